"""Recordings to predictions: the pipeline of ``encode``, the head, and one Parquet file."""

from __future__ import annotations

import contextlib
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from normwear_fast import __version__
from normwear_fast.encode.local import LocalEngine
from normwear_fast.encode.output import METADATA_KEY, _replace
from normwear_fast.encode.pipeline import (
    default_tokens,
    plan_jobs,
    plan_run,
    pool_channels,
)
from normwear_fast.encode.prepare import NOT_FINITE, OK, PreparedUnit
from normwear_fast.encode.readers import Readers
from normwear_fast.encode.settings import EncodeSettings, join_names
from normwear_fast.encode.survey import Surveyed, find_inputs, survey
from normwear_fast.encode.windows import WindowList
from normwear_fast.errors import OutputError, UsageError, one_line
from normwear_fast.files import check_writable, sync
from normwear_fast.finetune.predictor import Prediction, Predictor, prediction_columns

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class PredictSummary:
    """What came of a run.

    Args:
        output: the file; "" where there was nothing to write.
        recordings, windows: of the inputs.
        predicted: windows with a prediction.
        skipped: windows without one, by why.
        failed: recordings without predictions, and why.
        classes: windows of each predicted class.
        seconds: taken.
    """

    output: str
    recordings: int
    windows: int
    predicted: int
    skipped: dict[str, int]
    failed: dict[str, str]
    classes: dict[str, int]
    seconds: float


def predict_recordings(
    inputs: Sequence[str | Path],
    output: str | Path,
    predictor: Predictor,
    *,
    window: float | None = None,
    hop: float | None = None,
    windows: WindowList | None = None,
    rate: float | None = None,
    workers: int = 0,
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> PredictSummary:
    """Predicts every window of recordings, cut and prepared as the training windows were.

    Args:
        inputs: files and folders.
        output: a Parquet file, written whole at the end: ``recording, window_id, start_s, duration_s,
            status``, and ``predicted`` with a ``probability_CLASS`` each, or a ``value_TARGET`` each;
            null where the status is not "ok".
        predictor: of :meth:`Predictor.from_pretrained`.
        window: seconds, for a model trained on windows of several lengths.
        hop: seconds from one window's start to the next; by default as in training.
        windows: a list of them instead.
        rate: Hz, of recordings whose format has no clock.
        workers: reader processes; 0 reads here.
        overwrite: replace a file that is there.
        progress: told windows done and in all.

    Raises:
        UsageError: inputs or channels that are not there, or windows of a length not trained on.
        OutputError: the file is there already, or cannot be written.
    """
    began = time.perf_counter()
    output = Path(output)
    _check_output(output, overwrite)
    settings = _settings(predictor, window, hop, windows, rate)
    with (
        contextlib.closing(Readers(workers)) as readers,
        contextlib.closing(LocalEngine(readers)) as engine,
    ):
        found = find_inputs(inputs, None)
        surveyed = [
            _fitting(entry, predictor)
            for entry in survey(found, settings, windows, look=readers.look)
        ]
        failed = {entry.id: entry.error for entry in surveyed if entry.error is not None}
        total = sum(entry.windows for entry in surveyed)
        model = engine.start(lambda threads: [predictor.encoder], None)
        settings = default_tokens(settings, model.device_type)
        plan = plan_run(surveyed, settings, windows, model.config)
        tables: dict[int, pa.Table] = {}
        skipped: Counter[str] = Counter()
        classes: Counter[str] = Counter()
        done = 0
        progress(0, total)
        jobs = plan_jobs(plan, set(), settings, windows)
        with contextlib.closing(engine.encode(jobs, settings, lambda: False)) as encoded:
            for unit, embeddings, _ in encoded:
                failed |= unit.failed
                prediction = _predict(predictor, unit, embeddings)
                tables[unit.index] = _table(unit, prediction)
                skipped.update(status for status in prediction.statuses if status != OK)
                classes.update(name for name in prediction.predicted if name is not None)
                done += len(unit.rows)
                progress(done, total)
    rows = sum(len(table) for table in tables.values())
    if rows:
        _write(output, [tables[index] for index in sorted(tables)], predictor, settings)
    return PredictSummary(
        output=str(output) if rows else "",
        recordings=len(surveyed),
        windows=total,
        predicted=rows - sum(skipped.values()),
        skipped=dict(skipped),
        failed=failed,
        classes={name: classes[name] for name in predictor.task.classes},
        seconds=time.perf_counter() - began,
    )


def _settings(
    predictor: Predictor,
    window: float | None,
    hop: float | None,
    windows: WindowList | None,
    rate: float | None,
) -> EncodeSettings:
    """The preparation of training as settings of the pipeline, with the windows asked for."""
    preparation = predictor.preparation
    if windows is not None:
        for recording, listed in windows.recordings.items():
            for place, duration in enumerate(listed.durations.tolist()):
                where = f"window {listed.ids[place]} of {recording}"
                predictor.check_duration(duration, where)
    elif window is not None:
        predictor.check_duration(window, "--window")
        preparation = replace(preparation, window=window)
    elif preparation.window is None:
        raise UsageError(
            "this model was trained on windows of several lengths: say which to predict with --window "
            "or --windows"
        )
    return preparation.settings(
        hop=hop, windows=windows, rate=rate, pool=predictor.pool, precision="auto"
    )


def _fitting(entry: Surveyed, predictor: Predictor) -> Surveyed:
    """The same, or as failed where its number of channels is not the trained one."""
    if not entry.windows or len(entry.channels) == predictor.preparation.channel_count:
        return entry
    return replace(
        entry,
        windows=0,
        error=f"{entry.path}: has {len(entry.channels)} channels ({join_names(entry.channels)}); this "
        f"model was trained on {predictor.preparation.describe_channels()}",
    )


def _predict(
    predictor: Predictor, unit: PreparedUnit, embeddings: Sequence[NDArray[np.float32]]
) -> Prediction:
    statuses = [row.status for row in unit.rows]
    width = len(predictor.task.classes or predictor.task.targets)
    values = np.full((len(statuses), width), np.nan, np.float32)
    kept = [place for place, status in enumerate(statuses) if status == OK]
    if kept:
        pooled = np.stack([pool_channels(each, predictor.channel_pool) for each in embeddings])
        values[kept] = predictor.predict_embeddings(pooled)
    for place in kept:
        if not np.isfinite(values[place]).all():
            values[place], statuses[place] = np.nan, NOT_FINITE
    return Prediction(predictor.task, values, statuses)


def _table(unit: PreparedUnit, prediction: Prediction) -> pa.Table:
    import pyarrow as pa

    return pa.table(
        {
            "recording": pa.array([row.recording for row in unit.rows], pa.string()),
            "window_id": pa.array([row.window.id for row in unit.rows], pa.string()),
            "start_s": pa.array([row.window.start for row in unit.rows], pa.float64()),
            "duration_s": pa.array([row.window.duration for row in unit.rows], pa.float64()),
            "status": pa.array(prediction.statuses, pa.string()),
            **prediction_columns(prediction),
        }
    )


def _check_output(output: Path, overwrite: bool) -> None:
    if output.suffix.lower() != ".parquet":
        raise UsageError(f"--output {output}: predictions are one Parquet file; end it in .parquet")
    if output.exists() and not (overwrite and output.is_file()):
        raise OutputError(f"{output}: exists; choose another file, or --overwrite")
    if not output.parent.is_dir():
        raise OutputError(f"{output}: there is no folder {output.parent}")
    check_writable(output.parent)


def _write(
    output: Path, tables: Sequence[pa.Table], predictor: Predictor, settings: EncodeSettings
) -> None:
    """The file, whole or not at all, with what made it in its metadata."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    metadata: dict[str, Any] = {
        "version": __version__,
        "model": predictor.encoder.weights.get("sha256"),
        "task": predictor.task.name,
        "preparation": asdict(predictor.preparation),
        "pool": predictor.pool,
        "channel_pool": predictor.channel_pool,
        "window": settings.window,
        "hop": settings.hop,
    }
    table = pa.concat_tables(tables).replace_schema_metadata(
        {METADATA_KEY: json.dumps(metadata).encode()}
    )
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    try:
        _replace(output, sink.getvalue().to_pybytes())
        sync(output.parent)
    except OSError as error:
        raise OutputError(f"{output}: cannot be written ({one_line(error)})") from None
