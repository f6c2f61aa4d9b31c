"""A table of labels, and the labelled windows of the recordings that it names."""

from __future__ import annotations

import contextlib
import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from normwear_fast.encode.pipeline import (
    default_tokens,
    plan_jobs,
    plan_run,
)
from normwear_fast.encode.prepare import OK
from normwear_fast.encode.readers import Readers
from normwear_fast.encode.settings import check_duration, join_names
from normwear_fast.encode.survey import Surveyed, find_inputs, only_named, survey
from normwear_fast.encode.windows import (
    ListedWindows,
    Tiling,
    WindowList,
    _seconds,
    _text,
    duration_of,
    table_rows,
)
from normwear_fast.errors import InputError, UsageError, within
from normwear_fast.evaluate.registry import Task
from normwear_fast.evaluate.samples import _parse_label
from normwear_fast.finetune.data import (
    LabelledWindows,
    Origin,
    Preparation,
    TaskKind,
    as_float,
    check_splits,
    common_duration,
    task_of,
    with_channels,
)

MOST_WINDOWS = 10_000_000
"""Of one labelled stretch: two years of windows of 6 s. Milliseconds taken for seconds make more."""


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
        splits = check_splits([row.get("split") for row in rows], where)
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
                values = [as_float(v) if isinstance(v, int) else v for v in parsed]
            else:
                values = parsed
        found.append(task_of(name, values, where, task))
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
            preparation = replace(preparation, window=common_duration(table.durations))
    settings = preparation.settings(windows=windows, rate=rate)
    found = only_named(find_inputs(inputs, output), set(table.recordings), f"{table.path}:")
    rows_of_recording = {name: row for row, name in enumerate(table.recordings)}
    with contextlib.closing(Readers(workers)) as readers:
        surveyed = survey(found, settings, windows, look=readers.look)
        errors = [entry.error for entry in surveyed if entry.error is not None]
        if len(errors) == len(surveyed):
            more = f" (of {len(errors)} recordings the first)" if len(errors) > 1 else ""
            raise InputError(f"no recording gives a labelled window: {errors[0]}{more}")
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
    return with_channels(
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
