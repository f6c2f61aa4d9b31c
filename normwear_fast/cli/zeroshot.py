"""``normwear-fast zeroshot``: probabilities of answers in words for every window of recordings."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from normwear_fast.cli.encode import CHANNELS_HELP, channel_names
from normwear_fast.cli.main import seed
from normwear_fast.errors import OutputError, UsageError, one_line, require
from normwear_fast.files import check_writable

if TYPE_CHECKING:
    from normwear_fast.encode.prepare import PreparedUnit, Row, Source
    from normwear_fast.encode.settings import EncodeSettings
    from normwear_fast.encode.windows import Window
    from normwear_fast.model import FastNormWear
    from normwear_fast.zeroshot import ZeroShotClassifier

HELP = "ask recordings a question in words"
EXAMPLE = """\
normwear-fast zeroshot cohort/100.hea --weights normwear.safetensors \\
    --fusion normwear_msitf_zeroshot_last_checkpoint-5.pth --question "Is the heart rhythm normal?" \\
    --option "The heartbeat is normal." --option "The heartbeat is abnormal." --picture why.png"""

GROUP = 256
"""Windows classified in one call: the raw ones take 10 MB, their tokens stay within the budget."""

PICTURE_SECONDS = 60.0
"""A picture shows the first minute of windows: more would be unreadable."""


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """What `zeroshot` and `zeroshot-train` ask alike about encoder and text model."""
    weights = parser.add_mutually_exclusive_group(required=True)
    weights.add_argument("--weights", metavar="W", help="checkpoint file, folder or hub id")
    weights.add_argument(
        "--random-weights", type=seed, metavar="SEED", help="a random encoder, for trials"
    )
    parser.add_argument(
        "--text",
        metavar="T",
        help="text encoder: a folder (transformers or sentence-transformers) or a hub id; the "
        "released one by default",
    )
    parser.add_argument("--offline", action="store_true", help="never ask the network")
    parser.add_argument("--scalogram", choices=("conv", "scipy"), default="conv")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda[:i]")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="recordings or folders of them")
    parser.add_argument("--question", required=True, help="a sentence")
    parser.add_argument(
        "--option", action="append", required=True, metavar="ANSWER", help="at least two"
    )
    add_model_arguments(parser)
    parser.add_argument(
        "--fusion", metavar="F", help="fusion module: file or folder; inside --weights by default"
    )
    parser.add_argument("--window", type=float, default=6.0, metavar="S", help="seconds (6)")
    parser.add_argument("--hop", type=float, metavar="S", help="seconds; the window by default")
    parser.add_argument("--windows", metavar="FILE", help="CSV or Parquet list of windows instead")
    parser.add_argument("--channels", metavar="NAMES", type=channel_names, help=CHANNELS_HELP)
    parser.add_argument(
        "--preprocess",
        choices=("reference", "none"),
        help="what the fusion module was trained with, or reference where it does not say",
    )
    parser.add_argument("--max-missing", type=float, default=0.1, metavar="FRACTION")
    parser.add_argument("--rate", type=float, metavar="HZ", help="of formats without a clock")
    parser.add_argument("--output", metavar="FILE.parquet", help="rows to a file, not the screen")
    parser.add_argument(
        "--picture",
        metavar="FILE",
        help="relevance over the first minute of the first recording, .png or .svg",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the files of --output and --picture"
    )
    parser.add_argument("--json", action="store_true", help="results as JSON")


def load_model(args: argparse.Namespace) -> FastNormWear:
    """The encoder the arguments name, on their device."""
    import torch

    from normwear_fast.config import NormWearConfig
    from normwear_fast.model import FastNormWear

    name = args.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name != "cpu" and not torch.cuda.is_available():
        raise UsageError(f"device {name}: no GPU that this PyTorch can use; choose cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"device {name!r}: must be auto, cpu or cuda[:i]") from None
    conv = args.scalogram == "conv"
    if args.weights is None:
        model = FastNormWear(conv, config=NormWearConfig(), seed=args.random_weights)
    else:
        model = FastNormWear.from_pretrained(args.weights, optimized_cwt=conv)
    return model.to(device)


def run(args: argparse.Namespace) -> int:
    from normwear_fast.cli.main import print_error
    from normwear_fast.encode.prepare import OK, Source
    from normwear_fast.encode.settings import EncodeSettings
    from normwear_fast.encode.survey import find_inputs, survey, windows_of
    from normwear_fast.encode.windows import read_window_list
    from normwear_fast.zeroshot import (
        RELEASED_TEXT_ENCODER,
        MSiTF,
        ZeroShotClassifier,
        load_text_encoder,
    )

    if len(args.option) < 2 or len(set(args.option)) < len(args.option):
        raise UsageError("--option must be given at least twice, with different answers")
    if args.fusion is None and args.weights is None:
        raise UsageError("--fusion is required with --random-weights")
    for name, path, endings in (
        ("--output", args.output, (".parquet",)),
        ("--picture", args.picture, (".png", ".svg")),
    ):
        if path is not None and Path(path).suffix.lower() not in endings:
            raise UsageError(f"{name} {path}: must end in {' or '.join(endings)}")
        if (
            path is not None
            and os.path.lexists(path)
            and not (args.overwrite and os.path.isfile(path))
        ):
            raise OutputError(f"{path}: exists; choose another file, or --overwrite")
    if args.picture:
        require("matplotlib.figure", "--picture", "plots")
    for path in filter(None, (args.output, args.picture)):
        check_writable(Path(path).parent)
    listed = read_window_list(args.windows) if args.windows else None
    found = find_inputs(args.inputs, None)
    fusion = MSiTF.from_pretrained(args.fusion or args.weights)
    settings = EncodeSettings(
        window=args.window,
        hop=args.hop,
        windows=listed.digest if listed else None,
        channels=args.channels,
        preprocess=args.preprocess or fusion.description.get("preprocess") or "reference",
        max_missing=args.max_missing,
        rate=args.rate,
        scalogram=args.scalogram,
    )
    surveyed = survey(found, settings, listed)
    model = load_model(args)
    text_source = args.text or fusion.description.get("text_encoder") or RELEASED_TEXT_ENCODER
    text = load_text_encoder(text_source, device=model.device, offline=args.offline)
    classifier = ZeroShotClassifier(model, fusion, text)
    trained_with = fusion.description.get("text_encoder")
    if trained_with and Path(trained_with).name != Path(text.name).name:
        _say(f"note: this fusion module was trained with text encoder {trained_with}")

    task = _Task(classifier, args.question, args.option, settings)
    provenance = {
        "question": args.question,
        "options": args.option,
        "settings": settings.to_dict(),
        "encoder": model.provenance(),
        "fusion": {"source": fusion.source, "sha256": fusion.sha256},
        "text_encoder": text.name,
    }
    writer = _ParquetRows(Path(args.output), provenance) if args.output else None
    rows: list[dict[str, Any]] = []
    counts = {"recordings": 0, "windows": 0, "skipped": 0}
    failed: list[dict[str, str]] = []
    picture, unwritten = args.picture, None
    try:
        for item in surveyed:
            error = item.error
            if error is None:
                source = Source(
                    item.id,
                    item.path,
                    item.channels,
                    windows_of(item.id, item.duration, settings, listed),
                )
                for group in task.prepared(source):
                    error = group.failed.get(item.id)
                    found_rows = task.rows(group)
                    counts["windows"] += len(found_rows)
                    counts["skipped"] += sum(row["status"] != OK for row in found_rows)
                    if writer is not None:
                        writer.write(found_rows)
                    else:
                        rows += found_rows
                if picture and error is None:
                    try:
                        picture = None if task.draw(picture, source) else picture
                    except OutputError as refused:  # the rows are whole without it
                        picture, unwritten = None, refused
            if error is None:
                counts["recordings"] += 1
            else:
                failed.append({"recording": item.id, "error": error})
                print_error(error)
        if writer is not None:
            writer.finish()
    finally:
        if writer is not None:
            writer.abandon()
    if picture:
        _say(f"note: no picture {picture}: no recording had a window to draw")
    _report(args, provenance, counts, rows, failed)
    if unwritten is not None:
        raise unwritten
    return 1 if failed else 0


@dataclass
class _Task:
    classifier: ZeroShotClassifier
    question: str
    options: list[str]
    settings: EncodeSettings

    def prepared(self, source: Source) -> Iterator[PreparedUnit]:
        """The windows of a recording, a group at a time, in order."""
        from normwear_fast.encode.prepare import Job, JobUnit, prepare_job

        firsts = range(0, len(source.windows), GROUP)
        units = tuple(
            JobUnit(index, ((0, first, min(first + GROUP, len(source.windows))),))
            for index, first in enumerate(firsts)
        )
        return prepare_job(Job((source,), units), self.settings)

    def rows(self, group: PreparedUnit) -> list[dict[str, Any]]:
        answers: Iterator[NDArray[np.float32]] = iter(())
        if group.data:
            answers = iter(self.classifier.predict_proba(group.data, self.question, self.options))
        return [self._row(row, next(answers) if row.status == "ok" else None) for row in group.rows]

    def _row(self, row: Row, answer: NDArray[np.float32] | None) -> dict[str, Any]:
        return {
            "recording": row.recording,
            "window_id": row.window.id,
            "start_s": row.window.start,
            "duration_s": row.window.duration,
            "channels": list(row.channels),
            "status": row.status,
            "missing_fraction": row.missing_fraction,
            "answer": None if answer is None else self.options[int(answer.argmax())],
            "probabilities": None if answer is None else [float(p) for p in answer],
        }

    def draw(self, picture: str, source: Source) -> bool:
        """The recording's first minute of windows; False where none of them could be classified."""
        from normwear_fast import plots

        shown: list[tuple[Window, NDArray[np.float32]]] = []
        group = next(self.prepared(source))
        signals = iter(group.data)
        for row in group.rows:
            if row.status != "ok":
                continue
            signal, window = next(signals), row.window
            if shown:
                last = shown[-1][0]
                if window.start + window.duration - shown[0][0].start > PICTURE_SECONDS:
                    break
                if window.start < last.start + last.duration - 1e-6:
                    continue
            shown.append((window, signal))
        if not shown:
            return False
        kept = [signal for _, signal in shown]
        relevance = self.classifier.relevance(kept, self.question)
        answers = self.classifier.predict_proba(kept, self.question, self.options)
        drawn = [
            plots.RelevanceWindow(window.start, signal, tokens, self.options[int(answer.argmax())])
            for (window, signal), tokens, answer in zip(shown, relevance, answers, strict=True)
        ]
        title = f"{source.id}: {self.question}"
        plots.save(plots.relevance(drawn, source.channels, title=title), picture)
        return True


class _ParquetRows:
    """Rows into a Parquet file that appears under its name only once it is whole."""

    def __init__(self, path: Path, provenance: dict[str, Any]) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        options = len(provenance["options"])
        self._schema = pa.schema(
            [
                ("recording", pa.string()),
                ("window_id", pa.string()),
                ("start_s", pa.float64()),
                ("duration_s", pa.float64()),
                ("channels", pa.list_(pa.string())),
                ("status", pa.string()),
                ("missing_fraction", pa.float64()),
                ("answer", pa.string()),
                ("probabilities", pa.list_(pa.float32(), options)),
            ],
            metadata={"normwear_fast_zeroshot": json.dumps(provenance, ensure_ascii=False)},
        )
        self.path = path
        self._temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._writer = pq.ParquetWriter(self._temporary, self._schema, compression="zstd")
        except OSError as error:
            raise OutputError(f"{path}: cannot be written ({one_line(error)})") from None

    def write(self, rows: list[dict[str, Any]]) -> None:
        import pyarrow as pa

        try:
            self._writer.write_table(pa.Table.from_pylist(rows, schema=self._schema))
        except OSError as error:
            raise OutputError(f"{self.path}: cannot be written ({one_line(error)})") from None

    def finish(self) -> None:
        try:
            self._writer.close()
            with self._temporary.open("rb") as file:
                os.fsync(file.fileno())
            self._temporary.replace(self.path)
        except OSError as error:
            raise OutputError(f"{self.path}: cannot be written ({one_line(error)})") from None

    def abandon(self) -> None:
        """Leaves nothing behind of a file that was not finished; nothing to do after one that was."""
        if self._temporary.exists():
            with contextlib.suppress(Exception):  # it writes once more, to a full disk too
                self._writer.close()
            with contextlib.suppress(OSError):
                self._temporary.unlink(missing_ok=True)


def _report(
    args: argparse.Namespace,
    provenance: dict[str, Any],
    counts: dict[str, int],
    rows: list[dict[str, Any]],
    failed: list[dict[str, str]],
) -> None:
    if args.json:
        result: dict[str, Any] = {**provenance, **counts, "failed": failed}
        if args.output:
            result["output"] = args.output
        else:
            result["rows"] = rows
        print(json.dumps(result, indent=2, ensure_ascii=False))
        return
    if not args.output:
        _print_table(rows, args.option)
    summary = f"{counts['windows']} windows of {counts['recordings']} recordings"
    if counts["skipped"]:
        summary += f", {counts['skipped']} skipped"
    if failed:
        summary += f", {len(failed)} recordings failed"
    _say(summary + (f" -> {args.output}" if args.output else ""))


def _print_table(rows: list[dict[str, Any]], options: list[str]) -> None:
    for number, option in enumerate(options, 1):
        print(f"p{number}: {option}")
    width = max([len("recording"), *(len(row["recording"]) for row in rows)])
    heads = "".join(f"{f'p{number}':>9}" for number in range(1, len(options) + 1))
    print(f"{'recording':<{width}} {'window':>8} {'start_s':>10}{heads}  answer")
    for row in rows:
        shown = f"{row['recording']:<{width}} {row['window_id']:>8} {row['start_s']:>10.3f}"
        if row["probabilities"] is None:
            print(f"{shown}  skipped: {row['status']}")
            continue
        values = "".join(f"{p:>9.5f}" for p in row["probabilities"])
        print(f"{shown}{values}  p{options.index(row['answer']) + 1}")


def _say(line: str) -> None:
    print(line, file=sys.stderr)
