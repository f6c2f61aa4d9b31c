"""Encoder and head in one forward: the features of `encode`, rates by layer, merged adapters."""

from __future__ import annotations

import pytest
import torch
from pulse_windows import CLASSES, CONFIG, CPU, encoder

from normwear_fast.finetune import training as training_module
from normwear_fast.finetune.network import (
    FineTuneNetwork,
    Head,
    merge_lora,
    parameter_groups,
    require_gradients,
)
from normwear_fast.model import FastNormWear


@pytest.mark.parametrize("optimized_cwt", [True, False])
@pytest.mark.parametrize("pool", ["mean", "cls"])
@pytest.mark.parametrize("channel_pool", ["concat", "mean"])
def test_the_differentiable_features_are_those_of_encode(
    pool: str, channel_pool: str, optimized_cwt: bool
) -> None:
    """At the length of pretraining's grid and at another, whose positions are resized."""
    model = FastNormWear(optimized_cwt, config=CONFIG, precision="float32")
    head = Head(CONFIG.embed_dim * (3 if channel_pool == "concat" else 1), CLASSES)
    network = FineTuneNetwork(model, head, pool, channel_pool)  # type: ignore[arg-type]
    for samples in (130, 391):
        x = torch.randn(2, 3, samples, generator=torch.Generator().manual_seed(samples))
        fast = model.encode(x, 65.0, pool=pool, channels=channel_pool)  # type: ignore[arg-type]
        with torch.no_grad():
            slow = network.features(x)
        torch.testing.assert_close(torch.from_numpy(fast), slow, rtol=0, atol=2e-5)


def test_autocast_spares_the_series_and_its_differences() -> None:
    """Differences of a wave of 1e-2 on an offset of 1, which in bfloat16 has steps of 8e-3."""
    t = torch.arange(260) / 65
    x = (1 + 1e-2 * torch.sin(2 * torch.pi * 5 * t)).view(1, 1, -1)
    model, head = encoder(), Head(CONFIG.embed_dim, CLASSES)
    exact = FineTuneNetwork(model, head, "mean", "concat")
    cast = FineTuneNetwork(model, head, "mean", "concat", precision="bfloat16")
    with torch.no_grad():
        model.patch_embed.proj.weight[:, 0] = (
            0  # the series itself: its offset would drown the rest
        )
        model.patch_embed.proj.weight.mul_(1000)
        wanted = exact.features(x)
        assert 0 < (cast.features(x) - wanted).abs().max() < 0.02
        assert (exact.features(x.bfloat16().float()) - wanted).abs().max() > 0.05
    prepared = training_module._fabric(CPU).setup(cast)
    with torch.no_grad():  # nor does Fabric round what it passes on
        torch.testing.assert_close(prepared(x), cast(x), rtol=0, atol=0)


def test_a_head_sees_training_windows_at_mean_zero_and_deviation_one() -> None:
    features = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)) * 5 + 100
    features[:, 3] = 7.0  # does not vary
    head = Head(4, CLASSES)
    head.standardise(features)
    with torch.no_grad():
        head.linear.weight.copy_(torch.eye(4)[[0, 3]])
        seen = head(features)
    assert seen[:, 0].mean().item() == pytest.approx(0, abs=1e-5)
    assert seen[:, 0].std(correction=0).item() == pytest.approx(1, abs=1e-5)
    assert (seen[:, 1] == 0).all()


def test_every_layer_has_its_rate_and_only_matrices_decay() -> None:
    model = encoder()
    require_gradients(model, "full", lora_rank=1, seed=0)
    head = Head(2 * CONFIG.embed_dim, CLASSES)
    groups = parameter_groups(FineTuneNetwork(model, head, "mean", "concat"), 1e-3, 0.05, 0.75)
    found = {
        name: (group["lr"], group["weight_decay"]) for group in groups for name in group["names"]
    }
    wanted = {}
    for name, parameter in model.named_parameters():
        if name.startswith(("decoder", "mask_token", "temporal", "spatial")) or "pos_embed" in name:
            continue
        layer = {"cls_token": 0, "patch_embed": 0, "norm": 4}.get(name.split(".")[0])
        if layer is None:
            layer = 1 + int(name.split(".")[1])
        matrix = parameter.ndim >= 2 and name != "cls_token"
        wanted[f"encoder.{name}"] = (1e-3 * 0.75 ** (4 - layer), 0.05 if matrix else 0.0)
    wanted["head.linear.weight"], wanted["head.linear.bias"] = (1e-3, 0.05), (1e-3, 0.0)
    assert found.keys() == wanted.keys()
    for name, pair in wanted.items():
        assert found[name] == pytest.approx(pair, rel=1e-12), name
    assert sum(len(group["params"]) for group in groups) == len(wanted)  # none twice


def test_merged_adapters_are_the_adapted_encoder_in_plain_weights() -> None:
    model = encoder()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    require_gradients(model, "lora", lora_rank=4, seed=0)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    # qkv, proj, fc1 and fc2 of 3 layers and 2 fusions, an A and a B each, and nothing else.
    assert len(trained) == 5 * 4 * 2
    assert all("lora_" in name for name in trained)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05, generator=generator)
    network = FineTuneNetwork(model, Head(2 * CONFIG.embed_dim, CLASSES), "mean", "concat")
    x = torch.randn(2, 2, 130, generator=generator)
    with torch.no_grad():
        adapted = network.features(x)
    merge_lora(model)
    assert set(model.state_dict()) == set(before)
    merged = torch.from_numpy(model.encode(x, 65.0, channels="concat"))
    torch.testing.assert_close(merged, adapted, rtol=0, atol=2e-5)
    plain = torch.from_numpy(encoder().encode(x, 65.0, channels="concat"))
    assert (merged - plain).abs().max() > 1e-2
