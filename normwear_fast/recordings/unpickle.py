"""Reading pickles that hold NumPy arrays and plain values, and nothing else.

The published samples and WESAD are pickles. A pickle is a program; this is a machine with fewer
instructions. It builds plain values, and calls five functions of ours that build arrays, dtypes,
scalars and bytes. An instruction, a global or an argument outside of that ends the reading; nothing
that a pickle names is imported, and what it may have built is bounded by its own size.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, ClassVar, cast

import numpy as np

from normwear_fast.errors import RecordingError, one_line

# Bool, integers, floats, complex, bytes and text: no object, structured or datetime dtype.
_KINDS = "?biufcSU"
_MAX_ITEM = 4096
# Bytes that calls may build for every byte of the file: a pickle that asks one large string for a
# thousand copies of it is small.
_GROWTH = 4


class _Allowed:
    """Something a pickle may name. Neither it nor its attributes can be written to by one."""

    __slots__ = ("call",)

    def __init__(self, call: Callable[..., Any] | None) -> None:
        self.call = call


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
        self._check()

    def _check(self) -> None:
        if self.dtype.kind not in _KINDS or not 0 < self.dtype.itemsize <= _MAX_ITEM:
            raise pickle.UnpicklingError(f"a NumPy array of dtype {self.dtype}")

    def set_state(self, state: Any) -> None:
        if state[0] not in range(5):
            raise pickle.UnpicklingError("a NumPy dtype of an unknown version")
        order = state[1].decode("latin1") if isinstance(state[1], bytes) else state[1]
        fields, sizes = state[2:5], tuple(state[5:8])
        if order not in ("<", ">", "|", "=") or any(part is not None for part in fields):
            raise pickle.UnpicklingError("a NumPy array of a structured dtype")
        # Item size, alignment and flags are what the code says.
        if sizes not in ((), self.dtype.__reduce__()[2][5:8]):
            raise pickle.UnpicklingError("a NumPy dtype of another size or with flags")
        if order == "<":
            self.dtype = self.dtype.newbyteorder("<")
        elif order == ">":
            self.dtype = self.dtype.newbyteorder(">")


class _Array(np.ndarray):
    """An array being rebuilt; its state is checked before NumPy sees it."""

    def set_state(self, state: Any) -> None:
        version, shape, dtype, fortran, raw = state
        if version not in (0, 1):
            raise pickle.UnpicklingError("a NumPy array of an unknown version")
        if not isinstance(dtype, _Dtype):
            raise pickle.UnpicklingError("an array without a plain dtype")
        raw = _raw(raw)
        shape = _shape(shape)
        if math.prod(shape) * dtype.dtype.itemsize != len(raw):
            raise pickle.UnpicklingError(f"an array of shape {shape} in {len(raw)} bytes")
        super().__setstate__(cast(Any, (1, shape, dtype.dtype, bool(fortran), raw)))


def _shape(shape: Any) -> tuple[int, ...]:
    if (
        not isinstance(shape, tuple)
        or len(shape) > 32
        or not all(type(n) is int and n >= 0 for n in shape)
    ):
        raise pickle.UnpicklingError("an array whose shape is not a few lengths")
    return shape


def _raw(value: Any) -> bytes:
    """The bytes of an array; Python 2 wrote them as a string, read as latin1."""
    if isinstance(value, str):
        return value.encode("latin1")
    if not isinstance(value, bytes | bytearray):
        raise pickle.UnpicklingError("an array whose values are not bytes")
    return bytes(value)


def _reconstruct(kind: Any, shape: Any, code: Any) -> np.ndarray:
    # NumPy itself writes shape (0,) here and fills the array by its state; a pickle that asks
    # for more only wants memory.
    if kind is not _NDARRAY or _shape(shape) != (0,) or code not in ("b", b"b"):
        raise pickle.UnpicklingError("an array that is not built NumPy's way")
    return np.empty(0, dtype=np.uint8).view(_Array)


def _from_buffer(buffer: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    if not isinstance(dtype, _Dtype):
        raise pickle.UnpicklingError("an array without a plain dtype")
    values = np.frombuffer(_raw(buffer), dtype=dtype.dtype)
    return values.reshape(_shape(shape), order="F" if order == "F" else "C")


def _scalar(dtype: Any, value: Any) -> Any:
    if not isinstance(dtype, _Dtype):
        raise pickle.UnpicklingError("a NumPy scalar without a plain dtype")
    return np.frombuffer(_raw(value), dtype=dtype.dtype, count=1)[0]


def _encode(text: Any, encoding: Any = "utf-8") -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1", "ascii", "utf-8"):
        raise pickle.UnpicklingError("an encoding of something that is not text")
    return text.encode(encoding)


_NDARRAY = _Allowed(None)  # named as the type to rebuild, never called
_GLOBALS: dict[tuple[str, str], _Allowed] = {
    ("_codecs", "encode"): _Allowed(_encode),
    ("numpy", "ndarray"): _NDARRAY,
    ("numpy", "dtype"): _Allowed(_Dtype),
}
for _module in ("numpy.core", "numpy._core"):
    _GLOBALS[(f"{_module}.multiarray", "_reconstruct")] = _Allowed(_reconstruct)
    _GLOBALS[(f"{_module}.multiarray", "scalar")] = _Allowed(_scalar)
    _GLOBALS[(f"{_module}.numeric", "_frombuffer")] = _Allowed(_from_buffer)

# Not among them: persistent objects, the extension registry, NEWOBJ and INST, which make instances,
# sets (their members are hashed, however deep they nest), and buffers from outside the file.
_OPCODES = (
    *("PROTO", "FRAME", "STOP", "MARK", "POP", "POP_MARK", "DUP", "NONE", "NEWTRUE", "NEWFALSE"),
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
    *("BYTEARRAY8", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST", "LIST", "APPEND"),
    *("APPENDS", "EMPTY_DICT", "DICT", "SETITEM", "SETITEMS", "PUT", "BINPUT", "LONG_BINPUT"),
    *("MEMOIZE", "GET", "BINGET", "LONG_BINGET", "GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD"),
)


class _File:
    """A file that is never asked for more than is left of it: a length of 2^60 allocates nothing."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._file, self._left = file, size

    def read(self, count: int) -> bytes:
        if not 0 <= count <= self._left:
            raise pickle.UnpicklingError(f"{count} bytes wanted where {self._left} are left")
        self._left -= count
        return self._file.read(count)

    def readline(self) -> bytes:
        line = self._file.readline()
        self._left -= len(line)
        return line


class _Unpickler(pickle._Unpickler):
    """Python's own machine written in Python: the one in C fills memory for a memo index of 2^31,
    and writes into any object it is told to."""

    stack: list[Any]
    pop_mark: Callable[[], list[Any]]
    read: Callable[[int], bytes]
    append: Callable[[Any], None]

    def __init__(self, file: IO[bytes], size: int, encoding: str) -> None:
        super().__init__(cast(Any, _File(file, size)), encoding=encoding)
        self._budget = _GROWTH * size + 65536

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        code: pickle._Unpickler.dispatch[code]
        for code in (getattr(pickle, name)[0] for name in _OPCODES)
    }

    def load(self) -> Any:
        try:
            return super().load()
        except KeyError as error:
            if error.args and isinstance(error.args[0], int):
                raise pickle.UnpicklingError(
                    f"an instruction {bytes(error.args)!r} that plain values do not need"
                ) from None
            raise

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _GLOBALS[(module, name)]
        except KeyError:
            raise pickle.UnpicklingError(f"it names {module}.{name}") from None

    def _spend(self, made: Any) -> None:
        self._budget -= made.nbytes if isinstance(made, np.ndarray) else len(made)
        if self._budget < 0:
            raise pickle.UnpicklingError("it builds far more than the file holds")

    def load_reduce(self) -> None:
        arguments = self.stack.pop()
        function = self.stack[-1]
        if not isinstance(function, _Allowed) or function.call is None:
            raise pickle.UnpicklingError("a call of something that is no function")
        made = function.call(*arguments)
        if isinstance(made, np.ndarray | bytes):
            self._spend(made)
        self.stack[-1] = made

    def load_build(self) -> None:
        state = self.stack.pop()
        built = self.stack[-1]
        if not isinstance(built, _Array | _Dtype):
            raise pickle.UnpicklingError(f"a state for a {type(built).__name__}")
        built.set_state(state)
        if isinstance(built, _Array):
            self._spend(built)

    def load_bytearray8(self) -> None:
        count = int.from_bytes(self.read(8), "little")
        self.append(bytearray(self.read(count)))

    def _check_keys(self, keys: list[Any]) -> None:
        # Only plain keys: hashing a tuple nested a million deep ends the process.
        for key in keys:
            if not isinstance(key, str | bytes | int | float | None):
                raise pickle.UnpicklingError(f"a dictionary key of type {type(key).__name__}")

    def load_dict(self) -> None:
        items = self.pop_mark()
        self._check_keys(items[::2])
        self.append(dict(zip(items[::2], items[1::2], strict=True)))

    def load_setitem(self) -> None:
        self._check_keys(self.stack[-2:-1])
        self._check_target()
        value = self.stack.pop()
        key = self.stack.pop()
        self.stack[-1][key] = value

    def load_setitems(self) -> None:
        items = self.pop_mark()
        self._check_keys(items[::2])
        if not isinstance(self.stack[-1], dict):
            raise pickle.UnpicklingError("an item for something that is no dictionary")
        self.stack[-1].update(zip(items[::2], items[1::2], strict=True))

    def _check_target(self) -> None:
        if not isinstance(self.stack[-3], dict):
            raise pickle.UnpicklingError("an item for something that is no dictionary")

    def load_append(self) -> None:
        value = self.stack.pop()
        self._list().append(value)

    def load_appends(self) -> None:
        items = self.pop_mark()
        self._list().extend(items)

    def _list(self) -> list[Any]:
        if not isinstance(self.stack[-1], list):
            raise pickle.UnpicklingError("an entry for something that is no list")
        return self.stack[-1]

    for _name, _load in (
        ("REDUCE", load_reduce),
        ("BUILD", load_build),
        ("BYTEARRAY8", load_bytearray8),
        ("DICT", load_dict),
        ("SETITEM", load_setitem),
        ("SETITEMS", load_setitems),
        ("APPEND", load_append),
        ("APPENDS", load_appends),
    ):
        dispatch[getattr(pickle, _name)[0]] = _load
    del _name, _load


def _check(value: Any) -> None:
    """Raise if a container of the pickle holds anything but arrays and plain values."""
    seen: set[int] = set()
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, np.ndarray | np.generic):
            if item.dtype.kind not in _KINDS:
                raise pickle.UnpicklingError(f"a NumPy array of dtype {item.dtype}")
        elif isinstance(item, dict | list | tuple):
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
            arrays, numbers, text, lists, tuples and dictionaries. Nothing of it has run.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            value = _Unpickler(file, path.stat().st_size, encoding).load()
        _check(value)
    except OSError as error:
        raise RecordingError(f"{path}: cannot be read: {one_line(error)}") from None
    except Exception as error:  # a hostile pickle can fail in any operation
        why = one_line(error)
        raise RecordingError(
            f"{path}: refused as a pickle of arrays and plain values: {why}"
        ) from None
    return value
