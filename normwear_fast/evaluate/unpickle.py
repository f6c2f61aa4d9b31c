"""Reading pickles that hold NumPy arrays and plain values, and nothing else.

The published samples and WESAD are pickles. A pickle is a program: here every global it may name is
in one table, and each entry is a function of ours that builds an array, a dtype or bytes. Any other
global ends the reading before anything of it is imported or called.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from normwear_fast.errors import RecordingError

# Bool, integers, floats, complex, bytes and text: no object, structured or datetime dtype.
_KINDS = "?biufcSU"
_MAX_ITEM = 4096


class _ArrayType:
    """Stands in for numpy.ndarray where a pickle names it as the type to rebuild; not callable."""


class _Dtype:
    """A plain dtype whose state a pickle may set to a byte order and to nothing else.

    numpy.dtype's own __setstate__ would let a pickle rewrite fields and flags.
    """

    def __init__(self, code: Any, *_: Any) -> None:
        if isinstance(code, bytes):
            code = code.decode("latin1")
        if not isinstance(code, str):
            raise pickle.UnpicklingError("a dtype that is not a plain code")
        self.dtype = np.dtype(code)
        if self.dtype.kind not in _KINDS or self.dtype.itemsize > _MAX_ITEM:
            raise pickle.UnpicklingError(f"a NumPy array of dtype {self.dtype}")

    def __setstate__(self, state: Any) -> None:
        order = state[1].decode("latin1") if isinstance(state[1], bytes) else state[1]
        if order not in ("<", ">", "|", "=") or any(part is not None for part in state[2:5]):
            raise pickle.UnpicklingError("a NumPy array of a structured dtype")
        if order == "<":
            self.dtype = self.dtype.newbyteorder("<")
        elif order == ">":
            self.dtype = self.dtype.newbyteorder(">")


def _raw(value: Any) -> bytes:
    """The bytes of an array; Python 2 wrote them as a string, read as latin1."""
    return value.encode("latin1") if isinstance(value, str) else bytes(memoryview(value))


class _Array(np.ndarray):
    """An array being rebuilt; its state is checked before NumPy sees it."""

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, raw = state
        if not isinstance(dtype, _Dtype):
            raise pickle.UnpicklingError("an array without a dtype")
        raw = _raw(raw)
        if min(shape, default=0) < 0 or math.prod(shape) * dtype.dtype.itemsize != len(raw):
            raise pickle.UnpicklingError(f"an array of shape {shape} in {len(raw)} bytes")
        super().__setstate__((1, shape, dtype.dtype, fortran, raw))


def _reconstruct(kind: Any, shape: Any, code: Any) -> np.ndarray:
    # NumPy itself writes shape (0,) here and fills the array in __setstate__; a pickle that asks
    # for more only wants memory.
    if kind is not _ArrayType or tuple(shape) != (0,):
        raise pickle.UnpicklingError("an array that is not built NumPy's way")
    return np.empty(0, dtype=np.uint8).view(_Array)


def _from_buffer(buffer: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    if not isinstance(dtype, _Dtype):
        raise pickle.UnpicklingError("an array without a dtype")
    values = np.frombuffer(buffer, dtype=dtype.dtype)
    return values.reshape(shape, order="F" if order == "F" else "C")


def _scalar(dtype: Any, value: Any) -> Any:
    if not isinstance(dtype, _Dtype):
        raise pickle.UnpicklingError("a NumPy scalar without a plain dtype")
    return np.frombuffer(_raw(value), dtype=dtype.dtype, count=1)[0]


def _encode(text: Any, encoding: Any = "utf-8") -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1", "ascii", "utf-8"):
        raise pickle.UnpicklingError("an encoding of something that is not text")
    return text.encode(encoding)


_GLOBALS: dict[tuple[str, str], Any] = {
    ("_codecs", "encode"): _encode,
    ("numpy", "ndarray"): _ArrayType,
    ("numpy", "dtype"): _Dtype,
}
for _module in ("numpy.core", "numpy._core"):
    _GLOBALS[(f"{_module}.multiarray", "_reconstruct")] = _reconstruct
    _GLOBALS[(f"{_module}.multiarray", "scalar")] = _scalar
    _GLOBALS[(f"{_module}.numeric", "_frombuffer")] = _from_buffer


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        try:
            return _GLOBALS[(module, name)]
        except KeyError:
            raise pickle.UnpicklingError(f"it names {module}.{name}") from None

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it refers to something outside the file")


def _check(value: Any) -> None:
    """Raise if a container of the pickle holds anything but arrays and plain values."""
    seen: set[int] = set()
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, np.ndarray | np.generic):
            if item.dtype.kind not in _KINDS:
                raise pickle.UnpicklingError(f"a NumPy array of dtype {item.dtype}")
        elif isinstance(item, dict | list | tuple | set | frozenset):
            if id(item) not in seen:
                seen.add(id(item))
                pending.extend(item)
                if isinstance(item, dict):
                    pending.extend(item.values())
        elif item is not None and not isinstance(
            item, str | bytes | bytearray | int | float | complex
        ):
            raise pickle.UnpicklingError(f"a value of type {type(item).__name__}")


def load_pickle(path: str | Path, *, encoding: str = "ASCII") -> Any:
    """The value of a pickle of NumPy arrays and plain values.

    Args:
        path: the file.
        encoding: how Python 2 strings are read; "latin1" for arrays pickled by Python 2 (WESAD).

    Raises:
        RecordingError: the file is no pickle, is cut short, or names or holds anything else than
            arrays, numbers, text, lists, tuples, sets and dictionaries. Nothing of it has run.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            value = _Unpickler(file, encoding=encoding).load()
        _check(value)
    except OSError as error:
        raise RecordingError(f"{path}: cannot be read: {error.strerror}") from None
    except Exception as error:  # a hostile pickle can fail in any operation
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise RecordingError(
            f"{path}: refused as a pickle of arrays and plain values: {why}"
        ) from None
    return value
