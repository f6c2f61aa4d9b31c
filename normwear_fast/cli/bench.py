"""``normwear-fast bench``: how fast this machine encodes, beside the plain model in the same run."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable

HELP = (
    "Encode windows of the released model's size with random weights, every precision in turn with "
    "the plain eager model, and print channel-windows a second."
)
EXAMPLE = "normwear-fast bench --channels 3 --samples 390"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch", type=int, default=2, metavar="B", help="windows (default 2)")
    parser.add_argument("--channels", type=int, default=3, metavar="C", help="default 3")
    parser.add_argument("--samples", type=int, default=390, metavar="L", help="default 390, 6 s")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds (default 5)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    from normwear_fast.config import MIN_SAMPLES
    from normwear_fast.errors import UsageError

    for name, least in (("batch", 1), ("channels", 1), ("rounds", 1), ("samples", MIN_SAMPLES)):
        if getattr(args, name) < least:
            raise UsageError(f"--{name} is {getattr(args, name)}; it must be at least {least}")

    import torch

    from normwear_fast.benchmarking import (
        channel_flops,
        eager,
        error_against,
        interleave,
        machine,
        ratio,
        reference_of,
    )
    from normwear_fast.engine import PRECISIONS
    from normwear_fast.model import FastNormWear

    if args.threads is not None:
        if args.threads < 1:
            raise UsageError(f"--threads is {args.threads}; it must be at least 1")
        torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = FastNormWear(True, precision="float32").requires_grad_(False).to(device)
    x = torch.randn(args.batch, args.channels, args.samples, device=device)
    baseline = eager(reference_of(model), True)

    def fast(precision: str) -> Callable[[], torch.Tensor]:
        def call() -> torch.Tensor:
            model.precision = precision
            return model(x)

        return call

    functions: dict[str, Callable[[], torch.Tensor]] = {"reference, eager": lambda: baseline(x)}
    for precision in PRECISIONS:
        if precision == "auto":
            continue
        try:
            fast(precision)()
        except UsageError:
            continue  # not on this device
        functions[f"FastNormWear {precision}"] = fast(precision)
    expected = baseline(x)
    timings = interleave(functions, args.rounds)
    windows = args.batch * args.channels
    flops = windows * channel_flops(model.config, args.samples, args.channels)
    rows = {}
    for name, timing in timings.items():
        times, spread = ratio(timings["reference, eager"], timing)
        rows[name] = timing.as_dict() | {
            "channel_windows_per_s": windows / timing.median,
            "gflops_per_s": flops / timing.median / 1e9,
            "ratio": times,
            "ratio_spread": spread,
            **error_against(expected, functions[name]()),
        }
    facts = machine()
    if args.json:
        print(json.dumps({"machine": facts, "rows": rows}))
        return 0
    print(
        f"{facts['gpu'] or facts['cpu']}, {facts['threads']} threads; released size, B={args.batch} "
        f"C={args.channels} L={args.samples}, median of {args.rounds} interleaved rounds"
    )
    print(f"{'':26}{'windows/s':>10}{'GFLOP/s':>10}{'ratio':>16}{'mean cosine':>14}")
    for name, row in rows.items():
        against = f"{row['ratio']:.2f} +- {row['ratio_spread']:.2f}"
        print(
            f"{name:26}{row['channel_windows_per_s']:>10.3g}{row['gflops_per_s']:>10.4g}"
            f"{against:>16}{row['mean_cosine']:>14.6f}"
        )
    print("a window here is one channel of one window")
    return 0
