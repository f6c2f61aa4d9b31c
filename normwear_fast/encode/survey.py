"""What is to be encoded: each recording's windows and channels, before any sample is read."""

from __future__ import annotations

import math
import os
import unicodedata
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from normwear_fast.encode.settings import EncodeSettings, join_names
from normwear_fast.encode.windows import Tiling, Window, WindowList, select_channels
from normwear_fast.errors import NormWearError, RecordingError, UsageError, one_line
from normwear_fast.recordings import find_recordings, open_recording
from normwear_fast.recordings.base import FoundRecording, companions_of, unique_names
from normwear_fast.recordings.wfdb import files_of

COMPANIONS = {".hea": (".dat", ".mat"), ".vhdr": (".eeg", ".vmrk"), ".set": (".fdt",)}
"""Header formats and the usual extensions of the files that hold their samples, which a header that
cannot be read does not name."""


LONGEST = 1e12
"""Seconds: 30,000 years. Beyond, windows could not even be counted."""


@dataclass(frozen=True)
class Surveyed:
    """One recording as an input of a run.

    Args:
        id: as in the output's ``recording`` column.
        path: where it lies.
        size: bytes, companion files included.
        mtime_ns: when it, or a companion file, was last changed.
        windows: how many of it are to be encoded.
        duration: seconds.
        channels: names of the selected channels.
        notes: what the reader has to say about it.
        error: why it cannot be encoded, or None.
    """

    id: str
    path: str
    size: int
    mtime_ns: int
    windows: int = 0
    duration: float = 0.0
    channels: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "recording": self.id,
            "path": self.path,
            "size": self.size,
            "mtime_ns": self.mtime_ns,
            "windows": self.windows,
            "duration_s": self.duration,
            "channels": list(self.channels),
            "notes": list(self.notes),
            "error": self.error,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Surveyed:
        return cls(
            id=values["recording"],
            path=values["path"],
            size=values["size"],
            mtime_ns=values["mtime_ns"],
            windows=values["windows"],
            duration=values["duration_s"],
            channels=tuple(values["channels"]),
            notes=tuple(values["notes"]),
            error=values["error"],
        )


def reason(error: BaseException, path: str | Path) -> str:
    """Which recording could not be read and why, in one line."""
    if isinstance(error, NormWearError):
        text = str(error)
    elif isinstance(error, OSError) and error.strerror:
        text = error.strerror
    else:
        said = one_line(error)
        kind = type(error).__name__
        text = f"cannot be read ({kind if said == kind else f'{kind}: {said}'})"
    return text if text.startswith(str(path)) else f"{path}: {text}"


def file_state(path: Path) -> tuple[int, int]:
    """Total size and latest mtime_ns of a recording's files."""
    states = [file.stat() for file in _files(path)]
    return (
        sum(state.st_size for state in states),
        max((state.st_mtime_ns for state in states), default=0),
    )


def states_of(found: Sequence[FoundRecording]) -> dict[str, tuple[int, int]]:
    """`file_state` of recordings by id; (0, 0) of one that is not there."""
    states = {}
    for item in found:
        try:
            states[item.id] = file_state(item.path)
        except OSError:
            states[item.id] = (0, 0)
    return states


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.is_file())
    extension = path.suffix.lower()
    files = {path}
    if extension == ".hea":
        files |= set(files_of(path))
    elif path.is_file():  # opening a pipe waits for ever
        files |= companions_of(path)
    headers = [file for file in files if file.suffix.lower() == extension]
    ends = COMPANIONS.get(extension, ())
    files |= {header.with_name(header.stem + end) for header in headers for end in ends}
    return sorted({path} | {file for file in files if file.is_file()})


def _nameable(letter: str) -> bool:
    """Whether an id may have it: all of a line of text, also macOS's narrow no-break spaces and the
    joiners of emoji."""
    return letter.isprintable() or unicodedata.category(letter) == "Zs" or letter in "\u200c\u200d"


def printable(name: str) -> str:
    """The name with \\n for a line's end, \\xff for a byte that is no UTF-8, and so on."""
    return "".join(
        letter
        if _nameable(letter)
        else f"\\x{ord(letter) - 0xDC00:02x}"  # how Python has such a byte in a name
        if 0xDC80 <= ord(letter) <= 0xDCFF
        else letter.encode("unicode_escape").decode()
        for letter in name
    )


class MisnamedRecording(FoundRecording):
    """One whose name cannot be an id, as it has what no line or column of text can: it goes by the
    printable form of its name and is not opened."""

    def surveyed(self) -> Surveyed:
        """As failed."""
        path = printable(str(self.path))
        error = f"{path}: its name has characters no id can have; rename it"
        return Surveyed(self.id, path, *states_of([self])[self.id], error=error)


def find_inputs(inputs: Sequence[str | Path], output: str | Path | None) -> list[FoundRecording]:
    """The recordings of the inputs, without what lies in the output folder.

    Raises:
        UsageError: there is none, or none whose name can be an id.
    """
    found = find_recordings(inputs)
    if output is not None:
        below = os.path.abspath(output)
        found = [
            item
            for item in found
            if os.path.commonpath([below, os.path.abspath(item.path)]) != below
        ]
        if not found:
            raise UsageError(f"{inputs[0]}: no recording outside the output folder {output}")
    bad = [item for item in found if not all(map(_nameable, item.id))]
    if not bad:
        return found
    good = [item for item in found if all(map(_nameable, item.id))]
    # A name in this form may be another file's own name: every id is one recording's.
    ids = unique_names([item.id for item in good] + [printable(item.id) for item in bad])
    misnamed = [
        MisnamedRecording(name, item.path) for name, item in zip(ids[len(good) :], bad, strict=True)
    ]
    if not good:
        raise UsageError(misnamed[0].surveyed().error)
    return sorted([*good, *misnamed], key=lambda item: item.id)


def windows_of(
    recording: str, duration: float, settings: EncodeSettings, windows: WindowList | None
) -> Sequence[Window]:
    """The windows of one recording; listed ones may lie outside it, and lack what is not there.

    Raises:
        RecordingError: it is shorter than a window of a tiling, or longer than any can be.
    """
    if not duration < LONGEST:
        raise RecordingError(
            f"lasts {duration:g} s, longer than any recording; its header is damaged"
        )
    if windows is None:
        assert settings.window is not None
        assert settings.hop is not None
        tiling = Tiling.over(duration, settings.window, settings.hop)
        if not tiling:
            raise RecordingError(
                f"lasts {_seconds(duration)} s, less than a window of {settings.window:g} s"
            )
        return tiling
    return windows.recordings[recording]


def _seconds(duration: float) -> str:
    # Rounded down: 5.9996 s is less than 6, and must not read "6 s, less than 6 s".
    return f"{math.floor(duration * 1e3) / 1e3:g}"


@dataclass(frozen=True)
class Look:
    """A recording to be looked at.

    Args:
        place: in the order of ids.
        windows: those listed for it, where there is a list.
        alone: it is the only one; then its clock must not contradict the settings' rate.
    """

    place: int
    id: str
    path: str
    windows: WindowList | None
    alone: bool = False


@dataclass(frozen=True)
class Looked:
    """What is to be encoded of the recording at that place, and the names of all its channels."""

    place: int
    entry: Surveyed
    names: tuple[str, ...] = ()


class Opens(Protocol):
    """Told of an error before it becomes the recording's."""

    def refused(self, error: Exception) -> None: ...


def look_at(item: Look, settings: EncodeSettings, watch: Opens | None = None) -> Looked:
    """Opens a recording and says what of it is to be encoded."""
    path = Path(item.path)
    size = mtime_ns = 0
    names: tuple[str, ...] = ()
    try:
        size, mtime_ns = file_state(path)
        with open_recording(
            path, sampling_rate=settings.rate, own_clock=not item.alone
        ) as recording:
            names = tuple(channel.name for channel in recording.channels)
            channels = select_channels(recording.channels, settings.channels, recording.notes)
            entry = Surveyed(
                id=item.id,
                path=item.path,
                size=size,
                mtime_ns=mtime_ns,
                windows=len(windows_of(item.id, recording.duration, settings, item.windows)),
                duration=recording.duration,
                channels=tuple(recording.channels[c].name for c in channels),
                notes=tuple(recording.notes),
            )
    # Readers are other people's code on damaged files: any error is this recording's only.
    except Exception as error:
        if watch is not None:
            watch.refused(error)
        entry = Surveyed(item.id, item.path, size, mtime_ns, error=reason(error, path))
    return Looked(item.place, entry, names)


def survey(
    found: Sequence[FoundRecording],
    settings: EncodeSettings,
    windows: WindowList | None = None,
    progress: Callable[[int], None] = lambda done: None,
    look: Callable[[Iterable[Look], EncodeSettings], Iterable[Looked]] | None = None,
) -> list[Surveyed]:
    """Opens every recording and says what of it is to be encoded. One whose name can be no id has
    failed, and is left out beside a list of windows, which cannot name it.

    Args:
        found: recordings in order of id.
        settings: which windows and channels.
        windows: the list, where there is one; recordings it does not name are left out.
        progress: called with the number of recordings seen so far.
        look: does `look_at` for each, in any order; by default here.

    Raises:
        UsageError: a channel name no recording has, or a recording in the list that is not there.
    """
    misnamed = [item for item in found if isinstance(item, MisnamedRecording)]
    found = [item for item in found if not isinstance(item, MisnamedRecording)]
    if windows is not None:
        found = only_named(found, windows.recordings.keys(), "the list of windows")
        misnamed = []
    items = (
        Look(place, item.id, str(item.path), _listed_for(item.id, windows), len(found) == 1)
        for place, item in enumerate(found)
    )
    entries: list[Surveyed] = []
    names: set[str] = set()
    for looked in look(items, settings) if look else (look_at(item, settings) for item in items):
        entries.append(looked.entry)
        names.update(looked.names)
        progress(len(entries))
    unknown = sorted(set(settings.channels or ()) - names)
    if unknown and names:
        raise UsageError(
            f"no recording has a channel {join_names(unknown)}; there are {join_names(sorted(names))}"
        )
    entries += [item.surveyed() for item in misnamed]
    return sorted(entries, key=lambda entry: entry.id)


def _listed_for(recording: str, windows: WindowList | None) -> WindowList | None:
    if windows is None:
        return None
    return WindowList({recording: windows.recordings[recording]}, windows.digest)


def only_named(
    found: Sequence[FoundRecording], names: Collection[str], who: str
) -> list[FoundRecording]:
    """The recordings that a list names, all of which must be there.

    Args:
        found: what the inputs are.
        names: ids.
        who: names them, for the error.

    Raises:
        UsageError: one is not among the inputs.
    """
    missing = sorted(set(names) - {item.id for item in found})
    if missing:
        known = ", ".join(item.id for item in found[:5]) + (", ..." if len(found) > 5 else "")
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise UsageError(
            f"{who} names recording {', '.join(missing[:3])}{more}, which is not among the inputs; "
            f"they are {known}"
        )
    return [item for item in found if item.id in names]
