"""The loop: frozen encoders, steps in parts, early stopping, Ctrl-C, bad numbers, class weights."""

from __future__ import annotations

import math
import signal
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pulse_windows import CLASSES, CONFIG, CPU, RATE, encoder, labelled, pulses

from normwear_fast.errors import NormWearError
from normwear_fast.evaluate.registry import Task
from normwear_fast.finetune import FineTuner, FineTuneSettings, LabelledWindows
from normwear_fast.finetune import training as training_module
from normwear_fast.finetune.network import (
    FineTuneNetwork,
    Head,
    parameter_groups,
    require_gradients,
)
from normwear_fast.finetune.split import Split, split_windows
from normwear_fast.finetune.training import Examples, Stage


def stage(
    data: LabelledWindows,
    module: Any,
    head: Head,
    inputs: Sequence[NDArray[np.float32]],
    **other: Any,
) -> Stage:
    groups = other.pop("groups", None) or [
        {"params": list(head.linear.parameters()), "lr": 1e-2, "weight_decay": 0.05}
    ]
    targets = other.pop("targets", torch.from_numpy(data.labels))
    fabric = training_module._fabric(CPU)
    examples = Examples(inputs, [1] * len(inputs), other.pop("budget", 1000), CPU)
    return Stage("head", fabric, module, head, groups, examples, targets, torch.ones(len(data)))


def test_a_head_on_embeddings_made_once_trains_as_one_on_the_frozen_encoder() -> None:
    data, model = labelled(), encoder()
    settings = FineTuneSettings(batch_size=8)
    split = split_windows(data, 0.25, 0)
    embeddings = model.encode(data.windows, 65.0, channels="concat")
    model.requires_grad_(False)
    heads, histories = [], []
    for slow in (False, True):
        head = Head(2 * CONFIG.embed_dim, CLASSES)
        head.standardise(torch.from_numpy(embeddings[split.train]))
        module = FineTuneNetwork(model, head, "mean", "concat") if slow else head
        inputs = data.windows if slow else list(embeddings)
        histories.append(stage(data, module, head, inputs).fit(data, split, 3, settings, print))
        heads.append(head)
    for fast, slow_row in zip(*histories, strict=True):
        assert fast["validation_loss"] == pytest.approx(slow_row["validation_loss"], rel=1e-4)
    torch.testing.assert_close(heads[0].linear.weight, heads[1].linear.weight, rtol=0, atol=1e-4)
    assert histories[0][-1]["validation_loss"] < histories[0][0]["validation_loss"]


def test_a_step_in_parts_is_the_step_at_once() -> None:
    """Also where windows differ in length and so can never be one tensor."""
    windows, labels, _, who = pulses(4, 2)
    windows = [window[:, : 100 + 10 * (i % 3)] for i, window in enumerate(windows)]
    data = LabelledWindows.from_arrays(windows, labels, RATE, subjects=who)
    assert data.preparation.window is None
    found = []
    for budget in (1, 3, 1000):
        model = encoder()
        require_gradients(model, "full", lora_rank=1, seed=0)
        head = Head(2 * CONFIG.embed_dim, CLASSES)
        network = FineTuneNetwork(model, head, "cls", "concat")
        groups = parameter_groups(network, 1e-3, 0.05, 0.75)
        one = stage(data, network, head, data.windows, groups=groups, budget=budget)
        with torch.no_grad():
            outputs = torch.cat([network(torch.from_numpy(w)[None]) for w in data.windows])
            wanted = torch.nn.functional.cross_entropy(outputs, one.targets)
        loss = one.step(np.arange(len(data)))
        assert loss == pytest.approx(wanted.item(), rel=1e-5)
        gradients = [p.grad for p in one.parameters]
        found.append((loss, [g.clone() for g in gradients if g is not None]))
        assert len(found[-1][1]) == len(one.parameters)
    for loss, gradients in found[:-1]:
        assert loss == pytest.approx(found[-1][0], rel=1e-5)
        for gradient, whole in zip(gradients, found[-1][1], strict=True):
            assert (gradient - whole).abs().max() <= 1e-5 * max(1e-2, float(whole.abs().max()))


def test_training_ends_when_validation_stops_falling_and_keeps_its_best() -> None:
    """Validation labels turned round: every step makes it worse, so the start is the best."""
    data = labelled()
    split = split_windows(data, 0.25, 0)
    data.labels[split.validation] = 1 - data.labels[split.validation]
    embeddings = encoder().encode(data.windows, 65.0, channels="concat")
    head = Head(2 * CONFIG.embed_dim, CLASSES)
    head.standardise(torch.from_numpy(embeddings[split.train]))
    start = head.linear.weight.detach().clone()
    settings = FineTuneSettings(patience=3, batch_size=8)
    rows = stage(data, head, head, list(embeddings)).fit(data, split, 50, settings, print)
    assert [row["epoch"] for row in rows] == [0, 1, 2, 3]
    assert rows[-1]["loss"] < rows[1]["loss"]
    assert torch.equal(head.linear.weight, start)


def test_ctrl_c_ends_training_with_the_best_so_far(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    taken: list[int] = []
    step = Stage.step

    def interrupted(self: Stage, index: NDArray[np.intp]) -> float:
        taken.append(len(index))
        if len(taken) == 5:
            signal.raise_signal(signal.SIGINT)
        return step(self, index)

    monkeypatch.setattr(Stage, "step", interrupted)
    before = signal.getsignal(signal.SIGINT)
    tuner = FineTuner(encoder(), FineTuneSettings(batch_size=6, validation=0.25))
    found = tuner.fit(labelled())
    assert len(taken) == 5  # 3 in the first epoch, 2 of the second
    assert tuner.interrupted
    assert found.description["training"]["interrupted"]
    assert found.history[-1]["epoch"] == found.description["training"]["epochs_run"] == 2
    assert found.description["metrics"]["validation"]
    assert signal.getsignal(signal.SIGINT) is before
    assert "best so far" in capfd.readouterr().err


def test_what_is_not_finite_changes_no_weight_and_is_counted() -> None:
    data = labelled()
    split = split_windows(data, 0.25, 0)
    task = Task("t", "vital signs", targets=("x",))
    data.task, data.labels = task, np.ones((len(data), 1))
    targets = torch.zeros(len(data), 1)
    targets[split.train[0]] = math.nan
    embeddings = encoder().encode(data.windows, 65.0, channels="concat")
    head = Head(2 * CONFIG.embed_dim, task)
    one = stage(data, head, head, list(embeddings), targets=targets)
    before = head.linear.weight.detach().clone()
    assert math.isnan(one.step(split.train[:4]))
    assert torch.equal(head.linear.weight, before)
    rows = one.fit(data, split, 2, FineTuneSettings(batch_size=4), print)
    assert [row["skipped_steps"] for row in rows] == [0, 1, 1]
    assert torch.isfinite(head.linear.weight).all()
    targets[:] = math.nan
    with pytest.raises(NormWearError, match="lower the learning rate"):
        one.fit(data, split, 2, FineTuneSettings(), print)


def test_balanced_weights_make_classes_equal() -> None:
    data = labelled()
    split = Split(np.arange(0, 9), np.arange(9, 24), np.arange(0))
    weights = training_module._sample_weights(data, split, balanced=True).numpy()[:9]
    slow = data.labels[:9] == data.task.classes.index("slow")
    assert slow.sum() == 6
    assert weights[slow].sum() == pytest.approx(weights[~slow].sum())
    assert weights.sum() == pytest.approx(9)
