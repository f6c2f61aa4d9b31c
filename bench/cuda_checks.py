"""csrc/cuda: what the compiler says of every kernel, and what a GPU does with it.

`compile_report` needs nvcc only. `checks` and `timings` need a GPU; `python -m bench.gpu_check` runs
all three and tests/test_cuda_build.py holds the first to its limits.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from normwear_fast import cuda_backend, ingest, linear_float8, linear_hopper, operators
from normwear_fast.linear_float8 import INNER
from normwear_fast.linear_hopper import FLOAT8
from normwear_fast.operators import Tokenizer
from normwear_fast.packing import Segments, sequence_tokens

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "csrc" / "cuda"

# As in setup.py.
ARCHITECTURES = ("80", "90a", "100")
FLAGS = ["-std=c++17", "-O3"]
EXTRA = {"ingest": ["-fmad=false"]}

THREADS = {
    "residual_norm_kernel": 128,
    "tokenize_kernel": 192,
    "ingest_kernel": 256,
    "linear_float8_kernel": 384,
    "linear_kernel": 384,
}
"""Of a block, as in the kernels' launch bounds."""

BLOCKS = {
    "residual_norm_kernel": 1,
    "tokenize_kernel": 3,
    "ingest_kernel": 2,
    "linear_float8_kernel": 1,
    "linear_kernel": 1,
}
"""Of a multiprocessor at once, as in the launch bounds (1: none given)."""

SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90a": 227 * 1024, "sm_100": 227 * 1024}
"""Bytes of shared memory that a block may have (CUDA C++ Programming Guide, compute capabilities)."""


# --- Without a GPU ----------------------------------------------------------------------------------


def cuobjdump() -> str | None:
    """The disassembler of the CUDA toolkit, or the one that Triton brings."""
    found = shutil.which("cuobjdump")
    if found is None:
        import importlib.util

        spec = importlib.util.find_spec("triton")
        if spec is not None and spec.origin is not None:
            beside = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
            found = str(beside) if beside.is_file() else None
    return found


def compile_report(cache: Path = ROOT / "build" / "cuda-report") -> list[dict[str, Any]]:
    """Compiles csrc/cuda as setup.py does and reads what ptxas and the disassembly say.

    Returns:
        Per kernel and architecture: source, kernel (with its template arguments, mangled), arch,
        registers, stack, spill_stores, spill_loads, shared (static bytes), serialized (codes of
        the compiler's notes that it waits for products it need not wait for), and, where a
        disassembler was found, instructions (name to count) of global and local memory and of
        tensor cores. Kept in ``cache`` for unchanged sources and compiler.

    Raises:
        FileNotFoundError: no nvcc.
        subprocess.CalledProcessError: a kernel does not compile; stderr says why.
    """
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise FileNotFoundError("nvcc is not on the PATH")
    version = subprocess.run([nvcc, "--version"], capture_output=True, check=True).stdout
    digest = hashlib.sha256(version + Path(__file__).read_bytes() + str(cuobjdump()).encode())
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.read_bytes())
    kept = cache / f"{digest.hexdigest()[:16]}.json"
    if kept.exists():
        return list(json.loads(kept.read_text()))
    gencode = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    kernels: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        running = []
        for source in sorted(SOURCES.glob("*.cu")):
            target = Path(folder) / f"{source.stem}.o"
            command = [nvcc, *FLAGS, *EXTRA.get(source.stem, []), *gencode, "-Xptxas", "-v"]
            process = subprocess.Popen(
                [*command, f"-I{ROOT / 'csrc'}", "-c", str(source), "-o", str(target)],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            running.append((source, target, process))
        for source, target, process in running:
            log, _ = process.communicate()
            if process.returncode:
                raise subprocess.CalledProcessError(process.returncode, process.args, stderr=log)
            instructions = _instructions(target)
            for kernel in _ptxas(log):
                kernel["source"] = source.name
                kernel["instructions"] = instructions.get((kernel["arch"], kernel["kernel"]))
                kernels.append(kernel)
    cache.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkstemp(dir=cache)[1])
    made.write_text(json.dumps(kernels, indent=1) + "\n")
    made.replace(kept)
    return kernels


def _short(mangled: str) -> str:
    """'tokenize_kernel IfLb0E' of its mangled name: the template's arguments after the space."""
    pattern = r"(?=([a-z][a-z0-9_]*_kernel)(?:(I.*E)EEv|E))"
    for match in re.finditer(pattern, mangled):
        if mangled[: match.start()].endswith(str(len(match[1]))):  # a name follows its length
            return " ".join(filter(None, match.groups()))
    return mangled


def _ptxas(log: str) -> Iterator[dict[str, Any]]:
    pattern = re.compile(
        r"Compiling entry function '(\w+)' for '(\w+)'.*?"
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?"
        r"Used (\d+) registers([^\n]*)",
        re.DOTALL,
    )
    for name, arch, stack, stores, loads, registers, rest in pattern.findall(log):
        shared = re.search(r"(\d+) bytes smem", rest)
        notes = re.findall(rf"\((C75\d\d)\)[^\n]*function '{name}'", log)
        yield {
            "kernel": _short(name),
            "arch": arch,
            "registers": int(registers),
            "stack": int(stack),
            "spill_stores": int(stores),
            "spill_loads": int(loads),
            "shared": int(shared.group(1)) if shared else 0,
            "serialized": notes if arch == "sm_90a" else [],
        }


def _instructions(target: Path) -> dict[tuple[str, str], dict[str, int]]:
    """Counts of memory and tensor-core instructions by architecture and kernel."""
    tool = cuobjdump()
    if tool is None:
        return {}
    sass = subprocess.run([tool, "-sass", str(target)], capture_output=True, text=True, check=True)
    counts: dict[tuple[str, str], dict[str, int]] = {}
    arch, kernel = "", ""
    for line in sass.stdout.splitlines():
        if match := re.search(r"arch = (\w+)", line):
            arch = match.group(1)
        elif match := re.search(r"Function : (\w+)", line):
            kernel = _short(match.group(1))
            counts[arch, kernel] = {}
        elif match := re.search(r"\b((?:LDG|STG|LDL|STL|HMMA|HGMMA|QGMMA)[A-Z0-9._]*)", line):
            found = counts[arch, kernel]
            found[match.group(1)] = found.get(match.group(1), 0) + 1
    return counts


# --- On a GPU ---------------------------------------------------------------------------------------

Check = Callable[[], dict[str, float]]
"""Runs a kernel twice into poisoned outputs; gives error, bound and stable (1: the same bits twice)."""

GUARD = 256
"""Rows past the result that must stay as they were: a pair of tiles, any part of which may be beyond."""

FLOATS = (torch.float32, torch.bfloat16)


def checks() -> list[tuple[str, Check]]:
    """Every kernel of csrc/cuda on random ragged inputs against float64."""
    found: list[tuple[str, Check]] = []
    for width in (64, 100, 768, 1024, 4096):
        for residual in FLOATS:
            for update in (None, *FLOATS):
                for out in (*FLOATS, torch.float8_e4m3fn):
                    name = f"residual_norm {width} {residual} update {update} to {out}"
                    found.append((name, _norm_check(width, residual, update, out)))
    for method in ("conv", "scipy"):
        for residual in FLOATS:
            for tf32 in (False, True):
                name = f"tokenize {method} {residual} {'tf32' if tf32 else 'float32'}"
                found.append((name, _tokenize_check(method, residual, tf32)))
    if _hopper():
        found.append(("linear_float8 is taken", _taken_check(linear_float8.fits)))
        found.append(("linear is taken", _taken_check(linear_hopper.fits)))
        for kind in ("bias", "gelu", "scaled"):
            # Steps of K by the ring's five stages: fewer, as many, a multiple, and not.
            for columns, inner in (
                (192, 128),
                (192, 256),
                (384, 640),
                (1536, 768),
                (2304, 768),
                (3072, 768),
                (768, 3072),
            ):
                for rows in (1, 129, 258, 4_099, 30_001):
                    name = f"linear {kind} {rows} rows, {inner} to {columns}"
                    found.append((name, _linear_check(kind, rows, inner, columns)))
            found.append((f"linear {kind} again and again", _again_check(kind)))
        for columns in (384, 3072):
            for rows in (1, 127, 128, 129, 560, 4099, 70_001):
                name = f"{rows} rows to {columns}"
                found.append((f"linear_float8 {name}", _linear_float8_check(rows, columns)))
    for implementation in ("cuda", "cupy"):
        for rate in (64.0, 65.0, 117.096, 360.0, 4000.0):
            for preprocess in ("none", "reference"):
                name = f"ingest {implementation} {rate} Hz preprocess {preprocess}"
                found.append((name, _ingest_check(implementation, rate, preprocess)))
    return found


def _hopper() -> bool:
    """Where `linear` and `linear_float8` must run."""
    return torch.cuda.get_device_capability() == (9, 0)


def _taken_check(fits: Callable[..., bool]) -> Check:
    """Whether the encoder takes it there: a wrong no would cost speed and nothing else."""

    def check() -> dict[str, float]:
        taken = fits(torch.device("cuda"), INNER, 3072)
        return {"error": float(not taken), "bound": 0.0, "stable": 1.0}

    return check


def _linear_operands(kind: str, rows: int, inner: int, columns: int) -> dict[str, Any]:
    """With a bias as the layers have it (qkv's bfloat16, fc1's float32) or, for some rows, none; of the
    weight's rows those after the first 192, as keys and values are of qkv's."""
    x = torch.randn(rows, inner, device="cuda")
    weight = torch.randn(192 + columns, inner, device="cuda") / inner**0.5
    bias = torch.randn(columns, device="cuda")
    given: dict[str, Any] = {"bias": None if rows in (129, 4_099) else bias}
    if kind != "gelu" and rows > 1 and given["bias"] is not None:
        given["bias"] = bias.bfloat16()
    if kind == "scaled":
        (x, x_scale), (weight, scale) = map(linear_float8.quantise_columns, (x, weight))
        return {"x": x, "weight": weight[192:], "scales": (x_scale, scale[192:]), **given}
    return {"x": x.bfloat16(), "weight": weight[192:].bfloat16(), "gelu": kind == "gelu", **given}


def _again_check(kind: str) -> Check:
    """The same bits 50 times, while copies on another stream disturb the timing of everything."""

    def check() -> dict[str, float]:
        given = _linear_operands(kind, 4_099, INNER, 2304)
        first = linear_hopper.linear(**given)
        beside, disturbed = torch.cuda.Stream(), torch.empty(2, 2**28, device="cuda")
        changed = 0
        for _ in range(50):
            with torch.cuda.stream(beside):
                disturbed[0].copy_(disturbed[1])
            out = torch.full_like(first, torch.nan)
            changed += not torch.equal(linear_hopper.linear(**given, out=out), first)
        beside.synchronize()  # its copies are done before their memory is anyone else's
        return {"error": float(changed), "bound": 0.0, "stable": float(not changed)}

    return check


def _linear_check(kind: str, rows: int, inner: int, columns: int) -> Check:
    def check() -> dict[str, float]:
        given = _linear_operands(kind, rows, inner, columns)

        def run() -> tuple[Tensor, ...]:
            held = torch.full((rows + GUARD, columns), torch.nan, device="cuda").bfloat16()
            linear_hopper.linear(**given, out=held[:rows])
            if not bool(held[rows:].isnan().all()):
                held[:] = torch.nan  # wrote past its rows
            return (held[:rows],)

        (got,), stable = _twice(run)
        # Half a unit in bfloat16's last place; beside zero, float32's sums and GELU's 0.003 %. Of float8
        # every sum of 32 keeps 13 bits of its largest term or of what it is added to: of a result of
        # standard deviation 1, some 4.
        absolute = inner / 32 * 2**-13 * 4 if kind == "scaled" else 2e-5
        worst = 0.0
        for first in range(0, rows, 8192):
            part = slice(first, first + 8192)
            some = {**given, "x": given["x"][part]}
            if kind == "scaled":
                some["scales"] = (given["scales"][0][part], given["scales"][1])
            exact = linear_hopper.linear_ref(**some)
            error = (got[part].double() - exact).abs() / (absolute + 2**-8 * exact.abs())
            worst = max(worst, float(error.max().nan_to_num(nan=torch.inf)))
        return {"error": worst, "bound": 1.0, "stable": stable}

    return check


def _twice(run: Callable[[], tuple[Tensor, ...]]) -> tuple[tuple[Tensor, ...], float]:
    first, second = run(), run()
    stable = all(
        torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
        for a, b in zip(first, second, strict=True)
    )
    return first, float(stable)


def _norm_check(
    width: int, residual_type: torch.dtype, update_type: torch.dtype | None, out_type: torch.dtype
) -> Check:
    def check() -> dict[str, float]:
        rows = 3361
        residual = torch.randn(rows, width, device="cuda").mul(3).to(residual_type)
        carried = torch.randn(width, device="cuda")
        update = None
        if update_type is not None:
            update = torch.randn(rows, width, device="cuda").to(update_type)

        def run() -> tuple[Tensor, ...]:
            changed = residual.clone()
            out = torch.full((rows, width), torch.nan, device="cuda").to(out_type)
            scale = torch.full((rows,), torch.nan, device="cuda")
            cuda_backend.residual_norm(changed, carried, 1e-6, update=update, out=out, scale=scale)
            return (out, changed, scale) if out_type == torch.float8_e4m3fn else (out, changed)

        results, stable = _twice(run)
        expected = residual.clone()
        if update is not None:
            expected += update
        exact = F.layer_norm(expected.double() + carried.double(), (width,), eps=1e-6)
        got = results[0].double()
        size = float(exact.abs().max())
        bound = {torch.float32: 2e-6, torch.bfloat16: 2**-8}.get(out_type, 2**-4) * size + 1e-6
        if out_type == torch.float8_e4m3fn:
            got = got * results[2].double()[:, None]
        error = float((got - exact).abs().max())
        if not torch.equal(results[1], expected):
            error = float("inf")
        return {"error": error, "bound": bound, "stable": stable}

    return check


def _float8_operands(rows: int, columns: int) -> tuple[Tensor, Tensor, linear_float8.Float8Linear]:
    """Rows as a norm leaves them, and weights of very different size."""
    x = F.layer_norm(torch.randn(rows, INNER, device="cuda"), (INNER,))
    weight = torch.randn(columns, INNER, device="cuda") / INNER**0.5
    weight *= torch.logspace(-2, 1, columns, device="cuda")[:, None]
    bias = torch.randn(columns, device="cuda")
    return *linear_float8.quantise_columns(x), linear_float8.Float8Linear.of(weight, bias)


def _linear_float8_check(rows: int, columns: int) -> Check:
    def check() -> dict[str, float]:
        x, scale, linear = _float8_operands(rows, columns)

        def run() -> tuple[Tensor, ...]:
            held = torch.full((rows + GUARD, columns), torch.nan, device="cuda").to(FLOAT8)
            linear_float8.linear_float8(x, scale, linear, out=held[:rows])
            if not bool(held[rows:].float().isnan().all()):
                held[:] = torch.nan  # wrote past its rows
            return (held[:rows],)

        (got,), stable = _twice(run)
        places = linear_float8.order(columns, x.device)
        # Tensor cores keep some 14 bits of the largest term of a float8 sum of 32.
        lost = linear.scale * linear.weight.float().norm(dim=1) * INNER**0.5 * 2**-13
        absolute = (lost * linear.factor.float() + 2**-9)[places]
        worst = 0.0
        for first in range(0, rows, 8192):
            part = slice(first, first + 8192)
            exact = linear_float8.linear_float8_ref(x[part], scale[part], linear).float()
            error = (got[part].float() - exact).abs() / (absolute + 2**-3 * exact.abs())
            worst = max(worst, float(error.max().nan_to_num(nan=torch.inf)))
        return {"error": worst, "bound": 1.0, "stable": stable}

    return check


def _batch(
    lengths: list[int], method: str, width: int
) -> tuple[Tokenizer, Tensor, Segments, Segments]:
    device = torch.device("cuda")
    config: Any = SimpleNamespace(patch_size=(9, 5), grid_columns=13)
    tokens = [sequence_tokens(length, method, config) for length in lengths]  # type: ignore[arg-type]
    counts = tuple(sorted(set(tokens)))
    tokenizer = Tokenizer(
        torch.randn(width, 135, device=device) / 135**0.5,
        torch.randn(sum(counts), width, device=device),
        counts,
        (9, 5),
        65,
        method,  # type: ignore[arg-type]
        "mexh",
    )
    series = torch.randn(sum(lengths), device=device).cumsum(0) * 0.1
    return tokenizer, series, Segments(lengths, device), Segments(tokens, device)


def _tokenize_check(method: str, residual_type: torch.dtype, tf32: bool) -> Check:
    def check() -> dict[str, float]:
        rng = np.random.default_rng()
        lengths = [11, 12, 64, 65, 390, 391, 641, 642, 643, 1300, *rng.integers(11, 1400, 20)]
        batch = _batch([int(n) for n in rng.permutation(lengths)], method, 768)
        tokenizer, series, samples, sequences = batch

        def run() -> tuple[Tensor, ...]:
            rows = torch.full((sequences.total, 768), torch.nan, device="cuda", dtype=residual_type)
            cuda_backend.tokenize(rows, series, samples, sequences, tokenizer, tf32=tf32)
            return (rows,)

        (rows,), stable = _twice(run)
        exact = _defined(tokenizer, series, samples, sequences)
        size = float(exact.abs().max())
        # 640 float32 products in a row, then 135.
        bound = size * (5e-6 + (2**-10 if tf32 else 0))
        bound += size * 2**-8 if residual_type == torch.bfloat16 else 0
        error = float((rows.double().cpu() - exact).abs().max())
        return {"error": error, "bound": bound, "stable": stable}

    return check


def _defined(
    tokenizer: Tokenizer, series: Tensor, samples: Segments, sequences: Segments
) -> Tensor:
    """The definition in float64, on the CPU."""
    cpu = torch.device("cpu")
    tables = Tokenizer(
        tokenizer.patch_weight.double().cpu(),
        tokenizer.templates.double().cpu(),
        tokenizer.token_counts,
        tokenizer.patch_size,
        tokenizer.num_scales,
        tokenizer.method,
        tokenizer.wavelet,
    )
    rows = torch.empty(sequences.total, len(tables.patch_weight), dtype=torch.float64)
    at = Segments(samples.lengths, cpu), Segments(sequences.lengths, cpu)
    operators.tokenize(rows, series.cpu(), *at, tables)
    return rows


def _ingest_check(implementation: str, rate: float, preprocess: str) -> Check:
    def check() -> dict[str, float]:
        rng = np.random.default_rng()
        length, windows = int(6 * rate), 40
        raw = rng.standard_normal((3, windows * length // 2)).cumsum(-1).clip(-9e3, 9e3)
        codes = torch.from_numpy(np.where(rng.random(raw.shape) < 0.02, -9999, raw * 3)).to(
            torch.int16
        )
        starts = np.arange(windows) * (length // 2) - 5
        options: dict[str, Any] = {
            "gain": [0.1, 0.03, 1.0],
            "baseline": 0.5,
            "invalid": -9999,
            "preprocess": preprocess,
            "normalize": "window",
        }
        expected = ingest.ingest(codes, rate, starts, length, 390, **options)

        def run() -> tuple[Tensor, ...]:
            got = ingest.ingest(
                codes.cuda(), rate, starts, length, 390, **options, implementation=implementation
            )
            return got.data.cpu(), got.missing_fraction.cpu(), got.flat.cpu()

        (data, missing, flat), stable = _twice(run)
        error = float((data - expected.data).abs().max())
        if not (
            torch.equal(flat, expected.flat) and torch.allclose(missing, expected.missing_fraction)
        ):
            error = float("inf")
        return {"error": error, "bound": 1e-5, "stable": stable}

    return check


def timings() -> list[dict[str, Any]]:
    """Time of each operator on a full micro-batch, next to the bandwidth of a device copy."""
    rows, width = 131_072, 768
    source, target = torch.empty(2, rows, width, device="cuda")
    bandwidth = 2 * source.nbytes / _seconds(lambda: target.copy_(source))
    found: list[dict[str, Any]] = [{"name": "copy", "bytes_per_s": bandwidth}]

    carried = torch.randn(width, device="cuda")
    for out_type in FLOATS:
        out = torch.empty(rows, width, device="cuda", dtype=out_type)

        def norm(out: Tensor = out) -> None:
            cuda_backend.residual_norm(source, carried, 1e-6, out=out)

        seconds, moved = _seconds(norm), source.nbytes + out.nbytes
        found.append(
            {
                "name": f"residual_norm to {out_type}",
                "seconds": seconds,
                "of_bandwidth": moved / seconds / bandwidth,
            }
        )
    tokenizer, series, samples, sequences = _batch([390] * 234, "conv", width)
    residual = torch.empty(sequences.total, width, device="cuda")
    for tf32 in (False, True):

        def tokens(tf32: bool = tf32) -> None:
            cuda_backend.tokenize(residual, series, samples, sequences, tokenizer, tf32=tf32)

        seconds = _seconds(tokens)
        name = f"tokenize {'tf32' if tf32 else 'float32'}"
        found.append({"name": name, "seconds": seconds, "seconds_a_channel": seconds / 234})
    if _hopper():
        x, scale, linear = _float8_operands(131_040, 3072)
        out8 = torch.empty(131_040, 3072, device="cuda", dtype=FLOAT8)
        seconds = _seconds(lambda: linear_float8.linear_float8(x, scale, linear, out=out8))
        flops = 2.0 * out8.numel() * INNER
        found.append({"name": "linear_float8", "seconds": seconds, "flops_per_s": flops / seconds})
        for kind, columns in (("bias", 2304), ("gelu", 3072), ("scaled", 2304)):
            found.append(_linear_timings(kind, columns))
    raw = torch.randint(-9000, 9000, (8, 360 * 6 * 64), dtype=torch.int16, device="cuda")
    starts = np.arange(64) * 360 * 6

    def cut() -> None:
        ingest.ingest(raw, 360.0, starts, 360 * 6, 390, gain=0.01, implementation="cuda")

    seconds = _seconds(cut)
    found.append(
        {
            "name": "ingest 360 Hz, whole call",
            "seconds": seconds,
            "seconds_a_channel": seconds / 512,
        }
    )
    return found


def _linear_timings(kind: str, columns: int) -> dict[str, Any]:
    """`linear` at a layer's shape beside what it took the place of."""
    from bench.kernels.measure import sustained
    from normwear_fast.gpu import scaled_product
    from normwear_fast.kernels.linear_gelu import linear_gelu

    rows = 131_040
    given = _linear_operands(kind, rows, INNER, columns)
    x, weight, bias = given["x"], given["weight"], given["bias"]
    out = torch.empty(rows, columns, device="cuda", dtype=torch.bfloat16)
    before: dict[str, Callable[[], object]] = {
        "bias": lambda: torch.addmm(bias, x, weight.T, out=out),
        "gelu": lambda: linear_gelu(x, weight, bias, out=out),
        "scaled": lambda: scaled_product(
            x, given["scales"][0], weight, given["scales"][1], out, bias
        ),
    }
    taken = _seconds(lambda: linear_hopper.linear(**given, out=out))
    kept_up = sustained(
        {"linear": lambda: linear_hopper.linear(**given, out=out), "before": before[kind]}, x.device
    )
    flops = 2.0 * rows * columns * INNER
    return {
        "name": f"linear {kind} {INNER} to {columns}",
        "seconds": taken,
        "flops_per_s": flops / taken,
        "over_baseline": _seconds(before[kind]) / taken,
        "sustained_seconds": kept_up["linear"],
        "sustained_over_baseline": kept_up["before"] / kept_up["linear"],
    }


def _seconds(run: Callable[[], object]) -> float:
    from bench.kernels.measure import default_device, seconds

    return seconds(run, default_device())
