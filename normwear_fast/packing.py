"""Ragged windows in one buffer: who stands where, and what goes together.

A *sequence* is one channel of one window. The sequences of a micro-batch are packed into one
(tokens, E) buffer without padding; windows may differ in length and in channel count.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from normwear_fast.config import NormWearConfig
from normwear_fast.errors import InputError
from normwear_fast.wavelets import ScalogramMethod, scalogram_rows


def scalogram_method(optimized_cwt: bool) -> ScalogramMethod:
    """Upstream's flag as the name of a scalogram."""
    return "conv" if optimized_cwt else "scipy"


def patch_rows(samples: int, method: ScalogramMethod, rows_per_patch: int = 9) -> int:
    """Rows h of patches of a series of ``samples`` values (before differencing)."""
    return scalogram_rows(samples - 2, method) // rows_per_patch


def sequence_tokens(samples: int, method: ScalogramMethod, config: NormWearConfig) -> int:
    """Tokens T = 1 + 13 h of one channel of ``samples`` values: 560 for 390."""
    return 1 + config.grid_columns * patch_rows(samples, method, config.patch_size[0])


def window_tokens(
    channels: int, samples: int, optimized_cwt: bool, config: NormWearConfig | None = None
) -> int:
    """Tokens of a window of ``channels`` channels of ``samples`` values at the model's rate."""
    config = config or NormWearConfig()
    return channels * sequence_tokens(samples, scalogram_method(optimized_cwt), config)


def upload(array: NDArray[Any], device: torch.device) -> Tensor:
    """A small table on the device, without waiting for what the device is doing."""
    table = torch.from_numpy(array)
    if device.type != "cuda":
        return table.to(device)
    return table.pin_memory().to(device, non_blocking=True)


class Segments:
    """Consecutive segments of a packed axis, known on the host and on the device.

    Args:
        lengths: of each segment, in order.
        device: of :attr:`cu`.

    Raises:
        InputError: a length below zero.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self.lengths = tuple(lengths)
        if min(self.lengths, default=0) < 0:
            raise InputError(
                f"segments cannot have the lengths {self.lengths[:20]}: one is negative"
            )
        self.bounds = (0, *accumulate(self.lengths))
        self.device = device
        self._tiles: dict[int, Tensor] = {}
        self._host_tiles: dict[int, NDArray[np.int32]] = {}

    @classmethod
    def from_cu(cls, cu: Tensor) -> Segments:
        """From cumulative bounds, 0 first; reads them back to the host."""
        bounds = cu.tolist()
        if cu.ndim != 1 or bounds[:1] != [0]:
            raise InputError(
                f"bounds of segments are one row that starts with 0, not {bounds!s:.100}"
            )
        segments = cls([stop - start for start, stop in pairwise(bounds)], cu.device)
        segments.__dict__["cu"] = cu
        return segments

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def total(self) -> int:
        return self.bounds[-1]

    @property
    def longest(self) -> int:
        """Rows of the longest segment."""
        return max(self.lengths, default=0)

    @cached_property
    def cu(self) -> Tensor:
        """(segments + 1,) int32 bounds on the device."""
        return upload(np.asarray(self.bounds, dtype=np.int32), self.device)

    def tiles(self, block: int) -> Tensor:
        """Runs of at most ``block`` rows that stay inside a segment: what a kernel's programs take.

        Returns:
            (n, 2) int32 on the device: the segment, and the run's first row within it. An entry of a
            fixed-size table that stands for nothing has segment -1.
        """
        if block not in self._tiles:
            self._tiles[block] = upload(self.host_tiles(block), self.device)
        return self._tiles[block]

    def host_tiles(self, block: int) -> NDArray[np.int32]:
        """`tiles` on the host, kept; not to be written to."""
        if block not in self._host_tiles:
            self._host_tiles[block] = segment_tiles(self.lengths, block)
        return self._host_tiles[block]


def segment_tiles(lengths: Sequence[int], block: int) -> NDArray[np.int32]:
    """(n, 2) int32: segment and first row within it of every run of at most ``block`` rows."""
    counts = -(-np.asarray(lengths, dtype=np.int64) // block)
    segment = np.repeat(np.arange(len(counts)), counts)
    first = np.arange(len(segment)) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.stack((segment, first * block), axis=1).astype(np.int32)


def equal_runs(*axes: Segments) -> Iterator[tuple[int, int]]:
    """Runs ``(first, stop)`` of consecutive segments whose lengths agree along every given axis."""
    first, keys = 0, list(zip(*(axis.lengths for axis in axes), strict=True))
    for i in range(1, len(keys) + 1):
        if i == len(keys) or keys[i] != keys[first]:
            yield first, i
            first = i


class Layout:
    """Where every window, sequence and token of one micro-batch stands.

    Args:
        shapes: (C, L) of each window, in packed order.
        method: the scalogram, which decides a sequence's tokens.
        config: the model's sizes.
        device: of the index tensors.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]],
        method: ScalogramMethod,
        config: NormWearConfig,
        device: torch.device,
    ) -> None:
        lengths = [samples for channels, samples in shapes for _ in range(channels)]
        tokens = [sequence_tokens(samples, method, config) for samples in lengths]
        self.shapes = tuple(shapes)
        self.samples = Segments(lengths, device)
        """Samples of each sequence in the packed series."""
        self.sequences = Segments(tokens, device)
        """Tokens of each sequence in the packed rows."""
        self.windows = Segments([channels for channels, _ in shapes], device)
        """Sequences of each window."""
        self.ones = Segments([1] * len(lengths), device)
        """One query a sequence, where only [CLS] rows are wanted."""

    @cached_property
    def cls_rows(self) -> Tensor:
        """(S,) int64 packed row of each sequence's [CLS]."""
        return self.sequences.cu[:-1].long()

    @property
    def cls_index(self) -> Tensor:
        """(S,) int32: the same; -1 for a sequence that a fixed-size table only makes room for."""
        return self.sequences.cu[:-1]


@lru_cache(maxsize=128)
def cached_layout(
    shapes: tuple[tuple[int, int], ...],
    method: ScalogramMethod,
    config: NormWearConfig,
    device: torch.device,
    stream: int,
) -> Layout:
    """:class:`Layout`, kept: long runs repeat a handful of shapes.

    One a stream (its handle; 0 without a GPU): tables are copied on the stream that first asks for them,
    and another would not wait for the copy.
    """
    return Layout(shapes, method, config, device)


@dataclass(frozen=True)
class MicroBatch:
    """Windows, by index, that run through the encoder together."""

    windows: tuple[int, ...]
    tokens: int


def plan_micro_batches(
    shapes: Sequence[tuple[int, int]], tokens: Sequence[int], batch_tokens: int
) -> list[MicroBatch]:
    """Packs the windows of one work unit, the same way every time.

    Windows go in order of length, then channel count, then position, so that equal ones are adjacent.
    A micro-batch holds at most ``batch_tokens`` tokens, or a single window that is larger.
    """
    order = sorted(range(len(shapes)), key=lambda i: (shapes[i][1], shapes[i][0], i))
    batches: list[MicroBatch] = []
    members: list[int] = []
    total = 0
    for i in order:
        if members and total + tokens[i] > batch_tokens:
            batches.append(MicroBatch(tuple(members), total))
            members, total = [], 0
        members.append(i)
        total += tokens[i]
    if members:
        batches.append(MicroBatch(tuple(members), total))
    return batches


def plan_units(tokens: Sequence[int], unit_tokens: int) -> list[range]:
    """Cuts consecutive windows into work units of at most ``unit_tokens`` tokens (at least a window)."""
    units: list[range] = []
    first, total = 0, 0
    for i, count in enumerate(tokens):
        if i > first and total + count > unit_tokens:
            units.append(range(first, i))
            first, total = i, 0
        total += count
    if first < len(tokens):
        units.append(range(first, len(tokens)))
    return units
