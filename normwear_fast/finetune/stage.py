"""One stage of training: the loop over epochs and steps, the best by validation, and going on with it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from normwear_fast.errors import NormWearError
from normwear_fast.evaluate import metrics
from normwear_fast.evaluate.registry import Task
from normwear_fast.finetune.data import LabelledWindows
from normwear_fast.finetune.network import Head
from normwear_fast.finetune.resume import plain
from normwear_fast.finetune.settings import FineTuneSettings
from normwear_fast.finetune.split import Split
from normwear_fast.optimization import rate_factor

if TYPE_CHECKING:
    from lightning_fabric import Fabric


GRADIENT_NORM = 1.0
"""Gradients are clipped to it, as in pretraining."""


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


@dataclass
class Progress:
    """Where a stage stands, between two steps.

    Args:
        kept: the parameters of the lowest validation loss.
        best, best_epoch: that loss, and its epoch.
        epoch: under way; epoch 0 only judges the start.
        batch: steps of it that are taken.
        losses: theirs.
        rows: of the epochs that are done.
    """

    kept: list[Tensor]
    best: float = math.inf
    best_epoch: int = 0
    epoch: int = 0
    batch: int = 0
    losses: list[float] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)


Keep = Callable[[Callable[[], dict[str, Any]]], None]
"""Told after every step and epoch how to get the state to go on from; it may ask for it."""


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
        keep: Keep = lambda state: None,
        now: Progress | None = None,
    ) -> list[dict[str, Any]]:
        """Trains until the validation loss has not fallen for ``patience`` epochs; a row an epoch.

        Row 0 is the start. The module ends with the parameters of the lowest validation loss. Once
        ``stopped`` no step is taken any more; the epoch that was under way is judged as it is.

        Order and learning rate of a step are functions of the seed and its number: a stage that goes on
        from ``now``, as `restore` gives it, takes on a CPU with the same threads the very steps it would
        have taken.
        """
        per_epoch = -(-len(split.train) // settings.batch_size)
        steps = epochs * per_epoch
        warm_up = round(settings.warm_up * steps)
        now = now or Progress(self._parameters())
        began = time.monotonic() - (now.rows[-1]["seconds"] if now.rows else 0.0)
        every = 10 if self.name == "head" else 1  # an epoch of the head takes less than its scores

        def state() -> dict[str, Any]:
            return {
                **vars(now),
                "parameters": [parameter.detach() for parameter in self.parameters],
                "optimizer": self.optimizer.state_dict(),
            }

        def over() -> bool:
            return now.epoch > epochs or now.epoch > now.best_epoch + settings.patience

        while not over():
            order = np.random.default_rng((settings.seed, now.epoch)).permutation(split.train)
            for batch in range(now.batch, per_epoch if now.epoch else 0):
                if stopped():
                    keep(state)
                    break
                factor = rate_factor((now.epoch - 1) * per_epoch + batch, steps, warm_up)
                for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
                    group["lr"] = rate * factor
                first = batch * settings.batch_size
                now.losses.append(self.step(order[first : first + settings.batch_size]))
                now.batch += 1
                keep(state)
            finite = [loss for loss in now.losses if math.isfinite(loss)]
            if now.losses and not finite:
                raise NormWearError(
                    f"epoch {now.epoch}: no step had a finite loss and gradient; lower the learning "
                    f"rate ({self.rates[-1]:g}), or check the signals' units"
                )
            validation, prediction = self.evaluate(split.validation)
            if validation < now.best:
                now.best, now.best_epoch, now.kept = validation, now.epoch, self._parameters()
            row = {
                "stage": self.name,
                "epoch": now.epoch,
                "loss": float(np.mean(finite)) if finite else None,
                "validation_loss": validation if math.isfinite(validation) else math.inf,
                "learning_rate": max(group["lr"] for group in self.optimizer.param_groups),
                "skipped_steps": len(now.losses) - len(finite),
                "seconds": round(time.monotonic() - began, 3),
            }
            now.epoch, now.batch, now.losses = now.epoch + 1, 0, []
            last = over() or stopped()
            if last or row["epoch"] % every == 0:
                if np.isfinite(prediction).all():
                    row |= scores(data.task, data.labels[split.validation], prediction)
                progress(_line(row, epochs, data.task, now.best_epoch))
            now.rows.append(plain(row))
            keep(state)
            if last:
                break
        with torch.no_grad():
            for parameter, value in zip(self.parameters, now.kept, strict=True):
                parameter.copy_(value)
        return now.rows

    def _parameters(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def restore(self, state: Mapping[str, Any]) -> Progress:
        """Takes parameters and moments from the state that ``keep`` was told of, and where it stood."""
        now = Progress(**{each.name: state[each.name] for each in fields(Progress)})
        if now.epoch != len(now.rows) or now.best_epoch > now.epoch:
            raise ValueError("another number of epochs than their rows")
        moments = state["optimizer"]["state"]
        shapes = [parameter.shape for parameter in self.parameters]
        known = [state["parameters"], now.kept]
        if moments:  # there are none before the first step
            known += [
                [moments[i][m] for i in range(len(shapes))] for m in ("exp_avg", "exp_avg_sq")
            ]
        for tensors in known:
            if [value.shape for value in tensors] != shapes:
                raise ValueError("parameters of other shapes")
        for parameter, value in zip(self.parameters, state["parameters"], strict=True):
            parameter.copy_(value)
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
        groups = state["optimizer"]["param_groups"]
        for group, saved in zip(self.optimizer.param_groups, groups, strict=True):
            group["lr"] = saved["lr"]
        return now


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
