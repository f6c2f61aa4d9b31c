"""NumPy windows to NormWear embeddings: any lengths, channel counts and sampling rates in one call.

    python examples/embed_arrays.py

Needs nothing beyond the package.
"""

import sys
from pathlib import Path

import numpy as np

from normwear_fast import FastNormWear, NormWearError, preprocess

EXAMPLES = Path(__file__).resolve().parent


def main() -> None:
    # Small weights of our own; for research give the published checkpoint, which has E = 768.
    model = FastNormWear.from_pretrained(EXAMPLES / "weights" / "tiny")

    # A window is (channels, samples). These two share neither channels, length nor sampling rate.
    with np.load(EXAMPLES / "cohort" / "imu" / "walking_2.npz") as recording:
        imu, imu_rate = recording["data"], float(recording["sampling_rate"])  # 10 s at 10 Hz
    table = EXAMPLES / "cohort" / "ppg" / "ppg_timer_ms.csv"
    timer_ms, ppg = np.loadtxt(table, delimiter=",", skiprows=1, unpack=True)
    ppg_rate = 1000 / np.diff(timer_ms).mean()  # 117 Hz
    windows, rates = [imu, ppg[None, : round(6 * ppg_rate)]], [imu_rate, ppg_rate]
    print("windows (C, L):", *(window.shape for window in windows))

    # As the pretraining data were made: 65 Hz, detrended, smoothed, scaled. `normwear-fast encode` does
    # the same to each window, with as many samples as its duration has at 65 Hz.
    prepared = [
        preprocess(window, rate, samples=round(65 * window.shape[1] / rate))
        for window, rate in zip(windows, rates, strict=True)
    ]
    pooled = model.encode(prepared, sampling_rate=65, channels="mean")
    print("channels='mean' (B, E):", pooled.shape)
    kept = model.encode(prepared, sampling_rate=65, channels="keep")  # a list: the shapes differ
    print("channels='keep' (C, E):", *(embedding.shape for embedding in kept))
    tokens = model.encode(prepared, sampling_rate=65, pool="patch")  # [CLS] first, then the patches
    print("pool='patch' (C, T, E):", *(embedding.shape for embedding in tokens))

    # `encode` alone resamples and nothing else: right for signals that were prepared elsewhere. Raw
    # counts keep their offset (this PPG's is near 500) and land far from what the model has seen.
    raw = model.encode(windows, sampling_rate=rates, channels="mean")
    norms = np.linalg.norm(raw, axis=1) * np.linalg.norm(pooled, axis=1)
    cosine = (raw * pooled).sum(axis=1) / norms
    print(f"cosine of raw and prepared: IMU {cosine[0]:.2f}, PPG {cosine[1]:.2f}")


if __name__ == "__main__":
    try:
        main()
    except NormWearError as error:
        sys.exit(f"error: {error}")
