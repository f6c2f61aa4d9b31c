"""``normwear-fast convert``: any checkpoint form to a folder with safetensors and config.json."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from normwear_fast.errors import OutputError

HELP = (
    "Read a checkpoint of any form (.pth, .safetensors, a folder, a hub id), check every name and "
    "shape, and write model.safetensors and config.json."
)
EXAMPLE = "normwear-fast convert normwear_last_checkpoint-15470-correct.pth --output normwear/"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("weights", metavar="W", help="checkpoint file, folder or hub id")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="where to write")
    parser.add_argument("--overwrite", action="store_true", help="replace weights in FOLDER")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    from normwear_fast.files import check_writable
    from normwear_fast.weights import CONFIG_FILE, WEIGHTS_FILE, convert

    for name in (WEIGHTS_FILE, CONFIG_FILE):
        path = Path(args.output, name)
        if path.exists() and not args.overwrite:
            raise OutputError(f"{path}: exists; choose another folder, or --overwrite")
    check_writable(args.output)
    report = convert(args.weights, args.output)
    if args.json:
        print(json.dumps({"output": args.output, **dataclasses.asdict(report)}))
        return 0
    parts = ["encoder"]
    parts += ["decoder"] * report.decoder
    parts += ["zero-shot fusion module"] * report.fusion
    print(f"{args.output}: {', '.join(parts)}; {report.names} names, {report.parameters:,} values")
    print(f"sha256 {report.sha256}")
    return 0
