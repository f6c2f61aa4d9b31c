"""A small autoencoder, a short run of pretraining, and waves in memory for it."""

from __future__ import annotations

import numpy as np

from normwear_fast.config import NormWearConfig
from normwear_fast.pretrain.settings import PretrainSettings, RunSettings

TINY = NormWearConfig(
    embed_dim=32,
    depth=2,
    num_heads=1,
    decoder_embed_dim=16,
    decoder_depth=1,
    decoder_num_heads=2,
)
SETTINGS = PretrainSettings(
    steps=6, batch_size=2, accumulate=2, base_learning_rate=0.1, warmup=2, seed=5
)
CPU = RunSettings(accelerator="cpu", devices=1, checkpoint_every=0, picture_every=0, probe_every=0)


class Waves:
    """Series in memory with the shards' two methods."""

    def __init__(self, count=5):
        generator = np.random.default_rng(3)
        phase = generator.uniform(0, 6, (count, 3, 1))
        rate = generator.uniform(1, 9, (count, 3, 1))
        wave = np.sin(phase + rate * np.arange(390) / 65)
        self.values = (wave + 0.1 * generator.standard_normal(wave.shape)).astype(np.float32)

    def __len__(self):
        return len(self.values)

    def series(self, index):
        return self.values[index]
