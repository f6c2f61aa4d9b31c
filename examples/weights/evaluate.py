"""What the example weights are worth, beside the same architecture with random weights.

    python examples/weights/evaluate.py --weights examples/weights/tiny \
        --output bench/results/example-weights.json

Probes: logistic regression on standardised mean-pooled embeddings, five seeds, each with its own random
weights and its own half of the samples to learn from. Everything is held out: simulated signals of
other seeds than the corpus, and whole recordings that were never trained on.
Reconstruction: the decoder's mean squared error under the structured mask on whole held-out
recordings, over that of predicting each window-channel's own mean.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from corpus import ROOT, contaminate, simulated_ecg, simulated_ppg
from numpy.typing import NDArray

from normwear_fast import FastNormWear, scalogram
from normwear_fast.encode.windows import Extractor, Tiling
from normwear_fast.preprocess import prepare_window
from normwear_fast.pretrain import MaskedAutoencoder
from normwear_fast.pretrain.masking import draw_noise
from normwear_fast.recordings import open_recording

HELD_OUT = (
    "examples/cohort/ecg/mitdb_100.hea",
    "tests/data/s0010_re.hea",
    "examples/cohort/ppg/ppg_timer_ms.csv",
    "tests/data/ppg_100hz.csv",
    "examples/cohort/imu/standing_2.npz",
    "examples/cohort/imu/walking_2.npz",
    "examples/cohort/imu/running_2.npz",
    "examples/cohort/imu/badminton_2.npz",
)
"""Recordings never trained on, as a whole."""

NO_CLOCK = {"tests/data/ppg_100hz.csv": 100.0}
"""Hz, of files that do not say."""

QUALITY = HELD_OUT[:4]
"""What the task of signal quality is made from."""

SEED = 1_000_000
"""Of the simulated samples; the corpus has seed 0."""

PER_CLASS = 150
SNR = (0.0, 20.0)
"""dB of signal over noise in simulated samples."""

BEATS = ((50, 75), (75, 100), (100, 130))
"""Beats a minute of the classes of heart rate."""

QUALITY_SNR = 0.0
"""dB in the noisy samples of the task of signal quality."""

SEEDS = range(5)
WINDOW = 6.0


@dataclass(frozen=True)
class Task:
    """Labelled windows.

    Args:
        windows: (n, C, L) float32 at 65 Hz, with the reference preprocessing.
        labels: (n,).
        groups: (n,); samples of one group are learnt from or tested on together.
    """

    windows: NDArray[np.float32]
    labels: NDArray[np.int64]
    groups: NDArray[np.int64]


def at_65_hz(channels: NDArray[np.floating], rate: float, seconds: float) -> NDArray[np.float32]:
    """(C, L) at ``rate`` as the model takes it."""
    raw = [(x, rate, 0.0) for x in channels]
    data = prepare_window(raw, round(seconds * 65), preprocess="reference").data
    assert data is not None
    return data


def _simulated(
    make: Callable[[np.random.Generator, int], NDArray[np.floating]], classes: int
) -> Task:
    """``make(rng, class)`` gives a signal at 125 Hz; each sample is a body of its own."""
    windows, labels = [], []
    for place in range(PER_CLASS * classes):
        rng = np.random.default_rng((SEED, place))
        label = place % classes
        signal = contaminate(make(rng, label), 125, float(rng.uniform(*SNR)), rng)
        start = rng.integers(len(signal) - round(WINDOW * 125) + 1)
        windows.append(at_65_hz(signal[None, start : start + round(WINDOW * 125)], 125, WINDOW))
        labels.append(label)
    return Task(np.stack(windows), np.array(labels), np.arange(len(labels)))


def ecg_rhythm() -> Task:
    """Regular or irregular beats, ECG: a deviation of 1 or 20 beats a minute."""
    return _simulated(
        lambda rng, label: simulated_ecg(
            rng, 125, rng.uniform(60, 110), 10, deviation=(1, 20)[label]
        ),
        2,
    )


def ppg_rhythm() -> Task:
    """Regular or irregular beats, PPG: intervals that vary by 2 or 35 %."""
    return _simulated(
        lambda rng, label: simulated_ppg(
            rng, 125, rng.uniform(60, 110), 10, modulation=0.1, randomness=(0.02, 0.35)[label]
        ),
        2,
    )


def ecg_rate() -> Task:
    """Which of three ranges the heart rate lies in, ECG."""
    return _simulated(
        lambda rng, label: simulated_ecg(rng, 125, rng.uniform(*BEATS[label]), 10, deviation=1), 3
    )


def ppg_rate() -> Task:
    """Which of three ranges the heart rate lies in, PPG."""
    return _simulated(
        lambda rng, label: simulated_ppg(
            rng, 125, rng.uniform(*BEATS[label]), 10, modulation=0.1, randomness=0.02
        ),
        3,
    )


def quality() -> Task:
    """Real ECG and PPG as recorded, or with as much noise as signal added.

    A window and its noisy twin are one group.
    """
    windows, labels, groups = [], [], []
    for place, name in enumerate(QUALITY):
        for start, channels, rate in raw_windows(name):
            for channel, x in enumerate(channels):
                rng = np.random.default_rng((SEED, place, round(start), channel))
                for label, signal in enumerate(
                    (x, contaminate(x - x.mean(), rate, QUALITY_SNR, rng))
                ):
                    windows.append(at_65_hz(signal[None], rate, WINDOW))
                    labels.append(label)
                    groups.append(len(groups) // 2)
    return Task(np.stack(windows), np.array(labels), np.array(groups))


TASKS = {
    "ecg_rhythm": ecg_rhythm,
    "ppg_rhythm": ppg_rhythm,
    "ecg_rate": ecg_rate,
    "ppg_rate": ppg_rate,
    "quality": quality,
}


def raw_windows(name: str) -> list[tuple[float, NDArray[np.float64], float]]:
    """Start, raw samples (C, L) and their rate, of a held-out recording's windows; flat ones are
    left out."""
    found = []
    with open_recording(ROOT / name, sampling_rate=NO_CLOCK.get(name)) as recording:
        channels = list(range(len(recording.channels)))
        extractor = Extractor(recording, channels)
        windows = Tiling.over(recording.duration, WINDOW, WINDOW)
        for window, raw in zip(windows, extractor.extract(windows), strict=True):
            data = np.stack([channel.samples for channel in raw])
            if np.isfinite(data).all() and (np.ptp(data, axis=1) > 0).all():
                found.append((window.start, data, raw[0].rate))
        extractor.close()
    return found


# --- probes ----------------------------------------------------------------------------------------


def embed(model: FastNormWear, windows: NDArray[np.float32]) -> NDArray[np.float32]:
    """(n, C * E): the mean over a channel's tokens, channels one after another."""
    embeddings = model.encode(
        windows, 65.0, pool="mean", channels="concat", show_progress_bar=False
    )
    return np.asarray(embeddings)


def accuracy(
    features: NDArray[np.float32], labels: NDArray[np.int64], train: NDArray[np.bool_]
) -> float:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    probe.fit(features[train], labels[train])
    return float(probe.score(features[~train], labels[~train]))


def halves(task: Task, seed: int) -> NDArray[np.bool_]:
    """Which samples are learnt from: half of the groups."""
    groups = np.unique(task.groups)
    chosen = np.random.default_rng((SEED, seed)).permutation(groups)[: len(groups) // 2]
    return np.isin(task.groups, chosen)


def compare(
    trained: FastNormWear, windows: NDArray[np.float32], score: Callable[[Any, int], float]
) -> dict[str, Any]:
    """Accuracies of the trained and of random weights, a pair a seed."""
    features = embed(trained, windows)
    ours = [score(features, seed) for seed in SEEDS]
    random = []
    for seed in SEEDS:
        model = FastNormWear(True, config=trained.config, seed=seed, precision="float32")
        random.append(score(embed(model, windows), seed))
    difference = np.subtract(ours, random)
    return {
        "samples": len(windows),
        "random": random,
        "random_mean": float(np.mean(random)),
        "trained": ours,
        "trained_mean": float(np.mean(ours)),
        "difference_mean": float(difference.mean()),
        "difference_std": float(difference.std(ddof=1)),
        "in_standard_deviations": float(difference.mean() / difference.std(ddof=1)),
    }


def basic_motions(trained: FastNormWear) -> dict[str, Any]:
    """Four activities on the official test set, whose windows were not trained on."""
    with np.load(ROOT / "tests/data/imu/basic_motions.npz") as file:
        raw = np.concatenate([file["x_train"], file["x_test"]]).astype(float)
        labels = np.concatenate([file["y_train"], file["y_test"]])
        train = np.arange(len(raw)) < len(file["x_train"])
    windows = np.stack([at_65_hz(x, 10.0, 10.0) for x in raw])
    codes = np.unique(labels, return_inverse=True)[1]
    return compare(trained, windows, lambda features, seed: accuracy(features, codes, train))


# --- reconstruction --------------------------------------------------------------------------------


@torch.no_grad()
def reconstruction(model: MaskedAutoencoder, name: str) -> dict[str, float]:
    """Squared errors of a whole recording over those of each window-channel's own mean.

    ``hidden`` counts the samples whose patches were all removed, ``seen`` the others: the structured
    mask removes 26 of 43 patch rows (9 samples each) and 7 of 13 columns of those it keeps.
    """
    config = model.config
    width = config.pretrain_channels
    batch = []
    for _, channels, rate in raw_windows(name):
        data = at_65_hz(channels, rate, WINDOW)[:, 1 : 1 + config.pretrain_samples]
        for first in range(0, len(data), width):
            some = np.minimum(np.arange(first, first + width), len(data) - 1)
            batch.append(data[some])
    x = torch.from_numpy(np.stack(batch))
    generator = torch.Generator().manual_seed(0)
    noise = draw_noise(config, "structured", len(x) * width, generator=generator)
    _, found, mask = model(scalogram(x, "conv"), x, mask="structured", noise=noise)
    error = (found - x).square()
    baseline = (x - x.mean(dim=2, keepdim=True)).square()
    rows = mask.reshape(len(x), width, config.grid_rows, config.grid_columns).amin(dim=3)
    hidden = rows.repeat_interleave(config.patch_size[0], dim=2).bool()
    n = hidden.shape[2]
    error, baseline = error[:, :, :n], baseline[:, :, :n]
    return {
        "windows": len(x),
        "ratio": float(error.sum() / baseline.sum()),
        "ratio_hidden": float(error[hidden].sum() / baseline[hidden].sum()),
        "ratio_seen": float(error[~hidden].sum() / baseline[~hidden].sum()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--tasks", nargs="*", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # NeuroKit2 warns of draws that it moves into its range
    trained = FastNormWear.from_pretrained(args.weights, optimized_cwt=True, precision="float32")
    decoder = MaskedAutoencoder(trained.config)
    decoder.load_state_dict(trained.state_dict())
    decoder.eval()
    result: dict[str, Any] = {"weights": dict(trained.weights), "probes": {}, "reconstruction": {}}
    for name in HELD_OUT:
        result["reconstruction"][name] = found = reconstruction(decoder, name)
        print(name, {key: round(value, 3) for key, value in found.items()}, flush=True)
    for name in args.tasks:
        task = TASKS[name]()
        found = compare(
            trained,
            task.windows,
            lambda features, seed, task=task: accuracy(features, task.labels, halves(task, seed)),
        )
        result["probes"][name] = {"task": TASKS[name].__doc__.split("\n")[0], **found}
        print(name, {k: np.round(v, 3) for k, v in found.items()}, flush=True)
    result["basic_motions"] = basic_motions(trained)
    print("basic_motions", result["basic_motions"])
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
