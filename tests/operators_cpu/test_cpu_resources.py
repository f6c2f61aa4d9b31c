"""The CPU operators with large sizes, little memory, forks and threads."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from cpu_operators import (
    CPU,
    EPS,
    NAMES,
    PRECISIONS,
    ROOT,
    draw,
    multiplied,
    needs_native,
    tokens_of,
)
from helpers import ends

from normwear_fast import native
from normwear_fast.packing import Segments


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
sys.path[:0] = sys.argv[2:]
import test_cpu_resources as tests
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
        [sys.executable, "-c", OUT_OF_MEMORY, str(library), *map(str, Path(__file__).parents[:2])],
        env=os.environ | {"LD_PRELOAD": str(library)},
        cwd=ROOT,
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
