"""Where a layer's time goes in the native engine: `python -m bench.native_engine [--isa NAME] [--save]`.

One thread, in processor time (what other processes take does not count), best of the interleaved
rounds, and how far float32 sums are from float64: the figures of docs/native-engine.md, kept in
bench/results/<device>-<date>-layers.json. Wall-clock ratios are bench/test_encoder.py's.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from bench.saving import dated, save
from normwear_fast import FastNormWear, NormWearConfig, backends, native
from normwear_fast.benchmarking import eager, gemm_calls, machine, reference_of
from normwear_fast.scalograms import scalogram

CHANNELS, SAMPLES = 3, 390
PRECISIONS = ("float32", "bfloat16", "int8")


def processor_time(functions: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Best seconds of each, on this thread alone."""
    best = dict.fromkeys(functions, float("inf"))
    for i in range(rounds + 1):
        for name, function in functions.items():
            start = time.thread_time()
            function()
            if i:  # the first round warms up
                best[name] = min(best[name], time.thread_time() - start)
    return best


def parts(model: FastNormWear) -> dict[str, tuple[Callable[[], object], float]]:
    """The pieces of one micro-batch as (call, FLOPs)."""
    config, width = model.config, model.config.embed_dim
    layout = model._layout([(CHANNELS, SAMPLES)])
    engine = model._engine()
    encoder, operators = engine.encoder, engine.backend
    block, folded, rows = encoder.blocks[0], encoder.folded, layout.sequences.total
    residual = torch.randn(rows, width)
    qkv = torch.randn(rows, 3 * width).to(encoder.dtype)
    attended = torch.randn(rows, width).to(encoder.dtype)
    series = torch.randn(layout.samples.total)
    tokenizer = engine.tokenizer((rows // CHANNELS,))
    lengths = layout.sequences

    def feed() -> None:
        encoder.kernels.feed(
            residual=residual.data_ptr(), attended=native._view(attended), rows=rows,
            proj=block.proj, fc1=block.fc1, fc2=block.fc2, carried=folded.carried[1].data_ptr(),
            fc1_bias=block.fc1_bias.data_ptr(), eps=folded.layer_eps, threads=1,
        )  # fmt: skip

    hidden = config.hidden_dim
    return {
        "tokenize": (
            lambda: operators.tokenize(residual, series, layout.samples, lengths, tokenizer),
            CHANNELS * 0.176e9,
        ),
        "norm + qkv": (
            lambda: encoder._linear(
                residual, block.qkv, qkv, carried=folded.carried[0], bias=block.qkv_bias, norm=True
            ),
            2.0 * rows * 3 * width * width,
        ),
        "attention": (
            lambda: operators.channel_attention(
                qkv[:, :width], qkv[:, width:], lengths, lengths, config.num_heads, out=attended
            ),
            4.0 * rows * (rows // CHANNELS) * width,
        ),
        "proj + norm + MLP": (feed, 2.0 * rows * (width * width + 2 * width * hidden)),
        "fusion block": (
            lambda: encoder._true_block(
                residual[layout.cls_rows], encoder.fusions[0], layout.windows
            ),
            2.0 * CHANNELS * (4 * width * width + 2 * width * hidden),
        ),
    }


def layer(model: FastNormWear, rounds: int) -> dict[str, dict[str, float]]:
    """The pieces of a micro-batch in the model's precision."""
    calls = parts(model)
    best = processor_time({name: call for name, (call, _) in calls.items()}, rounds)
    return rates(best, {name: flops for name, (_, flops) in calls.items()})


def products(rounds: int) -> dict[str, dict[str, float]]:
    """The float32 products of a layer by every library here and by the native engine."""
    calls = gemm_calls(NormWearConfig.base(), CHANNELS * 560, torch.float32, torch.device("cpu"))
    best = processor_time({name: call for name, (call, _) in calls.items()}, rounds)
    return rates(best, {name: flops for name, (_, flops) in calls.items()})


def rates(best: Mapping[str, float], flops: Mapping[str, float]) -> dict[str, dict[str, float]]:
    return {name: {"s": s, "flops_per_s": flops[name] / s} for name, s in best.items()}


def encoders(model: FastNormWear, rounds: int) -> dict[str, dict[str, float]]:
    """The whole encoder in each precision against the eager reference."""
    x = torch.randn(1, CHANNELS, SAMPLES)
    reference = reference_of(model)
    plain = eager(reference, True)

    def fast(precision: str) -> Callable[[], object]:
        def run() -> object:
            model.precision = precision
            return model(x)

        return run

    calls: dict[str, Callable[[], object]] = {"reference eager": lambda: plain(x)}
    calls |= {name: fast(name) for name in PRECISIONS}
    calls["reference tokens"] = lambda: reference.patch_embed(scalogram(x, "conv").flatten(0, 1))
    best = processor_time(calls, rounds)
    return {name: {"s": s, "ratio": best["reference eager"] / s} for name, s in best.items()}


def sum_errors(isa: str, rows: int = 512, outputs: int = 512) -> dict[str, dict[str, float]]:
    """Standard deviation, against float64, of a float32 product's sums of k products of unit normals."""
    kernels, found = native.kernels(isa), {}
    for k in (768, 3072):
        a, b = torch.randn(rows, k), torch.randn(outputs, k)
        exact = a.double() @ b.double().T
        own = native.linear(kernels, a, native.pack(kernels, b, 0), torch.empty(rows, outputs))
        found[str(k)] = {
            "native": float((own.double() - exact).std()),
            "torch": float(((a @ b.T).double() - exact).std()),
        }
    return found


def measure(isa: str, rounds: int) -> dict[str, Any]:
    """All of one instruction set, printed as it comes."""
    backends.BACKENDS["native"] = lambda: native.backend(isa)
    model = FastNormWear(True, precision="float32", backend="native").requires_grad_(False)
    found: dict[str, Any] = {}
    for precision in PRECISIONS:
        model.precision = precision
        found[precision] = layer(model, rounds)
    found["encoder"] = encoders(model, max(3, rounds // 2))
    for section, rows in found.items():
        for name, row in rows.items():
            rate = (
                f"{row['ratio']:8.2f} x the reference"
                if "ratio" in row
                else f"{row['flops_per_s'] / 1e9:8.1f} GFLOP/s"
            )
            print(f"{isa:10} {section:9} {name:18} {1e3 * row['s']:9.2f} ms {rate}")
    found["sum_error"] = sum_errors(isa)
    for k, row in found["sum_error"].items():
        print(f"{isa:10} error of sums of {k}: {row['native']:.2e}, torch's {row['torch']:.2e}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--isa",
        nargs="+",
        choices=native.instruction_sets(),
        default=[native.kernels().name],
        help="instruction sets (default: the best here)",
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--save", action="store_true", help="write the JSON beside the others")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    facts = machine()
    print(f"{facts['cpu']}, one thread, {facts['date']}")
    result: dict[str, Any] = {"instruction_sets": {}}
    with torch.inference_mode():
        for isa in arguments.isa:
            result["instruction_sets"][isa] = measure(isa, arguments.rounds)
        result["products"] = products(arguments.rounds)
    for name, row in result["products"].items():
        print(f"product {name:18} {1e3 * row['s']:9.2f} ms {row['flops_per_s'] / 1e9:8.1f} GFLOP/s")
    if arguments.save:
        save(dated("layers"), result)


if __name__ == "__main__":
    main()
