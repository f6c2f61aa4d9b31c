"""The native products: rounding, NaN, saturation, rows that depend on themselves alone, and the MLP."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cpu_operators import CPU, EPS, NAMES, NATIVE, close, draw, kernels, strided

from normwear_fast import native
from normwear_fast.packing import Segments


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
def test_products_of_no_rows_do_nothing(name):
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
