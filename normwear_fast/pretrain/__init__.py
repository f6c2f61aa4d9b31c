"""Pretraining: the masked autoencoder, its data and its trainer."""

from __future__ import annotations

from normwear_fast.pretrain.autoencoder import MaskedAutoencoder

__all__ = ["MaskedAutoencoder"]
