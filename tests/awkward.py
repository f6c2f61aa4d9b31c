"""Recordings that hang, die or want memory while they are read; light, for reader processes."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from normwear_fast.encode import readers
from normwear_fast.recordings.base import Channel, Recording, register

_serve = readers._serve


@register(".awkward")
class Awkward(Recording):
    """40 s of 65 Hz in blocks of 10 s. The file says what happens in which block, or at opening:
    "sleep 2", "die 0", "memory 3", "open sleep"; "once NAME" only while the file NAME is not there."""

    format = "awkward"

    def __init__(self, path: Path, *, sampling_rate: float | None = None) -> None:
        self.path = path
        self.channels = (Channel("S", "", 65.0, 65 * 40),)
        self.words = path.read_text().split()
        if self.words[0] == "open":
            self._happen(self.words[1])

    def _happen(self, what: str) -> None:
        if "once" in self.words:
            mark = self.path.parent / self.words[self.words.index("once") + 1]
            if mark.exists():
                return
            mark.touch()
        if what == "sleep":
            time.sleep(600)
        elif what == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        elif what == "memory":
            np.ones(2**33, np.uint8)

    def _blocks(self, channels: list[int], seconds: float) -> Iterator[list[np.ndarray]]:
        data = np.random.default_rng(len(self.path.stem)).standard_normal(65 * 40)
        for block in range(4):
            if self.words[1] == str(block):
                self._happen(self.words[0])
            yield [data[block * 650 : block * 650 + 650]]


def serve(connection: Connection, state: Any, memory: int) -> None:
    """A reader process that knows these recordings."""
    _serve(connection, state, memory)
