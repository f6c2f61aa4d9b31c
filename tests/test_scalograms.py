"""Both scalograms against the reference numbers, and wavelets by name."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import ENCODER_GOLDENS, golden

from normwear_fast import scalogram
from normwear_fast.config import NormWearConfig
from normwear_fast.errors import InputError, UsageError
from normwear_fast.positions import position_table, resize_positions
from normwear_fast.scalograms import derivatives
from normwear_fast.wavelets import filter_widths, mother_wavelet, scalogram_rows, wavelet_bank

CONV_GOLDENS = [name for name in ENCODER_GOLDENS if "scalogram" in golden(name)]


@pytest.mark.parametrize("name", CONV_GOLDENS)
def test_conv_golden(name):
    arrays = golden(name)
    stride = int(arrays["scalogram_time_stride"])
    got = scalogram(torch.tensor(arrays["x"]))[:, :, :, ::stride].numpy()
    expected = arrays["scalogram"]
    assert got.shape == expected.shape
    assert got.dtype == np.float32
    assert np.abs(got - expected).max() <= 2e-6 * np.abs(expected).max()


@pytest.mark.parametrize("samples", [64, 390, 1300])
def test_scipy_golden(samples):
    arrays = golden("scalogram_scipy")
    got = scalogram(torch.tensor(arrays[f"x_{samples}"])[None], "scipy")[0].numpy()
    expected = arrays[f"scalogram_{samples}"]
    assert got.dtype == np.float64
    assert np.abs(got[:, :, :: 1 if samples == 64 else 5] - expected).max() <= 1e-6


@pytest.mark.parametrize("method", ["conv", "scipy"])
@pytest.mark.parametrize("samples", [11, 12, 13, 75, 388, 389, 640, 643, 644, 900])
def test_equals_the_sum_it_is_defined_by(method, samples):
    """y[n] = sum_k psi_i[k] s[n - W_i // 2 + k], written as a loop over n and scales."""
    x = torch.from_numpy(np.random.default_rng().standard_normal((1, 1, samples)))
    got = scalogram(x, method)[0, 0].numpy()
    count = samples - 2
    series = np.diff(x[0, 0].numpy(), 1), np.diff(x[0, 0].numpy(), 2)
    series = (x[0, 0, 2:].numpy(), series[0][1:], series[1])
    rows = scalogram_rows(count, method)
    assert got.shape == (3, rows, 65)
    assert rows == (count + 1 if method == "conv" and min(640, count) % 2 == 0 else count)
    rng = np.random.default_rng()
    for i in rng.choice(65, 6, replace=False):
        a, width = i + 0.1, filter_widths(count, method)[i]
        t = np.arange(width) - (width - 1) / 2
        psi = 2 / (np.sqrt(3 * a) * np.pi**0.25) * (1 - t**2 / a**2) * np.exp(-(t**2) / (2 * a**2))
        for n in (0, rows // 2, rows - 1, int(rng.integers(rows))):
            index = n - width // 2 + np.arange(width)
            inside = (index >= 0) & (index < count)
            for c in range(3):
                expected = psi[inside] @ series[c][index[inside]]
                assert got[c, n, i] == pytest.approx(expected, rel=1e-9, abs=1e-11)


def test_the_smallest_scale_depends_on_the_parity_of_the_width():
    """For an even width the grid is half-integer and a = 0.1 vanishes; for an odd one it hits zero."""
    assert np.abs(wavelet_bank(388, "conv")[0]).max() < 1e-3
    assert wavelet_bank(389, "conv")[0].max() == pytest.approx(2.7425, abs=1e-3)


def test_pywavelets_ricker_is_the_bank_s():
    """Where PyWavelets' float32 bounds hit the grid exactly, the two are one function."""
    import pywt

    wavelet = pywt.ContinuousWavelet("mexh")
    wavelet.lower_bound, wavelet.upper_bound = -8.0, 8.0
    values, t = wavelet.wavefun(length=257)
    assert np.abs(values - mother_wavelet("mexh", t)).max() < 1e-15


def test_another_wavelet_by_name():
    x = torch.randn(1, 2, 40)
    other = scalogram(x, wavelet="morl")
    assert other.shape == (1, 2, 3, 39, 65)
    assert not torch.allclose(other, scalogram(x))
    t = np.linspace(-3, 3, 25)
    assert np.abs(mother_wavelet("morl", t) - np.exp(-(t**2) / 2) * np.cos(5 * t)).max() < 1e-6


@pytest.mark.parametrize("name", ["cmor1.5-1.0", "db4", "nonsense"])
def test_a_wavelet_that_does_not_serve_is_refused(name):
    with pytest.raises(UsageError, match=name):
        scalogram(torch.randn(1, 1, 32), wavelet=name)


def test_differences_are_those_of_differences_in_float32():
    x = torch.tensor([[1.0, 1e8, -1e8, 3.0, 7.0]])
    _, first, second = derivatives(x)[0]
    d = x[0, 1:] - x[0, :-1]
    assert torch.equal(first, d[1:])
    assert torch.equal(second, d[1:] - d[:-1])


@pytest.mark.parametrize("method", ["conv", "scipy"])
def test_batched_and_differentiable(method):
    x = torch.randn(3, 2, 60, dtype=torch.float64, requires_grad=True)
    y = scalogram(x, method)
    alone = torch.stack([scalogram(x[i : i + 1], method)[0] for i in range(3)])
    assert torch.allclose(y, alone, rtol=0, atol=1e-13)
    y.square().sum().backward()
    assert torch.isfinite(x.grad).all()
    assert (x.grad != 0).any()


@pytest.mark.parametrize(
    ("x", "method", "message"),
    [
        (torch.zeros(2, 30), "conv", "(B, C, L)"),
        (torch.zeros(1, 1, 10), "conv", "11"),
        (torch.zeros(1, 1, 30, dtype=torch.int64), "conv", "int64"),
        (torch.zeros(1, 1, 30), "fft", "'conv' or 'scipy'"),
    ],
)
def test_bad_input(x, method, message):
    with pytest.raises(InputError) as caught:
        scalogram(x, method)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("rows", [9, 63, 127, 387, 389, 699, 1299])
def test_position_golden(rows):
    expected = golden("position_small")[f"rows{rows}"]
    config = NormWearConfig.small()
    table = position_table(config.embed_dim, config.grid_rows, config.grid_columns)
    got = resize_positions(table, rows // 9, config.grid_columns)[0].numpy()
    assert np.abs(got - expected).max() <= 2e-6
