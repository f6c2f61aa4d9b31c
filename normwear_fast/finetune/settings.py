"""How a head, and with it the encoder, is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from normwear_fast.errors import UsageError
from normwear_fast.finetune.network import HeadChannels, TokenPool
from normwear_fast.optimization import with_plain_numbers

Mode = Literal["head", "full", "lora"]
MODES: tuple[Mode, ...] = ("head", "full", "lora")

EPOCHS = {"head": 100, "full": 20, "lora": 20}
LEARNING_RATE = {"head": 1e-3, "full": 1e-4, "lora": 5e-4}
"""Defaults of a mode's stage; the head's stage of the other modes has the head's."""


@dataclass(frozen=True)
class FineTuneSettings:
    """How a head, and with it the encoder, is trained.

    Args:
        mode: ``head`` leaves the encoder as it is; ``full`` trains all of it; ``lora`` low-rank
            additions to its matrices, merged into them at the end.
        pool: over a channel's tokens: their ``mean``, or ``cls``.
        channel_pool: ``concat`` channels, or take their ``mean``.
        epochs: passes over the training windows at most; by default the mode's.
        batch_size: windows a step.
        learning_rate: of AdamW, after a linear warm-up, falling along half a cosine; by default the
            mode's.
        weight_decay: of matrices.
        layer_decay: factor of the learning rate from each layer to the one before it, in ``full``.
        lora_rank: of the additions; their scale is 2.
        warm_up: share of the steps.
        patience: epochs without a lower validation loss after which training ends.
        balanced: weight classes by the inverse of their share of the training windows.
        validation: share of the training subjects that validate, where the data do not say.
        seed: of the split, the head, the adapters and the order.
        batch_tokens: tokens of a step held at once; the device's default where None.

    Raises:
        UsageError: a value out of its range.
    """

    mode: Mode = "head"
    pool: TokenPool = "mean"
    channel_pool: HeadChannels = "concat"
    epochs: int | None = None
    batch_size: int = 32
    learning_rate: float | None = None
    weight_decay: float = 0.05
    layer_decay: float = 0.75
    lora_rank: int = 8
    warm_up: float = 0.1
    patience: int = 5
    balanced: bool = False
    validation: float = 0.2
    seed: int = 0
    batch_tokens: int | None = None

    def __post_init__(self) -> None:
        with_plain_numbers(self)
        for name, values in (
            ("mode", MODES),
            ("pool", ("mean", "cls")),
            ("channel_pool", ("concat", "mean")),
        ):
            if getattr(self, name) not in values:
                raise UsageError(
                    f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(values)}"
                )
        for name, fits, right in (
            ("epochs", self.epochs is None or self.epochs >= 1, ">= 1"),
            ("batch_size", self.batch_size >= 1, ">= 1"),
            ("learning_rate", self.learning_rate is None or 0 < self.learning_rate < 10, "> 0"),
            ("weight_decay", 0 <= self.weight_decay < 10, ">= 0"),
            ("layer_decay", 0 < self.layer_decay <= 1, "above 0 and at most 1"),
            ("lora_rank", self.lora_rank >= 1, ">= 1"),
            ("warm_up", 0 <= self.warm_up <= 1, "between 0 and 1"),
            ("patience", self.patience >= 1, ">= 1"),
            ("validation", 0 < self.validation <= 0.5, "above 0 and at most 0.5"),
            ("seed", self.seed >= 0, ">= 0"),
            ("batch_tokens", self.batch_tokens is None or self.batch_tokens >= 1, ">= 1"),
        ):
            if not fits:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be {right}")
