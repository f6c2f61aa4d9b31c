"""Pretraining's series: shards on disk, mapped into memory, and the batches drawn from them."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from normwear_fast.config import SAMPLING_RATE
from normwear_fast.errors import InputError, UsageError, one_line

if TYPE_CHECKING:
    import pyarrow as pa

SERIES = "series"
"""The column of a shard that holds a window's samples: a list a channel."""

SERIES_SAMPLES = round(6 * SAMPLING_RATE)
"""390: six seconds at 65 Hz."""

FIRST_SAMPLE = 1
"""Of the 390, training takes 1 to 388: the scalogram's two differences look two samples back."""

ORIGINALS = 0.1
"""Share of the series that mixup leaves as they are; the other nine tenths are mixed."""

SCAN_VALUES = 2**22
"""Samples checked at a time when shards are opened: 16 MB."""

FLAT, NOT_FINITE, SHORT, DAMAGED = "flat channel", "not finite", "short series", "damaged shard"


class Series(Protocol):
    """Numbered series, each (C, L) float32."""

    def __len__(self) -> int: ...
    def series(self, index: int) -> NDArray[np.float32]: ...


def channel_faults(values: NDArray[np.float32]) -> NDArray[np.str_]:
    """Why each row of ``values`` (n, L) cannot be trained on; empty for those that can.

    A flat channel says nothing, and a model that has to reconstruct zeros from zeros learns to.
    """
    finite = np.isfinite(values).all(axis=1)
    flat = values.min(axis=1) == values.max(axis=1)
    return np.where(~finite, NOT_FINITE, np.where(flat, FLAT, ""))


class SeriesShards:
    """The series of a folder of shards, memory-mapped and checked once on opening.

    A shard is an Arrow file (mapped: worker processes share its pages) or a Parquet file (decoded
    into memory) with a column ``series`` of one list a channel, as `normwear-fast prepare` writes.
    What cannot be trained on is left out and counted: channels that are flat, not finite or too
    short, windows with no channel left, shards that are cut off.

    Args:
        folder: holds ``*.arrow`` or ``*.parquet``, itself or in folders below it.
        samples: of every series; longer ones are cut to their first.

    Attributes:
        skipped: what was left out, by reason: channels, and whole shards.

    Raises:
        UsageError: no such folder, no shard in it, or nothing in them to train on.
    """

    def __init__(self, folder: str | Path, *, samples: int = SERIES_SAMPLES) -> None:
        self.folder, self.samples = Path(folder), samples
        self.skipped: Counter[str] = Counter()
        paths = sorted(
            path for path in self.folder.rglob("*") if path.suffix in (".arrow", ".parquet")
        )
        if not paths:
            what = "no *.arrow or *.parquet there" if self.folder.is_dir() else "no such folder"
            raise UsageError(f"{self.folder}: {what}; name an output of normwear-fast prepare")
        self._values: list[NDArray[np.float32]] = []
        places: list[tuple[NDArray[np.int64], ...]] = []
        for path in paths:
            try:
                for column in _read(path):
                    places.append(self._index(column, path))
            except _Damaged as damage:
                self.skipped[DAMAGED] += 1
                warnings.warn(f"{path}: left out: {damage}", stacklevel=2)
        # Of every usable channel: the chunk of values it lies in, its first sample, its window.
        chunks, starts, counts = (
            np.concatenate([place[i] for place in places] or [np.empty(0, np.int64)])
            for i in range(3)
        )
        if not len(counts):
            raise UsageError(
                f"{self.folder}: nothing to train on; left out were "
                + ", ".join(f"{count} of {why}" for why, count in self.skipped.items())
            )
        self._chunks, self._starts = chunks, starts
        self._first = np.concatenate([[0], np.cumsum(counts)])

    def __len__(self) -> int:
        return len(self._first) - 1

    def series(self, index: int) -> NDArray[np.float32]:
        """Window ``index`` as (C, samples) float32: its usable channels, in their order."""
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        channels = slice(self._first[index], self._first[index + 1])
        return np.stack(
            [
                self._values[chunk][start : start + self.samples]
                for chunk, start in zip(self._chunks[channels], self._starts[channels], strict=True)
            ]
        )

    def _index(self, column: pa.Array, path: Path) -> tuple[NDArray[np.int64], ...]:
        """Chunk and first sample of each usable channel, and their number in each window."""
        per_window, starts, lengths, values = _flatten(column, path)
        usable = lengths >= self.samples
        self.skipped[SHORT] += int((~usable).sum())
        step = max(1, SCAN_VALUES // self.samples)
        candidates = np.flatnonzero(usable)
        for first in range(0, len(candidates), step):
            some = candidates[first : first + step]
            faults = channel_faults(values[starts[some, None] + np.arange(self.samples)])
            usable[some] = faults == ""
            for fault, count in zip(*np.unique(faults, return_counts=True), strict=True):
                self.skipped[str(fault)] += int(count)
        self.skipped = Counter({why: n for why, n in self.skipped.items() if why and n})
        kept = np.add.reduceat(np.append(usable, False), per_window[:-1]) * (
            np.diff(per_window) > 0
        )
        chunk = np.full(int(usable.sum()), len(self._values))
        self._values.append(values)
        return chunk, starts[usable], kept[kept > 0]


class _Damaged(Exception):
    pass


def _read(path: Path) -> list[pa.Array]:
    """The series column of a shard, in chunks."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if path.suffix == ".arrow":
            table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        else:
            table = pq.ParquetFile(path).read(columns=[SERIES])
        column = table.column(SERIES)
        # An Arrow file is mapped as it is: a damaged offset would read what lies beside it in memory.
        column.validate(full=True)
    except Exception as error:  # damaged files fail in every way
        raise _Damaged(f"cut off, or not a shard of series ({one_line(error)})") from None
    return [chunk.drop_null() for chunk in column.chunks if len(chunk)]


def _flatten(
    column: pa.Array, path: Path
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """First channel of each window and one past the last, first sample and length of each channel,
    and all samples."""
    import pyarrow as pa

    kinds = (pa.ListType, pa.LargeListType)
    inner = column.type.value_type if isinstance(column.type, kinds) else None
    if not isinstance(inner, (*kinds, pa.FixedSizeListType)) or inner.value_type != pa.float32():
        raise _Damaged(f"its {SERIES} are {column.type}; a list of lists of float32 would be right")
    per_window = column.offsets.to_numpy().astype(np.int64)
    channels = column.values
    if isinstance(inner, pa.FixedSizeListType):
        ends = (np.arange(len(channels) + 1) + channels.offset) * inner.list_size
    else:
        ends = channels.offsets.to_numpy().astype(np.int64)
    lengths = np.diff(ends)
    if channels.null_count:
        lengths = np.where(channels.is_valid().to_numpy(zero_copy_only=False), lengths, 0)
    values = channels.values
    if values.null_count:
        values = values.fill_null(float("nan"))
    first, last = int(per_window[0]), int(per_window[-1])
    return (
        per_window - first,
        ends[first:last],
        lengths[first:last],
        values.to_numpy(zero_copy_only=False),
    )


def training_batch(
    shards: Series,
    indices: Sequence[int] | NDArray[np.integer[Any]],
    *,
    channels: int,
    samples: int = SERIES_SAMPLES - 2,
    mixup: bool,
    rng: np.random.Generator,
) -> NDArray[np.float32]:
    """The series of these windows as a batch, (B, channels, samples) float32.

    A window with more channels has ``channels`` of them drawn without replacement, one with fewer
    has its last repeated. Of its samples the second to the ``samples + 1``-st are taken.

    The published data set was enlarged tenfold by mixup before training: two series drawn at random,
    a chunk length uniform in (0, l), a start in each, and the second's chunk put into the first.
    Here a tenth of the series stays as it is and each other gets such a chunk of a window drawn from
    all of them, anew every time: a sample has the same distribution, and no disk holds ten copies.

    Args:
        shards: where the series come from.
        indices: (B,) of the windows.
        channels: of the batch; 4 as released.
        samples: of the batch; 388 as released.
        mixup: whether to mix.
        rng: of the channels, and of mixup.
    """
    batch = np.empty((len(indices), channels, samples), np.float32)
    for row, index in zip(batch, indices, strict=True):
        row[:] = _drawn(shards, int(index), channels, samples, rng)
        if mixup and rng.random() >= ORIGINALS:
            second = _drawn(shards, int(rng.integers(len(shards))), channels, samples, rng)
            length = int(rng.integers(1, samples))
            to, start = rng.integers(samples - length + 1, size=2)
            row[:, to : to + length] = second[:, start : start + length]
    return batch


def _drawn(
    shards: Series, index: int, channels: int, samples: int, rng: np.random.Generator
) -> NDArray[np.float32]:
    series = shards.series(index)
    if series.shape[1] < FIRST_SAMPLE + samples:
        raise InputError(
            f"window {index} has {series.shape[1]} samples; {FIRST_SAMPLE + samples} are needed"
        )
    if len(series) > channels:
        chosen = rng.choice(len(series), channels, replace=False)
    else:
        chosen = np.minimum(np.arange(channels), len(series) - 1)
    return series[chosen, FIRST_SAMPLE : FIRST_SAMPLE + samples]
