"""The folded, packed encoder is the plain model: exactly in float64, and for every fold."""

from __future__ import annotations

import pytest
import torch
from helpers import recipe_state_dict

from normwear_fast import scalogram
from normwear_fast.backends import TORCH
from normwear_fast.config import NormWearConfig
from normwear_fast.engine import Engine
from normwear_fast.folding import LOG2_E, fold
from normwear_fast.packing import Layout
from normwear_fast.reference import ReferenceNormWear

CONFIG = NormWearConfig(embed_dim=32, depth=3, num_heads=2, decoder_embed_dim=16, decoder_depth=1)


@pytest.fixture
def model():
    """Every parameter away from its neutral value: a fold that forgets one shows."""
    model = ReferenceNormWear(CONFIG, decoder=False).eval()
    model.load_state_dict(recipe_state_dict(model.state_dict(), 7))
    return model.double()


def plain(model, windows, method):
    out = []
    for window in windows:
        with torch.no_grad():
            out.append(model(scalogram(window[None], method).double())[0])
    return out


@pytest.mark.parametrize("method", ["conv", "scipy"])
@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("pool", ["patch", "mean", "cls"])
def test_exact_in_float64(method, depth, pool, monkeypatch):
    """Depth decides which layer is last: with a fusion block behind it, and without."""
    monkeypatch.setattr("normwear_fast.engine.MLP_ROWS", 100)  # tiles, the last one not full
    config = NormWearConfig(
        embed_dim=32, depth=depth, num_heads=2, decoder_embed_dim=16, decoder_depth=1
    )
    model = ReferenceNormWear(config, decoder=False).eval()
    model.load_state_dict(recipe_state_dict(model.state_dict(), 7))
    model = model.double()
    shapes = [(2, 40), (2, 40), (1, 41), (5, 64), (1, 11), (3, 64)]
    windows = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    engine = Engine(fold(model, torch.float64), config, method, TORCH)
    layout = Layout(shapes, method, config, torch.device("cpu"))
    got = engine.run(torch.cat([w.flatten() for w in windows]), layout, pool)
    assert got.dtype == torch.float64
    rows = []
    for out in plain(model, windows, method):
        rows.append({"patch": out.flatten(0, 1), "mean": out.mean(1), "cls": out[:, 0]}[pool])
    expected = torch.cat(rows)
    assert got.shape == expected.shape
    assert (got - expected).abs().max() < 1e-12


@pytest.mark.parametrize("pool", ["patch", "mean", "cls"])
def test_products_that_land_beside_the_residual(model, pool, monkeypatch):
    """bfloat16 over float32: what a product leaves pending is added once, tile by tile, [CLS] or not."""
    monkeypatch.setattr("normwear_fast.engine.MLP_ROWS", 100)
    shapes = [(2, 40), (1, 41), (3, 64)]
    windows = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    series, layout = (
        torch.cat([w.flatten() for w in windows]),
        Layout(shapes, "conv", CONFIG, torch.device("cpu")),
    )
    exact = Engine(fold(model, torch.float64), CONFIG, "conv", TORCH).run(series, layout, pool)
    engine = Engine(fold(model, torch.bfloat16), CONFIG, "conv", TORCH)
    assert not engine.accumulates
    error = engine.run(series.float(), layout, pool).double() - exact
    # Roundings of 2^-9, some ten in each of three layers; the worst of 900 windows had 0.014.
    assert (error.norm(dim=1) <= 2**-5 * exact.norm(dim=1)).all()


def test_norms_fold_into_the_next_linear(model):
    folded = fold(model, torch.float64).blocks[1]
    block = model.encoder_blocks[1].variate_encoder
    x = torch.randn(5, 32, dtype=torch.float64)
    standard = torch.nn.functional.layer_norm(x, (32,), eps=block.norm2.eps)
    expected = block.mlp.fc1(block.norm2(x))
    assert torch.allclose(standard @ folded.fc1.T + folded.fc1_bias, expected, atol=1e-13)


def test_the_key_bias_is_gone_and_the_value_bias_moved(model):
    """Key and value columns carry no bias; the output constant makes up for the value's."""
    folded = fold(model, torch.float64).blocks[0]
    assert (folded.qkv_bias[32:] == 0).all()
    block = model.encoder_blocks[0].variate_encoder
    bias = block.attn.qkv.bias + block.attn.qkv.weight @ block.norm1.bias
    expected = block.attn.proj(bias[64:])
    assert torch.allclose(folded.proj_constant, expected, atol=1e-13)


def test_the_query_is_scaled_for_powers_of_two(model):
    folded = fold(model, torch.float64).blocks[0]
    attention = model.encoder_blocks[0].variate_encoder
    expected = attention.attn.qkv.weight[:32] * attention.norm1.weight * 16**-0.5 * LOG2_E
    assert torch.allclose(folded.qkv[:32], expected, atol=1e-14)


def test_carried_is_the_running_sum_of_constants(model):
    folded = fold(model, torch.float64)
    assert (folded.carried[0] == 0).all()
    total = torch.zeros(32, dtype=torch.float64)
    for i, block in enumerate(folded.blocks):
        assert torch.allclose(folded.carried[2 * i], total, atol=1e-14)
        total = total + block.proj_constant
        assert torch.allclose(folded.carried[2 * i + 1], total, atol=1e-14)
        total = total + block.fc2_constant
    assert torch.allclose(folded.carried[-1], total, atol=1e-14)


def test_the_template_holds_positions_cls_and_patch_bias(model):
    folded = fold(model, torch.float64)
    series = torch.zeros(1, 1, 3, 45, 65, dtype=torch.float64)
    with torch.no_grad():
        expected = model.embed(series[0])[0]
    assert torch.allclose(folded.template(5, 13), expected, atol=1e-14)


def test_folding_leaves_the_model_alone(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    folded = fold(model, torch.float64)
    folded.template(43, 13).zero_()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
