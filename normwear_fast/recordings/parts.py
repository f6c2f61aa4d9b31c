"""Recordings put together from parts, each with a clock of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from normwear_fast.recordings.base import Array, Recording


class PartedRecording(Recording):
    """Several sources of channels on one time axis. A subclass calls `_combine`."""

    def _combine(self, parts: Sequence[Recording], starts: Sequence[float]) -> None:
        """Take over the parts' channels; `starts` are seconds after the recording's start."""
        self._places = [(part, i) for part in parts for i in range(len(part.channels))]
        self.channels = tuple(
            replace(channel, start=channel.start + start)
            for part, start in zip(parts, starts, strict=True)
            for channel in part.channels
        )
        self.notes += tuple(note for part in parts for note in part.notes)

    def _blocks(self, channels: list[int], seconds: float) -> Iterator[list[Array]]:
        rows: dict[int, list[int]] = {}  # id of a part -> rows of the block that it fills
        for row, channel in enumerate(channels):
            rows.setdefault(id(self._places[channel][0]), []).append(row)
        streams = []
        for wanted in rows.values():
            part = self._places[channels[wanted[0]]][0]
            indices = [self._places[channels[row]][1] for row in wanted]
            streams.append((wanted, part.blocks(indices, seconds)))
        # parts of one length end together; of several, the shorter ones go on empty
        while True:
            block: list[Array] = [np.empty(0)] * len(channels)
            ended = True
            for wanted, stream in streams:
                piece = next(stream, None)
                if piece is None:
                    continue
                ended = False
                for row, data in zip(wanted, piece, strict=True):
                    block[row] = data
            if ended:
                return
            yield block
