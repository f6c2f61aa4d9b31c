"""The float32 row once more with every row under one allocator setting.

A fresh 41 MB activation is page-faulted anew at every use under glibc's own thresholds, which costs
the eager and the compiled model more than an engine that reuses its buffers. Here glibc keeps freed
buffers for all alike; the page faults of each row say that it did. Named to run last: the setting
cannot be taken back.
"""

from __future__ import annotations

import pytest
import torch

from bench.test_encoder import BATCH, CHANNELS, DEVICE, SAMPLES, fast, signal
from normwear_fast import FastNormWear
from normwear_fast.benchmarking import (
    compiled,
    eager,
    interleave,
    ratio,
    reference_of,
    set_allocator_thresholds,
)

THRESHOLD = 1 << 30


@pytest.mark.skipif(DEVICE.type == "cuda", reason="of the CPU's allocator")
def test_same_allocator(benchmark, table, rounds):
    if not set_allocator_thresholds(THRESHOLD):
        pytest.skip("needs glibc")
    model = FastNormWear(True, precision="float32").requires_grad_(False)
    reference = reference_of(model)
    x = signal(BATCH, CHANNELS, SAMPLES)
    plain, frozen = eager(reference, True), compiled(reference, True)
    rows = {
        "reference eager": lambda: plain(x),
        "reference compiled": lambda: frozen(x),
        "FastNormWear float32": fast(model, x, "float32"),
    }
    timings = benchmark.pedantic(interleave, args=(rows, rounds, 2), rounds=1, iterations=1)
    faster = min(list(rows)[:2], key=lambda name: timings[name].median)
    for name, timing in timings.items():
        times, spread = ratio(timings[faster], timing)
        table[f"{name}, one allocator setting"] = timing.as_dict() | {
            "channel_windows_per_s": BATCH * CHANNELS / timing.median,
            "ratio": times,
            "ratio_spread": spread,
            "ratio_to": faster,
            "malloc_threshold": THRESHOLD,
        }
    torch.compiler.reset()
