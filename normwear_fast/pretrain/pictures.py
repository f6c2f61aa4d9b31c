"""Pictures of a run: what was hidden, and what came back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from normwear_fast.config import SAMPLING_RATE
from normwear_fast.errors import InputError
from normwear_fast.plots import COLOURS, PATCH_ROWS, _figure, _styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def reconstruction_figure(
    target: NDArray[np.floating],
    reconstruction: NDArray[np.floating],
    hidden: NDArray[np.floating],
) -> Figure:
    """Series and reconstructions, a row a window and a column a channel.

    Args:
        target: (B, C, samples) at 65 Hz.
        reconstruction: (B, C, samples).
        hidden: (B, C, rows) share of each patch row that was masked, 0 to 1; drawn as shading.
    """
    if target.ndim != 3 or target.shape != reconstruction.shape:
        raise InputError(
            f"target {target.shape} and reconstruction {reconstruction.shape}; both must be (B, C, L)"
        )
    windows, channels, samples = target.shape
    seconds = np.arange(samples) / SAMPLING_RATE
    edges = np.arange(hidden.shape[2] + 1) * PATCH_ROWS / SAMPLING_RATE
    with _styled():
        figure = _figure(3.2 * channels, 1.9 * windows)
        panels: Any = figure.subplots(windows, channels, sharex=True, squeeze=False)
        for b in range(windows):
            for c in range(channels):
                axes = panels[b, c]
                low, high = float(target[b, c].min()), float(target[b, c].max())
                margin = 0.1 * (high - low) or 1.0
                axes.pcolormesh(
                    edges,
                    [low - margin, high + margin],
                    hidden[b, c][None],
                    cmap="Greys",
                    vmin=0,
                    vmax=3,
                )
                axes.plot(seconds, target[b, c], color=COLOURS[0], linewidth=0.9, label="series")
                axes.plot(
                    seconds,
                    reconstruction[b, c],
                    color=COLOURS[1],
                    linewidth=0.9,
                    label="reconstruction",
                )
                axes.set_ylim(low - margin, high + margin)
                axes.set_title(f"window {b}, channel {c}", loc="left", fontsize=9)
        lines, labels = panels[0, 0].get_legend_handles_labels()
        figure.legend(lines, labels, frameon=False, fontsize=8, ncols=2, loc="outside upper right")
        for axes in panels[-1]:
            axes.set_xlabel("time (s)")
    return figure
