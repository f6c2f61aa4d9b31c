"""Every CPU backend's operators against the definition in float64, on every instruction set there is."""

from __future__ import annotations

import pytest
import torch
from cpu_operators import BACKENDS, CPU, DTYPES, EPS, NAMES, close, draw, kernels, strided

from normwear_fast import backends, native, operators
from normwear_fast.backends import TORCH
from normwear_fast.config import NormWearConfig
from normwear_fast.engine import Engine
from normwear_fast.folding import fold
from normwear_fast.packing import Layout, Segments
from normwear_fast.reference import ReferenceNormWear


def backend_of(name: str) -> backends.Backend:
    return TORCH if name == "torch" else native.backend(name)


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
            got = backend_of(name).residual_norm(residual, carried, EPS, update=update, out=out)
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
    backend_of(name).bias_gelu(x, bias)
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
        close(backend_of(name).pool_norm(*arguments, update=update), expected, 2e-5)


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
        got = backend_of(name).channel_attention(
            query, qkv[:, width:], queries, keys, heads, out=out
        )
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


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("method", ["conv", "scipy"])
@pytest.mark.parametrize(
    ("width", "patch", "scales", "wavelet"),
    [
        (36, (9, 5), 65, "mexh"),
        (128, (9, 5), 65, "mexh"),
        (20, (4, 13), 65, "mexh"),
        (16, (7, 1), 9, "gaus1"),  # not the same from both ends
    ],
)
def test_tokenize(name, method, width, patch, scales, wavelet, rng):
    config = NormWearConfig(
        embed_dim=width, depth=1, num_heads=2, decoder_embed_dim=16, decoder_depth=0,
        patch_size=patch, num_scales=scales, grid_rows=6, wavelet=wavelet,
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
    backend_of(name).tokenize(residual, series, layout.samples, layout.sequences, tokenizer)
    close(residual, expected, 2e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("method", ["conv", "scipy"])
def test_a_fill_value_stays_where_its_wavelets_reach(name, method, rng):
    """Tokens beside it as exact as without it: wavelets cut at 3e-8 of their peak left 1e-2 of theirs."""
    config = NormWearConfig(
        embed_dim=64, depth=1, num_heads=2, decoder_embed_dim=16, decoder_depth=0
    )
    layout = Layout([(1, 390)], method, config, CPU)
    engine = Engine(
        fold(ReferenceNormWear(config, decoder=False), torch.float32), config, method, TORCH
    )
    tokenizer = engine.tokenizer(tuple(layout.sequences.lengths))
    series = draw(rng, 390)
    series[195] = 1e6
    exact = operators.Tokenizer(**(vars(tokenizer) | {"prepared": {}}))
    exact.patch_weight = tokenizer.patch_weight.double()
    exact.templates = tokenizer.templates.double()
    expected = torch.empty(layout.sequences.total, 64, dtype=torch.float64)
    operators.tokenize(expected, series, layout.samples, layout.sequences, exact)
    residual = torch.empty(layout.sequences.total, 64)
    backend_of(name).tokenize(residual, series, layout.samples, layout.sequences, tokenizer)
    size = expected.abs().amax(dim=1, keepdim=True)
    assert (size < 100).sum() > 20  # tokens of the noise alone
    assert ((residual.double() - expected).abs() / size).max() < 1e-5
