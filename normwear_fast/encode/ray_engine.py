"""The Ray engine: a run's units prepared and encoded by Ray Data, on one machine or a cluster.

    jobs -> Reader actors -> a row a unit -> Encoder actors -> this process, which alone commits

Why Ray Data fits: a work unit is one row in a block of its own and one batch of the model, so the
rows that go through a GEMM together never depend on blocks, retries or the number of actors; its
streaming executor holds back the readers by bytes in the object store; its actor pools restart what
dies and give the unit to another actor, which computes the same bits. Units come back in any order
and are committed whole by the one writer, exactly as the local engine's are.

The readers keep the local engine's reader process below each actor: a recording that kills or hangs
its reader is given up there after the same attempts, rather than retried by Ray for ever.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import math
import os
import pickle
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from normwear_fast import __version__
from normwear_fast.encode.pipeline import Embeddings, Encoded, ModelInfo, encode_prepared
from normwear_fast.encode.prepare import Job, PreparedUnit
from normwear_fast.encode.readers import Readers
from normwear_fast.encode.settings import EncodeSettings
from normwear_fast.errors import NormWearError, UsageError, one_line

if TYPE_CHECKING:
    import pyarrow as pa

    from normwear_fast.model import FastNormWear

LoadModels = Callable[[int | None], "Sequence[FastNormWear]"]

ENCODER_CPUS = 0.75
"""Of an encoder's threads on a CPU: above a half, so that no node gets two; the rest is for readers."""

GPU_ENCODER_CPUS = 0.5
"""CPUs of an encoder on a GPU, whose host side is one thread that mostly waits."""

READER_CPUS = 0.25
"""The least a reader asks for. A whole CPU each would never be free beside encoders on two cores."""

GPU_READERS = 8
"""Readers an encoder on a GPU, at most."""

READER_BLOCKS = 8_192
"""Jobs beyond this many share blocks: a block is an object that the driver keeps account of."""

STORE_BYTES = 128 * 2**20
"""Least bound of units in flight."""


class RayEngine:
    """Prepares and encodes units on a Ray cluster; on this machine where none is running.

    Joins the cluster of RAY_ADDRESS, or of a session that is connected already. Weights and
    recordings are opened by the actors: their paths must lead to the same files on every node.

    Args:
        device: ``auto`` (GPUs where the cluster has any), ``cpu`` or ``cuda``.
        actors: encoders; by default one a GPU, or as many as the CPUs hold with their threads.
        readers: reader actors; by default as many as keep the encoders busy.

    Raises:
        UsageError: no ray package, no cluster at that address, or no GPU where one is asked for.
    """

    def __init__(
        self, device: str = "auto", *, actors: int | None = None, readers: int | None = None
    ) -> None:
        # Read by Ray as it is imported: nothing is sent anywhere, and what matters is raised.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        try:
            import ray.data  # noqa: F401
        except ImportError as error:
            raise UsageError(
                f"--engine ray needs Ray Data ({one_line(error)}): pip install 'normwear-fast[ray]'"
            ) from None
        self._device, self._actors, self._readers = device, actors, readers
        self._connected = False

    def start(self, load_models: LoadModels, threads: int | None) -> ModelInfo:
        """Connects, and asks one worker what its model is; the encoders must all agree with it."""
        import ray

        self._connect()
        resources = ray.cluster_resources()
        gpus = int(resources.get("GPU", 0))
        self._gpu = self._device == "cuda" or (self._device == "auto" and gpus > 0)
        if self._gpu and not gpus and self._actors is None:
            raise UsageError(
                "--device cuda: the Ray cluster has no GPU; use --device cpu, or say with --actors how "
                "many it will have"
            )
        if threads is None:
            threads = 1 if self._gpu else _default_threads()
        self._load_models, self._threads = load_models, threads
        self._size(resources.get("CPU", 1.0), gpus)
        probe = ray.remote(num_cpus=self._encoder_cpus, num_gpus=int(self._gpu), max_calls=1)(
            _probe
        )
        try:
            self._model: ModelInfo = ray.get(probe.remote(load_models, threads, self._gpu))
        except ray.exceptions.RayError as error:
            raise _failure(error) from error
        return self._model

    def _connect(self) -> None:
        import ray

        if ray.is_initialized():
            return
        try:
            ray.init(logging_level=logging.ERROR, log_to_driver=False, include_dashboard=None)
        except (ConnectionError, ValueError, RuntimeError) as error:
            where = os.environ.get("RAY_ADDRESS", "this machine")
            why = one_line(error)
            raise UsageError(f"Ray at {where} cannot be reached: {why}") from None
        self._connected = True

    def _size(self, cpus: float, gpus: int) -> None:
        """How many actors of each kind, and what part of a node each asks for."""
        if self._gpu:
            self._encoders = self._actors or gpus
            self._encoder_cpus = GPU_ENCODER_CPUS
            free = max(READER_CPUS, cpus - self._encoders * self._encoder_cpus)
            self._reading = self._readers or max(1, min(int(free), GPU_READERS * self._encoders))
            self._reader_cpus = min(1.0, max(READER_CPUS, free / self._reading))
        else:
            self._encoders = self._actors or max(1, int(cpus // self._threads))
            self._encoder_cpus = ENCODER_CPUS * self._threads
            self._reading = self._readers or math.ceil(self._encoders / 4)
            self._reader_cpus = READER_CPUS

    def encode(
        self, jobs: Iterator[Job], settings: EncodeSettings, stopped: Callable[[], bool]
    ) -> Generator[Encoded]:
        import ray.data

        items = [{"job": pickle.dumps(job)} for job in jobs]
        pool = ray.data.ActorPoolStrategy
        with self._context(settings):
            jobs_dataset = ray.data.from_items(
                items, override_num_blocks=min(len(items), READER_BLOCKS)
            )
            prepared = jobs_dataset.map_batches(
                Reader,
                fn_constructor_args=(settings,),
                batch_size=1,
                batch_format="pyarrow",
                compute=pool(size=min(self._reading, len(items))),
                num_cpus=self._reader_cpus,
            )
            encoded = prepared.map_batches(
                Encoder,
                fn_constructor_args=(
                    self._load_models,
                    self._threads,
                    self._gpu,
                    settings,
                    self._model.provenance,
                    __version__,
                ),
                batch_size=1,
                batch_format="pyarrow",
                compute=pool(size=self._encoders),
                num_cpus=self._encoder_cpus,
                num_gpus=int(self._gpu),
            )
            batches = cast(
                "Generator[pa.Table]",
                iter(encoded.iter_batches(batch_size=None, batch_format="pyarrow")),
            )
            seen: set[int] = set()
            try:
                for batch in batches:
                    for header, data in zip(batch["header"], batch["data"], strict=True):
                        unit, embeddings, seconds = _opened(header.as_py(), data.as_buffer())
                        if unit.index in seen:  # committed once, whatever Ray computed twice
                            continue
                        seen.add(unit.index)
                        yield unit, embeddings, seconds
                    if stopped():
                        return
            except ray.exceptions.RayError as error:
                raise _failure(error) from error
            finally:
                batches.close()  # ends the actors

    @contextlib.contextmanager
    def _context(self, settings: EncodeSettings) -> Iterator[None]:
        """Ray Data's settings for our datasets; those of the caller's own stay as they are."""
        import ray.data

        assert settings.unit_tokens is not None
        # A token's 9 / 13 samples of float32; what comes back is small but for patches.
        per_token = 3 + (2 * self._model.config.embed_dim if settings.pool == "patch" else 0)
        flying = (self._reading + 2 * self._encoders + 2) * per_token * settings.unit_tokens
        current = ray.data.DataContext.get_current()
        ours = current.copy()
        ours.target_max_block_size = 1  # a row, so a unit, is a block: handed on when it is ready
        ours.enable_progress_bars = False
        ours.execution_options.resource_limits = ray.data.ExecutionResources(
            object_store_memory=max(STORE_BYTES, flying)
        )
        logger = logging.getLogger("ray.data")
        level = logger.level
        logger.setLevel(logging.ERROR)
        try:
            with ray.data.DataContext.current(ours):
                yield
        finally:
            logger.setLevel(level)

    def close(self) -> None:
        """Leaves the cluster, and ends it where it was started here."""
        if self._connected:
            import ray

            ray.shutdown()
            self._connected = False


def _failure(error: Exception) -> NormWearError:
    """What went wrong in a worker: our own refusal as it was, else the last line of Ray's account."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, NormWearError):
        return cause
    lines = str(error).strip().splitlines()
    said = one_line(lines[-1] if lines else type(error).__name__)
    return NormWearError(f"a worker of the Ray cluster failed: {said}")


def _default_threads() -> int:
    """As the local engine has it on this machine, so that both give the same bits."""
    import torch

    return torch.get_num_threads()


# --- in Ray's workers ------------------------------------------------------------------------------


def _load(load_models: LoadModels, threads: int, gpu: bool) -> FastNormWear:
    if not gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = (
            ""  # before torch looks: this actor has been given none
        )
    import torch

    torch.set_num_threads(threads)
    return load_models(threads)[0]


def _probe(load_models: LoadModels, threads: int, gpu: bool) -> ModelInfo:
    return ModelInfo.of(_load(load_models, threads, gpu))


class Reader:
    """Rows of jobs to rows of prepared units, through one reader process that it keeps."""

    def __init__(self, settings: EncodeSettings) -> None:
        self._jobs: collections.deque[Job] = collections.deque()
        self._units = Readers(1).prepare(_Popping(self._jobs), settings, lambda: False)

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        for job in batch["job"].to_pylist():
            opened: Job = pickle.loads(job)  # from our own driver
            self._jobs.append(opened)
            for _ in opened.units:
                unit = next(self._units)
                data, unit.data = unit.data, []
                yield _row(unit, data, 0.0)


class _Popping(Iterator[Job]):
    """The jobs of a queue; its end is not the last one, for more may be put in."""

    def __init__(self, jobs: collections.deque[Job]) -> None:
        self._jobs = jobs

    def __next__(self) -> Job:
        if not self._jobs:
            raise StopIteration
        return self._jobs.popleft()


class Encoder:
    """Rows of prepared units to rows of embeddings; the batch is the unit."""

    def __init__(
        self,
        load_models: LoadModels,
        threads: int,
        gpu: bool,
        settings: EncodeSettings,
        provenance: dict[str, Any],
        version: str,
    ) -> None:
        self._settings = settings
        self._failure: NormWearError | None = None
        # An actor that cannot be made would only say that it died: the reason goes with its first row.
        try:
            self._model = _load(load_models, threads, gpu)
            _check_same(self._model.provenance() | {"version": __version__}, provenance, version)
        except NormWearError as error:
            self._failure = error

    def __call__(self, batch: pa.Table) -> pa.Table:
        (header,), (data,) = batch["header"].to_pylist(), batch["data"]
        if self._failure is not None:
            return _failed(self._failure)
        unit, windows, _ = _opened(header, data.as_buffer())
        unit.data = list(windows)
        started = time.perf_counter()
        try:
            embeddings = encode_prepared(self._model, unit, self._settings)
        except NormWearError as error:
            return _failed(error)
        unit.data = []
        return _row(unit, embeddings, time.perf_counter() - started)


def _check_same(found: dict[str, Any], wanted: dict[str, Any], version: str) -> None:
    """Refuses a node whose numbers would differ in their last bits, or by more."""
    import platform

    differ = [
        f"{name} is {found[name]}, elsewhere {value}"
        for name, value in (wanted | {"version": version}).items()
        if found[name] != value and name != "weights"
    ]
    for key in ("sha256", "seed"):  # a path may differ between nodes
        if found["weights"].get(key) != wanted["weights"].get(key):
            differ.append(f"the weights' {key} differs")
    if differ:
        raise NormWearError(
            f"node {platform.node()} of the Ray cluster would not give the same rows: "
            f"{'; '.join(differ)}; make its nodes alike, or leave it out"
        )


# --- rows ------------------------------------------------------------------------------------------


def _row(unit: PreparedUnit, arrays: Embeddings, seconds: float) -> pa.Table:
    """A unit (without its data) and some arrays of one type, as one row."""
    import pyarrow as pa

    dtype = arrays[0].dtype if len(arrays) else np.dtype(np.float32)
    header = pickle.dumps((unit, [array.shape for array in arrays], dtype.str, seconds))
    flat = [array.reshape(-1) for array in arrays]
    joined = np.concatenate(flat) if flat else np.empty(0, dtype)
    data = pa.array([joined.view(np.uint8).data], pa.large_binary())
    return pa.table({"header": pa.array([header], pa.binary()), "data": data})


def _failed(error: NormWearError) -> pa.Table:
    import pyarrow as pa

    header = pa.array([pickle.dumps(error)], pa.binary())
    return pa.table({"header": header, "data": pa.array([b""], pa.large_binary())})


def _opened(header: bytes, data: pa.Buffer) -> tuple[PreparedUnit, Embeddings, float]:
    """What `_row` was given; raises what `_failed` was."""
    content = pickle.loads(header)  # from our own actors
    if isinstance(content, NormWearError):
        raise content
    unit, shapes, dtype, seconds = content
    flat: NDArray[Any] = np.frombuffer(data, np.dtype(dtype))
    bounds = np.cumsum([0, *(math.prod(shape) for shape in shapes)]).tolist()
    arrays = [
        flat[first:stop].reshape(shape)
        for first, stop, shape in zip(bounds, bounds[1:], shapes, strict=False)
    ]
    return unit, arrays, seconds
