"""Reader processes: recordings are read, cut and prepared beside the model.

Each worker serves one job at a time and sends its units down a pipe as they become ready: rows
pickled, samples as raw float32 bytes. A worker whose unit nobody takes stands still, so what is in
flight is bounded by two units a worker.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

import numpy as np

from normwear_fast.encode.prepare import Job, PreparedUnit, prepare_job
from normwear_fast.encode.settings import EncodeSettings

POLL_SECONDS = 0.2
"""How often a wait for readers looks whether the run should stop."""

ATTEMPTS = 2
"""Times a unit is tried before a recording that kills its reader is given up."""

_UNIT, _DONE = b"u", b"d"


def prepared_units(
    jobs: Iterator[Job], settings: EncodeSettings, workers: int, stopped: Callable[[], bool]
) -> Iterator[PreparedUnit]:
    """Every unit of the jobs, prepared here (0 workers) or in that many processes.

    The order of the units depends on timing where there are workers; what is in them does not.

    Args:
        stopped: asked between units; once it says so nothing more comes.
    """
    if workers == 0:
        for job in jobs:
            for unit in prepare_job(job, settings):
                yield unit
                if stopped():
                    return
        return
    readers: list[_Reader] = []
    try:
        readers += [_Reader(settings) for _ in range(workers)]
        yield from _collect(jobs, readers, stopped)
    finally:
        for reader in readers:
            reader.end()


def _collect(
    jobs: Iterator[Job], readers: list[_Reader], stopped: Callable[[], bool]
) -> Iterator[PreparedUnit]:
    while not stopped():
        for reader in readers:
            if reader.job is None and (job := next(jobs, None)) is not None:
                reader.begin(job)
        busy = {reader.connection: reader for reader in readers if reader.job is not None}
        if not busy:
            return
        for connection in wait(list(busy), POLL_SECONDS):
            assert isinstance(connection, Connection)
            reader = busy[connection]
            try:
                unit = reader.receive()
            except (EOFError, OSError):
                yield from reader.died()
                continue
            if unit is not None:
                yield unit


class _Reader:
    """A worker process, seen from the run."""

    def __init__(self, settings: EncodeSettings) -> None:
        self.settings = settings
        self.job: Job | None = None
        self.deaths = 0
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process: BaseProcess = context.Process(
            target=_serve, args=(theirs, self.settings), daemon=True
        )
        # Its arrays are small: threads of a BLAS would only take the model's cores. Ctrl-C reaches
        # all of a terminal's processes, but only the run decides when a reader ends: it inherits
        # the blocked signal. (The first start of multiprocessing's tracker would unblock it.)
        resource_tracker.ensure_running()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            with _environment("OMP_NUM_THREADS", "1"):
                self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()

    def begin(self, job: Job) -> None:
        self.job, self.deaths = job, 0
        # Told only when it is idle, and a dead one is noticed by receive().
        with contextlib.suppress(OSError):
            self.connection.send(job)

    def receive(self) -> PreparedUnit | None:
        """The next unit of the job, or None when the job is done."""
        message = self.connection.recv_bytes()
        if message[:1] == _DONE:
            self.job = None
            return None
        unit, shapes = pickle.loads(message[1:])  # from our own process
        samples = np.frombuffer(self.connection.recv_bytes(), np.float32)
        bounds = np.cumsum([0, *(channels * length for channels, length in shapes)]).tolist()
        unit.data = [
            samples[first:stop].reshape(shape)
            for first, stop, shape in zip(bounds, bounds[1:], shapes, strict=False)
        ]
        assert self.job is not None
        self.job = replace(self.job, units=self.job.units[1:])
        self.deaths = 0
        return unit

    def died(self) -> Iterator[PreparedUnit]:
        """Starts another process for the rest of the job; gives up what has killed two."""
        job = self.job
        assert job is not None
        self.process.join(5)  # its end of the pipe closes a moment before it ends
        code = self.process.exitcode
        self.end()
        how = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
        self._start()
        self.job, deaths = None, self.deaths + 1
        if not job.units:
            return
        if deaths < ATTEMPTS:
            self.begin(job)
            self.deaths = deaths
            return
        for unit in job.units:
            failed = {
                job.sources[place].id: f"{job.sources[place].path}: its reader process died ({how})"
                for place, _, _ in unit.spans
            }
            yield PreparedUnit(unit.index, failed=failed)

    def end(self) -> None:
        self.connection.close()
        self.process.terminate()
        self.process.join(5)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def _serve(connection: Connection, settings: EncodeSettings) -> None:
    """A worker's life: jobs in, units out, until the run closes the pipe."""
    try:
        while True:
            job = connection.recv()
            for unit in prepare_job(job, settings):
                data, unit.data = unit.data, []
                header = pickle.dumps((unit, [window.shape for window in data]))
                samples = [window.reshape(-1) for window in data]
                packed = np.concatenate(samples) if samples else np.empty(0, np.float32)
                connection.send_bytes(_UNIT + header)
                connection.send_bytes(packed.view(np.uint8).data)
            connection.send_bytes(_DONE)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
