"""tokenize in Triton, interpreted, against its definition in float64."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from normwear_fast import operators
from normwear_fast.config import NormWearConfig
from normwear_fast.errors import InputError
from normwear_fast.kernels.tokenize import (
    _to_tf32,
    column_filters,
    constant_scalogram,
    to_tf32,
    tokenize,
)
from normwear_fast.operators import Tokenizer
from normwear_fast.packing import Segments, sequence_tokens
from normwear_fast.scalograms import scalogram
from normwear_fast.wavelets import wavelet_bank

CPU = torch.device("cpu")
RELEASED = NormWearConfig()


def batch(rng, lengths, method, width, config=RELEASED, wavelet="mexh"):
    """Tables, a series of drifting values, and where its sequences stand."""
    tokens = [sequence_tokens(length, method, config) for length in lengths]
    counts = tuple(sorted(set(tokens)))
    values = 3 * config.patch_size[0] * config.patch_size[1]

    def draw(*shape):
        return torch.from_numpy(rng.standard_normal(shape).astype(np.float32))

    tokenizer = Tokenizer(
        patch_weight=draw(width, values) / values**0.5,
        templates=draw(sum(counts), width),
        token_counts=counts,
        patch_size=config.patch_size,
        num_scales=config.num_scales,
        method=method,
        wavelet=wavelet,
    )
    series = draw(sum(lengths)).cumsum(0) * 0.1
    return tokenizer, series, Segments(lengths, CPU), Segments(tokens, CPU)


def defined(tokenizer, series, samples, sequences) -> torch.Tensor:
    """The definition in float64."""
    wide = dataclasses.replace(
        tokenizer,
        patch_weight=tokenizer.patch_weight.double(),
        templates=tokenizer.templates.double(),
        prepared={},
    )
    width = len(tokenizer.patch_weight)
    rows = torch.empty(sequences.total, width, dtype=torch.float64)
    operators.tokenize(rows, series, samples, sequences, wide)
    return rows


def check(batch, dtype, **options) -> None:
    tokenizer, series, samples, sequences = batch
    width = len(tokenizer.patch_weight)
    exact = defined(*batch)
    rows = torch.full((sequences.total + 3, width), torch.nan, dtype=dtype)
    tokenize(rows, series, samples, sequences, tokenizer, **options)
    assert rows[sequences.total :].isnan().all()  # the tail is not the tokenizer's
    rows = rows[: sequences.total]
    precision = options.get("input_precision")
    rounded = precision == "tf32" or (precision is None and dtype == torch.bfloat16)
    # float32 sums of up to 640 products, then 135; operands of 10 bits; rows of 8.
    bound = float(exact.abs().max()) * (2e-6 + (2**-10 if rounded else 0))
    bound = bound + (exact.abs() * 2**-8 if dtype == torch.bfloat16 else 0)
    assert not rows.isnan().any()
    worst = ((rows.double() - exact).abs() - bound).max()
    assert worst <= 0, f"{float(worst):.3g} over the bound"


@pytest.mark.parametrize("method", ["conv", "scipy"])
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {}),
        (torch.float32, {"input_precision": "tf32"}),
        (torch.bfloat16, {}),
    ],
    ids=["float32", "float32-tf32", "bfloat16"],
)
def test_parity_over_ragged_lengths(method, dtype, options):
    """Equal lengths stand apart, and are gathered into the same tiles."""
    rng = np.random.default_rng()
    lengths = [130, 11, 130, 19, int(rng.integers(12, 100))]
    check(
        batch(rng, [lengths[i] for i in rng.permutation(len(lengths))], method, 64),
        dtype,
        **options,
    )


@triton.jit
def rounding_kernel(x, out, N: tl.constexpr):
    tl.store(out + tl.arange(0, N), _to_tf32(tl.load(x + tl.arange(0, N))))


def test_operands_are_rounded_to_nearest():
    """The tensor cores would truncate: the error of a sum would grow with its length, not its root."""
    x = torch.randn(1024) * torch.logspace(-20, 20, 1024)
    x[0] = 1 + 2**-11  # a tie goes away from zero
    host, kernel = to_tf32(x), torch.full_like(x, torch.nan)
    rounding_kernel[(1,)](x, kernel, N=1024)
    assert torch.equal(host, kernel)
    assert (host.view(torch.int32) & 0x1FFF == 0).all()
    assert host[0] == 1 + 2**-10
    assert ((host.double() - x.double()).abs() <= x.double().abs() * 2**-11).all()


def test_nothing_is_written_beyond_the_scratch(monkeypatch):
    rng = np.random.default_rng()
    tokenizer, series, samples, sequences = batch(rng, [40, 11, 130], "conv", 16)
    rows, beyond = torch.full((sequences.total, 16), torch.nan), []

    def guarded(size, **options):
        shape = (size,) if isinstance(size, int) else size
        whole = torch.full((math.prod(shape) + 64,), torch.nan, **options)
        beyond.append(whole[-64:])
        return whole[:-64].view(shape)

    monkeypatch.setattr(torch, "empty", guarded)
    tokenize(rows, series, samples, sequences, tokenizer)
    assert len(beyond) == 2  # the padded series and their constants
    assert all(part.isnan().all() for part in beyond)
    assert rows.isfinite().all()  # nor read before it was written


@pytest.mark.parametrize("method", ["conv", "scipy"])
@pytest.mark.parametrize("precision", ["tf32", "ieee"])
def test_a_constant_costs_no_bits(method, precision):
    """Raw counts: operands of 10 bits see what varies, not the constant it stands on."""
    tokenizer, series, samples, sequences = batch(
        np.random.default_rng(), [130, 47, 130, 95], method, 32
    )
    offsets = torch.tensor([1e5, 0.0, -3e4, 300.0]).repeat_interleave(torch.tensor(samples.lengths))
    raw = series.round(decimals=3) + offsets
    exact = defined(tokenizer, raw, samples, sequences)
    varying = defined(tokenizer, (raw.double() - offsets.double()).float(), samples, sequences)
    rows = torch.full((sequences.total, 32), torch.nan)
    tokenize(rows, raw, samples, sequences, tokenizer, input_precision=precision)
    # What varies, and a patch itself: large at the ends of the series, next to nothing between.
    rounding = 2**-10 if precision == "tf32" else 2e-6
    bound = rounding * (varying.abs().max() + exact.abs().amax(dim=1, keepdim=True))
    assert ((rows.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("precision", ["tf32", "ieee"])
@pytest.mark.parametrize("fill", [-32768.0, 4e6])
@pytest.mark.parametrize("offset", [0.0, 2000.0])
def test_a_fill_value_costs_no_bits_where_it_does_not_reach(fill, offset, precision):
    """Nor does the constant that is taken out follow it."""
    one = tokenizer, series, samples, sequences = batch(np.random.default_rng(), [390], "conv", 32)
    varying = defined(*one)
    raw = series.round(decimals=3) + offset
    whole = defined(tokenizer, raw, samples, sequences)
    raw[[350, 352]] = fill
    exact = defined(tokenizer, raw, samples, sequences)
    far = (exact - whole).abs().amax(dim=1) <= 1e-6 * varying.abs().max()
    assert far.sum() > len(exact) / 4
    rows = torch.full((sequences.total, 32), torch.nan)
    tokenize(rows, raw, samples, sequences, tokenizer, input_precision=precision)
    rounding = 2**-10 if precision == "tf32" else 2e-6
    bound = rounding * (varying.abs().max() + exact.abs().amax(dim=1, keepdim=True))
    assert ((rows.double() - exact).abs() <= bound)[far].all()


@pytest.mark.parametrize("method", ["conv", "scipy"])
@pytest.mark.parametrize("samples", [9, 10, 387, 388, 639, 641, 1298])
def test_the_scalogram_of_a_constant(method, samples):
    ones = torch.ones(1, 1, samples + 2, dtype=torch.float64)
    expected = scalogram(ones, method)[0, 0, 0].numpy()
    found = constant_scalogram(samples, method, "mexh", 65)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < 1e-12


@pytest.mark.parametrize(
    ("method", "length"),
    [
        ("conv", 643),
        pytest.param("conv", 641, marks=pytest.mark.slow),
        pytest.param("conv", 642, marks=pytest.mark.slow),
        pytest.param("scipy", 660, marks=pytest.mark.slow),
        pytest.param("scipy", 390, marks=pytest.mark.slow),
    ],
)
def test_parity_around_the_longest_filter(method, length):
    check(batch(np.random.default_rng(), [length], method, 16), torch.float32)


@pytest.mark.parametrize(
    ("config", "wavelet", "width"),
    [
        (NormWearConfig(num_scales=30, patch_size=(4, 3)), "mexh", 36),
        (NormWearConfig(num_scales=10), "gaus1", 100),
    ],
)
def test_other_patches_wavelets_and_widths(config, wavelet, width):
    rng = np.random.default_rng()
    check(batch(rng, [40, 77, 40], "conv", width, config, wavelet), torch.float32)


def test_a_sequence_does_not_see_its_neighbours():
    rng = np.random.default_rng()
    tokenizer, series, samples, sequences = batch(rng, [30, 41, 30], "conv", 16)
    series[30:71] = torch.nan
    rows = torch.zeros(sequences.total, 16)
    tokenize(rows, series, samples, sequences, tokenizer)
    first, last = sequences.bounds[1:3]
    assert rows[:first].isfinite().all()
    assert rows[last:].isfinite().all()
    assert rows[first + 1 : last].isnan().all()


def test_residual_of_any_row_stride_and_templates_of_other_counts():
    rng = np.random.default_rng()
    both = batch(rng, [30, 60], "conv", 32)
    tokenizer = both[0]
    one = (tokenizer, both[1][30:], Segments([60], CPU), Segments(both[3].lengths[1:], CPU))
    wide = torch.full((one[3].total, 40), torch.nan)
    tokenize(wide[:, :32], one[1], one[2], one[3], tokenizer)
    assert wide[:, 32:].isnan().all()
    torch.testing.assert_close(wide[:, :32].double(), defined(*one), rtol=0, atol=2e-5)
    # The same lengths beside fewer templates: what is kept of a model serves all its tables.
    start = tokenizer.template_start(one[3].lengths[0])
    fewer = dataclasses.replace(
        tokenizer, templates=tokenizer.templates[start:], token_counts=one[3].lengths
    )
    again = torch.full((one[3].total, 32), torch.nan)
    tokenize(again, *one[1:], fewer)
    assert torch.equal(again, wide[:, :32])


def test_filters_keep_what_matters():
    """Every column's filters, summed back over a patch's rows, are the bank's wavelets."""
    bank, found = wavelet_bank(388, "conv"), column_filters(388, "conv", "mexh", 65, (9, 5))
    total = 0
    for column, (first, shift, taps) in enumerate(found.columns):
        part = found.taps[first : first + 45 * taps].reshape(9, 5, taps)
        total += taps
        for row in range(9):
            low = shift + 194
            kept = np.zeros((5, 388 + taps))
            kept[:, low : low + taps - row] = part[row, :, row:]
            assert not part[row, :, :row].any()
            wavelets = bank[5 * column : 5 * column + 5]
            peaks = np.abs(wavelets).max(axis=1)
            error = np.abs(kept[:, :388] - wavelets).max(axis=1) / peaks
            assert error.max() < 1e-7
            lost = np.abs(wavelets * (kept[:, :388] == 0)).max(axis=1) / peaks
            assert lost.max() < 1e-12  # a fill value of a million is in every row's sum
    assert total < 4700  # the whole bank would be 13 * 396


@pytest.mark.parametrize(("filters", "plans", "ones"), [(3, 2, 3), (9, 9, 3), (3, 9, 9)])
def test_what_is_kept_is_bounded(filters, plans, ones, monkeypatch):
    """And what is dropped is not used any more: a plan says where filters and patches were."""
    from normwear_fast.kernels import tokenize as module

    monkeypatch.setattr(module, "KEPT_FILTERS", filters)
    monkeypatch.setattr(module, "KEPT_PLANS", plans)
    monkeypatch.setattr(module, "KEPT_ONES", ones)
    rng = np.random.default_rng()
    tables = batch(rng, list(range(11, 20)), "scipy", 16)[0]
    for length in (11, 12, 13, 44, 12, 11):
        one = batch(rng, [length], "scipy", 16)
        tokenizer = dataclasses.replace(one[0], prepared=tables.prepared)
        check(
            (dataclasses.replace(tokenizer, patch_weight=tables.patch_weight), *one[1:]),
            torch.float32,
        )
    (kept,) = tables.prepared.values()
    assert len(kept._filters) <= filters
    assert len(kept.ones) <= ones
    assert len(kept._plans) <= plans


@pytest.mark.parametrize("method", ["conv", "scipy"])
def test_filters_of_every_length_are_made_once(method, monkeypatch):
    """Passes over all lengths in order, as `encode` sorts them: the second finds every filter."""
    from normwear_fast.kernels import tokenize as module

    made = []

    def filters(length, *arguments):
        made.append(length)
        return module.Filters(np.ones(48 * 32, np.float32), np.array([[0, -16, 32]] * 13))

    monkeypatch.setattr(module, "column_filters", filters)
    lengths = list(range(11, 701))
    tokenizer, _, samples, sequences = batch(np.random.default_rng(), lengths, method, 16)
    prepared = module.Prepared(tokenizer, "ieee")
    for _ in range(2):
        prepared.plan(tokenizer, samples, sequences, 64)
        prepared._plans.clear()
    assert len(made) == len(set(made))
    assert len(made) > 600


def test_what_does_not_fit_is_an_error():
    tokenizer, series, samples, sequences = batch(np.random.default_rng(), [20, 30], "conv", 16)
    with pytest.raises(InputError, match="rows and 2 series for"):
        tokenize(torch.empty(5, 16), series, samples, sequences, tokenizer)
    short = Segments([5], CPU), Segments([1], CPU)
    with pytest.raises(InputError, match="5 samples has no row of patches"):
        tokenize(torch.empty(1, 16), series[:5], *short, tokenizer)


@pytest.mark.parametrize(("name", "value"), [("allow_tf32", True), ("fp32_precision", "tf32")])
def test_float32_is_rounded_as_torch_rounds_it(name, value):
    """By either name of torch's flag."""
    one = batch(np.random.default_rng(), [20], "conv", 16)
    rows = {key: torch.empty(one[3].total, 16) for key in ("default", "flag", "tf32", "ieee")}
    for key in ("tf32", "ieee"):
        tokenize(rows[key], *one[1:], one[0], input_precision=key)
    tokenize(rows["default"], *one[1:], one[0])
    flags = torch.backends.cuda.matmul
    before = getattr(flags, name)
    setattr(flags, name, value)
    try:
        tokenize(rows["flag"], *one[1:], one[0])
    finally:
        setattr(flags, name, before)
    alone = torch.empty_like(rows["ieee"])  # with weights that nobody has rounded before
    fresh = dataclasses.replace(one[0], prepared={})
    tokenize(alone, *one[1:], fresh, input_precision="ieee")
    assert torch.equal(alone, rows["ieee"])
    assert torch.equal(rows["default"], rows["ieee"])
    assert torch.equal(rows["flag"], rows["tf32"])
    assert not torch.equal(rows["tf32"], rows["ieee"])


def test_float64_runs_plain():
    one = batch(np.random.default_rng(), [20, 30], "conv", 16)
    wide = dataclasses.replace(
        one[0], patch_weight=one[0].patch_weight.double(), templates=one[0].templates.double()
    )
    rows = torch.empty(one[3].total, 16, dtype=torch.float64)
    tokenize(rows, *one[1:], wide)
    assert torch.equal(rows, defined(*one))
