"""Which implementation of the operators runs: one table a backend, chosen by device.

A backend is a :class:`Backend` built from functions with the signatures of
:mod:`normwear_fast.operators`; what it does not accelerate it takes from the plain one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from normwear_fast import operators
from normwear_fast.errors import UsageError


@dataclass(frozen=True)
class Backend:
    """The five operators, and how the GEMMs around them are arranged."""

    name: str
    tokenize: Callable[..., None] = operators.tokenize
    residual_norm: Callable[..., torch.Tensor] = operators.residual_norm
    channel_attention: Callable[..., torch.Tensor] = operators.channel_attention
    bias_gelu: Callable[..., None] = operators.bias_gelu
    pool_norm: Callable[..., torch.Tensor] = operators.pool_norm


TORCH = Backend("torch")
"""Plain PyTorch, every device: the definition."""

BACKENDS: dict[str, Callable[[], Backend]] = {"torch": lambda: TORCH}
"""Name to a function that builds the backend, so that a backend loads only when it is asked for."""

_AUTO: dict[str, str] = {}
"""Device type to the backend ``auto`` takes there; plain PyTorch elsewhere."""


def select_backend(name: str, device: torch.device) -> Backend:
    """The backend of that name, or for ``auto`` the fastest one present for the device.

    Raises:
        UsageError: no backend of that name.
    """
    if name == "auto":
        name = _AUTO.get(device.type, "torch")
    if name not in BACKENDS:
        known: list[Any] = ["auto", *BACKENDS]
        raise UsageError(f"backend {name!r} does not exist; known are {', '.join(known)}")
    return BACKENDS[name]()
