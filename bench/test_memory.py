"""Memory of `encode` must not grow with the number of windows: measured in fresh processes."""

from __future__ import annotations

import json
import subprocess
import sys

PROGRAM = """
import json, resource, sys, threading, time
import numpy as np, psutil
from normwear_fast import FastNormWear, NormWearConfig
count = int(sys.argv[1])
model = FastNormWear(True, config=NormWearConfig.small(), precision="float32")
windows = np.broadcast_to(np.random.default_rng(0).standard_normal((1, 1, 390)).astype("f4"),
                          (count, 1, 390))
model.encode(windows[:64])
start = time.perf_counter()
out = model.encode(windows)
print(json.dumps({"resident": psutil.Process().memory_info().rss, "output": out.nbytes,
                  "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
                  "seconds": time.perf_counter() - start}))
"""


def encode(count: int) -> dict[str, float]:
    command = [sys.executable, "-c", PROGRAM, str(count)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_encode_10000_windows(benchmark, table):
    few = encode(1_000)
    many = benchmark.pedantic(encode, args=(10_000,), rounds=1, iterations=1)
    growth = many["resident"] - few["resident"] - many["output"]
    table["encode 10,000 windows, small model"] = {
        "channel_windows_per_s": 10_000 / many["seconds"],
        "resident_growth_bytes": growth,
        "peak_bytes": many["peak"],
        "output_bytes": many["output"],
    }
    assert growth <= 50 * 2**20
    assert many["peak"] < 2**30
