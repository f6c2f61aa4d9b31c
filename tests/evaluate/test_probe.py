"""Probes are scikit-learn's as the paper calls it; what cannot be scored says so; memory is bounded."""

from __future__ import annotations

import numpy as np
import pytest
from evaluation_sets import BINARY, NUMBER, THREE

from normwear_fast.errors import InputError
from normwear_fast.evaluate import metrics, probe, splits
from normwear_fast.evaluate.registry import Task


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
    with pytest.raises(InputError, match="class 'c' alone in the test half"):
        probe.fit_probe(x, y, train, test[y[test] == 2], THREE)
    with pytest.raises(InputError, match="class 'b' is in the test half and not in training"):
        probe.fit_probe(x, y, train[y[train] != 1], test, THREE)
    with pytest.raises(InputError, match="class 'a' alone in training"):
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


def test_partial_shot_and_folds_are_probes_of_their_rows(matrix):
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
    left_out = [note for note in found.notes if "left out" in note]
    assert len(left_out) >= 4  # six subjects in five folds: only one fold can have two
    assert len(found.folds) == 5 - len(left_out)


def test_channel_shuffling_permutes_whole_channels_sample_by_sample():
    features = np.arange(4 * 3 * 2, dtype=np.float32).reshape(4, 3, 2)
    found = probe.shuffle_channels(features, 1)
    for before, after in zip(features.tolist(), found.tolist(), strict=True):
        assert sorted(after) == before
    assert not np.array_equal(found, features)
    np.testing.assert_array_equal(found, probe.shuffle_channels(features, 1))
