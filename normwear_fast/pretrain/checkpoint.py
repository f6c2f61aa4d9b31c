"""A pretraining run's folder: whether one may be written there, and what it goes on from."""

from __future__ import annotations

import os
import re
from pathlib import Path

from normwear_fast.checkpoint import (
    CHECKPOINT_FILE,
    CHECKPOINT_TEMPORARY,
    Checkpoint,
    discard_checkpoint,
)
from normwear_fast.errors import OutputError, one_line
from normwear_fast.files import COUNT, check_writable
from normwear_fast.pretrain.logs import (
    PICTURES,
    PROBES_FILE,
    STEP_COLUMNS,
    STEPS_FILE,
    TENSORBOARD,
)
from normwear_fast.weights import CONFIG_FILE, WEIGHTS_FILE

CHECKPOINT = Checkpoint(
    "pretrain", {"step": COUNT, "skipped": COUNT, "model": dict, "optimizer": dict}
)

_EARLY = {STEPS_FILE, PROBES_FILE, TENSORBOARD, PICTURES}
"""What there is of a run before its first checkpoint."""

_TEMPORARY = re.compile(rf"{re.escape(CHECKPOINT_TEMPORARY)}|\.(steps|probes)\.[0-9a-f]{{8}}\.csv")


def check_output(folder: Path, *, overwrite: bool) -> None:
    """An OutputError unless a run may be written there: none of what another program, command or
    person left there is ever replaced."""
    try:
        if not folder.exists():
            return check_writable(folder)
        names = sorted(n for n in os.listdir(folder) if not _TEMPORARY.fullmatch(n))
    except OSError as error:
        raise OutputError(f"{folder}: cannot be a run's folder ({one_line(error)})") from None
    strange = [name for name in names if name not in _EARLY]
    if CHECKPOINT_FILE in names:
        if _has_curve(folder) or CHECKPOINT.is_in(folder):
            return check_writable(folder)
        if overwrite:
            strange = [CHECKPOINT_FILE]
        else:  # loading it says what is wrong with it
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


def discard(folder: Path) -> None:
    """Removes an earlier run's checkpoint first and then its weights; its curves `Log` begins anew.

    A kill before the new run's first checkpoint leaves nothing that could be gone on with, or taken for
    the new run's.
    """
    try:
        (
            folder / STEPS_FILE
        ).touch()  # by which the folder is known to be a run's while this is done
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written ({one_line(error)})") from None
    discard_checkpoint(folder, WEIGHTS_FILE, CONFIG_FILE)


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
