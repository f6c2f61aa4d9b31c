"""Who trains, who validates and who tests: no subject in two parts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from normwear_fast.errors import InputError, require
from normwear_fast.finetune.data import (
    SPLITS,
    LabelledWindows,
)


@dataclass(frozen=True)
class Split:
    """Ascending indices of the windows of each part; no subject that is known is in two of them."""

    train: NDArray[np.intp]
    validation: NDArray[np.intp]
    test: NDArray[np.intp]


def split_windows(data: LabelledWindows, fraction: float, seed: int) -> Split:
    """The split that the data bring, completed by a validation part where they name none.

    The validation part is drawn by subject, as alike in classes as whole subjects allow (scikit-learn's
    StratifiedGroupKFold); where no window names a subject, by window and class.

    Args:
        fraction: of the training subjects (or windows) that validate, at least one.
        seed: of the draw.

    Raises:
        InputError: a subject in two parts, one subject alone, or a class that only the validation
            part has.
    """
    given = data.split if data.split is not None else np.full(len(data), "")
    test = np.flatnonzero(given == "test")
    validation = np.flatnonzero(given == "validation")
    train = np.flatnonzero((given == "train") | (given == ""))
    if not len(train):
        raise InputError("no window is left to train on; all of them validate or test")
    if not len(validation):
        drawn = _draw(data, train, fraction, seed)
        train, validation = train[~drawn], train[drawn]
    split = Split(train, validation, test)
    _check_split(data, split, given_by_user=(given == "train").any())
    return split


def _draw(
    data: LabelledWindows, train: NDArray[np.intp], fraction: float, seed: int
) -> NDArray[np.bool_]:
    """Which of the training windows validate."""
    y, subjects = data.labels[train], data.subjects[train]
    if (subjects == "").all():
        data.notes.append(
            "no window names a subject: the validation part is drawn by window, and may hold people "
            "of the training part"
        )
        from normwear_fast.evaluate.splits import stratified_part

        drawn = np.zeros(len(train), dtype=bool)
        drawn[stratified_part(y, np.arange(len(train)), fraction, seed)] = True
        return drawn
    names = np.unique(subjects)
    if len(names) < 2:
        raise InputError(
            f"one subject only ({str(names[0])!r}) to train and validate on: two or more are needed, "
            "or a split column"
        )
    require("sklearn.model_selection", "a split by subject", "train")
    from sklearn.model_selection import GroupKFold, StratifiedGroupKFold

    folds = min(len(names), max(2, round(1 / fraction)))
    kind = GroupKFold
    if data.task.kind == "class" and (most := np.bincount(y).max()) > 1:
        kind = StratifiedGroupKFold  # which wants as many windows of a class as there are folds
        folds = min(folds, int(most))
    target = y if y.ndim == 1 else y[:, 0]
    drawn = np.zeros(len(train), dtype=bool)
    best = -1
    for _, chosen in kind(n_splits=folds, shuffle=True, random_state=seed).split(
        np.empty((len(y), 1)), target, subjects
    ):
        rest = np.ones(len(train), dtype=bool)
        rest[chosen] = False
        if not rest.any() or not len(chosen):
            continue
        # A class that only validates cannot be learned; one that only trains is not judged.
        lost = 0
        if data.task.kind == "class":
            lost = len(np.setdiff1d(y[chosen], y[rest])) * len(data.task.classes)
            lost += len(np.setdiff1d(y[rest], y[chosen]))
        if best < 0 or lost < best:
            best, drawn = lost, ~rest
        if not lost:
            break
    return drawn


def _check_split(data: LabelledWindows, split: Split, *, given_by_user: bool) -> None:
    parts = {name: getattr(split, name) for name in SPLITS}
    people = {
        name: {s for s in data.subjects[index].tolist() if s} for name, index in parts.items()
    }
    for first, second in (("train", "validation"), ("train", "test"), ("validation", "test")):
        both = people[first] & people[second]
        if not both:
            continue
        if given_by_user:
            raise InputError(
                f"subject {min(both)!r} is in both {first} and {second}; the results would not say "
                "how new people are done"
            )
        data.notes.append(f"{len(both)} subjects are in both {first} and {second}, as published")
    if data.task.kind != "class":
        return
    seen = np.unique(data.labels[split.train])
    for name in ("validation", "test"):
        for label in np.setdiff1d(data.labels[parts[name]], seen):
            who = people[name] & {str(s) for s in data.subjects[data.labels == label]}
            raise InputError(
                f"class {data.task.classes[label]!r} is in {name} only"
                f"{f' (subject {min(who)!r})' if who else ''}; a split with every class in training "
                "would be right"
            )
    if len(seen) < 2:
        raise InputError(
            f"class {data.task.classes[seen[0]]!r} alone in training; two or more are needed"
        )
