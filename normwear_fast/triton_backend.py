"""The backend ``triton``: every operator from `kernels/`, and the encoder of `gpu.py` around them."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import torch

from normwear_fast import linear_float8, linear_hopper
from normwear_fast.backends import Backend
from normwear_fast.config import NormWearConfig
from normwear_fast.errors import UsageError
from normwear_fast.folding import FoldedEncoder
from normwear_fast.gpu import GpuEncoder


def interpreted() -> bool:
    """Whether Triton interprets its kernels on CPU tensors (TRITON_INTERPRET=1) instead of compiling."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def backend() -> Backend:
    """The operators in Triton, with `GpuEncoder` between them.

    Raises:
        UsageError: Triton is not installed, or there is neither a GPU nor the interpreter.
    """
    if not (torch.cuda.is_available() or interpreted()):
        raise UsageError("backend 'triton' needs an NVIDIA GPU, and torch sees none")
    try:
        import triton  # noqa: F401
    except ImportError:
        raise UsageError(
            "backend 'triton' needs Triton; pip install 'normwear-fast[cuda]'"
        ) from None
    from normwear_fast.kernels import (
        bias_gelu,
        channel_attention,
        cls_rows,
        linear_gelu,
        pool_norm,
        residual_norm,
        tokenize,
    )

    table = Backend(
        "triton",
        tokenize=tokenize.tokenize,
        residual_norm=residual_norm.residual_norm,
        channel_attention=channel_attention.channel_attention,
        bias_gelu=bias_gelu.bias_gelu,
        pool_norm=pool_norm.pool_norm,
        gather_rows=cls_rows.gather_rows,
        scatter_rows=cls_rows.scatter_rows,
        linear_gelu=linear_gelu.linear_gelu,
    )

    def encoder(folded: FoldedEncoder, config: NormWearConfig, precision: str) -> GpuEncoder:
        # Other head sizes attend through the plain operator, which reads lengths on the host.
        bucketed = config.head_dim in channel_attention.HEAD_SIZES
        device = folded.carried.device
        sizes = (config.embed_dim, config.hidden_dim)
        ops = table
        if linear_float8.fits(device, *sizes):
            ops = dataclasses.replace(ops, linear_float8=linear_float8.linear_float8)
        if linear_hopper.fits(device, *sizes):
            ops = dataclasses.replace(ops, linear=linear_hopper.linear)
        return GpuEncoder(folded, config, precision, ops, bucketed=bucketed)

    return dataclasses.replace(
        table, encoder=encoder, precisions=("float32", "bfloat16", "fp8"), versions=_versions
    )


def _versions(device: torch.device) -> dict[str, Any]:
    import triton

    from normwear_fast.kernels.tuning import measured_choices

    return {
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "kernels": measured_choices(device),
        # Whose qkv and fc1 run depends on it.
        "hopper": linear_hopper.runs(device),
    }
