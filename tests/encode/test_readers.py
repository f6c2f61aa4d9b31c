"""Reader processes and the stages of a run: what hangs, dies or is too large ends only a reader."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import awkward
import encode_runs as common
import numpy as np
import pytest

from normwear_fast.encode import load_embeddings, local, pipeline, readers
from normwear_fast.encode.prepare import Job, PreparedUnit
from normwear_fast.encode.windows import Extractor, Tiling
from normwear_fast.errors import RecordingError
from normwear_fast.recordings import open_recording
from normwear_fast.recordings.base import Recording


@pytest.fixture
def awkward_readers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "_serve", awkward.serve)
    monkeypatch.setattr(readers, "STALL_SECONDS", 1.0)
    monkeypatch.setattr(readers, "MEMORY_BYTES", 2**30)


def make_awkward(folder: Path, *words: str) -> Path:
    folder.mkdir()
    for i, text in enumerate(words):
        (folder / f"{i}_{text.replace(' ', '_')}.awkward").write_text(
            "ok -1" if text.startswith("good") else text
        )
    return folder


STALLED, DIED = "nothing came of reading it for 1 s", "its reader process died (SIGKILL)"


@pytest.mark.usefixtures("awkward_readers")
@pytest.mark.parametrize(
    ("unit_tokens", "bad"),
    [
        (700, {"sleep 2": STALLED, "memory 3": "reading it takes more than 1 GiB of memory"}),
        (100_000, {"die 0": DIED, "open sleep": STALLED}),
    ],
    ids=["cut by itself", "in one unit with others"],
)
def test_what_a_recording_does_to_its_reader_costs_only_that_recording(
    unit_tokens: int, bad: dict[str, str], tmp_path: Path
) -> None:
    words = ["good"]
    for what in bad:
        words += [what, "good"]
    folder = make_awkward(tmp_path / "in", *words)
    settings = replace(common.SETTINGS, unit_tokens=unit_tokens)
    summary = common.run(folder, tmp_path / "out", settings, workers=2)
    names = {what: f"{words.index(what)}_{what.replace(' ', '_')}" for what in bad}
    assert summary.failed == {
        name: f"{folder / name}.awkward: {bad[what]}" for what, name in names.items()
    }
    assert summary.units_done == summary.units
    table = load_embeddings(tmp_path / "out")
    assert (table.status == "ok").all()
    counts = table.recording.value_counts()
    assert [counts[f"{i}_good"] for i in (0, 2, 4)] == [20, 20, 20]
    if unit_tokens == 700:  # what was whole before it went wrong is kept
        assert all(0 < counts[name] < 20 for name in names.values())
    else:
        assert set(counts.index) == {"0_good", "2_good", "4_good"}


@pytest.mark.usefixtures("awkward_readers")
def test_a_passing_fault_costs_nothing(tmp_path: Path) -> None:
    """A reader killed in mid-recording, once: another takes over from the unit it was at."""
    folder = make_awkward(tmp_path / "in", "good", "die 2 once mark")
    summary = common.run(folder, tmp_path / "out", workers=1)
    assert summary.failed == {}
    assert (tmp_path / "in" / "mark").exists()
    common.run(folder, tmp_path / "again")
    assert common.rows(tmp_path / "out") == common.rows(tmp_path / "again")


@pytest.mark.parametrize("extension", ["csv", "edf", "hea", "npz", "vhdr", "fif"])
def test_a_pipe_is_no_recording(extension: str, cohort_folder: Path, tmp_path: Path) -> None:
    """Opening one would wait for ever, in the search, the survey or a resumed run."""
    folder = cohort_folder
    os.mkfifo(folder / f"x.{extension}")
    for _ in range(2):
        summary = common.run(folder, tmp_path / "out")
        assert summary.failed == {"x": f"{folder}/x.{extension}: is no regular file"}


@pytest.fixture
def cohort_folder(tmp_path: Path) -> Path:
    return common.make_cohort(tmp_path / "in")


def test_readers_end_with_a_run_that_is_killed(tmp_path: Path) -> None:
    """Even one that hangs, and would not notice that its pipe is closed."""
    folder = make_awkward(tmp_path / "in", "sleep 0 once begun")
    pid = os.fork()
    if pid == 0:
        readers._serve = awkward.serve
        begin = readers._Reader.begin

        def tell(self: Any, *args: Any) -> None:
            begin(self, *args)
            (tmp_path / "pid").write_text(str(self.process.pid))

        readers._Reader.begin = tell  # type: ignore[method-assign]
        source = pipeline.Source("x", str(next(folder.iterdir())), ("S",), Tiling(2.0, 2.0, 4))
        job = Job((source,), (pipeline.JobUnit(0, ((0, 0, 4),)),))
        for _ in readers.prepared_units(iter([job]), common.SETTINGS, 1, lambda: False):
            pass
        os._exit(0)
    try:
        wait_until((folder / "begun").exists)
        reader = int((tmp_path / "pid").read_text())
        assert Path(f"/proc/{reader}").exists()
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    wait_until(lambda: not alive(reader))


def alive(pid: int) -> bool:
    """A zombie that nobody has waited for is dead."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition: Any, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


# --- stages ------------------------------------------------------------------------------------------


def test_what_waits_is_bounded_by_bytes() -> None:
    waiting: local.Waiting[int] = local.Waiting(limit=100, least=1)
    taken: list[int] = []
    largest = 0

    def make() -> None:
        for i in range(50):
            assert waiting.put(i, 30)
        waiting.end()

    maker = threading.Thread(target=make)
    maker.start()
    time.sleep(0.05)
    while (item := waiting.get()) is not None:
        largest = max(largest, waiting._bytes)
        taken.append(item)
    maker.join()
    assert taken == list(range(50))
    assert 0 < largest <= 100 + 30


def test_one_larger_than_the_bound_still_passes() -> None:
    waiting: local.Waiting[str] = local.Waiting(limit=10, least=1)
    assert waiting.put("large", 1000)
    blocked = threading.Thread(target=waiting.put, args=("next", 1))
    blocked.start()
    blocked.join(0.1)
    assert blocked.is_alive()
    assert waiting.get() == "large"
    blocked.join(5)
    assert waiting.get() == "next"
    waiting.close()
    assert not waiting.put("late", 1)
    assert waiting.get() is None


def test_device_works_while_the_next_is_read_and_the_last_written(
    cohort_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second unit is being encoded while the first is handed on and the third is prepared: each
    stage waits for the others, so that a run in which they took turns would not end."""
    monkeypatch.setattr(local, "RESULT_BYTES", 2**20)
    together = threading.Barrier(3, timeout=20)
    met = {name: iter([True]) for name in ("read", "encode", "write")}

    def meet(name: str) -> None:
        if next(met[name], False):
            together.wait()

    encode, prepare, add = local.encode_prepared, readers.prepare_job, pipeline._Run._add
    count = {"encode": 0, "read": 0}

    def encoding(*args: Any) -> Any:
        count["encode"] += 1
        if count["encode"] == 2:
            meet("encode")
        return encode(*args)

    def preparing(*args: Any) -> Iterator[PreparedUnit]:
        for unit in prepare(*args):
            count["read"] += 1
            if count["read"] == 3:
                meet("read")
            yield unit

    def adding(self: Any, *args: Any) -> None:
        meet("write")
        add(self, *args)

    monkeypatch.setattr(local, "encode_prepared", encoding)
    monkeypatch.setattr(readers, "prepare_job", preparing)
    monkeypatch.setattr(pipeline._Run, "_add", adding)
    summary = common.run(cohort_folder, tmp_path / "out")
    assert summary.units_done == summary.units > 3
    assert not any(next(left, False) for left in met.values())


@pytest.mark.parametrize("where", ["encode", "read"])
def test_an_error_in_a_stage_ends_the_run_and_keeps_what_is_whole(
    where: str, cohort_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    threads = threading.active_count()
    encoded = threading.Event()
    encode, read = local.encode_prepared, readers.prepare_job

    def encoding(*args: Any) -> Any:
        if where == "encode":
            fail_at_the_third()
        embeddings = encode(*args)
        encoded.set()
        return embeddings

    def reading(*args: Any) -> Any:
        if where == "read":
            fail_at_the_third()
        return read(*args)

    def fail_at_the_third() -> None:
        calls.append(1)
        if len(calls) == 3:
            assert encoded.wait(60)  # a run that fails before anything is encoded keeps nothing
            raise RuntimeError("broken")

    monkeypatch.setattr(local, "encode_prepared", encoding)
    monkeypatch.setattr(readers, "prepare_job", reading)
    with pytest.raises(RuntimeError, match="broken"):
        common.run(cohort_folder, tmp_path / "out")
    monkeypatch.undo()
    kept = len(load_embeddings(tmp_path / "out"))
    assert kept > 0
    common.run(cohort_folder, tmp_path / "out")
    common.run(cohort_folder, tmp_path / "undisturbed")
    assert common.rows(tmp_path / "out") == common.rows(tmp_path / "undisturbed")
    assert threading.active_count() <= threads


def test_stage_times_are_told(cohort_folder: Path, tmp_path: Path) -> None:
    summary = common.run(cohort_folder, tmp_path / "out")
    assert all(summary.seconds[stage] > 0 for stage in ("read", "prepare", "encode", "write"))
    assert summary.device_busy == summary.seconds["encode"] / summary.seconds["wall"] < 1
    again = common.run(cohort_folder, tmp_path / "out")
    assert again.device_busy == 0  # it had nothing to do


# --- from a place on ---------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [0.4, 3.0])
def test_blocks_from_a_place_are_the_rest_of_the_whole(
    start: float, cohort_dir: Path, data_dir: Path, tmp_path: Path
) -> None:
    """Of every recording there is, in every format."""
    from normwear_fast.recordings import find_recordings
    from normwear_fast.recordings.base import first_sample

    np.save(tmp_path / "x.npy", np.random.default_rng(0).standard_normal((2, 1000)))
    common.make_cohort(tmp_path)
    formats = set()
    for item in find_recordings([cohort_dir, data_dir, tmp_path]):
        try:
            recording = open_recording(item.path, sampling_rate=None)
        except RecordingError:
            if item.path.suffix != ".npy":
                continue
            recording = open_recording(item.path, sampling_rate=65.0)
        with recording:
            some = list(range(len(recording.channels)))[:3]
            if not some or max(c.samples for c in recording.channels) > 2_000_000:
                continue
            try:
                whole = joined(recording, some, 0.0)
            except RecordingError:
                continue
            formats.add(recording.format[:3])
            rest = joined(recording, some, min(start, recording.duration / 2))
            for c, all_of_it, part in zip(some, whole, rest, strict=True):
                first = first_sample(recording.channels[c], min(start, recording.duration / 2))
                np.testing.assert_array_equal(part, all_of_it[first:])
    assert formats >= {"WFD", "EDF", "NPY", "NPZ"}


def joined(recording: Recording, channels: list[int], start: float) -> list[np.ndarray]:
    blocks = list(recording.blocks(channels, 7.0, start))
    return [np.concatenate([block[i] for block in blocks]) for i in range(len(channels))]


def test_a_resumed_run_goes_to_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The samples before the first window wanted are not asked for."""
    np.save(tmp_path / "x.npy", np.random.default_rng(0).standard_normal((1, 65 * 600)))
    asked = []
    after = Recording.blocks

    def blocks(self: Recording, channels: Any, seconds: float = 60.0, start: float = 0.0) -> Any:
        asked.append(start)
        return after(self, channels, seconds, start)

    monkeypatch.setattr(Recording, "blocks", blocks)
    with open_recording(tmp_path / "x.npy", sampling_rate=65.0) as recording:
        extractor = Extractor(recording, [0], start=500.0)
        ((channel,),) = extractor.extract([pipeline.Tiling(6.0, 6.0, 100)[90]])
        np.testing.assert_array_equal(
            channel.samples, np.load(tmp_path / "x.npy")[0, 540 * 65 : 546 * 65]
        )
    assert asked == [500.0]
