"""Recordings to embeddings: windows, work units, the local engine and its output.

    recordings -> survey -> windows -> units -> prepare (here or in reader processes) -> model -> parts

`encode_recordings` is the whole way; `load_embeddings` reads what it wrote. A work unit is the atom of
all of it: what is encoded together, committed together, and done again after a kill.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from normwear_fast.encode.load import load_embeddings
    from normwear_fast.encode.pipeline import Summary, encode_recordings
    from normwear_fast.encode.settings import EncodeSettings
    from normwear_fast.encode.windows import WindowList, read_window_list

_WHERE = {
    "EncodeSettings": "settings",
    "Summary": "pipeline",
    "WindowList": "windows",
    "encode_recordings": "pipeline",
    "load_embeddings": "load",
    "read_window_list": "windows",
}

__all__ = [
    "EncodeSettings",
    "Summary",
    "WindowList",
    "encode_recordings",
    "load_embeddings",
    "read_window_list",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
