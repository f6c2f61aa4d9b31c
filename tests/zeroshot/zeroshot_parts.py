"""Small parts for zero-shot tests: sizes, a text encoder without a model, words, labelled motion."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from helpers import BASIC_MOTIONS
from torch import Tensor

from normwear_fast.config import NormWearConfig
from normwear_fast.zeroshot import TaskWording
from normwear_fast.zeroshot.training import LabelledWindows

TINY = NormWearConfig(embed_dim=32, depth=1, num_heads=2, decoder_embed_dim=16, decoder_depth=0)


class LetterEncoder:
    """A text encoder without a model: counts of hashed letter pairs; counts its calls, too."""

    name = "letters"

    def __init__(self, width: int = 24) -> None:
        self.width = width
        self.encoded: list[str] = []

    def encode(self, texts: Sequence[str]) -> Tensor:
        self.encoded += texts
        vectors = torch.zeros(len(texts), self.width)
        for row, text in zip(vectors, texts, strict=True):
            for a, b in itertools.pairwise(text):
                row[(ord(a) * 31 + ord(b)) % self.width] += 0.1
        return vectors


WORDS = [
    "is",
    "the",
    "heart",
    "rhythm",
    "normal",
    "?",
    "person",
    "walking",
    "runs",
    "sitting",
    "still",
    "no",
    "yes",
    "a",
    "abnormal",
]
MOTION = TaskWording(
    ("What is the person doing?", "Which activity is this?", "How does the wearer move?"),
    (
        "The person is {}.",
        "Someone is {}.",
        "The wearer of the watch is {}.",
        "Right now this individual is {}.",
    ),
    {
        "Standing": ("standing still", "not moving", "resting upright", "motionless"),
        "Walking": ("walking", "going for a walk", "strolling along", "taking a walk"),
        "Running": ("running", "jogging fast", "sprinting", "going for a run"),
        "Badminton": (
            "playing badminton",
            "hitting a shuttlecock",
            "swinging a racket",
            "at badminton",
        ),
    },
)


def motion(part: str) -> LabelledWindows:
    """Four seconds of the accelerometer of each window of BasicMotions."""
    with np.load(BASIC_MOTIONS, allow_pickle=False) as arrays:
        data, labels = arrays[f"x_{part}"][:, :3, :40], arrays[f"y_{part}"].tolist()
    return LabelledWindows(list(data), [10.0] * len(data), ["motion"] * len(data), labels)
