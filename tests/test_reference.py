"""The plain model against the published implementation's numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import ENCODER_GOLDENS, golden, golden_config, golden_weights

from normwear_fast import scalogram
from normwear_fast.config import NormWearConfig
from normwear_fast.errors import UsageError
from normwear_fast.reference import ReferenceNormWear


def reference(arrays, name):
    model = ReferenceNormWear(golden_config(arrays), seed=None).eval()
    model.load_state_dict(golden_weights(arrays))
    return model, "scipy" if "scipy" in name else "conv"


@pytest.mark.parametrize("name", ENCODER_GOLDENS)
def test_encoder_golden(name):
    arrays = golden(name)
    model, method = reference(arrays, name)
    base = "_base_" in name
    with torch.inference_mode():
        spectrum = scalogram(torch.tensor(arrays["x"]), method).float()
        out, hidden = model(spectrum, return_hidden=True)
    assert len(hidden) == model.config.depth
    cls = torch.stack([rows[:, :, 0] for rows in hidden]).numpy()
    assert np.abs(cls - arrays["hidden_cls"]).max() <= (3e-5 if base else 1e-5)
    out = out.numpy()
    if base:
        tolerance = 1e-4
        assert np.abs(out[:, :, arrays["rows"]] - arrays["out_rows"]).max() <= tolerance
        assert np.abs(out.mean(2) - arrays["out_mean"]).max() <= tolerance
        assert np.abs(np.linalg.norm(out, axis=-1) - arrays["out_norm"]).max() <= tolerance
    else:
        assert out.shape == arrays["out"].shape
        assert np.abs(out - arrays["out"]).max() <= 2e-5


def test_released_size_and_names():
    model = ReferenceNormWear()
    names = model.state_dict()
    assert sum(value.numel() for value in model.parameters()) == 136_112_328
    assert names["temporal_recon.weight"].shape == (388, 560)
    assert names["spatial_recon.conv1.weight"].shape == (384, 2048, 1)
    assert "decoder_blocks.0.attn.qkv.bias" not in names
    assert "encoder_blocks.0.cls_fusion.mlp.fc1.weight" in names
    assert "encoder_blocks.1.cls_fusion.mlp.fc1.weight" not in names
    assert not model.pos_embed.requires_grad
    assert not model.decoder_pos_embed.requires_grad


def test_epsilons():
    """No reference number can tell the final norm's 1e-5 from 1e-6."""
    model = ReferenceNormWear(NormWearConfig.small())
    assert model.norm.eps == model.decoder_norm.eps == 1e-5
    for block in (model.encoder_blocks[0].variate_encoder, model.encoder_blocks[0].cls_fusion):
        assert block.norm1.eps == block.norm2.eps == 1e-6
    assert model.decoder_blocks[0].norm1.eps == 1e-6


def test_seeded_and_polite_to_the_global_generator():
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first, again = (
        ReferenceNormWear(NormWearConfig.small(), seed=3),
        ReferenceNormWear(NormWearConfig.small(), seed=3),
    )
    other = ReferenceNormWear(NormWearConfig.small(), seed=4)
    assert torch.equal(torch.random.get_rng_state(), before)
    weights = (m.encoder_blocks[1].variate_encoder.mlp.fc1.weight for m in (first, again, other))
    a, b, c = weights
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert all(torch.isfinite(value).all() for value in first.state_dict().values())


def test_encoder_only():
    model = ReferenceNormWear(NormWearConfig.small(), decoder=False)
    assert not any("decoder" in name or "recon" in name for name in model.state_dict())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"embed_dim": 130, "num_heads": 4}, "embed_dim"),
        ({"depth": 0}, "depth"),
        ({"num_scales": 64}, "num_scales"),
        ({"fusion_every": -1}, "fusion_every"),
        ({"patch_size": (9,)}, "patch_size is .9,.; it must be two ints"),
        ({"patch_size": (9, 5, 1)}, "patch_size"),
        ({"patch_size": 9}, "patch_size is 9; it must be two ints"),
        ({"patch_size": "ab"}, "patch_size"),
        ({"patch_size": None}, "patch_size"),
        ({"patch_size": (9, 5.0)}, "patch_size"),
    ],
)
def test_impossible_configuration(values, message):
    with pytest.raises(UsageError, match=message):
        NormWearConfig(**values)


def test_configuration_round_trip_and_unknown_names():
    config = NormWearConfig(embed_dim=64, num_heads=1, patch_size=(9, 13))
    assert NormWearConfig.from_dict(config.to_dict()) == config
    with pytest.raises(UsageError, match="width"):
        NormWearConfig.from_dict({"width": 3})
