"""The fusion module's checkpoints: every form loads, saving returns it, and bad ones are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from normwear_fast.errors import OutputError, WeightsError
from normwear_fast.model import FastNormWear
from normwear_fast.zeroshot import MSiTF


@pytest.mark.parametrize("form", ["bare.pth", "model.pth", "prefix.pth", "beside.safetensors"])
def test_every_checkpoint_form_loads(
    form: str, fusion: MSiTF, encoder: FastNormWear, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    state = fusion.state_dict()
    path = tmp_path / form
    if form == "bare.pth":
        torch.save(state, path)
    elif form == "model.pth":
        torch.save({"model": {f"module.{k}": v for k, v in state.items()}, "epoch": 5}, path)
    elif form == "prefix.pth":
        torch.save(
            {f"aggregator.{k}": v for k, v in state.items()} | {"other": torch.ones(1)}, path
        )
    else:
        beside = {k: v.contiguous() for k, v in encoder.state_dict().items()}
        save_file(beside | {f"msitf_aggregator.{k}": v for k, v in state.items()}, path)
    loaded = MSiTF.from_pretrained(path)
    assert (loaded.embed_dim, loaded.query_dim) == (32, 24)
    assert not loaded.training
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, state[name])


def test_saved_folder_round_trips(fusion: MSiTF, tmp_path: Path) -> None:
    fusion.description = {"text_encoder": "letters", "preprocess": "none"}
    fusion.save_pretrained(tmp_path / "f")
    loaded = MSiTF.from_pretrained(tmp_path / "f")
    assert all(torch.equal(v, fusion.state_dict()[k]) for k, v in loaded.state_dict().items())
    assert loaded.description["text_encoder"] == "letters"
    assert sorted(p.name for p in (tmp_path / "f").iterdir()) == [
        "fusion.json",
        "fusion.safetensors",
    ]
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        fusion.save_pretrained(tmp_path / "file")


class Harmless:
    """Not a tensor: reading it back would import and call this module."""


def test_bad_checkpoints_are_named(fusion: MSiTF, tmp_path: Path) -> None:
    path = tmp_path / "f.pth"

    def load(state: Any) -> None:
        torch.save(state, path)
        MSiTF.from_pretrained(path)

    state = fusion.state_dict()
    without = {k: v for k, v in state.items() if k not in ("v.bias", "q.weight")}
    with pytest.raises(WeightsError, match=r"2 missing: v.bias, q.weight"):
        load(without)
    with pytest.raises(WeightsError, match=r"1 unexpected: extra"):
        load(state | {"extra": torch.zeros(1)})
    with pytest.raises(WeightsError, match=r"q.weight \(3, 24\) instead of \(24, 24\)"):
        load(state | {"q.weight": torch.zeros(3, 24)})
    with pytest.raises(WeightsError, match=r"k\.bias holds NaN"):
        load(state | {"k.bias": torch.full((24,), float("nan"))})
    with pytest.raises(WeightsError, match="must hold one fusion module"):
        load({"cls_token": torch.zeros(1, 1, 8)})
    with pytest.raises(WeightsError, match="no such"):
        MSiTF.from_pretrained(tmp_path / "nothing.pth")
    torch.save({"k": Harmless()}, path)
    with pytest.raises(WeightsError, match="nothing of it was run"):
        MSiTF.from_pretrained(path)
