"""What decides the weights a pretraining run ends in, how it is carried out, and what it came to."""

from __future__ import annotations

import math
from dataclasses import dataclass

from normwear_fast.errors import UsageError
from normwear_fast.optimization import rate_factor, with_plain_numbers
from normwear_fast.pretrain.masking import SCHEMES

PUBLISHED_BATCH = 256
"""Windows of a step the base learning rate is for."""

PRECISIONS = ("float32", "bfloat16")

AVERAGED = 20
"""Steps whose losses are averaged for what is said of a run; `steps.csv` has each."""


@dataclass(frozen=True)
class PretrainSettings:
    """What decides the weights a run ends in; a resumed run must agree in all of it.

    Args:
        steps: of the optimiser, over the whole run.
        batch_size: windows of a micro-batch, on one device.
        accumulate: micro-batches of a step, on one device.
        mask: ``random`` or ``structured``, the better one in the paper.
        mixup: whether a share of the series is mixed from two, as published.
        base_learning_rate: of AdamW for 256 windows a step; scaled with the windows.
        warmup: steps of linear warm-up; None is a tenth of ``steps``. Then half a cosine, to zero.
        weight_decay: of AdamW, for weights of two or more dimensions; biases, norms and tokens have none.
        clip: largest norm of a step's gradient.
        precision: ``float32``, or ``bfloat16`` autocast with float32 weights.
        seed: of initial weights, order, mixing and masks.
    """

    steps: int = 45_000
    batch_size: int = 64
    accumulate: int = 4
    mask: str = "structured"
    mixup: bool = True
    base_learning_rate: float = 1e-3
    warmup: int | None = None
    weight_decay: float = 0.05
    clip: float = 1.0
    precision: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        with_plain_numbers(self)
        for name, fits, right in (
            ("steps", self.steps >= 1, ">= 1"),
            ("batch_size", self.batch_size >= 1, ">= 1"),
            ("accumulate", self.accumulate >= 1, ">= 1"),
            ("mask", self.mask in SCHEMES, "random or structured"),
            ("base_learning_rate", 0 < self.base_learning_rate < math.inf, "> 0"),
            ("warmup", self.warmup is None or 0 <= self.warmup <= self.steps, "in 0..steps"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, ">= 0"),
            ("clip", self.clip > 0, "> 0"),
            ("precision", self.precision in PRECISIONS, "float32 or bfloat16"),
            ("seed", 0 <= self.seed < 2**63, "in 0..2^63-1"),
        ):
            if not fits:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be {right}")

    def learning_rate(self, step: int, windows: int) -> float:
        """Of step ``step``, counted from 0, with ``windows`` windows a step."""
        peak = self.base_learning_rate * windows / PUBLISHED_BATCH
        warmup = self.steps // 10 if self.warmup is None else self.warmup
        return peak * rate_factor(step, self.steps, warmup)


@dataclass(frozen=True)
class RunSettings:
    """How a run is carried out; may change when it goes on.

    Args:
        accelerator, devices, strategy: as of `lightning_fabric.Fabric`.
        compile: whether torch.compile makes the encoder and decoder.
        checkpoint_every, picture_every, probe_every: steps; 0 for never. A checkpoint is also written at
            the end and on Ctrl-C.
    """

    accelerator: str = "auto"
    devices: int | str = "auto"
    strategy: str = "auto"
    compile: bool = False
    checkpoint_every: int = 200
    picture_every: int = 500
    probe_every: int = 1000

    def __post_init__(self) -> None:
        with_plain_numbers(self)
        for name in ("checkpoint_every", "picture_every", "probe_every"):
            if getattr(self, name) < 0:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be >= 0 (0: never)")


@dataclass(frozen=True)
class PretrainReport:
    """What a run came to.

    Args:
        step: steps done.
        steps: steps asked for.
        loss: mean of the last :data:`AVERAGED` steps with a finite one.
        skipped: steps without a finite loss and gradient, which changed nothing.
        windows_per_second: over this call's steps, pictures and probes included.
    """

    step: int
    steps: int
    loss: float
    skipped: int
    windows_per_second: float
