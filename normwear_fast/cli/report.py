"""``normwear-fast report``: an encode output as one HTML page."""

from __future__ import annotations

import argparse

HELP = (
    "Write one HTML page about an output of encode: recordings, skipped windows and why, missing "
    "data, throughput, a map of the embeddings, and a window with its scalogram. The page is "
    "complete in itself and opens anywhere, a phone included."
)
EXAMPLE = "normwear-fast report out/ --recording ecg/mitdb_100 --window 3"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", help="the output folder of encode")
    parser.add_argument("--output", metavar="FILE", help="default: report.html in DIR")
    parser.add_argument("--recording", metavar="ID", help="of the window that is shown")
    parser.add_argument("--window", metavar="ID", help="its window_id (default: the first encoded)")


def run(args: argparse.Namespace) -> int:
    from normwear_fast.report import write_report

    path = write_report(args.folder, args.output, recording=args.recording, window_id=args.window)
    print(f"wrote {path}")
    return 0
