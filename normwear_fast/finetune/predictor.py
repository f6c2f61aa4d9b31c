"""A fine-tuned model: encoder, head, and what was done to the signals; and its folder.

A folder holds

- ``model.safetensors`` and ``config.json``: the encoder in the released layout, adapters merged, so that
  `FastNormWear.from_pretrained` and ``encode --weights`` take it;
- ``head.safetensors``: the head;
- ``finetune.json``: task, pooling, preparation, scores, where it comes from, and both files' SHA-256;
- ``epochs.csv`` and ``held_out.parquet``: how training went, and the held-out windows' predictions.

These appear together, by one rename, or not at all. While training goes on, and after Ctrl-C, there is
``checkpoint.pt`` too, from which it goes on.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from normwear_fast.checkpoint import CHECKPOINT_FILE, CHECKPOINT_TEMPORARY, locked
from normwear_fast.config import SAMPLING_RATE
from normwear_fast.encode.prepare import NOT_FINITE, OK
from normwear_fast.encode.settings import window_samples
from normwear_fast.errors import InputError, OutputError, UsageError, WeightsError, one_line
from normwear_fast.evaluate.registry import Task
from normwear_fast.files import check_writable, file_sha256, fits, read_json, sync
from normwear_fast.finetune.data import Origin, Preparation, prepare_windows
from normwear_fast.finetune.network import Head, HeadChannels, TokenPool
from normwear_fast.finetune.resume import CHECKPOINT, run_folder
from normwear_fast.inputs import rate_list, window_list
from normwear_fast.mne import with_own_rate
from normwear_fast.model import FastNormWear
from normwear_fast.tensor_files import own_storage, read_safetensors, write_safetensors
from normwear_fast.weights import CONFIG_FILE, WEIGHTS_FILE, expected_shapes, save_pretrained

HEAD_FILE = "head.safetensors"
DESCRIPTION_FILE = "finetune.json"
EPOCHS_FILE = "epochs.csv"
HELD_OUT_FILE = "held_out.parquet"
FORMAT = "normwear-fast finetune"
_OWN_FILES = {WEIGHTS_FILE, CONFIG_FILE, HEAD_FILE, DESCRIPTION_FILE, EPOCHS_FILE, HELD_OUT_FILE}
_OWN_FILES |= {CHECKPOINT_FILE, CHECKPOINT_TEMPORARY}
FORMAT_VERSION = 1

_DESCRIPTION = {
    "task": {"name": str, "classes": [str], "targets": [str]},
    "preparation": {
        "window": (float, None),
        "hop": (float, None),
        "channels": ([str], None),
        "channel_count": range(1, 2**16),
        "preprocess": str,
        "normalize": str,
        "max_missing": float,
    },
    "files": {str: str},
}
"""The form of what finetune.json says of the model; scores and provenance are for people."""


@dataclass(frozen=True)
class Prediction:
    """What is predicted of some windows, one row each.

    Args:
        task: with the names of classes or targets.
        values: (n, classes) probabilities, or (n, targets); NaN where the status is not "ok".
        statuses: "ok", or why there is no prediction.
    """

    task: Task
    values: NDArray[np.float32]
    statuses: list[str]

    @property
    def predicted(self) -> list[str | None]:
        """The likeliest class of each window; None where there is no prediction, or for targets."""
        if self.task.kind != "class":
            return [None] * len(self.statuses)
        return [
            self.task.classes[int(row.argmax())] if status == OK else None
            for row, status in zip(self.values, self.statuses, strict=True)
        ]


@dataclass
class Predictor:
    """Predicts classes or targets of windows.

    Args:
        encoder: with its weights as they were fine-tuned.
        head: on its pooled embeddings.
        task: what is predicted.
        pool, channel_pool: as of `FastNormWear.encode`.
        preparation: how windows are cut and preprocessed.
        description: scores, data, training and provenance, for finetune.json.
        history: a row an epoch.
        held_out: part -> (origin, subject, label, prediction) of its windows, where just trained.
    """

    encoder: FastNormWear
    head: Head
    task: Task
    pool: TokenPool
    channel_pool: HeadChannels
    preparation: Preparation
    description: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    held_out: dict[str, list[tuple[Origin, str, Any, NDArray[np.float32]]]] = field(
        default_factory=dict
    )

    def __post_init__(self) -> None:
        self.encoder.requires_grad_(False)
        self.head.requires_grad_(False)
        self.head.to(self.encoder.device)

    def to(self, device: str | torch.device) -> Predictor:
        """Moves encoder and head."""
        self.encoder.to(device)
        self.head.to(device)
        return self

    # --- predicting ----------------------------------------------------------------------------------

    def predict(
        self,
        windows: ArrayLike | Sequence[ArrayLike],
        sampling_rate: float | Sequence[float] = SAMPLING_RATE,
        *,
        preprocess: str | None = None,
        show_progress_bar: bool | None = None,
    ) -> Prediction:
        """Predictions of windows that are arrays, prepared as the training windows were.

        Args:
            windows: (B, C, L), or (C, L_i) arrays; the signal's own units, NaN where missing. Channels
                in the order of training, as long as the training windows.
            sampling_rate: Hz, one number or one a window.
            preprocess: other than in training: ``none`` for windows that are preprocessed already.

        Raises:
            InputError: another number of channels or another length than trained on (named).
        """
        windows, sampling_rate = with_own_rate(windows, sampling_rate)
        arrays = window_list(windows)
        rates = rate_list(sampling_rate, len(arrays))
        for index, (array, rate) in enumerate(zip(arrays, rates, strict=True)):
            self._check(array.shape[0], array.shape[1] / rate, f"window {index}")
        preparation = self.preparation
        if preprocess is not None:
            preparation = replace(preparation, preprocess=preprocess)
        prepared, statuses = prepare_windows(arrays, rates, preparation)
        values = np.full((len(arrays), len(self.task.classes or self.task.targets)), np.nan, "f4")
        ready = [window for window in prepared if window is not None]
        kept = [i for i, window in enumerate(prepared) if window is not None]
        if kept:
            embeddings = self.encoder.encode(
                ready,
                SAMPLING_RATE,
                pool=self.pool,
                channels=self.channel_pool,
                resample="never",
                show_progress_bar=show_progress_bar,
            )
            values[kept] = self.predict_embeddings(np.asarray(embeddings))
        for index in kept:
            if not np.isfinite(values[index]).all():
                values[index], statuses[index] = np.nan, NOT_FINITE
        return Prediction(self.task, values, statuses)

    @torch.inference_mode()
    def predict_embeddings(self, embeddings: NDArray[np.float32]) -> NDArray[np.float32]:
        """(n, F) pooled embeddings to (n, classes) probabilities or (n, targets)."""
        features = torch.from_numpy(np.ascontiguousarray(embeddings)).to(self.head.feature_mean)
        return self.head.predict(features).cpu().numpy()

    def _check(self, channels: int, duration: float, where: str) -> None:
        if channels != self.preparation.channel_count:
            raise InputError(
                f"{where} has {channels} channels; this model was trained on "
                f"{self.preparation.describe_channels()}"
            )
        self.check_duration(duration, where)

    def check_duration(self, duration: float, where: str) -> None:
        """An InputError unless windows of ``duration`` seconds are what was trained on."""
        window = self.preparation.window
        if window is not None and window_samples(duration) != window_samples(window):
            raise InputError(
                f"{where} lasts {duration:g} s; this model was trained on windows of {window:g} s"
            )

    # --- the folder ----------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Writes the folder that ``from_pretrained``, ``encode`` and ``predict`` load.

        Args:
            folder: made whole or not at all.
            overwrite: replace a fine-tuned model that is there; other files beside it stay.

        Raises:
            OutputError: something is there, a run is writing it, or the folder cannot be written.
        """
        folder = Path(folder)
        check_output(folder, overwrite=overwrite)
        with run_folder(folder):
            self._replace(folder)

    def _replace(self, folder: Path, *, unfinished: bool = False) -> None:
        """The folder by one rename; of an ``unfinished`` run with its checkpoint."""
        where = Path(os.path.realpath(folder))  # what a link leads to is replaced, not the link
        new, old = _beside(where, "new"), _beside(where, "old")
        try:
            shutil.rmtree(new, ignore_errors=True)  # of a run that was killed
            new.mkdir(parents=True)
            self._write(new)
            if unfinished and (folder / CHECKPOINT_FILE).exists():
                _copy(folder / CHECKPOINT_FILE, new / CHECKPOINT_FILE)
            if where.exists():
                where.rename(old)
            new.rename(where)
            sync(where.parent)
        except OSError as error:
            reason = one_line(error)
            raise OutputError(f"{folder}: the model cannot be written ({reason})") from None
        finally:
            shutil.rmtree(new, ignore_errors=True)
            _recover(where, ours=True)  # of "." this process now knows the old one only

    def _write(self, folder: Path) -> None:
        names = expected_shapes(self.encoder.config, decoder=False)
        state = self.encoder.state_dict()
        base = self.description.get("base", {})
        save_pretrained(
            folder,
            {name: state[name] for name in names},
            self.encoder.config,
            optimized_cwt=self.encoder.optimized_cwt,
            metadata={
                "fine_tuned_for": self.task.name,
                **{f"base_{k}": v for k, v in base.items()},
            },
        )
        write_safetensors(folder / HEAD_FILE, own_storage(self.head.state_dict()))
        shutil.copymode(folder / "config.json", folder / HEAD_FILE)
        (folder / EPOCHS_FILE).write_text(_csv(self.history), encoding="utf-8")
        if self.held_out:
            self._write_held_out(folder / HELD_OUT_FILE)
        values = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "task": {
                "name": self.task.name,
                "kind": self.task.kind,
                "classes": list(self.task.classes),
                "targets": list(self.task.targets),
            },
            "pool": self.pool,
            "channel_pool": self.channel_pool,
            "preparation": asdict(self.preparation),
            **self.description,
            "files": {name: file_sha256(folder / name) for name in (WEIGHTS_FILE, HEAD_FILE)},
        }
        text = json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        (folder / DESCRIPTION_FILE).write_text(text, encoding="utf-8")
        for path in [*folder.iterdir(), folder]:
            sync(path)

    def _write_held_out(self, path: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        rows = [(part, *row) for part, held in self.held_out.items() for row in held]
        values = np.stack([row[-1] for row in rows])
        columns: dict[str, Any] = {
            "split": [part for part, *_ in rows],
            "recording": [origin.recording for _, origin, *_ in rows],
            "window_id": [origin.window_id for _, origin, *_ in rows],
            "start_s": [origin.start for _, origin, *_ in rows],
            "duration_s": [origin.duration for _, origin, *_ in rows],
            "subject": [subject for _, _, subject, *_ in rows],
        }
        if self.task.kind == "class":
            columns["label"] = [self.task.classes[int(label)] for *_, label, _ in rows]
        else:
            truth = np.stack([np.atleast_1d(label) for *_, label, _ in rows])
            for place, name in enumerate(self.task.targets):
                columns[f"label_{name}"] = truth[:, place]
        columns |= prediction_columns(Prediction(self.task, values, [OK] * len(rows)))
        pq.write_table(pa.table(columns), path, compression="zstd")

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, precision: str = "auto", backend: str = "auto"
    ) -> Predictor:
        """A fine-tuned model from its folder.

        Args:
            folder: as ``finetune`` wrote it.
            precision, backend: as of `FastNormWear`.

        Raises:
            WeightsError: not such a folder, or its files do not belong together.
        """
        folder = Path(folder)
        values = _read_description(folder)
        task = Task(
            name=values["task"]["name"],
            group="state recognition",
            classes=tuple(values["task"]["classes"]),
            targets=tuple(values["task"]["targets"]),
        )
        preparation = _preparation(values["preparation"], folder)
        pool, channel_pool, files = values["pool"], values["channel_pool"], values["files"]
        if not (task.classes or task.targets):
            raise _not_ours(folder)
        encoder = FastNormWear.from_pretrained(folder, precision=precision, backend=backend)
        _check_digest(folder, WEIGHTS_FILE, encoder.weights["sha256"], files)
        if not (folder / HEAD_FILE).is_file():
            raise WeightsError(f"{folder}: has no {HEAD_FILE}; fine-tune again")
        _check_digest(folder, HEAD_FILE, file_sha256(folder / HEAD_FILE), files)
        stored = read_safetensors(folder / HEAD_FILE)
        channels = preparation.channel_count if channel_pool == "concat" else 1
        features = channels * encoder.config.embed_dim
        found = {name: tuple(value.shape) for name, value in stored.items()}
        # Before a head of any number of channels is made of what finetune.json says.
        fitting = found.get("linear.weight") == (len(task.classes or task.targets), features)
        head = Head(features if fitting else 1, task)
        if found != {name: tuple(value.shape) for name, value in head.state_dict().items()}:
            raise WeightsError(
                f"{folder / HEAD_FILE}: not a head for {preparation.describe_channels()} and "
                f"{len(task.classes or task.targets)} outputs, as {DESCRIPTION_FILE} has it"
            )
        head.load_state_dict(stored)
        own = ("format", "format_version", "task", "pool", "channel_pool", "preparation", "files")
        description = {key: value for key, value in values.items() if key not in own}
        return cls(encoder, head, task, pool, channel_pool, preparation, description)


def prediction_columns(prediction: Prediction) -> dict[str, Any]:
    """Columns of a table: ``predicted`` and a ``probability_CLASS`` each, or a ``value_TARGET`` each."""
    import pyarrow as pa

    missing = np.array([status != OK for status in prediction.statuses], dtype=bool)
    columns: dict[str, Any] = {}
    prefix, names = "value", prediction.task.targets
    if prediction.task.kind == "class":
        columns["predicted"] = pa.array(prediction.predicted, pa.string())
        prefix, names = "probability", prediction.task.classes
    for place, name in enumerate(names):
        column = np.ascontiguousarray(prediction.values[:, place])
        columns[f"{prefix}_{name}"] = pa.array(column, pa.float32(), mask=missing)
    return columns


def check_output(folder: Path, *, overwrite: bool, going_on: bool = False) -> None:
    """An OutputError unless a model may be written there: before training, not after it.

    Args:
        folder: where.
        overwrite: whether a fine-tuned model that is there may be replaced, or a run begun anew.
        going_on: whether a run that left its checkpoint there may go on.
    """
    _recover(folder)
    try:
        if not folder.exists():
            return check_writable(folder)
        if not folder.is_dir():
            raise OutputError(f"{folder}: exists and is no folder; choose another name")
        names = set(os.listdir(folder)) - {CHECKPOINT_TEMPORARY}
    except OSError as error:
        raise OutputError(f"{folder}: cannot be a model's folder ({one_line(error)})") from None
    where = Path(os.path.realpath(folder))
    if os.path.ismount(where):
        raise OutputError(
            f"{folder}: is a mount, and a model takes its folder's place as a whole; name a folder in it"
        )
    unfinished = CHECKPOINT_FILE in names
    if unfinished and not CHECKPOINT.is_in(folder):
        raise OutputError(
            f"{folder / CHECKPOINT_FILE}: not a checkpoint of finetune, or damaged; nothing in it was "
            "run; choose another folder, or move it away"
        )
    if names and not (overwrite or (going_on and unfinished)):
        raise OutputError(f"{folder}: exists; choose another folder, or --overwrite")
    if names and not (unfinished or DESCRIPTION_FILE in names):
        raise OutputError(
            f"{folder}: is no fine-tuned model, and will not be overwritten; choose a new folder"
        )
    check_writable(folder)
    check_writable(where.parent)


def _recover(folder: Path, *, ours: bool = False) -> None:
    """Ends what a kill between the renames of `Predictor._replace` left: the folder that was there before
    comes back, or, where the new one took its place, only what others had put into it.

    What another run holds is between its renames, and left to it.
    """
    folder = Path(os.path.realpath(folder))
    old = _beside(folder, "old")
    with contextlib.suppress(OSError, OutputError), nullcontext() if ours else locked(old):
        if old.is_dir() and not (folder / DESCRIPTION_FILE).exists():
            old.rename(folder)  # unless something else is there now
        elif old.is_dir():
            for path in old.iterdir():
                if path.name not in _OWN_FILES:
                    path.rename(folder / path.name)
            shutil.rmtree(old)


def _beside(folder: Path, which: str) -> Path:
    return folder.parent / f".{folder.name}.{which}"


def _copy(path: Path, copy: Path) -> None:
    """Gives a file a second name, or where the file system knows none, copies it."""
    try:
        os.link(path, copy)
    except OSError:
        shutil.copyfile(path, copy)


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _read_description(folder: Path) -> dict[str, Any]:
    path = folder / DESCRIPTION_FILE
    if not path.is_file():
        raise WeightsError(f"{folder}: holds no {DESCRIPTION_FILE}; a folder of finetune is right")
    values = read_json(path, WeightsError)
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise _not_ours(folder)
    if values.get("format_version") != FORMAT_VERSION:
        raise WeightsError(
            f"{path}: format_version is {values.get('format_version')!r}; this normwear-fast reads "
            f"{FORMAT_VERSION}"
        )
    if (
        not fits(values, _DESCRIPTION)
        or values.get("pool") not in get_args(TokenPool)
        or values.get("channel_pool") not in get_args(HeadChannels)
    ):
        raise _not_ours(folder)
    return values


def _preparation(values: dict[str, Any], folder: Path) -> Preparation:
    """What finetune.json says was done to the signals, if it can be done again."""
    names = values["channels"]
    try:
        found = Preparation(**values | {"channels": tuple(names) if names else None})
        replace(found, window=found.window or 6.0).settings()
    except (TypeError, UsageError) as error:  # a name or a value that is none of a preparation's
        raise WeightsError(f"{folder / DESCRIPTION_FILE}: preparation: {one_line(error)}") from None
    if found.normalize not in ("none", "window") or len(names or ()) not in (
        0,
        found.channel_count,
    ):
        raise _not_ours(folder)
    return found


def _not_ours(folder: Path) -> WeightsError:
    return WeightsError(f"{folder / DESCRIPTION_FILE}: not what finetune writes; fine-tune again")


def _check_digest(folder: Path, name: str, found: str, files: dict[str, Any]) -> None:
    if files.get(name) != found:
        raise WeightsError(
            f"{folder / name}: is not the file that {DESCRIPTION_FILE} speaks of; one of them was "
            "replaced or damaged"
        )
