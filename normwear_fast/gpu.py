"""The encoder on a GPU: Triton's operators, the vendor's products, one CUDA graph a token bucket.

A micro-batch of 262,080 tokens is some 170 launches and 92 ms of work on an H100, a single window of
three channels the same 170 launches and under 1 ms of work: launched one by one, the host would be
waited for. A graph replays them all at once. Its sizes are fixed, so micro-batches go into *buckets*:
buffers and tables of fixed size, at most a quarter larger than what they hold, in which rows, sequences
and windows beyond the real ones stand for nothing. Ragged and equal micro-batches share a bucket's
graph; only tables change.

The same code runs without graphs on CPU tensors, through Triton's interpreter or the plain operators;
that is how it is tested where there is no GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from normwear_fast.backends import Backend
from normwear_fast.buckets import FixedLayout, bucket_rows, table_size
from normwear_fast.config import NormWearConfig
from normwear_fast.errors import UsageError
from normwear_fast.folding import FoldedBlock, FoldedEncoder
from normwear_fast.linear_float8 import Float8Linear, order, quantise_columns, takes
from normwear_fast.linear_hopper import FLOAT8
from normwear_fast.operators import Pool
from normwear_fast.packing import Layout

if TYPE_CHECKING:
    from normwear_fast.kernels.tuning import Table

FLOAT8_CAPABILITY = (8, 9)
"""Ada and Hopper are the first with 8-bit floating-point products."""

AnyLayout = Layout | FixedLayout


def scaled_product(
    x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, out: Tensor, bias: Tensor | None
) -> Tensor:
    """out = (x_scale x) (scale weight)^T + bias, of 8-bit operands, accumulated in float32.

    Args:
        x: (rows, K) e4m3; x_scale (rows,) float32.
        weight: (N, K) e4m3; scale (N,) float32.
        out: (rows, N) bfloat16.
        bias: (N,) bfloat16 or None.
    """
    if x.device.type == "cuda":
        return torch._scaled_mm(
            x,
            weight.T,
            scale_a=x_scale[:, None],
            scale_b=scale[None],
            bias=bias,
            out_dtype=out.dtype,
            use_fast_accum=True,
            out=out,
        )
    product = (x.float() * x_scale[:, None]) @ (weight.float() * scale[:, None]).T
    return out.copy_(product if bias is None else product + bias.float())


@dataclass(frozen=True)
class _Float8Block:
    """The three products of a block whose operands a kernel of ours makes: weights with their scales.

    ``proj`` stays in bfloat16: attention's output would need a pass of its own to be quantised, 2.3 KB a
    token (0.8 ns at 2.9 TB/s), for a product that gets 0.7 ns faster.
    """

    qkv: tuple[Tensor, Tensor]
    fc1: tuple[Tensor, Tensor]
    fc2: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, block: FoldedBlock) -> _Float8Block:
        return cls(*(quantise_columns(w) for w in (block.qkv, block.fc1, block.fc2)))


@dataclass(frozen=True)
class _FusedFloat8Block:
    """The same where `linear_float8` makes the activations: fc2 takes its columns in the order they come
    in, each with what it was multiplied by taken back."""

    qkv: tuple[Tensor, Tensor]
    fc1: Float8Linear
    fc2: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, block: FoldedBlock) -> _FusedFloat8Block:
        fc1 = Float8Linear.of(block.fc1, block.fc1_bias)
        fc2 = block.fc2.float() / fc1.factor.float()
        places = order(fc2.shape[1], fc2.device)
        return cls(quantise_columns(block.qkv), fc1, quantise_columns(fc2[:, places]))


MLP_CHOICES: Mapping[int, Sequence[Mapping[str, int]]] = {
    80: ({"FUSED": 0}, {"FUSED": 1}),
    90: ({"FUSED": 1}, {"FUSED": 0}),
    100: ({"FUSED": 0}, {"FUSED": 1}),
}
"""Ways through the MLP in bfloat16 by architecture, the default first; a GPU's measurement may choose
another.

The vendor's fc1, the activation in place, the vendor's fc2: the activation step reads and writes 12.3 KB
a token, 4.2 ns at 2.9 TB/s beside fc1's 5.9. FUSED has it in fc1's epilogue, in a product of ours:
1.05 and 1.02 ms a full micro-batch on an H100 and an H200, where fc1 takes 0.83 and the activation 0.54
and 0.38 (2026-11-26). Tiles of 4,224 and 8,448 rows, whose activations stay in the L2 cache, made an
H200 4 % slower: the vendor's products lose more on so few rows. Blackwell keeps the vendor's until one
has been measured."""

LINEAR_ROWS = 3_072
"""Fewer rows leave qkv and fc1 to the vendor on a Hopper GPU too: 1,792 take `linear` 19 and 21 us, the
vendor 14 and, with `bias_gelu`, 22; 3,584 take it 25 and 34 us, the vendor 25 and 44; fp8's qkv
14 for 11 and 18 for 19 (an H100, 2026-11-26)."""

FUSED_ROWS = 8_192
"""Fewer rows take the vendor's fc1 and the activation after it, as one window's latency does: 1,792 rows
make 336 tiles of 128 x 128, two rounds of the 264 programs that an H100 works at."""

ALIGNED = 8
"""`linear_gelu` takes widths that are multiples of it: the tensor memory accelerator's rows are whole
16 bytes."""

T = TypeVar("T")

Take = Callable[[str, int, int, torch.dtype], Tensor]
"""A workspace's ``take(name, rows, width, dtype)``."""


def mlp_table() -> Table:
    """:data:`MLP_CHOICES` as a kernel's choices."""
    from normwear_fast.kernels.tuning import Choice

    return {key: tuple(Choice(blocks) for blocks in row) for key, row in MLP_CHOICES.items()}


class GpuEncoder:
    """The layers between the tokenizer and the pooled output.

    The residual has the operands' dtype, so that ``proj`` and ``fc2`` accumulate into it in the product
    itself (beta = 1). Only fp8's ``fc2`` lands in a buffer that the next norm adds in its own pass.

    Args:
        folded: the weights, in float32 for ``fp8``.
        config: sizes.
        precision: of the products: ``float32``, ``bfloat16`` or ``fp8``.
        ops: the operators.
        bucketed: whether micro-batches go into buckets of fixed tables, captured as graphs on a GPU;
            operators that read lengths on the host, as the plain ones do, need False.

    Raises:
        UsageError: a precision that the device, or this encoder, does not have.
    """

    def __init__(
        self,
        folded: FoldedEncoder,
        config: NormWearConfig,
        precision: str,
        ops: Backend,
        *,
        bucketed: bool = True,
    ) -> None:
        self.device = folded.carried.device
        _check_precision(precision, self.device)
        self.folded, self.config, self.precision, self.ops = folded, config, precision, ops
        self.dtype = torch.float32 if precision == "float32" else torch.bfloat16
        self.residual_dtype = self.dtype
        self.float8 = precision == "fp8"
        last = len(folded.blocks) - 1
        self.blocks = [_cast(block, self.dtype) for block in folded.blocks]
        self.fusions = {i: _cast(block, self.dtype) for i, block in folded.fusions.items()}
        self.fused8 = (
            self.float8
            and ops.linear_float8 is not None
            and takes(config.embed_dim, folded.blocks[0].fc1.shape[0])
        )
        """Whether fp8's fc1 has bias and activation in its epilogue."""
        self.float8_blocks: list[_Float8Block | _FusedFloat8Block] = []
        if self.float8:
            kind: Any = _FusedFloat8Block if self.fused8 else _Float8Block
            self.float8_blocks = [kind.of(b) for b in folded.blocks]
            # Quantised blocks keep what stays in bfloat16; the last one serves `cls` pooling whole.
            empty = torch.empty(0, dtype=self.dtype, device=self.device)
            self.blocks[:last] = [
                replace(block, qkv=empty, fc1=empty, fc2=empty) for block in self.blocks[:last]
            ]
        self.fusion_constants = {
            i: block.proj_constant + block.fc2_constant for i, block in self.fusions.items()
        }
        self.fusion_norms = {
            i: (folded.carried[2 * i + 2], folded.carried[2 * i + 2] + block.proj_constant)
            for i, block in self.fusions.items()
        }
        """What a fusion block's two norms add: the carried constants, then those and its own."""
        self.carried_to_norm = folded.carried[-1] + self.fusion_constants.get(last, 0.0)
        """What a [CLS] row of its own buffer stands without at the final norm."""
        self.mlp = self._mlp_choice()
        """How the MLP is arranged: a choice's constants (:data:`MLP_CHOICES`)."""
        self.bucketed = bucketed
        self.captured = self.bucketed and self.device.type == "cuda"
        """Whether buckets are captured as graphs; their fixed tables are used all the same without."""
        self._buckets: dict[tuple[int, int], _Bucket] = {}
        self._storage: dict[str, Tensor] = {}
        self._stream: Any = None
        """Captures' own, made with the first: torch's pool of memory has parts a stream."""

    def _mlp_choice(self) -> Mapping[str, int]:
        odd = any(size % ALIGNED for size in self.blocks[0].fc1.shape)
        if self.ops.linear_gelu is None or self.precision != "bfloat16" or odd:
            return {"FUSED": 0}
        from normwear_fast.kernels.tuning import pick

        return pick("mlp", self.precision, mlp_table(), self.device).blocks

    # --- buckets ---------------------------------------------------------------------------------

    def residual(self, layout: Layout, take: Take) -> Tensor:
        """(bucket's rows, E) buffer for a micro-batch's tokens; rows past the real ones are zero."""
        total, width = layout.sequences.total, self.config.embed_dim
        rows = bucket_rows(total) if self.bucketed else total
        residual = self._take("residual", rows, width, self.dtype)
        residual[total:].zero_()
        return residual

    def _bucket(self, layout: Layout) -> _Bucket:
        sequences = layout.sequences
        rows = bucket_rows(sequences.total)
        capacity = table_size(len(sequences), rows)
        if (rows, capacity) not in self._buckets:
            self._buckets[rows, capacity] = _Bucket(FixedLayout(rows, capacity, self.device))
        return self._buckets[rows, capacity]

    def _take(self, name: str, rows: int, width: int, dtype: torch.dtype) -> Tensor:
        """The same memory for every bucket: a larger one than ever before makes the graphs anew."""
        buffer, size = self._storage.get(name), rows * width
        if buffer is None or buffer.numel() < size:
            self._drop_graphs()
            with torch.inference_mode(False):
                # Zeros: a graph's rows past the real ones are computed too, and must be finite.
                buffer = torch.zeros(size, dtype=dtype, device=self.device)
            self._storage[name] = buffer
        return buffer[:size].view(rows, width)

    def release(self, keep_bytes: int) -> None:
        """Frees buffers and graphs where they hold more than ``keep_bytes``."""
        held = sum(b.numel() * b.element_size() for b in self._storage.values())
        if held > keep_bytes:
            self._drop_graphs()
            self._buckets.clear()
            self._storage.clear()

    def _drop_graphs(self) -> None:
        """Forgets the graphs, whose addresses are about to be wrong, once none is running."""
        if any(bucket.graphs for bucket in self._buckets.values()):
            torch.cuda.current_stream(self.device).synchronize()
        for bucket in self._buckets.values():
            bucket.graphs.clear()

    def run(self, residual: Tensor, layout: Layout, pool: Pool, take: Take) -> Tensor:
        """Tokens to output.

        Args:
            residual: what `residual` gave, filled by the tokenizer.
            layout: where everything stands.
            pool: ``mean``, ``cls`` or ``patch``.
            take: the workspace's, unused: buffers belong to the buckets.

        Returns:
            New tensor, float32: (S, E), or (tokens, E) for ``patch``.
        """
        cls_only = pool == "cls"
        if self.bucketed:
            self._run_bucket(residual, layout, cls_only)
        else:
            self._layers(residual, layout, cls_only)
        folded, width = self.folded, self.config.embed_dim
        norm = (folded.norm_weight, folded.norm_bias, folded.final_eps)
        if cls_only:
            few = self._take("cls", len(layout.sequences), width, self.dtype)
            return self.ops.pool_norm(few, self.carried_to_norm, *norm, layout.ones, "patch")
        total = layout.sequences.total
        update = self._update(len(residual))
        return self.ops.pool_norm(
            residual[:total],
            folded.carried[-1],
            *norm,
            layout.sequences,
            pool,
            update=None if update is None else update[:total],
        )

    def _run_bucket(self, residual: Tensor, layout: Layout, cls_only: bool) -> None:
        bucket = self._bucket(layout)
        bucket.layout.fill(layout)
        if not self.captured:
            self._layers(residual, bucket.layout, cls_only)
            return
        if cls_only not in bucket.graphs:
            bucket.graphs[cls_only] = self._capture(residual, bucket.layout, cls_only)
        bucket.graphs[cls_only].replay()

    def _capture(self, residual: Tensor, layout: FixedLayout, cls_only: bool) -> Any:
        """Runs the layers twice to compile and choose what they need, then records them.

        cuBLAS writes to a workspace that torch keeps for each stream, and frees for all streams when
        anyone's graphs are made or, in newer versions, dropped (torch.compile's "max-autotune" makes
        some): a graph replayed after that would write to memory that is no longer its own. Cleared as a
        capture begins, the workspace comes from the graphs' pool (32 MB on an H100, one for all of an
        encoder's graphs: they never run at once) and stays with them.
        """
        kept = residual.clone()  # the runs accumulate into it, and the replay needs it as it was
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device)
        stream = self._stream
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(2):
                residual.copy_(kept)
                self._layers(residual, layout, cls_only)
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        made = [known for bucket in self._buckets.values() for known in bucket.graphs.values()]
        pool = made[0].pool() if made else None
        # Other threads allocate meanwhile: one a device under cuda:all, and whoever pins host memory.
        mode = "thread_local"
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode=mode):
            torch._C._cuda_clearCublasWorkspaces()
            self._layers(residual, layout, cls_only)
            torch._C._cuda_clearCublasWorkspaces()
        residual.copy_(kept)
        return graph

    # --- layers ----------------------------------------------------------------------------------

    def _update(self, rows: int) -> Tensor | None:
        """(rows, E) what fp8's fc2 leaves to be added; None where products accumulate by themselves."""
        if not self.float8:
            return None
        return self._take("update", rows, self.config.embed_dim, self.dtype)

    def _layers(self, residual: Tensor, layout: AnyLayout, cls_only: bool) -> None:
        """All layers in place; ``cls_only`` leaves the [CLS] rows in their own buffer instead."""
        folded, width = self.folded, self.config.embed_dim
        rows, last = len(residual), len(self.blocks) - 1
        hidden = self.blocks[-1].fc1.shape[0]
        buffers = _Buffers(
            normed=self._take("normed", rows, width, FLOAT8 if self.float8 else self.dtype),
            qkv=self._take("qkv", rows, 3 * width, self.dtype),
            attended=self._take("attended", rows, width, self.dtype),
            hidden=None if self.fused8 else self._take("hidden", rows, hidden, self.dtype),
            scale=self._take("scale", rows, 1, torch.float32)[:, 0] if self.float8 else None,
            ones=self._take("ones", rows, 1, torch.float32)[:, 0].fill_(1) if self.fused8 else None,
            hidden8=self._take("hidden8", rows, hidden, FLOAT8) if self.float8 else None,
            update=self._update(rows),
        )
        pending: Tensor | None = None
        for i, block in enumerate(self.blocks):
            norms = (folded.carried[2 * i], folded.carried[2 * i + 1])
            if i == last and cls_only:
                self._last_layer_cls(residual, pending, layout, buffers)
                return
            if self.float8:
                pending = self._block8(residual, pending, i, norms, layout.sequences, buffers)
            else:
                self._block(residual, block, norms, layout.sequences, buffers)
            if i in self.fusions:
                self._fuse_cls(residual, pending, layout, i)

    def _block(
        self,
        x: Tensor,
        block: FoldedBlock,
        norms: tuple[Tensor, Tensor],
        segments: Any,
        buffers: _Buffers,
    ) -> None:
        """One block, in place: x stands without the constants that the norms carry."""
        ops, eps, width = self.ops, self.folded.layer_eps, x.shape[1]
        normed = ops.residual_norm(x, norms[0], eps, out=buffers.normed)
        qkv = self._product(normed, block.qkv, block.qkv_bias, buffers.qkv)
        attended = self._attention(
            qkv[:, :width], qkv[:, width:], segments, segments, buffers.attended
        )
        x.addmm_(attended, block.proj.T)
        self._mlp(x, block, norms[1], buffers)

    def _many(self, x: Tensor) -> bool:
        """Whether ``ops.linear`` is the faster for so many rows; float32 is not one of its precisions."""
        return len(x) >= LINEAR_ROWS and self.precision != "float32"

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
        """out = x weight^T + bias."""
        if self.ops.linear is not None and self._many(x):
            return self.ops.linear(x, weight, bias, out=out)
        if bias is None:
            return torch.mm(x, weight.T, out=out)
        return torch.addmm(bias, x, weight.T, out=out)

    def _product8(
        self,
        x: Tensor,
        x_scale: Tensor,
        weight: tuple[Tensor, Tensor],
        bias: Tensor | None,
        out: Tensor,
    ) -> Tensor:
        """The same of 8-bit operands with their scales."""
        if self.ops.linear is not None and self._many(x):
            return self.ops.linear(x, weight[0], bias, scales=(x_scale, weight[1]), out=out)
        return scaled_product(x, x_scale, *weight, out, bias)

    def _mlp(self, x: Tensor, block: FoldedBlock, carried: Tensor, buffers: _Buffers) -> None:
        ops = self.ops
        normed = ops.residual_norm(x, carried, self.folded.layer_eps, out=buffers.normed)
        hidden = _present(buffers.hidden)
        if ops.linear is not None and self._many(x):
            ops.linear(normed, block.fc1, block.fc1_bias, gelu=True, out=hidden)
        elif ops.linear_gelu is not None and self.mlp["FUSED"] and len(x) >= FUSED_ROWS:
            ops.linear_gelu(normed, block.fc1, block.fc1_bias, out=hidden)
        else:
            torch.mm(normed, block.fc1.T, out=hidden)
            ops.bias_gelu(hidden, block.fc1_bias)
        x.addmm_(hidden, block.fc2.T)

    def _block8(
        self,
        x: Tensor,
        pending: Tensor | None,
        i: int,
        norms: tuple[Tensor, Tensor],
        segments: Any,
        buffers: _Buffers,
    ) -> Tensor:
        """`_block` with 8-bit operands; returns what fc2 leaves to be added."""
        ops, eps, width = self.ops, self.folded.layer_eps, x.shape[1]
        block, weights = self.blocks[i], self.float8_blocks[i]
        normed, scale, hidden8, update = buffers.float8()
        ops.residual_norm(x, norms[0], eps, update=pending, out=normed, scale=scale)
        qkv = self._product8(normed, scale, weights.qkv, block.qkv_bias, buffers.qkv)
        attended = self._attention(
            qkv[:, :width], qkv[:, width:], segments, segments, buffers.attended
        )
        x.addmm_(attended, block.proj.T)
        ops.residual_norm(x, norms[1], eps, out=normed, scale=scale)
        if isinstance(weights, _FusedFloat8Block):
            _present(ops.linear_float8)(normed, scale, weights.fc1, out=hidden8)
            return scaled_product(hidden8, _present(buffers.ones), *weights.fc2, update, None)
        activation = scaled_product(normed, scale, *weights.fc1, _present(buffers.hidden), None)
        ops.bias_gelu(activation, block.fc1_bias, out=hidden8, scale=scale)
        return scaled_product(hidden8, scale, *weights.fc2, update, None)

    def _attention(
        self, query: Tensor, key_value: Tensor, queries: Any, keys: Any, out: Tensor
    ) -> Tensor:
        return self.ops.channel_attention(
            query, key_value, queries, keys, self.config.num_heads, out=out
        )

    # --- [CLS] rows ------------------------------------------------------------------------------

    def _cls_buffers(self, rows: int) -> _Buffers:
        width, hidden = self.config.embed_dim, self.blocks[-1].fc1.shape[0]
        return _Buffers(
            normed=self._take("cls normed", rows, width, self.dtype),
            qkv=self._take("cls qkv", rows, 3 * width, self.dtype),
            attended=self._take("cls attended", rows, width, self.dtype),
            hidden=self._take("cls hidden", rows, hidden, self.dtype),
        )

    def _fuse_cls(
        self, residual: Tensor, pending: Tensor | None, layout: AnyLayout, i: int
    ) -> None:
        """The [CLS] rows of every window see one another.

        They are stored less the carried c. With x = true - c, the block's first norm carries c and its
        second c + b_proj; what comes out is x + b_proj + b_fc2, again less c.
        """
        index, rows = layout.cls_index, len(layout.cls_index)
        x = self._take("cls", rows, self.config.embed_dim, self.dtype)
        self.ops.gather_rows(residual, index, update=pending, out=x)
        few = self._cls_buffers(rows)
        self._block(x, self.fusions[i], self.fusion_norms[i], layout.windows, few)
        self.ops.scatter_rows(x, self.fusion_constants[i], index, residual)

    def _last_layer_cls(
        self, residual: Tensor, pending: Tensor | None, layout: AnyLayout, buffers: _Buffers
    ) -> None:
        """The last layer where only [CLS] rows are wanted: keys and values of all, the rest of those.

        7 % less work at 12 layers. The rows end in the buffer ``cls``, less `carried_to_norm`.
        """
        ops, folded, width = self.ops, self.folded, self.config.embed_dim
        eps, last = folded.layer_eps, len(self.blocks) - 1
        block, carried = self.blocks[last], folded.carried[2 * last]
        index, rows = layout.cls_index, len(layout.cls_index)
        few = self._cls_buffers(rows)
        # Norms of all rows for keys and values; those of [CLS] once more, from a copy that goes on alone.
        key_value = buffers.qkv.view(-1)[: len(residual) * 2 * width].view(-1, 2 * width)
        x = self._take("cls", rows, width, self.dtype)
        if self.float8:
            scale, (weight, columns) = _present(buffers.scale), self.float8_blocks[last].qkv
            ops.residual_norm(
                residual, carried, eps, update=pending, out=buffers.normed, scale=scale
            )
            kept = (weight[width:], columns[width:])
            self._product8(buffers.normed, scale, kept, None, key_value)
        else:
            ops.residual_norm(residual, carried, eps, out=buffers.normed)
            self._product(buffers.normed, block.qkv[width:], None, key_value)
        ops.gather_rows(residual, index, out=x)
        normed = ops.residual_norm(x, carried, eps, out=few.normed)
        query = few.qkv.view(-1)[: rows * width].view(rows, width)
        self._product(normed, block.qkv[:width], block.qkv_bias[:width], query)
        attended = self._attention(query, key_value, layout.ones, layout.sequences, few.attended)
        x.addmm_(attended, block.proj.T)
        self._mlp(x, block, folded.carried[2 * last + 1], few)
        if last in self.fusions:
            self._block(x, self.fusions[last], self.fusion_norms[last], layout.windows, few)


@dataclass(frozen=True)
class _Buffers:
    """What one block writes between the residual's two accumulations."""

    normed: Tensor
    qkv: Tensor
    attended: Tensor
    hidden: Tensor | None
    scale: Tensor | None = None
    ones: Tensor | None = None
    hidden8: Tensor | None = None
    update: Tensor | None = None

    def float8(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``normed``, ``scale``, ``hidden8`` and ``update``, which fp8's blocks have."""
        scale, hidden8, update = (_present(t) for t in (self.scale, self.hidden8, self.update))
        return self.normed, scale, hidden8, update


class _Bucket:
    """Fixed tables, and the graphs made so far: one for [CLS] rows only, one for all."""

    def __init__(self, layout: FixedLayout) -> None:
        self.layout = layout
        self.graphs: dict[bool, Any] = {}


def _check_precision(precision: str, device: torch.device) -> None:
    if precision not in ("float32", "bfloat16", "fp8"):
        raise UsageError(f"precision {precision!r} does not run on a GPU; it is the CPU's")
    if precision == "fp8" and device.type == "cuda":
        found = torch.cuda.get_device_capability(device)
        if found < FLOAT8_CAPABILITY:
            raise UsageError(
                f"precision 'fp8' needs a GPU of compute capability 8.9 or newer (Ada, Hopper); "
                f"{torch.cuda.get_device_name(device)} has {found[0]}.{found[1]}: use bfloat16"
            )


def _present(value: T | None) -> T:
    assert value is not None
    return value


def _cast(block: FoldedBlock, dtype: torch.dtype) -> FoldedBlock:
    """Matrices and the query's bias in the operands' dtype; constants stay float32."""
    names = ("qkv", "qkv_bias", "proj", "fc1", "fc2")
    return replace(block, **{name: getattr(block, name).to(dtype) for name in names})
