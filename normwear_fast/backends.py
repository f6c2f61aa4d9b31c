"""Which implementation of the operators runs: one table a backend, chosen by device.

A backend is a :class:`Backend` built from functions with the signatures of
:mod:`normwear_fast.operators`; what it does not accelerate it takes from the plain one.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from normwear_fast import operators
from normwear_fast.errors import UsageError


@dataclass(frozen=True)
class Backend:
    """The operators, and how the GEMMs around them are arranged."""

    name: str
    tokenize: Callable[..., None] = operators.tokenize
    residual_norm: Callable[..., torch.Tensor] = operators.residual_norm
    channel_attention: Callable[..., torch.Tensor] = operators.channel_attention
    bias_gelu: Callable[..., None] = operators.bias_gelu
    pool_norm: Callable[..., torch.Tensor] = operators.pool_norm
    gather_rows: Callable[..., torch.Tensor] = operators.gather_rows
    scatter_rows: Callable[..., None] = operators.scatter_rows
    linear_gelu: Callable[..., torch.Tensor] | None = None
    """gelu(x weight^T + bias) as one kernel, where the backend has one."""
    linear_float8: Callable[..., torch.Tensor] | None = None
    """The same of float8 operands, to float8, where the device has such a kernel."""
    linear: Callable[..., torch.Tensor] | None = None
    """x weight^T + bias, or gelu of it, of bfloat16 or scaled float8 operands as one kernel, where the
    device has such a kernel."""
    encoder: Callable[..., Any] | None = None
    """Builds the layers with the backend's own products, from (folded, config, precision); None where
    the products are torch's."""
    precisions: tuple[str, ...] = ("float32", "bfloat16")
    """Of the products, where the backend brings an encoder (float64 always runs with torch's)."""
    blas: str | None = None
    """Whose products run; None for torch's library."""
    versions: Callable[[torch.device], dict[str, Any]] | None = None
    """What else decides an output's bits on a device: versions and launch choices, for its manifest."""


TORCH = Backend("torch")
"""Plain PyTorch, every device: the definition."""


def _native_backend() -> Backend:
    from normwear_fast import native

    return native.backend()


def _cuda_backend() -> Backend:
    from normwear_fast import cuda_backend

    return cuda_backend.backend()


def _triton_backend() -> Backend:
    from normwear_fast import triton_backend

    return triton_backend.backend()


BACKENDS: dict[str, Callable[[], Backend]] = {
    "torch": lambda: TORCH,
    "native": _native_backend,
    "cuda": _cuda_backend,
    "triton": _triton_backend,
}
"""Name to a function that builds the backend, so that a backend loads only when it is asked for. It
raises UsageError where the backend is not installed."""

_AUTO: dict[str, str] = {"cpu": "native", "cuda": "triton"}
"""Device type to the backend ``auto`` takes there if it is installed; plain PyTorch elsewhere."""

_DEVICES: dict[str, str] = {"native": "cpu"}
"""Backends that run on one device type only."""


@cache
def _say_once(reason: str) -> None:
    warnings.warn(f"{reason}; plain PyTorch runs instead, slower", RuntimeWarning, stacklevel=3)


def select_backend(name: str, device: torch.device) -> Backend:
    """The backend of that name, or for ``auto`` the fastest one present for the device.

    Raises:
        UsageError: no backend of that name, one that is not installed, or one for another device.
    """
    if name == "auto":
        try:
            return BACKENDS[_AUTO.get(device.type, "torch")]()
        except UsageError as error:
            _say_once(str(error))
            return TORCH
    if name not in BACKENDS:
        known: list[Any] = ["auto", *BACKENDS]
        raise UsageError(f"backend {name!r} does not exist; known are {', '.join(known)}")
    if _DEVICES.get(name, device.type) != device.type:
        raise UsageError(
            f"backend {name!r} runs on {_DEVICES[name]} only, and the model is on {device.type}"
        )
    return BACKENDS[name]()
