"""`FastNormWear.encode` of windows of raw samples: shapes, rates, gaps, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_model import X, two_orders

from normwear_fast import FastNormWear
from normwear_fast.errors import InputError
from normwear_fast.preprocess import resample_window


def test_encode_has_the_shape_of_its_pooling(model):
    x = np.random.default_rng().standard_normal((4, 3, 40)).astype(np.float32)
    tokens = 1 + 13 * 4
    for pool, axis in (("mean", ()), ("cls", ()), ("patch", (tokens,))):
        assert model.encode(x, pool=pool).shape == (4, 3, *axis, 32)
        assert model.encode(x, pool=pool, channels="mean").shape == (4, *axis, 32)
        assert model.encode(x, pool=pool, channels="concat").shape == (4, *axis, 96)
    everything = model.encode(x, pool="patch")
    assert np.abs(model.encode(x) - everything.mean(2)).max() <= two_orders(everything)
    assert np.abs(model.encode(x, pool="cls") - everything[:, :, 0]).max() < 2e-5
    joined = model.encode(x, channels="concat").reshape(4, 3, 32)
    assert np.array_equal(joined, model.encode(x))
    tensor = model.encode(x, convert_to_numpy=False)
    assert isinstance(tensor, torch.Tensor)
    assert np.array_equal(tensor.numpy(), model.encode(x))


def test_encode_resamples_each_window_from_its_own_rate(model):
    rng = np.random.default_rng()
    windows = [rng.standard_normal((2, 400)), rng.standard_normal((2, 400))]
    out = model.encode(windows, sampling_rate=[130, 32.5], pool="patch")
    assert [o.shape[1] for o in out] == [1 + 13 * (200 // 9), 1 + 13 * (800 // 9)]
    slow = model.encode(windows, sampling_rate=[200, 300], pool="patch", resample="upstream")
    assert [o.shape[1] for o in slow] == [1 + 13 * (400 // 9), 1 + 13 * (87 // 9)]
    as_they_are = model.encode(windows, resample="never")
    assert np.array_equal(model.encode(windows, 256, resample="upstream"), as_they_are)
    # As many samples as before, but not at the same times.
    close = [resample_window(window, 65.05, 400) for window in windows]
    assert np.array_equal(model.encode(windows, 65.05), model.encode(close))
    assert not np.array_equal(model.encode(windows, 65.05), as_they_are)


def test_encode_interpolates_missing_values_or_names_them(model):
    x = np.random.default_rng().standard_normal((3, 2, 40)).astype(np.float32)
    broken = x.copy()
    broken[2, 1, 5:8] = np.nan
    with pytest.raises(InputError, match="window 2, channel 1"):
        model.encode(broken)
    filled = x.copy()
    filled[2, 1, 4:9] = np.linspace(x[2, 1, 4], x[2, 1, 8], 5)
    got = model.encode(broken, missing="interpolate")
    assert np.abs(got - model.encode(filled)).max() < 2e-5
    broken[0, 0] = np.nan
    with pytest.raises(InputError, match="window 0, channel 0 holds no value"):
        model.encode(broken, missing="interpolate")


@pytest.mark.parametrize(
    ("windows", "options", "message"),
    [
        (np.zeros((2, 40)), {}, "(windows, channels, samples)"),
        ([np.zeros(40)], {}, "window 0 is (40,)"),
        ([np.zeros((0, 40))], {}, "window 0 is (0, 40)"),
        ([np.zeros((1, 40)), np.zeros((1, 10))], {}, "window 1 has 10 samples"),
        ([np.zeros((1, 40))], {"pool": "max"}, "pool is 'max'"),
        ([np.zeros((1, 40))], {"channels": "sum"}, "channels is 'sum'"),
        ([np.zeros((1, 40))], {"missing": "drop"}, "missing is 'drop'"),
        ([np.zeros((1, 40))], {"resample": "maybe"}, "resample is 'maybe'"),
        ([np.zeros((1, 40))], {"sampling_rate": [65, 65]}, "2 values for 1 windows"),
        ([np.zeros((1, 40))], {"batch_tokens": 20}, "batch_tokens=20"),
        ([np.full((1, 40), 1e300)], {}, "beyond float32"),
        ([np.array([["x"] * 40])], {}, "real numbers"),
    ],
)
def test_encode_refuses(model, windows, options, message):
    with pytest.raises(InputError) as caught:
        model.encode(windows, **options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [1e20, -1e30, 9.97e36, 1e300])
def test_fill_values_are_no_samples(model: FastNormWear, value: float) -> None:
    """Their variances overflow float32, and the kernels gave finite numbers that meant nothing."""
    x = X.astype(np.float64)
    x[1, 0, 40] = value
    with pytest.raises(InputError, match=r"window 1 holds values beyond .* make fill values NaN"):
        model.encode(x)
    with pytest.raises(InputError, match="window 1, channel 0 holds values beyond"):
        model.get_embedding(x)


def test_rates_may_be_of_any_number_type(model: FastNormWear) -> None:
    expected = model.get_embedding(np.tile(X, 4), 520.0)
    for rate in (np.float32(520), torch.tensor(520.0), np.int64(520)):
        assert torch.equal(model.get_embedding(np.tile(X, 4), rate), expected)
