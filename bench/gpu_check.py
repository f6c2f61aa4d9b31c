"""One command for what only a GPU can show: `python -m bench.gpu_check [--output FILE]`.

Compiles the CUDA kernels and holds the compiler's report to its limits; with a GPU, runs every kernel
on random ragged inputs against float64, twice, and times it. Writes JSON. Without a GPU it says so and
exits 0 when the compile-time part is in order; a failure anywhere exits 1.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import torch

from bench import cuda_checks
from normwear_fast.benchmarking import machine
from normwear_fast.build import build_info


def compile_part() -> tuple[list[dict[str, Any]], list[str]]:
    """The compiler's report, and what is wrong with it."""
    try:
        report = cuda_checks.compile_report()
    except FileNotFoundError as error:
        print(f"CUDA kernels: not compiled, {error}")
        return [], []
    print(f"{'kernel':52}{'arch':>8}{'registers':>11}{'spills':>8}{'shared':>8}")
    wrong = []
    for kernel in report:
        spills = kernel["spill_stores"] + kernel["spill_loads"] + kernel["stack"]
        print(
            f"{kernel['kernel']:52}{kernel['arch']:>8}{kernel['registers']:>11}{spills:>8}"
            f"{kernel['shared']:>8}"
        )
        if spills:
            wrong.append(f"{kernel['kernel']} spills on {kernel['arch']}")
    return report, wrong


def device_part() -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[str]]:
    """Every check and timing on the GPU, and which failed."""
    results, wrong = [], []
    for name, run in cuda_checks.checks():
        try:
            result: dict[str, Any] = {"name": name, **run()}
            failed = not (result["error"] <= result["bound"] and result["stable"])
        except Exception as error:  # one broken kernel must not hide the others
            result = {"name": name, "raised": f"{type(error).__name__}: {error}"}
            failed = True
        if failed and " cupy " in name and importlib.util.find_spec("cupy") is None:
            result["skipped"], failed = "CuPy is not installed", False
        result["passed"] = not failed
        results.append(result)
        print(f"{'FAILED' if failed else 'ok':8}{result}")
        if failed:
            wrong.append(name)
    timings = cuda_checks.timings() if not wrong else []
    for timing in timings:
        print(timing)
    return results, timings, wrong


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_check", description=__doc__)
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results" / "gpu-check.json"
    )
    output: Path = parser.parse_args(arguments).output
    compiled, wrong = compile_part()
    found: dict[str, Any] = {"machine": machine(), "build": build_info(), "compiled": compiled}
    if not torch.cuda.is_available():
        print("no GPU here: the kernels were not run")
        found["device"] = None
    elif not build_info()["cuda"]:
        print("normwear_fast._C was built without CUDA: the kernels were not run")
        found["device"] = None
        wrong.append("there is a GPU, and the CUDA operators were not built")
    else:
        found["device"] = torch.cuda.get_device_name()
        found["checks"], found["timings"], failed = device_part()
        wrong += failed
    found["wrong"] = wrong
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(found, indent=1) + "\n")
    for line in wrong:
        print(f"wrong: {line}", file=sys.stderr)
    print(f"wrote {output}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
