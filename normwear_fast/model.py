"""FastNormWear: the drop-in model, and `encode` for many windows."""

from __future__ import annotations

import hashlib
import os
import platform
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from normwear_fast import traced
from normwear_fast.backends import select_backend
from normwear_fast.config import MIN_SAMPLES, SAMPLING_RATE, NormWearConfig, check_config
from normwear_fast.engine import UNIT_BATCHES, Engine, default_batch_tokens, resolve_precision
from normwear_fast.errors import InputError, UsageError
from normwear_fast.folding import FoldedEncoder, NotPlainError, check_plain, fold
from normwear_fast.inputs import (
    Resample,
    at_model_rate,
    check_finite,
    prepare,
    rate_list,
    samples_at_model_rate,
    window_list,
)
from normwear_fast.mne import equal_windows_of, is_mne, windows_of
from normwear_fast.operators import Pool, living_models, register_model
from normwear_fast.outputs import ChannelPool, Outputs, pool_channels, progress
from normwear_fast.packing import (
    Layout,
    MicroBatch,
    cached_layout,
    plan_micro_batches,
    plan_units,
    scalogram_method,
    window_tokens,
)
from normwear_fast.preprocess import as_float_array, as_rate
from normwear_fast.reference import ReferenceNormWear
from normwear_fast.scalograms import scalogram
from normwear_fast.transfer import Transfers
from normwear_fast.watch import Watch, transformed

WORKSPACE_BYTES = {"cpu": 512 * 2**20, "cuda": 16 * 2**30}
"""Activation buffers kept between calls; a larger window's are freed after it."""

_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "fp8": torch.float32,  # the backend quantises
    "int8": torch.float32,  # likewise
}
_CACHES: dict[str, Any] = {"_watch": None, "_origin": None, "_digest": None, "_transfers": None}
"""What no copy of a model takes along."""


class FastNormWear(ReferenceNormWear):
    """NormWear with upstream's constructor and `get_embedding`, and a fast path for inference.

    The released-name parameters are the only truth. Folded weights are a cache of them per (device,
    precision, backend), rebuilt after ``load_state_dict``, ``.to()``, an optimiser step or any other
    write that autograd counts. It does not count writes through ``p.data`` or ``p.numpy()``: write
    under ``torch.no_grad()`` instead. Layers that compute anything else than the released ones, such as
    adapters, run in the plain model, with a warning; ``encode`` refuses them. Where gradients are
    enabled and any parameter or the input requires them, ``forward`` and ``get_embedding`` take the plain
    differentiable path: wrap inference in ``torch.inference_mode()``, or call
    ``requires_grad_(False)``; ``encode`` is always in inference mode.

    Args:
        optimized_cwt: which scalogram: True is the one pretraining used, False (upstream's default)
            SciPy's. The checkpoint works with both; their embeddings differ.
        use_cwt: True; the released weights take scalograms.
        weight_path: checkpoint file, folder or hub id; "" for random, seeded weights.
        config: sizes; the released model by default.
        precision: ``float32`` is the parity mode; ``bfloat16``; ``auto`` is bfloat16 on a GPU of
            capability >= 8.0 or a CPU that multiplies it faster than float32, else float32.
        backend: ``auto`` or the name of one of :data:`normwear_fast.backends.BACKENDS`.
        seed: of the random weights.

    Raises:
        WeightsError: a checkpoint that cannot be read or does not fit; lists every name that differs.
        UsageError: an unknown precision or backend, or ``use_cwt=False``.
    """

    def __init__(
        self,
        optimized_cwt: bool = False,
        use_cwt: bool = True,
        weight_path: str | Path = "",
        *,
        config: NormWearConfig | None = None,
        precision: str = "auto",
        backend: str = "auto",
        seed: int = 0,
    ) -> None:
        if not isinstance(optimized_cwt, bool):
            raise UsageError(
                f"optimized_cwt is {optimized_cwt!r}; it must be True or False (weights are the third "
                "argument, or weight_path=...)"
            )
        if not isinstance(weight_path, str | os.PathLike):
            raise UsageError(
                f"weight_path is {weight_path!r}; it must be a path, or left out for random weights"
            )
        check_config(config)
        if not use_cwt:
            raise UsageError("use_cwt=False has no released weights; NormWear takes scalograms")
        resolve_precision(precision, torch.device("cpu"))
        select_backend(backend, torch.device("cpu"))
        checkpoint = None
        if weight_path:
            from normwear_fast.weights import load_checkpoint

            checkpoint = load_checkpoint(weight_path, config=config)
            config = checkpoint.config
        if config is not None and not config.in_engine:
            raise UsageError(
                f"{weight_path or 'config'}: fusion {config.fusion!r} on tokens of the "
                f"{config.tokens}; the engine runs fusion 'cls' or 'none' on tokens of the scalogram "
                "(pretrain.MaskedAutoencoder runs the paper's other variants)"
            )
        # Parameters made in inference mode would have no version counter to watch.
        with torch.inference_mode(False):
            super().__init__(
                config,
                decoder=checkpoint is None or checkpoint.has_decoder,
                seed=seed if checkpoint is None else None,
            )
            if checkpoint is not None:
                # Names were checked; num_batches_tracked, a counter inference never reads, may be absent.
                self.load_state_dict(checkpoint.state_dict, strict=False)
        self.optimized_cwt = optimized_cwt
        self.precision = precision
        self.backend = backend
        self._frozen: tuple[FoldedEncoder, str] | None = None
        self._origin: Watch | None = None
        """Of the weights that :attr:`weights` speaks of; None once they have changed."""
        self.weights = (
            {"source": "random", "seed": seed}
            if checkpoint is None
            else {"source": checkpoint.source, "sha256": checkpoint.sha256}
        )
        self._digest: tuple[Watch, str] | None = None
        """SHA-256 of weights that no file's speaks for, once it was asked for."""
        self.train(False)
        self._watch: Watch | None = None
        self._engines: dict[tuple[Any, ...], Engine] = {}
        self._transfers: Transfers | None = None
        self._lock = threading.RLock()
        self._handle = register_model(self)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        optimized_cwt: bool | None = None,
        config: NormWearConfig | None = None,
        precision: str = "auto",
        backend: str = "auto",
    ) -> FastNormWear:
        """A model from a hub id, a folder, a ``.safetensors`` or a ``.pth`` file.

        Args:
            source: where the weights are.
            optimized_cwt: the scalogram; by default what the checkpoint's config.json says, or the one
                pretraining used (True) where it says nothing.
            config: sizes, where no config.json beside the weights gives them.
            precision, backend: as of the class.
        """
        if optimized_cwt is None:
            from normwear_fast.weights import saved_scalogram

            remembered = saved_scalogram(source)
            optimized_cwt = True if remembered is None else remembered
        return cls(
            optimized_cwt, weight_path=source, config=config, precision=precision, backend=backend
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes ``model.safetensors`` and ``config.json``, which `from_pretrained` loads bit for bit
        (float64 weights rounded to float32)."""
        from normwear_fast.weights import save_pretrained

        save_pretrained(
            folder,
            self.state_dict(),
            self.config,
            optimized_cwt=self.optimized_cwt,
            metadata={key: Path(str(value)).name for key, value in self.weights.items()},
        )

    # --- what the model is and where it runs ---------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return self._any_weight.device

    @property
    def _any_weight(self) -> Tensor:
        """One of the parameters or, once they are gone, of the folded weights."""
        return self._frozen[0].carried if self._frozen else self.cls_token

    @property
    def resolved_precision(self) -> str:
        """The precision inference runs in on the model's device: never ``auto``."""
        return self._precision(None)

    def batch_tokens_default(self, device: torch.device | None = None) -> int:
        """Tokens of a micro-batch where none are given, for the device's type."""
        return default_batch_tokens((device or self.device).type)

    def provenance(self) -> dict[str, Any]:
        """What decides the numbers of an output, for its manifest.

        Two runs whose provenance and work units agree give the same bits.
        """
        device = self.device
        backend = select_backend(self.backend, device)
        return {
            "weights": self._weights_record(),
            "config": self.config.to_dict(),
            "scalogram": scalogram_method(self.optimized_cwt),
            "precision": self.resolved_precision,
            "backend": backend.name,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "torch": torch.__version__,
            "blas": backend.blas or _torch_blas(device),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "machine": platform.machine(),
            "threads": torch.get_num_threads(),
            **(backend.versions(device) if backend.versions else {}),
        }

    @property
    def weights(self) -> dict[str, Any]:
        """Where the weights are from; where they were written to since, what they began as."""
        if self._origin is not None and not self._origin.same_weights():
            self._origin = None
        if self._origin is None and self._frozen is None:
            return {"source": "changed after loading", "began_as": self._weights["source"]}
        return dict(self._weights)

    @weights.setter
    def weights(self, record: dict[str, Any]) -> None:
        self._weights = dict(record)
        self._origin = Watch(self)

    def _weights_record(self) -> dict[str, Any]:
        """`weights` with a SHA-256, so that equal records mean equal weights."""
        record = self.weights
        if "sha256" in record or record["source"] == "random" or self._frozen is not None:
            return record
        watch = self._watched()
        if self._digest is None or self._digest[0] is not watch:
            self._digest = watch, _digest(self)
        return record | {"sha256": self._digest[1]}

    def extra_repr(self) -> str:
        record = self.weights
        source = record["source"]
        if source == "random":
            source = f"random (seed {record['seed']}); embeddings of it mean nothing"
        return (
            f"weights={source}, scalogram={scalogram_method(self.optimized_cwt)}, "
            f"precision={self.precision}, backend={self.backend}"
        )

    def freeze(self) -> FastNormWear:
        """Keeps only the folded weights of the current device and precision; encode-only from here.

        ``state_dict()`` and gradients are gone; memory is about halved (and the decoder's freed).
        """
        if self._frozen is not None:
            return self
        with self._lock:
            self._weights = self._weights_record()
            precision = self.resolved_precision
            engine = self._engine()
            # A backend with its own products has dropped the matrices that a move would need.
            folded = fold(self, _DTYPES[precision]) if engine.encoder else engine.folded
            self._frozen = (folded, precision)
            self._watch = self._origin = None
            self._engines.clear()
            for module in self.modules():
                for name in module._parameters:
                    module._parameters[name] = None
                module._buffers.clear()
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The released names; after `freeze` there is none, and a UsageError says so."""
        if getattr(self, "_frozen", None):
            raise UsageError("this model was frozen for encoding and dropped its original weights")
        return super().state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As of ``nn.Module``; a frozen model refuses."""
        if getattr(self, "_frozen", None):
            raise UsageError("this model was frozen for encoding; load weights into a new one")
        loaded = super().load_state_dict(*args, **kwargs)
        if hasattr(self, "_origin"):
            self.weights = {"source": "load_state_dict"}
        return loaded

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FastNormWear:
        # A move leaves engines of the old device behind: they must not outlive it.
        if "_engines" in self.__dict__:
            record, dtype = self.weights, self._any_weight.dtype
            self._engines.clear()
            self._watch = None
            if self._frozen is not None:
                folded = self._frozen[0].map(fn)
                if folded.carried.dtype != self._frozen[0].carried.dtype:
                    raise UsageError("a frozen model cannot change its dtype; load it anew")
                self._frozen = (folded, self._frozen[1])
        moved = cast("FastNormWear", super()._apply(fn, recurse))
        if self.__dict__.get("_origin") is not None:
            self._origin = None
            # A move changes no weight; one to fewer bits does.
            now = self._any_weight.dtype
            if torch.promote_types(dtype, now) == now:
                self.weights = record
        return moved

    def __deepcopy__(self, memo: dict[int, Any]) -> FastNormWear:
        # Engines are a cache and locks cannot be copied.
        import copy

        twin = self.__class__.__new__(self.__class__)
        memo[id(self)] = twin
        fresh: dict[str, Any] = {
            **_CACHES,
            "_engines": {},
            "_lock": threading.RLock(),
            "_handle": register_model(twin),
        }
        same = self._same()
        for name, value in self.__dict__.items():
            if name != "_compiled_call_impl":  # is bound to this one
                twin.__dict__[name] = fresh[name] if name in fresh else copy.deepcopy(value, memo)
        twin._origin = Watch(twin) if same else None
        return twin

    def _same(self) -> bool:
        """Whether the weights are those that :attr:`weights` speaks of."""
        return self._origin is not None and self._origin.same_weights()

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__ | _CACHES | {"_engines": {}, "_lock": None, "_same": self._same()}
        state.pop("_compiled_call_impl", None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        same = state.pop("_same", False)
        super().__setstate__(state)
        self._origin = Watch(self) if same else None
        self._lock = threading.RLock()
        self._handle = register_model(self)

    def _precision(self, precision: str | None) -> str:
        if self._frozen is not None:
            kept = self._frozen[1]
            if precision not in (None, "auto", kept):
                raise UsageError(
                    f"this model was frozen in {kept}; precision {precision!r} is gone"
                )
            return kept
        if self.cls_token.dtype == torch.float64 and precision is None:
            return "float64"  # what `.double()` asks for
        return resolve_precision(precision or self.precision, self.device)

    def _hollow(self) -> bool:
        """Whether the weights are shapes alone: on the meta device, or fake tensors."""
        return traced.shapes_only(self._any_weight)

    def _watched(self) -> Watch:
        if self._watch is None or not self._watch.unchanged():
            self._watch = Watch(self)
            self._engines.clear()
        return self._watch

    def _engine(self, precision: str | None = None) -> Engine:
        """The engine of the current weights; folds them where they changed since the last call."""
        if self._hollow():
            raise UsageError(
                "the weights are on the meta device or fake tensors: without values only forward's shape "
                "is known"
            )
        resolved = self._precision(precision)
        if self._frozen is None:
            self._watched()
        method = scalogram_method(self.optimized_cwt)
        key = (self.device, resolved, self.backend, method)
        if key not in self._engines:
            if self._frozen is not None:
                folded = self._frozen[0]
            else:
                check_plain(self)
                folded = fold(self, _DTYPES[resolved])
            self._engines[key] = Engine(
                folded,
                self.config,
                method,
                select_backend(self.backend, self.device),
                resolved,
            )
        return self._engines[key]

    # --- upstream's calls ----------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Token embeddings of equal windows at the model's rate.

        Args:
            x: (B, C, L) floating point on the model's device, L >= 11.

        Returns:
            (B, C, T, E) float32, row 0 of each channel its [CLS].

        Raises:
            InputError: another shape, or fewer than 11 samples.

        Under ``torch.compile`` inference is one opaque node, which runs the engine of the weights the
        model has at that moment. ``torch.export`` takes a snapshot of them (:mod:`normwear_fast.traced`).
        """
        if x.ndim != 3 or 0 in x.shape:
            raise InputError(f"input is {tuple(x.shape)}; it must be (batch, channels, samples)")
        if x.shape[-1] < MIN_SAMPLES:
            raise InputError(
                f"windows of {x.shape[-1]} samples are too short; {MIN_SAMPLES} are needed"
            )
        if torch.compiler.is_exporting():
            return traced.forward(self, x)
        if torch._C._get_tracing_state() is not None:
            raise UsageError(
                "torch.jit.trace cannot follow the engine; use torch.export or compile"
            )
        if self._needs_gradients(x):
            return self._forward_plain(x)
        x = x.to(self._series_dtype())
        if torch.compiler.is_compiling() or traced.shapes_only(x):
            tokens = window_tokens(1, x.shape[-1], self.optimized_cwt, self.config)
            sizes = (tokens, self.config.embed_dim)
            return cast(Tensor, torch.ops.normwear.forward(x, self._handle, *sizes))
        return self._forward_inference(x)

    def _forward_inference(self, x: Tensor) -> Tensor:
        """The engine; with a warning the plain model, where layers compute anything else."""
        try:
            return self._forward_fast(x)
        except NotPlainError as error:
            _say_plain_once(str(error))
            return self._forward_plain(x)

    def _forward_plain(self, x: Tensor) -> Tensor:
        """The reference model, differentiable; float32, or float64 beside float64 weights."""
        if self._frozen is not None:
            raise UsageError("this model was frozen for encoding: it has no gradients")
        spectrum = scalogram(
            x.to(self._series_dtype()),
            scalogram_method(self.optimized_cwt),
            wavelet=self.config.wavelet,
            num_scales=self.config.num_scales,
        )
        # Of torch's attention kernels only the plain one has a forward derivative.
        with sdpa_kernel(SDPBackend.MATH) if transformed() else nullcontext():
            out = cast(Tensor, super().forward(spectrum.to(self.cls_token.dtype)))
        return out.to(self._series_dtype())

    def _needs_gradients(self, x: Tensor) -> bool:
        if not torch.compiler.is_compiling() and transformed():
            return True
        if not torch.is_grad_enabled():
            return False
        if x.requires_grad:
            return True
        # A guard on each where it is traced; the watch needs addresses.
        if torch.compiler.is_compiling() or traced.shapes_only(x) or self._hollow():
            return any(parameter.requires_grad for parameter in self.parameters())
        return self._frozen is None and self._watched().requires_grad()

    def _series_dtype(self) -> torch.dtype:
        # Half-precision parameters still take a float32 series: its second difference needs the bits.
        return torch.float64 if self._any_weight.dtype == torch.float64 else torch.float32

    def _forward_fast(self, x: Tensor) -> Tensor:
        batch, channels, samples = x.shape
        tokens = window_tokens(1, samples, self.optimized_cwt, self.config)
        per_batch = max(1, self.batch_tokens_default() // (channels * tokens))
        # Not inference mode: a head trained on a frozen encoder's output saves it for its backward pass.
        with torch.no_grad(), self._lock:
            x = x.contiguous()
            engine = self._engine()
            parts = []
            for first in range(0, batch, per_batch):
                part = x[first : first + per_batch]
                layout = self._layout([(channels, samples)] * len(part))
                parts.append(engine.run(part.reshape(-1), layout, "patch"))
            engine.release(WORKSPACE_BYTES.get(self.device.type, 0))
            out = parts[0] if len(parts) == 1 else torch.cat(parts)
        return out.view(batch, channels, tokens, self.config.embed_dim)

    def get_embedding(
        self,
        sample_data: ArrayLike | Tensor,
        sampling_rate: float = SAMPLING_RATE,
        device: str | torch.device | None = None,
        *,
        resample: Resample = "upstream",
    ) -> Tensor:
        """Upstream's call: windows to token embeddings.

        Args:
            sample_data: (B, C, L) NumPy array or tensor, in the signal's own units. Or an mne.Epochs, or
                an mne.io.Raw, which is cut into windows of 6 s.
            sampling_rate: Hz, of all of them; mne's objects have their own.
            device: where the result should be; the model's device by default.
            resample: ``upstream`` resamples to 65 Hz only above 256 Hz, so that the same signal at 64
                and at 250 Hz lands on different scales; ``always`` and ``never`` mean it.

        Returns:
            (B, C, T, E) float32.

        Raises:
            InputError: another shape, a rate that is not positive, or NaN (window and channel named).
        """
        if is_mne(sample_data):
            sample_data, sampling_rate = equal_windows_of(sample_data)
        if isinstance(sample_data, Tensor):
            x = sample_data
        else:
            x = torch.from_numpy(np.ascontiguousarray(as_float_array(sample_data)))
        if x.ndim != 3:
            raise InputError(
                f"sample_data is {tuple(x.shape)}; it must be (batch, channels, samples)"
            )
        if x.is_complex():
            raise InputError(f"sample_data is {x.dtype}; it must be real numbers")
        if not x.is_floating_point():
            x = x.float()
        sampling_rate = as_rate(sampling_rate, "sampling_rate")
        check_finite(x.detach())
        x = x.to(self.device, self._series_dtype())
        out = self(at_model_rate(x, sampling_rate, resample))
        return out if device is None else out.to(device)

    # --- many windows --------------------------------------------------------------------------------

    def _layout(self, shapes: Sequence[tuple[int, int]]) -> Layout:
        method, device = scalogram_method(self.optimized_cwt), self.device
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        return cached_layout(tuple(shapes), method, self.config, device, stream)

    def _window_tokens(self, shape: tuple[int, int]) -> int:
        return window_tokens(*shape, self.optimized_cwt, self.config)

    def _transfer(self) -> Transfers:
        device, dtype = self.device, self._series_dtype()
        kept = self._transfers
        if kept is None or (kept.device, kept.dtype) != (device, dtype):
            self._transfers = kept = Transfers(device, dtype)
        return kept

    def _run_unit(
        self,
        windows: Sequence[NDArray[np.float32]],
        pool: Pool,
        batch_tokens: int | None,
        precision: str | None,
    ) -> Iterator[tuple[int, Tensor]]:
        """(index, (C, E) or (C, T, E)) of every window of one work unit, micro-batch by micro-batch."""
        shapes = [window.shape for window in windows]
        units = [range(len(windows))]
        return self._run_units(units, shapes, lambda i: windows[i], pool, batch_tokens, precision)

    def _run_units(
        self,
        units: Iterable[range],
        shapes: Sequence[tuple[int, ...]],
        load: Callable[[int], NDArray[np.float32]],
        pool: Pool,
        batch_tokens: int | None,
        precision: str | None,
    ) -> Iterator[tuple[int, Tensor]]:
        """(index, (C, E) or (C, T, E)) of every window of many units, each as `_run_unit` has it.

        The next unit's windows are loaded while the last one's are computed.

        Args:
            units: the windows of each; no micro-batch has windows of two.
            shapes: of all windows as ``load`` gives them.
            load: gives a window, when its micro-batch is next; it is not kept.
        """
        if pool not in ("mean", "cls", "patch"):
            raise InputError(f"pool is {pool!r}; it must be 'mean', 'cls' or 'patch'")
        transfers = self._transfer()
        flying: deque[tuple[MicroBatch, Layout, Callable[[], Tensor]]] = deque()
        for unit in units:
            for batch, host in self._packed(unit, shapes, load, batch_tokens, transfers):
                with self._lock, torch.inference_mode():
                    engine = self._engine(precision)
                    layout = self._layout(
                        [cast("tuple[int, int]", shapes[i]) for i in batch.windows]
                    )
                    out = engine.run(transfers.send(host, busy=bool(flying)), layout, pool)
                    flying.append((batch, layout, transfers.fetch(out)))
                    del out
                    engine.release(WORKSPACE_BYTES.get(self.device.type, 0))
                if len(flying) > transfers.in_flight:
                    yield from self._arrived(*flying.popleft(), pool)
        while flying:
            yield from self._arrived(*flying.popleft(), pool)

    def _packed(
        self,
        unit: range,
        shapes: Sequence[tuple[int, ...]],
        load: Callable[[int], NDArray[np.float32]],
        batch_tokens: int | None,
        transfers: Transfers,
    ) -> Iterator[tuple[MicroBatch, Tensor]]:
        """A unit's micro-batches and their packed samples, each loaded when it is asked for."""
        try:
            for batch in self._plan(unit, shapes, batch_tokens):
                windows = [load(i) for i in batch.windows]
                assert all(
                    w.shape == shapes[i] for w, i in zip(windows, batch.windows, strict=True)
                )
                host = transfers.pack(windows)
                del windows
                yield batch, host
        except InputError as error:
            # Of several windows that are wrong the first is named, as if all had been loaded at once.
            raise _first_error(unit, load) or error from None

    def _plan(
        self, unit: range, shapes: Sequence[tuple[int, ...]], batch_tokens: int | None
    ) -> list[MicroBatch]:
        """One work unit's micro-batches.

        Raises:
            InputError: a window that is too short, or larger than ``batch_tokens``.
        """
        members: list[tuple[int, int]] = []
        for i in unit:
            shape = shapes[i]
            if len(shape) != 2 or shape[0] == 0:
                raise InputError(f"window {i} is {shape}; it must be (channels, samples)")
            if shape[1] < MIN_SAMPLES:
                raise InputError(
                    f"window {i} has {shape[1]} samples at {SAMPLING_RATE:g} Hz; "
                    f"{MIN_SAMPLES} are needed"
                )
            members.append((shape[0], shape[1]))
        tokens = [self._window_tokens(shape) for shape in members]
        if batch_tokens is not None:
            for i, (channels, samples), count in zip(unit, members, tokens, strict=True):
                if count > batch_tokens:
                    raise InputError(
                        f"window {i} of {channels} channels and {samples} samples has {count} "
                        f"tokens; batch_tokens={batch_tokens} must be at least that"
                    )
        budget = batch_tokens or self.batch_tokens_default()
        return [
            MicroBatch(tuple(unit[i] for i in batch.windows), batch.tokens)
            for batch in plan_micro_batches(members, tokens, budget)
        ]

    def _arrived(
        self, batch: MicroBatch, layout: Layout, wait: Callable[[], Tensor], pool: Pool
    ) -> Iterator[tuple[int, Tensor]]:
        """The windows of one micro-batch, on the host."""
        parts = wait().split(self._rows(layout, pool))
        for i, part, shape in zip(batch.windows, parts, layout.shapes, strict=True):
            yield i, part.unflatten(0, (shape[0], -1)) if pool == "patch" else part

    @staticmethod
    def _rows(layout: Layout, pool: Pool) -> list[int]:
        """Output rows of each window."""
        if pool != "patch":
            return list(layout.windows.lengths)
        bounds, windows = layout.sequences.bounds, layout.windows.bounds
        return [bounds[b] - bounds[a] for a, b in pairwise(windows)]

    def encode_unit(
        self,
        windows: Sequence[NDArray[np.float32]],
        *,
        pool: Pool = "mean",
        batch_tokens: int | None = None,
        precision: str | None = None,
    ) -> list[NDArray[np.float32]]:
        """Encodes one work unit: windows at the model's rate, packed the same way every time.

        The same windows in the same order give the same bits (same weights, precision, backend,
        library, threads and device type).

        Args:
            windows: (C_i, L_i) float32 at 65 Hz, L_i >= 11.
            pool: ``mean`` over a channel's tokens ([CLS] included), its ``cls``, or ``patch``: all.
            batch_tokens: tokens in flight, a hard bound; by default the device's, and a single larger
                window runs alone.
            precision: this call's, instead of the model's.

        Returns:
            A (C_i, E) float32 array a window, (C_i, T_i, E) for ``patch``, in the order given.
        """
        out: list[NDArray[np.float32]] = [np.empty(0, np.float32)] * len(windows)
        for i, part in self._run_unit(windows, pool, batch_tokens, precision):
            # A copy: the part is a piece of its whole micro-batch, and on a GPU machine page-locked.
            out[i] = part.float().numpy().copy()
        return out

    def encode(
        self,
        windows: ArrayLike | Tensor | Sequence[ArrayLike | Tensor],
        sampling_rate: float | Sequence[float] = SAMPLING_RATE,
        *,
        pool: Pool = "mean",
        channels: ChannelPool = "keep",
        batch_tokens: int | None = None,
        precision: str | None = None,
        resample: Resample = "always",
        missing: Literal["error", "interpolate"] = "error",
        show_progress_bar: bool | None = None,
        convert_to_numpy: bool = True,
    ) -> Any:
        """Embeddings of many windows, equal or ragged, in bounded memory.

        Args:
            windows: one array (B, C, L), or a list of (C_i, L_i) arrays; the signal's own units. Or an
                mne.Epochs, or an mne.io.Raw, which is cut into windows of 6 s, end to end.
            sampling_rate: Hz, one number or one a window; mne's objects have their own.
            pool: over a channel's tokens: ``mean`` of all ([CLS] included, the published evaluation),
                ``cls``, or ``patch`` for none.
            channels: ``keep`` them apart, ``mean`` over them, or ``concat`` them.
            batch_tokens: tokens in flight, a hard bound on memory; the device's default otherwise.
            precision: this call's, instead of the model's.
            resample: ``always`` brings each window to round(duration * 65) samples; ``never``;
                ``upstream`` only above 256 Hz, as `get_embedding` does.
            missing: what NaN and inf do: ``error``, or ``interpolate`` linearly inside the window.
            show_progress_bar: on standard error; by default on a terminal.
            convert_to_numpy: arrays; False for tensors on the CPU.

        Returns:
            (B, C, E) for ``keep``, (B, E) for ``mean``, (B, C E) for ``concat``, with a token axis
            (B, C, T, E) for ``patch`` and its like; a list, one a window, where the shapes differ. Of no
            windows an array with B = 0, and C = 0 where they were an empty list.

        Raises:
            InputError: a window of another form, too short, or with missing values (named).
        """
        if channels not in ("keep", "mean", "concat"):
            raise InputError(f"channels is {channels!r}; it must be 'keep', 'mean' or 'concat'")
        if missing not in ("error", "interpolate"):
            raise InputError(f"missing is {missing!r}; it must be 'error' or 'interpolate'")
        if is_mne(windows):
            windows, sampling_rate = windows_of(windows)
        items = window_list(windows)
        rates = rate_list(sampling_rate, len(items))

        def resampled(shape: tuple[int, ...], rate: float) -> tuple[int, int]:
            return shape[0], samples_at_model_rate(shape[1], rate, resample)

        shapes = [resampled(item.shape, rate) for item, rate in zip(items, rates, strict=True)]
        counts = [self._window_tokens((c, max(n, MIN_SAMPLES))) for c, n in shapes]
        budget = batch_tokens or self.batch_tokens_default()
        nothing, given = (0, 0), getattr(windows, "shape", ())
        if not items and len(given) == 3:
            each = sampling_rate if np.ndim(sampling_rate) == 0 else SAMPLING_RATE
            nothing = resampled(given[1:], cast(float, each))
        outputs = Outputs(
            [self._output_shape(s, pool, channels) for s in shapes],
            convert_to_numpy,
            self._output_shape(nothing, pool, channels),
        )
        units = plan_units(counts, UNIT_BATCHES * budget)

        def load(i: int) -> NDArray[np.float32]:
            return prepare(items[i], rates[i], shapes[i][1], resample, missing, i)

        with progress(show_progress_bar, len(items)) as advance:
            for i, part in self._run_units(units, shapes, load, pool, batch_tokens, precision):
                outputs.put(i, pool_channels(part, channels))
                advance()
        return outputs.result()

    def _output_shape(
        self, shape: tuple[int, int], pool: Pool, channels: ChannelPool
    ) -> tuple[int, ...]:
        count, width = shape[0], self.config.embed_dim
        tokens: tuple[int, ...] = ()
        if pool == "patch":
            tokens = (self._window_tokens((1, max(shape[1], MIN_SAMPLES))),)
        if channels == "keep":
            return (count, *tokens, width)
        return (*tokens, width if channels == "mean" else count * width)


@cache
def _say_plain_once(reason: str) -> None:
    # Six frames up is who called the model: two of ours, forward and torch's two are between.
    warnings.warn(f"{reason}; the plain model runs instead, slower", RuntimeWarning, stacklevel=6)


def _digest(module: nn.Module) -> str:
    """SHA-256 of the names and values of a state dict, as they lie in memory."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        digest.update(memoryview(flat.numpy()))
    return digest.hexdigest()


def _renew_locks() -> None:
    """A fork's child has no thread that would release what another held."""
    for model in living_models():
        model._lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_locks)


def _torch_blas(device: torch.device) -> str:
    if device.type == "cuda":
        return "cublas"
    return "mkl" if torch.backends.mkl.is_available() else "other"


def _first_error(unit: range, load: Callable[[int], NDArray[np.float32]]) -> InputError | None:
    """Of the first window of a unit that cannot be loaded."""
    for i in unit:
        try:
            load(i)
        except InputError as error:
            return error
    return None
