"""Labelled windows: from recordings and a table of labels, from a sample set, or from arrays."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from normwear_fast.config import LARGEST_SAMPLE, MIN_SAMPLES, SAMPLING_RATE
from normwear_fast.encode.pipeline import (
    default_tokens,
    find_inputs,
    plan_jobs,
    plan_run,
    survey_inputs,
)
from normwear_fast.encode.prepare import MISSING, NO_DATA, OK, TOO_LARGE
from normwear_fast.encode.readers import Readers
from normwear_fast.encode.settings import EncodeSettings, check_duration, join_names, window_samples
from normwear_fast.encode.survey import Surveyed
from normwear_fast.encode.windows import (
    ListedWindows,
    Tiling,
    WindowList,
    _seconds,
    _text,
    duration_of,
    table_rows,
)
from normwear_fast.errors import InputError, UsageError, require, within
from normwear_fast.evaluate.registry import Task
from normwear_fast.evaluate.samples import SampleSet, _own_task, _parse_label
from normwear_fast.inputs import rate_list, window_list
from normwear_fast.mne import with_own_rate
from normwear_fast.preprocess import prepare_window
from normwear_fast.recordings.base import FoundRecording

SPLITS = ("train", "validation", "test")

MOST_WINDOWS = 10_000_000
"""Of one labelled stretch: two years of windows of 6 s. Milliseconds taken for seconds make more."""

TaskKind = Literal["auto", "classification", "regression"]


# --- how a window comes to be ----------------------------------------------------------------------


@dataclass(frozen=True)
class Preparation:
    """What was done to the signals a head was trained on, and is done to those it predicts on.

    Args:
        window: seconds of a window; None where the training windows differ.
        hop: seconds from one window's start to the next.
        channels: names, in order; None where the training windows had none.
        channel_count: how many.
        preprocess: ``reference`` is how the pretraining data were made; ``none`` only resamples.
        normalize: ``none``, or ``window`` for zero mean and unit deviation.
        max_missing: largest fraction of missing samples a window's channel may have.
    """

    window: float | None = 6.0
    hop: float | None = None
    channels: tuple[str, ...] | None = None
    channel_count: int = 0
    preprocess: str = "reference"
    normalize: str = "none"
    max_missing: float = 0.1

    def settings(
        self,
        *,
        hop: float | None = None,
        windows: WindowList | None = None,
        rate: float | None = None,
        pool: str = "mean",
        precision: str = "auto",
    ) -> EncodeSettings:
        """The same as settings of the pipeline; raises its UsageErrors."""
        return EncodeSettings(
            window=self.window,
            hop=hop if hop is not None else self.hop,
            windows=windows.digest if windows else None,
            channels=self.channels,
            preprocess=self.preprocess,
            normalize=self.normalize,
            max_missing=self.max_missing,
            rate=rate,
            pool=pool,
            precision=precision,
        )

    def describe_channels(self) -> str:
        """For errors: `2 channels (ECG, PPG)`."""
        names = f" ({join_names(self.channels)})" if self.channels else ""
        return f"{self.channel_count} channel{'s' * (self.channel_count != 1)}{names}"


def prepare_windows(
    windows: Sequence[NDArray[Any]],
    rates: Sequence[float],
    preparation: Preparation,
) -> tuple[list[NDArray[np.float32] | None], list[str]]:
    """Arrays as the pipeline makes windows of recordings: gaps filled, 65 Hz, preprocessed.

    Args:
        windows: (C_i, L_i), the signal's own units, NaN where missing.
        rates: Hz, one a window.

    Returns:
        (C_i, round(L_i / rate * 65)) float32 each, or None, and the status: "ok" or why not.

    Raises:
        InputError: a window shorter than the model takes, named by its place.
    """
    prepared: list[NDArray[np.float32] | None] = []
    statuses: list[str] = []
    for index, (window, rate) in enumerate(zip(windows, rates, strict=True)):
        samples = round(window.shape[1] / rate * SAMPLING_RATE)
        if samples < MIN_SAMPLES:
            raise InputError(
                f"window {index} has {samples} samples at {SAMPLING_RATE:g} Hz; "
                f"{MIN_SAMPLES} are needed"
            )
        data, status = _prepare(window.astype(np.float64), rate, samples, preparation)
        prepared.append(data)
        statuses.append(status)
    return prepared, statuses


def _prepare(
    window: NDArray[np.float64], rate: float, samples: int, preparation: Preparation
) -> tuple[NDArray[np.float32] | None, str]:
    missing = float(np.mean(~np.isfinite(window), axis=1).max())
    if missing > preparation.max_missing:
        return None, MISSING
    try:
        data = prepare_window(
            [(channel, rate, 0.0) for channel in window],
            samples,
            preprocess=cast('Literal["none", "reference"]', preparation.preprocess),
            normalize=cast('Literal["none", "window"]', preparation.normalize),
        ).data
    except InputError:
        return None, TOO_LARGE
    if data is not None and np.abs(data).max() > LARGEST_SAMPLE:
        return None, TOO_LARGE
    return (data, OK) if data is not None else (None, NO_DATA)


# --- labelled windows ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Origin:
    """Where a window comes from, as the output tables name it."""

    recording: str
    window_id: str
    start: float
    duration: float


@dataclass
class LabelledWindows:
    """What a head is trained on.

    Args:
        windows: (C, L_i) float32 at 65 Hz, prepared and finite; all of one number of channels.
        labels: (n,) int64 classes, or (n, targets) float64.
        task: what the labels mean.
        subjects: (n,) text; "" where nothing says who it was.
        origins: one a window.
        preparation: how they were made.
        split: (n,) of ``train``, ``validation``, ``test``, or None where it is still to be drawn.
        skipped: windows left out, by why.
        failed: recordings that could not be read, and why.
        notes: what a reader of the results should know.
    """

    windows: list[NDArray[np.float32]]
    labels: NDArray[Any]
    task: Task
    subjects: NDArray[np.str_]
    origins: list[Origin]
    preparation: Preparation
    split: NDArray[np.str_] | None = None
    skipped: dict[str, int] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.windows)

    @classmethod
    def from_arrays(
        cls,
        windows: ArrayLike | Sequence[ArrayLike],
        labels: Sequence[Any] | NDArray[Any] | Tensor,
        sampling_rate: float | Sequence[float] = SAMPLING_RATE,
        *,
        subjects: Sequence[str] | None = None,
        split: Sequence[str] | None = None,
        channels: Sequence[str] | None = None,
        task: TaskKind = "auto",
        preprocess: Literal["reference", "none"] = "reference",
        normalize: Literal["none", "window"] = "none",
        max_missing: float = 0.1,
    ) -> LabelledWindows:
        """Windows that are arrays already.

        Args:
            windows: one array (B, C, L), or (C, L_i) arrays; the signal's own units, NaN where
                missing.
            labels: one a window: text, booleans and integers are classes, floating-point numbers
                (or lists of them) targets, unless ``task`` says otherwise.
            sampling_rate: Hz, one number or one a window.
            subjects: who each window is of; keeps a person out of training and validation both.
            split: ``train``, ``validation`` or ``test`` a window; drawn where None.
            channels: their names, which recordings to be predicted must then have.
            task: ``classification`` or ``regression``, where the labels' type does not say it.
            preprocess, normalize, max_missing: as of :class:`Preparation`.

        Raises:
            InputError: windows of other forms, or labels, subjects and windows that do not match.
        """
        windows, sampling_rate = with_own_rate(windows, sampling_rate)
        arrays = window_list(windows)
        count = len(arrays)
        for name, given in (("labels", labels), ("subjects", subjects), ("split", split)):
            if given is not None and np.shape(given) == ():
                raise InputError(f"{name} is {given!r}; one a window is right")
            if given is not None and len(given) != count:
                raise InputError(f"{len(given)} {name} for {count} windows")
        if not count:
            raise InputError("no labelled window")
        rates = rate_list(sampling_rate, count)
        where = [f"window {index}" for index in range(count)]
        values = labels.tolist() if isinstance(labels, np.ndarray | Tensor) else list(labels)
        kind, column = _task("label", values, where, task)
        preparation = Preparation(
            window=_common([a.shape[1] / r for a, r in zip(arrays, rates, strict=True)]),
            channels=tuple(channels) if channels is not None else None,
            preprocess=preprocess,
            normalize=normalize,
            max_missing=max_missing,
        )
        return _of_arrays(
            arrays,
            rates,
            column,
            kind,
            np.array(subjects if subjects is not None else [""] * count, dtype=str),
            where,
            preparation,
            None if split is None else np.array(_check_splits(split, where)),
        )

    @classmethod
    def from_samples(
        cls,
        samples: SampleSet,
        *,
        label: str | None = None,
        preprocess: str = "reference",
        normalize: str = "none",
        max_missing: float = 0.1,
    ) -> LabelledWindows:
        """The windows of a data set in the forms that ``probe`` reads.

        Args:
            samples: of :func:`normwear_fast.evaluate.load_samples`. The samples of a public set have
                been through the reference preprocessing: they are taken as they are, and what is
                predicted later is given it.
            label: which of several tasks.
            preprocess, normalize, max_missing: as of :class:`Preparation`.

        Raises:
            UsageError: several tasks and none chosen, or no task of that name.
        """
        names = [task.name for task in samples.tasks]
        if label is None and len(names) == 1:
            label = names[0]
        if label not in names:
            asked = f"has no task {label!r}" if label is not None else "has several tasks"
            raise UsageError(f"{samples.name}: {asked}; choose one of {', '.join(names)}")
        place = names.index(label)
        known = samples.dataset
        rates = samples.sampling_rates.tolist()
        preparation = Preparation(
            window=_common([w.shape[1] / r for w, r in zip(samples.windows, rates, strict=True)]),
            channels=known.channels if known else None,
            preprocess="none" if known else preprocess,
            normalize=normalize,
            max_missing=max_missing,
        )
        split = None
        if samples.is_test is not None:
            split = np.where(samples.is_test, "test", "")
        data = _of_arrays(
            samples.windows,
            rates,
            samples.labels[place],
            samples.tasks[place],
            samples.subjects,
            samples.ids,
            preparation,
            split,
        )
        if known:
            data.preparation = replace(data.preparation, preprocess="reference")
        return data


def _of_arrays(
    windows: Sequence[NDArray[Any]],
    rates: Sequence[float],
    labels: NDArray[Any],
    task: Task,
    subjects: NDArray[np.str_],
    ids: Sequence[str],
    preparation: Preparation,
    split: NDArray[np.str_] | None,
) -> LabelledWindows:
    prepared, statuses = prepare_windows(windows, rates, preparation)
    kept = np.array([status == OK for status in statuses])
    data = LabelledWindows(
        windows=[window for window in prepared if window is not None],
        labels=labels[kept],
        task=task,
        subjects=subjects[kept],
        origins=[
            Origin(ids[i], "0", 0.0, windows[i].shape[1] / rates[i])
            for i in np.flatnonzero(kept).tolist()
        ],
        preparation=preparation,
        split=None if split is None else split[kept],
        skipped=dict(Counter(status for status in statuses if status != OK)),
    )
    return _with_channels(data)


def _with_channels(data: LabelledWindows) -> LabelledWindows:
    """The same with its number of channels known, which must be one and fit their names."""
    if not data.windows:
        why = ", ".join(f"{count} for {status}" for status, count in data.skipped.items())
        raise InputError(f"no labelled window is left{f'; skipped: {why}' if why else ''}")
    count = len(data.windows[0])
    for window, origin in zip(data.windows, data.origins, strict=True):
        if len(window) != count:
            raise InputError(
                f"{origin.recording} has {len(window)} channels and {data.origins[0].recording} "
                f"{count}; all windows must have the same"
            )
    names = data.preparation.channels
    if names is not None and len(names) != count:
        raise InputError(f"{len(names)} channel names for windows of {count} channels")
    data.preparation = replace(data.preparation, channel_count=count)
    return data


def _common(durations: Sequence[float]) -> float | None:
    """The windows' one duration, s; None where they have several numbers of samples."""
    samples = {window_samples(duration) for duration in durations}
    return durations[0] if len(samples) == 1 else None


def _task(
    name: str, values: list[Any], where: Sequence[str], kind: TaskKind
) -> tuple[Task, NDArray[Any]]:
    """Task and column of labels, whose type says what they are unless ``kind`` does."""
    if kind == "regression":
        for value, place in zip(values, where, strict=True):
            if isinstance(value, str) and isinstance(_parse_label(value), str):
                raise InputError(f"{place}: {name} is {value!r}; a number is right for regression")
        values = [_as_float(v) if isinstance(v, int | str) else v for v in values]
    elif kind == "classification":
        values = [_class_name(value) for value in values]
    task, column = _own_task(name, values, where)
    if task.kind == "class" and len(task.classes) < 2:
        raise InputError(f"{name}: class {task.classes[0]!r} alone; two or more are right")
    return task, column


def _as_float(value: int | str) -> float:
    """The same; what no floating-point number can hold is infinite, which no target may be."""
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _class_name(value: Any) -> Any:
    """A label as text, the shortest of a number: 1.0 and 1 are the same class. Missing ones stay."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return value
    return f"{value:g}" if isinstance(value, float) else str(value)


def _check_splits(values: Iterable[Any], where: Sequence[str]) -> list[str]:
    found = []
    for value, place in zip(values, where, strict=True):
        name = _text(value)
        if name not in SPLITS:
            raise InputError(f"{place}: split is {name!r}; it must be train, validation or test")
        found.append(name)
    return found


# --- recordings and a table of labels --------------------------------------------------------------


@dataclass(frozen=True)
class LabelTable:
    """Which stretches of which recordings have which label.

    Args:
        path: the file, for errors.
        task: what the labels mean.
        labels: one a row: (n,) int64 classes or (n, targets) float64.
        recordings: the rows' recordings.
        stretches: (start, duration) of each row in seconds; None where rows are whole recordings.
        subjects: of each row: the recording itself where the table names none.
        splits: of each row, or None.
        sha256: of the file.
    """

    path: Path
    task: Task
    labels: NDArray[Any]
    recordings: list[str]
    stretches: list[tuple[float, float]] | None
    subjects: list[str]
    splits: list[str] | None
    sha256: str

    @property
    def durations(self) -> list[float]:
        return [duration for _, duration in self.stretches or ()]

    def window_list(
        self, window: float | None, hop: float | None
    ) -> tuple[WindowList, dict[tuple[str, str], int], int]:
        """The windows of the stretches.

        Args:
            window, hop: seconds, to cut windows out of the stretches; a stretch is a window where
                ``window`` is None.

        Returns:
            the windows, the row of each (recording, window id), and how many stretches are shorter
            than a window.

        Raises:
            InputError: all stretches are shorter.
        """
        assert self.stretches is not None
        columns: dict[str, tuple[list[str], list[float], list[float]]] = {}
        row_of: dict[tuple[str, str], int] = {}
        short = 0
        for row, (recording, (start, duration)) in enumerate(
            zip(self.recordings, self.stretches, strict=True)
        ):
            ids, starts, durations = columns.setdefault(recording, ([], [], []))
            if window is not None and duration / (hop or window) > MOST_WINDOWS:
                raise InputError(
                    f"{self.path}: a stretch of {duration:g} s in {recording} is more than "
                    f"{MOST_WINDOWS:,} windows; are these seconds?"
                )
            if window is None:
                cut = [(str(row), start, duration)]
            else:
                tiles = Tiling.over(duration, window, hop or window)
                cut = [(f"{row}-{tile.id}", start + tile.start, window) for tile in tiles]
                short += not cut
            for window_id, begin, length in cut:
                row_of[recording, window_id] = row
                ids.append(window_id)
                starts.append(begin)
                durations.append(length)
        if not row_of:
            raise InputError(f"{self.path}: every row is shorter than a window of {window:g} s")
        listed = {
            recording: ListedWindows(ids, np.array(starts), np.array(durations))
            for recording, (ids, starts, durations) in columns.items()
            if ids
        }
        return WindowList(listed, self.sha256), row_of, short


def read_labels(
    path: str | Path, *, columns: Sequence[str] | None = None, task: TaskKind = "auto"
) -> LabelTable:
    """Reads a table of labels.

    Args:
        path: CSV or Parquet with ``recording`` and the label columns, and optionally ``start_s`` with
            ``duration_s`` or ``end_s``, ``subject``, and ``split`` (train, validation, test).
        columns: the label, or several regression targets; by default ``label``, or else ``value``,
            which is a target.
        task: ``auto``: text and integers are classes, floating-point numbers targets.

    Raises:
        UsageError: no such file or column.
        InputError: a row without a label, a recording twice, a stretch that cannot be (named).
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"{path}: no such table of labels; name a CSV or Parquet file")
    if columns is not None and (len(columns) != len(set(columns)) or not columns):
        raise UsageError("name every label column once")
    names: list[str] = []
    wanted = list(columns or ["label"])

    def check(found: Iterable[str]) -> None:
        names.extend(found)
        if columns is None and "label" not in names and "value" in names:
            wanted[:] = ["value"]
        missing = [name for name in ("recording", *wanted) if name not in names]
        if "start_s" in names and not {"duration_s", "end_s"} & set(names):
            missing.append("duration_s or end_s")
        if missing:
            raise UsageError(
                f"{path}: no column {', '.join(missing)}; it has {', '.join(names) or 'none'}"
            )

    rows, where = [], []
    for place, row in table_rows(path, check):
        where.append(place)
        rows.append(row)
    if not rows:
        raise UsageError(f"{path} has no rows")
    recordings = [_text(row.get("recording")) for row in rows]
    if "" in recordings:
        raise InputError(f"{where[recordings.index('')]}: no recording is named")
    stretches = None
    if "start_s" in names:
        stretches = [_stretch(row, place) for row, place in zip(rows, where, strict=True)]
    else:
        twice = [name for name, count in Counter(recordings).items() if count > 1]
        if twice:
            raise InputError(
                f"{path}: recording {twice[0]!r} has several rows; with start_s and duration_s each "
                "can label a stretch of it"
            )
    if columns is None and wanted == ["value"] and task == "auto":
        task = "regression"
    with within(path):
        kind, labels = _labels(rows, wanted, where, task)
    subjects = recordings
    if "subject" in names:
        subjects = [_text(row.get("subject")) for row in rows]
        if "" in subjects:
            raise InputError(f"{where[subjects.index('')]}: no subject; every row needs one")
    splits = None
    if "split" in names:
        splits = _check_splits([row.get("split") for row in rows], where)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return LabelTable(path, kind, labels, recordings, stretches, list(subjects), splits, digest)


def _stretch(row: dict[str, Any], where: str) -> tuple[float, float]:
    start = _seconds(row.get("start_s"), "start_s", where)
    duration = duration_of(row, start, where)
    check_duration(duration, f"{where}: a stretch")
    return start, duration


def _labels(
    rows: Sequence[dict[str, Any]], columns: Sequence[str], where: Sequence[str], task: TaskKind
) -> tuple[Task, NDArray[Any]]:
    """Task and labels of the rows; several columns are several targets."""
    found = []
    for name in columns:
        values = [row.get(name) for row in rows]
        if any(isinstance(value, str) for value in values):  # CSV knows text only
            parsed = [_parse_label(v.strip()) if isinstance(v, str) else v for v in values]
            if any(isinstance(value, str) and value for value in parsed):
                values = [v.strip() if isinstance(v, str) else v for v in values]
            elif any(isinstance(value, float) for value in parsed):
                values = [_as_float(v) if isinstance(v, int) else v for v in parsed]
            else:
                values = parsed
        found.append(_task(name, values, where, task))
    if len(found) == 1:
        kind, labels = found[0]
        if kind.kind == "reg" and len(kind.targets) == 1:
            kind = replace(kind, targets=tuple(columns))
        return kind, labels
    for name, (kind, _) in zip(columns, found, strict=True):
        if kind.kind == "class":
            raise InputError(
                f"column {name}: several label columns are regression targets; write them as "
                "floating-point numbers, or ask for regression"
            )
    name = ", ".join(columns)
    return replace(found[0][0], name=name, targets=tuple(columns)), np.concatenate(
        [labels for _, labels in found], axis=1
    )


def read_labelled(
    inputs: Sequence[str | Path],
    table: LabelTable,
    preparation: Preparation,
    *,
    rate: float | None = None,
    workers: int = 0,
    output: str | Path | None = None,
) -> LabelledWindows:
    """The labelled windows of recordings, read, cut and prepared as ``encode`` does.

    Args:
        inputs: files and folders; recordings that the table does not name are left out.
        table: the labels. Rows that are stretches are cut into windows of ``preparation.window``, or
            are a window each where that is None; whole recordings are cut into windows.
        preparation: how; its channels are all of a recording's where None.
        rate: Hz, of recordings whose format has no clock.
        workers: reader processes; 0 reads here.
        output: a folder in which no input is looked for.

    Raises:
        UsageError: a recording of the table is not there, or a channel none has.
        InputError: recordings differ in their channels, or no window is left.
    """
    windows: WindowList | None = None
    row_of: dict[tuple[str, str], int] = {}
    notes: list[str] = []
    if table.stretches is not None:
        windows, row_of, short = table.window_list(preparation.window, preparation.hop)
        if short:
            notes.append(f"{short} rows are shorter than a window of {preparation.window:g} s")
        if preparation.window is None:
            preparation = replace(preparation, window=_common(table.durations))
    settings = preparation.settings(windows=windows, rate=rate)
    found = _named(find_inputs(inputs, output), table)
    rows_of_recording = {name: row for row, name in enumerate(table.recordings)}
    with contextlib.closing(Readers(workers)) as readers:
        surveyed = survey_inputs(found, settings, windows, look=readers.look)
        channels = _same_channels(surveyed)
        settings = default_tokens(settings, "cpu")
        plan = plan_run(surveyed, settings, windows)
        jobs = plan_jobs(plan, set(), settings, windows)
        units = sorted(readers.prepare(jobs, settings, lambda: False), key=lambda unit: unit.index)
    failed = {entry.id: entry.error for entry in surveyed if entry.error is not None}
    kept: list[int] = []
    origins: list[Origin] = []
    skipped: Counter[str] = Counter()
    for unit in units:
        failed |= unit.failed
        for row in unit.rows:
            if row.status != OK:
                skipped[row.status] += 1
                continue
            window = row.window
            place = row_of.get((row.recording, window.id)) if windows else None
            kept.append(rows_of_recording[row.recording] if place is None else place)
            origins.append(Origin(row.recording, window.id, window.start, window.duration))
    return _with_channels(
        LabelledWindows(
            windows=[window for unit in units for window in unit.data],
            labels=table.labels[kept],
            task=table.task,
            subjects=np.array([table.subjects[row] for row in kept], dtype=str),
            origins=origins,
            preparation=replace(
                preparation, hop=preparation.hop if windows else settings.hop, channels=channels
            ),
            split=np.array([table.splits[row] for row in kept]) if table.splits else None,
            skipped=dict(skipped),
            failed=failed,
            notes=notes,
        )
    )


def _named(found: Sequence[FoundRecording], table: LabelTable) -> list[FoundRecording]:
    """The recordings that the table names, all of which must be there."""
    names = set(table.recordings)
    missing = sorted(names - {item.id for item in found})
    if missing:
        known = ", ".join(item.id for item in found[:5]) + (", ..." if len(found) > 5 else "")
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise UsageError(
            f"{table.path}: names recording {', '.join(missing[:3])}{more}, which is not among the "
            f"inputs; they are {known}"
        )
    return [item for item in found if item.id in names]


def _same_channels(surveyed: Sequence[Surveyed]) -> tuple[str, ...] | None:
    first: Surveyed | None = None
    for entry in surveyed:
        if not entry.windows:
            continue
        if first is None:
            first = entry
        elif entry.channels != first.channels:
            raise InputError(
                f"recordings differ in their channels: {first.id} has {join_names(first.channels)}; "
                f"{entry.id} has {join_names(entry.channels)}. Name the ones to take with --channels"
            )
    return first.channels if first else None


# --- who trains and who validates ------------------------------------------------------------------


@dataclass(frozen=True)
class Split:
    """Ascending indices of the windows of each part; no subject that is known is in two of them."""

    train: NDArray[np.intp]
    validation: NDArray[np.intp]
    test: NDArray[np.intp]


def split_windows(data: LabelledWindows, fraction: float, seed: int) -> Split:
    """The split that the data bring, completed by a validation part where they name none.

    The validation part is drawn by subject, as alike in classes as whole subjects allow (scikit-learn's
    StratifiedGroupKFold); where no window names a subject, by window and class.

    Args:
        fraction: of the training subjects (or windows) that validate, at least one.
        seed: of the draw.

    Raises:
        InputError: a subject in two parts, one subject alone, or a class that only the validation
            part has.
    """
    given = data.split if data.split is not None else np.full(len(data), "")
    test = np.flatnonzero(given == "test")
    validation = np.flatnonzero(given == "validation")
    train = np.flatnonzero((given == "train") | (given == ""))
    if not len(train):
        raise InputError("no window is left to train on; all of them validate or test")
    if not len(validation):
        drawn = _draw(data, train, fraction, seed)
        train, validation = train[~drawn], train[drawn]
    split = Split(train, validation, test)
    _check_split(data, split, given_by_user=(given == "train").any())
    return split


def _draw(
    data: LabelledWindows, train: NDArray[np.intp], fraction: float, seed: int
) -> NDArray[np.bool_]:
    """Which of the training windows validate."""
    y, subjects = data.labels[train], data.subjects[train]
    if (subjects == "").all():
        data.notes.append(
            "no window names a subject: the validation part is drawn by window, and may hold people "
            "of the training part"
        )
        from normwear_fast.evaluate.splits import stratified_part

        drawn = np.zeros(len(train), dtype=bool)
        drawn[stratified_part(y, np.arange(len(train)), fraction, seed)] = True
        return drawn
    names = np.unique(subjects)
    if len(names) < 2:
        raise InputError(
            f"one subject only ({str(names[0])!r}) to train and validate on: two or more are needed, "
            "or a split column"
        )
    require("sklearn.model_selection", "a split by subject", "train")
    from sklearn.model_selection import GroupKFold, StratifiedGroupKFold

    folds = min(len(names), max(2, round(1 / fraction)))
    kind = GroupKFold if data.task.kind == "reg" else StratifiedGroupKFold
    target = y if y.ndim == 1 else y[:, 0]
    drawn = np.zeros(len(train), dtype=bool)
    best = -1
    for _, chosen in kind(n_splits=folds, shuffle=True, random_state=seed).split(
        np.empty((len(y), 1)), target, subjects
    ):
        rest = np.ones(len(train), dtype=bool)
        rest[chosen] = False
        if not rest.any() or not len(chosen):
            continue
        # A class that only validates cannot be learned; one that only trains is not judged.
        lost = 0
        if data.task.kind == "class":
            lost = len(np.setdiff1d(y[chosen], y[rest])) * len(data.task.classes)
            lost += len(np.setdiff1d(y[rest], y[chosen]))
        if best < 0 or lost < best:
            best, drawn = lost, ~rest
        if not lost:
            break
    return drawn


def _check_split(data: LabelledWindows, split: Split, *, given_by_user: bool) -> None:
    parts = {name: getattr(split, name) for name in SPLITS}
    people = {
        name: {s for s in data.subjects[index].tolist() if s} for name, index in parts.items()
    }
    for first, second in (("train", "validation"), ("train", "test"), ("validation", "test")):
        both = people[first] & people[second]
        if not both:
            continue
        if given_by_user:
            raise InputError(
                f"subject {min(both)!r} is in both {first} and {second}; the results would not say "
                "how new people are done"
            )
        data.notes.append(f"{len(both)} subjects are in both {first} and {second}, as published")
    if data.task.kind != "class":
        return
    seen = np.unique(data.labels[split.train])
    for name in ("validation", "test"):
        for label in np.setdiff1d(data.labels[parts[name]], seen):
            who = people[name] & {str(s) for s in data.subjects[data.labels == label]}
            raise InputError(
                f"class {data.task.classes[label]!r} is in {name} only"
                f"{f' (subject {min(who)!r})' if who else ''}; a split with every class in training "
                "would be right"
            )
    if len(seen) < 2:
        raise InputError(
            f"class {data.task.classes[seen[0]]!r} alone in training; two or more are needed"
        )
