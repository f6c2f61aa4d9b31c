"""From recordings to a dataset: windows, work units, commits, resume, faults, and reading back."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from normwear_fast import FastNormWear, NormWearConfig
from normwear_fast.cli.main import main
from normwear_fast.encode import (
    EncodeSettings,
    Summary,
    encode_recordings,
    load_embeddings,
    local,
    pipeline,
    read_window_list,
    readers,
)
from normwear_fast.encode.output import METADATA_KEY, OutputFolder
from normwear_fast.encode.prepare import MISSING, TOO_LARGE, Job
from normwear_fast.encode.survey import file_state
from normwear_fast.encode.units import plan_units
from normwear_fast.encode.windows import Extractor, Tiling, Window
from normwear_fast.errors import OutputError, RecordingError, UsageError
from normwear_fast.preprocess import fill_missing, prepare_window, preprocess
from normwear_fast.pretrain.prepare import prepare_series
from normwear_fast.recordings.base import Channel, Recording, register

TINY = NormWearConfig(
    embed_dim=64, depth=2, num_heads=1, decoder_embed_dim=64, decoder_num_heads=1, decoder_depth=1
)
SETTINGS = EncodeSettings(window=2.0, batch_tokens=1000, unit_tokens=1500)
"""A unit is four windows of the two-channel recording: several units a recording."""


def models(threads: int | None = None, seed: int = 0) -> list[FastNormWear]:
    return [FastNormWear(True, config=TINY, precision="float32", seed=seed).freeze()]


def make_cohort(folder: Path) -> Path:
    """Ragged: 1 to 3 channels, other rates, other lengths, a gap, and small ones that share a unit."""
    rng = np.random.default_rng(7)
    for name, channels, rate, seconds in (
        ("a", 2, 65.0, 33.0),
        ("b", 1, 100.0, 9.0),
        ("c/d", 3, 30.0, 7.0),
        ("c/e", 2, 250.0, 12.5),
        ("f", 1, 64.0, 50.0),
    ):
        data = rng.standard_normal((channels, round(rate * seconds)))
        if name == "c/e":
            data[1, 600:1100] = np.nan
        path = folder / f"{name}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        names = np.array([f"S{i}" for i in range(channels)])
        np.savez(path, data=data, sampling_rate=rate, channels=names)
    return folder


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cohort(tmp_path_factory.mktemp("cohort"))


def run(cohort: Path, output: Path, settings: EncodeSettings = SETTINGS, **options: Any) -> Summary:
    load = options.pop("load_models", models)
    return encode_recordings([cohort], output, settings, load, **options)


def rows(output: Path) -> list[tuple[Any, ...]]:
    """Every row, embeddings as bytes, in the inputs' order."""
    table = load_embeddings(output)
    return [
        (*row[:4], tuple(row[4]), *row[5:7], None if row[7] is None else row[7].tobytes())
        for row in table.itertuples(index=False, name=None)
    ]


@pytest.fixture(scope="module")
def undisturbed(cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("output") / "out"
    summary = run(cohort, output)
    assert summary.exit_code == 0
    assert sorted(os.listdir(output)) == ["manifest.json", "part-000000.parquet"]
    return output


@pytest.fixture
def many_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every unit becomes a part of its own."""
    monkeypatch.setattr(pipeline, "PART_SECONDS", 0.0)


# --- windows ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("duration", "window", "hop", "count"),
    [
        (60, 6, 6, 10),
        (59.99, 6, 6, 9),
        (6, 6, 6, 1),
        (5.9, 6, 6, 0),
        (6.6, 6, 0.1, 7),
        (6, 6, 7, 1),
    ],
)
def test_tiling_counts_what_fits(duration: float, window: float, hop: float, count: int) -> None:
    tiling = Tiling.over(duration, window, hop)
    assert len(tiling) == count
    assert [w.start for w in tiling] == [k * hop for k in range(count)]


class Fake(Recording):
    """A recording in memory, whose file says nothing."""

    format = "fake"
    made: dict[str, tuple[tuple[Channel, ...], list[np.ndarray]]] = {}  # noqa: RUF012

    def __init__(self, path: Path, *, sampling_rate: float | None = None) -> None:
        self.path = path
        self.channels, self.data = self.made[path.stem]

    def _blocks(self, channels: list[int], seconds: float) -> Iterator[list[np.ndarray]]:
        done = [0] * len(channels)
        while any(len(self.data[c]) > d for c, d in zip(channels, done, strict=True)):
            block = []
            for i, c in enumerate(channels):
                step = max(1, round(seconds * self.channels[c].sampling_rate))
                block.append(self.data[c][done[i] : done[i] + step])
                done[i] += step
            yield block


def fake_recording(channels: Sequence[Channel], rng: np.random.Generator) -> Fake:
    data = [rng.standard_normal(channel.samples) for channel in channels]
    Fake.made["x"] = (tuple(channels), data)
    return Fake(Path("x.fake"))


def defined_window(channel: Channel, data: np.ndarray, window: Window) -> tuple[np.ndarray, float]:
    """A window's samples one by one, from the definition of which it owns."""
    first = math.ceil((window.start - channel.start) * channel.sampling_rate - 1e-6)
    stop = math.ceil(
        (window.start + window.duration - channel.start) * channel.sampling_rate - 1e-6
    )
    samples = [data[i] if 0 <= i < len(data) else np.nan for i in range(first, stop)]
    offset = channel.start + first / channel.sampling_rate - window.start
    return np.array(samples), max(offset, 0.0)


@settings(max_examples=60)
@given(st.data())
def test_extracted_windows_are_the_defined_ones(data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    channels = [
        Channel(
            f"S{i}",
            "",
            data.draw(st.sampled_from([4.0, 32.0, 65.0, 99.7])),
            data.draw(st.integers(1, 900)),
            data.draw(st.sampled_from([0.0, 0.37, 2.0])),
        )
        for i in range(data.draw(st.integers(1, 3)))
    ]
    recording = fake_recording(channels, rng)
    starts = data.draw(st.lists(st.floats(-3, 20), min_size=1, max_size=12).map(sorted))
    windows = [Window("", start, data.draw(st.floats(0.2, 9))) for start in starts]
    block = data.draw(st.sampled_from([0.3, 2.0, 60.0]))
    extractor = Extractor(recording, range(len(channels)), block)
    split = data.draw(st.integers(0, len(windows)))
    cut = [*extractor.extract(windows[:split]), *extractor.extract(windows[split:])]
    assert len(cut) == len(windows)
    for window, raw in zip(windows, cut, strict=True):
        for channel, values, got in zip(channels, recording.data, raw, strict=True):
            samples, offset = defined_window(channel, values, window)
            np.testing.assert_array_equal(got.samples, samples)
            assert got.rate == channel.sampling_rate
            assert got.offset == pytest.approx(offset, abs=1e-9)


def test_extraction_holds_no_more_than_blocks_and_windows() -> None:
    channel = Channel("S", "", 100.0, 600_000)
    recording = fake_recording([channel], np.random.default_rng(0))
    extractor = Extractor(recording, [0])
    largest = 0
    for raw in extractor.extract(Tiling.over(6000.0, 6.0, 6.0)[:]):
        assert len(raw[0].samples) == 600
        largest = max(largest, len(extractor._streams[0].buffer))
    assert largest <= 3 * 60 * 100


def test_recording_with_fewer_samples_than_declared_is_an_error() -> None:
    recording = fake_recording([Channel("S", "", 10.0, 100)], np.random.default_rng(0))
    recording.data[0] = recording.data[0][:70]
    with pytest.raises(RecordingError, match="S ends after 70 of its 100 samples"):
        list(Extractor(recording, [0]).extract(Tiling.over(10.0, 5.0, 5.0)[:]))


# --- work units ------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(1, 60)), max_size=12), st.integers(1, 300)
)
def test_units_hold_every_window_once_within_the_bound(
    recordings: list[tuple[int, int]], bound: int
) -> None:
    counts = [count for count, _ in recordings]
    uniform = plan_units(counts, lambda i, n: recordings[i][1], bound, lambda i, j: -1)
    one_by_one = plan_units(counts, lambda i, n: None, bound, lambda i, j: recordings[i][1])
    assert uniform == one_by_one
    seen = [
        (span.recording, j)
        for unit in uniform
        for span in unit.spans
        for j in range(span.first, span.stop)
    ]
    assert seen == [(i, j) for i, count in enumerate(counts) for j in range(count)]
    assert [unit.index for unit in uniform] == list(range(len(uniform)))
    for unit in uniform:
        tokens = sum((s.stop - s.first) * recordings[s.recording][1] for s in unit.spans)
        assert tokens <= bound or unit.windows == 1
        if len(unit.spans) > 1:
            assert all(s.stop - s.first == counts[s.recording] for s in unit.spans)


def test_units_do_not_depend_on_what_comes_later() -> None:
    each: Callable[[int, int], int] = lambda i, n: 10  # noqa: E731
    some = plan_units([3, 2, 50, 4], each, 100, each)
    more = plan_units([3, 2, 50, 4, 99], each, 100, each)
    assert more[: len(some)] == some


# --- rows ------------------------------------------------------------------------------------------


def test_embeddings_are_those_of_the_model(cohort: Path, tmp_path: Path) -> None:
    """Python's encode on the raw windows agrees; encode_unit on prepared ones to the bit."""
    plain = replace(SETTINGS, preprocess="none")
    run(cohort, tmp_path / "out", plain)
    table = load_embeddings(tmp_path / "out")
    model = models()[0]
    with np.load(cohort / "a.npz") as file:
        data = file["data"]
    windows = [data[:, k * 130 : (k + 1) * 130] for k in range(16)]
    got = table[table.recording == "a"]
    assert got.window_id.tolist() == [str(k) for k in range(16)]
    assert got.start_s.tolist() == [2.0 * k for k in range(16)]
    np.testing.assert_allclose(
        np.stack(got.embedding.tolist()), model.encode(np.stack(windows)), atol=2e-6
    )
    prepared = [prepare_window([(c, 65.0, 0.0) for c in w], 130).data for w in windows]
    tokens = 2 * (1 + 13 * ((130 - 2 + 1) // 9))  # N = 128 is even: N + 1 scalogram rows
    per_unit = 1500 // tokens
    assert 1 < per_unit < 16
    for first in range(0, 16, per_unit):
        unit = prepared[first : first + per_unit]
        expected = model.encode_unit(unit, batch_tokens=1000)  # type: ignore[arg-type]
        assert [e.tobytes() for e in expected] == [
            e.tobytes() for e in got.embedding[first : first + per_unit]
        ]


def test_reference_preprocessing_acts_on_the_windows_own_samples(
    cohort: Path, undisturbed: Path
) -> None:
    table = load_embeddings(undisturbed)
    got = table[table.recording == "b"]
    with np.load(cohort / "b.npz") as file:
        windows = [file["data"][:, 200 * k : 200 * (k + 1)] for k in range(4)]
    expected = models()[0].encode(np.stack([preprocess(w, 100.0) for w in windows]))
    np.testing.assert_allclose(np.stack(got.embedding.tolist()), expected, atol=2e-6)


def test_windows_with_gaps_are_rows_that_say_so(cohort: Path, undisturbed: Path) -> None:
    table = load_embeddings(undisturbed)
    got = table[table.recording == "c/e"]
    # Samples 600 to 1100 at 250 Hz: 0.8 of the window from 2 s, all but 0.2 - of the next: 0.2.
    assert got.missing_fraction.tolist() == [0, 0.8, 0.2, 0, 0, 0]
    assert got.status.tolist() == ["ok", MISSING, MISSING, "ok", "ok", "ok"]
    assert [e is None for e in got.embedding] == [False, True, True, False, False, False]
    manifest = json.loads((undisturbed / "manifest.json").read_text())
    assert manifest["counts"]["skipped"] == {MISSING: 2}
    assert manifest["counts"]["ok"] == (table.status == "ok").sum()


def test_small_gaps_are_filled_within_the_window(cohort: Path, tmp_path: Path) -> None:
    lenient = replace(SETTINGS, preprocess="none", max_missing=0.2)
    run(cohort / "c" / "e.npz", tmp_path / "out", lenient)
    table = load_embeddings(tmp_path / "out")
    assert table.status.tolist() == ["ok", MISSING, "ok", "ok", "ok", "ok"]
    with np.load(cohort / "c" / "e.npz") as file:
        window = file["data"][:, 1000:1500]
    filled, fraction = fill_missing(window)
    assert fraction.tolist() == [0, 0.2]
    expected = models()[0].encode([filled], sampling_rate=250)[0]
    np.testing.assert_allclose(table.embedding[2], expected, atol=2e-6)


@pytest.mark.parametrize("how", ["mean", "concat"])
def test_channels_pooled(how: str, cohort: Path, undisturbed: Path, tmp_path: Path) -> None:
    run(cohort, tmp_path / "out", replace(SETTINGS, channel_pool=how))
    kept = load_embeddings(undisturbed).embedding
    for one, all_channels in zip(load_embeddings(tmp_path / "out").embedding, kept, strict=True):
        if all_channels is None:
            assert one is None
        else:
            wanted = all_channels.mean(0) if how == "mean" else all_channels.reshape(-1)
            np.testing.assert_array_equal(one, wanted)


def test_normalizing_by_recording_takes_the_whole_recordings_statistics(
    cohort: Path, tmp_path: Path
) -> None:
    scaled = replace(SETTINGS, preprocess="none", normalize="recording", channels=("S1",))
    output = tmp_path / "out"
    run(cohort / "a.npz", output, scaled)
    with np.load(cohort / "a.npz") as file:
        data = file["data"][1]
    manifest = json.loads((output / "manifest.json").read_text())
    np.testing.assert_allclose(manifest["statistics"]["a"], [[data.mean(), data.std()]], rtol=1e-12)
    expected = models()[0].encode(((data - data.mean()) / data.std())[None, None, 130:260])
    np.testing.assert_allclose(load_embeddings(output).embedding[1], expected[0], atol=2e-6)


def test_listed_windows_equal_the_tiling_to_the_bit(
    cohort: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """The same windows, shuffled in the list and given by their ends, make the same units."""
    import pandas

    table = load_embeddings(undisturbed)
    listed = table[["recording", "window_id", "start_s"]].assign(end_s=table.start_s + 2.0)
    listed = listed.sample(frac=1, random_state=3)
    for name, write in (
        ("w.csv", pandas.DataFrame.to_csv),
        ("w.parquet", pandas.DataFrame.to_parquet),
    ):
        write(listed, tmp_path / name, index=False)
        windows = read_window_list(tmp_path / name)
        settings_ = replace(SETTINGS, window=None, hop=None, windows=windows.digest)
        run(cohort, tmp_path / f"{name}.out", settings_, windows=windows)
        assert rows(tmp_path / f"{name}.out") == rows(undisturbed)


def test_other_windows_of_a_list_agree_within_rounding(
    cohort: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """Of uneven lengths, overlapping, some beyond the end; the ones shared with the tiling agree."""
    path = tmp_path / "w.csv"
    path.write_text(
        "recording,start_s,duration_s\na,4,2\na,1,9.5\na,4.5,0.5\na,32.9,1\na,500,2\nf,6,2\n"
    )
    windows = read_window_list(path)
    settings_ = replace(SETTINGS, window=None, hop=None, windows=windows.digest)
    run(cohort, tmp_path / "out", settings_, windows=windows)
    table = load_embeddings(tmp_path / "out").set_index("window_id")
    assert table.index.tolist() == ["1", "0", "2", "3", "4", "5"]  # by start
    assert table.status.tolist() == ["ok", "ok", "ok", MISSING, MISSING, "ok"]
    tiled = load_embeddings(undisturbed).set_index(["recording", "start_s"])
    np.testing.assert_allclose(table.embedding["0"], tiled.embedding["a", 4.0], atol=2e-6)
    np.testing.assert_allclose(table.embedding["5"], tiled.embedding["f", 6.0], atol=2e-6)


@pytest.mark.parametrize("pool", ["mean", "patch"])
def test_a_listed_window_longer_than_its_recording_is_a_row(
    pool: str, cohort: Path, tmp_path: Path
) -> None:
    """As one that merely sticks out, however long it is; the others of the recording are encoded."""
    path = tmp_path / "w.csv"
    path.write_text("recording,start_s,duration_s\nb,0,2\nb,0,18\nb,-1e12,2e12\nb,6,4\nb,5,9.5\n")
    windows = read_window_list(path)
    settings_ = replace(
        SETTINGS, window=None, hop=None, windows=windows.digest, pool=pool, max_missing=0.3
    )
    assert run(cohort, tmp_path / "out", settings_, windows=windows).exit_code == 0
    table = load_embeddings(tmp_path / "out", "numpy")
    order = np.argsort(table["window_id"].astype(int))
    assert table["status"][order].tolist() == ["ok", MISSING, MISSING, "ok", MISSING]
    np.testing.assert_allclose(table["missing_fraction"][order], [0, 0.5, 1, 0.25, 5.5 / 9.5])
    assert run(cohort, tmp_path / "out", settings_, windows=windows).already_complete


@pytest.mark.parametrize("workers", [1, 3])
def test_reader_processes_change_nothing(
    workers: int, cohort: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run(cohort, tmp_path / "out", workers=workers)
    assert rows(tmp_path / "out") == rows(undisturbed)


def test_two_devices_change_nothing(cohort: Path, undisturbed: Path, tmp_path: Path) -> None:
    run(cohort, tmp_path / "out", load_models=lambda threads: models() + models())
    assert rows(tmp_path / "out") == rows(undisturbed)


def test_example_cohort(cohort_dir: Path, tmp_path: Path) -> None:
    summary = run(cohort_dir, tmp_path / "out", EncodeSettings(window=6.0))
    assert summary.exit_code == 0
    table = load_embeddings(tmp_path / "out")
    assert len(table) == summary.windows == len(table.drop_duplicates(["recording", "window_id"]))
    for row in table[table.status == "ok"].itertuples():
        assert row.embedding.shape == (len(row.channels), 64)
        assert np.isfinite(row.embedding).all()


def test_values_no_model_can_take_are_skipped(tmp_path: Path) -> None:
    """Beyond float32, and within it but beyond what its sums hold; neither spoils its neighbours."""
    data = np.random.default_rng(0).standard_normal((1, 65 * 8))
    data[0, 200] = 1e20  # a fill value
    data[0, 260:390] *= 1e300
    np.savez(tmp_path / "x.npz", data=data, sampling_rate=65.0)
    run(tmp_path / "x.npz", tmp_path / "out", replace(SETTINGS, preprocess="none"))
    table = load_embeddings(tmp_path / "out")
    assert table.status.tolist() == ["ok", TOO_LARGE, TOO_LARGE, "ok"]
    assert [e is None for e in table.embedding] == [False, True, True, False]
    scaled = replace(SETTINGS, preprocess="none", normalize="recording")
    run(tmp_path / "x.npz", tmp_path / "scaled", scaled)
    assert set(load_embeddings(tmp_path / "scaled").status) == {TOO_LARGE}


def test_names_that_cannot_be_ids(tmp_path: Path) -> None:
    """Each fails under the printable form of its name, which is no other recording's id."""
    signal = np.random.default_rng(0).standard_normal((1, 200))
    folder = tmp_path / os.fsdecode(b"of \xe9")  # what lies in it has ids all the same
    folder.mkdir()
    bad = ("a\nb", "c\td", os.fsdecode(b"\xff"), "e\u2028f")
    good_names = {"a\\nb", "é", "at 9.41\u202fAM"}  # as macOS writes the time
    for name in (*bad, *good_names):
        np.save(folder / f"{name}.npy", signal)
    settings = replace(SETTINGS, rate=65.0)
    for _ in range(2):  # the second time it goes on
        summary = run(folder, tmp_path / "out", settings)
        assert list(summary.failed) == [r"\xff", r"a\nb_2", r"c\td", r"e\u2028f"]
        assert all("rename it" in message for message in summary.failed.values())
        assert all(message.isprintable() for message in summary.failed.values())
        assert (summary.exit_code, summary.recordings, summary.tally.ok) == (1, 7, 3)
    assert set(load_embeddings(tmp_path / "out").recording) == good_names
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text(encoding="utf-8"))
    assert len({entry["recording"] for entry in manifest["inputs"]}) == 7
    good = [entry["path"] for entry in manifest["inputs"] if entry["error"] is None]
    assert set(good) == {str(folder / f"{name}.npy") for name in good_names}
    # None of them is in a list of windows that names the others.
    listed = tmp_path / "windows.csv"
    listed.write_text("recording,start_s,duration_s\né,0,2\n")
    windows = read_window_list(listed)
    by_list = replace(settings, windows=windows.digest)
    assert run(folder, tmp_path / "listed", by_list, windows=windows).exit_code == 0
    alone = folder / "a\nb.npy"
    with pytest.raises(UsageError, match=r"a\\nb\.npy: its name .* rename it"):
        run(alone, tmp_path / "alone", settings)


def test_parts_from_before_lacking_channels_were_counted(cohort: Path, tmp_path: Path) -> None:
    """They are read, and a run goes on from them."""
    output = tmp_path / "out"
    assert run(cohort, output).tally.lacking == {"S1": 2}
    (part,) = output.glob("part-*")
    table = pq.read_table(part)
    metadata = json.loads(table.schema.metadata[b"normwear_fast"])
    del metadata["tally"]["lacking"]
    pq.write_table(
        table.replace_schema_metadata({b"normwear_fast": json.dumps(metadata).encode()}), part
    )
    again = run(cohort, output)
    assert (again.already_complete, again.tally.lacking) == (True, {})
    metadata["tally"]["lacking"] = {"S1": "two"}
    pq.write_table(
        table.replace_schema_metadata({b"normwear_fast": json.dumps(metadata).encode()}), part
    )
    with pytest.raises(OutputError, match="is damaged"):
        run(cohort, output)


# --- resume ----------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _writer_keeps_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """One result waits at most: a stop comes before these small models are through."""
    monkeypatch.setattr(local, "RESULT_BYTES", 0)


class StopAfter(pipeline.Silent):
    """Sends a signal to this process when so many units have been encoded."""

    def __init__(self, units: int, number: int = signal.SIGINT) -> None:
        self.units, self.number = units, number

    def advance(self, windows: int) -> None:
        self.units -= 1
        if self.units == 0:
            signal.raise_signal(self.number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_keeps_what_is_whole_and_goes_on(
    number: int, cohort: Path, undisturbed: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    summary = run(cohort, output, progress=StopAfter(2, number))
    assert summary.interrupted
    assert summary.exit_code == 130
    assert 2 <= summary.units_done < summary.units
    assert json.loads((output / "manifest.json").read_text())["state"] == "interrupted"
    assert set(rows(output)) < set(rows(undisturbed))
    assert signal.getsignal(number) is not None
    again = run(cohort, output)
    assert again.exit_code == 0
    assert again.units_done == summary.units
    assert rows(output) == rows(undisturbed)
    assert again.tally.ok == (load_embeddings(output).status == "ok").sum()


def test_a_finished_run_is_left_alone(cohort: Path, undisturbed: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in undisturbed.iterdir()}
    summary = run(cohort, undisturbed)
    assert summary.already_complete
    assert summary.exit_code == 0
    assert {p: p.stat().st_mtime_ns for p in undisturbed.iterdir()} == before


def kill_and_go_on(
    recordings: int, workers: Sequence[int], kills: int, tmp_path: Path
) -> dict[str, Any]:
    """Kills runs of a mixed cohort at random points, each then going on to its end (tests/kills.py)."""
    seed = np.random.SeedSequence().entropy % 2**32  # type: ignore[operator]
    print(f"kill seed {seed}")  # shown by pytest on failure
    script = Path(__file__).with_name("kills.py")
    words = [sys.executable, script, tmp_path, recordings, ",".join(map(str, workers)), kills, seed]
    done = subprocess.run(
        [str(word) for word in words],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def assert_undisturbed(output: Path, undisturbed: Path) -> None:
    assert rows(output) == rows(undisturbed)
    names = sorted(os.listdir(output))
    assert names[0] == "manifest.json"
    assert all(name.startswith("part-") for name in names[1:])


def test_killed_at_random_points_ends_in_the_same_rows(tmp_path: Path) -> None:
    result = kill_and_go_on(16, [0], 5, tmp_path)
    assert result["kills"] == result["same_rows"] == 5


@pytest.mark.torture
@pytest.mark.timeout(3600)
def test_killed_a_hundred_times_ends_in_the_same_rows(tmp_path: Path) -> None:
    """Its outcome is bench/results/kill-torture.json."""
    result = kill_and_go_on(60, [0, 0, 0, 1, 0, 0, 0, 2], 100, tmp_path)
    path = Path(__file__).parent.parent / "bench" / "results" / "kill-torture.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    assert result["kills"] == result["same_rows"] == 100


@pytest.mark.usefixtures("many_parts")
def test_leftovers_of_a_killed_run_are_removed(
    cohort: Path, undisturbed: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    run(cohort, output, progress=StopAfter(1))
    (output / ".part-000001.parquet.tmp").write_bytes(b"half a part")
    (output / ".manifest.json.tmp").write_bytes(b"{")
    (output / ".lock").write_text("99999999")
    run(cohort, output)
    assert_undisturbed(output, undisturbed)


def test_a_reader_that_dies_is_replaced(
    cohort: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each worker is killed once while it works."""
    begin, killed = readers._Reader.begin, []

    def begin_and_die(self: Any, task: Any, *args: Any) -> None:
        begin(self, task, *args)
        if isinstance(task, Job) and len(killed) < 2:
            killed.append(self.process.pid)
            os.kill(self.process.pid, signal.SIGKILL)

    monkeypatch.setattr(readers._Reader, "begin", begin_and_die)
    assert run(cohort, tmp_path / "out", workers=2).failed == {}
    assert len(killed) == 2
    assert rows(tmp_path / "out") == rows(undisturbed)


def test_readers_that_cannot_start_are_said_so(
    cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "_serve", slice)  # ends at once
    summary = run(cohort / "a.npz", tmp_path / "out", workers=1)
    assert summary.exit_code == 1
    assert "reader process died (exit code 0)" in summary.failed["a"]
    assert summary.units == 0


@register(".broken")
class Broken(Recording):
    """Ten seconds that can be read, then an error; or none, once repaired."""

    format = "broken"
    repaired = False

    def __init__(self, path: Path, *, sampling_rate: float | None = None) -> None:
        self.path = path
        self.channels = (Channel("S", "", 65.0, 65 * 100),)

    def _blocks(self, channels: list[int], seconds: float) -> Iterator[list[np.ndarray]]:
        rng = np.random.default_rng(1)
        for block in range(10):
            if block == 4 and not self.repaired:
                raise ValueError("bad\nblock")
            yield [rng.standard_normal(650)]


def test_a_recording_that_breaks_off_is_reported_and_the_rest_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its whole units stay; the other recording of its unit, and the run, are not hurt."""
    folder = make_cohort(tmp_path / "in")
    (folder / "bad.broken").write_text("x")
    summary = run(folder, tmp_path / "out")
    assert summary.exit_code == 1
    path = folder / "bad.broken"
    assert summary.failed == {"bad": f"{path}: cannot be read (ValueError: bad block)"}
    table = load_embeddings(tmp_path / "out")
    broken = table[table.recording == "bad"]
    assert 0 < len(broken) <= 20
    assert (broken.status == "ok").all()
    assert set(table.recording) == {"a", "b", "bad", "c/d", "c/e", "f"}
    # It stays failed when the run is asked for again: no row depends on when it was read.
    monkeypatch.setattr(Broken, "repaired", True)
    again = run(folder, tmp_path / "out")
    assert again.already_complete
    assert again.failed == summary.failed
    assert run(folder, tmp_path / "out", overwrite=True).exit_code == 0
    assert len(load_embeddings(tmp_path / "out")) == again.windows


# --- one output, one run -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"window": 3.0, "hop": 3.0}, "window was 2.0, now 3.0; hop was 2.0, now 3.0"),
        ({"pool": "cls"}, "pool was mean, now cls"),
        ({"channels": ("S0",)}, "channels was None, now S0"),
        ({"preprocess": "none"}, "preprocess was reference, now none"),
    ],
)
def test_other_settings_are_refused(
    change: dict[str, Any], named: str, cohort: Path, undisturbed: Path
) -> None:
    before = rows(undisturbed)
    with pytest.raises(OutputError, match="--overwrite") as caught:
        run(cohort, undisturbed, replace(SETTINGS, **change))
    assert named in str(caught.value)
    assert rows(undisturbed) == before


def test_other_weights_are_refused(cohort: Path, undisturbed: Path) -> None:
    with pytest.raises(OutputError, match=r"weights\.seed was 0, now 1"):
        run(cohort, undisturbed, load_models=lambda threads: models(seed=1))


def test_other_inputs_are_refused(tmp_path: Path) -> None:
    folder, output = make_cohort(tmp_path / "in"), tmp_path / "out"
    run(folder, output)
    os.utime(folder / "b.npz", ns=(0, 5))
    (folder / "f.npz").unlink()
    np.save(folder / "new.npy", np.zeros((1, 1000)))
    with pytest.raises(OutputError, match="b was changed; recording f is gone; recording new is"):
        run(folder, output)


def test_a_header_stands_for_its_samples_too(data_dir: Path, tmp_path: Path) -> None:
    for suffix in (".hea", ".mat"):
        (tmp_path / f"a103l{suffix}").write_bytes((data_dir / f"a103l{suffix}").read_bytes())
    settings_ = EncodeSettings(window=60.0, channels=("II",))
    run(tmp_path / "a103l.hea", tmp_path / "out", settings_)
    os.utime(tmp_path / "a103l.mat", ns=(0, 5))
    with pytest.raises(OutputError, match="recording a103l was changed"):
        run(tmp_path / "a103l.hea", tmp_path / "out", settings_)


def test_a_header_stands_for_its_segments_samples_too(tmp_path: Path) -> None:
    """Whatever their files are named; a segment without a header of its own costs only itself."""
    (tmp_path / "r.hea").write_text("r/2 1 50 200\na 100\nb 100\n")
    (tmp_path / "a.hea").write_text("a 1 50 100\nsamples_1.sig 16 100/mV 16 0 0 0 0 ECG\n")
    files = {"r.hea", "a.hea", "samples_1.sig", "b.dat"}
    for name in ("samples_1.sig", "b.dat"):
        (tmp_path / name).write_bytes(bytes(200))
    for number, name in enumerate(sorted(files)):
        os.utime(tmp_path / name, ns=(0, number + 5))
    size, latest = file_state(tmp_path / "r.hea")
    assert size == sum((tmp_path / name).stat().st_size for name in files)
    assert latest == 8
    os.utime(tmp_path / "samples_1.sig", ns=(0, 99))
    assert file_state(tmp_path / "r.hea") == (size, 99)


def test_a_brainvision_header_stands_for_the_files_it_names(tmp_path: Path) -> None:
    header = tmp_path / "r.vhdr"
    header.write_text("Brain Vision\n[Common Infos]\nDataFile=other.eeg\nMarkerFile=../m.vmrk\n")
    (tmp_path / "other.eeg").write_bytes(bytes(50))
    assert (
        file_state(header)[0] == header.stat().st_size
    )  # a name that leads out: the reader says so
    header.write_text(header.read_text().replace("../m", "$b"))
    assert file_state(header)[0] == header.stat().st_size + 50


def test_threads_and_unit_sizes_are_taken_over(
    cohort: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """A resumed run cuts its units as it did before, whatever it would choose today."""
    output, asked = tmp_path / "out", []

    def load(threads: int | None) -> list[FastNormWear]:
        asked.append(threads)
        return models()

    run(cohort, output, progress=StopAfter(1), load_models=load)
    run(cohort, output, replace(SETTINGS, batch_tokens=None, unit_tokens=None), load_models=load)
    assert rows(output) == rows(undisturbed)
    manifest = json.loads((output / "manifest.json").read_text())
    assert asked == [None, manifest["model"]["threads"]]


def test_overwrite_removes_its_own_files_only(cohort: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    run(cohort, output)
    (output / "notes.txt").write_text("mine")
    summary = run(cohort / "b.npz", output, overwrite=True)
    assert summary.windows == 4
    assert len(load_embeddings(output)) == 4
    assert (output / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_something_else_is_refused(
    overwrite: bool, cohort: Path, tmp_path: Path
) -> None:
    (tmp_path / "part-000000.parquet").write_bytes(b"mine")
    with pytest.raises(OutputError, match=r"no manifest\.json"):
        run(cohort, tmp_path, overwrite=overwrite)
    (tmp_path / "manifest.json").write_text('{"format": "something else"}')
    with pytest.raises(OutputError, match="not a manifest of encode"):
        run(cohort, tmp_path, overwrite=overwrite)
    assert sorted(os.listdir(tmp_path)) == ["manifest.json", "part-000000.parquet"]


def test_a_part_of_another_run_or_damaged_is_refused(cohort: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        run(cohort / "b.npz", tmp_path / name)
    part = tmp_path / "one" / "part-000000.parquet"
    part.write_bytes((tmp_path / "two" / part.name).read_bytes())
    with pytest.raises(OutputError, match="belongs to another run"):
        run(cohort / "b.npz", tmp_path / "one")
    part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(OutputError, match="damaged"):
        run(cohort / "b.npz", tmp_path / "one")
    part.unlink()
    assert run(cohort / "b.npz", tmp_path / "one").encoded == 4


def test_a_second_writer_is_refused(cohort: Path, tmp_path: Path) -> None:
    class Second(pipeline.Silent):
        error = ""

        def advance(self, windows: int) -> None:
            with pytest.raises(OutputError) as caught:
                run(cohort, tmp_path / "out", overwrite=True)
            self.error = str(caught.value)

    second = Second()
    assert run(cohort, tmp_path / "out", progress=second).exit_code == 0
    assert f"written by another run (process {os.getpid()})" in second.error


def test_output_inside_the_inputs_is_no_input(tmp_path: Path) -> None:
    folder = make_cohort(tmp_path / "in")
    run(folder, folder / "out", progress=StopAfter(1))
    assert run(folder, folder / "out").failed == {}


def test_earlier_outputs_below_the_input_are_no_inputs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of encode, prepare, finetune, pretrain and predict: not encoded, and no reason to refuse."""
    folder = make_cohort(tmp_path / "in")
    names = {each.id for each in pipeline.find_inputs([folder], None)}
    run(folder, folder / "deep" / "out_mean")
    series = EncodeSettings(window=6.0)
    prepare_series([folder], folder / "series", series)
    for name, start, table in (
        ("tuned", ("finetune.json", '{\n  "format": "normwear-fast finetune",'), "epochs.csv"),
        ("run", ("steps.csv", "step,loss,learning_rate,gradient_norm,skipped\n"), "probes.csv"),
    ):
        (folder / name).mkdir()
        (folder / name / start[0]).write_text(start[1])
        (folder / name / table).write_text("time,value\n0,1\n")
    part = folder / "deep" / "out_mean" / "part-000000.parquet"
    shutil.copy(part, folder / "copy_of_a_part.parquet")
    metadata = {"normwear_fast_zeroshot": json.dumps({"question": "x" * 300})}
    answers = pa.table({"start_s": [0.0]}).replace_schema_metadata(metadata)
    pq.write_table(answers, folder / "answers.parquet")
    assert {each.id for each in pipeline.find_inputs([folder], None)} == names

    run(folder, folder / "out_cls", replace(SETTINGS, pool="cls"))
    assert {row[0] for row in rows(folder / "out_cls")} == names
    # A run with a sibling that came later goes on.
    assert run(folder, folder / "deep" / "out_mean").already_complete
    assert prepare_series([folder], folder / "series", series).already_complete
    assert main(["inspect", str(folder), "--json"]) == 0
    assert {each["id"] for each in json.loads(capsys.readouterr().out)["recordings"]} == names
    with pytest.raises(UsageError, match="out_cls: was written by normwear-fast"):
        run(folder / "out_cls", tmp_path / "new")

    # Only by what is in them: tables and manifests of others are what they were.
    (folder / "manifest.json").write_text('{"format": "something else"}')
    pq.write_table(pa.table({"normwear_fast": [0.0] * 200}), folder / "mine.parquet")
    (folder / "cut.parquet").write_bytes(part.read_bytes()[:-20])
    found = {each.id for each in pipeline.find_inputs([folder], None)}
    assert found == names | {"mine", "cut"}


# --- refusals of the system --------------------------------------------------------------------------


def assert_goes_on(cohort: Path, output: Path, undisturbed: Path) -> None:
    names = set(os.listdir(output))
    assert all(name == "manifest.json" or name.startswith("part-") for name in names)
    run(cohort, output)
    assert rows(output) == rows(undisturbed)


@pytest.mark.usefixtures("many_parts")
def test_no_space_left(
    cohort: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, synced = tmp_path / "out", os.fsync
    writes = []

    def full(descriptor: int) -> None:
        writes.append(descriptor)
        if len(writes) > 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        synced(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="no space left"):
        run(cohort, output)
    monkeypatch.setattr(os, "fsync", synced)
    assert_goes_on(cohort, output, undisturbed)


@pytest.mark.usefixtures("many_parts")
def test_a_full_file_system(cohort: Path, undisturbed: Path, tmp_path: Path) -> None:
    """A real one, of 32 KB, where it can be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=32k", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        with pytest.raises(OutputError, match="no space left"):
            run(cohort, disk / "out")
        subprocess.run(["mount", "-o", "remount,size=16m", str(disk)], check=True)
        assert_goes_on(cohort, disk / "out", undisturbed)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# --- reading back ------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["keep", "mean", "concat"])
def test_reads_back_everywhere(how: str, cohort: Path, tmp_path: Path) -> None:
    """Null and ragged rows included, in pyarrow, pandas, polars, duckdb and NumPy."""
    import duckdb
    import pandas
    import polars
    import pyarrow.dataset

    output = tmp_path / "out"
    run(cohort, output, replace(SETTINGS, channel_pool=how))
    files = str(output / "part-*.parquet")
    wanted = load_embeddings(output)
    embeddings = [None if e is None else e.tolist() for e in wanted.embedding]
    assert embeddings.count(None) == 2

    assert load_embeddings(output, "pyarrow")["embedding"].to_pylist() == embeddings
    dataset = pyarrow.dataset.dataset(str(output), exclude_invalid_files=True)
    assert dataset.to_table()["embedding"].to_pylist() == embeddings
    assert load_embeddings(output, "polars")["embedding"].to_list() == embeddings
    assert polars.scan_parquet(files).collect()["embedding"].to_list() == embeddings
    found = duckdb.sql(f"select embedding, status from '{files}'").fetchall()
    assert [
        None if e is None else [list(c) if how == "keep" else c for c in e] for e, _ in found
    ] == (embeddings)
    assert [status for _, status in found] == wanted.status.tolist()
    frame = pandas.read_parquet(output / "part-000000.parquet")
    assert [e is None for e in frame.embedding] == [e is None for e in embeddings]
    np.testing.assert_array_equal(np.stack(frame.embedding[0]), wanted.embedding[0])

    arrays = load_embeddings(output, "numpy")
    if how == "mean":
        assert arrays["embedding"].shape == (len(wanted), 64)
        assert np.isnan(arrays["embedding"]).all(axis=1).sum() == 2
    else:
        assert arrays["embedding"].dtype == object
    assert list(arrays["window_id"]) == wanted.window_id.tolist()
    some = load_embeddings(output, columns=["recording", "status"])
    assert list(some.columns) == ["recording", "status"]
    with pytest.raises(UsageError, match="no column colour"):
        load_embeddings(output, columns=["colour"])
    with pytest.raises(UsageError, match=r"columns is 'status'; it must be a list .*\['status'\]"):
        load_embeddings(output, columns="status")
    with pytest.raises(UsageError, match="columns is empty; name at least one"):
        load_embeddings(output, columns=[])


def test_parts_are_written_for_reading(undisturbed: Path) -> None:
    import pyarrow.parquet as pq

    metadata = pq.read_metadata(undisturbed / "part-000000.parquet")
    columns = {
        (column := metadata.row_group(0).column(i)).path_in_schema: column
        for i in range(metadata.num_columns)
    }
    embedding = columns["embedding.list.element.list.element"]
    assert "BYTE_STREAM_SPLIT" in embedding.encodings
    assert not embedding.has_dictionary_page
    assert embedding.compression == "ZSTD"
    described = json.loads(metadata.metadata[METADATA_KEY])
    assert described["schema"] == 1
    assert described["scalogram"] == "conv"
    assert sum(count for _, count in described["units"]) == metadata.num_rows


def test_no_output_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="no part-"):
        load_embeddings(tmp_path)


def test_a_library_that_is_not_installed_is_named(
    undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, install in (("pandas", r"'normwear-fast\[eval\]'"), ("polars", "polars")):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, name, None)
            with pytest.raises(UsageError, match=f"pip install {install}; library='numpy' and"):
                load_embeddings(undisturbed, name)
            assert len(load_embeddings(undisturbed, "numpy")["embedding"]) == 54


def test_lock_is_gone_and_empty_folders_too(tmp_path: Path) -> None:
    with OutputFolder(tmp_path / "a" / "b") as folder:
        assert (folder.path / ".lock").read_text() == str(os.getpid())
    assert list(tmp_path.iterdir()) == []


# --- settings ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"window": 0.16}, r"window of 0.16 s is 10 samples at 65 Hz; 11 \(0.17 s\) are needed"),
        ({"window": -1.0}, "window is -1.0 s; it must be above 0"),
        ({"window": math.nan}, "window is nan s"),
        ({"hop": 0.0}, "hop is 0.0 s"),
        ({"max_missing": 1.5}, "between 0 and 1"),
        ({"channels": ("A", "A")}, "name each wanted one once"),
        ({"normalize": "recording"}, "choose preprocess 'none'"),
        ({"pool": "max"}, "one of mean, cls"),
        ({"rate": 0.0}, "rate is 0.0 Hz"),
    ],
)
def test_settings_out_of_range(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        EncodeSettings(**values)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("recording,start_s\na,1\n", "no column duration_s or end_s; it has recording, start_s"),
        ("recording,start_s,end_s\n", "lists no windows"),
        ("recording,start_s,end_s\na,x,3\n", "line 2: start_s is 'x'"),
        ("recording,start_s,end_s\na,3\n", "line 2: end_s is None"),
        ("recording,start_s,end_s\na,0,2\na,3,3\n", "line 3: a window is 0.0 s"),
        ("recording,start_s,end_s\n,0,2\n", "line 2: no recording"),
        (
            "recording,start_s,duration_s,end_s\na,0,6,6\na,0,6,9\n",
            "line 3: start_s 0 and duration_s 6 end at 6, but end_s is 9",
        ),
        ("recording,start_s,duration_s\na,0,0.1\n", "line 2: a window of 0.1 s is 6 samples"),
        ("recording,start_s,end_s,window_id\na,0,2,w\na,1,3,w\n", "'w' is there twice"),
        (
            "recording,start_s,duration_s\na,0,6\na,0,5,6\n",
            "line 3: has 4 cells for the 3 columns recording, start_s, duration_s; as many are right",
        ),
    ],
)
def test_lists_that_cannot_be(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "windows.csv"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        read_window_list(path)


def test_a_list_whose_rows_end_in_empty_cells(tmp_path: Path) -> None:
    path = tmp_path / "windows.csv"
    path.write_text("recording,start_s,duration_s\na,0,6,\na,6,6, ,\n")
    assert read_window_list(path).recordings["a"].durations.tolist() == [6, 6]


def test_importing_encode_is_light() -> None:
    """A reader process must not load torch: a second, and 300 MB, for each."""
    code = (
        "import sys, normwear_fast.encode.readers as r; "
        "print([m for m in ('torch', 'pandas', 'scipy.signal', 'pyarrow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
