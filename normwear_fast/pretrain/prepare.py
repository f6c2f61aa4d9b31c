"""Recordings to shards of 65 Hz series: what `normwear-fast prepare` writes and pretraining reads.

Windows, gaps and preprocessing are those of `encode`, so that a model is trained on what it is later
given; what a kill leaves behind is gone on with in the same way.
"""

from __future__ import annotations

import contextlib
import fnmatch
import json
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from normwear_fast import __version__
from normwear_fast.encode.manifest import (
    Tally,
    build_manifest,
    check_same_inputs,
    check_same_settings,
    inputs_before,
    now,
)
from normwear_fast.encode.output import (
    METADATA_KEY,
    RUN,
    SCHEMA_VERSION,
    SETTINGS,
    TALLY,
    OutputFolder,
)
from normwear_fast.encode.pipeline import (
    Plan,
    Progress,
    Silent,
    plan_jobs,
)
from normwear_fast.encode.prepare import NOT_FINITE, OK, PreparedUnit, Row
from normwear_fast.encode.readers import Readers
from normwear_fast.encode.settings import EncodeSettings, window_samples
from normwear_fast.encode.survey import Surveyed, find_inputs, states_of, survey
from normwear_fast.encode.units import plan_units
from normwear_fast.errors import OutputError, UsageError
from normwear_fast.files import COUNT
from normwear_fast.interrupts import graceful_stop
from normwear_fast.pretrain.data import FLAT, SERIES, channel_faults
from normwear_fast.recordings.base import FoundRecording

if TYPE_CHECKING:
    import pyarrow as pa

UNIT_CHANNELS = 4096
"""Channel-windows of a work unit: some ten minutes of a ten-channel recording, a second's work."""

SHARD_BYTES = 64 * 2**20
"""Series held before they become a shard: 40,000 channel-windows of 6 s."""

SHARD_SECONDS = 30.0
"""Units wait no longer than this for their shard: what a kill can cost."""

FLAT_WINDOW = "every channel is flat"


class SeriesFolder(OutputFolder):
    """An output folder whose parts are Arrow files: they can be mapped, and need no decoding."""

    command = "prepare"
    manifest_format = "normwear-fast prepare"
    manifest_form: Mapping[str, Any] = RUN | {"settings": SETTINGS}
    part_form: Mapping[str, Any] = {
        "run": str,
        "units": [COUNT],
        "tally": TALLY,
        "flat_channels": COUNT,
    }
    part_suffix = ".arrow"

    def _stored(self, path: Path) -> Mapping[bytes, bytes]:
        import pyarrow as pa

        return pa.ipc.open_file(pa.memory_map(str(path))).schema.metadata or {}


@dataclass
class Summary:
    """What came of a run.

    Args:
        output: the folder.
        recordings, windows: of the inputs.
        prepared: windows in the shards, of this and earlier sessions.
        skipped: windows left out, by reason.
        flat_channels: channels left out of windows that others were kept of.
        failed: recordings that could not be read, and why.
        notes: what readers had to say, by recording.
        seconds: of this session.
        interrupted: stopped before the end, by request.
        already_complete: there was nothing left to do.
    """

    output: str
    recordings: int
    windows: int
    prepared: int
    skipped: dict[str, int]
    flat_channels: int
    failed: dict[str, str]
    notes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    seconds: float = 0.0
    interrupted: bool = False
    already_complete: bool = False

    @property
    def exit_code(self) -> int:
        if self.interrupted:
            return 130
        return 1 if self.failed else 0


def prepare_series(
    inputs: Sequence[str | Path],
    output: str | Path,
    settings: EncodeSettings,
    *,
    exclude: Sequence[str] = (),
    workers: int = 0,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Summary:
    """Writes the windows of recordings as shards of series, or goes on with a run that was stopped.

    Series are float32: the scalogram takes second differences, a hundredth of the signal and less at
    65 Hz, of which float16's steps would be a tenth.

    Args:
        inputs: files and folders.
        output: folder of part-*.arrow and manifest.json.
        settings: windows, channels, preprocessing and missing samples; the rest is encode's alone.
        exclude: patterns (``*``, ``?``, ``[...]``) of ids of recordings to leave out, as the ones
            held out for evaluation.
        workers: reader processes; 0 reads in this one.
        overwrite: discard an earlier run in that folder.
        progress: told how it gets on.

    Raises:
        UsageError: inputs or channels that are not there, or a pattern that names no recording.
        OutputError: the folder cannot be written, is in use, or holds a run that differs.
    """
    progress = progress or Silent()
    started = time.perf_counter()
    found = _without(find_inputs(inputs, output), exclude)
    with SeriesFolder(output) as folder, contextlib.closing(Readers(workers)) as readers:
        before = folder.read_manifest()
        previous = None if overwrite else before
        if previous is None:
            surveyed = survey(
                found,
                settings,
                None,
                lambda done: progress.surveyed(done, len(found)),
                readers.look,
            )
        else:
            surveyed = _resumed(previous, found, settings, folder.path)
        run = _Run(folder, surveyed, settings, previous, discard=before is not None)
        summary = run.prepare(readers, progress)
    summary.seconds = time.perf_counter() - started
    return summary


def _without(found: Sequence[FoundRecording], patterns: Sequence[str]) -> list[FoundRecording]:
    left = list(found)
    for pattern in patterns:
        named = {item.id for item in found if fnmatch.fnmatchcase(item.id, pattern)}
        if not named:
            known = ", ".join(item.id for item in found[:5]) + (", ..." if len(found) > 5 else "")
            raise UsageError(f"exclude {pattern!r} names no recording; they are {known}")
        left = [item for item in left if item.id not in named]
    if not left:
        raise UsageError(f"exclude {', '.join(patterns)} leaves none of {len(found)} recordings")
    return left


def _resumed(
    manifest: dict[str, Any], found: Sequence[FoundRecording], settings: EncodeSettings, where: Path
) -> list[Surveyed]:
    check_same_settings(manifest, settings, str(where))
    check_same_inputs(manifest, states_of(found), str(where))
    return inputs_before(manifest, settings, None, str(where))


def _shard_schema(samples: int) -> pa.Schema:
    import pyarrow as pa

    return pa.schema(
        [
            pa.field("recording", pa.string(), nullable=False),
            pa.field("start_s", pa.float64(), nullable=False),
            pa.field("channels", pa.list_(pa.string()), nullable=False),
            pa.field("missing_fraction", pa.float64(), nullable=False),
            pa.field(SERIES, pa.list_(pa.list_(pa.float32(), samples)), nullable=False),
        ]
    )


def build_shard(
    rows: Sequence[Row],
    series: Sequence[NDArray[np.float32]],
    samples: int,
    metadata: Mapping[str, Any],
) -> bytes:
    """An Arrow file of one row a window.

    Args:
        rows: where each is from.
        series: (C_i, samples) each.
        samples: of a series.
        metadata: kept in the schema.
    """
    import pyarrow as pa

    joined = np.concatenate([np.empty((0, samples), np.float32), *series]).reshape(-1)
    channels = pa.FixedSizeListArray.from_arrays(pa.array(joined, pa.float32()), samples)
    offsets = pa.array(np.cumsum([0, *map(len, series)]), pa.int32())
    schema = _shard_schema(samples).with_metadata(
        {METADATA_KEY: json.dumps(metadata, separators=(",", ":")).encode()}
    )
    table = pa.Table.from_arrays(
        [
            pa.array([row.recording for row in rows], pa.string()),
            pa.array([row.window.start for row in rows], pa.float64()),
            pa.array([list(row.channels) for row in rows], pa.list_(pa.string())),
            pa.array([row.missing_fraction for row in rows], pa.float64()),
            pa.ListArray.from_arrays(offsets, channels),
        ],
        schema=schema,
    )
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


class _Run:
    """A run under the lock of its folder: what is committed, what is waiting for its shard."""

    def __init__(
        self,
        folder: SeriesFolder,
        inputs: Sequence[Surveyed],
        settings: EncodeSettings,
        previous: dict[str, Any] | None,
        *,
        discard: bool,
    ) -> None:
        assert settings.window is not None
        self.folder, self.settings = folder, settings
        self.samples = window_samples(settings.window)
        units = plan_units(
            [entry.windows for entry in inputs],
            lambda i, count: len(inputs[i].channels),
            UNIT_CHANNELS,
            lambda i, j: len(inputs[i].channels),
        )
        self.plan = Plan(tuple(inputs), tuple(units), 0)
        self.id: str = previous["run"] if previous else secrets.token_hex(8)
        self.started: str = previous["started"] if previous else now()
        self.tally, self.flat_channels = Tally(), 0
        self.done: set[int] = set()
        self.complete_before = previous is not None and previous["state"] == "complete"
        if previous is not None:
            self._read_shards()
        elif discard:
            folder.clear()
        self._start_buffer()

    def _read_shards(self) -> None:
        for part in self.folder.parts(self.id):
            units = set(part.metadata["units"])
            if units & self.done or not units <= set(range(len(self.plan.units))):
                raise OutputError(
                    f"{part.path} repeats work units, or holds others; remove it and run again"
                )
            self.done |= units
            self.tally.add(Tally.from_dict(part.metadata["tally"]))
            self.flat_channels += part.metadata["flat_channels"]

    def prepare(self, readers: Readers, progress: Progress) -> Summary:
        left = [unit for unit in self.plan.units if unit.index not in self.done]
        if not left:
            if self.plan.units and not self.complete_before:
                self._write_manifest("complete")
            return self._summary(already_complete=bool(self.plan.units))
        self._write_manifest("running")
        total = sum(unit.windows for unit in self.plan.units)
        progress.start(total, total - sum(unit.windows for unit in left))
        jobs = plan_jobs(self.plan, self.done, self.settings, None)
        try:
            with (
                graceful_stop(progress.stopping) as stopped,
                contextlib.closing(readers.prepare(jobs, self.settings, stopped)) as prepared,
            ):
                for unit in prepared:
                    self._add(unit)
                    progress.advance(len(unit.rows))
            self._flush()
            self._write_manifest(
                "complete" if len(self.done) == len(self.plan.units) else "interrupted"
            )
        except OutputError:
            raise
        except BaseException:
            self._flush()  # what is whole is kept, whatever went wrong beside it
            raise
        finally:
            progress.close()
        return self._summary(already_complete=False)

    def _summary(self, already_complete: bool) -> Summary:
        return Summary(
            output=str(self.folder.path),
            recordings=len(self.plan.inputs),
            windows=sum(entry.windows for entry in self.plan.inputs),
            prepared=self.tally.ok,
            skipped=dict(self.tally.skipped),
            flat_channels=self.flat_channels,
            failed={e.id: e.error for e in self.plan.inputs if e.error is not None}
            | self.tally.failed,
            notes={entry.id: entry.notes for entry in self.plan.inputs if entry.notes},
            interrupted=len(self.done) < len(self.plan.units),
            already_complete=already_complete,
        )

    def _write_manifest(self, state: str) -> None:
        manifest = build_manifest(
            run=self.id,
            state=state,
            started=self.started,
            settings=self.settings,
            model={},
            inputs=self.plan.inputs,
            units=len(self.plan.units),
            done=len(self.done),
            tally=self.tally,
        )
        del manifest["model"]
        manifest["format"] = self.folder.manifest_format
        manifest["counts"]["flat_channels"] = self.flat_channels
        self.folder.write_manifest(manifest)

    # --- shards --------------------------------------------------------------------------------------

    def _start_buffer(self) -> None:
        self._units: list[int] = []
        self._rows: list[Row] = []
        self._series: list[NDArray[np.float32]] = []
        self._buffered, self._buffered_flat = Tally(), 0
        self._flushed_at = time.perf_counter()

    def _add(self, unit: PreparedUnit) -> None:
        """Buffers a unit's windows without their flat channels; writes a shard when it is full."""
        tally = Tally(failed=unit.failed)
        data = iter(unit.data)
        for row in unit.rows:
            if row.status != OK:
                tally.skip(row.status)
                continue
            window = next(data)
            faults = channel_faults(window)
            good = np.flatnonzero(faults == "")
            if not len(good):
                tally.skip(FLAT_WINDOW if (faults == FLAT).all() else NOT_FINITE)
                continue
            self._buffered_flat += len(window) - len(good)
            row.channels = tuple(row.channels[i] for i in good)
            self._rows.append(row)
            self._series.append(window[good])
            tally.ok += 1
        tally.seconds |= {"read": unit.read_seconds, "prepare": unit.prepare_seconds}
        self._units.append(unit.index)
        self._buffered.add(tally)
        size = sum(series.nbytes for series in self._series)
        if size >= SHARD_BYTES or time.perf_counter() - self._flushed_at >= SHARD_SECONDS:
            self._flush()

    def _flush(self) -> None:
        """Commits what is buffered as one shard."""
        if not self._units:
            return
        metadata = {
            "schema": SCHEMA_VERSION,
            "version": __version__,
            "run": self.id,
            "units": self._units,
            "tally": self._buffered.to_dict(),
            "flat_channels": self._buffered_flat,
        }
        self.folder.write_part(build_shard(self._rows, self._series, self.samples, metadata))
        self.done.update(self._units)
        self.tally.add(self._buffered)
        self.flat_channels += self._buffered_flat
        self._start_buffer()
