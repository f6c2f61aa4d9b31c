"""``normwear-fast encode``: recordings to a Parquet dataset of embeddings."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from normwear_fast.cli.main import seed
from normwear_fast.encode.settings import CHOICES, EncodeSettings, split_names
from normwear_fast.errors import OutputError, UsageError

if TYPE_CHECKING:
    import torch

    from normwear_fast.config import NormWearConfig
    from normwear_fast.encode.pipeline import Progress, Summary
    from normwear_fast.encode.ray_engine import RayEngine
    from normwear_fast.encode.windows import WindowList
    from normwear_fast.model import FastNormWear

HELP = (
    "Encode recordings: one row of embeddings a window, in Parquet. The same command goes on with a "
    "run that was stopped, at whatever point. Exit code 0: done; 1: some recordings failed (listed), "
    "or the output could not be written to its end; 2: refused before anything was encoded; 130: "
    "stopped by Ctrl-C."
)
EXAMPLE = (
    "normwear-fast encode cohort/ --weights normwear.safetensors --output out/ --window 6 --hop 6 "
    "--channels ECG,PPG"
)

CHANNELS_HELP = (
    "comma-separated, in order (default: all); a name with a comma goes in double quotes, as in "
    """'"ECG, lead I",PPG'"""
)

LINE_SECONDS = 10.0
"""Between two lines of progress where there is no terminal."""

LISTED = 20
"""Recordings named in a list of the summary; manifest.json has them all."""

NAMED = 3
"""Channels named as those that lacked data most."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="recordings, or folders of them")
    weights = parser.add_argument_group("weights (one of them)").add_mutually_exclusive_group()
    weights.add_argument("--weights", metavar="W", help="checkpoint file, folder or hub id")
    weights.add_argument(
        "--random-weights", type=seed, metavar="SEED", help="random weights, for trials"
    )
    parser.add_argument(
        "--model-size",
        choices=("base", "small"),
        help="of random weights: the released size (default), or a small one for trials",
    )
    parser.add_argument("--output", metavar="DIR", help="folder to write, or to go on with")

    windows = add_window_arguments(parser)
    windows.add_argument(
        "--max-missing",
        type=float,
        default=0.1,
        metavar="F",
        help="skip a window with a larger fraction of missing samples (0.1)",
    )
    signal = add_channel_arguments(parser)
    signal.add_argument(
        "--preprocess",
        choices=CHOICES["preprocess"],
        default=CHOICES["preprocess"][0],
        help="reference: as the pretraining data were made (default); none: resample only",
    )
    signal.add_argument(
        "--normalize",
        choices=CHOICES["normalize"],
        default=CHOICES["normalize"][0],
        help="to zero mean and unit deviation (default: none)",
    )
    model = add_form_arguments(parser)
    model.add_argument(
        "--precision",
        default="auto",
        metavar="P",
        help="auto (default), float32, bfloat16, int8 (CPU), fp8 (GPU)",
    )
    model.add_argument(
        "--device", default="auto", metavar="D", help="auto (default), cpu, cuda, cuda:I, cuda:all"
    )

    run = parser.add_argument_group("run")
    run.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="reader processes beside this one (1 on a CPU, else up to 8; 0: none); with Ray, in all",
    )
    run.add_argument(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="ray: on a Ray cluster (RAY_ADDRESS), or Ray on this machine",
    )
    run.add_argument(
        "--actors", type=int, metavar="N", help="Ray's encoders (one a GPU, or what the CPUs hold)"
    )
    run.add_argument(
        "--dry-run",
        action="store_true",
        help="print the plan, for the sizes of the weights where they are given; nothing is encoded",
    )
    run.add_argument("--overwrite", action="store_true", help="discard an earlier run in DIR")
    run.add_argument("--json", action="store_true", help="print the summary as JSON")


def add_window_arguments(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Which windows; `plan` has them too."""
    group = parser.add_argument_group("windows")
    group.add_argument("--window", type=float, metavar="S", help="seconds of a window (6)")
    group.add_argument("--hop", type=float, metavar="S", help="from one to the next (the window)")
    group.add_argument(
        "--windows",
        metavar="FILE",
        help="CSV or Parquet with recording, start_s, duration_s or end_s, and maybe window_id",
    )
    return group


def add_channel_arguments(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Which channels, at what rate."""
    group = parser.add_argument_group("signal")
    group.add_argument("--channels", metavar="NAMES", type=channel_names, help=CHANNELS_HELP)
    group.add_argument(
        "--rate",
        type=float,
        metavar="HZ",
        help="of recordings without a clock; of several, one with a clock keeps its own",
    )
    return group


def channel_names(text: str) -> tuple[str, ...]:
    """The type of --channels."""
    try:
        return split_names(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_form_arguments(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """What becomes of a window's tokens."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--pool",
        choices=CHOICES["pool"],
        default=CHOICES["pool"][0],
        help="over a channel's tokens (default: mean); patch keeps them all, in DIR/patches.zarr",
    )
    group.add_argument(
        "--channel-pool",
        choices=CHOICES["channel_pool"],
        default=CHOICES["channel_pool"][0],
        help="keep channels apart (default), their mean, or one after another",
    )
    group.add_argument(
        "--scalogram",
        choices=CHOICES["scalogram"],
        default=CHOICES["scalogram"][0],
        help="conv: the one pretraining used (default)",
    )
    return group


def run(args: argparse.Namespace) -> int:
    from normwear_fast.encode.windows import read_window_list

    _check(args)
    windows = read_window_list(args.windows) if args.windows else None
    settings = EncodeSettings(
        window=6.0 if args.window is None else args.window,
        hop=args.hop,
        windows=windows.digest if windows else None,
        channels=args.channels,
        normalize=args.normalize,
        preprocess=args.preprocess,
        pool=args.pool,
        channel_pool=args.channel_pool,
        precision=args.precision,
        scalogram=args.scalogram,
        max_missing=args.max_missing,
        rate=args.rate,
    )
    if args.dry_run:
        from normwear_fast.backends import select_backend
        from normwear_fast.cli.plan import show_plan
        from normwear_fast.engine import check_precision, resolve_precision

        device = _devices(args.device)[0]
        precision = resolve_precision(settings.precision, device)  # as the run would
        check_precision(precision, select_backend("auto", device), device)
        config, origin = _planned_size(args)
        return show_plan(args, settings, windows, args.output, device.type, config, origin)
    return _encode(args, settings, windows)


def _planned_size(args: argparse.Namespace) -> tuple[NormWearConfig, str]:
    """The sizes of the model that the run would load, and where they come from."""
    from normwear_fast.cli.plan import model_size

    if args.weights is not None:
        from normwear_fast.weights import saved_config

        config, origin = saved_config(args.weights)
        return config, f"{args.weights}, {origin}"
    return model_size(args.model_size)


def _check(args: argparse.Namespace) -> None:
    if not args.dry_run:
        if args.weights is None and args.random_weights is None:
            raise UsageError("--weights W is needed (or --random-weights SEED, for trials)")
        if args.output is None:
            raise UsageError("--output DIR is needed: the folder the embeddings go to")
    if args.model_size and args.random_weights is None:
        raise UsageError("--model-size is for --random-weights; weights have their own size")
    check_window_arguments(args)
    if args.workers is not None and args.workers < 0:
        raise UsageError(f"--workers {args.workers}: it must be 0 or more")
    if args.engine == "ray":
        if args.device not in ("auto", "cpu", "cuda", "cuda:all"):
            raise UsageError(
                f"--device {args.device}: Ray hands out its GPUs; use auto, cpu or cuda"
            )
        for name in ("actors", "workers"):
            value = getattr(args, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name} {value}: with --engine ray it must be 1 or more")
    elif args.actors is not None:
        raise UsageError("--actors is for --engine ray; --device cuda:all takes all GPUs here")


def check_window_arguments(args: argparse.Namespace) -> None:
    """A UsageError where windows are both listed and tiled."""
    if args.windows and (args.window is not None or args.hop is not None):
        raise UsageError("--windows lists every window: leave out --window and --hop")


# --- the run ---------------------------------------------------------------------------------------


def _encode(args: argparse.Namespace, settings: EncodeSettings, windows: WindowList | None) -> int:
    from normwear_fast.cli.main import print_error
    from normwear_fast.encode.pipeline import encode_recordings
    from normwear_fast.engine import resolve_precision

    engine: RayEngine | None = None
    device, workers = args.device, args.workers
    if args.engine == "ray":
        engine = _ray_engine(args)
        device, workers = "auto", 1  # the GPU that Ray has given; one reader for the survey
    else:
        first = _devices(device)[0]
        resolve_precision(settings.precision, first)  # before anything is opened
        if workers is None:
            workers = 1 if first.type == "cpu" else min(8, max(1, (os.cpu_count() or 1) - 1))
    progress = make_progress("encode")
    try:
        summary = encode_recordings(
            args.inputs,
            args.output,
            settings,
            _model_loader(args, device),
            windows=windows,
            workers=workers,
            overwrite=args.overwrite,
            progress=progress,
            engine=engine,
        )
    except OutputError as error:
        if not progress.started:
            raise
        print_error(error)
        return 1
    for message in summary.failed.values():
        print_error(message)
    if args.json:
        print(json.dumps(_summary_json(summary), allow_nan=False))
    else:
        print(*_summary_lines(summary), sep="\n")
    return summary.exit_code


def _ray_engine(args: argparse.Namespace) -> RayEngine:
    from normwear_fast.encode.ray_engine import RayEngine

    device = "cuda" if args.device == "cuda:all" else args.device
    return RayEngine(device, actors=args.actors, readers=args.workers)


def _devices(name: str) -> list[torch.device]:
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return [torch.device("cuda", 0) if count else torch.device("cpu")]
    if name == "cuda:all":
        if not count:
            raise UsageError("--device cuda:all: no CUDA device is available; use cpu")
        return [torch.device("cuda", index) for index in range(count)]
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {name}: it must be auto, cpu, cuda, cuda:I or cuda:all")
    if device.type == "cuda":
        if not count:
            raise UsageError(f"--device {name}: no CUDA device is available; use cpu")
        if (device.index or 0) >= count:
            raise UsageError(f"--device {name}: there are {count} CUDA devices, counted from 0")
        device = torch.device("cuda", device.index or 0)
    return [device]


def _model_loader(
    args: argparse.Namespace, device: str
) -> Callable[[int | None], list[FastNormWear]]:
    def load(threads: int | None) -> list[FastNormWear]:
        import copy

        import torch

        from normwear_fast.config import NormWearConfig
        from normwear_fast.model import FastNormWear

        devices = _devices(device)
        if threads is not None:
            torch.set_num_threads(threads)
        if args.weights is not None:
            model = FastNormWear.from_pretrained(
                args.weights,
                optimized_cwt=args.scalogram == "conv",
                precision=args.precision,
            )
        else:
            small = args.model_size == "small"
            model = FastNormWear(
                optimized_cwt=args.scalogram == "conv",
                config=NormWearConfig.small() if small else NormWearConfig.base(),
                precision=args.precision,
                seed=args.random_weights,
            )
        twins = [copy.deepcopy(model) for _ in devices[1:]]
        return [
            twin.to(place).freeze() for twin, place in zip([model, *twins], devices, strict=True)
        ]

    return load


# --- what is shown ---------------------------------------------------------------------------------


def _summary_json(summary: Summary) -> dict[str, Any]:
    return {
        "output": summary.output,
        "complete": summary.units_done == summary.units,
        "interrupted": summary.interrupted,
        "already_complete": summary.already_complete,
        "recordings": summary.recordings,
        "windows": summary.windows,
        "ok": summary.tally.ok,
        "skipped": summary.tally.skipped,
        "lacking": dict(summary.tally.lacking.most_common()),
        "flat": summary.tally.flat,
        "units": summary.units,
        "units_done": summary.units_done,
        "encoded_now": summary.encoded,
        "seconds": {stage: round(value, 3) for stage, value in summary.seconds.items()},
        "device_busy": round(summary.device_busy, 4),
        "failed": summary.failed,
        "notes": {name: list(notes) for name, notes in summary.notes.items()},
        "weights": summary.weights,
    }


def _summary_lines(summary: Summary) -> list[str]:
    lines = []
    notes = [f"{name}: {note}" for name, some in summary.notes.items() for note in some]
    lines += [f"note: {note}" for note in notes[:LISTED]]
    if len(notes) > LISTED:
        lines.append(f"note: {len(notes) - LISTED} more in manifest.json")
    if not summary.units:
        lines.append(f"nothing to encode in {summary.recordings:,} recordings; nothing was written")
        return lines
    tally = summary.tally
    text = f"{summary.output}: {tally.ok:,} of {summary.windows:,} windows encoded"
    if tally.skipped:
        each = ", ".join(f"{n:,} for {why}" for why, n in sorted(tally.skipped.items()))
        text += f"; {sum(tally.skipped.values()):,} skipped ({each})"
    lines.append(text)
    if tally.lacking:
        first, *more = tally.lacking.most_common(NAMED)
        text = f"lacked data most: {first[0]} in {first[1]:,} of the windows skipped for it"
        text += "".join(f", {name} in {count:,}" for name, count in more)
        left = len(tally.lacking) - NAMED
        lines.append(text + (f", and {left:,} more (--json has all)" if left > 0 else ""))
    if tally.flat:
        lines.append(f"encoded windows with a channel that does not vary: {tally.flat:,}")
    if summary.failed:
        lines.append(
            f"{len(summary.failed):,} of {summary.recordings:,} recordings failed: "
            + ", ".join(list(summary.failed)[:LISTED])
            + (", ..." if len(summary.failed) > LISTED else "")
        )
    lines += _time_lines(summary)
    if summary.weights.get("source") == "random":
        lines.append(
            f"The weights are random (seed {summary.weights['seed']}): these embeddings mean nothing."
        )
    if summary.already_complete:
        lines.append("This run was complete already; --overwrite would start it anew.")
    elif summary.interrupted:
        lines.append(
            f"Stopped with {summary.units_done:,} of {summary.units:,} work units done; the same "
            "command goes on from there."
        )
    return lines


def _time_lines(summary: Summary) -> list[str]:
    wall = summary.seconds.get("wall", 0.0)
    if not wall:
        return []
    stages = ("read", "prepare", "encode", "write")
    spent = ", ".join(f"{stage} {summary.seconds[stage]:.1f} s" for stage in stages)
    return [
        f"{wall:.1f} s, {summary.encoded / wall:,.1f} windows/s; side by side: {spent}; "
        f"device busy {100 * summary.device_busy:.0f} %"
    ]


class _Lines:
    """Progress as plain lines on stderr, for logs."""

    def __init__(self, verb: str) -> None:
        self.started, self._verb = False, verb
        self._total = self._done = self._first = 0
        self._began = self._said = time.monotonic()

    def _due(self) -> bool:
        due = time.monotonic() - self._said >= LINE_SECONDS
        if due:
            self._said = time.monotonic()
        return due

    def surveyed(self, done: int, total: int) -> None:
        if self._due():
            print(f"looked at {done:,} of {total:,} recordings", file=sys.stderr)

    def start(self, windows: int, done: int) -> None:
        self.started = True
        self._total, self._done, self._first = windows, done, done
        self._began = self._said = time.monotonic()
        before = f", {done:,} of them done already" if done else ""
        print(
            f"{self._verb.removesuffix('e')}ing {windows:,} windows{before}",
            file=sys.stderr,
            flush=True,
        )

    def advance(self, windows: int) -> None:
        self._done += windows
        if not self._due() or self._done == self._first:
            return
        rate = (self._done - self._first) / (time.monotonic() - self._began)
        left = (self._total - self._done) / rate
        print(
            f"{self._done:,} of {self._total:,} windows, {rate:,.1f}/s, {left / 60:,.1f} min left",
            file=sys.stderr,
            flush=True,
        )

    def stopping(self) -> None:
        _say_stopping()

    def close(self) -> None:
        pass


class _Bar:
    """Progress as a bar on a terminal."""

    def __init__(self, verb: str) -> None:
        self.started, self._verb = False, verb
        self._bar: Any = None

    def surveyed(self, done: int, total: int) -> None:
        from tqdm import tqdm

        if self._bar is None:
            self._bar = tqdm(total=total, unit="recording", desc="look", leave=False)
        self._bar.update(done - self._bar.n)

    def start(self, windows: int, done: int) -> None:
        from tqdm import tqdm

        self.started = True
        self.close()
        self._bar = tqdm(total=windows, initial=done, unit="window", desc=self._verb)

    def advance(self, windows: int) -> None:
        self._bar.update(windows)

    def stopping(self) -> None:
        _say_stopping()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _say_stopping() -> None:
    # In a signal handler: print could find stderr's buffer in the middle of a write.
    os.write(2, b"\nstopping after the current work unit; Ctrl-C again stops at once\n")


def make_progress(verb: str) -> _Lines | _Bar:
    """A bar on a terminal, else lines; ``verb`` is what is done to the windows."""
    terminal = sys.stderr is not None and sys.stderr.isatty()
    return _Bar(verb) if terminal else _Lines(verb)


if TYPE_CHECKING:  # both fit what the engine expects
    _shapes: tuple[Progress, Progress] = (_Lines("encode"), _Bar("encode"))
