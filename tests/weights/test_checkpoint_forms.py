"""Every form of checkpoint loads: pickles, safetensors, folders, and what was widened is said."""

from __future__ import annotations

import argparse
import hashlib
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from weight_files import TINY, StateDict, assert_same, refusal, saved

from normwear_fast.reference import ReferenceNormWear
from normwear_fast.weights import load_checkpoint


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin"])
@pytest.mark.parametrize("container", [None, "model", "state_dict"])
@pytest.mark.parametrize(
    "prefix",
    ["", "module.", "backbone.", "module.backbone.module.", "_orig_mod.", "module._orig_mod."],
)
def test_pickles_of_every_form_load(
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


def test_legacy_files_and_training_arguments_load(tmp_path: Path, state: StateDict) -> None:
    """torch.save's form before zip files, as masked-autoencoder training scripts fill it."""
    content = {"model": state, "epoch": 3, "args": argparse.Namespace(lr=1e-3, blr=None)}
    path = saved(tmp_path / "w.pth", content, _use_new_zipfile_serialization=False)
    assert_same(load_checkpoint(path, config=TINY).state_dict, state)
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


def test_parameters_load_without_their_gradient(tmp_path: Path, state: StateDict) -> None:
    content = {n: torch.nn.Parameter(v, v.is_floating_point()) for n, v in state.items()}
    found = load_checkpoint(saved(tmp_path / "w.pth", content), config=TINY).state_dict
    assert not any(value.requires_grad for value in found.values())


def test_released_safetensors_load_with_the_fusion_module(
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


def test_a_folder_holds_one_checkpoint(tmp_path: Path, state: StateDict) -> None:
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
    for value in (torch.finfo(dtype).max, torch.finfo(dtype).tiny):
        half["cls_token"][..., int(value < 1)] = value
    path = saved(tmp_path / "w.pth", half)
    name = str(dtype).removeprefix("torch.")
    with pytest.warns(UserWarning, match=f"weights are {name}; converted to float32 for use"):
        found = load_checkpoint(path, config=TINY)
    assert found.notes == (f"weights are {name}; converted to float32 for use",)
    wide = {n: v.float() if v.is_floating_point() else v for n, v in half.items()}
    assert_same(found.state_dict, wide)


def test_nothing_is_said_when_nothing_was_changed(tmp_path: Path, state: StateDict) -> None:
    path = saved(tmp_path / "w.pth", state)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_checkpoint(path, config=TINY)
