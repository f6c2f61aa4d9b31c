"""Everything the user chooses that decides the rows of an encode run."""

from __future__ import annotations

import csv
import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from normwear_fast.config import MIN_SAMPLES, SAMPLING_RATE
from normwear_fast.errors import UsageError

CHOICES: dict[str, tuple[str, ...]] = {
    "normalize": ("none", "window", "recording"),
    "preprocess": ("reference", "none"),
    "pool": ("mean", "cls", "patch"),
    "channel_pool": ("keep", "mean", "concat"),
    "scalogram": ("conv", "scipy"),
}
"""Allowed values, the default first."""

REUSED = ("batch_tokens", "unit_tokens")
"""Settings a resumed run takes over from the run it goes on with, rather than compares."""


@dataclass(frozen=True)
class EncodeSettings:
    """What decides the rows of a run; two runs with equal settings, weights and inputs agree.

    Args:
        window: seconds of a window; None where a list of windows is given.
        hop: seconds from one window's start to the next; ``window`` by default.
        windows: digest of the list of windows, None for tiling.
        channels: names to take, in this order; None for all of a recording.
        normalize: ``none``, or to zero mean and unit deviation per ``window`` or per ``recording``.
        preprocess: ``reference`` is how the pretraining data were made; ``none`` only resamples.
        pool: over a channel's tokens: their ``mean``, ``cls``, or ``patch`` for all of them (to Zarr).
        channel_pool: ``keep`` channels apart, ``mean`` over them, or ``concat`` them.
        precision: as `FastNormWear` takes it.
        scalogram: ``conv`` is the one pretraining used, ``scipy`` the other released one.
        max_missing: largest fraction of missing samples a window's channel may have.
        rate: Hz, for recordings whose format has no clock.
        batch_tokens: tokens of a micro-batch; the device's default where None.
        unit_tokens: tokens of a work unit; the device's default where None.

    Raises:
        UsageError: a value out of its range, or values that contradict each other.
    """

    window: float | None = 6.0
    hop: float | None = None
    windows: str | None = None
    channels: tuple[str, ...] | None = None
    normalize: str = "none"
    preprocess: str = "reference"
    pool: str = "mean"
    channel_pool: str = "keep"
    precision: str = "auto"
    scalogram: str = "conv"
    max_missing: float = 0.1
    rate: float | None = None
    batch_tokens: int | None = None
    unit_tokens: int | None = None

    def __post_init__(self) -> None:
        for name, values in CHOICES.items():
            if getattr(self, name) not in values:
                raise UsageError(
                    f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(values)}"
                )
        if self.windows is not None:
            object.__setattr__(self, "window", None)
            object.__setattr__(self, "hop", None)
        else:
            check_duration(self.window, "window")
            if self.hop is None:
                object.__setattr__(self, "hop", self.window)
            if not (isinstance(self.hop, int | float) and 0 < self.hop < math.inf):
                raise UsageError(f"hop is {self.hop} s; it must be above 0")
        if self.channels is not None:
            object.__setattr__(self, "channels", tuple(self.channels))
            if not self.channels or len(set(self.channels)) != len(self.channels):
                raise UsageError(
                    f"channels are {join_names(self.channels) or 'empty'}; name each wanted one once"
                )
        if not 0 <= self.max_missing <= 1:
            raise UsageError(f"max_missing is {self.max_missing}; it must be between 0 and 1")
        if self.rate is not None and not 0 < self.rate < math.inf:
            raise UsageError(f"rate is {self.rate} Hz; it must be above 0")
        if self.pool == "patch" and self.channel_pool != "keep":
            raise UsageError(
                f"channel_pool {self.channel_pool!r} pools what pool 'patch' keeps: choose channel_pool "
                "'keep' with it"
            )
        if self.normalize == "recording" and self.preprocess == "reference":
            raise UsageError(
                "normalize 'recording' has no effect under preprocess 'reference', which removes each "
                "window's own offset and scale; choose preprocess 'none' with it"
            )

    @property
    def optimized_cwt(self) -> bool:
        """The scalogram as upstream's flag."""
        return self.scalogram == "conv"

    def to_dict(self) -> dict[str, Any]:
        values = dataclasses.asdict(self)
        if self.channels is not None:
            values["channels"] = list(self.channels)
        return values


def split_names(text: str) -> tuple[str, ...]:
    """The names in a list with commas between them; one with a comma in double quotes, as CSV has it."""
    try:
        row = next(csv.reader([text], skipinitialspace=True, strict=True), [])
    except csv.Error as error:
        raise UsageError(
            f"{text} is no list of channels ({error}); names between commas are right, one with a comma "
            """in double quotes, as '"ECG, lead I",PPG'"""
        ) from None
    return tuple(name.strip() for name in row if name.strip())


def join_names(names: Iterable[str]) -> str:
    """Names as `split_names` takes them, to be copied from a line that lists them."""
    return ", ".join(
        '"' + name.replace('"', '""') + '"' if "," in name or '"' in name else name
        for name in names
    )


def window_samples(duration: float) -> int:
    """Samples at the model's rate of a window of ``duration`` seconds."""
    return round(duration * SAMPLING_RATE)


def check_duration(duration: float | None, what: str) -> None:
    """A UsageError that names ``what`` unless the model can take a window of ``duration`` seconds."""
    if not isinstance(duration, int | float) or not 0 < duration * SAMPLING_RATE < math.inf:
        raise UsageError(f"{what} is {duration} s; it must be above 0")
    if window_samples(duration) < MIN_SAMPLES:
        raise UsageError(
            f"{what} of {duration:g} s is {window_samples(duration)} samples at {SAMPLING_RATE:g} Hz; "
            f"{MIN_SAMPLES} ({MIN_SAMPLES / SAMPLING_RATE:.2f} s) are needed"
        )
