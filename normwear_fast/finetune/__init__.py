"""Fine-tuning: a head on NormWear's embeddings, and the encoder with it; and predicting with the result.

    labelled windows -> embeddings, once -> head -> (encoder and head) -> folder -> predictions

`FineTuner(weights, settings).fit(data)` gives a `Predictor`, which writes and reads the folder.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from normwear_fast.finetune.data import LabelledWindows, Preparation
    from normwear_fast.finetune.labels import read_labelled, read_labels
    from normwear_fast.finetune.predictor import Prediction, Predictor
    from normwear_fast.finetune.settings import FineTuneSettings
    from normwear_fast.finetune.training import FineTuner

_WHERE = {
    "FineTuneSettings": "settings",
    "FineTuner": "training",
    "LabelledWindows": "data",
    "Prediction": "predictor",
    "Predictor": "predictor",
    "Preparation": "data",
    "read_labelled": "labels",
    "read_labels": "labels",
}

__all__ = [
    "FineTuneSettings",
    "FineTuner",
    "LabelledWindows",
    "Prediction",
    "Predictor",
    "Preparation",
    "read_labelled",
    "read_labels",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
