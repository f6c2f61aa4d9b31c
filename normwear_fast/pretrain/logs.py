"""A run's curves: one CSV row a step, and the same for TensorBoard."""

from __future__ import annotations

import contextlib
import csv
import math
import re
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normwear_fast.errors import OutputError, UsageError, one_line, reading
from normwear_fast.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STEPS_FILE = "steps.csv"
PROBES_FILE = "probes.csv"
TENSORBOARD = "tensorboard"
PICTURES = "pictures"
RECONSTRUCTION = "reconstruction"
"""Name of a picture in `PICTURES`, before its step."""

_PICTURE = re.compile(rf"{RECONSTRUCTION}-(\d{{6,}})\.png")

STEP_COLUMNS = ("step", "loss", "learning_rate", "gradient_norm", "skipped", "windows_per_second")
"""Of `STEPS_FILE`."""

_NOT_OURS = "is damaged; move it away, and the same command goes on without what it said"


class Log:
    """Writes curves; rows and pictures beyond the checkpoint, of a run that was killed or is started
    anew, are dropped before it goes on.

    Args:
        folder: of the run.
        step: steps done so far; rows and pictures of later ones are removed, unread where none is done.
    """

    def __init__(self, folder: Path, step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UsageError(
                "pretraining needs tensorboard; pip install 'normwear-fast[train]'"
            ) from None
        self.folder = folder
        if step:
            self.last_losses(1)  # a damaged curve is refused before anything is written
        for name in (STEPS_FILE, PROBES_FILE):
            _keep_rows(folder / name, step)
        _keep_pictures(folder / PICTURES, step)
        self._hook, threading.excepthook = threading.excepthook, self._thread_failed
        try:
            self._board = SummaryWriter(
                str(folder / TENSORBOARD), purge_step=step + 1, flush_secs=30
            )
        except OSError as error:
            threading.excepthook = self._hook
            where = folder / TENSORBOARD
            raise OutputError(f"{where}: cannot be written ({one_line(error)})") from None

    def _thread_failed(self, failed: threading.ExceptHookArgs) -> None:
        """TensorBoard's thread raises what its next call raises again: one traceback less."""
        ours = type(failed.thread).__name__ == "_AsyncWriterThread"
        if not (ours and isinstance(failed.exc_value, OSError)):
            self._hook(failed)

    def write(self, name: str, row: Mapping[str, Any]) -> None:
        """Appends a row, which has ``step``, to a CSV of that name."""
        path = self.folder / name
        try:
            with path.open("a", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, list(row), lineterminator="\n")
                if file.tell() == 0:
                    writer.writeheader()
                writer.writerow(row)
        except OSError as error:
            raise OutputError(f"{path}: cannot be written ({one_line(error)})") from None
        with self._drawing():
            for key, value in row.items():
                if isinstance(value, float):
                    self._board.add_scalar(f"{path.stem}/{key}", value, int(row["step"]))

    def picture(self, figure: Figure, step: int) -> Path:
        """Saves a reconstruction as a PNG, and shows it in TensorBoard."""
        from normwear_fast import plots

        path = plots.save(figure, self.folder / PICTURES / f"{RECONSTRUCTION}-{step:06d}.png")
        with self._drawing():
            self._board.add_figure(RECONSTRUCTION, figure, step)
        return path

    def last_losses(self, count: int) -> list[float]:
        """Of the last ``count`` steps with a finite loss."""
        path = self.folder / STEPS_FILE
        rows = read_rows(path)
        with reading(path, OutputError, _NOT_OURS):
            losses = [float(row["loss"]) for row in rows]
        return [loss for loss in losses if math.isfinite(loss)][-count:]

    def close(self) -> None:
        with contextlib.suppress(OSError):  # the curves are in the CSV files too
            self._board.close()
        threading.excepthook = self._hook

    @contextlib.contextmanager
    def _drawing(self) -> Iterator[None]:
        """TensorBoard's writer says in one call what went wrong in its thread after another."""
        try:
            yield
        except OSError as error:
            where = self.folder / TENSORBOARD
            raise OutputError(f"{where}: cannot be written ({one_line(error)})") from None


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV this module wrote; a last line that a kill cut short is not one.

    Raises:
        OutputError: it is damaged.
    """
    if not path.exists():
        return []
    with reading(path, OutputError, _NOT_OURS):
        text = path.read_text(encoding="utf-8")
        rows = list(csv.DictReader(text[: text.rfind("\n") + 1].splitlines(), strict=True))
        if any(None in row or None in row.values() for row in rows):
            raise ValueError("a row of another length than the header")
    return rows


def _keep_pictures(folder: Path, step: int) -> None:
    """Removes the pictures of steps after ``step``; what a run does not name so is not its own."""
    try:
        for path in folder.iterdir() if folder.is_dir() else ():
            name = _PICTURE.fullmatch(path.name)
            if name is not None and int(name[1]) > step:
                path.unlink()
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written ({one_line(error)})") from None


def _keep_rows(path: Path, step: int) -> None:
    """Rewrites a CSV without the rows after ``step``."""
    if not path.exists():
        return
    rows = read_rows(path) if step else []
    with reading(path, OutputError, _NOT_OURS):
        rows = [row for row in rows if int(row["step"]) <= step]
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        if rows:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
