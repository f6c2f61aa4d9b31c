"""What a training run goes on from: one file that appears whole, for pretraining and fine-tuning."""

from __future__ import annotations

import contextlib
import fcntl
import os
import warnings
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from normwear_fast.errors import OutputError, one_line
from normwear_fast.files import fits, sync
from normwear_fast.tensor_files import check_pickled_names

CHECKPOINT_FILE = "checkpoint.pt"
CHECKPOINT_TEMPORARY = f".{CHECKPOINT_FILE}.tmp"
"""Written first, and then renamed over the one before; what a kill leaves, the next writes over."""

_DAMAGED = "choose another folder, or move it away and start anew with --overwrite"


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


@dataclass(frozen=True)
class Checkpoint:
    """``checkpoint.pt`` of a command: everything that decides the next step of its run.

    Args:
        command: whose it is; another's is refused.
        form: of what it holds beside ``identity``, in which a run that goes on must agree.
    """

    command: str
    form: Mapping[str, Any]

    @property
    def format(self) -> str:
        return f"normwear-fast {self.command} 1"

    def save(self, folder: Path, state: Mapping[str, Any]) -> None:
        """Writes ``checkpoint.pt``: beside it first, synced, then renamed over the one before.

        Args:
            state: tensors and plain values in dicts and lists, nothing that unpickling would run.

        Raises:
            OutputError: the folder cannot be written; the checkpoint before it is whole.
        """
        path, temporary = folder / CHECKPOINT_FILE, folder / CHECKPOINT_TEMPORARY
        try:
            with temporary.open("wb") as file:
                torch.save({"format": self.format, **state}, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync(folder)
        # torch.save reports a full disk as a RuntimeError of its zip writer.
        except (OSError, RuntimeError) as error:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise OutputError(f"{path}: cannot be written ({one_line(error)})") from None

    def load(self, folder: Path) -> dict[str, Any] | None:
        """The state in ``checkpoint.pt`` on the CPU, or None where there is none.

        Raises:
            OutputError: a file that is none of ours, is damaged, or holds anything but plain values.
        """
        path = folder / CHECKPOINT_FILE
        if not path.exists():
            return None
        try:
            state = _load(path)
        # A damaged file makes the reader raise almost anything.
        except Exception:
            raise OutputError(
                f"{path}: not a checkpoint of {self.command}, or damaged; nothing in it was run; "
                f"{_DAMAGED}"
            ) from None
        if not isinstance(state, dict) or state.get("format") != self.format:
            raise OutputError(
                f"{path}: not a checkpoint of this version of {self.command}; {_DAMAGED}"
            )
        if not fits(state, {"identity": dict, **self.form}):
            raise OutputError(f"{path}: is damaged; {_DAMAGED}")
        return state

    def is_in(self, folder: Path) -> bool:
        """Whether the folder holds one of this command, of whatever version."""
        try:
            state = _load(folder / CHECKPOINT_FILE, mmap=True)
        except Exception:
            return False
        return isinstance(state, dict) and str(state.get("format")).startswith(
            f"normwear-fast {self.command} "
        )


def _load(path: Path, **options: Any) -> Any:
    check_pickled_names(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.load(path, map_location="cpu", weights_only=True, **options)


def discard_checkpoint(folder: Path, *others: str) -> None:
    """Removes an earlier run's checkpoint, so that nothing goes on from it, and then its other files."""
    try:
        for name in (CHECKPOINT_FILE, *others):
            (folder / name).unlink(missing_ok=True)
            sync(folder)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written ({one_line(error)})") from None


def check_same(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """An OutputError that names every difference between the run in a folder and the one asked for."""
    differ = [
        f"{name} was {before.get(name)}, is {now.get(name)}"
        for name in {**before, **now}
        if before.get(name) != now.get(name)
    ]
    if differ:
        raise OutputError(
            f"{folder}: holds another run ({'; '.join(differ)}); give its settings, "
            "another folder, or --overwrite"
        )


def crc32(state: Mapping[str, Tensor]) -> int:
    """Of the names and values of a state dict; 0 of an empty one."""
    found = 0
    for name, value in state.items():
        flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        found = zlib.crc32(name.encode(), zlib.crc32(flat.numpy().data, found))
    return found
