"""Preparation of the 11 downstream sets, each from its own layout."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import raw_sets
from payload import Payload
from raw_sets import CNT_ELECTRODES, CUFF, noise

from normwear_fast.errors import NormWearError, OutputError, RecordingError, UsageError
from normwear_fast.evaluate.prepare import prepare, read_pieces
from normwear_fast.evaluate.registry import DATASETS
from normwear_fast.evaluate.samples import load_samples
from normwear_fast.recordings.unpickle import load_pickle

EXPECTED: dict[str, tuple[Any, int, int]] = {
    # 40 s hold whole windows of baseline and of stress, and none of amusement.
    "wesad": ({0: 2, 1: 2}, 2, 390),
    "uci-har": ({0: 2, 1: 2, 2: 2, 3: 1, 4: 1, 5: 1}, 8, 167),
    "driver-fatigue": ({0: 6, 1: 6}, 3, 390),
    "epilepsy": ({0: 36, 1: 9}, 15, 390),
    "gameemo": ({0: 6, 1: 6, 2: 6, 3: 6}, 3, 390),
    "ecg-abnormal": ({0: 10, 1: 10}, 20, 98),
    "ppg-bp": ({0: 3, 1: 3, 2: 3, 3: 3}, 4, 137),
    "physionet-emg": ({0: 5, 1: 5, 2: 5}, 3, 25),
    "noninvasive-bp": ([(119, 76), (120, 76), (131, 84), (131, 85), (131, 97), (132, 76)], 3, 390),
    "ppg-hgb": ([11.1, 11.2, 12.0, 17.8], 4, 648),
    "fetal-fpcg": ([136.0, 141.0, 150.0], 3, 390),
}


@pytest.fixture
def raw_tree(tmp_path, request) -> Path:
    raw = tmp_path / "raw"
    getattr(raw_sets, f"make_{request.param.replace('-', '_')}")(raw)
    return raw


@pytest.mark.parametrize(
    ("name", "raw_tree"), [(name, name) for name in DATASETS], indirect=["raw_tree"]
)
def test_every_set_is_prepared_from_its_own_layout(name, raw_tree, tmp_path):
    done = prepare(name, raw_tree, tmp_path / "out")
    dataset = DATASETS[name]
    found = load_samples(tmp_path / "out")
    labels, subjects, length = EXPECTED[name]
    assert done.samples == len(found)
    assert done.subjects == subjects == len(np.unique(found.subjects))
    assert found.dataset is dataset
    assert found.channels == len(dataset.channels)
    assert (found.sampling_rates == 65).all()
    assert {window.shape[1] for window in found.windows} == {length}
    y = found.labels[0]
    if isinstance(labels, dict):
        assert dict(Counter(y.tolist())) == labels
    else:
        assert sorted({tuple(row) for row in y.tolist()}) == sorted(
            row if isinstance(row, tuple) else (row,) for row in labels
        )
    assert found.is_test.sum() == done.test > 0
    if dataset.split == "subject":
        assert not set(found.subjects[found.is_test]) & set(found.subjects[~found.is_test])
    # The same from the Parquet, in float32 where the published form has float16.
    table = load_samples(tmp_path / "out" / "samples.parquet")
    order = np.argsort(found.subjects, kind="stable")
    other = np.argsort(table.subjects, kind="stable")
    for mine, theirs in zip(order, other, strict=True):
        np.testing.assert_allclose(found.windows[mine], table.windows[theirs], rtol=2e-3, atol=1e-3)
        assert found.is_test[mine] == table.is_test[theirs]
        for a, b in zip(found.labels, table.labels, strict=True):
            np.testing.assert_array_equal(a[mine], b[theirs])
    sample = load_pickle(next((tmp_path / "out" / "sample_for_downstream").iterdir()))
    assert set(sample) == {"uid", "data", "sampling_rate", "label"}
    assert sample["data"].dtype == np.float16


@pytest.mark.parametrize("raw_tree", ["ppg-bp"], indirect=True)
def test_prepared_windows_are_the_reference_preprocessing(raw_tree, tmp_path):
    from normwear_fast.preprocess import preprocess

    prepare("ppg-bp", raw_tree, tmp_path / "out")
    found = load_samples(tmp_path / "out" / "samples.parquet")
    values = np.array(
        (raw_tree / "PPG-BP Database/Data File/0_subject/2_1.txt").read_text().split()
    )
    expected = preprocess(values.astype(float), 1000)
    np.testing.assert_allclose(found.windows[0][0], expected, rtol=1e-5, atol=1e-5)
    y = {
        subject: [int(labels[i]) for labels in found.labels]
        for i, subject in enumerate(found.subjects)
    }
    assert y == {"2": [0, 0, 0, 0], "3": [1, 1, 0, 1], "6": [2, 1, 1, 0], "8": [3, 0, 0, 2]}


@pytest.mark.parametrize("raw_tree", ["driver-fatigue"], indirect=True)
def test_cnt_values_are_microvolts_of_the_named_electrodes(raw_tree):
    piece = next(iter(read_pieces("driver-fatigue", raw_tree)))
    raw_values = np.round(1000 * noise(12_500, len(CNT_ELECTRODES), seed=1))
    for (values, rate), name in zip(
        piece.channels, DATASETS["driver-fatigue"].channels, strict=True
    ):
        assert rate == 1000
        expected = (raw_values[:6000, CNT_ELECTRODES.index(name)] - 3) * 0.5
        np.testing.assert_allclose(values, expected, rtol=1e-6)


@pytest.mark.parametrize("raw_tree", ["noninvasive-bp"], indirect=True)
def test_pressure_readings_label_the_time_before_the_cuff_lets_go(raw_tree):
    from normwear_fast.evaluate.prepare.noninvasive_bp import reading_times

    force = np.array(json.loads((raw_tree / "1.json").read_text())["data_FSR"])
    found = np.array(reading_times(force, 1000.0, 2)) / 1000
    np.testing.assert_allclose(found, CUFF, atol=1.0)
    pieces = [piece for piece in read_pieces("noninvasive-bp", raw_tree) if piece.subject == "01"]
    assert [piece.labels[0] for piece in pieces] == [(119.0, 76.0)] * 5 + [(131.0, 84.0)] * 5


def test_epilepsy_is_also_read_from_the_uci_table(tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    rows = ["," + ",".join(f"X{i}" for i in range(1, 179)) + ",y"]
    for number, y in enumerate((4, 1, 5, 2, 3) * 4):
        values = ",".join(str(round(value)) for value in 100 * noise(178, seed=number))
        rows.append(f"X{number % 23 + 1}.V{y}.{number // 5},{values},{y}")
    (raw / "data.csv").write_text("\n".join(rows))
    pieces = list(read_pieces("epilepsy", raw))
    assert [piece.labels.index(1) for piece in pieces[:5]] == [1, 4, 0, 3, 2]
    assert pieces[0].subject == "V4-0"
    prepare("epilepsy", raw, tmp_path / "out")
    assert load_samples(tmp_path / "out").windows[0].shape == (1, 67)


@pytest.mark.parametrize(
    ("name", "raw_tree", "spoil", "message"),
    [
        (
            "wesad",
            "wesad",
            lambda raw: (raw / "WESAD/S2/S2.pkl").write_bytes(pickle.dumps(Payload(raw / "ran"))),
            "refused as a pickle",
        ),
        (
            "uci-har",
            "uci-har",
            lambda raw: (raw / "UCI HAR Dataset/test/y_test.txt").write_text("1\n2\n"),
            "do not hold the same number of windows",
        ),
        (
            "driver-fatigue",
            "driver-fatigue",
            lambda raw: (raw / "1/Normal state.cnt").write_bytes(b"Version 3.0" + b"\0" * 100),
            "not a NeuroScan CNT",
        ),
        (
            "gameemo",
            "gameemo",
            lambda raw: next(raw.rglob("S01G1All*.csv")).write_text("AF3,T7\n1,2\n"),
            "columns like",
        ),
        (
            "ppg-bp",
            "ppg-bp",
            lambda raw: next(raw.rglob("*.xlsx")).write_bytes(b"PK\x03\x04"),
            "not a plain .xlsx",
        ),
        (
            "physionet-emg",
            "physionet-emg",
            lambda raw: (raw / "emg_healthy.dat").write_bytes(b"\0" * 15200),
            "its SHA-256 is not the one",
        ),
        (
            "noninvasive-bp",
            "noninvasive-bp",
            lambda raw: (raw / "2.json").write_text('{"data_PCG": [1, "x"]}'),
            "no series data_PCG",
        ),
        (
            "fetal-fpcg",
            "fetal-fpcg",
            lambda raw: (raw / "Records.csv").write_text("Subject,Age\n1,2\n"),
            "columns like 'fhr'",
        ),
    ],
    indirect=["raw_tree"],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_damaged_raw_files_are_named(name, raw_tree, spoil, message, tmp_path):
    spoil(raw_tree)
    with pytest.raises(NormWearError, match=message) as caught:
        prepare(name, raw_tree, tmp_path / "out")
    assert str(raw_tree) in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".out")]


@pytest.mark.parametrize("name", list(DATASETS))
def test_a_folder_of_something_else(name, tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "notes.md").write_text("nothing here")
    with pytest.raises(RecordingError, match="it should"):
        prepare(name, raw, tmp_path / "out")
    with pytest.raises(UsageError, match="no such folder; give the unpacked"):
        prepare(name, tmp_path / "absent", tmp_path / "out")


@pytest.mark.parametrize("raw_tree", ["ecg-abnormal"], indirect=True)
def test_an_existing_output_is_kept(raw_tree, tmp_path):
    prepare("ecg-abnormal", raw_tree, tmp_path / "out")
    with pytest.raises(OutputError, match="exists"):
        prepare("ecg-abnormal", raw_tree, tmp_path / "out")
    before = (tmp_path / "out" / "train_test_split.json").read_text()
    prepare("ecg-abnormal", raw_tree, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "train_test_split.json").read_text() == before
    prepare("ecg-abnormal", raw_tree, tmp_path / "out", overwrite=True, seed=1)
    assert (tmp_path / "out" / "train_test_split.json").read_text() != before
    # The raw set itself, or a folder with somebody's notes, is not deleted.
    (tmp_path / "out" / "notes.txt").write_text("mine")
    for folder in (raw_tree, tmp_path / "out"):
        files = sorted(folder.rglob("*"))
        with pytest.raises(OutputError, match="will not be overwritten"):
            prepare("ecg-abnormal", raw_tree, folder, overwrite=True)
        assert sorted(folder.rglob("*")) == files


def test_a_workbook_that_is_a_trap(tmp_path):
    from normwear_fast.evaluate.prepare.common import read_xlsx

    path = tmp_path / "x.xlsx"
    with zipfile.ZipFile(path, "w") as archive:
        bomb = '<!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]><worksheet>&b;</worksheet>'
        archive.writestr("xl/worksheets/sheet1.xml", bomb)
    with pytest.raises(RecordingError, match="declares entities"):
        read_xlsx(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("xl/worksheets/sheet1.xml", b" " * (65 << 20))
    with pytest.raises(RecordingError, match="unpacks to more than 64 MB"):
        read_xlsx(path)
