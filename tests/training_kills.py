"""Trainings in processes that are killed at a chosen moment: a process that forks one for each.

    python tests/training_kills.py

Reads a line of JSON a run, ``{"what": ..., "folder": ..., "moment": ..., ...}``, and answers with one:
the moments that came, how it ended, and what it said. Moments are the steps of the optimiser, and each
time something is opened for writing, synced, renamed, linked or removed in the run's folder or beside
it. Moment ``n``, or ``[name, n]``, the n-th of that name, is the last one: SIGKILL, before it takes its
course. Without ``moment`` a run goes to its end; ``"signal": 2`` is a Ctrl-C there instead.
"""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
DONE, REFUSED, STOPPED = 0, 2, 130


class Runs:
    """The process that forks them, from a test's side."""

    def __init__(self) -> None:
        # One thread: a fork's child has none of OpenMP's others.
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def __call__(self, what: str, folder: Path, **how: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps({"what": what, "folder": str(folder), **how}), file=self.process.stdin)
        self.process.stdin.flush()
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        assert answer["status"] in (DONE, REFUSED, STOPPED, -signal.SIGKILL), answer["said"]
        return answer

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def result(folder: Path) -> dict[str, bytes]:
    """What a run leaves in its folder, to the bit, without the seconds that it took."""
    found = {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}
    for name in ("epochs.csv", "steps.csv"):
        if name in found:
            rows = list(csv.DictReader(io.StringIO(found[name].decode())))
            for row in rows:
                row.pop("seconds", None), row.pop("windows_per_second", None)
            found[name] = json.dumps(rows).encode()
    return found


# --- in the process that forks ---------------------------------------------------------------------


class Moments:
    """Counts them, and ends the process at one."""

    def __init__(self, folder: Path, last: int | list[Any] | None, number: int) -> None:
        self.where, self.number = str(folder.parent), number
        self.name, self.last = last if isinstance(last, list) else (None, last)
        self.seen: list[str] = []

    def __call__(self, name: str) -> None:
        self.seen.append(name)
        count = len(self.seen) if self.name is None else self.seen.count(self.name)
        if self.name in (None, name) and count - 1 == self.last:
            os.kill(os.getpid(), self.number)

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        kinds = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.truncate")
        writing = event == "open" and isinstance(arguments[2], int) and arguments[2] & 3
        if (event in kinds or writing) and self.where in str(arguments[0]):
            self(f"{event} {Path(str(arguments[0])).name}")


def finetune(folder: Path, moments: Moments, how: dict[str, Any]) -> int:
    import numpy as np
    from pulse_windows import encoder, labelled

    from normwear_fast.finetune import FineTuner, FineTuneSettings, resume, training
    from normwear_fast.finetune.settings import EPOCHS
    from normwear_fast.finetune.stage import Stage

    if how.get("keep", True):  # a checkpoint after each step
        resume.LEAST_SECONDS = resume.TIMES_ITS_WRITING = 0  # type: ignore[assignment]
    training.UNIT_BATCHES = 0.5  # type: ignore[assignment]
    EPOCHS["head"] = 6  # before the encoder
    step = Stage.step

    def counted(self: Stage, index: Any) -> float:
        moments(f"step of {self.name}")
        return step(self, index)

    Stage.step = counted  # type: ignore[method-assign]
    settings = FineTuneSettings(**how.get("settings", {}))
    data = labelled()
    if how.get("regression"):
        import dataclasses

        from normwear_fast.evaluate.registry import Task

        target = np.random.default_rng(0).random((len(data), 1)) + data.labels[:, None]
        data = dataclasses.replace(
            data, task=Task("t", "vital signs", targets=("x",)), labels=target
        )
    tuner = FineTuner(encoder(), settings, device="cpu", precision="float32", progress=say)
    tuner.fit(data, folder, overwrite=how.get("overwrite", False))
    return STOPPED if tuner.interrupted else DONE


def pretrain(folder: Path, moments: Moments, how: dict[str, Any]) -> int:
    from dataclasses import replace

    from pretrain_runs import CPU, SETTINGS, TINY, Waves

    from normwear_fast.pretrain import trainer

    step = trainer._Task._step

    def counted(self: Any, *arguments: Any) -> Any:
        moments("step")
        return step(self, *arguments)

    trainer._Task._step = counted  # type: ignore[method-assign]
    report = trainer.pretrain(
        Waves(),
        TINY,
        replace(SETTINGS, **{"steps": 4, **how.get("settings", {})}),
        folder,
        run=replace(CPU, checkpoint_every=2),
        overwrite=how.get("overwrite", False),
        say=say,
    )
    assert report is not None
    return DONE if report.step == report.steps else STOPPED


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def child(how: dict[str, Any], told: int) -> int:
    """A run; what came of it goes to the file descriptor ``told``, line by line."""
    from normwear_fast.errors import NormWearError

    os.dup2(told, 2)
    folder = Path(how["folder"])
    moments = Moments(folder, how.get("moment"), how.get("signal", signal.SIGKILL))
    sync = os.fsync

    def counted(handle: int) -> None:
        moments("fsync")
        sync(handle)

    os.fsync = counted
    sys.addaudithook(moments.audit)
    try:
        code = {"finetune": finetune, "pretrain": pretrain}[how["what"]](folder, moments, how)
    except NormWearError as error:
        say(f"error: {error}")
        code = REFUSED
    except KeyboardInterrupt:
        code = STOPPED
    except BaseException:
        traceback.print_exc()
        code = 1
    say(json.dumps({"moments": moments.seen}))
    return code


def main() -> None:
    sys.path[:0] = [str(HERE)]
    # All that a run imports, and nothing that starts a thread.
    import lightning_fabric  # noqa: F401
    import peft  # noqa: F401
    import pretrain_runs  # noqa: F401
    import pulse_windows  # noqa: F401
    import sklearn.model_selection  # noqa: F401
    import torch.distributed.checkpoint.state_dict
    import torch.utils.tensorboard  # noqa: F401

    import normwear_fast.finetune.training
    import normwear_fast.pretrain.trainer  # noqa: F401

    for line in sys.stdin:
        how = json.loads(line)
        reads, writes = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reads)
            os._exit(child(how, writes))
        os.close(writes)
        with os.fdopen(reads, errors="replace") as file:
            said = file.read().splitlines()
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        moments = json.loads(said.pop())["moments"] if said and '"moments"' in said[-1] else []
        print(json.dumps({"status": status, "moments": moments, "said": said}), flush=True)


if __name__ == "__main__":
    main()
