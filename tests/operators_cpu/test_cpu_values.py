"""NaN, infinity, the ends of int8, every conversion to bfloat16, and the caller's arithmetic modes."""

from __future__ import annotations

import ctypes
import platform
import sys

import numpy as np
import pytest
import torch
from cpu_operators import CPU, EPS, INFINITY, NAMES, NAN, PRECISIONS, attended, draw, multiplied

from normwear_fast import native
from normwear_fast.packing import Segments


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [NAN, -NAN, INFINITY, -INFINITY])
def test_an_int8_row_that_is_not_finite_has_no_finite_output(name, value, rng):
    """Whichever value of the row it is: minimum and maximum, which give the scale, pass over NaN."""
    k, width = native.kernels(name), 150
    rows = draw(rng, width, width)
    clean = native.quantise_rows(k, rows)
    spoilt = rows.clone()
    spoilt.fill_diagonal_(value)
    for x in (spoilt, spoilt.bfloat16()):
        _, scale, offset = native.quantise_rows(k, x)
        assert scale.isnan().all()
        assert offset.isnan().all()
    alone = rows.clone()
    alone[70, 70] = value
    for got, expected in zip(native.quantise_rows(k, alone), clean, strict=True):
        assert torch.equal(got[:70], expected[:70])
        assert torch.equal(got[71:], expected[71:])
    out = multiplied(name, spoilt, draw(rng, 40, width), "int8")
    assert not out.isfinite().any()
    # As float32's: gelu of it is NaN, or the infinity that only the row's largest value can be.
    _, scale, _ = native.quantise_rows(k, spoilt, torch.zeros(width))
    assert scale.isnan().all() or value == -INFINITY


@pytest.mark.parametrize("name", NAMES)
def test_int8_rows_at_the_ends_of_the_range(name):
    k = native.kernels(name)
    largest, least = torch.finfo(torch.float32).max, 2.0**-149
    rows = torch.zeros(4, 40)
    rows[0, 3], rows[0, 39] = largest, -largest  # the range is not a float32
    rows[1, 3], rows[1, 39] = largest, 1.0
    rows[2] = torch.linspace(0, 255 * least, 40)  # one over its step is not one
    rows[3] = 2.0**-126
    q, scale, offset = native.quantise_rows(k, rows)
    assert scale[0].isnan()
    back = q.double() * scale.double()[:, None] + offset.double()[:, None]
    assert ((back - rows.double()).abs()[1:] <= 0.5001 * scale[1:, None] + 2.0**-118).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("value", [NAN, INFINITY, -INFINITY])
def test_a_weight_that_is_not_finite_spoils_its_output_alone(name, precision, value, rng):
    a, w = draw(rng, 20, 70), draw(rng, 50, 70)
    clean = multiplied(name, a, w, precision)
    for at in (0, 38, 69):
        spoilt = w.clone()
        spoilt[11, at] = value
        got = multiplied(name, a, spoilt, precision)
        assert not got[:, 11].isfinite().any()
        others = torch.arange(50) != 11
        assert torch.equal(got[:, others], clean[:, others])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_feed_passes_nan_on_from_every_stage(name, precision, rng):
    k, width, hidden, rows = native.kernels(name), 72, 1000, 50
    sizes = {"proj": (width, width), "fc1": (hidden, width), "fc2": (width, hidden)}
    operand = native.OPERANDS[precision]
    chunks = {"proj": None, "fc1": None, "fc2": native.CHUNK}
    matrices = {
        which: native.pack(k, draw(rng, *sizes[which], scale=0.1), operand, chunks[which])
        for which in sizes
    }
    start, attended, carried = draw(rng, rows, width), draw(rng, rows, width), draw(rng, width)

    def run(residual, attended, bias):
        residual = residual.clone()
        k.feed(
            residual=residual.data_ptr(), attended=native._view(attended), rows=rows, **matrices,
            carried=carried.data_ptr(), fc1_bias=bias.data_ptr(), eps=EPS, threads=1,
        )  # fmt: skip
        return residual

    bias = draw(rng, hidden)
    clean, lost = run(start, attended, bias), torch.arange(rows) == 17
    for value in (NAN, INFINITY):
        spoilt = attended.clone()
        spoilt[17, 33] = value
        got = run(start, spoilt, bias)
        assert torch.equal(got.isnan().all(1), lost)
        assert torch.equal(got[~lost], clean[~lost])
    for unit in (0, 767, 999):  # of a first and a second tile of hidden units
        spoilt = bias.clone()
        spoilt[unit] = NAN
        assert run(start, attended, spoilt).isnan().all()


def every_upper_half(*lower: int) -> torch.Tensor:
    """float32 of every bfloat16's bits, each with these lower halves."""
    bits = np.arange(65536, dtype=np.uint32)[:, None] << 16 | np.array(lower, np.uint32)
    return torch.from_numpy(bits.reshape(-1).view(np.float32))


def through_rows(name, x: torch.Tensor, k: int, precision: str) -> torch.Tensor:
    """Every value times one, in rows of k finite ones, or of one alone that is not (as a bfloat16)."""
    finite, one = x.bfloat16().isfinite(), torch.eye(k)
    whole, lone = x[finite], x[~finite]
    rows = torch.cat((whole, torch.zeros(-len(whole) % k))).view(-1, k)
    out = torch.empty(len(x))
    out[finite] = multiplied(name, rows, one, precision).flatten()[: len(whole)]
    row, place = torch.arange(len(lone)), torch.arange(len(lone)) % k
    rows = torch.zeros(len(lone), k)
    rows[row, place] = lone
    out[~finite] = multiplied(name, rows, one, precision)[row, place]
    return out


def assert_rounded(got: torch.Tensor, x: torch.Tensor) -> None:
    """``got`` is x to the nearest bfloat16; what is not finite, or rounds to infinity, is not finite.

    Units for bfloat16 count subnormal values as zero, and float32's parts on the tile unit.
    """
    got, x, rounded = (t.float().numpy() for t in (got, x, x.bfloat16()))
    finite = np.isfinite(rounded)
    assert np.array_equal(np.isfinite(got), finite)
    assert np.isnan(got[np.isnan(x)]).all()
    other = finite & (got != rounded)
    got, x = got[other].astype(float), np.abs(x[other].astype(float))
    assert (x < 2.0**-102).all()
    assert (np.abs(np.abs(got) - x) <= 2.0**-8 * x + 2.0**-126).all()


@pytest.mark.parametrize("name", NAMES)
def test_every_conversion_to_bfloat16(name, rng):
    """Adding half a unit to the bits, as rounding does, makes some NaN an infinity and some a zero."""
    low = int(rng.integers(1, 0x8000))
    x = every_upper_half(0, low, 0x8000, 0x8001, 0xFFFF)
    one = torch.ones(1, 1)
    assert_rounded(
        through_rows(name, x, 37, "bfloat16"), x
    )  # rows: whole vectors, then lone values
    assert_rounded(multiplied(name, one, x[:, None], "bfloat16")[0], x)  # weights
    # Outputs: whole vectors and a rest, in whole cache lines or not; then lone ones.
    k = native.kernels(name)
    weight = native.pack(k, x[:, None], 0)
    for beside in (0, 1):
        c = torch.zeros(1, len(x) + 33, dtype=torch.bfloat16)[:, beside:][:, : len(x)]
        assert_rounded(native.linear(k, one, weight, c)[0], x)
    few = every_upper_half(1, 0xFFFF)
    got = multiplied(name, few[:, None], one, "float32", dtype=torch.bfloat16)
    assert_rounded(got[:, 0], few)
    bits = every_upper_half(0)
    assert_rounded(attended(name, bits.bfloat16()), bits)


@pytest.mark.parametrize("name", NAMES)
def test_float32_stays_what_it_is(name, rng):
    """Times one, whatever it is made of: on the tile unit three bfloat16, of which infinity minus itself
    is NaN. Never is a finite number made of what is not."""
    x = every_upper_half(0, int(rng.integers(1, 0x8000)), 0xFFFF)
    one = torch.ones(1, 1)
    # Rows of whole steps of the tile unit and of its short one, weights, values.
    found = [through_rows(name, x, k, "float32") for k in (32, 37)]
    found += [multiplied(name, one, x[:, None], "float32")[0], attended(name, x)]
    kept = (x.bfloat16() if name == "amx" else x).isfinite().numpy()
    x = x.numpy()
    for got in (y.numpy() for y in found):
        assert not np.isfinite(got[~kept]).any()
        assert np.isnan(got[np.isnan(x)]).all()
        other = kept & (got != x)
        assert name == "amx" or not other.any()
        error = np.abs(got[other].astype(float) - x[other])
        assert (error <= 2.0**-24 * np.abs(x[other].astype(float)) + 2.0**-125).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"),
    reason="not run: glibc's name, and x86's numbers of the rounding modes",
)
def test_bits_do_not_depend_on_the_callers_arithmetic(name, rng):
    """A library linked with -ffast-math, or torch.set_flush_denormal, changes one thread's arithmetic:
    a row's bits would depend on the thread that computes it."""
    k, threads = native.kernels(name), torch.get_num_threads()
    a, w, tiny = draw(rng, 300, 33), draw(rng, 200, 33), torch.full((3000, 64), 1e-39)
    values, keys = draw(rng, 300, 64), Segments([100, 200], CPU)

    def run():
        c, subnormal = torch.full((300, 200), NAN), tiny.clone()
        native.linear(k, a, native.pack(k, w, 0), c)
        native.bias_gelu(k, subnormal, torch.zeros(64))
        normed = native.residual_norm(k, values, None, EPS)
        return (
            c,
            subnormal,
            normed,
            native.channel_attention(k, normed[:, :32], values, keys, keys, 2),
        )

    up = 0x800
    libm = ctypes.CDLL("libm.so.6")
    torch.set_num_threads(2)
    try:
        expected = run()
        torch.set_flush_denormal(True)
        flushed = run()
        assert torch.tensor([1e-39]).mul(1.0)[0] == 0  # the caller's own is as it was
        torch.set_flush_denormal(False)
        libm.fesetround(up)
        rounded = run()
        assert libm.fegetround() == up
    finally:
        torch.set_flush_denormal(False)
        libm.fesetround(0)
        torch.set_num_threads(threads)
    for results in zip(expected, flushed, rounded, strict=True):
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])
