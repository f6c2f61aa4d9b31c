"""Which patches pretraining keeps: random and structured masks, one draw a (sample, channel).

A mask is made from uniform noise: the patches, or the patch rows and columns, with the smallest draws
stay. Every sequence keeps the same number, so kept tokens form a dense batch.
Source: Luo et al. 2026 (arXiv 2412.09758), pretraining; the published shares.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

from normwear_fast.config import NormWearConfig
from normwear_fast.errors import InputError

MaskScheme = Literal["random", "structured"]
SCHEMES: tuple[MaskScheme, ...] = ("random", "structured")
Noise: TypeAlias = Tensor | tuple[Tensor, Tensor]
"""(S, patches), or the pair (S, rows) and (S, columns) of a structured mask; float32 in [0, 1)."""

RANDOM_REMOVED = 0.8
TIME_KEPT, SCALE_KEPT = 0.4, 0.5


def kept_counts(config: NormWearConfig) -> tuple[int, int, int]:
    """Patches a random mask keeps; patch rows and patch columns a structured one keeps: 111, 17, 6.

    At least one of each: tokens of the series have a single column, and only time is masked.
    """
    patches = config.grid_tokens - 1
    shares = (
        patches * (1 - RANDOM_REMOVED),
        config.grid_rows * TIME_KEPT,
        config.grid_columns * SCALE_KEPT,
    )
    return tuple(max(1, int(share)) for share in shares)  # type: ignore[return-value]


def draw_noise(
    config: NormWearConfig,
    scheme: MaskScheme,
    sequences: int,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Noise:
    """The uniform draws of ``sequences`` masks, on the device."""

    def draw(columns: int) -> Tensor:
        return torch.rand(
            sequences, columns, generator=generator, device=device, dtype=torch.float32
        )

    if scheme == "structured":
        return draw(config.grid_rows), draw(config.grid_columns)
    return draw(config.grid_tokens - 1)


def smallest(noise: Tensor, count: int) -> Tensor:
    """(S, n) draws in [0, 1) -> (S, count) indices of the smallest, ascending.

    Of equal draws the first stays, as in a stable sort. The bits of non-negative float32 values order
    like the values, so draw and index fit one int64 key, no two keys are equal, and a partial selection
    finds what a full sort would.
    """
    if noise.dtype != torch.float32:
        raise InputError(f"mask noise is {noise.dtype}; it must be float32")
    index = torch.arange(noise.shape[1], device=noise.device)
    keys = (noise.contiguous().view(torch.int32).long() << 32) | index
    kept = keys.topk(count, dim=1, largest=False, sorted=False).values & 0xFFFFFFFF
    return kept.sort(dim=1).values


def kept_patches(noise: Noise, scheme: MaskScheme, config: NormWearConfig) -> Tensor:
    """(S, k) indices of the patches that stay, ascending, token order ``columns * t + s``.

    Args:
        noise: (S, patches) for ``random``; (S, rows) and (S, columns) for ``structured``, which keeps a
            patch if its row is among the smallest of the first and its column among the smallest of the
            second.

    Raises:
        InputError: an unknown scheme, or noise of another shape or dtype than the scheme takes.
    """
    count, rows, columns = kept_counts(config)
    grid = (config.grid_rows, config.grid_columns)
    if scheme == "random":
        if not isinstance(noise, Tensor) or noise.shape[1:] != (grid[0] * grid[1],):
            raise InputError(f"a random mask takes noise (S, {grid[0] * grid[1]})")
        return smallest(noise, count)
    if scheme != "structured":
        raise InputError(f"mask is {scheme!r}; it must be 'random' or 'structured'")
    if isinstance(noise, Tensor) or [draw.shape[1:] for draw in noise] != [(n,) for n in grid]:
        raise InputError(f"a structured mask takes noise (S, {grid[0]}) and (S, {grid[1]})")
    time, scale = smallest(noise[0], rows), smallest(noise[1], columns)
    return (time[:, :, None] * config.grid_columns + scale[:, None, :]).flatten(1)


def mask_of(kept: Tensor, patches: int) -> Tensor:
    """(S, k) kept indices -> (S, patches) float32, 1 = removed."""
    mask = torch.ones(len(kept), patches, device=kept.device, dtype=torch.float32)
    return mask.scatter_(1, kept, 0.0)
