"""What the encode command adds to the bare encoder on the same windows, interleaved.

    python -m bench.encode_overhead                                # base model, C=3, this machine
    python -m bench.encode_overhead --save encode-overhead         # also writes bench/results/NAME.json
    python -m bench.encode_overhead --unit-windows 4 --rounds 3    # three minutes on two cores
    python -m bench.encode_overhead --model-size small --units 8   # a trial

A WFDB recording of three channels at 360 Hz is encoded by `encode_recordings` (survey, reading,
preparing, device, pooled rows, Parquet with its syncs), and the very windows it prepares are given, in
the same work units, to `FastNormWear.encode_unit` alone. Rounds alternate, forward and backward, in one
process and on one model, so loading weights is in neither.

*steady*: from the start of the first unit's encoding to the start of the last's, against the bare time
of the units between: what a long run pays, its preparing beside the encoder included. *whole*: the
run's wall clock against all of the bare time; it has the one-time costs too, which a short run feels.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.pipeline_rate import RATE, write_wfdb
from bench.saving import save
from normwear_fast import FastNormWear, NormWearConfig
from normwear_fast.encode.pipeline import default_tokens, encode_recordings
from normwear_fast.encode.settings import EncodeSettings

CHANNELS, WINDOW = 3, 6.0
WINDOW_TOKENS = CHANNELS * 560


class Watched:
    """A model whose `encode_unit` calls are kept: what they were given, when they began and ended."""

    def __init__(self, model: FastNormWear) -> None:
        self._model = model
        self.calls: list[tuple[list[np.ndarray], dict[str, Any], float, float]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def encode_unit(self, windows: list[np.ndarray], **options: Any) -> list[np.ndarray]:
        kept = list(windows)
        began = time.perf_counter()
        result = self._model.encode_unit(windows, **options)
        self.calls.append((kept, options, began, time.perf_counter()))
        return result


def command(
    path: Path, output: Path, settings: EncodeSettings, model: Watched, workers: int
) -> float:
    """Wall seconds of one run into a new folder."""
    model.calls.clear()
    began = time.perf_counter()
    summary = encode_recordings([path], output, settings, lambda threads: [model], workers=workers)
    seconds = time.perf_counter() - began
    assert summary.tally.ok == summary.windows, summary
    return seconds


def bare(model: Watched, units: list[tuple[list[np.ndarray], dict[str, Any]]]) -> list[float]:
    """Seconds of each unit."""
    seconds = []
    for windows, options in units:
        began = time.perf_counter()
        model._model.encode_unit(windows, **options)
        seconds.append(time.perf_counter() - began)
    return seconds


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    config = NormWearConfig.small() if args.model_size == "small" else NormWearConfig.base()
    fast = FastNormWear(True, config=config, precision=args.precision, seed=0)
    model = Watched(fast.to(args.device).freeze())
    unit_tokens = None if args.unit_windows is None else args.unit_windows * WINDOW_TOKENS
    settings = EncodeSettings(window=WINDOW, precision=args.precision, unit_tokens=unit_tokens)
    planned = default_tokens(settings, args.device)
    assert planned.unit_tokens is not None
    windows = args.units * max(1, planned.unit_tokens // WINDOW_TOKENS)
    path = write_wfdb(folder, "recording", CHANNELS, "212", windows * WINDOW / 60)

    warm = command(path, folder / "warm", settings, model, args.workers)
    units = [(windows, options) for windows, options, _, _ in model.calls]
    assert len(units) > 2, "three units at least are needed for a steady state"
    print(f"{len(units)} units, {warm:.1f} s a run at first", flush=True)
    steady, whole, bare_seconds, command_seconds = [], [], [], []
    for i in range(args.rounds):

        def run_command(i: int = i) -> tuple[float, float]:
            seconds = command(path, folder / f"out{i}", settings, model, args.workers)
            began = [call[2] for call in model.calls]
            return seconds, began[-1] - began[0]

        if i % 2:
            alone = bare(model, units)
            seconds, between = run_command()
        else:
            seconds, between = run_command()
            alone = bare(model, units)
        steady.append(between / sum(alone[:-1]) - 1)
        whole.append(seconds / sum(alone) - 1)
        bare_seconds.append(sum(alone))
        command_seconds.append(seconds)
        print(f"round {i}: steady {steady[-1]:+.2%}, whole {whole[-1]:+.2%}", flush=True)
    channel_windows = sum(len(window) for windows, _ in units for window in windows)
    return {
        "model": args.model_size,
        "precision": fast.resolved_precision,
        "channels": CHANNELS,
        "sampling_rate_hz": RATE,
        "windows": channel_windows // CHANNELS,
        "units": len(units),
        "workers": args.workers,
        "rounds": args.rounds,
        "steady_overhead": {"median": statistics.median(steady), "rounds": steady},
        "whole_overhead": {"median": statistics.median(whole), "rounds": whole},
        "bare_channel_windows_per_s": channel_windows / statistics.median(bare_seconds),
        "command_channel_windows_per_s": channel_windows / statistics.median(command_seconds),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--units", type=int, default=4, help="work units a run")
    parser.add_argument("--unit-windows", type=int, help="of a unit (default: encode's own)")
    parser.add_argument("--workers", type=int, default=0, help="reader processes")
    parser.add_argument("--model-size", choices=("base", "small"), default="base")
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's)")
    parser.add_argument("--save", metavar="NAME", help="write bench/results/NAME.json")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        row = measure(args, Path(folder))
    print(json.dumps(row, indent=1))
    if args.save:
        save(args.save, {"overhead": row})
    return 0


if __name__ == "__main__":
    sys.exit(main())
