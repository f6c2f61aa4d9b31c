"""The results of `encode` on their way to the caller: pooled over channels, in place, counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

ChannelPool = Literal["keep", "mean", "concat"]


def pool_channels(part: Tensor, channels: ChannelPool) -> Tensor:
    """(C, E) or (C, T, E) pooled over its first axis."""
    if channels == "keep":
        return part
    if channels == "mean":
        return part.mean(0)
    return part.movedim(0, -2).flatten(-2)


class Outputs:
    """The results of a run in their final place: one array where all shapes agree, else a list.

    Args:
        shapes: of every window's result.
        as_numpy: arrays, or tensors.
        nothing: the shape that a window's result would have, where there is none.
    """

    def __init__(
        self, shapes: Sequence[tuple[int, ...]], as_numpy: bool, nothing: tuple[int, ...]
    ) -> None:
        self.as_numpy = as_numpy
        self.uniform = len(set(shapes)) <= 1
        if self.uniform:
            shape = shapes[0] if shapes else nothing
            self.array = torch.empty((len(shapes), *shape), dtype=torch.float32, device="cpu")
        else:
            self.items = [torch.empty(shape, dtype=torch.float32, device="cpu") for shape in shapes]

    def put(self, index: int, value: Tensor) -> None:
        (self.array[index] if self.uniform else self.items[index]).copy_(value)

    def result(self) -> Any:
        if self.uniform:
            return self.array.numpy() if self.as_numpy else self.array
        return [item.numpy() for item in self.items] if self.as_numpy else self.items


class progress:
    """A tqdm bar that counts windows, or nothing."""

    def __init__(self, show: bool | None, total: int) -> None:
        import sys

        self.bar: Any = None
        # A process started without a terminal may have no stderr at all.
        if show or (show is None and sys.stderr is not None and sys.stderr.isatty()):
            from tqdm import tqdm

            self.bar = tqdm(total=total, unit="window", desc="encode")

    def __enter__(self) -> Callable[[], None]:
        return self._advance

    def _advance(self) -> None:
        if self.bar is not None:
            self.bar.update()

    def __exit__(self, *exc: object) -> None:
        if self.bar is not None:
            self.bar.close()
