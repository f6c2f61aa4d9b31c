"""Which block sizes a kernel runs with: a readable table an architecture, and what a device measured.

Every kernel's file holds a :data:`Table`. Without anything else its first choice runs, so that two
machines with the same kind of GPU give the same bits. `tune` times all of them on the device at hand and
keeps the fastest in a JSON file named after device and versions; `pick` takes that one from then on.
`python -m bench.gpu_check --tune` is what calls it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from normwear_fast.files import fits
from normwear_fast.kernels import interpreter

if os.environ.get("TRITON_INTERPRET") == "1":
    interpreter.mend()


@dataclass(frozen=True)
class Choice:
    """How one kernel is launched.

    Args:
        blocks: constants of the kernel by name, such as ``{"BLOCK_M": 128, "BLOCK_N": 64}``.
        num_warps: warps of a program.
        num_stages: of the software pipeline over the loop's loads.
    """

    blocks: Mapping[str, int] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 2

    def launch(self) -> dict[str, Any]:
        """As keyword arguments of a Triton launch."""
        return {**self.blocks, "num_warps": self.num_warps, "num_stages": self.num_stages}


Table = Mapping[int, Sequence[Choice]]
"""Compute capability (80, 90, 100) to choices, the default first. A capability between two entries
takes the lower one; ``pick`` says how the interpreter is served."""


def capability(device: torch.device) -> int:
    """10 times the compute capability; the oldest supported one where there is no GPU."""
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@lru_cache(maxsize=16)
def multiprocessors(device: torch.device) -> int:
    """Of the device; a few where tests stand in for one."""
    if device.type != "cuda":
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count


def choices(table: Table, architecture: int) -> Sequence[Choice]:
    """The table's row for an architecture."""
    known = [key for key in sorted(table) if key <= architecture]
    return table[known[-1] if known else min(table)]


def cache_path(device: torch.device) -> Path:
    """Where a device's measured choices lie: one file for each device name and version."""
    import triton

    from normwear_fast import __version__

    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    name = torch.cuda.get_device_name(device).replace(" ", "-").replace("/", "-").lower()
    return (
        Path(root)
        / "normwear_fast"
        / f"kernels-{name}-{__version__}-triton-{triton.__version__}.json"
    )


@lru_cache(maxsize=8)
def _measured(path: Path) -> dict[str, dict[str, Any]]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if fits(found, {str: {"choice": dict, "seconds": float}}) else {}


@lru_cache(maxsize=64)
def _device_path(device: torch.device) -> Path:
    return cache_path(device)


def pick(operator: str, case: str, table: Table, device: torch.device) -> Choice:
    """The choice for a case of an operator on a device: measured there, or the table's first.

    Args:
        operator: the kernel's name.
        case: what the best choice depends on, such as a dtype; part of the kept file's key.
        table: the operator's choices.
        device: where it will run; on a CPU (Triton's interpreter) the first choice of the oldest row.
    """
    known = choices(table, capability(device))
    if device.type != "cuda":
        return known[0]
    kept = _measured(_device_path(device)).get(f"{operator} {case}", {}).get("choice")
    # Not asdict, which copies: 30 us an operator, a quarter of the host's time for a single window.
    return next((choice for choice in known if vars(choice) == kept), known[0])


def tune(
    operator: str,
    case: str,
    table: Table,
    device: torch.device,
    seconds: Callable[[Choice], float],
) -> dict[str, float]:
    """Times every choice on the device and keeps the fastest.

    Args:
        seconds: runs the kernel with a choice and returns its time.

    Returns:
        Seconds by the choice's text; a choice the device refuses is left out.
    """
    found: dict[str, float] = {}
    best: tuple[float, Choice] | None = None
    for choice in choices(table, capability(device)):
        try:
            taken = seconds(choice)
        except Exception as error:  # too much shared memory for this device, for example
            found[f"{choice} refused: {type(error).__name__}"] = float("inf")
            continue
        found[str(choice)] = taken
        if best is None or taken < best[0]:
            best = (taken, choice)
    if best is not None:
        path = cache_path(device)
        kept = dict(_measured(path))
        kept[f"{operator} {case}"] = {"choice": asdict(best[1]), "seconds": best[0]}
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        partial.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")
        partial.replace(path)
        _measured.cache_clear()
    return found


def measured_choices(device: torch.device) -> dict[str, Any]:
    """What is kept for a device, for an output's provenance: empty where the tables' first run."""
    if device.type != "cuda":
        return {}
    kept = _measured(_device_path(device))
    return {name: entry["choice"] for name, entry in sorted(kept.items())}
