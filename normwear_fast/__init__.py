"""Wearable recordings to NormWear embeddings, fast.

Public names load on first use, so that importing the package costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

# Not on first use: importing the module of the same name would put it in the function's place. It
# loads NumPy alone, 15 ms on top of that.
from normwear_fast.preprocess import preprocess

__version__ = "0.1.0"

_WHERE = {
    "FastNormWear": "model",
    "NormWearConfig": "config",
    "NormWearError": "errors",
    "scalogram": "scalograms",
    "load_embeddings": "encode",
}

__all__ = ["__version__", "preprocess", *_WHERE]

if TYPE_CHECKING:
    from normwear_fast.config import NormWearConfig as NormWearConfig
    from normwear_fast.encode import load_embeddings as load_embeddings
    from normwear_fast.errors import NormWearError as NormWearError
    from normwear_fast.model import FastNormWear as FastNormWear
    from normwear_fast.scalograms import scalogram as scalogram


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
