"""Sizes beside the weights: our config, a foreign one believed for plain sizes, and bad ones."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

import pytest
import torch
from weight_files import FOREIGN, OURS, TINY, StateDict, config_beside, refusal, saved

from normwear_fast.config import NormWearConfig
from normwear_fast.errors import UsageError
from normwear_fast.weights import load_checkpoint, save_pretrained, saved_config, saved_scalogram


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
    config_beside(tmp_path, {"model_type": "normwear", "optimized_cwt": "yes", "num_heads": 4})
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
def test_a_config_that_is_no_json_is_refused(
    tmp_path: Path, encoder: StateDict, content: bytes
) -> None:
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
def test_the_saved_scalogram_is_used(
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


def test_the_saved_config_is_read_back(tmp_path: Path, encoder: StateDict) -> None:
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


def test_a_config_of_another_kind_is_refused(tmp_path: Path, state: StateDict) -> None:
    path = saved(tmp_path / "w.pth", state)
    for wrong in ({"embed_dim": 128}, "small", NormWearConfig):
        said = refusal(partial(load_checkpoint, path, config=wrong), UsageError)
        assert "it must be a NormWearConfig" in said
    save = partial(save_pretrained, tmp_path / "out", state)
    assert "config is a dict" in refusal(lambda: save(TINY.to_dict()), UsageError)
