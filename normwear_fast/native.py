"""The CPU's operators in C++ (csrc/cpu), and the encoder made of them.

The products are ours too: weights are packed once for the processor's instruction set, a block of rows
stays in cache from one product to the next, and a row's result depends on that row alone, whatever the
micro-batch or the number of threads. docs/native-engine.md has the measurements behind each choice.

``NORMWEAR_FAST_ISA`` forces an instruction set: ``portable``, ``avx2``, ``avx512``, ``avx512bf16`` or
``amx``. Otherwise the best one runs, but ``avx512bf16`` only where its products pay (`bfloat16_gain`).
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from normwear_fast import _native, operators
from normwear_fast.backends import Backend
from normwear_fast.config import NormWearConfig
from normwear_fast.errors import InputError, UsageError
from normwear_fast.folding import FoldedBlock, FoldedEncoder
from normwear_fast.operators import Pool, Tokenizer
from normwear_fast.packing import Layout, Segments
from normwear_fast.wavelets import NEGLIGIBLE, ScalogramMethod, scalogram_rows, wavelet_bank

INSTRUCTION_SETS = ("amx", "avx512bf16", "avx512", "avx2", "portable")
"""Best first. ``amx`` is the tile unit with bfloat16 and int8, whose float32 is three bfloat16 a value
and about as exact; ``avx512`` includes VNNI; ``avx2`` includes FMA."""

OPERANDS = {"float32": 0, "bfloat16": 1, "int8": 2}
"""Precisions the products know, as csrc/cpu/kernels.h numbers them."""

CHUNK = 768
"""Columns of fc2 that share one int8 scale a row: the MLP tile that is in cache, so that a row's scale
needs no second pass. Finer than one scale a row, hence never less exact."""

_TYPES = {torch.float32: 0, torch.bfloat16: 1}
_POOLS = {"mean": 0, "cls": 1, "patch": 2}
_NONE = (0, 0, 0)


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Its address goes to C++: never of the process's default dtype or device."""
    return torch.empty(shape, dtype=dtype, device="cpu")


@cache
def instruction_sets() -> tuple[str, ...]:
    """Those this build and this processor have, best first; empty without the extension."""
    module, _ = _native.load()
    if module is None:
        return ()
    return tuple(name for name in INSTRUCTION_SETS if module.kernels(name) is not None)


@cache
def bfloat16_gain(instruction_set: str) -> float:
    """How many times faster than in float32 a product is in bfloat16, measured: 5 ms, once a process.

    A layer in AVX512-BF16 takes half the time of AVX-512 on AMD's Zen 4 (28 of 55 ms) and twice as long
    on an Intel Xeon (0.55 of the rate); no flag of the processor tells. Far enough apart for a busy
    machine.
    """
    operations = kernels(instruction_set)
    a, w, c = _empty(84, 768).fill_(1), _empty(256, 768).fill_(1), _empty(84, 256)
    weights = {name: pack(operations, w, OPERANDS[name]) for name in ("float32", "bfloat16")}
    best = dict.fromkeys(weights, float("inf"))
    for _ in range(7):
        for name, weight in weights.items():
            start = time.perf_counter()
            operations.linear(
                a=_view(a), standardise=False, carried=0, eps=0.0, weight=weight, bias=0,
                gelu=False, accumulate=False, c=_view(c), rows=len(a), threads=1,
            )  # fmt: skip
            best[name] = min(best[name], time.perf_counter() - start)
    return best["float32"] / best["bfloat16"]


def default_instruction_set() -> str:
    """``NORMWEAR_FAST_ISA``, or the best that pays."""
    forced = os.environ.get("NORMWEAR_FAST_ISA")
    if forced:
        return forced
    best, *others = instruction_sets()
    return others[0] if best == "avx512bf16" and bfloat16_gain(best) < 1 else best


def kernels(instruction_set: str | None = None) -> Any:
    """The operators of an instruction set: by default the best, or ``NORMWEAR_FAST_ISA``'s."""
    module, _ = _native.load()
    present = instruction_sets()
    name = instruction_set or default_instruction_set()
    if module is None or name not in present:
        raise UsageError(
            f"instruction set {name!r} is not one this processor has; it has {', '.join(present)}"
        )
    return module.kernels(name)


@cache
def backend(instruction_set: str | None = None) -> Backend:
    """The native backend, by default for the best instruction set or ``NORMWEAR_FAST_ISA``'s.

    Raises:
        UsageError: no extension, or an instruction set that is not there.
    """
    module, why_not = _native.load()
    if module is None:
        raise UsageError(
            f"backend 'native' needs normwear_fast._C ({why_not}); install a C++17 compiler and "
            "reinstall normwear-fast"
        )
    operations = kernels(instruction_set)
    return Backend(
        "native",
        tokenize=partial(tokenize, operations),
        residual_norm=partial(residual_norm, operations),
        channel_attention=partial(channel_attention, operations),
        bias_gelu=partial(bias_gelu, operations),
        pool_norm=partial(pool_norm, operations),
        encoder=partial(NativeEncoder, operations),
        precisions=tuple(OPERANDS),
        blas=f"normwear-fast {operations.name}",
    )


# --- addresses ---------------------------------------------------------------------------------------


def _view(x: Tensor | None) -> tuple[int, int, int]:
    return _NONE if x is None else (x.data_ptr(), x.stride(0), _TYPES[x.dtype])


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


# The checks are a third of what a call of a few rows takes: attributes that cost 50 ns, no generators.


def _rows(shape: tuple[int, ...], *tensors: Tensor | None) -> bool:
    """Whether all are CPU matrices of this shape and a type the kernels know, with contiguous rows."""
    if len(shape) != 2:
        return False
    for x in tensors:
        if x is not None and not (
            x.is_cpu
            and x.dtype in _TYPES
            and x.shape == shape
            and (shape[1] <= 1 or x.stride()[1] == 1)
            and x.data_ptr() % x.itemsize == 0
        ):
            return False
    return True


def _apart(x: Tensor | None) -> bool:
    """Whether no two rows share memory, as those of an expanded tensor do: what is written to."""
    if x is None:
        return True
    rows, width = x.shape
    return rows <= 1 or x.stride()[0] >= width


def _whole(shape: tuple[int, ...], *tensors: Tensor | None) -> bool:
    """Whether all are contiguous float32 of this shape on the CPU."""
    for x in tensors:
        if x is not None and not (
            x.is_cpu
            and x.dtype == torch.float32
            and x.shape == shape
            and x.is_contiguous()
            and x.data_ptr() % 4 == 0
        ):
            return False
    return True


def _within(operator: str, what: str, segments: Segments, rows: int) -> None:
    """Refuses segments of more rows than there are: the definition's slices would only be shorter."""
    if segments.total > rows:
        raise InputError(f"{operator}: {what} are {segments.total} rows, and there are {rows}")


def _what(x: Tensor | None) -> str:
    if x is None:
        return "None"
    strides = "" if x.is_contiguous() else f" of strides {x.stride()}"
    return f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}{strides}"


@lru_cache(maxsize=256)
def _bounds(segments: Segments) -> Tensor:
    return torch.tensor(segments.bounds, dtype=torch.int64, device="cpu")


# --- the operators: signatures and meaning are those of normwear_fast.operators ----------------------
# What the kernels do not take (float64, odd strides, shapes that do not match) goes to the definition,
# which computes or raises; what is passed on lies inside its tensors.


def residual_norm(
    kernels: Any,
    residual: Tensor,
    carried: Tensor | None,
    eps: float,
    *,
    update: Tensor | None = None,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    wanted = (out.dtype if out is not None else dtype) or residual.dtype
    shape = residual.shape
    taken = _rows(shape, residual, update, out) and _whole(shape, residual) and shape[1] > 0
    if not (taken and _whole(shape[1:], carried) and wanted in _TYPES and _apart(out)):
        return operators.residual_norm(residual, carried, eps, update=update, dtype=dtype, out=out)
    if out is None:
        out = _empty(*shape, dtype=wanted)
    kernels.residual_norm(
        residual=residual.data_ptr(),
        update=_view(update),
        carried=_address(carried),
        eps=eps,
        rows=shape[0],
        width=shape[1],
        out=_view(out),
        threads=torch.get_num_threads(),
    )
    return out


def bias_gelu(kernels: Any, x: Tensor, bias: Tensor) -> None:
    if not (_rows(x.shape, x) and _whole(x.shape[1:], bias) and _apart(x)):
        return operators.bias_gelu(x, bias)
    kernels.bias_gelu(
        x=_view(x),
        bias=bias.data_ptr(),
        rows=x.shape[0],
        width=x.shape[1],
        threads=torch.get_num_threads(),
    )
    return None


def quantise_rows(kernels: Any, x: Tensor, bias: Tensor | None = None) -> tuple[Tensor, ...]:
    """Rows, or gelu(rows + bias), as 8-bit integers: x ~ scale * q + offset, the row's whole range.

    Args:
        x: (rows, width) float32 or bfloat16.
        bias: (width,) float32 for gelu, or None.

    Returns:
        q (rows, width) uint8, scale (rows,), offset (rows,): off by scale / 2 at most. A row that holds
        NaN or an infinity has a scale and an offset of NaN; one whose range is below 2^-118 counts as
        constant.
    """
    if not (_rows(x.shape, x) and x.shape[1] > 0 and _whole(x.shape[1:], bias)):
        raise InputError(
            f"quantise_rows: x is {_what(x)}, bias {_what(bias)}; wanted are (rows, width) float32 "
            "or bfloat16 on the CPU with contiguous rows, and (width,) float32 or None"
        )
    rows, width = x.shape
    q = _empty(rows, width, dtype=torch.uint8)
    scale, offset = _empty(rows), _empty(rows)
    kernels.quantise(
        x=_view(x),
        bias=_address(bias),
        rows=rows,
        width=width,
        out=q.data_ptr(),
        scale=scale.data_ptr(),
        offset=offset.data_ptr(),
        threads=torch.get_num_threads(),
    )
    return q, scale, offset


def channel_attention(
    kernels: Any,
    query: Tensor,
    key_value: Tensor,
    queries: Segments,
    keys: Segments,
    num_heads: int,
    *,
    out: Tensor | None = None,
) -> Tensor:
    shape, wide = query.shape, key_value.shape
    _within("channel_attention", "queries", queries, shape[0])
    _within("channel_attention", "keys", keys, wide[0])
    if out is not None and out.shape != (queries.total, *shape[1:]):
        # The definition's torch.cat would make it fit, beyond what it is a view of.
        raise InputError(f"channel_attention: out is {_what(out)} for {queries.total} queries")
    same = query.dtype == key_value.dtype and (out is None or out.dtype == query.dtype)
    fits = (
        same
        and _rows(shape, query, out)
        and _rows(wide, key_value)
        and _apart(out)
        and num_heads > 0
        and shape[1] % num_heads == 0 < shape[1]
        and wide[1] == 2 * shape[1]
        and queries.total == shape[0]
        and len(queries) == len(keys)
        and 0 not in keys.lengths
    )
    if not fits:
        return operators.channel_attention(query, key_value, queries, keys, num_heads, out=out)
    if out is None:
        out = _empty(*shape, dtype=query.dtype)
    bounds = [_bounds(queries), _bounds(keys)]  # kept: another thread may empty the cache
    kernels.attention(
        query=_view(query),
        key_value=_view(key_value),
        out=_view(out),
        queries=bounds[0].data_ptr(),
        keys=bounds[1].data_ptr(),
        segments=len(queries),
        heads=num_heads,
        head_size=shape[1] // num_heads,
        threads=torch.get_num_threads(),
    )
    return out


def pool_norm(
    kernels: Any,
    residual: Tensor,
    carried: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    sequences: Segments,
    pool: Pool,
    *,
    update: Tensor | None = None,
) -> Tensor:
    shape = residual.shape
    _within("pool_norm", "sequences", sequences, shape[0])
    taken = _rows(shape, residual, update) and _whole(shape, residual) and shape[1] > 0
    fits = (
        taken
        and _whole(shape[1:], carried, weight, bias)
        and (sequences.total == shape[0] if pool == "patch" else 0 not in sequences.lengths)
    )
    if not fits:
        return operators.pool_norm(
            residual, carried, weight, bias, eps, sequences, pool, update=update
        )
    out = _empty(shape[0] if pool == "patch" else len(sequences), shape[1])
    bounds = _bounds(sequences)
    kernels.pool_norm(
        residual=residual.data_ptr(),
        update=_view(update),
        carried=_address(carried),
        weight=weight.data_ptr(),
        bias=bias.data_ptr(),
        eps=eps,
        segments=bounds.data_ptr(),
        sequences=len(sequences),
        width=shape[1],
        pool=_POOLS[pool],
        out=out.data_ptr(),
        threads=torch.get_num_threads(),
    )
    return out


@dataclass(frozen=True)
class _Filters:
    """The wavelets of one series length, a patch column after another.

    ``taps`` holds (taps, scales of a patch) float32 a column; ``spans`` (columns, 4): the first tap
    that counts, one past the last, where the column starts in ``taps``, and 1 if its taps are the same
    from both ends, as those of an even wavelet are.
    """

    taps: NDArray[np.float32]
    spans: NDArray[np.int64]
    padding: int


@lru_cache(maxsize=64)
def _filters(
    samples: int, method: ScalogramMethod, wavelet: str, num_scales: int, patch_scales: int
) -> _Filters:
    bank = wavelet_bank(samples, method, wavelet, num_scales)
    taps, spans, start = [], [], 0
    for first in range(0, num_scales - patch_scales + 1, patch_scales):
        part = bank[first : first + patch_scales]
        peaks = np.abs(part).max(axis=1, keepdims=True)
        counts = np.flatnonzero((np.abs(part) > NEGLIGIBLE * peaks).any(axis=0))
        low, high = (int(counts[0]), int(counts[-1]) + 1) if len(counts) else (0, 0)
        column = np.ascontiguousarray(part[:, low:high].T, dtype=np.float32)
        spans.append((low, high, start, int(np.array_equal(column, column[::-1]))))
        taps.append(column.reshape(-1))
        start += len(taps[-1])
    return _Filters(np.concatenate(taps), np.array(spans, np.int64), bank.shape[1] // 2)


def _patch_matrix(kernels: Any, tokenizer: Tokenizer) -> Any:
    """(E, rows * 3 * scales) packed: for every scalogram row of a patch its 3 * scales values."""
    rows, scales = tokenizer.patch_size
    weight = tokenizer.patch_weight.view(-1, 3, rows, scales).permute(0, 2, 1, 3).flatten(2)
    return pack(kernels, weight.flatten(1), 0)


def pack(kernels: Any, weight: Tensor, operand: int, chunk: int | None = None) -> Any:
    """A weight (n, k) as the products take it: panels of outputs, k by k; see csrc/cpu/kernels.h."""
    if weight.ndim != 2 or weight.numel() == 0 or weight.device.type != "cpu":
        raise InputError(f"pack: the weight is {_what(weight)}, not (n, k) on the CPU")
    weight = weight.float().contiguous()
    if weight.data_ptr() % 4:
        weight = weight.clone()
    outputs, inputs = weight.shape
    return kernels.pack(
        weight=weight.data_ptr(),
        n=outputs,
        k=inputs,
        stride=inputs,
        operand=operand,
        chunk=chunk or inputs,
        threads=torch.get_num_threads(),
    )


def linear(
    kernels: Any,
    a: Tensor,
    weight: Any,
    c: Tensor,
    *,
    carried: Tensor | None = None,
    bias: Tensor | None = None,
    norm: bool = False,
    eps: float = 0.0,
    gelu: bool = False,
    add: bool = False,
) -> Tensor:
    """c (+)= gelu?(norm?(a + carried) weight^T + bias), in one pass over a.

    Args:
        a: (rows, k) float32 or bfloat16, rows contiguous; ``norm`` takes all of a row.
        weight: what `pack` made of (n, k).
        c: (rows, n) float32 or bfloat16.
        carried: (k,) float32, with ``norm``; bias: (n,) float32.
    """
    (n, k), rows = weight.shape, a.shape[0]
    matrices = c is not None and _rows((rows, k), a) and _rows((rows, n), c) and _apart(c)
    if not (matrices and _whole((k,), carried) and _whole((n,), bias)):
        raise InputError(
            f"linear: a {_what(a)}, carried {_what(carried)}, bias {_what(bias)} and c {_what(c)} are "
            f"not what a matrix of {n} outputs and {k} inputs takes"
        )
    kernels.linear(
        a=_view(a),
        standardise=norm,
        carried=_address(carried),
        eps=eps,
        weight=weight,
        bias=_address(bias),
        gelu=gelu,
        accumulate=add,
        c=_view(c),
        rows=rows,
        threads=torch.get_num_threads(),
    )
    return c


def _tokens(samples: int, tokenizer: Tokenizer) -> int:
    """Tokens of a series of ``samples`` values; 0 for one too short to be differenced."""
    if samples < 3:
        return 0
    rows, scales = tokenizer.patch_size
    columns = tokenizer.num_scales // scales
    return 1 + columns * (scalogram_rows(samples - 2, tokenizer.method) // rows)


def tokenize(
    kernels: Any,
    residual: Tensor,
    series: Tensor,
    samples: Segments,
    sequences: Segments,
    tokenizer: Tokenizer,
) -> None:
    _within("tokenize", "samples", samples, len(series))
    _within("tokenize", "tokens", sequences, len(residual))
    width, (rows, scales) = residual.shape[-1], tokenizer.patch_size
    pairs = list(zip(samples.lengths, sequences.lengths, strict=True))
    fits = (
        residual.ndim == 2
        and not tokenizer.float64
        and min(width, rows, scales, tokenizer.num_scales // max(1, scales)) > 0
        and _whole(residual.shape, residual)
        and _whole((len(series),), series)
        and _whole((sum(tokenizer.token_counts), width), tokenizer.templates)
        and _whole(tokenizer.patch_weight.shape, tokenizer.patch_weight)
        and tokenizer.patch_weight.numel() == width * 3 * rows * scales
        and all(tokens == _tokens(length, tokenizer) for length, tokens in set(pairs))
    )
    if not fits:
        return operators.tokenize(residual, series, samples, sequences, tokenizer)
    key = ("native", kernels.name)
    if key not in tokenizer.prepared:
        tokenizer.prepared[key] = _patch_matrix(kernels, tokenizer)
    known: dict[tuple[int, int], int] = {}
    which = [known.setdefault(pair, len(known)) for pair in pairs]
    table = torch.tensor(which, dtype=torch.int64, device="cpu")
    filters, entries = [], []
    for length, tokens in known:
        part = _filters(
            length - 2, tokenizer.method, tokenizer.wavelet, tokenizer.num_scales, scales
        )
        filters.append(part)  # alive during the call
        template = tokenizer.templates.data_ptr() + 4 * width * tokenizer.template_start(tokens)
        entries.append((part.taps.ctypes.data, part.spans.ctypes.data, template, part.padding))
    bounds = [_bounds(samples), _bounds(sequences)]
    kernels.tokenize(
        series=series.data_ptr(),
        samples=bounds[0].data_ptr(),
        tokens=bounds[1].data_ptr(),
        table=table.data_ptr(),
        sequences=len(samples),
        filters=entries,
        columns=tokenizer.num_scales // scales,
        patch_rows=rows,
        patch_scales=scales,
        weight=tokenizer.prepared[key],
        residual=residual.data_ptr(),
        width=width,
        threads=torch.get_num_threads(),
    )
    return None


# --- the encoder -------------------------------------------------------------------------------------


class _Block:
    """A folded block with its matrices packed."""

    def __init__(self, kernels: Any, block: FoldedBlock, operand: int, last: bool) -> None:
        packed = partial(pack, kernels, operand=operand)
        width = block.proj.shape[0]
        self.qkv = packed(block.qkv)
        self.qkv_bias = block.qkv_bias.float()
        self.query = packed(block.qkv[:width]) if last else None
        self.key_value = packed(block.qkv[width:]) if last else None
        self.proj = packed(block.proj)
        self.proj_constant = block.proj_constant
        self.fc1 = packed(block.fc1)
        self.fc1_bias = block.fc1_bias
        self.fc2 = packed(block.fc2, chunk=CHUNK)
        self.fc2_constant = block.fc2_constant
        self.hidden = block.fc1.shape[0]


class NativeEncoder:
    """The layers between the tokenizer and the pooled output, in three native calls a layer.

    Args:
        kernels: of the instruction set.
        folded: the weights; its matrices are copied and not needed any more.
        config: sizes.
        precision: of the products: ``float32``, ``bfloat16`` or ``int8``.
    """

    def __init__(
        self, kernels: Any, folded: FoldedEncoder, config: NormWearConfig, precision: str
    ) -> None:
        operand = OPERANDS[precision]
        last = len(folded.blocks) - 1
        self.kernels, self.folded, self.config = kernels, folded, config
        half = precision == "bfloat16" or (precision == "int8" and kernels.native_bfloat16)
        self.dtype = torch.bfloat16 if half else torch.float32
        """Of queries, keys and values: bfloat16 halves attention's time where it is native."""
        self.blocks = [_Block(kernels, b, operand, i == last) for i, b in enumerate(folded.blocks)]
        self.fusions = {i: _Block(kernels, b, operand, False) for i, b in folded.fusions.items()}

    residual_dtype = torch.float32

    def residual(self, layout: Layout, take: Any) -> Tensor:
        """(tokens, E) float32 buffer for the tokenizer."""
        width = self.config.embed_dim
        out: Tensor = take("residual", layout.sequences.total, width, self.residual_dtype)
        return out

    def release(self, keep_bytes: int) -> None:
        """Nothing: what it keeps between calls is weights."""

    def run(self, residual: Tensor, layout: Layout, pool: Pool, take: Any) -> Tensor:
        """Tokens to output.

        Args:
            residual: (tokens, E) float32, overwritten.
            layout: where everything stands.
            pool: ``mean``, ``cls`` or ``patch``.
            take: the workspace's ``take(name, rows, width, dtype)``.
        """
        kernels, folded, width = self.kernels, self.folded, self.config.embed_dim
        sequences, rows, heads = layout.sequences, len(residual), self.config.num_heads
        qkv = take("qkv", rows, 3 * width, self.dtype)
        attended = take("attended", rows, width, self.dtype)
        last = len(self.blocks) - 1
        for i, block in enumerate(self.blocks):
            carried = folded.carried[2 * i]
            if i == last and pool == "cls":
                return self._last_layer_cls(residual, layout, take)
            self._linear(residual, block.qkv, qkv, carried=carried, bias=block.qkv_bias, norm=True)
            channel_attention(
                kernels, qkv[:, :width], qkv[:, width:], sequences, sequences, heads, out=attended
            )
            kernels.feed(
                residual=residual.data_ptr(),
                attended=_view(attended),
                rows=rows,
                proj=block.proj,
                fc1=block.fc1,
                fc2=block.fc2,
                carried=folded.carried[2 * i + 1].data_ptr(),
                fc1_bias=block.fc1_bias.data_ptr(),
                eps=folded.layer_eps,
                threads=torch.get_num_threads(),
            )
            if i in self.fusions:
                cls, carried = layout.cls_rows, folded.carried[2 * i + 2]
                fused = self._true_block(residual[cls] + carried, self.fusions[i], layout.windows)
                residual[cls] = fused - carried
        return self._pooled(residual, folded.carried[-1], sequences, pool)

    def _linear(self, a: Tensor, weight: Any, c: Tensor, **options: Any) -> Tensor:
        return linear(self.kernels, a, weight, c, eps=self.folded.layer_eps, **options)

    def _true_block(self, x: Tensor, block: _Block, groups: Segments) -> Tensor:
        """A block over true values (S, E), attending inside each group: the fusion of [CLS] rows."""
        width = x.shape[1]
        qkv = _empty(len(x), 3 * width, dtype=self.dtype)
        self._linear(x, block.qkv, qkv, bias=block.qkv_bias, norm=True)
        attended = channel_attention(
            self.kernels, qkv[:, :width], qkv[:, width:], groups, groups, self.config.num_heads
        )
        return self._after_attention(x, attended, block)

    def _after_attention(self, x: Tensor, attended: Tensor, block: _Block) -> Tensor:
        """proj and the MLP with their constants; few rows, so that threads share the outputs."""
        x = self._linear(attended, block.proj, x + block.proj_constant, add=True)
        hidden = _empty(len(x), block.hidden)
        self._linear(x, block.fc1, hidden, bias=block.fc1_bias, norm=True, gelu=True)
        return self._linear(hidden, block.fc2, x + block.fc2_constant, add=True)

    def _last_layer_cls(self, residual: Tensor, layout: Layout, take: Any) -> Tensor:
        """The last layer for [CLS] rows only: keys and values of all tokens, the rest of those."""
        last, width = len(self.blocks) - 1, self.config.embed_dim
        block, carried = self.blocks[last], self.folded.carried[2 * last]
        key_value = take("qkv", len(residual), 2 * width, self.dtype)
        self._linear(residual, block.key_value, key_value, carried=carried, norm=True)
        x = residual[layout.cls_rows] + carried
        query = _empty(len(x), width, dtype=self.dtype)
        self._linear(x, block.query, query, bias=block.qkv_bias[:width], norm=True)
        attended = channel_attention(
            self.kernels, query, key_value, layout.ones, layout.sequences, self.config.num_heads
        )
        x = self._after_attention(x, attended, block)
        if last in self.fusions:
            x = self._true_block(x, self.fusions[last], layout.windows)
        return self._pooled(x, None, layout.ones, "patch")

    def _pooled(
        self, residual: Tensor, carried: Tensor | None, segments: Segments, pool: Pool
    ) -> Tensor:
        folded = self.folded
        weight, bias, eps = folded.norm_weight, folded.norm_bias, folded.final_eps
        return pool_norm(self.kernels, residual, carried, weight, bias, eps, segments, pool)
