"""Where measurements are kept: one JSON a run in bench/results, which says what it ran on."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from normwear_fast.benchmarking import machine

RESULTS = Path(__file__).parent / "results"


def slug(name: str) -> str:
    """'nvidia-h100-80gb-hbm3' of a device's name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def dated(label: str) -> str:
    """<device>-<date>-LABEL: the GPU, or the CPU and its threads."""
    facts = machine()
    device = facts["gpu"] or f"{facts['cpu']} {facts['threads']} threads"
    return f"{slug(device)}-{facts['date']}-{label}"


def save(name: str, found: Mapping[str, Any]) -> Path:
    """Writes bench/results/NAME.json: ``machine``, unless found has its own, and what was found."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), **found}, indent=1) + "\n")
    print(f"wrote {path}")
    return path
