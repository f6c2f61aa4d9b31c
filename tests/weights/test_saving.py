"""Saving and `convert`: bit for bit, the same file each time, and the old weights whole on failure."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from pathlib import Path

import pytest
import safetensors.torch
import torch
from helpers import full_disk
from safetensors import safe_open
from weight_files import TINY, StateDict, assert_same, refusal, saved

from normwear_fast import FastNormWear, tensor_files
from normwear_fast.errors import OutputError
from normwear_fast.weights import convert, load_checkpoint, save_pretrained


def test_what_is_saved_loads_bit_for_bit(
    tmp_path: Path, state: StateDict, fusion: StateDict
) -> None:
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


def test_the_same_weights_are_the_same_file(tmp_path: Path, state: StateDict) -> None:
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


def test_no_space_leaves_the_old_weights_whole(tmp_path: Path, state: StateDict) -> None:
    save_pretrained(tmp_path, state, TINY, optimized_cwt=True)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    state["norm.weight"] += 1
    with full_disk(2000):
        message = refusal(lambda: save_pretrained(tmp_path, state, TINY), OutputError)
    assert "File too large" in message
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path, state: StateDict) -> None:
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

    monkeypatch.setattr(tensor_files, "sync", interrupt)
    state["norm.weight"] += 1
    with pytest.raises(KeyboardInterrupt):
        save_pretrained(tmp_path, state, TINY)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_convert_unwraps_a_checkpoint(tmp_path: Path, state: StateDict, fusion: StateDict) -> None:
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
