"""channel_attention in Triton, interpreted, against its definition in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from normwear_fast import operators
from normwear_fast.buckets import FixedSegments
from normwear_fast.kernels import channel_attention as module
from normwear_fast.kernels.channel_attention import channel_attention
from normwear_fast.kernels.tuning import Choice
from normwear_fast.packing import Segments

CPU = torch.device("cpu")
FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16


def draw(rng, rows, width, heads, dtype) -> torch.Tensor:
    """(rows, 3 E) queries, keys and values inside a wider matrix of NaN; queries as after folding."""
    qkv = torch.from_numpy(rng.standard_normal((rows, 3 * width)))
    qkv[:, :width] *= 2 * (width // heads) ** -0.5 / np.log(2)
    wide = torch.full((rows, 3 * width + 16), torch.nan, dtype=dtype)
    wide[:, : 3 * width] = qkv.to(dtype)
    return wide[:, : 3 * width]


def check(qkv, width, queries, keys, heads, query=None, cases=None) -> None:
    """Parity into a poisoned buffer with two rows of nobody's after the last segment."""
    query = qkv[:, :width] if query is None else query
    key_value = qkv[:, width:]
    exact = operators.channel_attention(query.double(), key_value.double(), queries, keys, heads)
    out = torch.full((queries.total + 2, width + 8), torch.nan, dtype=qkv.dtype)
    got = channel_attention(query, key_value, queries, keys, heads, out=out[:, :width])
    assert got.data_ptr() == out.data_ptr()
    assert out[queries.total :].isnan().all()
    assert out[:, width:].isnan().all()
    close(out[: queries.total, :width], exact, key_value[:, width:].abs().max())


def close(got: torch.Tensor, exact: torch.Tensor, largest: torch.Tensor) -> None:
    """Weights, rounded to bfloat16, move a mean of values by 2^-8 of the largest, where one of them is
    nearly all; in float32 the rounding of scores of 10 or so does, by 1e-6."""
    rounding = torch.finfo(got.dtype).eps / 2
    bound = rounding * exact.abs() + (2e-6 if got.dtype == FLOAT32 else rounding) * largest
    assert ((got.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize(("heads", "size"), [(2, 64), (1, 16), (1, 32), (1, 128)])
def test_tokens_of_a_channel(dtype, heads, size):
    rng = np.random.default_rng()
    ragged = [int(n) for n in rng.permutation([66, 1, 65, 64, 129, *rng.integers(2, 200, 1)])]
    sequences, width = Segments(ragged, CPU), heads * size
    check(draw(rng, sequences.total, width, heads, dtype), width, sequences, sequences, heads)


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_cls_rows_of_windows(dtype):
    rng = np.random.default_rng()
    windows = Segments([*range(1, 15), 64, 33], CPU)
    check(draw(rng, windows.total, 128, 2, dtype), 128, windows, windows, 2)


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_one_query_a_channel(dtype):
    rng = np.random.default_rng()
    sequences = Segments([40, 131, 64, 200], CPU)
    ones = Segments([1] * len(sequences), CPU)
    qkv = draw(rng, sequences.total, 128, 2, dtype)
    query = qkv[sequences.cu[:-1].long(), :128]
    check(qkv, 128, ones, sequences, 2, query=query)


CASES = {
    "long": module.LONG_CHOICES,
    "short": module.SHORT_CHOICES,
    "few": module.FEW_CHOICES,
    "full": module.FLOAT32_CHOICES,
}


@pytest.mark.parametrize("name", CASES)
def test_every_choice(name, monkeypatch):
    """Whatever a device measures as fastest: the class is for speed, any choice takes any lengths."""
    rng = np.random.default_rng()
    sequences = Segments([1, 70, 150], CPU)
    qkv = draw(rng, sequences.total, 16, 1, FLOAT32 if name == "full" else BFLOAT16)
    monkeypatch.setattr(module, "_case", lambda *_: (name, CASES[name]))
    seen = set()
    for choice in (choice for row in CASES[name].values() for choice in row):
        if str(choice.blocks) not in seen:
            seen.add(str(choice.blocks))
            monkeypatch.setattr(module, "pick", lambda *_, choice=choice: choice)
            check(qkv, 16, sequences, sequences, 1)


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_tables_of_fixed_size(dtype):
    """Entries that stand for nothing: tiles of segment -1, segments of no rows."""
    rng = np.random.default_rng()
    real = Segments([80, 5, 171], CPU)
    tables = FixedSegments(5, 400, 90, CPU)
    tables.fill(real)
    qkv = draw(rng, 400, 64, 1, dtype)
    exact = operators.channel_attention(
        qkv[:256, :64].double(), qkv[:256, 64:].double(), real, real, 1
    )
    out = torch.full((400, 64), torch.nan, dtype=dtype)
    channel_attention(qkv[:, :64], qkv[:, 64:], tables, tables, 1, out=out)
    close(out[:256], exact, qkv[:, 128:].abs().max())
    assert out[256:].isnan().all()
    # One query each, more of them than there are sequences: the rest attends to nothing.
    ones = Segments([1] * 5, CPU)
    query, out = qkv[:5, :64].clone(), torch.full((5, 64), torch.nan, dtype=dtype)
    channel_attention(query, qkv[:, 64:], ones, tables, 1, out=out)
    few = operators.channel_attention(
        query[:3].double(), qkv[:256, 64:].double(), Segments([1] * 3, CPU), real, 1
    )
    close(out[:3], few, qkv[:, 128:].abs().max())
    assert (out[3:] == 0).all()


@pytest.mark.filterwarnings("ignore:All-NaN slice")
def test_keys_beyond_32_bits():
    """A sequence of a million tokens in few: rows 2^25 values apart, on pages never touched."""
    rng = np.random.default_rng()
    sequences, stride = Segments([71], CPU), 2**25
    qkv = draw(rng, 71, 16, 1, BFLOAT16)
    far = torch.empty(71 * stride, dtype=BFLOAT16).as_strided((71, 32), (stride, 1))
    far.copy_(qkv[:, 16:])
    exact = operators.channel_attention(qkv[:, :16].double(), far.double(), sequences, sequences, 1)
    got = channel_attention(qkv[:, :16], far, sequences, sequences, 1)
    close(got, exact, far[:, 16:].abs().max())


def test_a_neighbour_of_nan_and_large_scores():
    """What is not a segment's own cannot reach it; the largest score may be anywhere."""
    rng = np.random.default_rng()
    sequences = Segments([70, 90], CPU)
    qkv = draw(rng, 160, 64, 1, FLOAT32)
    qkv[:, :64] *= 60  # scores of hundreds: 2^score alone would overflow
    qkv[70:, 64:] = torch.nan
    first = Segments([70], CPU)
    exact = operators.channel_attention(
        qkv[:70, :64].double(), qkv[:70, 64:].double(), first, first, 1
    )
    got = channel_attention(qkv[:, :64], qkv[:, 64:], sequences, sequences, 1)
    torch.testing.assert_close(got[:70].double(), exact, rtol=1e-4, atol=2e-4)
    assert got[70:].isnan().all()


def steep(rng, lengths, powers, dtype, rows=slice(None), size=64) -> tuple[torch.Tensor, Segments]:
    """Queries, keys and values whose scores grow by that many powers of two from a segment's first key
    to its last, in the queries ``rows`` names."""
    sequences = Segments(lengths, CPU)
    qkv = draw(rng, sequences.total, size, 1, dtype)
    qkv[:, 0] = 0
    qkv[rows, 0] = 16
    for start, stop in zip(sequences.bounds, sequences.bounds[1:], strict=False):
        qkv[start:stop, size] = torch.linspace(0, powers / 16, stop - start)
    return qkv, sequences


def counted(monkeypatch) -> list[int]:
    """Grows by one at every block with the running maximum."""
    calls: list[int] = []
    inner = module._attend

    class Counting:
        def __call__(self, *arguments, **named):
            calls.append(1)
            return inner(*arguments, **named)

    monkeypatch.setattr(module, "_attend", Counting())
    return calls


@pytest.fixture(params=[(64, 64), (64, 32), (16, 16)], ids=str)
def chosen(request, monkeypatch):
    choice = Choice(dict(zip(("BLOCK_M", "BLOCK_N"), request.param, strict=True)))
    monkeypatch.setattr(module, "pick", lambda *_: choice)
    return request.param


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize("powers", [-1000, 70, 90, 140, 300, 5000])
def test_scores_that_grow(chosen, powers, dtype):
    """Beyond what a sum holds at the first block's scale: such tiles are done again."""
    rng = np.random.default_rng()
    width = 64
    qkv, sequences = steep(rng, [130, 64, 129, 1], powers, dtype)
    exact = operators.channel_attention(
        qkv[:, :width].double(), qkv[:, width:].double(), sequences, sequences, 1
    )
    got = channel_attention(qkv[:, :width], qkv[:, width:], sequences, sequences, 1)
    # Scores of 1000 are known to 1e-4 of a power in float32, whoever adds them up.
    rounding, scores = torch.finfo(dtype).eps / 2, 4e-7 * abs(powers)
    weights = max(2e-6, scores) if dtype == FLOAT32 else rounding + scores
    bound = rounding * exact.abs() + weights * qkv[:, 2 * width :].abs().max()
    assert ((got.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("where", ["a row", "other rows", "the last key", "one in the middle"])
@pytest.mark.parametrize("powers", [100, 300, 2000])
def test_scores_that_leap(chosen, where, powers):
    """In some rows of a tile; at one key alone, whichever block it is in."""
    rng = np.random.default_rng()
    rows = {"a row": slice(37, 38), "other rows": slice(0, None, 3)}.get(where, slice(None))
    qkv, sequences = steep(rng, [131], powers, BFLOAT16, rows)
    if where in ("the last key", "one in the middle"):
        qkv[:, 64] = 0
        qkv[-1 if where == "the last key" else 70, 64] = powers / 16
    check(qkv, 64, sequences, sequences, 1)


@pytest.mark.parametrize(
    ("powers", "again"), [(0, False), (60, False), (-3000, False), (300, True)]
)
def test_what_is_done_again(powers, again, monkeypatch):
    """Only what overflows: one block gives each tile its reference, else all of them run twice."""
    rng = np.random.default_rng()
    qkv, sequences = steep(rng, [192], powers, BFLOAT16)
    monkeypatch.setattr(module, "pick", lambda *_: Choice({"BLOCK_M": 64, "BLOCK_N": 64}))
    calls = counted(monkeypatch)
    check(qkv, 64, sequences, sequences, 1)
    assert len(calls) == 3 * (4 if again else 1)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("powers", [88, 92, 95, 96, 98, 102])
def test_large_values_at_the_edge_of_what_is_done_again(chosen, powers):
    """Weights around 2^64 times values of 2^62: no sum of values overflows where its tile is kept."""
    rng = np.random.default_rng()
    qkv, sequences = steep(rng, [131], 0, FLOAT32)
    qkv[:, 1:64] = 0
    qkv[-1, 64] = powers / 16
    qkv[:, 128:] = 2.0**62 * (1 + torch.rand(131, 64))
    exact = operators.channel_attention(
        qkv[:, :64].double(), qkv[:, 64:].double(), sequences, sequences, 1
    )
    got = channel_attention(qkv[:, :64], qkv[:, 64:], sequences, sequences, 1)
    torch.testing.assert_close(got.double(), exact, rtol=1e-4, atol=0)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_no_keys_give_zeros(chosen):
    """A table's unused entries, which the optimistic softmax has no first block for."""
    qkv = torch.randn(70, 192)
    queries, keys = Segments([70, 70], CPU), Segments([0, 70], CPU)
    query = torch.cat([qkv[:, :64], qkv[:, :64]])
    got = channel_attention(query, qkv[:, 64:], queries, keys, 1)
    assert torch.equal(got[:70], torch.zeros(70, 64))
    exact = operators.channel_attention(
        query[70:].double(), qkv[:, 64:].double(), Segments([70], CPU), Segments([70], CPU), 1
    )
    torch.testing.assert_close(got[70:].double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("level", [-500, -40, 40, 500])
def test_scores_far_from_zero(chosen, level):
    """All of them alike: nothing overflows, but 2^score alone would."""
    rng = np.random.default_rng()
    qkv, sequences = steep(rng, [150, 20], 0, BFLOAT16)
    qkv[:, 64] = level / 16
    check(qkv, 64, sequences, sequences, 1)


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_few_keys_and_whole_blocks(chosen, dtype):
    """The first block is what is more than full ones: a key, or all of a block."""
    rng = np.random.default_rng()
    sequences = Segments([1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 192], CPU)
    check(draw(rng, sequences.total, 64, 1, dtype), 64, sequences, sequences, 1)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("column", [64 + 5, 128 + 5], ids=["key", "value"])
@pytest.mark.parametrize("at", [0, 40, 89])
def test_what_is_not_finite_stays_where_it_is(chosen, value, column, at):
    rng = np.random.default_rng()
    sequences = Segments([70, 90, 65], CPU)
    qkv = draw(rng, 225, 64, 1, BFLOAT16)
    qkv[70 + at, column] = value
    exact = operators.channel_attention(
        qkv[:, :64].double(), qkv[:, 64:].double(), sequences, sequences, 1
    )
    got = channel_attention(qkv[:, :64], qkv[:, 64:], sequences, sequences, 1)
    largest = qkv[:, 128:].nan_to_num(0, 0, 0).abs().max()
    own = torch.zeros(225, dtype=torch.bool)
    own[70:160] = True
    close(got[~own], exact[~own], largest)
    assert torch.equal(got.isfinite(), exact.isfinite())
    finite = exact.isfinite()
    assert torch.equal(got.isnan(), exact.isnan())
    close(got[finite], exact[finite], largest)


def test_what_runs_plain():
    rng = np.random.default_rng()
    sequences = Segments([7, 3], CPU)
    for width, heads, dtype in ((16, 2, FLOAT32), (64, 1, torch.float64)):
        qkv = draw(rng, 10, width, heads, dtype)
        exact = operators.channel_attention(
            qkv[:, :width].double(), qkv[:, width:].double(), sequences, sequences, heads
        )
        got = channel_attention(qkv[:, :width], qkv[:, width:], sequences, sequences, heads)
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)
    empty = Segments([], CPU)
    none = torch.zeros(0, 192)
    assert channel_attention(none[:, :64], none[:, 64:], empty, empty, 1).shape == (0, 64)
