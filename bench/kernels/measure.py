"""What the kernels' checks and timings share."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor


def default_device() -> torch.device:
    """The GPU; the CPU where there is none, for Triton's interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def twice(run: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """The result of a run, and 1.0 if a second one gives the same bits."""
    first, second = run(), run()
    same = torch.equal(first.contiguous().view(torch.uint8), second.contiguous().view(torch.uint8))
    return first, float(same)


def excess(
    got: Tensor, exact: Tensor, absolute: float | Tensor, relative: float
) -> dict[str, float]:
    """Largest error of ``got`` over its bound ``absolute + relative * |exact|``, as error and bound 1."""
    error = (got.double() - exact.to(got.device)).abs()
    worst = (error / (absolute + relative * exact.to(got.device).abs())).max()
    return {"error": float(worst.nan_to_num(nan=torch.inf)), "bound": 1.0}


AHEAD = 4_000_000
"""Clocks, some 2 ms, that a GPU is kept waiting before what is timed."""


def run_ahead(device: torch.device, clocks: int = AHEAD) -> None:
    """Keeps a GPU waiting while the host launches what is timed.

    On an idle GPU an event's time is that of its arrival: the 20 to 60 us that the host takes to launch
    a kernel from Python would count as the kernel's, half of a norm's 120.
    """
    if device.type == "cuda":
        torch.cuda._sleep(clocks)


def seconds(run: Callable[[], object], device: torch.device, rounds: int = 20) -> float:
    """Median of single runs after a warm-up: by CUDA events on a GPU, launches not counted."""
    for _ in range(min(3, rounds)):
        run()
    taken = []
    for _ in range(rounds):
        if device.type == "cuda":
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            run_ahead(device)
            start.record()
            run()
            stop.record()
            stop.synchronize()
            taken.append(start.elapsed_time(stop) / 1e3)
        else:
            began = time.perf_counter()
            run()
            taken.append(time.perf_counter() - began)
    return float(np.median(taken))


def copy_bandwidth(device: torch.device, size: int) -> float:
    """Bytes a second of a device copy, read and written, of ``size`` bytes."""
    source, target = torch.randint(256, (2, size), dtype=torch.uint8, device=device)
    return 2 * size / seconds(lambda: target.copy_(source), device)
