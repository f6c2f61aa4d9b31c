"""The encoder in every precision against its baselines: `pytest bench --benchmark-only`.

Each row is a pytest-benchmark whose every round is preceded by a timed round of the baseline, so
that both see the same minute of the machine; the ratio is the median of the rounds' ratios. What the
project is judged by runs by default, six minutes on two cores; `-m ""` adds sweeps over shapes.
"""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from normwear_fast import FastNormWear, NormWearConfig
from normwear_fast.benchmarking import (
    channel_flops,
    compiled,
    eager,
    error_against,
    gemm_calls,
    gemm_rate,
    interleave,
    one_at_a_time,
    reference_of,
    scipy_scalogram,
    synchronize,
)
from normwear_fast.engine import PRECISIONS
from normwear_fast.reference import ReferenceNormWear
from normwear_fast.scalograms import scalogram

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BATCH, CHANNELS, SAMPLES = 2, 3, 390


@pytest.fixture(scope="module")
def model() -> FastNormWear:
    return FastNormWear(True, precision="float32").requires_grad_(False).to(DEVICE)


@pytest.fixture(scope="module")
def reference(model: FastNormWear) -> ReferenceNormWear:
    return reference_of(model)


@pytest.fixture(scope="module")
def ceiling() -> dict[str, dict[str, float]]:
    """FLOP/s of the best of a layer's products by operand dtype, measured in this run: of all, and of the
    libraries' alone (a native float32 product on a tile unit is faster than any of theirs)."""
    rates = {}
    for dtype in (torch.float32, torch.bfloat16):
        rows = BATCH * CHANNELS * 560
        calls = gemm_calls(NormWearConfig(), rows, dtype, DEVICE)
        timings = interleave({name: call for name, (call, _) in calls.items()}, rounds=9)
        flops = {name: flops for name, (_, flops) in calls.items()}
        libraries = {name: value for name, value in flops.items() if not name.endswith("native")}
        rates[str(dtype).removeprefix("torch.")] = {
            "ceiling": gemm_rate(timings, flops),
            "library_ceiling": gemm_rate(timings, libraries),
        }
    return rates


def signal(batch: int, channels: int, samples: int) -> Tensor:
    return torch.from_numpy(
        np.random.default_rng(0).standard_normal((batch, channels, samples)).astype(np.float32)
    ).to(DEVICE)


def measure(
    benchmark: Any,
    row: Callable[[], object],
    baseline: Callable[[], object],
    rounds: int,
    channel_windows: int,
) -> dict[str, Any]:
    """One row: the benchmark's rounds, each after a timed round of the baseline."""
    seconds: list[float] = []
    faults: dict[str, list[int]] = {"baseline": [], "row": []}

    def counted(name: str, call: Callable[[], object]) -> None:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        call()
        synchronize()
        faults[name].append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

    def timed_baseline() -> None:
        synchronize()
        start = time.perf_counter()
        counted("baseline", baseline)
        seconds.append(time.perf_counter() - start)

    def target() -> None:
        counted("row", row)

    baseline()
    benchmark.pedantic(target, setup=timed_baseline, rounds=rounds, iterations=1, warmup_rounds=1)
    own = benchmark.stats.stats.data
    ratios = [b / r for b, r in zip(seconds[-len(own) :], own, strict=True)]
    quartiles = statistics.quantiles(ratios, n=4)
    facts = {
        "median_s": statistics.median(own),
        "best_s": min(own),
        "baseline_median_s": statistics.median(seconds),
        "channel_windows_per_s": channel_windows / statistics.median(own),
        "ratio": statistics.median(ratios),
        "ratio_spread": (quartiles[2] - quartiles[0]) / 2,
        "page_faults": int(statistics.median(faults["row"])),
        "baseline_page_faults": int(statistics.median(faults["baseline"])),
    }
    benchmark.extra_info.update(facts)
    return facts


def fast(model: FastNormWear, x: Tensor, precision: str) -> Callable[[], Tensor]:
    def run() -> Tensor:
        model.precision = precision
        with torch.inference_mode():
            return model(x)

    return run


@pytest.mark.parametrize("precision", [name for name in PRECISIONS if name != "auto"])
def test_fast(benchmark, table, rounds, model, reference, ceiling, precision):
    if precision not in model._engine().backend.precisions:
        pytest.skip(f"{precision} is not one of backend {model._engine().backend.name}'s")
    x = signal(BATCH, CHANNELS, SAMPLES)
    baseline = eager(reference, True)
    row = fast(model, x, precision)
    facts = measure(benchmark, row, lambda: baseline(x), rounds, BATCH * CHANNELS)
    facts |= error_against(baseline(x), row())
    for name, rate in ceiling.get(precision, {}).items():
        best = BATCH * CHANNELS * channel_flops(model.config, SAMPLES, CHANNELS) / rate
        facts |= {f"gemm_{name}_flops": rate, f"of_{name}": best / facts["median_s"]}
    benchmark.extra_info.update(facts)
    table[f"FastNormWear {precision}"] = facts


@pytest.mark.parametrize("name", ["compiled", "one at a time"])
def test_baseline(benchmark, table, rounds, reference, name):
    x = signal(BATCH, CHANNELS, SAMPLES)
    baseline = eager(reference, True)
    other = compiled(reference, True) if name == "compiled" else one_at_a_time(reference)
    facts = measure(benchmark, lambda: other(x), lambda: baseline(x), rounds, BATCH * CHANNELS)
    table[f"reference {name}"] = facts


def test_cls(benchmark, table, rounds, model):
    """`cls` against `patch`: the last layer computes [CLS] rows only."""
    windows = list(signal(BATCH, CHANNELS, SAMPLES).cpu().numpy())

    def run(pool: str) -> Callable[[], object]:
        return lambda: model.encode_unit(windows, pool=pool, precision="float32")

    facts = measure(benchmark, run("cls"), run("patch"), rounds, BATCH * CHANNELS)
    table["encode pool=cls over patch"] = facts


@pytest.mark.parametrize("name", ["convolutions", "one at a time"])
def test_tokenize(benchmark, table, rounds, model, reference, name):
    """Series to tokens, warm: against the reference's convolutions and against upstream's pipeline."""
    channels = BATCH * CHANNELS
    x = signal(BATCH, CHANNELS, SAMPLES)
    layout, engine = model._layout([(CHANNELS, SAMPLES)] * BATCH), model._engine()
    tokens = torch.empty(layout.sequences.total, model.config.embed_dim, device=DEVICE)
    tables = engine.tokenizer(tuple(sorted(set(layout.sequences.lengths))))

    def row() -> None:
        engine.backend.tokenize(tokens, x.view(-1), layout.samples, layout.sequences, tables)

    def convolutions() -> Tensor:
        return reference.patch_embed(scalogram(x, "conv").flatten(0, 1))

    def one_by_one() -> None:
        for window in x.cpu().numpy():
            parts = torch.from_numpy(scipy_scalogram(window, model.config.num_scales))
            reference.patch_embed(parts.float().to(DEVICE))

    baseline = convolutions if name == "convolutions" else one_by_one
    with torch.inference_mode():
        facts = measure(benchmark, row, baseline, 3 * rounds, channels)
    table[f"tokenize over {name}"] = facts


@pytest.mark.slow
@pytest.mark.parametrize(
    ("batch", "channels", "samples"),
    [(1, 1, 64), (1, 1, 390), (1, 3, 390), (1, 14, 390), (2, 2, 650), (1, 1, 1300), (16, 3, 64)],
)
def test_sweep(benchmark, table, rounds, model, reference, batch, channels, samples):
    """Window lengths, channel counts and batch sizes, float32, against the eager reference."""
    x = signal(batch, channels, samples)
    baseline = eager(reference, True)
    row = fast(model, x, "float32")
    facts = measure(benchmark, row, lambda: baseline(x), min(rounds, 5), batch * channels)
    facts |= error_against(baseline(x), row())
    table[f"float32 B={batch} C={channels} L={samples}"] = facts


def test_latency_one_thread(benchmark, table, rounds, model, reference):
    """One short window on one thread: nothing but overhead can lose here."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        x = signal(1, 1, 64)
        baseline = eager(reference, True)
        row = fast(model, x, "float32")
        facts = measure(benchmark, row, lambda: baseline(x), max(rounds, 15), 1)
    finally:
        torch.set_num_threads(threads)
    table["float32 B=1 C=1 L=64, one thread"] = facts


@pytest.mark.slow
def test_ragged(benchmark, table, rounds, model):
    """A ragged mix against equal windows of as many tokens: the token rate should not care."""
    rng = np.random.default_rng(0)
    shapes = [(int(rng.integers(1, 6)), int(rng.integers(128, 651))) for _ in range(4)]
    windows = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    tokens = sum(model._window_tokens(shape) for shape in shapes)
    uniform = [rng.standard_normal((1, 390)).astype(np.float32) for _ in range(tokens // 560)]
    budget = 16_384
    facts = measure(
        benchmark,
        lambda: model.encode_unit(windows, batch_tokens=budget, precision="float32"),
        lambda: model.encode_unit(uniform, batch_tokens=budget, precision="float32"),
        rounds,
        sum(channels for channels, _ in shapes),
    )
    facts["token_rate_ratio"] = facts["ratio"] * tokens / (560 * len(uniform))
    table["float32 ragged over uniform"] = facts
