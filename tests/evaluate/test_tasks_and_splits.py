"""The paper's sets and tasks, and splits in which no subject is in both halves."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from evaluation_sets import BINARY

from normwear_fast.errors import InputError, UsageError
from normwear_fast.evaluate import metrics, probe, registry, splits
from normwear_fast.evaluate.registry import DATASETS, GROUPS, find_released


def test_the_registry_is_the_papers():
    tasks = [task for dataset in DATASETS.values() for task in dataset.tasks]
    assert len(DATASETS) == 11
    assert len(tasks) == 18
    counts = Counter(task.group for task in tasks)
    assert [counts[group] for group in GROUPS] == [3, 6, 6, 3]
    for dataset in DATASETS.values():
        assert len(dataset.channels) == len(dataset.modalities) == len(dataset.sampling_rates)
    # The paper's micro and macro averages follow from its group averages by this grouping alone.
    means = (83.1, 85.9, 73.2, 95.4)
    found = metrics.averages([(task.group, means[GROUPS.index(task.group)]) for task in tasks])
    assert found["macro"] == pytest.approx(sum(means) / 4)
    assert found["micro"] == pytest.approx(np.dot(means, [3, 6, 6, 3]) / 18)
    assert (round(found["micro"], 1), round(found["macro"], 1)) == (82.8, 84.4)


def test_published_folder_names_find_their_tasks():
    dataset, tasks = find_released("PPG_CVD")
    assert (dataset.key, [task.name for task in tasks]) == ("ppg-bp", ["cerebrovascular_disease"])
    assert len(find_released("Epilepsy")[1]) == 5
    assert find_released("elsewhere") is None
    with pytest.raises(UsageError, match="known: wesad, uci-har"):
        registry.get_dataset("wesat")


def test_partial_shot_takes_a_tenth_of_each_class():
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


def test_one_subject_only_cannot_be_split():
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
