"""The loop: a head on embeddings made once, then, if asked for, encoder and head together.

Every mode starts with the head alone, on embeddings that the fast encoder makes once. ``full`` and
``lora`` go on from there: a good head keeps the first steps from distorting what the encoder knows
(Kumar et al. 2022, arXiv 2202.10054), and the result is never worse on the validation part than the head.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from normwear_fast import __version__
from normwear_fast.benchmarking import set_allocator_thresholds
from normwear_fast.checkpoint import check_same, discard_checkpoint
from normwear_fast.config import SAMPLING_RATE
from normwear_fast.encode.prepare import NOT_FINITE
from normwear_fast.engine import UNIT_BATCHES, resolve_precision
from normwear_fast.errors import InputError, UsageError
from normwear_fast.finetune.data import LabelledWindows
from normwear_fast.finetune.network import (
    FineTuneNetwork,
    Head,
    merge_lora,
    parameter_groups,
    require_gradients,
)
from normwear_fast.finetune.predictor import Predictor, check_output
from normwear_fast.finetune.resume import CHECKPOINT, Keeper, identity_of, run_folder, state_of
from normwear_fast.finetune.settings import EPOCHS, LEARNING_RATE, FineTuneSettings
from normwear_fast.finetune.split import Split, split_windows
from normwear_fast.finetune.stage import Examples, Stage, scores
from normwear_fast.interrupts import graceful_stop
from normwear_fast.model import FastNormWear
from normwear_fast.outputs import progress
from normwear_fast.packing import plan_units, window_tokens

if TYPE_CHECKING:
    from lightning_fabric import Fabric

TRAINING_TOKENS = {"cpu": 4096, "cuda": 16384}
"""Tokens whose activations are held for the backward pass: some 1.2 MB each in float32 at the released
size, half in bfloat16. A step of more is summed up in parts, exactly."""


@dataclass(frozen=True)
class _Run:
    """What the stages of one fit share."""

    data: LabelledWindows
    split: Split
    targets: Tensor
    weights: Tensor
    stopped: Callable[[], bool]
    keeper: Keeper
    before: dict[str, Any] | None


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
    def fit(
        self,
        data: LabelledWindows,
        folder: str | Path | None = None,
        *,
        overwrite: bool = False,
    ) -> Predictor:
        """Trains and judges, always from the weights this was made with.

        Args:
            data: the labelled windows.
            folder: where the result is written, and meanwhile a checkpoint: after a kill the same call
                goes on from it to the same result, bit for bit on a CPU with the same threads.
            overwrite: begin anew where the folder holds a fine-tuned model, which is replaced at the end,
                or the checkpoint of a run, which is gone at once.

        Returns:
            The best model on the validation part, judged on that part and on the test part if there
            is one, both with the encoder that will predict, which is its own: a later fit leaves it
            alone. `Predictor.save_pretrained` writes it elsewhere.

        Ctrl-C ends training after the step under way, with the best so far; ``interrupted`` says so, and
        the same call goes on after that step.

        Raises:
            InputError: a split that cannot be, or data without a window the model has a value for.
            OutputError: the folder holds something else, a run of other settings, data or weights, or
                cannot be written.
            NormWearError: training that gives no finite number.
        """
        # Data that cannot be split are refused before the hours that encoding them may take; which
        # windows have a value, and with them the split itself, are known after it.
        split_windows(replace(data, notes=[]), self.settings.validation, self.settings.seed)
        if folder is None:
            return self._fit(data)
        folder = Path(folder)
        # Before the lock too: what a kill left beside the folder comes back to a name that is free.
        check_output(folder, overwrite=overwrite, going_on=True)
        with run_folder(folder):
            check_output(folder, overwrite=overwrite, going_on=True)
            predictor = self._fit(data, folder, overwrite)
            predictor._replace(folder, unfinished=self.interrupted)
        return predictor

    def _fit(
        self, data: LabelledWindows, folder: Path | None = None, overwrite: bool = False
    ) -> Predictor:
        self.history = []
        self.interrupted = False
        settings, tuned = self.settings, self.settings.mode != "head"
        data = replace(data, notes=list(data.notes))
        model = copy.deepcopy(self.model).to(self.device)
        base = dict(model.weights)
        keeper, before = self._going_on(data, model, folder, overwrite)
        channels = len(data.windows[0]) if settings.channel_pool == "concat" else 1
        head = Head(channels * model.config.embed_dim, data.task, settings.seed).to(self.device)
        made = None  # the embeddings of all windows, until the head is trained
        if before is None or before["stage"] in ("encoding", "head"):
            made = np.empty((len(data), head.linear.in_features), np.float32)
            self._embed_all(model, data.windows, made, keeper, before)
            finite = np.asarray(np.isfinite(made).all(axis=1))
        else:
            with keeper.restoring():
                finite = before["finite"].numpy()
                if finite.shape != (len(data),) or finite.dtype != bool:
                    raise ValueError("of another number of windows")
        data = _finite(data, finite)
        split = split_windows(data, settings.validation, settings.seed)
        targets = torch.from_numpy(data.labels).to(self.device)
        if made is not None:
            embeddings = made if finite.all() else made[finite]
            train = torch.from_numpy(embeddings[split.train]).to(self.device)
            head.standardise(train, targets[split.train] if data.task.kind == "reg" else None)
        else:
            assert before is not None
            embeddings = np.empty((len(data), head.linear.in_features), np.float32)
            with keeper.restoring():
                head.load_state_dict(before["head"])
                self.history += before["history"]
        if data.task.kind == "reg":
            targets = ((targets - head.target_mean) / head.target_std).float()
        weights = _sample_weights(data, split, settings.balanced).to(self.device)
        with graceful_stop(_say_stopping) as stopped:
            run = _Run(data, split, targets, weights, stopped, keeper, before)
            if made is not None:
                self._fit_head(head, embeddings, made, run)
                made = None
            if tuned:
                self._fit_network(model, head, finite, base, run)
            self.interrupted = keeper.stopped
        if tuned:
            held_out = np.sort(np.concatenate([split.validation, split.test]))
            judged = np.empty((len(held_out), embeddings.shape[1]), np.float32)
            self._embed(model, [data.windows[i] for i in held_out], judged)
            embeddings[held_out] = judged
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

    def _going_on(
        self, data: LabelledWindows, model: FastNormWear, folder: Path | None, overwrite: bool
    ) -> tuple[Keeper, dict[str, Any] | None]:
        """What writes the run's checkpoints, and the state that it goes on from."""
        if folder is None:
            return Keeper(None, {}), None
        settings = asdict(self.settings) | {
            "precision": self.precision,
            "embedding_precision": model.resolved_precision,
            "optimized_cwt": model.optimized_cwt,
        }
        identity = identity_of(data, settings, model.state_dict())
        if overwrite:
            discard_checkpoint(folder)
        before = CHECKPOINT.load(folder)
        if before is not None:
            check_same(folder, before["identity"], identity)
        return Keeper(folder, identity), before

    def _embed_all(
        self,
        model: FastNormWear,
        windows: Sequence[NDArray[np.float32]],
        made: NDArray[np.float32],
        keeper: Keeper,
        before: dict[str, Any] | None,
    ) -> None:
        """Fills ``made`` with the embeddings of all windows, the first of which a checkpoint may have."""
        done = 0
        if before is None:
            self.progress(f"encoding {len(windows):,} windows once")
        else:
            with keeper.restoring():
                rows = before.pop("embeddings").numpy()
                if rows.shape[1:] != made.shape[1:] or rows.dtype != made.dtype:
                    raise ValueError("embeddings of another width")
                done = len(rows)
                made[:done] = rows
            self.progress(f"going on: {done:,} of {len(windows):,} windows are encoded")
        # Without a folder nothing is kept, and Ctrl-C is the usual exception, at once.
        asked: AbstractContextManager[Callable[[], bool]] = nullcontext(lambda: False)
        if keeper.folder is not None:
            asked = graceful_stop(_say_stopping_encoding)
        with asked as stopped:

            def after(done: int) -> None:
                rows = torch.from_numpy(made[:done])  # whose storage ends there too
                keeper.offer(lambda: state_of("encoding", embeddings=rows), stopped())
                if stopped():
                    raise KeyboardInterrupt

            self._embed(model, windows, made, done, after)

    def _embed(
        self,
        model: FastNormWear,
        windows: Sequence[NDArray[np.float32]],
        made: NDArray[np.float32],
        done: int = 0,
        after: Callable[[int], None] = lambda done: None,
    ) -> None:
        """Fills (n, F) from row ``done`` on with the fast encoder; ``after`` is told how far that is.

        It goes by ``encode``'s own work units, which give the same bits in a call of their own.
        """
        units = plan_units(_costs(model, windows), UNIT_BATCHES * model.batch_tokens_default())
        with progress(None, len(windows)) as advance:
            for unit in units:
                if unit.stop > done:
                    made[unit.start : unit.stop] = model.encode(
                        windows[unit.start : unit.stop],
                        SAMPLING_RATE,
                        pool=self.settings.pool,
                        channels=self.settings.channel_pool,
                        resample="never",
                        show_progress_bar=False,
                    )
                    after(unit.stop)
                for _ in unit:
                    advance()

    def _fit_head(
        self, head: Head, embeddings: NDArray[np.float32], made: NDArray[np.float32], run: _Run
    ) -> None:
        whole = self.settings.mode == "head"
        rate = (self.settings.learning_rate if whole else None) or LEARNING_RATE["head"]
        decay = self.settings.weight_decay
        groups = [
            {"params": [head.linear.weight], "lr": rate, "weight_decay": decay},
            {"params": [head.linear.bias], "lr": rate, "weight_decay": 0.0},
        ]
        examples = Examples(list(embeddings), [1] * len(embeddings), len(embeddings), self.device)
        epochs = (self.settings.epochs if whole else None) or EPOCHS["head"]
        known = {"embeddings": torch.from_numpy(made)}
        self._fit_stage("head", head, head, groups, examples, epochs, run, known)

    def _fit_network(
        self,
        model: FastNormWear,
        head: Head,
        finite: NDArray[np.bool_],
        base: dict[str, Any],
        run: _Run,
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
        budget = settings.batch_tokens or TRAINING_TOKENS.get(self.device.type, 4096)
        windows = run.data.windows
        examples = Examples(windows, _costs(model, windows), budget, self.device)
        epochs = settings.epochs or EPOCHS[settings.mode]
        known = {"finite": torch.from_numpy(finite), "head": head.state_dict()}
        try:
            self._fit_stage(settings.mode, network, head, groups, examples, epochs, run, known)
        finally:
            if settings.mode == "lora":
                merge_lora(model)
            model.requires_grad_(False)
            model.weights = {"source": "fine-tuned", **{f"base_{k}": v for k, v in base.items()}}

    def _fit_stage(
        self,
        name: str,
        module: nn.Module,
        head: Head,
        groups: list[dict[str, Any]],
        examples: Examples,
        epochs: int,
        run: _Run,
        known: dict[str, Any],
    ) -> None:
        """Fits, from where a checkpoint of this stage stands; ``known`` goes into its checkpoints too."""
        fabric = _fabric(self.device)
        stage = Stage(name, fabric, module, head, groups, examples, run.targets, run.weights)
        now = None
        if run.before is not None and run.before["stage"] == name:
            with run.keeper.restoring():
                now = stage.restore(run.before.pop("progress"))
            self.progress(f"going on: {name}, epoch {now.epoch}, after {now.batch} of its steps")
        known = known | {"history": list(self.history)}

        def keep(state: Callable[[], dict[str, Any]]) -> None:
            run.keeper.offer(lambda: state_of(name, progress=state(), **known), run.stopped())

        self.history += stage.fit(
            run.data, run.split, epochs, self.settings, self.progress, run.stopped, keep, now
        )

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


def _finite(data: LabelledWindows, finite: NDArray[np.bool_]) -> LabelledWindows:
    """The same without the windows whose embeddings are not finite; counted."""
    if finite.all():
        return data
    if not finite.any():
        raise InputError("no window has a finite embedding; check the signals' units")
    kept = np.flatnonzero(finite)
    return replace(
        data,
        windows=[data.windows[i] for i in kept],
        origins=[data.origins[i] for i in kept],
        labels=data.labels[kept],
        subjects=data.subjects[kept],
        split=None if data.split is None else data.split[kept],
        skipped=data.skipped | {NOT_FINITE: int((~finite).sum())},
    )


def _costs(model: FastNormWear, windows: Sequence[NDArray[np.float32]]) -> list[int]:
    """Tokens of each window."""
    return [
        window_tokens(len(window), window.shape[1], model.optimized_cwt, model.config)
        for window in windows
    ]


def _sample_weights(data: LabelledWindows, split: Split, balanced: bool) -> Tensor:
    """(n,) float32: 1, or training windows / (classes * windows of that class)."""
    if not balanced or data.task.kind == "reg":
        return torch.ones(len(data))
    counts = np.bincount(data.labels[split.train], minlength=len(data.task.classes))
    present = counts > 0
    of_class = np.zeros(len(counts))
    of_class[present] = len(split.train) / (present.sum() * counts[present])
    return torch.from_numpy(of_class[data.labels].astype(np.float32))


def _say_stopping() -> None:
    # In a signal handler: print could find stderr's buffer in the middle of a write.
    os.write(
        2, b"\nending training after this step, with the best so far; Ctrl-C again ends at once\n"
    )


def _say_stopping_encoding() -> None:
    os.write(2, b"\nstopping after these windows; Ctrl-C again ends at once\n")
