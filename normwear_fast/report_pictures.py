"""The report's pictures, as SVG and PNG text that needs nothing beside it."""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Sequence
from html import escape

import numpy as np
from numpy.typing import NDArray

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#666666")
"""Okabe and Ito's, which people with any colour vision tell apart."""


def colour(index: int) -> str:
    """Of the series at that place: the first seven as above, then hues a golden angle apart."""
    if index < len(COLOURS):
        return COLOURS[index]
    return f"hsl({137.508 * index % 360:.0f} 60% {42 + 8 * (index % 3)}%)"


def scatter(
    points: NDArray[np.floating],
    groups: Sequence[int],
    titles: Sequence[str],
    names: Sequence[str],
    labels: tuple[str, str],
    listed: int = 16,
) -> str:
    """A map of points with a legend.

    Args:
        points: (n, 2).
        groups: of each point, index into ``names``.
        titles: what a pointer on it shows.
        names: of the groups.
        labels: of the two axes.
        listed: names in the legend; the rest are counted.
    """
    size, edge = 440.0, 14.0
    low = points.min(axis=0)
    span = np.maximum(points.max(axis=0) - low, 1e-12)
    placed = edge + (points - low) / span * (size - 2 * edge)
    marks = "".join(
        f'<circle cx="{x:.1f}" cy="{size - y:.1f}" r="3.2" fill="{colour(group)}">'
        f"<title>{escape(title)}</title></circle>"
        for (x, y), group, title in zip(placed.tolist(), groups, titles, strict=True)
    )
    return (
        f'<svg class="map" viewBox="0 0 {size:g} {size:g}" role="img" '
        f'aria-label="map of {len(points)} points">'
        f'<rect x="1" y="1" width="{size - 2:g}" height="{size - 2:g}" class="frame"/>'
        f'<g fill-opacity="0.7">{marks}</g></svg>'
        f'<div class="axes">across: {escape(labels[0])}; up: {escape(labels[1])}</div>'
        + legend(names, listed)
    )


def legend(names: Sequence[str], listed: int) -> str:
    """Names beside their colours."""
    items = "".join(
        f'<li><i style="background:{colour(i)}"></i>{escape(name)}</li>'
        for i, name in enumerate(names[:listed])
    )
    more = f"<li>and {len(names) - listed:,} more</li>" if len(names) > listed else ""
    return f'<ul class="legend">{items}{more}</ul>'


def bars(rows: Sequence[tuple[str, float, str]]) -> str:
    """Horizontal bars from zero: (name, value, what stands after the bar)."""
    largest = max((value for _, value, _ in rows), default=0.0) or 1.0
    lines = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td class="bar"><b '
        f'style="width:{100 * value / largest:.2f}%"></b></td><td>{escape(text)}</td></tr>'
        for name, value, text in rows
    )
    return f'<table class="bars">{lines}</table>'


def strip(values: NDArray[np.floating], label: str) -> str:
    """A line of time whose cells darken with the fraction (0 to 1) that is missing; NaN is grey."""
    cells = []
    start = 0
    shades = [None if math.isnan(v) else round(10 * v + 0.499) for v in values.tolist()]
    for i in range(1, len(shades) + 1):
        if i == len(shades) or shades[i] != shades[start]:
            shade = shades[start]
            if shade != 0:
                fill = "#ddd" if shade is None else f"hsl(18 85% {82 - 5.2 * shade:.0f}%)"
                cells.append(f'<rect x="{start}" width="{i - start}" height="1" fill="{fill}"/>')
            start = i
    return (
        f'<svg class="strip" viewBox="0 0 {len(shades)} 1" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(label)}">{"".join(cells)}</svg>'
    )


def line(values: NDArray[np.floating], label: str) -> str:
    """A series over the whole width."""
    low, high = float(values.min()), float(values.max())
    span = high - low or 1.0
    steps = np.linspace(0, 1000, len(values))
    path = " ".join(
        f"{x:.1f},{95 - 90 * (y - low) / span:.1f}"
        for x, y in zip(steps.tolist(), values.tolist(), strict=True)
    )
    return (
        f'<svg class="line" viewBox="0 0 1000 100" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(label)}"><polyline points="{path}"/></svg>'
    )


_COLD_TO_WARM = np.array(
    [[5, 48, 97], [67, 147, 195], [247, 247, 247], [214, 96, 77], [103, 0, 31]], dtype=np.float64
)
"""Blue through white to red (ColorBrewer RdBu), for values of both signs."""


def image(values: NDArray[np.floating], label: str) -> str:
    """(height, width) values of both signs as a picture; zero is white, the scale ends at the 99.5th
    percentile of their size."""
    limit = float(np.quantile(np.abs(values), 0.995)) or 1.0
    place = (np.clip(values / limit, -1, 1) + 1) * 2  # 0..4 along the five colours
    left = np.minimum(place.astype(np.intp), 3)
    share = (place - left)[..., None]
    pixels = _COLD_TO_WARM[left] * (1 - share) + _COLD_TO_WARM[left + 1] * share
    data = base64.b64encode(_png(np.round(pixels).astype(np.uint8))).decode()
    return f'<img class="scalogram" alt="{escape(label)}" src="data:image/png;base64,{data}">'


def _png(pixels: NDArray[np.uint8]) -> bytes:
    """(height, width, 3) as a PNG file, https://www.w3.org/TR/png/."""
    height, width, _ = pixels.shape
    rows = np.concatenate([np.zeros((height, 1), np.uint8), pixels.reshape(height, -1)], axis=1)

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows.tobytes(), 9))
        + chunk(b"IEND", b"")
    )
