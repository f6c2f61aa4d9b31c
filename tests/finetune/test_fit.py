"""`fit` and `predict` of arrays: repeatable, each fit its own, dtypes, labels, targets and scores."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pulse_windows import CLASSES, RATE, encoder, labelled, pulses

from normwear_fast.errors import InputError, UsageError
from normwear_fast.evaluate.registry import Task
from normwear_fast.finetune import FineTuner, FineTuneSettings, LabelledWindows, Predictor
from normwear_fast.finetune.network import encoder_parameters
from normwear_fast.finetune.training import scores


@pytest.mark.parametrize("mode", ["head", "full", "lora"])
def test_the_same_seed_gives_the_same_bits_and_new_people_are_told_apart(
    mode: Any, tmp_path: Path
) -> None:
    data = labelled()
    settings = FineTuneSettings(
        mode=mode, epochs=2 if mode != "head" else 30, batch_size=6, seed=3, validation=0.25
    )
    model = encoder()
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    first, second = (FineTuner(model, settings, precision="float32").fit(data) for _ in range(2))
    for name, value in model.state_dict().items():
        assert torch.equal(value, kept[name])  # the caller's model is left alone
    for left, right in ((first.encoder, second.encoder), (first.head, second.head)):
        others = right.state_dict()
        for name, value in left.state_dict().items():
            assert torch.equal(value, others[name])
    changed = [
        name
        for name in encoder_parameters(first.encoder)
        if not torch.equal(first.encoder.state_dict()[name], kept[name])
    ]
    assert bool(changed) == (mode != "head")
    assert first.description["metrics"]["validation"]["accuracy"] > 0.8
    rows = [row for row in first.history if row["stage"] == mode]
    best = min(row["validation_loss"] for row in rows)
    held = first.held_out["validation"]
    chosen = np.array([row[int(label)] for _, _, label, row in held])
    assert -np.log(chosen).mean() == pytest.approx(best, rel=1e-3, abs=1e-5)
    # What is saved predicts the same, to the bit.
    first.save_pretrained(tmp_path / "model")
    again = Predictor.from_pretrained(tmp_path / "model", precision="float32")
    windows = pulses()[0]
    np.testing.assert_array_equal(
        again.predict(windows, RATE).values, first.predict(windows, RATE).values
    )


def test_every_fit_begins_with_the_weights_given_and_owns_its_own() -> None:
    """Folds of a cross-validation: one trainer, fitted again and again."""
    windows, labels, _, _ = pulses()
    settings = FineTuneSettings(mode="full", epochs=2, batch_size=6, learning_rate=1e-3)
    other = LabelledWindows.from_arrays(
        [-window for window in windows], labels[1:] + labels[:1], RATE
    )
    tuner = FineTuner(encoder(), settings, device="cpu", precision="float32")
    first = tuner.fit(labelled())
    before = first.predict(windows, RATE).values
    weights = {name: value.clone() for name, value in first.encoder.state_dict().items()}
    second = tuner.fit(other)
    assert first.encoder is not second.encoder
    for name, value in first.encoder.state_dict().items():
        assert torch.equal(value, weights[name])
    np.testing.assert_array_equal(first.predict(windows, RATE).values, before)
    fresh = FineTuner(encoder(), settings, device="cpu", precision="float32").fit(other)
    for name, value in second.encoder.state_dict().items():
        assert torch.equal(value, fresh.encoder.state_dict()[name])
    assert second.description == fresh.description  # nor is anything noted twice
    assert other.notes == []


@pytest.mark.parametrize("mode", ["head", "full", "lora"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_weights_of_another_dtype_train_in_float32(
    mode: Any, dtype: torch.dtype, tmp_path: Path
) -> None:
    settings = FineTuneSettings(mode=mode, epochs=1, batch_size=8)
    tuner = FineTuner(encoder().to(dtype), settings, device="cpu", precision="float32")
    found = tuner.fit(labelled())
    assert found.encoder.cls_token.dtype == (dtype if mode == "head" else torch.float32)
    found.save_pretrained(tmp_path / "model")
    windows = pulses()[0]
    again = Predictor.from_pretrained(tmp_path / "model", precision="float32")
    np.testing.assert_allclose(
        again.predict(windows, RATE).values, found.predict(windows, RATE).values, atol=2e-3
    )


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_a_frozen_model_trains_a_head_alone(mode: Any) -> None:
    frozen = encoder().freeze()
    with pytest.raises(UsageError, match=f"frozen for encoding; mode '{mode}' trains its weights"):
        FineTuner(frozen, FineTuneSettings(mode=mode), device="cpu")
    found = FineTuner(frozen, FineTuneSettings(epochs=2), device="cpu").fit(labelled())
    assert np.isfinite(found.predict(pulses()[0], RATE).values).all()


@pytest.mark.parametrize("mode", ["head", "full", "lora"])
@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
def test_fit_trains_where_gradients_are_off(mode: Any, without: Any) -> None:
    settings = FineTuneSettings(mode=mode, epochs=1, batch_size=8)
    wanted = FineTuner(encoder(), settings, device="cpu", precision="float32").fit(labelled())
    with without():
        tuner = FineTuner(encoder(), settings, device="cpu", precision="float32")
        found = tuner.fit(labelled())
    for name, value in found.encoder.state_dict().items():
        assert torch.equal(value, wanted.encoder.state_dict()[name])
        assert not value.is_inference()


@pytest.mark.parametrize(
    ("labels", "kind"),
    [
        (torch.arange(24) % 2, "class"),
        (torch.arange(24) % 2 == 0, "class"),
        (torch.linspace(0, 1, 24, requires_grad=True), "reg"),
        (torch.rand(24, 3, generator=torch.Generator().manual_seed(0)).bfloat16(), "reg"),
    ],
)
def test_labels_may_be_a_tensor(labels: torch.Tensor, kind: str) -> None:
    windows, _, _, who = pulses()
    found = LabelledWindows.from_arrays(windows, labels, RATE, subjects=who)
    wanted = LabelledWindows.from_arrays(windows, labels.tolist(), RATE, subjects=who)
    assert found.task == wanted.task
    assert found.task.kind == kind
    np.testing.assert_array_equal(found.labels, wanted.labels)
    with pytest.raises(InputError, match="one a window"):
        LabelledWindows.from_arrays(windows, torch.tensor(1), RATE)


def test_epochs_of_mne_have_their_own_rate() -> None:
    mne = pytest.importorskip("mne")
    windows, labels, _, who = pulses()
    info = mne.create_info(2, RATE, "eeg")
    epochs = mne.EpochsArray(np.stack(windows), info, verbose="ERROR")
    data = LabelledWindows.from_arrays(epochs, labels, subjects=who)
    wanted = labelled()
    assert data.preparation == wanted.preparation
    np.testing.assert_array_equal(data.windows[3], wanted.windows[3])
    found = FineTuner(encoder(), FineTuneSettings(epochs=2), device="cpu").fit(data)
    np.testing.assert_array_equal(found.predict(epochs).values, found.predict(windows, RATE).values)


def test_targets_are_learned_in_their_own_unit() -> None:
    windows, _, rates, who = pulses(10, 4)
    beats = [[60 * rate, 1000 / rate] for rate in rates]
    data = LabelledWindows.from_arrays(windows, beats, RATE, subjects=who)
    assert data.task.kind == "reg"
    found = FineTuner(encoder(), FineTuneSettings(validation=0.3)).fit(data)
    scored = found.description["metrics"]["validation"]
    assert scored["r2"] > 0.5
    assert scored["relative_accuracy"] > 0.9
    prediction = found.predict(windows[:4], RATE)
    assert prediction.predicted == [None] * 4
    assert 30 < prediction.values[:, 0].mean() < 120
    assert 300 < prediction.values[:, 1].mean() < 2000


def test_scores_that_have_no_meaning_are_left_out() -> None:
    one = scores(CLASSES, np.array([1, 1]), np.array([[0.2, 0.8], [0.6, 0.4]]))
    assert one == {"accuracy": 0.5}
    task = Task("t", "vital signs", targets=("x",))
    found = scores(task, np.array([[0.0], [2.0]]), np.array([[1.0], [2.0]]))
    assert found == {
        "mean_absolute_error": 0.5,
        "root_mean_squared_error": math.sqrt(0.5),
        "r2": 0.5,
    }
