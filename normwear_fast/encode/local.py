"""The local engine: units are read, encoded and written at the same time, each stage in its thread.

    readers -> prepared units, bounded by bytes -> a thread a device -> results, bounded by bytes -> run

The thread that asks for the results builds tables and writes parts while the devices go on.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Generic, TypeVar

from normwear_fast.encode.pipeline import Embeddings, Encoded, ModelInfo, encode_prepared
from normwear_fast.encode.prepare import Job, PreparedUnit
from normwear_fast.encode.readers import Readers
from normwear_fast.encode.settings import EncodeSettings

if TYPE_CHECKING:
    from normwear_fast.model import FastNormWear

PREPARED_BYTES = 64 * 2**20
"""Samples that wait for a device: some 40,000 channel-windows of 6 s."""

RESULT_BYTES = 256 * 2**20
"""Embeddings that wait for the writer: a slow disk holds a device up only for what is beyond."""

_T = TypeVar("_T")


class Waiting(Generic[_T]):
    """What one stage has made and the next has not taken, first in first out, bounded by bytes.

    Args:
        limit: bytes; once they are reached the maker waits.
        least: so many may always wait, whatever their size.
    """

    def __init__(self, limit: int, least: int) -> None:
        self._limit, self._least = limit, least
        self._items: deque[tuple[_T, int]] = deque()
        self._bytes = 0
        self._ended = self._closed = False
        self._changed = threading.Condition()

    def put(self, item: _T, size: int) -> bool:
        """Waits for room; False when nobody will take it any more."""
        with self._changed:
            while not self._closed and self._full():
                self._changed.wait()
            if self._closed:
                return False
            self._items.append((item, size))
            self._bytes += size
            self._changed.notify_all()
            return True

    def _full(self) -> bool:
        return len(self._items) >= self._least and self._bytes >= self._limit

    def get(self) -> _T | None:
        """The next; None when there is none and none will come."""
        with self._changed:
            while not (self._items or self._ended or self._closed):
                self._changed.wait()
            if not self._items or self._closed:
                return None
            item, size = self._items.popleft()
            self._bytes -= size
            self._changed.notify_all()
            return item

    def end(self) -> None:
        """No more will come; what waits is still taken."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def close(self) -> None:
        """Nothing more is wanted: what waits is dropped, and who waits goes on."""
        with self._changed:
            self._closed = True
            self._items.clear()
            self._changed.notify_all()


class LocalEngine:
    """Prepares units here or in reader processes, and encodes them on this machine's devices."""

    def __init__(self, readers: Readers) -> None:
        self._readers = readers
        self._models: Sequence[FastNormWear] = ()

    def start(
        self, load_models: Callable[[int | None], Sequence[FastNormWear]], threads: int | None
    ) -> ModelInfo:
        self._models = load_models(threads)
        return ModelInfo.of(self._models[0])

    def encode(
        self, jobs: Iterator[Job], settings: EncodeSettings, stopped: Callable[[], bool]
    ) -> Generator[Encoded]:
        """Units with their embeddings, as they come, and the seconds they took of all devices."""
        yield from _Stages(self._readers, self._models, settings, stopped).run(jobs)

    def close(self) -> None:
        self._readers.close()
        self._models = ()


class _Stages:
    """The threads of one run, and what waits between them."""

    def __init__(
        self,
        readers: Readers,
        models: Sequence[FastNormWear],
        settings: EncodeSettings,
        stopped: Callable[[], bool],
    ) -> None:
        self._readers, self._models, self._settings = readers, models, settings
        self._asked_to_stop = stopped
        self._over = threading.Event()
        self._prepared: Waiting[PreparedUnit] = Waiting(PREPARED_BYTES, len(models))
        self._results: Waiting[Encoded] = Waiting(RESULT_BYTES, 1)
        self._encoding = len(models)
        self._lock = threading.Lock()
        self._error: BaseException | None = None

    def run(self, jobs: Iterator[Job]) -> Generator[Encoded]:
        threads = [threading.Thread(target=self._read, args=(jobs,), name="read")]
        threads += [
            threading.Thread(target=self._encode, args=(model,), name="encode")
            for model in self._models
        ]
        for thread in threads:
            thread.start()
        try:
            while (result := self._results.get()) is not None:
                yield result
        finally:
            self._over.set()
            self._prepared.close()
            self._results.close()
            for thread in threads:
                thread.join()
        if self._error is not None:
            raise self._error

    def _stopped(self) -> bool:
        return self._over.is_set() or self._asked_to_stop()

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            self._error = self._error or error
        self._over.set()

    def _read(self, jobs: Iterator[Job]) -> None:
        units = self._readers.prepare(jobs, self._settings, self._stopped)
        try:
            for unit in units:
                if not self._prepared.put(unit, sum(window.nbytes for window in unit.data)):
                    break
        except BaseException as error:
            self._fail(error)
        finally:
            units.close()
            self._prepared.end()

    def _encode(self, model: FastNormWear) -> None:
        try:
            # Units not begun when the run is to stop are left for the next session.
            while (unit := self._prepared.get()) is not None and not self._stopped():
                started = time.perf_counter()
                embeddings: Embeddings = encode_prepared(model, unit, self._settings)
                seconds = (time.perf_counter() - started) / len(self._models)
                unit.data.clear()
                size = sum(embedding.nbytes for embedding in embeddings)
                self._results.put((unit, embeddings, seconds), size)
        except BaseException as error:
            self._fail(error)
        finally:
            with self._lock:
                self._encoding -= 1
                last = not self._encoding
            if last:
                self._prepared.close()
                self._results.end()
