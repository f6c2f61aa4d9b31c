"""What a fine-tuning goes on from: when its checkpoint is written, and what a run must agree in."""

from __future__ import annotations

import contextlib
import json
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from numbers import Real
from pathlib import Path
from typing import Any, cast

import numpy as np
from torch import Tensor

from normwear_fast.checkpoint import CHECKPOINT_FILE, Checkpoint, crc32, locked
from normwear_fast.errors import OutputError, one_line, reading
from normwear_fast.files import COUNT
from normwear_fast.finetune.data import LabelledWindows

_ROW = {
    "stage": str,
    "epoch": COUNT,
    "validation_loss": Real,
    "skipped_steps": COUNT,
    "seconds": float,
}
_PROGRESS = {
    "epoch": COUNT,
    "batch": COUNT,
    "best": Real,
    "best_epoch": COUNT,
    "losses": [Real],
    "rows": [_ROW],
    "parameters": [Tensor],
    "kept": [Tensor],
    "optimizer": {"state": dict, "param_groups": [{"lr": float}]},
}
_OPTIONAL = {"embeddings": Tensor, "finite": Tensor, "head": dict, "progress": _PROGRESS}
"""The embeddings made so far, until the head is trained; afterwards which windows had finite ones, and
the head as a whole; and where the stage stands."""

CHECKPOINT = Checkpoint(
    "finetune",
    {"stage": str, "history": [_ROW], **{name: (form, None) for name, form in _OPTIONAL.items()}},
)

LEAST_SECONDS = 10.0
"""Of training between two checkpoints: what takes less is as quickly done again."""

TIMES_ITS_WRITING = 20
"""A checkpoint comes when training has taken so many times as long as writing the last one did: no more
than that can be lost, and a twentieth of the time goes into it. At the released size one of ``full`` is
2.0 GB: weights, two moments and the best so far."""


class Keeper:
    """Writes the checkpoint of a run from time to time.

    Args:
        folder: of the run; None writes nothing.
        identity: what a run that goes on must agree in.
    """

    def __init__(self, folder: Path | None, identity: Mapping[str, Any]) -> None:
        self.folder, self.identity = folder, identity
        self._due = time.monotonic() + LEAST_SECONDS
        self.stopped = False

    def offer(self, state: Callable[[], dict[str, Any]], stopping: bool) -> None:
        """Writes ``state()`` if it is time to, or if the run was asked to stop, and then none after it:
        what a run still does before it ends, as judging half an epoch, is none of its steps."""
        if self.stopped:
            return
        self.stopped = stopping
        if self.folder is None or not (stopping or time.monotonic() >= self._due):
            return
        began = time.monotonic()
        CHECKPOINT.save(self.folder, {"identity": dict(self.identity), **state()})
        ended = time.monotonic()
        self._due = ended + max(LEAST_SECONDS, TIMES_ITS_WRITING * (ended - began))

    def restoring(self) -> contextlib.AbstractContextManager[None]:
        """Around what takes something out of a checkpoint: what does not fit is one line."""
        what = "does not fit this run; start anew with --overwrite or in another folder"
        assert self.folder is not None
        return reading(self.folder / CHECKPOINT_FILE, OutputError, what)


def state_of(stage: str, **known: Any) -> dict[str, Any]:
    """What a checkpoint holds, of which a stage knows a part."""
    return {"stage": stage, "history": [], **dict.fromkeys(_OPTIONAL), **known}


def identity_of(
    data: LabelledWindows, settings: Mapping[str, Any], weights: Mapping[str, Tensor]
) -> dict[str, Any]:
    """What decides the result of a run: settings, windows, labels, weights."""
    windows = 0
    for window in data.windows:
        windows = zlib.crc32(np.ascontiguousarray(window).data, windows)
    labels = zlib.crc32(np.ascontiguousarray(data.labels).data)
    split = None if data.split is None else data.split.tolist()
    for what in (data.task, data.subjects.tolist(), split, data.origins):
        labels = zlib.crc32(repr(what).encode(), labels)
    identity = {
        **settings,
        **{f"preparation.{name}": value for name, value in asdict(data.preparation).items()},
        "windows": len(data),
        "windows_crc32": windows,
        "labels_crc32": labels,
        "weights_crc32": crc32(weights),
    }
    return cast(dict[str, Any], plain(identity))


def plain(value: Any) -> Any:
    """The same without NumPy's numbers and texts, which loading refuses as it does all classes."""
    return json.loads(json.dumps(value, default=lambda number: number.item()))


@contextlib.contextmanager
def run_folder(folder: Path) -> Iterator[None]:
    """Makes a run's folder and holds it; one that nothing was written to is gone afterwards."""
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be made ({one_line(error)})") from None
    try:
        with locked(folder):
            yield
    finally:
        if made:
            with contextlib.suppress(OSError):
                folder.rmdir()
