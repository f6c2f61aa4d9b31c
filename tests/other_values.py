"""Files that are whole but hold something else: what no flipped bit reaches, behind checksums and
parsers. A value of a JSON file, a cell of a table, an array of an archive becomes another one."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 3, 0.5, 1e308, 10**30, float("nan"), float("inf"), "", "x", "\0", "65"),
    *([], {}, [None], [[1], [2, 3]], [[]], {"a": 1}, "A" * 5000, 10**400, "9" * 5000),
)


def _replaced(value: Any, random: np.random.Generator) -> Any:
    """The same with one value in it, at a random depth, replaced, dropped or doubled."""
    if isinstance(value, dict) and value and random.random() < 0.9:
        names = list(value)
        name = names[int(random.integers(len(names)))]
        kept = dict(value)
        if random.random() < 0.15:
            del kept[name]
        else:
            kept[name] = _replaced(value[name], random)
        return kept
    if isinstance(value, list) and value and random.random() < 0.8:
        place = int(random.integers(len(value)))
        if random.random() < 0.3:
            return value[:place] if random.random() < 0.5 else value + value[place:]
        return [*value[:place], _replaced(value[place], random), *value[place + 1 :]]
    return VALUES[int(random.integers(len(VALUES)))]


def _json(content: bytes, random: np.random.Generator) -> bytes:
    return json.dumps(_replaced(json.loads(content), random), indent=1).encode()


def _csv(content: bytes, random: np.random.Generator) -> bytes:
    rows = [list(row) for row in csv.reader(io.StringIO(content.decode()))]
    row = rows[int(random.integers(len(rows)))]
    place = int(random.integers(max(1, len(row))))
    way = random.integers(4)
    if way == 0 and row:
        del row[place]
    elif way == 1:
        row[place:place] = row[place : place + 1]
    else:
        row[place : place + 1] = [str(VALUES[int(random.integers(len(VALUES)))])]
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    return text.getvalue().encode()


def _array(random: np.random.Generator) -> np.ndarray:
    arrays: tuple[Callable[[], np.ndarray], ...] = (
        lambda: np.array(7),
        lambda: np.empty(0),
        lambda: np.empty((0, 2, 130)),
        lambda: np.empty((4, 2, 0)),
        lambda: np.zeros((4, 2, 130), bool),
        lambda: np.full((4, 2, 130), np.nan),
        lambda: np.full((4, 2, 130), 1e308),
        lambda: np.full((4, 2, 130), np.iinfo(np.int64).min),
        lambda: np.zeros((4, 2, 130), complex),
        lambda: np.zeros((4, 2, 130), np.float16),
        lambda: np.zeros((2, 2, 130), ">f8"),
        lambda: np.array(["1", "x", "2", ""]),
        lambda: np.array([b"1", b"\xff", b"2", b"3"]),
        lambda: np.array(["2020-01-01", "NaT", "2021-01-01", "2022-01-01"], "M8[D]"),
        lambda: np.zeros(4, [("a", "f8"), ("b", "i4")]),
        lambda: np.array([None, {}, [], 1], object),
        lambda: np.array([0.0, np.inf, 2.0, -1.0]),
        lambda: np.array([1e-300, 1e300, 65, 65]),
        lambda: np.array(1e-7),
        lambda: np.array([2**62, -(2**62), 0, 1]),
        lambda: np.arange(8.0).reshape(4, 2),
    )
    return arrays[int(random.integers(len(arrays)))]()


def _npy(content: bytes, random: np.random.Generator) -> bytes:
    stream = io.BytesIO()
    np.save(stream, _array(random), allow_pickle=True)
    return stream.getvalue()


def _npz(content: bytes, random: np.random.Generator) -> bytes:
    with np.load(io.BytesIO(content)) as file:
        arrays = {name: file[name] for name in file.files}
    name = list(arrays)[int(random.integers(len(arrays)))]
    arrays[name] = _array(random)
    if random.random() < 0.1:
        del arrays[name]
    stream = io.BytesIO()
    np.savez(stream, allow_pickle=True, **arrays)
    return stream.getvalue()


def _pickle(content: bytes, random: np.random.Generator) -> bytes:
    value = pickle.loads(content)  # of our own writing
    if random.random() < 0.3 and isinstance(value, dict):
        value[list(value)[int(random.integers(len(value)))]] = _array(random)
    else:
        value = _replaced(value, random)
    return pickle.dumps(value, protocol=4)


def _column(rows: int, random: np.random.Generator) -> Any:
    import pyarrow as pa

    def repeated(values: list[Any], kind: Any = None) -> Any:
        return pa.array([values[i % len(values)] for i in range(rows)], kind)

    columns: tuple[Callable[[], Any], ...] = (
        lambda: pa.nulls(rows),
        lambda: repeated(["x", None, ""]),
        lambda: repeated([b"\xff\xfe", b""]),
        lambda: repeated([1.5, float("nan"), float("inf"), -1e308]),
        lambda: repeated([1e-300]),
        lambda: repeated([2**62, -1, 0]),
        lambda: repeated([True, False]),
        lambda: repeated([{"a": 1}, None]),
        lambda: repeated([[1.0, 2.0], [], None]),
        lambda: repeated([[[1.0], [2.0, 3.0]], [[]], [None]]),
        lambda: repeated([[["a"]], [["b", "c"]]]),
        lambda: repeated([[1.0] * 16, None], pa.list_(pa.float32(), 16)),
        lambda: repeated([2**40, 3], pa.timestamp("ns")),
        lambda: repeated([2**62], pa.timestamp("s")),
        lambda: repeated(["x", "y"]).dictionary_encode(),
        lambda: repeated([1, 2]).cast(pa.decimal128(30, 2)),
        lambda: repeated(["A" * 5000]),
        lambda: repeated([65, 64], pa.uint8()),
    )
    return columns[int(random.integers(len(columns)))]()


def _table(content: bytes, random: np.random.Generator, suffix: str) -> bytes:
    """A column, or the metadata of the schema, is another."""
    import pyarrow as pa
    from pyarrow import parquet

    reader = pa.BufferReader(content)
    table = (
        parquet.read_table(reader) if suffix == ".parquet" else pa.ipc.open_file(reader).read_all()
    )
    metadata = dict(table.schema.metadata or {})
    if metadata and random.random() < 0.5:
        key = list(metadata)[int(random.integers(len(metadata)))]
        with contextlib.suppress(ValueError):
            metadata[key] = _json(metadata[key], random)
        if random.random() < 0.1:
            metadata = {}
    else:
        place = int(random.integers(table.num_columns))
        name = table.column_names[place]
        way = random.integers(8)
        if way == 0:
            table = table.remove_column(place)
        elif way == 1:
            table = table.add_column(0, name, _column(len(table), random))
        elif way == 2:
            table = table.slice(0, int(random.integers(len(table) + 1)))
        elif way == 3:
            table = pa.concat_tables([table, table])
        else:
            table = table.set_column(place, name, _column(len(table), random))
    table = table.replace_schema_metadata(metadata)
    sink = pa.BufferOutputStream()
    if suffix == ".parquet":
        parquet.write_table(table, sink)
    else:
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
    return sink.getvalue().to_pybytes()


def _tensor(like: Any, random: np.random.Generator) -> Any:
    import torch

    tensors: tuple[Callable[[], Any], ...] = (
        lambda: like.to(torch.complex64),
        lambda: like.to(torch.int8),
        lambda: like.to(torch.float8_e4m3fn),
        lambda: like.to(torch.float64),
        lambda: torch.full_like(like, float("nan")),
        lambda: torch.empty(0),
        lambda: torch.zeros(()),
        lambda: like.reshape(-1),
        lambda: like.unsqueeze(0),
        lambda: torch.zeros(1).expand(2**33),
        lambda: torch.zeros(1).expand_as(like),
        lambda: like.to_sparse() if like.ndim else like,
        lambda: torch.empty(like.shape, device="meta"),
        lambda: "no tensor",
        lambda: [like],
        lambda: {"a": {"b": like}},
        lambda: None,
    )
    return tensors[int(random.integers(len(tensors)))]()


def _changed_tensors(value: Any, random: np.random.Generator) -> Any:
    import torch

    if isinstance(value, dict) and value:
        names = list(value)
        name = names[int(random.integers(len(names)))]
        kept = dict(value)
        if random.random() < 0.1:
            kept[f"{name}.more"] = kept.pop(name)
        elif isinstance(value[name], torch.Tensor):
            kept[name] = _tensor(value[name], random)
        else:
            kept[name] = _changed_tensors(value[name], random)
        return kept
    return VALUES[int(random.integers(len(VALUES)))]


def _torch(content: bytes, random: np.random.Generator) -> bytes:
    import torch

    value = torch.load(io.BytesIO(content), weights_only=True)
    stream = io.BytesIO()
    torch.save(_changed_tensors(value, random), stream)
    return stream.getvalue()


def _safetensors(content: bytes, random: np.random.Generator) -> bytes:
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    names = list(header)
    name = names[int(random.integers(len(names)))]
    if random.random() < 0.5 and isinstance(header[name], dict) and "dtype" in header[name]:
        kinds = ["F16", "BF16", "F64", "I64", "U8", "BOOL", "F8_E4M3", "C64", "X"]
        header[name]["dtype"] = kinds[int(random.integers(len(kinds)))]
    else:
        header = _replaced(header, random)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + size :]


CHANGES: dict[str, Callable[[bytes, np.random.Generator], bytes]] = {
    ".json": _json,
    ".csv": _csv,
    ".npy": _npy,
    ".npz": _npz,
    ".pkl": _pickle,
    ".parquet": lambda content, random: _table(content, random, ".parquet"),
    ".arrow": lambda content, random: _table(content, random, ".arrow"),
    ".pth": _torch,
    ".pt": _torch,
    ".safetensors": _safetensors,
}


def change(file: Path, random: np.random.Generator) -> bool:
    """Writes the file with something else in it; False for a format that is not known here."""
    if file.suffix not in CHANGES:
        return False
    content = file.read_bytes()
    for _ in range(10):
        with contextlib.suppress(Exception):  # a library may not write what it would have to refuse
            file.write_bytes(CHANGES[file.suffix](content, random))
            return True
    return False
