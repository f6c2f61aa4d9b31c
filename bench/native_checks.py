"""The CPU operators of csrc/cpu on this machine: `python -m bench.native_checks`.

`checks` gives every operator of every instruction set the processor has, on random ragged inputs
against the definition in float64, as bench.cuda_checks does for the GPU's: outputs are poisoned with
NaN first, and each runs on one thread and on two, which must give the same bits. `not_run` names the
sets that are missing here. tests/operators_cpu/ goes further into shapes and limits; this is what
another machine's processor is asked before its numbers are believed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from normwear_fast import native, operators
from normwear_fast.backends import TORCH
from normwear_fast.benchmarking import machine
from normwear_fast.config import NormWearConfig
from normwear_fast.engine import Engine
from normwear_fast.folding import fold
from normwear_fast.operators import Pool, Tokenizer
from normwear_fast.packing import Layout, Segments
from normwear_fast.reference import ReferenceNormWear
from normwear_fast.wavelets import ScalogramMethod

Check = Callable[[], dict[str, float]]
"""Runs an operator into poisoned outputs; gives error, bound and stable (1: the same bits again)."""

CPU = torch.device("cpu")
EPS = 1e-6
FLOATS = (torch.float32, torch.bfloat16)


def checks() -> list[tuple[str, Check]]:
    """Every operator on every instruction set of this processor."""
    found: list[tuple[str, Check]] = []
    for name in native.instruction_sets():
        kernels = native.kernels(name)
        for dtype in FLOATS:
            kind = str(dtype).removeprefix("torch.")
            found += [
                (f"{name} residual_norm {kind}", partial(_residual_norm, kernels, dtype)),
                (f"{name} bias_gelu {kind}", partial(_bias_gelu, kernels, dtype)),
                (f"{name} quantise_rows {kind}", partial(_quantise_rows, kernels, dtype)),
                (f"{name} channel_attention {kind}", partial(_attention, kernels, dtype)),
            ]
        for pool in ("mean", "cls", "patch"):
            found.append((f"{name} pool_norm {pool}", partial(_pool_norm, kernels, pool)))
        for precision in native.OPERANDS:
            found.append((f"{name} linear {precision}", partial(_linear, kernels, precision)))
        for method in ("conv", "scipy"):
            found.append((f"{name} tokenize {method}", partial(_tokenize, kernels, method)))
        for precision in native.OPERANDS:
            for which in ("mean", "cls"):
                check = partial(_encoder, name, precision, which)
                found.append((f"{name} encoder {precision} {which}", check))
    return found


def not_run() -> list[str]:
    """Instruction sets that this build or this processor does not have."""
    return [name for name in native.INSTRUCTION_SETS if name not in native.instruction_sets()]


def run() -> tuple[list[dict[str, Any]], list[str]]:
    """Every check's result, printed as it comes, and the names of those that failed."""
    results, wrong = [], []
    for name, check in checks():
        try:
            result: dict[str, Any] = {"name": name, **check()}
            result["passed"] = bool(result["error"] <= result["bound"] and result["stable"])
        except Exception as error:  # one broken operator must not hide the others
            result = {"name": name, "raised": f"{type(error).__name__}: {error}", "passed": False}
        results.append(result)
        print(f"{'ok' if result['passed'] else 'FAILED':8}{result}")
        if not result["passed"]:
            wrong.append(name)
    for name in not_run():
        print(f"not run: this build or processor has no {name}")
    return results, wrong


def _outcome(run: Callable[[], Tensor], exact: Tensor, bound: float) -> dict[str, float]:
    """Error of one thread's result; stable if two threads give the same bits."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        got = run()
        torch.set_num_threads(2)
        stable = torch.equal(got, run())
    finally:
        torch.set_num_threads(before)
    difference = (got.double() - exact).abs()
    if got.dtype == torch.bfloat16:
        difference = difference - 2**-8 * exact.abs()  # the result's own rounding
    # NaN, which poison leaves where nothing was written, compares as larger than any bound.
    error = float("inf") if difference.isnan().any() else float(difference.max())
    return {"error": error, "bound": bound, "stable": float(stable)}


def _draw(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    values = np.random.default_rng().standard_normal(shape) * scale
    return torch.from_numpy(values.astype(np.float32)).to(dtype)


def _strided(x: Tensor) -> Tensor:
    """The same rows inside a wider matrix of NaN."""
    wide = torch.full((x.shape[0], x.shape[1] + 5), torch.nan, dtype=x.dtype)
    wide[:, 2:-3] = x
    return wide[:, 2:-3]


def _ragged(most: int, count: int) -> Segments:
    lengths = np.random.default_rng().integers(1, most, count)
    return Segments([1, *(int(n) for n in lengths)], CPU)


def _residual_norm(kernels: Any, dtype: torch.dtype) -> dict[str, float]:
    residual, carried = _draw(61, 771, scale=3.0) + 2.0, _draw(771)
    update = _strided(_draw(61, 771, dtype=dtype))
    exact = F.layer_norm(residual.double() + update.double() + carried.double(), (771,), eps=EPS)

    def run() -> Tensor:
        out = _strided(torch.full((61, 771), torch.nan, dtype=dtype))
        changed = residual.clone()
        return native.residual_norm(kernels, changed, carried, EPS, update=update, out=out)

    return _outcome(run, exact, 1e-5)


def _bias_gelu(kernels: Any, dtype: torch.dtype) -> dict[str, float]:
    x, bias = _draw(61, 3075, dtype=dtype, scale=3.0), _draw(3075)

    def run() -> Tensor:
        changed = _strided(x)
        native.bias_gelu(kernels, changed, bias)
        return changed

    return _outcome(run, F.gelu(x.double() + bias.double()), 1e-6)


def _quantise_rows(kernels: Any, dtype: torch.dtype) -> dict[str, float]:
    """In steps of each row's scale: half a step is the rounding itself."""
    x, bias = _strided(_draw(61, 771, dtype=dtype, scale=4.0)), _draw(771)
    _, scale, _ = native.quantise_rows(kernels, x, bias)

    def run() -> Tensor:
        q, own, offset = native.quantise_rows(kernels, x, bias)
        return (q * own[:, None].double() + offset[:, None]) / scale[:, None].double()

    exact = F.gelu(x.double() + bias.double()) / scale[:, None].double()
    return _outcome(run, exact, 0.501)


def _attention(kernels: Any, dtype: torch.dtype) -> dict[str, float]:
    heads, width, keys = 3, 192, _ragged(300, 5)
    query = _strided(_draw(keys.total, width, dtype=dtype))
    key_value = _strided(_draw(keys.total, 2 * width, dtype=dtype, scale=0.5))
    exact = operators.channel_attention(query.double(), key_value.double(), keys, keys, heads)

    def run() -> Tensor:
        out = torch.full(query.shape, torch.nan, dtype=dtype)
        return native.channel_attention(kernels, query, key_value, keys, keys, heads, out=out)

    return _outcome(run, exact, 5e-6 if dtype == torch.float32 else 2e-2)


def _pool_norm(kernels: Any, pool: Pool) -> dict[str, float]:
    sequences = _ragged(60, 6)
    values = (_draw(sequences.total, 771), _draw(771), _draw(771), _draw(771))
    exact = operators.pool_norm(*(x.double() for x in values), 1e-5, sequences, pool)
    return _outcome(lambda: native.pool_norm(kernels, *values, 1e-5, sequences, pool), exact, 2e-5)


def _linear(kernels: Any, precision: str) -> dict[str, float]:
    """Standardised rows times a weight with bias and gelu; the operands' rounding decides the bound."""
    rows, n, k = 131, 203, 768
    a, w = _strided(_draw(rows, k)), _draw(n, k, scale=k**-0.5)
    bias, carried = _draw(n), _draw(k)
    weight = native.pack(kernels, w, native.OPERANDS[precision])
    normed = F.layer_norm(a.double() + carried.double(), (k,), eps=EPS)
    exact = F.gelu(normed @ w.double().T + bias.double())

    def run() -> Tensor:
        c = torch.full((rows, n), torch.nan)
        options: dict[str, Any] = {"bias": bias, "carried": carried, "norm": True, "gelu": True}
        return native.linear(kernels, a, weight, c, eps=EPS, **options)

    relative = {"float32": 6e-6, "bfloat16": 1e-2, "int8": 3e-2}[precision]
    return _outcome(run, exact, relative * float(exact.abs().max()))


def _tokenize(kernels: Any, method: ScalogramMethod) -> dict[str, float]:
    layout, reference, config = _model(method, 128)
    engine = Engine(fold(reference, torch.float32), config, method, TORCH)
    tokenizer = engine.tokenizer(tuple(sorted(set(layout.sequences.lengths))))
    tables: dict[str, Any] = vars(tokenizer) | {"prepared": {}}
    tables |= {name: tables[name].double() for name in ("patch_weight", "templates")}
    series = _draw(layout.samples.total)
    exact = torch.full((layout.sequences.total, 128), torch.nan, dtype=torch.float64)
    operators.tokenize(exact, series, layout.samples, layout.sequences, Tokenizer(**tables))

    def run() -> Tensor:
        rows = torch.full(exact.shape, torch.nan)
        native.tokenize(kernels, rows, series, layout.samples, layout.sequences, tokenizer)
        return rows

    return _outcome(run, exact, 2e-6 * float(exact.abs().max()))


def _encoder(name: str, precision: str, pool: Pool) -> dict[str, float]:
    """The whole engine over a ragged micro-batch of two layers, fusion included."""
    layout, reference, config = _model("conv", 128)
    series = _draw(layout.samples.total)
    plain = Engine(fold(reference.double(), torch.float64), config, "conv", TORCH)
    exact = plain.run(series, layout, pool)
    folded = fold(reference.float(), torch.float32)
    engine = Engine(folded, config, "conv", native.backend(name), precision)
    bound = {"float32": 2e-5, "bfloat16": 5e-2, "int8": 2e-1}[precision]
    return _outcome(lambda: engine.run(series, layout, pool), exact, bound)


def _model(method: ScalogramMethod, width: int) -> tuple[Layout, ReferenceNormWear, NormWearConfig]:
    """A small model, and the shortest window, odd and even ones and a long one in one micro-batch."""
    config = NormWearConfig(
        embed_dim=width, depth=2, num_heads=2, decoder_embed_dim=16, decoder_depth=0
    )
    other = int(np.random.default_rng().integers(13, 200))
    shapes = [(1, 11), (1, 12), (2, 390), (1, 700), (3, other)]
    return Layout(shapes, method, config, CPU), ReferenceNormWear(config, decoder=False), config


def main() -> int:
    print(f"{machine()['cpu']}: {', '.join(native.instruction_sets()) or 'no native operators'}")
    return 1 if run()[1] else 0


if __name__ == "__main__":
    sys.exit(main())
