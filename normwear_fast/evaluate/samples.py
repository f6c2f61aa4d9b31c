"""Labelled windows: the published sample format, and a user's own folder, Parquet or NPZ.

Forms that `load_samples` reads:

* a folder with `sample_for_downstream/*.pkl`, one sample each, `{uid, data (C, L),
  sampling_rate, label: [{"class": k} or {"reg": v}, ...]}`, and `train_test_split.json`
  (`{"train": [file names], "test": [file names]}`) beside it: the published archive, and what
  preparation writes;
* a folder with `labels.csv`: columns `file` (NPY (C, L), or any recording the package opens, below
  the folder) and `label`, optional `subject`, `split` (train or test) and `sampling_rate`;
* one Parquet: `data`, a list of samples a channel (or one list column a channel), NaN or null where
  missing, and a label column, optional `subject`, `split`, `sampling_rate`;
* one NPZ: `x_train`, `y_train`, `x_test`, `y_test` (N, C, L) and `sampling_rate`.

Text, booleans and integers are classes; floating-point labels are regression targets.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from normwear_fast.errors import InputError, RecordingError, UsageError, reading, within
from normwear_fast.evaluate.registry import Dataset, Task, find_released
from normwear_fast.files import fits, read_json, read_npy, read_npz, read_parquet
from normwear_fast.recordings.base import RATES
from normwear_fast.recordings.unpickle import load_pickle

SAMPLE_FOLDER = "sample_for_downstream"
SPLIT_FILE = "train_test_split.json"
PARQUET_TASKS = b"normwear_fast.tasks"
_RESERVED = ("data", "uid", "subject", "split", "sampling_rate")


@dataclass
class SampleSet:
    """Labelled windows of one data set.

    Attributes:
        name: what results are reported under.
        windows: one float32 array (C, L) a sample, in its own units.
        sampling_rates: (n,) Hz.
        subjects: (n,) text; "" where nothing says who it was.
        tasks: what the labels mean.
        labels: one array a task: (n,) integers, or (n, targets) float64 for a regression.
        is_test: (n,) bool, or None if the source has no split.
        ids: one name a sample, for messages.
        dataset: the registry's entry, None for a user's own set.
    """

    name: str
    windows: list[NDArray[np.float32]]
    sampling_rates: NDArray[np.float64]
    subjects: NDArray[np.str_]
    tasks: tuple[Task, ...]
    labels: tuple[NDArray[Any], ...]
    is_test: NDArray[np.bool_] | None
    ids: list[str]
    dataset: Dataset | None = None
    _fingerprint: str = field(default="", repr=False)

    def __len__(self) -> int:
        return len(self.windows)

    @property
    def channels(self) -> int:
        return len(self.windows[0])

    def fingerprint(self) -> str:
        """SHA-256 of all windows, their shapes and rates: the data's part of a cache key."""
        if not self._fingerprint:
            digest = hashlib.sha256(np.ascontiguousarray(self.sampling_rates).tobytes())
            for window in self.windows:
                digest.update(repr(window.shape).encode())
                digest.update(np.ascontiguousarray(window).data)
            self._fingerprint = digest.hexdigest()
        return self._fingerprint


def load_samples(path: str | Path, *, label: Sequence[str] = ("label",)) -> SampleSet:
    """Labelled windows of any of the forms above.

    Args:
        path: folder, `.parquet` or `.npz`.
        label: label columns of a Parquet; ignored for the other forms, and for a Parquet that
            preparation wrote, which names its own.

    Raises:
        UsageError: nothing is there, or it is none of the forms.
        RecordingError, InputError: a file of it cannot be read or contradicts itself.
    """
    path = Path(path)
    if not path.exists():
        raise UsageError(f"{path}: no such data set; give a folder, a .parquet or an .npz")
    if path.is_dir():
        folder = path.parent if path.name == SAMPLE_FOLDER else path
        if (folder / SAMPLE_FOLDER).is_dir():
            return _load_released(folder)
        if (folder / "labels.csv").is_file():
            return _load_folder(folder)
        raise UsageError(
            f"{path}: neither {SAMPLE_FOLDER}/ nor labels.csv in it; see the forms a data set "
            "takes in normwear_fast.evaluate.samples"
        )
    if path.suffix == ".parquet":
        return _load_parquet(path, label)
    if path.suffix == ".npz":
        return _load_npz(path)
    raise UsageError(f"{path}: a data set is a folder, a .parquet or an .npz")


# -- the published format --------------------------------------------------------------------------


def _window(value: Any, where: str) -> NDArray[np.float32]:
    with reading(where, InputError, "data is no array of numbers"):  # lists of several lengths
        data = np.asarray(value)
    if data.ndim == 1:
        data = data[None]
    if data.ndim != 2 or data.dtype.kind not in "biuf" or 0 in data.shape:
        raise InputError(
            f"{where}: data is {data.dtype} of shape {data.shape}; (channels, samples) numbers "
            "would be right"
        )
    return np.ascontiguousarray(data, dtype=np.float32)


def _rate(value: Any, where: str) -> float:
    try:
        rate = float(value)
    except (TypeError, ValueError, OverflowError):
        rate = 0.0
    if not RATES[0] <= rate <= RATES[1]:
        raise InputError(
            f"{where}: sampling_rate is {value!r}; a positive number of Hz is right, "
            f"{RATES[0]:g} to {RATES[1]:g}"
        )
    return rate


def _load_released(folder: Path) -> SampleSet:
    files = sorted((folder / SAMPLE_FOLDER).glob("*.pkl"))
    if not files:
        raise RecordingError(f"{folder / SAMPLE_FOLDER}: holds no sample (*.pkl)")
    windows, rates, subjects, raw_labels = [], [], [], []
    for file in files:
        sample = load_pickle(file)
        held = set(sample) if isinstance(sample, dict) else set()
        missing = {"data", "sampling_rate", "label"} - held
        if missing:
            raise RecordingError(f"{file}: not a sample; it lacks {', '.join(sorted(missing))}")
        windows.append(_window(sample["data"], str(file)))
        rates.append(_rate(sample["sampling_rate"], str(file)))
        # Most published samples leave uid empty and begin the file's name with the subject; those
        # named subject_NN are one subject a file.
        head = file.stem.split("_")[0]
        uid = sample.get("uid")
        known_by = str(uid) if isinstance(uid, str | int | float | np.generic) and uid else ""
        subjects.append(known_by or (file.stem if head == "subject" else head))
        raw_labels.append(_sample_labels(sample["label"], file))
    known = _known_tasks(folder)
    tasks, labels = _collect_labels(raw_labels, files, known[1] if known else None, folder)
    return SampleSet(
        name=known[0].key if known and len(known[1]) == len(known[0].tasks) else folder.name,
        windows=windows,
        sampling_rates=np.array(rates),
        subjects=np.array(subjects),
        tasks=tasks,
        labels=labels,
        is_test=_read_split(folder / SPLIT_FILE, [file.name for file in files]),
        ids=[file.name for file in files],
        dataset=known[0] if known else None,
    )


def _known_tasks(folder: Path) -> tuple[Dataset, tuple[Task, ...]] | None:
    """The registry's entry of a prepared folder (its dataset.json) or of a published one."""
    about = folder / "dataset.json"
    if about.is_file():
        right = "not what preparation wrote; remove it or prepare again"
        values = read_json(about, RecordingError, right)
        if not fits(values, {"dataset": str}):
            raise RecordingError(f"{about}: {right}")
        return find_released(values["dataset"])
    return find_released(folder.resolve().name)


def _sample_labels(value: Any, file: Path) -> list[tuple[str, Any]]:
    if not isinstance(value, list) or not value:
        raise RecordingError(f'{file}: label is no list of {{"class": k}} or {{"reg": v}}')
    labels = []
    for entry in value:
        if not isinstance(entry, dict) or len(entry) != 1 or not {"class", "reg"} & set(entry):
            raise RecordingError(f'{file}: a label is not {{"class": k}} or {{"reg": v}}')
        (pair,) = entry.items()
        labels.append(pair)
    return labels


def _collect_labels(
    raw: list[list[tuple[str, Any]]],
    files: list[Path],
    known: tuple[Task, ...] | None,
    folder: Path,
) -> tuple[tuple[Task, ...], tuple[NDArray[Any], ...]]:
    kinds = [kind for kind, _ in raw[0]]
    if known is not None and [task.kind for task in known] != kinds:
        raise RecordingError(
            f"{folder}: its samples have labels {kinds}, where its tasks are "
            f"{', '.join(f'{task.name} ({task.kind})' for task in known)}"
        )
    for labels, file in zip(raw, files, strict=True):
        if [kind for kind, _ in labels] != kinds:
            raise RecordingError(f"{file}: labels of other kinds than {files[0].name}")
    tasks: list[Task] = []
    columns: list[NDArray[Any]] = []
    for index, kind in enumerate(kinds):
        where = [str(file) for file in files]
        values = [labels[index][1] for labels in raw]
        if kind == "class":
            numbers = _integers(values, where)
            task = known[index] if known else _class_task(f"label {index}", numbers)
            outside = (numbers < 0) | (numbers >= len(task.classes))
            if outside.any():
                bad = int(np.argmax(outside))
                raise InputError(
                    f"{where[bad]}: class {numbers[bad]} of {task.name}, which has "
                    f"{len(task.classes)} classes, 0 to {len(task.classes) - 1}"
                )
            columns.append(numbers)
        else:
            targets = _numbers(values, where)
            names = tuple(f"target {i}" for i in range(targets.shape[1]))
            task = known[index] if known else Task(f"label {index}", "vital signs", targets=names)
            columns.append(targets)
        tasks.append(task)
    return tuple(tasks), tuple(columns)


def _class_task(name: str, column: NDArray[np.int64]) -> Task:
    top = int(column.max(initial=0))
    if top > 9999:
        raise InputError(f"{name}: class {top}; classes are numbered from 0")
    return Task(name, "state recognition", tuple(str(k) for k in range(top + 1)))


def _integers(values: Sequence[Any], where: Sequence[str]) -> NDArray[np.int64]:
    column = np.empty(len(values), dtype=np.int64)
    for index, value in enumerate(values):
        try:
            column[index] = number = int(value)
            right = number == float(value)
        except (TypeError, ValueError, OverflowError):
            right = False
        if not right:
            raise InputError(f"{where[index]}: class {value!r}; a whole number is right")
    return column


def _numbers(values: Sequence[Any], where: Sequence[str]) -> NDArray[np.float64]:
    rows: list[NDArray[np.float64]] = []
    for index, value in enumerate(values):
        try:
            row = np.atleast_1d(np.asarray(value, dtype=np.float64))
        except (TypeError, ValueError, OverflowError):
            row = np.array([np.nan])
        if row.ndim != 1 or not np.isfinite(row).all():
            raise InputError(f"{where[index]}: target {value!r}; a finite number is right")
        if rows and len(row) != len(rows[0]):
            raise InputError(f"{where[index]}: {len(row)} targets; others have {len(rows[0])}")
        rows.append(row)
    return np.stack(rows)


def _read_split(path: Path, names: list[str]) -> NDArray[np.bool_] | None:
    """Which samples are tested, of a train_test_split.json; None if there is no file.

    As published, a sample is in training unless it is listed under "test".
    """
    if not path.exists():
        return None
    right = 'right is {"train": [file names], "test": [file names]}'
    split = read_json(path, RecordingError, f"not JSON; {right}")
    if not isinstance(split, dict) or not {"train", "test"} <= set(split):
        raise RecordingError(f"{path}: {right}")
    halves = {}
    for half in ("train", "test"):
        listed = split[half]
        if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
            raise RecordingError(f"{path}: {half} is no list of file names; {right}")
        halves[half] = set(listed)
    both = halves["train"] & halves["test"]
    if both:
        raise RecordingError(
            f"{path}: {len(both)} samples are in both halves, {min(both)!r} among them"
        )
    unknown = (halves["train"] | halves["test"]) - set(names)
    if unknown:
        raise RecordingError(
            f"{path}: names {len(unknown)} samples that are not in {SAMPLE_FOLDER}/, "
            f"{min(unknown)!r} among them"
        )
    return np.array([name in halves["test"] for name in names])


# -- a user's own data -----------------------------------------------------------------------------


def _own_task(name: str, values: Sequence[Any], where: Sequence[str]) -> tuple[Task, NDArray[Any]]:
    """Task and column of a user's labels: floats and lists are targets, the rest are classes."""
    values = [value.item() if isinstance(value, np.generic) else value for value in values]
    values = [v.decode("utf-8", "replace") if isinstance(v, bytes) else v for v in values]
    for index, value in enumerate(values):
        if not isinstance(value, str | bool | int | float | list | np.ndarray | None):
            raise InputError(
                f"{where[index]}: {name} is {value!r}; text, a number or a list of numbers is right"
            )
        if value is None or value == "" or (isinstance(value, float) and np.isnan(value)):
            raise InputError(f"{where[index]}: no {name}; every sample needs one")
    if any(isinstance(value, float | list | np.ndarray) for value in values):
        column = _numbers(values, where)
        targets = tuple(f"target {i}" for i in range(column.shape[1]))
        return Task(name, "vital signs", targets=targets), column
    text = all(isinstance(value, str) for value in values)
    if not text and any(isinstance(value, str) for value in values):
        raise InputError(f"column {name}: both text and numbers; one kind is right")
    classes = sorted(set(values))
    if len(classes) > max(50, len(values) // 2):
        raise InputError(
            f"column {name}: {len(classes)} classes in {len(values)} samples; for a regression "
            "write the targets as floating-point numbers"
        )
    index_of = {value: index for index, value in enumerate(classes)}
    column = np.array([index_of[value] for value in values], dtype=np.int64)
    return Task(name, "state recognition", tuple(str(value) for value in classes)), column


def _own_split(values: Sequence[Any], where: Sequence[str]) -> NDArray[np.bool_]:
    for index, value in enumerate(values):
        if value not in ("train", "test"):
            raise InputError(f"{where[index]}: split is {value!r}; train or test is right")
    return np.array([value == "test" for value in values])


def _own_subjects(values: Iterable[Any]) -> NDArray[np.str_]:
    return np.array(["" if value is None else str(value) for value in values])


def _parse_label(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _load_folder(folder: Path) -> SampleSet:
    path = folder / "labels.csv"
    with (
        reading(path, RecordingError, "not a CSV in UTF-8"),
        path.open(encoding="utf-8-sig", newline="") as stream,
    ):
        reader = csv.DictReader(stream, strict=True)
        rows = list(reader)
        columns = reader.fieldnames or []
    if not {"file", "label"} <= set(columns):
        raise RecordingError(f"{path}: columns {list(columns)}; `file` and `label` are needed")
    if not rows:
        raise RecordingError(f"{path}: no sample in it")
    root = folder.resolve()
    windows, rates, where = [], [], []
    for number, row in enumerate(rows, start=2):
        place = f"{path}, line {number}"
        if None in row or None in row.values():
            raise RecordingError(f"{place}: not as many fields as the {len(columns)} columns")
        try:
            file = (root / row["file"]).resolve()
            inside, there = file.is_relative_to(root), file.is_file()
        except (OSError, ValueError):  # a name with a null byte, or too long
            inside, there = True, False
        if not inside:
            raise InputError(f"{place}: {row['file'][:200]!r} is not below the folder")
        if not there:
            raise InputError(f"{place}: there is no file {row['file'][:200]!r}")
        rate = _rate(row["sampling_rate"], place) if row.get("sampling_rate") else None
        with within(place):
            window, found = _read_window(file, rate)
        windows.append(window)
        rates.append(found)
        where.append(place)
    values = [_parse_label(row["label"]) for row in rows]
    if any(isinstance(value, str) for value in values):
        values = [row["label"] for row in rows]  # "1" beside "b" is text as well
    elif any(isinstance(value, float) for value in values):
        values = [float(row["label"]) for row in rows]
    with within(path):
        task, column = _own_task("label", values, where)
    return SampleSet(
        name=folder.resolve().name,
        windows=windows,
        sampling_rates=np.array(rates),
        subjects=_own_subjects(row.get("subject", "") for row in rows),
        tasks=(task,),
        labels=(column,),
        is_test=_own_split([row["split"] for row in rows], where) if "split" in columns else None,
        ids=[row["file"] for row in rows],
    )


def _read_window(file: Path, rate: float | None) -> tuple[NDArray[np.float32], float]:
    """One sample (C, L) and its rate, Hz: an NPY, or a recording of channels of one rate."""
    if file.suffix == ".npy":
        if rate is None:
            raise InputError(f"{file}: an NPY has no clock; labels.csv needs `sampling_rate`")
        return _window(read_npy(file, RecordingError), str(file)), rate
    from normwear_fast.recordings import open_recording

    with open_recording(file, sampling_rate=rate) as recording:
        found = {channel.sampling_rate for channel in recording.channels}
        if len(found) != 1:
            raise InputError(
                f"{file}: channels at {sorted(found)} Hz; a sample has one rate for all channels"
            )
        parts: list[list[NDArray[np.float64]]] = [[] for _ in recording.channels]
        for block in recording.blocks(range(len(recording.channels))):
            for part, values in zip(parts, block, strict=True):
                part.append(values)
    channels = [np.concatenate(part) for part in parts]
    if len({len(channel) for channel in channels}) != 1:
        raise InputError(f"{file}: channels of {[len(c) for c in channels]} samples; one is right")
    return _window(np.stack(channels), str(file)), found.pop()


def _load_parquet(path: Path, label: Sequence[str]) -> SampleSet:
    table = read_parquet(path, RecordingError)
    if not table.num_rows:
        raise RecordingError(f"{path}: no row in it")
    known: tuple[Dataset, tuple[Task, ...]] | None = None
    metadata = table.schema.metadata or {}
    if PARQUET_TASKS in metadata:
        known = find_released(metadata[PARQUET_TASKS].decode("utf-8", "replace"))
    names = [task.name for task in known[1]] if known else list(label)
    for name in names:
        if name not in table.column_names:
            columns = ", ".join(table.column_names)
            raise UsageError(f"{path}: no column {name!r}; its columns: {columns}")
    where = [f"{path}, row {index}" for index in range(table.num_rows)]
    windows = _parquet_windows(table, names, path, where)
    if "sampling_rate" not in table.column_names:
        raise InputError(f"{path}: no column sampling_rate (Hz)")
    rates = table.column("sampling_rate").to_pylist()
    tasks, labels = [], []
    for index, name in enumerate(names):
        values = table.column(name).to_pylist()
        if known:
            task = known[1][index]
            column = _integers(values, where) if task.classes else _numbers(values, where)
            if task.classes and not 0 <= column.min() <= column.max() < len(task.classes):
                raise InputError(f"{path}: {name} has classes beyond 0 to {len(task.classes) - 1}")
        else:
            with within(path):
                task, column = _own_task(name, values, where)
        tasks.append(task)
        labels.append(column)
    subject = next((name for name in ("subject", "uid") if name in table.column_names), None)
    split = table.column("split").to_pylist() if "split" in table.column_names else None
    return SampleSet(
        name=known[0].key if known else path.stem,
        windows=windows,
        sampling_rates=np.array([_rate(r, w) for r, w in zip(rates, where, strict=True)]),
        subjects=_own_subjects(table.column(subject).to_pylist() if subject else [""] * len(where)),
        tasks=tuple(tasks),
        labels=tuple(labels),
        is_test=_own_split(split, where) if split else None,
        ids=[f"row {index}" for index in range(table.num_rows)],
        dataset=known[0] if known else None,
    )


def _parquet_windows(
    table: Any, labels: Sequence[str], path: Path, where: Sequence[str]
) -> list[NDArray[np.float32]]:
    """The windows: column `data`, else every list column of numbers is a channel."""
    import pyarrow as pa

    def is_list(kind: Any) -> bool:
        types = pa.types
        return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)

    names = (
        ["data"]
        if "data" in table.column_names
        else [
            field.name
            for field in table.schema
            if field.name not in (*_RESERVED, *labels)
            and is_list(field.type)
            and not is_list(field.type.value_type)
        ]
    )
    if not names or not all(is_list(table.schema.field(name).type) for name in names):
        raise InputError(f"{path}: no column `data` of lists, and no list column a channel")
    windows = []
    columns = [table.column(name) for name in names]
    for index, place in enumerate(where):
        values = [column[index].values for column in columns]
        if any(value is None for value in values):
            raise InputError(f"{place}: no data")
        if len(names) == 1 and is_list(values[0].type):
            values = [inner.values for inner in values[0]]
        if any(value is None for value in values):
            raise InputError(f"{place}: a channel is null; a list of its samples is right")
        lengths = {len(value) for value in values}
        if len(lengths) != 1:
            raise InputError(f"{place}: channels of {sorted(lengths)} samples; one length is right")
        with reading(place, InputError, "data is no list of numbers a channel"):
            # A null is a missing sample: pandas writes NaN so, and NumPy gets NaN of it again.
            data = np.stack([np.asarray(value) for value in values])
        windows.append(_window(data, place))
    return windows


def _load_npz(path: Path) -> SampleSet:
    held = read_npz(path, RecordingError)
    needed = ("x_train", "y_train", "x_test", "y_test", "sampling_rate")
    missing = [name for name in needed if name not in held]
    if missing:
        raise RecordingError(f"{path}: it lacks {', '.join(missing)}")
    halves = [held["x_train"], held["x_test"]]
    for name, x in zip(("train", "test"), halves, strict=True):
        if x.ndim != 3 or x.dtype.kind not in "biuf" or 0 in x.shape:
            raise InputError(
                f"{path}: x_{name} is {x.dtype} of shape {x.shape}; (samples, channels, time) "
                "would be right"
            )
        if held[f"y_{name}"].shape[:1] != x.shape[:1]:
            raise InputError(f"{path}: x_{name} and y_{name} differ in length")
    rate = _rate(held["sampling_rate"], str(path))
    labels = [value for half in ("y_train", "y_test") for value in held[half].tolist()]
    sizes = [len(x) for x in halves]
    ids = [f"train {i}" for i in range(sizes[0])] + [f"test {i}" for i in range(sizes[1])]
    with within(path):
        task, column = _own_task("label", labels, [f"{path}, {name}" for name in ids])
    return SampleSet(
        name=path.stem,
        windows=[np.ascontiguousarray(w, dtype=np.float32) for x in halves for w in x],
        sampling_rates=np.full(sum(sizes), rate),
        subjects=np.full(sum(sizes), ""),
        tasks=(task,),
        labels=(column,),
        is_test=np.repeat([False, True], sizes),
        ids=ids,
    )
