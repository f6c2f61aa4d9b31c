"""The packed encoder as `torch.export` sees it: five operators and GEMMs over constant folded weights.

An exported program is a snapshot: it holds the weights the model had, folded, and takes windows of one
shape (C, L) in any number B. All of a batch runs at once; nothing here cuts it to a token budget.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from normwear_fast.config import NormWearConfig
from normwear_fast.engine import tokens_in_float64
from normwear_fast.errors import UsageError
from normwear_fast.folding import FoldedBlock, FoldedEncoder, check_plain, fold
from normwear_fast.packing import scalogram_method, sequence_tokens
from normwear_fast.reference import ReferenceNormWear
from normwear_fast.wavelets import ScalogramMethod

if TYPE_CHECKING:
    from normwear_fast.model import FastNormWear


def forward(model: FastNormWear, x: Tensor) -> Tensor:
    """What `FastNormWear.forward` does under ``torch.export``: (B, C, L) -> (B, C, T, E).

    Raises:
        UsageError: ``strict=True``, or a precision that torch's own products do not have.
    """
    if torch.compiler.is_dynamo_compiling():
        raise UsageError("torch.export with strict=True cannot fold the weights; use strict=False")
    precision = model.resolved_precision
    if precision not in _OPERANDS:
        raise UsageError(
            f"precision {precision!r} cannot be exported; it must be {', '.join(_OPERANDS)}"
        )
    method = scalogram_method(model.optimized_cwt)
    tokens = sequence_tokens(x.shape[-1], method, model.config)
    # Real tensors, outside the trace: what is made of them enters the program as constants. The second
    # keeps folding's no_grad out of it, too.
    with _disable_current_modes(), torch._C.DisableTorchFunction():
        folded = _folded(model, _OPERANDS[precision])
        columns = model.config.grid_columns
        template = folded.template((tokens - 1) // columns, columns)
    return _Trace(folded, template, model.config, method).encode(x)


_OPERANDS = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
}


def _folded(model: FastNormWear, dtype: torch.dtype) -> FoldedEncoder:
    """The model's weights, folded; its parameters are fake tensors while it is traced."""
    if model._frozen is not None:
        return model._frozen[0]
    check_plain(model)
    twin = ReferenceNormWear(model.config, decoder=False, seed=None)
    real = _real_parameters(model)
    # Clones: what folding leaves as it is would follow the model's later changes.
    weights = {name: real[name].clone() for name in twin.state_dict()}
    twin.load_state_dict(weights, assign=True)
    return fold(twin, dtype)


def _real_parameters(model: FastNormWear) -> dict[str, Tensor]:
    """Name to the parameter that stood there before ``torch.export`` put a fake one in its place."""
    # The converter's memory is the only link back: real tensor to number, number to fake tensor.
    mode = cast(FakeTensor, model.cls_token).fake_mode
    converter = mode.fake_tensor_converter.meta_converter
    real = {
        id(converter.tensor_memo[number]): tensor
        for tensor, number in converter.describer.lookup_tensor.items()
        if number in converter.tensor_memo
    }
    return {name: real[id(fake)].detach() for name, fake in model.named_parameters()}


def shapes_only(x: Tensor) -> bool:
    """Whether x is on the meta device or a fake tensor, as all are in a FakeTensorMode: no values."""
    mode = torch._C._TorchDispatchModeKey.FAKE
    return x.is_meta or isinstance(x, FakeTensor) or torch._C._get_dispatch_mode(mode) is not None


class _Trace:
    """One encoding of equal windows, written without sizes that depend on B.

    Args:
        folded: weights.
        template: (T, E) of the windows' length.
        config: sizes.
        method: the scalogram.
    """

    def __init__(
        self,
        folded: FoldedEncoder,
        template: Tensor,
        config: NormWearConfig,
        method: ScalogramMethod,
    ) -> None:
        self.folded, self.template, self.config, self.method = folded, template, config, method
        self.ops = torch.ops.normwear
        self.dtype = folded.blocks[0].qkv.dtype

    def encode(self, x: Tensor) -> Tensor:
        folded, config, ops = self.folded, self.config, self.ops
        batch, channels, samples = x.shape
        tokens, width = self.template.shape
        sequences = batch * channels
        cu_tokens = _equal_bounds(sequences, tokens, x.device)
        cu_windows = _equal_bounds(batch, channels, x.device)
        residual = x.new_empty((sequences * tokens, width), dtype=folded.carried.dtype)
        ops.tokenize(
            residual,
            # Half precision has no bits to spare for the second difference.
            x.reshape(-1).to(torch.float64 if self.dtype == torch.float64 else torch.float32),
            _equal_bounds(sequences, samples, x.device),
            cu_tokens,
            folded.patch_weight,
            self.template,
            [tokens],
            list(config.patch_size),
            config.num_scales,
            self.method,
            config.wavelet,
            tokens_in_float64(self.method, str(self.dtype).removeprefix("torch.")),
        )
        update: Tensor | None = None
        for i, block in enumerate(folded.blocks):
            normed = self._norm(residual, folded.carried[2 * i], update)
            attended = self._attention(normed, block, cu_tokens)
            update = self._accumulate(residual, attended, block.proj)
            normed = self._norm(residual, folded.carried[2 * i + 1], update)
            update = self._accumulate(residual, self._activation(normed, block), block.fc2)
            if i in folded.fusions:
                # [CLS] rows hold their true value less what is carried by now.
                carried = folded.carried[2 * i + 2]
                cls = residual.view(-1, tokens, width)[:, 0]
                true = cls + carried
                if update is not None:
                    pending = update.view(-1, tokens, width)[:, 0]
                    true = true + pending
                    pending.zero_()
                cls.copy_(self._fusion(true, folded.fusions[i], cu_windows) - carried)
        out: Tensor = ops.pool_norm(
            residual,
            folded.carried[-1],
            folded.norm_weight,
            folded.norm_bias,
            folded.final_eps,
            cu_tokens,
            "patch",
            update,
        )
        return out.view(batch, channels, tokens, width)

    def _norm(self, residual: Tensor, carried: Tensor | None, update: Tensor | None) -> Tensor:
        normed = self.ops.residual_norm(
            residual, carried, self.folded.layer_eps, update, self.dtype
        )
        return cast(Tensor, normed)

    def _attention(self, normed: Tensor, block: FoldedBlock, cu: Tensor) -> Tensor:
        width = self.config.embed_dim
        qkv = torch.addmm(block.qkv_bias, normed, block.qkv.T)
        attended = self.ops.channel_attention(
            qkv[:, :width], qkv[:, width:], cu, cu, self.config.num_heads
        )
        return cast(Tensor, attended)

    def _activation(self, normed: Tensor, block: FoldedBlock) -> Tensor:
        activation = normed @ block.fc1.T
        self.ops.bias_gelu(activation, block.fc1_bias)
        return activation

    def _accumulate(self, residual: Tensor, x: Tensor, weight: Tensor) -> Tensor | None:
        """residual += x weight^T, at once or, where dtypes differ, left to the next norm."""
        if self.dtype == residual.dtype:
            residual.addmm_(x, weight.T)
            return None
        return x @ weight.T

    def _fusion(self, x: Tensor, block: FoldedBlock, cu_windows: Tensor) -> Tensor:
        """A whole block over the true [CLS] rows (S, E) of every window."""
        attended = self._attention(self._norm(x, None, None), block, cu_windows)
        x = x + block.proj_constant + attended @ block.proj.T
        activation = self._activation(self._norm(x, None, None), block)
        return x + block.fc2_constant + activation @ block.fc2.T


def _equal_bounds(count: Any, length: int, device: torch.device) -> Tensor:
    """(count + 1,) int32 bounds of ``count`` (an int or a symbol) segments of one length."""
    return torch.arange(count + 1, dtype=torch.int32, device=device) * length
