"""Zero-shot questions to recordings: text encoders, the MSiTF fusion module, and its training."""

from __future__ import annotations

from normwear_fast.zeroshot.classifier import ZeroShotClassifier
from normwear_fast.zeroshot.fusion import FusionTerms, MSiTF, score_options
from normwear_fast.zeroshot.text import (
    RELEASED_TEXT_ENCODER,
    LlamaTextEncoder,
    SentenceTransformerTextEncoder,
    TextEncoder,
    load_text_encoder,
)
from normwear_fast.zeroshot.training import TrainingSettings, train_fusion
from normwear_fast.zeroshot.wording import WORDING, TaskWording, load_wording

__all__ = [
    "RELEASED_TEXT_ENCODER",
    "WORDING",
    "FusionTerms",
    "LlamaTextEncoder",
    "MSiTF",
    "SentenceTransformerTextEncoder",
    "TaskWording",
    "TextEncoder",
    "TrainingSettings",
    "ZeroShotClassifier",
    "load_text_encoder",
    "load_wording",
    "score_options",
    "train_fusion",
]
