"""Weights of a small model, its encoder alone, and a fusion module."""

from __future__ import annotations

import pytest
import torch
from weight_files import TINY, StateDict

from normwear_fast.reference import ReferenceNormWear
from normwear_fast.weights import expected_shapes


@pytest.fixture
def state() -> StateDict:
    """Encoder and decoder of TINY, every float entry different from every other."""
    values = ReferenceNormWear(TINY, seed=3).state_dict()
    generator = torch.Generator().manual_seed(4)
    return {
        name: torch.randn(v.shape, generator=generator) if v.is_floating_point() else v.clone()
        for name, v in values.items()
    }


@pytest.fixture
def encoder(state: StateDict) -> StateDict:
    return {name: state[name] for name in expected_shapes(TINY, decoder=False)}


@pytest.fixture
def fusion() -> StateDict:
    generator = torch.Generator().manual_seed(5)
    return {
        "msitf_aggregator.q.weight": torch.randn(4, 4, generator=generator),
        "msitf_aggregator.out_fc.LayerNorm.bias": torch.randn(4, generator=generator),
    }
