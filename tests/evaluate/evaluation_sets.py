"""Tasks and small sets of samples for the tests of evaluation."""

from __future__ import annotations

import numpy as np

from normwear_fast.evaluate.registry import Task
from normwear_fast.evaluate.samples import SampleSet

BINARY = Task("sick", "disease risk", ("no", "yes"))
THREE = Task("state", "state recognition", ("a", "b", "c"))
NUMBER = Task("value", "vital signs", targets=("value",))


def small_set(
    n: int = 12, lengths: tuple[int, ...] = (130, 130, 200), rate: float = 65.0
) -> SampleSet:
    random = np.random.default_rng(0)
    y = np.arange(n) % 2
    windows = [
        (random.standard_normal((2, lengths[i % len(lengths)])) * (1 + 4 * y[i])).astype(np.float32)
        for i in range(n)
    ]
    return SampleSet(
        name="small",
        windows=windows,
        sampling_rates=np.full(n, rate),
        subjects=np.array([f"p{i // 2}" for i in range(n)]),
        tasks=(BINARY,),
        labels=(y,),
        is_test=np.arange(n) >= n // 2,
        ids=[f"sample {i}" for i in range(n)],
    )
