"""One command for what only a GPU can show: `python -m bench.gpu_check [--tune] [--quick]`.

First what is right: every operator of every backend on fresh random inputs against float64, twice, into
poisoned outputs; the reference numbers in each precision; the same bits again and again, with graphs and
without. Then what is fast: the ceilings of this device, every kernel, a layer stack, `encode` from host
memory and its baselines, against what the project set out to reach.

Each section runs in a process of its own with a time limit, so that a kernel that hangs or corrupts its
context hides nothing else, and the report is written after each. Without a GPU it compiles everything,
holds that to its limits, says that nothing was run, and exits 0; a failure anywhere exits 1.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, as_completed, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench import cuda_checks
from bench.saving import RESULTS, slug
from normwear_fast.benchmarking import channel_flops, machine
from normwear_fast.build import build_info
from normwear_fast.config import NormWearConfig

ROOT = Path(__file__).resolve().parent.parent

Found = dict[str, Any]
Record = Callable[[str, Any], None]
"""Adds a step's result to a section's part of the report, which is written at once."""

TARGETS = (80, 90, 100)


# --- without a GPU ----------------------------------------------------------------------------------


def compile_part() -> tuple[list[Found], list[str]]:
    """nvcc's report on csrc/cuda, and what is wrong with it."""
    try:
        report = cuda_checks.compile_report()
    except FileNotFoundError as error:
        print(f"CUDA kernels: not compiled, {error}")
        return [], []
    except subprocess.CalledProcessError as error:
        said = str(error.stderr or error).strip().splitlines()
        return [], [f"csrc/cuda: {said[-1]}"]
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


def triton_part() -> tuple[list[Found], list[str]]:
    """`bench.kernel_report`, in a process where Triton compiles, and what is wrong with it."""
    if importlib.util.find_spec("triton") is None:
        print("Triton's kernels: not compiled, Triton is not installed")
        return [], []
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "report.json"
        command = [sys.executable, "-m", "bench.kernel_report", "--json", str(output)]
        run = subprocess.run(
            [*command, "--targets", *map(str, TARGETS)],
            env=environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        print(run.stdout, end="")
        if not output.exists():
            return [], [
                f"bench.kernel_report: {(run.stderr.strip() or 'no report').splitlines()[-1]}"
            ]
        found = json.loads(output.read_text())
    return found["kernels"], found["wrong"]


# --- sections, each in a process of its own ---------------------------------------------------------


@dataclass(frozen=True)
class Section:
    """Steps that share a process.

    Args:
        run: takes what records a step, and a `bench.encoder_gpu.Bench`.
        limit: seconds before it is ended.
        alone: whether it times something and must have the device to itself.
    """

    run: Callable[[Record, Any], None]
    limit: int
    alone: bool = False


def checked(record: Record, checks: list[tuple[str, cuda_checks.Check]]) -> None:
    """Every check's outcome; one that raises does not hide the others."""
    results: list[Found] = []
    for name, run in checks:
        try:
            result: Found = {"name": name, **run()}
            result["passed"] = bool(result["error"] <= result["bound"] and result["stable"])
        except Exception as error:
            traceback.print_exc()
            result = {"name": name, "raised": f"{type(error).__name__}: {error}", "passed": False}
            if " cupy " in name and importlib.util.find_spec("cupy") is None:
                result |= {"skipped": "CuPy is not installed", "passed": True}
        results.append(result)
        record("checks", results)


def guarded(record: Record, bench: Any, steps: Mapping[str, Callable[[Any], Any]]) -> None:
    """Every step's result; one that raises does not hide the others."""
    for name, step in steps.items():
        start = time.perf_counter()
        try:
            record(name, step(bench))
        except Exception as error:
            traceback.print_exc()
            record(f"{name} raised", f"{type(error).__name__}: {error}")
        record("seconds", {name: round(time.perf_counter() - start, 2)})


def _native(record: Record, bench: Any) -> None:
    from bench import native_checks

    checked(record, native_checks.checks())
    record("not run", native_checks.not_run())


def _cuda(record: Record, bench: Any) -> None:
    if not build_info()["cuda"]:
        record("built raised", "normwear_fast._C was built without CUDA")
        return
    checked(record, cuda_checks.checks())


def _cuda_timings(record: Record, bench: Any) -> None:
    if build_info()["cuda"]:
        guarded(record, bench, {"timings": lambda _: cuda_checks.timings()})


def _operator(name: str) -> Callable[[Record, Any], None]:
    def run(record: Record, bench: Any) -> None:
        from bench.kernel_report import operators

        checked(record, operators([name])[name].checks(device=bench.device))

    return run


def _kernel_timings(bench: Any) -> list[Found]:
    """Every kernel at the judged shape; a module that raises does not hide the others."""
    from bench.kernel_report import operators

    found: list[Found] = []
    for name, module in operators().items():
        try:
            found += module.timings(device=bench.device)
        except Exception as error:
            traceback.print_exc()
            found.append({"name": name, "raised": f"{type(error).__name__}: {error}"})
    return found


def _right(record: Record, bench: Any) -> None:
    from bench import encoder_gpu as encoder

    steps = (encoder.goldens, encoder.graphs, encoder.repetition)
    guarded(record, bench, {step.__name__: step for step in steps})


def _fast(record: Record, bench: Any) -> None:
    from bench import encoder_gpu as encoder

    steps: dict[str, Callable[[Any], Any]] = {
        "ceilings": encoder.ceilings,
        "encode": encoder.encode,
        "stack": encoder.stack,
        "latency": encoder.latency,
        "ragged": encoder.ragged,
        "kernels": _kernel_timings,
    }
    guarded(record, bench, steps)


def _memory(record: Record, bench: Any) -> None:
    from bench import encoder_gpu as encoder

    guarded(record, bench, {"memory": encoder.memory})


def _tune(record: Record, bench: Any) -> None:
    from bench import encoder_gpu as encoder

    guarded(record, bench, {"tune": encoder.tune})


def _baselines(record: Record, bench: Any) -> None:
    from bench import encoder_gpu as encoder

    steps = (encoder.one_at_a_time, encoder.compiled_reference)
    guarded(record, bench, {step.__name__: step for step in steps})


def sections() -> dict[str, Section]:
    """Those not alone run side by side, those with most time first; others follow in this order."""
    files = sorted((ROOT / "bench" / "kernels").glob("*.py"))
    operators = [p.stem for p in files if "def checks(" in p.read_text()]
    return {
        **{name: Section(_operator(name), 180) for name in operators},
        "native": Section(_native, 180),
        "cuda": Section(_cuda, 240),
        "tune": Section(_tune, 240, alone=True),
        "right": Section(_right, 240),
        "fast": Section(_fast, 240, alone=True),
        "cuda timings": Section(_cuda_timings, 60, alone=True),
        "memory": Section(_memory, 60, alone=True),
        "baselines": Section(_baselines, 360, alone=True),
    }


def work(name: str, output: Path, bench: Any) -> None:
    """Runs one section here and writes its part of the report as it grows."""
    found: Found = {}

    def record(step: str, result: Any) -> None:
        found[step] = found.get(step, {}) | result if step == "seconds" else result
        partial = output.with_suffix(".partial")
        partial.write_text(json.dumps(found))
        partial.replace(output)

    sections()[name].run(record, bench)


def in_a_process(name: str, limit: int, options: list[str]) -> tuple[Found, str | None]:
    """A section's part of the report from a process of its own, and why it ended early, if it did."""
    with tempfile.TemporaryDirectory() as folder:
        part = Path(folder) / "part.json"
        command = [
            sys.executable,
            "-m",
            "bench.gpu_check",
            "--section",
            name,
            "--output",
            str(part),
        ]
        ended = None
        # A file and not a pipe: compilers that outlive their process would hold a pipe open. A group
        # of its own, so that they end with it.
        errors = Path(folder) / "errors.txt"
        with errors.open("wb") as log:
            process = subprocess.Popen(
                [*command, *options],
                cwd=ROOT,
                stdout=subprocess.DEVNULL,
                stderr=log,
                process_group=0,
            )
            try:
                process.wait(limit)
            except subprocess.TimeoutExpired:
                ended = f"{name} took more than {limit} s and was ended"
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        said = errors.read_text(errors="replace")[-KEPT_ERRORS:].strip()
        if process.returncode and ended is None:
            last = (said or f"exit {process.returncode}").splitlines()[-1]
            ended = f"{name} ended early: {last}"
        found: Found = json.loads(part.read_text()) if part.exists() else {}
        if said and (ended or any(failures(name, found))):
            found["stderr"] = said
        return found, ended


KEPT_ERRORS = 20_000
"""Characters of what a section printed on standard error that its part of the report keeps."""


def failures(name: str, part: Found) -> Iterator[str]:
    """One line for each check that did not pass and each step that raised."""
    for step, result in part.items():
        if step.endswith(" raised"):
            yield f"{name}: {step}: {result}"
        for row in result if isinstance(result, list) else []:
            if isinstance(row, dict) and not row.get("passed", "raised" not in row):
                yield f"{name}: {row}"
        for key, value in result.items() if isinstance(result, dict) else []:
            if isinstance(value, dict) and "raised" in value:
                yield f"{name}: {step} {key} raised: {value['raised']}"


# --- what was to be reached -------------------------------------------------------------------------


@dataclass(frozen=True)
class Goal:
    """A number of the report and the bound it is held to.

    Args:
        name: what it is.
        value: from the sections' parts; a KeyError where it was not measured.
        bound: the least, or where ``most`` the largest, that passes.
        most: whether smaller is better.
    """

    name: str
    value: Callable[[Found], float]
    bound: float
    most: bool = False


def _of_ceiling(parts: Found) -> float:
    flops = channel_flops(NormWearConfig(), 390, 4)
    rate = parts["fast"]["encode"]["bfloat16"]["channel_windows_per_s"]
    return float(rate * flops / parts["fast"]["ceilings"]["bfloat16"]["ceiling"])


def _fp8_gain(parts: Found) -> float:
    rates = {k: v["channel_windows_per_s"] for k, v in parts["fast"]["encode"].items()}
    return float(rates["fp8"] / rates["bfloat16"])


def _over_sdpa(case: str) -> Callable[[Found], float]:
    def value(parts: Found) -> float:
        for row in parts["fast"]["kernels"]:
            if row["name"] == f"channel_attention {case} torch.bfloat16":
                return float(row["over_flash_attention"])
        raise KeyError(case)

    return value


GOALS = (
    Goal("bfloat16 encode, of the GEMM ceiling", _of_ceiling, 0.58),
    Goal(
        "bfloat16 over the compiled reference",
        lambda p: p["baselines"]["compiled_reference"]["ratio"],
        1.3,
    ),
    Goal(
        "bfloat16 over one window at a time", lambda p: p["baselines"]["one_at_a_time"]["ratio"], 50
    ),
    Goal(
        "bfloat16 mean token cosine",
        lambda p: p["fast"]["encode"]["bfloat16"]["mean_cosine"],
        0.999,
    ),
    Goal(
        "bfloat16 worst cosine of a full micro-batch",
        lambda p: p["fast"]["encode"]["bfloat16"]["full_batch_worst_cosine"],
        0.995,
    ),
    Goal("fp8 over bfloat16", _fp8_gain, 1.25),
    Goal("fp8 mean token cosine", lambda p: p["fast"]["encode"]["fp8"]["mean_cosine"], 0.998),
    Goal(
        "fp8 worst cosine of a full micro-batch",
        lambda p: p["fast"]["encode"]["fp8"]["full_batch_worst_cosine"],
        0.995,
    ),
    Goal(
        "share of tokenize, norms, activation",
        lambda p: p["fast"]["stack"]["bfloat16"]["light_share"],
        0.25,
        most=True,
    ),
    Goal("attention over SDPA's flash kernel", _over_sdpa("equal"), 1.0),
    Goal("attention over padded SDPA, 1:6 mix", _over_sdpa("mix 1:6"), 1.5),
    Goal(
        "latency of three channels, ms",
        lambda p: 1e3 * p["fast"]["latency"]["bfloat16"]["median_s"],
        2.0,
        most=True,
    ),
    Goal("ragged over equal token rate", lambda p: p["fast"]["ragged"]["ratio"], 0.9),
    Goal(
        "peak memory over weights and buffers",
        lambda p: p["memory"]["memory"]["over_budget"],
        1.25,
        most=True,
    ),
    Goal(
        "peak memory of three times the windows",
        lambda p: p["memory"]["memory"]["growth"],
        1.02,
        most=True,
    ),
)
"""Of an H100, and apart from it of an H200."""


def judged(parts: Found) -> list[Found]:
    """Every goal with its value and whether it is reached; None where it was not measured."""
    found = []
    for goal in GOALS:
        try:
            value: float | None = float(goal.value(parts))
        except (KeyError, TypeError):
            value = None
        reached = (
            None if value is None else (value <= goal.bound if goal.most else value >= goal.bound)
        )
        bound = f"{'<=' if goal.most else '>='} {goal.bound:g}"
        found.append({"name": goal.name, "value": value, "bound": bound, "reached": reached})
    return found


def rows_of(parts: Found) -> dict[str, Found]:
    """Rates by engine, as `bench.chart` draws them; ratios to the compiled reference.

    A ratio is of rates taken in turn, or a product of such: precisions beside bfloat16, bfloat16 beside
    the reference.
    """
    baselines = parts.get("baselines", {})
    encode = {
        precision: found["channel_windows_per_s"]
        for precision, found in parts.get("fast", {}).get("encode", {}).items()
        if "raised" not in found
    }
    found = {f"encode {name}": {"channel_windows_per_s": rate} for name, rate in encode.items()}
    for name, text in BASELINES.items():
        if name in baselines:
            rate = baselines[name]["channel_windows_per_s"]
            found[text] = {"channel_windows_per_s": rate}
    if "compiled_reference" in baselines and "bfloat16" in encode:
        over = baselines["compiled_reference"]["ratio"]
        for name, rate in encode.items():
            found[f"encode {name}"]["ratio"] = over * rate / encode["bfloat16"]
        found[BASELINES["compiled_reference"]]["ratio"] = 1.0
        if "one_at_a_time" in baselines:
            found[BASELINES["one_at_a_time"]]["ratio"] = over / baselines["one_at_a_time"]["ratio"]
    return found


BASELINES = {
    "compiled_reference": "reference, bfloat16, max-autotune",
    "one_at_a_time": "one window at a time",
}


def print_report(parts: Found, goals: list[Found]) -> None:
    """Ceilings, kernels, shares and goals as aligned text."""
    fast = parts.get("fast", {})
    for name, found in fast.get("ceilings", {}).items():
        if isinstance(found, dict) and "raised" in found:
            continue
        if isinstance(found, dict):
            rates = ", ".join(f"{k} {v / 1e12:.0f}" for k, v in found["flops_per_s"].items())
            best, kept = found["ceiling"] / 1e12, found["sustained"] / 1e12
            print(f"ceiling {name:12}{best:8.0f} TFLOP/s, sustained {kept:.0f}  ({rates})")
        else:
            print(f"ceiling copy        {found / 1e12:8.2f} TB/s")
    for row in fast.get("kernels", []):
        facts = {k: v for k, v in row.items() if k not in ("name", "seconds", "bytes", "flops")}
        text = ", ".join(
            f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in facts.items()
        )
        print(f"{row['name']:60}{1e6 * row.get('seconds', float('nan')):10.1f} us  {text}")
    for precision, found in fast.get("stack", {}).items():
        if "raised" in found:
            continue
        shares = ", ".join(f"{k} {v:.1%}" for k, v in found["shares"].items())
        print(f"stack {precision}: {1e3 * found['seconds']:.2f} ms; {shares}")
    for name, row in rows_of(parts).items():
        ratio = f"{row['ratio']:8.2f}x" if "ratio" in row else ""
        print(f"{name:40}{row['channel_windows_per_s']:10.1f} channel-windows/s{ratio}")
    power = parts.get("baselines", {}).get("compiled_reference", {}).get("power", {})
    for name, drawn in power.items():
        if drawn and "raised" not in drawn:
            print(f"{name:40}" + ", ".join(f"{key} {value:.0f}" for key, value in drawn.items()))
    for goal in goals:
        state = {True: "reached", False: "MISSED", None: "not measured"}[goal["reached"]]
        value = "" if goal["value"] is None else f"{goal['value']:.4g}"
        print(f"{goal['name']:44}{value:>10} {goal['bound']:>9}  {state}")


# --- the command ------------------------------------------------------------------------------------


def build() -> list[str]:
    """Builds the native extension where it is missing or stale; what is wrong with that."""
    check = [sys.executable, "-c", "from normwear_fast.build import check_build; check_build()"]
    if subprocess.run(check, cwd=ROOT, capture_output=True).returncode == 0:
        return []
    print("building normwear_fast._C", flush=True)
    install = "-m pip install --quiet --no-build-isolation --no-deps --editable ."
    run = subprocess.run(
        [sys.executable, *install.split()], cwd=ROOT, capture_output=True, text=True
    )
    if run.returncode:
        return [f"the build failed: {(run.stderr.strip() or run.stdout).splitlines()[-1]}"]
    return []


def default_output(device: str | None, date: str) -> Path:
    """bench/results/<device>-<date>.json; under build/ where nothing was run."""
    if device is None:
        return ROOT / "build" / "gpu-check.json"
    return RESULTS / f"{slug(device)}-{date}.json"


def check_device(
    found: Found,
    output: Path,
    options: list[str],
    *,
    tune: bool,
    compilers: Iterable[Future[Any]] = (),
) -> list[str]:
    """Runs every section, adding to ``found`` and to the file as each ends; returns what is wrong.

    What is timed waits for ``compilers``, which take every core.
    """
    wrong: list[str] = []
    parts: Found = found.setdefault("sections", {})

    def keep(name: str, part: Found, ended: str | None) -> None:
        parts[name] = part
        lines = [*failures(name, part), *([ended] if ended else [])]
        wrong.extend(lines)
        checks = [r for v in part.values() if isinstance(v, list) for r in v if "passed" in r]
        passed = f"{sum(r['passed'] for r in checks)} of {len(checks)} checks passed, "
        seconds = time.perf_counter() - started
        print(f"{name}: {passed if checks else ''}{len(lines)} wrong, {seconds:.0f} s", flush=True)
        for line in [*lines, *part.get("stderr", "").splitlines()[-20:]]:
            print(f"    {line}", flush=True)
        found["goals"], found["wrong"] = judged(parts), wrong
        found["rows"] = rows_of(parts)
        write(found, output)

    started = time.perf_counter()
    every = sections()
    # What is right is not timed and may share the device; four processes keep its compilers busy. The
    # encoder with choices just tuned comes after them, and alone.
    beside = [name for name, s in every.items() if not s.alone and not (tune and name == "right")]
    beside.sort(key=lambda name: -every[name].limit)
    with ThreadPoolExecutor(4) as pool:
        running = {
            pool.submit(in_a_process, name, every[name].limit, options): name for name in beside
        }
        for done in as_completed(running):
            keep(running[done], *done.result())
    wait(compilers, timeout=120)  # a report on the compiler must not cost the timings
    for name, section in every.items():
        if name not in beside and (tune or name != "tune"):
            keep(name, *in_a_process(name, section.limit, options))
    print_report(parts, found["goals"])
    return wrong


def write(found: Found, output: Path) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(found, indent=1) + "\n")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_check", description=__doc__)
    parser.add_argument("--output", type=Path, help="the report; by default named after the device")
    parser.add_argument("--quick", action="store_true", help="fewer rounds and reference files")
    parser.add_argument(
        "--tune", action="store_true", help="choose every kernel's block sizes first"
    )
    parser.add_argument(
        "--section", choices=list(sections()), help="run one section in this process"
    )
    options = parser.parse_args(arguments)
    cuda = torch.cuda.is_available()
    if options.section:
        from bench.encoder_gpu import JUDGED, QUICK, Bench

        device = torch.device("cuda" if cuda else "cpu")
        work(options.section, options.output, Bench(device, QUICK if options.quick else JUDGED))
        return 0
    wrong = build() if cuda else []
    facts = machine()  # after the build: the extension is looked for once a process
    output = options.output or default_output(facts["gpu"], facts["date"])
    found: Found = {"machine": facts, "device": facts["gpu"], "build": build_info()}
    with ThreadPoolExecutor(2) as compilers:
        nvcc, triton = compilers.submit(compile_part), compilers.submit(triton_part)
        if not cuda:
            print("no GPU here: the kernels were not run")
        else:
            quick = ["--quick"] if options.quick else []
            wrong += check_device(found, output, quick, tune=options.tune, compilers=(nvcc, triton))
        (found["compiled"], spilled), (found["triton"], narrow) = nvcc.result(), triton.result()
    wrong += spilled + narrow
    found["wrong"] = wrong
    write(found, output)
    if found.get("rows"):
        draw(output)
    for line in wrong:
        print(f"wrong: {line}", file=sys.stderr)
    print(f"wrote {output}")
    return 1 if wrong else 0


def draw(output: Path) -> None:
    """The chart beside the report, where Matplotlib is installed."""
    try:
        from bench.chart import draw as chart

        print(f"wrote {chart(output)}")
    except ImportError as error:
        print(f"no chart: {error}")


if __name__ == "__main__":
    sys.exit(main())
