"""What a row holds: the model's numbers, whatever the gaps, pooling, lists, processes and names."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from encode_runs import SETTINGS, models, rows, run

from normwear_fast.encode import EncodeSettings, load_embeddings, read_window_list
from normwear_fast.encode.prepare import MISSING, TOO_LARGE
from normwear_fast.errors import OutputError, UsageError
from normwear_fast.preprocess import fill_missing, prepare_window, preprocess


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


def test_windows_with_gaps_are_rows_that_say_so(undisturbed: Path) -> None:
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
def test_channels_are_pooled_by_mean_or_side_by_side(
    how: str, cohort: Path, undisturbed: Path, tmp_path: Path
) -> None:
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


def test_the_example_cohort_is_encoded(cohort_dir: Path, tmp_path: Path) -> None:
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


def test_names_that_cannot_be_ids_fail_alone(tmp_path: Path) -> None:
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
