"""From a public set's own files to samples: one module a set, nothing downloaded.

Every module has `read(raw, dataset) -> Iterator[Piece]`; its docstring says where the layout comes
from and what is uncertain. The signals go through the reference preprocessing to 65 Hz, and are
written in the published sample format and as one Parquet.
"""

from __future__ import annotations

import importlib
import json
import os
import pickle
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from normwear_fast.errors import OutputError, RecordingError, UsageError, one_line, within
from normwear_fast.evaluate.prepare.common import Piece, to_model_rate
from normwear_fast.evaluate.registry import Dataset, get_dataset
from normwear_fast.evaluate.samples import PARQUET_TASKS, SAMPLE_FOLDER, SPLIT_FILE
from normwear_fast.evaluate.splits import default_split

PARQUET_FILE = "samples.parquet"
DATASET_FILE = "dataset.json"
_SAMPLING_RATE = 65.0

# The published samples are float16; preprocessed values are around 1, far from its largest.
_LARGEST = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class Prepared:
    """What preparation wrote."""

    dataset: Dataset
    output: Path
    samples: int
    train: int
    test: int
    subjects: int
    flat_channels: int


def read_pieces(name: str, raw: Path) -> Iterator[Piece]:
    """The labelled pieces of a set's raw files, at their own rates.

    Raises:
        RecordingError: the folder has not the set's layout, or a file of it cannot be read.
    """
    dataset = get_dataset(name)
    module = importlib.import_module(f"normwear_fast.evaluate.prepare.{name.replace('-', '_')}")
    try:
        yield from module.read(raw, dataset)
    except OSError as error:
        where = error.filename or raw
        raise RecordingError(f"{where}: cannot be read ({one_line(error)})") from None


def prepare(
    name: str, raw: str | Path, output: str | Path, *, seed: int = 0, overwrite: bool = False
) -> Prepared:
    """Write a public set's samples from its raw files.

    The output folder appears whole or not at all. It holds `sample_for_downstream/*.pkl`,
    `train_test_split.json` (the set's official split, else a seeded one by subject or, for sets
    without subjects to hold out, stratified), `samples.parquet` with the same samples in float32,
    and `dataset.json`.

    Args:
        name: key of the set.
        raw: folder of the raw files as downloaded and unpacked.
        output: a folder that does not exist yet.
        seed: of the split, where the set has none of its own.
        overwrite: replace an existing output.

    Raises:
        UsageError: an unknown set, or no such raw folder.
        RecordingError, InputError: the raw files are not as the set has them.
        OutputError: the output exists, or cannot be written.
    """
    dataset = get_dataset(name)
    raw, output = Path(raw), Path(output)
    if not raw.is_dir():
        raise UsageError(
            f"{raw}: no such folder; give the unpacked {dataset.title} from {dataset.source}"
        )
    if output.exists() and not overwrite:
        raise OutputError(f"{output}: exists; another --output, or --overwrite, would be right")
    if output.exists() and not _replaceable(output):
        raise OutputError(
            f"{output}: holds no samples of probe --prepare, and will not be overwritten; choose a new "
            "folder"
        )
    try:
        output.absolute().parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(dir=output.absolute().parent, prefix=f".{output.name}-"))
    except OSError as error:
        raise OutputError(f"{output}: cannot be written ({one_line(error)})") from None
    try:
        prepared = _write(dataset, raw, work, output, seed)
        work.chmod(0o755)
        if output.exists():
            shutil.rmtree(output)
        os.replace(work, output)
    except OSError as error:
        raise OutputError(f"{output}: cannot be written ({one_line(error)})") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return prepared


def _replaceable(output: Path) -> bool:
    """Whether a folder is empty, or holds nothing but what `prepare` writes."""
    if not output.is_dir():
        return False
    names = {path.name for path in output.iterdir()}
    return names <= {SAMPLE_FOLDER, PARQUET_FILE, SPLIT_FILE, DATASET_FILE} and (
        not names or DATASET_FILE in names
    )


def _write(dataset: Dataset, raw: Path, work: Path, output: Path, seed: int) -> Prepared:
    folder = work / SAMPLE_FOLDER
    folder.mkdir()
    names: list[str] = []
    subjects: list[str] = []
    first_labels: list[Any] = []
    official: list[bool | None] = []
    counts: dict[str, int] = {}
    flat = 0
    with _ParquetWriter(work / PARQUET_FILE, dataset) as table:
        for piece in read_pieces(dataset.key, raw):
            with within(f"{raw}, subject {piece.subject}"):
                data, flat_channels = to_model_rate(piece)
            flat += flat_channels
            labels = [
                {task.kind: _plain(value)}
                for task, value in zip(dataset.tasks, piece.labels, strict=True)
            ]
            # The published files begin with the subject, up to the first underscore.
            subject = piece.subject.replace("_", "-")
            number = counts[subject] = counts.get(subject, -1) + 1
            names.append(f"{subject}_{number:05d}.pkl")
            subjects.append(subject)
            first_labels.append(piece.labels[0])
            official.append(piece.is_test)
            sample = {
                "uid": subject,
                "data": np.clip(data, -_LARGEST, _LARGEST).astype(np.float16),
                "sampling_rate": _SAMPLING_RATE,
                "label": labels,
            }
            with (folder / names[-1]).open("wb") as file:
                pickle.dump(sample, file, protocol=4)
            table.add(subject, data, piece.labels)
        if not names:
            raise RecordingError(
                f"{raw}: nothing of {dataset.title} found in it; it should be the unpacked set from "
                f"{dataset.source}"
            )
        if None in official:
            column = np.asarray(first_labels)
            with within(raw):
                is_test = default_split(dataset, np.array(subjects), column, seed)
        else:
            is_test = np.array(official, dtype=bool)
        table.finish(is_test)
    split = {
        "train": [name for name, test in zip(names, is_test, strict=True) if not test],
        "test": [name for name, test in zip(names, is_test, strict=True) if test],
    }
    (work / SPLIT_FILE).write_text(json.dumps(split, indent=0), encoding="utf-8")
    about = {
        "dataset": dataset.key,
        "title": dataset.title,
        "channels": dataset.channels,
        "tasks": [
            {"name": task.name, "classes": task.classes, "targets": task.targets}
            for task in dataset.tasks
        ],
        "sampling_rate": _SAMPLING_RATE,
        "preprocessing": "reference",
        "split": "official" if None not in official else f"{dataset.split}, seed {seed}",
        "samples": len(names),
        "flat_channels": flat,
        "source": dataset.source,
    }
    (work / DATASET_FILE).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    return Prepared(
        dataset=dataset,
        output=output,
        samples=len(names),
        train=int((~is_test).sum()),
        test=int(is_test.sum()),
        subjects=len(set(subjects)),
        flat_channels=flat,
    )


def _plain(value: Any) -> Any:
    return [float(part) for part in value] if isinstance(value, tuple) else value


class _ParquetWriter:
    """Samples to one Parquet: subject, split, sampling_rate, data, a column a task.

    Rows wait in row groups of 512; the split, known only at the end, is written by a second pass
    over the finished file.
    """

    ROWS = 512

    def __init__(self, path: Path, dataset: Dataset) -> None:
        import pyarrow as pa

        self._path = path
        self._draft = path.with_suffix(".draft")
        self._dataset = dataset
        fields = [
            pa.field("subject", pa.string()),
            pa.field("sampling_rate", pa.float64()),
            pa.field("data", pa.list_(pa.list_(pa.float32()))),
        ]
        for task in dataset.tasks:
            kind = pa.int64() if task.classes else pa.float64()
            fields.append(pa.field(task.name, kind if len(task.targets) < 2 else pa.list_(kind)))
        self._schema = pa.schema(fields)
        self._rows: list[dict[str, Any]] = []

    def __enter__(self) -> _ParquetWriter:
        import pyarrow.parquet as pq

        self._writer = pq.ParquetWriter(self._draft, self._schema, compression="zstd")
        return self

    def add(self, subject: str, data: NDArray[np.float64], labels: tuple[Any, ...]) -> None:
        row = {
            "subject": subject,
            "sampling_rate": _SAMPLING_RATE,
            "data": list(data.astype(np.float32)),
        }
        row |= {
            task.name: _plain(value)
            for task, value in zip(self._dataset.tasks, labels, strict=True)
        }
        self._rows.append(row)
        if len(self._rows) == self.ROWS:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa

        if self._rows:
            self._writer.write_table(pa.Table.from_pylist(self._rows, schema=self._schema))
            self._rows = []

    def finish(self, is_test: NDArray[np.bool_]) -> None:
        """Write the file with its split column."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._flush()
        self._writer.close()
        split = pa.array(np.where(is_test, "test", "train"))
        schema = self._schema.insert(1, pa.field("split", pa.string())).with_metadata(
            {PARQUET_TASKS: self._dataset.key.encode()}
        )
        # Embeddings and signals do not repeat: dictionaries would only cost time.
        with pq.ParquetWriter(
            self._path, schema, compression="zstd", use_dictionary=["subject", "split"]
        ) as writer:
            start = 0
            for batch in pq.ParquetFile(self._draft).iter_batches(self.ROWS):
                columns = list(batch.columns)
                columns.insert(1, split.slice(start, batch.num_rows))
                start += batch.num_rows
                writer.write_batch(pa.record_batch(columns, schema=schema))

    def __exit__(self, *_: object) -> None:
        self._writer.close()
        self._draft.unlink(missing_ok=True)
