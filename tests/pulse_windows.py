"""Windows of pulses, labelled by their rate, and a small encoder to tune on them."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from normwear_fast.config import NormWearConfig
from normwear_fast.evaluate.registry import Task
from normwear_fast.finetune import LabelledWindows
from normwear_fast.model import FastNormWear

CONFIG = NormWearConfig(
    embed_dim=64, depth=3, num_heads=1, decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=4
)
CLASSES = Task("rate", "state recognition", classes=("fast", "slow"))
CPU = torch.device("cpu")
RATE = 64.0


def encoder(**arguments: Any) -> FastNormWear:
    return FastNormWear(True, config=CONFIG, precision="float32", **arguments)


def pulse(frequency: float, seconds: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """(2, L): a pulse train and a wave of that rate with a phase of its own, in noise."""
    t = np.arange(round(seconds * RATE)) / RATE + rng.random()
    clean = np.stack([np.sin(np.pi * frequency * t) ** 30, np.sin(2 * np.pi * frequency * t)])
    return clean + 0.1 * rng.standard_normal(clean.shape)


def pulses(
    subjects: int = 8, each: int = 3, seconds: float = 2.0
) -> tuple[list[NDArray[np.float64]], list[str], list[float], list[str]]:
    """Windows, classes, rates in Hz and subjects: odd subjects are fast."""
    rng = np.random.default_rng(7)
    windows, labels, rates, who = [], [], [], []
    for subject in range(subjects):
        for _ in range(each):
            rate = rng.uniform(0.8, 1.1) if subject % 2 == 0 else rng.uniform(2.2, 3.0)
            windows.append(pulse(rate, seconds, rng))
            labels.append("slow" if subject % 2 == 0 else "fast")
            rates.append(rate)
            who.append(f"s{subject}")
    return windows, labels, rates, who


def labelled(**arguments: Any) -> LabelledWindows:
    windows, labels, _, who = pulses()
    return LabelledWindows.from_arrays(windows, labels, RATE, subjects=who, **arguments)


def write_table(path: Path, names: list[str], rows: list[list[Any]]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([names, *rows])
    return path
