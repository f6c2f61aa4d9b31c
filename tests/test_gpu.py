"""The GPU engine without a GPU: its tables, its arithmetic through plain operators, and whole small
encoders through Triton's interpreter against the reference numbers."""

from __future__ import annotations

import contextlib
import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import golden, golden_config, golden_weights
from hypothesis import given
from hypothesis import strategies as st

from normwear_fast import FastNormWear, NormWearConfig, engine, linear_float8, linear_hopper
from normwear_fast.backends import TORCH, select_backend
from normwear_fast.buckets import FixedLayout, FixedSegments, bucket_rows, table_size
from normwear_fast.engine import Engine, default_batch_tokens, exact_products
from normwear_fast.errors import UsageError
from normwear_fast.folding import fold
from normwear_fast.gpu import GpuEncoder, mlp_table, scaled_product
from normwear_fast.kernels import tuning
from normwear_fast.linear_float8 import FLOAT8_MAX, linear_float8_ref, quantise_columns
from normwear_fast.linear_hopper import linear_ref
from normwear_fast.packing import Layout, Segments, segment_tiles
from normwear_fast.reference import ReferenceNormWear

CPU = torch.device("cpu")
SMALL = NormWearConfig.small()


# --- buckets and tables --------------------------------------------------------------------------


@given(st.integers(1, 200_000))
def test_a_bucket_holds_its_tokens_and_at_most_a_quarter_more(tokens):
    rows = bucket_rows(tokens)
    assert tokens <= rows <= max(1_024, 1.25 * tokens + 1)
    assert bucket_rows(rows) == rows
    assert bucket_rows(tokens + 1) >= rows


def test_a_full_budget_is_a_bucket():
    assert bucket_rows(131_072) == bucket_rows(131_040) == 131_072


@given(st.integers(2, 1_000), st.integers(1_024, 131_072))
def test_a_buckets_tables_hold_any_sequences_and_not_many_more(tokens, rows):
    """Rows are those of the bucket, up to a quarter more than the sequences of so many tokens fill."""
    rows = bucket_rows(rows)
    sequences = max(1, rows // tokens)
    size = table_size(sequences, rows)
    assert size >= sequences
    assert size <= max(rows // 256, (5 if tokens >= 14 else 7) * sequences)


def test_few_columns_of_patches_make_short_sequences():
    """One column, windows of 11 samples: 2 tokens a sequence."""
    config = dataclasses.replace(SMALL, num_scales=5)
    layout = Layout([(2, 11)] * 500, "conv", config, CPU)
    assert set(layout.sequences.lengths) == {2}
    rows = bucket_rows(layout.sequences.total)
    fixed = FixedLayout(rows, table_size(len(layout.sequences), rows), CPU)
    fixed.fill(layout)
    assert fixed.sequences.cu[:1001].tolist() == layout.sequences.cu.tolist()


@given(st.lists(st.integers(1, 90), min_size=1, max_size=12), st.sampled_from([16, 64, 128]))
def test_fixed_tables_say_what_segments_say(lengths, block):
    fixed, segments = FixedSegments(16, 1_200, 90, CPU), Segments(lengths, CPU)
    fixed.fill(Segments([3, 1], CPU))
    before = fixed.tiles(block).data_ptr(), fixed.cu.data_ptr(), fixed.index.data_ptr()
    fixed.fill(segments)
    assert before == (fixed.tiles(block).data_ptr(), fixed.cu.data_ptr(), fixed.index.data_ptr())
    count = len(lengths)
    assert torch.equal(fixed.cu[: count + 1], segments.cu)
    assert (fixed.cu[count:] == segments.total).all()
    assert torch.equal(fixed.index[:count], segments.cu[:-1])
    assert (fixed.index[count:] == -1).all()
    real = segment_tiles(lengths, block)
    assert np.array_equal(fixed.tiles(block)[: len(real)].numpy(), real)
    assert (fixed.tiles(block)[len(real) :] == -1).all()


def assert_tables_say(layout, fixed, blocks):
    for name in ("sequences", "windows", "ones"):
        real, table = getattr(layout, name), getattr(fixed, name)
        count = len(real)
        assert table.cu.tolist() == [*real.bounds, *[real.total] * (table.capacity - count)], name
        assert table.index.tolist() == [*real.bounds[:-1], *[-1] * (table.capacity - count)], name
        for block in blocks:
            tiles, expected = table.tiles(block), segment_tiles(real.lengths, block).tolist()
            assert len(tiles) == table.total // block + table.capacity
            assert tiles.tolist() == expected + [[-1, -1]] * (len(tiles) - len(expected)), name


def tensors_of(fixed, blocks):
    tables = (fixed.sequences, fixed.windows, fixed.ones)
    return [t for table in tables for t in (table.cu, table.index, *map(table.tiles, blocks))]


@pytest.mark.parametrize(("blocks", "chunks"), [((16,), 1), ((16, 32, 64, 128), 2)])
def test_a_layout_fills_all_its_tables_at_once(blocks, chunks, monkeypatch):
    """Whatever was in them; what finds no room in the first allocation is in a second."""
    layouts = [
        Layout(shapes, "conv", SMALL, CPU)
        for shapes in ([(1, 40), (3, 40), (2, 131)], [(1, 11)], [(2, 60)] * 4, [(9, 30)])
    ]
    fixed = FixedLayout(1_024, 9, CPU)
    fixed.fill(layouts[0])
    tensors = tensors_of(fixed, blocks)
    addresses = [t.data_ptr() for t in tensors]
    assert all(address % 16 == addresses[0] % 16 for address in addresses)
    assert_tables_say(layouts[0], fixed, blocks)  # those made after the layout was filled, too
    copies, send = [], type(fixed._arena).send
    monkeypatch.setattr(
        type(fixed._arena),
        "send",
        lambda self, staged: (copies.append(len(staged)), send(self, staged)),
    )
    for layout in (*layouts[1:], layouts[0]):
        for tensor in tensors:
            tensor.fill_(-777)
        fixed.fill(layout)
        assert_tables_say(layout, fixed, blocks)
        assert [t.data_ptr() for t in tensors_of(fixed, blocks)] == addresses
    assert copies == [chunks] * 4


def test_tables_are_filled_when_they_must_be(monkeypatch):
    """Not for the layout that they hold; again after a copy that failed."""
    first, second = (Layout([shape], "conv", SMALL, CPU) for shape in ((2, 40), (1, 90)))
    again = Layout([(2, 40)], "conv", SMALL, CPU)
    split = Layout([(1, 40), (1, 40)], "conv", SMALL, CPU)  # the same sequences, other windows
    fixed = FixedLayout(1_024, 4, CPU)
    arena, sent = type(fixed._arena), []
    send = arena.send
    monkeypatch.setattr(arena, "send", lambda self, staged: (sent.append(1), send(self, staged)))
    for layout, count in ((first, 1), (again, 1), (split, 2), (first, 3)):
        fixed.fill(layout)
        assert len(sent) == count
        assert_tables_say(layout, fixed, (16,))

    def broken(self, staged):
        self._chunks[0][:40] = 0
        raise RuntimeError("no memory to stage it in")

    with monkeypatch.context() as patch:
        patch.setattr(arena, "send", broken)
        with pytest.raises(RuntimeError, match="no memory"):
            fixed.fill(second)
    for layout in (second, first):
        fixed.fill(layout)
        assert_tables_say(layout, fixed, (16, 64))
    with pytest.raises(ValueError, match="broadcast"):  # rather than into the next table
        fixed.fill(Layout([(5, 20)], "conv", SMALL, CPU))
    fixed.fill(second)
    assert_tables_say(second, fixed, (16, 64))


# --- arithmetic ----------------------------------------------------------------------------------


def encoder_of(model, precision, ops=TORCH):
    """An engine around `GpuEncoder` with the given operators."""
    folded = fold(model, torch.float32 if precision == "fp8" else getattr(torch, precision))
    backend = dataclasses.replace(
        ops,
        encoder=lambda *arguments: GpuEncoder(*arguments, ops, bucketed=False),
        precisions=("float32", "bfloat16", "fp8"),
    )
    return Engine(folded, model.config, "conv", backend, precision)


@pytest.mark.parametrize("pool", ["mean", "cls", "patch"])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_packed_layers_are_the_engines(pool, depth):
    """Both arrangements of the same folds; a last layer with and without a fusion block."""
    config = dataclasses.replace(SMALL, depth=depth, decoder_depth=0)
    model = ReferenceNormWear(config, decoder=False, seed=depth).requires_grad_(False)
    for value in model.parameters():  # norms and biases that are not ones and zeros
        if value.ndim == 1:
            value += 0.1 * torch.randn(len(value))
    layout = Layout([(1, 40), (3, 40), (2, 131)], "conv", config, CPU)
    series = torch.randn(layout.samples.total)
    expected = Engine(fold(model, torch.float32), config, "conv", TORCH).run(series, layout, pool)
    got = encoder_of(model, "float32").run(series, layout, pool)
    assert got.dtype == torch.float32
    assert torch.allclose(got, expected, atol=2e-5)


@pytest.mark.parametrize("pool", ["mean", "cls", "patch"])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_float8s_layers_without_its_rounding(pool, depth, monkeypatch):
    """fp8's arrangement with float32 in place of its types: each scale, and what fc2 leaves pending."""
    for module in ("gpu", "linear_float8"):
        monkeypatch.setattr(f"normwear_fast.{module}.FLOAT8", torch.float32)

    def scaled(x, out, scale):
        scale.copy_(torch.rand(len(x)) + 0.5)
        return out.copy_(x / scale[:, None])

    def norm(residual, carried, eps, *, update=None, out=None, scale=None):
        if scale is None:
            return TORCH.residual_norm(residual, carried, eps, update=update, out=out)
        return scaled(TORCH.residual_norm(residual, carried, eps, update=update), out, scale)

    def gelu(x, bias, *, out=None, scale=None):
        TORCH.bias_gelu(x, bias)
        return x if out is None else scaled(x, out, scale)

    config = dataclasses.replace(SMALL, depth=depth, decoder_depth=0)
    model = ReferenceNormWear(config, decoder=False, seed=depth).requires_grad_(False)
    for value in model.parameters():  # norms and biases that are not ones and zeros
        value += 0.1 * torch.randn(value.shape)
    layout = Layout([(1, 40), (3, 40), (2, 131)], "conv", config, CPU)
    series = torch.randn(layout.samples.total)
    expected = Engine(fold(model, torch.float32), config, "conv", TORCH).run(series, layout, pool)
    engine = encoder_of(
        model, "fp8", dataclasses.replace(TORCH, residual_norm=norm, bias_gelu=gelu)
    )
    encoder, folded = engine.encoder, fold(model, torch.float32)
    encoder.dtype = encoder.residual_dtype = torch.float32
    encoder.blocks, encoder.fusions = list(folded.blocks), folded.fusions
    got = engine.run(series, layout, pool)
    assert torch.allclose(got, expected, atol=2e-5)


def test_exact_products_leave_the_process_as_it_was():
    flags = torch.backends.cuda.matmul
    before = (flags.allow_tf32, flags.allow_bf16_reduced_precision_reduction)
    try:
        flags.allow_tf32 = True
        with exact_products("float32"):
            assert not flags.allow_tf32
            assert not flags.allow_bf16_reduced_precision_reduction
        assert flags.allow_tf32
        with exact_products("bfloat16"):
            assert flags.allow_tf32
        flags.allow_bf16_reduced_precision_reduction = (False, False)
        with exact_products("bfloat16"):
            assert not flags.allow_bf16_reduced_precision_reduction
        assert not flags.allow_bf16_reduced_precision_reduction
        assert not flags.allow_bf16_reduced_precision_reduction_split_k
    finally:
        flags.allow_tf32, flags.allow_bf16_reduced_precision_reduction = before


def test_exact_products_of_two_devices_overlap():
    """One thread a device: the first to end must not give the other reduced sums, nor leave them off."""
    flags = torch.backends.cuda.matmul
    name = "allow_bf16_reduced_precision_reduction"
    before = getattr(flags, name)
    try:
        setattr(flags, name, True)
        first, second = exact_products("bfloat16"), exact_products("float32")
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert not getattr(flags, name)
        second.__exit__(None, None, None)
        assert getattr(flags, name)
    finally:
        setattr(flags, name, before)


def test_another_stream_waits_for_the_buffers(monkeypatch):
    """Callers with a stream each share an engine's buffers: one micro-batch after another."""

    class Stream:
        def __init__(self):
            self.waited = []

        def wait_stream(self, other):
            self.waited.append(other)

    first, second = Stream(), Stream()
    engine = Engine(fold(ReferenceNormWear(SMALL, seed=0), torch.float32), SMALL, "conv", TORCH)
    engine.device = SimpleNamespace(type="cuda")
    monkeypatch.setattr(engine, "_run", lambda *arguments: None)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    for current in (first, first, second, second, first):
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device, s=current: s)
        engine.run(torch.empty(0), None, "mean")
    assert (first.waited, second.waited) == ([second], [first])


def test_columns_quantise_to_their_whole_range():
    weight = torch.randn(40, 64) * torch.logspace(-6, 6, 40)[:, None]
    weight[3] = 0
    quantised, scale = quantise_columns(weight)
    assert scale[3] == 1
    sizes = quantised.float().abs().amax(dim=1)
    assert (sizes[torch.arange(40) != 3] == FLOAT8_MAX).all()
    # e4m3 keeps three bits after the leading one: a sixteenth of a value, or half a smallest step.
    error = (quantised.float() * scale[:, None] - weight).abs()
    assert (error <= weight.abs() / 16 + scale[:, None] * 2**-10).all()


def test_scaled_product_is_the_product_of_the_scaled():
    weight, scale = quantise_columns(torch.randn(24, 32))
    x, x_scale = quantise_columns(torch.randn(10, 32))
    out, bias = torch.full((10, 24), torch.nan, dtype=torch.bfloat16), torch.randn(24).bfloat16()
    scaled_product(x, x_scale, weight, scale, out, bias)
    exact = (x.double() * x_scale[:, None]) @ (weight.double() * scale[:, None]).T + bias.double()
    assert torch.allclose(out.double(), exact, rtol=2**-8, atol=1e-2)


# --- through Triton's interpreter ------------------------------------------------------------------

QUICK = ("encoder_small_b1c1L32",)
LONG = (
    "encoder_small_b1c1L64",
    "encoder_small_b2c2L128",
    "encoder_small_b1c10L129",
    "encoder_small_b2c3L390",
    "encoder_small_b1c2L700",
    "encoder_small_b1c1L1300",
    "encoder_scipy_small_b1c3L391",
)
SLOW = (pytest.mark.slow, pytest.mark.timeout(1_200))
CASES = [*QUICK, *(pytest.param(name, marks=SLOW) for name in LONG)]
SEVERAL_CHANNELS = [
    *QUICK,
    *(pytest.param(f"encoder_{n}", marks=SLOW) for n in ("small_b2c2L128", "scipy_small_b1c3L391")),
]


@pytest.fixture
def narrow(monkeypatch):
    """Buckets no wider than they must be: the interpreter takes a while for every row."""
    monkeypatch.setattr("normwear_fast.buckets.SMALLEST_BUCKET", 16)


def triton_model(name, precision):
    arrays = golden(name)
    config = golden_config(arrays)
    optimized = "scipy" not in name
    model = FastNormWear(optimized, config=config, precision=precision, backend="triton")
    model.load_state_dict(golden_weights(arrays))
    return model.requires_grad_(False), arrays


@pytest.mark.parametrize("name", CASES)
def test_reference_numbers_through_triton(name, narrow):
    model, arrays = triton_model(name, "float32")
    out = model.get_embedding(arrays["x"])
    assert np.abs(out.numpy() - arrays["out"]).max() <= 2e-5


@pytest.mark.parametrize(
    ("precision", "worst", "mean"), [("bfloat16", 0.995, 0.999), ("fp8", 0.9, 0.998)]
)
@pytest.mark.parametrize("name", SEVERAL_CHANNELS)
def test_fast_precisions_through_triton(name, precision, worst, mean, narrow):
    model, arrays = triton_model(name, precision)
    out = model.get_embedding(arrays["x"])
    cosine = torch.nn.functional.cosine_similarity(out, torch.from_numpy(arrays["out"]), dim=-1)
    assert cosine.mean() >= mean
    assert cosine.min() >= worst


@pytest.mark.parametrize("optimized", [True, False])
def test_raw_counts_through_triton(optimized, narrow):
    """A pulse on a constant 250 times as large. At 6 s and the small size two such windows are 3e-5 to
    1.5e-4 apart; what the tokenizer's operands of 10 bits made of them was up to 5e-4 off."""
    config = NormWearConfig(embed_dim=64, depth=2, num_heads=1, decoder_embed_dim=16)
    t = np.arange(130) / 65
    pulse = [np.sin(2 * np.pi * f * t) + 0.3 * np.sin(4 * np.pi * f * t + 1) for f in (1.2, 1.5)]
    x = (1e5 + 400 * np.stack(pulse)).round()[:, None].astype(np.float32)
    exact = FastNormWear(optimized, config=config).double().encode(x)
    model = FastNormWear(optimized, config=config, backend="triton", precision="bfloat16")
    found = torch.from_numpy(model.encode(x)).double()
    cosine = torch.nn.functional.cosine_similarity(found, torch.from_numpy(exact).double(), dim=-1)
    assert (1 - cosine).max() < 2e-6


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_float8_with_its_activation_in_the_product(pool, monkeypatch):
    """`linear_float8`'s definition in the layers: its order and factors are taken back by fc2."""
    monkeypatch.setattr("normwear_fast.gpu.takes", lambda *sizes: True)
    calls = []

    def defined(x, x_scale, linear, *, out):
        calls.append(len(x))
        return out.copy_(linear_float8_ref(x, x_scale, linear))

    config = dataclasses.replace(SMALL, depth=2, decoder_depth=0)
    model = ReferenceNormWear(config, decoder=False, seed=1).requires_grad_(False)
    for block in model.encoder_blocks:  # neurons of very different size
        fc1 = block.variate_encoder.mlp.fc1
        fc1.weight *= torch.logspace(-1, 1, len(fc1.weight))[:, None]
        fc1.bias += torch.randn(len(fc1.bias))
    triton = select_backend("triton", CPU)
    layout = Layout([(2, 40), (1, 23)], "conv", config, CPU)
    series = torch.randn(layout.samples.total)
    exact = encoder_of(model, "float32").run(series, layout, pool)
    apart = encoder_of(model, "fp8", triton).run(series, layout, pool)
    assert not calls
    fused = encoder_of(model, "fp8", dataclasses.replace(triton, linear_float8=defined))
    got = fused.run(series, layout, pool)
    assert calls == [layout.sequences.total] * (2 if pool == "mean" else 1)
    errors = [float((out - exact).norm() / exact.norm()) for out in (apart, got)]
    assert errors[1] < 0.1
    assert errors[1] < 1.3 * errors[0]


@pytest.mark.parametrize("pool", ["mean", "cls"])
@pytest.mark.parametrize("precision", ["bfloat16", "fp8"])
def test_the_layers_with_hoppers_products(precision, pool, monkeypatch):
    """`linear`'s definition in the layers, for as many rows as it is the faster for."""
    monkeypatch.setattr("normwear_fast.gpu.LINEAR_ROWS", 40)
    calls = []

    def defined(x, weight, bias=None, *, scales=None, gelu=False, out):
        calls.append((len(weight), bias is not None, gelu))
        return out.copy_(linear_ref(x, weight, bias, scales=scales, gelu=gelu))

    config = dataclasses.replace(SMALL, depth=2, decoder_depth=0)
    model = ReferenceNormWear(config, decoder=False, seed=1).requires_grad_(False)
    for value in model.parameters():
        if value.ndim == 1:
            value += 0.1 * torch.randn(len(value))
    others = TORCH if precision == "bfloat16" else select_backend("triton", CPU)
    layout = Layout([(2, 40), (1, 23)], "conv", config, CPU)
    series = torch.randn(layout.samples.total)
    apart = encoder_of(model, precision, others).run(series, layout, pool)
    ops = dataclasses.replace(others, linear=defined)
    got = encoder_of(model, precision, ops).run(series, layout, pool)
    width, hidden = config.embed_dim, config.hidden_dim
    qkv, fc1 = (3 * width, True, False), (hidden, True, True)
    layer = [qkv] if precision == "fp8" else [qkv, fc1]
    assert calls == [*layer, *(layer if pool == "mean" else [(2 * width, False, False)])]
    size = float(apart.norm())
    assert float((got - apart).norm()) / size < (0.02 if precision == "bfloat16" else 0.1)
    exact = encoder_of(model, "float32", ops).run(series, layout, pool)
    assert len(calls) == 2 * len(layer) - (pool == "cls") * (len(layer) - 1)  # float32 makes none
    errors = [float((out - exact).norm()) for out in (apart, got)]
    assert errors[1] < 1.3 * errors[0] + 1e-3 * size


@pytest.mark.parametrize("pool", ["mean", "cls"])
@pytest.mark.parametrize("precision", ["bfloat16", "fp8"])
def test_hoppers_products_take_what_the_layers_give(precision, pool, monkeypatch):
    """Shapes, dtypes and strides of every call, by the checks of `linear` itself; the launch alone is the
    definition. With weights assigned as transposes, whose rows do not lie end to end."""
    monkeypatch.setattr("normwear_fast.gpu.LINEAR_ROWS", 2)
    calls = []

    def launch(name, device, given):
        calls.append(name)
        scales = None if given["scale"] is None else (given["x_scale"], given["scale"])
        gelu = given["epilogue"] == linear_hopper.GELU
        exact = linear_ref(given["x"], given["weight"], given["bias"], scales=scales, gelu=gelu)
        given["out"].copy_(exact)

    monkeypatch.setattr("normwear_fast.cuda_backend.launch", launch)
    config = dataclasses.replace(SMALL, embed_dim=384, num_heads=6, depth=2, decoder_depth=0)
    assert linear_hopper.takes(config.hidden_dim, config.embed_dim)
    model = ReferenceNormWear(config, decoder=False, seed=1).requires_grad_(False)
    turned = {
        name: value.T.contiguous().T if value.ndim == 2 else value
        for name, value in model.state_dict().items()
    }
    model.load_state_dict(turned, assign=True)
    layout = Layout([(2, 30), (1, 23)], "conv", config, CPU)
    series = torch.randn(layout.samples.total)
    others = TORCH if precision == "bfloat16" else select_backend("triton", CPU)
    apart = encoder_of(model, precision, others).run(series, layout, pool)
    ops = dataclasses.replace(others, linear=linear_hopper.linear)
    got = encoder_of(model, precision, ops).run(series, layout, pool)
    assert calls
    most = 0.02 if precision == "bfloat16" else 0.1
    assert float((got - apart).norm()) < most * float(apart.norm())


@pytest.mark.parametrize(
    "there", [(), ("linear",), ("linear_float8",), ("linear", "linear_float8")]
)
def test_hoppers_products_are_taken_where_they_run(there, monkeypatch):
    for name, module in (("linear", linear_hopper), ("linear_float8", linear_float8)):
        monkeypatch.setattr(module, "fits", lambda *_, taken=name in there: taken)
    monkeypatch.setattr(linear_hopper, "runs", lambda device: bool(there))
    config = dataclasses.replace(SMALL, depth=1, decoder_depth=0)
    model = ReferenceNormWear(config, decoder=False, seed=1).requires_grad_(False)
    backend = select_backend("triton", CPU)
    ops = backend.encoder(fold(model, torch.bfloat16), config, "bfloat16").ops
    assert ops.linear is (linear_hopper.linear if "linear" in there else None)
    assert ops.linear_float8 is (linear_float8.linear_float8 if "linear_float8" in there else None)
    assert backend.versions(CPU)["hopper"] is bool(there)


def test_the_smallest_gpu_decides_how_many_tokens_there_are(monkeypatch):
    memory = [80 * 10**9, 16 * 10**9]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(memory))
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda i: SimpleNamespace(total_memory=memory[i])
    )
    engine._smallest_gpu.cache_clear()
    try:
        assert engine._smallest_gpu() == 16 * 10**9
        assert default_batch_tokens("cuda") == 131_072
        memory.pop()
        engine._smallest_gpu.cache_clear()
        assert default_batch_tokens("cuda") == 262_144
        assert default_batch_tokens("cpu") == default_batch_tokens("mps") == 3_360
    finally:
        engine._smallest_gpu.cache_clear()


def test_the_fused_mlp_beside_the_other(narrow, monkeypatch):
    """fc1 with its activation in one kernel, as Hopper has it, against the two of the default."""
    monkeypatch.setattr("normwear_fast.gpu.FUSED_ROWS", 1)
    config = dataclasses.replace(SMALL, depth=1, decoder_depth=0)
    model = FastNormWear(True, config=config, precision="bfloat16", backend="triton")
    window = np.random.default_rng().standard_normal((1, 1, 30))
    expected = model.encode(window)
    encoder = model._engine().encoder
    assert encoder.mlp == {"FUSED": 0}
    encoder.mlp = {"FUSED": 1}
    assert np.allclose(model.encode(window), expected, atol=0.05)


@pytest.mark.parametrize("rows", [63, 64])
@pytest.mark.parametrize("fused", [0, 1])
def test_the_fused_mlp_is_for_many_rows(rows, fused, narrow, monkeypatch):
    monkeypatch.setattr("normwear_fast.gpu.FUSED_ROWS", 64)
    config = dataclasses.replace(SMALL, depth=1, decoder_depth=0)
    model = ReferenceNormWear(config, decoder=False, seed=1).requires_grad_(False)
    triton = select_backend("triton", CPU)
    calls = []

    def counted(x, *weights, out):
        calls.append(len(x))
        return triton.linear_gelu(x, *weights, out=out)

    ops = dataclasses.replace(triton, linear_gelu=counted)
    encoder = GpuEncoder(fold(model, torch.bfloat16), config, "bfloat16", ops)
    encoder.mlp = {"FUSED": fused}
    x = torch.randn(rows, config.embed_dim).bfloat16()
    buffers = SimpleNamespace(
        normed=torch.empty_like(x), hidden=torch.empty(rows, config.hidden_dim).bfloat16()
    )
    encoder._mlp(x, encoder.blocks[0], torch.zeros(config.embed_dim), buffers)
    assert calls == [rows] * (fused and rows == 64)


@pytest.mark.parametrize(("architecture", "fused"), [(80, 0), (89, 0), (90, 1), (100, 0), (120, 0)])
def test_the_fused_mlp_is_the_default_where_it_was_measured(architecture, fused):
    assert tuning.choices(mlp_table(), architecture)[0].blocks == {"FUSED": fused}


@pytest.mark.parametrize(
    ("sizes", "fused"),
    [({}, 1), ({"embed_dim": 36, "num_heads": 3}, 0), ({"mlp_ratio": 132 / 128}, 0)],
    ids=str,
)
def test_widths_the_fused_mlp_cannot_take(sizes, fused, monkeypatch):
    """Rows of 72 bytes: no tensor memory accelerator takes them."""
    ops = select_backend("triton", CPU)  # the kernels' modules take `pick` when they are imported
    monkeypatch.setattr(tuning, "pick", lambda *_: tuning.Choice({"FUSED": 1}))
    config = dataclasses.replace(SMALL, depth=1, decoder_depth=0, **sizes)
    model = ReferenceNormWear(config, decoder=False, seed=1).requires_grad_(False)
    encoder = GpuEncoder(fold(model, torch.bfloat16), config, "bfloat16", ops)
    assert encoder.mlp == {"FUSED": fused}


class Recorded:
    """Stands in for torch's graphs: what is captured runs, and a replay runs the same call again."""

    made = 0

    def __init__(self):
        type(self).made += 1
        self.number, self.calls = self.made, []

    def pool(self):
        return self.number

    def replay(self):
        for call in self.calls:
            call()


def test_captured_layers_are_replayed(monkeypatch, narrow):
    """The way through capture and replay: once a bucket and kind, anew when the buffers have grown."""
    layers, capturing, streams, pools, steps = GpuEncoder._layers, [], set(), [], []

    def recorded(self, *arguments):
        steps.append("layers")
        if capturing:  # what is recorded does not run
            capturing[-1].calls.append(lambda: layers(self, *arguments))
        else:
            layers(self, *arguments)

    @contextlib.contextmanager
    def capture(graph, **options):
        capturing.append(graph)
        streams.add(options["stream"])
        pools.append(options["pool"])
        steps.append("begin")
        yield
        steps.append("end")
        capturing.pop()

    class Stream:
        def __init__(self, device=None):
            self.device = device

        def wait_stream(self, other):
            pass

        def synchronize(self):
            pass

    monkeypatch.setattr(GpuEncoder, "_layers", recorded)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recorded)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(Recorded, "made", 0)
    clear = lambda: steps.append("clear")  # noqa: E731
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", clear, raising=False)

    config = dataclasses.replace(SMALL, depth=1, decoder_depth=0)
    model = FastNormWear(True, config=config, precision="float32", backend="triton")
    plain = FastNormWear(True, config=config, precision="float32", backend="torch")
    model._engine().encoder.captured = True
    rng = np.random.default_rng()
    # Two of one bucket share a graph; a larger one makes room; what was captured before is made anew;
    # all rows and [CLS] alone are two.
    for samples, pool, graphs in (
        (20, "mean", 1),
        (21, "mean", 1),
        (40, "cls", 2),
        (20, "mean", 3),
        (20, "cls", 4),
    ):
        windows = rng.standard_normal((1, 1, samples))
        got, expected = (m.encode(windows, pool=pool) for m in (model, plain))
        assert np.allclose(got, expected, atol=2e-5)
        assert Recorded.made == graphs
    # Every graph's workspace is its encoder's: one stream, and one pool as long as a graph lives.
    assert len(streams) == 1
    assert pools == [None, None, 2, 3]
    assert steps == ["layers", "layers", "begin", "clear", "layers", "clear", "end"] * 4


def test_buckets_of_equal_rows_have_tables_for_as_many_sequences_as_come():
    config = dataclasses.replace(SMALL, depth=1, decoder_depth=0)
    folded = fold(ReferenceNormWear(config, decoder=False, seed=0), torch.float32)
    encoder = GpuEncoder(folded, config, "float32", TORCH)
    few, many = (Layout([shape], "conv", config, CPU) for shape in ((1, 690), (10, 60)))
    buckets = [encoder._bucket(layout).layout for layout in (few, many)]
    assert [bucket.sequences.total for bucket in buckets] == [1_024, 1_024]
    for layout, bucket in zip((few, many), buckets, strict=True):
        bucket.fill(layout)
        assert_tables_say(layout, bucket, (16,))
    assert encoder._bucket(few).layout is buckets[0]


def test_inference_mode_and_none_in_turn(narrow):
    """Tables made by `encode`, which is in inference mode, are filled by `forward`, which is not."""
    config = dataclasses.replace(SMALL, depth=1, decoder_depth=0)
    model = FastNormWear(True, config=config, precision="float32", backend="triton")
    model.requires_grad_(False)
    windows = np.random.default_rng().standard_normal((1, 1, 20)).astype(np.float32)
    for _ in range(2):
        encoded = model.encode(windows, pool="patch")
        assert np.array_equal(encoded, model.get_embedding(windows).numpy())


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_ragged_windows_through_triton(pool, narrow):
    """A bucket's tables at work: unequal windows, one after another through the same bucket."""
    config = dataclasses.replace(SMALL, depth=1, decoder_depth=0)
    model = FastNormWear(True, config=config, precision="float32", backend="triton")
    plain = FastNormWear(True, config=config, precision="float32", backend="torch")
    rng = np.random.default_rng()
    for shapes in ([(1, 11), (2, 30), (1, 40)], [(5, 20)]):
        windows = [rng.standard_normal(shape) for shape in shapes]
        expected = plain.encode(windows, pool=pool)
        for want, got in zip(expected, model.encode(windows, pool=pool), strict=True):
            assert np.allclose(want, got, atol=2e-5)


def test_precisions_that_a_backend_does_not_have():
    for backend, precision in (("native", "fp8"), ("torch", "fp8"), ("triton", "int8")):
        model = FastNormWear(True, config=SMALL, precision=precision, backend=backend)
        with pytest.raises(UsageError, match=f"precision '{precision}' needs backend"):
            model.encode(np.zeros((1, 1, 40)))


def test_the_triton_backend_says_what_it_needs(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="needs an NVIDIA GPU"):
            select_backend("triton", CPU)
