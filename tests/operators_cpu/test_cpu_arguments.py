"""Matrices, tables and arguments that do not fit are refused, and nothing is written."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cpu_operators import CPU, EPS, PRECISIONS, needs_native, tokens_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from normwear_fast import native, operators
from normwear_fast.errors import InputError
from normwear_fast.packing import Segments


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
