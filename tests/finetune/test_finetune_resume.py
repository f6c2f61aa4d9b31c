"""What a fine-tuning goes on from, and what it refuses to; the kills are in test_training_kills.py."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pulse_windows import RATE, encoder, labelled, pulses

from normwear_fast.checkpoint import CHECKPOINT_FILE, locked
from normwear_fast.cli.main import main
from normwear_fast.errors import InputError, OutputError
from normwear_fast.finetune import (
    FineTuner,
    FineTuneSettings,
    LabelledWindows,
    Predictor,
    predictor,
    resume,
)
from normwear_fast.finetune.stage import Stage
from normwear_fast.pretrain import checkpoint as pretraining

SETTINGS = FineTuneSettings(
    mode="full", epochs=2, batch_size=12, seed=3, validation=0.25, patience=2
)


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


def tuner(
    settings: FineTuneSettings = SETTINGS, model: Any = None, said: list[str] | None = None
) -> FineTuner:
    tell = (lambda line: None) if said is None else said.append
    return FineTuner(model or encoder(), settings, device="cpu", precision="float32", progress=tell)


def killed_at(step: str, count: int, folder: Path, patch: pytest.MonkeyPatch, **how: Any) -> None:
    """A run into ``folder`` that ends at the count-th step of a stage, after a checkpoint each."""
    seen: list[str] = []
    take = Stage.step

    def counted(self: Stage, index: Any) -> float:
        seen.append(self.name)
        if seen.count(step) == count:
            raise Killed
        return take(self, index)

    with patch.context() as context:
        context.setattr(Stage, "step", counted)
        context.setattr(resume, "LEAST_SECONDS", 0)
        context.setattr(resume, "TIMES_ITS_WRITING", 0)
        overwrite = how.pop("overwrite", False)
        data = how.pop("data", None) or labelled()
        with pytest.raises(Killed):
            tuner(**how).fit(data, folder, overwrite=overwrite)


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run killed while its encoder was trained."""
    folder = tmp_path_factory.mktemp("begun") / "run"
    killed_at("full", 3, folder, pytest.MonkeyPatch())
    assert [path.name for path in folder.iterdir()] == [CHECKPOINT_FILE]
    return folder


def other_windows() -> LabelledWindows:
    data = labelled()
    data.windows[5] = data.windows[5].copy()
    data.windows[5][1, 7] += 1e-6
    return data


def other_labels() -> LabelledWindows:
    windows, labels, _, who = pulses()
    labels[0] = "fast"
    return LabelledWindows.from_arrays(windows, labels, RATE, subjects=who)


def other_people() -> LabelledWindows:
    windows, labels, _, who = pulses()
    return LabelledWindows.from_arrays(windows, labels, RATE, subjects=[f"new {w}" for w in who])


def fewer() -> LabelledWindows:
    windows, labels, _, who = pulses()
    return LabelledWindows.from_arrays(windows[:-1], labels[:-1], RATE, subjects=who[:-1])


@pytest.mark.parametrize(
    ("how", "data", "said"),
    [
        ({"settings": replace(SETTINGS, seed=4)}, labelled, r"\(seed was 3, is 4\)"),
        ({"settings": replace(SETTINGS, epochs=3)}, labelled, r"\(epochs was 2, is 3\)"),
        ({"settings": replace(SETTINGS, mode="lora")}, labelled, r"\(mode was full, is lora\)"),
        (
            {"settings": replace(SETTINGS, learning_rate=0.1)},
            labelled,
            "learning_rate was None, is",
        ),
        ({"model": encoder(seed=1)}, labelled, r"\(weights_crc32 was \d+, is \d+\)"),
        ({}, other_windows, r"\(windows_crc32 was \d+, is \d+\)"),
        ({}, other_labels, r"\(labels_crc32 was \d+, is \d+\)"),
        ({}, other_people, r"\(labels_crc32 was \d+, is \d+\)"),
        ({}, fewer, "windows was 24, is 23; windows_crc32"),
        ({}, lambda: labelled(normalize="window"), "preparation.normalize was none, is window"),
    ],
)
def test_another_run_is_refused_and_named(how: Any, data: Any, said: str, begun: Path) -> None:
    before = (begun / CHECKPOINT_FILE).read_bytes()
    with pytest.raises(OutputError, match=said) as refused:
        tuner(**how).fit(data(), begun)
    assert str(refused.value).startswith(f"{begun}: holds another run (")
    assert str(refused.value).endswith("give its settings, another folder, or --overwrite")
    assert (begun / CHECKPOINT_FILE).read_bytes() == before


def test_settings_and_channels_may_be_of_numpys_types(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which a checkpoint that runs nothing does not hold."""
    settings = replace(SETTINGS, mode="head", seed=np.int64(3), learning_rate=np.float64(1e-3))  # type: ignore[arg-type]
    data = labelled(channels=np.array(["ECG", "PPG"]))
    killed_at("head", 3, tmp_path / "run", monkeypatch, settings=settings, data=data)
    said: list[str] = []
    tuner(settings, said=said).fit(data, tmp_path / "run")
    assert said[1] == "going on: head, epoch 2, after 0 of its steps"
    Predictor.from_pretrained(tmp_path / "run")


def test_data_that_are_refused_leave_the_run_that_was_to_be_overwritten(begun: Path) -> None:
    before = (begun / CHECKPOINT_FILE).read_bytes()
    data = labelled()
    data.subjects[:] = "one"
    with pytest.raises(InputError, match="one subject only"):
        tuner().fit(data, begun, overwrite=True)
    assert (begun / CHECKPOINT_FILE).read_bytes() == before


def test_a_run_of_the_same_folder_at_once_is_refused(begun: Path) -> None:
    with locked(begun), pytest.raises(OutputError, match="another run is writing it"):
        tuner().fit(labelled(), begun)
    found = tuner(replace(SETTINGS, mode="head")).fit(labelled())
    with locked(begun), pytest.raises(OutputError, match="another run is writing it"):
        found.save_pretrained(begun, overwrite=True)
    assert (begun / CHECKPOINT_FILE).exists()


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3000])


def foreign(path: Path) -> None:
    torch.save({"state_dict": {}}, path)


def test_a_checkpoint_of_another_version_is_refused(begun: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(begun, folder)
    state = torch.load(folder / CHECKPOINT_FILE, weights_only=True)
    torch.save({**state, "format": "normwear-fast finetune 9"}, folder / CHECKPOINT_FILE)
    said = "not a checkpoint of this version of finetune; choose another folder, or"
    with pytest.raises(OutputError, match=said):
        tuner().fit(labelled(), folder)


def of_pretrain(path: Path) -> None:
    torch.save({"format": "normwear-fast pretrain 1", "identity": {}}, path)


@pytest.mark.parametrize("damage", [truncated, foreign, of_pretrain])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_checkpoint_that_is_none_of_ours_is_kept_and_refused(
    damage: Any, overwrite: bool, begun: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(begun, folder)
    damage(folder / CHECKPOINT_FILE)
    before = (folder / CHECKPOINT_FILE).read_bytes()
    with pytest.raises(
        OutputError, match=r"checkpoint\.pt: not a checkpoint of finetune, or damaged"
    ):
        tuner().fit(labelled(), folder, overwrite=overwrite)
    assert (folder / CHECKPOINT_FILE).read_bytes() == before


@pytest.mark.parametrize(
    "part", ["head", "finite", "history", "progress", "parameters", "kept", "optimizer", "shape"]
)
def test_a_checkpoint_without_a_part_is_one_line(part: str, begun: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(begun, folder)
    state = torch.load(folder / CHECKPOINT_FILE, weights_only=True)
    if part == "shape":
        state["progress"]["kept"][3] = torch.zeros(1)
    else:
        del (state if part in state else state["progress"])[part]
    torch.save(state, folder / CHECKPOINT_FILE)
    with pytest.raises(OutputError, match=r"checkpoint\.pt: (is damaged|does not fit this run)"):
        tuner().fit(labelled(), folder)


def test_embeddings_are_not_made_again_once_the_head_is_trained(
    begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(begun, tmp_path / "run")
    embedded: list[int] = []
    embed = FineTuner._embed

    def counted(self: FineTuner, model: Any, windows: Any, *arguments: Any) -> None:
        embedded.append(len(windows))
        embed(self, model, windows, *arguments)

    monkeypatch.setattr(FineTuner, "_embed", counted)
    found = tuner().fit(labelled(), tmp_path / "run")
    assert embedded == [found.description["data"]["windows"]["validation"]]


def test_embeddings_are_held_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a large cohort are larger than its windows."""
    held: list[Any] = []
    fit_head, save = FineTuner._fit_head, resume.Checkpoint.save

    def fitted(self: FineTuner, head: Any, embeddings: Any, made: Any, run: Any) -> None:
        assert np.shares_memory(embeddings, made)
        assert all(np.shares_memory(made, rows) for rows in held)
        fit_head(self, head, embeddings, made, run)

    def saved(self: Any, folder: Path, state: Any) -> None:
        if state["stage"] == "encoding":
            rows = state["embeddings"]
            assert rows.untyped_storage().nbytes() == rows.nbytes  # all of it is written
            held.append(rows.numpy())
        save(self, folder, state)

    monkeypatch.setattr(FineTuner, "_fit_head", fitted)
    monkeypatch.setattr(resume.Checkpoint, "save", saved)
    monkeypatch.setattr(resume, "LEAST_SECONDS", 0)
    tuner(replace(SETTINGS, mode="head")).fit(labelled(), tmp_path / "run")
    assert held


def without_value(which: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of which the model has no finite embedding."""
    embed = FineTuner._embed

    def spoiled(self: FineTuner, model: Any, windows: Any, made: Any, *arguments: Any) -> None:
        embed(self, model, windows, made, *arguments)
        if len(windows) == 24:
            made[which] = np.nan

    monkeypatch.setattr(FineTuner, "_embed", spoiled)


def test_a_window_without_a_value_is_left_out_by_a_run_that_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = labelled()
    without_value(4, monkeypatch)
    killed_at("full", 3, tmp_path / "run", monkeypatch, data=data)
    found = tuner().fit(data, tmp_path / "run")
    whole = tuner().fit(data)
    assert found.description == whole.description
    assert sum(found.description["data"]["skipped"].values()) == 1


def test_a_short_run_writes_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> None:
        pytest.fail("a checkpoint of seconds")

    monkeypatch.setattr(resume.Checkpoint, "save", fail)
    settings = replace(SETTINGS, mode="head")
    tuner(settings).fit(labelled(), tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    with pytest.raises(OutputError, match="run: exists; choose another folder, or --overwrite"):
        tuner(settings).fit(labelled(), tmp_path / "run")


def test_checkpoints_take_a_twentieth_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    written: list[float] = []

    def save(self: Any, folder: Path, state: Any) -> None:
        written.append(clock[0])
        clock[0] += 3.0

    monkeypatch.setattr(resume.Checkpoint, "save", save)
    monkeypatch.setattr(resume.time, "monotonic", lambda: clock[0])
    keeper = resume.Keeper(Path("run"), {})
    for _ in range(200):
        clock[0] += 1.0
        keeper.offer(dict, False)
    assert written[:3] == [10.0, 73.0, 136.0]
    keeper.offer(dict, True)
    keeper.offer(dict, True)
    assert len(written) == 5  # at the stop, and none after it


def test_a_run_that_is_refused_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = labelled()
    without_value(slice(None), monkeypatch)
    with pytest.raises(InputError, match="no window has a finite embedding"):
        tuner().fit(data, tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_a_model_moved_aside_by_a_killed_run_comes_back(tmp_path: Path) -> None:
    """Killed between two renames, with somebody's notes in the folder."""
    found = tuner(replace(SETTINGS, mode="head")).fit(labelled(), tmp_path / "run")
    (tmp_path / "run" / "notes.txt").write_text("mine")
    (tmp_path / "run").rename(tmp_path / ".run.old")
    with pytest.raises(OutputError, match="run: exists"):
        found.save_pretrained(tmp_path / "run")
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"
    shutil.copytree(tmp_path / "run", tmp_path / ".run.old")
    (tmp_path / "run" / "notes.txt").unlink()
    found.save_pretrained(tmp_path / "run", overwrite=True)
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_run_killed_between_two_renames_is_not_begun_anew(begun: Path, tmp_path: Path) -> None:
    shutil.copytree(begun, tmp_path / ".run.old")
    said: list[str] = []
    tuner(said=said).fit(labelled(), tmp_path / "run")
    assert said[0].startswith("going on: full, epoch ")
    (tmp_path / "run").rename(tmp_path / ".run.old")
    (tmp_path / "run").mkdir()  # by whom the missing folder surprised
    with pytest.raises(OutputError, match="run: exists; choose another folder"):
        tuner().fit(labelled(), tmp_path / "run")
    Predictor.from_pretrained(tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_who_looks_between_two_renames_leaves_them_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another command for the same folder, which would take them for a killed run's."""
    found = tuner(replace(SETTINGS, mode="head")).fit(labelled(), tmp_path / "run")
    rename = Path.rename

    def seen(self: Path, target: Path) -> Path:
        renamed = rename(self, target)
        if target.name == ".run.old":
            predictor.check_output(tmp_path / "run", overwrite=False, going_on=True)
        return renamed

    monkeypatch.setattr(Path, "rename", seen)
    found.save_pretrained(tmp_path / "run", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    Predictor.from_pretrained(tmp_path / "run")


def test_a_mount_is_refused_before_the_training(tmp_path: Path) -> None:
    """Nothing takes its name, as a container's /out."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(tmp_path)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        with pytest.raises(OutputError, match=r"is a mount, .* name a folder in it"):
            predictor.check_output(tmp_path, overwrite=False)
        predictor.check_output(tmp_path / "run", overwrite=False)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_folder_that_may_not_be_looked_into_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(path: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    for patched, name in ((Path, "exists"), (os, "listdir")):
        for check in (predictor.check_output, pretraining.check_output):
            with monkeypatch.context() as patch:
                patch.setattr(patched, name, refused)
                with pytest.raises(OutputError, match=r"folder \(Permission denied\)"):
                    check(tmp_path, overwrite=False)


def test_ctrl_c_of_an_encoding_that_is_not_kept_comes_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As in a notebook, where a second one would end the kernel."""
    reached: list[str] = []

    def encode(self: Any, *arguments: Any, **options: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        reached.append("the end of a work unit")

    monkeypatch.setattr("normwear_fast.model.FastNormWear.encode", encode)
    with pytest.raises(KeyboardInterrupt):
        tuner().fit(labelled())
    assert not reached


def test_a_saved_model_does_not_take_the_place_of_an_unfinished_run(
    begun: Path, tmp_path: Path
) -> None:
    found = tuner(replace(SETTINGS, mode="head")).fit(labelled())
    shutil.copytree(begun, tmp_path / "run")
    with pytest.raises(OutputError, match="run: exists"):
        found.save_pretrained(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    found.save_pretrained(tmp_path / "empty")  # nothing is lost there


def test_the_command_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    windows, labels, _, _ = pulses(8, 2)
    half = {"x_train": np.stack(windows), "y_train": np.array(labels)}
    half |= {"x_test": half["x_train"][::3], "y_test": half["y_train"][::3]}
    np.savez(tmp_path / "set.npz", sampling_rate=RATE, **half)
    encoder().save_pretrained(tmp_path / "weights")
    command = ["finetune", str(tmp_path / "set.npz"), "--weights", str(tmp_path / "weights")]
    command += ["--output", str(tmp_path / "run"), "--precision", "float32", "--epochs", "3"]
    step, taken = Stage.step, []

    def interrupted(self: Stage, index: Any) -> float:
        taken.append(1)
        if len(taken) == 1:
            signal.raise_signal(signal.SIGINT)
        return step(self, index)

    monkeypatch.setattr(Stage, "step", interrupted)
    assert main(command) == 130
    out = capsys.readouterr().out
    assert "stopped in epoch 1; this is the best so far; the same command goes on" in out
    stopped = json.loads((tmp_path / "run" / "finetune.json").read_text())
    assert stopped["training"]["interrupted"]
    assert main([*command, "--seed", "7"]) == 2
    assert "holds another run (seed was 0, is 7)" in capsys.readouterr().err
    taken.clear()
    assert main([*command, "--overwrite"]) == 130
    out = capsys.readouterr().out
    assert "this is the best so far; the same command without --overwrite goes on" in out
    assert main(command) == 0
    assert "going on: head, epoch" in capsys.readouterr().err
    assert not (tmp_path / "run" / CHECKPOINT_FILE).exists()
    ended = json.loads((tmp_path / "run" / "finetune.json").read_text())
    assert not ended["training"]["interrupted"]
    assert ended["training"]["epochs_run"] == 3


def test_a_folder_by_another_name_is_replaced_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a link, which stays one; and as the working folder."""
    found = tuner(replace(SETTINGS, mode="head")).fit(labelled())
    (tmp_path / "disk" / "run").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "run")
    looked_at: list[Path] = []
    with monkeypatch.context() as patch:
        patch.setattr(predictor, "check_writable", looked_at.append)
        predictor.check_output(tmp_path / "link", overwrite=False)
    assert looked_at == [tmp_path / "link", tmp_path / "disk"]  # where names change
    for _ in range(2):
        found.save_pretrained(tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["run"]
    Predictor.from_pretrained(tmp_path / "link")
    monkeypatch.chdir(tmp_path / "disk" / "run")
    with pytest.raises(OutputError, match=r"^\.: exists; choose another folder"):
        found.save_pretrained(".")
    found.save_pretrained(".", overwrite=True)
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["run"]
    Predictor.from_pretrained(tmp_path / "link")
