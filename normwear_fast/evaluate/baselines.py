"""What turns windows into features: NormWear, statistics, the raw series, other published models.

Every one is an `Embedder`: (C, L) windows to (n, C, F) float32, channel by channel, so that probes
concatenate or shuffle the channels of all of them alike. `embeddings` caches their output.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from normwear_fast.errors import (
    InputError,
    OutputError,
    UsageError,
    WeightsError,
    reading,
)
from normwear_fast.evaluate.samples import SampleSet
from normwear_fast.files import replacing

if TYPE_CHECKING:
    from normwear_fast.model import FastNormWear

Windows = Sequence[NDArray[np.float32]]

CACHE_VERSION = 2

# Floats of one stacked block of equal windows: 64 MB of float64.
_BLOCK = 8_000_000


class Embedder(Protocol):
    """A model or rule that maps windows to features.

    Attributes:
        name: what results are reported under.
    """

    name: str

    def identity(self) -> dict[str, Any]:
        """All that decides the features besides the windows: weights, settings, versions."""
        ...

    def embed(self, windows: Windows, rates: NDArray[np.float64]) -> NDArray[np.float32]:
        """Features (n, C, F) of n windows (C, L) at `rates` (n,) Hz."""
        ...


def _groups(windows: Windows, rates: NDArray[np.float64]) -> Iterator[tuple[list[int], float]]:
    """Indices of windows of one shape and rate, in blocks of bounded size, with the rate."""
    groups: dict[tuple[tuple[int, ...], float], list[int]] = {}
    for index, (window, rate) in enumerate(zip(windows, rates.tolist(), strict=True)):
        groups.setdefault((window.shape, rate), []).append(index)
    for (shape, rate), indices in groups.items():
        step = max(1, _BLOCK // int(np.prod(shape)))
        for start in range(0, len(indices), step):
            yield indices[start : start + step], rate


def check_channels(samples: SampleSet) -> None:
    """Raise if the samples differ in their number of channels: features could not be stacked."""
    for window, name in zip(samples.windows, samples.ids, strict=True):
        if len(window) != samples.channels:
            raise InputError(
                f"{samples.name}: {name} has {len(window)} channels, {samples.ids[0]} has "
                f"{samples.channels}; one number of channels for all samples is right"
            )


def at_model_rate(
    windows: Windows, rates: NDArray[np.float64], target_rate: float
) -> list[NDArray[np.float32]]:
    """The windows band-limited to `target_rate`, Hz; those already there are passed on."""
    from normwear_fast.preprocess import fill_missing, resample_window

    found: list[NDArray[np.float32]] = list(windows)
    for indices, rate in _groups(windows, rates):
        if rate == target_rate:
            continue
        block = np.stack([windows[index] for index in indices])
        samples = max(1, round(block.shape[-1] / rate * target_rate))
        filled = np.nan_to_num(fill_missing(block)[0])
        resampled = resample_window(filled, rate, samples, target_rate=target_rate)
        for index, window in zip(indices, resampled.astype(np.float32), strict=True):
            found[index] = window
    return found


# -- NormWear --------------------------------------------------------------------------------------


@dataclass
class NormWear:
    """The published evaluation's features: the mean over all tokens of each channel (E,).

    Args:
        model: with released weights, or random ones as a baseline.
        name: "normwear", or "random" for a model without weights.
    """

    model: FastNormWear
    name: str = "normwear"

    def identity(self) -> dict[str, Any]:
        about = self.model.provenance()
        weights = dict(about.pop("weights"))
        if "sha256" in weights:
            weights.pop("source", None)  # the same weights from another place are the same weights
        return {"model": "normwear", "pool": "mean", "weights": weights, **about}

    def embed(self, windows: Windows, rates: NDArray[np.float64]) -> NDArray[np.float32]:
        found = self.model.encode(
            list(windows), rates.tolist(), pool="mean", channels="keep", missing="interpolate"
        )
        return np.asarray(found, dtype=np.float32)


def random_normwear(*, small: bool = False, seed: int = 0) -> NormWear:
    """NormWear with random, seeded weights, of the released size or the small one."""
    from normwear_fast.config import NormWearConfig
    from normwear_fast.model import FastNormWear

    config = NormWearConfig.small() if small else NormWearConfig.base()
    model = FastNormWear(optimized_cwt=True, config=config, seed=seed)
    return NormWear(model, name="random-small" if small else "random")


# -- built in --------------------------------------------------------------------------------------

STATISTICS = (
    *("mean", "std", "max", "min", "skewness", "kurtosis", "quantile_25", "median", "quantile_75"),
    *("spectral_centroid", "spectral_spread", "mean_frequency", "peak_frequency"),
    *("spectral_quantile_25", "spectral_median", "spectral_quantile_75"),
)


def channel_statistics(x: NDArray[np.floating], sampling_rate: float) -> NDArray[np.float64]:
    """The paper's 16 statistics of each channel, signed log.

    Nine of the values: mean, standard deviation, maximum, minimum, skewness, excess kurtosis and
    three quartiles. Seven of the magnitudes of the spectrum's first L // 2 bins, as published, the mean
    level included: centroid and spread, mean of the bins' frequencies, the peak's frequency, and where
    a quarter, half and three quarters of the magnitude lie, Hz. Then sign(f) log(1 + |f|); a
    statistic that a constant channel lacks is 0.

    Args:
        x: (..., L), L >= 2.
        sampling_rate: Hz.

    Returns:
        (..., 16) in the order of `STATISTICS`.
    """
    x = np.asarray(x, dtype=np.float64)
    length = x.shape[-1]
    if length < 2:
        raise InputError(f"a channel of {length} samples has no statistics; two or more are right")
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        mean = x.mean(axis=-1)
        centred = x - mean[..., None]
        variance = (centred**2).mean(axis=-1)
        # Below this, a constant channel's rounding errors would pass for a shape.
        flat = variance <= (np.finfo(np.float64).eps * np.abs(mean)) ** 2
        safe = np.where(flat, np.nan, variance)
        skewness = (centred**3).mean(axis=-1) / safe**1.5
        kurtosis = (centred**4).mean(axis=-1) / safe**2 - 3
        low, middle, high = np.quantile(x, [0.25, 0.5, 0.75], axis=-1)
        values = [mean, np.sqrt(variance), x.max(axis=-1), x.min(axis=-1), skewness, kurtosis]
        values += [low, middle, high]

        bins = length // 2
        magnitude = np.abs(np.fft.rfft(x, axis=-1))[..., :bins]
        frequency = np.arange(bins) * (sampling_rate / length)
        share = magnitude / magnitude.sum(axis=-1, keepdims=True)
        centroid = share @ frequency
        spread = np.sqrt((share * (frequency - centroid[..., None]) ** 2).sum(axis=-1))
        peak = frequency[magnitude.argmax(axis=-1)]
        cumulative = share.cumsum(axis=-1)
        values += [centroid, spread, np.full(mean.shape, frequency.mean()), peak]
        for quantile in (0.25, 0.5, 0.75):
            below = (cumulative < quantile).sum(axis=-1)
            values.append(frequency[np.minimum(below, bins - 1)])
        features = np.stack(values, axis=-1)
        return np.nan_to_num(np.sign(features) * np.log1p(np.abs(features)))


@dataclass
class Statistics:
    """The paper's interpretable baseline: 16 statistics a channel."""

    name: str = "statistics"

    def identity(self) -> dict[str, Any]:
        return {"model": "statistics", "statistics": list(STATISTICS)}

    def embed(self, windows: Windows, rates: NDArray[np.float64]) -> NDArray[np.float32]:
        features = np.empty((len(windows), len(windows[0]), len(STATISTICS)), np.float32)
        for indices, rate in _groups(windows, rates):
            block = np.stack([windows[index] for index in indices])
            features[indices] = channel_statistics(block, rate)
        return features


@dataclass
class Raw:
    """The series themselves: every sample of a channel is a feature."""

    name: str = "raw"

    def identity(self) -> dict[str, Any]:
        return {"model": "raw"}

    def embed(self, windows: Windows, rates: NDArray[np.float64]) -> NDArray[np.float32]:
        lengths = {window.shape[1] for window in windows}
        if len(lengths) != 1:
            raise InputError(
                f"the raw series as features need windows of one length; found {sorted(lengths)[:5]}"
            )
        return np.stack(list(windows)).astype(np.float32, copy=False)


# -- other published models, through their own packages --------------------------------------------


def _missing(package: str, install: str) -> UsageError:
    return UsageError(f"this baseline needs the package {package}; pip install {install}")


def _in_blocks(
    windows: Windows, rates: NDArray[np.float64], run: Callable[[NDArray[np.float32]], Any]
) -> NDArray[np.float32]:
    """Features of `run`, channels (m, L) to (m, F), over windows grouped by length."""
    features: NDArray[np.float32] | None = None
    channels = len(windows[0])
    for indices, _ in _groups(windows, rates):
        for start in range(0, len(indices), 32):
            part = indices[start : start + 32]
            series = np.concatenate([windows[index] for index in part])
            found = np.asarray(run(series), dtype=np.float32)
            if features is None:
                features = np.empty((len(windows), channels, found.shape[-1]), np.float32)
            features[part] = found.reshape(len(part), channels, -1)
    assert features is not None  # a sample set is never empty
    return features


@dataclass
class Chronos:
    """Chronos T5: the representation of the last token, the one forecasting starts from.

    Args:
        model: id or folder of a chronos-forecasting T5 model.
        device: where it runs.
    """

    model: str = "amazon/chronos-t5-large"
    device: str = "cpu"
    name: str = "chronos"
    _pipeline: Any = field(default=None, repr=False)

    def identity(self) -> dict[str, Any]:
        return {"model": "chronos", "weights": self.model}

    def embed(self, windows: Windows, rates: NDArray[np.float64]) -> NDArray[np.float32]:
        try:
            from chronos import ChronosPipeline  # type: ignore[import-not-found]
        except ImportError:
            raise _missing("chronos", "chronos-forecasting") from None
        import torch

        if self._pipeline is None:
            with reading(self.model, WeightsError, "cannot be loaded"):
                self._pipeline = ChronosPipeline.from_pretrained(self.model, device_map=self.device)

        def run(series: NDArray[np.float32]) -> Any:
            with torch.inference_mode():
                hidden, _ = self._pipeline.embed(torch.from_numpy(series))
            return hidden[:, -1].float().cpu().numpy()

        return _in_blocks(windows, rates, run)


@dataclass
class Moment:
    """MOMENT's embedding of a channel; its context is 512 samples, shorter series padded left.

    Longer series keep their last 512 samples.
    """

    model: str = "AutonLab/MOMENT-1-large"
    device: str = "cpu"
    name: str = "moment"
    _pipeline: Any = field(default=None, repr=False)

    CONTEXT = 512

    def identity(self) -> dict[str, Any]:
        return {"model": "moment", "weights": self.model}

    def embed(self, windows: Windows, rates: NDArray[np.float64]) -> NDArray[np.float32]:
        try:
            from momentfm import MOMENTPipeline  # type: ignore[import-not-found]
        except ImportError:
            raise _missing("momentfm", "momentfm") from None
        import torch

        if self._pipeline is None:
            with reading(self.model, WeightsError, "cannot be loaded"):
                pipeline = MOMENTPipeline.from_pretrained(
                    self.model, model_kwargs={"task_name": "embedding"}
                )
                pipeline.init()
            self._pipeline = pipeline.to(self.device).eval()

        def run(series: NDArray[np.float32]) -> Any:
            length = min(series.shape[1], self.CONTEXT)
            padded = np.zeros((len(series), 1, self.CONTEXT), np.float32)
            padded[:, 0, self.CONTEXT - length :] = series[:, series.shape[1] - length :]
            mask = np.zeros((len(series), self.CONTEXT), np.float32)
            mask[:, self.CONTEXT - length :] = 1
            with torch.inference_mode():
                out = self._pipeline(
                    x_enc=torch.from_numpy(padded).to(self.device),
                    input_mask=torch.from_numpy(mask).to(self.device),
                )
            return out.embeddings.float().cpu().numpy()

        return _in_blocks(windows, rates, run)


@dataclass
class Clap:
    """CLAP's audio embedding (512) of a channel brought to 48 kHz, through transformers."""

    model: str = "laion/clap-htsat-fused"
    device: str = "cpu"
    name: str = "clap"
    _loaded: Any = field(default=None, repr=False)

    SAMPLING_RATE = 48_000

    def identity(self) -> dict[str, Any]:
        return {"model": "clap", "weights": self.model}

    def embed(self, windows: Windows, rates: NDArray[np.float64]) -> NDArray[np.float32]:
        try:
            from transformers import ClapAudioModelWithProjection, ClapFeatureExtractor
        except ImportError:
            raise _missing("transformers", "'normwear-fast[zeroshot]'") from None
        import torch

        if self._loaded is None:
            with reading(self.model, WeightsError, "cannot be loaded"):
                loaded: Any = ClapAudioModelWithProjection.from_pretrained(self.model)
                extractor = ClapFeatureExtractor.from_pretrained(self.model)
            self._loaded = loaded.to(self.device).eval(), extractor
        model, extractor = self._loaded
        rate = self.SAMPLING_RATE

        features: list[NDArray[np.float32]] = []
        for window, own in zip(windows, rates, strict=True):
            # One window at a time: 6 s at 48 kHz are 288,000 samples a channel.
            (audio,) = at_model_rate([window], np.array([own]), rate)
            inputs = extractor(list(audio), sampling_rate=rate, return_tensors="pt")
            with torch.inference_mode():
                out = model(**{name: value.to(self.device) for name, value in inputs.items()})
            features.append(out.audio_embeds.float().cpu().numpy())
        return np.stack(features)


BASELINES: dict[str, Callable[[], Embedder]] = {
    "statistics": Statistics,
    "raw": Raw,
    "chronos": Chronos,
    "moment": Moment,
    "clap": Clap,
}


# -- the cache -------------------------------------------------------------------------------------


def default_cache() -> Path:
    """Where features are kept: under XDG_CACHE_HOME, else ~/.cache."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "normwear-fast" / "features"


def embeddings(
    samples: SampleSet, embedder: Embedder, cache: Path | None = None
) -> NDArray[np.float32]:
    """Features (n, C, F) of all samples, computed once for an embedder and its data.

    Args:
        cache: folder; the file's name is a hash of the embedder's identity (weights' SHA-256 and
            settings) and of the windows. None: nothing is kept.

    Raises:
        InputError: samples of different channel counts, or an infinite feature.
        OutputError: the cache cannot be written.
    """
    check_channels(samples)
    path = None
    if cache is not None:
        key = {
            "version": CACHE_VERSION,
            "embedder": embedder.identity(),
            "data": samples.fingerprint(),
        }
        text = json.dumps(key, sort_keys=True, default=str)
        digest = hashlib.sha256(text.encode()).hexdigest()
        path = cache / f"{embedder.name}-{digest[:40]}.npy"
        found = _read_cache(path, len(samples), samples.channels)
        if found is not None:
            return found
    features = embedder.embed(samples.windows, samples.sampling_rates)
    if features.shape[:2] != (len(samples), samples.channels) or features.ndim != 3:
        raise InputError(
            f"{embedder.name}: features of shape {features.shape} for {len(samples)} samples of "
            f"{samples.channels} channels"
        )
    features = np.ascontiguousarray(features, dtype=np.float32)
    if path is not None:
        _write_cache(path, features)
    return features


def _read_cache(path: Path, samples: int, channels: int) -> NDArray[np.float32] | None:
    try:
        with path.open("rb") as file:
            found = np.lib.format.read_array(file, allow_pickle=False)
            checksum = file.read(5)
    except Exception:  # absent, or damaged in whatever way: computed again and replaced
        return None
    if found.dtype != np.float32 or found.ndim != 3 or found.shape[:2] != (samples, channels):
        return None
    return found if checksum == _checksum(found) else None


def _checksum(features: NDArray[np.float32]) -> bytes:
    """What follows the array in a cached file: a bit that has changed would change results."""
    return zlib.crc32(np.ascontiguousarray(features).data).to_bytes(4, "little")


def _write_cache(path: Path, features: NDArray[np.float32]) -> None:
    try:
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.save(file, features, allow_pickle=False)
            file.write(_checksum(features))
    except OutputError as error:
        raise OutputError(
            f"{error}: features cannot be kept there; give --cache another folder, or --no-cache"
        ) from None
