"""What a run goes on from: everything that decides its next step, in one file that appears whole."""

from __future__ import annotations

import contextlib
import fcntl
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from normwear_fast.errors import OutputError, one_line
from normwear_fast.files import COUNT, fits
from normwear_fast.weights import check_pickled_names

CHECKPOINT_FILE = "checkpoint.pt"
FORMAT = "normwear-fast pretrain 1"
STATE = {"identity": dict, "step": COUNT, "skipped": COUNT, "model": dict, "optimizer": dict}
"""The form of what it holds beside its format."""


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the folder for one run; the lock goes with the process, however it ends."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(
                f"{folder}: another run is writing it; wait for its end, or give another folder"
            ) from None
        yield
    finally:
        os.close(handle)


def save_checkpoint(folder: Path, state: Mapping[str, Any]) -> None:
    """Writes ``checkpoint.pt``: beside it first, synced, then renamed over the one before.

    Args:
        state: tensors and plain values in dicts and lists, nothing that unpickling would run.

    Raises:
        OutputError: the folder cannot be written; the checkpoint before it is whole.
    """
    path = folder / CHECKPOINT_FILE
    temporary = path.with_name(f".{CHECKPOINT_FILE}.tmp")
    try:
        with temporary.open("wb") as file:
            torch.save({"format": FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    # torch.save reports a full disk as a RuntimeError of its zip writer.
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise OutputError(f"{path}: cannot be written ({one_line(error)})") from None


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """The state in ``checkpoint.pt`` on the CPU, or None where there is none.

    Raises:
        OutputError: a file that is none of ours, is damaged, or holds anything but plain values.
    """
    path = folder / CHECKPOINT_FILE
    if not path.exists():
        return None
    try:
        check_pickled_names(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", weights_only=True)
    # A damaged file makes the reader raise almost anything.
    except Exception:
        raise OutputError(
            f"{path}: not a checkpoint of pretrain, or damaged; nothing in it was run; "
            "start anew with --overwrite or in another folder"
        ) from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise OutputError(f"{path}: not a checkpoint of this version of pretrain")
    if not fits(state, STATE):
        raise OutputError(f"{path}: is damaged; start anew with --overwrite or in another folder")
    return state
