"""The example weights: what they are, that everything loads them, and that they know something."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from normwear_fast import FastNormWear, scalogram
from normwear_fast.preprocess import prepare_window
from normwear_fast.pretrain import MaskedAutoencoder
from normwear_fast.pretrain.masking import draw_noise
from normwear_fast.reference import ReferenceNormWear
from normwear_fast.weights import load_checkpoint

ROOT = Path(__file__).parent.parent
WEIGHTS = ROOT / "examples" / "weights" / "tiny"
SEED = 7


@pytest.fixture(scope="module")
def trained() -> FastNormWear:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*bfloat16; converted to float32")
        return FastNormWear.from_pretrained(WEIGHTS, precision="float32")


def test_small_bfloat16_and_of_the_released_layout() -> None:
    path = WEIGHTS / "model.safetensors"
    assert path.stat().st_size <= 8_000_000
    with pytest.warns(UserWarning, match="weights are bfloat16; converted to float32"):
        checkpoint = load_checkpoint(WEIGHTS)
    assert checkpoint.has_decoder
    assert checkpoint.optimized_cwt is True
    assert checkpoint.config.head_dim == 64  # what the GPU kernels take
    expected = ReferenceNormWear(checkpoint.config).state_dict()
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == set(expected)
        total = 0
        for name, value in expected.items():
            stored = file.get_tensor(name)
            assert stored.shape == value.shape, name
            assert stored.dtype == (torch.bfloat16 if value.is_floating_point() else torch.int64), (
                name
            )
            total += stored.numel()
    assert total <= 4_000_000
    assert (
        "not the published model"
        in json.loads((WEIGHTS / "config.json").read_text())["metadata"]["source"]
    )


def ecg(rng: np.random.Generator, heart_rate: float) -> NDArray[np.float64]:
    """(1, 750) at 125 Hz: beats of five Gaussian waves, irregular, wandering and noisy.

    Not the simulator the weights were trained on.
    """
    time = np.arange(750) / 125
    signal = 0.3 * np.sin(2 * np.pi * (0.3 * time + rng.random())) * rng.random()
    beat = rng.uniform(-1, 0)
    scale = rng.uniform(0.8, 1.2, 5)
    while beat < 7:
        for delay, height, width in (
            (-0.2, 0.15, 0.025),
            (-0.03, -0.12, 0.01),
            (0.0, 1.0, 0.012),
            (0.03, -0.25, 0.01),
            (0.25, 0.3, 0.05),
        ):
            at = beat + delay
            signal += height * scale[0] * np.exp(-0.5 * ((time - at) / (width * scale[1])) ** 2)
        beat += 60 / heart_rate * rng.normal(1, 0.05)
    return (signal + rng.normal(0, 0.2, 750))[None]


def test_heart_rate_is_found_better_than_with_random_weights(trained: FastNormWear) -> None:
    ranges = ((50, 75), (75, 100), (100, 130))
    windows, labels = [], np.arange(120) % 3
    for place, label in enumerate(labels):
        rng = np.random.default_rng((SEED, place))
        raw = ecg(rng, rng.uniform(*ranges[label]))
        data = prepare_window([(x, 125.0, 0.0) for x in raw], 390, preprocess="reference").data
        windows.append(data)

    def scores(model: FastNormWear) -> list[float]:
        features = model.encode(
            np.stack(windows), pool="mean", channels="concat", show_progress_bar=False
        )
        found = []
        for seed in range(5):
            train = np.random.default_rng(seed).permutation(120) < 60
            probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
            probe.fit(features[train], labels[train])
            found.append(float(probe.score(features[~train], labels[~train])))
        return found

    random = FastNormWear(True, config=trained.config, seed=0, precision="float32")
    ours, theirs = np.mean(scores(trained)), np.mean(scores(random))
    assert theirs < 0.85
    assert ours > theirs + 0.04


def test_a_held_out_signal_is_reconstructed(trained: FastNormWear) -> None:
    model = MaskedAutoencoder(trained.config)
    model.load_state_dict(trained.state_dict())
    model.eval()
    rng = np.random.default_rng(SEED)
    raw = np.concatenate([ecg(rng, 70) for _ in range(8)])
    data = prepare_window([(x, 125.0, 0.0) for x in raw], 390, preprocess="reference").data
    assert data is not None
    x = torch.from_numpy(data[:, 1:389]).unflatten(0, (2, 4))
    noise = draw_noise(model.config, "structured", 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        loss, _, _ = model(scalogram(x, "conv"), x, mask="structured", noise=noise)
    assert float(loss) < 0.9 * float((x - x.mean(2, keepdim=True)).square().mean())
