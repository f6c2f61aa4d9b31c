"""What a checkpoint must hold: names, shapes, kinds and finite values; each mismatch is named."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from weight_files import TINY, StateDict, refusal

from normwear_fast.config import NormWearConfig
from normwear_fast.reference import ReferenceNormWear
from normwear_fast.weights import check_names, expected_shapes


def test_base_size_has_the_released_values() -> None:
    shapes = expected_shapes(NormWearConfig.base())
    sizes = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    assert sum(n for name, n in sizes.items() if not name.endswith(statistics)) == 136_112_328
    assert shapes["pos_embed"] == (1, 560, 768)
    assert shapes["decoder_pos_embed"] == (1, 560, 512)
    assert shapes["temporal_recon.weight"] == (388, 560)
    assert shapes["encoder_blocks.10.cls_fusion.attn.qkv.weight"] == (2304, 768)
    assert "encoder_blocks.11.cls_fusion.attn.qkv.weight" not in shapes
    assert "decoder_blocks.0.attn.qkv.bias" not in shapes


def test_expected_shapes_are_the_reference_models_own() -> None:
    for decoder in (True, False):
        model = ReferenceNormWear(TINY, decoder=decoder)
        own = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        assert dict(expected_shapes(TINY, decoder=decoder)) == own


def test_base_size_check_accepts_released_shapes() -> None:
    base = NormWearConfig.base()
    values = {n: torch.zeros(()).expand(s) for n, s in expected_shapes(base).items()}
    del values["spatial_recon.norm.num_batches_tracked"]
    assert check_names(values, base) is True
    encoder = {n: values[n] for n in expected_shapes(base, decoder=False)}
    assert check_names(encoder, base) is False


def test_every_mismatch_is_in_one_line(state: StateDict) -> None:
    missing = ("cls_token", "encoder_blocks.2.cls_fusion.mlp.fc1.bias", "decoder_norm.bias")
    for name in missing:
        del state[name]
    state["head.weight"] = torch.zeros(2)
    state["extra.num_batches_tracked"] = torch.tensor(1)
    state["norm.weight"] = torch.zeros(9)
    state["spatial_recon.conv1.weight"] = torch.zeros(4, 32)
    state["patch_embed.proj.bias"] = torch.zeros(8, dtype=torch.int32)
    message = refusal(lambda: check_names(state, TINY, source="w.pth"))
    assert message.startswith("w.pth: ")
    assert "3 missing: " + ", ".join(missing) in message
    assert "2 unexpected: head.weight, extra.num_batches_tracked" in message
    assert "norm.weight (9,) instead of (8,)" in message
    assert "spatial_recon.conv1.weight (4, 32) instead of (4, 32, 1)" in message
    assert "1 of the wrong type: patch_embed.proj.bias int32" in message


def test_decoder_is_whole_or_absent(state: StateDict, encoder: StateDict) -> None:
    assert check_names(state, TINY) is True
    assert check_names(encoder, TINY) is False
    assert check_names(state, TINY, decoder=True) is True
    assert check_names(encoder, TINY, decoder=False) is False
    wanted = [n for n in expected_shapes(TINY) if n not in encoder and "num_batches" not in n]
    message = refusal(lambda: check_names(encoder, TINY, decoder=True))
    assert f"{len(wanted)} missing: {', '.join(wanted)}" in message
    message = refusal(lambda: check_names(state, TINY, decoder=False))
    assert "unexpected: " in message
    assert "mask_token" in message
    part = encoder | {"mask_token": state["mask_token"]}
    assert f"{len(wanted) - 1} missing" in refusal(lambda: check_names(part, TINY))


@pytest.mark.parametrize("present", [True, False])
def test_batch_norm_counter_may_be_absent(
    state: StateDict, encoder: StateDict, present: bool
) -> None:
    counter = "spatial_recon.norm.num_batches_tracked"
    if not present:
        del state[counter]
    assert check_names(state, TINY) is True
    ReferenceNormWear(TINY).load_state_dict(state)
    encoder[counter] = torch.tensor(7)
    assert check_names(encoder, TINY) is False
    state[counter] = torch.tensor(7.0)
    assert f"{counter} float32" in refusal(lambda: check_names(state, TINY))
    state[counter] = torch.tensor([7])
    assert f"{counter} (1,) instead of ()" in refusal(lambda: check_names(state, TINY))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_first_value_that_is_not_finite_is_named(
    state: StateDict, dtype: torch.dtype, value: float
) -> None:
    state = {n: v.to(dtype) if v.is_floating_point() else v for n, v in state.items()}
    assert check_names(state, TINY)
    state["norm.bias"][3] = value
    state["decoder_norm.bias"][0] = value
    message = refusal(lambda: check_names(state, TINY))
    assert "norm.bias holds NaN or infinity" in message
    assert "decoder_norm" not in message


def test_fusion_values_are_checked_and_its_names_are_not(
    state: StateDict, fusion: StateDict
) -> None:
    assert check_names(state | fusion, TINY) is True
    fusion["msitf_aggregator.q.weight"][1, 2] = float("nan")
    assert "msitf_aggregator.q.weight holds NaN" in refusal(
        lambda: check_names(state | fusion, TINY)
    )


@pytest.mark.parametrize(
    ("odd", "called"),
    [
        (torch.zeros(8, dtype=torch.int8), "int8"),
        (torch.zeros(8, dtype=torch.complex64), "complex64"),
        (torch.zeros(8, dtype=torch.bool), "bool"),
        (torch.zeros(8).to(torch.float8_e4m3fn), "float8_e4m3fn"),
        (torch.zeros(8).to_sparse(), "float32, not dense"),
        (torch.zeros(8, device="meta"), "float32 without values"),
    ],
)
def test_other_kinds_of_tensor_are_refused(state: StateDict, odd: Tensor, called: str) -> None:
    state["norm.weight"] = odd
    message = refusal(lambda: check_names(state, TINY))
    assert message.endswith(f"1 of the wrong type: norm.weight {called}")
