"""Work units: the atom of encoding, commit, resume and retry, decided by settings and input alone.

What a GEMM returns for a row depends, in its last bits, on the rows beside it. So which windows go
through the model together must never depend on timing, on workers or on where a run was killed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Span:
    """Windows ``first`` to ``stop - 1`` of the recording at that place in the sorted inputs."""

    recording: int
    first: int
    stop: int


@dataclass(frozen=True)
class Unit:
    """Windows that are encoded and committed together: one span, or several whole small recordings."""

    index: int
    spans: tuple[Span, ...]

    @property
    def windows(self) -> int:
        return sum(span.stop - span.first for span in self.spans)


def plan_units(
    windows: Sequence[int],
    tokens: Callable[[int, int], int | None],
    unit_tokens: int,
    window_tokens: Callable[[int, int], int],
) -> list[Unit]:
    """Cuts a run into work units of at most ``unit_tokens`` tokens, or one larger window.

    A recording that fills less than a unit shares one with the small recordings after it, while they
    fit; a larger one is cut by itself.

    Args:
        windows: of each recording, in sorted order.
        tokens: tokens of every window of recording i (given its number of windows) where all are
            equal, else None.
        unit_tokens: the bound.
        window_tokens: tokens of window j of recording i.
    """
    units: list[Unit] = []
    group: list[Span] = []
    group_total = 0

    def close() -> None:
        nonlocal group, group_total
        if group:
            units.append(Unit(len(units), tuple(group)))
        group, group_total = [], 0

    for i, count in enumerate(windows):
        if count == 0:
            continue
        spans = list(_cut(i, count, tokens(i, count), unit_tokens, window_tokens))
        if len(spans) > 1:
            close()
            for span, _ in spans:
                units.append(Unit(len(units), (span,)))
            continue
        span, total = spans[0]
        if group and group_total + total > unit_tokens:
            close()
        group.append(span)
        group_total += total
    close()
    return units


def _cut(
    recording: int,
    count: int,
    each: int | None,
    unit_tokens: int,
    window_tokens: Callable[[int, int], int],
) -> Iterator[tuple[Span, int]]:
    """Spans of one recording and their tokens."""
    if each is not None:
        step = max(1, unit_tokens // each)
        for first in range(0, count, step):
            stop = min(first + step, count)
            yield Span(recording, first, stop), (stop - first) * each
        return
    first, total = 0, 0
    for j in range(count):
        tokens = window_tokens(recording, j)
        if j > first and total + tokens > unit_tokens:
            yield Span(recording, first, j), total
            first, total = j, 0
        total += tokens
    yield Span(recording, first, count), total


def group_jobs(units: Iterable[Unit]) -> Iterator[list[Unit]]:
    """Runs of units that one pass over one recording serves; a unit of several recordings is its own."""
    job: list[Unit] = []
    for unit in units:
        same = (
            job
            and len(unit.spans) == len(job[-1].spans) == 1
            and unit.spans[0].recording == job[-1].spans[0].recording
        )
        if job and not same:
            yield job
            job = []
        job.append(unit)
    if job:
        yield job
