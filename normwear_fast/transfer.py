"""Series to the device and results back, each under the other micro-batches' compute.

On a GPU three streams work at once: one copies the next micro-batch's series in, the current stream
computes, one copies the last results out. Host buffers are page-locked (from torch's caching allocator,
which reuses one only when its copy is done), so that no copy makes the host wait. On a CPU everything
is plain and at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

IN_FLIGHT = {"cuda": 2, "cpu": 0}
"""Micro-batches the host may be ahead: with two, one is computed while the next is packed and copied."""


class Transfers:
    """Copies of micro-batches. Kept from call to call: torch's allocator keeps memory for every stream.

    Args:
        device: where they are encoded.
        dtype: of the series there.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.in_flight = IN_FLIGHT.get(device.type, 0)
        if device.type == "cuda":
            self._in, self._out = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def pack(self, windows: Sequence[NDArray[np.float32]]) -> Tensor:
        """(total samples,) on the host, the windows' channels one after another.

        Args:
            windows: (C_i, L_i) float32.
        """
        total = sum(window.size for window in windows)
        on_gpu = self.device.type == "cuda"
        host = torch.empty(total, dtype=torch.float32, device="cpu", pin_memory=on_gpu)
        np.concatenate([window.reshape(-1) for window in windows], out=host.numpy())
        return host

    def send(self, host: Tensor, *, busy: bool = True) -> Tensor:
        """What `pack` gave, on the device.

        Args:
            host: the series.
            busy: whether other micro-batches may be computed meanwhile; where none are, the copy goes
                before the computation in its own stream, and nothing waits for another stream.
        """
        if self.device.type != "cuda":
            return host.to(self.device, self.dtype)
        if not busy:
            return host.to(self.device, non_blocking=True).to(self.dtype)
        compute = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self._in):
            series = host.to(self.device, non_blocking=True)
        compute.wait_stream(self._in)
        series.record_stream(compute)
        return series.to(self.dtype)

    def fetch(self, result: Tensor) -> Callable[[], Tensor]:
        """Starts a result's way to the host; the function returned waits for it.

        Returns:
            Gives a tensor on the CPU; on a GPU machine its memory is page-locked, so that what is kept
            for long should be copied.
        """
        if self.device.type != "cuda":
            return lambda: result
        self._out.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._out):
            host = torch.empty(result.shape, dtype=result.dtype, device="cpu", pin_memory=True)
            host.copy_(result, non_blocking=True)
            arrived = self._out.record_event()
        result.record_stream(self._out)

        def wait() -> Tensor:
            arrived.synchronize()
            return host

        return wait
