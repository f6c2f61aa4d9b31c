"""The relevance of a question's every patch, drawn over the signal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from normwear_fast.config import SAMPLING_RATE
from normwear_fast.errors import OutputError, UsageError

PATCH_SAMPLES = 9
"""Scalogram rows of a patch; row r stands at sample r + 1 of the window, the middle of the second
difference it is made of."""

SCALE_GROUPS = 13


@dataclass(frozen=True)
class DrawnWindow:
    """One window of the picture.

    Args:
        start: seconds after the recording's start.
        signal: (C, L) at 65 Hz, as the encoder got it.
        relevance: (C, T), [CLS] first.
        answer: shown above the window.
    """

    start: float
    signal: NDArray[np.float32]
    relevance: NDArray[np.float32]
    answer: str


def draw_relevance(
    path: str | Path,
    title: str,
    question: str,
    names: Sequence[str],
    windows: Sequence[DrawnWindow],
) -> None:
    """Write a picture: a row a channel, its signal in front of its 13 scale groups by time.

    Colour is relevance over the window's mean: 1 is average, whatever the number of tokens.

    Args:
        path: its ending chooses the format: .png, .svg or .pdf.
        names: of the channels.
        windows: of one recording, in order; gaps between them stay empty.
    Raises: UsageError for another ending; OutputError where the file cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise UsageError(f"{path}: a picture must end in .png, .svg or .pdf")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    ratios = [window.relevance * window.relevance.size for window in windows]
    spread = max(float(np.abs(ratio[:, 1:] - 1).max()) for ratio in ratios) or 1e-6
    figure = Figure(figsize=(11, 1.2 + 1.5 * len(names)), layout="constrained")
    FigureCanvasAgg(figure)
    rows = figure.subplots(len(names), 1, sharex=True, squeeze=False)[:, 0]
    mesh = None
    for channel, (axes, name) in enumerate(zip(rows, names, strict=True)):
        front = axes.twinx()
        front.set_zorder(axes.get_zorder() + 1)
        front.patch.set_visible(False)
        for window, ratio in zip(windows, ratios, strict=True):
            grid = ratio[channel, 1:].reshape(-1, SCALE_GROUPS).T
            edges = (np.arange(grid.shape[1] + 1) * PATCH_SAMPLES + 0.5) / SAMPLING_RATE
            mesh = axes.pcolormesh(
                window.start + edges,
                np.arange(SCALE_GROUPS + 1),
                grid,
                cmap="RdBu_r",
                vmin=1 - spread,
                vmax=1 + spread,
                alpha=0.75,
                rasterized=True,
                linewidth=0,
            )
            signal = window.signal[channel]
            times = window.start + np.arange(len(signal)) / SAMPLING_RATE
            front.plot(times, signal, color="black", linewidth=0.9)
            if channel == 0:
                middle = window.start + len(signal) / SAMPLING_RATE / 2
                axes.annotate(
                    _shortened(window.answer, 60 // len(windows) + 8),
                    (middle, 1.02),
                    xycoords=axes.get_xaxis_transform(),
                    ha="center",
                    va="bottom",
                    fontsize=8,
                )
            axes.axvline(window.start, color="0.5", linewidth=0.6, linestyle=":")
        axes.margins(x=0)
        axes.set_ylabel(name)
        axes.set_yticks([0, SCALE_GROUPS], ["fine", "coarse"], fontsize=7)
        front.tick_params(labelsize=7)
    rows[-1].set_xlabel("time (s)")
    figure.suptitle(f"{title}: {_shortened(question, 90)}", fontsize=11)
    if mesh is not None:
        figure.colorbar(mesh, ax=list(rows), label="relevance (1 = average)", pad=0.03)
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise OutputError(f"{path}: picture cannot be written ({error.strerror})") from None


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else text[: max(1, length - 1)].rstrip() + "…"
