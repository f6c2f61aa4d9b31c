"""Fusion modules on disk: the released ``.pth``, a checkpoint that holds one, and our own folder.

Our folder holds ``fusion.safetensors`` (names under ``msitf_aggregator.``, as beside an encoder)
and ``fusion.json`` (widths, the text encoder it belongs to, and how it was trained).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from normwear_fast.errors import WeightNamesError, WeightsError
from normwear_fast.files import file_sha256, fits, read_json
from normwear_fast.tensor_files import write_described
from normwear_fast.weights import FUSION_PREFIX, _is_usable, _kind, _locate, read_state_dict
from normwear_fast.zeroshot.fusion import MSiTF

WEIGHTS_FILE = "fusion.safetensors"
DESCRIPTION_FILE = "fusion.json"
FORMAT_VERSION = 1
_ANCHOR = "cd.0.weight"


def load_fusion(source: str | Path) -> MSiTF:
    """Read a fusion module of any form, in evaluation mode.

    Args:
        source: a file or folder with the module alone, bare or under one prefix, or an encoder's
            checkpoint or hub id with ``msitf_aggregator.*`` in it.
    Raises: WeightsError: unreadable, holding code, without a fusion module, or one line with every
        missing, unexpected and wrongly shaped name; a name with NaN or infinity.
    """
    folder = Path(source)
    if (folder / WEIGHTS_FILE).is_file():
        path, label = folder / WEIGHTS_FILE, str(source)
    else:
        path, label = _locate(str(source), None)
    module = fusion_from_state_dict(read_state_dict(path), label)
    module.source = label
    module.sha256 = file_sha256(path)
    description = path.parent / DESCRIPTION_FILE
    if path.name == WEIGHTS_FILE and description.is_file():
        module.description = _read_description(description)
    return module


def fusion_from_state_dict(state_dict: Mapping[str, Tensor], label: str) -> MSiTF:
    """The fusion module among a file's names; the encoder's beside it are left alone.

    Raises: as :func:`load_fusion`.
    """
    prefixes = [name.removesuffix(_ANCHOR) for name in state_dict if name.endswith(_ANCHOR)]
    prefixes = [prefix for prefix in prefixes if not prefix or prefix.endswith(".")]
    if len(prefixes) != 1:
        found = "none" if not prefixes else f"{len(prefixes)}, under {', '.join(prefixes)}"
        raise WeightsError(
            f"{label}: must hold one fusion module ({_ANCHOR}, k.weight, ...), bare or under "
            f"{FUSION_PREFIX}; it holds {found}"
        )
    prefix = prefixes[0]
    own = {
        name.removeprefix(prefix): value
        for name, value in state_dict.items()
        if name.startswith(prefix)
    }
    anchor, key = own[_ANCHOR], own.get("k.weight")
    if anchor.ndim != 2 or key is None or key.ndim != 2:
        raise WeightsError(f"{label}: {_ANCHOR} and k.weight must be there, as matrices")
    with torch.device("meta"):
        module = MSiTF(embed_dim=anchor.shape[1], query_dim=key.shape[0])
    expected = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    lists = {
        "missing": [name for name in expected if name not in own],
        "unexpected": [name for name in own if name not in expected],
        "of the wrong shape": [
            f"{name} {tuple(value.shape)} instead of {expected[name]}"
            for name, value in own.items()
            if name in expected and tuple(value.shape) != expected[name]
        ],
        "of the wrong type": [
            f"{name} {_kind(value)}" for name, value in own.items() if not _is_usable(name, value)
        ],
    }
    if any(lists.values()):
        found = "; ".join(f"{len(n)} {what}: {', '.join(n)}" for what, n in lists.items() if n)
        raise WeightNamesError(
            f"{label}: no fusion module of widths {module.embed_dim} and {module.query_dim}: "
            f"{found}"
        )
    for name, value in own.items():
        if not torch.isfinite(value).all():
            raise WeightsError(f"{label}: {name} holds NaN or infinity; every value must be finite")
    # Copies: a file's pages must not back parameters that training will write.
    module.load_state_dict(
        {name: value.to(torch.float32, copy=True) for name, value in own.items()}, assign=True
    )
    module.source = label
    return module.requires_grad_(False).eval()


def save_fusion(module: MSiTF, folder: str | Path) -> None:
    """Write ``fusion.safetensors`` and ``fusion.json``; what was there is replaced or left whole.

    Args:
        module: its values are written as float32, its ``description`` (text encoder, training
            settings, results) into the JSON beside the widths.
        folder: made if needed.
    Raises: OutputError where the folder cannot be written.
    """
    tensors = {FUSION_PREFIX + name: value.float() for name, value in module.state_dict().items()}
    values = module.description | {
        "format_version": FORMAT_VERSION,
        "embed_dim": module.embed_dim,
        "query_dim": module.query_dim,
    }
    text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    write_described(Path(folder), WEIGHTS_FILE, tensors, DESCRIPTION_FILE, text, "fusion module")


def _read_description(path: Path) -> dict[str, Any]:
    values = read_json(path, WeightsError)
    if not isinstance(values, dict) or values.get("format_version") != FORMAT_VERSION:
        raise WeightsError(f"{path}: must be a JSON object of format_version {FORMAT_VERSION}")
    if not fits(values.get("text_encoder"), (str, None)):
        raise WeightsError(f"{path}: text_encoder is {values['text_encoder']!r}; a name is right")
    if values.get("preprocess") not in ("reference", "none", None):
        raise WeightsError(
            f"{path}: preprocess is {values['preprocess']!r}; reference or none is right"
        )
    return values
