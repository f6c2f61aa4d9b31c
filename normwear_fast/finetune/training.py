"""The loop: a head on embeddings made once, then, if asked for, encoder and head together.

Every mode starts with the head alone, on embeddings that the fast encoder makes once. ``full`` and
``lora`` go on from there: a good head keeps the first steps from distorting what the encoder knows
(Kumar et al. 2022, arXiv 2202.10054), and the result is never worse on the validation part than the head.
"""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from normwear_fast import __version__
from normwear_fast.benchmarking import set_allocator_thresholds
from normwear_fast.config import SAMPLING_RATE
from normwear_fast.encode.prepare import NOT_FINITE
from normwear_fast.engine import resolve_precision
from normwear_fast.errors import InputError, NormWearError, UsageError
from normwear_fast.evaluate import metrics
from normwear_fast.evaluate.registry import Task
from normwear_fast.finetune.data import LabelledWindows, Split, split_windows
from normwear_fast.finetune.network import (
    FineTuneNetwork,
    Head,
    HeadChannels,
    TokenPool,
    merge_lora,
    parameter_groups,
    require_gradients,
)
from normwear_fast.finetune.predictor import Predictor
from normwear_fast.interrupts import graceful_stop
from normwear_fast.model import FastNormWear
from normwear_fast.optimization import rate_factor
from normwear_fast.packing import window_tokens

if TYPE_CHECKING:
    from lightning_fabric import Fabric

Mode = Literal["head", "full", "lora"]
MODES: tuple[Mode, ...] = ("head", "full", "lora")

EPOCHS = {"head": 100, "full": 20, "lora": 20}
LEARNING_RATE = {"head": 1e-3, "full": 1e-4, "lora": 5e-4}
"""Defaults of a mode's stage; the head's stage of the other modes has the head's."""

TRAINING_TOKENS = {"cpu": 4096, "cuda": 16384}
"""Tokens whose activations are held for the backward pass: some 1.2 MB each in float32 at the released
size, half in bfloat16. A step of more is summed up in parts, exactly."""

GRADIENT_NORM = 1.0
"""Gradients are clipped to it, as in pretraining."""


@dataclass(frozen=True)
class FineTuneSettings:
    """How a head, and with it the encoder, is trained.

    Args:
        mode: ``head`` leaves the encoder as it is; ``full`` trains all of it; ``lora`` low-rank
            additions to its matrices, merged into them at the end.
        pool: over a channel's tokens: their ``mean``, or ``cls``.
        channel_pool: ``concat`` channels, or take their ``mean``.
        epochs: passes over the training windows at most; by default the mode's.
        batch_size: windows a step.
        learning_rate: of AdamW, after a linear warm-up, falling along half a cosine; by default the
            mode's.
        weight_decay: of matrices.
        layer_decay: factor of the learning rate from each layer to the one before it, in ``full``.
        lora_rank: of the additions; their scale is 2.
        warm_up: share of the steps.
        patience: epochs without a lower validation loss after which training ends.
        balanced: weight classes by the inverse of their share of the training windows.
        validation: share of the training subjects that validate, where the data do not say.
        seed: of the split, the head, the adapters and the order.
        batch_tokens: tokens of a step held at once; the device's default where None.

    Raises:
        UsageError: a value out of its range.
    """

    mode: Mode = "head"
    pool: TokenPool = "mean"
    channel_pool: HeadChannels = "concat"
    epochs: int | None = None
    batch_size: int = 32
    learning_rate: float | None = None
    weight_decay: float = 0.05
    layer_decay: float = 0.75
    lora_rank: int = 8
    warm_up: float = 0.1
    patience: int = 5
    balanced: bool = False
    validation: float = 0.2
    seed: int = 0
    batch_tokens: int | None = None

    def __post_init__(self) -> None:
        for name, values in (
            ("mode", MODES),
            ("pool", ("mean", "cls")),
            ("channel_pool", ("concat", "mean")),
        ):
            if getattr(self, name) not in values:
                raise UsageError(
                    f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(values)}"
                )
        for name, fits, right in (
            ("epochs", self.epochs is None or self.epochs >= 1, ">= 1"),
            ("batch_size", self.batch_size >= 1, ">= 1"),
            ("learning_rate", self.learning_rate is None or 0 < self.learning_rate < 10, "> 0"),
            ("weight_decay", 0 <= self.weight_decay < 10, ">= 0"),
            ("layer_decay", 0 < self.layer_decay <= 1, "above 0 and at most 1"),
            ("lora_rank", self.lora_rank >= 1, ">= 1"),
            ("warm_up", 0 <= self.warm_up <= 1, "between 0 and 1"),
            ("patience", self.patience >= 1, ">= 1"),
            ("validation", 0 < self.validation <= 0.5, "above 0 and at most 0.5"),
            ("seed", self.seed >= 0, ">= 0"),
            ("batch_tokens", self.batch_tokens is None or self.batch_tokens >= 1, ">= 1"),
        ):
            if not fits:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be {right}")


def scores(task: Task, y: NDArray[Any], prediction: NDArray[np.floating]) -> dict[str, float]:
    """The published scores of predictions, and a regression's errors in its own unit.

    Args:
        y: (n,) classes or (n, targets).
        prediction: (n, classes) probabilities or (n, targets).

    Returns:
        For classes as `metrics.classification_scores`, the accuracy alone where ``y`` holds one class.
        For targets their mean absolute and root mean squared error and R2, averaged over targets, and
        ``relative_accuracy`` in log(y + 1), as published, where every target is above 0.
    """
    if task.kind == "class":
        if len(np.unique(y)) < 2:
            return {"accuracy": float(np.mean(y == prediction.argmax(axis=1)))}
        return metrics.classification_scores(y, prediction, np.arange(len(task.classes)))
    error = prediction - y
    spread = np.square(y - y.mean(axis=0)).sum(axis=0)
    found = {
        "mean_absolute_error": float(np.abs(error).mean()),
        "root_mean_squared_error": float(np.sqrt(np.square(error).mean())),
    }
    if (spread > 0).all():
        found["r2"] = float((1 - np.square(error).sum(axis=0) / spread).mean())
    if (y > 0).all():
        guess = np.log1p(np.maximum(prediction, 0))
        found["relative_accuracy"] = float(metrics.relative_accuracy(np.log1p(y), guess)[0])
    return found


class FineTuner:
    """Trains a head, and with it the encoder, on labelled windows.

    Args:
        weights: a checkpoint in any form, or a model, which is copied and left as it is. ``full`` and
            ``lora`` train in float32 what comes in another dtype; a frozen model has a head alone.
        settings: how.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:I``.
        precision: ``float32``, ``bfloat16`` (weights stay float32) or ``auto``: embeddings are made in
            what `FastNormWear` takes for it, and the encoder is trained in bfloat16 on a GPU that has it
            and in float32 on a CPU, where autocast's backward pass takes twice as long.
        progress: told of each epoch in a line.

    Raises:
        UsageError: an unknown device or precision, an extra that is not installed, or a frozen model
            to be trained.
        WeightsError: from loading.
    """

    def __init__(
        self,
        weights: str | Path | FastNormWear,
        settings: FineTuneSettings | None = None,
        *,
        device: str = "auto",
        precision: str = "auto",
        progress: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.settings = settings or FineTuneSettings()
        self.progress = progress
        self.device = choose_device(device)
        if precision not in ("auto", "float32", "bfloat16"):
            raise UsageError(
                f"precision {precision!r} is not for training; it must be auto, float32 or bfloat16"
            )
        self.precision = resolve_precision(precision, self.device)
        if precision == "auto" and self.device.type == "cpu":
            self.precision = "float32"
        _fabric(self.device)  # an extra that is missing is said before weights are loaded
        trained = self.settings.mode != "head"
        if isinstance(weights, FastNormWear):
            if trained and weights._frozen is not None:
                raise UsageError(
                    f"this model was frozen for encoding; mode {self.settings.mode!r} trains its "
                    "weights: give a model that is not, or mode='head'"
                )
            self.model = copy.deepcopy(weights)
        else:
            self.model = FastNormWear.from_pretrained(weights)
        if trained:
            self.model.float()
        self.model.precision = precision
        self.history: list[dict[str, Any]] = []
        self.interrupted = False

    @torch.inference_mode(False)
    @torch.enable_grad()
    def fit(self, data: LabelledWindows) -> Predictor:
        """Trains and judges, always from the weights this was made with.

        Args:
            data: the labelled windows.

        Returns:
            The best model on the validation part, judged on that part and on the test part if there
            is one, both with the encoder that will predict, which is its own: a later fit leaves it
            alone. `Predictor.save_pretrained` writes it.

        Ctrl-C ends training after the step under way, with the best so far; ``interrupted`` says so.

        Raises:
            InputError: a split that cannot be, or data without a window the model has a value for.
            NormWearError: training that gives no finite number.
        """
        self.history = []
        self.interrupted = False
        settings = self.settings
        data = replace(data, notes=list(data.notes))
        # Data that cannot be split are refused before the hours that encoding them may take; which
        # windows have a value, and with them the split itself, are known after it.
        split_windows(replace(data, notes=[]), settings.validation, settings.seed)
        model = copy.deepcopy(self.model).to(self.device)
        base = dict(model.weights)
        self.progress(f"encoding {len(data):,} windows once")
        embeddings = self._embed(model, data.windows)
        data, embeddings = _finite(data, embeddings)
        split = split_windows(data, settings.validation, settings.seed)
        head = Head(embeddings.shape[1], data.task, settings.seed).to(self.device)
        targets = torch.from_numpy(data.labels).to(self.device)
        train = torch.from_numpy(embeddings[split.train]).to(self.device)
        head.standardise(train, targets[split.train] if data.task.kind == "reg" else None)
        if data.task.kind == "reg":
            targets = ((targets - head.target_mean) / head.target_std).float()
        weights = _sample_weights(data, split, settings.balanced).to(self.device)
        with graceful_stop(_say_stopping) as stopped:
            self._fit_head(head, embeddings, data, split, targets, weights, stopped)
            if settings.mode != "head":
                self._fit_network(model, head, data, split, targets, weights, base, stopped)
            self.interrupted = stopped()
        if settings.mode != "head":
            held_out = np.sort(np.concatenate([split.validation, split.test]))
            embeddings[held_out] = self._embed(model, [data.windows[i] for i in held_out])
        predictor = Predictor(
            model,
            head,
            data.task,
            settings.pool,
            settings.channel_pool,
            data.preparation,
        )
        self._judge(predictor, data, split, embeddings, base)
        return predictor

    def _embed(
        self, model: FastNormWear, windows: Sequence[NDArray[np.float32]]
    ) -> NDArray[np.float32]:
        """(n, F) with the fast encoder."""
        found = model.encode(
            list(windows),
            SAMPLING_RATE,
            pool=self.settings.pool,
            channels=self.settings.channel_pool,
            resample="never",
        )
        return np.asarray(found, np.float32)

    def _fit_head(
        self,
        head: Head,
        embeddings: NDArray[np.float32],
        data: LabelledWindows,
        split: Split,
        targets: Tensor,
        weights: Tensor,
        stopped: Callable[[], bool],
    ) -> None:
        whole = self.settings.mode == "head"
        rate = (self.settings.learning_rate if whole else None) or LEARNING_RATE["head"]
        decay = self.settings.weight_decay
        groups = [
            {"params": [head.linear.weight], "lr": rate, "weight_decay": decay},
            {"params": [head.linear.bias], "lr": rate, "weight_decay": 0.0},
        ]
        stage = Stage(
            "head",
            _fabric(self.device),
            head,
            head,
            groups,
            Examples(list(embeddings), [1] * len(embeddings), len(embeddings), self.device),
            targets,
            weights,
        )
        epochs = (self.settings.epochs if whole else None) or EPOCHS["head"]
        self.history += stage.fit(data, split, epochs, self.settings, self.progress, stopped)

    def _fit_network(
        self,
        model: FastNormWear,
        head: Head,
        data: LabelledWindows,
        split: Split,
        targets: Tensor,
        weights: Tensor,
        base: dict[str, Any],
        stopped: Callable[[], bool],
    ) -> None:
        settings = self.settings
        if self.device.type == "cpu":
            set_allocator_thresholds(2**30)
        require_gradients(model, settings.mode, lora_rank=settings.lora_rank, seed=settings.seed)
        model.to(self.device)  # the adapters
        network = FineTuneNetwork(
            model, head, settings.pool, settings.channel_pool, precision=self.precision
        )
        groups = parameter_groups(
            network,
            settings.learning_rate or LEARNING_RATE[settings.mode],
            settings.weight_decay,
            settings.layer_decay if settings.mode == "full" else 1.0,
        )
        costs = [
            window_tokens(len(window), window.shape[1], model.optimized_cwt, model.config)
            for window in data.windows
        ]
        budget = settings.batch_tokens or TRAINING_TOKENS.get(self.device.type, 4096)
        stage = Stage(
            settings.mode,
            _fabric(self.device),
            network,
            head,
            groups,
            Examples(data.windows, costs, budget, self.device),
            targets,
            weights,
        )
        epochs = settings.epochs or EPOCHS[settings.mode]
        try:
            self.history += stage.fit(data, split, epochs, settings, self.progress, stopped)
        finally:
            if settings.mode == "lora":
                merge_lora(model)
            model.requires_grad_(False)
            model.weights = {"source": "fine-tuned", **{f"base_{k}": v for k, v in base.items()}}

    def _judge(
        self,
        predictor: Predictor,
        data: LabelledWindows,
        split: Split,
        embeddings: NDArray[np.float32],
        base: dict[str, Any],
    ) -> None:
        """Scores the held-out parts and describes the whole."""
        found = {}
        for part in ("validation", "test"):
            index = getattr(split, part)
            if len(index):
                prediction = predictor.predict_embeddings(embeddings[index])
                found[part] = scores(data.task, data.labels[index], prediction)
                predictor.held_out[part] = [
                    (data.origins[i], str(data.subjects[i]), data.labels[i], row)
                    for i, row in zip(index, prediction, strict=True)
                ]
        last = [row for row in self.history if row["stage"] == self.settings.mode]
        best = min(last, key=lambda row: (row["validation_loss"], row["epoch"]))
        predictor.history = self.history
        predictor.description = {
            "metrics": found,
            "data": {
                "windows": {part: len(getattr(split, part)) for part in asdict(split)},
                "subjects": {
                    part: len(set(data.subjects[getattr(split, part)].tolist()) - {""})
                    for part in asdict(split)
                },
                "skipped": data.skipped,
                "recordings_failed": len(data.failed),
                "notes": data.notes,
            },
            "training": asdict(self.settings)
            | {
                "embedding_precision": predictor.encoder.resolved_precision,
                "epochs_run": last[-1]["epoch"],
                "best_epoch": best["epoch"],
                "interrupted": self.interrupted,
                "skipped_steps": sum(row["skipped_steps"] for row in self.history),
                "precision": self.precision,
                "device": self.device.type,
            },
            "base": {key: Path(str(value)).name for key, value in base.items()},
            "version": __version__,
            "torch": torch.__version__,
        }


def choose_device(name: str) -> torch.device:
    """The device of that name, ``auto`` the first GPU if there is one; a UsageError for another."""
    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type == "cuda" and (device.index or 0) < torch.cuda.device_count():
        return torch.device("cuda", device.index or 0)
    if device.type == "cpu":
        return torch.device("cpu")
    raise UsageError(f"--device {name}: not on this machine; auto, cpu or cuda[:i]")


def _fabric(device: torch.device) -> Fabric:
    try:
        from lightning_fabric import Fabric
    except ImportError:
        raise UsageError(
            "fine-tuning needs lightning-fabric; install it with: pip install 'normwear-fast[train]'"
        ) from None
    # The network does its own autocast: Fabric's rounds the series that a module is given.
    devices = [device.index] if device.type == "cuda" else 1
    return Fabric(accelerator=device.type, devices=devices, precision="32-true")


def _finite(
    data: LabelledWindows, embeddings: NDArray[np.float32]
) -> tuple[LabelledWindows, NDArray[np.float32]]:
    """Both without the windows whose values the model cannot hold; counted."""
    finite = np.isfinite(embeddings).all(axis=1)
    if finite.all():
        return data, embeddings
    if not finite.any():
        raise InputError("no window has a finite embedding; check the signals' units")
    data = copy.copy(data)
    data.skipped = data.skipped | {NOT_FINITE: int((~finite).sum())}
    kept = np.flatnonzero(finite)
    data.windows = [data.windows[i] for i in kept]
    data.origins = [data.origins[i] for i in kept]
    data.labels, data.subjects = data.labels[kept], data.subjects[kept]
    data.split = None if data.split is None else data.split[kept]
    return data, embeddings[kept]


def _sample_weights(data: LabelledWindows, split: Split, balanced: bool) -> Tensor:
    """(n,) float32: 1, or training windows / (classes * windows of that class)."""
    if not balanced or data.task.kind == "reg":
        return torch.ones(len(data))
    counts = np.bincount(data.labels[split.train], minlength=len(data.task.classes))
    present = counts > 0
    of_class = np.zeros(len(counts))
    of_class[present] = len(split.train) / (present.sum() * counts[present])
    return torch.from_numpy(of_class[data.labels].astype(np.float32))


# --- one stage -------------------------------------------------------------------------------------


class Examples:
    """Inputs by index, stacked where they are equal, at most ``budget`` of cost at a time.

    Args:
        inputs: (F,) embeddings or (C, L_i) windows.
        costs: one each, tokens.
        budget: of a part; a dearer example is one alone.
        device: of the tensors.
    """

    def __init__(
        self,
        inputs: Sequence[NDArray[np.float32]],
        costs: Sequence[int],
        budget: int,
        device: torch.device,
    ) -> None:
        self.inputs, self.costs, self.budget, self.device = inputs, costs, budget, device

    def parts(self, index: NDArray[np.intp]) -> Iterator[tuple[NDArray[np.intp], Tensor]]:
        """Every example of ``index`` once: which, and their inputs (n, ...)."""
        order = sorted(index.tolist(), key=lambda i: self.inputs[i].shape)
        members: list[int] = []
        total = 0
        for i in order:
            unlike = members and self.inputs[i].shape != self.inputs[members[0]].shape
            if unlike or (members and total + self.costs[i] > self.budget):
                yield self._stack(members)
                members, total = [], 0
            members.append(i)
            total += self.costs[i]
        if members:
            yield self._stack(members)

    def _stack(self, members: list[int]) -> tuple[NDArray[np.intp], Tensor]:
        stacked = torch.from_numpy(np.stack([self.inputs[i] for i in members]))
        return np.array(members), stacked.to(self.device)


class Stage:
    """Minimises the weighted mean loss of a module's training examples; keeps the best by validation.

    Args:
        name: in the history.
        fabric: device and precision.
        module: inputs (n, ...) to outputs (n, k).
        head: the module's last part, which knows the task.
        groups: AdamW's.
        examples: of all windows.
        targets: (n,) classes, or (n, targets) in deviations.
        weights: (n,) of the loss.
    """

    def __init__(
        self,
        name: str,
        fabric: Fabric,
        module: nn.Module,
        head: Head,
        groups: list[dict[str, Any]],
        examples: Examples,
        targets: Tensor,
        weights: Tensor,
    ) -> None:
        self.name, self.fabric, self.head, self.examples = name, fabric, head, examples
        self.targets, self.weights = targets, weights
        self.parameters = [p for group in groups for p in group["params"]]
        self.rates = [group["lr"] for group in groups]
        self.module, self.optimizer = fabric.setup(module, torch.optim.AdamW(groups))

    def losses(self, out: Tensor, index: Tensor) -> Tensor:
        """(n,) weighted loss of each example."""
        if self.head.kind == "class":
            each = F.cross_entropy(out, self.targets[index], reduction="none")
        else:
            each = F.mse_loss(out, self.targets[index], reduction="none").mean(dim=1)
        return each * self.weights[index]

    def step(self, index: NDArray[np.intp]) -> float:
        """One step on a batch; its loss. A loss or gradient that is not finite changes nothing."""
        self.optimizer.zero_grad(set_to_none=True)
        share = 1 / float(self.weights[torch.from_numpy(index)].sum())
        total = 0.0
        for members, inputs in self.examples.parts(index):
            where = torch.from_numpy(members).to(inputs.device)
            loss = self.losses(self.module(inputs), where).sum() * share
            self.fabric.backward(loss)
            total += float(loss.detach())
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, GRADIENT_NORM)
        if not (math.isfinite(total) and bool(torch.isfinite(norm))):
            self.optimizer.zero_grad(set_to_none=True)
            return math.nan
        self.optimizer.step()
        return total

    @torch.no_grad()
    def evaluate(self, index: NDArray[np.intp]) -> tuple[float, NDArray[np.float32]]:
        """Mean loss and predictions of some examples."""
        found = np.empty((len(index), self.head.linear.out_features), np.float32)
        place = {int(i): row for row, i in enumerate(index)}
        total = 0.0
        for members, inputs in self.examples.parts(index):
            where = torch.from_numpy(members).to(inputs.device)
            out = self.module(inputs)
            total += float(self.losses(out, where).sum())
            found[[place[int(i)] for i in members]] = self.head.finish(out).cpu().numpy()
        return total / float(self.weights[torch.from_numpy(index)].sum()), found

    def fit(
        self,
        data: LabelledWindows,
        split: Split,
        epochs: int,
        settings: FineTuneSettings,
        progress: Callable[[str], None],
        stopped: Callable[[], bool] = lambda: False,
    ) -> list[dict[str, Any]]:
        """Trains until the validation loss has not fallen for ``patience`` epochs; a row an epoch.

        Row 0 is the start. The module ends with the parameters of the lowest validation loss. Once
        ``stopped`` no step is taken any more; the epoch that was under way is judged as it is.
        """
        per_epoch = -(-len(split.train) // settings.batch_size)
        steps = epochs * per_epoch
        warm_up = round(settings.warm_up * steps)
        began = time.monotonic()
        rows: list[dict[str, Any]] = []
        every = 10 if self.name == "head" else 1  # an epoch of the head takes less than its scores
        best, best_epoch, kept = math.inf, 0, [p.detach().clone() for p in self.parameters]
        for epoch in range(epochs + 1):
            losses: list[float] = []
            order = np.random.default_rng((settings.seed, epoch)).permutation(split.train)
            for batch in range(per_epoch if epoch else 0):
                if stopped():
                    break
                factor = rate_factor((epoch - 1) * per_epoch + batch, steps, warm_up)
                for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
                    group["lr"] = rate * factor
                first = batch * settings.batch_size
                losses.append(self.step(order[first : first + settings.batch_size]))
            finite = [loss for loss in losses if math.isfinite(loss)]
            if losses and not finite:
                raise NormWearError(
                    f"epoch {epoch}: no step had a finite loss and gradient; lower the learning rate "
                    f"({self.rates[-1]:g}), or check the signals' units"
                )
            validation, prediction = self.evaluate(split.validation)
            if validation < best:
                best, best_epoch = validation, epoch
                kept = [p.detach().clone() for p in self.parameters]
            over = epoch == epochs or epoch - best_epoch >= settings.patience or stopped()
            said = over or epoch % every == 0
            judged = {}
            if said and np.isfinite(prediction).all():
                judged = scores(data.task, data.labels[split.validation], prediction)
            rows.append(
                {
                    "stage": self.name,
                    "epoch": epoch,
                    "loss": float(np.mean(finite)) if finite else None,
                    "validation_loss": validation if math.isfinite(validation) else math.inf,
                    "learning_rate": max(group["lr"] for group in self.optimizer.param_groups),
                    "skipped_steps": len(losses) - len(finite),
                    "seconds": round(time.monotonic() - began, 3),
                    **judged,
                }
            )
            if said:
                progress(_line(rows[-1], epochs, data.task, best_epoch))
            if over:
                break
        with torch.no_grad():
            for parameter, value in zip(self.parameters, kept, strict=True):
                parameter.copy_(value)
        return rows


def _say_stopping() -> None:
    # In a signal handler: print could find stderr's buffer in the middle of a write.
    os.write(
        2, b"\nending training after this step, with the best so far; Ctrl-C again ends at once\n"
    )


def _line(row: dict[str, Any], epochs: int, task: Task, best: int) -> str:
    metric = task.metric if task.metric in row else "accuracy"
    if task.kind == "reg":
        metric = "mean_absolute_error"
    text = f"{row['stage']}, epoch {row['epoch']} of at most {epochs}: "
    if row["loss"] is not None:
        text += f"loss {row['loss']:.4f}, "
    text += f"validation {row['validation_loss']:.4f}"
    if metric in row:
        text += f", {metric.replace('_', ' ')} {row[metric]:.4f}"
    if row["skipped_steps"]:
        text += f", {row['skipped_steps']} steps skipped (not finite)"
    return text + f"; best so far epoch {best}"
