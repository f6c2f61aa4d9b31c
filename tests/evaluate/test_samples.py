"""Labelled samples: published pickles read as data, folders, tables, archives."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import BASIC_MOTIONS
from payload import Payload

from normwear_fast.errors import InputError, NormWearError, RecordingError
from normwear_fast.evaluate.registry import DATASETS
from normwear_fast.evaluate.samples import load_samples


def write_released(
    folder: Path, samples: list[dict[str, Any]], names: list[str], split: Any
) -> None:
    (folder / "sample_for_downstream").mkdir(parents=True)
    for name, sample in zip(names, samples, strict=True):
        (folder / "sample_for_downstream" / name).write_bytes(pickle.dumps(sample))
    if split is not None:
        text = split if isinstance(split, str) else json.dumps(split)
        (folder / "train_test_split.json").write_text(text)


def released(n: int = 4, **changes: Any) -> list[dict[str, Any]]:
    random = np.random.default_rng(0)
    return [
        {
            "uid": "",
            "data": random.standard_normal((2, 130)).astype(np.float16),
            "sampling_rate": 65,
            "label": [{"class": index % 2}, {"reg": [100.0 + index, 60.0]}],
        }
        | changes
        for index in range(n)
    ]


NAMES = ["07_0.pkl", "07_1.pkl", "12_0.pkl", "subject_03.pkl"]


def test_the_published_format(tmp_path):
    write_released(tmp_path / "x", released(), NAMES, {"train": NAMES[:2], "test": NAMES[2:3]})
    found = load_samples(tmp_path / "x")
    assert found.subjects.tolist() == ["07", "07", "12", "subject_03"]
    # A sample that neither half lists trains, as published.
    assert found.is_test.tolist() == [False, False, True, False]
    assert [task.kind for task in found.tasks] == ["class", "reg"]
    assert found.labels[0].tolist() == [0, 1, 0, 1]
    assert found.labels[1].shape == (4, 2)
    assert found.windows[0].dtype == np.float32
    assert found.windows[0].shape == (2, 130)


def test_a_published_folder_gets_its_registered_classes(tmp_path):
    samples = released(label=[{"class": 2}])
    write_released(tmp_path / "PPG_CVD", samples, NAMES, None)
    found = load_samples(tmp_path / "PPG_CVD")
    assert found.dataset is DATASETS["ppg-bp"]
    assert found.tasks[0].classes[2].startswith("insufficiency")
    assert found.is_test is None
    samples = released(label=[{"class": 3}])
    write_released(tmp_path / "b" / "PPG_CVD", samples, NAMES, None)
    with pytest.raises(InputError, match="class 3 of cerebrovascular_disease, which has 3"):
        load_samples(tmp_path / "b" / "PPG_CVD")


def hostile_pickles(ran: Path) -> dict[str, bytes]:
    return {
        "command": pickle.dumps({"data": Payload(ran)}),
        "cut short": pickle.dumps(released(1)[0])[:-9],
        "empty": b"",
    }


@pytest.mark.parametrize("name", list(hostile_pickles(Path("x"))))
def test_a_hostile_pickle_is_refused_and_nothing_runs(tmp_path, name):
    """Read as recordings' are: their tests have the many ways to harm."""
    ran = tmp_path / "ran"
    folder = tmp_path / "set" / "sample_for_downstream"
    folder.mkdir(parents=True)
    (folder / "a_0.pkl").write_bytes(hostile_pickles(ran)[name])
    with pytest.raises(RecordingError, match=r"a_0\.pkl: ") as caught:
        load_samples(tmp_path / "set")
    assert "\n" not in str(caught.value)
    assert not ran.exists()


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[1, 2]", "right is"),
        ({"train": NAMES, "test": "07_0.pkl"}, "test is no list of file names"),
        ({"train": [1], "test": []}, "train is no list"),
        ({"train": NAMES, "test": NAMES[:1]}, "1 samples are in both halves, '07_0.pkl'"),
        ({"train": NAMES, "test": ["../../secret"]}, "not in sample_for_downstream"),
    ],
)
def test_a_hostile_split_file(tmp_path, split, message):
    write_released(tmp_path / "x", released(), NAMES, split)
    with pytest.raises(RecordingError, match=message):
        load_samples(tmp_path / "x")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": np.zeros((2, 3, 4))}, "shape"),
        ({"data": np.zeros((2, 0))}, "shape"),
        ({"data": [["a", "b"]]}, "data is"),
        ({"sampling_rate": 0}, "sampling_rate is 0"),
        ({"sampling_rate": "fast"}, "positive number of Hz"),
        ({"label": []}, "label is no list"),
        ({"label": [{"class": 1, "reg": 2}]}, "a label is not"),
        ({"label": [{"class": 0.5}]}, "a whole number is right"),
        ({"label": [{"class": float("nan")}]}, "a whole number is right"),
        ({"label": [{"class": 10**30}]}, "a whole number is right"),
        ({"label": [{"class": -1}]}, "class -1"),
        ({"label": [{"class": 10**9}]}, "numbered from 0"),
        ({"label": [{"reg": float("nan")}]}, "a finite number is right"),
        ({"label": [{"reg": "high"}]}, "a finite number is right"),
    ],
)
def test_a_hostile_sample(tmp_path, change, message):
    write_released(tmp_path / "x", released(**change), NAMES, None)
    with pytest.raises((InputError, RecordingError), match=message):
        load_samples(tmp_path / "x")


def write_folder(folder: Path, labels: str | bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in "abcd":
        np.save(folder / f"{name}.npy", np.arange(40.0).reshape(2, 20))
    data = labels if isinstance(labels, bytes) else labels.encode()
    (folder / "labels.csv").write_bytes(data)
    return folder


def test_a_users_own_folder(tmp_path):
    rows = "file,label,subject,split,sampling_rate\na.npy,calm,p1,train,50\nb.npy,busy,p2,test,50\n"
    found = load_samples(write_folder(tmp_path / "mine", rows))
    assert found.name == "mine"
    assert found.tasks[0].classes == ("busy", "calm")
    assert found.labels[0].tolist() == [1, 0]
    assert found.is_test.tolist() == [False, True]
    assert found.sampling_rates.tolist() == [50.0, 50.0]
    rows = "file,label,sampling_rate\na.npy,1.5,50\nb.npy,2,50\n"
    assert load_samples(write_folder(tmp_path / "reg", rows)).labels[0].tolist() == [[1.5], [2.0]]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ("file,label,sampling_rate\n../../etc/passwd,1,65\n", "is not below the folder"),
        ("file,label,sampling_rate\n/etc/passwd,1,65\n", "is not below the folder"),
        ("file,label,sampling_rate\na\0.npy,1,65\n", "there is no file|not a CSV"),
        ("file,label,sampling_rate\n" + "x" * 5000 + ",1,65\n", "there is no file"),
        ("file,label,sampling_rate\nz.npy,1,65\n", "there is no file 'z.npy'"),
        ("file,label,sampling_rate\na.npy,,65\n", "line 2: no label"),
        ("file,label,sampling_rate\na.npy,nan,65\n", "line 2: no label"),
        ("file,label,sampling_rate\na.npy,1,-3\n", "positive number of Hz"),
        ("file,label\na.npy,1\n", "an NPY has no clock"),
        ("file,label,sampling_rate\na.npy,1\n", "not as many fields"),
        ("file,label,sampling_rate\na.npy,1,65,9\n", "not as many fields"),
        ("file,label,sampling_rate,split\na.npy,1,65,dev\n", "split is 'dev'"),
        ("name,label\na.npy,1\n", "`file` and `label` are needed"),
        ("file,label\n", "no sample in it"),
        (b"\xff\xfe\x00\x01", "not a CSV in UTF-8"),
        (b'file,label\n"a.npy', "not a CSV"),
    ],
)
def test_a_hostile_label_file(tmp_path, labels, message):
    with pytest.raises((InputError, RecordingError), match=message) as caught:
        load_samples(write_folder(tmp_path / "mine", labels))
    assert "\n" not in str(caught.value)


def test_a_pickled_npy_is_refused(tmp_path):
    folder = write_folder(tmp_path / "mine", "file,label,sampling_rate\na.npy,1,65\n")
    np.save(folder / "a.npy", np.array([Payload(tmp_path / "ran")], dtype=object))
    with pytest.raises(RecordingError, match="not a NumPy array of numbers"):
        load_samples(folder)
    assert not (tmp_path / "ran").exists()


def write_parquet(path: Path, columns: dict[str, Any]) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns), path)
    return path


def test_a_users_own_parquet(tmp_path):
    random = np.random.default_rng(0)
    data = random.standard_normal((4, 2, 30))
    rest = {"label": ["x", "y", "x", "y"], "sampling_rate": [65.0] * 4, "subject": list("aabb")}
    nested = write_parquet(tmp_path / "a.parquet", {"data": data.tolist(), **rest})
    wide = write_parquet(
        tmp_path / "b.parquet", {"ecg": data[:, 0].tolist(), "ppg": data[:, 1].tolist(), **rest}
    )
    for path in (nested, wide):
        found = load_samples(path)
        np.testing.assert_allclose(np.stack(found.windows), data, rtol=1e-6)
        assert found.labels[0].tolist() == [0, 1, 0, 1]
        assert found.subjects.tolist() == list("aabb")
    targets = write_parquet(
        tmp_path / "c.parquet",
        {
            "data": data.tolist(),
            "age": [1.0, 2, 3, 4],
            "sex": [0, 1, 0, 1],
            "sampling_rate": [65] * 4,
        },
    )
    found = load_samples(targets, label=["age", "sex"])
    assert [task.kind for task in found.tasks] == ["reg", "class"]


def test_nulls_in_lists_are_missing_samples(tmp_path):
    """pandas writes NaN as null: what it writes reads as what was meant."""
    pd = pytest.importorskip("pandas")
    data = np.random.default_rng(0).standard_normal((4, 2, 30)).astype(np.float32)
    data[1, 0, 3:5] = data[2, 1] = np.nan
    rest = {"label": list("xyxy"), "sampling_rate": 65.0}
    frame = pd.DataFrame({"ecg": list(data[:, 0]), "ppg": [x.tolist() for x in data[:, 1]], **rest})
    frame.to_parquet(tmp_path / "pandas.parquet")
    nested = [
        [[None if np.isnan(v) else v for v in channel] for channel in window]
        for window in data.tolist()
    ]
    rest["sampling_rate"] = [65.0] * 4
    write_parquet(tmp_path / "nested.parquet", {"data": nested, **rest})
    for name in ("pandas", "nested"):
        found = load_samples(tmp_path / f"{name}.parquet")
        np.testing.assert_array_equal(np.stack(found.windows), data)
    whole = write_parquet(tmp_path / "whole.parquet", {"data": [[[1, None, 3]]] * 4, **rest})
    np.testing.assert_array_equal(load_samples(whole).windows[0], [[1, np.nan, 3]])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label": None}, "no column 'label'"),
        ({"label": ["x", None, "x", "y"]}, "row 1: no label"),
        ({"label": [float("nan"), 1.0, 2.0, 3.0]}, "row 0: no label"),
        ({"label": [float("inf"), 1.0, 2.0, 3.0]}, "finite number"),
        ({"sampling_rate": None}, "no column sampling_rate"),
        ({"sampling_rate": [65, 0, 65, 65]}, "row 1: sampling_rate is 0"),
        ({"data": [[[1.0, 2.0]], [[1.0, 2.0]], None, [[1.0]]]}, "row 2: no data"),
        ({"data": [[[1.0, 2.0], [1.0]]] * 4}, "channels of"),
        ({"data": [[[1.0, 2.0], None]] * 4}, "row 0: a channel is null"),
        ({"data": [[[None, None]]] * 4}, "numbers would be right"),
        ({"data": [1.0, 2.0, 3.0, 4.0]}, "no column `data` of lists"),
        ({"data": [["a"], ["b"], ["c"], ["d"]]}, "numbers would be right"),
    ],
)
def test_a_hostile_parquet(tmp_path, changes, message):
    columns: dict[str, Any] = {
        "data": [[[1.0, 2.0]]] * 4,
        "label": ["x", "y", "x", "y"],
        "sampling_rate": [65.0] * 4,
    } | changes
    path = write_parquet(
        tmp_path / "a.parquet",
        {name: value for name, value in columns.items() if value is not None},
    )
    with pytest.raises(NormWearError, match=message):
        load_samples(path)


def test_what_is_no_data_set(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"PAR1 no")
    (tmp_path / "x.npz").write_bytes(b"PK no")
    (tmp_path / "x.txt").write_bytes(b"")
    (tmp_path / "set" / "sample_for_downstream").mkdir(parents=True)
    for path, message in (
        (tmp_path / "absent", "no such data set"),
        (tmp_path, "neither sample_for_downstream/ nor labels.csv"),
        (tmp_path / "x.parquet", "not a Parquet file"),
        (tmp_path / "x.npz", "not an NPZ"),
        (tmp_path / "x.txt", r"a folder, a \.parquet or an \.npz"),
        (tmp_path / "set", "holds no sample"),
    ):
        with pytest.raises(NormWearError, match=message):
            load_samples(path)


def test_basic_motions_has_its_own_split():
    found = load_samples(BASIC_MOTIONS)
    assert len(found) == 80
    assert found.is_test.sum() == 40
    assert set(found.tasks[0].classes) == {"Standing", "Running", "Walking", "Badminton"}
    assert found.sampling_rates[0] == 10
