"""linear_gelu: fc1 with its activation, against the vendor's product and `bias_gelu` after it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench.kernels import SEQUENCES, TOKENS, WIDTH, Check, Compiled
from bench.kernels.measure import default_device, excess, seconds, twice
from normwear_fast.kernels import linear_gelu as module
from normwear_fast.kernels import tuning
from normwear_fast.kernels.bias_gelu import bias_gelu
from normwear_fast.kernels.tuning import Choice, capability, choices

ROWS, HIDDEN = SEQUENCES * TOKENS, 4 * WIDTH
FLOPS = 2.0 * ROWS * HIDDEN * WIDTH
BYTES = 2.0 * (ROWS * WIDTH + HIDDEN * WIDTH + ROWS * HIDDEN)
MULTIPROCESSORS = 132
"""An H100's."""


def compiled() -> list[Compiled]:
    """The tiles of one program each; and one entry a persistent choice, whose blocks are in its types."""
    tiled = {
        target: tuple(choice for choice in row if "PER_SM" not in choice.blocks)
        for target, row in module.CHOICES.items()
    }
    found = [
        Compiled(
            name="linear_gelu bfloat16",
            kernel=module.linear_gelu_kernel,
            signature={
                "x": "*bf16",
                "weight": "*bf16",
                "bias": "*fp32",
                "out": "*bf16",
                "rows": "i32",
                "x_stride": "i32",
                "out_stride": "i32",
            },
            constants={"N": HIDDEN, "K": WIDTH},
            table=tiled,
            flops=FLOPS,
            bytes=BYTES,
            programs=lambda blocks: -(-ROWS // blocks["BLOCK_M"]) * -(-HIDDEN // blocks["BLOCK_N"]),
            dot=True,
            unit="bfloat16",
            divisible=("x_stride", "out_stride"),
        )
    ]
    persistent: dict[str, tuple[Choice, int]] = {}
    for target, row in module.CHOICES.items():
        for choice in row:
            if "PER_SM" in choice.blocks:
                m, n, k = (choice.blocks[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
                name = f"linear_gelu persistent {m}x{n}x{k}, {choice.num_stages} stages"
                persistent.setdefault(name, (choice, target))
    for name, (choice, target) in persistent.items():
        blocks = dict(choice.blocks)
        per_sm = blocks.pop("PER_SM")
        m, n, k = blocks["BLOCK_M"], blocks["BLOCK_N"], blocks["BLOCK_K"]
        found.append(
            Compiled(
                name=name,
                kernel=module.linear_gelu_persistent_kernel,
                signature={
                    "x": f"tensordesc<bf16[{m},{k}]>",
                    "weight": f"tensordesc<bf16[{n},{k}]>",
                    "bias": "*fp32",
                    "out": f"tensordesc<bf16[{m},{n // 2}]>",
                    "rows": "i32",
                },
                constants={"N": HIDDEN, "K": WIDTH},
                table={target: (Choice(blocks, choice.num_warps, choice.num_stages),)},
                flops=FLOPS,
                bytes=BYTES,
                programs=lambda blocks, per_sm=per_sm: per_sm * MULTIPROCESSORS,
                dot=True,
                unit="bfloat16",
            )
        )
    return found


def checks(
    device: torch.device | None = None, rows: int = 4_099, inner: int = WIDTH, hidden: int = HIDDEN
) -> list[tuple[str, Check]]:
    """Every choice of the device's, the last tile of rows half empty."""
    device = device or default_device()
    return [
        (f"linear_gelu {i} {dtype}", _check(choice, dtype, device, rows, inner, hidden))
        for i, choice in enumerate(choices(module.CHOICES, capability(device)))
        for dtype in (torch.bfloat16, torch.float16)
    ]


def _check(
    choice: Choice, dtype: torch.dtype, device: torch.device, rows: int, inner: int, hidden: int
) -> Check:
    def check() -> dict[str, float]:
        x = torch.randn(rows, inner, device=device).to(dtype)
        weight = (torch.randn(hidden, inner, device=device) / inner**0.5).to(dtype)
        bias = torch.randn(hidden, device=device)

        def run() -> Tensor:
            out = torch.full((rows + 1, hidden), torch.nan, device=device, dtype=dtype)
            module.launch(choice, x, weight, bias, out[:rows])
            if not bool(out[rows].isnan().all()):
                out[:] = torch.nan  # wrote past its rows
            return out[:rows]

        got, stable = twice(run)
        exact = module.linear_gelu_ref(x.double(), weight.double(), bias.double())
        return {**excess(got, exact, 3e-6, torch.finfo(dtype).eps), "stable": stable}

    return check


def _operands(
    device: torch.device, rows: int, width: int, hidden: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = torch.randn(rows, width, device=device).bfloat16()
    weight = (torch.randn(hidden, width, device=device) / width**0.5).bfloat16()
    bias = torch.randn(hidden, device=device)
    return x, weight, bias, torch.empty(rows, hidden, device=device, dtype=torch.bfloat16)


def tune(
    device: torch.device,
    rows: int = ROWS,
    width: int = WIDTH,
    hidden: int = HIDDEN,
    rounds: int = 20,
) -> dict[str, float]:
    """Keeps the fastest choice at a shape; seconds of each."""
    operands = _operands(device, rows, width, hidden)

    def timed(choice: Choice) -> float:
        return seconds(lambda: module.launch(choice, *operands), device, rounds)

    return tuning.tune("linear_gelu", str(torch.bfloat16), module.CHOICES, device, timed)


def timings(device: torch.device | None = None, rows: int = ROWS) -> list[dict[str, Any]]:
    """Every choice, the vendor's product alone, and that with the activation after it."""
    device = device or default_device()
    x, weight, bias, out = _operands(device, rows, WIDTH, HIDDEN)

    def product() -> None:
        torch.mm(x, weight.T, out=out)

    def product_then_gelu() -> None:
        product()
        bias_gelu(out, bias)

    flops = FLOPS * rows / ROWS
    both = seconds(product_then_gelu, device)
    found: list[dict[str, Any]] = [
        {"name": "fc1 alone, vendor's", "seconds": seconds(product, device), "flops": flops},
        {"name": "fc1, vendor's, then bias_gelu", "seconds": both, "flops": flops},
    ]
    for choice in choices(module.CHOICES, capability(device)):

        def run(choice: Choice = choice) -> None:
            module.launch(choice, x, weight, bias, out)

        name = (
            f"linear_gelu {dict(choice.blocks)} {choice.num_warps} warps {choice.num_stages} stages"
        )
        try:
            taken = seconds(run, device)
        except Exception as error:  # one choice the device refuses must not hide the others
            found.append({"name": name, "refused": f"{type(error).__name__}: {error}"})
            continue
        found.append(
            {
                "name": name,
                "seconds": taken,
                "flops": flops,
                "bytes": BYTES * rows / ROWS,
                "over_baseline": both / taken,
            }
        )
    return found
