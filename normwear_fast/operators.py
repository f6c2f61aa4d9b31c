"""The operators of the packed encoder: what each means, in plain PyTorch.

These functions are the definition every accelerated backend is tested against. Rows are packed
(see :mod:`normwear_fast.packing`); S sequences, E = width, H heads. Below them, as ``torch.library``
operators in the namespace ``normwear``, the five that ``torch.export`` has one node each for and, for
``torch.compile``, ``forward``: all of inference as one. Steady-state encoding calls the functions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Literal, cast
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.nn import functional as F

from normwear_fast.packing import Segments, equal_runs
from normwear_fast.scalograms import derivatives
from normwear_fast.wavelets import ScalogramMethod, scalogram_rows, wavelet_bank

Pool = Literal["mean", "cls", "patch"]

TOKENIZE_ROWS = 16_384
"""Scalogram rows the plain tokenizer holds at a time: 13 MB in float32."""


@dataclass
class Tokenizer:
    """What turns a series into tokens: wavelets, patch projection and templates.

    Args:
        patch_weight: (E, 3 * rows * scales) of the patch convolution.
        templates: (sum of T, E), one template for every entry of ``token_counts``, in that order.
        token_counts: distinct tokens T a sequence can have here, ascending.
        patch_size: scalogram rows and scales of a patch.
        num_scales: wavelet scales.
        method: which scalogram.
        wavelet: PyWavelets' name of the mother wavelet.
        float64: whether wavelets and patches are, as the published code has SciPy's scalogram. Its
            values are sums of large terms that nearly cancel: in float32 a token of a signal with a
            constant, or with little at a scale, is 1e-3 to 2e-2 off.
    """

    patch_weight: Tensor
    templates: Tensor
    token_counts: tuple[int, ...]
    patch_size: tuple[int, int]
    num_scales: int
    method: ScalogramMethod
    wavelet: str
    float64: bool = False
    prepared: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)
    """What a backend made of these tables, by its own key."""

    @property
    def dtype(self) -> torch.dtype:
        """Of wavelets and patches."""
        return torch.float64 if self.float64 else self.patch_weight.dtype

    def template_start(self, tokens: int) -> int:
        """First row in ``templates`` of the template for a sequence of ``tokens`` tokens."""
        return sum(self.token_counts[: self.token_counts.index(tokens)])

    def bank(self, samples: int) -> Tensor:
        """(num_scales, W) filters for differenced series of ``samples`` values."""
        bank = wavelet_bank(samples, self.method, self.wavelet, self.num_scales)
        return torch.tensor(bank, dtype=self.dtype, device=self.patch_weight.device)


def torch_uses_tf32() -> bool:
    """Whether the process has asked for TF32 in float32 products on a GPU, by either of torch's names."""
    flags = torch.backends.cuda.matmul
    try:
        return bool(flags.allow_tf32)
    except RuntimeError:  # the process has used the newer name, and torch refuses to mix the two
        return bool(flags.fp32_precision == "tf32")


def tokenize(
    residual: Tensor, series: Tensor, samples: Segments, sequences: Segments, tokenizer: Tokenizer
) -> None:
    """Series to tokens: differences, wavelets, patches, template, written into the packed rows.

    Args:
        residual: (>= tokens, E), overwritten.
        series: (total samples,) float32, the sequences one after another.
        samples: samples of each sequence.
        sequences: tokens of each sequence.
        tokenizer: tables of the model.
    """
    width = residual.shape[1]
    patch = tokenizer.patch_weight.view(width, 3, *tokenizer.patch_size).to(tokenizer.dtype)
    for first, stop in equal_runs(samples, sequences):
        length, tokens = samples.lengths[first], sequences.lengths[first]
        run = series[samples.bounds[first] : samples.bounds[stop]].view(-1, 1, length)
        rows = residual[sequences.bounds[first] : sequences.bounds[stop]].view(-1, tokens, width)
        bank = tokenizer.bank(length - 2)
        start = tokenizer.template_start(tokens)
        template = tokenizer.templates[start : start + tokens]
        rows[:, 0] = template[0]
        # Differences before any rounding: those of a bfloat16 series would be mostly noise.
        differences = derivatives(run).to(bank.dtype).view(-1, 1, length - 2)
        kept = scalogram_rows(length - 2, tokenizer.method)
        # One by one where this stands in for the native engine, whose tokens are the same in any batch:
        # a library's products of other sizes differ in the last bit.
        chunk = 1 if tokenizer.float64 else max(1, TOKENIZE_ROWS // kept)
        for i in range(0, len(run), chunk):
            part = differences[3 * i : 3 * (i + chunk)]
            y = F.conv1d(part, bank.unsqueeze(1), padding=bank.shape[1] // 2)[..., :kept]
            scalogram = y.transpose(1, 2).unflatten(0, (-1, 3))
            patches = F.conv2d(scalogram, patch, stride=tokenizer.patch_size)
            rows[i : i + chunk, 1:] = patches.flatten(2).transpose(1, 2) + template[1:]


def residual_norm(
    residual: Tensor,
    carried: Tensor | None,
    eps: float,
    *,
    update: Tensor | None = None,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Adds a pending update to the residual, then standardises residual + carried.

    Args:
        residual: (rows, E); ``update`` is added to it in place.
        carried: (E,) constants the residual stands without, or None where it holds true values.
        eps: of the norm.
        update: (rows, E) or None.
        dtype: of the result; the residual's by default.
        out: (rows, E) buffer for the result.

    Returns:
        (rows, E): zero mean and unit variance a row; the affine part is folded into the next Linear.
    """
    if update is not None:
        residual += update
    x = residual if carried is None else residual + carried
    normed = F.layer_norm(x, x.shape[-1:], eps=eps)
    if out is not None:
        return out.copy_(normed)
    return normed.to(dtype or residual.dtype)


def channel_attention(
    query: Tensor,
    key_value: Tensor,
    queries: Segments,
    keys: Segments,
    num_heads: int,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Softmax attention inside each segment: a channel's tokens, or a window's [CLS] rows.

    Args:
        query: (query rows, E), any row stride; holds head_size^-0.5 log2(e) already.
        key_value: (key rows, 2 E), any row stride: keys, then values.
        queries: query rows of each segment.
        keys: key rows of each segment.
        num_heads: H.
        out: (query rows, E) buffer the result may be written to.

    Returns:
        (query rows, E), contiguous.
    """
    width = query.shape[1]
    parts = []
    for first, stop in equal_runs(queries, keys):
        count = stop - first
        q = query[queries.bounds[first] : queries.bounds[stop]]
        kv = key_value[keys.bounds[first] : keys.bounds[stop]]
        q = q.unflatten(1, (num_heads, -1)).unflatten(0, (count, -1)).transpose(1, 2)
        kv = kv.unflatten(1, (2, num_heads, -1)).unflatten(0, (count, -1)).permute(2, 0, 3, 1, 4)
        # The query's log2(e) makes this exp2(q k): scale = ln 2 undoes it for the natural softmax.
        attended = F.scaled_dot_product_attention(q, kv[0], kv[1], scale=math.log(2.0))
        parts.append(attended.transpose(1, 2).reshape(-1, width))
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts) if out is None else torch.cat(parts, out=out)


def bias_gelu(x: Tensor, bias: Tensor) -> None:
    """gelu(x + bias), exact (erf), in place: x (rows, hidden), bias (hidden,)."""
    x += bias
    torch.ops.aten.gelu_(x)


def pool_norm(
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
    """The final LayerNorm and the pooling over a sequence's tokens.

    Args:
        residual: (tokens, E).
        carried: (E,) constants the residual stands without, or None.
        weight, bias: (E,) of the norm.
        eps: of the norm.
        sequences: tokens of each sequence.
        pool: ``mean`` over all tokens ([CLS] included), ``cls``, or ``patch`` for every row.
        update: (tokens, E) still to be added to the residual, or None.

    Returns:
        (S, E), or (tokens, E) for ``patch``, in the weight's dtype.
    """

    def norm(rows: Tensor, pending: Tensor | None) -> Tensor:
        if pending is not None:
            rows = rows + pending
        rows = rows.to(weight.dtype)
        rows = rows if carried is None else rows + carried
        return F.layer_norm(rows, rows.shape[-1:], weight, bias, eps)

    if pool == "patch":
        return norm(residual, update)
    if pool == "cls":
        first_rows = sequences.cu[:-1].long()
        return norm(residual[first_rows], None if update is None else update[first_rows])
    pooled = []
    for first, stop in equal_runs(sequences):
        rows = slice(sequences.bounds[first], sequences.bounds[stop])
        normed = norm(residual[rows], None if update is None else update[rows])
        pooled.append(normed.unflatten(0, (stop - first, -1)).mean(1))
    return torch.cat(pooled)


def gather_rows(
    residual: Tensor, rows: Tensor, *, update: Tensor | None = None, out: Tensor
) -> Tensor:
    """Copies rows of the residual, with what is still to be added to them, to a buffer of their own.

    Args:
        residual: (tokens, E).
        rows: (S,) int32; an entry of -1 stands for nothing, and its row of ``out`` becomes zero.
        update: (tokens, E) still to be added to the residual, or None; the rows taken become zero.
        out: (S, E) in the residual's dtype.
    """
    real = rows >= 0
    index = rows[real].long()
    taken = residual[index]
    if update is not None:
        taken = taken + update[index]
        update[index] = 0
    out.zero_()
    out[real] = taken.to(out.dtype)
    return out


def scatter_rows(x: Tensor, constant: Tensor, rows: Tensor, residual: Tensor) -> None:
    """residual[rows] = x + constant, where rows is not -1.

    Args:
        x: (S, E).
        constant: (E,) float32.
        rows: (S,) int32, each once.
        residual: (tokens, E), written in place.
    """
    real = rows >= 0
    residual[rows[real].long()] = (x[real] + constant).to(residual.dtype)


# --- The same, as torch.library operators -----------------------------------------------------------
# Segments travel as their cumulative bounds (int32). `backends` is imported late: it needs this module.


_MODELS: WeakValueDictionary[int, Any] = WeakValueDictionary()
_HANDLES = count()


def register_model(model: Any) -> int:
    """A number by which ``normwear::forward`` finds the model while it lives."""
    handle = next(_HANDLES)
    _MODELS[handle] = model
    return handle


def living_models() -> list[Any]:
    """All that `register_model` knows."""
    return list(_MODELS.values())


UNCAPTURED = (torch.Tag.cudagraph_unsafe,)
"""No caller's graph may capture these: they read bounds on the host, or replay graphs of their own."""


@torch.library.custom_op("normwear::forward", mutates_args=(), tags=UNCAPTURED)
def _forward(x: Tensor, handle: int, tokens: int, embed_dim: int) -> Tensor:
    embedded: Tensor = _MODELS[handle]._forward_inference(x)
    return embedded


@_forward.register_fake
def _(x: Tensor, handle: int, tokens: int, embed_dim: int) -> Tensor:
    return x.new_empty((*x.shape[:2], tokens, embed_dim))


def _backend(device: torch.device):  # type: ignore[no-untyped-def]
    from normwear_fast.backends import select_backend

    return select_backend("auto", device)


@torch.library.custom_op("normwear::tokenize", mutates_args=("residual",), tags=UNCAPTURED)
def _tokenize(
    residual: Tensor,
    series: Tensor,
    cu_samples: Tensor,
    cu_tokens: Tensor,
    patch_weight: Tensor,
    templates: Tensor,
    token_counts: Sequence[int],
    patch_size: Sequence[int],
    num_scales: int,
    method: str,
    wavelet: str,
    float64: bool = False,
) -> None:
    tokenizer = Tokenizer(
        patch_weight,
        templates,
        tuple(token_counts),
        (patch_size[0], patch_size[1]),
        num_scales,
        cast(ScalogramMethod, method),
        wavelet,
        float64,
    )
    _backend(residual.device).tokenize(
        residual, series, Segments.from_cu(cu_samples), Segments.from_cu(cu_tokens), tokenizer
    )


@_tokenize.register_fake
def _(
    residual: Tensor,
    series: Tensor,
    cu_samples: Tensor,
    cu_tokens: Tensor,
    patch_weight: Tensor,
    templates: Tensor,
    token_counts: Sequence[int],
    patch_size: Sequence[int],
    num_scales: int,
    method: str,
    wavelet: str,
    float64: bool = False,
) -> None:
    return None


@torch.library.custom_op("normwear::residual_norm", mutates_args=("residual",))
def _residual_norm(
    residual: Tensor,
    carried: Tensor | None,
    eps: float,
    update: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    normed: Tensor = _backend(residual.device).residual_norm(
        residual, carried, eps, update=update, dtype=dtype
    )
    return normed


@_residual_norm.register_fake
def _(
    residual: Tensor,
    carried: Tensor | None,
    eps: float,
    update: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    return residual.new_empty(residual.shape, dtype=dtype)


@torch.library.custom_op("normwear::channel_attention", mutates_args=(), tags=UNCAPTURED)
def _channel_attention(
    query: Tensor, key_value: Tensor, cu_queries: Tensor, cu_keys: Tensor, num_heads: int
) -> Tensor:
    attended: Tensor = _backend(query.device).channel_attention(
        query, key_value, Segments.from_cu(cu_queries), Segments.from_cu(cu_keys), num_heads
    )
    return attended


@_channel_attention.register_fake
def _(
    query: Tensor, key_value: Tensor, cu_queries: Tensor, cu_keys: Tensor, num_heads: int
) -> Tensor:
    return query.new_empty(query.shape)


@torch.library.custom_op("normwear::bias_gelu", mutates_args=("x",))
def _bias_gelu(x: Tensor, bias: Tensor) -> None:
    _backend(x.device).bias_gelu(x, bias)


@_bias_gelu.register_fake
def _(x: Tensor, bias: Tensor) -> None:
    return None


@torch.library.custom_op("normwear::pool_norm", mutates_args=(), tags=UNCAPTURED)
def _pool_norm(
    residual: Tensor,
    carried: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    cu_tokens: Tensor,
    pool: str,
    update: Tensor | None,
) -> Tensor:
    sequences = Segments.from_cu(cu_tokens)
    pooled: Tensor = _backend(residual.device).pool_norm(
        residual, carried, weight, bias, eps, sequences, cast(Pool, pool), update=update
    )
    return pooled


@_pool_norm.register_fake
def _(
    residual: Tensor,
    carried: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    cu_tokens: Tensor,
    pool: str,
    update: Tensor | None,
) -> Tensor:
    rows = residual.shape[0] if pool == "patch" else cu_tokens.shape[0] - 1
    return weight.new_empty((rows, residual.shape[1]))
