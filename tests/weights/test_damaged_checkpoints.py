"""Damaged and hostile checkpoints are one line: code never runs, no byte gives a traceback."""

from __future__ import annotations

import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from payload import Payload
from weight_files import TINY, StateDict, refusal, saved

from normwear_fast.errors import OutputError, UsageError, WeightsError
from normwear_fast.reference import ReferenceNormWear
from normwear_fast.weights import load_checkpoint, read_state_dict, save_pretrained


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
def test_a_checkpoint_cut_short_anywhere_is_refused(
    tmp_path: Path, encoder: StateDict, name: str
) -> None:
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
def test_what_is_no_checkpoint_is_refused(
    tmp_path: Path, name: str, content: bytes, said: str
) -> None:
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
def test_contents_that_are_no_state_dict_are_refused(
    tmp_path: Path, content: Any, said: str
) -> None:
    path = saved(tmp_path / "w.pth", content)
    assert said in refusal(lambda: load_checkpoint(path))


def test_a_checkpoint_of_another_size_is_refused(tmp_path: Path, state: StateDict) -> None:
    path = saved(tmp_path / "w.pth", state)
    message = refusal(lambda: load_checkpoint(path))
    assert "embed_dim 768, depth 12, decoder_embed_dim 512, decoder_depth 2" in message
    assert "no config said others" in message
    assert "norm.weight (8,) instead of (768,)" in message
    assert "encoder_blocks.11.variate_encoder.norm1.weight" in message


def test_missing_and_unreadable_files_are_refused(tmp_path: Path, state: StateDict) -> None:
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
def test_a_checkpoint_without_permission_is_one_line(tmp_path: Path, state: StateDict) -> None:
    path = saved(tmp_path / "w.pth", state)
    path.chmod(0)
    assert "Permission denied" in refusal(lambda: load_checkpoint(path, config=TINY))
    tmp_path.chmod(0o500)
    try:
        message = refusal(lambda: save_pretrained(tmp_path / "new", state, TINY), OutputError)
    finally:
        tmp_path.chmod(0o700)
    assert "Permission denied" in message
