"""Downstream evaluation: 18 tasks on 11 public sets, or a user's own labelled windows.

`registry` says what the tasks are, `prepare` makes samples of a set's raw download, `samples` reads
them, `baselines` turns them into features, `probe` fits the published linear probes, `metrics` and
`statistics` score and compare them.
"""

from __future__ import annotations

from normwear_fast.evaluate.registry import DATASETS, Dataset, Task
from normwear_fast.evaluate.samples import SampleSet, load_samples

__all__ = ["DATASETS", "Dataset", "SampleSet", "Task", "load_samples"]
