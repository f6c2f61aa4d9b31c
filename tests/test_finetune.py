"""Fine-tuning: the same numbers fast and slow, who trains and who validates, folder, predictions."""

from __future__ import annotations

import csv
import json
import math
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from helpers import full_disk
from numpy.typing import NDArray

from normwear_fast.cli.main import main
from normwear_fast.config import NormWearConfig
from normwear_fast.encode import load_embeddings
from normwear_fast.errors import InputError, NormWearError, OutputError, UsageError, WeightsError
from normwear_fast.evaluate.registry import Task
from normwear_fast.finetune import (
    FineTuner,
    FineTuneSettings,
    LabelledWindows,
    Predictor,
    read_labels,
)
from normwear_fast.finetune import predictor as predictor_module
from normwear_fast.finetune import training as training_module
from normwear_fast.finetune.data import Split, split_windows
from normwear_fast.finetune.network import (
    FineTuneNetwork,
    Head,
    encoder_parameters,
    merge_lora,
    parameter_groups,
    require_gradients,
)
from normwear_fast.finetune.training import Examples, Stage, scores
from normwear_fast.model import FastNormWear

CONFIG = NormWearConfig(
    embed_dim=64, depth=3, num_heads=1, decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=4
)
CLASSES = Task("rate", "state recognition", classes=("fast", "slow"))
CPU = torch.device("cpu")
RATE = 64.0


def encoder(**arguments: Any) -> FastNormWear:
    return FastNormWear(True, config=CONFIG, precision="float32", **arguments)


def pulse(frequency: float, seconds: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """(2, L): a pulse train and a wave of that rate with a phase of its own, in noise."""
    t = np.arange(round(seconds * RATE)) / RATE + rng.random()
    clean = np.stack([np.sin(np.pi * frequency * t) ** 30, np.sin(2 * np.pi * frequency * t)])
    return clean + 0.1 * rng.standard_normal(clean.shape)


def pulses(
    subjects: int = 8, each: int = 3, seconds: float = 2.0
) -> tuple[list[NDArray[np.float64]], list[str], list[float], list[str]]:
    """Windows, classes, rates in Hz and subjects: odd subjects are fast."""
    rng = np.random.default_rng(7)
    windows, labels, rates, who = [], [], [], []
    for subject in range(subjects):
        for _ in range(each):
            rate = rng.uniform(0.8, 1.1) if subject % 2 == 0 else rng.uniform(2.2, 3.0)
            windows.append(pulse(rate, seconds, rng))
            labels.append("slow" if subject % 2 == 0 else "fast")
            rates.append(rate)
            who.append(f"s{subject}")
    return windows, labels, rates, who


def labelled(**arguments: Any) -> LabelledWindows:
    windows, labels, _, who = pulses()
    return LabelledWindows.from_arrays(windows, labels, RATE, subjects=who, **arguments)


# --- the network -----------------------------------------------------------------------------------


@pytest.mark.parametrize("optimized_cwt", [True, False])
@pytest.mark.parametrize("pool", ["mean", "cls"])
@pytest.mark.parametrize("channel_pool", ["concat", "mean"])
def test_the_differentiable_features_are_those_of_encode(
    pool: str, channel_pool: str, optimized_cwt: bool
) -> None:
    """At the length of pretraining's grid and at another, whose positions are resized."""
    model = FastNormWear(optimized_cwt, config=CONFIG, precision="float32")
    head = Head(CONFIG.embed_dim * (3 if channel_pool == "concat" else 1), CLASSES)
    network = FineTuneNetwork(model, head, pool, channel_pool)  # type: ignore[arg-type]
    for samples in (130, 391):
        x = torch.randn(2, 3, samples, generator=torch.Generator().manual_seed(samples))
        fast = model.encode(x, 65.0, pool=pool, channels=channel_pool)  # type: ignore[arg-type]
        with torch.no_grad():
            slow = network.features(x)
        torch.testing.assert_close(torch.from_numpy(fast), slow, rtol=0, atol=2e-5)


def test_autocast_spares_the_series_and_its_differences() -> None:
    """Differences of a wave of 1e-2 on an offset of 1, which in bfloat16 has steps of 8e-3."""
    t = torch.arange(260) / 65
    x = (1 + 1e-2 * torch.sin(2 * torch.pi * 5 * t)).view(1, 1, -1)
    model, head = encoder(), Head(CONFIG.embed_dim, CLASSES)
    exact = FineTuneNetwork(model, head, "mean", "concat")
    cast = FineTuneNetwork(model, head, "mean", "concat", precision="bfloat16")
    with torch.no_grad():
        model.patch_embed.proj.weight[:, 0] = (
            0  # the series itself: its offset would drown the rest
        )
        model.patch_embed.proj.weight.mul_(1000)
        wanted = exact.features(x)
        assert 0 < (cast.features(x) - wanted).abs().max() < 0.02
        assert (exact.features(x.bfloat16().float()) - wanted).abs().max() > 0.05
    prepared = training_module._fabric(CPU).setup(cast)
    with torch.no_grad():  # nor does Fabric round what it passes on
        torch.testing.assert_close(prepared(x), cast(x), rtol=0, atol=0)


def test_a_head_sees_training_windows_at_mean_zero_and_deviation_one() -> None:
    features = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)) * 5 + 100
    features[:, 3] = 7.0  # does not vary
    head = Head(4, CLASSES)
    head.standardise(features)
    with torch.no_grad():
        head.linear.weight.copy_(torch.eye(4)[[0, 3]])
        seen = head(features)
    assert seen[:, 0].mean().item() == pytest.approx(0, abs=1e-5)
    assert seen[:, 0].std(correction=0).item() == pytest.approx(1, abs=1e-5)
    assert (seen[:, 1] == 0).all()


def test_every_layer_has_its_rate_and_only_matrices_decay() -> None:
    model = encoder()
    require_gradients(model, "full", lora_rank=1, seed=0)
    head = Head(2 * CONFIG.embed_dim, CLASSES)
    groups = parameter_groups(FineTuneNetwork(model, head, "mean", "concat"), 1e-3, 0.05, 0.75)
    found = {
        name: (group["lr"], group["weight_decay"]) for group in groups for name in group["names"]
    }
    wanted = {}
    for name, parameter in model.named_parameters():
        if name.startswith(("decoder", "mask_token", "temporal", "spatial")) or "pos_embed" in name:
            continue
        layer = {"cls_token": 0, "patch_embed": 0, "norm": 4}.get(name.split(".")[0])
        if layer is None:
            layer = 1 + int(name.split(".")[1])
        matrix = parameter.ndim >= 2 and name != "cls_token"
        wanted[f"encoder.{name}"] = (1e-3 * 0.75 ** (4 - layer), 0.05 if matrix else 0.0)
    wanted["head.linear.weight"], wanted["head.linear.bias"] = (1e-3, 0.05), (1e-3, 0.0)
    assert found.keys() == wanted.keys()
    for name, pair in wanted.items():
        assert found[name] == pytest.approx(pair, rel=1e-12), name
    assert sum(len(group["params"]) for group in groups) == len(wanted)  # none twice


def test_merged_adapters_are_the_adapted_encoder_in_plain_weights() -> None:
    model = encoder()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    require_gradients(model, "lora", lora_rank=4, seed=0)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    # qkv, proj, fc1 and fc2 of 3 layers and 2 fusions, an A and a B each, and nothing else.
    assert len(trained) == 5 * 4 * 2
    assert all("lora_" in name for name in trained)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05, generator=generator)
    network = FineTuneNetwork(model, Head(2 * CONFIG.embed_dim, CLASSES), "mean", "concat")
    x = torch.randn(2, 2, 130, generator=generator)
    with torch.no_grad():
        adapted = network.features(x)
    merge_lora(model)
    assert set(model.state_dict()) == set(before)
    merged = torch.from_numpy(model.encode(x, 65.0, channels="concat"))
    torch.testing.assert_close(merged, adapted, rtol=0, atol=2e-5)
    plain = torch.from_numpy(encoder().encode(x, 65.0, channels="concat"))
    assert (merged - plain).abs().max() > 1e-2


# --- the loop --------------------------------------------------------------------------------------


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


def test_targets_are_learned_in_their_own_unit(tmp_path: Path) -> None:
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


def test_scores_of_one_class_and_of_targets_with_zeros() -> None:
    one = scores(CLASSES, np.array([1, 1]), np.array([[0.2, 0.8], [0.6, 0.4]]))
    assert one == {"accuracy": 0.5}
    task = Task("t", "vital signs", targets=("x",))
    found = scores(task, np.array([[0.0], [2.0]]), np.array([[1.0], [2.0]]))
    assert found == {
        "mean_absolute_error": 0.5,
        "root_mean_squared_error": math.sqrt(0.5),
        "r2": 0.5,
    }


# --- who trains and who validates ------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_no_subject_is_in_two_parts_and_every_class_in_training(seed: int) -> None:
    rng = np.random.default_rng(seed)
    count = 60
    subjects = rng.integers(0, 9, count)
    windows = rng.standard_normal((count, 1, 64))
    labels = np.where(rng.random(count) < 0.2, "rare", "frequent")
    labels[:2] = "rare", "frequent"
    who = [f"s{i}" for i in subjects]
    given = ["test" if i == 0 else "train" for i in subjects]
    data = LabelledWindows.from_arrays(windows, labels.tolist(), subjects=who, split=given)
    split = split_windows(data, 0.2, seed)
    parts = (split.train, split.validation, split.test)
    assert sorted(np.concatenate(parts).tolist()) == list(range(count))
    people = [set(data.subjects[part].tolist()) for part in parts]
    assert sum(map(len, people)) == len(set.union(*people))
    assert len(np.unique(data.labels[split.train])) == 2
    assert 0.05 < len(split.validation) / count < 0.4


def test_data_that_cannot_be_split_are_refused_before_they_are_encoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    windows, labels, _, _ = pulses(4, 1)
    data = LabelledWindows.from_arrays(windows, labels, RATE, subjects=["a"] * len(labels))
    said: list[str] = []
    tuner = FineTuner(encoder(), device="cpu", progress=said.append)
    monkeypatch.setattr(tuner.model, "encode", lambda *args, **options: pytest.fail("encoded"))
    with pytest.raises(InputError, match="one subject only"):
        tuner.fit(data)
    assert said == []


def test_a_split_that_cannot_be_is_named() -> None:
    windows, labels, _, _ = pulses(4, 1)
    arguments: dict[str, Any] = {"sampling_rate": RATE}

    def split(subjects: Any = None, given: Any = None, names: list[str] = labels) -> Split:
        data = LabelledWindows.from_arrays(
            windows, names, subjects=subjects, split=given, **arguments
        )
        return split_windows(data, 0.5, 0)

    with pytest.raises(InputError, match="one subject only"):
        split(["a"] * 4)
    with pytest.raises(InputError, match="'a' is in both train and validation"):
        split(["a", "a", "b", "c"], ["train", "validation", "train", "train"])
    with pytest.raises(InputError, match="'odd' is in validation only"):
        split(
            ["a", "b", "c", "d"], ["train", "train", "train", "validation"], ["x", "y", "x", "odd"]
        )
    with pytest.raises(InputError, match="no window is left to train on"):
        split(given=["test"] * 4)
    with pytest.raises(InputError, match="alone; two or more"):
        split(names=["x"] * 4)
    with pytest.raises(InputError, match="split is 'dev'"):
        split(given=["dev"] * 4)
    data = LabelledWindows.from_arrays(windows, labels, **arguments)
    split_windows(data, 0.5, 0)
    assert "no window names a subject" in data.notes[0]


# --- recordings, tables and the commands -----------------------------------------------------------


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six recordings of 10 s, one with a gap; one that cannot be read; labels; weights."""
    folder = tmp_path_factory.mktemp("cohort")
    (folder / "recordings").mkdir()
    rng = np.random.default_rng(3)
    rows = []
    for subject in range(6):
        data = pulse(0.9 if subject % 2 == 0 else 2.5, 10.0, rng)
        if subject == 2:
            data[0, 150:230] = np.nan
        path = folder / "recordings" / f"r{subject}.npz"
        np.savez(path, data=data, sampling_rate=RATE, channels=np.array(["ECG", "PPG"]))
        rows.append([f"r{subject}", "slow" if subject % 2 == 0 else "fast", f"s{subject}"])
    (folder / "recordings" / "damaged.npz").write_bytes(b"PK\x03\x04 no more")
    rows.append(["damaged", "slow", "s9"])
    write_table(folder / "labels.csv", ["recording", "label", "subject"], rows)
    encoder().save_pretrained(folder / "weights")
    return folder


def write_table(path: Path, names: list[str], rows: list[list[Any]]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([names, *rows])
    return path


@pytest.fixture(scope="module")
def tuned(cohort: Path) -> Path:
    """The folder of a head that the command trained."""
    arguments = [str(cohort / "recordings"), "--labels", str(cohort / "labels.csv")]
    arguments += ["--weights", str(cohort / "weights"), "--output", str(cohort / "model")]
    arguments += ["--window", "2", "--hop", "1", "--precision", "float32", "--workers", "0"]
    assert main(["finetune", *arguments, "--validation", "0.34"]) == 1  # the damaged one
    return cohort / "model"


def predict(cohort: Path, model: Path, output: Path, *arguments: str) -> int:
    inputs = [str(cohort / "recordings"), "--model", str(model), "--output", str(output)]
    return main(["predict", *inputs, "--precision", "float32", "--workers", "0", *arguments])


def test_predictions_of_recordings_are_what_training_judged(
    cohort: Path, tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict(cohort, tuned, tmp_path / "out.parquet") == 1
    assert "damaged.npz" in capsys.readouterr().err
    table = pq.read_table(tmp_path / "out.parquet").to_pandas()
    assert list(table.columns[:6]) == [
        *("recording", "window_id", "start_s", "duration_s", "status", "predicted")
    ]
    assert len(table) == 6 * 9
    assert (table.duration_s == 2).all()
    skipped = table[table.status != "ok"]
    assert set(skipped.recording) == {"r2"}
    assert skipped[["predicted", "probability_fast", "probability_slow"]].isna().all(axis=None)
    good = table[table.status == "ok"]
    np.testing.assert_allclose(good.probability_fast + good.probability_slow, 1, atol=1e-6)
    about = json.loads((tuned / "finetune.json").read_text())
    held = pq.read_table(tuned / "held_out.parquet").to_pandas()
    both = held.merge(table, on=["recording", "window_id"], suffixes=("", "_now"))
    assert len(both) == len(held) == about["data"]["windows"]["validation"]
    np.testing.assert_allclose(both.probability_fast, both.probability_fast_now, atol=1e-6)
    labels = dict(list(csv.reader((cohort / "labels.csv").open()))[i][:2] for i in range(1, 7))
    accuracy = np.mean(
        [labels[r] == p for r, p in zip(both.recording, both.predicted_now, strict=True)]
    )
    assert accuracy == about["metrics"]["validation"]["accuracy"]
    assert accuracy > 0.8
    assert about["data"]["skipped"] == {"missing data": len(skipped)}
    assert about["data"]["recordings_failed"] == 1
    # A second run leaves the file alone, and the same windows by a list are the same.
    assert predict(cohort, tuned, tmp_path / "out.parquet") == 2
    rows = [["r1", 3.0, 2.0], ["r4", 0.0, 2.0]]
    listed = write_table(tmp_path / "list.csv", ["recording", "start_s", "duration_s"], rows)
    assert predict(cohort, tuned, tmp_path / "two.parquet", "--windows", str(listed)) == 0
    two = pq.read_table(tmp_path / "two.parquet").to_pandas()
    want = [
        table[(table.recording == r) & (table.start_s == s)].probability_fast for r, s, _ in rows
    ]
    np.testing.assert_allclose(two.probability_fast, np.concatenate(want), atol=1e-6)


def test_encode_takes_the_folder_and_arrays_predict_like_recordings(
    cohort: Path, tuned: Path, tmp_path: Path
) -> None:
    one = str(cohort / "recordings" / "r1.npz")
    arguments = ["--weights", str(tuned), "--output", str(tmp_path / "out"), "--window", "2"]
    assert main(["encode", one, *arguments, "--precision", "float32", "--workers", "0"]) == 0
    embeddings = load_embeddings(tmp_path / "out", library="numpy")["embedding"]
    found = Predictor.from_pretrained(tuned, precision="float32")
    by_hand = found.predict_embeddings(np.stack(list(embeddings)).reshape(5, -1))
    with np.load(one) as arrays:
        data = arrays["data"]
    windows = [data[:, 128 * k : 128 * (k + 1)] for k in range(5)]
    prediction = found.predict(windows, RATE)
    np.testing.assert_allclose(prediction.values, by_hand, atol=1e-6)
    assert prediction.predicted == ["fast"] * 5
    windows[1] = windows[1].copy()
    windows[1][0, :100] = np.nan
    prediction = found.predict(windows, RATE)
    assert prediction.statuses[1] == "missing data"
    assert np.isnan(prediction.values[1]).all()
    assert prediction.predicted[1] is None


def test_predict_refuses_what_does_not_fit(
    cohort: Path, tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = Predictor.from_pretrained(tuned, precision="float32")
    with pytest.raises(InputError, match=r"window 0 has 3 channels.*2 channels \(ECG, PPG\)"):
        found.predict(np.zeros((1, 3, 128)), RATE)
    with pytest.raises(InputError, match="lasts 3 s; this model was trained on windows of 2 s"):
        found.predict(np.zeros((1, 2, 192)), RATE)
    other = tmp_path / "other.npz"
    np.savez(other, data=np.zeros((1, 640)), sampling_rate=RATE, channels=np.array(["EDA"]))
    output = str(tmp_path / "out.parquet")
    arguments = ["predict", str(other), "--model", str(tuned), "--workers", "0"]
    assert main([*arguments, "--output", output]) == 2
    assert "no recording has a channel ECG, PPG" in capsys.readouterr().err
    assert main([*arguments, "--output", output, "--window", "4"]) == 2
    assert "trained on windows of 2 s" in capsys.readouterr().err
    names, rows = ["recording", "start_s", "duration_s"], [["other", 0, 3]]
    listed = str(write_table(tmp_path / "list.csv", names, rows))
    assert main([*arguments, "--output", output, "--windows", listed]) == 2
    assert "window 0 of other lasts 3 s" in capsys.readouterr().err
    assert main([*arguments, "--output", str(tmp_path / "out.csv")]) == 2
    assert "end it in .parquet" in capsys.readouterr().err
    arguments.insert(1, str(cohort / "recordings" / "r0.npz"))
    assert main([*arguments, "--output", output]) == 1
    assert "has no channel ECG, PPG; it has EDA" in capsys.readouterr().err
    assert set(pq.read_table(output).to_pandas().recording) == {"r0"}


def test_unnamed_channels_are_counted_and_several_lengths_need_a_window(
    cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    windows, labels, _, who = pulses(4, 2)
    windows = [window[:, : 100 + 10 * (i % 2)] for i, window in enumerate(windows)]
    data = LabelledWindows.from_arrays(windows, labels, RATE, subjects=who)
    settings = FineTuneSettings(epochs=1, channel_pool="mean", pool="cls", validation=0.5)
    FineTuner(cohort / "weights", settings, precision="float32").fit(data).save_pretrained(
        tmp_path / "model"
    )
    one = tmp_path / "three.npz"
    np.savez(one, data=np.random.default_rng(0).random((3, 256)), sampling_rate=RATE)
    output = tmp_path / "out.parquet"
    assert predict(cohort, tmp_path / "model", output) == 2
    assert "several lengths" in capsys.readouterr().err
    arguments = ["predict", str(one), str(cohort / "recordings" / "r0.npz"), "--workers", "0"]
    arguments += ["--model", str(tmp_path / "model"), "--output", str(output), "--window", "1.6"]
    assert main(arguments) == 1
    assert "has 3 channels" in capsys.readouterr().err
    table = pq.read_table(output).to_pandas()
    assert len(table) == 6
    assert table.probability_fast.notna().all()


def test_rows_that_are_stretches_are_windows_or_are_cut_into_them(
    cohort: Path, tmp_path: Path
) -> None:
    names = ["recording", "start_s", "end_s", "value", "subject"]
    rows = [
        ["r0", 0, 4, 54, "a"],
        ["r0", 4, 8, 55, "a"],
        ["r1", 0, 4, 150, "b"],
        ["r1", 4, 5, 1, "b"],
    ]
    table = read_labels(write_table(tmp_path / "labels.csv", names, rows))
    assert table.task.targets == ("value",)
    windows, row_of, short = table.window_list(2.0, 1.0)
    assert windows.recordings["r0"].starts.tolist() == [0, 1, 2, 4, 5, 6]
    assert [row_of["r0", i] for i in windows.recordings["r0"].ids] == [0, 0, 0, 1, 1, 1]
    assert short == 1
    windows, row_of, short = table.window_list(None, None)
    assert windows.recordings["r1"].durations.tolist() == [4, 1]
    assert short == 0
    assert row_of["r1", "3"] == 3


@pytest.mark.parametrize(
    ("names", "rows", "said"),
    [
        ("recording", ["r0"], "no column label"),
        ("recording,label", ["r0,a", "r0,b"], "'r0' has several rows"),
        ("recording,label", ["r0,a", "r1,"], "line 3: no label"),
        ("recording,label", ["r0,a", ",b"], "line 3: no recording"),
        ("recording,label", ["r0,a", "nobody,b"], "nobody, which is not among the inputs"),
        ("recording,label,subject", ["r0,a,x", "r1,b,"], "line 3: no subject"),
        ("recording,label,split", ["r0,a,train", "r1,b,dev"], "line 3: split is 'dev'"),
        ("recording,start_s,label", ["r0,0,a"], "no column duration_s or end_s"),
        ("recording,start_s,end_s,label", ["r0,4,4,a", "r1,0,4,b"], "line 2: a stretch is 0.0 s"),
        ("recording,start_s,end_s,label", ["r0,x,4,a", "r1,0,4,b"], "start_s is 'x'"),
        ("recording,label", ["r0,a", "r1,a"], "class 'a' alone"),
        ("recording,label", ["r0,0.5", "r1,nan"], "line 3: no label"),
        ("recording,label", ["r0,0.5", "r1,inf"], "a finite number is right"),
        ("recording,label", [], "has no rows"),
        ("recording,value", ["r0,1", "r1,high"], "value is 'high'; a number is right"),
    ],
)
def test_a_table_that_is_wrong_is_one_line_before_anything_is_done(
    names: str,
    rows: list[str],
    said: str,
    cohort: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "labels.csv"
    path.write_text("\n".join([names, *rows]) + "\n")
    output = tmp_path / "out"
    arguments = [str(cohort / "recordings"), "--labels", str(path), "--output", str(output)]
    assert main(["finetune", *arguments, "--weights", "nowhere", "--workers", "0"]) == 2
    error = capsys.readouterr().err.strip()
    assert said in error
    assert "\n" not in error
    assert not output.exists()


def test_whole_numbers_are_classes_unless_regression_is_asked_for(tmp_path: Path) -> None:
    path = write_table(
        tmp_path / "a.csv", ["recording", "label", "age"], [["x", 1, 30], ["y", 0, 40]]
    )
    table = read_labels(path)
    assert table.task.classes == ("0", "1")
    assert table.labels.tolist() == [1, 0]
    assert table.subjects == ["x", "y"]  # a recording is a person where nothing says otherwise
    both = read_labels(path, columns=["label", "age"], task="regression")
    assert both.task.targets == ("label", "age")
    assert both.labels.tolist() == [[1, 30], [0, 40]]
    path = write_table(tmp_path / "b.csv", ["recording", "label"], [["x", "1.0"], ["y", "2.5"]])
    assert read_labels(path).task.kind == "reg"
    assert read_labels(path, task="classification").task.classes == ("1", "2.5")


def test_recordings_that_differ_in_channels_are_named(
    cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(cohort / "recordings" / "r0.npz", tmp_path / "r0.npz")
    data = pulse(2.5, 10.0, np.random.default_rng(0))
    np.savez(tmp_path / "r1.npz", data=data, sampling_rate=RATE, channels=np.array(["PPG", "ECG"]))
    labels = write_table(
        tmp_path / "labels.csv", ["recording", "label"], [["r0", "a"], ["r1", "b"]]
    )
    arguments = ["finetune", str(tmp_path), "--labels", str(labels), "--workers", "0"]
    arguments += ["--weights", str(cohort / "weights"), "--output", str(tmp_path / "out")]
    assert main(arguments) == 2
    assert "r0 has ECG, PPG; r1 has PPG, ECG" in capsys.readouterr().err


def test_a_sample_set_trains_and_its_test_half_is_judged(
    data_dir: Path, cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with np.load(data_dir / "imu" / "basic_motions.npz") as arrays:
        half = {name: arrays[name][::2] for name in arrays.files if name[1] == "_"}
        half = {name: value[:, :3, :60] if "x" in name else value for name, value in half.items()}
        np.savez(tmp_path / "motions.npz", sampling_rate=arrays["sampling_rate"], **half)
    arguments = [str(tmp_path / "motions.npz"), "--weights", str(cohort / "weights")]
    arguments += ["--output", str(tmp_path / "out"), "--precision", "float32", "--json"]
    assert main(["finetune", *arguments, "--normalize", "none", "--preprocess", "none"]) == 0
    about = json.loads(capsys.readouterr().out)
    assert about["data"]["windows"] == {"train": 16, "validation": 4, "test": 20}
    assert about["metrics"]["test"]["accuracy"] > 0.6  # 4 classes; random weights
    assert "no window names a subject" in about["data"]["notes"][0]
    assert main(["finetune", *arguments]) == 2
    assert "exists" in capsys.readouterr().err


# --- the folder ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / "finetune.json").unlink(), "holds no finetune.json"),
        (lambda folder: (folder / "finetune.json").write_text("{"), "cannot be read as JSON"),
        (lambda folder: (folder / "finetune.json").write_text("{}"), "not what finetune writes"),
        (lambda folder: (folder / "head.safetensors").unlink(), "has no head.safetensors"),
        (lambda folder: (folder / "head.safetensors").write_bytes(b"x"), "was replaced or damaged"),
        (lambda folder: encoder(seed=1).save_pretrained(folder), "was replaced or damaged"),
        (lambda folder: edit(folder, format_version=2), "this normwear-fast reads 1"),
        (lambda folder: edit(folder, channel_pool="mean"), "not a head for 2 channels"),
        (lambda folder: edit(folder, preparation={}), "not what finetune writes"),
    ],
)
def test_a_folder_that_does_not_hold_together_is_refused(
    damage: Any, said: str, tuned: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tuned, folder)
    damage(folder)
    with pytest.raises(WeightsError, match=said):
        Predictor.from_pretrained(folder)


def edit(folder: Path, **values: Any) -> None:
    path = folder / "finetune.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_folder_appears_whole_or_not_at_all(
    tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Predictor.from_pretrained(tuned, precision="float32")
    output = tmp_path / "model"
    written: list[str] = []

    def fails(path: Path, tensors: Any) -> None:
        written.append(path.name)
        raise OSError(28, "No space left on device")

    (tmp_path / ".model.new").mkdir()  # what a killed run left behind
    (tmp_path / ".model.new" / "model.safetensors").write_bytes(b"half")
    with monkeypatch.context() as patch:
        patch.setattr(predictor_module, "_write_safetensors", fails)
        with pytest.raises(OutputError, match="No space left"):
            found.save_pretrained(output)
    assert written == ["head.safetensors"]
    assert list(tmp_path.iterdir()) == []
    found.save_pretrained(output)
    with pytest.raises(OutputError, match="exists"):
        found.save_pretrained(output)
    with monkeypatch.context() as patch:
        patch.setattr(predictor_module, "_write_safetensors", fails)
        with pytest.raises(OutputError, match="No space left"):
            found.save_pretrained(output, overwrite=True)
    Predictor.from_pretrained(output)
    found.save_pretrained(output, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    (output / "notes.txt").write_text("mine")
    found.save_pretrained(output, overwrite=True)
    assert (output / "notes.txt").read_text() == "mine"
    foreign = tmp_path / "thesis"
    foreign.mkdir()
    (foreign / "chapter.txt").write_text("years")
    with pytest.raises(OutputError, match="is no fine-tuned model"):
        found.save_pretrained(foreign, overwrite=True)
    assert (foreign / "chapter.txt").exists()


def test_an_output_that_cannot_be_written_is_refused_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And predict's before it predicts: neither the recordings nor the model named are there."""
    with full_disk():
        assert (
            main(["finetune", "nowhere", "--weights", "none", "--output", str(tmp_path / "m")]) == 2
        )
    assert "m: cannot be written (File too large)" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"mode": "half"}, "mode is 'half'"),
        ({"epochs": 0}, "epochs is 0"),
        ({"learning_rate": math.nan}, "learning_rate is nan"),
        ({"validation": 0.0}, "validation is 0.0"),
        ({"layer_decay": 0.0}, "layer_decay is 0.0"),
    ],
)
def test_settings_out_of_range_are_named(arguments: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        FineTuneSettings(**arguments)
