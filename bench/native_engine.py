"""Where a layer's time goes in the native engine: `python -m bench.native_engine [--isa NAME]`.

One thread, in processor time (what other processes take does not count), best of the interleaved
rounds: the figures of docs/native-engine.md. Wall-clock ratios are bench/test_encoder.py's.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping

import torch

from normwear_fast import FastNormWear, backends, native
from normwear_fast.benchmarking import eager, gemm_calls, machine, reference_of
from normwear_fast.scalograms import scalogram

CHANNELS, SAMPLES = 3, 390


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--isa", choices=native.instruction_sets(), default=None)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    backends.BACKENDS["native"] = lambda: native.backend(arguments.isa)
    model = FastNormWear(True, precision="float32", backend="native").requires_grad_(False)
    facts = machine()
    print(f"{facts['cpu']}, one thread, {native.backend(arguments.isa).blas}, {facts['date']}")
    with torch.inference_mode():
        for precision in ("float32", "bfloat16", "int8"):
            model.precision = precision
            calls = parts(model)
            best = processor_time(
                {name: call for name, (call, _) in calls.items()}, arguments.rounds
            )
            for name, seconds in best.items():
                rate = calls[name][1] / seconds / 1e9
                print(f"{precision:9} {name:18} {1e3 * seconds:9.2f} ms {rate:8.1f} GFLOP/s")
        products = gemm_calls(model.config, CHANNELS * 560, torch.float32, torch.device("cpu"))
        best = processor_time(
            {name: call for name, (call, _) in products.items()}, arguments.rounds
        )
        for name, seconds in best.items():
            rate = products[name][1] / seconds / 1e9
            print(f"product   {name:18} {1e3 * seconds:9.2f} ms {rate:8.1f} GFLOP/s")
        x = torch.randn(1, CHANNELS, SAMPLES)
        reference = reference_of(model)
        plain = eager(reference, True)

        def fast(precision: str) -> Callable[[], object]:
            def run() -> object:
                model.precision = precision
                return model(x)

            return run

        whole: dict[str, Callable[[], object]] = {"reference eager": lambda: plain(x)}
        whole |= {name: fast(name) for name in ("float32", "bfloat16", "int8")}
        whole["reference tokens"] = lambda: reference.patch_embed(
            scalogram(x, "conv").flatten(0, 1)
        )
        best = processor_time(whole, max(3, arguments.rounds // 2))
        for name, seconds in best.items():
            ratio = best["reference eager"] / seconds
            print(f"encoder   {name:18} {1e3 * seconds:9.1f} ms {ratio:8.2f} x the reference")


if __name__ == "__main__":
    main()
