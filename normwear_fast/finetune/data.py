"""Labelled windows: from arrays, from a sample set; labels.py has those of recordings."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from normwear_fast.config import LARGEST_SAMPLE, MIN_SAMPLES, SAMPLING_RATE
from normwear_fast.encode.prepare import MISSING, NO_DATA, OK, TOO_LARGE
from normwear_fast.encode.settings import EncodeSettings, join_names, window_samples
from normwear_fast.encode.windows import (
    WindowList,
    _text,
)
from normwear_fast.errors import InputError, UsageError
from normwear_fast.evaluate.registry import Task
from normwear_fast.evaluate.samples import SampleSet, _own_task, _parse_label
from normwear_fast.inputs import rate_list, window_list
from normwear_fast.mne import with_own_rate
from normwear_fast.preprocess import prepare_window

SPLITS = ("train", "validation", "test")

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
        kind, column = task_of("label", values, where, task)
        preparation = Preparation(
            window=common_duration([a.shape[1] / r for a, r in zip(arrays, rates, strict=True)]),
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
            None if split is None else np.array(check_splits(split, where)),
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
            window=common_duration(
                [w.shape[1] / r for w, r in zip(samples.windows, rates, strict=True)]
            ),
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
    return with_channels(data)


def with_channels(data: LabelledWindows) -> LabelledWindows:
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


def common_duration(durations: Sequence[float]) -> float | None:
    """The windows' one duration, s; None where they have several numbers of samples."""
    samples = {window_samples(duration) for duration in durations}
    return durations[0] if len(samples) == 1 else None


def task_of(
    name: str, values: list[Any], where: Sequence[str], kind: TaskKind
) -> tuple[Task, NDArray[Any]]:
    """Task and column of labels, whose type says what they are unless ``kind`` does."""
    if kind == "regression":
        for value, place in zip(values, where, strict=True):
            if isinstance(value, str) and isinstance(_parse_label(value), str):
                raise InputError(f"{place}: {name} is {value!r}; a number is right for regression")
        values = [as_float(v) if isinstance(v, int | str) else v for v in values]
    elif kind == "classification":
        values = [_class_name(value) for value in values]
    task, column = _own_task(name, values, where)
    if task.kind == "class" and len(task.classes) < 2:
        raise InputError(f"{name}: class {task.classes[0]!r} alone; two or more are right")
    return task, column


def as_float(value: int | str) -> float:
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


def check_splits(values: Iterable[Any], where: Sequence[str]) -> list[str]:
    found = []
    for value, place in zip(values, where, strict=True):
        name = _text(value)
        if name not in SPLITS:
            raise InputError(f"{place}: split is {name!r}; it must be train, validation or test")
        found.append(name)
    return found
