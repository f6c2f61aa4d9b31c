"""Pretraining: the masked autoencoder, its data and its trainer."""

from __future__ import annotations

from normwear_fast.pretrain.autoencoder import MaskedAutoencoder
from normwear_fast.pretrain.data import SeriesShards
from normwear_fast.pretrain.settings import PretrainReport, PretrainSettings, RunSettings
from normwear_fast.pretrain.trainer import pretrain

__all__ = [
    "MaskedAutoencoder",
    "PretrainReport",
    "PretrainSettings",
    "RunSettings",
    "SeriesShards",
    "pretrain",
]
