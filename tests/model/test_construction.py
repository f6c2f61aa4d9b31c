"""Making a model: what is said of random weights or a missing engine, and what is refused."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from tiny_model import TINY

from normwear_fast import FastNormWear, backends
from normwear_fast.errors import UsageError


def test_random_weights_say_so():
    fresh = FastNormWear(config=TINY, seed=12)
    assert "random (seed 12)" in repr(fresh)
    assert fresh.provenance()["weights"] == {"source": "random", "seed": 12}
    assert fresh.provenance()["scalogram"] == "scipy"
    assert not fresh.optimized_cwt


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"use_cwt": False}, "use_cwt"),
        ({"precision": "float17"}, "float17"),
        ({"backend": "abacus"}, "abacus"),
        ({"optimized_cwt": "weights.pth"}, "optimized_cwt is 'weights.pth'"),
        ({"weight_path": None}, "weight_path is None"),
        ({"config": {"depth": 2}}, "config is a dict"),
    ],
)
def test_constructor_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        FastNormWear(**{"config": TINY, **arguments})


def test_a_missing_native_engine_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> backends.Backend:
        raise UsageError("backend 'native' needs normwear_fast._C: it was not built")

    monkeypatch.setitem(backends.BACKENDS, "native", missing)
    backends._say_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="it was not built; plain PyTorch runs instead"):
        assert backends.select_backend("auto", torch.device("cpu")) is backends.TORCH
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backends.select_backend("auto", torch.device("cpu"))
