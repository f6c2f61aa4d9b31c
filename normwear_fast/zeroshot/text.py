"""Text encoders: sentences to vectors, the same for a sentence whatever it is batched with."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional as F

from normwear_fast.errors import InputError, WeightsError, one_line, reading, within
from normwear_fast.files import fits, read_json
from normwear_fast.tensor_files import check_pickled_names

RELEASED_TEXT_ENCODER = "muzammil-eds/tinyllama-2.5T-Clinical-v2"
"""Hugging Face id of the text encoder the released fusion module was trained with, 2048 wide."""

BATCH_SIZE = 16
"""Sentences in one forward pass; questions and answers are short and few."""


LAYERS = 1000
"""No text model has so many; they would be made before their weights were missed."""


@runtime_checkable
class TextEncoder(Protocol):
    """What the zero-shot classes need of a text model; any object of this shape will do."""

    @property
    def name(self) -> str:
        """Recorded beside a trained fusion module, which works with this encoder only."""

    @property
    def width(self) -> int:
        """Q, the width of a vector."""

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Sentences to (n, Q) float32, order kept."""


class _TransformersEncoder:
    """A transformers model from an id or a folder; subclasses pool its last hidden state."""

    def __init__(self, source: str | Path, *, device: str | torch.device, offline: bool) -> None:
        self.name = str(source)
        self.device = torch.device(device)
        self._tokenizer, self._model = _load(str(source), offline)
        self._model.eval().requires_grad_(False).to(self.device)
        longest = getattr(self._model.config, "max_position_embeddings", None)
        self.max_tokens: int | None = longest if fits(longest, range(1, 2**31)) else None

    @property
    def width(self) -> int:
        return int(self._model.config.hidden_size)

    @torch.inference_mode()
    def encode(self, texts: Sequence[str]) -> Tensor:
        """Sentences to (n, Q) float32 on the encoder's device, order kept.

        Sentences are padded on the right and masked, so that a vector does not depend on its batch.

        Raises: InputError for an empty sentence or one longer than the model reads; WeightsError for a
            tokenizer that does not belong to the model.
        """
        texts = checked_texts(texts)
        with reading(f"text encoder {self.name}", WeightsError, "its tokenizer is damaged"):
            ids: list[list[int]] = self._tokenizer(texts)["input_ids"]
        known = self._model.get_input_embeddings().num_embeddings
        for text, tokens in zip(texts, ids, strict=True):
            if not tokens:
                raise InputError(f"text {text[:60]!r} has no token the text encoder knows")
            if max(tokens) >= known:
                raise WeightsError(
                    f"text encoder {self.name}: its tokenizer gives token {max(tokens)} and its model "
                    f"knows {known}; they must be of one model"
                )
            if self.max_tokens is not None and len(tokens) > self.max_tokens:
                raise InputError(
                    f"text {text[:60]!r} has {len(tokens)} tokens; {self.name} reads at most "
                    f"{self.max_tokens}"
                )
        # Sorted by length, a batch holds little padding.
        order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
        vectors: list[Tensor] = [torch.empty(0)] * len(ids)
        for start in range(0, len(order), BATCH_SIZE):
            batch = order[start : start + BATCH_SIZE]
            for index, vector in zip(batch, self._vectors([ids[i] for i in batch]), strict=True):
                vectors[index] = vector
        return torch.stack(vectors)

    def _vectors(self, ids: list[list[int]]) -> Tensor:
        longest = max(map(len, ids))
        # The pad value is never read behind the mask, so a tokenizer without one needs none.
        pad = self._tokenizer.pad_token_id or 0
        tokens = torch.tensor([row + [pad] * (longest - len(row)) for row in ids])
        lengths = torch.tensor([len(row) for row in ids])
        mask = torch.arange(longest) < lengths.unsqueeze(1)
        tokens, mask = tokens.to(self.device), mask.to(self.device)
        out = self._model(input_ids=tokens, attention_mask=mask.long())
        return self._pool(out.last_hidden_state.float(), mask)

    def _pool(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """(n, tokens, Q) and (n, tokens) to (n, Q)."""
        return masked_mean(hidden, mask)


def masked_mean(hidden: Tensor, mask: Tensor) -> Tensor:
    """Mean over the tokens the mask keeps: (n, tokens, Q), (n, tokens) -> (n, Q)."""
    kept = hidden.masked_fill(~mask.unsqueeze(-1), 0)
    return kept.sum(dim=1) / mask.sum(dim=1, keepdim=True)


class LlamaTextEncoder(_TransformersEncoder):
    """The released way: a language model's last hidden state, mean over the attention mask.

    Args:
        source: Hugging Face id, or a folder with ``config.json``, tokenizer and weights.
        device: where the model runs.
        offline: use what is on this machine only, never the network.
    Raises: WeightsError that says how to get a model that is not there.
    Source: Luo et al. 2026 (arXiv 2412.09758), zero-shot inference.
    """

    def __init__(
        self,
        source: str | Path = RELEASED_TEXT_ENCODER,
        *,
        device: str | torch.device = "cpu",
        offline: bool = False,
    ) -> None:
        super().__init__(source, device=device, offline=offline)


class SentenceTransformerTextEncoder(_TransformersEncoder):
    """A sentence-transformers folder: a transformer, mean or first-token pooling, unit length.

    Read straight from the folder's ``modules.json``, so that a vector does not depend on whether or
    in which version the sentence-transformers package is installed.

    Args:
        folder: holds ``modules.json``.
        device: where the model runs.
    Raises: WeightsError for a folder with other modules, naming them.
    """

    def __init__(self, folder: str | Path, *, device: str | torch.device = "cpu") -> None:
        folder = Path(folder)
        modules = read_json(folder / "modules.json", WeightsError)
        if not fits(modules, [{"type": str, "path": str}]):
            raise WeightsError(
                f"{folder}/modules.json: no list of modules, each with type and path"
            )
        kinds = [module["type"].rsplit(".", 1)[-1] for module in modules]
        if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
            raise WeightsError(
                f"{folder}: modules {', '.join(kinds)}; read here are Transformer, Pooling and "
                "optionally Normalize"
            )
        for module in modules[:2]:
            if not os.path.isdir(folder / module["path"]):  # False, too, for what no name can be
                raise WeightsError(
                    f"{folder}/modules.json: names {module['path']!r}, which is no folder there"
                )
        super().__init__(folder / modules[0]["path"], device=device, offline=True)
        self.name = str(folder)
        self.normalize = "Normalize" in kinds
        with within(f"{folder}/modules.json"):  # which may name another one
            self.pooling = _pooling(folder / modules[1]["path"] / "config.json")
        settings = folder / modules[0]["path"] / "sentence_bert_config.json"
        if settings.exists():
            values = read_json(settings, WeightsError)
            if not fits(values, {"max_seq_length": (range(1, 2**31), None)}):
                raise WeightsError(
                    f"{settings}: max_seq_length must be a number of tokens, or null"
                )
            self.max_tokens = values["max_seq_length"] or self.max_tokens

    def _pool(self, hidden: Tensor, mask: Tensor) -> Tensor:
        pooled = hidden[:, 0] if self.pooling == "cls" else masked_mean(hidden, mask)
        return F.normalize(pooled, dim=1) if self.normalize else pooled


def load_text_encoder(
    source: str | Path = RELEASED_TEXT_ENCODER,
    *,
    device: str | torch.device = "cpu",
    offline: bool = False,
) -> TextEncoder:
    """The encoder a source holds: sentence-transformers for a folder with ``modules.json``, else
    the released way of pooling."""
    if os.path.isfile(Path(source) / "modules.json"):
        return SentenceTransformerTextEncoder(source, device=device)
    return LlamaTextEncoder(source, device=device, offline=offline)


def checked_texts(texts: Sequence[str]) -> list[str]:
    """A list of sentences; an InputError for what is none."""
    if isinstance(texts, str):
        raise InputError("texts is one string; pass a list of strings")
    for index, text in enumerate(texts):
        # Half a character, as a damaged \\u escape leaves it, is no text to a tokenizer.
        if not isinstance(text, str) or not text.strip() or not _encodes(text):
            raise InputError(f"text {index} is {text!r}; it must be a sentence")
    if not texts:
        raise InputError("no text to encode")
    return list(texts)


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _load(source: str, offline: bool) -> tuple[Any, Any]:
    try:
        from transformers import AutoConfig, AutoModel, AutoTokenizer
    except ImportError as error:
        raise WeightsError(
            f"text encoder {source}: the transformers package is missing; install "
            "normwear-fast[zeroshot]"
        ) from error
    if os.path.isdir(source):
        if not (Path(source) / "config.json").is_file():
            raise WeightsError(
                f"text encoder {source}: no config.json in this folder; it must hold a model as "
                "`hf download` or save_pretrained leaves it"
            )
        offline = True
    options: dict[str, Any] = {"local_files_only": offline, "trust_remote_code": False}
    try:
        for path in Path(source).glob("*.bin"):
            check_pickled_names(path)
        with _quiet():
            tokenizer = AutoTokenizer.from_pretrained(source, **options)
            # Safetensors or, where a repository has only those, .bin files read with weights_only.
            config = AutoConfig.from_pretrained(source, **options)
            layers = getattr(config, "num_hidden_layers", None)
            if not fits(layers, (range(LAYERS), None)):
                raise ValueError(f"its config has {layers} layers")
            model, found = AutoModel.from_pretrained(
                source, config=config, dtype=torch.float32, output_loading_info=True, **options
            )
            model(input_ids=torch.zeros(1, 1, dtype=torch.long))  # sizes that do not go together
        # What no file holds is drawn at random. Of a pooler's output nothing is asked.
        missing = sorted(n for n in found["missing_keys"] if not n.startswith("pooler."))
        if missing:
            raise ValueError(f"{len(missing)} weights are in no file, {missing[0]} among them")
    except Exception as error:  # damaged files fail in every way; tokenizers' errors have no class
        reason = one_line(error)
        advice = (
            "check its files"
            if os.path.isdir(source)
            else f"run `hf download {source}` where there is a network, or name a folder that "
            "holds the model"
        )
        raise WeightsError(
            f"text encoder {source} cannot be loaded ({reason}); {advice}"
        ) from error
    return tokenizer, model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' own progress bar, which would land in the output of a command."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _pooling(path: Path) -> str:
    config = read_json(path, WeightsError)
    if not isinstance(config, dict):
        raise WeightsError(f"{path}: holds a {type(config).__name__}; it must hold a JSON object")
    on = [name for name, value in config.items() if name.startswith("pooling_mode_") and value]
    modes = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
    found = [modes.get(name, name) for name in on] or [str(config.get("pooling_mode"))]
    if found not in (["mean"], ["cls"]):
        raise WeightsError(f"{path}: pooling {', '.join(found)}; read here are mean and cls")
    return found[0]
