"""The recordings the example weights are trained on, beside the real ones that this project holds.

    python examples/weights/corpus.py OUTPUT --seed 0

writes NeuroKit2's simulated ECG, PPG, EDA and RSP as NPZ recordings into OUTPUT/simulated, and the
training windows of BasicMotions, without those that the example cohort holds out, into OUTPUT/imu.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[2]

SECONDS = 60
"""Of a simulated recording: ten windows."""

RECORDINGS = {"ecg": 160, "ecg_leads": 40, "ppg": 200, "eda": 100, "rsp": 100, "wearable": 140}

Signal = NDArray[np.float64]


def contaminate(x: Signal, sampling_rate: float, snr: float, rng: np.random.Generator) -> Signal:
    """``x`` (L,) with a random mixture of noises of wearables, ``snr`` dB below its own power.

    White noise, slow wander, bursts of movement at 1 to 8 Hz, and mains hum where the rate holds it.
    """
    time = np.arange(len(x)) / sampling_rate
    white = rng.standard_normal(len(x))
    wander = sum(
        rng.uniform(0.3, 1) * np.sin(2 * np.pi * (rng.uniform(0.05, 0.5) * time + rng.random()))
        for _ in range(3)
    )
    movement = np.zeros(len(x))
    for _ in range(rng.integers(1, 6)):
        centre, width = rng.uniform(0, time[-1]), rng.uniform(0.3, 2)
        tone = np.sin(2 * np.pi * (rng.uniform(1, 8) * time + rng.random()))
        movement += rng.uniform(1, 3) * tone * np.exp(-0.5 * ((time - centre) / width) ** 2)
    hum = np.sin(2 * np.pi * rng.choice([50, 60]) * time)
    sources = [white, wander, movement, *([hum] if sampling_rate > 120 else [])]
    weights = rng.dirichlet(np.full(len(sources), 0.5))
    noise = sum(w * s / s.std() for w, s in zip(weights, sources, strict=True))
    return x + noise * (x.std() * 10 ** (-snr / 20) / np.std(noise))


def simulated_ecg(
    rng: np.random.Generator, rate: int, heart_rate: float, seconds: int, *, deviation: float
) -> Signal:
    """One lead; ``deviation`` of the heart rate in beats a minute."""
    import neurokit2

    return np.asarray(
        neurokit2.ecg_simulate(
            duration=seconds,
            sampling_rate=rate,
            noise=0,
            heart_rate=heart_rate,
            heart_rate_std=deviation,
            random_state=int(rng.integers(2**31)),
        )
    )


def simulated_ppg(
    rng: np.random.Generator,
    rate: int,
    heart_rate: float,
    seconds: int,
    *,
    modulation: float,
    randomness: float,
) -> Signal:
    """``modulation`` of the heart rate by breathing, and ``randomness`` of the intervals between
    beats, as parts of them."""
    import neurokit2

    return np.asarray(
        neurokit2.ppg_simulate(
            duration=seconds,
            sampling_rate=rate,
            heart_rate=heart_rate,
            frequency_modulation=modulation,
            ibi_randomness=randomness,
            drift=float(rng.uniform(0, 0.5)),
            motion_amplitude=float(rng.choice([0, 0.1, 0.4])),
            powerline_amplitude=0,
            random_state=int(rng.integers(2**31)),
        )
    )


def _ecg(rng: np.random.Generator, rate: int, heart_rate: float) -> Signal:
    deviation = float(rng.choice([1, 3, 8, 15]))
    return simulated_ecg(rng, rate, heart_rate, SECONDS, deviation=deviation)


def _ppg(rng: np.random.Generator, rate: int, heart_rate: float) -> Signal:
    modulation, randomness = float(rng.uniform(0.05, 0.4)), float(rng.choice([0.02, 0.1, 0.3]))
    return simulated_ppg(
        rng, rate, heart_rate, SECONDS, modulation=modulation, randomness=randomness
    )


def _eda(rng: np.random.Generator, rate: int) -> Signal:
    import neurokit2

    return np.asarray(
        neurokit2.eda_simulate(
            duration=SECONDS,
            sampling_rate=rate,
            noise=0,
            scr_number=int(rng.integers(2, 14)),
            drift=float(rng.uniform(-0.02, 0.02)),
            random_state=int(rng.integers(2**31)),
        )
    )


def _rsp(rng: np.random.Generator, rate: int) -> Signal:
    import neurokit2

    return np.asarray(
        neurokit2.rsp_simulate(
            duration=SECONDS,
            sampling_rate=rate,
            noise=0,
            respiratory_rate=float(rng.uniform(7, 32)),
            method=str(rng.choice(["breathmetrics", "sinusoidal"])),
            random_state=int(rng.integers(2**31)),
        )
    )


def _leads(rng: np.random.Generator, rate: int, heart_rate: float) -> dict[str, Signal]:
    import neurokit2

    table = neurokit2.ecg_simulate(
        duration=SECONDS,
        sampling_rate=rate,
        noise=0,
        heart_rate=heart_rate,
        heart_rate_std=float(rng.choice([1, 3, 8])),
        method="multileads",
        random_state=int(rng.integers(2**31)),
    )
    return {name: table[name].to_numpy() for name in table}


def simulate(kind: str, seed: tuple[int, ...]) -> tuple[dict[str, Signal], int]:
    """One recording: its channels, (L,) each, and their rate in Hz."""
    rng = np.random.default_rng(seed)
    heart_rate = float(rng.uniform(45, 150))
    rates = {
        "ecg": (125, 250, 360),
        "ecg_leads": (250,),
        "ppg": (32, 64, 100, 125),
        "eda": (4, 8, 32),
        "rsp": (25, 50, 100),
        "wearable": (64, 125),
    }
    rate = int(rng.choice(rates[kind]))
    single: dict[str, Callable[[], Signal]] = {
        "ecg": lambda: _ecg(rng, rate, heart_rate),
        "ppg": lambda: _ppg(rng, rate, heart_rate),
        "eda": lambda: _eda(rng, rate),
        "rsp": lambda: _rsp(rng, rate),
    }
    if kind == "ecg_leads":
        channels = _leads(rng, rate, heart_rate)
    elif kind == "wearable":  # a device's channels of one body, in any number and order
        names = rng.permutation(list(single))[: rng.integers(2, 5)]
        channels = {str(name): single[str(name)]() for name in names}
    else:
        channels = {kind: single[kind]()}
    for name, signal in channels.items():
        if rng.random() < 0.6:
            channels[name] = contaminate(signal, rate, float(rng.uniform(-3, 30)), rng)
    return channels, rate


def write_recording(path: Path, channels: dict[str, Signal], rate: float) -> None:
    samples = min(map(len, channels.values()))  # NeuroKit2's EDA may have a few more than asked for
    data = np.stack([x[:samples] for x in channels.values()]).astype(np.float32)
    np.savez(path, data=data, sampling_rate=float(rate), channels=np.array(list(channels)))


def _write_simulated(path: Path, kind: str, seed: tuple[int, ...]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NeuroKit2 warns of draws that it moves into its range
        channels, rate = simulate(kind, seed)
    write_recording(path, channels, rate)


def write_motions(output: Path) -> None:
    """BasicMotions' training windows, without the second of each activity, which the example cohort
    has and evaluation holds out."""
    with np.load(ROOT / "tests/data/imu/basic_motions.npz") as file:
        data, labels = file["x_train"], file["y_train"]
        rate, names = float(file["sampling_rate"]), [str(name) for name in file["channels"]]
    output.mkdir(parents=True, exist_ok=True)
    for label in np.unique(labels):
        for place, row in enumerate(np.flatnonzero(labels == label)):
            if place != 1:
                channels = dict(zip(names, data[row].astype(float), strict=True))
                write_recording(output / f"{label.lower()}_{place + 1}.npz", channels, rate)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--share", type=float, default=1.0, help="of the recordings (1)")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    folder = args.output / "simulated"
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [
        (folder / f"{kind}_{place:03d}.npz", kind, (args.seed, order, place))
        for order, (kind, count) in enumerate(RECORDINGS.items())
        for place in range(round(count * args.share))
    ]
    with ProcessPoolExecutor(args.workers) as pool:
        list(pool.map(_write_simulated, *zip(*jobs, strict=True), chunksize=8))
    write_motions(args.output / "imu")
    print(f"{args.output}: {len(jobs)} simulated recordings of {SECONDS} s, and BasicMotions")


if __name__ == "__main__":
    main()
