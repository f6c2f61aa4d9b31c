"""``normwear-fast zeroshot-train``: a fusion module from labelled windows and answers in words."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from normwear_fast.cli.main import seed
from normwear_fast.cli.zeroshot import add_model_arguments, load_model
from normwear_fast.errors import InputError, OutputError, UsageError, within
from normwear_fast.files import check_writable

HELP = "train the zero-shot fusion module on labelled windows"
EXAMPLE = """\
normwear-fast zeroshot-train labelled.npz --wording tasks.json --task activity \\
    --weights normwear.safetensors --text all-MiniLM-L6-v2/ --output fusion/"""

DESCRIPTION = """\
DATA is an NPZ with data (n, C, L), sampling_rate, label (n) and optionally task (n), or a Parquet
file with those columns, data a list of channels. Encoders stay frozen; the result works with the text
encoder it was trained with. Wordings of the published tasks are built in; your own go in a JSON:
{"activity": {"questions": ["What is the person doing?", "How do they move?"],
"frames": ["The person is {}.", "Someone is {}."], "classes": {"walk": ["walking", "strolling"], ...}}};
for a number give "unit" in place of "classes". The last question, frame and phrase are not trained
on but judge the result."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from normwear_fast.zeroshot.training import TrainingSettings

    default = TrainingSettings()
    parser.description = DESCRIPTION
    parser.add_argument("data", metavar="DATA", help="labelled windows, .npz or .parquet")
    add_model_arguments(parser)
    parser.add_argument("--output", required=True, metavar="DIR", help="of the fusion module")
    parser.add_argument("--task", metavar="NAME", help="of all windows, where DATA names none")
    parser.add_argument("--wording", metavar="JSON", help="how your own tasks are asked")
    parser.add_argument("--preprocess", choices=("reference", "none"), default="reference")
    parser.add_argument("--start-from", metavar="F", help="a fusion module to train further")
    parser.add_argument("--epochs", type=int, default=default.epochs)
    parser.add_argument("--batch-size", type=int, default=default.batch_size)
    parser.add_argument("--learning-rate", type=float, default=default.learning_rate)
    parser.add_argument("--held-out", type=float, default=default.held_out, metavar="SHARE")
    parser.add_argument("--seed", type=seed, default=default.seed)
    parser.add_argument("--overwrite", action="store_true", help="replace a fusion module in DIR")
    parser.add_argument("--json", action="store_true", help="the result as JSON")


def run(args: argparse.Namespace) -> int:
    import torch

    from normwear_fast.zeroshot import (
        RELEASED_TEXT_ENCODER,
        WORDING,
        MSiTF,
        TrainingSettings,
        load_text_encoder,
        load_wording,
        train_fusion,
    )
    from normwear_fast.zeroshot.checkpoint import DESCRIPTION_FILE, WEIGHTS_FILE
    from normwear_fast.zeroshot.training import at_model_rate, read_labelled

    output = Path(args.output)
    for name in (WEIGHTS_FILE, DESCRIPTION_FILE):
        if (output / name).exists() and not args.overwrite:
            raise OutputError(f"{output / name}: exists; choose another folder, or --overwrite")
    check_writable(output)
    settings = TrainingSettings(
        epochs=args.epochs,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        held_out=args.held_out,
        seed=args.seed,
    )
    wording = WORDING | (load_wording(args.wording) if args.wording else {})
    try:
        data = read_labelled(args.data, task=args.task)
        with within(args.data):
            data = at_model_rate(data, args.preprocess)
    except InputError as error:
        raise UsageError(str(error)) from None
    model = load_model(args)
    text = load_text_encoder(
        args.text or RELEASED_TEXT_ENCODER, device=model.device, offline=args.offline
    )
    if args.start_from:
        fusion = MSiTF.from_pretrained(args.start_from)
        if (fusion.embed_dim, fusion.query_dim) != (model.config.embed_dim, text.width):
            raise UsageError(
                f"{args.start_from} joins widths {fusion.embed_dim} and {fusion.query_dim}; encoder "
                f"and text encoder here have {model.config.embed_dim} and {text.width}"
            )
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            fusion = MSiTF(model.config.embed_dim, text.width)
    report = train_fusion(fusion, model, text, data, wording, settings, output, progress=_say)
    fusion.description["preprocess"] = args.preprocess
    fusion.save_pretrained(output)
    if args.json:
        print(json.dumps({"output": str(output), **fusion.description}, indent=2))
    else:
        for task, result in report.held_out.items():
            values = ", ".join(f"{name} {value:g}" for name, value in result.items())
            print(f"{task}, held-out wording: {values}")
        print(f"fusion module -> {output}")
    return 0


def _say(line: str) -> None:
    print(line, file=sys.stderr)
