"""What a GPU draws, and its clock, while something runs.

Where the power limit sets the rate, seconds alone do not say why.
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import threading
import time
from collections.abc import Callable

import torch

QUERY = ("clocks.sm", "power.draw", "power.limit")
EVERY_MS = 50

SETTLE, MEASURE = 2.0, 1.5
"""Seconds run before samples count, the driver's figure being the mean of the last second, and while."""


def drawn(
    run: Callable[[], object],
    device: torch.device,
    *,
    settle: float = SETTLE,
    measure: float = MEASURE,
) -> dict[str, float] | None:
    """Repeats ``run`` for some seconds under nvidia-smi.

    Returns:
        Medians: ``sm_clock_mhz``, ``watts`` and ``limit_watts``; None on a CPU or without nvidia-smi.

    Raises:
        RuntimeError: nvidia-smi tells nothing about this device.
    """
    program = shutil.which("nvidia-smi")
    if device.type != "cuda" or program is None:
        return None
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    command = [program, f"--id={uuid}", f"--query-gpu={','.join(QUERY)}"]
    command += ["--format=csv,noheader,nounits", f"--loop-ms={EVERY_MS}"]
    return _sampled(run, command, settle, measure)


def _sampled(
    run: Callable[[], object], command: list[str], settle: float, measure: float
) -> dict[str, float]:
    samples: list[tuple[float, list[float]]] = []

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            try:
                values = [float(text) for text in line.split(",")]
            except ValueError:  # "[N/A]", or why there is nothing
                continue
            if len(values) == len(QUERY):
                samples.append((time.monotonic(), values))

    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        try:
            began = time.monotonic()
            while time.monotonic() < began + settle + measure:
                run()
        finally:
            process.terminate()
        reader.join()
    counted = [values for at, values in samples if at > began + settle]
    if not counted:
        raise RuntimeError(f"no samples from {command[0]}")
    clock, watts, limit = (statistics.median(column) for column in zip(*counted, strict=True))
    return {"sm_clock_mhz": clock, "watts": watts, "limit_watts": limit}
