"""The words of tasks and labels: of every published task, by name or number, and bad ones named."""

from __future__ import annotations

from pathlib import Path

import pytest

from normwear_fast.errors import InputError, UsageError
from normwear_fast.zeroshot import WORDING, load_wording


def test_every_published_task_has_words() -> None:
    registry = pytest.importorskip("normwear_fast.evaluate.registry")
    expected: dict[str, tuple[str, ...]] = {}
    for key, dataset in registry.DATASETS.items():
        for task in dataset.tasks:
            names = task.targets if len(task.targets) > 1 else (task.name,)
            expected |= {f"{key}/{name}": task.classes for name in names}
    assert {name: tuple(words.classes) for name, words in WORDING.items()} == expected
    for words in WORDING.values():
        labels = list(words.classes) or ["120"]
        assert words.held_out_question() not in words.training_questions()
        trained = {sentence for label in labels for sentence in words.training_answers(label)}
        held_out = {words.held_out_answer(label) for label in labels}
        assert not trained & held_out
        assert len(held_out) == len(labels)
        assert all("{" not in sentence for sentence in trained | held_out)


def test_labels_are_found_by_name_index_and_number() -> None:
    words = WORDING["wesad/stress"]
    assert [words.label(x) for x in ("stress", 1, "1")] == ["stress"] * 3
    with pytest.raises(InputError, match="none of baseline, stress, amusement"):
        words.label("3")
    assert WORDING["noninvasive-bp/systolic"].label(119.7) == "120"
    assert "120 mmHg" in WORDING["noninvasive-bp/systolic"].held_out_answer("120")
    with pytest.raises(InputError, match="no number"):
        WORDING["noninvasive-bp/systolic"].label("high")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "object of tasks"),
        ("{", "not readable as JSON"),
        (
            '{"a": {"questions": ["q?"], "frames": ["f"], "unit": "Hz"}}',
            "every frame must hold one",
        ),
        ('{"a": {"questions": [], "frames": ["{}"], "unit": "Hz"}}', "questions must be a list"),
        ('{"a": {"questions": ["q?"], "frames": ["{}"]}}', "needs classes, or a unit"),
        (
            '{"a": {"questions": ["q?"], "frames": ["{}"], "classes": {"x": "y"}}}',
            "x must be a list",
        ),
        ('{"a": {"question": ["q?"]}}', "must be an object of classes"),
    ],
)
def test_bad_wording_is_named(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "w.json"
    path.write_text(content)
    with pytest.raises(UsageError, match=message):
        load_wording(path)
