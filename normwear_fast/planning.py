"""What a run comes to, before it: windows, tokens, FLOPs, bytes of output, hours on named devices.

Windows are counted by the same survey that encode begins with, so their number is encode's own number
of rows. Hours are FLOPs over a rate of ``devices.json``, where a device is either measured (by this
project's benchmarks; date and file are there) or modelled (and says from what).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from typing import TYPE_CHECKING, Any

from normwear_fast.config import NormWearConfig
from normwear_fast.encode.settings import EncodeSettings, join_names, window_samples
from normwear_fast.encode.windows import planned_duration
from normwear_fast.errors import UsageError

if TYPE_CHECKING:
    from normwear_fast.encode.pipeline import Plan
    from normwear_fast.encode.survey import Surveyed
    from normwear_fast.encode.windows import WindowList

COMPRESSED = 0.93
"""Bytes of a part per byte of its embeddings, byte-split under zstd: measured 0.926, random weights of
the released size."""

PATCHES_COMPRESSED = 0.94
"""As `COMPRESSED`, of patches: the small model's."""

ROW_BYTES = 24
"""A row's other columns in a part, compressed: ids, times, status."""

PART_OVERHEAD = 3000
"""Schema, metadata and pages of a part, whatever it holds; measured 3,354 bytes beside 15 rows."""


@dataclass(frozen=True)
class Device:
    """How fast a device encodes.

    Args:
        name: as ``--device`` takes it.
        precision: of the model.
        basis: ``measured`` by this project, or ``modelled``.
        flops_per_s: slowest and fastest expected rate of the encoder's own operations.
        date: of the measurement, or of the model.
        source: where the numbers come from.
        count: how many of them.
    """

    name: str
    precision: str
    basis: str
    flops_per_s: tuple[float, float]
    date: str
    source: str
    count: int = 1

    def hours(self, flops: float) -> tuple[float, float]:
        """Shortest and longest, if the readers keep up and the devices share the work evenly."""
        slow, fast = self.flops_per_s
        return flops / fast / self.count / 3600, flops / slow / self.count / 3600


def known_devices() -> tuple[Device, ...]:
    """The devices of devices.json."""
    text = resources.files("normwear_fast").joinpath("devices.json").read_text(encoding="utf-8")
    return tuple(
        Device(**{**values, "flops_per_s": tuple(values["flops_per_s"])})
        for values in json.loads(text)["devices"]
    )


def named_devices(names: Sequence[str]) -> list[Device]:
    """The devices of these names in any case; ``8xH100`` is eight of them.

    Raises:
        UsageError: a name that devices.json does not have.
    """
    known = known_devices()
    chosen = []
    for name in names:
        match = re.fullmatch(r"(?:([1-9]\d{0,5})\s*x\s*)?(.+)", name.strip(), re.IGNORECASE)
        count, wanted = (match[1], match[2].lower()) if match else (None, "")
        found = [device for device in known if device.name.lower() == wanted]
        if not found:
            raise UsageError(
                f"--device {name}: not known; it must be one of "
                f"{', '.join(dict.fromkeys(device.name for device in known))}, or N times it: 8xH100"
            )
        chosen += [Device(**{**asdict(device), "count": int(count or 1)}) for device in found]
    return chosen


@dataclass(frozen=True)
class Estimate:
    """What a run comes to.

    Args:
        inputs: every recording, those that cannot be encoded too.
        windows: rows of the output; missing data can make some of them rows without an embedding.
        channel_windows: windows times their channels.
        tokens: of all windows.
        units: work units.
        flops: of the encoder.
        output_bytes: of the Parquet parts, or of the Zarr store of patches.
    """

    inputs: tuple[Surveyed, ...]
    windows: int
    channel_windows: int
    tokens: int
    units: int
    flops: float
    output_bytes: int

    def to_dict(self, devices: Sequence[Device]) -> dict[str, Any]:
        """The plan as JSON has it."""
        return {
            "recordings": len(self.inputs),
            "recordings_failed": sum(entry.error is not None for entry in self.inputs),
            "windows": self.windows,
            "channel_windows": self.channel_windows,
            "tokens": self.tokens,
            "units": self.units,
            "flops": self.flops,
            "output_bytes": self.output_bytes,
            "devices": [asdict(d) | {"hours": list(d.hours(self.flops))} for d in devices],
            "inputs": [entry.to_dict() for entry in self.inputs],
        }


def estimate(
    plan: Plan,
    settings: EncodeSettings,
    windows: WindowList | None,
    config: NormWearConfig,
) -> Estimate:
    """Adds up a plan.

    Args:
        plan: of the surveyed inputs.
        settings: of the run.
        windows: the list of windows, where there is one.
        config: the model's sizes.
    """
    flops = 0.0
    channel_windows = values = 0
    for entry in plan.inputs:
        channels = len(entry.channels)
        channel_windows += entry.windows * channels
        values += entry.windows * (1 if settings.channel_pool == "mean" else channels)
        for duration, count in _durations(entry, settings, windows):
            samples = window_samples(duration)
            flops += count * channels * _flops(config, samples, channels)
    rows = sum(entry.windows for entry in plan.inputs)
    if settings.pool == "patch":  # Zarr holds them as float16
        content: float = plan.tokens * config.embed_dim * 2 * PATCHES_COMPRESSED
    else:
        content = values * config.embed_dim * 4 * COMPRESSED
    return Estimate(
        inputs=plan.inputs,
        windows=rows,
        channel_windows=channel_windows,
        tokens=plan.tokens,
        units=len(plan.units),
        flops=flops,
        output_bytes=round(content + rows * ROW_BYTES + (PART_OVERHEAD if rows else 0)),
    )


def _flops(config: NormWearConfig, samples: int, channels: int) -> float:
    from normwear_fast.benchmarking import channel_flops

    return channel_flops(config, samples, channels)


def _durations(
    entry: Surveyed, settings: EncodeSettings, windows: WindowList | None
) -> list[tuple[float, int]]:
    """The different lengths of a recording's windows (s), and how many have each."""
    if not entry.windows:
        return []
    if settings.window is not None:
        return [(settings.window, entry.windows)]
    import numpy as np

    assert windows is not None
    planned = [
        planned_duration(duration, entry.duration, settings.max_missing)
        for duration in windows.recordings[entry.id].durations.tolist()
    ]
    durations, counts = np.unique(planned, return_counts=True)
    return list(zip(durations.tolist(), counts.tolist(), strict=True))


# --- what is shown ---------------------------------------------------------------------------------

LISTED = 40
"""Recordings in the table; --json has them all."""


def table(estimate: Estimate, devices: Sequence[Device]) -> list[str]:
    """The plan as lines of text."""
    good = [entry for entry in estimate.inputs if entry.error is None]
    wide = max((len(entry.id) for entry in good[:LISTED]), default=0)
    lines = [
        f"{entry.id:<{wide}}  {entry.windows:>8,} windows  {entry.duration:>10,.1f} s  "
        f"{join_names(entry.channels)}"
        for entry in good[:LISTED]
    ]
    if len(good) > LISTED:
        lines.append(f"and {len(good) - LISTED:,} recordings more (--json lists all)")
    lines += [
        f"would encode {estimate.windows:,} windows ({estimate.channel_windows:,} channel-windows, "
        f"{estimate.tokens:,} tokens) of {len(good):,} recordings in {estimate.units:,} work units",
        f"{_si(estimate.flops)}FLOP; output about {_bytes(estimate.output_bytes)}",
    ]
    if devices and estimate.flops:
        rows = [
            (
                (f"{d.count} x " if d.count > 1 else "") + d.name,
                d.precision,
                _span(d.hours(estimate.flops)),
                f"{d.basis} {d.date}: {d.source}",
            )
            for d in devices
        ]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines.append("time on")
        lines += [
            "  "
            + "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[3]])
            for row in rows
        ]
    return lines


def _si(value: float) -> str:
    """1.07e14 -> '107 T', with the prefix that leaves one to three digits."""
    for prefix, power in (("Z", 21), ("E", 18), ("P", 15), ("T", 12), ("G", 9)):
        if value >= 10**power:
            return f"{value / 10**power:,.3g} {prefix}"
    return f"{value:,.0f} "


def _bytes(value: float) -> str:
    for name, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {name}"
    return f"{value:.0f} bytes"


def _span(hours: tuple[float, float]) -> str:
    """Hours as people say them: '3.2 to 3.6 h', '40 s'."""
    unit, size = "h", 1.0
    if hours[1] < 1:
        unit, size = ("min", 60.0) if hours[1] * 60 >= 1 else ("s", 3600.0)
    low, high = (_digits(value * size) for value in hours)
    return f"{low} {unit}" if low == high else f"{low} to {high} {unit}"


def _digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"
