"""Reading, resampling and packing without an encoder, and streaming a cohort of any size.

    python -m bench.pipeline_rate                       # rates, then part of 200 GB
    python -m bench.pipeline_rate --save pipeline-rate  # also writes bench/results/NAME.json

*Rates*: channel-windows of 6 s a second of one core's time, from WFDB at 360 Hz through encode's own
readers and preparation to the packed (samples,) series of micro-batches that a device would be given.
A core's time is CPU time, one thread, so that a busy machine does not change it.

*Cohort*: a synthetic reader stands for `--gigabytes` of 16-bit WFDB in `--recordings` files, because
nothing of that size is written for a benchmark: one block of signal, made once, is what every read
returns. It is planned whole; then the run's own jobs are prepared and packed in order for `--seconds`
of CPU time while the process's resident memory is sampled. What part of the cohort that was is printed
and stored; the peak of each quarter of the time says whether memory grows.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from normwear_fast.benchmarking import machine
from normwear_fast.config import NormWearConfig
from normwear_fast.encode.pipeline import default_tokens, plan_jobs, plan_run
from normwear_fast.encode.prepare import prepare_job
from normwear_fast.encode.settings import EncodeSettings
from normwear_fast.encode.survey import Surveyed, survey
from normwear_fast.packing import plan_micro_batches, window_tokens
from normwear_fast.recordings import Channel, Recording
from normwear_fast.recordings.base import Array, FoundRecording, register

RATE = 360.0
RESULTS = Path(__file__).parent / "results"


def ecg_like(samples: int, channels: int) -> np.ndarray:
    """(samples, channels) float64 in mV."""
    t = np.arange(samples)[:, None] / RATE
    beats = np.sin(2 * np.pi * 1.2 * t + np.arange(channels)) ** 9
    return beats + 0.05 * np.random.default_rng(0).standard_normal((samples, channels))


def write_wfdb(folder: Path, name: str, channels: int, storage: str, minutes: int) -> Path:
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


def stream(
    found: list[FoundRecording], settings: EncodeSettings, seconds: float | None = None
) -> dict[str, float]:
    """Prepares and packs what encode would, in its order, for that long (all of it: None)."""
    settings = default_tokens(settings, "cpu")
    plan = plan_run(survey(found, settings), settings, None, NormWearConfig())
    return run_plan(plan, settings, seconds)


def run_plan(plan: Any, settings: EncodeSettings, seconds: float | None) -> dict[str, float]:
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
            if seconds is not None and time.process_time() - cpu > seconds:
                break
        if seconds is not None and time.process_time() - cpu > seconds:
            break
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
                stream(found, settings, 0.5)  # caches of filters, imports
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
    """Samples the resident memory of this process until it is closed."""

    def __init__(self) -> None:
        self.samples: list[int] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        process = psutil.Process()
        while not self._stop.wait(0.05):
            self.samples.append(process.memory_info().rss)

    def close(self) -> list[float]:
        """Peak MB of each quarter of the time."""
        self._stop.set()
        self._thread.join()
        quarters = np.array_split(np.array(self.samples), 4)
        return [round(float(quarter.max()) / 1e6, 1) for quarter in quarters]


def cohort(folder: Path, gigabytes: float, recordings: int, seconds: float) -> dict[str, Any]:
    channels = 3
    samples = round(gigabytes * 1e9 / recordings / channels / 2)
    for i in range(recordings):
        (folder / f"{i:05d}.synthetic").write_text(f"{channels} {samples}")
    found = [FoundRecording(f"{i:05d}", folder / f"{i:05d}.synthetic") for i in range(recordings)]
    memory = Memory()
    began = time.perf_counter()
    settings = default_tokens(EncodeSettings(), "cpu")
    surveyed: list[Surveyed] = survey(found, settings)
    plan = plan_run(surveyed, settings, None, NormWearConfig())
    planned = time.perf_counter() - began
    plan_peak = max(memory.close())
    memory = Memory()
    done = run_plan(plan, settings, seconds)
    quarters = memory.close()
    windows = sum(entry.windows for entry in plan.inputs)
    share = done["windows"] / windows
    return {
        "what": "a synthetic reader; nothing of this size was written, and only a part was streamed",
        "equivalent_gigabytes_16_bit": gigabytes,
        "recordings": recordings,
        "hours_each": round(samples / RATE / 3600, 2),
        "windows": windows,
        "channel_windows": windows * channels,
        "units": len(plan.units),
        "plan_s": round(planned, 2),
        "plan_peak_mb": plan_peak,
        "streamed": done,
        "streamed_share": share,
        "streamed_gigabytes": round(share * gigabytes, 3),
        "peak_mb_by_quarter": quarters,
        "whole_at_this_rate_core_hours": round(done["cpu_s"] / share / 3600, 1),
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
        RESULTS.mkdir(exist_ok=True)
        result = {"machine": machine(), "rows": rows, "cohort": large}
        path = RESULTS / f"{args.save}.json"
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
