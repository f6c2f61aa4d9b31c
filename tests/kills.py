"""Kills encode runs at random moments and lets each go on to its end: do the rows stay the same?

    python tests/kills.py FOLDER RECORDINGS WORKERS,WORKERS,... KILLS SEED

Each trial has an output of its own. Its run is killed with SIGKILL at a random moment, and up to three
times more while it goes on; then it is left to end. The last line printed is the outcome
as JSON: of each trial when its kills came, how much had been committed by then, and whether its rows
are those of a run nobody disturbed. A run that ended before its kill does not count as one.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import random
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import encode_runs
import numpy as np

from normwear_fast.encode import Summary, load_embeddings, pipeline
from normwear_fast.encode.prepare import MISSING

SETTINGS = replace(encode_runs.SETTINGS, rate=65.0, max_missing=0.05)


def make_mixed(folder: Path, recordings: int) -> Path:
    """Seven formats, ragged; every seventh recording is damaged, and some have gaps."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(60)
    for i in range(recordings):
        channels, seconds = 1 + i % 3, 4 + int(rng.integers(0, 20))
        data = rng.standard_normal((channels, 65 * seconds))
        if i % 5 == 0:
            data[0, 130:200] = np.nan
        name = f"{i:02d}"
        path = [_npz, _npy, _csv, _parquet, _edf, _wfdb][i % 6](folder, name, data)
        if i % 7 == 3:
            content = path.read_bytes()
            path.write_bytes(content[: len(content) // 3])
    return folder


def _npz(folder: Path, name: str, data: np.ndarray) -> Path:
    path = folder / f"{name}.npz"
    np.savez(path, data=data, sampling_rate=65.0)
    return path


def _npy(folder: Path, name: str, data: np.ndarray) -> Path:
    path = folder / f"{name}.npy"
    np.save(path, data)
    return path


def _csv(folder: Path, name: str, data: np.ndarray) -> Path:
    path = folder / f"{name}.csv"
    lines = ["time," + ",".join(f"S{i}" for i in range(len(data)))]
    for i, values in enumerate(data.T):
        cells = ["" if np.isnan(v) else f"{v:.5f}" for v in values]
        lines.append(",".join([f"{i / 65:.6f}", *cells]))
    path.write_text("\n".join(lines) + "\n")
    return path


def _parquet(folder: Path, name: str, data: np.ndarray) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / f"{name}.parquet"
    pq.write_table(pa.table({f"S{i}": values for i, values in enumerate(data)}), path)
    return path


def _edf(folder: Path, name: str, data: np.ndarray) -> Path:
    import edfio

    path = folder / f"{name}.edf"
    filled = np.nan_to_num(data)
    edfio.Edf([edfio.EdfSignal(values, 65, label="S") for values in filled]).write(path)
    return path


def _wfdb(folder: Path, name: str, data: np.ndarray) -> Path:
    import wfdb

    count = len(data)
    wfdb.wrsamp(
        f"r{name}",
        fs=65,
        units=["mV"] * count,
        sig_name=[f"S{i}" for i in range(count)],
        p_signal=data.T,
        fmt=["16"] * count,
        write_dir=str(folder),
    )
    return folder / f"r{name}.dat"


class Trials:
    """Runs of one cohort, in processes that need not import anything."""

    def __init__(self, folder: Path, recordings: int, seed: int) -> None:
        self.folder, self.chance = folder, random.Random(seed)
        self.cohort = make_mixed(folder / "cohort", recordings)
        started = time.perf_counter()
        self.summary = self.encode(folder / "undisturbed", 0)
        self.seconds = time.perf_counter() - started
        self.rows = digest(folder / "undisturbed")
        bad = len(range(3, recordings, 7))
        assert len(self.summary.failed) == bad, self.summary.failed
        assert self.summary.tally.skipped[MISSING] > 0, "some windows have gaps"

    def encode(self, output: Path, workers: int) -> Summary:
        return encode_runs.run(self.cohort, output, SETTINGS, workers=workers)

    def _child(self, output: Path, workers: int) -> int:
        pid = os.fork()
        if pid == 0:
            self.encode(output, workers)
            os._exit(0)
        return pid

    @staticmethod
    def _ended(pid: int, seconds: float) -> bool:
        """Whether a child ends by itself within so many seconds."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            if os.waitpid(pid, os.WNOHANG)[0]:
                return True
            time.sleep(min(left, 0.005))
        return bool(os.waitpid(pid, os.WNOHANG)[0])

    def _time(self, workers: int, output: Path) -> float:
        """Of an undisturbed run with so many workers."""
        started = time.perf_counter()
        assert os.waitpid(self._child(output, workers), 0)[1] == 0
        return time.perf_counter() - started

    def run(self, workers: list[int], kills: int) -> list[dict[str, Any]]:
        lasting = {n: self._time(n, self.folder / f"timed{n}") for n in set(workers)}
        trials: list[dict[str, Any]] = []
        done = tried = 0
        while done < kills:
            n = workers[len(trials) % len(workers)]
            output = self.folder / f"out{tried}"
            tried += 1
            at: list[dict[str, float]] = []
            for _ in range(min(kills - done, self.chance.choice((2, 3, 4)))):
                moment = self.chance.uniform(0, lasting[n])
                pid = self._child(output, n)
                if self._ended(pid, moment):  # before its kill
                    break
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                parts = len(list(output.glob("part-*")))
                at.append({"after_s": round(moment, 3), "parts": parts})
            if not at:
                continue
            assert os.waitpid(self._child(output, n), 0)[1] == 0
            done += len(at)
            names = sorted(os.listdir(output))
            clean = all(x == "manifest.json" or x.startswith("part-") for x in names)
            same = digest(output) == self.rows
            trials.append({"workers": n, "kills": at, "same_rows": same, "no_leftovers": clean})
        return trials


def digest(output: Path) -> str:
    """Of every row, in the inputs' order, to the bit."""
    found = hashlib.sha256(repr(encode_runs.rows(output)).encode())
    return found.hexdigest()


def main() -> None:
    folder, workers = Path(sys.argv[1]), sys.argv[3]
    recordings, kills, seed = int(sys.argv[2]), int(sys.argv[4]), int(sys.argv[5])
    pipeline.PART_SECONDS = 0.0  # a part a unit: as many moments as there can be
    trials = Trials(folder, recordings, seed)
    told = trials.run([int(n) for n in workers.split(",")], kills)
    good = [trial for trial in told if trial["same_rows"] and trial["no_leftovers"]]
    outcome = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seed": seed,
        "recordings": trials.summary.recordings,
        "damaged": len(trials.summary.failed),
        "rows": len(load_embeddings(folder / "undisturbed")),
        "work_units": trials.summary.units,
        "undisturbed_s": round(trials.seconds, 3),
        "runs": len(told),
        "kills": sum(len(trial["kills"]) for trial in told),
        "same_rows": sum(len(trial["kills"]) for trial in good),
        "trials": told,
    }
    print(json.dumps(outcome))


if __name__ == "__main__":
    # Readers would run this file's imports again, torch's among them, if they knew of it.
    sys.modules["__main__"].__file__ = None
    main()
