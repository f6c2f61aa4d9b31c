"""Bootstrap intervals, the permutation test and critical differences between models."""

from __future__ import annotations

import numpy as np
import pytest
from evaluation_sets import THREE

from normwear_fast.errors import InputError
from normwear_fast.evaluate import metrics, probe


def test_bootstrap_interval_is_as_wide_as_theory_and_draws_subjects():
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
