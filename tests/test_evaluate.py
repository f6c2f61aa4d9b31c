"""Downstream evaluation: samples, preparation, features, probes, scores, the command."""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import pickle
import struct
import sys
import types
import warnings
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from normwear_fast.errors import (
    InputError,
    NormWearError,
    OutputError,
    RecordingError,
    UsageError,
)
from normwear_fast.evaluate import baselines, metrics, probe, registry, splits
from normwear_fast.evaluate.prepare import prepare, read_pieces
from normwear_fast.evaluate.registry import DATASETS, GROUPS, Task, find_released
from normwear_fast.evaluate.run import evaluate, write_report
from normwear_fast.evaluate.samples import SampleSet, load_samples
from normwear_fast.recordings.unpickle import load_pickle

BASIC_MOTIONS = Path(__file__).parent / "data" / "imu" / "basic_motions.npz"
BINARY = Task("sick", "disease risk", ("no", "yes"))
THREE = Task("state", "state recognition", ("a", "b", "c"))
NUMBER = Task("value", "vital signs", targets=("value",))


# -- the registry ----------------------------------------------------------------------------------


def test_the_registry_is_the_papers():
    tasks = [task for dataset in DATASETS.values() for task in dataset.tasks]
    assert len(DATASETS) == 11
    assert len(tasks) == 18
    counts = Counter(task.group for task in tasks)
    assert [counts[group] for group in GROUPS] == [3, 6, 6, 3]
    for dataset in DATASETS.values():
        assert len(dataset.channels) == len(dataset.modalities) == len(dataset.sampling_rates)
    # The paper's micro and macro averages follow from its group averages by this grouping alone.
    for means, micro, macro in (
        ((83.1, 85.9, 73.2, 95.4), 82.8, 84.4),
        ((79.9, 84.3, 71.0, 95.3), 81.0, 82.6),
    ):
        scores = [(task.group, means[GROUPS.index(task.group)]) for task in tasks]
        found = metrics.averages(scores)
        assert found["macro"] == pytest.approx(sum(means) / 4)
        assert found["micro"] == pytest.approx(np.dot(means, [3, 6, 6, 3]) / 18)
        if micro == 82.8:  # the best baseline differs from group to group: its micro does not
            assert round(found["micro"], 1) == micro
            assert round(found["macro"], 1) == macro


def test_published_folder_names_find_their_tasks():
    dataset, tasks = find_released("PPG_CVD")
    assert (dataset.key, [task.name for task in tasks]) == ("ppg-bp", ["cerebrovascular_disease"])
    assert len(find_released("Epilepsy")[1]) == 5
    assert find_released("elsewhere") is None
    with pytest.raises(UsageError, match="known: wesad, uci-har"):
        registry.get_dataset("wesat")


# -- pickles ---------------------------------------------------------------------------------------


class Command:
    """Runs a command when a plain unpickler reads it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.path}'",)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_and_plain_values_are_read(tmp_path, protocol):
    value = {
        "uid": "s1",
        "data": np.arange(6, dtype=np.float16).reshape(2, 3),
        "turned": np.asfortranarray(np.arange(6.0).reshape(3, 2)),
        "big": np.arange(3, dtype=">i4"),
        "label": [{"class": np.int64(2)}, {"reg": (1.5, None)}, {"reg": np.float32(0.5)}],
    }
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps(value, protocol=protocol))
    found = load_pickle(path)
    for name in ("data", "turned", "big"):
        np.testing.assert_array_equal(found[name], value[name])
        # NumPy turns foreign byte order into the machine's, except in protocol 5.
        assert found[name].dtype.newbyteorder("=") == value[name].dtype.newbyteorder("=")
    assert found["label"] == value["label"]
    assert np.dtype("i4").isnative  # nothing of a pickle reached NumPy's own dtypes


def hostile_pickles(mark: Path) -> dict[str, bytes]:
    array = pickle.dumps(np.zeros(3), protocol=2)
    return {
        "command": pickle.dumps({"data": Command(mark)}),
        "command in an array": pickle.dumps(np.array([Command(mark)], dtype=object)),
        "object array": pickle.dumps(np.array([{}, None], dtype=object)),
        "structured array": pickle.dumps(np.zeros(2, dtype=[("a", "f8")])),
        "eval": b"cbuiltins\neval\n(S'open(\"" + str(mark).encode() + b'","w")\'\ntR.',
        "getattr": b"cbuiltins\ngetattr\n(cos\nsystem\nS'x'\ntR.",
        "memory": b"cnumpy\nndarray\n((I100000000000\ntS'd'\ntR.",
        "memory by reconstruct": b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n"
        b"(I100000000000\ntS'd'\ntR.",
        "wrong length": array.replace(b"K\x03\x85", b"K\x7f\x85"),
        "cut short": array[:-9],
        "no pickle": b"\x89PNG\r\n",
        "empty": b"",
        "deep": b"(" * 100_000 + b"t" * 100_000 + b".",
        "class of ours": b"cnormwear_fast.errors\nNormWearError\n.",
    }


@pytest.mark.parametrize("name", list(hostile_pickles(Path("x"))))
def test_a_hostile_pickle_is_refused_and_nothing_runs(tmp_path, name):
    mark = tmp_path / "ran"
    folder = tmp_path / "set" / "sample_for_downstream"
    folder.mkdir(parents=True)
    (folder / "a_0.pkl").write_bytes(hostile_pickles(mark)[name])
    with pytest.raises(RecordingError, match=r"a_0\.pkl: ") as caught:
        load_samples(tmp_path / "set")
    assert "\n" not in str(caught.value)
    assert not mark.exists()


# -- samples ---------------------------------------------------------------------------------------


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
    np.save(folder / "a.npy", np.array([Command(tmp_path / "ran")], dtype=object))
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
        ({"data": [[[1.0, None]]] * 4}, "nulls in the data"),
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


# -- splits ----------------------------------------------------------------------------------------


def test_a_tenth_of_each_class():
    y = np.repeat([0, 1, 2], [100, 40, 3])
    index = np.flatnonzero(np.arange(len(y)) % 7 != 0)
    part = splits.stratified_part(y, index, 0.1, seed=3)
    counts = np.bincount(y[index])
    assert np.bincount(y[part]).tolist() == [max(1, round(0.1 * count)) for count in counts]
    assert np.isin(part, index).all()
    assert (np.diff(part) > 0).all()
    np.testing.assert_array_equal(part, splits.stratified_part(y, index, 0.1, seed=3))
    assert not np.array_equal(part, splits.stratified_part(y, index, 0.1, seed=4))
    targets = np.linspace(1, 2, 200)[:, None]
    assert len(splits.stratified_part(targets, np.arange(200), 0.1, 0)) == 20


def test_no_subject_is_in_both_halves():
    subjects = np.repeat([f"p{i}" for i in range(11)], 4)
    y = np.tile([0, 1], 22)
    is_test = splits.split_by_subject(subjects, 0)
    assert len(np.unique(subjects[is_test])) == 2
    assert not set(subjects[is_test]) & set(subjects[~is_test])
    tested = []
    for train, test in splits.subject_folds(subjects, y, 0):
        assert not set(subjects[train]) & set(subjects[test])
        tested += test.tolist()
    assert sorted(tested) == list(range(44))


def test_one_subject_only():
    one = np.full(20, "p1")
    with pytest.raises(InputError, match="one subject only \\('p1'\\)"):
        splits.default_split(None, one, np.tile([0, 1], 10), 0)
    x = np.random.default_rng(0).standard_normal((20, 3)).astype(np.float32)
    with pytest.raises(InputError, match="5 folds by subject need 5 or more subjects; found 1"):
        probe.probe(x, np.tile([0, 1], 10), np.zeros(20, bool), one, BINARY, protocol="folds")
    nobody = np.full(20, "")
    assert splits.default_split(None, nobody, np.tile([0, 1], 10), 0).sum() == 4
    with pytest.raises(InputError, match="samples without a subject"):
        list(splits.subject_folds(nobody, np.tile([0, 1], 10), 0))


# -- scores against scikit-learn -------------------------------------------------------------------


@pytest.fixture(scope="module")
def matrix() -> dict[str, Any]:
    """A fixed random matrix with labels that depend on it, and a split."""
    random = np.random.default_rng(20260)
    x = random.standard_normal((240, 30)).astype(np.float32)
    hidden = x @ random.standard_normal((30, 3)) + 3 * random.standard_normal((240, 3))
    is_test = random.random(240) < 0.4
    return {
        "x": x,
        "binary": (hidden[:, 0] > 0).astype(np.int64),
        "three": hidden.argmax(axis=1),
        "targets": 200 + 10 * hidden[:, :2],
        "is_test": is_test,
        "train": np.flatnonzero(~is_test),
        "test": np.flatnonzero(is_test),
        "subjects": np.full(240, ""),
    }


@pytest.mark.parametrize("kind", ["binary", "three"])
def test_classification_is_scikit_learns_as_the_paper_calls_it(matrix, kind):
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import (
        average_precision_score,
        f1_score,
        precision_score,
        recall_score,
        roc_auc_score,
    )

    x, y = matrix["x"], matrix[kind]
    train, test = ~matrix["is_test"], matrix["is_test"]
    model = LogisticRegression(solver="newton-cg", C=1.0, max_iter=500).fit(x[train], y[train])
    probability = model.predict_proba(x[test])
    guess, truth = model.predict(x[test]), y[test]
    columns = probability.astype(np.float64)
    columns /= columns.sum(axis=1, keepdims=True)
    if kind == "binary":
        auc = roc_auc_score(truth, columns[:, 1])
        precision = average_precision_score(truth, columns[:, 1])
    else:
        auc = roc_auc_score(truth, columns, multi_class="ovo", average="macro")
        precision = average_precision_score(truth, columns, average="macro")
    expected = {
        "auc": auc,
        "average_precision": precision,
        "accuracy": np.mean(guess == truth),
        "precision": precision_score(truth, guess, average="macro"),
        "recall": recall_score(truth, guess, average="macro"),
        "f1": f1_score(truth, guess, average="macro"),
    }
    task = BINARY if kind == "binary" else THREE
    found = probe.fit_probe(x, y, matrix["train"], matrix["test"], task)
    np.testing.assert_array_equal(found.prediction, probability)
    assert found.prediction.dtype == np.float32  # no silent doubling of a large matrix
    assert found.scores == expected
    assert 0.6 < found.score < 0.99  # neither trivial nor broken


@pytest.mark.parametrize("targets", [1, 2])
def test_regression_is_scikit_learns_as_the_paper_calls_it(matrix, targets):
    from sklearn.linear_model import Ridge
    from sklearn.multioutput import MultiOutputRegressor

    x, y = matrix["x"], matrix["targets"][:, :targets]
    train, test = ~matrix["is_test"], matrix["is_test"]
    model = Ridge(solver="cholesky", alpha=1.0, max_iter=500)
    if targets > 1:
        model = MultiOutputRegressor(model)
    log = np.log(y + 1)
    model.fit(x[train], log[train])
    predicted = model.predict(x[test]).reshape(-1, targets)
    predicted = np.clip(predicted, log[train].min(), log[train].max())
    expected = 1 - np.mean(np.abs((log[test] - predicted) / log[test]))
    found = probe.fit_probe(x, y, matrix["train"], matrix["test"], NUMBER)
    assert found.score == pytest.approx(expected, abs=1e-6)
    assert found.prediction == pytest.approx(predicted, abs=1e-5)
    assert found.prediction.max() <= log[train].max()
    assert found.score < 1


def test_predictions_are_clipped_to_the_training_range():
    x = np.linspace(-1, 1, 50, dtype=np.float32)[:, None]
    y = np.exp(3 * x.astype(np.float64))
    found = probe.fit_probe(x, y, np.arange(10, 40), np.r_[0:10, 40:50], NUMBER)
    low, high = np.log(y[10:40] + 1).min(), np.log(y[10:40] + 1).max()
    assert found.prediction.min() == low
    assert found.prediction.max() == high


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_fast_auc_is_scikit_learns_with_ties_and_counts(classes):
    from sklearn.metrics import roc_auc_score

    random = np.random.default_rng(classes)
    y = random.integers(classes, size=200)
    probability = np.round(random.dirichlet(np.ones(classes), 200), 1) + 0.01
    probability /= probability.sum(axis=1, keepdims=True)

    def sklearn_auc(rows: np.ndarray) -> float:
        score = probability[rows, 1] if classes == 2 else probability[rows]
        return float(roc_auc_score(y[rows], score, multi_class="ovo", average="macro"))

    present = np.arange(classes)
    whole = metrics.fast_auc(y, probability, present)[0]
    assert whole == pytest.approx(sklearn_auc(np.arange(200)), abs=1e-12)
    counts = random.multinomial(200, np.full(200, 1 / 200), size=4).astype(np.float64)
    found = metrics.fast_auc(y, probability, present, counts)
    for value, row in zip(found, counts.astype(int), strict=True):
        assert value == pytest.approx(sklearn_auc(np.repeat(np.arange(200), row)), abs=1e-12)
    assert np.isnan(metrics.fast_auc(y, probability, present, (y == 0)[None].astype(float))[0])


def test_a_class_the_test_half_lacks_is_left_out_and_the_rest_renormalised(matrix):
    from sklearn.metrics import average_precision_score, roc_auc_score

    y = matrix["three"]
    for lacking in ([1], [0]):
        test = matrix["test"][~np.isin(y[matrix["test"]], lacking)]
        found = probe.fit_probe(matrix["x"], y, matrix["train"], test, THREE)
        present = [k for k in range(3) if k not in lacking]
        columns = found.prediction[:, present].astype(np.float64)
        columns /= columns.sum(axis=1, keepdims=True)
        truth = y[test] == present[1]
        assert found.score == pytest.approx(roc_auc_score(truth, columns[:, 1]), abs=1e-12)
        expected = average_precision_score(truth, columns[:, 1])
        assert found.scores["average_precision"] == pytest.approx(expected, abs=1e-12)
        assert any("the test half lacks" in note for note in found.notes)
    four = Task("state", "EEG", ("a", "b", "c", "d"))
    y = np.random.default_rng(0).integers(4, size=240)
    test = matrix["test"][y[matrix["test"]] != 2]
    found = probe.fit_probe(matrix["x"], y, matrix["train"], test, four)
    columns = found.prediction[:, [0, 1, 3]].astype(np.float64)
    columns /= columns.sum(axis=1, keepdims=True)
    expected = roc_auc_score(y[test], columns, multi_class="ovo", average="macro", labels=[0, 1, 3])
    assert found.score == pytest.approx(expected, abs=1e-12)


def test_what_cannot_be_scored_says_so(matrix):
    x, y = matrix["x"], matrix["three"]
    train, test = matrix["train"], matrix["test"]
    with pytest.raises(InputError, match="the test half holds class 2 alone"):
        probe.fit_probe(x, y, train, test[y[test] == 2], THREE)
    with pytest.raises(InputError, match="class 1 is in the test half and not in training"):
        probe.fit_probe(x, y, train[y[train] != 1], test, THREE)
    with pytest.raises(InputError, match="class 0 alone in training"):
        probe.fit_probe(x, y, train[y[train] == 0], test, THREE)
    with pytest.raises(InputError, match="0 samples train"):
        probe.fit_probe(x, y, train[:0], test, THREE)
    targets = np.full((240, 1), 5.0)
    targets[7] = 0
    with pytest.raises(InputError, match=r"value: target \[0.\] of sample 7"):
        probe.fit_probe(x, targets, train, test, NUMBER)


def test_a_constant_feature_changes_nothing(matrix):
    x = np.concatenate([matrix["x"], np.full((240, 1), 0, np.float32)], axis=1)
    for y, task in ((matrix["three"], THREE), (matrix["targets"][:, :1], NUMBER)):
        plain = probe.fit_probe(matrix["x"], y, matrix["train"], matrix["test"], task)
        found = probe.fit_probe(x, y, matrix["train"], matrix["test"], task)
        assert found.score == pytest.approx(plain.score, abs=1e-4)
        constant = np.full((240, 2), 3, np.float32)
        found = probe.fit_probe(constant, y, matrix["train"], matrix["test"], task)
        assert np.isfinite(found.score)
        if task is THREE:
            assert found.score == 0.5


def test_nan_features_are_zero_and_counted_and_infinite_ones_refused(matrix):
    x = matrix["x"].copy()
    x[[3, 9], 5] = np.nan
    expected = np.nan_to_num(x)
    assert probe.replace_nan(x) == 2
    np.testing.assert_array_equal(x, expected)
    x[11, 0] = np.inf
    with pytest.raises(InputError, match="features of sample 11 are infinite"):
        probe.replace_nan(x)


@pytest.mark.parametrize("task", [BINARY, THREE, NUMBER], ids=lambda task: task.name)
def test_large_matrices_are_not_copied_and_are_put_back(matrix, monkeypatch, task):
    y = {"sick": matrix["binary"], "state": matrix["three"], "value": matrix["targets"][:, :1]}
    x = matrix["x"].copy()
    plain = probe.fit_probe(x, y[task.name], matrix["train"], matrix["test"], task)
    monkeypatch.setattr(probe, "SMALL", 0)
    monkeypatch.setattr(probe, "_ROWS", 16)
    with probe._training_rows(x, matrix["train"]) as (rows, samples, place):
        assert np.shares_memory(rows, x)
        np.testing.assert_array_equal(np.sort(samples), matrix["train"])
        np.testing.assert_array_equal(rows, matrix["x"][samples])
        np.testing.assert_array_equal(x[place], matrix["x"])
    found = probe.fit_probe(x, y[task.name], matrix["train"], matrix["test"], task)
    np.testing.assert_array_equal(x, matrix["x"])
    assert found.score == pytest.approx(plain.score, abs=1e-4)
    assert found.prediction == pytest.approx(plain.prediction, abs=1e-3)
    assert found.prediction.dtype == plain.prediction.dtype
    # Also when fitting fails.
    with pytest.raises(RuntimeError, match="stop"), probe._training_rows(x, matrix["train"]):
        raise RuntimeError("stop")
    np.testing.assert_array_equal(x, matrix["x"])


@pytest.mark.parametrize(("task", "most"), [(BINARY, 0.25), (THREE, 0.25), (NUMBER, 0.4)])
def test_a_large_probe_holds_two_matrices_at_most(monkeypatch, task, most):
    import tracemalloc

    monkeypatch.setattr(probe, "SMALL", 0)
    monkeypatch.setattr(probe, "_ROWS", 64)
    random = np.random.default_rng(0)
    x = random.standard_normal((4000, 320)).astype(np.float32)
    y = {"sick": (x[:, 0] > 0).astype(int), "state": x[:, :3].argmax(axis=1)}
    labels = y.get(task.name, (200 + 10 * x[:, :1]).astype(np.float64))
    is_test = random.random(4000) < 0.2
    halves = np.flatnonzero(~is_test), np.flatnonzero(is_test)
    probe.fit_probe(x[:100], labels[:100], np.arange(70), np.arange(70, 100), task)  # imports
    tracemalloc.start()
    found = probe.fit_probe(x, labels, *halves, task)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < most * x.nbytes
    assert found.score > 0.9
    assert found.prediction.dtype == (np.float64 if task is NUMBER else np.float32)


def test_partial_shot_and_folds(matrix):
    x, y = matrix["x"], matrix["three"]
    kwargs = {"resamples": 0, "seed": 5}
    part = probe.probe(
        x, y, matrix["is_test"], matrix["subjects"], THREE, protocol="partial", **kwargs
    )
    rows = splits.stratified_part(y, matrix["train"], 0.1, 5)
    plain = probe.fit_probe(x, y, rows, matrix["test"], THREE)
    assert (part.train, part.score) == (len(rows), plain.score)
    subjects = np.repeat([f"p{i:02d}" for i in range(24)], 10)
    folds = probe.probe(x, y, matrix["is_test"], subjects, THREE, protocol="folds", **kwargs)
    assert len(folds.folds) == 5
    assert folds.score == pytest.approx(np.mean(folds.folds))
    assert folds.test == 240
    # Whole subjects of one class: the folds without both classes are left out, and it is said.
    lumped = np.repeat([0, 1], 120)
    found = probe.probe(
        x, lumped, matrix["is_test"], np.repeat(list("abcdef"), 40), BINARY, protocol="folds"
    )
    assert any("left out" in note for note in found.notes) or len(found.folds) == 5


def test_channel_shuffling_permutes_whole_channels_sample_by_sample():
    features = np.arange(4 * 3 * 2, dtype=np.float32).reshape(4, 3, 2)
    found = probe.shuffle_channels(features, 1)
    for before, after in zip(features.tolist(), found.tolist(), strict=True):
        assert sorted(after) == before
    assert not np.array_equal(found, features)
    np.testing.assert_array_equal(found, probe.shuffle_channels(features, 1))


# -- intervals and tests ---------------------------------------------------------------------------


def test_bootstrap_interval_covers_and_draws_subjects():
    random = np.random.default_rng(0)
    values = random.standard_normal(400)

    def mean(counts: np.ndarray) -> np.ndarray:
        return counts @ values / counts.sum(axis=1)

    found = metrics.bootstrap_interval(mean, np.full(400, ""), resamples=4000, seed=1)
    assert found.unit == "sample"
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * values.std() / 20, rel=0.08)
    assert found == metrics.bootstrap_interval(mean, np.full(400, ""), resamples=4000, seed=1)
    # Twenty copies of twenty people are twenty observations, not four hundred.
    people = np.repeat([f"p{i}" for i in range(20)], 20)
    values = np.repeat(random.standard_normal(20), 20)
    by_subject = metrics.bootstrap_interval(mean, people, resamples=2000)
    by_sample = metrics.bootstrap_interval(mean, np.full(400, ""), resamples=2000)
    assert by_subject.unit == "subject"
    ratio = (by_subject.high - by_subject.low) / (by_sample.high - by_sample.low)
    assert ratio == pytest.approx(np.sqrt(20), rel=0.2)


def test_permutation_test_tells_models_apart_only_where_they_differ(matrix):
    y = matrix["three"]
    train, test = matrix["train"], matrix["test"]
    good = probe.fit_probe(matrix["x"], y, train, test, THREE)
    noise = np.random.default_rng(0).standard_normal((240, 30)).astype(np.float32)
    bad = probe.fit_probe(noise, y, train, test, THREE)
    difference, p_value = probe.compare(good, bad, permutations=200)
    assert difference == pytest.approx(good.score - bad.score, abs=1e-9)
    assert p_value < 0.02
    assert probe.compare(good, good, permutations=50) == (0.0, 1.0)
    with pytest.raises(InputError, match="different test samples"):
        probe.compare(good, probe.fit_probe(noise, y, train, test[1:], THREE))


def test_critical_difference_is_demsars():
    # Demsar 2006, section 3.2.2: the four C4.5 variants on 14 data sets.
    table = """.763 .768 .771 .798 .599 .591 .590 .569 .954 .971 .968 .967 .628 .661 .654 .657
    .882 .888 .886 .898 .936 .931 .916 .931 .661 .668 .609 .685 .583 .583 .563 .625
    .775 .838 .866 .875 1.0 1.0 1.0 1.0 .940 .962 .965 .962 .619 .666 .614 .669
    .972 .981 .9751 .975 .957 .978 .946 .970"""
    scores = np.array(table.split(), float).reshape(14, 4).T
    found = metrics.critical_difference(["C4.5", "+m", "+cf", "+m+cf"], scores)
    np.testing.assert_allclose(found.ranks, [3.143, 2.000, 2.893, 1.964], atol=2e-3)
    assert found.distance == pytest.approx(1.25, abs=0.005)
    assert 0.01 < found.p_value < 0.05
    with pytest.raises(InputError, match="two or more of each"):
        metrics.critical_difference(["a"], scores[:1])


# -- features --------------------------------------------------------------------------------------


def published_statistics(x: np.ndarray, rate: float) -> np.ndarray:
    """The sixteen, written out for one series from their definitions."""
    from scipy.stats import kurtosis, skew

    values = [x.mean(), x.std(), x.max(), x.min(), skew(x), kurtosis(x)]
    values += [np.quantile(x, q) for q in (0.25, 0.5, 0.75)]
    bins = len(x) // 2
    magnitude = np.abs(np.fft.fft(x))[:bins]
    frequency = np.fft.fftfreq(len(x), 1 / rate)[:bins]
    share = magnitude / magnitude.sum()
    centroid = np.sum(frequency * share)
    values += [centroid, np.sqrt(np.sum((frequency - centroid) ** 2 * share)), frequency.mean()]
    values.append(frequency[magnitude.argmax()])
    for q in (0.25, 0.5, 0.75):
        values.append(frequency[min(np.searchsorted(np.cumsum(share), q), bins - 1)])
    return np.nan_to_num(np.sign(values) * np.log1p(np.abs(values)))


@pytest.mark.parametrize("length", [2, 11, 390, 391])
def test_the_sixteen_statistics(length):
    random = np.random.default_rng(length)
    x = 5 + 3 * random.standard_normal((3, 2, length)).cumsum(axis=-1)
    found = baselines.channel_statistics(x, 65.0)
    assert found.shape == (3, 2, 16)
    for index in itertools.product(range(3), range(2)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            np.testing.assert_allclose(
                found[index], published_statistics(x[index], 65.0), rtol=1e-9, atol=1e-9
            )


def test_statistics_of_a_constant_channel_are_finite():
    for value in (0.0, 4.2, 1e30):
        found = baselines.channel_statistics(np.full(390, value), 65.0)
        assert np.isfinite(found).all()
        assert found[4] == found[5] == 0


def small_set(
    n: int = 12, lengths: tuple[int, ...] = (130, 130, 200), rate: float = 65.0
) -> SampleSet:
    random = np.random.default_rng(0)
    y = np.arange(n) % 2
    windows = [
        (random.standard_normal((2, lengths[i % len(lengths)])) * (1 + 4 * y[i])).astype(np.float32)
        for i in range(n)
    ]
    return SampleSet(
        name="small",
        windows=windows,
        sampling_rates=np.full(n, rate),
        subjects=np.array([f"p{i // 2}" for i in range(n)]),
        tasks=(BINARY,),
        labels=(y,),
        is_test=np.arange(n) >= n // 2,
        ids=[f"sample {i}" for i in range(n)],
    )


@pytest.fixture(scope="module")
def tiny() -> baselines.NormWear:
    from normwear_fast.config import NormWearConfig
    from normwear_fast.model import FastNormWear

    config = NormWearConfig(
        embed_dim=32, depth=1, num_heads=1, decoder_embed_dim=32, decoder_depth=1
    )
    return baselines.NormWear(FastNormWear(optimized_cwt=True, config=config), name="random")


def test_features_of_ragged_windows_keep_their_order(tiny):
    samples = small_set()
    for embedder in (baselines.Statistics(), tiny):
        together = baselines.embeddings(samples, embedder)
        assert together.shape[:2] == (12, 2)
        assert together.dtype == np.float32
        alone = np.concatenate(
            [
                embedder.embed([window], np.array([rate]))
                for window, rate in zip(samples.windows, samples.sampling_rates, strict=True)
            ]
        )
        np.testing.assert_allclose(together, alone, atol=2e-5)
    with pytest.raises(InputError, match="windows of one length; found \\[130, 200\\]"):
        baselines.embeddings(samples, baselines.Raw())


def test_normwear_features_are_the_models_mean_over_tokens(tiny):
    import torch

    samples = small_set(2, (130,))
    found = baselines.embeddings(samples, tiny)
    with torch.inference_mode():
        whole = tiny.model.get_embedding(np.stack(samples.windows), sampling_rate=65)
    np.testing.assert_allclose(found, np.asarray(whole.mean(dim=2)), atol=1e-5)


def test_samples_of_other_channel_counts_are_refused():
    samples = small_set()
    samples.windows[5] = samples.windows[5][:1]
    with pytest.raises(InputError, match="sample 5 has 1 channels, sample 0 has 2"):
        baselines.embeddings(samples, baselines.Statistics())


def test_features_are_computed_once(tmp_path, monkeypatch):
    calls = []
    original = baselines.Statistics.embed

    def counted(self: Any, windows: Any, rates: Any) -> Any:
        calls.append(len(windows))
        return original(self, windows, rates)

    monkeypatch.setattr(baselines.Statistics, "embed", counted)
    samples = small_set()
    first = baselines.embeddings(samples, baselines.Statistics(), tmp_path)
    again = baselines.embeddings(small_set(), baselines.Statistics(), tmp_path)
    np.testing.assert_array_equal(first, again)
    assert calls == [12]
    changed = small_set()
    changed.windows[3] = changed.windows[3] + 1
    baselines.embeddings(changed, baselines.Statistics(), tmp_path)
    slower = small_set(rate=64.0)
    baselines.embeddings(slower, baselines.Statistics(), tmp_path)
    assert calls == [12] * 3
    # A file cut short is computed again; nothing half-written is left.
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:50])
    np.testing.assert_array_equal(
        first, baselines.embeddings(small_set(), baselines.Statistics(), tmp_path)
    )
    assert calls == [12] * 4
    assert not list(tmp_path.glob("*.tmp"))
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(OutputError, match="features cannot be kept there"):
        baselines.embeddings(small_set(), baselines.Statistics(), blocked)


def test_the_cache_knows_weights_from_weights(tiny):
    from normwear_fast.model import FastNormWear

    other = FastNormWear(optimized_cwt=True, config=tiny.model.config, seed=1)
    scipy = FastNormWear(optimized_cwt=False, config=tiny.model.config)
    identities = [
        json.dumps(baselines.NormWear(model).identity(), sort_keys=True, default=str)
        for model in (tiny.model, other, scipy)
    ]
    assert len(set(identities)) == 3
    same = FastNormWear(optimized_cwt=True, config=tiny.model.config)
    assert baselines.NormWear(same).identity() == tiny.identity()


# -- adapters --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "package"), [("chronos", "chronos"), ("moment", "momentfm"), ("clap", "transformers")]
)
def test_a_missing_package_says_how_to_get_it(monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UsageError, match=f"needs the package {package}; pip install"):
        baselines.embeddings(small_set(), baselines.BASELINES[name]())


def test_chronos_takes_the_last_tokens_state(monkeypatch):
    import torch

    class Pipeline:
        @classmethod
        def from_pretrained(cls, model: str, device_map: str) -> Pipeline:
            assert (model, device_map) == ("amazon/chronos-t5-large", "cpu")
            return cls()

        def embed(self, series: torch.Tensor) -> tuple[torch.Tensor, None]:
            tokens = torch.cat([series, 10 * series.mean(dim=1, keepdim=True)], dim=1)
            return tokens[..., None].repeat(1, 1, 4).to(torch.bfloat16), None

    monkeypatch.setitem(sys.modules, "chronos", types.SimpleNamespace(ChronosPipeline=Pipeline))
    samples = small_set()
    found = baselines.embeddings(samples, baselines.Chronos())
    assert found.shape == (12, 2, 4)
    expected = np.stack([10 * window.mean(axis=1) for window in samples.windows])
    np.testing.assert_allclose(found[..., 0], expected, rtol=0.01, atol=0.01)


def test_moment_pads_on_the_left_and_masks(monkeypatch):
    import torch

    class Pipeline(torch.nn.Module):
        @classmethod
        def from_pretrained(cls, model: str, model_kwargs: dict[str, str]) -> Pipeline:
            assert model_kwargs == {"task_name": "embedding"}
            return cls()

        def init(self) -> None:
            self.ready = True

        def forward(self, x_enc: torch.Tensor, input_mask: torch.Tensor) -> Any:
            assert self.ready
            assert x_enc.shape[1:] == (1, 512)
            assert (x_enc[:, 0][input_mask == 0] == 0).all()
            sums = torch.stack([x_enc[:, 0, -1], input_mask.sum(dim=1)], dim=1)
            return types.SimpleNamespace(embeddings=sums)

    monkeypatch.setitem(sys.modules, "momentfm", types.SimpleNamespace(MOMENTPipeline=Pipeline))
    samples = small_set(lengths=(130, 600))
    found = baselines.embeddings(samples, baselines.Moment())
    assert found[0, 0].tolist() == [samples.windows[0][0, -1], 130]
    assert found[1, 1].tolist() == [samples.windows[1][1, -1], 512]


def test_clap_runs_through_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.ClapAudioConfig(
        hidden_size=32,
        patch_embeds_hidden_size=16,
        depths=[1, 1],
        num_attention_heads=[2, 2],
        num_hidden_layers=2,
        projection_dim=8,
        spec_size=64,
        num_mel_bins=16,
        window_size=4,
        enable_fusion=False,
    )
    try:
        model = transformers.ClapAudioModelWithProjection(config)
        model.save_pretrained(tmp_path)
    except Exception as error:
        pytest.skip(f"a tiny CLAP cannot be built with this transformers: {error}")
    transformers.ClapFeatureExtractor(
        feature_size=16, truncation="rand_trunc", max_length_s=2, fft_window_size=256
    ).save_pretrained(tmp_path)
    found = baselines.embeddings(small_set(2, (130,)), baselines.Clap(model=str(tmp_path)))
    assert found.shape == (2, 2, 8)
    assert np.isfinite(found).all()


# -- preparation: every set in its true layout -----------------------------------------------------


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def make_wesad(raw: Path) -> None:
    for subject in ("S2", "S3"):
        folder = raw / "WESAD" / subject
        folder.mkdir(parents=True)
        seconds = 40
        label = np.repeat([0, 1, 2, 4, 3], [4, 13, 12, 5, 6]).repeat(700)
        record = {
            "signal": {
                "chest": {
                    name: noise(700 * seconds, 3 if name == "ACC" else 1)
                    for name in ("ACC", "ECG", "EMG", "EDA", "Temp", "Resp")
                },
                "wrist": {
                    "ACC": noise(32 * seconds, 3),
                    "BVP": noise(64 * seconds, 1),
                    "EDA": noise(4 * seconds, 1),
                    "TEMP": noise(4 * seconds, 1),
                },
            },
            "label": label.astype(np.int32),
            "subject": subject,
        }
        # Python 2 wrote protocol 2.
        (folder / f"{subject}.pkl").write_bytes(pickle.dumps(record, protocol=2))
        (folder / f"{subject}_quest.csv").write_text("# Subj;S2;;\n")


def make_uci_har(raw: Path) -> None:
    root = raw / "UCI HAR Dataset"
    for half, subjects in (("train", [1, 1, 3, 5, 6, 7]), ("test", [2, 4, 9])):
        signals = root / half / "Inertial Signals"
        signals.mkdir(parents=True)
        for kind in ("total_acc", "body_acc", "body_gyro"):
            for axis in "xyz":
                np.savetxt(
                    signals / f"{kind}_{axis}_{half}.txt", noise(len(subjects), 128), " %.7e"
                )
        activities = [(index % 6) + 1 for index in range(len(subjects))]
        np.savetxt(root / half / f"y_{half}.txt", activities, "%d")
        np.savetxt(root / half / f"subject_{half}.txt", subjects, "%d")


CNT_ELECTRODES = ("HEOL", "FP1", "FP2", "F7", "TP7", "TP8", "O1", "A2")


def cnt_file(values: np.ndarray, rate: int, events: bool = True) -> bytes:
    """A NeuroScan CNT file of (samples, electrodes) int32 values."""
    samples, electrodes = values.shape
    header = bytearray(900)
    header[:12] = b"Version 3.0\0"
    struct.pack_into("<H", header, 370, electrodes)
    struct.pack_into("<H", header, 376, rate)
    struct.pack_into("<i", header, 864, samples)
    table = bytearray()
    for name in CNT_ELECTRODES:
        entry = bytearray(75)
        entry[: len(name)] = name.encode()
        struct.pack_into("<h", entry, 47, 3)
        struct.pack_into("<f", entry, 59, 204.8)
        struct.pack_into("<f", entry, 71, 0.5)
        table += entry
    data = values.astype("<i4").tobytes()
    if events:
        struct.pack_into("<i", header, 886, 900 + len(table) + len(data))
        data += b"\x01" + b"\0" * 30
    return bytes(header) + bytes(table) + data


def make_driver_fatigue(raw: Path) -> None:
    for subject in ("1", "2", "12"):
        folder = raw / subject
        folder.mkdir(parents=True)
        for state in ("Normal state", "Fatigue state"):
            values = np.round(1000 * noise(12_500, len(CNT_ELECTRODES), seed=int(subject)))
            (folder / f"{state}.cnt").write_bytes(cnt_file(values, 1000))


def make_epilepsy(raw: Path) -> None:
    for letter in "ZONFS":
        folder = raw / letter
        folder.mkdir(parents=True)
        suffix = ".TXT" if letter == "N" else ".txt"
        for number in (1, 2, 100):
            values = np.round(100 * noise(4097, seed=number)).astype(int)
            (folder / f"{letter}{number:03d}{suffix}").write_text(
                "\n".join(map(str, values)) + "\n"
            )


def make_gameemo(raw: Path) -> None:
    names = "AF3,AF4,F3,F4,F7,F8,FC5,FC6,O1,O2,P7,P8,T7,T8,"
    for subject in (1, 2, 3):
        folder = raw / f"(S{subject:02d})" / "Preprocessed EEG Data" / ".csv format"
        folder.mkdir(parents=True)
        for game in (1, 2, 3, 4):
            rows = [names] + [
                ",".join(f"{value:.4f}" for value in row) + "," for row in noise(128 * 13, 14)
            ]
            (folder / f"S{subject:02d}G{game}AllChannels.csv").write_text("\n".join(rows))
        raw_folder = raw / f"(S{subject:02d})" / "Raw EEG Data" / ".csv format"
        raw_folder.mkdir(parents=True)
        (raw_folder / f"S{subject:02d}G1AllRawChannels.csv").write_text(names + "\n")


def make_ecg_abnormal(raw: Path) -> None:
    raw.mkdir(parents=True)
    for label, name in enumerate(("normal", "abnormal")):
        beats = np.abs(noise(10, 188, seed=label))
        beats[:, 120:] = 0
        beats[:, 187] = label
        np.savetxt(raw / f"ptbdb_{name}.csv", beats, "%.18e", delimiter=",")
    np.savetxt(raw / "mitbih_train.csv", np.zeros((2, 188)), delimiter=",")


def xlsx(rows: list[list[Any]]) -> dict[str, str]:
    """The parts of a workbook as Excel writes a plain table."""
    strings: list[str] = []
    body = []
    for number, row in enumerate(rows, start=1):
        cells = []
        for index, value in enumerate(row):
            if value == "":
                continue
            name = f"{chr(65 + index)}{number}"
            if isinstance(value, str):
                if value not in strings:
                    strings.append(value)
                cells.append(f'<c r="{name}" t="s"><v>{strings.index(value)}</v></c>')
            else:
                cells.append(f'<c r="{name}"><v>{value}</v></c>')
        body.append(f'<row r="{number}">{"".join(cells)}</row>')
    space = 'xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"'
    items = "".join(f"<si><t>{text}</t></si>" for text in strings)
    return {
        "xl/workbook.xml": f"<workbook {space}/>",
        "xl/sharedStrings.xml": f"<sst {space}>{items}</sst>",
        "xl/worksheets/sheet1.xml": f"<worksheet {space}><sheetData>{''.join(body)}"
        "</sheetData></worksheet>",
    }


PPG_BP_ROWS: list[list[Any]] = [
    ["Cardiovascular dataset"],
    [
        "Num.",
        "subject_ID",
        "Sex(M/F)",
        "Age(year)",
        "Hypertension",
        "Diabetes",
        "cerebral infarction",
        "cerebrovascular disease",
    ],
    [1, 2, "Female", 45, "Normal", "", "", ""],
    [2, 3, "Male", 50, "Prehypertension", "Type 2 Diabetes", "", "cerebrovascular disease"],
    [3, 6, "Male", 60, "Stage 1 hypertension", "Diabetes", "cerebral infarction", ""],
    [4, 8, "Male", 61, "Stage 2 hypertension", "", "", "insufficiency of cerebral blood supply"],
]


def make_ppg_bp(raw: Path) -> None:
    folder = raw / "PPG-BP Database" / "Data File" / "0_subject"
    folder.mkdir(parents=True)
    with zipfile.ZipFile(folder.parent / "PPG-BP dataset.xlsx", "w") as archive:
        for name, text in xlsx(PPG_BP_ROWS).items():
            archive.writestr(name, text)
    for subject in (2, 3, 6, 8):
        for segment in (1, 2, 3):
            values = np.round(2000 + 100 * noise(2100, seed=subject)).astype(int)
            (folder / f"{subject}_{segment}.txt").write_text("\t".join(map(str, values)) + "\t")


def make_physionet_emg(raw: Path) -> None:
    wfdb = pytest.importorskip("wfdb")
    raw.mkdir(parents=True)
    sums = []
    for name in ("healthy", "myopathy", "neuropathy"):
        wfdb.wrsamp(
            f"emg_{name}",
            fs=4000,
            units=["mV"],
            sig_name=["EMG"],
            p_signal=noise(7600, 1),
            fmt=["16"],
            write_dir=str(raw),
        )
        for suffix in (".hea", ".dat"):
            data = (raw / f"emg_{name}{suffix}").read_bytes()
            sums.append(f"{hashlib.sha256(data).hexdigest()} emg_{name}{suffix}")
    (raw / "SHA256SUMS.txt").write_text("\n".join(sums) + "\n")


# Seconds at which the cuff deflates in the synthetic recordings.
CUFF = (35.0, 70.0)


def make_noninvasive_bp(raw: Path) -> None:
    raw.mkdir(parents=True)
    for subject in (1, 2, 14):
        time = np.arange(80_000) / 1000
        force = np.full(len(time), 3000.0)
        for end in CUFF:
            # The cuff presses for eight seconds, then lets go.
            force[(time > end - 8) & (time < end)] -= 1500
        record = {
            "age": 30,
            "weight": 70,
            "height": 170,
            "data_PPG": np.round(500 * noise(80_000)).tolist(),
            "data_ECG": np.round(500 * noise(80_000, seed=1)).tolist(),
            "data_PCG": np.round(500 * noise(80_000, seed=2)).tolist(),
            "data_FSR": force.tolist(),
            "data_BP": [{"SBP": 118 + subject, "DBP": 76}, {"SBP": 131, "DBP": 83 + subject}],
        }
        (raw / f"{subject}.json").write_text(json.dumps(record))


def make_ppg_hgb(raw: Path) -> None:
    root = raw / "Hemoglobin Photoplethysmography Dataset"
    folder = root / "Raw dataset per subject"
    folder.mkdir(parents=True)
    for subject in (1, 2, 10, 68):
        rows = ["Red (a.u),Infra Red (a.u),Gender,Age (year),Hemoglobin (g/dL)"]
        for red, infrared in 1e5 + 1000 * noise(249 + subject % 2, 2, seed=subject):
            rows.append(f"{red:.0f},{infrared:.0f},Female,33,{11 + subject / 10}")
        (folder / f"{subject}.csv").write_text("\n".join(rows))
    other = root / "Preprocessing dataset per subject"
    other.mkdir()
    (other / "1.csv").write_text("Red (a.u),Infra Red (a.u)\n1,2\n")
    (root / "Final Dataset Hb PPG.csv").write_text("Red (a.u)\n1\n")


def make_fetal_fpcg(raw: Path) -> None:
    from scipy.io import wavfile

    raw.mkdir(parents=True)
    rows = ["Subject,Gestational age (weeks),Maternal age,FHR (bpm)"]
    for subject, rate in ((1, "141"), (2, "NA"), (3, "150"), (10, "136")):
        rows.append(f"{subject},36,24,{rate}")
        values = (3000 * noise(2000 * 13, seed=subject)).astype(np.int16)
        wavfile.write(raw / f"subject_{subject:02d}.wav", 2000, values)
    (raw / "Records.csv").write_text("\n".join(rows) + "\n")


# Samples of each class in order of the labels, or the targets; the number of subjects; the length.
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
    globals()[f"make_{request.param.replace('-', '_')}"](raw)
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
            lambda raw: (raw / "WESAD/S2/S2.pkl").write_bytes(pickle.dumps(Command(raw / "ran"))),
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


# -- the whole, and the command --------------------------------------------------------------------


def test_a_prepared_set_is_evaluated_with_its_groups(tmp_path):
    make_ppg_bp(tmp_path / "raw")
    prepare("ppg-bp", tmp_path / "raw", tmp_path / "out", seed=0)
    found = load_samples(tmp_path / "out")
    # Twelve samples of four people cannot hold out a person of each class.
    found.is_test = np.arange(12) % 3 == 2
    result = evaluate([found], [baselines.Statistics()], resamples=20)
    assert [row.task.name for row in result.rows] == [task.name for task in found.tasks]
    (entry,) = result.averages
    scores = [row.result.score for row in result.rows]
    assert entry["averages"]["disease risk"] == pytest.approx(np.mean(scores))
    assert entry["averages"]["micro"] == pytest.approx(np.mean(scores))


def test_nan_embeddings_are_reported():
    class Broken:
        name = "broken"

        def identity(self) -> dict[str, Any]:
            return {}

        def embed(self, windows: Any, rates: Any) -> np.ndarray:
            features = np.stack([window.std(axis=1, keepdims=True) for window in windows])
            features[[1, 8]] = np.nan
            return features

    result = evaluate([small_set()], [Broken()], resamples=0)
    assert "2 of 12 samples had NaN features, taken as 0" in result.rows[0].result.notes


def command(*arguments: str) -> int:
    from normwear_fast.cli import probe as probe_command

    parser = argparse.ArgumentParser()
    probe_command.add_arguments(parser)
    return probe_command.run(parser.parse_args(list(arguments)))


def run_basic_motions(capsys: Any, *arguments: str) -> dict[str, Any]:
    code = command(
        str(BASIC_MOTIONS),
        "--model",
        "random-small",
        "--baseline",
        "statistics",
        "--json",
        *arguments,
    )
    assert code == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def tiny_random(monkeypatch, tiny):
    """`--model random-small` at a size that leaves the suite fast."""
    from normwear_fast.config import NormWearConfig

    monkeypatch.setattr(NormWearConfig, "small", classmethod(lambda cls: tiny.model.config))


def test_basic_motions_side_by_side_and_reproducible(capsys, tiny_random, tmp_path):
    seed = ("--resamples", "200", "--seed", "3")
    first = run_basic_motions(capsys, "--no-cache", *seed)
    again = run_basic_motions(capsys, "--cache", str(tmp_path / "c"), *seed)
    cached = run_basic_motions(capsys, "--cache", str(tmp_path / "c"), *seed)
    assert first == again == cached
    rows = {row["model"]: row for row in first["results"]}
    assert set(rows) == {"random-small", "statistics"}
    for row in rows.values():
        assert (row["train"], row["test"], row["metric"]) == (40, 40, "auc")
        assert row["score"] > 0.9  # random features already separate this set
        assert row["interval"]["low"] <= row["score"] <= row["interval"]["high"]
    assert first["comparisons"][0]["models"] == ["random-small", "statistics"]
    command(
        str(BASIC_MOTIONS), "--baseline", "raw", "--no-cache", "--protocol", "partial", "--json"
    )
    (row,) = json.loads(capsys.readouterr().out)["results"]
    assert (row["train"], row["protocol"]) == (4, "partial")


@pytest.mark.slow
def test_basic_motions_with_the_small_model(capsys):
    found = run_basic_motions(capsys, "--no-cache")
    assert all(row["score"] > 0.99 for row in found["results"])


def test_the_command_writes_a_report(capsys, tiny_random, tmp_path):
    output = tmp_path / "out"
    code = command(
        *(str(BASIC_MOTIONS), "--baseline", "statistics", "--baseline", "raw", "--no-cache"),
        *("--output", str(output), "--resamples", "100", "--shuffle-channels"),
    )
    assert code == 0
    text = capsys.readouterr().out
    columns = "data model protocol train test metric score % 95 % interval accuracy %"
    assert text.splitlines()[0].split() == columns.split()
    assert "permutation p" in text
    page = (output / "report.html").read_text()
    assert page.count("<img") == page.count("data:image/png;base64,") >= 6
    assert "http" not in page.replace("http-equiv", "")
    names = {path.name for path in (output / "pictures").iterdir()}
    assert "scores-full.png" in names
    assert "ROC-basic-motions-raw-full.svg" in names
    assert json.loads((output / "results.json").read_text())["settings"]["shuffle_channels"]
    with pytest.raises(OutputError, match="exists"):
        command(str(BASIC_MOTIONS), "--baseline", "raw", "--output", str(output))


def test_the_command_lists_and_prepares(capsys, tmp_path):
    assert command("--list") == 0
    text = capsys.readouterr().out
    assert text.count("\n") == 11 + 18
    assert command("--list", "--json") == 0
    assert len(json.loads(capsys.readouterr().out)) == 11
    make_ecg_abnormal(tmp_path / "raw")
    arguments = ["ecg-abnormal", "--prepare", str(tmp_path / "raw"), "--output"]
    assert command(*arguments, str(tmp_path / "a"), "--json") == 0
    assert json.loads(capsys.readouterr().out)["samples"] == 20
    assert command(*arguments, str(tmp_path / "b")) == 0
    assert "ECG-Abnormal: 20 samples" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no DATASET given"),
        (["x.npz"], "nothing to probe"),
        (["x.npz", "--baseline", "raw"], "no such data set"),
        (["x", "--prepare", "y"], "takes one DATASET"),
        (["x", "--prepare", "y", "--output", "z"], "no downstream set 'x'"),
        ([str(BASIC_MOTIONS), "--baseline", "raw", "--seed", "-1"], "0 or more"),
        ([str(BASIC_MOTIONS), "--baseline", "raw", "--device", "tpu"], "not on this machine"),
        ([str(BASIC_MOTIONS), "--baseline", "raw", "--protocol", "folds"], "without a subject"),
    ],
)
def test_wrong_usage(arguments, message):
    with pytest.raises(NormWearError, match=message):
        command(*arguments)


def test_a_report_of_several_sets_and_models(tmp_path):
    other = small_set()
    other.name, other.tasks = "other", (Task("sick", "EEG", ("no", "yes")),)
    third = small_set(n=14)
    third.name = "third"
    result = evaluate([small_set(), other, third], [baselines.Statistics(), _Means()], resamples=20)
    names = {path.name for path in write_report(result, tmp_path / "out")}
    assert {"radar-full.png", "critical-difference-full.svg", "report.html"} <= names


class _Means:
    name = "means"

    def identity(self) -> dict[str, Any]:
        return {}

    def embed(self, windows: Any, rates: Any) -> np.ndarray:
        return np.stack([window.mean(axis=1, keepdims=True) for window in windows])
