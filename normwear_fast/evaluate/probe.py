"""Linear probing by the published protocol.

Frozen features, the channels of a sample concatenated; logistic regression (newton-cg, C = 1, 500
iterations) or ridge regression (cholesky, alpha = 1) on log(y + 1), predictions clipped to the
training range. No standardisation: the published protocol has none. NaN features are 0, as
published, and counted in the result. Source: Luo et al., arXiv 2412.09758, downstream evaluation.

Memory: features stay float32. Beyond `SMALL` bytes they are not copied at all: the training rows are
brought to the front in place and put back afterwards, and the two estimators that would copy them
inside scikit-learn have a form here that solves the same problem without.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from normwear_fast.errors import InputError, one_line, require
from normwear_fast.evaluate import metrics
from normwear_fast.evaluate.registry import Task
from normwear_fast.evaluate.splits import stratified_part, subject_folds

Protocol = Literal["full", "partial", "folds"]
PROTOCOLS: tuple[Protocol, ...] = ("full", "partial", "folds")
PARTIAL = 0.1
SMALL = 256 * 2**20
_ROWS = 1024  # rows predicted, checked or swapped at a time


def logistic_regression() -> Any:
    """The published classifier."""
    require("sklearn.linear_model", "probing", "eval")
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(solver="newton-cg", C=1.0, max_iter=500)


class LargeBinaryRegression:
    """`logistic_regression` for two classes and a matrix that must not be copied.

    scikit-learn's two-class Hessian holds the training rows scaled by their weights, in all 1.6
    matrices beside the features (measured with 1.9). Here the same objective goes to the same
    Newton-CG solver (scikit-learn's own, with its tolerance and line search), and the Hessian
    multiplies the rows as they are. The tests hold the two together.
    """

    def __init__(self) -> None:
        self.template = logistic_regression()

    def fit(self, x: NDArray[np.float32], y: NDArray[np.int64]) -> LargeBinaryRegression:
        from scipy.special import expit
        from sklearn.utils.optimize import _newton_cg

        self.classes_ = np.unique(y)
        target = (y == self.classes_[1]).astype(np.float64)
        count = len(x)
        penalty = 1.0 / (self.template.C * count)

        # The solver's steps are float64, and a float64 vector would turn all of x into float64.
        def raw(w: NDArray[np.floating]) -> NDArray[np.float64]:
            return (x @ w[:-1].astype(np.float32)).astype(np.float64) + float(w[-1])

        def loss(w: NDArray[np.floating]) -> float:
            score = raw(w)
            fit = float(np.mean(np.logaddexp(0, score) - target * score))
            return fit + 0.5 * penalty * float(w[:-1] @ w[:-1])

        def rows_times(each: NDArray[np.float64], w: NDArray[np.floating]) -> NDArray[np.float32]:
            """Weighted sum of the rows, and of their constant, with the penalty's part for w."""
            found = np.empty(len(w), np.float32)
            found[:-1] = each.astype(np.float32) @ x + penalty * w[:-1]
            found[-1] = each.sum()
            return found

        def gradient(w: NDArray[np.floating]) -> NDArray[np.float32]:
            return rows_times((expit(raw(w)) - target) / count, w)

        def gradient_and_hessian(w: NDArray[np.floating]) -> tuple[NDArray[np.float32], Any]:
            probability = expit(raw(w))
            curvature = probability * (1 - probability) / count

            def product(s: NDArray[np.floating]) -> NDArray[np.float32]:
                return rows_times(curvature * raw(s), s)

            return rows_times((probability - target) / count, w), product

        weights, _ = _newton_cg(
            grad_hess=gradient_and_hessian,
            func=loss,
            grad=gradient,
            x0=np.zeros(x.shape[1] + 1, np.float32),
            tol=self.template.tol,
            maxiter=self.template.max_iter,
        )
        self.weights = weights.astype(np.float32)
        return self

    def predict_proba(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        from scipy.special import expit

        positive = expit(x @ self.weights[:-1] + self.weights[-1])
        return np.stack([1 - positive, positive], axis=1)


def ridge_regression() -> Any:
    """The published regressor, for targets in log(y + 1)."""
    require("sklearn.linear_model", "probing", "eval")
    from sklearn.linear_model import Ridge

    return Ridge(solver="cholesky", alpha=1.0)


class LargeRidgeRegression:
    """`ridge_regression` for a matrix that must not be copied, with more rows than features.

    scikit-learn centres a copy of the rows; here blocks of them are centred, one after another, as
    their products are summed. The system solved is the same.
    """

    def __init__(self) -> None:
        self.template = ridge_regression()

    def fit(self, x: NDArray[np.float32], y: NDArray[np.float64]) -> LargeRidgeRegression:
        from scipy.linalg import cho_factor, cho_solve
        from scipy.linalg.blas import ssyrk

        features = x.shape[1]
        mean = np.mean(x, axis=0, dtype=np.float64).astype(np.float32)
        middle = y.mean(axis=0)
        products = np.zeros((features, features), np.float32, order="F")
        targets = np.zeros((features, y.shape[1]))
        for start in range(0, len(x), _ROWS):
            block = x[start : start + _ROWS] - mean
            # Half of the symmetric products, added in place.
            products = ssyrk(1.0, block.T, beta=1.0, c=products, lower=1, overwrite_c=1)
            targets += block.T @ (y[start : start + _ROWS] - middle).astype(np.float32)
        products.flat[:: features + 1] += self.template.alpha
        factor = cho_factor(products, lower=True, overwrite_a=True, check_finite=False)
        self.weights = cho_solve(factor, targets.astype(np.float32), check_finite=False)
        self.intercept = middle - mean.astype(np.float64) @ self.weights
        return self

    def predict(self, x: NDArray[np.float32]) -> NDArray[np.float64]:
        return x @ self.weights + self.intercept


@dataclass
class ProbeResult:
    """One probe of one task.

    Attributes:
        scores: every metric of the task's kind, 0 to 1; `score` is the published one.
        train, test: sample counts.
        interval: bootstrap interval of `score`.
        notes: what a reader should know: no convergence, classes the test half lacks.
        test_index: which samples were tested.
        truth: their labels; targets in log(y + 1) for a regression.
        prediction: class probabilities (n, k) or clipped predictions (n, targets).
        classes: the classes in training, in the order of the probabilities; empty for a regression.
        folds: scores of each fold of a five-fold probe.
    """

    metric: str
    score: float
    scores: dict[str, float]
    train: int
    test: int
    interval: metrics.Interval | None = None
    notes: list[str] = field(default_factory=list)
    folds: list[float] = field(default_factory=list)
    test_index: NDArray[np.intp] = field(default_factory=lambda: np.empty(0, np.intp), repr=False)
    truth: NDArray[Any] = field(default_factory=lambda: np.empty(0), repr=False)
    prediction: NDArray[Any] = field(default_factory=lambda: np.empty(0), repr=False)
    classes: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64), repr=False)

    def summary(self) -> dict[str, Any]:
        """The numbers alone, for JSON."""
        return {
            "metric": self.metric,
            "score": self.score,
            "scores": self.scores,
            "train": self.train,
            "test": self.test,
            "interval": asdict(self.interval) if self.interval else None,
            "folds": self.folds,
            "notes": self.notes,
        }


# -- features --------------------------------------------------------------------------------------


def concatenate_channels(features: NDArray[np.float32]) -> NDArray[np.float32]:
    """(n, C, F) to (n, C F), without a copy."""
    return features.reshape(len(features), -1)


def shuffle_channels(features: NDArray[np.float32], seed: int) -> NDArray[np.float32]:
    """Every sample's channels in a random order of its own, in training and test alike.

    NormWear treats the channels of a window as a set: shuffling them before the encoder or their
    embeddings behind it is the same.

    Args:
        features: (n, C, F).
    """
    samples, channels, _ = features.shape
    order = np.random.default_rng(seed).random((samples, channels)).argsort(axis=1)
    return np.take_along_axis(features, order[..., None], axis=1)


def replace_nan(features: NDArray[np.float32]) -> int:
    """NaN to 0 in place, as published; how many samples had one.

    Raises:
        InputError: an infinite feature. The published replacement, the largest float, leaves no
            probe to fit.
    """
    flat = features.reshape(len(features), -1)
    affected = 0
    for start in range(0, len(flat), _ROWS):
        block = flat[start : start + _ROWS]
        if np.isfinite(block).all():
            continue
        infinite = np.isinf(block).any(axis=1)
        if infinite.any():
            raise InputError(
                f"features of sample {start + int(np.argmax(infinite))} are infinite; NaN or finite "
                "values are right"
            )
        affected += int(np.isnan(block).any(axis=1).sum())
        np.nan_to_num(block, copy=False)
    return affected


@contextmanager
def _training_rows(
    x: NDArray[np.float32], train: NDArray[np.intp]
) -> Iterator[tuple[NDArray[np.float32], NDArray[np.intp], NDArray[np.intp]]]:
    """Training rows of `x` as one matrix, by view, copy or swap, and where every row is meanwhile.

    Yields:
        the matrix, the sample of each of its rows, and the row of `x` each sample is at.
    """
    place = np.arange(len(x))
    count = len(train)
    if count and train[-1] - train[0] == count - 1 and (np.diff(train) == 1).all():
        yield x[train[0] : train[-1] + 1], train, place
        return
    if count * x.shape[1] * x.itemsize <= SMALL or not x.flags.writeable:
        yield x[train], train, place
        return
    behind = train[train >= count]
    in_front = np.setdiff1d(np.arange(count), train[train < count], assume_unique=True)

    def swap() -> None:
        for start in range(0, len(behind), _ROWS):
            a, b = in_front[start : start + _ROWS], behind[start : start + _ROWS]
            kept = x[a]
            x[a] = x[b]
            x[b] = kept

    swap()
    try:
        place[in_front], place[behind] = behind, in_front
        samples = np.arange(count)
        samples[in_front] = behind
        yield x[:count], samples, place
    finally:
        swap()


def _predict(
    function: Callable[[NDArray[np.float32]], NDArray[Any]],
    x: NDArray[np.float32],
    rows: NDArray[np.intp],
) -> NDArray[Any]:
    return np.concatenate(
        [function(x[rows[start : start + _ROWS]]) for start in range(0, len(rows), _ROWS)]
    )


# -- probes ----------------------------------------------------------------------------------------


def fit_probe(
    x: NDArray[np.float32],
    y: NDArray[Any],
    train: NDArray[np.intp],
    test: NDArray[np.intp],
    task: Task,
) -> ProbeResult:
    """Fit on `train`, score on `test`.

    Args:
        x: (n, F) finite features, float32; its rows may be moved meanwhile, and are put back.
        y: (n,) classes, or (n, targets) positive targets.
        train, test: ascending sample indices.

    Raises:
        InputError: one class in training or test, a test class that training lacks, a target that
            is not above 0.
    """
    if not len(train) or not len(test):
        raise InputError(
            f"{task.name}: {len(train)} samples train and {len(test)} test; both halves need some"
        )
    if task.kind == "class":
        _check_classes(y, train, test, task)
    target: NDArray[Any] = y if task.kind == "class" else metrics.log_targets(y, task.name)
    notes: list[str] = []
    with _training_rows(x, train) as (rows, samples, place):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            large = rows.nbytes > SMALL
            model: Any
            if task.kind == "class":
                two = len(np.unique(target[train])) == 2
                model = LargeBinaryRegression() if large and two else logistic_regression()
            else:
                tall = len(rows) > rows.shape[1]
                model = LargeRidgeRegression() if large and tall else ridge_regression()
            probe = model.fit(rows, target[samples])
        said = sorted({one_line(str(warning.message), 120) for warning in caught})
        notes += [f"scikit-learn: {message}" for message in said]
        function = probe.predict_proba if task.kind == "class" else probe.predict
        prediction = _predict(function, x, place[test])
    truth = target[test]
    if task.kind == "class":
        classes = probe.classes_.astype(np.int64)
        scores = metrics.classification_scores(truth, prediction, classes)
        lacking = np.setdiff1d(classes, truth)
        if len(lacking):
            names = ", ".join(task.classes[k] for k in lacking)
            notes.append(f"the test half lacks {names}; scored on the other classes, as published")
    else:
        classes = np.empty(0, np.int64)
        # As published, one range over all targets together.
        prediction = prediction.reshape(truth.shape).astype(np.float64)
        prediction = np.clip(prediction, target[train].min(), target[train].max())
        scores = {"relative_accuracy": float(metrics.relative_accuracy(truth, prediction)[0])}
    return ProbeResult(
        metric=task.metric,
        score=scores[task.metric],
        scores=scores,
        train=len(train),
        test=len(test),
        notes=notes,
        test_index=test,
        truth=truth,
        prediction=prediction,
        classes=classes,
    )


def _check_classes(
    y: NDArray[Any], train: NDArray[np.intp], test: NDArray[np.intp], task: Task
) -> None:
    """An InputError by the classes' own names unless both halves can be scored."""
    for half, index in (("training", train), ("the test half", test)):
        present = np.unique(y[index])
        if len(present) < 2:
            raise InputError(
                f"{task.name}: class {task.classes[present[0]]!r} alone in {half}; two or more are right"
            )
    unseen = np.setdiff1d(y[test], y[train])
    if len(unseen):
        names = ", ".join(repr(task.classes[k]) for k in unseen)
        raise InputError(
            f"{task.name}: class {names} is in the test half and not in training; a split with every "
            "class in training would be right"
        )


def score_interval(
    result: ProbeResult, subjects: NDArray[np.str_], *, resamples: int, seed: int
) -> metrics.Interval:
    """Bootstrap interval of a probe's published score; `subjects` are of all samples (n,)."""
    if len(result.classes):
        present, columns = metrics.present_probabilities(
            result.truth, result.prediction, result.classes
        )

        def score(counts: NDArray[np.float64]) -> NDArray[np.float64]:
            return metrics.fast_auc(result.truth, columns, present, counts)
    else:

        def score(counts: NDArray[np.float64]) -> NDArray[np.float64]:
            return metrics.relative_accuracy(result.truth, result.prediction, counts)

    return metrics.bootstrap_interval(
        score, subjects[result.test_index], resamples=resamples, seed=seed
    )


def probe(
    x: NDArray[np.float32],
    y: NDArray[Any],
    is_test: NDArray[np.bool_],
    subjects: NDArray[np.str_],
    task: Task,
    *,
    protocol: Protocol = "full",
    resamples: int = 1000,
    seed: int = 0,
) -> ProbeResult:
    """One task by one protocol.

    Args:
        x: (n, F) float32.
        y: (n,) classes or (n, targets).
        is_test: (n,) the set's split; not used by `folds`.
        subjects: (n,).
        protocol: `full` trains on all training samples; `partial` on a stratified tenth of them;
            `folds` is five-fold by subject, scored by the folds' mean.
        resamples: of the bootstrap; 0 for none.
        seed: of the tenth, the folds and the bootstrap.
    """
    if protocol == "folds":
        return _probe_folds(x, y, subjects, task, seed=seed)
    train, test = np.flatnonzero(~is_test), np.flatnonzero(is_test)
    if protocol == "partial":
        train = stratified_part(y, train, PARTIAL, seed)
    result = fit_probe(x, y, train, test, task)
    if resamples:
        result.interval = score_interval(result, subjects, resamples=resamples, seed=seed)
    return result


def _probe_folds(
    x: NDArray[np.float32], y: NDArray[Any], subjects: NDArray[np.str_], task: Task, *, seed: int
) -> ProbeResult:
    found: list[ProbeResult] = []
    notes: list[str] = []
    for number, (train, test) in enumerate(subject_folds(subjects, y, seed), start=1):
        try:
            found.append(fit_probe(x, y, train, test, task))
        except InputError as error:
            notes.append(f"fold {number} left out: {error}")
        else:
            notes += [f"fold {number}: {note}" for note in found[-1].notes]
    if not found:
        raise InputError(f"{task.name}: no fold can be scored; {notes[0]}")
    names = found[0].scores
    return ProbeResult(
        metric=task.metric,
        score=float(np.mean([fold.score for fold in found])),
        scores={name: float(np.mean([fold.scores[name] for fold in found])) for name in names},
        train=int(np.mean([fold.train for fold in found])),
        test=sum(fold.test for fold in found),
        notes=notes,
        folds=[fold.score for fold in found],
    )


def compare(
    first: ProbeResult, second: ProbeResult, *, permutations: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Score difference of two models on the same test half, and its permutation p value."""
    if not np.array_equal(first.test_index, second.test_index) or not len(first.test_index):
        raise InputError("two probes of different test samples cannot be compared pair by pair")
    if len(first.classes):
        present, a = metrics.present_probabilities(first.truth, first.prediction, first.classes)
        _, b = metrics.present_probabilities(second.truth, second.prediction, second.classes)

        def score(prediction: NDArray[np.floating]) -> float:
            return float(metrics.fast_auc(first.truth, prediction, present)[0])
    else:
        a, b = first.prediction, second.prediction

        def score(prediction: NDArray[np.floating]) -> float:
            return float(metrics.relative_accuracy(first.truth, prediction)[0])

    return metrics.permutation_test(score, a, b, permutations=permutations, seed=seed)


def comparison_table(
    scores: Sequence[tuple[str, str, float]],
) -> tuple[list[str], list[str], NDArray[np.float64]]:
    """Models, tasks and scores (models, tasks) of (model, task, score) rows; NaN where none."""
    models = list(dict.fromkeys(model for model, _, _ in scores))
    tasks = list(dict.fromkeys(task for _, task, _ in scores))
    table = np.full((len(models), len(tasks)), np.nan)
    for model, task, score in scores:
        table[models.index(model), tasks.index(task)] = score
    return models, tasks, table
