"""What every reader offers, the registry of readers, and the search for recordings in folders."""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from normwear_fast.errors import (
    InputError,
    NormWearError,
    RecordingError,
    UsageError,
    one_line,
)

Array = NDArray[np.float64]

RATES = (1e-3, 1e6)
"""Hz; a rate outside is a damaged header, and would make a small file last for ages."""


@dataclass(frozen=True)
class Channel:
    """One signal of a recording.

    Args:
        name: as the file has it.
        unit: physical unit, "" where the file has none.
        sampling_rate: Hz.
        samples: how many samples `Recording.blocks` yields for it.
        start: seconds from the recording's start to sample 0.
    """

    name: str
    unit: str
    sampling_rate: float
    samples: int
    start: float = 0.0


def first_sample(channel: Channel, time: float) -> int:
    """Index of a channel's first sample at or after a time (s); its number of samples if none is."""
    # Clocks are rounded: a sample that misses the time by a millionth of a sample means it.
    index = np.ceil((time - channel.start) * channel.sampling_rate - 1e-6)
    return int(np.clip(index, 0, channel.samples))


def without_first(blocks: Iterator[list[Array]], skip: Sequence[int]) -> Iterator[list[Array]]:
    """Blocks without the first `skip[i]` samples of their channel i."""
    left = list(skip)
    for block in blocks:
        yield [samples[count:] for samples, count in zip(block, left, strict=True)]
        left = [max(0, count - samples.size) for samples, count in zip(block, left, strict=True)]


class Recording(ABC):
    """One opened recording; a context manager.

    Attributes:
        path: the file it was opened from.
        format: name of the format.
        channels: its signals; () for a valid file that holds none.
        notes: what a user should know about how the file was read, one line each.
        unreadable: channels, by index, whose blocks are an error that a note tells.
        start_time: wall-clock time of second 0, where the file tells.
    """

    path: Path
    format: str
    channels: tuple[Channel, ...] = ()
    notes: tuple[str, ...] = ()
    unreadable: tuple[int, ...] = ()
    start_time: datetime | None = None

    @property
    def duration(self) -> float:
        """Seconds from the start to the end of the channel that ends last."""
        return max((c.start + c.samples / c.sampling_rate for c in self.channels), default=0.0)

    def blocks(
        self, channels: Sequence[int], seconds: float = 60.0, start: float = 0.0
    ) -> Iterator[list[Array]]:
        """Stream channels to their end, in memory bounded by the block.

        Args:
            channels: indices into `self.channels`, in the order wanted.
            seconds: length of a block.
            start: seconds; a channel's first sample is `first_sample(channel, start)`.

        Yields:
            One float64 array a channel, in physical units, NaN where missing. An array may be
            empty; a channel's arrays put together have exactly `Channel.samples` samples, less those
            before the start.

        Raises:
            RecordingError: the file turns out to be damaged.
        """
        if not seconds > 0:
            raise InputError(f"a block of {seconds} s: seconds must be above 0")
        for index in channels:
            if not 0 <= index < len(self.channels):
                raise InputError(
                    f"{self.path}: channel {index} does not exist; it has {len(self.channels)}"
                )
        if not channels:
            return iter(())
        skip = [first_sample(self.channels[index], start) for index in channels]
        if not any(skip):
            return self._blocks(list(channels), seconds)
        return self._blocks_after(list(channels), seconds, skip)

    @abstractmethod
    def _blocks(self, channels: list[int], seconds: float) -> Iterator[list[Array]]:
        """`blocks` with checked arguments and at least one channel."""

    def _blocks_after(
        self, channels: list[int], seconds: float, skip: list[int]
    ) -> Iterator[list[Array]]:
        """`_blocks` without the first `skip[i]` samples of `channels[i]`. Readers that can go to a
        place in their file do so; this reads on to it."""
        return without_first(self._blocks(channels, seconds), skip)

    def close(self) -> None:  # noqa: B027  (most readers hold nothing open)
        """Release the file."""

    def __enter__(self) -> Recording:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


# extension, lower case with its dot -> reader
_READERS: dict[str, Callable[..., Recording]] = {}
# folders that are recordings: recognises one -> reader
_FOLDERS: list[tuple[Callable[[Path], bool], Callable[..., Recording]]] = []
# tried for a file whose extension no reader has: gives a reader, or None
_OTHERS: list[Callable[[Path], Callable[..., Recording] | None]] = []
# extension -> gives the files that belong to a file of that format and are no recordings themselves
_COMPANIONS: dict[str, Callable[[Path], Iterable[Path]]] = {}

_Reader = TypeVar("_Reader", bound=Callable[..., Recording])


def register(
    *names: str, companions: Callable[[Path], Iterable[Path]] | None = None
) -> Callable[[_Reader], _Reader]:
    """Class decorator: the reader of files with these extensions.

    The class is called as `cls(path, sampling_rate=...)`; sampling_rate is the user's --rate or None.

    Args:
        names: extensions with their dot; case does not matter.
        companions: given such a file, the paths that are parts of it, not recordings of their own.
    """

    def decorate(cls: _Reader) -> _Reader:
        for name in names:
            _READERS[name.lower()] = cls
            if companions is not None:
                _COMPANIONS[name.lower()] = companions
        return cls

    return decorate


def register_folder(recognise: Callable[[Path], bool]) -> Callable[[_Reader], _Reader]:
    """Class decorator: the reader of folders that `recognise` says are one recording."""

    def decorate(cls: _Reader) -> _Reader:
        _FOLDERS.append((recognise, cls))
        return cls

    return decorate


def register_others(choose: Callable[[Path], Callable[..., Recording] | None]) -> None:
    """What to do with a file whose extension is not registered, when it is given by name."""
    _OTHERS.append(choose)


def _folder_reader(path: Path) -> Callable[..., Recording] | None:
    """The reader of a folder that is one recording; None for a folder of recordings."""
    return next((reader for recognise, reader in _FOLDERS if recognise(path)), None)


def extensions() -> tuple[str, ...]:
    """The extensions that some reader is registered for, sorted."""
    return tuple(sorted(_READERS))


def open_recording(
    path: str | Path, *, sampling_rate: float | None = None, own_clock: bool = False
) -> Recording:
    """Open a recording by its extension; a Zarr or Empatica E4 folder by what it holds.

    Args:
        path: the file or folder; for WFDB the .hea header, for BrainVision the .vhdr.
        sampling_rate: Hz, for files without a clock of their own. A file that has one may differ
            from it by 1 %.
        own_clock: one that differs by more keeps its own, with a note, and is not refused: of many
            recordings only some may lack a clock.

    Raises:
        RecordingError: missing, empty, damaged or unknown file, or no sampling rate to be had.
    """
    path = Path(path)
    if sampling_rate is not None and not (np.isfinite(sampling_rate) and sampling_rate > 0):
        raise UsageError(f"--rate {sampling_rate}: a sampling rate is a number of Hz above 0")
    folder = path.is_dir()
    reader = _folder_reader(path) if folder else _READERS.get(path.suffix.lower())
    if reader is None and not folder:
        headers = [path.with_suffix(suffix) for suffix in (".hea", ".vhdr", ".set")]
        header = next((one for one in headers if one.is_file()), None)
        if header is not None:
            raise RecordingError(f"{path}: is a part of a recording; give its header {header}")
        reader = next(filter(None, (choose(path) for choose in _OTHERS)), None)
    if reader is None:
        if folder:
            raise RecordingError(f"{path}: is a folder that holds no recording of its own")
        raise RecordingError(
            f"{path}: {path.suffix or 'no extension'} is no format; "
            f"known are {' '.join(extensions())}"
        )
    try:
        if not folder and path.exists() and not path.is_file():  # opening a pipe waits for ever
            raise RecordingError(f"{path}: is no regular file")
        if not folder and path.stat().st_size == 0:
            raise RecordingError(f"{path}: is empty (0 bytes)")
        try:
            recording = reader(path, sampling_rate=sampling_rate)
        except OtherRateError:
            if not own_clock:
                raise
            recording = reader(path, sampling_rate=None)
            recording.notes += (
                f"has a clock of its own: --rate {sampling_rate:g} is not for it and left out",
            )
    except OSError as error:
        raise RecordingError(f"{path}: cannot be read: {one_line(error)}") from error
    except ImportError as error:
        raise RecordingError(
            f"{path}: reading {path.suffix} needs {error.name}; "
            "install it with: pip install 'normwear-fast[io]'"
        ) from error
    names = unique_names([channel.name for channel in recording.channels])
    recording.channels = tuple(
        replace(channel, name=name) for channel, name in zip(recording.channels, names, strict=True)
    )
    for channel in recording.channels:
        if not RATES[0] <= channel.sampling_rate <= RATES[1]:
            recording.close()
            raise RecordingError(
                f"{path}: channel {channel.name} is at {channel.sampling_rate:g} Hz; "
                f"{RATES[0]:g} to {RATES[1]:g} Hz is right"
            )
    return recording


@contextmanager
def refusing(path: Path, what: str = "is damaged") -> Iterator[None]:
    """Any error of another library on a file becomes the one line that a user gets."""
    try:
        yield
    except (NormWearError, ImportError):
        raise
    except Exception as error:  # damaged files fail in every way
        raise RecordingError(f"{path}: {what}: {one_line(error)}") from error


class OtherRateError(RecordingError):
    """A recording whose own clock contradicts the --rate."""


class ClockError(RecordingError):
    """Times that can be no clock: one is missing, they go back, or they do not move."""


def check_rate(path: Path, given: float | None, rates: Iterable[float]) -> None:
    """Refuse a --rate that no channel of a file with its own clock has, by more than 1 %."""
    rates = sorted(set(rates))
    if given is None or not rates or any(abs(given / rate - 1) <= 0.01 for rate in rates):
        return
    own = ", ".join(f"{rate:g}" for rate in rates)
    raise OtherRateError(
        f"{path}: --rate {given:g} contradicts the file's own {own} Hz; leave --rate out"
    )


def rechunk(pieces: Iterable[list[Array]], samples: int) -> Iterator[list[Array]]:
    """Put pieces of channels with one rate together into blocks of `samples` samples."""
    waiting: list[list[Array]] = []
    held = 0
    for piece in pieces:
        while piece[0].size:
            take = min(samples - held, piece[0].size)
            waiting.append([channel[:take] for channel in piece])
            piece = [channel[take:] for channel in piece]
            held += take
            if held == samples:
                yield [np.concatenate(parts) for parts in zip(*waiting, strict=True)]
                waiting, held = [], 0
    if held:
        yield [np.concatenate(parts) for parts in zip(*waiting, strict=True)]


# "ECG [mV]", "EDA (uS)"
_BRACKETED: re.Pattern[str] = re.compile(
    r"^(?P<name>.*\S)\s*(?:\[(?P<a>[^\]]*)\]|\((?P<b>[^)]*)\))$"
)


def split_units(titles: Sequence[str]) -> list[tuple[str, str]]:
    """Column titles to (name, unit). Titles that would share a name ("acc (x)", "acc (y)") stay whole;
    an empty one becomes channel_{place}, and a repeated one gets a number."""
    parts = []
    for place, title in enumerate(titles, start=1):
        title = title.strip()
        match = _BRACKETED.match(title)
        unit = (match["a"] or match["b"] or "").strip() if match else ""
        parts.append((match["name"] if match else title or f"channel_{place}", unit, title))
    shared = Counter(name for name, _, _ in parts)
    whole = [bool(unit) and shared[name] > 1 for name, unit, _ in parts]
    names = unique_names([p[2] if w else p[0] for p, w in zip(parts, whole, strict=True)])
    units = ["" if w else p[1] for p, w in zip(parts, whole, strict=True)]
    return list(zip(names, units, strict=True))


def unique_names(names: Sequence[str]) -> list[str]:
    """Names with a number after each that is there already: a, a_2, a_3."""
    taken = set(names)
    seen: Counter[str] = Counter()
    result: list[str] = []
    for name in names:
        seen[name] += 1
        unique = name
        if seen[name] > 1:
            unique = f"{name}_{seen[name]}"
            while unique in taken:
                seen[name] += 1
                unique = f"{name}_{seen[name]}"
            taken.add(unique)
        result.append(unique)
    return result


@dataclass(frozen=True)
class FoundRecording:
    """A recording to open, and the id its output carries."""

    id: str
    path: Path


def find_recordings(inputs: Sequence[str | Path]) -> list[FoundRecording]:
    """The recordings in files and folders, sorted by id.

    An id is the path below the input folder without its extension (POSIX slashes); the stem, for a
    file given itself. Recordings that would share an id keep their extension, and if they still
    share it (two inputs) the path below the inputs' common folder. In folders, unknown extensions,
    hidden names, parts of other recordings and what normwear-fast wrote are passed over.

    Raises:
        UsageError: an input does not exist, or there is no recording in any of them.
    """
    found: dict[str, tuple[str, Path]] = {}  # absolute path -> (id with extension, path)
    for given in map(Path, inputs):
        if not given.exists():
            raise UsageError(f"{given}: no such file or folder")
        if given.is_dir() and _folder_reader(given) is None:
            for path in _recordings_below(given):
                found.setdefault(os.path.abspath(path), (path.relative_to(given).as_posix(), path))
        else:
            name = given.name or given.resolve().name
            found.setdefault(os.path.abspath(given), (name, given))
    if not found:
        where = ", ".join(str(given) for given in inputs) or "no input"
        written = next((given for given in map(Path, inputs) if _is_output(given)), None)
        if written is not None:
            raise UsageError(
                f"{written}: was written by normwear-fast; name a folder of recordings"
            )
        raise UsageError(f"{where}: no recording found; known are {' '.join(extensions())}")

    ids = {key: _without_extension(name, path) for key, (name, path) in found.items()}
    for key in _shared(ids):
        ids[key] = found[key][0]
    again = _shared(ids)
    if again:
        top = os.path.commonpath([os.path.dirname(key) for key in again])
        for key in again:
            ids[key] = Path(os.path.relpath(key, top)).as_posix()
    return sorted((FoundRecording(ids[k], found[k][1]) for k in found), key=lambda one: one.id)


def _without_extension(name: str, path: Path) -> str:
    """A folder's name has an extension only where some reader's files have the same."""
    if path.is_dir() and path.suffix.lower() not in _READERS:
        return name
    return Path(name).with_suffix("").as_posix()


def _shared(ids: dict[str, str]) -> list[str]:
    counts = Counter(ids.values())
    return [key for key, name in ids.items() if counts[name] > 1]


_OUTPUTS = {
    "manifest.json": rb'\s*{\s*"format":\s*"normwear-fast ',  # encode, prepare
    "finetune.json": rb'\s*{\s*"format":\s*"normwear-fast ',
    "steps.csv": rb"step,loss,learning_rate,gradient_norm,",  # pretrain
}
"""Files of our own outputs, and how they begin: none of what lies beside them is a recording."""

_OUR_METADATA = re.compile(rb"\x18[\x0d\x16]normwear_fast(_zeroshot)?\x18[\x80-\xff]*[\x00-\x7f]{")
"""In a Parquet footer: the key under which we say of a table what made it, before JSON."""


def companions_of(path: Path) -> set[Path]:
    """The files that are part of a file's recording, as its format has it."""
    parts = _COMPANIONS.get(path.suffix.lower())
    if parts is None or not path.is_file():  # opening a pipe waits for ever
        return set()
    try:
        return set(parts(path))
    except (OSError, ValueError):  # what a damaged header is, its reader says
        return set()


def _is_output(folder: Path) -> bool:
    for name, beginning in _OUTPUTS.items():
        path = folder / name
        if path.is_file():  # opening a pipe waits for ever
            with suppress(OSError), path.open("rb") as file:
                if re.match(beginning, file.read(200)):
                    return True
    return False


def _is_table_of_ours(path: Path) -> bool:
    """Whether a Parquet file is a part of encode or predictions: known by its footer, unopened."""
    if path.suffix.lower() not in (".parquet", ".pq") or not path.is_file():
        return False
    with suppress(OSError), path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 8))
        tail = file.read(8)
        length = int.from_bytes(tail[:4], "little")
        if tail[4:] == b"PAR1" and length <= size - 8:
            file.seek(size - 8 - length)
            return _OUR_METADATA.search(file.read(length)) is not None
    return False


def _recordings_below(folder: Path) -> list[Path]:
    """Files with a known extension and folders that are recordings, without parts of others."""
    paths: list[Path] = []
    visited: set[str] = set()
    for top, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(top)
        if real in visited:  # a link back up
            folders.clear()
            continue
        visited.add(real)
        if _is_output(Path(top)):
            folders.clear()
            continue
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        whole = [name for name in folders if _folder_reader(Path(top, name)) is not None]
        paths += [Path(top, name) for name in whole]
        folders[:] = [name for name in folders if name not in whole]
        known = (name for name in sorted(files) if not name.startswith("."))
        paths += [
            path
            for path in (Path(top, name) for name in known)
            if path.suffix.lower() in _READERS and not _is_table_of_ours(path)
        ]
    parts = {part for path in paths for part in companions_of(path)}
    return [path for path in paths if path not in parts]
