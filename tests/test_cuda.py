"""The CUDA operators without a GPU: the kernels' source, run on the host, against the definitions.

cuda_emulation.cpp runs every thread of a block from barrier to barrier, in ascending and descending
order, with shared memory poisoned; the launches' tables and checks are those of the package. What only
a GPU can show is `python -m bench.gpu_check`.
"""

from __future__ import annotations

import runpy
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cuda_emulation import emulated, load  # noqa: F401
from torch.nn import functional as F

from normwear_fast import (
    FastNormWear,
    NormWearConfig,
    _native,
    cuda_backend,
    linear_hopper,
    operators,
)
from normwear_fast.backends import BACKENDS, Backend, select_backend
from normwear_fast.errors import InputError, UsageError
from normwear_fast.linear_float8 import (
    FLOAT8_MAX,
    INNER,
    Float8Linear,
    fits,
    linear_float8,
    linear_float8_ref,
    order,
    parts,
    quantise_columns,
)
from normwear_fast.linear_hopper import linear, linear_ref
from normwear_fast.operators import Tokenizer
from normwear_fast.packing import Segments, sequence_tokens

CPU = torch.device("cpu")
FLOAT8 = torch.float8_e4m3fn
FLOATS = (torch.float32, torch.bfloat16)
LENGTHS = (11, 12, 19, 20, 64, 65, 128, 129, 390, 391, 390)
LONG = (641, 642, 1300)
UNEVEN = (630,)  # 69 rows of patches, in chunks of 35 and 34: 8 tiles and 7


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()])


# residual_norm


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("width", [4, 12, 64, 100, 768, 776, 1028, 4096])
@pytest.mark.parametrize("residual_type", FLOATS)
@pytest.mark.parametrize("update_type", [None, *FLOATS])
def test_residual_norm(
    width: int, residual_type: torch.dtype, update_type: torch.dtype | None
) -> None:
    rows = 9  # a block takes 4 rows or 1: the last one is not full
    residual = (3 * torch.randn(rows, width) + 100 * torch.randn(rows, 1)).to(residual_type)
    update = None if update_type is None else torch.randn(rows, width).to(update_type)
    carried = torch.randn(width)
    expected_residual = residual.clone()
    if update is not None:
        expected_residual += update
    exact = F.layer_norm(expected_residual.double() + carried.double(), (width,), eps=1e-6)
    for dtype, tolerance in ((torch.float32, 3e-5), (torch.bfloat16, 2**-8)):
        changed = residual.clone()
        out = torch.full((rows, width), torch.nan, dtype=dtype)
        got = cuda_backend.residual_norm(changed, carried, 1e-6, update=update, out=out)
        assert got is out
        assert torch.equal(changed, expected_residual)
        # The rounding of a float32 value of 100 is 4e-6 of the unit that it is standardised to.
        bound = tolerance * exact.abs().max() + 3e-5
        assert (out.double() - exact).abs().max() <= bound


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("width", [12, 64, 768, 1024])
def test_residual_norm_float8(width: int) -> None:
    residual = torch.randn(7, width)
    residual[2] = 1.5  # standardised to zeros
    residual[3, 1] = 1e4  # one value that sets the row's scale, the others far below it
    scale = torch.full((7,), torch.nan)
    out = cuda_backend.residual_norm(residual.clone(), None, 1e-6, dtype=FLOAT8, scale=scale)
    normed = F.layer_norm(residual, (width,), eps=1e-6)
    largest = normed.abs().amax(1)
    expected = torch.where(largest > 0, largest / 448, torch.ones(7))
    torch.testing.assert_close(scale, expected, rtol=1e-5, atol=0)
    # torch's own rounding of the same quotients; one in float32's last bit may round the other way.
    quotient = normed / scale[:, None]
    other = quotient.to(FLOAT8).float()
    assert (out.float() - other).abs().max() <= 32
    assert (out.float() != other).float().mean() < 2e-3
    assert not (out.float().isnan()).any()


def rounded(kind: str, x: torch.Tensor) -> torch.Tensor:
    out = torch.empty(len(x), dtype=torch.int32)
    load().round(kind, x.data_ptr(), out.data_ptr(), len(x))
    return out


def with_neighbours(values: torch.Tensor) -> torch.Tensor:
    """The values, the midpoints between them, the float32 next to each, and the same negative."""
    x = torch.cat((values, (values[1:] + values[:-1]) / 2))
    x = torch.cat((x, x.nextafter(torch.tensor(torch.inf)), x.nextafter(torch.tensor(-torch.inf))))
    return torch.cat((x, -x))


def test_rounding() -> None:
    """The kernels' own conversions against torch's, at every place where they could differ."""
    x = with_neighbours(torch.arange(0x7F, dtype=torch.uint8).view(FLOAT8).float())
    x = x[x.abs() <= 448]
    assert torch.equal(rounded("float8", x), x.to(FLOAT8).view(torch.uint8).int())
    beyond = torch.tensor([449.0, 480.0, 1e9, torch.inf, -torch.inf, torch.nan])
    codes = [0x7E, 0x7E, 0x7E, 0x7E, 0xFE, 0x7F]  # saturated; NaN stays
    assert rounded("float8", beyond).tolist() == codes

    x = with_neighbours(torch.arange(0x7F80, dtype=torch.int16).view(torch.bfloat16).float())
    x = torch.cat((x, torch.tensor([torch.inf, -torch.inf])))
    expected = x.bfloat16().view(torch.int16).int() & 0xFFFF
    assert torch.equal(rounded("bfloat16", x), expected)
    assert rounded("bfloat16", torch.tensor([torch.nan]))[0] & 0x7FFF > 0x7F80

    x = torch.randn(10_000)
    tf32 = rounded("tf32", x)
    assert (tf32 & 0x1FFF == 0).all()
    assert ((tf32.view(torch.float32) - x).abs() <= x.abs() * 2**-11).all()
    # The weights are rounded by `pack_tf32`, the patches by the kernel: the same way.
    packed = cuda_backend.pack_tf32(x[: 64 * 135].view(64, 135).contiguous())
    kept = packed.flatten()[packed.flatten() != 0].sort().values
    assert torch.equal(
        kept, rounded("tf32", x[: 64 * 135].contiguous()).view(torch.float32).sort().values
    )


@pytest.mark.usefixtures("emulated")
def test_residual_norm_none_and_odd_widths() -> None:
    assert cuda_backend.residual_norm(torch.empty(0, 8), None, 1e-6).shape == (0, 8)
    x = torch.randn(3, 7)  # no kernel for 7: plain PyTorch
    torch.testing.assert_close(
        cuda_backend.residual_norm(x, None, 1e-6), F.layer_norm(x, (7,), eps=1e-6)
    )
    x = torch.randn(3, 8, dtype=torch.float64)
    torch.testing.assert_close(
        cuda_backend.residual_norm(x, None, 1e-6), F.layer_norm(x, (8,), eps=1e-6)
    )


# tokenize


def make(
    lengths: tuple[int, ...], method: str, width: int, scales: int = 65
) -> tuple[Tokenizer, torch.Tensor, Segments, Segments]:
    config = types.SimpleNamespace(patch_size=(9, 5), grid_columns=scales // 5)
    tokens = [sequence_tokens(length, method, config) for length in lengths]  # type: ignore[arg-type]
    counts = tuple(sorted(set(tokens)))
    tokenizer = Tokenizer(
        torch.randn(width, 135) / 135**0.5,
        torch.randn(sum(counts), width),
        counts,
        (9, 5),
        scales,
        method,  # type: ignore[arg-type]
        "mexh",
    )
    series = torch.randn(sum(lengths)).cumsum(0) * 0.1
    return tokenizer, series, Segments(lengths, CPU), Segments(tokens, CPU)


def defined(
    tokenizer: Tokenizer, series: torch.Tensor, samples: Segments, sequences: Segments, dtype: Any
) -> torch.Tensor:
    tables = Tokenizer(
        tokenizer.patch_weight.to(dtype),
        tokenizer.templates.to(dtype),
        tokenizer.token_counts,
        tokenizer.patch_size,
        tokenizer.num_scales,
        tokenizer.method,
        tokenizer.wavelet,
    )
    rows = torch.empty(sequences.total, len(tables.patch_weight), dtype=dtype)
    operators.tokenize(rows, series, samples, sequences, tables)
    return rows.double()


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("method", ["conv", "scipy"])
@pytest.mark.parametrize("lengths", [LENGTHS, LONG, UNEVEN], ids=["ragged", "long", "uneven"])
def test_tokenize(method: str, lengths: tuple[int, ...]) -> None:
    for width, scales, dtype, tf32 in (
        (36, 65, torch.float32, False),
        (40, 15, torch.bfloat16, False),
        (40, 15, torch.float32, True),
        (104, 10, torch.bfloat16, True),
    ):
        batch = make(lengths, method, width, scales)
        tokenizer, series, samples, sequences = batch
        exact = defined(*batch, torch.float64)
        size = exact.abs().max()
        plain_error = (defined(*batch, torch.float32) - exact).abs().max()
        rows = torch.full((sequences.total + 3, width), torch.nan, dtype=dtype)
        cuda_backend.tokenize(rows, series, samples, sequences, tokenizer, tf32=tf32)
        assert rows[sequences.total :].isnan().all()
        error = (rows[: sequences.total].double() - exact).abs().max()
        bound = 3 * plain_error + 1e-6 * size
        bound += size * 2**-10 if tf32 else 0
        bound += size * 2**-8 if dtype == torch.bfloat16 else 0
        assert error <= bound, (width, dtype, tf32)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("method", ["conv", "scipy"])
def test_a_fill_value_stays_where_its_wavelets_reach(method: str) -> None:
    """Tokens beside it are as exact as without it."""
    tokenizer, series, samples, sequences = make((390,), method, 32)
    series[195] = 1e6
    exact = defined(tokenizer, series, samples, sequences, torch.float64)
    rows = torch.empty(sequences.total, 32)
    cuda_backend.tokenize(rows, series, samples, sequences, tokenizer)
    size = exact.abs().amax(dim=1, keepdim=True)
    assert (size < 100).sum() > 20  # tokens of the noise alone
    assert ((rows.double() - exact).abs() / size).max() < 1e-5


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 1, 0, 2]])
def test_tokenize_sequences_do_not_touch(order: list[int]) -> None:
    """The same bits whatever else is in the batch, and where."""
    lengths = (390, 64, 11, 700)
    tokenizer, series, samples, sequences = make(lengths, "conv", 32)
    rows = torch.empty(sequences.total, 32)
    cuda_backend.tokenize(rows, series, samples, sequences, tokenizer)
    parts = series.split(list(lengths))
    shuffled = torch.cat([parts[i] for i in order])
    tokens = [sequences.lengths[i] for i in order]
    other = torch.empty_like(rows)
    cuda_backend.tokenize(
        other,
        shuffled,
        Segments([lengths[i] for i in order], CPU),
        Segments(tokens, CPU),
        tokenizer,
    )
    expected = [rows.split(sequences.lengths)[i] for i in order]
    assert torch.equal(bits(other), bits(torch.cat(expected)))


@pytest.mark.usefixtures("emulated")
def test_tokenize_keeps_tables_of_their_own() -> None:
    """One model's: of lengths whose tokens are as many, and of either way to multiply."""
    kept: dict[Any, Any] = {}
    made = [make((length,), "conv", 32) for length in (64, 65)]
    assert made[0][3].lengths == made[1][3].lengths
    weight, templates = made[0][0].patch_weight, made[0][0].templates
    for tf32 in (True, False):
        for tokenizer, series, samples, sequences in made:
            tokenizer.patch_weight, tokenizer.templates = weight, templates
            exact = defined(tokenizer, series, samples, sequences, torch.float64)
            tokenizer.prepared = kept
            rows = torch.full((sequences.total, 32), torch.nan)
            cuda_backend.tokenize(rows, series, samples, sequences, tokenizer, tf32=tf32)
            bound = (2**-10 if tf32 else 3e-6) * exact.abs().max()
            assert (rows.double() - exact).abs().max() <= bound


def test_tokenize_tables_are_small() -> None:
    """The figure of csrc/cuda/tokenize.cuh: a length's filters, next to 38 MB of composed ones."""
    tables = cuda_backend.bank_tables((388,), "conv", "mexh", 65)
    assert tables["taps"].nbytes < 160_000
    assert (tables["columns"][..., 2] % 9 == 0).all()


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("optimized_cwt", [True, False])
def test_whole_model(optimized_cwt: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend through the engine: ragged windows, every call that the layers make."""
    monkeypatch.setitem(
        BACKENDS,
        "cuda",
        lambda: Backend(
            "cuda", tokenize=cuda_backend.tokenize, residual_norm=cuda_backend.residual_norm
        ),
    )
    config = NormWearConfig(
        embed_dim=64,
        depth=2,
        num_heads=1,
        decoder_embed_dim=64,
        decoder_num_heads=1,
        decoder_depth=1,
    )
    rng = np.random.default_rng(0)
    windows = [
        rng.standard_normal(shape).astype(np.float32) for shape in ((2, 64), (1, 390), (3, 65))
    ]
    torch.manual_seed(0)
    models = [
        FastNormWear(
            config=config, optimized_cwt=optimized_cwt, precision="float32", backend=backend
        )
        for backend in ("torch", "cuda")
    ]
    models[1].load_state_dict(models[0].state_dict())
    for a, b in zip(*(model.encode_unit(windows, pool="patch") for model in models), strict=True):
        np.testing.assert_allclose(b, a, atol=3e-5)


# What is refused


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"carried": torch.zeros(4)}, r"carried has shape \(4,\), not \(8,\)"),
        (
            {"carried": torch.zeros(8, dtype=torch.float64)},
            "carried is torch.float64, not torch.float32",
        ),
        ({"update": torch.zeros(8, 2).T}, "update is not contiguous"),
        (
            {"update": torch.zeros(17)[1:].view(2, 8)},
            "update does not start at a multiple of 16 bytes",
        ),
        ({"update": torch.zeros(2, 8, device="meta")}, "update is on meta"),
        ({"dtype": FLOAT8}, "needs scale"),
        ({"dtype": torch.float16}, "out is torch.float16"),
    ],
)
def test_residual_norm_refuses(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"carried": None, "eps": 1e-6, **change}
    with pytest.raises(InputError, match=message) as caught:
        cuda_backend.residual_norm(torch.zeros(2, 8), **arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("emulated")
def test_tokenize_refuses() -> None:
    tokenizer, series, samples, sequences = make((64, 64), "conv", 32)
    with pytest.raises(InputError, match="100 rows and 2 series"):
        cuda_backend.tokenize(torch.empty(100, 32), series, samples, sequences, tokenizer)
    with pytest.raises(InputError, match=r"series has shape \(127,\)"):
        cuda_backend.tokenize(
            torch.empty(200, 32), series[1:].clone(), samples, sequences, tokenizer
        )
    short = Segments([10, 64], CPU)
    with pytest.raises(InputError, match="a series of 10 samples; 11 are needed"):
        cuda_backend.tokenize(
            torch.empty(200, 32), series[:74].clone(), short, sequences, tokenizer
        )


def test_without_a_gpu() -> None:
    """The module is importable without a driver, and a call says in one line what is missing."""
    with pytest.raises(InputError, match="backend 'cuda' needs a CUDA device") as caught:
        cuda_backend.residual_norm(torch.zeros(2, 8), None, 1e-6)
    assert "\n" not in str(caught.value)


def test_launch_without_a_driver() -> None:
    """What the compiled module itself says where there is no device."""
    module, _ = _native.load()
    if module is None or not module.CUDA:
        pytest.skip("normwear_fast._C was built without CUDA")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert set(module.CUDA_ARCHITECTURES.split()) == {"sm_80", "sm_90a", "sm_100"}
    assert not module.cuda_ingest_runs()
    assert not module.cuda_hopper_runs()
    x = torch.zeros(1, 8)
    fields: dict[str, Any] = dict.fromkeys(
        (
            "residual",
            "update",
            "carried",
            "out",
            "scale",
            "residual_type",
            "update_type",
            "out_type",
        )
    )
    fields = cuda_backend.addresses(
        {**fields, "residual": x, "out": x, "rows": 1, "width": 8, "eps": 1e-6}
    )
    with pytest.raises(RuntimeError, match=r"^CUDA residual_norm: .+") as caught:
        module.cuda_residual_norm(fields, 0)
    assert "\n" not in str(caught.value)
    with pytest.raises(KeyError):
        module.cuda_residual_norm({**fields, "surplus": 1}, 0)


def test_backend_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    built = types.SimpleNamespace(CUDA=True)
    monkeypatch.setattr(_native, "load", lambda: (built, None))
    backend = select_backend("cuda", torch.device("cuda"))
    assert backend.tokenize is cuda_backend.tokenize
    assert backend.residual_norm is cuda_backend.residual_norm
    assert backend.pool_norm is operators.pool_norm
    built.CUDA = False
    with pytest.raises(UsageError, match="backend 'cuda' was not built"):
        select_backend("cuda", torch.device("cuda"))
    monkeypatch.setattr(_native, "load", lambda: (None, "it was not built"))
    with pytest.raises(UsageError, match="which cannot be used: it was not built"):
        select_backend("cuda", torch.device("cuda"))


def test_setup_does_without_nvcc(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No nvcc, one that fails, or one that is not wanted: `_C` is built without CUDA."""
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    setup = runpy.run_path(str(Path(__file__).resolve().parent.parent / "setup.py"))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("NORMWEAR_FAST_CUDA", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert setup["cuda_toolkit"](["c++"]) is None
    assert capsys.readouterr().err == ""
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'nvcc fatal: this one is broken' >&2\nexit 1\n")
    nvcc.chmod(0o755)
    assert setup["cuda_toolkit"](["c++"]) is None
    assert "this one is broken); building without CUDA" in capsys.readouterr().err
    monkeypatch.setenv("NORMWEAR_FAST_CUDA", "0")
    assert setup["cuda_toolkit"](["c++"]) is None
    assert capsys.readouterr().err == ""


# linear


def linear_operands(
    rows: int, inner: int, columns: int, scaled: bool
) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]:
    x, weight = torch.randn(rows, inner), torch.randn(columns, inner) / inner**0.5
    if not scaled:
        return x.bfloat16(), weight.bfloat16(), None
    (x, x_scale), (weight, scale) = quantise_columns(x), quantise_columns(weight)
    return x, weight, (x_scale, scale)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("bias_type", [None, *FLOATS])
@pytest.mark.parametrize(("gelu", "scaled"), [(False, False), (True, False), (False, True)])
def test_linear(bias_type: torch.dtype | None, gelu: bool, scaled: bool) -> None:
    x, weight, scales = linear_operands(5, 128, 192, scaled)
    bias = None if bias_type is None else torch.randn(192).to(bias_type)
    out = torch.full((5, 192), torch.nan).bfloat16()
    assert linear(x, weight, bias, scales=scales, gelu=gelu, out=out) is out
    exact = linear_ref(x, weight, bias, scales=scales, gelu=gelu)
    # Half a unit in the last place of bfloat16, and what float32 and GELU's 0.003 % leave beside zero.
    assert ((out.double() - exact).abs() <= 2**-8 * exact.abs() + 2e-6).all()
    assert torch.equal(linear(x, weight, bias, scales=scales, gelu=gelu), out)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("gelu", [False, True])
def test_linear_keeps_nan_in_its_row(gelu: bool) -> None:
    x, weight, _ = linear_operands(4, 64, 192, False)
    x[1, 7] = torch.nan
    out = linear(x, weight, torch.randn(192), gelu=gelu)
    assert out[1].isnan().all()
    assert not out[[0, 2, 3]].isnan().any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(4, 128)}, "x is torch.float32, not torch.bfloat16"),
        ({"weight": torch.zeros(192, 64).bfloat16()}, r"weight has shape \(192, 64\)"),
        ({"weight": torch.zeros(200, 128).bfloat16()}, "128 values to 200 outputs; rows must be"),
        ({"weight": torch.zeros(3264, 128).bfloat16()}, "128 values to 3264 outputs"),
        ({"x": torch.zeros(4, 100).bfloat16()}, "100 values to 192 outputs"),
        ({"x": torch.zeros(4, 0).bfloat16()}, "0 values to 192 outputs"),
        ({"x": torch.zeros(128).bfloat16()}, r"x has shape \(128,\); it must be \(rows, values\)"),
        ({"weight": torch.zeros(128, 192).bfloat16().T}, "weight is not contiguous"),
        ({"bias": torch.zeros(191)}, r"bias has shape \(191,\), not \(192,\)"),
        ({"bias": torch.zeros(192).double()}, "bias is torch.float64"),
        ({"out": torch.zeros(4, 192)}, "out is torch.float32"),
        ({"out": torch.zeros(192, 4).bfloat16().T}, "out is not contiguous"),
        ({"scales": (torch.ones(4), torch.ones(192))}, "x is torch.bfloat16, not"),
        ({"x": torch.empty(2**30 + 1, 128, device="meta")}, "1,073,741,825 rows; one call takes"),
        ({}, "the tensors are on cpu"),
    ],
)
def test_linear_refuses(change: dict[str, Any], message: str) -> None:
    x, weight, _ = linear_operands(4, 128, 192, False)
    given = {"x": x, "weight": weight, "out": torch.empty(4, 192).bfloat16(), **change}
    with pytest.raises(InputError, match=f"linear: {message}"):
        linear(**given)


@pytest.mark.parametrize(
    ("scales", "gelu", "message"),
    [
        ((torch.ones(3), torch.ones(192)), False, r"x's scale has shape \(3,\)"),
        ((torch.ones(4), torch.ones(4)), False, r"weight's scale has shape \(4,\)"),
        ((torch.ones(4), torch.ones(192)), True, "gelu is not made of scaled operands"),
    ],
)
def test_linear_refuses_scales(
    scales: tuple[torch.Tensor, torch.Tensor], gelu: bool, message: str
) -> None:
    x, weight, _ = linear_operands(4, 128, 192, True)
    with pytest.raises(InputError, match=f"linear: {message}"):
        linear(x, weight, scales=scales, gelu=gelu)


# linear_float8


def float8_operands(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor, Float8Linear]:
    """Rows as a norm leaves them, one with a value that dwarfs the rest, the last one of zeros."""
    x = F.layer_norm(torch.randn(rows, INNER), (INNER,))
    x[0, 5] = 27
    x[-1] = 0
    weight = torch.randn(columns, INNER) * torch.logspace(-3, 1, columns)[:, None] / INNER**0.5
    weight[3] = 0
    return *quantise_columns(x), Float8Linear.of(weight, torch.randn(columns) * 0.3)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize(("rows", "columns"), [(1, 384), (5, 768)])
def test_linear_float8(rows: int, columns: int) -> None:
    x, scale, linear = float8_operands(rows, columns)
    out = torch.full((rows, columns), torch.nan).to(FLOAT8)
    assert linear_float8(x, scale, linear, out=out) is out
    exact = linear_float8_ref(x, scale, linear).double()
    # GELU's tail is 0.16 % off: the rounding to four bits goes the other way now and then.
    error = (out.double() - exact).abs()
    assert (error <= 2**-3 * exact.abs() + 2**-9).all()
    assert (error > 0).float().mean() < 0.02


@pytest.mark.usefixtures("emulated")
def test_linear_float8_keeps_nan_in_its_row() -> None:
    x, scale, linear = float8_operands(4, 384)
    x[1, 7] = torch.nan
    out = linear_float8(x, scale, linear).float()
    assert out[1].isnan().all()
    assert not out[[0, 2, 3]].isnan().any()


def test_linear_float8_never_saturates() -> None:
    """No row of a norm exceeds what the factor was made for, were all of it along one neuron."""
    weight, bias = torch.randn(384, INNER), 10 * torch.randn(384)
    linear = Float8Linear.of(weight, bias)
    along = F.normalize(weight, dim=1) * INNER**0.5
    largest = (F.gelu(along @ weight.T + bias) * linear.factor.float()).diagonal()
    assert largest.max() <= FLOAT8_MAX * (1 + 2**-8)
    assert largest[bias > 0].min() >= FLOAT8_MAX * (1 - 2**-8)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("size", [0.0, 1e-44, 1e-38])
def test_linear_float8_of_dead_neurons(size: float) -> None:
    """Their results are finite, and what fc2 makes of their weights is nothing beside the others."""
    weight, bias = torch.randn(384, INNER), torch.randn(384)
    weight[7], bias[7] = size, size
    linear = Float8Linear.of(weight, bias)
    x, scale = quantise_columns(F.layer_norm(torch.randn(3, INNER), (INNER,)))
    for out in (linear_float8(x, scale, linear), linear_float8_ref(x, scale, linear)):
        assert (out.float()[:, order(384) == 7] == 0).all()
        assert out.float().isfinite().all()
    factor = linear.factor.float()
    assert factor.isfinite().all()
    assert 1 / factor[7] < 1e-6 / factor[torch.arange(384) != 7].max()


def test_linear_float8_takes_no_more_than_it_can_address() -> None:
    rows = 2**35 // 3072
    linear = Float8Linear.of(torch.randn(3072, INNER), torch.randn(3072))
    for count, message in (
        (rows + 1, "11,184,811 rows of 3,072 outputs"),
        (rows, "weight is on cpu"),
    ):
        x = torch.empty((count, INNER), dtype=FLOAT8, device="meta")
        with pytest.raises(InputError, match=f"linear_float8: {message}"):
            linear_float8(x, torch.empty(count, device="meta"), linear)


@pytest.mark.parametrize(
    ("capability", "sizes", "fit"),
    [
        ((9, 0), (768, 3072), True),
        ((9, 0), (768, 3000), False),
        ((9, 0), (512, 3072), False),
        ((8, 9), (768, 3072), False),
        ((10, 0), (768, 3072), False),
        ((12, 0), (768, 3072), False),
    ],
)
def test_linear_float8_is_for_hopper(
    capability: tuple[int, int],
    sizes: tuple[int, int],
    fit: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    for built, runs in ((True, True), (True, False), (False, False)):
        module = types.SimpleNamespace(CUDA=built)
        if built:  # a driver may be too old for it
            module.cuda_hopper_runs = lambda runs=runs: runs
        monkeypatch.setattr(_native, "load", lambda module=module: (module, None))
        assert fits(device, *sizes) is (fit and runs)
        if sizes == (768, 3072):
            assert linear_hopper.fits(device, *sizes) is (fit and runs)
    monkeypatch.setattr(_native, "load", lambda: (None, "it was not built"))
    assert not fits(device, *sizes)
    assert not fits(torch.device("cpu"), *sizes)
    assert not linear_hopper.fits(torch.device("cpu"), *sizes)


@pytest.mark.parametrize(
    ("width", "hidden", "fit"),
    [
        (768, 3072, True),
        (384, 1536, True),
        (512, 2048, False),
        (128, 576, False),
        (768, 3000, False),
        (1152, 4608, False),
    ],
)
def test_linear_is_for_some_widths(
    width: int, hidden: int, fit: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear_hopper, "runs", lambda device: True)
    assert linear_hopper.fits(CPU, width, hidden) is fit


def test_linear_float8_order() -> None:
    places = order(64)
    assert places[:10].tolist() == [0, 1, 8, 9, 16, 17, 24, 25, 2, 3]
    assert places.sort().values.tolist() == list(range(64))
    assert (places[32:] == places[:32] + 32).all()


def test_linear_float8_parts() -> None:
    assert parts(1_024, 3072, 132) == 1
    assert parts(14, 3072, 132) == 8  # 112 thread blocks of 2 tiles, not 14 of 16
    for blocks in (1, 5, 14, 157):
        assert 8 % parts(blocks, 3072, 132) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(4, 768)}, "x is torch.float32"),
        ({"x": torch.zeros(4, 512).to(FLOAT8)}, r"x has shape \(4, 512\)"),
        ({"x_scale": torch.ones(3)}, r"x_scale has shape \(3,\)"),
        ({"out": torch.zeros(4, 384)}, "out is torch.float32, not torch.float8_e4m3fn"),
        ({"out": torch.zeros(384, 4).to(FLOAT8).T}, "out is not contiguous"),
    ],
)
def test_linear_float8_refuses(change: dict[str, Any], message: str) -> None:
    x, scale, linear = float8_operands(4, 384)
    given = {"x": x, "x_scale": scale, "linear": linear, **change}
    with pytest.raises(InputError, match=f"linear_float8: {message}"):
        linear_float8(**given)
    odd = Float8Linear.of(torch.randn(256, INNER), torch.randn(256))
    with pytest.raises(InputError, match="256 outputs, not a multiple of 384"):
        linear_float8(x, scale, odd)
