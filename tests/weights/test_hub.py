"""Hub ids: cached, offline, unreachable, and folders of the same name."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
from weight_files import OURS, TINY, StateDict, assert_same, refusal

from normwear_fast.weights import convert, load_checkpoint, save_pretrained, saved_config

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


def test_a_cached_hub_id_loads_offline(tmp_path: Path, hub_cache: Path, encoder: StateDict) -> None:
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


def test_a_hub_id_that_is_not_cached_is_refused_offline(hub_cache: Path) -> None:
    message = refusal(lambda: load_checkpoint("owner/name"))
    assert message.startswith("owner/name: no such file or folder")
    assert "HF_HUB_OFFLINE is set" in message
    assert "`hf download owner/name model.safetensors config.json`" in message


def test_a_cached_hub_id_without_weights_is_refused(hub_cache: Path) -> None:
    cached(hub_cache, {"config.json": b"{}"})
    message = refusal(lambda: load_checkpoint("owner/name"))
    assert "HF_HUB_OFFLINE is set" in message
    assert "hf download owner/name" in message


def test_a_hub_that_cannot_be_reached_is_one_line(
    hub_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
