"""The report of an encode output: one HTML page that loads nothing, from its manifest and parts.

Everything a file or channel is called is escaped, and the page's own policy forbids scripts and
anything from elsewhere. Memory is bounded whatever the output's size: rows stream by a row group at a
time, and of the embeddings at most `MAP_POINTS` are kept.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from normwear_fast.encode.manifest import STAGES, Tally
from normwear_fast.encode.output import MANIFEST, OutputFolder, check_columns
from normwear_fast.encode.prepare import OK
from normwear_fast.errors import NormWearError, OutputError, UsageError, one_line, reading
from normwear_fast.files import replacing
from normwear_fast.report_pictures import bars, image, line, scatter, strip

if TYPE_CHECKING:
    import pyarrow as pa

MAP_POINTS = 1500
"""Points of a map: channels of windows, or windows where their channels were pooled."""

BINS = 120
"""Cells of a line of missing data over time."""

TABLE_ROWS = 500
"""Recordings in the cohort's table; failed ones and those with the most skipped windows come first."""

MISSING_RECORDINGS = 24
"""Recordings whose missing data are drawn, those with the most first."""

READ_SAMPLES = 200_000_000
"""Samples read again from the recordings to tell their channels' missing data apart: some 10 s."""

MODALITIES: tuple[tuple[str, str], ...] = (
    ("ECG", r"ecg|ekg|\bmlii?i?\b|^(lead ?)?(i|ii|iii|av[rlf]|v[1-6])$"),
    ("PPG", r"ppg|pleth|\bbvp\b|spo2|^(infra)?red$|^ir$"),
    ("gyroscope", r"gyr"),
    ("magnetometer", r"mag(n|_|$)"),
    ("accelerometer", r"acc|^[xyz]$"),
    ("EDA", r"\beda\b|eda_|gsr|skin ?cond"),
    ("EEG", r"eeg|^(fp|af|f|fc|ft|c|cp|t|tp|p|po|o)(z|\d{1,2})\b"),
    ("EMG", r"emg"),
    ("EOG", r"eog"),
    ("respiration", r"resp|breath|airflow|thor|abdo"),
    ("temperature", r"temp"),
    ("blood pressure", r"\b(abp|art|bp)\b|pressure"),
    ("heart rate", r"\bhr\b|heart ?rate"),
)
"""What a channel's name says it measures: the first pattern found in it, case ignored."""

OTHER = "other"


def guess_modality(channel: str) -> str:
    """The modality a channel's name speaks for, by `MODALITIES`; ``other`` where none does."""
    return next((name for name, p in MODALITIES if re.search(p, channel, re.IGNORECASE)), OTHER)


# --- what is in the output -------------------------------------------------------------------------


@dataclass
class _Seen:
    """What the rows say of one recording."""

    ok: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    missing: float = 0.0  # sum over windows of their worst channel's fraction
    worst: NDArray[np.float64] = field(default_factory=lambda: np.full(BINS, np.nan))

    @property
    def rows(self) -> int:
        return self.ok + self.skipped.total()


@dataclass(frozen=True)
class _Chosen:
    """The window whose signal is shown."""

    recording: str
    window_id: str
    start: float
    duration: float


class _Output:
    """An encode output, read once from end to end.

    Raises:
        OutputError: no output of encode there, or a damaged part.
        UsageError: the window asked for is not in it.
    """

    def __init__(self, folder: Path, recording: str | None, window_id: str | None) -> None:
        self.folder = folder
        if not folder.is_dir():
            raise OutputError(f"{folder}: no such folder; name the output folder of encode")
        output = OutputFolder(folder)
        manifest = output.read_manifest()
        if manifest is None:
            raise OutputError(f"{folder}: no manifest.json there; name the output folder of encode")
        self.manifest = manifest
        self.entries: dict[str, dict[str, Any]] = {e["recording"]: e for e in manifest["inputs"]}
        self._wanted = (recording, window_id)
        if recording is not None and recording not in self.entries:
            raise UsageError(
                f"--recording {recording}: not in {folder}; there are "
                + ", ".join(list(self.entries)[:5])
            )
        self.seen: dict[str, _Seen] = {}
        self.tally = Tally()
        self.chosen: _Chosen | None = None
        parts = output.parts(manifest["run"])
        for part in parts:
            self.tally.add(Tally.from_dict(part.metadata["tally"]))
        self.failed = {
            e["recording"]: e["error"] for e in manifest["inputs"] if e["error"] is not None
        } | self.tally.failed
        channels = max((len(e["channels"]) for e in self.entries.values()), default=1)
        self.per_row = channels if manifest["settings"]["channel_pool"] != "mean" else 1
        self._stride = max(1, math.ceil(self.tally.ok * self.per_row / MAP_POINTS))
        self._ok_rows = 0
        self.points: list[tuple[str, str, str, NDArray[np.float32]]] = []
        for part in parts:
            self._read(part.path)
        if self.chosen is None and self._wanted != (None, None):
            raise UsageError(
                f"no encoded window {window_id or ''} of {recording or 'any recording'} in {folder}"
            )

    def _read(self, path: Path) -> None:
        import pyarrow.parquet as pq

        with reading(path, OutputError, "cannot be read as a part of encode's output"):
            file = pq.ParquetFile(path)
            check_columns(file.schema_arrow, path)
            names = [name for name in file.schema_arrow.names if name != "embedding"]
            for group in range(file.num_row_groups):
                rows = file.read_row_group(group, columns=names)
                rows.validate(full=True)
                taken = self._add(rows)
                if taken.size and "embedding" in file.schema_arrow.names:
                    column = file.read_row_group(group, columns=["embedding"]).column(0)
                    self._keep(rows.take(taken), column.take(taken))

    def _add(self, rows: pa.Table) -> NDArray[np.int64]:
        """Counts rows; returns which of them go on the maps."""
        recordings = np.array(rows["recording"].to_pylist(), dtype=object)
        statuses = np.array(rows["status"].to_pylist(), dtype=object)
        starts, durations = rows["start_s"].to_numpy(), rows["duration_s"].to_numpy()
        missing = rows["missing_fraction"].to_numpy()
        if not (np.isfinite(starts).all() and np.isfinite(durations).all()):
            raise ValueError("a window without its times")
        changes = np.flatnonzero(recordings[1:] != recordings[:-1]) + 1
        for stretch in np.split(np.arange(len(recordings)), changes):
            if not stretch.size:
                continue
            name = recordings[stretch[0]]
            if name not in self.entries:
                raise ValueError(f"recording {name!r} is not in {MANIFEST}")
            seen = self.seen.setdefault(name, _Seen())
            counts = Counter(statuses[stretch].tolist())
            seen.ok += counts.pop(OK, 0)
            seen.skipped += counts
            seen.missing += float(missing[stretch].sum())
            length = self.entries[name]["duration_s"] or 1.0
            first = _cells(starts[stretch] / length)
            last = _cells((starts[stretch] + durations[stretch]) / length - 1e-9)
            for step in range(int((last - first).max()) + 1):
                np.fmax.at(seen.worst, np.minimum(first + step, last), missing[stretch])
        good = statuses == OK
        if self.chosen is None:
            self._choose(rows, recordings, good)
        number = self._ok_rows + np.cumsum(good) - 1
        self._ok_rows += int(good.sum())
        return np.flatnonzero(good & (number % self._stride == 0))

    def _choose(
        self, rows: pa.Table, recordings: NDArray[np.object_], good: NDArray[np.bool_]
    ) -> None:
        recording, window_id = self._wanted
        if recording is not None:
            good = good & (recordings == recording)
        if window_id is not None:
            ids = np.array(rows["window_id"].to_pylist(), dtype=object)
            good = good & (ids == window_id)
        if good.any():
            row = rows.slice(int(good.argmax()), 1).to_pylist()[0]
            self.chosen = _Chosen(
                row["recording"], row["window_id"], row["start_s"], row["duration_s"]
            )

    def _keep(self, rows: pa.Table, embeddings: pa.ChunkedArray) -> None:
        pooled = self.manifest["settings"]["channel_pool"]
        for row, value in zip(rows.to_pylist(), embeddings.to_pylist(), strict=True):
            if value is None:
                continue
            vectors = np.asarray(value, np.float32)
            if not np.isfinite(vectors).all():  # encode writes none: such bits are damaged
                continue
            channels = row["channels"]
            if pooled == "mean":
                kinds = sorted({guess_modality(name) for name in channels})
                kind = " + ".join(kinds)
                self.points.append((row["recording"], kind, row["window_id"], vectors))
                continue
            for name, vector in zip(channels, vectors.reshape(len(channels), -1), strict=True):
                title = f"{row['window_id']}, {name}"
                self.points.append((row["recording"], guess_modality(name), title, vector))


def _cells(shares: NDArray[np.float64]) -> NDArray[np.intp]:
    """Which of `BINS` cells a share of a recording's length falls into."""
    return np.clip(shares * BINS, 0, BINS - 1).astype(np.intp)


# --- missing data, a channel at a time -------------------------------------------------------------


def _unchanged(entry: dict[str, Any]) -> str | None:
    """Why a recording cannot be read as it was when it was encoded, or None."""
    from normwear_fast.encode.survey import file_state

    try:
        state = file_state(Path(entry["path"]))
    except (OSError, ValueError) as error:  # no path can have a NUL in it
        return (getattr(error, "strerror", None) or "cannot be read").lower()
    return None if state == (entry["size"], entry["mtime_ns"]) else "changed since"


def _channel_missing(
    entry: dict[str, Any], rate: float | None
) -> list[tuple[str, NDArray[np.float64], float]]:
    """(name, fraction missing in each of `BINS` cells of the recording, in all) of each channel.

    What lies before or after a channel's own samples is NaN.
    """
    from normwear_fast.encode.windows import select_channels
    from normwear_fast.recordings import open_recording

    with open_recording(Path(entry["path"]), sampling_rate=rate, own_clock=True) as recording:
        chosen = select_channels(recording.channels, tuple(entry["channels"]))
        duration = recording.duration or 1.0
        totals, absent = np.zeros((len(chosen), BINS)), np.zeros((len(chosen), BINS))
        done = [0] * len(chosen)
        for block in recording.blocks(chosen):
            for place, (index, data) in enumerate(zip(chosen, block, strict=True)):
                channel = recording.channels[index]
                times = channel.start + (done[place] + np.arange(len(data))) / channel.sampling_rate
                cells = _cells(times / duration)
                totals[place] += np.bincount(cells, minlength=BINS)
                absent[place] += np.bincount(cells[~np.isfinite(data)], minlength=BINS)
                done[place] += len(data)
        with np.errstate(invalid="ignore"):
            fractions = absent / totals
        return [
            (recording.channels[c].name, row, float(gone.sum() / max(total.sum(), 1)))
            for c, row, gone, total in zip(chosen, fractions, absent, totals, strict=True)
        ]


def _samples(entry: dict[str, Any], rate: float | None) -> float:
    from normwear_fast.recordings import open_recording

    with open_recording(Path(entry["path"]), sampling_rate=rate, own_clock=True) as recording:
        return float(sum(channel.samples for channel in recording.channels))


def _missing_section(output: _Output) -> Iterator[str]:
    order = sorted(
        (name for name, seen in output.seen.items() if seen.missing > 0),
        key=lambda name: (-output.seen[name].missing / output.seen[name].rows, name),
    )
    if not order:
        yield "<p>No window misses a sample.</p>"
        return
    yield (
        f'<p class="note">From a recording\'s start (left) to its end, in {BINS} cells: white is '
        "whole, darker is more missing, grey is no signal. The line <i>windows</i> is the worst "
        "channel of the windows there, as encode saw them.</p>"
    )
    budget = float(READ_SAMPLES)
    rate = output.manifest["settings"]["rate"]
    for name in order[:MISSING_RECORDINGS]:
        entry, seen = output.entries[name], output.seen[name]
        share = seen.missing / seen.rows
        lines = [("windows", seen.worst, share)]
        why_not = _unchanged(entry)
        if why_not is None:
            try:
                budget -= _samples(entry, rate)
                if budget >= 0:
                    lines += _channel_missing(entry, rate)
                else:
                    why_not = "too long to be read again for a report"
            except (NormWearError, OSError) as error:
                why_not = one_line(error)
        yield f"<h3>{escape(name)} <small>({_clock(entry['duration_s'])})</small></h3>"
        yield '<table class="strips">' + "".join(
            f'<tr><th scope="row">{escape(label)}</th><td>'
            + strip(values, f"missing data of {label} in {name}")
            + f"</td><td>{_percent(all_over)}</td></tr>"
            for label, values, all_over in lines
        )
        yield "</table>"
        if why_not is not None:
            yield f'<p class="note">Its channels are not told apart: {escape(why_not)}.</p>'
    if len(order) > MISSING_RECORDINGS:
        yield f"<p>{len(order) - MISSING_RECORDINGS:,} more recordings miss something.</p>"


# --- the other sections ----------------------------------------------------------------------------


def _head_section(output: _Output) -> Iterator[str]:
    manifest, tally = output.manifest, output.tally
    rows = sum(seen.rows for seen in output.seen.values())
    planned = sum(entry["windows"] for entry in output.entries.values())
    weights = manifest["model"]["weights"]
    if weights.get("source") == "random":
        yield (
            f'<p class="warn">The weights are random (seed {escape(str(weights.get("seed")))}): '
            "these embeddings mean nothing.</p>"
        )
    if manifest["state"] != "complete":
        yield (
            f'<p class="warn">The run is {escape(manifest["state"])}: {rows:,} of {planned:,} '
            "windows are done.</p>"
        )
    signal = sum(e["duration_s"] for e in output.entries.values())
    tiles = [
        (f"{len(output.entries):,}", "recordings"),
        (_clock(signal), "of signal"),
        (f"{tally.ok:,}", "windows encoded"),
        (f"{sum(tally.skipped.values()):,}", "windows skipped"),
        (f"{len(output.failed):,}", "recordings failed"),
    ]
    yield '<div class="tiles">' + "".join(
        f"<div><b>{escape(value)}</b>{escape(label)}</div>" for value, label in tiles
    )
    yield "</div>"
    settings = manifest["settings"]
    shown = {
        "weights": weights.get("path") or weights.get("source"),
        "SHA-256": weights.get("sha256"),
        "precision": manifest["model"].get("precision"),
        "window": None if settings["window"] is None else f"{settings['window']:g} s",
        "hop": None if settings["hop"] is None else f"{settings['hop']:g} s",
        "channels": ", ".join(settings["channels"] or ()) or "all",
        "preprocess": settings["preprocess"],
        "normalize": settings["normalize"],
        "pool": f"{settings['pool']} over tokens, {settings['channel_pool']} channels",
        "scalogram": settings["scalogram"],
        "largest missing": _percent(settings["max_missing"]),
        "normwear-fast": manifest["version"],
        "begun": manifest["started"],
    }
    items = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(str(value))}</dd></div>"
        for name, value in shown.items()
        if value is not None
    )
    yield f"<details><summary>Settings</summary><dl>{items}</dl></details>"


def _cohort_section(output: _Output) -> Iterator[str]:
    def badness(name: str) -> tuple[bool, int]:
        seen = output.seen.get(name, _Seen())
        return name not in output.failed, -seen.skipped.total()

    names = sorted(output.entries, key=lambda name: (*badness(name), name))
    yield (
        '<div class="wide"><table><thead><tr><th>recording</th><th>length</th><th>windows</th>'
        "<th>encoded</th><th>skipped</th><th>missing</th><th>channels</th></tr></thead><tbody>"
    )
    for name in names[:TABLE_ROWS]:
        entry, seen = output.entries[name], output.seen.get(name, _Seen())
        if name in output.failed:
            yield (
                f'<tr class="failed"><td>{escape(name)}</td><td colspan="6">failed: '
                f"{escape(output.failed[name])}</td></tr>"
            )
            continue
        missing = _percent(seen.missing / seen.rows) if seen.rows else ""
        yield (
            f"<tr><td>{escape(name)}</td><td>{_clock(entry['duration_s'])}</td>"
            f"<td>{entry['windows']:,}</td><td>{seen.ok:,}</td>"
            f"<td>{seen.skipped.total() or ''}</td><td>{missing}</td>"
            f"<td>{escape(', '.join(entry['channels']))}</td></tr>"
        )
    yield "</tbody></table></div>"
    if len(names) > TABLE_ROWS:
        yield f"<p>and {len(names) - TABLE_ROWS:,} recordings more, in manifest.json</p>"
    notes = [(name, note) for name in names for note in output.entries[name]["notes"]]
    if notes:
        items = "".join(f"<li>{escape(n)}: {escape(note)}</li>" for n, note in notes[:TABLE_ROWS])
        yield f"<details><summary>Notes of the readers ({len(notes):,})</summary>"
        yield f"<ul>{items}</ul></details>"


def _skipped_section(output: _Output) -> Iterator[str]:
    skipped = Counter(output.tally.skipped)
    if not skipped:
        yield "<p>No window was skipped.</p>"
    total = output.tally.ok + skipped.total()
    if skipped:
        yield bars(
            [
                (why, count, f"{count:,} ({_percent(count / total)})")
                for why, count in skipped.most_common()
            ]
        )
    if output.tally.flat:
        yield (
            "<p>Encoded windows with a channel that does not vary (zero to the model): "
            f"{output.tally.flat:,}</p>"
        )


def _throughput_section(output: _Output) -> Iterator[str]:
    seconds = output.tally.seconds
    wall = seconds["wall"]
    if not wall:
        yield "<p>Nothing was timed.</p>"
        return
    windows = output.tally.ok
    rows = [
        (
            stage,
            seconds[stage],
            f"{_duration(seconds[stage])}"
            + (f", {_rate(windows / seconds[stage])} windows/s" if seconds[stage] else ""),
        )
        for stage in STAGES
    ]
    yield bars(rows)
    busy = min(1.0, seconds["encode"] / wall)
    yield (
        '<p class="note">Stages run side by side, and reading and preparing in several processes, so '
        f"they add up to more than the wall clock. The model worked {_percent(busy)} of the time "
        "(of one device).</p>"
    )


def _map_section(output: _Output) -> Iterator[str]:
    if not output.points:
        yield "<p>The parts hold no embeddings to map"
        yield " (patches are in Zarr).</p>" if output.tally.ok else ".</p>"
        return
    widths = Counter(len(vector) for *_, vector in output.points)
    width = widths.most_common(1)[0][0]
    points = [point for point in output.points if len(point[3]) == width]
    if len(points) < 3:
        yield "<p>Too few windows for a map.</p>"
        return
    x = np.stack([vector for *_, vector in points]).astype(np.float64)
    x -= x.mean(axis=0)
    _, sizes, axes = np.linalg.svd(x, full_matrices=False)
    # An axis's sign is arbitrary; the largest weight decides it, so that a report repeats.
    axes = axes[:2] * np.sign(np.take_along_axis(axes[:2], np.abs(axes[:2]).argmax(1)[:, None], 1))
    share = sizes**2 / max(float((sizes**2).sum()), 1e-300)
    labels = (f"first component ({_percent(share[0])})", f"second ({_percent(share[1])})")
    placed = x @ axes.T
    each = (
        "windows"
        if output.manifest["settings"]["channel_pool"] == "mean"
        else "channels of windows"
    )
    what = f"{len(points):,} {each}" + (
        f", every {_ordinal(output._stride)} window" if output._stride > 1 else ""
    )
    yield f'<p class="note">Principal components of {what}.</p><div class="maps">'
    by_recording = [recording for recording, *_ in points]
    by_modality = [kind for _, kind, _, _ in points]
    for heading, values in (("by recording", by_recording), ("by modality", by_modality)):
        names = [name for name, _ in Counter(values).most_common()]
        place = {name: i for i, name in enumerate(names)}
        titles = [f"{recording}, window {title} ({kind})" for recording, kind, title, _ in points]
        svg = scatter(placed, [place[value] for value in values], titles, names, labels)
        yield f"<figure><h3>{heading}</h3>{svg}</figure>"
    yield "</div>"
    kinds = ", ".join(name for name, _ in MODALITIES)
    yield (
        '<p class="note">The modality is a guess from the channel\'s name '
        f"({escape(kinds)}; else {OTHER}).</p>"
    )


SHOWN_CHANNELS = 4


def _window_section(output: _Output) -> Iterator[str]:
    chosen = output.chosen
    if chosen is None:
        yield "<p>No window was encoded.</p>"
        return
    entry = output.entries[chosen.recording]
    where = (
        f"Window {chosen.window_id} of {chosen.recording}, from {chosen.start:g} s, "
        f"{chosen.duration:g} s long"
    )
    why_not = _unchanged(entry)
    signal: NDArray[np.float32] | None = None
    if why_not is None:
        try:
            signal = _prepared(output, chosen)
        except (NormWearError, OSError) as error:
            why_not = one_line(error)
    if signal is None:
        yield f"<p>{escape(where)}, is not shown: {escape(entry['path'])}: {escape(why_not or '')}.</p>"
        return
    import torch

    from normwear_fast.packing import scalogram_method
    from normwear_fast.scalograms import scalogram

    settings = output.manifest["settings"]
    method = scalogram_method(settings["scalogram"] == "conv")
    yield (
        f'<p class="note">{escape(where)}: each channel as the model took it (65 Hz, preprocess '
        f"{escape(settings['preprocess'])}, normalize {escape(settings['normalize'])}), and the "
        "scalograms of it and of its two differences. Time runs to the right, scales from 0.1 "
        "(top) to 64.1 samples (bottom); red is positive, blue negative.</p>"
    )
    for name, series in list(zip(entry["channels"], signal, strict=True))[:SHOWN_CHANNELS]:
        pictures = scalogram(torch.from_numpy(series.copy())[None, None], method)[0, 0]
        yield f"<figure><h3>{escape(name)} <small>({guess_modality(name)})</small></h3>"
        yield line(series, f"signal of {name}")
        for title, picture in zip(
            ("signal", "first difference", "second difference"), pictures.numpy(), strict=True
        ):
            yield image(picture.T.astype(np.float64), f"scalogram of the {title} of {name}")
            yield f'<div class="axes">{title}</div>'
        yield "</figure>"
    if len(signal) > SHOWN_CHANNELS:
        yield f"<p>and {len(signal) - SHOWN_CHANNELS} channels more</p>"


def _prepared(output: _Output, chosen: _Chosen) -> NDArray[np.float32]:
    """The chosen window (C, L) made once more by encode's own code.

    Raises:
        NormWearError: it cannot be made any more.
    """
    from normwear_fast.encode.prepare import Job, JobUnit, Source, prepare_job
    from normwear_fast.encode.settings import EncodeSettings
    from normwear_fast.encode.windows import Window

    with reading(output.folder, OutputError, "its manifest's settings are not encode's"):
        settings = EncodeSettings(**output.manifest["settings"])
    entry = output.entries[chosen.recording]
    window = Window(chosen.window_id, chosen.start, chosen.duration)
    source = Source(chosen.recording, entry["path"], tuple(entry["channels"]), [window])
    (unit,) = prepare_job(Job((source,), (JobUnit(0, ((0, 0, 1),)),)), settings)
    if not unit.data:
        raise NormWearError(next(iter(unit.failed.values()), "not what it was"))
    return unit.data[0]


# --- the page --------------------------------------------------------------------------------------

_STYLE = """
:root { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; color: #1c2733;
  background: #f4f6f8 }
body { max-width: 68rem; margin: 0 auto; padding: 1rem }
h1 { font-size: 1.5rem; margin: .4rem 0 1rem; overflow-wrap: anywhere }
h2 { font-size: 1.15rem; margin: 0 0 .6rem }
h3 { font-size: .95rem; margin: .8rem 0 .3rem; overflow-wrap: anywhere }
section { background: #fff; border: 1px solid #dde3e9; border-radius: 8px; padding: 1rem;
  margin: 0 0 1rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
.wide { overflow-x: auto; max-height: 32rem; overflow-y: auto }
.wide table { width: 100% }
.wide th, .wide td { text-align: right; padding: .25rem .6rem; border-bottom: 1px solid #e8edf1;
  white-space: nowrap }
.wide th:first-child, .wide td:first-child, .wide th:last-child, .wide td:last-child,
.wide td[colspan] { text-align: left }
.wide td[colspan], .wide td:last-child { white-space: normal; min-width: 11rem;
  overflow-wrap: anywhere }
.wide thead th { position: sticky; top: 0; background: #fff; font-weight: 600 }
.failed td { color: #a02c00 }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: .6rem;
  margin-bottom: .8rem }
.tiles div { background: #eef3f8; border-radius: 6px; padding: .5rem .8rem; font-size: .85rem }
.tiles b { display: block; font-size: 1.35rem; font-weight: 650; line-height: 1.3 }
.warn { background: #fff3d6; border-left: 4px solid #e69f00; padding: .4rem .8rem; margin: 0 0 .8rem }
.note, .axes { color: #55636f; font-size: .85rem; margin: .2rem 0 .6rem }
summary { cursor: pointer; color: #0072b2 }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); gap: .3rem 1rem;
  margin: .6rem 0 0 }
dt { color: #55636f; font-size: .8rem } dd { margin: 0; overflow-wrap: anywhere }
.bars, .strips { width: 100%; table-layout: auto }
.bars th, .strips th { text-align: left; font-weight: 400; padding-right: .8rem; width: 1% ;
  min-width: 5.5rem; max-width: 12rem; overflow-wrap: anywhere }
.bars td, .strips td { padding: .2rem 0 }
.bars td:last-child, .strips td:last-child { padding-left: .7rem; width: 1%; white-space: nowrap;
  text-align: right }
.bar b { display: block; height: 1rem; background: #0072b2; border-radius: 0 3px 3px 0;
  min-width: 2px }
@media (max-width: 36rem) {
  .bars tr { display: grid; grid-template-columns: auto 1fr; margin-bottom: .4rem }
  .bars .bar { grid-row: 2; grid-column: 1 / 3; padding: 0 }
  .bars th, .bars td:last-child { width: auto; max-width: none }
}
svg.strip { display: block; width: 100%; height: 1rem; background: #fff; outline: 1px solid #d4dbe1 }
svg.line { display: block; width: 100%; height: 6rem; border: 1px solid #d4dbe1;
  box-sizing: border-box }
svg.line polyline { fill: none; stroke: #1c2733; stroke-width: 1.3; vector-effect: non-scaling-stroke }
img.scalogram { display: block; width: 100%; height: 5.5rem; margin-top: .4rem;
  image-rendering: pixelated; border: 1px solid #d4dbe1; box-sizing: border-box }
figure { margin: 0 }
.maps { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 19rem), 1fr));
  gap: 1.2rem }
svg.map { width: 100%; display: block }
.frame { fill: #fbfcfd; stroke: #d4dbe1 }
.legend { list-style: none; margin: .3rem 0 0; padding: 0; display: flex; flex-wrap: wrap;
  gap: .15rem .9rem; font-size: .85rem }
.legend li { overflow-wrap: anywhere }
.legend i { display: inline-block; width: .75rem; height: .75rem; border-radius: 50%;
  margin-right: .35rem; vertical-align: -1px }
"""


def build_report(
    folder: str | Path, *, recording: str | None = None, window_id: str | None = None
) -> str:
    """The page of an encode output.

    Args:
        folder: as given to ``encode --output``; of a run that goes on, too.
        recording, window_id: the window whose signal is shown; the first encoded one where None.

    Raises:
        OutputError: no output of encode there, or a damaged part.
        UsageError: a recording or window that is not in it.
    """
    output = _Output(Path(folder), recording, window_id)
    sections: list[tuple[str, Iterable[str]]] = [
        ("", _head_section(output)),
        ("Recordings", _cohort_section(output)),
        ("Skipped windows", _skipped_section(output)),
        ("Missing data over time", _missing_section(output)),
        ("Throughput by stage", _throughput_section(output)),
        ("Map of the embeddings", _map_section(output)),
        ("A window and its scalogram", _window_section(output)),
    ]
    body = "".join(
        f"<section>{f'<h2>{heading}</h2>' if heading else ''}{''.join(content)}</section>\n"
        for heading, content in sections
    )
    name = escape(Path(folder).resolve().name)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "img-src data:; style-src 'unsafe-inline'\">\n"
        f"<title>{name}: embeddings</title>\n<style>{_STYLE}</style></head>\n"
        f"<body>\n<h1>{name}</h1>\n{body}</body></html>\n"
    )


def write_report(
    folder: str | Path,
    path: str | Path | None = None,
    *,
    recording: str | None = None,
    window_id: str | None = None,
) -> Path:
    """Writes `build_report` to a file, ``report.html`` in the folder by default; returns its path.

    Raises:
        OutputError: it cannot be written, or is there and no page; and as `build_report`.
    """
    target = Path(path) if path is not None else Path(folder) / "report.html"
    if target.suffix.lower() not in (".html", ".htm") and (
        target.exists() or (target.parent / MANIFEST).exists()
    ):
        what = "exists" if target.exists() else "lies in an output"
        raise OutputError(f"{target}: {what} and is no .html; a report replaces nothing but a page")
    if path is not None and not target.parent.is_dir():
        raise OutputError(f"{target}: cannot be written: there is no folder {target.parent}")
    page = build_report(folder, recording=recording, window_id=window_id)
    with replacing(target) as temporary:
        temporary.write_text(page, encoding="utf-8", errors="xmlcharrefreplace")
    return target


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.1 or share == 0 else f"{100 * share:.2g} %"


def _clock(seconds: float) -> str:
    """90.5 -> '0:01:30'; days where there are."""
    return str(timedelta(seconds=int(min(seconds, 8e13))))  # the longest it can say


def _duration(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds < 100 else _clock(seconds)


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _ordinal(number: int) -> str:
    if number % 100 in (11, 12, 13):
        return f"{number}th"
    return f"{number}{('th', 'st', 'nd', 'rd')[number % 10] if number % 10 < 4 else 'th'}"
