"""Downstream evaluation: registry, splits, features, probes, scores, the command."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import types
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import full_disk
from raw_sets import make_ecg_abnormal, make_ppg_bp

from normwear_fast.errors import (
    InputError,
    NormWearError,
    OutputError,
    UsageError,
)
from normwear_fast.evaluate import baselines, metrics, probe, registry, splits
from normwear_fast.evaluate.prepare import prepare
from normwear_fast.evaluate.registry import DATASETS, GROUPS, Task, find_released
from normwear_fast.evaluate.run import evaluate, write_report
from normwear_fast.evaluate.samples import SampleSet, load_samples

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


def test_a_set_given_twice_is_used_once(capsys, monkeypatch):
    monkeypatch.chdir(BASIC_MOTIONS.parent)
    again = [str(BASIC_MOTIONS), BASIC_MOTIONS.name, str(BASIC_MOTIONS)]
    options = ["--baseline", "statistics", "--no-cache", "--resamples", "0", "--json"]
    assert command(*again, *options) == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert [row["dataset"] for row in found["results"]] == ["basic_motions"]
    assert found["comparisons"] == []
    notes = [line for line in said.err.splitlines() if line.startswith("note:")]
    assert notes == [
        f"note: {BASIC_MOTIONS.name} is given twice, as {BASIC_MOTIONS} too; it is used once",
        f"note: {BASIC_MOTIONS} is given twice; it is used once",
    ]


def test_a_class_is_named_as_the_data_have_it(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = {"data": [[[1.0, 2.0, 4.0]]] * 6, "label": [1] * 6, "sampling_rate": [65.0] * 6}
    pq.write_table(pa.table(rows), tmp_path / "ones.parquet")
    with pytest.raises(InputError, match="label: class '1' alone in training; two or more"):
        command(str(tmp_path / "ones.parquet"), "--baseline", "raw", "--no-cache")


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


def test_results_that_cannot_be_written(tmp_path, capsys):
    """Known before any feature is made; and a disk that fills up later leaves nothing by halves."""
    output = tmp_path / "out"
    arguments = (str(BASIC_MOTIONS), "--baseline", "statistics", "--resamples", "0", "--no-cache")
    with full_disk(), pytest.raises(OutputError, match=r"out: cannot be written"):
        command("nowhere", *arguments[1:], "--output", str(output))
    assert not output.exists()
    with full_disk(50), pytest.raises(OutputError, match=r"results\.json: cannot be written"):
        command(*arguments, "--output", str(output))
    assert not [path for path in output.rglob("*") if path.is_file()]


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
