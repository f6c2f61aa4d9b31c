"""``normwear-fast plan``: what an encode run comes to, before it."""

from __future__ import annotations

import argparse
import json

from normwear_fast.cli.encode import (
    add_channel_arguments,
    add_form_arguments,
    add_window_arguments,
    check_window_arguments,
    parse_names,
)
from normwear_fast.encode.settings import EncodeSettings
from normwear_fast.encode.windows import WindowList, read_window_list

HELP = (
    "Count windows, tokens, FLOPs, bytes of output and hours on named devices before a long run. "
    "Only headers are read where a format has them. Exit code 1: some recordings cannot be encoded "
    "(listed)."
)
EXAMPLE = "normwear-fast plan cohort/ --window 6 --device H100 --device 8xH100"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="recordings, or folders of them")
    parser.add_argument(
        "--device",
        action="append",
        metavar="NAME",
        help="hours on this one, as H100 or 8xH100; may be given again (default: all known)",
    )
    add_window_arguments(parser)
    add_channel_arguments(parser)
    add_form_arguments(parser)
    parser.add_argument(
        "--model-size", choices=("base", "small"), help="the released size (default), or the small"
    )
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")


def run(args: argparse.Namespace) -> int:
    check_window_arguments(args)
    windows = read_window_list(args.windows) if args.windows else None
    settings = EncodeSettings(
        window=6.0 if args.window is None else args.window,
        hop=args.hop,
        windows=windows.digest if windows else None,
        channels=parse_names(args.channels),
        pool=args.pool,
        channel_pool=args.channel_pool,
        scalogram=args.scalogram,
        rate=args.rate,
    )
    return show_plan(args, settings, windows, None, "cpu")


def show_plan(
    args: argparse.Namespace,
    settings: EncodeSettings,
    windows: WindowList | None,
    output: str | None,
    device_type: str,
) -> int:
    """Prints the plan; also all that ``encode --dry-run`` does.

    Args:
        args: has ``inputs``, ``model_size`` and ``json``; ``device`` names the planned devices where
            ``output`` is None, else (under encode) the one it would run on, and all known are shown.
        output: encode's output folder, whose content is no input.
        device_type: cpu or cuda, whose work units are counted.
    """
    from normwear_fast.cli.main import print_error
    from normwear_fast.config import NormWearConfig
    from normwear_fast.encode.pipeline import default_tokens, find_inputs, plan_run
    from normwear_fast.encode.survey import survey
    from normwear_fast.planning import estimate, known_devices, named_devices, table

    names = args.device if isinstance(args.device, list) else None
    devices = named_devices(names) if names else known_devices()
    config = NormWearConfig.small() if args.model_size == "small" else NormWearConfig.base()
    found = find_inputs(args.inputs, output)
    settings = default_tokens(settings, device_type)
    plan = plan_run(survey(found, settings, windows), settings, windows, config)
    failed = [entry.error for entry in plan.inputs if entry.error is not None]
    for message in failed:
        print_error(message)
    result = estimate(plan, settings, windows, config)
    if args.json:
        print(json.dumps(result.to_dict(devices)))
    else:
        print(*table(result, devices), sep="\n")
    return 1 if failed else 0
