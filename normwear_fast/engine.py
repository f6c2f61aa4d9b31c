"""The packed encoder: folded weights, five operators, and the GEMMs between them.

The residual stream is one (tokens, E) buffer that ``proj`` and ``fc2`` accumulate into. Where operands
and residual have different dtypes (bfloat16 over float32) a product lands in an update buffer, which
the next norm adds in the same pass it standardises.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from normwear_fast import operators
from normwear_fast.backends import Backend
from normwear_fast.config import NormWearConfig
from normwear_fast.errors import UsageError
from normwear_fast.folding import FoldedBlock, FoldedEncoder, without_matrices
from normwear_fast.operators import Pool, Tokenizer
from normwear_fast.packing import Layout
from normwear_fast.wavelets import ScalogramMethod

PRECISIONS = ("auto", "float32", "bfloat16", "fp8", "int8")

BATCH_TOKENS = {"cpu": 3_360, "cuda": 131_072}
"""Tokens of a micro-batch: six 6 s channels on a CPU, where GEMMs reach their rate already; 234 on a
GPU, 2.0 GB of activations in bfloat16."""

LARGE_MEMORY, LARGE_BATCH_TOKENS = 24 * 10**9, 262_144
"""GPUs with so many bytes take twice as many tokens, 4.0 GB in bfloat16 and 8.0 in float32: with half of
that every launch's last round of tiles, and what windows of several channels leave of a budget, cost an
H100 1 % and an H200 2 to 3 (2026-11-26)."""


def default_batch_tokens(device_type: str) -> int:
    """Tokens of a micro-batch where none are given: of all GPUs here what the smallest takes.

    The same whichever of them a model is on, so that work units and their bits are.
    """
    tokens = BATCH_TOKENS.get(device_type, BATCH_TOKENS["cpu"])
    if device_type == "cuda" and _smallest_gpu() >= LARGE_MEMORY:
        return LARGE_BATCH_TOKENS
    return tokens


@lru_cache(maxsize=1)
def _smallest_gpu() -> int:
    """Bytes of memory; 0 where torch sees no GPU."""
    gpus = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    return min((torch.cuda.get_device_properties(i).total_memory for i in gpus), default=0)


UNIT_BATCHES = 8
"""Full micro-batches of a work unit: a last, partly filled one then costs at most an eighth."""

MLP_ROWS = 1_120
"""Rows of an MLP tile on a CPU: its 3072-wide activation is 14 MB and is reused by every tile."""


@lru_cache(maxsize=1)
def cpu_has_bfloat16() -> bool:
    """Whether bfloat16 is the faster precision on this processor.

    The native engine knows from a measurement of its products; without it, torch's are taken to be
    where there is AMX or AVX512-BF16.
    """
    from normwear_fast import native

    if native.instruction_sets():
        return bool(native.kernels().native_bfloat16)
    capabilities = torch.backends.cpu.get_cpu_capability()
    if "AVX512" not in capabilities and "AMX" not in capabilities:
        return False
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)


def resolve_precision(precision: str, device: torch.device) -> str:
    """``auto`` as what it means on the device; any other known precision as it is.

    bfloat16 on a GPU of capability >= 8.0 and on a CPU where it is faster, else float32.
    """
    if precision not in PRECISIONS:
        raise UsageError(
            f"precision {precision!r} does not exist; known are {', '.join(PRECISIONS)}"
        )
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.get_device_capability(device) >= (8, 0) else "float32"
    return "bfloat16" if device.type == "cpu" and cpu_has_bfloat16() else "float32"


def check_precision(precision: str, backend: Backend, device: torch.device) -> None:
    """A UsageError unless the backend has products of a precision that is not ``auto``."""
    if precision not in (*backend.precisions, "float64"):
        homes = {"int8": "backend 'native' on a CPU", "fp8": "backend 'triton' on a GPU"}
        raise UsageError(
            f"precision {precision!r} needs {homes[precision]}; this is backend {backend.name!r} "
            f"on {device.type}"
        )


def tokens_in_float64(method: ScalogramMethod, precision: str) -> bool:
    """Whether the parity mode is held to a scalogram that the published code has in float64.

    In float32 a token of raw counts is up to 2e-2 off. Other precisions lose as much elsewhere.
    """
    return method == "scipy" and precision == "float32"


_EXACT_LOCK = threading.Lock()
_EXACT: dict[str, tuple[int, Any]] = {}
"""Flag to how many runs hold it, one thread a device, and what the process had set before the first."""


def _setting(flags: Any, name: str) -> Any:
    """A flag as it must be set to be the same again: a pair where torch has split-K beside it."""
    value, split_k = getattr(flags, name), getattr(flags, f"{name}_split_k", None)
    return value if split_k is None else (value, split_k)


@contextmanager
def exact_products(precision: str, kind: str = "cuda") -> Iterator[None]:
    """float32 without TF32 or, on a CPU, bfloat16; bfloat16 without 16-bit partial sums; whatever the
    process has set.

    The flags are the process's: of runs that overlap the last to end puts them back.
    """
    flags = _cuda_flags(precision) if kind == "cuda" else _cpu_flags(precision)
    with _EXACT_LOCK:
        for place, (owner, name, value) in flags.items():
            held, before = _EXACT.get(place) or (0, _setting(owner, name))
            setattr(owner, name, value)
            _EXACT[place] = held + 1, before
    try:
        yield
    finally:
        with _EXACT_LOCK:
            for place, (owner, name, _) in flags.items():
                held, before = _EXACT.pop(place)
                if held > 1:
                    _EXACT[place] = held - 1, before
                else:
                    setattr(owner, name, before)


_Flags = dict[str, tuple[Any, str, Any]]
"""Owner of the flag, its name there, and its value, by a name of its own."""


def _cuda_flags(precision: str) -> _Flags:
    owner: Any = torch.backends.cuda.matmul
    name = "allow_bf16_reduced_precision_reduction"
    flags: _Flags = {name: (owner, name, False)}
    if precision == "float32":
        try:
            _ = owner.allow_tf32
            flags["tf32"] = owner, "allow_tf32", False
        except RuntimeError:  # the process uses the newer name, and torch refuses to mix the two
            flags["tf32"] = owner, "fp32_precision", "ieee"
    return flags


def _cpu_flags(precision: str) -> _Flags:
    if precision != "float32":
        return {}
    library: Any = torch.backends.mkldnn
    owners = {"mkldnn matmul": library.matmul, "mkldnn conv": library.conv}
    return {place: (owner, "fp32_precision", "ieee") for place, owner in owners.items()}


class Workspace:
    """Activation buffers, allocated once for the largest micro-batch seen and reused."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, rows: int, width: int, dtype: torch.dtype) -> Tensor:
        """(rows, width) contiguous, uninitialised; the same memory for the same name."""
        buffer = self._buffers.get(name)
        size = rows * width
        if buffer is None or buffer.numel() < size or buffer.dtype != dtype:
            # Written in place inside and outside inference mode: must not be an inference tensor.
            with torch.inference_mode(False):
                buffer = torch.empty(size, dtype=dtype, device=self.device)
            self._buffers[name] = buffer
        return buffer[:size].view(rows, width)

    def release(self, keep_bytes: int) -> None:
        """Frees everything if more than ``keep_bytes`` are held: one huge window leaves no trace."""
        if sum(b.numel() * b.element_size() for b in self._buffers.values()) > keep_bytes:
            self._buffers.clear()


class Engine:
    """Runs micro-batches through the folded encoder.

    Args:
        folded: weights, matrices in the operand dtype.
        config: sizes.
        method: the scalogram.
        backend: the operators.
        precision: of the products; by default what the folded matrices are in.

    Raises:
        UsageError: ``int8`` or ``fp8`` where the backend has no such products.
    """

    def __init__(
        self,
        folded: FoldedEncoder,
        config: NormWearConfig,
        method: ScalogramMethod,
        backend: Backend,
        precision: str | None = None,
    ) -> None:
        self.dtype = folded.blocks[0].qkv.dtype
        self.precision = precision = precision or str(self.dtype).removeprefix("torch.")
        self.encoder = None
        check_precision(precision, backend, folded.carried.device)
        if backend.encoder is not None and self.dtype != torch.float64:
            self.encoder = backend.encoder(folded, config, precision)
            folded = without_matrices(folded)
            self.encoder.folded = folded
            self.residual_dtype = self.encoder.residual_dtype
        else:
            self.residual_dtype = folded.carried.dtype
        self.folded = folded
        self.config = config
        self.method = method
        self.backend = backend
        self.device = folded.carried.device
        # cuDNN's float32 convolutions, the plain tokenizer's, are TF32 unless the process forbids it.
        convolves = self.device.type == "cuda" and backend.tokenize is operators.tokenize
        self._tokens_in_float64 = tokens_in_float64(method, precision) or (
            convolves and precision == "float32"
        )
        self.workspace = Workspace(self.device)
        self._stream: Any = None
        """That the last micro-batch ran on."""
        self._templates: dict[int, Tensor] = {}
        self._tokenizers: dict[tuple[int, ...], Tokenizer] = {}
        self._prepared: dict[Any, Any] = {}
        """What the backend made of the tokenizers' tables: one for all, they differ by templates only."""

    def release(self, keep_bytes: int) -> None:
        """Frees the activation buffers where they hold more than ``keep_bytes``."""
        self.workspace.release(keep_bytes)
        if self.encoder is not None:
            self.encoder.release(keep_bytes)

    @property
    def accumulates(self) -> bool:
        """Whether products accumulate into the residual, with no update buffer between."""
        return self.dtype == self.residual_dtype

    def tokenizer(self, token_counts: tuple[int, ...]) -> Tokenizer:
        """Tables for sequences of these distinct token counts (ascending)."""
        if token_counts not in self._tokenizers:
            columns = self.config.grid_columns
            for tokens in token_counts:
                if tokens not in self._templates:
                    rows = (tokens - 1) // columns
                    self._templates[tokens] = self.folded.template(rows, columns)
            if len(self._tokenizers) >= 64:  # a cohort of ever new lengths must not pile them up
                self._tokenizers.clear()
                self._templates = {tokens: self._templates[tokens] for tokens in token_counts}
            self._tokenizers[token_counts] = Tokenizer(
                patch_weight=self.folded.patch_weight,
                templates=torch.cat([self._templates[tokens] for tokens in token_counts]),
                token_counts=token_counts,
                patch_size=self.config.patch_size,
                num_scales=self.config.num_scales,
                method=self.method,
                wavelet=self.config.wavelet,
                float64=self._tokens_in_float64,
                prepared=self._prepared,
            )
        return self._tokenizers[token_counts]

    def run(self, series: Tensor, layout: Layout, pool: Pool) -> Tensor:
        """Encodes one micro-batch, on the engine's device whichever is current.

        Args:
            series: (total samples,) float32 on the device, packed as ``layout`` says.
            layout: where everything stands.
            pool: ``mean`` or ``cls`` for (S, E), ``patch`` for (tokens, E).

        Returns:
            New tensor in float32 (float64 beside float64 weights).
        """
        kind = self.device.type
        if torch.is_autocast_enabled(kind):
            # The engine's precision is its own: autocast would hand products operands of two dtypes.
            with torch.autocast(kind, enabled=False):
                return self.run(series, layout, pool)
        if kind != "cuda":
            if self.encoder is not None:  # no product of torch's
                return self._run(series, layout, pool)
            with exact_products(self.precision, kind):
                return self._run(series, layout, pool)
        # Kernels are launched on the current device's stream.
        with torch.cuda.device(self.device), exact_products(self.precision):
            stream = torch.cuda.current_stream(self.device)
            if self._stream not in (None, stream):
                stream.wait_stream(self._stream)  # the buffers are the last micro-batch's still
            self._stream = stream
            return self._run(series, layout, pool)

    @torch.no_grad()
    def _run(self, series: Tensor, layout: Layout, pool: Pool) -> Tensor:
        ops, folded, width = self.backend, self.folded, self.config.embed_dim
        sequences, rows = layout.sequences, layout.sequences.total
        take, eps = self.workspace.take, folded.layer_eps
        if self.encoder is not None:
            residual = self.encoder.residual(layout, take)
        else:
            residual = take("residual", rows, width, self.residual_dtype)
        counts = tuple(sorted(set(sequences.lengths)))
        ops.tokenize(residual, series, layout.samples, sequences, self.tokenizer(counts))
        if self.encoder is not None:
            out: Tensor = self.encoder.run(residual, layout, pool, take)
            return out
        normed = take("normed", rows, width, self.dtype)
        attended = take("attended", rows, width, self.dtype)
        qkv = take("qkv", rows, 3 * width, self.dtype)
        update = None if self.accumulates else take("update", rows, width, self.dtype)
        pending: Tensor | None = None
        last = len(folded.blocks) - 1
        for i, block in enumerate(folded.blocks):
            ops.residual_norm(residual, folded.carried[2 * i], eps, update=pending, out=normed)
            if i == last and pool == "cls":
                return self._last_layer_cls(residual, normed, layout)
            torch.addmm(block.qkv_bias, normed, block.qkv.T, out=qkv)
            x = ops.channel_attention(
                qkv[:, :width],
                qkv[:, width:],
                sequences,
                sequences,
                self.config.num_heads,
                out=attended,
            )
            pending = self._accumulate(residual, x, block.proj, update)
            carried = folded.carried[2 * i + 1]
            ops.residual_norm(residual, carried, eps, update=pending, out=normed)
            pending = self._mlp(residual, normed, block, update)
            if i in folded.fusions:
                self._fuse_cls(residual, pending, layout, i)
        return ops.pool_norm(
            residual,
            folded.carried[-1],
            folded.norm_weight,
            folded.norm_bias,
            folded.final_eps,
            sequences,
            pool,
            update=pending,
        )

    @staticmethod
    def _accumulate(
        residual: Tensor, x: Tensor, weight: Tensor, update: Tensor | None
    ) -> Tensor | None:
        """residual += x weight^T, at once or left pending in ``update``."""
        if update is None:
            residual.addmm_(x, weight.T)
            return None
        return torch.mm(x, weight.T, out=update)

    def _mlp(
        self, residual: Tensor, normed: Tensor, block: FoldedBlock, update: Tensor | None
    ) -> Tensor | None:
        rows, hidden = len(normed), block.fc1.shape[0]
        tile = MLP_ROWS if self.device.type == "cpu" else rows
        buffer = self.workspace.take("hidden", min(tile, rows), hidden, self.dtype)
        for first in range(0, rows, tile):
            part = slice(first, min(first + tile, rows))
            activation = buffer[: part.stop - part.start]
            torch.mm(normed[part], block.fc1.T, out=activation)
            self.backend.bias_gelu(activation, block.fc1_bias)
            pending = None if update is None else update[part]
            self._accumulate(residual[part], activation, block.fc2, pending)
        return update

    def _block_with_constants(self, x: Tensor, block: FoldedBlock, layout: Layout) -> Tensor:
        """A whole block over true values (S, E), grouped by window: the fusion of [CLS] rows."""
        ops, width = self.backend, self.config.embed_dim
        normed = ops.residual_norm(x, None, self.folded.layer_eps, dtype=self.dtype)
        qkv = torch.addmm(block.qkv_bias, normed, block.qkv.T)
        groups = layout.windows
        heads = self.config.num_heads
        attended = ops.channel_attention(qkv[:, :width], qkv[:, width:], groups, groups, heads)
        x = x + block.proj_constant
        return self._mlp_with_constant(self._add_product(x, attended, block.proj), block)

    def _mlp_with_constant(self, x: Tensor, block: FoldedBlock) -> Tensor:
        ops = self.backend
        normed = ops.residual_norm(x, None, self.folded.layer_eps, dtype=self.dtype)
        activation = normed @ block.fc1.T
        ops.bias_gelu(activation, block.fc1_bias)
        return self._add_product(x + block.fc2_constant, activation, block.fc2)

    def _add_product(self, x: Tensor, operand: Tensor, weight: Tensor) -> Tensor:
        if self.accumulates:
            return x.addmm_(operand, weight.T)
        return x.add_(operand @ weight.T)

    def _fuse_cls(self, residual: Tensor, pending: Tensor | None, layout: Layout, i: int) -> None:
        """The [CLS] rows of every window see one another; stored less what is carried by now."""
        cls, carried = layout.cls_rows, self.folded.carried[2 * i + 2]
        x = residual[cls] + carried
        if pending is not None:
            x += pending[cls]
            pending[cls] = 0
        fused = self._block_with_constants(x, self.folded.fusions[i], layout)
        residual[cls] = fused - carried

    def _last_layer_cls(self, residual: Tensor, normed: Tensor, layout: Layout) -> Tensor:
        """The last layer where only [CLS] rows are wanted: keys and values of all, the rest of those.

        7 % less work at 12 layers (fold 6 of the design): a third of qkv, all of proj and the MLP.
        """
        ops, folded, width = self.backend, self.folded, self.config.embed_dim
        last = len(folded.blocks) - 1
        block, cls = folded.blocks[last], layout.cls_rows
        key_value = self.workspace.take("qkv", len(normed), 2 * width, self.dtype)
        torch.mm(normed, block.qkv[width:].T, out=key_value)
        query = torch.addmm(block.qkv_bias[:width], normed[cls], block.qkv[:width].T)
        attended = ops.channel_attention(
            query, key_value, layout.ones, layout.sequences, self.config.num_heads
        )
        x = residual[cls] + (folded.carried[2 * last] + block.proj_constant)
        x = self._mlp_with_constant(self._add_product(x, attended, block.proj), block)
        if last in folded.fusions:
            x = self._block_with_constants(x, folded.fusions[last], layout)
        return ops.pool_norm(
            x, None, folded.norm_weight, folded.norm_bias, folded.final_eps, layout.ones, "patch"
        )
