"""``normwear-fast pretrain``: a masked autoencoder from prepared series."""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from normwear_fast.cli.main import goes_on
from normwear_fast.errors import InputError, UsageError

if TYPE_CHECKING:
    from normwear_fast.config import NormWearConfig

HELP = """\
Train a masked autoencoder on the shards of `normwear-fast prepare`. The output folder is one that
every other command takes as --weights. The same command, without --overwrite, goes on with a run that
was stopped, at whatever point."""
EXAMPLE = """\
normwear-fast pretrain shards/ --output run/ --config small --steps 5000 --batch-size 32 \\
    --accumulate 1 --probe labelled/"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from normwear_fast.pretrain.settings import PretrainSettings, RunSettings

    default, run = PretrainSettings(), RunSettings()
    parser.add_argument("data", metavar="DATA", help="folder of normwear-fast prepare")
    parser.add_argument("--output", required=True, metavar="DIR", help="to write or go on with")
    parser.add_argument(
        "--overwrite", action="store_true", help="start anew in --output, a run's folder"
    )
    model = parser.add_argument_group("model")
    model.add_argument(
        "--config",
        metavar="SIZE",
        help="base (default), small, or a JSON file of NormWearConfig's names",
    )
    model.add_argument("--start-from", metavar="W", help="weights with a decoder to train further")
    recipe = parser.add_argument_group("recipe (the same whenever a run goes on)")
    recipe.add_argument("--mask", choices=("random", "structured"), default=default.mask)
    recipe.add_argument("--no-mixup", action="store_true", help="train on the series as they are")
    recipe.add_argument("--steps", type=int, default=default.steps)
    recipe.add_argument(
        "--batch-size",
        type=int,
        default=default.batch_size,
        metavar="N",
        help=f"windows of a micro-batch on a device (default {default.batch_size})",
    )
    recipe.add_argument(
        "--accumulate",
        type=int,
        default=default.accumulate,
        metavar="N",
        help=f"micro-batches of a step on a device (default {default.accumulate})",
    )
    recipe.add_argument(
        "--learning-rate",
        type=float,
        default=default.base_learning_rate,
        metavar="LR",
        help="for 256 windows a step; scaled to the windows (default %(default)g)",
    )
    recipe.add_argument("--warmup", type=int, metavar="STEPS", help="default: a tenth of --steps")
    recipe.add_argument("--weight-decay", type=float, default=default.weight_decay)
    recipe.add_argument("--clip", type=float, default=default.clip, metavar="NORM")
    recipe.add_argument("--seed", type=int, default=default.seed)
    recipe.add_argument(
        "--precision",
        choices=("float32", "bfloat16"),
        default=default.precision,
        help="of the products; weights stay float32 (default %(default)s)",
    )
    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", default="auto", help="auto, cpu or cuda (default auto)")
    machine.add_argument(
        "--devices", default="auto", metavar="N", help="default: all GPUs, one CPU"
    )
    machine.add_argument(
        "--strategy",
        choices=("auto", "ddp", "fsdp"),
        default="auto",
        help="how devices share the work (default auto: ddp where there are several)",
    )
    machine.add_argument("--compile", action="store_true", help="through torch.compile")
    watching = parser.add_argument_group("watching")
    watching.add_argument(
        "--checkpoint-every", type=int, default=run.checkpoint_every, metavar="STEPS"
    )
    watching.add_argument("--picture-every", type=int, default=run.picture_every, metavar="STEPS")
    watching.add_argument("--probe", metavar="FOLDER", help="labelled windows, as probe takes them")
    watching.add_argument("--probe-every", type=int, default=run.probe_every, metavar="STEPS")
    watching.add_argument("--json", action="store_true", help="the result as JSON")


def run(args: argparse.Namespace) -> int:
    from normwear_fast.pretrain.data import SeriesShards
    from normwear_fast.pretrain.settings import PretrainSettings, RunSettings
    from normwear_fast.pretrain.trainer import pretrain

    try:
        settings = PretrainSettings(
            steps=args.steps,
            batch_size=args.batch_size,
            accumulate=args.accumulate,
            mask=args.mask,
            mixup=not args.no_mixup,
            base_learning_rate=args.learning_rate,
            warmup=args.warmup,
            weight_decay=args.weight_decay,
            clip=args.clip,
            precision=args.precision,
            seed=args.seed,
        )
        watching = RunSettings(
            accelerator=args.device,
            devices=int(args.devices) if args.devices.isdigit() else args.devices,
            strategy=args.strategy,
            compile=args.compile,
            checkpoint_every=args.checkpoint_every,
            picture_every=args.picture_every,
            probe_every=args.probe_every,
        )
    except UsageError as error:  # it begins with the setting's name
        name, _, rest = str(error).partition(" ")
        option = name.removeprefix("base_").replace("_", "-")
        raise UsageError(f"--{option} {rest}") from None
    config = None if args.config is None else _config(args.config)
    initial = None
    if args.start_from:
        from normwear_fast.weights import load_checkpoint

        checkpoint = load_checkpoint(args.start_from, config=config)
        if not checkpoint.has_decoder:
            raise UsageError(
                f"{args.start_from}: has no decoder; training goes on from one with it"
            )
        if config not in (None, checkpoint.config):
            raise UsageError(f"{args.start_from}: of other sizes than --config {args.config}")
        config, initial = checkpoint.config, checkpoint.state_dict
    samples = None
    if args.probe:
        from normwear_fast.evaluate.samples import load_samples

        samples = load_samples(args.probe)
    shards = SeriesShards(args.data)
    skipped = ", ".join(f"{count} {why}" for why, count in sorted(shards.skipped.items()))
    _say(f"{args.data}: {len(shards)} series" + (f"; left out: {skipped}" if skipped else ""))
    try:
        report = pretrain(
            shards,
            config or _config("base"),
            settings,
            args.output,
            run=watching,
            initial=initial,
            probe=samples,
            overwrite=args.overwrite,
            say=_say,
        )
    except InputError as error:
        # Not the command's fault: the run diverged, and what it has so far is kept.
        _say(f"error: {error}")
        return 1
    if report is None:  # another process speaks for this one
        return 0
    if args.json:
        loss = report.loss if math.isfinite(report.loss) else None
        values = {**asdict(report), "loss": loss, "output": args.output}
        print(json.dumps(values, indent=2))
    else:
        print(
            f"{report.step} of {report.steps} steps, loss {report.loss:.5f}, {report.skipped} skipped, "
            f"{report.windows_per_second:.1f} windows/s -> {args.output}"
        )
    if report.step < report.steps:
        _say(f"stopped; {goes_on(args)}")
        return 130
    return 0


def _config(name: str) -> NormWearConfig:
    from normwear_fast.config import NormWearConfig
    from normwear_fast.weights import ARCHITECTURE, FORMAT_VERSION, _config_from, _read_json

    if name in ("base", "small"):
        return NormWearConfig.base() if name == "base" else NormWearConfig.small()
    path = Path(name)
    if not path.is_file():
        raise UsageError(f"--config {name}: neither base nor small, and no such file")
    values = _read_json(path)
    ours = {"architecture": ARCHITECTURE, "format_version": FORMAT_VERSION}
    for key in (*ours, "optimized_cwt", "metadata"):
        values.pop(key, None)
    return _config_from(values, path)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
