"""Pretraining's data: `prepare` end to end, what its shards hold, and the batches drawn from them."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from normwear_fast.cli.main import main
from normwear_fast.encode.settings import EncodeSettings
from normwear_fast.errors import InputError, OutputError, UsageError
from normwear_fast.preprocess import prepare_window
from normwear_fast.pretrain import prepare as prepare_module
from normwear_fast.pretrain.data import (
    DAMAGED,
    FLAT,
    NOT_FINITE,
    ORIGINALS,
    SHORT,
    SeriesShards,
    training_batch,
)
from normwear_fast.pretrain.prepare import FLAT_WINDOW, prepare_series
from normwear_fast.recordings import open_recording

RATE = 100.0


def write_recording(path: Path, data: NDArray[np.floating]) -> None:
    names = np.array([f"channel_{i}" for i in range(len(data))])
    np.savez(path, data=data, sampling_rate=RATE, channels=names)


@pytest.fixture
def recordings(tmp_path: Path) -> Path:
    """Good ones, one with a flat channel, one that is all flat, one with a gap, one too short."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "in"
    folder.mkdir()
    noise = rng.standard_normal((2, 3000))
    write_recording(folder / "good.npz", noise)
    write_recording(folder / "held_out.npz", noise[:1])
    write_recording(folder / "one_flat.npz", np.stack([noise[0], np.ones(3000)]))
    write_recording(folder / "all_flat.npz", np.full((1, 3000), 2.0))
    gap = noise.copy()
    gap[1, 1200:1700] = np.nan
    write_recording(folder / "gap.npz", gap)
    write_recording(folder / "short.npz", noise[:, :500])
    return folder


def rows(folder: Path) -> list[dict[str, object]]:
    """The rows of all shards, in order of recording and start."""
    tables = [pa.ipc.open_file(path).read_all() for path in sorted(folder.glob("part-*.arrow"))]
    found = pa.concat_tables(tables).to_pylist()
    return sorted(found, key=lambda row: (row["recording"], row["start_s"]))


def test_the_example_cohort_from_files_to_a_batch(
    cohort_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["prepare", str(cohort_dir), "--output", str(tmp_path / "out"), "--exclude", "imu/*_2"]
    assert main([*words, "--workers", "0", "--hop", "3", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    # 39 + 29 + 41 windows of ECG and PPG, and 2 of each of four recordings of movement; the PPG with
    # a timer stands still for one of its windows.
    assert (summary["recordings"], summary["windows"], summary["prepared"]) == (7, 117, 116)
    assert summary["skipped"] == {FLAT_WINDOW: 1}
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["state"] == "complete"
    assert manifest["counts"]["ok"] == 116
    shards = SeriesShards(tmp_path / "out")
    assert len(shards) == 116
    assert not shards.skipped
    first = rows(tmp_path / "out")[0]
    assert first["recording"] == "ecg/mitdb_100"
    assert first["channels"] == ["MLII", "V5"]
    with open_recording(cohort_dir / "ecg/mitdb_100.hea") as recording:
        raw = np.stack(next(iter(recording.blocks([0, 1], 6.0))))
    expected = prepare_window([(x, 360.0, 0.0) for x in raw], 390, preprocess="reference").data
    np.testing.assert_array_equal(np.array(first["series"], np.float32), expected)
    batch = training_batch(
        shards, [0, 50, 115], channels=4, mixup=True, rng=np.random.default_rng(0)
    )
    assert batch.shape == (3, 4, 388)
    assert batch.dtype == np.float32
    assert np.isfinite(batch).all()
    assert main([*words, "--workers", "0", "--hop", "3"]) == 0
    assert "complete already" in capsys.readouterr().out


def test_bad_recordings_are_left_out_and_counted(recordings: Path, tmp_path: Path) -> None:
    settings = EncodeSettings()
    summary = prepare_series([recordings], tmp_path / "out", settings, exclude=["held_*"])
    assert summary.exit_code == 1
    assert list(summary.failed) == ["short"]
    assert "less than a window" in summary.failed["short"]
    assert summary.windows == 20
    assert summary.skipped == {FLAT_WINDOW: 5, "missing data": 1}
    assert summary.prepared == 14
    assert summary.flat_channels == 5
    kept = rows(tmp_path / "out")
    assert {row["recording"] for row in kept} == {"good", "one_flat", "gap"}
    assert all(row["channels"] == ["channel_0"] for row in kept if row["recording"] == "one_flat")
    shards = SeriesShards(tmp_path / "out")
    assert len(shards) == 14
    for index in range(len(shards)):
        series = shards.series(index)
        assert series.shape in ((1, 390), (2, 390))
        assert np.isfinite(series).all()
        assert (series.std(axis=1) > 0).all()


def test_a_killed_run_goes_on_and_another_one_is_refused(
    recordings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_module, "UNIT_CHANNELS", 4)
    monkeypatch.setattr(prepare_module, "SHARD_BYTES", 1)
    settings = EncodeSettings(hop=2.0)
    whole = prepare_series([recordings], tmp_path / "whole", settings)
    write = prepare_module.SeriesFolder.write_part
    written = 0

    class Killed(BaseException):
        pass

    def write_three(folder: prepare_module.SeriesFolder, content: bytes) -> None:
        nonlocal written
        written += 1
        if written > 3:
            raise Killed
        write(folder, content)

    monkeypatch.setattr(prepare_module.SeriesFolder, "write_part", write_three)
    with pytest.raises(Killed):
        prepare_series([recordings], tmp_path / "out", settings)
    monkeypatch.setattr(prepare_module.SeriesFolder, "write_part", write)
    assert len(list((tmp_path / "out").glob("part-*.arrow"))) == 3
    (tmp_path / "out" / ".part-000003.arrow.tmp").write_bytes(b"half")
    with pytest.raises(OutputError, match=r"hop was 2\.0, now 3\.0"):
        prepare_series([recordings], tmp_path / "out", EncodeSettings(hop=3.0))
    again = prepare_series([recordings], tmp_path / "out", settings)
    assert rows(tmp_path / "out") == rows(tmp_path / "whole")
    assert (again.prepared, again.skipped, again.flat_channels) == (
        whole.prepared,
        whole.skipped,
        whole.flat_channels,
    )
    assert not list((tmp_path / "out").glob(".part*"))
    shutil.copy(recordings / "good.npz", recordings / "new.npz")
    with pytest.raises(OutputError, match="recording new is new"):
        prepare_series([recordings], tmp_path / "out", settings)


def test_what_is_excluded_must_be_there(recordings: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="exclude 'nobody' names no recording"):
        prepare_series([recordings], tmp_path / "out", EncodeSettings(), exclude=["nobody"])
    with pytest.raises(UsageError, match="leaves none of 6 recordings"):
        prepare_series([recordings], tmp_path / "out", EncodeSettings(), exclude=["*"])
    assert not (tmp_path / "out").exists()


def write_shard(path: Path, windows: list[list[NDArray[np.floating]]], kind: pa.DataType) -> None:
    values = pa.array([[list(map(float, x)) for x in window] for window in windows], kind)
    table = pa.table({"series": values})
    if path.suffix == ".parquet":
        pq.write_table(table, path)
        return
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


@pytest.mark.parametrize("suffix", [".arrow", ".parquet"])
def test_bad_series_are_skipped_and_counted(suffix: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    good = rng.standard_normal((6, 390)).astype(np.float32)
    broken = good[0].copy()
    broken[17] = np.nan
    infinite = good[0].copy()
    infinite[389] = np.inf
    windows = [
        [good[0], good[1]],
        [broken, good[2]],
        [np.zeros(390), infinite],
        [good[3][:389]],
        [],
        [np.concatenate([good[4], good[4]]), good[5]],
    ]
    write_shard(tmp_path / f"mine{suffix}", windows, pa.list_(pa.list_(pa.float32())))
    shards = SeriesShards(tmp_path)
    assert shards.skipped == {NOT_FINITE: 2, FLAT: 1, SHORT: 1}
    assert len(shards) == 3
    for index, expected in enumerate((good[[0, 1]], good[[2]], good[[4, 5]])):
        np.testing.assert_array_equal(shards.series(index), expected)
    with pytest.raises(IndexError):
        shards.series(3)


def test_a_shard_cut_off_is_skipped_and_named(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    kind, doubles = pa.list_(pa.list_(pa.float32(), 390)), pa.list_(pa.list_(pa.float64()))
    for name in ("a.arrow", "b.arrow", "c.parquet"):
        write_shard(tmp_path / name, [[x] for x in rng.standard_normal((8, 390))], kind)
    for name in ("b.arrow", "c.parquet"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: len(content) // 2])
    write_shard(tmp_path / "d.arrow", [[x] for x in rng.standard_normal((2, 390))], doubles)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        shards = SeriesShards(tmp_path)
    assert len(shards) == 8
    assert shards.skipped == {DAMAGED: 3}
    told = [str(warning.message) for warning in caught]
    assert [next(n for n in ("b.arrow", "c.parquet", "d.arrow") if n in line) for line in told]
    (tmp_path / "a.arrow").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(UsageError, match="nothing to train on; left out were 3 of damaged"):
            SeriesShards(tmp_path)
    with pytest.raises(UsageError, match="no such folder"):
        SeriesShards(tmp_path / "nowhere")


class Numbered:
    """Window i has the value i in every sample of its channel 0, i + 0.1 in channel 1, ..."""

    def __init__(self, *channels: int) -> None:
        self.channels = channels

    def __len__(self) -> int:
        return len(self.channels)

    def series(self, index: int) -> NDArray[np.float32]:
        values = index + np.arange(self.channels[index]) / 10
        return np.repeat(values[:, None], 390, axis=1).astype(np.float32)


def test_channels_are_repeated_or_drawn() -> None:
    rng = np.random.default_rng(0)
    shards = Numbered(1, 2, 4, 9)
    drawn = []
    for _ in range(200):
        batch = training_batch(shards, [0, 1, 2, 3], channels=4, mixup=False, rng=rng)
        np.testing.assert_allclose(batch[0, :, 0], [0, 0, 0, 0])
        np.testing.assert_allclose(batch[1, :, 0], [1, 1.1, 1.1, 1.1])
        np.testing.assert_allclose(batch[2, :, 0], [2, 2.1, 2.2, 2.3])
        assert len(set(batch[3, :, 0])) == 4
        drawn += batch[3, :, 0].tolist()
    counts = np.unique(np.round(drawn, 1), return_counts=True)[1]
    assert len(counts) == 9
    # 200 draws of 4 of 9: 88.9 each, with a standard deviation of 7.
    assert (abs(counts - 800 / 9) < 35).all()


def test_samples_are_the_second_to_the_last_but_one() -> None:
    class Ramp(Numbered):
        def series(self, index: int) -> NDArray[np.float32]:
            return np.arange(390, dtype=np.float32)[None]

    batch = training_batch(Ramp(1), [0], channels=1, mixup=False, rng=np.random.default_rng(0))
    np.testing.assert_array_equal(batch[0, 0], np.arange(1, 389))
    with pytest.raises(InputError, match="has 390 samples; 401 are needed"):
        training_batch(
            Ramp(1), [0], channels=1, samples=400, mixup=False, rng=np.random.default_rng(0)
        )


def test_mixup_puts_one_chunk_of_another_window_into_nine_of_ten() -> None:
    count = 4000
    shards = Numbered(*[1] * 50)
    rng = np.random.default_rng(0)
    batch = training_batch(shards, [0] * count, channels=1, mixup=True, rng=rng)[:, 0]
    foreign = batch != 0
    # One run of one other window's values, or none at all.
    assert (np.abs(np.diff(foreign.astype(int), axis=1)).sum(axis=1) <= 2).all()
    for row in batch[foreign.any(axis=1)]:
        assert len(np.unique(row[row != 0])) == 1
    mixed = foreign.any(axis=1).mean()
    # One in fifty partners is window 0 itself.
    assert abs(mixed - (1 - ORIGINALS) * 49 / 50) < 0.025
    lengths = foreign.sum(axis=1)[foreign.any(axis=1)]
    # Uniform in (0, 388): mean 194, and as many in each quarter.
    assert abs(lengths.mean() - 194) < 10
    quarters = np.histogram(lengths, [0, 97, 194, 291, 388])[0] / len(lengths)
    assert (abs(quarters - 0.25) < 0.035).all()
    again = training_batch(
        shards, [0] * count, channels=1, mixup=True, rng=np.random.default_rng(0)
    )
    np.testing.assert_array_equal(again[:, 0], batch)
