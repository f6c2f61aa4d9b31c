"""Windows from blocks, and work units from windows: every sample where it belongs, every window once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from normwear_fast.encode.units import plan_units
from normwear_fast.encode.windows import Extractor, Tiling, Window
from normwear_fast.errors import RecordingError
from normwear_fast.recordings.base import Channel, Recording


@pytest.mark.parametrize(
    ("duration", "window", "hop", "count"),
    [
        (60, 6, 6, 10),
        (59.99, 6, 6, 9),
        (6, 6, 6, 1),
        (5.9, 6, 6, 0),
        (6.6, 6, 0.1, 7),
        (6, 6, 7, 1),
    ],
)
def test_tiling_counts_what_fits(duration: float, window: float, hop: float, count: int) -> None:
    tiling = Tiling.over(duration, window, hop)
    assert len(tiling) == count
    assert [w.start for w in tiling] == [k * hop for k in range(count)]


class Fake(Recording):
    """A recording in memory, whose file says nothing."""

    format = "fake"
    made: dict[str, tuple[tuple[Channel, ...], list[np.ndarray]]] = {}  # noqa: RUF012

    def __init__(self, path: Path, *, sampling_rate: float | None = None) -> None:
        self.path = path
        self.channels, self.data = self.made[path.stem]

    def _blocks(self, channels: list[int], seconds: float) -> Iterator[list[np.ndarray]]:
        done = [0] * len(channels)
        while any(len(self.data[c]) > d for c, d in zip(channels, done, strict=True)):
            block = []
            for i, c in enumerate(channels):
                step = max(1, round(seconds * self.channels[c].sampling_rate))
                block.append(self.data[c][done[i] : done[i] + step])
                done[i] += step
            yield block


def fake_recording(channels: Sequence[Channel], rng: np.random.Generator) -> Fake:
    data = [rng.standard_normal(channel.samples) for channel in channels]
    Fake.made["x"] = (tuple(channels), data)
    return Fake(Path("x.fake"))


def defined_window(channel: Channel, data: np.ndarray, window: Window) -> tuple[np.ndarray, float]:
    """A window's samples one by one, from the definition of which it owns."""
    first = math.ceil((window.start - channel.start) * channel.sampling_rate - 1e-6)
    stop = math.ceil(
        (window.start + window.duration - channel.start) * channel.sampling_rate - 1e-6
    )
    samples = [data[i] if 0 <= i < len(data) else np.nan for i in range(first, stop)]
    offset = channel.start + first / channel.sampling_rate - window.start
    return np.array(samples), max(offset, 0.0)


@settings(max_examples=60)
@given(st.data())
def test_extracted_windows_are_the_defined_ones(data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    channels = [
        Channel(
            f"S{i}",
            "",
            data.draw(st.sampled_from([4.0, 32.0, 65.0, 99.7])),
            data.draw(st.integers(1, 900)),
            data.draw(st.sampled_from([0.0, 0.37, 2.0])),
        )
        for i in range(data.draw(st.integers(1, 3)))
    ]
    recording = fake_recording(channels, rng)
    starts = data.draw(st.lists(st.floats(-3, 20), min_size=1, max_size=12).map(sorted))
    windows = [Window("", start, data.draw(st.floats(0.2, 9))) for start in starts]
    block = data.draw(st.sampled_from([0.3, 2.0, 60.0]))
    extractor = Extractor(recording, range(len(channels)), block)
    split = data.draw(st.integers(0, len(windows)))
    cut = [*extractor.extract(windows[:split]), *extractor.extract(windows[split:])]
    assert len(cut) == len(windows)
    for window, raw in zip(windows, cut, strict=True):
        for channel, values, got in zip(channels, recording.data, raw, strict=True):
            samples, offset = defined_window(channel, values, window)
            np.testing.assert_array_equal(got.samples, samples)
            assert got.rate == channel.sampling_rate
            assert got.offset == pytest.approx(offset, abs=1e-9)


def test_extraction_holds_no_more_than_blocks_and_windows() -> None:
    channel = Channel("S", "", 100.0, 600_000)
    recording = fake_recording([channel], np.random.default_rng(0))
    extractor = Extractor(recording, [0])
    largest = 0
    for raw in extractor.extract(Tiling.over(6000.0, 6.0, 6.0)[:]):
        assert len(raw[0].samples) == 600
        largest = max(largest, len(extractor._streams[0].buffer))
    assert largest <= 3 * 60 * 100


def test_recording_with_fewer_samples_than_declared_is_an_error() -> None:
    recording = fake_recording([Channel("S", "", 10.0, 100)], np.random.default_rng(0))
    recording.data[0] = recording.data[0][:70]
    with pytest.raises(RecordingError, match="S ends after 70 of its 100 samples"):
        list(Extractor(recording, [0]).extract(Tiling.over(10.0, 5.0, 5.0)[:]))


@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(1, 60)), max_size=12), st.integers(1, 300)
)
def test_units_hold_every_window_once_within_the_bound(
    recordings: list[tuple[int, int]], bound: int
) -> None:
    counts = [count for count, _ in recordings]
    uniform = plan_units(counts, lambda i, n: recordings[i][1], bound, lambda i, j: -1)
    one_by_one = plan_units(counts, lambda i, n: None, bound, lambda i, j: recordings[i][1])
    assert uniform == one_by_one
    seen = [
        (span.recording, j)
        for unit in uniform
        for span in unit.spans
        for j in range(span.first, span.stop)
    ]
    assert seen == [(i, j) for i, count in enumerate(counts) for j in range(count)]
    assert [unit.index for unit in uniform] == list(range(len(uniform)))
    for unit in uniform:
        tokens = sum((s.stop - s.first) * recordings[s.recording][1] for s in unit.spans)
        assert tokens <= bound or unit.windows == 1
        if len(unit.spans) > 1:
            assert all(s.stop - s.first == counts[s.recording] for s in unit.spans)


def test_units_do_not_depend_on_what_comes_later() -> None:
    each: Callable[[int, int], int] = lambda i, n: 10  # noqa: E731
    some = plan_units([3, 2, 50, 4], each, 100, each)
    more = plan_units([3, 2, 50, 4, 99], each, 100, each)
    assert more[: len(some)] == some
