"""The operators in CUDA C++: what `csrc/cuda` takes, prepared and checked.

The compiled module gets addresses and sizes only, so everything it relies on is checked here: device,
dtype, shape, contiguity, alignment. The kernels' arithmetic is tested on the host (tests/test_cuda.py
compiles the same source for the CPU) and their code by the compiler's report; `python -m
bench.gpu_check` runs them on a GPU (an H100 and an H200 so far).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from normwear_fast import _native, operators
from normwear_fast.backends import Backend
from normwear_fast.errors import InputError, UsageError
from normwear_fast.operators import Tokenizer
from normwear_fast.packing import Segments
from normwear_fast.wavelets import NEGLIGIBLE, ScalogramMethod, wavelet_bank

TYPES = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float8_e4m3fn: 2,
    torch.int16: 3,
    torch.int32: 4,
}
"""``Type`` of csrc/cuda/launch.h."""

PATCH_SIZE = (9, 5)
"""Rows and scales of a patch that the tokenizer is written for."""

TILE_TOKENS = 64
CHUNK_ROWS = 64
"""Tokens of a thread block and most rows of patches of a chunk, as in csrc/cuda/tokenize.cuh."""

LARGEST_WIDTH = 4096
"""Of a row that residual_norm keeps in registers."""


def backend() -> Backend:
    """The backend ``cuda``: tokenize and residual_norm in CUDA C++, the rest plain PyTorch.

    Raises:
        UsageError: the CUDA operators were not built.
    """
    _module()
    return Backend("cuda", tokenize=tokenize, residual_norm=residual_norm)


def _module() -> Any:
    module, why_not = _native.load()
    if module is None:
        raise UsageError(f"backend 'cuda' needs normwear_fast._C, which cannot be used: {why_not}")
    if not module.CUDA:
        raise UsageError(
            "backend 'cuda' was not built; put nvcc (CUDA 12.8 or later) on the PATH and reinstall "
            "normwear-fast"
        )
    return module


def launch(operator: str, device: torch.device, fields: dict[str, Any]) -> None:
    """Starts an operator on the device's current stream; tensors among the fields become addresses."""
    if device.type != "cuda":
        raise InputError(
            f"{operator}: the tensors are on {device}; backend 'cuda' needs a CUDA device"
        )
    run = getattr(_module(), f"cuda_{operator}")
    with torch.cuda.device(device):
        try:
            run(addresses(fields), torch.cuda.current_stream(device).cuda_stream)
        except RuntimeError as error:
            raise UsageError(f"{error} (on {torch.cuda.get_device_name(device)})") from None


def addresses(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields with each tensor as its address and None as the null pointer."""
    return {
        name: value.data_ptr() if isinstance(value, Tensor) else 0 if value is None else value
        for name, value in fields.items()
    }


def check(
    operator: str,
    name: str,
    tensor: Tensor,
    device: torch.device,
    dtypes: tuple[torch.dtype, ...],
    shape: tuple[int | None, ...],
) -> None:
    """Refuses a tensor that a kernel could not read; None in the shape stands for any size."""
    fits = tensor.ndim == len(shape) and all(
        want is None or size == want for size, want in zip(tensor.shape, shape, strict=True)
    )
    if tensor.device != device:
        problem = f"is on {tensor.device}, the others on {device}"
    elif tensor.dtype not in dtypes:
        problem = f"is {tensor.dtype}, not {' or '.join(map(str, dtypes))}"
    elif not fits:
        problem = f"has shape {tuple(tensor.shape)}, not {shape}"
    elif not tensor.is_contiguous():
        problem = "is not contiguous"
    elif tensor.numel() and tensor.data_ptr() % 16:
        problem = "does not start at a multiple of 16 bytes"
    else:
        return
    raise InputError(f"{operator}: {name} {problem}")


# residual_norm


def residual_norm(
    residual: Tensor,
    carried: Tensor | None,
    eps: float,
    *,
    update: Tensor | None = None,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """`operators.residual_norm` on the GPU; float64, and widths it has no kernel for, run plain.

    Args:
        residual: (rows, E) float32 or bfloat16; ``update`` is added to it in place.
        carried: (E,) float32 or None.
        eps: of the norm.
        update: (rows, E) float32 or bfloat16, or None.
        dtype: of the result: float32, bfloat16 or float8_e4m3fn; the residual's by default.
        out: (rows, E) buffer for the result.
        scale: (rows,) float32, written where the result is float8_e4m3fn: a row's largest size over
            448, by which its values are divided (1 for a row of zeros).

    Returns:
        (rows, E): zero mean and unit variance a row.

    Raises:
        InputError: a tensor of another dtype, device, shape or layout; float8 without ``scale``.
        UsageError: not built, or the launch was refused.
    """
    rows, width = residual.shape
    dtype = out.dtype if out is not None else dtype or residual.dtype
    plain = residual.dtype == torch.float64 or width % 4 != 0 or width > LARGEST_WIDTH
    if plain and dtype != torch.float8_e4m3fn:
        return operators.residual_norm(residual, carried, eps, update=update, dtype=dtype, out=out)
    name, device, floats = "residual_norm", residual.device, (torch.float32, torch.bfloat16)
    if out is None:
        out = torch.empty(residual.shape, dtype=dtype, device=device)
    check(name, "residual", residual, device, floats, (rows, width))
    check(name, "out", out, device, (*floats, torch.float8_e4m3fn), (rows, width))
    if carried is not None:
        check(name, "carried", carried, device, (torch.float32,), (width,))
    if update is not None:
        check(name, "update", update, device, floats, (rows, width))
    if dtype == torch.float8_e4m3fn:
        if scale is None:
            raise InputError("residual_norm: a float8 result needs scale (rows,) float32")
        check(name, "scale", scale, device, (torch.float32,), (rows,))
    launch(
        name,
        device,
        {
            "residual": residual,
            "update": update,
            "carried": carried,
            "out": out,
            "scale": scale if dtype == torch.float8_e4m3fn else None,
            "rows": rows,
            "width": width,
            "residual_type": TYPES[residual.dtype],
            "update_type": TYPES[residual.dtype if update is None else update.dtype],
            "out_type": TYPES[dtype],
            "eps": eps,
        },
    )
    return out


# tokenize


def tokenize(
    residual: Tensor,
    series: Tensor,
    samples: Segments,
    sequences: Segments,
    tokenizer: Tokenizer,
    *,
    tf32: bool | None = None,
) -> None:
    """`operators.tokenize` on the GPU, one launch for ragged sequences.

    float64, patches other than 9 x 5 and widths that are no multiple of 4 run plain.

    Args:
        residual: (>= tokens, E) float32 or bfloat16, overwritten.
        series: (total samples,) float32.
        samples: samples of each sequence, 11 or more.
        sequences: tokens of each sequence.
        tokenizer: tables of the model.
        tf32: patches times weights by TF32 tensor cores; wavelets are float32 always. By default for a
            bfloat16 residual, and where torch's own float32 products use TF32.

    Raises:
        InputError: a tensor of another dtype, device, shape or layout.
        UsageError: not built, or the launch was refused.
    """
    width = residual.shape[1]
    weight = tokenizer.patch_weight
    if tokenizer.dtype != torch.float32 or tokenizer.patch_size != PATCH_SIZE or width % 4:
        operators.tokenize(residual, series, samples, sequences, tokenizer)
        return
    if tf32 is None:
        tf32 = residual.dtype == torch.bfloat16 or operators.torch_uses_tf32()
    tf32 = tf32 and width % 8 == 0
    name, device, floats = "tokenize", residual.device, (torch.float32, torch.bfloat16)
    check(name, "residual", residual, device, floats, (None, width))
    check(name, "series", series, device, (torch.float32,), (samples.total,))
    check(name, "patch_weight", weight, device, (torch.float32,), (width, None))
    templates = tokenizer.templates
    check(name, "templates", templates, device, (torch.float32,), (None, width))
    if len(residual) < sequences.total or len(samples) != len(sequences):
        raise InputError(
            f"tokenize: {len(residual)} rows and {len(samples)} series for {sequences.total} tokens of "
            f"{len(sequences)} sequences"
        )
    plan = _plan(tokenizer, samples, sequences, device)
    key = ("cuda weights", tf32, device)
    if key not in tokenizer.prepared:
        tokenizer.prepared[key] = pack_tf32(weight) if tf32 else pack_float32(weight)
    launch(
        name,
        device,
        {
            "series": series,
            "cu_samples": samples.cu,
            "cu_tokens": sequences.cu,
            "weights": tokenizer.prepared[key],
            "templates": templates,
            "residual": residual,
            "sequences": len(sequences),
            "width": width,
            "residual_type": TYPES[residual.dtype],
            "tf32": tf32,
            **plan,
        },
    )


KEPT_PLANS = 64
"""Plans of micro-batches kept with a model's tables: long runs repeat a handful of shapes."""


def _plan(
    tokenizer: Tokenizer, samples: Segments, sequences: Segments, device: torch.device
) -> dict[str, Any]:
    """The fields of a launch that depend on the sequences' lengths alone."""
    plans = tokenizer.prepared.setdefault("cuda plans", {})
    key = (samples.lengths, sequences.lengths, device)
    if key in plans:
        return cast(dict[str, Any], plans[key])
    if min(samples.lengths) < 11:
        raise InputError(f"tokenize: a series of {min(samples.lengths)} samples; 11 are needed")
    columns = tokenizer.num_scales // PATCH_SIZE[1]
    distinct = tuple(sorted({length - 2 for length in samples.lengths}))
    banks = bank_tables(distinct, tokenizer.method, tokenizer.wavelet, tokenizer.num_scales)
    bank_of = {count: i for i, count in enumerate(distinct)}
    sequences_at = [
        (tokenizer.template_start(tokens), bank_of[length - 2])
        for length, tokens in zip(samples.lengths, sequences.lengths, strict=True)
    ]
    if len(plans) >= KEPT_PLANS:
        plans.clear()
    plans[key] = {
        "sequences_at": torch.tensor(sequences_at, dtype=torch.int32, device=device),
        "bank_columns": torch.from_numpy(banks["columns"]).to(device),
        "bank_taps": torch.from_numpy(banks["taps"]).to(device),
        "tiles": max(tiles((tokens - 1) // columns, columns) for tokens in set(sequences.lengths)),
        "columns": columns,
        "lead": banks["lead"],
        "span": banks["span"],
    }
    return cast(dict[str, Any], plans[key])


def tiles(rows: int, columns: int) -> int:
    """Thread blocks of a sequence of that many rows of patches: see csrc/cuda/tokenize.cuh."""
    chunks = -(-rows // CHUNK_ROWS)
    return chunks * -(-(-(-rows // chunks) * columns) // TILE_TOKENS)


@lru_cache(maxsize=64)
def bank_tables(
    counts: tuple[int, ...], method: ScalogramMethod, wavelet: str, num_scales: int
) -> dict[str, Any]:
    """Wavelet filters by column of patches, without the taps that are negligible.

    Args:
        counts: samples of the differenced series that a bank each is made for.
        method, wavelet, num_scales: as of `wavelets.wavelet_bank`.

    Returns:
        columns (banks, columns, 4) int32: a column's first tap, the place of that tap from the row it
        is for, its taps (a multiple of 9), 0; taps (n, 8) float32: the five scales of a column and
        three zeros; lead: samples before a row that a filter reaches; span: samples that the rows of
        a chunk need.
    """
    size = PATCH_SIZE[1]
    columns, taps = [], []
    first, lead, tail = 0, 0, 0
    for count in counts:
        bank = wavelet_bank(count, method, wavelet, num_scales)
        centre = bank.shape[1] // 2
        for column in range(num_scales // size):
            filters = bank[column * size : (column + 1) * size]
            matters = np.abs(filters) > NEGLIGIBLE * np.abs(filters).max(axis=1, keepdims=True)
            (where,) = np.nonzero(matters.any(axis=0))
            low, high = int(where[0]), int(where[-1]) + 1
            padded = -(-(high - low) // PATCH_SIZE[0]) * PATCH_SIZE[0]
            table = np.zeros((padded, 8), dtype=np.float32)
            table[: high - low, :size] = filters[:, low:high].T
            shift = low - centre
            columns.append((first, shift, padded, 0))
            taps.append(table)
            first += padded
            lead, tail = max(lead, -shift), max(tail, shift + padded)
    # The last row of a chunk, its patch, its taps, and the sample after them that a window slides to.
    span = lead + PATCH_SIZE[0] * CHUNK_ROWS + tail + PATCH_SIZE[0]
    table_of_columns: NDArray[np.int32] = np.array(columns, dtype=np.int32)
    return {
        "columns": table_of_columns.reshape(len(counts), -1, 4),
        "taps": np.concatenate(taps),
        "lead": lead,
        "span": -(-span // 4) * 4,
    }


def pack_float32(weight: Tensor) -> Tensor:
    """(E, 135) to (135, E to a multiple of 32): csrc/cuda/tokenize.cuh's float32 layout."""
    width, values = weight.shape
    packed = weight.new_zeros(values, -(-width // 32) * 32)
    packed[:, :width] = weight.T
    return packed


def pack_tf32(weight: Tensor) -> Tensor:
    """(E, 135) to (E / 32, 17, 2, 32, 4), rounded to TF32: csrc/cuda/tokenize.cuh's TF32 layout."""
    width, values = weight.shape
    steps, pieces = -(-values // 8), -(-width // 32)
    padded = weight.new_zeros(pieces * 32, steps * 8)
    padded[:width, :values] = weight
    # To nearest, ties away from zero: half of the last kept bit added to the magnitude.
    bits = (padded.view(torch.int32) + 0x1000) & ~0x1FFF
    # Output 8 (n / 2) + 2 j + n % 2 of a piece is column n of tile j; k of a step is 4 half + t.
    pairs = bits.view(pieces, 4, 4, 2, steps, 2, 4)  # piece, n / 2, j, n % 2, step, half, t
    lanes = pairs.permute(0, 4, 2, 1, 3, 6, 5)  # piece, step, j, n / 2, n % 2, t, half
    lanes = lanes.reshape(pieces, steps, 2, 2, 32, 2).transpose(
        3, 4
    )  # j as 2 x 2; then lane, j % 2
    return lanes.reshape(pieces, steps, 2, 32, 4).contiguous().view(torch.float32)
