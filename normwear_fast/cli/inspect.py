"""`normwear-fast inspect`: what is in recordings, read to the end."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from normwear_fast.cli.main import print_error
from normwear_fast.errors import NormWearError
from normwear_fast.recordings import Channel, FoundRecording, find_recordings, open_recording

HELP = "Read recordings to the end and list their channels, rates, durations and gaps."
EXAMPLE = """\
normwear-fast inspect examples/cohort
  normwear-fast inspect night1.edf watch.npy --rate 32 --json > contents.json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "inputs", nargs="+", metavar="INPUT", help="a recording or a folder of them"
    )
    parser.add_argument(
        "--rate",
        type=float,
        metavar="HZ",
        help="sampling rate of files without a clock (NPY; CSV and Parquet without times); of "
        "several recordings one with a clock of another rate keeps its own",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(args: argparse.Namespace) -> int:
    """Print what is there; 1 if a recording could not be read, else 0.

    Raises:
        UsageError: an input does not exist, or there is no recording.
    """
    recordings: list[dict[str, Any]] = []
    failed: list[dict[str, str]] = []
    recordings_found = find_recordings(args.inputs)
    for found in recordings_found:
        try:
            content = describe(found, args.rate, own_clock=len(recordings_found) > 1)
        except NormWearError as error:
            failed.append({"id": found.id, "path": str(found.path), "error": str(error)})
            continue
        recordings.append(content)
        if not args.json:
            print(_printable(_table(content)))
    if args.json:
        print(json.dumps({"recordings": recordings, "failed": failed}, indent=1))
    else:
        print(f"{len(recordings)} recordings, {len(failed)} failed")
    for failure in failed:
        print_error(failure["error"])
    return 1 if failed else 0


def _printable(text: str) -> str:
    """Text with \\x.. for what the terminal has no characters for, as in names that are no UTF-8."""
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


@dataclass
class _Missing:
    """Counts a channel's missing samples as they stream by."""

    missing: int = 0
    gaps: int = 0
    longest: int = 0  # samples
    open: int = 0  # length of the gap that the last block ended in

    def add(self, data: NDArray[np.float64]) -> None:
        absent = np.isnan(data)
        self.missing += int(absent.sum())
        edges = np.flatnonzero(np.diff(absent, prepend=False, append=False))
        starts, ends = edges[::2], edges[1::2]
        if not starts.size:
            self.open = self.open if not data.size else 0
            return
        lengths = ends - starts
        going_on = self.open and starts[0] == 0
        self.gaps += starts.size - bool(going_on)
        if going_on:
            lengths[0] += self.open
        self.longest = max(self.longest, int(lengths.max()))
        self.open = int(lengths[-1]) if ends[-1] == data.size else 0


def describe(
    found: FoundRecording, rate: float | None = None, *, own_clock: bool = False
) -> dict[str, Any]:
    """Everything `inspect` says about one recording, as plain values.

    Args:
        found: the recording.
        rate: Hz, if it has no clock.
        own_clock: one that has a clock keeps it, whatever the rate.

    Raises:
        RecordingError: it cannot be read.
    """
    with open_recording(found.path, sampling_rate=rate, own_clock=own_clock) as recording:
        places = range(len(recording.channels))
        counts = {i: _Missing() for i in places if i not in recording.unreadable}
        for block in recording.blocks(tuple(counts)):
            for count, data in zip(counts.values(), block, strict=True):
                count.add(data)
        return {
            "id": found.id,
            "path": str(found.path),
            "format": recording.format,
            "start_time": recording.start_time.isoformat() if recording.start_time else None,
            "duration_s": recording.duration,
            "channels": [
                _channel(channel, counts.get(i)) for i, channel in enumerate(recording.channels)
            ],
            "notes": list(recording.notes),
        }


def _channel(channel: Channel, count: _Missing | None) -> dict[str, Any]:
    """What is said of a channel; None for what is not known of one that cannot be read."""
    if count is None:
        return {**asdict(channel), "missing": None, "gaps": None, "longest_gap_s": None}
    return {
        **asdict(channel),
        "missing": count.missing,
        "gaps": count.gaps,
        "longest_gap_s": count.longest / channel.sampling_rate,
    }


_COLUMNS = ("channel", "unit", "rate Hz", "samples", "missing", "gaps", "longest gap s")


def _table(content: dict[str, Any]) -> str:
    start = f", from {content['start_time']}" if content["start_time"] else ""
    title = f"{content['id']}: {content['format']}, {_clock(content['duration_s'])}{start}"
    rows = [_COLUMNS] + [
        (
            channel["name"],
            channel["unit"] or "-",
            f"{channel['sampling_rate']:.8g}",
            str(channel["samples"]),
            *_missing_cells(channel),
        )
        for channel in content["channels"]
    ]
    if not content["channels"]:
        rows = []
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [title]
    for row in rows:
        cells = [
            cell.ljust(width) if place < 2 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  " + "  ".join(cells).rstrip())
    lines += ["  holds no signal"] if not rows else []
    lines += [f"  note: {note}" for note in content["notes"]]
    return "\n".join(lines) + "\n"


def _missing_cells(channel: dict[str, Any]) -> tuple[str, str, str]:
    missing = channel["missing"]
    if missing is None:
        return ("cannot be read", "-", "-")
    share = f"{missing / max(1, channel['samples']):.2%}" if missing else "0"
    return (share, str(channel["gaps"]), f"{channel['longest_gap_s']:.3g}")


def _clock(seconds: float) -> str:
    """90.5 -> "0:01:30.5"."""
    minutes, rest = divmod(round(seconds, 3), 60)
    hours, minutes = divmod(int(minutes), 60)
    whole, _, fraction = f"{rest:.3f}".partition(".")
    fraction = fraction.rstrip("0")
    return f"{hours}:{minutes:02d}:{int(whole):02d}" + (f".{fraction}" if fraction else "")
