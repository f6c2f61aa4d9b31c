"""The encoder on a GPU, from one product's ceiling to `encode` end to end: what bench.gpu_check measures.

Every step takes a `Bench` (device, sizes, one model) and returns plain numbers for the report. The
judged shape is `JUDGED`: windows of four channels of 6 s in micro-batches of 468 sequences. The same
steps run on a CPU through Triton's interpreter at small sizes, which is how they are tested.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import statistics
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from bench.kernels import SEQUENCES, linear_gelu
from bench.kernels.measure import AHEAD, copy_bandwidth, run_ahead, seconds, sustained
from bench.power import drawn
from normwear_fast import FastNormWear, NormWearConfig
from normwear_fast import benchmarking as benchmarks
from normwear_fast.gpu import FLOAT8_CAPABILITY, mlp_table, scaled_product
from normwear_fast.kernels import tuning
from normwear_fast.linear_float8 import quantise_columns
from normwear_fast.operators import Pool
from normwear_fast.packing import sequence_tokens

TESTS = Path(__file__).resolve().parent.parent / "tests"

OPERATORS = (
    "tokenize",
    "residual_norm",
    "channel_attention",
    "bias_gelu",
    "pool_norm",
    "gather_rows",
    "scatter_rows",
)

LIGHT = ("tokenize", "residual_norm", "bias_gelu", "pool_norm", "gather_rows", "scatter_rows")
"""What shall take at most a quarter of the time: everything that is neither product nor attention."""


@dataclass(frozen=True)
class Sizes:
    """How much is run.

    Args:
        config: the model's sizes.
        sequences: of a full micro-batch.
        channels, samples: of the judged windows.
        batches: full micro-batches of one `encode`.
        rounds: timed runs of each kind.
        repeats: of what must give the same bits every time.
        latency_rounds: single windows.
        batch_tokens: tokens of a micro-batch; the device's default if None.
        ragged_samples, ragged_channels: bounds of the ragged mix, inclusive.
        goldens: reference files by the beginning of their names.
    """

    config: NormWearConfig = field(default_factory=NormWearConfig)
    sequences: int = 2 * SEQUENCES
    channels: int = 4
    samples: int = 390
    batches: int = 8
    rounds: int = 7
    repeats: int = 40
    latency_rounds: int = 200
    batch_tokens: int | None = None
    ragged_samples: tuple[int, int] = (128, 650)
    ragged_channels: tuple[int, int] = (1, 14)
    goldens: str = "encoder_"


JUDGED = Sizes()

QUICK = Sizes(batches=6, rounds=5, repeats=5, latency_rounds=50, goldens="encoder_small")


class Bench:
    """One device, one set of sizes, one model with seeded random weights.

    Args:
        device: where all of it runs.
        sizes: how much.
    """

    def __init__(self, device: torch.device, sizes: Sizes = JUDGED) -> None:
        self.device, self.sizes = device, sizes
        self.rng = np.random.default_rng()

    @cached_property
    def model(self) -> FastNormWear:
        model = FastNormWear(True, config=self.sizes.config, precision="float32", backend="triton")
        return model.requires_grad_(False).to(self.device)

    @property
    def tokens(self) -> int:
        """Of one judged sequence."""
        return sequence_tokens(self.sizes.samples, "conv", self.sizes.config)

    @property
    def windows_a_batch(self) -> int:
        return max(1, self.sizes.sequences // self.sizes.channels)

    @property
    def precisions(self) -> tuple[str, ...]:
        """The fast ones that the device has."""
        return ("bfloat16", "fp8") if self.has_float8 else ("bfloat16",)

    @property
    def has_float8(self) -> bool:
        if self.device.type != "cuda":
            return True
        return torch.cuda.get_device_capability(self.device) >= FLOAT8_CAPABILITY

    def windows(self, count: int) -> NDArray[np.float32]:
        """(count, C, L) random walks in page-locked host memory."""
        shape = (count, self.sizes.channels, self.sizes.samples)
        walks = self.rng.standard_normal(shape, dtype=np.float32).cumsum(-1)
        held = torch.from_numpy(walks)
        return (held.pin_memory() if self.device.type == "cuda" else held).numpy()

    def mix(self, tokens: int) -> list[NDArray[np.float32]]:
        """Ragged random windows of about that many tokens together."""
        found: list[NDArray[np.float32]] = []
        total = 0
        while total < tokens:
            channels = int(self.rng.integers(*self.sizes.ragged_channels, endpoint=True))
            samples = int(self.rng.integers(*self.sizes.ragged_samples, endpoint=True))
            walk = self.rng.standard_normal((channels, samples), dtype=np.float32).cumsum(-1)
            found.append(walk)
            total += channels * sequence_tokens(samples, "conv", self.sizes.config)
        return found

    def encode(self, windows: Any, precision: str, **options: Any) -> Any:
        return self.model.encode(
            windows, precision=precision, batch_tokens=self.sizes.batch_tokens, **options
        )

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def attempted(part: Callable[[], Any]) -> Any:
    """A part of a step's result, or what it raised: one precision that fails hides no other."""
    try:
        return part()
    except Exception as error:
        traceback.print_exc()
        return {"raised": f"{type(error).__name__}: {error}", "passed": False}


# --- right before fast ------------------------------------------------------------------------------


def _helpers() -> ModuleType:
    """tests/helpers.py, which knows how the reference numbers were made."""
    spec = importlib.util.spec_from_file_location("helpers", TESTS / "helpers.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


POOLED: tuple[Pool, ...] = ("mean", "cls")

GOLDEN_BOUNDS = {"float32": (2e-5, 0.999999), "bfloat16": (None, 0.999), "fp8": (None, 0.998)}
"""Largest error and mean token cosine against the published implementation's numbers."""


def goldens(bench: Bench) -> list[dict[str, Any]]:
    """The reference numbers in each precision."""
    helpers, found = _helpers(), []
    for name in helpers.ENCODER_GOLDENS:
        if not name.startswith(bench.sizes.goldens):
            continue
        arrays = helpers.golden(name)
        model = FastNormWear(
            "scipy" not in name, config=helpers.golden_config(arrays), backend="triton"
        )
        model.load_state_dict(helpers.golden_weights(arrays))
        model.requires_grad_(False).to(bench.device)
        rows = arrays.get("rows")  # of the base files, which hold these rows of the output alone
        expected = torch.from_numpy(arrays["out" if rows is None else "out_rows"])

        def judged(
            precision: str,
            model: FastNormWear = model,
            arrays: Any = arrays,
            expected: Any = expected,
            rows: Any = rows,
        ) -> dict[str, Any]:
            model.precision = precision
            with torch.inference_mode():
                x = torch.from_numpy(arrays["x"]).to(bench.device)
                out = model(x).cpu()
            errors = benchmarks.error_against(expected, out if rows is None else out[:, :, rows])
            largest, cosine = GOLDEN_BOUNDS[precision]
            passed = errors["mean_cosine"] >= cosine
            passed &= largest is None or errors["max_abs_error"] <= largest
            return {**errors, "passed": passed}

        for precision in ("float32", *bench.precisions):
            errors = attempted(lambda precision=precision, judged=judged: judged(precision))
            found.append({"name": f"{name} {precision}", **errors})
    return found


def repetition(bench: Bench) -> list[dict[str, Any]]:
    """Races show as bits that change: a ragged mix again and again, with other windows between."""
    found = []
    tokens = max(1, bench.sizes.sequences // 8) * bench.tokens
    windows, others = bench.mix(tokens), [bench.mix(tokens // 2) for _ in range(3)]

    def repeated(precision: str, pool: Pool) -> dict[str, Any]:
        first = bench.encode(windows, precision, pool=pool)
        changed = 0
        for i in range(bench.sizes.repeats):
            bench.encode(others[i % len(others)], precision, pool=pool)
            again = bench.encode(windows, precision, pool=pool)
            changed += not _same(first, again)
        finite = all(bool(np.isfinite(out).all()) for out in first)
        return {"changed": changed, "passed": finite and not changed}

    for precision in ("float32", *bench.precisions):
        for pool in POOLED:
            outcome = attempted(lambda precision=precision, pool=pool: repeated(precision, pool))
            found.append({"name": f"{precision} {pool} x {bench.sizes.repeats}", **outcome})
    return found


def graphs(bench: Bench) -> list[dict[str, Any]]:
    """Replayed graphs against the same launches one by one, bit for bit, ragged and equal."""
    found = []
    cases = {
        "equal": list(bench.windows(bench.windows_a_batch)),
        "ragged": bench.mix(bench.sizes.sequences * bench.tokens // 2),
        "one window": list(bench.windows(1)),
    }

    def compared(precision: str, windows: Any, pool: Pool) -> dict[str, Any]:
        encoder: Any = bench.model._engine(precision).encoder
        captured = encoder.captured
        with_graph = bench.encode(windows, precision, pool=pool)
        encoder.captured = False
        try:
            without = bench.encode(windows, precision, pool=pool)
        finally:
            encoder.captured = captured
        return {"passed": _same(with_graph, without)}

    for precision in ("float32", *bench.precisions):
        for name, windows in cases.items():
            for pool in POOLED:
                outcome = attempted(
                    lambda precision=precision, windows=windows, pool=pool: compared(
                        precision, windows, pool
                    )
                )
                found.append({"name": f"{precision} {name} {pool}", **outcome})
    return found


def _same(first: Any, second: Any) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


# --- ceilings ---------------------------------------------------------------------------------------


def ceilings(bench: Bench) -> dict[str, Any]:
    """What the device gives our four products and a copy; the best product is the ceiling."""
    config, device = bench.sizes.config, bench.device
    rows = bench.sizes.sequences * bench.tokens
    found: dict[str, Any] = {}
    found["bfloat16"] = _rates(bench, benchmarks.gemm_calls(config, rows, torch.bfloat16, device))
    found["copy_bytes_per_s"] = copy_bandwidth(device, 4 * rows * config.embed_dim)
    flags = torch.backends.cuda.matmul
    before = flags.allow_tf32
    for name, allowed in (("tf32", True), ("float32", False)):
        flags.allow_tf32 = allowed
        try:
            calls = benchmarks.gemm_calls(config, rows, torch.float32, device)
            found[name] = _rates(bench, calls)
        finally:
            flags.allow_tf32 = before
    if bench.has_float8:
        found["fp8"] = attempted(lambda: _rates(bench, _float8_calls(config, rows, device)))
    return found


def _float8_calls(
    config: NormWearConfig, rows: int, device: torch.device
) -> dict[str, tuple[Callable[[], object], float]]:
    calls: dict[str, tuple[Callable[[], object], float]] = {}
    for name, (m, n, k) in benchmarks.gemm_shapes(config, rows).items():
        a, a_scale = quantise_columns(torch.randn(m, k, device=device))
        b, b_scale = quantise_columns(torch.randn(n, k, device=device))
        out = torch.empty(m, n, dtype=torch.bfloat16, device=device)

        def call(
            operands: tuple[Tensor, ...] = (a, a_scale, b, b_scale, out),
        ) -> object:
            return scaled_product(*operands, None)

        calls[name] = (call, 2.0 * m * n * k)
    return calls


SUSTAINED = 0.5
"""Seconds of one product after another: by then a GPU's clock is what its power allows."""


def _rates(bench: Bench, calls: dict[str, tuple[Callable[[], object], float]]) -> dict[str, Any]:
    """Of every product by itself; the best is the ceiling, and ``sustained`` what it keeps up.

    A product alone meets a cool device: `encode` may fall short of its ceiling by the clock alone.
    """
    taken = {
        name: seconds(call, bench.device, bench.sizes.rounds) for name, (call, _) in calls.items()
    }
    rates = {name: flops / taken[name] for name, (_, flops) in calls.items()}
    best = max(rates, key=lambda name: rates[name])
    call, flops = calls[best]
    period = SUSTAINED if bench.device.type == "cuda" else 0.0
    kept_up = sustained({best: call}, bench.device, rounds=1, settle=period, measure=period)
    return {
        "flops_per_s": rates,
        "ceiling": rates[best],
        "sustained": flops / kept_up[best],
    }


# --- where the time of a layer stack goes -----------------------------------------------------------


class Stopwatch:
    """Time between marks on the device, summed by name.

    Args:
        device: CUDA events on a GPU, the process's clock on a CPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._spans: list[tuple[str, Any, Any]] = []

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, with its time added to ``name``'s."""

        def run(*arguments: Any, **options: Any) -> Any:
            start = self._mark()
            result = function(*arguments, **options)
            self._spans.append((name, start, self._mark()))
            return result

        return run

    def totals(self) -> dict[str, float]:
        """Seconds by name."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        found: dict[str, float] = defaultdict(float)
        for name, start, stop in self._spans:
            found[name] += (
                start.elapsed_time(stop) / 1e3 if self.device.type == "cuda" else stop - start
            )
        return dict(found)


@contextmanager
def instrumented(engine: Any, wrap: Callable[[str, Any], Any]) -> Iterator[None]:
    """The engine with its operators wrapped and its graphs off, for the length of the block."""
    encoder, backend = engine.encoder, engine.backend
    kept, captured = encoder.ops, encoder.captured
    wrapped = {name: wrap(name, getattr(kept, name)) for name in OPERATORS}
    encoder.ops = dataclasses.replace(kept, **wrapped)
    engine.backend = dataclasses.replace(backend, tokenize=wrapped["tokenize"])
    encoder.captured = False
    try:
        yield
    finally:
        encoder.ops, encoder.captured, engine.backend = kept, captured, backend


def stack(bench: Bench) -> dict[str, Any]:
    """A judged micro-batch on the device, by operator; what no operator took is the products'."""

    def parts_of(precision: str) -> dict[str, Any]:
        engine, run = _device_run(bench, precision)
        whole = seconds(run, bench.device, bench.sizes.rounds)
        rounds = []
        for _ in range(bench.sizes.rounds + 1):
            watch = Stopwatch(bench.device)
            with instrumented(engine, watch.timed):
                run_ahead(bench.device, 5 * AHEAD)  # 170 launches one by one take some 7 ms
                watch.timed("all", run)()
            rounds.append(watch.totals())
        parts = {
            name: statistics.median(r.get(name, 0.0) for r in rounds[1:])
            for name in ("all", *OPERATORS)
        }
        parts["products"] = parts["all"] - sum(parts[name] for name in OPERATORS)
        channels = bench.windows_a_batch * bench.sizes.channels
        return {
            "seconds": whole,
            "seconds_by_launch": parts,
            "shares": {
                name: value / parts["all"] for name, value in parts.items() if name != "all"
            },
            "light_share": sum(parts[name] for name in LIGHT) / parts["all"],
            "channel_windows_per_s": channels / whole,
        }

    return {
        precision: attempted(lambda precision=precision: parts_of(precision))
        for precision in bench.precisions
    }


def _device_run(
    bench: Bench, precision: str, pool: Pool = "mean"
) -> tuple[Any, Callable[[], Tensor]]:
    """The engine, and one judged micro-batch through it, series and result on the device."""
    shape = (bench.sizes.channels, bench.sizes.samples)
    engine: Any = bench.model._engine(precision)
    layout = bench.model._layout([shape] * bench.windows_a_batch)
    series = torch.randn(layout.samples.total, device=bench.device).cumsum(0)

    def run() -> Tensor:
        with torch.inference_mode():
            out: Tensor = engine.run(series, layout, pool)
        return out

    return engine, run


def tune(bench: Bench) -> dict[str, dict[str, Any]]:
    """Times every choice of every kernel on the calls of judged micro-batches and keeps the fastest.

    Returns:
        Operator and case to seconds by choice. The model picks anew afterwards.
    """
    calls: dict[tuple[str, str], tuple[Any, ModuleType, Callable[[], Any]]] = {}

    def recorded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        module = sys.modules[function.__module__]
        if not hasattr(module, "pick"):
            return function

        def run(*arguments: Any, **options: Any) -> Any:
            def pick(operator: str, case: str, table: Any, device: torch.device) -> Any:
                call = (table, module, lambda: function(*arguments, **options))
                calls.setdefault((operator, case), call)
                return tuning.pick(operator, case, table, device)

            with replaced(module, "pick", pick):
                return function(*arguments, **options)

        return run

    def record(precision: str) -> None:
        for pool in POOLED:
            engine, run = _device_run(bench, precision, pool)
            with instrumented(engine, recorded):
                run()

    found: dict[str, dict[str, Any]] = {}
    for precision in bench.precisions:
        raised = attempted(lambda precision=precision: record(precision))
        found |= {f"the calls of {precision}": raised} if raised else {}
    for (operator, case), (table, module, call) in calls.items():

        def timed(
            choice: tuning.Choice,
            key: tuple[str, str] = (operator, case),
            module: ModuleType = module,
            call: Callable[[], Any] = call,
        ) -> float:
            def pick(*asked: Any) -> tuning.Choice:
                return choice if asked[:2] == key else tuning.pick(*asked)

            with replaced(module, "pick", pick), torch.inference_mode():
                return seconds(call, bench.device, bench.sizes.rounds)

        found[f"{operator} {case}"] = tuning.tune(operator, case, table, bench.device, timed)
    bench.model._engines.clear()
    config, rows = bench.sizes.config, bench.sizes.sequences * bench.tokens
    found["linear_gelu torch.bfloat16"] = linear_gelu.tune(  # before the MLP that may choose it
        bench.device, rows, config.embed_dim, config.hidden_dim, bench.sizes.rounds
    )
    found["mlp bfloat16"] = _tune_mlp(bench)
    bench.model._engines.clear()
    return found


def _tune_mlp(bench: Bench) -> dict[str, float]:
    """The ways through the MLP, by the time of all layers."""
    engine, run = _device_run(bench, "bfloat16")
    encoder = engine.encoder
    if encoder.ops.linear is not None:
        return {}  # which takes its place

    def timed(choice: tuning.Choice) -> float:
        if choice.blocks["FUSED"] and encoder.ops.linear_gelu is None:
            raise ValueError("the backend has no such kernel")
        encoder.mlp = choice.blocks
        for bucket in encoder._buckets.values():
            bucket.graphs.clear()
        return seconds(run, bench.device, bench.sizes.rounds)

    return tuning.tune("mlp", "bfloat16", mlp_table(), bench.device, timed)


@contextmanager
def replaced(module: ModuleType, name: str, value: Any) -> Iterator[None]:
    """A module's name bound to another value for the length of the block."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


# --- from the host and back -------------------------------------------------------------------------


def encode(bench: Bench) -> dict[str, Any]:
    """`encode` of page-locked float32 windows to pooled embeddings on the host, precisions in turn."""
    windows = bench.windows(bench.sizes.batches * bench.windows_a_batch)
    channels = len(windows) * bench.sizes.channels
    few = windows[: max(1, 32 // bench.sizes.channels)]
    full = windows[: bench.windows_a_batch]
    eighth = max(1, len(full) // 8) * bench.sizes.channels * bench.tokens

    def cosines(exact: Any, got: Any) -> Tensor:
        exact, got = (torch.from_numpy(out).double() for out in (exact, got))
        return F.cosine_similarity(exact, got, dim=-1)

    def compared(name: str) -> dict[str, Any]:
        by_token = cosines(
            bench.encode(few, "float32", pool="patch"), bench.encode(few, name, pool="patch")
        )
        # A full micro-batch, whose rows no check of an operator reaches, against small ones in float32.
        exact = bench.model.encode(full, precision="float32", batch_tokens=eighth)
        return {
            "mean_cosine": float(by_token.mean()),
            "worst_cosine": float(by_token.min()),
            "full_batch_worst_cosine": float(cosines(exact, bench.encode(full, name)).min()),
        }

    found = {name: attempted(lambda name=name: compared(name)) for name in bench.precisions}
    calls: dict[str, Callable[[], object]] = {}
    for name in bench.precisions:
        # Once alone at full size: what one precision lacks there must not cost the others their rates.
        ran = attempted(lambda name=name: bool(len(bench.encode(windows, name))))
        if ran is True:
            calls[name] = lambda name=name: bench.encode(windows, name)
        else:
            found[name] = ran
    for name, timing in benchmarks.interleave(calls, rounds=bench.sizes.rounds).items():
        found[name] |= {
            **timing.as_dict(),
            "channel_windows_per_s": channels / timing.median,
        }
    return found


def ragged(bench: Bench) -> dict[str, Any]:
    """Tokens a second of a ragged mix over those of equal windows, as many tokens, in turn."""
    tokens = bench.sizes.batches * bench.sizes.sequences * bench.tokens
    mix = bench.mix(tokens)
    equal = bench.windows(bench.sizes.batches * bench.windows_a_batch)
    counts = {
        "ragged": sum(
            len(w) * sequence_tokens(w.shape[1], "conv", bench.sizes.config) for w in mix
        ),
        "equal": equal.shape[0] * equal.shape[1] * bench.tokens,
    }
    timings = benchmarks.interleave(
        {
            "ragged": lambda: bench.encode(mix, "bfloat16"),
            "equal": lambda: bench.encode(equal, "bfloat16"),
        },
        rounds=bench.sizes.rounds,
    )
    rates = {name: counts[name] / timing.median for name, timing in timings.items()}
    return {"tokens_per_s": rates, "ratio": rates["ragged"] / rates["equal"], "windows": len(mix)}


def latency(bench: Bench) -> dict[str, Any]:
    """One window of three channels, host to host."""
    shape = (3, bench.sizes.samples)
    window = bench.rng.standard_normal(shape, dtype=np.float32)

    def quantiles(precision: str) -> dict[str, float]:
        taken = []
        for i in range(bench.sizes.latency_rounds + 10):
            start = time.perf_counter()
            bench.model.encode_unit([window], precision=precision)
            if i >= 10:
                taken.append(time.perf_counter() - start)
        median, late = np.quantile(taken, [0.5, 0.95])
        return {"median_s": float(median), "p95_s": float(late)}

    return {
        precision: attempted(lambda precision=precision: quantiles(precision))
        for precision in ("float32", *bench.precisions)
    }


def memory(bench: Bench) -> dict[str, Any]:
    """The peak of a short and of a longer run, beside the weights and one budget's buffers."""
    if bench.device.type != "cuda":
        return {"peak_bytes": None, "longer_peak_bytes": None}
    windows = bench.windows(3 * bench.sizes.batches * bench.windows_a_batch)
    short = windows[: bench.sizes.batches * bench.windows_a_batch]
    peaks = []
    for part in (short, windows):  # captures every bucket: the longer run meets some of its own
        bench.encode(part, "bfloat16")
    for part in (short, windows):
        torch.cuda.reset_peak_memory_stats(bench.device)
        bench.encode(part, "bfloat16")
        peaks.append(torch.cuda.max_memory_allocated(bench.device))
    engine: Any = bench.model._engine("bfloat16")
    held = engine.encoder._storage.values()
    buffers = sum(b.numel() * b.element_size() for b in held)
    weights = sum(p.numel() * p.element_size() for p in bench.model.parameters())
    folded = sum(
        value.numel() * value.element_size()
        for block in (*engine.encoder.blocks, *engine.encoder.fusions.values())
        for value in vars(block).values()
    )
    return {
        "peak_bytes": peaks[0],
        "longer_peak_bytes": peaks[1],
        "buffer_bytes": buffers,
        "weight_bytes": weights + folded,
        "over_budget": peaks[1] / (buffers + weights + folded),
        "growth": peaks[1] / peaks[0],
    }


def one_at_a_time(bench: Bench) -> dict[str, Any]:
    """Against what users run today: windows one by one, scalograms on the CPU, eager float32."""
    reference = benchmarks.reference_of(bench.model)
    few = torch.from_numpy(bench.windows(8))
    many = bench.windows(bench.sizes.batches * bench.windows_a_batch)
    run = benchmarks.one_at_a_time(reference)
    return _in_turn(bench, (lambda: run(few), len(few)), many)


def compiled_reference(bench: Bench) -> dict[str, Any]:
    """Against the reference under bfloat16 autocast and torch.compile max-autotune.

    Both encode the same windows, from page-locked memory to the means on the host: the reference in full
    micro-batches, which nothing makes wait for the host. A single micro-batch after a pause would run at
    a clock that the power limit allows nobody for longer.
    """
    reference = benchmarks.reference_of(bench.model)
    many, size = bench.windows(bench.sizes.batches * bench.windows_a_batch), bench.windows_a_batch
    compiled = benchmarks.compiled(reference, True)
    windows = torch.from_numpy(many)
    on_gpu, width = bench.device.type == "cuda", bench.sizes.config.embed_dim
    pooled = torch.empty((*windows.shape[:2], width), pin_memory=on_gpu)

    def run() -> None:
        with torch.inference_mode():
            for x, out in zip(windows.split(size), pooled.split(size), strict=True):
                tokens = compiled(x.to(bench.device, non_blocking=True))
                out.copy_(tokens.mean(2), non_blocking=True)
        bench.synchronize()

    start = time.perf_counter()
    compiled(windows[:size].to(bench.device))
    bench.synchronize()
    compiling = time.perf_counter() - start
    found = _in_turn(bench, (run, len(windows)), many)
    exact = bench.encode(many[:size], "float32")
    cosines = F.cosine_similarity(pooled[:size].double(), torch.from_numpy(exact).double(), dim=-1)
    worst = float(cosines.min())
    if not worst >= 0.99:
        raise RuntimeError(f"the compiled reference is not the model: worst cosine {worst:.4f}")
    power = {
        "reference": attempted(lambda: drawn(run, bench.device)),
        "encode": attempted(lambda: drawn(lambda: bench.encode(many, "bfloat16"), bench.device)),
    }
    return {
        **found,
        "worst_cosine": worst,
        "compile_s": compiling,
        "power": power,
    }


def _in_turn(
    bench: Bench, baseline: tuple[Callable[[], object], int], many: NDArray[np.float32]
) -> dict[str, Any]:
    """A baseline and `encode` in bfloat16, round by round.

    Args:
        baseline: one round of it, and its windows.
        many: the windows of a round of `encode`.
    """
    run, count = baseline
    calls = {"baseline": run, "encode": lambda: bench.encode(many, "bfloat16")}
    windows = {"baseline": count, "encode": len(many)}
    timings = benchmarks.interleave(calls, rounds=bench.sizes.rounds)
    # A round of both gives one ratio; their windows differ in number.
    each = {
        name: [taken / windows[name] for taken in timing.seconds]
        for name, timing in timings.items()
    }
    ratios = [b / e for b, e in zip(each["baseline"], each["encode"], strict=True)]
    channels = bench.sizes.channels
    return {
        "channel_windows_per_s": channels / statistics.median(each["baseline"]),
        "encode_channel_windows_per_s": channels / statistics.median(each["encode"]),
        "ratio": statistics.median(ratios),
        "lowest_ratio": min(ratios),
        "highest_ratio": max(ratios),
    }
