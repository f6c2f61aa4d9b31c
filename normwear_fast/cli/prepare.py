"""``normwear-fast prepare``: recordings to shards of series for pretraining."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os

from normwear_fast.cli.encode import add_channel_arguments
from normwear_fast.encode.settings import CHOICES, EncodeSettings
from normwear_fast.errors import UsageError

HELP = (
    "Cut recordings into windows, bring them to 65 Hz with the reference preprocessing, and write "
    "them as Arrow shards for pretrain. Windows with too much missing, and channels that do not "
    "vary, are left out and counted. The same command goes on with a run that was stopped. Exit "
    "code 0: done; 1: some recordings failed (listed); 2: refused; 130: stopped by Ctrl-C."
)
EXAMPLE = "normwear-fast prepare cohort/ --output shards/ --window 6 --hop 3 --exclude 'test/*'"

LISTED = 20
"""Recordings whose notes are shown; manifest.json has them all."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="recordings, or folders of them")
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="folder to write or go on with"
    )
    parser.add_argument(
        "--exclude",
        action="append",
        default=[],
        metavar="PATTERN",
        help="recordings whose id matches are left out, as 'test/*'; may be given again",
    )
    windows = parser.add_argument_group("windows")
    windows.add_argument("--window", type=float, default=6.0, metavar="S", help="seconds (6)")
    windows.add_argument("--hop", type=float, metavar="S", help="from one to the next (the window)")
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
        help="reference: as the published pretraining (default); none: resample only",
    )
    run = parser.add_argument_group("run")
    run.add_argument(
        "--workers", type=int, metavar="N", help="reader processes (one less than cores; 0: none)"
    )
    run.add_argument("--overwrite", action="store_true", help="discard an earlier run in DIR")
    run.add_argument("--json", action="store_true", help="print the summary as JSON")


def run(args: argparse.Namespace) -> int:
    from normwear_fast.cli.encode import make_progress
    from normwear_fast.cli.main import print_error
    from normwear_fast.pretrain.prepare import prepare_series

    if args.workers is not None and args.workers < 0:
        raise UsageError(f"--workers {args.workers}: it must be 0 or more")
    settings = EncodeSettings(
        window=args.window,
        hop=args.hop,
        channels=args.channels,
        preprocess=args.preprocess,
        max_missing=args.max_missing,
        rate=args.rate,
    )
    workers = max(1, (os.cpu_count() or 1) - 1) if args.workers is None else args.workers
    summary = prepare_series(
        args.inputs,
        args.output,
        settings,
        exclude=args.exclude,
        workers=workers,
        overwrite=args.overwrite,
        progress=make_progress("prepare"),
    )
    for message in summary.failed.values():
        print_error(message)
    if args.json:
        print(json.dumps(dataclasses.asdict(summary) | {"seconds": round(summary.seconds, 3)}))
        return summary.exit_code
    notes = [f"{name}: {note}" for name, some in summary.notes.items() for note in some]
    for note in notes[:LISTED]:
        print(f"note: {note}")
    if not summary.windows:
        print(f"nothing to prepare in {summary.recordings:,} recordings; nothing was written")
        return summary.exit_code
    text = f"{summary.output}: {summary.prepared:,} of {summary.windows:,} windows prepared"
    if summary.skipped:
        each = ", ".join(f"{n:,} for {why}" for why, n in sorted(summary.skipped.items()))
        text += f"; {sum(summary.skipped.values()):,} skipped ({each})"
    print(text)
    if summary.flat_channels:
        print(f"channels left out of windows because they do not vary: {summary.flat_channels:,}")
    if summary.failed:
        print(f"{len(summary.failed):,} of {summary.recordings:,} recordings failed")
    if summary.already_complete:
        print("This run was complete already; --overwrite would start it anew.")
    elif summary.interrupted:
        print("Stopped before the end; the same command goes on from there.")
    return summary.exit_code
