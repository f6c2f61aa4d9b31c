"""Scores of the published protocol, and bootstrap and permutation statistics over them.

Classification: AUC (one-vs-one, macro), average precision (macro), accuracy, precision, recall and
F1 (macro). A class that the test half lacks is taken out of the probabilities, which are then
renormalised, as published. Regression: 1 - mean(|y - p| / y), both in log(y + 1).

`relative_accuracy` and `fast_auc` are ours and take resampling weights; the rest is scikit-learn's,
and the tests hold the two together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from normwear_fast.errors import InputError, require

CLASS_METRICS = ("auc", "average_precision", "accuracy", "precision", "recall", "f1")

# Elements of one block of resampled counts (resamples x samples): 32 MB of float64.
_BLOCK = 4_000_000


def present_probabilities(
    y: NDArray[np.int64], probabilities: NDArray[np.floating], classes: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Classes found in `y`, and their probabilities (n, present), renormalised.

    Args:
        y: (n,) true classes.
        probabilities: (n, len(classes)).
        classes: (k,) the classes the probe was trained on, ascending.

    Raises:
        InputError: `y` has a class the probe never saw, or only one class (no AUC then).
    """
    present = np.unique(y)
    unseen = np.setdiff1d(present, classes)
    if len(unseen):
        raise InputError(
            f"class {', '.join(map(str, unseen))} is in the test half and not in training; "
            "a split with every class in training would be right"
        )
    if len(present) < 2:
        raise InputError(f"the test half holds class {present[0]} alone; AUC needs two or more")
    columns = np.asarray(probabilities, np.float64)[:, np.searchsorted(classes, present)]
    total = columns.sum(axis=1, keepdims=True)
    # Zero total: the probe gave all its mass to classes the test half lacks; any constant serves.
    return present, np.where(total > 0, columns / np.where(total > 0, total, 1), 1 / len(present))


def classification_scores(
    y: NDArray[np.int64], probabilities: NDArray[np.floating], classes: NDArray[np.int64]
) -> dict[str, float]:
    """The six published scores of test predictions (n, k), through scikit-learn."""
    require("sklearn.metrics", "scoring", "eval")
    from sklearn import metrics

    present, columns = present_probabilities(y, probabilities, classes)
    if len(present) == 2:
        auc = metrics.roc_auc_score(y, columns[:, 1])
        precision = metrics.average_precision_score(y == present[1], columns[:, 1])
    else:
        auc = metrics.roc_auc_score(y, columns, multi_class="ovo", average="macro", labels=present)
        precision = metrics.average_precision_score(y, columns, average="macro")
    guess = classes[np.argmax(probabilities, axis=1)]
    macro = {"average": "macro", "zero_division": 0}
    return {
        "auc": float(auc),
        "average_precision": float(precision),
        "accuracy": float(np.mean(y == guess)),
        "precision": float(metrics.precision_score(y, guess, **macro)),
        "recall": float(metrics.recall_score(y, guess, **macro)),
        "f1": float(metrics.f1_score(y, guess, **macro)),
    }


def log_targets(y: NDArray[np.float64], where: str) -> NDArray[np.float64]:
    """log(y + 1), the space of the published regressions; every y must be above 0."""
    if not (y > 0).all():
        index = int(np.argmax(~(np.atleast_2d(y.T).T > 0).all(axis=1)))
        raise InputError(
            f"{where}: target {y[index]} of sample {index}; the published score divides by "
            "log(y + 1), so targets above 0 are right"
        )
    return np.log(y + 1)


def relative_accuracy(
    y: NDArray[np.float64],
    prediction: NDArray[np.floating],
    counts: NDArray[np.float64] | None = None,
) -> NDArray[np.float64]:
    """1 - mean(|y - p| / y) over samples and targets; (1,), or one value a row of `counts` (b, n).

    `counts` says how often each resample holds each sample.
    """
    error = np.abs((y - prediction) / y)
    each = error.reshape(len(y), -1).mean(axis=1)
    if counts is None:
        return 1 - np.array([each.mean()])
    return 1 - counts @ each / counts.sum(axis=1)


def _binary_auc(
    positive: NDArray[np.bool_], score: NDArray[np.floating], counts: NDArray[np.float64]
) -> NDArray[np.float64]:
    """AUC of each row of `counts` (b, n): P(score of a positive > of a negative), ties half."""
    order = np.argsort(score, kind="stable")
    ranked = score[order]
    starts = np.concatenate([[0], np.flatnonzero(np.diff(ranked)) + 1])
    counts = counts[:, order]
    positive = positive[order]
    wins = np.add.reduceat(counts * positive, starts, axis=1)
    losses = np.add.reduceat(counts * ~positive, starts, axis=1)
    below = np.cumsum(losses, axis=1) - losses
    pairs = wins.sum(axis=1) * losses.sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (wins * (below + losses / 2)).sum(axis=1) / pairs


def fast_auc(
    y: NDArray[np.int64],
    probabilities: NDArray[np.floating],
    present: NDArray[np.int64],
    counts: NDArray[np.float64] | None = None,
) -> NDArray[np.float64]:
    """AUC, one-vs-one macro, of `present_probabilities`' columns; one value a row of `counts`.

    NaN for a resample that lacks one of the classes.
    """
    if counts is None:
        counts = np.ones((1, len(y)))
    if len(present) == 2:
        return _binary_auc(y == present[1], probabilities[:, 1], counts)
    total = np.zeros(len(counts))
    pairs = 0
    for i in range(len(present)):
        for j in range(i + 1, len(present)):
            rows = (y == present[i]) | (y == present[j])
            part = counts[:, rows]
            first = y[rows] == present[i]
            total += _binary_auc(first, probabilities[rows, i], part)
            total += _binary_auc(~first, probabilities[rows, j], part)
            pairs += 2
    return total / pairs


@dataclass(frozen=True)
class Interval:
    """A bootstrap interval of a score."""

    low: float
    high: float
    level: float
    resamples: int
    unit: str  # "subject" or "sample": what was drawn


def bootstrap_interval(
    score: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    subjects: NDArray[np.str_],
    *,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Percentile interval of a test score, drawing subjects with replacement, else samples.

    Samples of one person are not independent: where the test half has two or more named subjects,
    whole subjects are drawn.

    Args:
        score: counts (b, n) to scores (b,), NaN where a resample has none.
        subjects: (n,) who each test sample is from; "" where nobody knows.
        resamples, level, seed: how many, at which level, of which random stream.
    """
    names, member = np.unique(subjects, return_inverse=True)
    by_subject = len(names) > 1 and "" not in names
    samples = len(subjects)
    units = len(names) if by_subject else samples
    random = np.random.default_rng(seed)
    values = []
    for start in range(0, resamples, max(1, _BLOCK // samples)):
        rows = min(max(1, _BLOCK // samples), resamples - start)
        drawn = random.integers(units, size=(rows, units))
        drawn += np.arange(rows)[:, None] * units
        drawn_counts = np.bincount(drawn.ravel(), minlength=rows * units).reshape(rows, units)
        counts = drawn_counts.astype(np.float64)
        values.append(score(counts[:, member] if by_subject else counts))
    found = np.concatenate(values)
    found = found[~np.isnan(found)]
    if not len(found):
        low = high = float("nan")
    else:
        low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2]).tolist()
    return Interval(low, high, level, len(found), "subject" if by_subject else "sample")


def permutation_test(
    score: Callable[[NDArray[np.floating]], float],
    first: NDArray[np.floating],
    second: NDArray[np.floating],
    *,
    permutations: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Difference of two models' scores on one test half, and its two-sided p value.

    Under the null the two models' predictions of a sample are exchangeable: each permutation swaps
    them at random, sample by sample.

    Args:
        score: predictions of a model (n, ...) to its score.
        first, second: the two models' predictions of the same samples.
    """
    random = np.random.default_rng(seed)
    difference = score(first) - score(second)
    shape = (len(first),) + (1,) * (first.ndim - 1)
    as_far = 1  # the observed labelling is one of them, so p is never 0
    for _ in range(permutations):
        swap = random.random(len(first)).reshape(shape) < 0.5
        permuted = score(np.where(swap, second, first)) - score(np.where(swap, first, second))
        as_far += abs(permuted) >= abs(difference) - 1e-12
    return difference, as_far / (permutations + 1)


@dataclass(frozen=True)
class CriticalDifference:
    """Mean ranks of models over tasks (1 is best), Friedman's p, and Nemenyi's distance."""

    models: tuple[str, ...]
    ranks: tuple[float, ...]
    tasks: int
    p_value: float
    distance: float


def critical_difference(
    models: Sequence[str], scores: NDArray[np.float64], *, level: float = 0.05
) -> CriticalDifference:
    """Demsar's comparison of two or more models (models, tasks), higher scores better.

    Two models whose mean ranks differ by less than `distance` = q sqrt(k (k + 1) / (6 n)) are not
    told apart (Nemenyi); q is the studentised range over sqrt(2).
    """
    from scipy.stats import friedmanchisquare, rankdata, studentized_range

    k, tasks = scores.shape
    if k != len(models) or k < 2 or tasks < 2 or np.isnan(scores).any():
        raise InputError(
            f"critical difference of {k} models on {tasks} tasks; two or more of each, with a "
            "score for every pair, would be right"
        )
    ranks = rankdata(-scores, axis=0).mean(axis=1)
    # Friedman's test is defined from three models on; for two the ranks and the distance stand.
    p_value = float(friedmanchisquare(*scores).pvalue) if k > 2 else float("nan")
    q = studentized_range.ppf(1 - level, k, np.inf) / np.sqrt(2)
    distance = float(q * np.sqrt(k * (k + 1) / (6 * tasks)))
    return CriticalDifference(tuple(models), tuple(ranks.tolist()), tasks, p_value, distance)


def averages(scores: Sequence[tuple[str, float]]) -> dict[str, float]:
    """Mean score of each group, `micro` (mean over tasks) and `macro` (mean over groups).

    Args:
        scores: (group, score) of each task.
    """
    groups: dict[str, list[float]] = {}
    for group, score in scores:
        groups.setdefault(group, []).append(score)
    means = {group: float(np.mean(values)) for group, values in groups.items()}
    return means | {
        "micro": float(np.mean([score for _, score in scores])),
        "macro": float(np.mean(list(means.values()))),
    }
