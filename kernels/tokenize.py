"""`tokenize`: series to tokens in two launches; the scalogram never leaves the chip.

Everything from a series to a token is linear. Token t of patch column f, whose patch of 9 rows and 5
scales lies at scalogram rows 9 t .. 9 t + 8 and scales 5 f .. 5 f + 4, is

    token = template + sum_c sum_(r, j) weight_c[:, (r, j)] * y_c[9 t + r, 5 f + j]
    y_c[9 t + r, 5 f + j] = sum_k padded_c[9 t + k + shift_f] * filters_f[(r, j), k]

where filters_f holds the column's five wavelets nine times, each a sample further on. One program takes
BLOCK_M tokens of a column, reads pieces of the series that start 9 samples apart, and multiplies twice:
by the filters (45 columns, padded to 64), then by the patch weights. Tokens of all sequences that share
filters stand together in the first dimension: no tile is half empty because a sequence has 43 rows.

Filters are cut where the wavelet is negligible: at the judged shape 4,608 taps in 13 columns are left. A
row of patches is then 1.8 MFLOP for the first product and 3.8 for the second; 234 channels are 56 GFLOP
(a third of it padding), 0.14 ms at 400 TFLOP/s, half an H100's bfloat16 rate. Memory sees 201 MB of
tokens written, 0.06 ms at 3.35 TB/s, and little else. Weights convolved into the filters beforehand would
make it one product of 205 GFLOP, and 41 MB of tables for every length in a cohort where these need 0.88.

Differences are formed in float32 and padded with zeros afterwards. For TF32 every operand is rounded to
nearest here, because the tensor cores truncate.

Before that a series' usual mean is taken out of it, and that many times the scalogram of a constant 1,
from a table, is where its own sums begin. The wavelets' sums cancel: with operands of 10 bits, raw counts
whose constant is 250 times what varies on it had embeddings further off than windows of one recording are
apart (5e-4 of 1 - cosine for 3e-5 to 1.5e-4; 3e-7 now).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from normwear_fast import operators
from normwear_fast.errors import InputError
from normwear_fast.kernels.tuning import Choice, Table, pick
from normwear_fast.operators import Tokenizer
from normwear_fast.packing import Segments, segment_tiles, upload
from normwear_fast.wavelets import (
    NEGLIGIBLE,
    ScalogramMethod,
    filter_widths,
    scalogram_rows,
    wavelet_bank,
)

InputPrecision = Literal["tf32", "ieee"]

SERIES_CHOICES: Table = {80: (Choice({"BLOCK": 1024}, num_warps=4, num_stages=1),)}

TF32_CHOICES: Table = {
    80: (
        Choice({"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 32}, num_warps=8, num_stages=3),
        Choice({"BLOCK_M": 64, "BLOCK_N": 16, "BLOCK_K": 32}, num_warps=4, num_stages=3),
        Choice({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32}, num_warps=8, num_stages=3),
        Choice({"BLOCK_M": 128, "BLOCK_N": 32, "BLOCK_K": 32}, num_warps=8, num_stages=3),
    ),
    90: (
        Choice({"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 32}, num_warps=8, num_stages=4),
        Choice({"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 32}, num_warps=8, num_stages=3),
        Choice({"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 32}, num_warps=4, num_stages=3),
        Choice({"BLOCK_M": 128, "BLOCK_N": 32, "BLOCK_K": 32}, num_warps=8, num_stages=3),
        Choice({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32}, num_warps=8, num_stages=3),
    ),
    100: (
        Choice({"BLOCK_M": 128, "BLOCK_N": 32, "BLOCK_K": 32}, num_warps=8, num_stages=3),
        Choice({"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 32}, num_warps=4, num_stages=3),
        Choice({"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 32}, num_warps=8, num_stages=3),
    ),
    120: (Choice({"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 32}, num_warps=8, num_stages=3),),
}
"""128 rows read the weights half as often as 64: 440 KB a program, 0.5 GB out of the L2 cache in all. 64
rows and 4 warps leave room for two programs on a multiprocessor: 0.45 ms for 0.41 to 0.42 on an H200.
Blackwell's graphics cards (120) have 99 KB of shared memory."""

IEEE_CHOICES: Table = {
    80: (
        Choice({"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 16}, num_warps=8, num_stages=2),
        Choice({"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 16}, num_warps=4, num_stages=2),
        Choice({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32}, num_warps=8, num_stages=2),
        Choice({"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 32}, num_warps=4, num_stages=2),
    ),
    100: (Choice({"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 16}, num_warps=8, num_stages=2),),
}
"""On sm_100 Triton 3.6 spills in every other of these."""

TAPS_MULTIPLE = 32
"""Filters are padded with zeros to a multiple of this: the largest BLOCK_K."""

KEPT_FILTERS = 641
"""Filters kept with a model's tables, one for every number of samples up to 640, 0.88 MB each at 390:
0.46 GB in a cohort that has them all. With fewer, lengths that come in order drop one another before they
come again, and each takes the host a millisecond: more than the 48 of a ragged micro-batch on an H100."""

KEPT_ONES = 641
"""Lengths whose scalogram of a constant is kept, 0.1 MB each at 390: 40 MB where all up to 640 are."""

KEPT_PLANS = 64
"""Plans of micro-batches kept with a model's tables: long runs repeat a handful of shapes."""


@triton.jit
def _to_tf32(x):
    """To the nearest value of 10 bits of mantissa, ties away from zero."""
    bits = x.to(tl.int32, bitcast=True)
    return ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


@triton.jit
def series_kernel(
    series,  # (total samples,) float32
    spans,  # (S, 8) int32: see Plan
    templates,  # (template rows, E) float32
    padded,  # (3, plane) float32
    constants,  # (S,) float32
    residual,  # (>= tokens, E)
    plane,
    residual_stride,
    E: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A series less its constant, that, and its two differences, with zeros on either side; the
    sequence's [CLS] row.

    The constant is the mean of the values that are no further from the mean of all than twice the mean
    distance: one fill value a million times the rest would else be what all others are rounded beside.
    """
    span = spans + 8 * tl.program_id(0)
    source = tl.load(span)
    count = tl.load(span + 1)
    target = tl.load(span + 2)
    size = tl.load(span + 3)
    lead = tl.load(span + 4)
    # Every program of a sequence adds up all of it, in the same order. Divided first: counts near
    # float32's largest have a mean too.
    total = count + 2
    part = tl.zeros((BLOCK,), dtype=tl.float32)
    for begin in range(0, total, BLOCK):
        i = begin + tl.arange(0, BLOCK)
        part += tl.load(series + source + i, mask=i < total, other=0.0) / total
    mean = tl.sum(part, axis=0)
    part = tl.zeros((BLOCK,), dtype=tl.float32)
    for begin in range(0, total, BLOCK):
        i = begin + tl.arange(0, BLOCK)
        x = tl.load(series + source + i, mask=i < total, other=mean)
        part += tl.abs(x - mean) / total
    spread = 2.0 * tl.sum(part, axis=0)
    part = tl.zeros((BLOCK,), dtype=tl.float32)
    usual = tl.zeros((BLOCK,), dtype=tl.float32)
    for begin in range(0, total, BLOCK):
        i = begin + tl.arange(0, BLOCK)
        x = tl.load(series + source + i, mask=i < total, other=0.0)
        near = (i < total) & (tl.abs(x - mean) <= spread)
        part += tl.where(near, x / total, 0.0)
        usual += tl.where(near, 1.0, 0.0)
    share = tl.sum(usual, axis=0) / total
    constant = tl.where(share > 0, tl.sum(part, axis=0) / tl.maximum(share, 1.0 / total), mean)
    position = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    n = position - lead
    inside = (n >= 0) & (n < count)
    x0 = tl.load(series + source + n, mask=inside, other=0.0)
    x1 = tl.load(series + source + n + 1, mask=inside, other=0.0)
    x2 = tl.load(series + source + n + 2, mask=inside, other=0.0)
    first = x2 - x1
    second = first - (x1 - x0)
    # Exact where the values are within a factor of two of the constant; else it is not large.
    x2 = tl.where(inside, x2 - constant, 0.0)
    if PRECISION == "tf32":
        x2 = _to_tf32(x2)
        first = _to_tf32(first)
        second = _to_tf32(second)
    written = position < size
    at = padded + target + position
    tl.store(at, x2, mask=written)
    tl.store(at + plane, first, mask=written)
    tl.store(at + 2 * plane, second, mask=written)
    if tl.program_id(1) == 0:
        tl.store(constants + tl.program_id(0), constant)
        row = tl.load(span + 5).to(tl.int64) * residual_stride
        template = tl.load(span + 6).to(tl.int64) * E
        for start in tl.static_range(0, E, BLOCK):
            column = start + tl.arange(0, BLOCK)
            value = tl.load(templates + template + column, mask=column < E)
            tl.store(residual + row + column, value.to(residual.dtype.element_ty), mask=column < E)


@triton.jit
def _scalogram(
    rows,  # (BLOCK_M,) pointers into one padded series
    filters,  # (VALUES, taps) float32
    taps,
    y,  # (BLOCK_M, BLOCK_V) float32: what the sums begin with
    VALUES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(BLOCK_M, BLOCK_V) scalogram values of a token's patch, zero beyond VALUES."""
    k = tl.arange(0, BLOCK_K)
    value = tl.arange(0, BLOCK_V)
    a = rows[:, None] + k[None, :]
    b = filters + value[None, :] * taps + k[:, None]
    for _ in range(0, taps, BLOCK_K):
        wavelets = tl.load(b, mask=(value < VALUES)[None, :], other=0.0)
        y = tl.dot(tl.load(a), wavelets, y, input_precision=PRECISION)
        a += BLOCK_K
        b += BLOCK_K
    if PRECISION == "tf32":
        y = _to_tf32(y)
    return y


# Not specialised on what changes from one micro-batch to the next: each variant compiles for seconds.
@triton.jit(do_not_specialize=("num_rows", "num_tiles"))
def tokens_kernel(
    padded,  # (3, plane) float32
    rows,  # (5, num_rows) int32: first sample; column 0's output and template rows, and patch; sequence
    tiles,  # (num_tiles, 4) int32: first of rows, how many, which filters
    columns,  # (filters, COLUMNS, 4) int64: address of (VALUES, taps) float32, shift, taps
    weight,  # (3, E, VALUES) float32
    templates,  # (template rows, E) float32
    ones,  # (patches, VALUES) float32: the scalograms of a constant 1
    constants,  # (S,) float32
    residual,  # (>= tokens, E)
    plane,
    num_rows,
    num_tiles,
    residual_stride,
    COLUMNS: tl.constexpr,
    E: tl.constexpr,
    VALUES: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Tokens of one patch column: BLOCK_M of them, of sequences that share filters."""
    # The widest wavelets, which take longest, first: what is left at the end is short.
    column = COLUMNS - 1 - tl.program_id(0) // num_tiles
    tile = tiles + 4 * (tl.program_id(0) % num_tiles)
    count = tl.load(tile + 1)
    m = tl.arange(0, BLOCK_M)
    # Past the last row that row again, so that no load of the loops needs a mask.
    row = rows + tl.load(tile) + tl.minimum(m, count - 1)
    entry = columns + (tl.load(tile + 2) * COLUMNS + column) * 4
    filters = tl.multiple_of(tl.load(entry).to(tl.pointer_type(tl.float32)), 16)
    shift = tl.load(entry + 1).to(tl.int32)
    taps = tl.multiple_of(tl.load(entry + 2).to(tl.int32), 32)

    start = padded + tl.load(row) + shift
    value = tl.arange(0, BLOCK_V)
    patch = ones + (tl.load(row + 3 * num_rows) + column).to(tl.int64)[:, None] * VALUES
    y = tl.load(patch + value[None, :], mask=(value < VALUES)[None, :], other=0.0)
    y *= tl.load(constants + tl.load(row + 4 * num_rows))[:, None]
    y0 = _scalogram(start, filters, taps, y, VALUES, BLOCK_M, BLOCK_V, BLOCK_K, PRECISION)
    y = tl.zeros((BLOCK_M, BLOCK_V), dtype=tl.float32)
    start += plane
    y1 = _scalogram(start, filters, taps, y, VALUES, BLOCK_M, BLOCK_V, BLOCK_K, PRECISION)
    start += plane
    y2 = _scalogram(start, filters, taps, y, VALUES, BLOCK_M, BLOCK_V, BLOCK_K, PRECISION)

    written = (m < count)[:, None]
    target = residual + (tl.load(row + num_rows) + column).to(tl.int64)[:, None] * residual_stride
    template = templates + (tl.load(row + 2 * num_rows) + column).to(tl.int64)[:, None] * E
    known = (value < VALUES)[:, None]
    # Two stages: three blocks of weights each are what shared memory has room for.
    for first in tl.range(0, E, BLOCK_N, num_stages=2):
        n = first + tl.arange(0, BLOCK_N)
        inside = (n < E)[None, :]
        w = weight + n[None, :] * VALUES + value[:, None]
        added = tl.load(template + n[None, :], mask=inside, other=0.0)
        w0 = tl.load(w, mask=known & inside, other=0.0)
        w1 = tl.load(w + E * VALUES, mask=known & inside, other=0.0)
        w2 = tl.load(w + 2 * E * VALUES, mask=known & inside, other=0.0)
        tokens = tl.dot(y0, w0, input_precision=PRECISION)
        tokens = tl.dot(y1, w1, tokens, input_precision=PRECISION)
        tokens = tl.dot(y2, w2, tokens, input_precision=PRECISION) + added
        tl.store(target + n[None, :], tokens.to(residual.dtype.element_ty), mask=written & inside)


def tokenize(
    residual: Tensor,
    series: Tensor,
    samples: Segments,
    sequences: Segments,
    tokenizer: Tokenizer,
    *,
    input_precision: InputPrecision | None = None,
) -> None:
    """`operators.tokenize` in two launches; float64 runs plain.

    Args:
        residual: (>= tokens, E) float32 or bfloat16, overwritten.
        series: (total samples,) float32.
        samples: samples of each sequence, 11 or more.
        sequences: tokens of each sequence.
        tokenizer: tables of the model; what is made of them is kept in its ``prepared``.
        input_precision: of both products: ``tf32`` or ``ieee``. By default TF32 for a bfloat16 residual,
            and where torch's own float32 products use it.

    Raises:
        InputError: a series too short for a patch, or rows and series that do not fit one another.
    """
    if tokenizer.dtype == torch.float64:
        operators.tokenize(residual, series, samples, sequences, tokenizer)
        return
    if len(residual) < sequences.total or len(samples) != len(sequences):
        raise InputError(
            f"tokenize: {len(residual)} rows and {len(samples)} series for {sequences.total} tokens of "
            f"{len(sequences)} sequences"
        )
    if len(samples) == 0:
        return
    if input_precision is None:
        rounded = residual.dtype == torch.bfloat16 or operators.torch_uses_tf32()
        input_precision = "tf32" if rounded else "ieee"
    device, width = residual.device, residual.shape[1]
    case = f"{residual.dtype} {input_precision}"
    table = TF32_CHOICES if input_precision == "tf32" else IEEE_CHOICES
    choice = pick("tokenize", case, table, device)
    key = ("triton", device, input_precision)
    if key not in tokenizer.prepared:
        tokenizer.prepared[key] = Prepared(tokenizer, input_precision)
    prepared: Prepared = tokenizer.prepared[key]
    plan = prepared.plan(tokenizer, samples, sequences, choice.blocks["BLOCK_M"])
    padded = torch.empty((3, plan.plane), dtype=torch.float32, device=device)
    constants = torch.empty(len(samples), dtype=torch.float32, device=device)
    with torch.cuda.device_of(residual):
        blocks = pick("tokenize series", "any", SERIES_CHOICES, device)
        grid = (len(samples), triton.cdiv(plan.longest_span, blocks.blocks["BLOCK"]))
        series_kernel[grid](
            series,
            plan.spans,
            tokenizer.templates,
            padded,
            constants,
            residual,
            plan.plane,
            residual.stride(0),
            E=width,
            PRECISION=input_precision,
            **blocks.launch(),
        )
        num_tiles, columns = len(plan.tiles), plan.columns.shape[1]
        tokens_kernel[(num_tiles * columns,)](
            padded,
            plan.rows,
            plan.tiles,
            plan.columns,
            prepared.weight,
            tokenizer.templates,
            prepared.ones.patches,
            constants,
            residual,
            plan.plane,
            plan.rows.shape[1],
            num_tiles,
            residual.stride(0),
            COLUMNS=columns,
            E=width,
            VALUES=prepared.weight.shape[2],
            BLOCK_V=max(16, triton.next_power_of_2(prepared.weight.shape[2])),
            PRECISION=input_precision,
            **choice.launch(),
        )


def packed_weight(weight: Tensor) -> Tensor:
    """Patch weights (E, 3 * values) as (3, E, values to a multiple of 4): loads of 16 bytes."""
    width, values = len(weight), weight.shape[1] // 3
    packed = weight.new_zeros(3, width, -(-values // 4) * 4)
    packed[:, :, :values] = weight.view(width, 3, values).transpose(0, 1)
    return packed


def to_tf32(x: Tensor) -> Tensor:
    """float32 rounded to TF32's 10 bits of mantissa, to nearest, ties away from zero."""
    return ((x.view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)


@dataclass(frozen=True)
class Filters:
    """Wavelets of every patch column, once for each row of a patch, on the host.

    Args:
        taps: (total,) float32: for each column (values to a multiple of 4, its taps).
        columns: (columns, 3) int64: where a column starts in ``taps``; how far its first tap lies from
            the first scalogram row of a token; its taps, a multiple of TAPS_MULTIPLE.
    """

    taps: NDArray[np.float32]
    columns: NDArray[np.int64]

    @property
    def lead(self) -> int:
        """Samples before a token's first row that the widest column reaches."""
        return int(-self.columns[:, 1].min())

    @property
    def reach(self) -> int:
        """Samples from a token's first row on that are read, padding included."""
        return int((self.columns[:, 1] + self.columns[:, 2]).max())


@lru_cache(maxsize=64)
def column_filters(
    length: int,
    method: ScalogramMethod,
    wavelet: str,
    num_scales: int,
    patch_size: tuple[int, int],
) -> Filters:
    """Filters where the longest wavelet has ``length`` taps, as `wavelets.filter_widths` says."""
    bank = wavelet_bank(length, method, wavelet, num_scales)
    centre, (patch_rows, size) = bank.shape[1] // 2, patch_size
    values = -(-patch_rows * size // 4) * 4
    parts, columns, first = [], [], 0
    for column in range(num_scales // size):
        wavelets = bank[column * size : (column + 1) * size]
        matters = np.abs(wavelets) > NEGLIGIBLE * np.abs(wavelets).max(axis=1, keepdims=True)
        (where,) = np.nonzero(matters.any(axis=0))
        low, high = int(where[0]), int(where[-1]) + 1
        taps = -(-(high - low + patch_rows - 1) // TAPS_MULTIPLE) * TAPS_MULTIPLE
        part = np.zeros((values, taps), dtype=np.float32)
        for row in range(patch_rows):
            part[row * size : (row + 1) * size, row : row + high - low] = wavelets[:, low:high]
        parts.append(part.ravel())
        columns.append((first, low - centre, taps))
        first += part.size
    return Filters(np.concatenate(parts), np.array(columns, dtype=np.int64))


@dataclass(frozen=True)
class Plan:
    """What a launch needs besides the model's tables, made of the sequences' lengths alone.

    Args:
        spans: (S, 8) int32, a sequence each: first sample in the series; differenced samples; where its
            padded series starts, and how long that is; zeros before it; its [CLS] row in the residual
            and in the templates; 0.
        rows: (5, rows of patches) int32: first sample in the padded series; row of column 0 in the
            residual and in the templates; its patch in `Ones`; sequence. Sequences that share filters
            follow one another.
        tiles: (n, 4) int32: first of ``rows``, how many, which filters, 0.
        columns: (filters, columns, 4) int64: address, shift and taps of each column; 0.
        filters: what the addresses point into.
        plane: samples of the three padded series each.
        longest_span: padded samples of a sequence at most.
    """

    spans: Tensor
    rows: Tensor
    tiles: Tensor
    columns: Tensor
    filters: tuple[Tensor, ...]
    plane: int
    longest_span: int


def constant_scalogram(
    samples: int, method: ScalogramMethod, wavelet: str, num_scales: int
) -> NDArray[np.float64]:
    """(rows, num_scales) of a series of ``samples`` ones: sums of the wavelets where they overlap it."""
    bank = wavelet_bank(samples, method, wavelet, num_scales)
    width = bank.shape[1]
    sums = np.pad(np.cumsum(bank, axis=1), ((0, 0), (1, 0)))
    first = np.arange(scalogram_rows(samples, method)) - width // 2
    stop = np.minimum(width, samples - first)
    return (sums[:, stop] - sums[:, np.maximum(0, -first)]).T


class Ones:
    """Scalograms of a constant 1 on a device, patch by patch, by the number of differenced samples.

    Args:
        weight: (3, E, VALUES) float32, beside whose values a patch's are laid out.
    """

    def __init__(self, weight: Tensor) -> None:
        self.patches = weight.new_empty((0, weight.shape[2]))
        """(>= patches of all, VALUES) float32. It moves when it grows; places in it stay."""
        self._first: dict[int, int] = {}
        self._used = 0

    def __len__(self) -> int:
        return len(self._first)

    def __contains__(self, samples: int) -> bool:
        return samples in self._first

    def clear(self) -> None:
        self._first.clear()
        self._used = 0

    def first(self, samples: int, tokenizer: Tokenizer) -> int:
        """Place of the first patch of a constant of ``samples`` differenced samples."""
        if samples not in self._first:
            (rows, size), scales = tokenizer.patch_size, tokenizer.num_scales
            y = constant_scalogram(samples, tokenizer.method, tokenizer.wavelet, scales)
            height, columns = len(y) // rows, scales // size
            y = y[: height * rows, : columns * size].reshape(height, rows, columns, size)
            y = y.transpose(0, 2, 1, 3).reshape(height * columns, rows * size)
            made = np.zeros((len(y), self.patches.shape[1]), dtype=np.float32)
            made[:, : y.shape[1]] = y
            with torch.inference_mode(False):  # written to inside and outside it
                self._append(samples, upload(made, self.patches.device))
        return self._first[samples]

    def _append(self, samples: int, made: Tensor) -> None:
        stop = self._used + len(made)
        if stop > len(self.patches):
            grown = made.new_empty((max(stop, 2 * len(self.patches)), made.shape[1]))
            grown[: self._used] = self.patches[: self._used]
            self.patches = grown
        self.patches[self._used : stop] = made
        self._first[samples], self._used = self._used, stop


class Prepared:
    """What is kept of a model's tables on a device, for one precision of the products."""

    def __init__(self, tokenizer: Tokenizer, input_precision: InputPrecision) -> None:
        self.rounded = input_precision == "tf32"
        weight = packed_weight(tokenizer.patch_weight)
        self.weight = to_tf32(weight) if self.rounded else weight
        """(3, E, VALUES)."""
        self.ones = Ones(self.weight)
        self._filters: dict[int, tuple[Filters, Tensor]] = {}
        self._plans: dict[object, Plan] = {}

    def plan(
        self, tokenizer: Tokenizer, samples: Segments, sequences: Segments, block: int
    ) -> Plan:
        """The plan for these lengths in tiles of ``block`` rows of patches."""
        key = (samples.lengths, sequences.lengths, tokenizer.token_counts, block)
        if key not in self._plans:
            if len(self._plans) >= KEPT_PLANS:
                del self._plans[next(iter(self._plans))]
            self._plans[key] = self._made(tokenizer, samples, sequences, block)
        return self._plans[key]

    def _filters_of(self, tokenizer: Tokenizer, length: int) -> tuple[Filters, Tensor]:
        if length not in self._filters:
            if len(self._filters) >= KEPT_FILTERS:
                del self._filters[next(iter(self._filters))]
                self._plans.clear()  # they hold filters too
            host = column_filters(
                length,
                tokenizer.method,
                tokenizer.wavelet,
                tokenizer.num_scales,
                tokenizer.patch_size,
            )
            taps = upload(host.taps, self.weight.device)
            host = replace(host, taps=np.empty(0, dtype=np.float32))  # the device has them
            self._filters[length] = host, to_tf32(taps) if self.rounded else taps
        return self._filters[length]

    def _patches_of(self, tokenizer: Tokenizer, count: NDArray[np.int64]) -> NDArray[np.int64]:
        """(S,) places in :attr:`ones` for sequences of so many differenced samples."""
        new = [n for n in np.unique(count).tolist() if n not in self.ones]
        if len(self.ones) + len(new) > KEPT_ONES:
            self.ones.clear()
            self._plans.clear()  # they say where patches were
        return np.array([self.ones.first(n, tokenizer) for n in count.tolist()])

    def _made(
        self, tokenizer: Tokenizer, samples: Segments, sequences: Segments, block: int
    ) -> Plan:
        device, patch_rows = self.weight.device, tokenizer.patch_size[0]
        num_columns = tokenizer.num_scales // tokenizer.patch_size[1]
        height = (np.asarray(sequences.lengths) - 1) // num_columns
        if height.min() < 1:
            raise InputError(
                f"tokenize: a series of {min(samples.lengths)} samples has no row of patches"
            )
        count = np.asarray(samples.lengths) - 2
        longest = [
            int(filter_widths(int(n), tokenizer.method, tokenizer.num_scales).max()) for n in count
        ]
        lengths, which = np.unique(longest, return_inverse=True)
        patch = self._patches_of(tokenizer, count)
        filters = [self._filters_of(tokenizer, int(length)) for length in lengths]
        lead = np.array([host.lead for host, _ in filters])[which]
        reach = np.array([host.reach for host, _ in filters])[which]
        span = lead + patch_rows * (height - 1) + reach
        span = -(-span // 16) * 16
        padded = np.cumsum(span) - span
        cls_row = np.asarray(sequences.bounds[:-1])
        template = np.array([tokenizer.template_start(tokens) for tokens in sequences.lengths])
        spans = np.stack(
            (samples.bounds[:-1], count, padded, span, lead, cls_row, template, 0 * span), axis=1
        )

        order = np.argsort(which, kind="stable")
        sequence = np.repeat(order, height[order])
        first = np.cumsum(height[order]) - height[order]
        t = np.arange(len(sequence)) - np.repeat(first, height[order])
        rows = np.stack(
            (
                (padded + lead)[sequence] + patch_rows * t,
                cls_row[sequence] + 1 + num_columns * t,
                template[sequence] + 1 + num_columns * t,
                patch[sequence] + num_columns * t,
                sequence,
            )
        )
        shared = np.bincount(which, weights=height).astype(np.int64)
        tile = segment_tiles(shared.tolist(), block).astype(np.int64)
        begin = (np.cumsum(shared) - shared)[tile[:, 0]] + tile[:, 1]
        size = np.minimum(shared[tile[:, 0]] - tile[:, 1], block)
        tiles = np.stack((begin, size, tile[:, 0], 0 * size), axis=1)
        columns = np.zeros((len(filters), num_columns, 4), dtype=np.int64)
        for i, (host, taps) in enumerate(filters):
            columns[i, :, :3] = host.columns
            columns[i, :, 0] = taps.data_ptr() + taps.element_size() * host.columns[:, 0]
        return Plan(
            spans=upload(spans.astype(np.int32), device),
            rows=upload(rows.astype(np.int32), device),
            tiles=upload(tiles.astype(np.int32), device),
            columns=upload(columns, device),
            filters=tuple(taps for _, taps in filters),
            plane=int(span.sum()),
            longest_span=int(span.max()),
        )
