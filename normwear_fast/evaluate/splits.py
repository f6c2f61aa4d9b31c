"""Which samples train and which test: by subject, stratified, ten per cent, five folds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from normwear_fast.errors import InputError, require
from normwear_fast.evaluate.registry import Dataset

TEST_PART = 0.2
FOLDS = 5


def stratified_part(
    y: NDArray[Any], index: NDArray[np.intp], fraction: float, seed: int
) -> NDArray[np.intp]:
    """A random `fraction` of `index`, of each class of `y` alike, at least one of each.

    Regression targets (floating point) have no classes and are drawn at random. Ascending.
    """
    strata = np.zeros(len(index), np.int64) if y.dtype.kind == "f" else y[index].astype(np.int64)
    order = np.lexsort((np.random.default_rng(seed).random(len(index)), strata))
    _, starts, counts = np.unique(strata[order], return_index=True, return_counts=True)
    keep = np.maximum(1, np.rint(fraction * counts)).astype(np.int64)
    within = np.arange(len(index)) - np.repeat(starts, counts)
    return np.sort(index[order[within < np.repeat(keep, counts)]])


def split_by_subject(subjects: NDArray[np.str_], seed: int) -> NDArray[np.bool_]:
    """Which samples test: those of a random fifth of the subjects, one subject at least."""
    names = np.unique(subjects)
    if len(names) < 2:
        raise InputError(
            f"one subject only ({str(names[0])!r}): a split by subject needs two or more"
        )
    shuffled = np.random.default_rng(seed).permutation(names)
    return np.isin(subjects, shuffled[: max(1, round(TEST_PART * len(names)))])


def split_at_random(y: NDArray[Any], seed: int) -> NDArray[np.bool_]:
    """Which samples test: a fifth of each class."""
    if len(y) < 2:
        raise InputError("one sample only: a split needs two or more")
    is_test = np.zeros(len(y), dtype=bool)
    is_test[stratified_part(y, np.arange(len(y)), TEST_PART, seed)] = True
    return is_test


def default_split(
    dataset: Dataset | None, subjects: NDArray[np.str_], y: NDArray[Any], seed: int
) -> NDArray[np.bool_]:
    """The split of a set that brings none: by subject where samples name one, else stratified."""
    if (dataset is not None and dataset.split == "random") or (subjects == "").all():
        return split_at_random(y, seed)
    return split_by_subject(subjects, seed)


def subject_folds(
    subjects: NDArray[np.str_], y: NDArray[Any], seed: int
) -> Iterator[tuple[NDArray[np.intp], NDArray[np.intp]]]:
    """Training and test indices of five folds; no subject is in both halves of a fold.

    Raises:
        InputError: fewer than five subjects, or samples that name none.
    """
    names = np.unique(subjects)
    if len(names) < FOLDS or "" in names:
        found = "samples without a subject" if "" in names else f"{len(names)} of them"
        raise InputError(f"{FOLDS} folds by subject need {FOLDS} or more subjects; found {found}")
    require("sklearn.model_selection", "a split into folds", "eval")
    from sklearn.model_selection import GroupKFold, StratifiedGroupKFold

    kind = GroupKFold if y.dtype.kind == "f" else StratifiedGroupKFold
    folds = kind(n_splits=FOLDS, shuffle=True, random_state=seed)
    yield from folds.split(np.empty((len(y), 1)), y if y.ndim == 1 else y[:, 0], subjects)
