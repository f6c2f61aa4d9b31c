"""Splits by subject: nobody in two parts, every class in training, and what cannot be split."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pulse_windows import RATE, encoder, pulses

from normwear_fast.errors import InputError
from normwear_fast.finetune import FineTuner, LabelledWindows
from normwear_fast.finetune.split import Split, split_windows


@pytest.mark.parametrize("seed", range(5))
def test_no_subject_is_in_two_parts_and_every_class_in_training(seed: int) -> None:
    rng = np.random.default_rng(seed)
    count = 60
    subjects = rng.integers(0, 9, count)
    windows = rng.standard_normal((count, 1, 64))
    labels = np.where(rng.random(count) < 0.2, "rare", "frequent")
    labels[:2] = "rare", "frequent"
    who = [f"s{i}" for i in subjects]
    given = ["test" if i == 0 else "train" for i in subjects]
    data = LabelledWindows.from_arrays(windows, labels.tolist(), subjects=who, split=given)
    split = split_windows(data, 0.2, seed)
    parts = (split.train, split.validation, split.test)
    assert sorted(np.concatenate(parts).tolist()) == list(range(count))
    people = [set(data.subjects[part].tolist()) for part in parts]
    assert sum(map(len, people)) == len(set.union(*people))
    assert len(np.unique(data.labels[split.train])) == 2
    assert 0.05 < len(split.validation) / count < 0.4


def test_data_that_cannot_be_split_are_refused_before_they_are_encoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    windows, labels, _, _ = pulses(4, 1)
    data = LabelledWindows.from_arrays(windows, labels, RATE, subjects=["a"] * len(labels))
    said: list[str] = []
    tuner = FineTuner(encoder(), device="cpu", progress=said.append)
    monkeypatch.setattr(tuner.model, "encode", lambda *args, **options: pytest.fail("encoded"))
    with pytest.raises(InputError, match="one subject only"):
        tuner.fit(data)
    assert said == []


def test_a_split_that_cannot_be_is_named() -> None:
    windows, labels, _, _ = pulses(4, 1)
    arguments: dict[str, Any] = {"sampling_rate": RATE}

    def split(subjects: Any = None, given: Any = None, names: list[str] = labels) -> Split:
        data = LabelledWindows.from_arrays(
            windows, names, subjects=subjects, split=given, **arguments
        )
        return split_windows(data, 0.5, 0)

    with pytest.raises(InputError, match="one subject only"):
        split(["a"] * 4)
    with pytest.raises(InputError, match="'a' is in both train and validation"):
        split(["a", "a", "b", "c"], ["train", "validation", "train", "train"])
    with pytest.raises(InputError, match="'odd' is in validation only"):
        split(
            ["a", "b", "c", "d"], ["train", "train", "train", "validation"], ["x", "y", "x", "odd"]
        )
    with pytest.raises(InputError, match="no window is left to train on"):
        split(given=["test"] * 4)
    with pytest.raises(InputError, match="alone; two or more"):
        split(names=["x"] * 4)
    with pytest.raises(InputError, match="split is 'dev'"):
        split(given=["dev"] * 4)
    data = LabelledWindows.from_arrays(windows, labels, **arguments)
    split_windows(data, 0.5, 0)
    assert "no window names a subject" in data.notes[0]
