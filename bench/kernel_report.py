"""What every Triton kernel compiles to, without a GPU: `python -m bench.kernel_report`.

Compiles each kernel as it runs in the encoder for sm_80, sm_90 and sm_100 and prints registers, spills,
shared memory, occupancy, the instructions that matter, and a modelled time: the larger of its FLOPs and
its bytes over an H100's ceilings. Writes JSON. Exits 1 where a kernel spills, does not fit, leaves the
tensor cores alone or reads memory narrowly. None of it has been on a GPU: `python -m bench.gpu_check` is
what times kernels.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import multiprocessing
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import bench.kernels
from bench.cuda_checks import ROOT, cuobjdump
from bench.kernels import SEQUENCES, Compiled
from normwear_fast.benchmarking import channel_flops
from normwear_fast.config import NormWearConfig
from normwear_fast.kernels.tuning import Choice, choices

RESULT = ROOT / "bench" / "results" / "kernel-report.json"
CACHE = ROOT / "build" / "kernel-report"

TARGETS = (80, 90, 100)

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes of shared memory of one block (CUDA C++ Programming Guide, compute capabilities)."""

SHARED_TOTAL = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}
"""Bytes of a multiprocessor; each block takes 1 KB for the system."""

REGISTERS, WARPS, BLOCKS = 65_536, 64, 32
"""Of a multiprocessor, the same on all three. Registers go to a warp in units of 256."""

TENSOR_CORES = {80: "mma.sync", 90: "wgmma", 100: "tcgen05"}
"""How a target multiplies matrices, by its name in PTX."""

WGMMA_ROWS = 64
"""Rows of the smallest wgmma and tcgen05 product; fewer go to mma.sync on every target."""

CEILINGS = {
    "bfloat16": (798e12, "FLOP/s, cuBLAS at the encoder's shapes on an H100"),
    "tf32": (399e12, "FLOP/s, half of bfloat16"),
    "float8": (1596e12, "FLOP/s, twice bfloat16"),
    "float32": (67e12, "FLOP/s, NVIDIA's data sheet of the H100 SXM"),
    "memory": (3.35e12, "bytes/s, the same data sheet"),
}
"""What the modelled time divides by, and where it is from. `bench.gpu_check` measures its own."""

LAUNCHES = {
    "tokenize series tf32": 1,
    "tokenize tf32": 1,
    "residual_norm bfloat16 to bfloat16": 24,
    "channel_attention bfloat16": 12,
    "channel_attention bfloat16 of [CLS] rows": 6,
    "bias_gelu bfloat16": 12,
    "pool_norm mean": 1,
}
"""Launches of the judged micro-batch's encoding in bfloat16, pooled by mean."""

INSTRUCTIONS = {
    "wgmma": r"[HQI]GMMA",
    "tcgen05": r"UTC[A-Z]*MMA",
    "mma.sync": r"[HIQ]MMA",
    "ldmatrix": r"LDSM",
    "cp.async": r"LDGSTS",
    "TMA": r"UTMALDG|UBLKCP",
    "load 16 B": r"LDG\S*\.128|LDGSTS\S*\.128",
    "load 8 B": r"LDG\S*\.64|LDGSTS\S*\.64",
    "load": r"LDG|LDGSTS",
    "store 16 B": r"STG\S*\.128",
    "store": r"STG|UTMASTG",
    "ex2": r"MUFU\.EX2",
    "spill": r"LDL|STL",
}
"""What is counted, by the beginning of its name in the disassembly."""


def operators(names: Iterable[str] = ()) -> dict[str, Any]:
    """Operator to its module in bench/kernels: every one, or those named."""
    files = sorted(module.name for module in pkgutil.iter_modules(bench.kernels.__path__))
    modules = {name: importlib.import_module(f"bench.kernels.{name}") for name in names or files}
    return {name: module for name, module in modules.items() if hasattr(module, "compiled")}


def entries(names: Iterable[str] = ()) -> list[tuple[str, int, Compiled]]:
    """(operator, index in its ``compiled()``, kernel) of every kernel, or of the operators named."""
    return [
        (name, i, entry)
        for name, module in operators(names).items()
        for i, entry in enumerate(module.compiled())
    ]


def supported(entry: Compiled, target: int) -> bool:
    """Whether the kernel is for that architecture: float8 ones have no row for sm_80."""
    return target >= min(entry.table)


def report(
    targets: Sequence[int] = TARGETS,
    names: Iterable[str] = (),
    *,
    every_choice: bool = False,
    cache: Path = CACHE,
) -> list[dict[str, Any]]:
    """Compiles and describes every kernel.

    Args:
        targets: compute capabilities times ten.
        names: operators; all by default.
        every_choice: each row of the kernel's table instead of its first.
        cache: folder of what is known of unchanged kernels.

    Returns:
        A dictionary for each kernel, target and choice: see `describe`; ``raised`` holds the compiler's
        message where there is no kernel.
    """
    jobs = []
    for module, index, entry in entries(names):
        for target in targets:
            if supported(entry, target):
                row = choices(entry.table, target)
                jobs += [(module, index, target, i) for i in range(len(row) if every_choice else 1)]
    # Costly ones first would need their costs; alternating targets evens the two processes out.
    context = multiprocessing.get_context("spawn")
    workers = min(len(jobs), max(1, len(os.sched_getaffinity(0))))
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        return list(pool.map(_described, jobs, [cache] * len(jobs), chunksize=1))


def _described(job: tuple[str, int, int, int], cache: Path) -> dict[str, Any]:
    module, index, target, row = job
    entry = importlib.import_module(f"bench.kernels.{module}").compiled()[index]
    choice = choices(entry.table, target)[row]
    kept = cache / f"{_digest(entry, target, choice)}.json"
    if kept.exists():
        return dict(json.loads(kept.read_text()))
    try:
        made = describe(entry, target, choice)
    except Exception as error:  # one kernel that does not compile must not hide the others
        message = str(error).strip() or repr(error)
        return _head(entry, target, choice) | {"raised": f"{type(error).__name__}: {message}"}
    cache.mkdir(parents=True, exist_ok=True)
    partial = kept.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(json.dumps(made))
    partial.replace(kept)
    return made


def _digest(entry: Compiled, target: int, choice: Choice) -> str:
    import triton

    facts = {
        "kernel": entry.kernel.cache_key,  # its source and that of every function it calls
        "entry": {**asdict(_plain(entry)), "programs": entry.programs(choice.blocks)},
        "target": target,
        "choice": asdict(choice),
        "triton": triton.__version__,
        "report": Path(__file__).read_text(),
    }
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:24]


def _plain(entry: Compiled) -> Compiled:
    """The entry without what has an address for a name."""
    from dataclasses import replace

    return replace(entry, kernel=None, programs=len)


def _head(entry: Compiled, target: int, choice: Choice) -> dict[str, Any]:
    return {"name": entry.name, "target": f"sm_{target}", "choice": choice.launch()}


def compile_kernel(entry: Compiled, target: int, choice: Choice) -> Any:
    """Triton's compiled kernel for a target that need not be here."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = entry.kernel.arg_names
    constants = {**entry.constants, **choice.blocks}
    signature = {name: entry.signature.get(name, "constexpr") for name in names}
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if signature[name].startswith("*") or name in entry.divisible
    }
    source = ASTSource(entry.kernel, signature, constants, attributes)
    options = {"num_warps": choice.num_warps, "num_stages": choice.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)


def describe(entry: Compiled, target: int, choice: Choice) -> dict[str, Any]:
    """One kernel on one target.

    Returns:
        name, target, choice; registers, stack and spills (instructions), shared (bytes), blocks and
        occupancy of a multiprocessor; tensor_cores by PTX name; instructions, counted in the
        disassembly; flops, bytes, seconds, bound and share of the encoder as modelled.
    """
    compiled = compile_kernel(entry, target, choice)
    ptx = compiled.asm["ptx"]
    usage, instructions = disassembled(compiled.asm["cubin"])
    warps = int(getattr(compiled.metadata, "num_warps", choice.num_warps))
    if total := re.search(r"\.reqntid\s+(\d+)", ptx):  # warp specialisation adds some
        warps = int(total.group(1)) // 32
    shared = int(compiled.metadata.shared)
    blocks = resident_blocks(target, usage["registers"], warps, shared)
    return {
        **_head(entry, target, choice),
        **usage,
        "spills": instructions.get("spill", 0),
        "shared": shared,
        "warps": warps,
        "blocks": blocks,
        "occupancy": blocks * warps / WARPS,
        "tensor_cores": [name for name in TENSOR_CORES.values() if name in ptx],
        "instructions": instructions,
        "programs": entry.programs(choice.blocks),
        **modelled(entry),
        "dot": entry.dot,
        "rows": max((n for k, n in choice.blocks.items() if k.startswith("BLOCK_M")), default=0),
    }


def disassembled(cubin: bytes) -> tuple[dict[str, int], dict[str, int]]:
    """Registers and stack of a kernel, and the counts of :data:`INSTRUCTIONS`."""
    tool = cuobjdump()
    if tool is None:
        raise FileNotFoundError("no cuobjdump: it comes with Triton and with the CUDA toolkit")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        # nvdisasm, which cuobjdump starts, lies beside it in Triton and is on the PATH in CUDA.
        path = os.pathsep.join((str(Path(tool).parent), os.environ["PATH"]))
        run = subprocess.run(
            [tool, "-res-usage", "-sass", file.name],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PATH": path},
        )
    text = run.stdout + run.stderr
    return resource_usage(text), counted(text)


def resource_usage(text: str) -> dict[str, int]:
    """``registers`` and ``stack`` of cuobjdump's -res-usage line."""
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise ValueError("cuobjdump printed no resource usage")
    return {"registers": int(found.group(1)), "stack": int(found.group(2))}


def counted(sass: str) -> dict[str, int]:
    """How often each of :data:`INSTRUCTIONS` occurs in a disassembly; those that do not are left out."""
    opcodes = Counter(
        re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", sass, re.MULTILINE)
    )
    found = {
        name: sum(n for opcode, n in opcodes.items() if re.match(pattern, opcode))
        for name, pattern in INSTRUCTIONS.items()
    }
    return {name: n for name, n in found.items() if n}


def resident_blocks(target: int, registers: int, warps: int, shared: int) -> int:
    """Blocks that a multiprocessor holds at once."""
    per_warp = -(-registers * 32 // 256) * 256
    by_registers = REGISTERS // per_warp // warps
    by_shared = SHARED_TOTAL[target] // (shared + 1024)
    return min(BLOCKS, WARPS // warps, by_registers, by_shared)


def modelled(entry: Compiled) -> dict[str, Any]:
    """Time of a launch at the judged shape on an H100; of bfloat16 kernels the launches of an encoding
    and their share of its time."""
    arithmetic = entry.flops / CEILINGS[entry.unit][0]
    memory = entry.bytes / CEILINGS["memory"][0]
    seconds = max(arithmetic, memory)
    launches = LAUNCHES.get(entry.name)
    return {
        "unit": entry.unit,
        "flops": entry.flops,
        "bytes": entry.bytes,
        "seconds": seconds,
        "bound": "arithmetic" if arithmetic > memory else "memory",
        "launches": launches,
        "share": launches * seconds / encoder_seconds() if launches else None,
    }


def encoder_seconds() -> float:
    """The judged micro-batch at the bfloat16 ceiling: every FLOP of it at that rate."""
    return SEQUENCES * channel_flops(NormWearConfig(), 390) / CEILINGS["bfloat16"][0]


def wrong(kernel: dict[str, Any]) -> list[str]:
    """What is wrong with a described kernel, each in one line."""
    who = f"{kernel['name']} on {kernel['target']}"
    if "raised" in kernel:
        return [f"{who} does not compile: {kernel['raised'].splitlines()[0]}"]
    target = int(kernel["target"].removeprefix("sm_"))
    counts, found = kernel["instructions"], []
    if kernel["spills"]:
        found.append(f"{who} spills: {kernel['spills']} local loads and stores")
    if kernel["shared"] > SHARED_LIMIT[target]:
        found.append(f"{who} takes {kernel['shared']} bytes of shared memory")
    if kernel["dot"]:
        small = kernel["rows"] and kernel["rows"] < WGMMA_ROWS
        wanted = "mma.sync" if small else TENSOR_CORES[target]
        if wanted not in kernel["tensor_cores"]:
            found.append(f"{who} has no {wanted} in its PTX")
    if not counts.get("load 16 B") and not counts.get("TMA"):
        found.append(f"{who} has no 16-byte load from global memory")
    return found


def print_table(kernels: Iterable[dict[str, Any]]) -> None:
    """The report as aligned text."""
    print(
        f"{'kernel':44}{'target':>7}{'regs':>6}{'spills':>7}{'shared':>8}{'warps':>6}{'blocks':>7}"
        f"{'occup.':>7}{'us':>8}{'share':>7}  bound, instructions"
    )
    for kernel in kernels:
        start = f"{kernel['name']:44}{kernel['target']:>7}"
        if "raised" in kernel:
            print(f"{start}  {kernel['raised'].splitlines()[0]}")
            continue
        share = "" if kernel["share"] is None else f"{kernel['share']:.1%}"
        mix = ", ".join(f"{n} {name}" for name, n in kernel["instructions"].items())
        print(
            f"{start}{kernel['registers']:>6}{kernel['spills']:>7}{kernel['shared']:>8}"
            f"{kernel['warps']:>6}{kernel['blocks']:>7}{kernel['occupancy']:>7.0%}"
            f"{kernel['seconds'] * 1e6:>8.1f}{share:>7}  {kernel['bound']}; {mix}"
        )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.kernel_report", description=__doc__)
    parser.add_argument("kernels", nargs="*", help="operators, such as bias_gelu; all by default")
    parser.add_argument("--all", action="store_true", help="every choice of the tables")
    parser.add_argument("--targets", type=int, nargs="+", choices=TARGETS, default=TARGETS)
    parser.add_argument("--json", type=Path, default=RESULT, help="where to write the report")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error(
            "TRITON_INTERPRET=1 is set: Triton would interpret the kernels, not compile them"
        )
    import triton

    kernels = report(options.targets, options.kernels, every_choice=options.all)
    print_table(kernels)
    lines = [line for kernel in kernels for line in wrong(kernel)]
    facts = {
        "device": None,
        "note": "compiled ahead of time, not run on a GPU; times are modelled for an H100",
        "triton": triton.__version__,
        "ceilings": {name: {"value": v, "unit": text} for name, (v, text) in CEILINGS.items()},
        "encoder_seconds": encoder_seconds(),
        "kernels": kernels,
        "wrong": lines,
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(facts, indent=1) + "\n")
    for line in lines:
        print(f"wrong: {line}", file=sys.stderr)
    print(f"wrote {options.json}; modelled, not run on a GPU")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
