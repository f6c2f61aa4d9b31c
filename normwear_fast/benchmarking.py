"""Measuring on shared machines: interleaved rounds, ratios, and the baselines all engines face.

`normwear-fast bench` and the suite in ``bench/`` both use this module, so that a user's table and the
project's are made the same way.
"""

from __future__ import annotations

import ctypes
import datetime
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from normwear_fast import native
from normwear_fast.config import NormWearConfig
from normwear_fast.packing import scalogram_method, sequence_tokens
from normwear_fast.reference import ReferenceNormWear
from normwear_fast.scalograms import scalogram


@dataclass
class Timing:
    """Rounds of one function, taken in turn with the others of its run."""

    seconds: list[float] = field(default_factory=list)
    page_faults: list[int] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def best(self) -> float:
        return min(self.seconds)

    @property
    def spread(self) -> float:
        """Half the interquartile range over the median."""
        if len(self.seconds) < 2:
            return 0.0
        quartiles = statistics.quantiles(self.seconds, n=4)
        return (quartiles[2] - quartiles[0]) / 2 / self.median

    def as_dict(self) -> dict[str, Any]:
        return {
            "median_s": self.median,
            "best_s": self.best,
            "spread": self.spread,
            "rounds": len(self.seconds),
            "page_faults": int(statistics.median(self.page_faults)) if self.page_faults else 0,
        }


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def interleave(
    functions: Mapping[str, Callable[[], object]], rounds: int = 7, warmup: int = 1
) -> dict[str, Timing]:
    """Times functions in turn, round by round, so that a machine's moods meet all of them.

    Every second round goes backwards: whoever follows a cache-hungry neighbour does so half the time.
    """
    for _ in range(warmup):
        for function in functions.values():
            function()
    timings = {name: Timing() for name in functions}
    for i in range(rounds):
        names = list(functions) if i % 2 == 0 else list(functions)[::-1]
        for name in names:
            synchronize()
            faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            start = time.perf_counter()
            functions[name]()
            synchronize()
            timings[name].seconds.append(time.perf_counter() - start)
            faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
            timings[name].page_faults.append(faults)
    return timings


def ratio(baseline: Timing, row: Timing) -> tuple[float, float]:
    """How many times faster ``row`` is, and the spread: median and half IQR of per-round ratios."""
    ratios = [b / r for b, r in zip(baseline.seconds, row.seconds, strict=True)]
    if len(ratios) < 2:
        return ratios[0], 0.0
    quartiles = statistics.quantiles(ratios, n=4)
    return statistics.median(ratios), (quartiles[2] - quartiles[0]) / 2


def set_allocator_thresholds(threshold: int) -> bool:
    """Makes glibc reuse freed buffers up to ``threshold`` bytes instead of returning them.

    A fresh 41 MB activation is page-faulted anew at every use otherwise; a table says which it ran
    under. False where the C library has no ``mallopt``.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    trim, mmap = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
    return bool(mallopt(mmap, threshold)) and bool(mallopt(trim, threshold))


def machine() -> dict[str, Any]:
    """What a measurement ran on."""
    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as lines:
            model = next(line.split(":")[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        pass
    cuda = torch.cuda.is_available()
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": model,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "instruction_set": native.kernels().name if native.instruction_sets() else None,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": sys.platform,
        "load_average": os.getloadavg()[0],
    }


def channel_flops(config: NormWearConfig, samples: int, channels: int = 1) -> float:
    """Floating-point operations of one channel of a window: 107e9 for the released model at 390.

    Linear layers, attention (4 T^2 E a layer), fusion blocks over ``channels`` rows, patches, wavelets.
    """
    tokens = sequence_tokens(samples, "conv", config)
    width, hidden = config.embed_dim, config.hidden_dim
    linear = 2 * (4 * width * width + 2 * width * hidden)
    layers = config.depth * (tokens * linear + 4 * tokens**2 * width)
    fusions = sum(config.has_fusion(i) for i in range(config.depth))
    fusion = fusions * (linear + 4 * channels * width)
    rows, taps = samples - 1, min(640, samples - 2)
    scalogram_flops = 2 * 3 * rows * config.num_scales * taps
    patches = 2 * (tokens - 1) * width * 3 * config.patch_size[0] * config.patch_size[1]
    return layers + fusion + scalogram_flops + patches


def gemm_shapes(config: NormWearConfig, rows: int) -> dict[str, tuple[int, int, int]]:
    """(M, N, K) of a layer's four products."""
    width, hidden = config.embed_dim, config.hidden_dim
    return {
        "qkv": (rows, 3 * width, width),
        "proj": (rows, width, width),
        "fc1": (rows, hidden, width),
        "fc2": (rows, width, hidden),
    }


def gemm_calls(
    config: NormWearConfig, rows: int, dtype: torch.dtype, device: torch.device
) -> dict[str, tuple[Callable[[], object], float]]:
    """The four products of every library here as (call, FLOPs), on operands of that dtype."""
    calls: dict[str, tuple[Callable[[], object], float]] = {}
    for name, (m, n, k) in gemm_shapes(config, rows).items():
        a = torch.randn(m, k, device=device).to(dtype)
        b = torch.randn(n, k, device=device).to(dtype)
        out = torch.empty(m, n, dtype=dtype, device=device)

        def call(a: Tensor = a, b: Tensor = b, out: Tensor = out) -> object:
            return torch.mm(a, b.T, out=out)

        calls[name] = (call, 2.0 * m * n * k)
        if device.type == "cpu":
            calls |= _other_libraries(name, a, b)
    return calls


def _other_libraries(
    name: str, a: Tensor, b: Tensor
) -> dict[str, tuple[Callable[[], object], float]]:
    """The same product by oneDNN on a packed weight and by the native engine: the ceiling is the best."""
    flops = 2.0 * a.shape[0] * a.shape[1] * b.shape[0]
    calls: dict[str, tuple[Callable[[], object], float]] = {}
    if torch.backends.mkldnn.is_available():
        linear = torch.ops.mkldnn._linear_pointwise
        packed = torch.ops.mkldnn._reorder_linear_weight(b, a.shape[0])

        def onednn() -> object:
            with torch.inference_mode():
                return linear(a, packed, None, "none", [], "")

        calls[f"{name} oneDNN"] = (onednn, flops)
    if native.instruction_sets() and a.dtype in (torch.float32, torch.bfloat16):
        kernels = native.kernels()
        operand = native.OPERANDS[str(a.dtype).removeprefix("torch.")]
        weight = native.pack(kernels, b, operand)
        out = torch.empty(a.shape[0], b.shape[0], dtype=a.dtype)

        def own() -> object:
            return native.linear(kernels, a, weight, out)

        calls[f"{name} native"] = (own, flops)
    return calls


def gemm_rate(timings: Mapping[str, Timing], flops: Mapping[str, float]) -> float:
    """The best rate any of our products reached, FLOP/s: the ceiling of an encoder made of them."""
    return max(flops[name] / timings[name].best for name in flops)


# --- Baselines --------------------------------------------------------------------------------------


def reference_of(model: ReferenceNormWear) -> ReferenceNormWear:
    """The plain model with the same weights."""
    reference = ReferenceNormWear(model.config, decoder=model.has_decoder, seed=None)
    reference.load_state_dict(model.state_dict())
    return reference.to(model.cls_token.device).eval().requires_grad_(False)


def eager(reference: ReferenceNormWear, optimized_cwt: bool) -> Callable[[Tensor], Tensor]:
    """The reference as its authors run it: scalogram and model, eager, float32."""
    method = scalogram_method(optimized_cwt)

    def run(x: Tensor) -> Tensor:
        with torch.inference_mode():
            out = reference(scalogram(x, method).float())
        assert isinstance(out, Tensor)
        return out

    return run


def compiled(reference: ReferenceNormWear, optimized_cwt: bool) -> Callable[[Tensor], Tensor]:
    """The reference under ``torch.compile``: inductor with freezing on a CPU, bf16 autocast and
    max-autotune on a GPU."""
    import torch._inductor.config as inductor

    method = scalogram_method(optimized_cwt)
    cuda = reference.cls_token.device.type == "cuda"
    inductor.freezing = not cuda
    model = torch.compile(reference, mode="max-autotune" if cuda else None, dynamic=False)

    def run(x: Tensor) -> Tensor:
        with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16, enabled=cuda):
            return model(scalogram(x, method).float())

    return run


def scipy_scalogram(window: np.ndarray, num_scales: int) -> np.ndarray:
    """(C, L) to (C, 3, L - 2, num_scales) as upstream's default does it: a loop over channels, series
    and scales, what ``scipy.signal.cwt`` with ``ricker`` did in each until 1.14, in float64."""
    from scipy.signal import convolve

    from normwear_fast.wavelets import filter_widths, mother_wavelet, scales

    samples = window.shape[1] - 2
    widths = filter_widths(samples, "scipy", num_scales)
    out = np.empty((len(window), 3, samples, num_scales))
    for i, channel in enumerate(window):
        first = np.diff(channel)
        derivatives = (channel[2:], first[1:], np.diff(first))
        for j, series in enumerate(x.astype(np.float64) for x in derivatives):
            for k, (scale, width) in enumerate(zip(scales(num_scales), widths, strict=True)):
                t = np.arange(width) - (width - 1) / 2
                wavelet = mother_wavelet("mexh", t / scale) / np.sqrt(scale)
                out[i, j, :, k] = convolve(series, wavelet[::-1], mode="same")
    return out


def one_at_a_time(reference: ReferenceNormWear) -> Callable[[Tensor], Tensor]:
    """What users run today: windows one by one, their scalograms by `scipy_scalogram` on the CPU, then
    the eager model; the mean of a channel's tokens is on the host before the next window begins."""
    device, count = reference.cls_token.device, reference.config.num_scales

    def run(x: Tensor) -> Tensor:
        parts = []
        for window in x.cpu().numpy():
            spectrum = torch.from_numpy(scipy_scalogram(window, count)[None])
            with torch.inference_mode():
                parts.append(reference(spectrum.float().to(device)).mean(2).cpu())
        return torch.cat(parts)

    return run


def error_against(expected: Tensor, got: Tensor) -> dict[str, float]:
    """Largest absolute difference, and mean and worst cosine of a token."""
    cosine = torch.nn.functional.cosine_similarity(expected.double(), got.double(), dim=-1)
    return {
        "max_abs_error": float((expected - got).abs().max()),
        "mean_cosine": float(cosine.mean()),
        "worst_cosine": float(cosine.min()),
    }
