"""Checkpoints: every form loads, every damage is one line, and nothing changes a bit on the way."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import pickle
import resource
import stat
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from payload import Payload
from safetensors import safe_open
from torch import Tensor

from normwear_fast import FastNormWear, weights
from normwear_fast.config import NormWearConfig
from normwear_fast.errors import OutputError, UsageError, WeightsError
from normwear_fast.reference import ReferenceNormWear
from normwear_fast.weights import (
    check_names,
    convert,
    expected_shapes,
    load_checkpoint,
    read_state_dict,
    save_pretrained,
    saved_config,
    saved_scalogram,
)

TINY = NormWearConfig(
    embed_dim=8,
    depth=3,
    num_heads=2,
    decoder_embed_dim=8,
    decoder_depth=1,
    grid_rows=2,
    pretrain_samples=20,
)
StateDict = dict[str, Tensor]


@pytest.fixture
def state() -> StateDict:
    """Encoder and decoder of TINY, every float entry different from every other."""
    values = ReferenceNormWear(TINY, seed=3).state_dict()
    generator = torch.Generator().manual_seed(4)
    return {
        name: torch.randn(v.shape, generator=generator) if v.is_floating_point() else v.clone()
        for name, v in values.items()
    }


@pytest.fixture
def encoder(state: StateDict) -> StateDict:
    return {name: state[name] for name in expected_shapes(TINY, decoder=False)}


@pytest.fixture
def fusion() -> StateDict:
    generator = torch.Generator().manual_seed(5)
    return {
        "msitf_aggregator.q.weight": torch.randn(4, 4, generator=generator),
        "msitf_aggregator.out_fc.LayerNorm.bias": torch.randn(4, generator=generator),
    }


def saved(path: Path, content: Any, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(content, path)
    else:
        torch.save(content, path, **options)
    return path


def assert_same(found: StateDict, wanted: StateDict) -> None:
    """The same names and the same bits."""
    assert sorted(found) == sorted(wanted)
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype, name
        assert found[name].shape == value.shape, name
        assert found[name].numpy().tobytes() == value.numpy().tobytes(), name


def refusal(action: Callable[[], object], error: type[Exception] = WeightsError) -> str:
    """The one line an action is refused with."""
    with pytest.raises(error) as caught:
        action()
    message = str(caught.value)
    assert len(message.splitlines()) == 1, message
    return message


# Names and shapes


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


# Forms


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin"])
@pytest.mark.parametrize("container", [None, "model", "state_dict"])
@pytest.mark.parametrize(
    "prefix",
    ["", "module.", "backbone.", "module.backbone.module.", "_orig_mod.", "module._orig_mod."],
)
def test_pickled_forms(
    tmp_path: Path, state: StateDict, suffix: str, container: str | None, prefix: str
) -> None:
    content: Any = {prefix + name: value for name, value in state.items()}
    if container:
        content = {container: content, "optimizer": {"state": {}, "step": 3}, "epoch": 5}
    path = saved(tmp_path / f"w{suffix}", content)
    found = load_checkpoint(path, config=TINY)
    assert_same(found.state_dict, state)
    assert found.fusion == {}
    assert found.config == TINY
    assert found.optimized_cwt is None
    assert found.has_decoder
    assert found.source == str(path)
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert found.notes == ()


def test_legacy_file_and_training_arguments(tmp_path: Path, state: StateDict) -> None:
    """torch.save's form before zip files, as masked-autoencoder training scripts fill it."""
    content = {"model": state, "epoch": 3, "args": argparse.Namespace(lr=1e-3, blr=None)}
    path = saved(tmp_path / "w.pth", content, _use_new_zipfile_serialization=False)
    assert_same(load_checkpoint(path, config=TINY).state_dict, state)
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


def test_parameters_load_without_their_gradient(tmp_path: Path, state: StateDict) -> None:
    content = {n: torch.nn.Parameter(v, v.is_floating_point()) for n, v in state.items()}
    found = load_checkpoint(saved(tmp_path / "w.pth", content), config=TINY).state_dict
    assert not any(value.requires_grad for value in found.values())


def test_released_safetensors_with_the_fusion_module(
    tmp_path: Path, encoder: StateDict, fusion: StateDict
) -> None:
    path = saved(tmp_path / "model.safetensors", encoder | fusion)
    found = load_checkpoint(str(path), config=TINY)
    assert_same(found.state_dict, encoder)
    assert_same(found.fusion, {n.removeprefix("msitf_aggregator."): v for n, v in fusion.items()})
    assert not found.has_decoder
    prefixed = {f"module.{name}": value for name, value in (encoder | fusion).items()}
    again = load_checkpoint(saved(tmp_path / "b.safetensors", prefixed), config=TINY)
    assert_same(again.state_dict, encoder)
    assert_same(again.fusion, found.fusion)


def test_folder(tmp_path: Path, state: StateDict) -> None:
    folder = tmp_path / "weights"
    saved(folder / "best.pth", state)
    (folder / "notes.txt").write_text("not weights")
    assert load_checkpoint(folder, config=TINY).source == str(folder)
    saved(folder / "last.pth", state)
    message = refusal(lambda: load_checkpoint(folder, config=TINY))
    assert "2 (best.pth, last.pth)" in message
    other = {
        name: value + 1 if value.is_floating_point() else value for name, value in state.items()
    }
    saved(folder / "model.safetensors", other)
    assert_same(load_checkpoint(folder, config=TINY).state_dict, other)
    (tmp_path / "empty").mkdir()
    assert "it holds none" in refusal(lambda: load_checkpoint(tmp_path / "empty"))


def test_weights_may_go_into_a_model(tmp_path: Path, state: StateDict) -> None:
    model = ReferenceNormWear(TINY)
    model.load_state_dict(load_checkpoint(saved(tmp_path / "w.pth", state), config=TINY).state_dict)
    assert_same(dict(model.state_dict()), state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened_and_said(
    tmp_path: Path, state: StateDict, dtype: torch.dtype
) -> None:
    half = {n: v.to(dtype) if v.is_floating_point() else v for n, v in state.items()}
    path = saved(tmp_path / "w.pth", half)
    name = str(dtype).removeprefix("torch.")
    with pytest.warns(UserWarning, match=f"weights are {name}; converted to float32 for use"):
        found = load_checkpoint(path, config=TINY)
    assert found.notes == (f"weights are {name}; converted to float32 for use",)
    wide = {n: v.float() if v.is_floating_point() else v for n, v in half.items()}
    assert_same(found.state_dict, wide)


# config.json


def config_beside(folder: Path, values: object) -> None:
    (folder / "config.json").write_text(json.dumps(values))


OURS = {"architecture": "normwear", "format_version": 1, **TINY.to_dict(), "optimized_cwt": False}
FOREIGN = {
    "architectures": ["SomethingElse"],
    "embed_dim": 8,
    "depth": 3,
    "num_heads": 2,
    "mlp_ratio": 4,
    "decoder_embed_dim": 8,
    "decoder_depth": 1,
    "decoder_num_heads": 16,
    "patch_size": 16,
}


def test_our_config_sets_the_sizes(tmp_path: Path, encoder: StateDict) -> None:
    path = saved(tmp_path / "w.pth", encoder)
    config_beside(tmp_path, OURS)
    found = load_checkpoint(path)
    assert found.config == TINY
    assert found.optimized_cwt is False
    assert load_checkpoint(path, config=TINY).config == TINY
    given = dataclasses.replace(TINY, num_heads=1)
    message = refusal(lambda: load_checkpoint(path, config=given))
    assert message.endswith("contradicts the given config: num_heads is 2, given 1")


def test_foreign_config_is_believed_for_plain_sizes_only(
    tmp_path: Path, encoder: StateDict
) -> None:
    path = saved(tmp_path / "w.pth", encoder)
    full_grid = dataclasses.replace(TINY, grid_rows=43, pretrain_samples=388)
    encoder["pos_embed"] = torch.zeros(1, 560, 8)
    saved(path, encoder)
    config_beside(tmp_path, FOREIGN | {"optimized_cwt": True})
    found = load_checkpoint(path)
    assert found.config == full_grid  # patch_size 16 and 16 decoder heads are someone else's words
    assert found.optimized_cwt is True
    other_heads = dataclasses.replace(full_grid, num_heads=4)
    assert load_checkpoint(path, config=other_heads).config == other_heads
    config_beside(tmp_path, {"model_type": "normwear", "optimized_cwt": "yes"})
    message = refusal(lambda: load_checkpoint(path))
    assert "embed_dim 768, depth 12; the released sizes" in message
    assert load_checkpoint(path, config=full_grid).optimized_cwt is None


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (OURS | {"format_version": 2}, "format_version is 2; this normwear-fast reads 1"),
        (OURS | {"optimized_cwt": "conv"}, "optimized_cwt is 'conv'"),
        (OURS | {"embed_dims": 8}, "unknown NormWearConfig names embed_dims"),
        (OURS | {"embed_dim": "8"}, "embed_dim is '8'; it must be like 768"),
        (OURS | {"embed_dim": True}, "embed_dim is True"),
        (OURS | {"embed_dim": 7}, "NormWearConfig.embed_dim is 7"),
        (OURS | {"patch_size": 9}, "patch_size is 9; it must be like (9, 5)"),
        (OURS | {"patch_size": [9, 0]}, "patch_size is [9, 0]"),
        (OURS | {"mlp_ratio": "4"}, "mlp_ratio is '4'"),
        (FOREIGN | {"depth": None}, "depth is None"),
        ([1], "holds a list; it must hold a JSON object"),
    ],
)
def test_bad_config_is_one_line(
    tmp_path: Path, encoder: StateDict, values: object, said: str
) -> None:
    path = saved(tmp_path / "w.pth", encoder)
    config_beside(tmp_path, values)
    message = refusal(lambda: load_checkpoint(path))
    assert message.startswith(str(tmp_path / "config.json"))
    assert said in message


@pytest.mark.parametrize("content", [b"", b'{"depth": 3', b"\xff\xfe\x00"])
def test_config_that_is_no_json(tmp_path: Path, encoder: StateDict, content: bytes) -> None:
    path = saved(tmp_path / "w.pth", encoder)
    (tmp_path / "config.json").write_bytes(content)
    assert "config.json: cannot be read as JSON" in refusal(lambda: load_checkpoint(path))


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        (OURS, False),
        (FOREIGN | {"optimized_cwt": True}, True),
        (FOREIGN | {"optimized_cwt": 1}, None),
        (OURS | {"optimized_cwt": None}, None),
        (None, None),
    ],
)
def test_saved_scalogram(
    tmp_path: Path, encoder: StateDict, values: object, wanted: bool | None
) -> None:
    path = saved(tmp_path / "w.pth", encoder)
    if values is not None:
        config_beside(tmp_path, values)
    assert saved_scalogram(path) is wanted
    assert saved_scalogram(str(tmp_path)) is wanted
    (tmp_path / "config.json").write_text("{")
    assert "cannot be read as JSON" in refusal(lambda: saved_scalogram(path))
    assert "no such weights" in refusal(lambda: saved_scalogram(tmp_path / "other.pth"))


def test_saved_config(tmp_path: Path, encoder: StateDict) -> None:
    """The sizes that loading takes, refused where loading refuses, of all but the values."""
    path = saved(tmp_path / "w.pth", encoder)
    assert "not weights of these sizes (embed_dim 768" in refusal(lambda: saved_config(path))
    config_beside(tmp_path, OURS)
    assert saved_config(path) == (load_checkpoint(path).config, "from config.json")
    assert saved_config(str(tmp_path))[0] == TINY
    name = next(iter(encoder))
    saved(path, {k: v for k, v in encoder.items() if k != name})
    assert f"1 missing: {name}" in refusal(lambda: saved_config(path))
    path.write_bytes(b"PK no")
    assert "not a checkpoint of torch.save" in refusal(lambda: saved_config(path))


# Damage


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle2", "pickle4"])
def test_code_in_a_pickle_never_runs(tmp_path: Path, state: StateDict, form: str) -> None:
    target = tmp_path / "ran"
    path = tmp_path / "w.pth"
    content = {"model": state, "extra": Payload(target)}
    if form.startswith("pickle"):
        path.write_bytes(pickle.dumps({"extra": Payload(target)}, protocol=int(form[-1])))
    else:
        saved(path, content, _use_new_zipfile_serialization=form == "zip")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        message = refusal(lambda: load_checkpoint(path, config=TINY))
    assert message.startswith(f"{path}: ")
    assert "in it was run" in message or "of it was run" in message
    if form != "pickle4":  # whose way to name a function torch does not even know
        assert "a pickle that asks to run posix.system; nothing of it was run" in message
    assert not target.exists()
    pickle.loads(pickle.dumps(Payload(target)))  # the payload itself works
    assert target.exists()


def test_pickled_model_object_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "w.pth", ReferenceNormWear(TINY))
    message = refusal(lambda: load_checkpoint(path, config=TINY))
    assert "normwear_fast.reference.ReferenceNormWear" in message
    assert "torch.save(model.state_dict(), path)" in message


@pytest.mark.parametrize("name", ["w.pth", "legacy.pth", "w.safetensors"])
def test_cut_short_anywhere(tmp_path: Path, encoder: StateDict, name: str) -> None:
    options = {"_use_new_zipfile_serialization": False} if name == "legacy.pth" else {}
    whole = saved(tmp_path / name, encoder, **options).read_bytes()
    path = tmp_path / f"cut-{name}"
    for length in (1, 3, 4, 8, 9, 100, len(whole) // 3, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert "or cut short" in refusal(lambda: load_checkpoint(path, config=TINY))


@pytest.mark.parametrize("name", ["w.pth", "legacy.pth", "w.safetensors"])
def test_damaged_bytes_are_refused_or_loaded_never_a_traceback(
    tmp_path: Path, encoder: StateDict, name: str
) -> None:
    options = {"_use_new_zipfile_serialization": False} if name == "legacy.pth" else {}
    whole = saved(tmp_path / name, encoder, **options).read_bytes()
    path = tmp_path / f"damaged-{name}"
    generator = torch.Generator().manual_seed(6)
    refused = 0
    for position in torch.randint(min(len(whole), 20_000), (60,), generator=generator).tolist():
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0xFF]) + whole[position + 1 :])
        try:
            load_checkpoint(path, config=TINY)
        except WeightsError as error:
            assert len(str(error).splitlines()) == 1  # noqa: PT017
            refused += 1
    assert refused > 0


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("w.pth", b"", "is empty (0 bytes)"),
        ("w.safetensors", b"", "is empty (0 bytes)"),
        ("w.pth", b"<!DOCTYPE html><html>Not found</html>", "not a checkpoint of torch.save"),
        ("w.safetensors", b"<!DOCTYPE html><html>Not found</html>", "not a safetensors file"),
        ("w.safetensors", b"version https://git-lfs.github.com/spec/v1", "not a safetensors file"),
        ("w.ckpt", b"abc", "it must end in .safetensors, .pth, .pt or .bin"),
    ],
)
def test_not_a_checkpoint(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    message = refusal(lambda: load_checkpoint(path))
    assert message.startswith(str(path))
    assert said in message


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([torch.zeros(2)], "holds a list; it must hold a state dict"),
        (torch.zeros(2), "holds a Tensor; it must hold a state dict"),
        ({}, "holds no state dict, only nothing"),
        ({"epoch": 3, "optimizer": {}}, "only epoch, optimizer"),
        ({"cls_token": torch.zeros(2), "epoch": 3}, "epoch is a int; it must be a tensor"),
        (
            {"module.norm.bias": torch.zeros(2), "norm.bias": torch.zeros(2)},
            "two entries are named norm.bias",
        ),
        ({3: torch.zeros(2), "a\nb": torch.zeros(2)}, "2 unexpected: 3, a b"),
    ],
)
def test_contents_that_are_no_state_dict(tmp_path: Path, content: Any, said: str) -> None:
    path = saved(tmp_path / "w.pth", content)
    assert said in refusal(lambda: load_checkpoint(path))


def test_checkpoint_of_another_size(tmp_path: Path, state: StateDict) -> None:
    path = saved(tmp_path / "w.pth", state)
    message = refusal(lambda: load_checkpoint(path))
    assert "embed_dim 768, depth 12, decoder_embed_dim 512, decoder_depth 2" in message
    assert "no config said others" in message
    assert "norm.weight (8,) instead of (768,)" in message
    assert "encoder_blocks.11.variate_encoder.norm1.weight" in message


def test_missing_and_unreadable(tmp_path: Path, state: StateDict) -> None:
    assert "no such weights file or folder" in refusal(lambda: load_checkpoint("nothing.pth"))
    assert "no such weights file" in refusal(lambda: load_checkpoint("runs/nothing.pth"))
    assert "no such weights file" in refusal(lambda: load_checkpoint(""))
    assert "no such weights file" in refusal(lambda: load_checkpoint("\0"))
    assert "no such weights file" in refusal(lambda: load_checkpoint("x" * 5000))
    assert "no such file" in refusal(lambda: read_state_dict(tmp_path / "w.pth"))
    path = saved(tmp_path / "w.pth", state)
    message = refusal(lambda: load_checkpoint(path, config=TINY, revision="main"), UsageError)
    assert "revision main is for a Hugging Face id" in message


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_no_permission(tmp_path: Path, state: StateDict) -> None:
    path = saved(tmp_path / "w.pth", state)
    path.chmod(0)
    assert "Permission denied" in refusal(lambda: load_checkpoint(path, config=TINY))
    tmp_path.chmod(0o500)
    try:
        message = refusal(lambda: save_pretrained(tmp_path / "new", state, TINY), OutputError)
    finally:
        tmp_path.chmod(0o700)
    assert "Permission denied" in message


# Writing


def test_round_trip_bit_for_bit(tmp_path: Path, state: StateDict, fusion: StateDict) -> None:
    state["norm.weight"][:4] = torch.tensor([-0.0, 1e-45, 3.4028235e38, -1e-40])
    folder = tmp_path / "a" / "b"
    save_pretrained(folder, state | fusion, TINY, optimized_cwt=True, metadata={"source": "seed 3"})
    found = load_checkpoint(folder)
    assert_same(found.state_dict, state)
    assert_same(found.fusion, {n.removeprefix("msitf_aggregator."): v for n, v in fusion.items()})
    assert found.config == TINY
    assert found.optimized_cwt is True
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    values = json.loads((folder / "config.json").read_text())
    assert values == {
        "architecture": "normwear",
        "format_version": 1,
        **TINY.to_dict(),
        "optimized_cwt": True,
        "metadata": {"source": "seed 3"},
    }


def test_float64_keeps_its_bits(tmp_path: Path, encoder: StateDict) -> None:
    double = {name: value.double() / 3 for name, value in encoder.items()}
    save_pretrained(tmp_path, double, TINY)
    assert_same(load_checkpoint(tmp_path).state_dict, double)


def test_a_model_of_float64_weights_has_them_rounded(tmp_path: Path) -> None:
    model = FastNormWear(True, config=TINY).double()
    with torch.no_grad():
        model.cls_token.div_(3)
    model.save_pretrained(tmp_path)
    assert torch.equal(load_checkpoint(tmp_path).state_dict["cls_token"], model.cls_token)
    again = FastNormWear.from_pretrained(tmp_path)
    for name, value in again.state_dict().items():
        kept = model.state_dict()[name]
        assert torch.equal(value, kept.float() if kept.is_floating_point() else kept)


def test_a_config_of_another_kind_is_refused(tmp_path: Path, state: StateDict) -> None:
    path = saved(tmp_path / "w.pth", state)
    for wrong in ({"embed_dim": 128}, "small", NormWearConfig):
        said = refusal(partial(load_checkpoint, path, config=wrong), UsageError)
        assert "it must be a NormWearConfig" in said
    save = partial(save_pretrained, tmp_path / "out", state)
    assert "config is a dict" in refusal(lambda: save(TINY.to_dict()), UsageError)


def test_same_weights_same_file(tmp_path: Path, state: StateDict) -> None:
    for name in ("a", "b", "c"):
        save_pretrained(tmp_path / name, state, TINY, metadata={"x": "1", "y": "2", name: "3"})
    files = {(tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b", "c")}
    assert len(files) == 1
    with safe_open(tmp_path / "a" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_shared_and_strided_tensors_are_written_whole(tmp_path: Path, state: StateDict) -> None:
    shared = torch.randn(64)
    state["norm.weight"] = shared[8:16]
    state["norm.bias"] = shared[8:16]
    state["decoder_norm.weight"] = state["decoder_norm.bias"] = torch.randn(8)
    state["patch_embed.proj.bias"] = shared[::8]
    fc1 = "encoder_blocks.0.variate_encoder.mlp.fc1.weight"
    state[fc1] = state[fc1].t().contiguous().t()
    save_pretrained(tmp_path, state, TINY)
    assert_same(load_checkpoint(tmp_path).state_dict, {n: v.clone() for n, v in state.items()})


def test_files_are_readable_by_whom_the_umask_allows(tmp_path: Path, state: StateDict) -> None:
    before = os.umask(0o022)
    try:
        save_pretrained(tmp_path, state, TINY)
    finally:
        os.umask(before)
    modes = {stat.S_IMODE((tmp_path / n).stat().st_mode) for n in os.listdir(tmp_path)}
    assert modes == {0o644}


def test_saving_another_size_is_refused(tmp_path: Path, state: StateDict) -> None:
    del state["norm.weight"]
    message = refusal(lambda: save_pretrained(tmp_path / "out", state, TINY))
    assert "1 missing: norm.weight" in message
    assert not (tmp_path / "out").exists()


@pytest.fixture
def file_size_limit() -> Iterator[Callable[[int], None]]:
    """Writes beyond the given size fail, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_no_space_leaves_the_old_weights_whole(
    tmp_path: Path, state: StateDict, file_size_limit: Callable[[int], None]
) -> None:
    save_pretrained(tmp_path, state, TINY, optimized_cwt=True)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    state["norm.weight"] += 1
    file_size_limit(2000)
    message = refusal(lambda: save_pretrained(tmp_path, state, TINY), OutputError)
    assert "File too large" in message
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_output_that_is_a_file(tmp_path: Path, state: StateDict) -> None:
    (tmp_path / "out").write_text("mine")
    refusal(lambda: save_pretrained(tmp_path / "out", state, TINY), OutputError)
    assert (tmp_path / "out").read_text() == "mine"


def test_interrupted_save_leaves_the_old_weights_whole(
    tmp_path: Path, state: StateDict, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_pretrained(tmp_path, state, TINY)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def interrupt(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(weights, "_sync", interrupt)
    state["norm.weight"] += 1
    with pytest.raises(KeyboardInterrupt):
        save_pretrained(tmp_path, state, TINY)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# Conversion


def test_convert_a_wrapped_checkpoint(tmp_path: Path, state: StateDict, fusion: StateDict) -> None:
    content = {"model": {f"module.{n}": v for n, v in (state | fusion).items()}, "epoch": 1}
    path = saved(tmp_path / "w.pth", content)
    report = convert(path, tmp_path / "out", config=TINY)
    written = tmp_path / "out" / "model.safetensors"
    learned = [
        v
        for n, v in (state | fusion).items()
        if not n.endswith(("running_mean", "running_var", "num_batches_tracked"))
    ]
    assert report.names == len(state) + 2
    assert report.parameters == sum(value.numel() for value in learned)
    assert report.decoder
    assert report.fusion
    assert report.sha256 == hashlib.sha256(written.read_bytes()).hexdigest()
    assert report.notes == ()
    assert_same(safetensors.torch.load_file(written), state | fusion)
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    assert values["optimized_cwt"] is None
    assert values["metadata"]["source"] == "w.pth"
    assert values["metadata"]["source_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    # Once more, from the folder into itself: the same file.
    assert convert(tmp_path / "out", tmp_path / "out") == report


def test_convert_encoder_only_keeps_the_scalogram(tmp_path: Path, encoder: StateDict) -> None:
    save_pretrained(tmp_path / "a", encoder, TINY, optimized_cwt=False)
    report = convert(tmp_path / "a", tmp_path / "b")
    assert not report.decoder
    assert not report.fusion
    assert load_checkpoint(tmp_path / "b").optimized_cwt is False


def test_convert_refuses_before_writing(tmp_path: Path, state: StateDict) -> None:
    path = saved(tmp_path / "w.pth", state)
    refusal(lambda: convert(path, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


# Hugging Face


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache and no network."""
    from huggingface_hub import constants

    cache = tmp_path / "hub"
    cache.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return cache


def cached(cache: Path, files: dict[str, bytes]) -> Path:
    """owner/name in the cache, laid out as huggingface_hub does: snapshot links into blobs."""
    repository = cache / "models--owner--name"
    snapshot = repository / "snapshots" / COMMIT
    for folder in (snapshot, repository / "refs", repository / "blobs"):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    for name, content in files.items():
        blob = repository / "blobs" / hashlib.sha256(content).hexdigest()
        blob.write_bytes(content)
        (snapshot / name).symlink_to(os.path.relpath(blob, snapshot))
    return snapshot


def test_cached_hub_id_offline(tmp_path: Path, hub_cache: Path, encoder: StateDict) -> None:
    save_pretrained(tmp_path / "made", encoder, TINY, optimized_cwt=True)
    cached(hub_cache, {p.name: p.read_bytes() for p in (tmp_path / "made").iterdir()})
    found = load_checkpoint("owner/name")
    assert_same(found.state_dict, encoder)
    assert found.config == TINY
    assert found.optimized_cwt is True
    assert found.source == f"owner/name@{COMMIT}"
    assert load_checkpoint("owner/name", revision=COMMIT).source == found.source
    message = refusal(lambda: load_checkpoint("owner/name", revision="v2"))
    assert "--revision v2" in message
    convert("owner/name", tmp_path / "out")
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    assert values["metadata"]["source"] == f"owner/name@{COMMIT}"


def test_the_sizes_of_a_hub_id_need_no_weights(hub_cache: Path) -> None:
    assert "HF_HUB_OFFLINE is set" in refusal(lambda: saved_config("owner/name"))
    cached(hub_cache, {"config.json": json.dumps(OURS).encode()})
    assert saved_config("owner/name") == (TINY, "from config.json")


def test_hub_id_offline_and_not_cached(hub_cache: Path) -> None:
    message = refusal(lambda: load_checkpoint("owner/name"))
    assert message.startswith("owner/name: no such file or folder")
    assert "HF_HUB_OFFLINE is set" in message
    assert "`hf download owner/name model.safetensors config.json`" in message


def test_cached_hub_id_without_weights(hub_cache: Path) -> None:
    cached(hub_cache, {"config.json": b"{}"})
    message = refusal(lambda: load_checkpoint("owner/name"))
    assert "HF_HUB_OFFLINE is set" in message
    assert "hf download owner/name" in message


def test_hub_that_cannot_be_reached(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub import constants

    def unreachable(*args: object, **options: object) -> str:
        raise ConnectionError("no route to host\nand a second line")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    message = refusal(lambda: load_checkpoint("owner/name"))
    assert "not in the cache (no route to host)" in message
    assert "hf download owner/name" in message


def test_only_two_files_are_asked_of_the_hub(
    tmp_path: Path, hub_cache: Path, encoder: StateDict, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    save_pretrained(tmp_path / "made", encoder, TINY)
    asked: list[tuple[str, dict[str, Any]]] = []

    def download(hub_id: str, **options: Any) -> str:
        asked.append((hub_id, options))
        return str(tmp_path / "made")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    load_checkpoint("owner/name", revision="v2")
    files = ["model.safetensors", "config.json"]
    assert asked == [("owner/name", {"revision": "v2", "allow_patterns": files})]


def test_folder_wins_over_a_hub_id(
    tmp_path: Path, hub_cache: Path, encoder: StateDict, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached(hub_cache, {"config.json": b"{}"})
    monkeypatch.chdir(tmp_path)
    save_pretrained("owner/name", encoder, TINY)
    assert load_checkpoint("owner/name").source == "owner/name"


def test_quiet_when_nothing_was_changed(tmp_path: Path, state: StateDict) -> None:
    path = saved(tmp_path / "w.pth", state)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_checkpoint(path, config=TINY)
