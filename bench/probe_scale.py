"""Wall time and peak memory of one linear probe at the size of a large evaluation.

    python -m bench.probe_scale                                  # 50,000 x 7,680, three tasks
    python -m bench.probe_scale --samples 10000 --features 1536  # a trial

Each task runs in a process of its own, so that its peak is its own. Features are float32 and half
noise; 80 % train, 20 % test, scattered, so that training rows must be gathered or swapped. Printed
a task: seconds of fit and score, the peak resident memory, and how many copies of the matrix that is
above the process before the matrix existed.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

TASKS = ("2 classes", "6 classes", "regression")


def measure(task_name: str, samples: int, features: int) -> dict[str, object]:
    import numpy as np

    from normwear_fast.evaluate.probe import fit_probe, logistic_regression, ridge_regression
    from normwear_fast.evaluate.registry import Task

    # scikit-learn and SciPy are loaded before the baseline is read.
    logistic_regression().fit(np.eye(4, dtype=np.float32), [0, 1, 0, 1])
    ridge_regression().fit(np.eye(4, dtype=np.float32), [0.0, 1.0, 0.0, 1.0])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    random = np.random.default_rng(0)
    x = np.empty((samples, features), np.float32)
    for start in range(0, samples, 1000):
        random.standard_normal(out=x[start : start + 1000], dtype=np.float32)
    classes = {"2 classes": 2, "6 classes": 6, "regression": 1}[task_name]
    weights = random.standard_normal((features, classes), dtype=np.float32) * features**-0.5
    scores = x @ weights + random.standard_normal((samples, classes), dtype=np.float32)
    if task_name == "regression":
        y = (100 + 10 * scores).astype(np.float64)
        task = Task("target", "vital signs", targets=("target",))
    else:
        y = (scores[:, 0] < scores[:, 1]).astype(np.int64) if classes == 2 else scores.argmax(1)
        names = tuple(str(index) for index in range(classes))
        task = Task("label", "state recognition", names)
    del scores
    is_test = random.random(samples) < 0.2
    start_time = time.perf_counter()
    result = fit_probe(x, y, np.flatnonzero(~is_test), np.flatnonzero(is_test), task)
    seconds = time.perf_counter() - start_time
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "task": task_name,
        "samples": samples,
        "features": features,
        "threads": int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)),
        "seconds": round(seconds, 1),
        "score": round(result.score, 4),
        "matrix_gb": round(x.nbytes / 1e9, 2),
        "peak_gb": round(peak * 1024 / 1e9, 2),
        "copies": round((peak - before) * 1024 / x.nbytes, 2),
        "notes": result.notes,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--samples", type=int, default=50_000)
    parser.add_argument("--features", type=int, default=7_680)
    parser.add_argument("--task", choices=TASKS, action="append", help="default: all three")
    parser.add_argument("--json", type=Path, help="also write the results there")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.alone:
        print(json.dumps(measure(args.task[0], args.samples, args.features)))
        return 0
    results = []
    for task in args.task or TASKS:
        command = [sys.executable, __file__, "--alone", "--task", task]
        command += ["--samples", str(args.samples), "--features", str(args.features)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            print(done.stderr, file=sys.stderr)
            return done.returncode
        results.append(json.loads(done.stdout))
        print(results[-1], flush=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
