"""What tests of readers share: a recording read whole, one refused, and one written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from normwear_fast.errors import RecordingError
from normwear_fast.recordings import Recording, open_recording


def read(recording: Recording, seconds: float = 60.0, channels: Any = None) -> list[np.ndarray]:
    """Channels whole, from blocks; checked against the declared lengths."""
    wanted = range(len(recording.channels)) if channels is None else channels
    blocks = list(recording.blocks(wanted, seconds))
    whole = [np.concatenate([block[i] for block in blocks]) for i in range(len(wanted))]
    assert all(data.dtype == np.float64 for data in whole)
    assert [data.size for data in whole] == [recording.channels[c].samples for c in wanted]
    return whole


def opened(path: Path, rate: float | None = None) -> tuple[Recording, list[np.ndarray]]:
    with open_recording(path, sampling_rate=rate) as recording:
        return recording, read(recording)


def refused(path: Path, *words: str, rate: float | None = None, to_the_end: bool = False) -> str:
    """The one line that a bad file gets; it names the file and has all the words."""
    with (  # noqa: PT012
        pytest.raises(RecordingError) as info,
        open_recording(path, sampling_rate=rate) as recording,
    ):
        if to_the_end:
            read(recording)
    text = str(info.value)
    assert "\n" not in text
    assert path.stem in text
    for word in words:
        assert word in text, text
    return text


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def opened_in_any_blocks(
    path: Path, rate: float | None = None
) -> tuple[Recording, list[np.ndarray]]:
    """A recording whole, after its blocks of two other lengths and orders were found equal to it."""
    with open_recording(path, sampling_rate=rate) as recording:
        whole = read(recording)
        for seconds in (0.37, 1e9):
            for data, expected in zip(read(recording, seconds), whole, strict=True):
                np.testing.assert_array_equal(data, expected)
        backwards = list(range(len(whole)))[::-1]
        for data, expected in zip(read(recording, 2.0, backwards), whole[::-1], strict=True):
            np.testing.assert_array_equal(data, expected)
        return recording, whole


def refused_when_read(path: Path, *words: str, rate: float | None = None) -> str:
    """What is `refused` to the end, by its whole name."""
    return refused(path, path.name, *words, rate=rate, to_the_end=True)


def signal(channels: int, samples: int, dtype: Any = np.float64) -> np.ndarray:
    values = np.random.default_rng(7).normal(0, 100, (channels, samples))
    return values.astype(dtype)
