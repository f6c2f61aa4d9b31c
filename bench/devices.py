"""Puts what the benchmarks measured into `plan`'s table of devices: `python -m bench.devices`.

Of every result file with a table of rows, the rows "FastNormWear PRECISION" and, of `bench.gpu_check`,
"encode PRECISION" (windows of 6 s), and of `bench.encode_overhead` the encode command's own rate
become devices that are *measured*: from the lowest to the highest rate found for a name and precision,
with the newest date and the files. They take the place of modelled ones of their name; the other modelled
ones in normwear_fast/devices.json stay.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.saving import RESULTS, slug
from normwear_fast.benchmarking import channel_flops
from normwear_fast.config import NormWearConfig

DEVICES = Path(__file__).parent.parent / "normwear_fast" / "devices.json"


def device_name(machine: dict[str, Any]) -> str:
    """H100 for 'NVIDIA H100 80GB HBM3'; cpu-amx-2 for two threads with the tile unit."""
    gpu = machine.get("gpu")
    if gpu:
        found = re.search(r"\b([ABHLVT]\d{1,3}S?|GH200|GB200|RTX ?\w+)\b", gpu)
        return found[1] if found else slug(gpu)
    # Files from before machine() named the instruction set have torch's word for the processor.
    instructions = machine.get("instruction_set") or str(machine["capability"]).lower()
    return f"cpu-{instructions}-{machine['threads']}"


def measured(path: Path) -> Iterator[dict[str, Any]]:
    """The devices of one result file."""
    result = json.loads(path.read_text())
    machine = result.get("machine") if isinstance(result, dict) else None
    if not isinstance(machine, dict) or "capability" not in machine:
        return
    config = NormWearConfig.base()
    rates: dict[str, list[float]] = {}
    for name, row in result.get("rows", {}).items():
        match = re.fullmatch(r"(?:FastNormWear|encode) (\w+)", name)
        if match and row.get("channel_windows_per_s"):
            rates[match[1]] = [row["channel_windows_per_s"]] * 2
    overhead = result.get("overhead")
    if overhead and overhead["model"] == "base":
        pair = (
            overhead["command_channel_windows_per_s"],
            overhead["bare_channel_windows_per_s"],
        )
        rates[overhead["precision"]] = sorted(pair)
    for precision, pair in rates.items():
        yield {
            "name": device_name(machine),
            "precision": precision,
            "basis": "measured",
            "flops_per_s": [round(rate * channel_flops(config, 390, 3)) for rate in pair],
            "date": machine["date"],
            "source": path.stem,
        }


def joined(devices: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One device of several measurements of it."""
    rates = [rate for device in devices for rate in device["flops_per_s"]]
    return devices[0] | {
        "flops_per_s": [min(rates), max(rates)],
        "date": max(device["date"] for device in devices),
        "source": "bench/results: " + ", ".join(device["source"] for device in devices),
    }


def main() -> int:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    table = json.loads(DEVICES.read_text())
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for path in sorted(RESULTS.glob("*.json")):
        for device in measured(path):
            found.setdefault((device["name"], device["precision"]), []).append(device)
            print(f"{device['name']}, {device['precision']}: measured, {path.name}")
    entries = {(d["name"], d["precision"]): d for d in table["devices"] if d["basis"] == "modelled"}
    entries |= {key: joined(devices) for key, devices in found.items()}
    table["devices"] = sorted(entries.values(), key=lambda d: (d["name"], d["precision"]))
    DEVICES.write_text(json.dumps(table, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
