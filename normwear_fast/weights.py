"""NormWear checkpoints: read in every form they come in, checked by name, written as safetensors.

A folder of ours holds two files:

- ``model.safetensors``: the released names, and under ``msitf_aggregator.`` the zero-shot fusion
  module's, if there is one;
- ``config.json``: the names of :class:`~normwear_fast.config.NormWearConfig`, ``optimized_cwt``
  (which scalogram the weights are for; null: not said), ``metadata`` (free text) and, to recognise
  the file by, ``architecture`` and ``format_version``.

Where the sizes come from, first match:

1. a ``config.json`` of ours beside the weights (one that contradicts a given config is an error);
2. the config given by the caller;
3. someone else's ``config.json`` (the Hugging Face one, say), if it states ``embed_dim``, ``depth``
   and ``num_heads``. Only names in ``FOREIGN_NAMES`` are taken from it, and ``optimized_cwt``;
4. the released sizes.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from normwear_fast.config import NormWearConfig, check_config
from normwear_fast.errors import UsageError, WeightNamesError, WeightsError, first_line, one_line
from normwear_fast.files import file_sha256, read_json
from normwear_fast.reference import ReferenceNormWear
from normwear_fast.tensor_files import read_pickled, read_safetensors, write_described
from normwear_fast.wavelets import mother_wavelet

ARCHITECTURE = "normwear"
FORMAT_VERSION = 1
WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
FUSION_PREFIX = "msitf_aggregator."
"""Of the zero-shot fusion module's names, beside the encoder's."""

WRAPPERS = ("module.", "backbone.", "_orig_mod.")
"""Prefixes that training wrappers and torch.compile put before the released names, in any order and
number."""

CONTAINERS = ("model", "state_dict")
"""Keys under which a training checkpoint keeps its state dict."""

PICKLED = (".pth", ".pt", ".bin")
FOREIGN_NAMES = (
    "embed_dim",
    "depth",
    "num_heads",
    "mlp_ratio",
    "decoder_embed_dim",
    "decoder_depth",
)
"""What we believe of a config.json that is not ours: sizes whose name can mean one thing only."""

_COUNTER = "num_batches_tracked"
_BUFFERS = ("running_mean", "running_var", _COUNTER)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_WIDENED = (torch.float16, torch.bfloat16)
_FLOATING = (torch.float32, torch.float64, *_WIDENED)


@dataclass(frozen=True)
class Checkpoint:
    """Weights, checked against the sizes they are for.

    Args:
        state_dict: released names, no prefix; on the CPU, float32 (float64 where the file has it).
            May be backed by the file's pages: copy before writing into it.
        fusion: names and values under ``msitf_aggregator.``, that prefix removed; often empty.
        config: the sizes.
        optimized_cwt: which scalogram the weights are for; None where no config.json says it.
        has_decoder: whether the pretraining decoder is in ``state_dict``.
        source: the path or hub id that was asked for, a hub id with ``@`` and its commit.
        sha256: hex digest of the file that holds the weights.
        notes: what was done to the values, one line each; empty if they are the file's.
    """

    state_dict: dict[str, Tensor]
    fusion: dict[str, Tensor]
    config: NormWearConfig
    optimized_cwt: bool | None
    has_decoder: bool
    source: str
    sha256: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ConversionReport:
    """What :func:`convert` wrote.

    Args:
        names: entries of the file, fusion module included.
        parameters: their values, without BatchNorm's running statistics and counter.
        decoder: whether the pretraining decoder is among them.
        fusion: whether the zero-shot fusion module is among them.
        sha256: hex digest of the written ``model.safetensors``; the same weights give the same one.
        notes: what was done to the values on the way, one line each.
    """

    names: int
    parameters: int
    decoder: bool
    fusion: bool
    sha256: str
    notes: tuple[str, ...] = ()


def load_checkpoint(
    source: str | Path, *, config: NormWearConfig | None = None, revision: str | None = None
) -> Checkpoint:
    """Reads and checks weights of any form.

    Args:
        source: a ``.safetensors`` file; a ``.pth``, ``.pt`` or ``.bin`` file of ``torch.save``,
            bare or under ``model`` or ``state_dict``, with or without wrapper prefixes; a folder
            with ``model.safetensors`` or one such file; or a Hugging Face id ``owner/name``, cached
            by huggingface_hub. What exists on disk wins over a hub id.
        config: sizes, where no config.json of ours says them.
        revision: branch, tag or commit of a hub id.

    Raises:
        WeightsError: unreadable, not cached while offline, holding code, of another size (every
            name listed), not floating point or not finite.
        UsageError: a ``revision`` for something on disk, or a config that is no NormWearConfig.
    """
    check_config(config)
    weights, label = _locate(str(source), revision)
    state_dict = read_state_dict(weights)
    sha256 = file_sha256(weights)
    chosen, optimized_cwt, origin = _choose_config(weights.parent / CONFIG_FILE, config)
    has_decoder = check_names(state_dict, chosen, source=str(source), origin=origin)
    state_dict, notes = _widen(state_dict)
    for note in notes:
        warnings.warn(f"{source}: {note}", stacklevel=2)
    return Checkpoint(
        state_dict={k: v for k, v in state_dict.items() if not k.startswith(FUSION_PREFIX)},
        fusion={
            k.removeprefix(FUSION_PREFIX): v
            for k, v in state_dict.items()
            if k.startswith(FUSION_PREFIX)
        },
        config=chosen,
        optimized_cwt=optimized_cwt,
        has_decoder=has_decoder,
        source=label,
        sha256=sha256,
        notes=notes,
    )


def saved_scalogram(source: str | Path, *, revision: str | None = None) -> bool | None:
    """``optimized_cwt`` of the config.json beside the weights; None where nothing says it.

    Raises:
        WeightsError: no such weights, or a config.json that is no JSON object.
    """
    path = _locate(str(source), revision)[0].parent / CONFIG_FILE
    value = _read_json(path).get("optimized_cwt") if path.is_file() else None
    return value if isinstance(value, bool) else None


def saved_config(source: str | Path, *, revision: str | None = None) -> tuple[NormWearConfig, str]:
    """The sizes that loading weights would take, and where those come from, in words.

    Of a file here the names and shapes are checked against them, as loading does; its values are mapped
    and not read. Of a hub id config.json alone is fetched.

    Raises:
        WeightsError: as `load_checkpoint`, but for the values.
    """
    if _is_hub_id(str(source)):
        folder = _snapshot(str(source), revision, [CONFIG_FILE])
        config, _, origin = _choose_config(folder / CONFIG_FILE, None)
        return config, origin
    weights, _ = _locate(str(source), revision)
    state_dict = read_state_dict(weights)
    config, _, origin = _choose_config(weights.parent / CONFIG_FILE, None)
    _check_forms(state_dict, config, None, str(source), origin)
    return config, origin


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a file, out of its container and without wrapper prefixes; nothing checked.

    Raises:
        WeightsError: missing, empty, cut short, holding code, or without a state dict in it.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise WeightsError(f"{path}: no such file")
        if path.stat().st_size == 0:
            raise WeightsError(f"{path}: is empty (0 bytes)")
        path.open("rb").close()  # whether it may be read
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({one_line(error)})") from None
    if path.suffix == ".safetensors":
        content: Any = read_safetensors(path)
    elif path.suffix in PICKLED:
        content = read_pickled(path)
    else:
        raise WeightsError(
            f"{path}: not a weights file by its name; "
            f"it must end in .safetensors, {', '.join(PICKLED[:-1])} or {PICKLED[-1]}"
        )
    for key in CONTAINERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path}: holds a {type(content).__name__}; it must hold a state dict")
    if not any(isinstance(value, Tensor) for value in content.values()):
        keys = ", ".join(map(str, list(content)[:8])) or "nothing"
        raise WeightsError(
            f"{path}: holds no state dict, only {keys}; "
            f"it must be bare or under {' or '.join(CONTAINERS)}"
        )
    state_dict: dict[str, Tensor] = {}
    for key, value in content.items():
        name = str(key)
        if not isinstance(value, Tensor):
            raise WeightsError(f"{path}: {name} is a {type(value).__name__}; it must be a tensor")
        while name.startswith(WRAPPERS):
            name = name.removeprefix(next(w for w in WRAPPERS if name.startswith(w)))
        if name in state_dict:
            raise WeightsError(
                f"{path}: two entries are named {name} once their prefixes are removed"
            )
        state_dict[name] = value.detach()
    return state_dict


@lru_cache(maxsize=8)
def expected_shapes(
    config: NormWearConfig, *, decoder: bool = True
) -> Mapping[str, tuple[int, ...]]:
    """Released name -> shape for these sizes, in the model's order; allocates no values."""
    outline = _Outline(config, decoder=decoder)
    return MappingProxyType({name: tuple(v.shape) for name, v in outline.state_dict().items()})


class _Outline(ReferenceNormWear):
    """The reference model left on the meta device: names and shapes without values."""

    def to_empty(
        self, *, device: torch.device | str | int | None, recurse: bool = True
    ) -> _Outline:
        return self

    def reset_parameters(self, seed: int | None = 0) -> None:
        return


def check_names(
    state_dict: Mapping[str, Tensor],
    config: NormWearConfig,
    decoder: bool | None = None,
    *,
    source: str = "state dict",
    origin: str = "as asked for",
) -> bool:
    """Checks every name, shape, kind and value against the sizes.

    BatchNorm's ``num_batches_tracked`` may be there or not; ``msitf_aggregator.*`` may be there and
    is checked for its values only.

    Args:
        state_dict: released names without wrapper prefixes, on any device.
        config: the sizes.
        decoder: True: the decoder must be there. False: it must not. None: all of it or nothing.
        source: what to call the weights in an error.
        origin: where the sizes come from, for the error.

    Returns:
        Whether the decoder is there.

    Raises:
        WeightsError: one line with every missing, unexpected, wrongly shaped and wrongly typed
            name; or the first name with a NaN or infinite value.
    """
    decoder = _check_forms(state_dict, config, decoder, source, origin)
    for name, value in state_dict.items():
        if value.numel() and not name.endswith(_COUNTER):
            low, high = torch.aminmax(value)  # NaN in either if there is one; no copy of the values
            if not (torch.isfinite(low) and torch.isfinite(high)):
                raise WeightsError(
                    f"{source}: {name} holds NaN or infinity; every value must be finite"
                )
    return decoder


def _check_forms(
    state_dict: Mapping[str, Tensor],
    config: NormWearConfig,
    decoder: bool | None,
    source: str,
    origin: str,
) -> bool:
    """`check_names` without the values."""
    expected = expected_shapes(config, decoder=True)
    encoder = expected_shapes(config, decoder=False)
    if decoder is None:
        decoder = any(
            name not in encoder and name in expected and not name.endswith(_COUNTER)
            for name in state_dict
        )
    wanted = expected if decoder else encoder
    present = {k: v for k, v in state_dict.items() if not k.startswith(FUSION_PREFIX)}
    lists = {
        "missing": [n for n in wanted if n not in present and not n.endswith(_COUNTER)],
        "unexpected": [n for n in present if n not in wanted and not _is_counter(n, expected)],
        "of the wrong shape": [
            f"{n} {tuple(v.shape)} instead of {expected[n]}"
            for n, v in present.items()
            if n in expected and tuple(v.shape) != expected[n]
        ],
        "of the wrong type": [
            f"{n} {_kind(v)}" for n, v in state_dict.items() if not _is_usable(n, v)
        ],
    }
    if any(lists.values()):
        sizes = ", ".join(f"{n} {getattr(config, n)}" for n in ("embed_dim", "depth"))
        if decoder:
            names = ("decoder_embed_dim", "decoder_depth")
            sizes += "".join(f", {n} {getattr(config, n)}" for n in names)
        found = "; ".join(f"{len(n)} {what}: {', '.join(n)}" for what, n in lists.items() if n)
        raise WeightNamesError(f"{source}: not weights of these sizes ({sizes}; {origin}): {found}")
    return decoder


def save_pretrained(
    folder: str | Path,
    state_dict: Mapping[str, Tensor],
    config: NormWearConfig,
    *,
    optimized_cwt: bool | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes ``model.safetensors`` and ``config.json``; what was there is replaced or left whole.

    Args:
        folder: made if needed.
        state_dict: released names, and ``msitf_aggregator.*`` if there are any; `load_checkpoint`
            gives values back bit for bit (float16 and bfloat16 as the equal float32). A FastNormWear
            made of them has float32 parameters: it rounds float64.
        config: the sizes the weights are for.
        optimized_cwt: which scalogram the weights are for; None if nobody knows.
        metadata: text to keep in config.json: where the weights come from, say.

    Raises:
        WeightsError: the state dict is not one of these sizes.
        OutputError: the folder cannot be written.
    """
    check_config(config)
    check_names(state_dict, config)
    values = {
        "architecture": ARCHITECTURE,
        "format_version": FORMAT_VERSION,
        **config.to_dict(),
        "optimized_cwt": optimized_cwt,
        "metadata": dict(metadata or {}),
    }
    text = json.dumps(values, indent=2) + "\n"
    write_described(Path(folder), WEIGHTS_FILE, state_dict, CONFIG_FILE, text, "weights")


def convert(
    source: str | Path,
    folder: str | Path,
    *,
    config: NormWearConfig | None = None,
    revision: str | None = None,
) -> ConversionReport:
    """Any checkpoint form to a folder of ours, checked; a fusion module goes along.

    Args:
        source, config, revision: as of :func:`load_checkpoint`.
        folder: of the new ``model.safetensors`` and ``config.json``.

    Raises:
        WeightsError: as :func:`load_checkpoint`.
        OutputError: as :func:`save_pretrained`.
    """
    checkpoint = load_checkpoint(source, config=config, revision=revision)
    state_dict = dict(checkpoint.state_dict)
    state_dict |= {FUSION_PREFIX + name: value for name, value in checkpoint.fusion.items()}
    on_disk = checkpoint.source == str(source)  # the user's folders are nobody else's business
    save_pretrained(
        folder,
        state_dict,
        checkpoint.config,
        optimized_cwt=checkpoint.optimized_cwt,
        metadata={
            "source": Path(checkpoint.source).name if on_disk else checkpoint.source,
            "source_sha256": checkpoint.sha256,
        },
    )
    return ConversionReport(
        names=len(state_dict),
        parameters=sum(v.numel() for n, v in state_dict.items() if not n.endswith(_BUFFERS)),
        decoder=checkpoint.has_decoder,
        fusion=bool(checkpoint.fusion),
        sha256=file_sha256(Path(folder) / WEIGHTS_FILE),
        notes=checkpoint.notes,
    )


def _is_hub_id(source: str) -> bool:
    """Whether a name that nothing on disk has is of the form of a Hugging Face id."""
    if os.path.exists(source):  # unlike Path.exists, False also for names no file could have
        return False
    suffixes = (".safetensors", *PICKLED)
    return _HUB_ID.fullmatch(source) is not None and Path(source).suffix not in suffixes


def _locate(source: str, revision: str | None) -> tuple[Path, str]:
    """The file that holds the weights, and what to call it."""
    path = Path(source)
    if _is_hub_id(source):
        return _download(source, revision)
    if not source or not os.path.exists(path):
        raise WeightsError(
            f"{source or repr(source)}: no such weights file or folder, "
            "and no Hugging Face id (owner/name) either"
        )
    if revision is not None:
        raise UsageError(f"{source}: is on disk; revision {revision} is for a Hugging Face id")
    if path.is_dir():
        return _weights_in(path), source
    return path, source


def _weights_in(folder: Path) -> Path:
    """The folder's model.safetensors, or the one checkpoint in it."""
    if (folder / WEIGHTS_FILE).exists():
        return folder / WEIGHTS_FILE
    try:
        found = sorted(
            path
            for path in folder.iterdir()
            if path.suffix in (".safetensors", *PICKLED) and not path.name.startswith(".")
        )
    except OSError as error:
        raise WeightsError(f"{folder}: cannot be read ({one_line(error)})") from None
    if len(found) == 1:
        return found[0]
    what = f"{len(found)} ({', '.join(path.name for path in found)})" if found else "none"
    raise WeightsError(
        f"{folder}: must hold {WEIGHTS_FILE} or exactly one checkpoint; it holds {what}"
    )


def _download(hub_id: str, revision: str | None) -> tuple[Path, str]:
    """The weights of a hub id in huggingface_hub's cache, fetched if they are not there yet."""
    from huggingface_hub.constants import HF_HUB_OFFLINE

    snapshot = _snapshot(hub_id, revision, [WEIGHTS_FILE, CONFIG_FILE])
    if not (snapshot / WEIGHTS_FILE).is_file():
        raise WeightsError(
            f"{hub_id}: no {WEIGHTS_FILE} in "
            f"{'the cache (HF_HUB_OFFLINE is set)' if HF_HUB_OFFLINE else 'this repository'}; fetch it "
            f"where there is a network with {_fetching(hub_id, revision)}, or give a weights file"
        )
    return snapshot / WEIGHTS_FILE, f"{hub_id}@{snapshot.name}"


def _snapshot(hub_id: str, revision: str | None, files: list[str]) -> Path:
    """The folder of these files of a hub id in huggingface_hub's cache; those it has are there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import HF_HUB_OFFLINE

    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=files))
    # Its errors differ between versions and HTTP libraries; all of them mean: not to be had.
    except Exception as error:
        if HF_HUB_OFFLINE:
            reason = "offline (HF_HUB_OFFLINE is set) and not in the cache"
        else:
            reason = f"not to be had from the hub and not in the cache ({first_line(error)})"
        raise WeightsError(
            f"{hub_id}: no such file or folder, and as a Hugging Face id {reason}; fetch it once where "
            f"there is a network with {_fetching(hub_id, revision)}, or give a weights file"
        ) from None


def _fetching(hub_id: str, revision: str | None) -> str:
    at = f" --revision {revision}" if revision else ""
    return f"`hf download {hub_id} {WEIGHTS_FILE} {CONFIG_FILE}{at}`"


def _choose_config(
    path: Path, given: NormWearConfig | None
) -> tuple[NormWearConfig, bool | None, str]:
    """The sizes, which scalogram, and where the sizes come from; the order is this file's text."""
    assumed = "as given" if given else "the released sizes: no config said others"
    if not path.is_file():
        return given or NormWearConfig(), None, assumed
    values = _read_json(path)
    optimized_cwt = values.get("optimized_cwt")
    if values.get("architecture") == ARCHITECTURE and "format_version" in values:
        if values["format_version"] != FORMAT_VERSION:
            raise WeightsError(
                f"{path}: format_version is {values['format_version']!r}; "
                f"this normwear-fast reads {FORMAT_VERSION}"
            )
        if optimized_cwt is not None and not isinstance(optimized_cwt, bool):
            raise WeightsError(
                f"{path}: optimized_cwt is {optimized_cwt!r}; it must be a bool or null"
            )
        ours = ("architecture", "format_version", "optimized_cwt", "metadata")
        config = _config_from({k: v for k, v in values.items() if k not in ours}, path)
        if given is not None and given != config:
            names = [field.name for field in dataclasses.fields(config)]
            differ = [
                f"{n} is {getattr(config, n)}, given {getattr(given, n)}"
                for n in names
                if getattr(config, n) != getattr(given, n)
            ]
            raise WeightsError(f"{path}: contradicts the given config: {'; '.join(differ)}")
        return config, optimized_cwt, f"from {path.name}"
    scalogram = optimized_cwt if isinstance(optimized_cwt, bool) else None
    if given is None and all(name in values for name in FOREIGN_NAMES[:3]):
        config = _config_from({k: values[k] for k in FOREIGN_NAMES if k in values}, path)
        return config, scalogram, f"from {path.name}"
    return given or NormWearConfig(), scalogram, assumed


def _read_json(path: Path) -> dict[str, Any]:
    values = read_json(path, WeightsError)
    if not isinstance(values, dict):
        raise WeightsError(f"{path}: holds a {type(values).__name__}; it must hold a JSON object")
    return values


def _config_from(values: dict[str, Any], path: Path) -> NormWearConfig:
    """A config from JSON values, each of the kind of its default."""
    for field in dataclasses.fields(NormWearConfig):
        if field.name not in values:
            continue
        value, default = values[field.name], field.default
        if isinstance(default, tuple):
            fits = isinstance(value, list) and len(value) == len(default)
            fits = fits and all(type(item) is int and item > 0 for item in value)
        elif isinstance(default, float):
            fits = type(value) in (int, float) and 0 < value < 1e6
        else:
            fits = type(value) is type(default)
        if not fits:
            raise WeightsError(f"{path}: {field.name} is {value!r}; it must be like {default!r}")
    try:
        config = NormWearConfig.from_dict(values, str(path))
        mother_wavelet(config.wavelet, np.linspace(-1, 1, 3))
    except UsageError as error:
        text = str(error)
        raise WeightsError(text if str(path) in text else f"{path}: {text}") from None
    return config


def _is_counter(name: str, expected: Mapping[str, tuple[int, ...]]) -> bool:
    return name in expected and name.endswith(_COUNTER)


def _is_usable(name: str, value: Tensor) -> bool:
    """Whether a plain dense tensor with values of the kind its name calls for."""
    if value.layout != torch.strided or value.is_meta or value.is_nested:
        return False
    return value.dtype == torch.int64 if name.endswith(_COUNTER) else value.dtype in _FLOATING


def _kind(value: Tensor) -> str:
    kind = str(value.dtype).removeprefix("torch.")
    if value.is_meta:
        return f"{kind} without values"
    if value.layout != torch.strided or value.is_nested:
        return f"{kind}, not dense"
    return kind


def _widen(state_dict: dict[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """float16 and bfloat16 as float32, which holds each of their values exactly."""
    found = {value.dtype for value in state_dict.values()}
    kinds = [str(dtype).removeprefix("torch.") for dtype in _WIDENED if dtype in found]
    if not kinds:
        return state_dict, ()
    wide = {n: v.float() if v.dtype in _WIDENED else v for n, v in state_dict.items()}
    return wide, (f"weights are {' and '.join(kinds)}; converted to float32 for use",)
