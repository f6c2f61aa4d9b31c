"""Llama and sentence encoders: vectors that do not depend on the batch, and folders refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from zeroshot_parts import WORDS

from normwear_fast.errors import InputError, WeightsError
from normwear_fast.zeroshot import (
    LlamaTextEncoder,
    SentenceTransformerTextEncoder,
    TextEncoder,
    load_text_encoder,
)

SENTENCES = [
    "is the heart rhythm normal ?",
    "yes",
    "a person walking",
    "no",
    "the person runs a a a",
]


def test_llama_vectors_do_not_depend_on_the_batch(tiny_llama: Path) -> None:
    text = load_text_encoder(tiny_llama)
    assert isinstance(text, LlamaTextEncoder)
    assert isinstance(text, TextEncoder)
    assert text.width == 24
    together = text.encode(SENTENCES * 5)  # more than one batch, mixed lengths
    assert together.shape == (25, 24)
    for sentence, vector in zip(SENTENCES * 5, together, strict=True):
        assert (text.encode([sentence])[0] - vector).abs().max() < 1e-6
    ids = torch.tensor([[1, *(3 + WORDS.index(w) for w in SENTENCES[0].split())]])
    hidden = text._model(input_ids=ids).last_hidden_state
    assert (hidden.mean(dim=1)[0] - together[0]).abs().max() < 1e-6


def test_llama_refuses_what_it_cannot_encode(tiny_llama: Path, tmp_path: Path) -> None:
    text = LlamaTextEncoder(tiny_llama)
    with pytest.raises(InputError, match=r"13 tokens; .* at most 12"):
        text.encode(["a " * 12])
    with pytest.raises(InputError, match="text 1 is ' '"):
        text.encode(["yes", " "])
    with pytest.raises(InputError, match="one string"):
        text.encode("yes")
    with pytest.raises(WeightsError, match=r"hf download nobody/none-such"):
        LlamaTextEncoder("nobody/none-such", offline=True)
    with pytest.raises(WeightsError, match=r"no config.json"):
        LlamaTextEncoder(tmp_path)


def test_sentence_encoder_pools_and_normalises_as_its_folder_says(
    sentences: SentenceTransformerTextEncoder,
) -> None:
    texts = ["A man is running.", "Someone jogs.", "The stock market fell sharply yesterday."]
    vectors = sentences.encode(texts)
    assert vectors.shape == (3, 384)
    assert (vectors.norm(dim=1) - 1).abs().max() < 1e-5
    alone = torch.cat([sentences.encode([text]) for text in texts])
    assert (alone - vectors).abs().max() < 1e-6
    alike, other = vectors[0] @ vectors[1], vectors[0] @ vectors[2]
    assert alike > 0.5 > 0.2 > other
    assert sentences.max_tokens == 256


@pytest.mark.slow
def test_sentence_encoder_is_the_packages(sentences: SentenceTransformerTextEncoder) -> None:
    package = pytest.importorskip("sentence_transformers")
    texts = ["A man is running.", "yes", "The stock market fell sharply yesterday. " * 10]
    expected = package.SentenceTransformer(sentences.name, device="cpu").encode(texts)
    assert np.abs(sentences.encode(texts).numpy() - expected).max() < 1e-6


def test_sentence_folder_with_other_modules_is_refused(tmp_path: Path) -> None:
    kinds = ["models.Transformer", "models.Pooling", "models.Dense"]
    modules = [
        {"idx": i, "path": "", "type": f"sentence_transformers.{k}"} for i, k in enumerate(kinds)
    ]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(WeightsError, match="Transformer, Pooling, Dense; read here"):
        load_text_encoder(tmp_path)
