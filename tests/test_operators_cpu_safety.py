"""What the CPU operators do with values, sizes, memory and processes that are not as they should be."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import platform
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ends
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from normwear_fast import _native, native, operators
from normwear_fast.backends import TORCH
from normwear_fast.config import NormWearConfig
from normwear_fast.engine import Engine
from normwear_fast.errors import InputError
from normwear_fast.folding import fold
from normwear_fast.packing import Layout, Segments
from normwear_fast.reference import ReferenceNormWear

CPU = torch.device("cpu")
EPS = 1e-6
CONFIG = NormWearConfig(embed_dim=16, depth=1, num_heads=2, decoder_embed_dim=16, decoder_depth=0)
NAN, INFINITY = float("nan"), float("inf")
PRECISIONS = sorted(native.OPERANDS)
NAMES = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            name not in native.instruction_sets(),
            reason=f"not run: this build or processor has no {name}",
        ),
    )
    for name in native.INSTRUCTION_SETS
]
needs_native = pytest.mark.skipif(
    _native.load()[0] is None, reason="normwear_fast._C was not built"
)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng()


def draw(rng, *shape, scale=1.0) -> torch.Tensor:
    return torch.from_numpy((scale * rng.standard_normal(shape)).astype(np.float32))


def multiplied(name, a, w, precision, *, dtype=torch.float32, **options) -> torch.Tensor:
    k = native.kernels(name)
    c = torch.full((len(a), len(w)), NAN, dtype=dtype)
    packed = native.pack(k, w, native.OPERANDS[precision])
    return native.linear(k, a, packed, c, eps=EPS, **options)


# --- NaN and infinity --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [NAN, -NAN, INFINITY, -INFINITY])
def test_an_int8_row_that_is_not_finite_has_no_finite_output(name, value, rng):
    """Whichever value of the row it is: minimum and maximum, which give the scale, pass over NaN."""
    k, width = native.kernels(name), 150
    rows = draw(rng, width, width)
    clean = native.quantise_rows(k, rows)
    spoilt = rows.clone()
    spoilt.fill_diagonal_(value)
    for x in (spoilt, spoilt.bfloat16()):
        _, scale, offset = native.quantise_rows(k, x)
        assert scale.isnan().all()
        assert offset.isnan().all()
    alone = rows.clone()
    alone[70, 70] = value
    for got, expected in zip(native.quantise_rows(k, alone), clean, strict=True):
        assert torch.equal(got[:70], expected[:70])
        assert torch.equal(got[71:], expected[71:])
    out = multiplied(name, spoilt, draw(rng, 40, width), "int8")
    assert not out.isfinite().any()
    # As float32's: gelu of it is NaN, or the infinity that only the row's largest value can be.
    _, scale, _ = native.quantise_rows(k, spoilt, torch.zeros(width))
    assert scale.isnan().all() or value == -INFINITY


@pytest.mark.parametrize("name", NAMES)
def test_int8_rows_at_the_ends_of_the_range(name):
    k = native.kernels(name)
    largest, least = torch.finfo(torch.float32).max, 2.0**-149
    rows = torch.zeros(4, 40)
    rows[0, 3], rows[0, 39] = largest, -largest  # the range is not a float32
    rows[1, 3], rows[1, 39] = largest, 1.0
    rows[2] = torch.linspace(0, 255 * least, 40)  # one over its step is not one
    rows[3] = 2.0**-126
    q, scale, offset = native.quantise_rows(k, rows)
    assert scale[0].isnan()
    back = q.double() * scale.double()[:, None] + offset.double()[:, None]
    assert ((back - rows.double()).abs()[1:] <= 0.5001 * scale[1:, None] + 2.0**-118).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("value", [NAN, INFINITY, -INFINITY])
def test_a_weight_that_is_not_finite_spoils_its_output_alone(name, precision, value, rng):
    a, w = draw(rng, 20, 70), draw(rng, 50, 70)
    clean = multiplied(name, a, w, precision)
    for at in (0, 38, 69):
        spoilt = w.clone()
        spoilt[11, at] = value
        got = multiplied(name, a, spoilt, precision)
        assert not got[:, 11].isfinite().any()
        others = torch.arange(50) != 11
        assert torch.equal(got[:, others], clean[:, others])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_feed_passes_nan_on_from_every_stage(name, precision, rng):
    k, width, hidden, rows = native.kernels(name), 72, 1000, 50
    sizes = {"proj": (width, width), "fc1": (hidden, width), "fc2": (width, hidden)}
    operand = native.OPERANDS[precision]
    chunks = {"proj": None, "fc1": None, "fc2": native.CHUNK}
    matrices = {
        which: native.pack(k, draw(rng, *sizes[which], scale=0.1), operand, chunks[which])
        for which in sizes
    }
    start, attended, carried = draw(rng, rows, width), draw(rng, rows, width), draw(rng, width)

    def run(residual, attended, bias):
        residual = residual.clone()
        k.feed(
            residual=residual.data_ptr(), attended=native._view(attended), rows=rows, **matrices,
            carried=carried.data_ptr(), fc1_bias=bias.data_ptr(), eps=EPS, threads=1,
        )  # fmt: skip
        return residual

    bias = draw(rng, hidden)
    clean, lost = run(start, attended, bias), torch.arange(rows) == 17
    for value in (NAN, INFINITY):
        spoilt = attended.clone()
        spoilt[17, 33] = value
        got = run(start, spoilt, bias)
        assert torch.equal(got.isnan().all(1), lost)
        assert torch.equal(got[~lost], clean[~lost])
    for unit in (0, 767, 999):  # of a first and a second tile of hidden units
        spoilt = bias.clone()
        spoilt[unit] = NAN
        assert run(start, attended, spoilt).isnan().all()


def every_upper_half(*lower: int) -> torch.Tensor:
    """float32 of every bfloat16's bits, each with these lower halves."""
    bits = np.arange(65536, dtype=np.uint32)[:, None] << 16 | np.array(lower, np.uint32)
    return torch.from_numpy(bits.reshape(-1).view(np.float32))


def through_rows(name, x: torch.Tensor, k: int, precision: str) -> torch.Tensor:
    """Every value times one, in rows of k finite ones, or of one alone that is not (as a bfloat16)."""
    finite, one = x.bfloat16().isfinite(), torch.eye(k)
    whole, lone = x[finite], x[~finite]
    rows = torch.cat((whole, torch.zeros(-len(whole) % k))).view(-1, k)
    out = torch.empty(len(x))
    out[finite] = multiplied(name, rows, one, precision).flatten()[: len(whole)]
    row, place = torch.arange(len(lone)), torch.arange(len(lone)) % k
    rows = torch.zeros(len(lone), k)
    rows[row, place] = lone
    out[~finite] = multiplied(name, rows, one, precision)[row, place]
    return out


def attended(name, values: torch.Tensor) -> torch.Tensor:
    """Values as they come out of attention to one key, of score 0."""
    row = values[None]
    nothing, one = torch.zeros_like(row), Segments([1], CPU)
    key_value = torch.cat((nothing, row), 1)
    return native.backend(name).channel_attention(nothing, key_value, one, one, 1)[0]


def assert_rounded(got: torch.Tensor, x: torch.Tensor) -> None:
    """``got`` is x to the nearest bfloat16; what is not finite, or rounds to infinity, is not finite.

    Units for bfloat16 count subnormal values as zero, and float32's parts on the tile unit.
    """
    got, x, rounded = (t.float().numpy() for t in (got, x, x.bfloat16()))
    finite = np.isfinite(rounded)
    assert np.array_equal(np.isfinite(got), finite)
    assert np.isnan(got[np.isnan(x)]).all()
    other = finite & (got != rounded)
    got, x = got[other].astype(float), np.abs(x[other].astype(float))
    assert (x < 2.0**-102).all()
    assert (np.abs(np.abs(got) - x) <= 2.0**-8 * x + 2.0**-126).all()


@pytest.mark.parametrize("name", NAMES)
def test_every_conversion_to_bfloat16(name, rng):
    """Adding half a unit to the bits, as rounding does, makes some NaN an infinity and some a zero."""
    low = int(rng.integers(1, 0x8000))
    x = every_upper_half(0, low, 0x8000, 0x8001, 0xFFFF)
    one = torch.ones(1, 1)
    assert_rounded(
        through_rows(name, x, 37, "bfloat16"), x
    )  # rows: whole vectors, then lone values
    assert_rounded(multiplied(name, one, x[:, None], "bfloat16")[0], x)  # weights
    # Outputs: whole vectors and a rest, in whole cache lines or not; then lone ones.
    k = native.kernels(name)
    weight = native.pack(k, x[:, None], 0)
    for beside in (0, 1):
        c = torch.zeros(1, len(x) + 33, dtype=torch.bfloat16)[:, beside:][:, : len(x)]
        assert_rounded(native.linear(k, one, weight, c)[0], x)
    few = every_upper_half(1, 0xFFFF)
    got = multiplied(name, few[:, None], one, "float32", dtype=torch.bfloat16)
    assert_rounded(got[:, 0], few)
    bits = every_upper_half(0)
    assert_rounded(attended(name, bits.bfloat16()), bits)


@pytest.mark.parametrize("name", NAMES)
def test_float32_stays_what_it_is(name, rng):
    """Times one, whatever it is made of: on the tile unit three bfloat16, of which infinity minus itself
    is NaN. Never is a finite number made of what is not."""
    x = every_upper_half(0, int(rng.integers(1, 0x8000)), 0xFFFF)
    one = torch.ones(1, 1)
    # Rows of whole steps of the tile unit and of its short one, weights, values.
    found = [through_rows(name, x, k, "float32") for k in (32, 37)]
    found += [multiplied(name, one, x[:, None], "float32")[0], attended(name, x)]
    kept = (x.bfloat16() if name == "amx" else x).isfinite().numpy()
    x = x.numpy()
    for got in (y.numpy() for y in found):
        assert not np.isfinite(got[~kept]).any()
        assert np.isnan(got[np.isnan(x)]).all()
        other = kept & (got != x)
        assert name == "amx" or not other.any()
        error = np.abs(got[other].astype(float) - x[other])
        assert (error <= 2.0**-24 * np.abs(x[other].astype(float)) + 2.0**-125).all()


# --- the state of the processor ----------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"),
    reason="not run: glibc's name, and x86's numbers of the rounding modes",
)
def test_bits_do_not_depend_on_the_callers_arithmetic(name, rng):
    """A library linked with -ffast-math, or torch.set_flush_denormal, changes one thread's arithmetic:
    a row's bits would depend on the thread that computes it."""
    k, threads = native.kernels(name), torch.get_num_threads()
    a, w, tiny = draw(rng, 300, 33), draw(rng, 200, 33), torch.full((3000, 64), 1e-39)
    values, keys = draw(rng, 300, 64), Segments([100, 200], CPU)

    def run():
        c, subnormal = torch.full((300, 200), NAN), tiny.clone()
        native.linear(k, a, native.pack(k, w, 0), c)
        native.bias_gelu(k, subnormal, torch.zeros(64))
        normed = native.residual_norm(k, values, None, EPS)
        return (
            c,
            subnormal,
            normed,
            native.channel_attention(k, normed[:, :32], values, keys, keys, 2),
        )

    up = 0x800
    libm = ctypes.CDLL("libm.so.6")
    torch.set_num_threads(2)
    try:
        expected = run()
        torch.set_flush_denormal(True)
        flushed = run()
        assert torch.tensor([1e-39]).mul(1.0)[0] == 0  # the caller's own is as it was
        torch.set_flush_denormal(False)
        libm.fesetround(up)
        rounded = run()
        assert libm.fegetround() == up
    finally:
        torch.set_flush_denormal(False)
        libm.fesetround(0)
        torch.set_num_threads(threads)
    for results in zip(expected, flushed, rounded, strict=True):
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])


def _pack_in_child(weight: torch.Tensor, result: object) -> None:
    kernels = native.kernels()
    packed = kernels.pack(
        weight=weight.data_ptr(), n=len(weight), k=weight.shape[1], stride=weight.shape[1],
        operand=0, chunk=weight.shape[1], threads=2,
    )  # fmt: skip
    result.put(packed.bytes)  # type: ignore[attr-defined]


@needs_native
@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_packs_weights():
    """Which its engine does at first use. GNU OpenMP's threads are the parent's alone."""
    weight, small, out = torch.ones(512, 512), torch.ones(300, 512), torch.empty(300, 512)
    kernels = native.kernels()
    packed = native.pack(kernels, weight, 0)
    kernels.linear(
        a=native._view(small), standardise=False, carried=0, eps=0.0, weight=packed, bias=0,
        gelu=False, accumulate=False, c=native._view(out), rows=300, threads=2,
    )  # fmt: skip
    context = multiprocessing.get_context("fork")
    result = context.SimpleQueue()
    child = context.Process(target=_pack_in_child, args=(weight, result))
    child.start()
    assert ends(child)
    assert result.get() == packed.bytes


@needs_native
def test_tables_live_as_long_as_the_call(monkeypatch):
    """Another thread may push them out of the cache while the operator works without the GIL."""
    made: list[weakref.ref[torch.Tensor]] = []

    def table(segments: Segments) -> torch.Tensor:
        bounds = torch.tensor(segments.bounds, dtype=torch.int64)
        made.append(weakref.ref(bounds))
        return bounds

    class Operations:
        name = "none"

        def __getattr__(self, operator: str):
            return lambda **arguments: calls.append([ref() is not None for ref in made])

    calls: list[list[bool]] = []
    monkeypatch.setattr(native, "_bounds", table)
    segments, x = Segments([4, 3], CPU), torch.zeros(7, 8)
    native.channel_attention(Operations(), x, torch.zeros(7, 16), segments, segments, 2)
    native.pool_norm(Operations(), x, None, x[0], x[0], EPS, segments, "mean")
    layout, tokenizer = tokens_of((1, 30))
    tokenizer.prepared["native", "none"] = object()
    residual = torch.zeros(layout.sequences.total, 16)
    native.tokenize(
        Operations(), residual, torch.zeros(30), layout.samples, layout.sequences, tokenizer
    )
    assert [alive.count(True) for alive in calls] == [2, 1, 2]


# --- sizes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_more_int8_inputs_than_a_32_bit_sum_holds(name):
    """66,311 products of 255 and 127; a matrix of more inputs is cut."""
    k = 70_016
    a = torch.ones(2, k)
    a[:, 0] = 0.0  # so that every 1 becomes 255
    for sign in (1.0, -1.0):
        got = multiplied(name, a, torch.full((9, k), sign), "int8")
        assert (got - sign * (k - 1)).abs().max() < 1e-3 * k


@pytest.mark.parametrize("name", NAMES)
def test_elements_beyond_32_bits(name, rng, tmp_path):
    """Rows 2^31 elements apart, in files of which only the pages of these rows exist."""
    k, apart, backend = native.kernels(name), 2**31 + 64, native.backend(name)

    def spread(values: torch.Tensor, file: str) -> torch.Tensor:
        """Two bfloat16 rows, the second past the 32 bits."""
        path, size = str(tmp_path / file), apart + values.shape[1]
        wide = torch.from_file(path, shared=True, size=size, dtype=torch.bfloat16)
        rows = wide.as_strided(values.shape, (apart, 1))
        rows.copy_(values)
        return rows

    a, w = draw(rng, 2, 64).bfloat16(), draw(rng, 128, 64)
    far = spread(a, "a")
    for precision in PRECISIONS:
        packed = native.pack(k, w, native.OPERANDS[precision])
        near = native.linear(k, a, packed, torch.zeros(2, 128, dtype=torch.bfloat16))
        c = spread(torch.zeros(2, 128, dtype=torch.bfloat16), "c")
        assert torch.equal(native.linear(k, far, packed, c), near)
    update = backend.residual_norm(torch.ones(2, 64), None, EPS, update=a, dtype=torch.bfloat16)
    out = spread(torch.zeros(2, 64, dtype=torch.bfloat16), "c")
    assert torch.equal(
        backend.residual_norm(torch.ones(2, 64), None, EPS, update=far, out=out), update
    )
    for got, expected in zip(native.quantise_rows(k, far), native.quantise_rows(k, a), strict=True):
        assert torch.equal(got, expected)
    segments, key_value = Segments([2], CPU), draw(rng, 2, 128).bfloat16()
    attended = backend.channel_attention(a, key_value, segments, segments, 2)
    far_kv, out = spread(key_value, "kv"), spread(torch.zeros_like(a), "c")
    assert torch.equal(
        backend.channel_attention(far, far_kv, segments, segments, 2, out=out), attended
    )
    bias = draw(rng, 64)
    backend.bias_gelu(a, bias)
    backend.bias_gelu(far, bias)
    assert torch.equal(far, a)
    # [CLS] rows of a residual of more than 2^31 elements.
    rows, width = 2**21 + 8, 1024
    file = str(tmp_path / "residual")
    residual = torch.from_file(file, shared=True, size=rows * width).view(rows, width)
    residual[0], residual[rows - 5] = last = draw(rng, 2, width)
    norm = torch.ones(width), torch.zeros(width), EPS
    pooled = backend.pool_norm(residual, None, *norm, Segments([rows - 5, 5], CPU), "cls")
    assert torch.equal(pooled, backend.pool_norm(last, None, *norm, Segments([1, 1], CPU), "cls"))


@pytest.mark.parametrize("precision", PRECISIONS)
@needs_native
def test_matrices_that_do_not_belong_together_are_refused(precision):
    k = native.kernels()
    operand = native.OPERANDS[precision]
    square, wide = (native.pack(k, torch.zeros(n, 64), operand) for n in (64, 128))
    narrow = native.pack(k, torch.zeros(64, 128), operand)
    other = native.pack(k, torch.zeros(64, 64), (operand + 1) % 3)
    x, bias = torch.zeros(3, 64), torch.zeros(128)

    def feed(rows=3, **matrices):
        k.feed(
            residual=x.data_ptr(), attended=native._view(x), rows=rows, carried=x.data_ptr(),
            fc1_bias=bias.data_ptr(), eps=EPS, threads=1,
            **(dict(proj=square, fc1=wide, fc2=narrow) | matrices),
        )  # fmt: skip

    feed()
    for wrong in (
        {"fc1": narrow}, {"fc2": square}, {"fc2": wide}, {"proj": wide}, {"proj": other}, {"rows": -1},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"matrices|negative"):
            feed(**wrong)
    if precision == "int8":
        cut = native.pack(k, torch.zeros(64, 128), operand, 64)
        a, c = torch.zeros(3, 128), torch.zeros(3, 64)
        native.linear(k, a, cut, c)
        for options in ({"norm": True}, {"gelu": True}):
            with pytest.raises(ValueError, match="chunks"):
                native.linear(k, a, cut, c, **options)
    for size in ({"n": -1}, {"k": 0}, {"k": 2**62}, {"operand": 3}, {"chunk": 0}):
        sizes = dict(n=3, k=64, stride=64, operand=operand, chunk=64, threads=1) | size
        with pytest.raises((ValueError, MemoryError)):
            k.pack(weight=x.data_ptr(), **sizes)


@needs_native
def test_tables_out_of_order_are_refused():
    """By the module too, which believes addresses only."""
    k, x = native.kernels(), torch.zeros(8, 64)
    one = native._view(x)

    def attend(queries, keys, head_size=8, types=(0, 0, 0)):
        tables = [torch.tensor(bounds) for bounds in (queries, keys)]
        views = [(*one[:2], kind) for kind in types]
        k.attention(
            query=views[0], key_value=views[1], out=views[2], queries=tables[0].data_ptr(),
            keys=tables[1].data_ptr(), segments=len(queries) - 1, heads=2, head_size=head_size,
            threads=1,
        )  # fmt: skip

    attend([0, 4, 8], [0, 4, 8])
    for wrong in (
        ([0, 4, 2], [0, 4, 8]), ([0, 4, 8], [0, 4, 2]), ([0, 4, 8], [0, 0, 8]), ([-1, 4], [0, 4]),
        ([0, 4], [0, 4], 0), ([0, 4], [0, 4], 8, (0, 0, 1)), ([0, 4], [0, 4], 8, (7, 7, 7)),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"segments|heads|type"):
            attend(*wrong)
    for bounds in ([0, 5, 3], [1, 4], [[0, 4]]):
        cu = torch.tensor(bounds, dtype=torch.int32)
        with pytest.raises(InputError, match="segments"):
            torch.ops.normwear.pool_norm(x, None, x[0], x[0], EPS, cu, "mean", None)


# --- memory ------------------------------------------------------------------------------------------

REFUSING = """
#include <dlfcn.h>
#include <cstddef>
extern "C" {
int granted = 1 << 30;
void* aligned_alloc(std::size_t alignment, std::size_t size) {
    typedef void* (*Function)(std::size_t, std::size_t);
    static const Function real = reinterpret_cast<Function>(dlsym(RTLD_NEXT, "aligned_alloc"));
    return __atomic_sub_fetch(&granted, 1, __ATOMIC_RELAXED) < 0 ? nullptr : real(alignment, size);
}
}
"""

OUT_OF_MEMORY = """
import ctypes, itertools, sys, threading
import torch
sys.path.insert(0, sys.argv[2])
import test_operators_cpu_safety as tests
from normwear_fast import native

granted = ctypes.c_int.in_dll(ctypes.CDLL(sys.argv[1]), "granted")

def attempt(run, count, outcomes):
    granted.value = count
    try:
        run()
        outcomes.append(None)
    except MemoryError:
        granted.value = 1 << 30
        outcomes.append([x.clone() for x in run()])  # the same thread, once there is memory

torch.set_num_threads(2)
for name in native.instruction_sets():
    for what, run in tests.allocating(native.kernels(name)).items():
        expected, refusals = [x.clone() for x in run()], 0
        for count in itertools.count():
            # A thread of its own: scratch memory stays with its thread, and so do OpenMP's workers.
            outcomes = []
            thread = threading.Thread(target=attempt, args=(run, count, outcomes))
            thread.start()
            thread.join()
            granted.value = 1 << 30
            if outcomes[0] is None:
                break
            refusals += 1
            assert all(map(torch.equal, outcomes[0], expected)), (name, what)
        print(name, what, refusals)
"""


def allocating(k) -> dict[str, Callable[[], Sequence[torch.Tensor]]]:
    """Every operator that takes memory, with work for two threads: what gives its outputs."""
    rng = np.random.default_rng()
    wide, rows, bias = draw(rng, 80, 1024), draw(rng, 80, 128), draw(rng, 1024)
    half, segments, short = wide.bfloat16(), Segments([30, 50], CPU), bias[:128]
    found: dict[str, Callable[[], Sequence[torch.Tensor]]] = {
        "residual_norm": lambda: [native.residual_norm(k, wide, bias, EPS)],
        "pool_norm": lambda: [native.pool_norm(k, wide, None, bias, bias, EPS, segments, "mean")],
        "quantise": lambda: native.quantise_rows(k, wide, bias),
    }

    def gelu():
        x = half.clone()
        native.bias_gelu(k, x, bias)
        return [x]

    found["bias_gelu"] = gelu
    for x in (wide, half):
        found[f"attention {x.dtype}"] = lambda x=x: [
            native.channel_attention(k, x[:, :256], x[:, 256:768], segments, segments, 4)
        ]
    square = draw(rng, 128, 128, scale=0.1)
    for precision, operand in native.OPERANDS.items():
        w = native.pack(k, square, operand)

        def linear(w=w):
            return [native.linear(k, rows, w, torch.zeros(80, 128))]

        def feed(w=w):
            x = rows.clone()
            k.feed(
                residual=x.data_ptr(), attended=native._view(rows), rows=80, proj=w, fc1=w, fc2=w,
                carried=short.data_ptr(), fc1_bias=short.data_ptr(), eps=EPS, threads=2,
            )  # fmt: skip
            return [x]

        def pack(operand=operand):
            native.pack(k, square, operand)
            return []

        found |= {f"{f.__name__} {precision}": f for f in (linear, feed, pack)}
    layout, tokenizer = tokens_of((2, 390))
    series = draw(rng, layout.samples.total)

    def tokenize():
        residual = torch.zeros(layout.sequences.total, 16)
        native.tokenize(k, residual, series, layout.samples, layout.sequences, tokenizer)
        return [residual]

    found["tokenize"] = tokenize
    return found


@needs_native
@pytest.mark.skipif(
    shutil.which("g++") is None or sys.platform != "linux", reason="needs g++, Linux"
)
def test_memory_that_is_refused_is_a_memory_error(tmp_path):
    """Every allocation of every operator in turn, most of them in an OpenMP thread, where an exception
    that is not caught ends the process; afterwards the operator does its work."""
    library = tmp_path / "refusing.so"
    (tmp_path / "refusing.cpp").write_text(REFUSING)
    command = ["g++", "-O1", "-shared", "-fPIC", str(tmp_path / "refusing.cpp"), "-o", str(library)]
    subprocess.run([*command, "-ldl"], check=True)
    done = subprocess.run(
        [sys.executable, "-c", OUT_OF_MEMORY, str(library), str(Path(__file__).parent)],
        env=os.environ | {"LD_PRELOAD": str(library)},
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    outcomes = [line.rsplit(" ", 1) for line in done.stdout.splitlines()]
    assert len(outcomes) == 16 * len(native.instruction_sets())
    for what, refusals in outcomes:
        assert int(refusals) > 0, what


HUGE_ROW = """
import os, pathlib, torch
from normwear_fast import native

def resident():
    pages = pathlib.Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")

width = 20_000_000
x, bias = torch.ones((1, width), dtype=torch.bfloat16), torch.zeros(width)
before = resident()
native.bias_gelu(native.kernels(), x, bias)
print(resident() - before)
"""


@needs_native
@pytest.mark.skipif(sys.platform != "linux", reason="not run: reads Linux's /proc")
def test_one_huge_window_leaves_no_scratch_memory():
    """In a process of its own: threads that other tests left behind take memory when they like."""
    if "asan" in os.environ.get("LD_PRELOAD", ""):
        pytest.skip("AddressSanitizer keeps what was freed for a while")
    run = [sys.executable, "-c", HUGE_ROW]
    grown = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    assert int(grown) < 40e6  # a row in float32 takes 80


@needs_native
def test_python_threads_at_once_give_the_same_bits(rng):
    """Each brings its own team and scratch memory."""
    k, w = native.kernels(), draw(rng, 128, 128)
    inputs = [draw(rng, rows, 128) for rows in (30, 700, 1000)] * 8

    def run(x):
        out = native.linear(k, x, native.pack(k, w, 2), torch.zeros(len(x), 128))
        segments = Segments([len(x)], CPU)
        return native.channel_attention(k, out[:, :32], out[:, :64], segments, segments, 2)

    expected = [run(x) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        for got, alone in zip(pool.map(run, inputs), expected, strict=True):
            assert torch.equal(got, alone)


# --- arguments that do not fit -----------------------------------------------------------------------


class Guarded:
    """Copies of tensors, each inside a larger one whose other values must stay."""

    def __init__(self) -> None:
        self.buffers: list[torch.Tensor] = []

    def __call__(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        x = torch.from_numpy(np.random.default_rng().standard_normal(shape).astype(np.float32))
        buffer = torch.full((x.numel() + 128,), 77.0, dtype=dtype)
        self.buffers.append(buffer)
        inner = buffer[64:-64].view(shape)
        inner.copy_(x)
        return inner

    def untouched(self) -> bool:
        return all(bool((torch.cat((b[:64], b[-64:])) == 77.0).all()) for b in self.buffers)


def misaligned(x: torch.Tensor) -> torch.Tensor:
    numbers = x.float().numpy()
    raw = np.zeros(numbers.nbytes + 1, np.uint8)
    view = raw[1:].view(np.float32).reshape(numbers.shape)
    view[...] = numbers
    return torch.from_numpy(view)


SPOILT = {
    "as it is": lambda x: x,
    "none": lambda x: None,
    "float64": lambda x: x.double(),
    "float16": lambda x: x.half(),
    "bfloat16": lambda x: x.bfloat16(),
    "whole numbers": lambda x: x.int(),
    "a row fewer": lambda x: x[:-1],
    "a row more": lambda x: torch.cat((x, x[:1])),
    "two rows": lambda x: x[:2],
    "no rows": lambda x: x[:0],
    "a column fewer": lambda x: x[..., :-1],
    "a column more": lambda x: torch.cat((x, x[..., :1]), -1),
    "one column": lambda x: x[..., :1],
    "no columns": lambda x: x[..., :0],
    "every second column": lambda x: torch.stack((x, x), -1)[..., 0],
    "columns first": lambda x: x.mT.contiguous().mT,
    "transposed": lambda x: x.mT,
    "a dimension more": lambda x: x[None],
    "flat": lambda x: x.flatten(),
    "one number": lambda x: x.flatten()[0],
    "one row for all": lambda x: x[:1].expand(x.shape),
    "misaligned": misaligned,
    "nowhere": lambda x: x.to("meta"),
}
SEGMENTS = [
    [5],
    [4, 3],
    [7],
    [6, 1],
    [0, 7],
    [7, 0],
    [3, 3],
    [4, 4],
    [700, 7],
    [-1, 8],
    [8, -1],
    [1] * 7,
]


def spoil(data: st.DataObject, value):
    if isinstance(value, torch.Tensor):
        return SPOILT[data.draw(st.sampled_from(sorted(SPOILT)))](value)
    if isinstance(value, Segments):
        return Segments(data.draw(st.sampled_from(SEGMENTS)), CPU)
    if isinstance(value, int):
        return data.draw(st.sampled_from([-1, 0, 1, 3, 4, 8, 100]))
    return data.draw(st.sampled_from(["mean", "cls", "patch", "none"]))


@cache
def tokens_of(*shapes: tuple[int, int]) -> tuple[Layout, operators.Tokenizer]:
    layout = Layout(shapes, "conv", CONFIG, CPU)
    engine = Engine(fold(ReferenceNormWear(CONFIG), torch.float32), CONFIG, "conv", TORCH)
    return layout, engine.tokenizer(tuple(sorted(set(layout.sequences.lengths))))


def fitting(operator: str, new: Guarded) -> dict[str, object]:
    """Arguments of an operator that it takes, 7 rows of width 16."""
    two, rows = Segments([4, 3], CPU), (7, 16)
    if operator == "residual_norm":
        return dict(residual=new(*rows), carried=new(16), update=new(*rows), out=new(*rows))
    if operator == "bias_gelu":
        return dict(x=new(*rows), bias=new(16))
    if operator == "channel_attention":
        return dict(
            query=new(*rows),
            key_value=new(7, 32),
            queries=two,
            keys=two,
            num_heads=2,
            out=new(*rows),
        )
    if operator == "pool_norm":
        return dict(
            residual=new(*rows), carried=new(16), weight=new(16), bias=new(16), sequences=two,
            pool="mean", update=new(*rows),
        )  # fmt: skip
    if operator == "tokenize":
        layout, tokenizer = tokens_of((1, 30), (2, 12))
        return dict(
            residual=new(layout.sequences.total, 16), series=new(layout.samples.total),
            samples=layout.samples, sequences=layout.sequences, rows=9, scales=5, num_scales=65,
            patch_weight=tokenizer.patch_weight.clone(), templates=tokenizer.templates.clone(),
            counts=tokenizer.token_counts,
        )  # fmt: skip
    if operator == "linear":
        return dict(a=new(*rows), w=new(40, 16), c=new(7, 40), carried=new(16), bias=new(40))
    return dict(x=new(*rows), bias=new(16))  # quantise_rows


def run(operator: str, kernels, **given):
    """The native operator, or with no kernels its definition: the output, and what may be written to."""
    tensors = [x for which, x in given.items() if isinstance(x, torch.Tensor) and which != "out"]
    if operator in ("residual_norm", "pool_norm"):
        given["eps"] = EPS
    if operator == "tokenize":
        counts = given.pop("counts")
        patch = (given.pop("rows"), given.pop("scales"))
        given["tokenizer"] = operators.Tokenizer(
            given.pop("patch_weight"), given.pop("templates"), counts, patch,
            given.pop("num_scales"), "conv", "mexh",
        )  # fmt: skip
    if operator == "linear":
        a, w, c, options = (
            given["a"],
            given["w"],
            given["c"],
            {"norm": True, "gelu": True, "eps": EPS},
        )
        if kernels:
            vectors = {"carried": given["carried"], "bias": given["bias"]}
            out = native.linear(kernels, a, native.pack(kernels, w, 0), c, **vectors, **options)
        else:
            normed = operators.residual_norm(a.double(), given["carried"], EPS)
            x = normed @ w.double().T + (0 if given["bias"] is None else given["bias"])
            out = c.copy_(torch.nn.functional.gelu(x))
    elif operator == "quantise_rows":
        if kernels:
            q, scale, offset = native.quantise_rows(kernels, given["x"], given["bias"])
            out = q * scale[:, None] + offset[:, None]
        else:
            x = given["x"].float()
            out = x if given["bias"] is None else torch.nn.functional.gelu(x + given["bias"])
    elif kernels:
        out = getattr(native, operator)(kernels, **given)
    else:
        out = getattr(operators, operator)(**given)
    return [x for x in (out, *tensors) if x is not None]


@needs_native
@settings(max_examples=250, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_fuzz_arguments_that_do_not_fit(data):
    """An exception, or what the definition makes of them; never a value beside them."""
    new = Guarded()
    kernels = native.kernels(data.draw(st.sampled_from(native.instruction_sets())))
    operator = data.draw(
        st.sampled_from(
            [
                "residual_norm",
                "bias_gelu",
                "channel_attention",
                "pool_norm",
                "tokenize",
                "linear",
                "quantise_rows",
            ]
        )
    )
    given = fitting(operator, new)
    chosen = st.lists(st.sampled_from(sorted(given)), max_size=2, unique=True)
    try:
        given |= {which: spoil(data, given[which]) for which in data.draw(chosen)}
    except (RuntimeError, IndexError, InputError, TypeError):
        return  # a change that this argument does not take
    twin = {
        which: value.clone() if isinstance(value, torch.Tensor) else value
        for which, value in given.items()
    }
    try:
        got = run(operator, kernels, **given)
    except Exception:
        assert new.untouched()
        return
    assert new.untouched()
    if any(isinstance(x, torch.Tensor) and x.is_meta for x in given.values()):
        return  # torch writes nothing then, and says nothing
    for mine, expected in zip(got, run(operator, None, **twin), strict=True):
        close = operator != "quantise_rows" and mine.dtype in (torch.float32, torch.float64)
        tolerance = 1e-4 if close else 3e-2
        assert mine.shape == expected.shape
        assert torch.allclose(
            mine.double(), expected.double(), tolerance, tolerance, equal_nan=True
        )
