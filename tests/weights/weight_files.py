"""A small model's weights as files, how two are compared, and the one line a bad file gets."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from normwear_fast.config import NormWearConfig
from normwear_fast.errors import WeightsError

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
