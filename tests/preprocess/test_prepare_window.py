"""`prepare_window` is its parts, channel by channel; running statistics are those of the whole."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from noisy_windows import noise, seeds

from normwear_fast.errors import InputError, UsageError
from normwear_fast.preprocess import (
    RunningStatistics,
    fill_missing,
    prepare_window,
    preprocess,
    resample_window,
)


def window_channel(signal: Callable, rate: float, start: float, duration: float = 6.0) -> tuple:
    """The samples a window owns of a channel that starts with the recording."""
    first = math.ceil(start * rate - 1e-6)
    last = math.ceil((start + duration) * rate - 1e-6)
    t = np.arange(first, last) / rate
    return signal(t), rate, first / rate - start


@pytest.mark.parametrize("start", [0.0, 7.123, 100.0077])
def test_channels_of_different_rates_stay_aligned(start: float) -> None:
    frequency = 5.0
    channels = [
        window_channel(lambda t: np.sin(2 * np.pi * frequency * t), rate, start)
        for rate in (360, 117.096, 250, 64, 1000 / 7.7, 4000, 99.9, 65)
    ]
    data = prepare_window(channels, 390).data
    assert data is not None
    seconds = start + np.arange(390) / 65
    carrier = np.exp(-2j * np.pi * frequency * seconds)[26:-26]  # 26 whole periods of 13 samples
    phases = np.angle((data[:, 26:-26] * carrier).sum(axis=1) * 1j)
    delays = phases / (2 * np.pi * frequency)
    np.testing.assert_allclose(delays, 0, atol=1e-3)
    assert np.ptp(delays) < 1e-4


@pytest.mark.parametrize("choice", ["none", "reference"])
def test_prepare_window_is_its_parts(choice: str) -> None:
    raw = noise(12, 3, 2160)
    raw[1, 50:90] = np.nan
    slow = noise(13, 60)
    channels = [(raw[0], 360, 0.001), (slow, 10, 0.05), (raw[1], 360, 0.001), (raw[2], 360, 0.0)]
    prepared = prepare_window(channels, 390, preprocess=choice)
    assert prepared.data is not None
    assert prepared.data.dtype == np.float32
    assert prepared.missing_fraction == 40 / 2160
    assert prepared.flat == ()
    for row, (x, rate, offset) in zip(prepared.data, channels, strict=True):
        filled, _ = fill_missing(x)
        if choice == "none":
            expected = resample_window(filled, rate, 390, offset=offset)
        else:
            expected = preprocess(filled, rate, samples=390, offset=offset)
        np.testing.assert_array_equal(row, expected.astype(np.float32))


@settings(max_examples=30)
@given(seed=seeds, order=st.permutations(range(4)), normalize=st.sampled_from(["none", "window"]))
def test_channels_are_independent(seed: int, order: list[int], normalize: str) -> None:
    channels = [
        (noise(seed, 720), 120.0, 0.0),
        (noise(seed + 1, 720), 120.0, 0.0),
        (noise(seed + 2, 702), 117.096, 0.004),
        (noise(seed + 3, 90), 15.0, 0.01),
    ]
    data = prepare_window(channels, 390, normalize=normalize).data
    permuted = prepare_window([channels[i] for i in order], 390, normalize=normalize).data
    assert data is not None
    np.testing.assert_array_equal(permuted, data[list(order)])
    alone = prepare_window([channels[order[0]]], 390, normalize=normalize).data
    np.testing.assert_array_equal(alone, data[[order[0]]])


def test_normalize_takes_the_windows_or_the_recordings_statistics() -> None:
    raw = 50 + 7 * noise(14, 2, 600)
    channels = [(row, 100.0, 0.0) for row in raw]
    plain = prepare_window(channels, 390).data
    scaled = prepare_window(channels, 390, normalize="window").data
    assert plain is not None
    assert scaled is not None
    np.testing.assert_allclose(scaled.mean(axis=1), 0, atol=1e-6)
    np.testing.assert_allclose(scaled.std(axis=1), 1, atol=1e-6)
    statistics = [(50.0, 7.0), (40.0, 2.0)]
    scaled = prepare_window(channels, 390, normalize="recording", statistics=statistics).data
    expected = (plain - [[50], [40]]) / [[7], [2]]
    np.testing.assert_allclose(scaled, expected, rtol=0, atol=1e-4 / 7)


@pytest.mark.parametrize("rate", [50, 65, 100, 117.096])
def test_flat_channels_are_zero_once_scaled(rate: float) -> None:
    """Nor is a constant's rounding blown up to a signal of size one."""
    length = math.ceil(6 * rate)
    channels = [(noise(15, length), rate, 0.0), (np.full(length, 1234.5), rate, 0.0)]
    for choices in ({"normalize": "window"}, {"preprocess": "reference"}):
        prepared = prepare_window(channels, 390, **choices)
        assert prepared.flat == (1,)
        assert prepared.data is not None
        assert not prepared.data[1].any()
        assert prepared.data[0].any()
    prepared = prepare_window(
        channels, 390, normalize="recording", statistics=[(0.0, 1.0), (1234.5, 0.0)]
    )
    assert prepared.flat == (1,)
    assert prepared.data is not None
    assert not prepared.data[1].any()
    prepared = prepare_window(channels, 390)
    assert prepared.flat == (1,)
    assert prepared.data is not None
    np.testing.assert_allclose(prepared.data[1], 1234.5, rtol=1e-6)


@pytest.mark.parametrize("empty", [np.full(600, np.nan), np.full(600, np.inf), np.empty(0)])
def test_a_channel_without_values_leaves_no_data(empty: np.ndarray) -> None:
    prepared = prepare_window([(noise(16, 600), 100, 0.0), (empty, 100, 0.0)], 390)
    assert prepared.data is None
    assert prepared.missing_fraction == 1


@pytest.mark.parametrize("length", [1, 2, 3])
@pytest.mark.parametrize("rate", [1, 64, 65, 100, 117.096, 4000])
def test_windows_of_a_few_raw_samples_are_finite(rate: float, length: int) -> None:
    for choice in ("none", "reference"):
        prepared = prepare_window(
            [(noise(17, length), rate, 0.5 / rate)], 11, preprocess=choice, normalize="window"
        )
        assert prepared.data is not None
        assert prepared.data.shape == (1, 11)
        assert np.isfinite(prepared.data).all()


@pytest.mark.parametrize("rate", [50, 65, 100, 117.096])
@pytest.mark.parametrize("size", [1e39, 1e200, 1.7e308])
def test_too_large_for_float32_is_refused_by_channel(rate: float, size: float) -> None:
    x = noise(18, math.ceil(6 * rate))
    x /= np.abs(x).max()
    channels = [(x, rate, 0.0), (x * size, rate, 0.0)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(InputError, match="channel 1 is too large for float32"):
            prepare_window(channels, 390)
        if size > 1e150:  # squares or sums leave float64, and std with them
            with pytest.raises(InputError, match="channel 1 is too large"):
                prepare_window(channels, 390, normalize="window")
        else:
            data = prepare_window(channels, 390, normalize="window").data
            np.testing.assert_allclose(data[1], data[0], atol=1e-6)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"preprocess": "detrend"}, "must be 'none' or 'reference'"),
        ({"normalize": "zscore"}, "must be 'none', 'window' or 'recording'"),
        ({"normalize": "recording"}, "statistics of 1 channels, not of 0"),
        ({"normalize": "recording", "statistics": [(0, 1)] * 2}, "of 1 channels, not of 2"),
        (
            {"normalize": "recording", "preprocess": "reference", "statistics": [(0, 1)]},
            "has no meaning",
        ),
    ],
)
def test_prepare_window_refuses_choices(choices: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        prepare_window([(np.ones(600), 100, 0.0)], 390, **choices)


def test_prepare_window_refuses_shapes() -> None:
    with pytest.raises(InputError, match="without channels"):
        prepare_window([], 390)
    with pytest.raises(InputError, match="channel 0 has shape"):
        prepare_window([(np.ones((2, 600)), 100, 0.0)], 390)


@settings(max_examples=60)
@given(seed=seeds, cuts=st.lists(st.integers(0, 500), max_size=6), offset=st.floats(-1e6, 1e6))
def test_running_statistics_are_those_of_the_whole(
    seed: int, cuts: list[int], offset: float
) -> None:
    x = offset + noise(seed, 2, 500)
    x[0, np.random.default_rng(seed).random(500) < 0.3] = np.nan
    x[1, 7] = np.inf
    edges = [0, *sorted(cuts), 500]
    running = RunningStatistics(2)
    halves = [RunningStatistics(2), RunningStatistics(2)]
    for number, (a, b) in enumerate(itertools.pairwise(edges)):
        running.update(list(x[:, a:b]))
        halves[number % 2].update(list(x[:, a:b]))
    halves[0].merge(halves[1])
    for statistics in (running, halves[0]):
        for channel, (mean, std) in enumerate(statistics.statistics()):
            good = x[channel][np.isfinite(x[channel])]
            assert statistics.count[channel] == len(good)
            assert mean == pytest.approx(good.mean(), rel=1e-12, abs=1e-12)
            assert std == pytest.approx(good.std(), rel=1e-8)


def test_running_statistics_of_ragged_empty_and_constant_channels() -> None:
    running = RunningStatistics(3)
    for _ in range(7):
        running.update([np.full(3, 0.1), np.empty(0), np.array([1, 2], dtype=np.int16)])
    assert running.count.tolist() == [21, 0, 14]
    assert running.statistics() == [(0.1, 0.0), (0.0, 0.0), (1.5, 0.5)]
    with pytest.raises(InputError, match="a block of 1 channels"):
        running.update([np.ones(3)])


def test_running_statistics_keep_the_digits_of_a_small_signal() -> None:
    x = noise(19, 100_000)
    running = RunningStatistics(1)
    for block in np.split(1e9 + x, 50):
        running.update([block])
    assert running.std[0] == pytest.approx(x.std(), rel=1e-6)
