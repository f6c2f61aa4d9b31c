"""Buckets: tables of fixed size and address that say where a micro-batch's sequences and windows stand.

A CUDA graph's sizes and addresses are fixed. A micro-batch goes into a bucket of rows at most a quarter
larger than what it holds; rows, sequences and windows beyond the real ones stand for nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from normwear_fast.packing import Layout, Segments

SMALLEST_BUCKET = 1_024
"""Tokens; a window of one 6 s channel has 560."""

LONG_SEQUENCE, SEQUENCE_TOKENS = 256, (256, 64, 14, 2)
"""A bucket of R rows has tables for R / 256 sequences, which 6 s windows (560 tokens) fit twice over, or,
where a micro-batch has more, for R / 64, which 1 s windows fit, or R / 14: none is shorter with the
released 13 columns of patches; or R / 2, with fewer. An entry costs an empty program a head and layer and
a row of every fusion block: 9,000 would be an eighth of a full micro-batch's time on an H100."""

USUAL_CHANNELS = 16
"""Sequences of a window that the fusion's attention is launched for."""


def bucket_rows(tokens: int) -> int:
    """Rows of the bucket for that many tokens: a power of two, or 1.25, 1.5 or 1.75 times one."""
    if tokens <= SMALLEST_BUCKET:
        return SMALLEST_BUCKET
    quarter = (1 << ((tokens - 1).bit_length() - 1)) // 4
    return -(-tokens // quarter) * quarter


def table_size(sequences: int, rows: int) -> int:
    """Sequences that a bucket of so many rows has tables for, if a micro-batch has ``sequences``."""
    return next(rows // n for n in SEQUENCE_TOKENS if sequences <= rows // n)


TABLE_START = 32
"""A table starts at a multiple of so many integers of its allocation: 128 bytes, a line of the caches.
Triton compiles other code for pointers that are no multiple of 16."""

SMALLEST_TILE = 16
"""Rows of a kernel's smallest tiles: a bucket's allocation has room for a table of those."""


@dataclass(frozen=True)
class _Place:
    """Where a table is in its arena."""

    chunk: int
    part: slice


class _Arena:
    """Tables of integers on the device, at addresses that stay, in few allocations: one copy fills each.

    Args:
        size: integers of an allocation; a table that finds no room is given another.
        device: of the tables.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.size, self.device = size, device
        self._chunks: list[Tensor] = []
        self._used: list[int] = []

    def place(self, size: int) -> tuple[_Place, Tensor]:
        """A new table of so many integers, each of them -1."""
        taken = -(-size // TABLE_START) * TABLE_START
        # Filled inside and outside inference mode: must not be inference tensors.
        with torch.inference_mode(False):
            if not self._chunks or self._used[-1] + taken > len(self._chunks[-1]):
                room = (max(self.size, taken),)
                self._chunks.append(torch.full(room, -1, dtype=torch.int32, device=self.device))
                self._used.append(0)
            start = self._used[-1]
            self._used[-1] += taken
            place = _Place(len(self._chunks) - 1, slice(start, start + size))
            return place, self._chunks[-1][place.part]

    def staged(self) -> list[Tensor]:
        """Host memory for all tables, an allocation each, -1 throughout: what `send` copies."""
        return [self._host(used) for used in self._used]

    def send(self, staged: Sequence[Tensor]) -> None:
        """Every table's new contents; the copies wait for what runs on the current stream."""
        for chunk, host in zip(self._chunks, staged, strict=True):
            chunk[: len(host)].copy_(host, non_blocking=True)

    def send_one(self, table: Tensor, values: NDArray[np.int32]) -> None:
        """One table's, -1 after the values."""
        host = self._host(len(table))
        host.numpy()[: values.size] = values.reshape(-1)
        table.copy_(host, non_blocking=True)

    def _host(self, size: int) -> Tensor:
        """Page-locked for a GPU: torch's allocator hands it out again only when its copy is done."""
        on_gpu = self.device.type == "cuda"
        return torch.full((size,), -1, dtype=torch.int32, device="cpu", pin_memory=on_gpu)


class FixedSegments:
    """Segments of any micro-batch that fits, in tables whose sizes and addresses never change.

    To a kernel it is a :class:`~normwear_fast.packing.Segments`: segments beyond the real ones are empty,
    and tiles beyond the real ones have segment -1.

    Args:
        capacity: segments there is room for.
        rows: rows there is room for.
        longest: rows of a segment that launches should expect; any number is right, if not as fast.
        device: of the tables.
        arena: where the tables are; by default one of their own.
    """

    def __init__(
        self,
        capacity: int,
        rows: int,
        longest: int,
        device: torch.device,
        arena: _Arena | None = None,
    ) -> None:
        self.capacity, self.total, self.longest, self.device = capacity, rows, longest, device
        self._shared = arena is not None
        self._arena = arena or _Arena(self.room(capacity, rows), device)
        self._cu, self.cu = self._arena.place(capacity + 1)
        self.cu.zero_()
        self._index, self.index = self._arena.place(capacity)
        """First row of each segment, -1 where there is none."""
        self._tiles: dict[int, tuple[_Place, Tensor]] = {}
        self._segments = Segments((), device)

    @staticmethod
    def room(capacity: int, rows: int) -> int:
        """Integers of the tables, with one of the smallest tiles."""
        return 2 * (capacity + rows // SMALLEST_TILE) + 2 * capacity + 3 * TABLE_START

    def __len__(self) -> int:
        return self.capacity

    def fill(self, segments: Segments) -> None:
        """Takes a micro-batch's segments; the copies wait for what runs on the current stream."""
        assert not self._shared, "a layout fills all that share its arena"
        staged = self._arena.staged()
        self.write([host.numpy() for host in staged], segments)
        self._arena.send(staged)

    def write(self, staged: Sequence[NDArray[np.int32]], segments: Segments) -> None:
        """Puts a micro-batch's segments into what the arena is about to send, -1 so far."""
        cu, index = _part(staged, self._cu), _part(staged, self._index)
        count = len(segments)
        cu[: count + 1] = segments.bounds
        cu[count + 1 :] = segments.total
        index[:count] = cu[:count]
        for block, (place, _) in self._tiles.items():
            real = segments.host_tiles(block)
            _part(staged, place)[: real.size] = real.reshape(-1)
        self._segments = segments

    def tiles(self, block: int) -> Tensor:
        """(rows // block + capacity, 2) int32, as `Segments.tiles`, filled up with -1."""
        if block not in self._tiles:
            place, table = self._arena.place(2 * (self.total // block + self.capacity))
            self._arena.send_one(table, self._segments.host_tiles(block))
            with torch.inference_mode(False):
                self._tiles[block] = place, table.view(-1, 2)
        return self._tiles[block][1]


def _part(staged: Sequence[NDArray[np.int32]], place: _Place) -> NDArray[np.int32]:
    return staged[place.chunk][place.part]


class FixedLayout:
    """Where everything stands in a bucket: what `packing.Layout` is to one micro-batch."""

    def __init__(self, rows: int, capacity: int, device: torch.device) -> None:
        room = FixedSegments.room(capacity, rows) + 2 * FixedSegments.room(capacity, capacity)
        self._arena = _Arena(room, device)
        self.sequences = FixedSegments(capacity, rows, LONG_SEQUENCE, device, self._arena)
        self.windows = FixedSegments(capacity, capacity, USUAL_CHANNELS, device, self._arena)
        self.ones = FixedSegments(capacity, capacity, 1, device, self._arena)
        self._filled: tuple[tuple[int, ...], tuple[int, ...]] | None = None

    @property
    def cls_index(self) -> Tensor:
        return self.sequences.index

    def fill(self, layout: Layout) -> None:
        """Takes a micro-batch's layout; the copy waits for what runs on the current stream.

        The tables stay as they are where the last micro-batch had the same one.
        """
        lengths = layout.sequences.lengths, layout.windows.lengths
        if lengths == self._filled:
            return
        self._filled = None  # until everything is sent
        staged = self._arena.staged()
        arrays = [host.numpy() for host in staged]
        self.sequences.write(arrays, layout.sequences)
        self.windows.write(arrays, layout.windows)
        self.ones.write(arrays, layout.ones)
        self._arena.send(staged)
        self._filled = lengths
