"""FIF, BrainVision, EEGLAB and GDF, through mne, which reads them by blocks; in mne's SI units.

What mne takes on trust is checked before it: sizes against the file, links between files, and what
a header may make it allocate. Formats that only `mne.io.read_raw` knows are opened with it, untested.
"""

from __future__ import annotations

import os
import re
import struct
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from normwear_fast.errors import RecordingError, one_line
from normwear_fast.recordings.base import (
    Array,
    Channel,
    Recording,
    check_rate,
    refusing,
    register,
    register_folder,
    register_others,
)
from normwear_fast.recordings.parts import PartedRecording

# FIFF unit code -> unit, https://mne.tools (FIFF_UNIT_*)
_UNITS = {
    1: "m",
    3: "s",
    6: "mol",
    7: "rad",
    101: "Hz",
    107: "V",
    109: "Ohm",
    110: "S",
    112: "T",
    114: "degC",
    201: "T/m",
    202: "Am",
    210: "px",
}
_SKIP = "BAD_ACQ_SKIP"  # mne's name for a stretch that was not recorded
_EXPANDED = 1 << 30  # bytes that a .set may hold when unpacked: mne reads it whole
_OTHER_FILES = {
    *(".ahdr", ".cnt", ".nxe", ".hdr", ".snirf", ".mat", ".bin", ".data", ".sqd", ".con", ".txt"),
    *(".dat", ".dap", ".rs3", ".cdt", ".nedf", ".asc", ".ns3", ".lay", ".eeg"),
}
_OTHER_FOLDERS = {".mff", ".ds", ".mefd"}


class _Raw(Recording):
    """One mne.io.Raw: channels of one rate."""

    def __init__(self, path: Path, raw: Any) -> None:
        self.path, self._raw = path, raw
        kinds = raw.get_channel_types()
        self._picks = [i for i, kind in enumerate(kinds) if kind != "stim"]
        left_out = [raw.ch_names[i] for i, kind in enumerate(kinds) if kind == "stim"]
        if left_out:
            self.notes += (f"trigger channels are left out: {', '.join(left_out)}",)
        bad = [name for name in raw.info["bads"] if name not in left_out]
        if bad:
            self.notes += (f"marked bad in the file, and read: {', '.join(bad)}",)
        rate, samples = float(raw.info["sfreq"]), int(raw.n_times)
        if not (np.isfinite(rate) and rate > 0):
            raise RecordingError(f"{path}: sampling rate {rate}: must be above 0 Hz")
        self._keep_skips(rate)
        self.channels = tuple(
            Channel(raw.ch_names[i], _UNITS.get(int(raw.info["chs"][i]["unit"]), ""), rate, samples)
            for i in self._picks
        )
        self.start_time = raw.info["meas_date"]

    def _keep_skips(self, rate: float) -> None:
        """Leave only the stretches that were not recorded annotated: those become NaN."""
        raw = self._raw
        names = [str(text) for text in raw.annotations.description]
        skips = [i for i, name in enumerate(names) if name == _SKIP]
        bad = sum(name.lower().startswith("bad") and name != _SKIP for name in names)
        if bad:
            self.notes += (f"{bad} stretches marked bad in the file are read as they are",)
        gaps, missing = _union(raw.annotations.onset[skips], raw.annotations.duration[skips])
        if gaps:
            self.notes += (f"{gaps} gaps, {missing:.3g} s in all, are missing samples",)
        if raw.n_times > max(1e7, 1000 * (raw.n_times - missing * rate)):
            raise RecordingError(
                f"{self.path}: {raw.n_times / rate / 86400:.3g} days, almost all of them a gap; "
                f"split the file at its gaps"
            )
        self._skips = bool(skips)
        raw.set_annotations(raw.annotations[skips], emit_warning=False)

    def _blocks(self, channels: list[int], seconds: float) -> Iterator[list[Array]]:
        step = max(1, round(seconds * self.channels[0].sampling_rate))
        picks = [self._picks[channel] for channel in channels]
        for start in range(0, self._raw.n_times, step):
            stop = min(start + step, self._raw.n_times)
            with refusing(self.path, f"sample {start} to {stop} cannot be read"), _quiet():
                data = self._raw.get_data(
                    picks=picks,
                    start=start,
                    stop=stop,
                    reject_by_annotation="NaN" if self._skips else None,
                    verbose="ERROR",
                )
            if data.shape != (len(picks), stop - start):
                raise RecordingError(f"{self.path}: ends before sample {stop}")
            data[~np.isfinite(data)] = np.nan
            yield list(data)


def _union(onsets: Array, durations: Array) -> tuple[int, float]:
    """How many stretches, and their seconds together; mne may list one twice."""
    gaps, total, end = 0, 0.0, -np.inf
    for onset, duration in sorted(zip(onsets.tolist(), durations.tolist(), strict=True)):
        gaps += onset > end
        total += max(0.0, onset + duration - max(onset, end))
        end = max(end, onset + duration)
    return gaps, total


class _quiet(warnings.catch_warnings):
    """mne's warnings, collected; none of them reaches the user's screen."""

    def __init__(self) -> None:
        super().__init__(record=True)

    def __enter__(self) -> Any:
        caught = super().__enter__()
        warnings.simplefilter("always")
        return caught


class MneRecording(PartedRecording):
    """A file that mne reads. A subclass names its reader and what to check before and after."""

    def __init__(self, path: Path, *, sampling_rate: float | None = None) -> None:
        import mne

        self.path = path
        with refusing(path), _quiet() as caught:
            self._check(path)
            self._raw = self._reader(mne)(os.path.abspath(path), preload=False, verbose="ERROR")
            self._check_raw(self._raw)
            whole = _Raw(path, self._raw)
        for text in dict.fromkeys(one_line(str(warning.message), 200) for warning in caught):
            if "naming conventions" not in text and "deprecat" not in text.lower():
                self.notes += (f"mne: {text}",)
        self.start_time = whole.start_time
        self._combine([whole], [0.0])
        check_rate(path, sampling_rate, (channel.sampling_rate for channel in self.channels))

    def close(self) -> None:
        self._raw.close()

    def _reader(self, mne: Any) -> Callable[..., Any]:
        return mne.io.read_raw

    def _check(self, path: Path) -> None:
        """Before mne sees the file."""

    def _check_raw(self, raw: Any) -> None:
        """What mne made of it, before a sample is read."""


# ---------------------------------------------------------------- FIF

# FIFF_REF_ROLE (2: the file goes on in what follows), FIFF_REF_FILE_NUM, FIFF_REF_FILE_NAME
_FIF_ROLE, _FIF_GOES_ON, _FIF_NUMBER, _FIF_NAME = 115, 2, 117, 118
_FIF_DIRECTORY = 102


def _fif_tags(path: Path) -> Iterator[tuple[int, int, int]]:
    """(kind, place of the data, size) of each tag, all of them within the file.

    mne follows a tag that points back for ever, and reads as much as a tag says it has.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        place = 0
        while place < size:
            file.seek(place)
            head = file.read(16)
            if len(head) < 16:
                raise RecordingError(f"{path}: ends within the tag at byte {place}: truncated")
            kind, _, length, following = struct.unpack(">iIii", head)
            if length < 0 or place + 16 + length > size:
                raise RecordingError(
                    f"{path}: the tag at byte {place} declares {length} bytes; the file has "
                    f"{size - place - 16} more"
                )
            yield kind, place + 16, length
            if kind == _FIF_DIRECTORY:
                file.seek(place + 16)
                entries = np.frombuffer(file.read(length // 16 * 16), ">i4").reshape(-1, 4)
                ends = entries[:-1, 3].astype(np.int64) + 16 + entries[:-1, 2]
                if (entries[:-1, 2:] < 0).any() or (ends > size).any():
                    raise RecordingError(f"{path}: its directory points beyond its {size} bytes")
            if following == -1:
                return
            after = place + 16 + length if following == 0 else following
            if after <= place:
                raise RecordingError(f"{path}: the tag at byte {place} points back to {following}")
            place = after


def _fif_chain(path: Path) -> list[Path]:
    """A FIF file and those it goes on in."""
    chain: list[Path] = []
    following: Path | None = path
    while following is not None:
        if following in chain:
            raise RecordingError(f"{path}: is split into files that refer to each other in a ring")
        chain.append(following)
        current, following, numbered, goes_on = following, None, False, False
        for kind, place, length in _fif_tags(current):
            if kind not in (_FIF_ROLE, _FIF_NAME, _FIF_NUMBER):
                continue
            with current.open("rb") as file:
                file.seek(place)
                content = file.read(min(length, 4096))
            if kind == _FIF_ROLE:
                goes_on = int.from_bytes(content, "big") == _FIF_GOES_ON
            elif kind == _FIF_NUMBER:
                numbered |= goes_on
            elif goes_on:
                name = content.decode("latin-1").strip("\0")
                if os.path.basename(name) != name or name in ("", ".", ".."):
                    raise RecordingError(
                        f"{current}: goes on in {name!r}; a file of the same folder is right"
                    )
                following = current.with_name(name)
        if following is None and numbered:
            raise RecordingError(f"{current}: goes on in a file that it does not name")
        if following is not None and not following.is_file():
            raise RecordingError(f"{path}: goes on in {following}, which does not exist")
    return chain


def _fif_parts(path: Path) -> Iterable[Path]:
    """The files that a split recording goes on in."""
    try:
        # most have no neighbour that could be a part: not worth reading their tags
        if not any(other != path for other in path.parent.glob(f"*{path.suffix}")):
            return []
        return _fif_chain(path)[1:]
    except (OSError, RecordingError):
        return []


@register(".fif", companions=_fif_parts)
class FifRecording(MneRecording):
    """A raw FIF file, split or whole."""

    format = "FIF"

    def _reader(self, mne: Any) -> Callable[..., Any]:
        return mne.io.read_raw_fif

    def _check(self, path: Path) -> None:
        _fif_chain(path)


# ---------------------------------------------------------------- BrainVision

_BRAINVISION_BYTES = {"INT_16": 2, "INT_32": 4, "IEEE_FLOAT_32": 4}


def _brainvision_header(path: Path) -> dict[str, str]:
    """The entries of a header, lower case; those of [Comment] are left out."""
    entries: dict[str, str] = {}
    with path.open("rb") as file:
        text = file.read(16 << 20).decode("latin-1")
    for line in text.split("[Comment]")[0].splitlines():
        name, equals, value = line.partition("=")
        if equals and not line.startswith(";"):
            entries.setdefault(name.strip().lower(), value.strip())
    return entries


def _brainvision_parts(path: Path) -> Iterable[Path]:
    try:
        entries = _brainvision_header(path)
    except OSError:
        return []
    base = {"$b": path.stem}
    names = [entries.get("datafile", ""), entries.get("markerfile", "")]
    return [path.with_name(name.replace("$b", base["$b"])) for name in names if name]


@register(".vhdr", companions=_brainvision_parts)
class BrainVisionRecording(MneRecording):
    """A BrainVision header with its .eeg and .vmrk files."""

    format = "BrainVision"

    def _reader(self, mne: Any) -> Callable[..., Any]:
        return mne.io.read_raw_brainvision

    def _check(self, path: Path) -> None:
        with path.open("rb") as file:
            first = file.readline(256)
        if b"brain vision" not in first.lower() and b"brainvision" not in first.lower():
            raise RecordingError(f"{path}: is no BrainVision header: it does not begin like one")
        entries = _brainvision_header(path)
        for key in ("datafile", "markerfile"):
            name = entries.get(key, "")
            if "/" in name or "\\" in name or name == "..":
                raise RecordingError(
                    f"{path}: names {name!r} as {key}; a file of the same folder is right"
                )
        data = path.with_name(entries.get("datafile", "").replace("$b", path.stem))
        if not entries.get("datafile") or not data.is_file():
            raise RecordingError(f"{path}: its data file {data.name!r} does not exist")
        listed = sum(re.fullmatch(r"ch\d+", key) is not None for key in entries)
        channels = self._number(entries, "numberofchannels")
        if not 0 < channels <= max(listed, 1) or channels != int(channels):
            raise RecordingError(f"{path}: declares {channels:g} channels and lists {listed}")
        if not self._number(entries, "samplinginterval") > 0:
            raise RecordingError(f"{path}: SamplingInterval must be above 0 microseconds")
        if entries.get("dataformat", "").upper() != "BINARY":
            return
        width = _BRAINVISION_BYTES.get(entries.get("binaryformat", "").upper())
        if width is None:
            raise RecordingError(
                f"{path}: has BinaryFormat {entries.get('binaryformat')!r}; "
                f"{' or '.join(_BRAINVISION_BYTES)} is right"
            )
        size, frame = data.stat().st_size, width * int(channels)
        points = self._number(entries, "datapoints") if "datapoints" in entries else size / frame
        if size != points * frame or size % frame:
            raise RecordingError(
                f"{path}: declares {points:.8g} samples of {int(channels)} channels, "
                f"{points * frame:.12g} bytes; {data.name} has {size}"
            )

    def _number(self, entries: dict[str, str], key: str) -> float:
        try:
            return float(entries[key])
        except (KeyError, ValueError):
            raise RecordingError(
                f"{self.path}: has {entries.get(key, 'nothing')!r} as {key}: a number is right"
            ) from None


# ---------------------------------------------------------------- EEGLAB

_MAT_COMPRESSED, _MAT_MATRIX = 15, 14


def _eeglab_parts(path: Path) -> Iterable[Path]:
    return [path.with_suffix(".fdt")]


def _check_mat(path: Path) -> None:
    """The elements of a MATLAB 5 file: all within it, and of a size that may be read whole."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(128)
        if head[:8] == b"\x89HDF\r\n\x1a\n" or head[:10] == b"MATLAB 7.3":
            return  # HDF5: mne says what it needs for it
        if head[126:128] not in (b"IM", b"MI"):
            raise RecordingError(f"{path}: is no EEGLAB file: it is no MATLAB 5 file")
        order = "<" if head[126:128] == b"IM" else ">"
        place, expanded = 128, 0
        while place + 8 <= size:
            file.seek(place)
            kind, length = struct.unpack(order + "II", file.read(8))
            if kind not in (_MAT_COMPRESSED, _MAT_MATRIX) or place + 8 + length > size:
                raise RecordingError(
                    f"{path}: element of type {kind} at byte {place} declares {length} bytes; the "
                    f"file has {size - place - 8} more"
                )
            expanded += _unpacked(path, file, length, order) if kind == _MAT_COMPRESSED else length
            if expanded > _EXPANDED:
                raise RecordingError(
                    f"{path}: unpacks to more than {_EXPANDED >> 30} GB, which mne reads whole; save "
                    f"the data beside it, as .fdt"
                )
            place += 8 + length


def _unpacked(path: Path, file: Any, length: int, order: str) -> int:
    """The size of a compressed element, read through: SciPy's reader does not compare its checksum,
    and can crash on what a damaged one unpacks to."""
    start, stream, head, size = file.tell(), zlib.decompressobj(), b"", 0
    while length and size <= _EXPANDED:
        packed = file.read(min(length, 1 << 16))
        length -= len(packed)
        while packed and size <= _EXPANDED:
            part = stream.decompress(packed, 1 << 20)
            packed = stream.unconsumed_tail
            head, size = (head + part)[:8] if len(head) < 8 else head, size + len(part)
            if not part:
                break
    declared = 8 + struct.unpack(order + "II", head)[1] if len(head) == 8 else -1
    if size <= _EXPANDED and (declared != size or not stream.eof):
        raise RecordingError(
            f"{path}: the element at byte {start - 8} declares {declared} bytes and holds {size}: damaged"
        )
    return size


@register(".set", companions=_eeglab_parts)
class EeglabRecording(MneRecording):
    """A continuous EEGLAB set, with its data inside or in an .fdt file."""

    format = "EEGLAB"

    def _reader(self, mne: Any) -> Callable[..., Any]:
        return mne.io.read_raw_eeglab

    def _check(self, path: Path) -> None:
        _check_mat(path)

    def _check_raw(self, raw: Any) -> None:
        file = Path(os.path.normpath(raw.filenames[0]))
        if file.parent != Path(os.path.abspath(self.path)).parent:
            raise RecordingError(
                f"{self.path}: its data lies in {file}; a file of the same folder is right"
            )
        shape = (len(raw.ch_names), raw.n_times)
        if file.suffix == ".fdt":
            size, expected = file.stat().st_size, 4 * shape[0] * shape[1]
            if size != expected:
                raise RecordingError(
                    f"{self.path}: declares {shape[1]} samples of {shape[0]} channels, {expected} "
                    f"bytes; {file.name} has {size}"
                )
            return
        from scipy.io import whosmat

        for name, stored, _ in whosmat(str(self.path)):
            if name == "data" and tuple(stored) != shape:
                raise RecordingError(
                    f"{self.path}: declares {shape[1]} samples of {shape[0]} channels; its data "
                    f"has shape {tuple(stored)}"
                )


# ---------------------------------------------------------------- GDF

# type code -> bytes; 0 and the bit types beyond 255 are not read
_GDF_BYTES = {1: 1, 2: 1, 3: 2, 4: 2, 5: 4, 6: 4, 7: 8, 8: 8, 16: 4, 17: 8, 279: 3, 535: 3}


@register(".gdf")
class GdfRecording(MneRecording):
    """A GDF file of version 1 or 2, all channels at one rate."""

    format = "GDF"

    def _reader(self, mne: Any) -> Callable[..., Any]:
        return mne.io.read_raw_gdf

    def _check(self, path: Path) -> None:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(256)
            match = re.match(rb"GDF (\d\.\d\d)", head)
            if len(head) < 256 or match is None:
                raise RecordingError(f"{path}: is no GDF file: it does not begin like one")
            modern = float(match[1]) >= 1.9
            records = struct.unpack_from("<q", head, 236)[0]
            duration = struct.unpack_from("<II", head, 244)
            if modern:
                header = 256 * struct.unpack_from("<H", head, 184)[0]
                channels = struct.unpack_from("<H", head, 252)[0]
            else:
                header = struct.unpack_from("<q", head, 184)[0]
                channels = struct.unpack_from("<I", head, 252)[0]
            if not channels or header < 256 * (channels + 1) or size < header:
                raise RecordingError(
                    f"{path}: header declares {header} bytes of header for {channels} channels "
                    f"({256 * (channels + 1)} are right); the file has {size}"
                )
            body = file.read(256 * channels)
            lengths = np.frombuffer(body, "<i4", channels, 216 * channels).astype(np.int64)
            kinds = np.frombuffer(body, "<i4", channels, 220 * channels).tolist()
            unknown = [kind for kind in kinds if kind not in _GDF_BYTES]
            if unknown or (lengths <= 0).any() or not all(duration):
                raise RecordingError(
                    f"{path}: header has channels of types {sorted({*kinds})} with "
                    f"{sorted({*lengths.tolist()})} samples in records of {duration[0]}/{duration[1]} s"
                )
            record = int(sum(_GDF_BYTES[k] * int(n) for k, n in zip(kinds, lengths, strict=True)))
            end = header + records * record
            if records < 0 or end > size:
                raise RecordingError(
                    f"{path}: header declares {records} data records, {end} bytes; the file has "
                    f"{size}"
                )
            self._check_events(path, file, end, size, float(match[1]))
        rates = sorted({n * duration[1] / duration[0] for n in lengths.tolist()})
        if len(rates) > 1:  # mne brings them to one, with artefacts at the ends of every block
            raise RecordingError(
                f"{path}: has channels at {', '.join(f'{rate:g}' for rate in rates)} Hz; one rate, or "
                f"an EDF file, is right"
            )

    def _check_events(self, path: Path, file: Any, end: int, size: int, version: float) -> None:
        """The table of events behind the data: mne makes room for as many as it declares."""
        file.seek(end)
        head = file.read(8)
        if not head:
            if version < 1.9:
                raise RecordingError(f"{path}: ends before its table of events: truncated")
            return
        if len(head) < 8:
            raise RecordingError(f"{path}: has {size - end} bytes after its data: truncated")
        count = (
            struct.unpack_from("<I", head, 4)[0]
            if version < 1.94
            else int.from_bytes(head[1:4], "little")
        )
        needed = count * (12 if head[0] == 3 else 6)
        if head[0] in (1, 3) and end + 8 + needed > size:
            raise RecordingError(
                f"{path}: declares {count} events, {needed} bytes; the file has {size - end - 8} more"
            )


# ---------------------------------------------------------------- what else mne.io.read_raw knows


def _is_other_folder(path: Path) -> bool:
    return path.suffix.lower() in _OTHER_FOLDERS


@register_folder(_is_other_folder)
class OtherRecording(MneRecording):
    """A file of a format that this package is not tested with."""

    format = "mne"

    def __init__(self, path: Path, *, sampling_rate: float | None = None) -> None:
        super().__init__(path, sampling_rate=sampling_rate)
        self.notes = (f"{path.suffix} is read through mne.io.read_raw, untested here", *self.notes)


register_others(lambda path: OtherRecording if path.suffix.lower() in _OTHER_FILES else None)
