"""Reading, resampling and packing without an encoder, and streaming a cohort of any size.

    python -m bench.pipeline_rate                       # rates, then part of 200 GB
    python -m bench.pipeline_rate --save pipeline-rate  # also writes bench/results/NAME.json

*Rates*: channel-windows of 6 s a second of one core's time, from WFDB at 360 Hz through encode's own
readers and preparation to the packed (samples,) series of micro-batches that a device would be given.
A core's time is CPU time, one thread, so that a busy machine does not change it.

*Cohort*: a synthetic reader stands for `--gigabytes` of 16-bit WFDB in `--recordings` files, because
nothing of that size is written for a benchmark: one block of signal, made once, is what every read
returns. `encode_recordings` itself surveys and plans all of it, then prepares, packs, "encodes" by a
null encoder and writes Parquet for `--seconds` of CPU time, and is stopped, while the process's
resident memory is sampled. What part of the cohort that was is printed and stored; the peak of each
quarter of the time says whether memory grows.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import psutil
import torch

from bench.saving import save
from normwear_fast.config import NormWearConfig
from normwear_fast.encode.pipeline import (
    default_tokens,
    encode_recordings,
    plan_jobs,
    plan_run,
)
from normwear_fast.encode.prepare import prepare_job
from normwear_fast.encode.settings import EncodeSettings
from normwear_fast.encode.survey import survey
from normwear_fast.packing import plan_micro_batches, window_tokens
from normwear_fast.recordings import Channel, Recording
from normwear_fast.recordings.base import Array, FoundRecording, register

if TYPE_CHECKING:
    from normwear_fast.model import FastNormWear

RATE = 360.0


def ecg_like(samples: int, channels: int) -> np.ndarray:
    """(samples, channels) float64 in mV."""
    t = np.arange(samples)[:, None] / RATE
    beats = np.sin(2 * np.pi * 1.2 * t + np.arange(channels)) ** 9
    return beats + 0.05 * np.random.default_rng(0).standard_normal((samples, channels))


def write_wfdb(folder: Path, name: str, channels: int, storage: str, minutes: float) -> Path:
    import wfdb

    wfdb.wrsamp(
        name,
        fs=RATE,
        units=["mV"] * channels,
        sig_name=[f"lead_{i}" for i in range(channels)],
        p_signal=ecg_like(round(minutes * 60 * RATE), channels),
        fmt=[storage] * channels,
        adc_gain=[200.0] * channels,
        baseline=[0] * channels,
        write_dir=str(folder),
    )
    return folder / f"{name}.hea"


def pack(data: list[np.ndarray], settings: EncodeSettings) -> int:
    """Windows into the series of micro-batches, as the model is given them; returns how many."""
    shapes = [(window.shape[0], window.shape[1]) for window in data]
    tokens = [window_tokens(*shape, settings.optimized_cwt) for shape in shapes]
    assert settings.batch_tokens is not None
    batches = plan_micro_batches(shapes, tokens, settings.batch_tokens)
    packed = [np.concatenate([data[i].reshape(-1) for i in batch.windows]) for batch in batches]
    return len(packed)


def stream(found: list[FoundRecording], settings: EncodeSettings) -> dict[str, float]:
    """Prepares and packs what encode would, in its order."""
    settings = default_tokens(settings, "cpu")
    plan = plan_run(survey(found, settings), settings, None, NormWearConfig())
    facts = dict.fromkeys(("windows", "channel_windows", "units", "read_s", "prepare_s"), 0.0)
    began, cpu = time.perf_counter(), time.process_time()
    for job in plan_jobs(plan, set(), settings, None):
        for unit in prepare_job(job, settings):
            assert not unit.failed, unit.failed
            pack(unit.data, settings)
            facts["units"] += 1
            facts["windows"] += len(unit.data)
            facts["channel_windows"] += sum(len(window) for window in unit.data)
            facts["read_s"] += unit.read_seconds
            facts["prepare_s"] += unit.prepare_seconds
    facts["wall_s"] = time.perf_counter() - began
    facts["cpu_s"] = time.process_time() - cpu
    facts["channel_windows_per_cpu_s"] = facts["channel_windows"] / facts["cpu_s"]
    return {name: round(value, 3) for name, value in facts.items()}


def rates(folder: Path, rounds: int, minutes: int) -> dict[str, dict[str, float]]:
    """Rows by name: storage format, channels, preprocessing; the median of the rounds."""
    rows = {}
    for storage in ("212", "16"):
        for channels in (1, 2, 3, 12):
            name = f"c{channels}_{storage}"
            path = write_wfdb(folder, name, channels, storage, max(2, minutes // channels))
            for preprocess in ("reference", "none"):
                settings = EncodeSettings(preprocess=preprocess)
                found = [FoundRecording(name, path)]
                if channels == 1:
                    stream(found, settings)  # imports, caches of filters
                runs = [stream(found, settings) for _ in range(rounds)]
                runs.sort(key=lambda run: run["channel_windows_per_cpu_s"])
                label = f"WFDB {storage}, C={channels}, preprocess {preprocess}"
                rows[label] = runs[rounds // 2]
                print(f"{label:42} {rows[label]['channel_windows_per_cpu_s']:8,.0f} a core second")
    return rows


# --- a cohort that is not there --------------------------------------------------------------------


@register(".synthetic")
class SyntheticRecording(Recording):
    """Reads what its file's two numbers say: channels and samples, of one block of signal repeated."""

    format = "synthetic"
    _blocks_made: dict[int, np.ndarray] = {}  # noqa: RUF012  (one signal for all recordings)

    def __init__(self, path: Path, *, sampling_rate: float | None = None) -> None:
        self.path = path
        channels, samples = map(int, path.read_text().split())
        self.channels = tuple(Channel(f"lead_{i}", "mV", RATE, samples) for i in range(channels))

    def _blocks(self, channels: list[int], seconds: float) -> Iterator[list[Array]]:
        step = round(seconds * RATE)
        if step not in self._blocks_made:
            # As 16-bit files are read: integers, divided by a gain.
            signal = np.round(200 * ecg_like(step, len(self.channels))).astype(np.int16)
            self._blocks_made[step] = signal.T.copy()
        raw = self._blocks_made[step]
        for first in range(0, self.channels[0].samples, step):
            count = min(step, self.channels[0].samples - first)
            yield [raw[c, :count] / 200.0 for c in channels]


class Memory:
    """Samples the resident memory of this process until it is closed: (seconds, bytes)."""

    def __init__(self) -> None:
        self.samples: list[tuple[float, int]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        process = psutil.Process()
        while not self._stop.wait(0.05):
            self.samples.append((time.perf_counter(), process.memory_info().rss))

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def peaks_mb(self, first: float, last: float, pieces: int) -> list[float]:
        """The peak of each piece of that time."""
        held = np.array([size for at, size in self.samples if first <= at <= last])
        return [round(float(part.max()) / 1e6, 1) for part in np.array_split(held, pieces)]


class NullModel:
    """Packs what it is given and returns one array for every window; stops the run when time is up."""

    def __init__(self, seconds: float) -> None:
        self.config = NormWearConfig()
        self.device = torch.device("cpu")
        self.optimized_cwt = True
        self.began = self.cpu = 0.0
        self.channel_windows = 0
        self._seconds = seconds
        noise = np.random.default_rng(0).standard_normal((64, self.config.embed_dim))
        self._embedding = noise.astype(np.float32)

    def provenance(self) -> dict[str, Any]:
        config = asdict(self.config)
        weights = {"source": "none"}
        return {"weights": weights, "precision": "float32", "config": config, "threads": 1}

    def encode_unit(
        self, windows: list[np.ndarray], *, pool: str, batch_tokens: int
    ) -> list[np.ndarray]:
        if not self.began:
            self.began, self.cpu = time.perf_counter(), time.process_time()
        pack(windows, EncodeSettings(batch_tokens=batch_tokens))
        self.channel_windows += sum(len(window) for window in windows)
        if time.process_time() - self.cpu > self._seconds:
            os.kill(os.getpid(), signal.SIGTERM)
        return [self._embedding[: len(window)] for window in windows]


def cohort(folder: Path, gigabytes: float, recordings: int, seconds: float) -> dict[str, Any]:
    channels = 3
    samples = round(gigabytes * 1e9 / recordings / channels / 2)
    inputs = folder / "cohort"
    inputs.mkdir()
    for i in range(recordings):
        (inputs / f"{i:05d}.synthetic").write_text(f"{channels} {samples}")
    model = NullModel(seconds)
    memory = Memory()
    start = time.perf_counter()
    summary = encode_recordings(
        [inputs],
        folder / "out",
        EncodeSettings(),
        lambda threads: [cast("FastNormWear", model)],
    )
    end, cpu = time.perf_counter(), time.process_time() - model.cpu
    memory.close()
    assert summary.interrupted, "the whole cohort was streamed: ask for fewer --seconds"
    share = summary.encoded / summary.windows
    return {
        "what": "a synthetic reader and a null encoder through encode itself, written to Parquet and "
        "stopped; nothing of this size was read from a disk, and only a part was streamed",
        "equivalent_gigabytes_16_bit": gigabytes,
        "recordings": recordings,
        "hours_each": round(samples / RATE / 3600, 2),
        "windows": summary.windows,
        "channel_windows": summary.windows * channels,
        "units": summary.units,
        "survey_and_plan_s": round(model.began - start, 2),
        "survey_and_plan_peak_mb": memory.peaks_mb(start, model.began, 1)[0],
        "streamed_windows": summary.encoded,
        "streamed_units": summary.units_done,
        "streamed_share": round(share, 6),
        "streamed_gigabytes": round(share * gigabytes, 3),
        "streamed_wall_s": round(end - model.began, 2),
        "streamed_cpu_s": round(cpu, 2),
        "channel_windows_per_cpu_s": round(model.channel_windows / cpu),
        "peak_mb_by_quarter": memory.peaks_mb(model.began, end, 4),
        "whole_at_this_rate_core_hours": round(cpu / share / 3600, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--minutes", type=int, default=60, help="of channels in a row's recording")
    parser.add_argument("--gigabytes", type=float, default=200.0)
    parser.add_argument("--recordings", type=int, default=2000)
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="CPU seconds of streaming the cohort"
    )
    parser.add_argument("--save", metavar="NAME", help="write bench/results/NAME.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows = rates(Path(folder), args.rounds, args.minutes)
        large = cohort(Path(folder), args.gigabytes, args.recordings, args.seconds)
    print(json.dumps(large, indent=1))
    if args.save:
        save(args.save, {"rows": rows, "cohort": large})
    return 0


if __name__ == "__main__":
    sys.exit(main())
