"""What a run is and what came of it: the content of manifest.json, and how two runs differ."""

from __future__ import annotations

import datetime
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from normwear_fast import __version__
from normwear_fast.encode.output import MANIFEST_FORMAT, SCHEMA_VERSION
from normwear_fast.encode.settings import REUSED, EncodeSettings
from normwear_fast.encode.survey import Surveyed, windows_of
from normwear_fast.encode.windows import WindowList
from normwear_fast.errors import OutputError, RecordingError

STAGES = ("read", "prepare", "encode", "write", "wall")

SHOWN = 6
"""Differences named in an error; the rest are counted."""


@dataclass
class Tally:
    """What some work units came to; sums over parts.

    Args:
        ok: windows with an embedding.
        skipped: windows without one, by status.
        flat: embedded windows that hold a channel without variation.
        lacking: windows skipped for missing data in which a channel lacked too much, by its name.
        failed: recordings that could not be read, and why.
        statistics: (mean, standard deviation) of each channel of recordings normalized as a whole.
        seconds: spent, by stage.
    """

    ok: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    flat: int = 0
    lacking: Counter[str] = field(default_factory=Counter)
    failed: dict[str, str] = field(default_factory=dict)
    statistics: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))

    def skip(self, status: str, count: int = 1) -> None:
        self.skipped[status] = self.skipped.get(status, 0) + count

    def add(self, other: Tally) -> None:
        self.ok += other.ok
        for status, count in other.skipped.items():
            self.skip(status, count)
        self.flat += other.flat
        self.lacking += other.lacking
        self.failed |= other.failed
        self.statistics |= other.statistics
        for stage in STAGES:
            self.seconds[stage] += other.seconds[stage]

    def to_dict(self) -> dict[str, Any]:
        return {
            "ok": self.ok,
            "skipped": self.skipped,
            "flat": self.flat,
            "lacking": self.lacking,
            "failed": self.failed,
            "statistics": _finite(self.statistics),
            "seconds": {stage: round(self.seconds[stage], 3) for stage in STAGES},
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Tally:
        return cls(
            ok=values["ok"],
            skipped=dict(values["skipped"]),
            flat=values["flat"],
            lacking=Counter(values["lacking"]),
            failed=dict(values["failed"]),
            statistics=dict(values["statistics"]),
            seconds=dict.fromkeys(STAGES, 0.0) | values["seconds"],
        )


def _finite(statistics: Mapping[str, Any]) -> dict[str, Any]:
    """With null for what JSON has no number for; a channel of such values is skipped throughout."""
    return {
        recording: [
            [v if v is not None and math.isfinite(v) else None for v in pair] for pair in pairs
        ]
        for recording, pairs in statistics.items()
    }


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def build_manifest(
    *,
    run: str,
    state: str,
    started: str,
    settings: EncodeSettings,
    model: Mapping[str, Any],
    inputs: Sequence[Surveyed],
    units: int,
    done: int,
    tally: Tally,
) -> dict[str, Any]:
    """The content of manifest.json; ``state`` is running, interrupted or complete."""
    failed = {entry.id: entry.error for entry in inputs if entry.error is not None} | tally.failed
    return {
        "format": MANIFEST_FORMAT,
        "schema": SCHEMA_VERSION,
        "version": __version__,
        "run": run,
        "state": state,
        "started": started,
        "updated": now(),
        "settings": settings.to_dict(),
        "model": dict(model),
        "counts": {
            "recordings": len(inputs),
            "recordings_failed": len(failed),
            "windows": sum(entry.windows for entry in inputs),
            "ok": tally.ok,
            "skipped": tally.skipped,
            "flat": tally.flat,
            "units": units,
            "units_done": done,
        },
        "seconds": {stage: round(tally.seconds[stage], 3) for stage in STAGES},
        "failed": failed,
        "statistics": _finite(tally.statistics),
        "inputs": [entry.to_dict() for entry in inputs],
    }


def check_same_settings(manifest: Mapping[str, Any], settings: EncodeSettings, where: str) -> None:
    """Refuses to go on with a run of other settings or another version of this program."""
    before = {k: v for k, v in manifest["settings"].items() if k not in REUSED}
    now = {k: v for k, v in settings.to_dict().items() if k not in REUSED}
    before |= {"version": manifest["version"], "schema": manifest["schema"]}
    now |= {"version": __version__, "schema": SCHEMA_VERSION}
    _refuse(_differences(before, now), where)


def check_same_model(manifest: Mapping[str, Any], model: Mapping[str, Any], where: str) -> None:
    """Refuses to go on with other weights, or on hardware or a library that rounds differently."""
    _refuse(_differences(_comparable(manifest["model"]), _comparable(model)), where)


def _comparable(model: Mapping[str, Any]) -> dict[str, Any]:
    compared = {name: value for name, value in model.items() if name != "threads"}
    if "sha256" in model["weights"]:  # the same weights may have moved
        compared["weights"] = {"sha256": model["weights"]["sha256"]}
    return compared


def check_same_inputs(
    manifest: Mapping[str, Any], states: Mapping[str, tuple[int, int]], where: str
) -> None:
    """Refuses to go on with other recordings.

    Args:
        states: (size, mtime_ns) of each recording by its id.
    """
    before = {e["recording"]: (e["size"], e["mtime_ns"]) for e in manifest["inputs"]}
    differences = []
    for recording in sorted(before.keys() | states.keys()):
        if recording not in states:
            differences.append(f"recording {recording} is gone")
        elif recording not in before:
            differences.append(f"recording {recording} is new")
        elif before[recording] != states[recording]:
            (size, _), (new_size, _) = before[recording], states[recording]
            detail = f" ({size} bytes, now {new_size})" if size != new_size else ""
            differences.append(f"recording {recording} was changed{detail}")
    _refuse(differences, where)


def inputs_before(
    manifest: Mapping[str, Any],
    settings: EncodeSettings,
    windows: WindowList | None,
    where: str,
) -> list[Surveyed]:
    """What the session that wrote a manifest found in its recordings, which are known to be the same.

    Raises:
        OutputError: the manifest contradicts itself: it is damaged.
    """
    entries = [Surveyed.from_dict(values) for values in manifest["inputs"]]
    seen: set[str] = set()
    for entry in entries:
        count = 0
        if entry.error is None:
            try:
                count = len(windows_of(entry.id, entry.duration, settings, windows))
            except RecordingError:
                count = -1
        if entry.windows != count or entry.id in seen:
            raise OutputError(
                f"{where}: its manifest is damaged: recording {entry.id} cannot have "
                f"{entry.windows} windows; choose a new folder, or start anew with --overwrite"
            )
        seen.add(entry.id)
    return entries


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    found = []
    for name in [*before, *(name for name in now if name not in before)]:
        old, new = before.get(name), now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += _differences(old, new, f"{prefix}{name}.")
        elif old != new:
            found.append(f"{prefix}{name} was {_shown(old)}, now {_shown(new)}")
    return found


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value))
    text = str(value)
    return text[:12] + "..." if len(text) == 64 else text  # a digest


def _refuse(differences: Iterable[str], where: str) -> None:
    listed = list(differences)
    if listed:
        more = f" and {len(listed) - SHOWN} more" if len(listed) > SHOWN else ""
        raise OutputError(
            f"output {where} holds a run that differs: {'; '.join(listed[:SHOWN])}{more}. Choose a new "
            "folder, or start anew with --overwrite"
        )
