"""Exact rewrites of the weights, done once, so that the layer loop has less to do.

1. A LayerNorm's weight g and bias beta go into the next Linear: W' = W diag(g), b' = b + W beta.
2. The key bias cancels in the softmax. The value bias passes through it (attention weights sum to
   one) and joins the projection's: c = W_proj b_v' + b_proj.
3. The constants of ``proj`` and ``fc2`` are never added to the residual. Their running sum is
   *carried*: each norm adds one vector as it loads, so both products are pure accumulations.
   Fusion blocks read and write true values and add their own.
4. head_size^-0.5 and log2(e), for a softmax of powers of two, go into the query rows.
5. [CLS] token + position row, patch bias + position rows: one template a window length.

Each changes rounding only; tests/test_folding.py holds the folded model to the plain one in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from normwear_fast.config import NormWearConfig
from normwear_fast.errors import UsageError
from normwear_fast.positions import resize_positions
from normwear_fast.reference import (
    FINAL_EPS,
    LAYER_EPS,
    MLP,
    Attention,
    Block,
    EncoderLayer,
    PatchEmbed,
    ReferenceNormWear,
)

LOG2_E = 1.0 / math.log(2.0)


_PLAIN = {
    *(nn.ModuleList, PatchEmbed, EncoderLayer, Block, Attention, MLP),
    *(nn.Linear, nn.LayerNorm, nn.Conv2d),
}
"""What the encoder's modules are, themselves and no subclass, where folding may read their weights."""


@dataclass(frozen=True)
class FoldedBlock:
    """One Transformer block after folds 1, 2 and 4; weights as (out, in), like ``nn.Linear``'s."""

    qkv: Tensor  # (3 E, E); query rows hold head_size^-0.5 log2(e)
    qkv_bias: Tensor  # (3 E,): the query's; zero for key and value
    proj: Tensor  # (E, E)
    proj_constant: Tensor  # (E,)
    fc1: Tensor  # (hidden, E)
    fc1_bias: Tensor  # (hidden,)
    fc2: Tensor  # (E, hidden)
    fc2_constant: Tensor  # (E,)


@dataclass(frozen=True)
class FoldedEncoder:
    """The encoder after all folds, in one dtype on one device.

    ``carried[2 i]`` is what norm1 of layer i adds, ``carried[2 i + 1]`` norm2, the last one ``norm``.
    Matrices have the operand dtype; constants, the template's parts and ``norm`` stay in float32 (or
    float64 beside float64 operands).
    """

    patch_weight: Tensor  # (E, 3 * 9 * 5)
    patch_bias: Tensor  # (E,)
    cls_token: Tensor  # (E,)
    positions: Tensor  # (1, 1 + 43 * 13, E)
    blocks: tuple[FoldedBlock, ...]
    fusions: dict[int, FoldedBlock]
    carried: Tensor  # (2 depth + 1, E)
    norm_weight: Tensor
    norm_bias: Tensor
    layer_eps: float = LAYER_EPS
    final_eps: float = FINAL_EPS

    def template(self, rows: int, columns: int) -> Tensor:
        """(1 + rows * columns, E): what the tokenizer adds to [CLS] and to each patch (fold 5)."""
        table = resize_positions(self.positions, rows, columns)[0].clone()
        table[0] += self.cls_token
        table[1:] += self.patch_bias
        return table

    def map(self, function: Callable[[Tensor], Tensor]) -> FoldedEncoder:
        """The same with a function applied to every tensor, as ``nn.Module._apply`` does."""
        return cast(FoldedEncoder, _mapped(self, function))


def _mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, FoldedBlock | FoldedEncoder):
        parts = {f.name: _mapped(getattr(value, f.name), function) for f in fields(value)}
        return type(value)(**parts)
    if isinstance(value, tuple):
        return tuple(_mapped(item, function) for item in value)
    if isinstance(value, dict):
        return {key: _mapped(item, function) for key, item in value.items()}
    return value


def _fold_block(block: Block, dtype: torch.dtype, constant_dtype: torch.dtype) -> FoldedBlock:
    def double(value: Tensor) -> Tensor:
        # Rows end to end, as kernels take them: a parameter assigned as a transpose is not.
        return value.detach().double().contiguous()

    attention, mlp = block.attn, block.mlp
    width, heads = attention.proj.in_features, attention.num_heads
    qkv = double(attention.qkv.weight)
    qkv_bias = double(attention.qkv.bias) + qkv @ double(block.norm1.bias)
    qkv = qkv * double(block.norm1.weight)
    query_scale = (width // heads) ** -0.5 * LOG2_E
    qkv[:width] *= query_scale
    query_bias, value_bias = qkv_bias[:width] * query_scale, qkv_bias[2 * width :]
    proj = double(attention.proj.weight)
    fc1 = double(mlp.fc1.weight)
    return FoldedBlock(
        qkv=qkv.to(dtype),
        qkv_bias=torch.cat((query_bias, query_bias.new_zeros(2 * width))).to(dtype),
        proj=proj.to(dtype),
        proj_constant=(proj @ value_bias + double(attention.proj.bias)).to(constant_dtype),
        fc1=(fc1 * double(block.norm2.weight)).to(dtype),
        fc1_bias=(double(mlp.fc1.bias) + fc1 @ double(block.norm2.bias)).to(constant_dtype),
        fc2=double(mlp.fc2.weight).to(dtype),
        fc2_constant=double(mlp.fc2.bias).to(constant_dtype),
    )


class NotPlainError(UsageError):
    """A layer computes something that folded weights would not."""


def check_plain(model: ReferenceNormWear) -> None:
    """Folding reads weights: a layer that computes anything else (an adapter, a hook) must not.

    Raises:
        NotPlainError: the first such layer.
    """
    hooks = torch.nn.modules.module
    if hooks._global_forward_hooks or hooks._global_forward_pre_hooks:
        raise NotPlainError("torch has global forward hooks, which fast inference would not run")
    for root in ("patch_embed", "encoder_blocks", "norm"):
        for name, module in cast(nn.Module, getattr(model, root)).named_modules(prefix=root):
            # A parametrization's own modules compute the weight that is read here.
            if "parametrizations" not in name.split("."):
                wrong = _what_is_not_plain(name, module, model.config)
                if wrong is not None:
                    raise NotPlainError(f"{name} {wrong}")
    for i, layer in enumerate(cast(Iterable[nn.Module], model.encoder_blocks)):
        if model.config.has_fusion(i) and not hasattr(layer, "cls_fusion"):
            raise NotPlainError(f"encoder_blocks.{i} has no cls_fusion")


def _what_is_not_plain(name: str, module: nn.Module, config: NormWearConfig) -> str | None:
    kind = type(module)
    if parametrize.is_parametrized(module):
        kind = kind.__bases__[0]
    if module._forward_hooks or module._forward_pre_hooks:
        return "has forward hooks, which fast inference would not run"
    if kind not in _PLAIN or "forward" in module.__dict__:
        return f"is a {kind.__name__}, not a plain layer; merge adapters into the weights before encoding"
    if isinstance(module, nn.Linear | nn.LayerNorm | nn.Conv2d) and (
        module.weight is None or module.bias is None
    ):
        return "has no weight or no bias"
    if isinstance(module, nn.LayerNorm):
        eps = FINAL_EPS if name == "norm" else LAYER_EPS
        return None if module.eps == eps else f"has eps {module.eps:g}, not {eps:g}"
    if isinstance(module, Attention) and module.num_heads != config.num_heads:
        return f"has {module.num_heads} heads, the model's config {config.num_heads}"
    return None


@torch.no_grad()
def fold(model: ReferenceNormWear, dtype: torch.dtype) -> FoldedEncoder:
    """Folds the model's current weights, on their device.

    Args:
        model: owner of the released-name parameters; left untouched.
        dtype: of the matrices (the GEMM operands).
    """
    constant_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    blocks, fusions = [], {}
    for i, layer in enumerate(cast(Iterable[EncoderLayer], model.encoder_blocks)):
        blocks.append(_fold_block(layer.variate_encoder, dtype, constant_dtype))
        if model.config.has_fusion(i):
            fusions[i] = _fold_block(layer.cls_fusion, dtype, constant_dtype)
    constants = [c.double() for b in blocks for c in (b.proj_constant, b.fc2_constant)]
    steps = torch.stack([torch.zeros_like(constants[0]), *constants])
    convolution = model.patch_embed.proj
    # Patches are always projected from float32: 0.1 % of the work, and the second difference would
    # drown in the rounding of a bfloat16 scalogram.
    return FoldedEncoder(
        patch_weight=convolution.weight.detach().flatten(1).to(constant_dtype).contiguous(),
        patch_bias=cast(Tensor, convolution.bias).detach().to(constant_dtype),
        cls_token=model.cls_token.detach().flatten().to(constant_dtype),
        positions=model.pos_embed.detach().to(constant_dtype),
        blocks=tuple(blocks),
        fusions=fusions,
        carried=steps.cumsum(0).to(constant_dtype),
        norm_weight=model.norm.weight.detach().to(constant_dtype),
        norm_bias=model.norm.bias.detach().to(constant_dtype),
        final_eps=model.norm.eps,
    )


def without_matrices(folded: FoldedEncoder) -> FoldedEncoder:
    """The same without the blocks, for a backend that keeps its own copy of them."""
    return replace(folded, blocks=(), fusions={})
