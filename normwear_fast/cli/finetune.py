"""``normwear-fast finetune``: labelled recordings or samples to a model that predicts."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normwear_fast.cli.encode import add_channel_arguments
from normwear_fast.cli.main import goes_on, seed
from normwear_fast.errors import UsageError, require

if TYPE_CHECKING:
    from normwear_fast.finetune.data import LabelledWindows
    from normwear_fast.finetune.predictor import Predictor

HELP = (
    "Fine-tune on labelled windows: a head on embeddings made once (the default), the whole encoder, or "
    "LoRA. Writes a folder that encode and predict load. Exit code 0: done; 1: some recordings failed "
    "(listed) and the rest was trained on; 2: refused; 130: Ctrl-C, and what was best so far is written. "
    "After Ctrl-C, a kill or a power cut the same command, without --overwrite, goes on."
)
EXAMPLE = """\
normwear-fast finetune cohort/ --labels labels.csv --weights normwear.safetensors --output stress/
  normwear-fast finetune cohort/ --labels labels.csv --weights W --output stress/ --mode lora
  normwear-fast finetune samples/wesad --weights W --output wesad/
labels.csv has recording, label (or value, a number to predict), and if need be start_s with duration_s or
end_s, subject, split (train, validation, test)."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="with --labels recordings, or folders of them; without, one labelled set as probe reads it",
    )
    parser.add_argument("--labels", metavar="FILE", help="CSV or Parquet of the recordings' labels")
    parser.add_argument(
        "--weights", required=True, metavar="W", help="checkpoint file, folder or hub id"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="of the fine-tuned model")

    what = parser.add_argument_group("labels")
    what.add_argument(
        "--label",
        action="append",
        metavar="COLUMN",
        help="label column (label, else value); several are several numbers to predict",
    )
    what.add_argument(
        "--task",
        choices=("auto", "classification", "regression"),
        default="auto",
        help="auto: text and whole numbers are classes, other numbers are predicted as such",
    )
    what.add_argument(
        "--class-weights",
        choices=("none", "balanced"),
        default="none",
        help="balanced: rare classes weigh as much as frequent ones",
    )
    what.add_argument(
        "--validation",
        type=float,
        default=0.2,
        metavar="F",
        help="share of the subjects that validate (0.2)",
    )

    windows = parser.add_argument_group("windows")
    windows.add_argument(
        "--window",
        type=float,
        metavar="S",
        help="seconds of the windows cut out of each labelled stretch (default: each is one window) or "
        "recording (6)",
    )
    windows.add_argument("--hop", type=float, metavar="S", help="from one to the next (the window)")
    windows.add_argument(
        "--max-missing",
        type=float,
        default=0.1,
        metavar="F",
        help="skip windows that lack more (0.1)",
    )
    signal = add_channel_arguments(parser)
    signal.add_argument(
        "--preprocess",
        choices=("reference", "none"),
        default="reference",
        help="reference: as the pretraining data were made (default); none: resample only",
    )
    signal.add_argument(
        "--normalize",
        choices=("none", "window"),
        default="none",
        help="to zero mean and unit deviation",
    )

    train = parser.add_argument_group("training")
    train.add_argument("--mode", choices=("head", "full", "lora"), default="head")
    train.add_argument(
        "--pool", choices=("mean", "cls"), default="mean", help="of a channel's tokens"
    )
    train.add_argument(
        "--channel-pool",
        choices=("concat", "mean"),
        default="concat",
        help="of a window's channels",
    )
    train.add_argument(
        "--epochs", type=int, metavar="N", help="at most (head 100, full and lora 20)"
    )
    train.add_argument(
        "--batch-size", type=int, default=32, metavar="N", help="windows a step (32)"
    )
    train.add_argument(
        "--learning-rate", type=float, metavar="R", help="peak (head 1e-3, full 1e-4, lora 5e-4)"
    )
    train.add_argument("--weight-decay", type=float, default=0.05, metavar="D")
    train.add_argument(
        "--layer-decay",
        type=float,
        default=0.75,
        metavar="D",
        help="of the rate per layer down, in full",
    )
    train.add_argument("--lora-rank", type=int, default=8, metavar="R")
    train.add_argument(
        "--patience",
        type=int,
        default=5,
        metavar="N",
        help="epochs without a better validation loss (5)",
    )
    train.add_argument("--seed", type=seed, default=0)
    train.add_argument("--precision", default="auto", metavar="P", help="auto, float32 or bfloat16")
    train.add_argument("--device", default="auto", metavar="D", help="auto, cpu or cuda[:i]")

    run = parser.add_argument_group("run")
    run.add_argument("--workers", type=int, default=1, metavar="N", help="reader processes (1)")
    run.add_argument(
        "--overwrite",
        action="store_true",
        help="begin anew in DIR, and replace a fine-tuned model there",
    )
    run.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    from normwear_fast.checkpoint import CHECKPOINT_FILE
    from normwear_fast.cli.main import print_error
    from normwear_fast.finetune.predictor import check_output
    from normwear_fast.finetune.settings import FineTuneSettings
    from normwear_fast.finetune.training import FineTuner

    settings = FineTuneSettings(
        mode=args.mode,
        pool=args.pool,
        channel_pool=args.channel_pool,
        epochs=args.epochs,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        weight_decay=args.weight_decay,
        layer_decay=args.layer_decay,
        lora_rank=args.lora_rank,
        patience=args.patience,
        balanced=args.class_weights == "balanced",
        validation=args.validation,
        seed=args.seed,
    )
    output = Path(args.output)
    check_output(output, overwrite=args.overwrite, going_on=True)
    for module in ("lightning_fabric", "sklearn.model_selection"):
        require(module, "fine-tuning", "train")
    data = _from_recordings(args) if args.labels else _from_samples(args)
    tuner = FineTuner(
        args.weights, settings, device=args.device, precision=args.precision, progress=_say
    )
    try:
        predictor = tuner.fit(data, output, overwrite=args.overwrite)
    except KeyboardInterrupt:
        if (output / CHECKPOINT_FILE).exists():
            _say(goes_on(args))
        raise
    for message in data.failed.values():
        print_error(message)
    if args.json:
        print(json.dumps({"output": str(output), **predictor.description}, indent=1))
    else:
        print(*_lines(predictor, output, goes_on(args)), sep="\n")
    if tuner.interrupted:
        return 130
    return 1 if data.failed else 0


def _from_recordings(args: argparse.Namespace) -> LabelledWindows:
    from normwear_fast.finetune.data import Preparation
    from normwear_fast.finetune.labels import read_labelled, read_labels

    if args.workers < 0:
        raise UsageError(f"--workers {args.workers}: it must be 0 or more")
    table = read_labels(args.labels, columns=args.label, task=args.task)
    window = args.window
    if window is None and table.stretches is None:
        window = 6.0
    if window is None and args.hop is not None:
        raise UsageError("--hop needs --window: without one every labelled stretch is a window")
    preparation = Preparation(
        window=window,
        hop=args.hop,
        channels=args.channels,
        preprocess=args.preprocess,
        normalize=args.normalize,
        max_missing=args.max_missing,
    )
    return read_labelled(
        args.inputs, table, preparation, rate=args.rate, workers=args.workers, output=args.output
    )


def _from_samples(args: argparse.Namespace) -> LabelledWindows:
    from normwear_fast.evaluate.samples import load_samples
    from normwear_fast.finetune.data import LabelledWindows

    if len(args.inputs) != 1:
        raise UsageError("several INPUTs are recordings, and need --labels FILE")
    for name in ("window", "hop", "channels", "rate"):
        if getattr(args, name) is not None:
            raise UsageError(
                f"--{name} is for recordings with --labels; samples are windows already"
            )
    if args.task != "auto":
        raise UsageError(
            "--task is for --labels; in a sample set floating-point labels are targets"
        )
    if args.label is not None and len(args.label) != 1:
        raise UsageError("--label names one label of a sample set")
    samples = load_samples(args.inputs[0], label=args.label or ["label"])
    return LabelledWindows.from_samples(
        samples,
        label=args.label[0] if args.label else None,
        preprocess=args.preprocess,
        normalize=args.normalize,
        max_missing=args.max_missing,
    )


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _subjects(count: int) -> str:
    return f" ({count} subject{'s' * (count != 1)})" if count else ""


def _lines(predictor: Predictor, output: Path, how_on: str) -> list[str]:
    about: dict[str, Any] = predictor.description
    data = about["data"]
    parts = [
        f"{count:,} {part}" + _subjects(data["subjects"][part])
        for part, count in data["windows"].items()
        if count
    ]
    lines = [f"windows: {', '.join(parts)}"]
    if data["skipped"]:
        each = ", ".join(f"{count:,} for {why}" for why, count in sorted(data["skipped"].items()))
        lines.append(f"skipped: {each}")
    lines += [f"note: {note}" for note in data["notes"]]
    for part, found in about["metrics"].items():
        values = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in found.items())
        lines.append(f"{part}: {values}")
    training = about["training"]
    if training["interrupted"]:
        epoch = training["epochs_run"]
        lines.append(f"stopped in epoch {epoch}; this is the best so far; {how_on}")
    if training["skipped_steps"]:
        lines.append(f"{training['skipped_steps']} steps were skipped: not finite")
    lines.append(f"{predictor.task.name} ({training['mode']}) -> {output}")
    return lines
