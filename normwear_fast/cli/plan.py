"""``normwear-fast plan``: what an encode run comes to, before it."""

from __future__ import annotations

import argparse
import json

from normwear_fast.cli.encode import (
    add_channel_arguments,
    add_form_arguments,
    add_window_arguments,
    check_window_arguments,
)
from normwear_fast.config import NormWearConfig
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
        channels=args.channels,
        pool=args.pool,
        channel_pool=args.channel_pool,
        scalogram=args.scalogram,
        rate=args.rate,
    )
    return show_plan(args, settings, windows, None, "cpu", *model_size(args.model_size))


def model_size(named: str | None) -> tuple[NormWearConfig, str]:
    """The sizes of ``--model-size``, and where they come from."""
    if named is None:
        return NormWearConfig.base(), "the released sizes, as nothing said others"
    config = NormWearConfig.small() if named == "small" else NormWearConfig.base()
    return config, f"--model-size {named}"


def show_plan(
    args: argparse.Namespace,
    settings: EncodeSettings,
    windows: WindowList | None,
    output: str | None,
    device_type: str,
    config: NormWearConfig,
    origin: str,
) -> int:
    """Prints the plan; also all that ``encode --dry-run`` does.

    Args:
        args: has ``inputs`` and ``json``; ``device`` names the planned devices where
            ``output`` is None, else (under encode) the one it would run on, and all known are shown.
        output: encode's output folder, whose content is no input.
        device_type: cpu or cuda, whose work units are counted.
        config: the model's sizes.
        origin: where those come from, in words.
    """
    from normwear_fast.cli.main import print_error
    from normwear_fast.encode.pipeline import default_tokens, plan_run
    from normwear_fast.encode.survey import find_inputs, survey
    from normwear_fast.planning import estimate, known_devices, named_devices, table

    names = args.device if isinstance(args.device, list) else None
    devices = named_devices(names) if names else known_devices()
    found = find_inputs(args.inputs, output)
    settings = default_tokens(settings, device_type)
    plan = plan_run(survey(found, settings, windows), settings, windows, config)
    failed = [entry.error for entry in plan.inputs if entry.error is not None]
    for message in failed:
        print_error(message)
    result = estimate(plan, settings, windows, config)
    if args.json:
        model = {"origin": origin, **config.to_dict()}
        print(json.dumps(result.to_dict(devices) | {"model": model}))
    else:
        print(f"model: embed_dim {config.embed_dim}, depth {config.depth}; {origin}")
        print(*table(result, devices), sep="\n")
    return 1 if failed else 0
