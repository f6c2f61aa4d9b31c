"""Reader processes: recordings are looked at, read, cut and prepared beside the model.

Each worker serves one task at a time and sends its units down a pipe as they become ready: rows
pickled, samples as raw float32 bytes. A worker whose unit nobody takes stands still, so it holds one
unit beside the block it reads. Readers are other people's code on damaged files: one that shows no
sign of life, asks for too much memory or dies is replaced, and the recording that it was at is given
up when another has ended the same way.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import replace
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar, cast

import numpy as np

from normwear_fast.encode.prepare import Job, PreparedUnit, Watch, prepare_job
from normwear_fast.encode.settings import EncodeSettings
from normwear_fast.encode.survey import Look, Looked, Surveyed, look_at

POLL_SECONDS = 0.2
"""How often a wait for readers looks whether the run should stop, and whether they live."""

STALL_SECONDS = 30.0
"""A reader that for so long has neither read a byte nor prepared a window is ended."""

START_SECONDS = 120.0
"""The same for one that has not come up yet: importing NumPy can take long on a busy machine."""

MEMORY_BYTES = 4 * 2**30
"""Most private memory of a reader; files that it maps do not count."""

NICE = 10
"""Of readers: a core that a reader takes from the model is missed at each of the model's barriers,
while a model that waits for a reader leaves it all of them."""

ATTEMPTS = 2
"""Times a recording is tried before it is given up for having ended its readers."""

_UNIT, _LOOKED, _DONE = b"u", b"l", b"d"
_NO_MEMORY = 77
"""Exit code of a reader that had no memory left."""

_Task = TypeVar("_Task", Job, Look)
_Result = TypeVar("_Result", PreparedUnit, Looked)


class Readers:
    """A number of reader processes, started when there is something to do; 0 works in this one."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._readers: list[_Reader] = []

    def look(self, items: Iterable[Look], settings: EncodeSettings) -> Generator[Looked]:
        """Opens recordings; what there is to each, in any order."""
        if self._workers == 0:
            for item in items:
                yield look_at(item, settings)
            return
        yield from self._collect(iter(items), settings, lambda: False, Looked)

    def prepare(
        self, jobs: Iterator[Job], settings: EncodeSettings, stopped: Callable[[], bool]
    ) -> Generator[PreparedUnit]:
        """Every unit of the jobs, prepared.

        The order of the units depends on timing where there are workers; what is in them does not.

        Args:
            stopped: asked between units; once it says so nothing more comes.
        """
        if self._workers == 0:
            for job in jobs:
                for unit in prepare_job(job, settings):
                    yield unit
                    if stopped():
                        return
            return
        yield from self._collect(jobs, settings, stopped, PreparedUnit)

    def close(self) -> None:
        """Ends the processes; they start again when they are needed."""
        for reader in self._readers:
            reader.end()
        self._readers = []

    def _collect(
        self,
        tasks: Iterator[_Task],
        settings: EncodeSettings,
        stopped: Callable[[], bool],
        kind: type[_Result],
    ) -> Generator[_Result]:
        finished = False
        try:
            while not stopped():
                self._occupy(tasks, settings)
                busy = {r.connection: r for r in self._readers if r.task is not None}
                if not busy:
                    break
                ready = wait(list(busy), POLL_SECONDS)
                for connection, reader in busy.items():
                    result: PreparedUnit | Looked | None
                    if connection in ready:
                        try:
                            result = reader.receive()
                        except (EOFError, OSError):
                            yield from cast(Iterator[_Result], reader.failed(reader.how_it_died()))
                            continue
                        if result is not None:
                            assert isinstance(result, kind)
                            yield result
                    elif reader.stands_still():
                        how = f"nothing came of reading it for {STALL_SECONDS:g} s"
                        yield from cast(Iterator[_Result], reader.failed(how))
            finished = not any(reader.task is not None for reader in self._readers)
        finally:
            if not finished:  # in the middle of something nobody wants any more
                self.close()

    def _occupy(self, tasks: Iterator[_Task], settings: EncodeSettings) -> None:
        """Gives every idle reader a task, while there are any."""
        for place in range(self._workers):
            started = place < len(self._readers)
            if started and self._readers[place].task is not None:
                continue
            task = next(tasks, None)
            if task is None:
                return
            if not started:
                self._readers.append(_Reader())
            self._readers[place].begin(task, settings)


def prepared_units(
    jobs: Iterator[Job], settings: EncodeSettings, workers: int, stopped: Callable[[], bool]
) -> Generator[PreparedUnit]:
    """`Readers.prepare` with readers of its own."""
    with contextlib.closing(Readers(workers)) as readers:
        yield from readers.prepare(jobs, settings, stopped)


class _Reader:
    """A worker process, seen from the run."""

    def __init__(self) -> None:
        self.task: Job | Look | None = None
        self.settings: EncodeSettings | None = None
        self.deaths = 0
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        # Signs of life, and the place of the source that is worked on.
        self.state: Any = context.RawArray(ctypes.c_uint64, 2)
        self.process: BaseProcess = context.Process(
            target=_serve, args=(theirs, self.state, MEMORY_BYTES), daemon=True
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
        self._seen: tuple[int, int] = (0, 0)
        self._changed = self._checked = time.monotonic()

    def begin(self, task: Job | Look, settings: EncodeSettings, deaths: int = 0) -> None:
        self.task, self.settings, self.deaths = task, settings, deaths
        self._changed = time.monotonic()
        # Told only when it is idle, and a dead one is noticed by receive().
        with contextlib.suppress(OSError):
            self.connection.send((task, settings))

    def receive(self) -> PreparedUnit | Looked | None:
        """The next result of the task, or None when that is done."""
        message = self.connection.recv_bytes()
        self._changed = time.monotonic()
        if message[:1] == _DONE:
            self.task = None
            return None
        content = pickle.loads(memoryview(message)[1:])  # from our own process
        self.deaths = 0
        if message[:1] == _LOOKED:
            assert isinstance(content, Looked)
            return content
        unit, shapes = content
        samples = np.frombuffer(self.connection.recv_bytes(), np.float32)
        bounds = np.cumsum([0, *(channels * length for channels, length in shapes)]).tolist()
        unit.data = [
            samples[first:stop].reshape(shape)
            for first, stop, shape in zip(bounds, bounds[1:], shapes, strict=False)
        ]
        assert isinstance(self.task, Job)
        self.task = replace(self.task, units=self.task.units[1:])
        return cast(PreparedUnit, unit)

    def stands_still(self) -> bool:
        """Whether nothing has come of the task for too long. Asked while its pipe is empty: a reader
        that waits to be heard does not stand still."""
        now = time.monotonic()
        if now - self._checked < POLL_SECONDS or self.connection.poll():
            return False
        self._checked = now
        seen = (int(self.state[0]), _bytes_read(self.process.pid))
        if seen != self._seen:
            self._seen, self._changed = seen, now
        return now - self._changed > (STALL_SECONDS if seen[0] else START_SECONDS)

    def how_it_died(self) -> str:
        self.process.join(5)  # its end of the pipe closes a moment before it ends
        code = self.process.exitcode
        if code == _NO_MEMORY:
            return f"reading it takes more than {MEMORY_BYTES / 2**30:.3g} GiB of memory"
        name = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
        return f"its reader process died ({name})"

    def failed(self, how: str) -> Iterator[PreparedUnit | Looked]:
        """Starts another process for the rest of the task; gives up what has ended two."""
        task, settings, deaths = self.task, self.settings, self.deaths + 1
        assert task is not None
        assert settings is not None
        place = int(self.state[1])
        self.end()
        self._start()
        self.task = None
        if isinstance(task, Job) and not task.units:
            return
        if deaths >= ATTEMPTS:
            deaths = 0
            if isinstance(task, Look):
                yield Looked(task.place, Surveyed(task.id, task.path, 0, 0, error=_line(task, how)))
                return
            source = task.sources[place]
            if place in task.failed:  # it dies of something else than that recording
                yield from _given_up(task, how)
                return
            task = replace(task, failed={**task.failed, place: _line(source, how)})
        self.begin(task, settings, deaths)

    def end(self) -> None:
        self.connection.close()
        # It may be deep in other people's code, which may hold off a polite signal; it has nothing
        # to put in order.
        self.process.kill()
        self.process.join()


def _line(source: Any, how: str) -> str:
    return f"{source.path}: {how}"


def _given_up(job: Job, how: str) -> Iterator[PreparedUnit]:
    for unit in job.units:
        sources: Sequence[Any] = [job.sources[place] for place, _, _ in unit.spans]
        yield PreparedUnit(unit.index, failed={one.id: _line(one, how) for one in sources})


def _bytes_read(pid: int | None) -> int:
    """Bytes that a process has read from files so far; 0 where the system does not tell."""
    try:
        with open(f"/proc/{pid}/io", "rb") as file:
            return int(file.readline().split()[1])
    except (OSError, ValueError, IndexError):
        return 0


# --- in the worker -----------------------------------------------------------------------------------


class _Shared(Watch):
    """Writes how a task gets on where the run can see it."""

    def __init__(self, state: Any) -> None:
        self._state = state

    def at(self, place: int) -> None:
        self._state[1] = place
        self.alive()

    def alive(self) -> None:
        self._state[0] += 1

    def refused(self, error: Exception) -> None:
        # What is left of the limit depends on what this process read before: only a fresh one's
        # word counts.
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, MemoryError):
                os._exit(_NO_MEMORY)
            cause = cause.__cause__ or cause.__context__


def _serve(connection: Connection, state: Any, memory: int) -> None:
    """A worker's life: tasks in, results out, until the run closes the pipe or is gone."""
    threading.Thread(target=_end_with_the_run, daemon=True).start()
    _limit(memory)
    watch = _Shared(state)
    try:
        while True:
            watch.at(0)
            task, settings = connection.recv()
            watch.at(0)
            if isinstance(task, Look):
                connection.send_bytes(_LOOKED + pickle.dumps(look_at(task, settings, watch)))
            else:
                for unit in prepare_job(task, settings, watch):
                    _send(connection, unit)
            connection.send_bytes(_DONE)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
    except MemoryError:
        os._exit(_NO_MEMORY)


def _send(connection: Connection, unit: PreparedUnit) -> None:
    data, unit.data = unit.data, []
    header = pickle.dumps((unit, [window.shape for window in data]))
    samples = [window.reshape(-1) for window in data]
    packed = np.concatenate(samples) if samples else np.empty(0, np.float32)
    connection.send_bytes(_UNIT + header)
    connection.send_bytes(packed.view(np.uint8).data)


def _end_with_the_run() -> None:
    """A reader that hangs would outlive a run that was killed."""
    run = multiprocessing.parent_process()
    if run is not None:
        wait([run.sentinel])
        os._exit(1)


def _limit(memory: int) -> None:
    """Lets this process have so many bytes, and the model's threads go first."""
    with contextlib.suppress(OSError):
        os.nice(NICE)
    if sys.platform == "linux":
        import resource

        with contextlib.suppress(OSError, ValueError):
            hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
            resource.setrlimit(resource.RLIMIT_DATA, (memory, hard))


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
