"""`normwear-fast probe`: linear probing of labelled windows, and preparation of the public sets."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

HELP = "linear probing of NormWear and baselines on labelled windows"
EXAMPLE = """\
normwear-fast probe --list
normwear-fast probe wesad --prepare ~/raw/WESAD --output samples/wesad
normwear-fast probe samples/wesad samples/gameemo --model normwear.safetensors \\
    --baseline statistics --output results/
normwear-fast probe windows.parquet --label stress --model random --baseline statistics --json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "datasets",
        nargs="*",
        metavar="DATASET",
        help="a prepared or published sample folder, a folder with labels.csv, a .parquet or an "
        ".npz; with --prepare, the key of a public set",
    )
    parser.add_argument("--list", action="store_true", help="list the 11 public sets and 18 tasks")
    parser.add_argument(
        "--prepare",
        metavar="RAW",
        help="make samples of the public set DATASET from its unpacked download RAW; nothing is "
        "downloaded; they go to --output",
    )
    parser.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="W",
        help="NormWear weights: a file, folder or hub id; `random` or `random-small` for random, "
        "seeded ones; may be given several times",
    )
    parser.add_argument(
        "--baseline",
        action="append",
        default=[],
        choices=["statistics", "raw", "chronos", "moment", "clap"],
        help="16 statistics a channel, the raw series, or a model whose package is installed",
    )
    parser.add_argument(
        "--protocol",
        action="append",
        default=[],
        choices=["full", "partial", "folds"],
        help="all training labels (default), a stratified tenth of them, or five folds by subject",
    )
    parser.add_argument(
        "--shuffle-channels",
        action="store_true",
        help="put every sample's channels in a random order of its own",
    )
    parser.add_argument(
        "--label",
        action="append",
        default=[],
        metavar="COLUMN",
        help="label column of a Parquet (default `label`); may be given several times",
    )
    parser.add_argument(
        "--resamples",
        type=int,
        default=1000,
        metavar="N",
        help="bootstrap draws and permutations (default 1000; 0 for no intervals)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn (default 0)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda[:i]")
    parser.add_argument(
        "--output",
        metavar="DIR",
        help="with --prepare, the samples' folder; else results.json, report.html and pictures",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing --output")
    parser.add_argument("--cache", metavar="DIR", help="where features are kept")
    parser.add_argument("--no-cache", action="store_true", help="keep no features")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")


def run(args: argparse.Namespace) -> int:
    from normwear_fast.errors import UsageError

    if args.list:
        return _list(args.json)
    if not args.datasets:
        raise UsageError("no DATASET given; a folder, a .parquet or an .npz, or --list")
    if args.seed < 0 or args.resamples < 0:
        raise UsageError("--seed and --resamples are 0 or more")
    return _prepare(args) if args.prepare else _probe(args)


def _list(as_json: bool) -> int:
    from normwear_fast.evaluate.registry import DATASETS

    if as_json:
        entries = [
            {
                "dataset": dataset.key,
                "title": dataset.title,
                "channels": dataset.channels,
                "modalities": dataset.modalities,
                "sampling_rates": dataset.sampling_rates,
                "tasks": [
                    {
                        "name": task.name,
                        "group": task.group,
                        "metric": task.metric,
                        "classes": task.classes,
                        "targets": task.targets,
                    }
                    for task in dataset.tasks
                ],
                "source": dataset.source,
            }
            for dataset in DATASETS.values()
        ]
        print(json.dumps(entries, indent=1))
        return 0
    for dataset in DATASETS.values():
        print(f"{dataset.key}: {dataset.title}, {len(dataset.channels)} channels; {dataset.source}")
        for task in dataset.tasks:
            what = ", ".join(task.classes or task.targets)
            print(f"    {task.name} ({task.group}): {what}")
    return 0


def _prepare(args: argparse.Namespace) -> int:
    from normwear_fast.errors import UsageError
    from normwear_fast.evaluate.prepare import prepare

    if len(args.datasets) != 1 or not args.output:
        raise UsageError("--prepare takes one DATASET (a key of --list) and --output DIR")
    done = prepare(
        args.datasets[0], args.prepare, args.output, seed=args.seed, overwrite=args.overwrite
    )
    about = {
        "dataset": done.dataset.key,
        "output": str(done.output),
        "samples": done.samples,
        "train": done.train,
        "test": done.test,
        "subjects": done.subjects,
        "flat_channels": done.flat_channels,
    }
    if args.json:
        print(json.dumps(about, indent=1))
    else:
        print(
            f"{done.dataset.title}: {done.samples} samples of {done.subjects} subjects in "
            f"{done.output} ({done.train} train, {done.test} test, {done.flat_channels} flat "
            "channels)"
        )
    return 0


def _probe(args: argparse.Namespace) -> int:
    from normwear_fast.errors import OutputError, UsageError, require
    from normwear_fast.evaluate.baselines import (
        BASELINES,
        Embedder,
        NormWear,
        default_cache,
        random_normwear,
    )
    from normwear_fast.evaluate.run import evaluate, table_rows, write_report
    from normwear_fast.evaluate.samples import load_samples
    from normwear_fast.files import check_writable

    if not args.model and not args.baseline:
        raise UsageError("nothing to probe; give --model, --baseline or both")
    output = Path(args.output) if args.output else None
    if output is not None and output.exists() and not args.overwrite:
        raise OutputError(f"{output}: exists; another --output, or --overwrite, would be right")
    require("sklearn.linear_model", "probing", "eval")
    if output is not None:
        check_writable(output)
        require("matplotlib.figure", "the report of --output", "plots")

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    paths = _once(args.datasets, say)
    sets = [load_samples(path, label=args.label or ["label"]) for path in paths]
    for samples, path in zip(sets, paths, strict=True):
        known = [task.name for task in samples.tasks]
        if samples.dataset is None and (missing := sorted(set(args.label) - set(known))):
            raise UsageError(
                f"{path}: --label {missing[0]}: its label is {', '.join(known)}; a column is chosen of "
                "a Parquet only"
            )
    names = [samples.name for samples in sets]
    if len(set(names)) != len(names):
        for samples, path in zip(sets, paths, strict=True):
            samples.name = path
    device = _device(args.device)
    embedders: list[Embedder] = []
    for source in dict.fromkeys(args.model):
        if source in ("random", "random-small"):
            embedder = random_normwear(small=source == "random-small", seed=args.seed)
        else:
            from normwear_fast.model import FastNormWear

            embedder = NormWear(FastNormWear.from_pretrained(source))
            if any(other.name == embedder.name for other in embedders):
                embedder.name = source
        embedder.model.to(device)
        embedders.append(embedder)
    for name in dict.fromkeys(args.baseline):
        baseline = BASELINES[name]()
        if hasattr(baseline, "device"):
            baseline.device = device
        embedders.append(baseline)
    cache = None if args.no_cache else Path(args.cache) if args.cache else default_cache()
    evaluation = evaluate(
        sets,
        embedders,
        protocols=tuple(dict.fromkeys(args.protocol)) or ("full",),
        shuffle=args.shuffle_channels,
        resamples=args.resamples,
        seed=args.seed,
        cache=cache,
        say=say,
    )
    if output is not None:
        write_report(evaluation, output)
        say(f"report: {output / 'report.html'}")
    if args.json:
        print(json.dumps(evaluation.to_json(), indent=1))
        return 0
    _print_table(table_rows(evaluation))
    for row in evaluation.rows:
        for note in row.result.notes:
            print(f"note: {row.name}, {row.model}, {row.protocol}: {note}")
    for entry in evaluation.averages:
        values = ", ".join(f"{name} {100 * value:.2f}" for name, value in entry["averages"].items())
        print(f"averages of {entry['model']}, {entry['protocol']}: {values}")
    for entry in evaluation.comparisons:
        first, second = entry["models"]
        print(
            f"{entry['dataset']} {entry['task']}, {entry['protocol']}: {first} - {second} "
            f"{100 * entry['difference']:+.2f} points, permutation p {entry['p_value']:.4f}"
        )
    return 0


def _once(paths: list[str], say: Callable[[str], None]) -> list[str]:
    """The same without what is there already under another spelling: a set compared with itself would
    pass for two."""
    from normwear_fast.evaluate.samples import SAMPLE_FOLDER

    kept: dict[str, str] = {}
    for path in paths:
        real = Path(os.path.realpath(path))
        key = str(real.parent if real.name == SAMPLE_FOLDER else real)
        if key in kept:
            also = "" if path == kept[key] else f", as {kept[key]} too"
            say(f"note: {path} is given twice{also}; it is used once")
        kept.setdefault(key, path)
    return list(kept.values())


def _device(name: str) -> str:
    import torch

    from normwear_fast.errors import UsageError

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu" or (name.split(":")[0] == "cuda" and torch.cuda.is_available()):
        return name
    raise UsageError(f"--device {name}: not on this machine; auto, cpu or cuda[:i]")


def _print_table(rows: list[dict[str, str]]) -> None:
    columns = [name for name in rows[0] if any(row[name] for row in rows)]
    widths = [max(len(name), *(len(row[name]) for row in rows)) for name in columns]
    print(
        "  ".join(name.ljust(width) for name, width in zip(columns, widths, strict=True)).rstrip()
    )
    for row in rows:
        cells = (row[name].ljust(width) for name, width in zip(columns, widths, strict=True))
        print("  ".join(cells).rstrip())
