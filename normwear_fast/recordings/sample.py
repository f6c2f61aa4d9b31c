"""Upstream's sample pickles: one window each, {uid, data (C, L), sampling_rate, label}."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from normwear_fast.errors import RecordingError
from normwear_fast.recordings.base import Array, Channel, Recording, check_rate, register
from normwear_fast.recordings.unpickle import load_pickle

_BYTES = 256 << 20  # a pickle cannot be streamed; a sample has some 10 kB


@register(".pkl", ".pickle")
class SampleRecording(Recording):
    """A pickle of arrays and plain values; anything else in it is refused, and nothing of it runs."""

    format = "NormWear sample"

    def __init__(self, path: Path, *, sampling_rate: float | None = None) -> None:
        self.path = path
        size = path.stat().st_size
        if size > _BYTES:
            raise RecordingError(
                f"{path}: has {size >> 20} MB; pickles of at most {_BYTES >> 20} MB are read"
            )
        value = load_pickle(path)
        data = value.get("data") if isinstance(value, dict) else None
        if not isinstance(data, np.ndarray):
            raise RecordingError(
                f"{path}: is no sample: a dictionary with data (channels, samples) and "
                f"sampling_rate is right"
            )
        data = data.view(np.ndarray)
        if data.dtype.kind not in "iufb":
            raise RecordingError(f"{path}: data holds {data.dtype}; real numbers are right")
        shape = data.shape
        if len(shape) not in (1, 2) or 0 in shape or (len(shape) == 2 and shape[0] > shape[1]):
            raise RecordingError(f"{path}: data has shape {shape}; (channels, samples) is right")
        self._data = data.reshape(-1, shape[-1])
        rate = value.get("sampling_rate", sampling_rate)
        if rate is None:
            raise RecordingError(f"{path}: has no sampling_rate; pass --rate HZ")
        try:
            rate = float(rate)
        except (TypeError, ValueError):
            rate = 0.0
        if not (np.isfinite(rate) and rate > 0):
            raise RecordingError(
                f"{path}: sampling_rate is {str(value['sampling_rate'])[:60]!r}; "
                f"a number of Hz above 0 is right"
            )
        check_rate(path, sampling_rate, [rate])
        self.channels = tuple(
            Channel(f"channel_{i + 1}", "", rate, shape[-1]) for i in range(len(self._data))
        )

    def _blocks(self, channels: list[int], seconds: float) -> Iterator[list[Array]]:
        step = max(1, round(seconds * self.channels[0].sampling_rate))
        for start in range(0, self._data.shape[1], step):
            block: list[Array] = []
            for channel in channels:
                values: Array = np.array(self._data[channel, start : start + step], dtype=float)
                values[~np.isfinite(values)] = np.nan
                block.append(values)
            yield block
