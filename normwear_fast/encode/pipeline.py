"""A run: recordings -> windows -> work units -> model -> parts, each beside the next.

What decides the rows and commits them is here, once; an `Engine` prepares and encodes the units, in
this process (`normwear_fast.encode.local`) or on a cluster (`normwear_fast.encode.ray_engine`).
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from normwear_fast import __version__
from normwear_fast.encode.manifest import (
    Tally,
    build_manifest,
    check_same_inputs,
    check_same_model,
    check_same_settings,
    inputs_before,
    now,
)
from normwear_fast.encode.output import (
    SCHEMA_VERSION,
    Embedding,
    OutputFolder,
    build_table,
    encode_part,
)
from normwear_fast.encode.patches import PatchStore, require_zarr
from normwear_fast.encode.prepare import NOT_FINITE, OK, Job, JobUnit, PreparedUnit, Source
from normwear_fast.encode.readers import Readers
from normwear_fast.encode.settings import EncodeSettings, window_samples
from normwear_fast.encode.survey import (
    MisnamedRecording,
    Surveyed,
    find_inputs,
    states_of,
    survey,
    windows_of,
)
from normwear_fast.encode.units import Unit, group_jobs, plan_units
from normwear_fast.encode.windows import Tiling, WindowList, planned_duration
from normwear_fast.errors import NormWearError, OutputError
from normwear_fast.interrupts import graceful_stop
from normwear_fast.recordings.base import FoundRecording

if TYPE_CHECKING:
    from normwear_fast.config import NormWearConfig
    from normwear_fast.model import FastNormWear

PART_BYTES = 64 * 2**20
"""Embeddings held before they become a part: some 20,000 channel-windows of the released model."""

PART_SECONDS = 30.0
"""Work units wait no longer than this (or one unit's time) for their part: what a kill can cost."""

PATCH_UNIT_TOKENS = 131_072
"""Largest default unit for patch-level output: its 200 MB of float16 are one shard, written whole."""


class Progress(Protocol):
    """Told how a run gets on."""

    def surveyed(self, done: int, total: int) -> None: ...
    def start(self, windows: int, done: int) -> None: ...
    def advance(self, windows: int) -> None: ...
    def stopping(self) -> None: ...
    def close(self) -> None: ...


class Silent:
    """No progress shown."""

    def surveyed(self, done: int, total: int) -> None:
        pass

    def start(self, windows: int, done: int) -> None:
        pass

    def advance(self, windows: int) -> None:
        pass

    def stopping(self) -> None:
        pass

    def close(self) -> None:
        pass


@dataclass
class Summary:
    """What came of a run.

    Args:
        output: the folder.
        recordings, windows: of the inputs.
        units, units_done: work units in all, and committed.
        tally: of everything committed, in this and earlier sessions.
        failed: recordings that could not be encoded, and why.
        notes: what readers had to say, by recording.
        weights: where they came from; a source of "random" means the embeddings mean nothing.
        encoded: windows with an embedding from this session.
        seconds: this session's, by stage.
        interrupted: stopped before the end, by request.
        already_complete: there was nothing left to do.
    """

    output: str
    recordings: int
    windows: int
    units: int
    units_done: int
    tally: Tally
    failed: dict[str, str]
    notes: dict[str, tuple[str, ...]]
    weights: dict[str, Any] = field(default_factory=dict)
    encoded: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    interrupted: bool = False
    already_complete: bool = False

    @property
    def device_busy(self) -> float:
        """Part of this session's time in which the devices were encoding."""
        wall = self.seconds.get("wall", 0.0)
        return min(1.0, self.seconds["encode"] / wall) if wall else 0.0

    @property
    def exit_code(self) -> int:
        if self.interrupted:
            return 130
        return 1 if self.failed else 0


@dataclass(frozen=True)
class Plan:
    """The windows and work units of a run.

    Args:
        inputs: every recording, the ones that cannot be encoded too.
        units: in order.
        tokens: of all windows.
    """

    inputs: tuple[Surveyed, ...]
    units: tuple[Unit, ...]
    tokens: int


Embeddings = Sequence[NDArray[Any]]
"""One a window whose status is "ok", in order."""

Encoded = tuple[PreparedUnit, Embeddings, float]
"""A unit (its data may be gone), its embeddings, and the seconds that took of all devices: one second
of one of two is half a second."""


@dataclass(frozen=True)
class ModelInfo:
    """What a run has to know of its model.

    Args:
        provenance: what decides its numbers, for the manifest.
        config: its size.
        device_type: ``cpu`` or ``cuda``.
    """

    provenance: dict[str, Any]
    config: NormWearConfig
    device_type: str

    @classmethod
    def of(cls, model: FastNormWear) -> ModelInfo:
        return cls(model.provenance(), model.config, model.device.type)


class Engine(Protocol):
    """Where units are prepared and encoded. What it returns depends on neither place nor timing."""

    def start(
        self, load_models: Callable[[int | None], Sequence[FastNormWear]], threads: int | None
    ) -> ModelInfo:
        """Gets ready, with that many CPU threads a model (None: as it likes)."""

    def encode(
        self, jobs: Iterator[Job], settings: EncodeSettings, stopped: Callable[[], bool]
    ) -> Generator[Encoded]:
        """Every unit of the jobs once, in any order; ends early once ``stopped``."""

    def close(self) -> None: ...


def default_tokens(settings: EncodeSettings, device_type: str) -> EncodeSettings:
    """The settings with the device's micro-batch and unit sizes where they say none."""
    from normwear_fast.engine import UNIT_BATCHES, default_batch_tokens

    bounded = settings.unit_tokens is None and settings.pool == "patch"
    usual = default_batch_tokens(device_type)
    batch = settings.batch_tokens or (min(usual, PATCH_UNIT_TOKENS) if bounded else usual)
    unit = settings.unit_tokens or UNIT_BATCHES * batch
    if bounded:
        unit = min(unit, max(batch, PATCH_UNIT_TOKENS))
    return replace(settings, batch_tokens=batch, unit_tokens=unit)


def plan_run(
    inputs: Sequence[Surveyed],
    settings: EncodeSettings,
    windows: WindowList | None,
    config: NormWearConfig | None = None,
) -> Plan:
    """Cuts surveyed recordings into work units; ``settings`` must have their token sizes."""
    from normwear_fast.packing import window_tokens

    assert settings.unit_tokens is not None

    def tokens_of(i: int, duration: float) -> int:
        channels, samples = len(inputs[i].channels), window_samples(duration)
        return window_tokens(channels, samples, settings.optimized_cwt, config)

    def each(i: int, count: int) -> int | None:
        if settings.window is not None:
            return tokens_of(i, settings.window)
        # A shard is a fixed number of windows: patch-level units count each as the longest.
        if settings.pool == "patch":
            return max(listed(i, j) for j in range(count))
        return None

    def listed(i: int, j: int) -> int:
        assert windows is not None
        listed = float(windows.recordings[inputs[i].id].durations[j])
        return tokens_of(i, planned_duration(listed, inputs[i].duration, settings.max_missing))

    counts = [entry.windows for entry in inputs]
    units = plan_units(counts, each, settings.unit_tokens, listed)
    if settings.window is not None:
        total = sum(
            count * tokens_of(i, settings.window) for i, count in enumerate(counts) if count
        )
    else:
        total = sum(listed(i, j) for i, count in enumerate(counts) for j in range(count))
    return Plan(tuple(inputs), tuple(units), total)


def plan_jobs(
    plan: Plan, done: set[int], settings: EncodeSettings, windows: WindowList | None
) -> Iterator[Job]:
    """The jobs that prepare every unit not done yet."""
    for units in group_jobs(unit for unit in plan.units if unit.index not in done):
        places: dict[int, int] = {}
        for unit in units:
            for span in unit.spans:
                places.setdefault(span.recording, len(places))
        yield Job(
            sources=tuple(_source(plan.inputs[i], settings, windows) for i in places),
            units=tuple(
                JobUnit(
                    unit.index,
                    tuple((places[span.recording], span.first, span.stop) for span in unit.spans),
                )
                for unit in units
            ),
        )


def _source(entry: Surveyed, settings: EncodeSettings, windows: WindowList | None) -> Source:
    if windows is not None:
        wanted = windows_of(entry.id, entry.duration, settings, windows)
        return Source(entry.id, entry.path, entry.channels, wanted)
    assert settings.window is not None
    assert settings.hop is not None
    tiling = Tiling(settings.window, settings.hop, entry.windows)
    return Source(entry.id, entry.path, entry.channels, tiling)


def embedding_form(plan: Plan, settings: EncodeSettings, embed_dim: int) -> Embedding | None:
    """The form of the embedding column, from the settings and the inputs alone; None for patches."""
    if settings.pool == "patch":
        return None
    if settings.channel_pool == "keep":
        return Embedding(per_channel=True, width=embed_dim)
    if settings.channel_pool == "mean":
        return Embedding(per_channel=False, width=embed_dim)
    counts = {len(entry.channels) for entry in plan.inputs if entry.windows}
    return Embedding(False, counts.pop() * embed_dim if len(counts) == 1 else None)


def encode_prepared(
    model: FastNormWear, unit: PreparedUnit, settings: EncodeSettings
) -> Embeddings:
    """What the model makes of a unit's windows: (C, E) float32 each; (C, T, E) float16 for patches.

    Raises:
        NormWearError: the device's memory does not hold one of its windows.
    """
    from normwear_fast.packing import window_tokens

    if not unit.data:
        return []
    assert settings.batch_tokens is not None
    # A window larger than the micro-batch makes the unit's larger.
    largest = max(
        window_tokens(channels, samples, model.optimized_cwt, model.config)
        for channels, samples in {window.shape for window in unit.data}
    )
    budget = max(settings.batch_tokens, largest)
    pool = cast('Literal["mean", "cls", "patch"]', settings.pool)
    try:
        embeddings = model.encode_unit(unit.data, pool=pool, batch_tokens=budget)
    except Exception as error:
        if type(error).__name__ != "OutOfMemoryError":
            raise
        row = unit.rows[0]
        raise NormWearError(
            f"the device ran out of memory in recording {row.recording} near "
            f"{row.window.start:g} s; use shorter windows or fewer channels"
        ) from error
    if pool != "patch":
        return embeddings
    with np.errstate(over="ignore"):  # what float16 cannot hold is infinite, and skipped later
        return [embedding.astype(np.float16) for embedding in embeddings]


def pool_channels(embedding: NDArray[Any], how: str) -> NDArray[Any]:
    """(C, E) as it is, its mean over channels (E,), or the channels one after another (C * E,)."""
    if how == "keep":
        return embedding
    return embedding.mean(axis=0) if how == "mean" else embedding.reshape(-1)


def encode_recordings(
    inputs: Sequence[str | Path],
    output: str | Path,
    settings: EncodeSettings,
    load_models: Callable[[int | None], Sequence[FastNormWear]],
    *,
    windows: WindowList | None = None,
    workers: int = 0,
    overwrite: bool = False,
    progress: Progress | None = None,
    engine: Engine | None = None,
) -> Summary:
    """Encodes recordings into an output folder, or goes on with what a stopped run left there.

    The rows are decided by inputs, settings and weights; not by workers, timing, kills or retries.

    Args:
        inputs: files and folders.
        output: folder of the Parquet parts and manifest.json.
        settings: what decides the rows.
        load_models: called once with the CPU threads to use (None: as it likes) when inputs and
            output are known to be good; a model a device, all the same.
        windows: the list of windows whose digest is ``settings.windows``.
        workers: reader processes of the local engine; 0 reads in this one, which then waits for a
            reader that hangs.
        overwrite: discard an earlier run in that folder.
        progress: told how it gets on.
        engine: where units are prepared and encoded; by default here.

    Raises:
        UsageError: inputs, windows or channels that are not there.
        OutputError: the folder cannot be written, is in use, or holds a run that differs.
        WeightsError: from ``load_models``.
    """
    progress = progress or Silent()
    readers = Readers(workers)
    if engine is None:
        from normwear_fast.encode.local import LocalEngine

        engine = LocalEngine(readers)
    if settings.pool == "patch":
        require_zarr()
    found = find_inputs(inputs, output)
    with OutputFolder(output) as folder, contextlib.closing(engine), contextlib.closing(readers):
        before = folder.read_manifest()
        previous = None if overwrite else before
        if previous is None:
            surveyed = survey(
                found,
                settings,
                windows,
                lambda done: progress.surveyed(done, len(found)),
                readers.look,
            )
        else:
            surveyed = _resume_inputs(previous, found, settings, windows, folder.path)
            settings = replace(
                settings,
                batch_tokens=previous["settings"]["batch_tokens"],
                unit_tokens=previous["settings"]["unit_tokens"],
            )
        if not any(entry.windows for entry in surveyed):
            return _nothing(folder.path, surveyed)
        model = engine.start(load_models, previous["model"]["threads"] if previous else None)
        if previous is None:
            settings = default_tokens(settings, model.device_type)
            if before is not None:
                folder.clear()
        else:
            check_same_model(previous, model.provenance, str(folder.path))
        plan = plan_run(surveyed, settings, windows, model.config)
        run = _Run(folder, plan, settings, model, windows, previous)
        return run.encode(engine, windows, progress)


def _resume_inputs(
    manifest: dict[str, Any],
    found: Sequence[FoundRecording],
    settings: EncodeSettings,
    windows: WindowList | None,
    where: Path,
) -> list[Surveyed]:
    """What the earlier session found in the inputs, once they are known to be the same."""
    check_same_settings(manifest, settings, str(where))
    listed = [item for item in found if windows is None or item.id in windows.recordings]
    check_same_inputs(manifest, states_of(listed), str(where))
    paths = {item.id: str(item.path) for item in found if not isinstance(item, MisnamedRecording)}
    entries = inputs_before(manifest, settings, windows, str(where))
    return [replace(entry, path=paths.get(entry.id, entry.path)) for entry in entries]


def _nothing(output: Path, surveyed: Sequence[Surveyed]) -> Summary:
    """The summary of a run of which no recording can be encoded; nothing is written."""
    return Summary(
        output=str(output),
        recordings=len(surveyed),
        windows=0,
        units=0,
        units_done=0,
        tally=Tally(),
        failed={entry.id: entry.error for entry in surveyed if entry.error is not None},
        notes={},
    )


class _Run:
    """A run under the lock of its folder: what is committed, what is waiting for its part."""

    def __init__(
        self,
        folder: OutputFolder,
        plan: Plan,
        settings: EncodeSettings,
        model: ModelInfo,
        windows: WindowList | None,
        previous: dict[str, Any] | None,
    ) -> None:
        self.folder, self.plan, self.settings = folder, plan, settings
        self.provenance = provenance = model.provenance
        self.id: str = previous["run"] if previous else secrets.token_hex(8)
        self.started: str = previous["started"] if previous else now()
        self.form = embedding_form(plan, settings, provenance["config"]["embed_dim"])
        self.done: set[int] = set()
        self.tally = Tally()
        self.session = Tally()
        self.complete_before = previous is not None and previous["state"] == "complete"
        self._read_parts()
        if previous is None:
            self._write_manifest("running")
        self.patches: PatchStore | None = None
        if settings.pool == "patch":
            self.patches = PatchStore(folder, plan, settings, model, windows, self.id, self.done)
        self._start_buffer()

    def _read_parts(self) -> None:
        for part in self.folder.parts(self.id):
            for index, rows in part.metadata["units"]:
                known = index < len(self.plan.units) and rows <= self.plan.units[index].windows
                if index in self.done or not known:
                    raise OutputError(
                        f"{part.path} repeats work unit {index}, or holds another one; remove it and "
                        "run again"
                    )
                self.done.add(index)
            self.tally.add(Tally.from_dict(part.metadata["tally"]))

    def _write_manifest(self, state: str) -> None:
        self.folder.write_manifest(
            build_manifest(
                run=self.id,
                state=state,
                started=self.started,
                settings=self.settings,
                model=self.provenance,
                inputs=self.plan.inputs,
                units=len(self.plan.units),
                done=len(self.done),
                tally=self.tally,
            )
        )

    # --- encoding ------------------------------------------------------------------------------------

    def encode(self, engine: Engine, windows: WindowList | None, progress: Progress) -> Summary:
        left = [unit for unit in self.plan.units if unit.index not in self.done]
        if not left:
            if not self.complete_before:
                self._write_manifest("complete")
            return self._summary(interrupted=False, already_complete=True)
        total = sum(unit.windows for unit in self.plan.units)
        progress.start(total, total - sum(unit.windows for unit in left))
        jobs = plan_jobs(self.plan, self.done, self.settings, windows)
        try:
            with (
                graceful_stop(progress.stopping) as stopped,
                contextlib.closing(engine.encode(jobs, self.settings, stopped)) as encoded,
            ):
                for unit, embeddings, seconds in encoded:
                    self._add(unit, embeddings, seconds)
                    progress.advance(len(unit.rows))
            self._flush()
            interrupted = len(self.done) < len(self.plan.units)
            self._write_manifest("interrupted" if interrupted else "complete")
        except OutputError:
            raise
        except BaseException:
            self._flush()  # what is whole is kept, whatever went wrong beside it
            raise
        finally:
            progress.close()
        return self._summary(interrupted, already_complete=False)

    def _summary(self, interrupted: bool, already_complete: bool) -> Summary:
        failed = {e.id: e.error for e in self.plan.inputs if e.error is not None}
        return Summary(
            output=str(self.folder.path),
            recordings=len(self.plan.inputs),
            windows=sum(entry.windows for entry in self.plan.inputs),
            units=len(self.plan.units),
            units_done=len(self.done),
            tally=self.tally,
            failed=failed | self.tally.failed,
            notes={entry.id: entry.notes for entry in self.plan.inputs if entry.notes},
            weights=self.provenance["weights"],
            encoded=self.session.ok,
            seconds=self.session.seconds,
            interrupted=interrupted,
            already_complete=already_complete,
        )

    # --- parts ---------------------------------------------------------------------------------------

    def _start_buffer(self) -> None:
        self._units: list[tuple[int, int]] = []
        self._tables: list[Any] = []
        self._buffered = Tally()
        self._flushed_at = time.perf_counter()

    def _add(self, unit: PreparedUnit, embeddings: Embeddings, seconds: float) -> None:
        """Buffers an encoded unit; writes a part when there is enough for one."""
        started = time.perf_counter()
        tally = Tally(
            failed=unit.failed, statistics=unit.statistics, flat=unit.flat, lacking=unit.lacking
        )
        results = iter(embeddings)
        values: list[NDArray[Any] | None] = []
        for row in unit.rows:
            value = next(results) if row.status == OK else None
            if value is not None and not np.isfinite(value).all():
                row.status, value = NOT_FINITE, None
            if value is None:
                tally.skip(row.status)
                values.append(None)
            else:
                tally.ok += 1
                values.append(pool_channels(value, self.settings.channel_pool))
        if self.patches is not None:  # first, so that what a part speaks of is there
            self.patches.write(unit, values)
        self._tables.append(build_table(unit.rows, values, self.form))
        self._units.append((unit.index, len(unit.rows)))
        tally.seconds |= {
            "read": unit.read_seconds,
            "prepare": unit.prepare_seconds,
            "encode": seconds,
            "write": time.perf_counter() - started,
        }
        self._buffered.add(tally)
        size = sum(table.nbytes for table in self._tables)
        if size >= PART_BYTES or time.perf_counter() - self._flushed_at >= PART_SECONDS:
            self._flush()

    def _flush(self) -> None:
        """Commits what is buffered as one part."""
        if not self._units:
            return
        import pyarrow as pa

        started = time.perf_counter()
        self._buffered.seconds["wall"] = started - self._flushed_at
        metadata = {
            "schema": SCHEMA_VERSION,
            "version": __version__,
            "run": self.id,
            "weights": self.provenance["weights"],
            "scalogram": self.settings.scalogram,
            "pool": self.settings.pool,
            "channel_pool": self.settings.channel_pool,
            "precision": self.provenance["precision"],
            "units": self._units,
            "tally": self._buffered.to_dict(),
        }
        self.folder.write_part(encode_part(pa.concat_tables(self._tables), self.form, metadata))
        self.done.update(index for index, _ in self._units)
        self.tally.add(self._buffered)
        self.session.add(self._buffered)
        self._start_buffer()
        # This part's own writing is counted with the next one's.
        self._buffered.seconds["write"] = time.perf_counter() - started
        self._flushed_at = started
