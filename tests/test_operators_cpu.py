"""Every CPU backend against the definition in float64, on every instruction set the processor has."""

from __future__ import annotations

import ast
import ctypes
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import ENCODER_GOLDENS, golden, golden_config, recipe_state_dict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bench import native_checks
from normwear_fast import _native, backends, engine, native, operators
from normwear_fast.backends import TORCH
from normwear_fast.config import NormWearConfig
from normwear_fast.engine import Engine
from normwear_fast.errors import UsageError
from normwear_fast.folding import fold
from normwear_fast.model import FastNormWear
from normwear_fast.packing import Layout, Segments
from normwear_fast.reference import ReferenceNormWear

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
NATIVE = _native.load()[0] is not None
EPS = 1e-6


def has(name: str) -> pytest.MarkDecorator:
    missing = name != "torch" and name not in native.instruction_sets()
    return pytest.mark.skipif(missing, reason=f"not run: this build or processor has no {name}")


NAMES = [pytest.param(name, marks=has(name)) for name in native.INSTRUCTION_SETS]
BACKENDS = [pytest.param("torch"), *NAMES]


def get(name: str) -> backends.Backend:
    return TORCH if name == "torch" else native.backend(name)


def kernels(name: str):
    module = _native.load()[0]
    assert module is not None
    return module.kernels(name)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng()


def draw(rng, *shape, dtype=torch.float32, scale=1.0) -> torch.Tensor:
    values = torch.from_numpy((scale * rng.standard_normal(shape)).astype(np.float32))
    return values.to(dtype)


def strided(x: torch.Tensor, extra: int = 5) -> torch.Tensor:
    """The same rows inside a wider matrix of NaN."""
    wide = torch.full((x.shape[0], x.shape[1] + extra), float("nan"), dtype=x.dtype)
    wide[:, 2 : 2 + x.shape[1]] = x
    return wide[:, 2 : 2 + x.shape[1]]


def close(got: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Within ``tolerance`` in float32; bfloat16 results may also round: 2^-8 of the value."""
    assert torch.isfinite(got).all()
    bound = torch.full_like(expected, tolerance)
    if got.dtype == torch.bfloat16:
        bound = bound + 2**-8 * expected.abs()
    worst = ((got.double() - expected).abs() - bound).max()
    assert worst <= 0, f"{float(worst):.3g} over a tolerance of {tolerance:g}"


DTYPES = [torch.float32, torch.bfloat16]


# --- row by row --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 7, 36, 128, 768, 771])
def test_residual_norm(name, dtype, width, rng):
    rows = int(rng.integers(1, 40))
    for carried in (None, draw(rng, width)):
        for update in (None, draw(rng, rows, width), strided(draw(rng, rows, width, dtype=dtype))):
            residual = draw(rng, rows, width, scale=3.0) + 2.0
            exact = residual.double()
            wide = None if carried is None else carried.double()
            pending = None if update is None else update.double()
            expected = operators.residual_norm(exact, wide, EPS, update=pending)
            out = strided(torch.full((rows, width), float("nan"), dtype=dtype))
            got = get(name).residual_norm(residual, carried, EPS, update=update, out=out)
            # The width-1 norm divides nothing by sqrt(eps): rounding is magnified by 1000.
            close(got, expected, 2e-3 if width == 1 else 1e-5)
            assert got.dtype == dtype
            close(residual, exact, 2e-6)  # the update arrived in the residual


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 5, 16, 100, 3072])
def test_bias_gelu(name, dtype, width, rng):
    x, bias = strided(draw(rng, 9, width, dtype=dtype, scale=3.0)), draw(rng, width)
    expected = torch.nn.functional.gelu(x.double() + bias.double())
    get(name).bias_gelu(x, bias)
    close(x, expected, 1e-6 if dtype == torch.float32 else 4e-2)


@pytest.mark.parametrize("name", NAMES)
def test_erf_over_a_dense_grid(name):
    """An erf off by 2e-7 would put gelu off by |x| 1e-7."""
    x = torch.linspace(-14, 14, 2_000_001).view(1, -1)
    got = x.clone()
    native.backend(name).bias_gelu(got, torch.zeros(x.shape[1]))
    wide = x.double()
    error = (got.double() - 0.5 * wide * torch.special.erfc(-wide / 2**0.5)).abs()
    assert (error <= 1e-7 * wide.abs() + 1e-12).all()
    special = torch.tensor([[float("nan"), float("inf"), -1e30, 0.0]])
    native.backend(name).bias_gelu(special, torch.zeros(4))
    assert special[0, 0].isnan()
    assert special[0, 1] == float("inf")
    assert abs(float(special[0, 2])) < 1e-20
    assert special[0, 3] == 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantise_rows(name, dtype, rng):
    x = strided(draw(rng, 20, 101, dtype=dtype, scale=4.0))
    x[3] = 1.5  # a constant row has scale 0
    q, scale, offset = native.quantise_rows(kernels(name), x)
    back = q.double() * scale.double()[:, None] + offset.double()[:, None]
    assert ((back - x.double()).abs() <= 0.5001 * scale.double()[:, None] + 1e-6).all()
    assert q[0].min() == 0
    assert q[0].max() == 255
    bias = draw(rng, 101)
    q, scale, offset = native.quantise_rows(kernels(name), x, bias)
    back = q.double() * scale.double()[:, None] + offset.double()[:, None]
    expected = torch.nn.functional.gelu(x.double() + bias.double())
    assert ((back - expected).abs() <= 0.5001 * scale.double()[:, None] + 1e-6).all()


def ragged(rng, most: int = 60, count: int = 5) -> Segments:
    return Segments([int(n) for n in rng.integers(1, most, count)], CPU)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("pool", ["mean", "cls", "patch"])
@pytest.mark.parametrize("width", [7, 128])
def test_pool_norm(name, pool, width, rng):
    sequences = ragged(rng)
    residual, carried = draw(rng, sequences.total, width) + 1.0, draw(rng, width)
    weight, bias = draw(rng, width), draw(rng, width)
    for update in (None, draw(rng, sequences.total, width, dtype=torch.bfloat16)):
        wide = [t.double() for t in (residual, carried, weight, bias)]
        pending = None if update is None else update.double()
        expected = operators.pool_norm(*wide, 1e-5, sequences, pool, update=pending)
        arguments = (residual, carried, weight, bias, 1e-5, sequences, pool)
        close(get(name).pool_norm(*arguments, update=update), expected, 2e-5)


# --- attention ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "size"), [(2, 64), (3, 12), (2, 7), (1, 80)])
def test_channel_attention(name, dtype, heads, size, rng):
    width = heads * size
    if name == "torch" and dtype == torch.bfloat16 and size == 7:
        pytest.skip("a bfloat16 row of 7 is not one torch's kernels all take")
    keys = Segments([1, 14, int(rng.integers(2, 90)), 400], CPU)
    qkv = draw(rng, keys.total, 3 * width, dtype=dtype, scale=0.5)
    for queries in (keys, Segments([1] * len(keys), CPU), Segments([3, 0, 29, 15], CPU)):
        query = strided(draw(rng, queries.total, width, dtype=dtype))
        if 0 in queries.lengths and name == "torch":
            continue
        expected = torch.cat(
            [
                operators.channel_attention(
                    query[queries.bounds[i] : queries.bounds[i + 1]].double(),
                    qkv[keys.bounds[i] : keys.bounds[i + 1], width:].double(),
                    Segments([queries.lengths[i]], CPU),
                    Segments([keys.lengths[i]], CPU),
                    heads,
                )
                for i in range(len(keys))
                if queries.lengths[i]
            ]
        )
        out = torch.full(query.shape, float("nan"), dtype=dtype)
        got = get(name).channel_attention(query, qkv[:, width:], queries, keys, heads, out=out)
        close(got, expected, 5e-6 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("name", NAMES)
def test_attention_of_large_scores(name, rng):
    """Scores of thousands: the softmax is a choice, not an overflow.

    Whole numbers: their scores are exact in float32, where rounded ones of this size could decide a
    near tie either way.
    """
    queries, keys = Segments([70], CPU), Segments([430], CPU)
    query = draw(rng, 70, 16, scale=100.0).round()
    key_value = draw(rng, 430, 32, scale=100.0).round()
    expected = operators.channel_attention(query.double(), key_value.double(), queries, keys, 1)
    got = native.backend(name).channel_attention(query, key_value, queries, keys, 1)
    close(got, expected, 2e-2)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_where_it_belongs(name, dtype, rng):
    """A query's in its row and head, a key's or a value's in its segment; the rest keeps its bits."""
    heads, size, keys = 2, 20, Segments([37, 40], CPU)
    query = draw(rng, keys.total, heads * size, dtype=dtype)
    key_value = draw(rng, keys.total, 2 * heads * size, dtype=dtype)
    attention = native.backend(name).channel_attention
    clean = attention(query, key_value, keys, keys, heads)
    second_head, second_segment = slice(size, None), slice(37, None)
    for where in ("query", "key", "value"):
        spoilt = {"query": query.clone(), "key_value": key_value.clone()}
        lost = torch.zeros_like(clean, dtype=torch.bool)
        if where == "query":
            spoilt["query"][50, size + 3] = float("nan")
            lost[50, second_head] = True
        else:
            column = (0 if where == "key" else heads * size) + size + 3
            spoilt["key_value"][50, column] = float("nan")
            columns = second_head if where == "key" else slice(size + 3, size + 4)
            lost[second_segment, columns] = True
        got = attention(spoilt["query"], spoilt["key_value"], keys, keys, heads)
        assert torch.equal(got.isnan(), lost)
        assert torch.equal(got[~lost], clean[~lost])


# --- tokenizer ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("method", ["conv", "scipy"])
@pytest.mark.parametrize(
    ("width", "patch", "scales"),
    [(36, (9, 5), 65), (128, (9, 5), 65), (20, (4, 13), 65), (16, (7, 1), 9)],
)
def test_tokenize(name, method, width, patch, scales, rng):
    config = NormWearConfig(
        embed_dim=width, depth=1, num_heads=2, decoder_embed_dim=16, decoder_depth=0,
        patch_size=patch, num_scales=scales, grid_rows=6,
    )  # fmt: skip
    # 580 samples: two jobs of 32 patches a column, whole pairs of tiles.
    shapes = [(2, 390), (1, 11), (1, 12), (3, int(rng.integers(13, 200))), (1, 580), (1, 700)]
    layout = Layout(shapes, method, config, CPU)
    counts = tuple(sorted(set(layout.sequences.lengths)))
    engine = Engine(
        fold(ReferenceNormWear(config, decoder=False), torch.float32), config, method, TORCH
    )
    tokenizer = engine.tokenizer(counts)
    series = draw(rng, layout.samples.total)
    exact = operators.Tokenizer(**(vars(tokenizer) | {"prepared": {}}))
    exact.patch_weight = tokenizer.patch_weight.double()
    exact.templates = tokenizer.templates.double()
    expected = torch.full((layout.sequences.total, width), float("nan"), dtype=torch.float64)
    operators.tokenize(expected, series, layout.samples, layout.sequences, exact)
    residual = torch.full((layout.sequences.total, width), float("nan"))
    get(name).tokenize(residual, series, layout.samples, layout.sequences, tokenizer)
    close(residual, expected, 2e-6 * float(expected.abs().max()))


# --- products ----------------------------------------------------------------------------------------


def product(name, a, w, precision, *, chunk=None, bias=None, carried=None, norm=False, gelu=False,
            start=None, threads=1, dtype=torch.float32, beside=5):  # fmt: skip
    k = kernels(name)
    packed = native.pack(k, w, native.OPERANDS[precision], chunk)
    whole = torch.full((len(a), len(w) + beside), float("nan"), dtype=dtype)
    c = whole[:, beside // 2 :][:, : len(w)]
    if start is not None:
        c.copy_(start)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        native.linear(
            k,
            a,
            packed,
            c,
            carried=carried,
            bias=bias,
            norm=norm,
            eps=EPS,
            gelu=gelu,
            add=start is not None,
        )
    finally:
        torch.set_num_threads(before)
    assert int(whole.isnan().sum()) - int(c.isnan().sum()) == beside * len(a)  # nothing beside it
    return c


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (53, 37), (128, 768), (96, 1600)])
def test_linear(name, precision, n, k, rng):
    """Relative to the operands' rounding: 2^-9 for bfloat16, half a step for int8."""
    for rows in (1, 2, 13, int(rng.integers(15, 130))):
        a, w = strided(draw(rng, rows, k)), draw(rng, n, k, scale=k**-0.5)
        bias, start = draw(rng, n), draw(rng, rows, n)
        tolerance = {"float32": 6e-6, "bfloat16": 2.5e-2, "int8": 0.15}[precision]
        got = product(name, a, w, precision, chunk=704 if k > 704 else None, bias=bias, start=start)
        exact = a.double() @ w.double().T
        close(got, exact + bias.double() + start.double(), tolerance * max(1.0, exact.abs().max()))
        if k == 1:
            continue
        carried = draw(rng, k)
        got = product(name, a, w, precision, bias=bias, carried=carried, norm=True, gelu=True)
        normed = torch.nn.functional.layer_norm((a + carried).double(), (k,), eps=EPS)
        expected = torch.nn.functional.gelu(normed @ w.double().T + bias.double())
        close(got, expected, tolerance * max(1.0, exact.abs().max()))
        a, start = strided(draw(rng, rows, k, dtype=torch.bfloat16)), start.bfloat16()
        got = product(name, a, w, precision, start=start, dtype=torch.bfloat16)
        exact = a.double() @ w.double().T
        close(got, exact + start.double(), tolerance * max(1.0, exact.abs().max()))
        for beside in (0, 5):  # rows of whole cache lines, and of others
            got = product(name, a, w, precision, dtype=torch.bfloat16, beside=beside)
            close(got, exact, tolerance * max(1.0, exact.abs().max()))


@pytest.mark.parametrize("k", [1, 8, 9, 32, 39, 77])
@pytest.mark.parametrize("name", NAMES)
def test_float32_products_keep_every_bit(name, k, rng):
    """One product a sum, over 160 octaves, whatever a float32 is made of.

    On the tile unit |m| <= 2^-8 and |l| <= 2^-17 of a value's power of two, so ml and lm, left out,
    are 2^-24 together; hh meets the small parts and then the sum, two roundings of 2^-24; those of
    the small parts are below 2^-28.
    """
    octaves = [torch.from_numpy(np.exp2(rng.integers(-40, 41, n))).float() for n in (40, 70)]
    for at in range(max(0, k - 9), k):  # the tile unit packs up to 8 last values its own way
        a, w = (torch.zeros(len(scale), k) for scale in octaves)
        for x, scale in zip((a, w), octaves, strict=True):
            x[:, at] = draw(rng, len(x)) * scale
        exact = a.double() @ w.double().T
        error = (product(name, a, w, "float32").double() - exact).abs()
        assert error.le((3 * 2**-24 + 2**-28) * exact.abs()).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
def test_nan_and_infinity_stay_in_their_row(name, precision, rng):
    a, w = draw(rng, 40, 70), draw(rng, 50, 70)
    clean = product(name, a, w, precision)
    for value in (float("nan"), float("inf"), 3.4e38):
        spoilt = a.clone()
        spoilt[[3, 20], 5] = value
        got = product(name, spoilt, w, precision)
        rest = [i for i in range(40) if i not in (3, 20)]
        assert torch.equal(got[rest], clean[rest])
        if precision != "int8":  # whose rows are standardised before: all of a row is NaN then
            assert not (got[[3, 20]].abs() <= 1e30).any()


@pytest.mark.parametrize("name", NAMES)
def test_nothing_to_do(name):
    assert product(name, torch.zeros(0, 8), torch.ones(3, 8), "float32").shape == (0, 3)
    none = Segments([], CPU)
    got = native.backend(name).channel_attention(
        torch.zeros(0, 8), torch.zeros(0, 16), none, none, 2
    )
    assert got.shape == (0, 8)


@pytest.mark.parametrize("name", NAMES)
def test_int8_never_saturates(name):
    """Every activation 255 and every weight at its largest, all of one sign: 16-bit sums would clip,
    and so would 32-bit ones of more than 66,000 inputs."""
    k = 3072
    for sign in (1.0, -1.0):
        a = torch.ones(3, k)
        a[:, 0] = 0.0  # so that the row's range is 0..1 and 1 becomes 255
        w = torch.full((40, k), sign)
        got = product(name, a, w, "int8", chunk=k)
        assert (got - sign * (k - 1)).abs().max() < 1e-3 * k


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
def test_a_row_depends_on_itself_alone(name, precision, rng):
    """The same bits alone, in any batch and on any number of threads: what a resumed run needs."""
    a, w = draw(rng, 200, 128), draw(rng, 700, 128)
    whole = product(name, a, w, precision)
    # The threads share the rows of 99 and 200, the outputs of 7.
    for rows, threads in ((1, 1), (7, 3), (99, 3), (200, 2)):
        assert torch.equal(
            product(name, a[-rows:].contiguous(), w, precision, threads=threads), whole[-rows:]
        )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
def test_feed(name, precision, rng):
    """proj, norm and MLP in one call: two tiles of hidden units, the second short; blocks of rows."""
    width, hidden, rows, k = 72, 1000, 300, kernels(name)
    operand, functional = native.OPERANDS[precision], torch.nn.functional
    proj, fc1, fc2 = (
        draw(rng, n, m, scale=m**-0.5)
        for n, m in ((width, width), (hidden, width), (width, hidden))
    )
    matrices = dict(proj=native.pack(k, proj, operand), fc1=native.pack(k, fc1, operand))
    matrices["fc2"] = native.pack(k, fc2, operand, native.CHUNK)
    carried, bias = draw(rng, width), draw(rng, hidden)
    start, attended = draw(rng, rows, width), strided(draw(rng, rows, width))

    def run(residual, attended, threads=1):
        k.feed(
            residual=residual.data_ptr(), attended=native._view(attended), rows=len(residual),
            **matrices, carried=carried.data_ptr(), fc1_bias=bias.data_ptr(), eps=EPS,
            threads=threads,
        )  # fmt: skip
        return residual

    x = start.double() + attended.double() @ proj.double().T
    normed = functional.layer_norm(x + carried.double(), (width,), eps=EPS)
    expected = x + functional.gelu(normed @ fc1.double().T + bias.double()) @ fc2.double().T
    whole = run(start.clone(), attended)
    tolerance = {"float32": 1e-5, "bfloat16": 3e-2, "int8": 0.15}[precision]
    close(whole, expected, tolerance)
    for part, threads in ((1, 1), (33, 2)):
        assert torch.equal(run(start[-part:].clone(), attended[-part:], threads), whole[-part:])
    spoilt = start.clone()
    spoilt[40, 7] = float("nan")
    assert torch.equal(run(spoilt, attended).isnan().any(1), torch.arange(rows) == 40)


@pytest.mark.skipif(not NATIVE, reason="normwear_fast._C was not built")
def test_a_chunk_that_cuts_a_packing_step_is_refused():
    with pytest.raises(ValueError, match="multiple of 64"):
        native.pack(kernels("portable"), torch.zeros(8, 100), native.OPERANDS["int8"], 50)


def test_a_matrix_of_another_instruction_set_is_refused():
    names = native.instruction_sets()
    if len(names) < 2:
        pytest.skip("not run: one instruction set only")
    w = native.pack(kernels(names[0]), torch.zeros(8, 8), 0)
    a = torch.zeros(2, 8)
    with pytest.raises(ValueError, match="another instruction set"):
        kernels(names[1]).linear(
            a=native._view(a), standardise=False, carried=0, eps=0.0, weight=w, bias=0,
            gelu=False, accumulate=False, c=native._view(a.clone()), rows=2, threads=1,
        )  # fmt: skip


# --- the encoder -------------------------------------------------------------------------------------

TINY = NormWearConfig(embed_dim=32, depth=3, num_heads=2, decoder_embed_dim=16, decoder_depth=0)


def encoder(monkeypatch, name: str, config: NormWearConfig, precision: str, method: bool = True):
    monkeypatch.setitem(backends.BACKENDS, "native", lambda: native.backend(name))
    model = FastNormWear(method, config=config, precision=precision, backend="native")
    return model.requires_grad_(False)


GOLDEN_LIMITS = {"bfloat16": (0.999, 0.995), "int8": (0.998, 0.995)}


@pytest.fixture(scope="module")
def golden_weights():
    known = {}

    def load(model, arrays):
        key = (str(arrays["config"]), int(arrays["weight_seed"]))
        if key not in known:
            known[key] = recipe_state_dict(model.state_dict(), key[1])
        model.load_state_dict(known[key])

    return load


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("file", [f for f in ENCODER_GOLDENS if "base" not in f or "L128" in f])
def test_golden(name, file, monkeypatch, golden_weights):
    arrays = golden(file)
    base = "base" in file
    if base and name != native.instruction_sets()[0]:
        pytest.skip(
            "not run: the base model runs on the best instruction set, the small one on all"
        )
    if name == "portable" and arrays["x"].size > 1_000:
        pytest.skip("not run: portable code takes the shorter files")
    config = golden_config(arrays)
    model = encoder(monkeypatch, name, config, "float32", "scipy" not in file)
    golden_weights(model, arrays)
    x = torch.from_numpy(arrays["x"])
    for precision in ("float32", "bfloat16", "int8"):
        model.precision = precision
        out = model(x).double()
        key = "out_rows" if base else "out"
        got = out[:, :, torch.from_numpy(arrays["rows"]).long()] if base else out
        expected = torch.from_numpy(arrays[key]).double()
        assert torch.isfinite(out).all()
        if precision == "float32":
            assert (got - expected).abs().max() < (1e-4 if base else 2e-5)
            continue
        cosine = torch.nn.functional.cosine_similarity(got, expected, dim=-1)
        mean, worst = GOLDEN_LIMITS[precision]
        assert cosine.mean() >= mean
        assert cosine.min() >= worst


@pytest.mark.skipif(not NATIVE, reason="normwear_fast._C was not built")
@settings(max_examples=25, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_fuzz_ragged_windows_against_the_plain_backend(data):
    name = data.draw(st.sampled_from(native.instruction_sets()))
    method = data.draw(st.booleans())
    shapes = data.draw(
        st.lists(st.tuples(st.integers(1, 5), st.integers(11, 150)), min_size=1, max_size=6)
    )
    pool = data.draw(st.sampled_from(["mean", "cls", "patch"]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    windows = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    plain = FastNormWear(method, config=TINY, precision="float32", backend="torch")
    with pytest.MonkeyPatch.context() as patch:
        fast = encoder(patch, name, TINY, "float32", method)
        got = fast.encode_unit(windows, pool=pool, batch_tokens=2_000)
    for mine, expected in zip(got, plain.encode_unit(windows, pool=pool), strict=True):
        assert mine.shape == expected.shape
        assert np.abs(mine - expected).max() < 2e-5


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_the_same_bits_in_any_company_and_on_any_threads(name, precision, monkeypatch, rng):
    model = encoder(monkeypatch, name, TINY, precision)
    windows = [rng.standard_normal((2, n)).astype(np.float32) for n in (60, 390, 60, 130)]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        together = model.encode_unit(windows)
        torch.set_num_threads(2)
        again = model.encode_unit(windows)
        alone = [model.encode_unit([window])[0] for window in windows]
    finally:
        torch.set_num_threads(threads)
    for a, b, c in zip(together, again, alone, strict=True):
        assert np.array_equal(a, b)
        assert np.array_equal(a, c)


def test_a_float64_model_takes_the_definition():
    model = FastNormWear(config=TINY).double().requires_grad_(False)
    x = torch.randn(1, 2, 60, dtype=torch.float64)
    plain = FastNormWear(config=TINY, backend="torch").double().requires_grad_(False)
    assert (model(x) - plain(x)).abs().max() < 1e-12


@pytest.mark.skipif(not NATIVE, reason="normwear_fast._C was not built")
def test_the_checks_of_another_machine_see_a_broken_operator(monkeypatch):
    """bench/native_checks.py, which bench.gpu_check runs on its machine too."""
    known = dict(native_checks.checks())
    assert len(known) == 22 * len(native.instruction_sets())
    check = known[f"{native.instruction_sets()[0]} bias_gelu float32"]
    good = check()
    assert good["error"] <= good["bound"]
    assert good["stable"]
    monkeypatch.setattr(native, "bias_gelu", lambda kernels, x, bias: x.mul_(1.001))
    assert not check()["error"] <= good["bound"]
    monkeypatch.setattr(native, "bias_gelu", lambda kernels, x, bias: x.fill_(torch.nan))
    assert not check()["error"] <= good["bound"]


@pytest.mark.parametrize(("gain", "chosen"), [(0.55, "avx512"), (1.9, "avx512bf16")])
def test_bfloat16_products_are_used_where_they_pay(gain, chosen, monkeypatch):
    monkeypatch.delenv("NORMWEAR_FAST_ISA", raising=False)
    monkeypatch.setattr(native, "instruction_sets", lambda: native.INSTRUCTION_SETS[1:])
    monkeypatch.setattr(native, "bfloat16_gain", lambda name: gain)
    assert native.default_instruction_set() == chosen


@pytest.mark.skipif(not NATIVE, reason="normwear_fast._C was not built")
def test_auto_is_the_faster_precision(monkeypatch):
    """Of the CPU: what the measured products say, and float32 for sets without bfloat16 products."""
    for name in native.instruction_sets():
        monkeypatch.setenv("NORMWEAR_FAST_ISA", name)
        has_bfloat16 = name in ("amx", "avx512bf16")
        assert native.kernels(name).native_bfloat16 == has_bfloat16
        assert engine.cpu_has_bfloat16.__wrapped__() == has_bfloat16


def test_choice_of_backend(monkeypatch):
    if NATIVE:
        assert backends.select_backend("auto", CPU).name == "native"
        assert "normwear-fast" in FastNormWear(config=TINY).provenance()["blas"]
        monkeypatch.setenv("NORMWEAR_FAST_ISA", "portable")
        assert native.backend.__wrapped__().blas == "normwear-fast portable"
        monkeypatch.setenv("NORMWEAR_FAST_ISA", "mmx")
        with pytest.raises(UsageError, match=r"mmx.*portable"):
            native.backend.__wrapped__()
    with pytest.raises(UsageError, match="runs on cpu only"):
        backends.select_backend("native", torch.device("cuda"))
    with pytest.raises(UsageError, match=r"int8.*native"):
        FastNormWear(config=TINY, precision="int8", backend="torch").encode(np.ones((1, 1, 60)))
    monkeypatch.setattr(_native, "load", lambda: (None, "it was not built"))
    native.backend.cache_clear()
    try:
        assert backends.select_backend("auto", CPU) is TORCH
        with pytest.raises(UsageError, match="it was not built"):
            backends.select_backend("native", CPU)
    finally:
        native.backend.cache_clear()


# --- the tile unit -----------------------------------------------------------------------------------

TILES = """
#define NORMWEAR_ISA {space}
#include "cpu/tiles.h"
extern "C" void {space}(const void* a, const void* b, void* c, long count, int whole) {{
    using namespace normwear::{space};
    const Tiles tiles;
    for (long i = 0; i < count; ++i) {{
        tile_load<2>(static_cast<const char*>(a) + 1024 * i, 64);
        tile_stream<3>(static_cast<const char*>(b) + 1024 * i, 64);
        tile_load<1>(static_cast<char*>(c) + 1024 * i, 64);
        if (whole) tile_int8<1, 2, 3>();
        else tile_bfloat16<1, 2, 3>();
        tile_store<1>(static_cast<char*>(c) + 1024 * i, 64);
    }}
}}
"""


@pytest.mark.parametrize("name", [pytest.param("amx", marks=has("amx"))])
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_emulated_tiles_have_the_processors_bits(name, tmp_path, rng):
    """Which the sanitised run below and processors without the unit rely on."""
    assert kernels(name).name == name  # it has asked the system for the unit
    spaces = {"unit": ["-mamx-tile"], "emulated": ["-mfma", "-DNORMWEAR_EMULATE_TILES"]}
    for space in spaces:
        (tmp_path / f"{space}.cpp").write_text(TILES.format(space=space))
        command = ["g++", "-std=c++17", "-O1", "-shared", "-fPIC", f"-I{ROOT / 'csrc'}"]
        command += [*spaces[space], f"{tmp_path / space}.cpp", "-o", f"{tmp_path / space}.so"]
        subprocess.run(command, check=True)

    def run(space: str, a, b, c, whole: bool):
        c = c.copy()
        function = getattr(ctypes.CDLL(f"{tmp_path / space}.so"), space)
        pointers = [ctypes.c_void_p(x.ctypes.data) for x in (a, b, c)]
        function(*pointers, ctypes.c_long(len(a)), ctypes.c_int(whole))
        return c

    shape = (200, 16, 16)
    a, b, c = (rng.integers(0, 2**32, shape, dtype=np.uint32) for _ in range(3))
    assert np.array_equal(run("unit", a, b, c, True), run("emulated", a, b, c, True))

    def bits(x) -> Any:
        return np.ascontiguousarray(x, np.float32).view(np.uint32)

    def values(low: int, high: int, special: float) -> Any:
        """Pairs of bfloat16 of exponents low .. high; a share of subnormal, infinite and NaN ones."""
        wide = (*shape, 2)
        x = bits(rng.standard_normal(wide) * np.exp2(rng.integers(low, high, wide))) >> 16
        odd = rng.choice(
            np.array([0x7F80, 0xFF80, 0x7FC0, 0x0001, 0x8055, 0x0000], np.uint32), wide
        )
        x = np.where(rng.random(wide) < special, odd, x)
        return np.ascontiguousarray(x[..., 0] | x[..., 1] << 16)

    for low, high, special in ((0, 1, 0), (-68, -58, 0), (-126, 127, 0), (-8, 8, 0.002)):
        a, b = values(low, high, special), values(low, high, special)
        c = bits(rng.standard_normal(shape) * np.exp2(rng.integers(2 * low, high, shape)))
        c[rng.random(shape) < 0.1] &= np.uint32(0x807FFFFF)  # subnormal
        got, expected = (run(space, a, b, c, False).view(np.float32) for space in spaces)
        nan = np.isnan(got)
        assert np.array_equal(nan, np.isnan(expected))
        assert np.array_equal(bits(got)[~nan], bits(expected)[~nan])


# --- memory ------------------------------------------------------------------------------------------

SANITISED = """
import importlib.util, sys, pytest, normwear_fast
spec = importlib.util.spec_from_file_location("normwear_fast._C", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
sys.modules["normwear_fast._C"] = normwear_fast._C = module
# What is left out asks for values alone, starts processes of its own, or takes minutes here.
left_out = "golden emulated every_conversion float32_stays refused_is forked_child python_threads"
chosen = "not (" + left_out.replace(" ", " or ") + ")"
options = ["-q", "-s", "-x", "-p", "no:cacheprovider", "--timeout=1200"]
code = pytest.main([*sys.argv[2:], *options, "-k", chosen])
sys.exit(int(code))
"""


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_no_access_outside_the_buffers(tmp_path):
    """The native operators' tests once more, compiled with the address and behaviour sanitisers."""
    flags = [
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=undefined",
        "-O1",
        "-g1",
        "-fPIC",
    ]
    # libstdc++ too, or libasan would not find what throws.
    preloaded = [
        subprocess.check_output(["g++", f"-print-file-name={name}"], text=True).strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    if not os.path.isabs(preloaded[0]):
        pytest.skip("g++ has no libasan")
    import pybind11

    # setup.py's table of flags, without running setup.
    tree = ast.parse((ROOT / "setup.py").read_text())
    wanted = {"AVX2", "AVX512", "INSTRUCTION_SETS"}
    tree.body = [
        node
        for node in tree.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) in wanted
    ]
    scope: dict[str, Any] = {}
    exec(compile(tree, "setup.py", "exec"), scope)
    sets = scope["INSTRUCTION_SETS"]
    # What the tile unit loads and stores is seen only where it is plain C++.
    flags += ["-DNORMWEAR_X86", "-DNORMWEAR_AMX", "-DNORMWEAR_EMULATE_TILES"]
    (tmp_path / "build_info.h").write_text(
        "".join(
            f'#define NORMWEAR_{n} ""\n' for n in ("BUILD_ID", "PYTHON_ID", "COMPILER", "FLAGS")
        )
    )
    include = [tmp_path, ROOT / "csrc", pybind11.get_include(), sysconfig.get_paths()["include"]]
    jobs, objects = [], []
    for source in [ROOT / "csrc" / "bindings.cpp", *sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))]:
        objects.append(str(tmp_path / f"{source.stem}.o"))
        command = ["g++", "-std=c++17", "-fopenmp", "-ffp-contract=fast", *flags]
        command += sets.get(source.stem.removeprefix("kernels_"), [])
        command += [f"-I{folder}" for folder in include] + ["-c", str(source), "-o", objects[-1]]
        jobs.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
    for job in jobs:
        assert job.wait() == 0, job.stderr.read() if job.stderr else shlex.join(job.args)
    library = tmp_path / "_C.so"
    subprocess.run(["g++", "-shared", "-fopenmp", *flags, *objects, "-o", str(library)], check=True)
    environment = os.environ | {
        "LD_PRELOAD": " ".join(preloaded),
        "ASAN_OPTIONS": "detect_leaks=0",
        "OMP_NUM_THREADS": "2",
        "PYTHONPATH": str(ROOT),
    }
    files = [__file__, str(Path(__file__).with_name("test_operators_cpu_safety.py"))]
    command = [sys.executable, "-c", SANITISED, str(library), *files]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
