"""Trainings killed with SIGKILL: the same command ends in the same bits, and nothing is left behind."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from training_kills import DONE, REFUSED, STOPPED, Runs, result

pytest.importorskip("lightning_fabric")
pytest.importorskip("peft")

SETTINGS: dict[str, Any] = {
    "epochs": 4,
    "batch_size": 12,
    "seed": 3,
    "validation": 0.25,
    "patience": 2,
}
TUNINGS: dict[str, dict[str, Any]] = {
    "head": {"settings": {**SETTINGS, "mode": "head"}},
    "targets": {"settings": {**SETTINGS, "mode": "head"}, "regression": True},
    "full": {"settings": {**SETTINGS, "mode": "full", "learning_rate": 3e-3}},
    "lora": {"settings": {**SETTINGS, "mode": "lora", "learning_rate": 1e-2}},
}


@pytest.fixture(scope="module")
def runs() -> Iterator[Runs]:
    runs = Runs()
    yield runs
    runs.close()


@pytest.fixture(scope="module")
def whole(
    runs: Runs, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], dict[str, bytes]]:
    """What a fine-tuning leaves that nobody disturbs, and that writes no checkpoint."""

    @cache
    def found(tuning: str) -> dict[str, bytes]:
        output = tmp_path_factory.mktemp("whole") / "out"
        ended = runs("finetune", output, keep=False, **TUNINGS[tuning])
        assert ended["status"] == DONE, ended["said"]
        assert names(output.parent) == {"out"}
        return result(output)

    return found


Whole = Callable[[str], dict[str, bytes]]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# --- fine-tuning -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tuning", "moments"),
    [
        # In the writing of a checkpoint; in a step; with the folder's old name gone, its new not there.
        ("head", [["fsync", 3], ["step of head", 7], ["os.rename .out.new", 0]]),
        ("targets", [["step of head", 4]]),
        ("full", [["step of head", 8], ["step of full", 3], ["os.rename .checkpoint.pt.tmp", 1]]),
        ("lora", [["step of lora", 3]]),
    ],
)
def test_a_killed_fine_tuning_goes_on_to_the_same_bits(
    tuning: str, moments: list[Any], runs: Runs, whole: Whole, tmp_path: Path
) -> None:
    how, output = TUNINGS[tuning], tmp_path / "out"
    for place, moment in enumerate(moments):
        killed = runs("finetune", output, moment=moment, **how)
        assert killed["status"] == -signal.SIGKILL, killed["said"]
        assert any(line.startswith("going on: ") for line in killed["said"]) == (place > 0)
        assert "finetune.json" not in result(output) if output.exists() else True
    ended = runs("finetune", output, **how)
    assert ended["status"] == DONE, ended["said"]
    assert result(output) == whole(tuning)
    assert names(tmp_path) == {"out"}


@pytest.mark.parametrize(
    ("tuning", "moment", "model"),
    [
        ("head", ["fsync", 3], False),
        ("full", ["step of head", 9], True),
        ("full", ["step of full", 3], True),
    ],
)
def test_ctrl_c_ends_cleanly_and_the_same_command_goes_on(
    tuning: str, moment: Any, model: bool, runs: Runs, whole: Whole, tmp_path: Path
) -> None:
    """While windows are encoded there is no model yet; later the best so far is one."""
    how, output = TUNINGS[tuning], tmp_path / "out"
    stopped = runs("finetune", output, moment=moment, signal=signal.SIGINT, **how)
    assert stopped["status"] == STOPPED, stopped["said"]
    assert "checkpoint.pt" in names(output)
    assert ("finetune.json" in names(output)) == model
    assert names(tmp_path) == {"out"}
    ended = runs("finetune", output, **how)
    assert ended["status"] == DONE, ended["said"]
    assert result(output) == whole(tuning)


def test_an_overwrite_that_is_killed_leaves_the_model_and_no_old_checkpoint(
    runs: Runs, tmp_path: Path
) -> None:
    how, output = TUNINGS["head"], tmp_path / "out"
    other = {"settings": {**how["settings"], "seed": 4}}
    runs("finetune", output, moment=["step of head", 5], **how)
    assert names(output) == {"checkpoint.pt"}
    killed = runs("finetune", output, moment=["open .checkpoint.pt.tmp", 0], overwrite=True, **how)
    assert killed["status"] == -signal.SIGKILL
    assert names(output) == set()
    anew = runs("finetune", output, **how)
    assert anew["status"] == DONE
    assert anew["said"][0] == "encoding 24 windows once"
    before = result(output)
    runs("finetune", output, moment=["step of head", 5], overwrite=True, **other)
    found = result(output)
    assert found.pop("checkpoint.pt")
    assert found == before  # the model stays until the new one is whole
    assert runs("finetune", output, **how)["said"][-1].startswith(
        f"error: {output}: holds another run"
    )
    assert runs("finetune", output, **other)["status"] == DONE
    assert names(tmp_path) == {"out"}
    assert result(output).keys() == before.keys()
    assert result(output)["head.safetensors"] != before["head.safetensors"]


@pytest.mark.torture
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("tuning", list(TUNINGS))
def test_a_fine_tuning_killed_at_any_moment(
    tuning: str, runs: Runs, whole: Whole, tmp_path: Path
) -> None:
    """Every moment of a run, but every tenth of those before its encoder trains, which are the head's;
    and a random one of what goes on from it."""
    how, chance = TUNINGS[tuning], random.Random(2026)
    wanted = whole(tuning)
    seen = runs("finetune", tmp_path / "seen" / "out", **how)["moments"]
    count = len(seen)
    first = next((i for i, name in enumerate(seen) if name == f"step of {tuning}"), 0)
    if tuning == "head":
        first = 0
    for moment in [*range(0, first, 10), *range(first, count)]:
        output = tmp_path / f"{moment}" / "out"
        killed = runs("finetune", output, moment=moment, **how)
        assert killed["status"] == -signal.SIGKILL, (moment, killed["said"])
        where = f"killed at {moment}, {seen[moment]}"
        again = runs("finetune", output, moment=chance.randrange(count), **how)
        if again["status"] == REFUSED:  # all was done but the clearing up
            assert "exists; choose another folder" in again["said"][-1], where
        elif again["status"] != DONE:
            again = runs("finetune", output, **how)
            assert again["status"] in (DONE, REFUSED), (where, again["said"])
        assert result(output) == wanted, where
        assert names(tmp_path / f"{moment}") == {"out"}, where


# --- pretraining -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "moment", [["step", 0], ["os.remove checkpoint.pt", 0], ["os.remove model.safetensors", 0]]
)
def test_an_overwrite_of_a_pretraining_killed_before_its_first_checkpoint(
    moment: Any, runs: Runs, tmp_path: Path
) -> None:
    """Nothing of the old run is gone on with; before its checkpoint is removed, all of it is there."""
    output = tmp_path / "out"
    assert runs("pretrain", output, moment=["step", 3])["status"] == -signal.SIGKILL
    before = result(output)
    killed = runs("pretrain", output, moment=moment, overwrite=True)
    assert killed["status"] == -signal.SIGKILL, killed["said"]
    if moment[0] == "os.remove checkpoint.pt":
        assert result(output) == before
        return
    assert "checkpoint.pt" not in names(output)
    again = runs("pretrain", output)
    if moment[0] == "os.remove model.safetensors":
        assert "but no checkpoint.pt to go on from" in again["said"][-1]
        again = runs("pretrain", output, overwrite=True)
    assert again["status"] == DONE, again["said"]
    assert not any(line.startswith("going on") for line in again["said"])
    assert len(result(output)["steps.csv"]) > len(before["steps.csv"])
