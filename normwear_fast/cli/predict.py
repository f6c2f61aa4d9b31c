"""``normwear-fast predict``: recordings to predictions of a fine-tuned model."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict

from normwear_fast.cli.encode import check_window_arguments
from normwear_fast.errors import UsageError

HELP = (
    "Predict with a fine-tuned model: one row a window in a Parquet file, windows cut and prepared as in "
    "training. Exit code 0: done; 1: some recordings failed (listed); 2: refused; 130: stopped, nothing "
    "written."
)
EXAMPLE = "normwear-fast predict new_recordings/ --model stress/ --output stress.parquet"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="recordings, or folders of them")
    parser.add_argument("--model", required=True, metavar="DIR", help="folder of finetune")
    parser.add_argument("--output", required=True, metavar="FILE", help="a .parquet to write")
    windows = parser.add_argument_group("windows (default: as in training)")
    windows.add_argument(
        "--window", type=float, metavar="S", help="seconds, where the model knows several lengths"
    )
    windows.add_argument("--hop", type=float, metavar="S", help="from one to the next")
    windows.add_argument(
        "--windows",
        metavar="FILE",
        help="CSV or Parquet with recording, start_s, duration_s or end_s, and maybe window_id",
    )
    parser.add_argument(
        "--rate",
        type=float,
        metavar="HZ",
        help="of recordings without a clock; of several, one with a clock keeps its own",
    )
    parser.add_argument(
        "--precision", default="auto", metavar="P", help="auto (default), float32, bfloat16"
    )
    parser.add_argument("--device", default="auto", metavar="D", help="auto, cpu or cuda[:i]")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="reader processes (1)")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")


def run(args: argparse.Namespace) -> int:
    from normwear_fast.cli.main import print_error
    from normwear_fast.encode.windows import read_window_list
    from normwear_fast.finetune.pipeline import predict_recordings
    from normwear_fast.finetune.predictor import Predictor
    from normwear_fast.finetune.training import choose_device

    check_window_arguments(args)
    if args.workers < 0:
        raise UsageError(f"--workers {args.workers}: it must be 0 or more")
    device = choose_device(args.device)
    windows = read_window_list(args.windows) if args.windows else None
    predictor = Predictor.from_pretrained(args.model, precision=args.precision).to(device)
    predictor.encoder.freeze()
    with _Progress() as progress:
        summary = predict_recordings(
            args.inputs,
            args.output,
            predictor,
            window=args.window,
            hop=args.hop,
            windows=windows,
            rate=args.rate,
            workers=args.workers,
            overwrite=args.overwrite,
            progress=progress,
        )
    for message in summary.failed.values():
        print_error(message)
    if args.json:
        print(json.dumps(asdict(summary), indent=1))
        return 1 if summary.failed else 0
    text = f"{summary.predicted:,} of {summary.windows:,} windows predicted"
    if summary.skipped:
        each = ", ".join(f"{count:,} for {why}" for why, count in sorted(summary.skipped.items()))
        text += f"; {sum(summary.skipped.values()):,} skipped ({each})"
    print(text)
    if summary.classes and summary.predicted:
        print("classes: " + ", ".join(f"{name} {n:,}" for name, n in summary.classes.items()))
    print(f"predictions -> {summary.output}" if summary.output else "nothing was written")
    return 1 if summary.failed else 0


class _Progress:
    """A bar on a terminal, nothing in a log."""

    def __enter__(self) -> _Progress:
        from tqdm import tqdm

        terminal = sys.stderr is not None and sys.stderr.isatty()
        self._bar = tqdm(unit="window", desc="predict", disable=not terminal)
        return self

    def __call__(self, done: int, total: int) -> None:
        self._bar.total = total
        self._bar.update(done - self._bar.n)

    def __exit__(self, *exc: object) -> None:
        self._bar.close()
