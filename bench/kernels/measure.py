"""What the kernels' checks and timings share."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping

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
        run_ahead(device)
        taken.append(_elapsed(run, device))
    return float(np.median(taken))


SETTLE, MEASURE = 0.1, 0.15
"""Seconds that a run is repeated before its rate counts, and while: by then a GPU's clock is what its
power allows. After a pause it is higher, and the way that draws the most gains the most."""


def sustained(
    runs: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    rounds: int = 3,
    settle: float = SETTLE,
    measure: float = MEASURE,
) -> dict[str, float]:
    """Seconds of each, one after another without a pause: medians of rounds, taken in turn."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    once = {name: seconds(run, device, 3) for name, run in runs.items()}
    for i in range(rounds):
        for name in list(runs) if i % 2 == 0 else list(runs)[::-1]:
            for _ in range(math.ceil(settle / once[name])):
                runs[name]()
            count = max(1, math.ceil(measure / once[name]))

            def many(run: Callable[[], object] = runs[name], count: int = count) -> None:
                for _ in range(count):
                    run()

            taken[name].append(_elapsed(many, device) / count)
    return {name: float(np.median(found)) for name, found in taken.items()}


def _elapsed(run: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        began = time.perf_counter()
        run()
        return time.perf_counter() - began
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop)) / 1e3


def copy_bandwidth(device: torch.device, size: int) -> float:
    """Bytes a second of a device copy, read and written, of ``size`` bytes."""
    source, target = torch.randint(256, (2, size), dtype=torch.uint8, device=device)
    return 2 * size / seconds(lambda: target.copy_(source), device)
