"""What a run goes on from: everything that decides its next step, in one file that appears whole."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from normwear_fast.errors import OutputError, one_line
from normwear_fast.files import COUNT, check_writable, fits
from normwear_fast.pretrain.logs import (
    PICTURES,
    PROBES_FILE,
    STEP_COLUMNS,
    STEPS_FILE,
    TENSORBOARD,
)
from normwear_fast.weights import check_pickled_names

CHECKPOINT_FILE = "checkpoint.pt"
FORMAT = "normwear-fast pretrain 1"
STATE = {"identity": dict, "step": COUNT, "skipped": COUNT, "model": dict, "optimizer": dict}
"""The form of what it holds beside its format."""


_EARLY = {STEPS_FILE, PROBES_FILE, TENSORBOARD, PICTURES}
"""What there is of a run before its first checkpoint."""

_TEMPORARY = re.compile(r"\.checkpoint\.pt\.tmp|\.(steps|probes)\.[0-9a-f]{8}\.csv")


def check_output(folder: Path, *, overwrite: bool) -> None:
    """An OutputError unless a run may be written there: none of what another program, command or
    person left there is ever replaced."""
    if not folder.exists():
        return check_writable(folder)
    try:
        names = sorted(n for n in os.listdir(folder) if not _TEMPORARY.fullmatch(n))
    except OSError as error:
        raise OutputError(f"{folder}: cannot be a run's folder ({one_line(error)})") from None
    strange = [name for name in names if name not in _EARLY]
    if CHECKPOINT_FILE in names:
        if _has_curve(folder) or _is_checkpoint(folder / CHECKPOINT_FILE):
            return check_writable(folder)
        if overwrite:
            strange = [CHECKPOINT_FILE]
        else:  # load_checkpoint says what is wrong with it
            return check_writable(folder)
    elif _has_curve(folder):
        if not strange or overwrite:
            return check_writable(folder)
        raise OutputError(
            f"{folder}: holds {strange[0]} but no {CHECKPOINT_FILE} to go on from; choose another "
            "folder, or start anew with --overwrite"
        )
    elif not set(names) - {TENSORBOARD}:
        return check_writable(folder)
    raise OutputError(
        f"{folder}: holds {(strange or names)[0]} and is not an output of pretrain; nothing in it is "
        "replaced, choose a new folder"
    )


def _has_curve(folder: Path) -> bool:
    """Whether ``steps.csv`` is there and of a run (one just begun may be without its header)."""
    try:
        with (folder / STEPS_FILE).open("rb") as file:
            return file.readline(1000).decode(errors="replace").strip() in (
                "",
                ",".join(STEP_COLUMNS),
            )
    except OSError:
        return False


def _is_checkpoint(path: Path) -> bool:
    try:
        check_pickled_names(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:
        return False
    return isinstance(state, dict) and str(state.get("format")).startswith("normwear-fast pretrain")


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
