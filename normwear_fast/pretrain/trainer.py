"""The pretraining loop: one process a device, exact resume, and never a NaN weight.

Everything a step does is a function of the seed and the step's number: which series, how they are
mixed, what is masked. A checkpoint therefore holds weights, moments and a step count, and a run that
goes on after a kill takes, on a CPU with the same threads, the very steps it would have taken.

    series (B, C, 388) --SeriesPatches--> kept pixels -> encoder -> decoder -> loss      a micro-batch
    accumulate x processes micro-batches -> clip -> AdamW                                a step

Source of the recipe: Luo et al. 2026 (arXiv 2412.09758), pretraining.
"""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from normwear_fast.checkpoint import CHECKPOINT_FILE, check_same, crc32, locked
from normwear_fast.config import NormWearConfig
from normwear_fast.errors import InputError, OutputError, UsageError, one_line, reading, require
from normwear_fast.interrupts import graceful_stop
from normwear_fast.optimization import decays
from normwear_fast.pretrain.autoencoder import MaskedAutoencoder
from normwear_fast.pretrain.checkpoint import CHECKPOINT, check_output, discard
from normwear_fast.pretrain.logs import PROBES_FILE, STEPS_FILE, Log
from normwear_fast.pretrain.masking import Noise, draw_noise, kept_patches, mask_of
from normwear_fast.pretrain.pixels import SeriesPatches
from normwear_fast.pretrain.settings import (
    AVERAGED,
    PretrainReport,
    PretrainSettings,
    RunSettings,
)

if TYPE_CHECKING:
    from lightning_fabric import Fabric

    from normwear_fast.evaluate.samples import SampleSet

MAX_SKIPPED = 50
"""Steps in a row without a finite loss after which a run ends: it would never recover."""

PICTURED = 2
"""Windows whose reconstruction is drawn."""


class Shards(Protocol):
    """What the trainer asks of its data; `data.SeriesShards` is the one on disk."""

    def __len__(self) -> int: ...

    def series(self, index: int) -> NDArray[np.float32]: ...


class TrainingStep(nn.Module):
    """Series and noise to loss and reconstruction: what a device does with a micro-batch.

    Args:
        model: trained.
        scheme: of the masks.
        precision: ``bfloat16`` is autocast around the encoder and decoder alone. Fabric's own mixed
            precision rounds a module's inputs too, and a rounded series has no second difference left.
        compile: whether the encoder and decoder go through torch.compile.
    """

    def __init__(
        self,
        model: MaskedAutoencoder,
        scheme: str,
        *,
        precision: str = "float32",
        compile: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.scheme: Any = scheme
        self.autocast = precision == "bfloat16"
        self.series_patches = SeriesPatches(model.config)
        self._reconstruct = model.reconstruct
        if compile:
            self._reconstruct = torch.compile(model.reconstruct, dynamic=False)

    def forward(self, series: Tensor, noise: Noise) -> tuple[Tensor, Tensor]:
        """(B, C, samples) and its (B C) rows of noise -> the mean squared error, (B, C, samples)."""
        kept = kept_patches(noise, self.scheme, self.model.config)
        pixels = self.series_patches(series.flatten(0, 1), kept)
        with torch.autocast(series.device.type, torch.bfloat16, enabled=self.autocast):
            reconstruction = self._reconstruct(pixels, kept).float()
        return F.mse_loss(reconstruction, series), reconstruction


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weights of two or more dimensions, which decay; biases, norms and the two tokens, which do not."""
    decayed: list[Tensor] = []
    free: list[Tensor] = []
    for value in model.parameters():
        if value.requires_grad:
            (decayed if decays(value) else free).append(value)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": free, "weight_decay": 0.0},
    ]


class Order:
    """Which series a step sees: epochs of all of them, each shuffled by the seed and its number."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed
        self._epoch, self._permutation = -1, np.empty(0, np.int64)

    def __call__(self, first: int, windows: int) -> NDArray[np.int64]:
        """Indices of draws ``first .. first + windows - 1`` since the start of the run."""
        found = np.empty(windows, np.int64)
        for i, draw in enumerate(range(first, first + windows)):
            epoch, position = divmod(draw, self.count)
            if epoch != self._epoch:
                generator = np.random.default_rng((self.seed, 0, epoch))
                self._epoch, self._permutation = epoch, generator.permutation(self.count)
            found[i] = self._permutation[position]
        return found


class _Batches:
    """The micro-batches of this process, the next one made while the device works on this one."""

    def __init__(self, shards: Shards, config: NormWearConfig, settings: PretrainSettings) -> None:
        self.shards, self.config, self.settings = shards, config, settings
        self._order = Order(len(shards), settings.seed)
        self._thread = ThreadPoolExecutor(1, "batch")
        self._next: tuple[int, Future[Tensor]] | None = None

    def _make(self, number: int) -> Tensor:
        from normwear_fast.pretrain.data import training_batch

        size = self.settings.batch_size
        batch = training_batch(
            cast(Any, self.shards),
            self._order(number * size, size),
            channels=self.config.pretrain_channels,
            samples=self.config.pretrain_samples,
            mixup=self.settings.mixup,
            rng=np.random.default_rng((self.settings.seed, 1, number)),
        )
        return torch.from_numpy(batch)

    def get(self, number: int, following: int) -> Tensor:
        """Micro-batch ``number`` of the run; starts on ``following``."""
        if self._next is not None and self._next[0] == number:
            batch = self._next[1].result()
        else:
            batch = self._thread.submit(self._make, number).result()
        self._next = following, self._thread.submit(self._make, following)
        return batch

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)


def pretrain(
    shards: Shards,
    config: NormWearConfig,
    settings: PretrainSettings,
    output: str | Path,
    *,
    run: RunSettings | None = None,
    initial: dict[str, Tensor] | None = None,
    probe: SampleSet | None = None,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> PretrainReport | None:
    """Pretrains a masked autoencoder, or goes on with what is in ``output``.

    Args:
        shards: 65 Hz series, `data.SeriesShards`.
        config: sizes and variants.
        settings: what decides the weights.
        output: folder of ``checkpoint.pt``, ``model.safetensors`` and ``config.json`` (released names),
            ``steps.csv``, ``probes.csv``, ``pictures/`` and ``tensorboard/``.
        run: how the run is carried out.
        initial: released names to start from, decoder included; None for random ones by the seed.
        probe: a labelled set, probed with the encoder's embeddings every ``probe_every`` steps.
        overwrite: start anew where ``output`` holds another run; what is not a run's is refused.
        say: told what is being done, a line at a time.

    Returns:
        What the run came to; None in other processes than the first, where there are several.

    Raises:
        UsageError: settings the data, the output or this machine cannot serve.
        OutputError: the output cannot be written, holds other things, or a run of other settings.
        InputError: too many steps in a row without a finite loss.
    """
    run = run or RunSettings()
    if len(shards) == 0:
        raise UsageError("no series to train on; normwear-fast prepare makes some")
    if probe is not None and not config.in_engine:
        raise UsageError(
            f"a probe needs an encoder that encode can run; fusion {config.fusion!r} on tokens of the "
            f"{config.tokens} is not one"
        )
    try:
        from lightning_fabric import Fabric
    except ImportError:
        raise UsageError(
            "pretraining needs lightning-fabric; pip install 'normwear-fast[train]'"
        ) from None
    try:
        fabric = Fabric(
            accelerator=run.accelerator,
            devices=run.devices,
            strategy=run.strategy,
        )
    # Fabric's own words, whatever class it chose for them.
    except Exception as error:
        raise UsageError(
            f"device {run.accelerator}, devices {run.devices}, strategy {run.strategy}: "
            f"{one_line(error)}"
        ) from None
    require("torch.utils.tensorboard", "pretraining", "train")
    if run.picture_every:
        require("matplotlib.figure", "a picture of the reconstruction", "plots")
    check_output(Path(output), overwrite=overwrite)
    task = _Task(shards, config, settings, Path(output), run, initial, probe, overwrite, say)
    report = cast(PretrainReport, fabric.launch(task))
    return report if fabric.is_global_zero else None


@dataclass
class _Task:
    """One process's part of a run; called by Fabric in each."""

    shards: Shards
    config: NormWearConfig
    settings: PretrainSettings
    output: Path
    run: RunSettings
    initial: dict[str, Tensor] | None
    probe: SampleSet | None
    overwrite: bool
    say: Callable[[str], None]

    def __call__(self, fabric: Fabric) -> PretrainReport:
        if not fabric.is_global_zero:
            self.say = lambda line: None
        try:
            self.output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{self.output}: cannot be made ({one_line(error)})") from None
        with locked(self.output) if fabric.is_global_zero else nullcontext():
            return self._train(fabric)

    def _train(self, fabric: Fabric) -> PretrainReport:
        settings, run = self.settings, self.run
        windows = settings.batch_size * settings.accumulate * fabric.world_size
        identity = self._identity(fabric.world_size)
        state = None if self.overwrite else CHECKPOINT.load(self.output)
        fabric.barrier()
        if state is not None:
            check_same(self.output, state["identity"], identity)

        self.model = MaskedAutoencoder(
            self.config, seed=settings.seed if self.initial is None else None
        )
        if self.initial is not None:
            self.model.load_state_dict(self.initial, strict=True)
        if fabric.device.type == "cpu":
            from normwear_fast.benchmarking import set_allocator_thresholds

            set_allocator_thresholds(2**30)
        step_module = TrainingStep(
            self.model, settings.mask, precision=settings.precision, compile=run.compile
        )
        optimizer = torch.optim.AdamW(
            parameter_groups(step_module, settings.weight_decay),
            lr=settings.learning_rate(0, windows),
            betas=(0.9, 0.95),
            fused=True,
        )
        module, optimizer = fabric.setup(step_module, optimizer)
        module.train()
        step, skipped = 0, 0
        if state is not None:
            what = "does not fit this run; start anew with --overwrite or in another folder"
            with reading(self.output / CHECKPOINT_FILE, OutputError, what):
                self._restore(module, optimizer, state)
            step, skipped = int(state["step"]), int(state["skipped"])
            state = None  # the weights a second time
            self.say(f"going on after step {step} of {settings.steps}")
        log = None
        if fabric.is_global_zero:
            if self.overwrite:  # only now, when nothing is left that could refuse this run
                discard(self.output)
            log = Log(self.output, step)
        batches = _Batches(self.shards, self.config, settings)
        losses = log.last_losses(AVERAGED) if log is not None else []
        in_a_row, first_step, began = 0, step, time.perf_counter()
        try:
            with graceful_stop(self._stopping) as stopping:
                while step < settings.steps:
                    rate = settings.learning_rate(step, windows)
                    for group in optimizer.param_groups:
                        group["lr"] = rate
                    started = time.perf_counter()
                    loss, norm, stop = self._step(
                        fabric, module, optimizer, batches, step, stopping
                    )
                    finite = math.isfinite(loss) and math.isfinite(norm)
                    step += 1
                    skipped += not finite
                    in_a_row = 0 if finite else in_a_row + 1
                    if finite:
                        losses = [*losses[1 - AVERAGED :], loss]
                    if log is not None:
                        row = {
                            "step": step,
                            "loss": loss,
                            "learning_rate": rate,
                            "gradient_norm": norm,
                            "skipped": skipped,
                            "windows_per_second": windows / (time.perf_counter() - started),
                        }
                        log.write(STEPS_FILE, row)
                        self._tell(step, began, first_step, losses, rate, skipped)
                    if in_a_row >= MAX_SKIPPED:
                        raise InputError(
                            f"steps {step - in_a_row + 1} to {step}: no finite loss or gradient; the "
                            "weights before them are kept; a lower learning rate may help"
                        )
                    last = stop or step == settings.steps
                    if last or _due(step, run.checkpoint_every):
                        self._save(fabric, module, optimizer, step, skipped, identity)
                    if _due(step, run.picture_every):
                        self._picture(module, log, step, fabric.device)
                    if self.probe is not None and _due(step, run.probe_every):
                        self._probe(module, optimizer, log, step, fabric.device)
                        fabric.barrier()
                    if stop:
                        break
                    module.train()
        finally:
            batches.close()
            if log is not None:
                log.close()
        fabric.barrier()  # a process that ended would break off what others still wait for
        seconds = time.perf_counter() - began
        return PretrainReport(
            step=step,
            steps=settings.steps,
            loss=float(np.mean(losses)) if losses else math.nan,
            skipped=skipped,
            windows_per_second=(step - first_step) * windows / seconds,
        )

    def _step(
        self,
        fabric: Fabric,
        module: Any,
        optimizer: Any,
        batches: _Batches,
        step: int,
        stopping: Callable[[], bool],
    ) -> tuple[float, float, bool]:
        """One step: the mean loss and gradient norm over all processes, and whether to stop."""
        settings, rank, world = self.settings, fabric.global_rank, fabric.world_size
        buffers = [(each, each.clone()) for each in self.model.spatial_recon.norm.buffers()]
        total = torch.zeros((), device=fabric.device)
        for i in range(settings.accumulate):
            number = (step * settings.accumulate + i) * world + rank
            series = batches.get(number, number + world)
            if fabric.device.type == "cuda":
                series = series.pin_memory()
            series = series.to(fabric.device, non_blocking=True)
            generator = torch.Generator(fabric.device)
            generator.manual_seed(_seed_of(settings.seed, number))
            noise = draw_noise(
                self.config,
                cast(Any, settings.mask),
                len(series) * series.shape[1],
                generator=generator,
                device=fabric.device,
            )
            more = i + 1 < settings.accumulate
            with fabric.no_backward_sync(module, enabled=more):
                loss = module(series, noise)[0] / settings.accumulate
                fabric.backward(loss)
            total += loss.detach()
        norm = fabric.clip_gradients(
            module, optimizer, max_norm=settings.clip, error_if_nonfinite=False
        )
        assert norm is not None
        facts = torch.stack((total, norm.to(total.dtype), total.new_tensor(float(stopping()))))
        facts = cast(Tensor, fabric.all_reduce(facts, reduce_op="mean"))
        mean_loss, mean_norm, stop = facts.tolist()
        if math.isfinite(mean_loss) and math.isfinite(mean_norm):
            optimizer.step()
        else:
            for buffer, before in buffers:
                buffer.copy_(before)
        optimizer.zero_grad(set_to_none=True)
        return mean_loss, mean_norm, stop > 0

    def _identity(self, world_size: int) -> dict[str, Any]:
        """What a run that goes on must agree in."""
        shown = np.linspace(0, len(self.shards) - 1, min(16, len(self.shards))).astype(int)
        check = 0
        for index in shown:
            check = zlib.crc32(np.ascontiguousarray(self.shards.series(int(index))).data, check)
        return {
            **{f"config.{name}": value for name, value in self.config.to_dict().items()},
            **asdict(self.settings),
            "processes": world_size,
            "series": len(self.shards),
            "series_crc32": check,
            "initial_crc32": crc32(self.initial or {}),
        }

    def _state(self, module: Any, optimizer: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Released names, and the optimiser's moments; whole on the first process."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

        weights, moments = get_state_dict(
            module._forward_module,
            optimizer.optimizer,
            options=StateDictOptions(full_state_dict=True, cpu_offload=True),
        )
        released = {name.removeprefix("model."): value for name, value in weights.items()}
        return cast(dict[str, Tensor], released), moments

    def _save(
        self,
        fabric: Fabric,
        module: Any,
        optimizer: Any,
        step: int,
        skipped: int,
        identity: dict[str, Any],
    ) -> None:
        """The checkpoint, and the released layout beside it."""
        from normwear_fast.weights import save_pretrained

        weights, moments = self._state(module, optimizer)
        if fabric.is_global_zero:
            state = {"identity": identity, "step": step, "skipped": skipped}
            CHECKPOINT.save(self.output, {**state, "model": weights, "optimizer": moments})
            save_pretrained(
                self.output,
                weights,
                self.config,
                optimized_cwt=True,
                metadata={"source": "normwear-fast pretrain", "step": str(step)},
            )
        fabric.barrier()

    def _restore(self, module: Any, optimizer: Any, state: dict[str, Any]) -> None:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

        set_state_dict(
            module._forward_module,
            optimizer.optimizer,
            model_state_dict={f"model.{name}": value for name, value in state["model"].items()},
            optim_state_dict=state["optimizer"],
            options=StateDictOptions(full_state_dict=True),
        )

    def _stopping(self) -> None:
        self.say("stopping after this step; once more to stop at once")

    def _tell(
        self,
        step: int,
        began: float,
        first: int,
        losses: Sequence[float],
        rate: float,
        skipped: int,
    ) -> None:
        steps = self.settings.steps
        if step != first + 1 and step % max(1, min(50, steps // 20)) and step != steps:
            return
        each = (time.perf_counter() - began) / (step - first)
        loss = f"{np.mean(losses):.5f}" if losses else "none yet"
        extra = f", {skipped} skipped" if skipped else ""
        self.say(
            f"step {step} of {steps}: loss {loss}, learning rate {rate:.2e}, {each:.2f} s a step, "
            f"{each * (steps - step) / 60:.0f} min to go{extra}"
        )

    @torch.no_grad()
    def _picture(self, module: Any, log: Log | None, step: int, device: torch.device) -> None:
        """The same windows and masks every time, so that pictures show the training alone."""
        from normwear_fast.pretrain.data import training_batch
        from normwear_fast.pretrain.pictures import reconstruction_figure

        config, scheme = self.config, cast(Any, self.settings.mask)
        series = training_batch(
            cast(Any, self.shards),
            Order(len(self.shards), self.settings.seed)(0, min(PICTURED, len(self.shards))),
            channels=config.pretrain_channels,
            samples=config.pretrain_samples,
            mixup=False,
            rng=np.random.default_rng((self.settings.seed, 2)),
        )
        generator = torch.Generator(device).manual_seed(_seed_of(self.settings.seed, 0))
        rows = series.shape[0] * series.shape[1]
        noise = draw_noise(config, scheme, rows, generator=generator, device=device)
        module.eval()
        found = module(torch.from_numpy(series).to(device), noise)[1].cpu().numpy()
        if log is not None:
            removed = mask_of(kept_patches(noise, scheme, config).cpu(), config.grid_tokens - 1)
            hidden = removed.view(*found.shape[:2], config.grid_rows, config.grid_columns).mean(3)
            figure = reconstruction_figure(series, found, hidden.numpy())
            log.picture(figure, step)

    def _probe(
        self, module: Any, optimizer: Any, log: Log | None, step: int, device: torch.device
    ) -> None:
        """Scores of a linear probe on the encoder as it stands."""
        from normwear_fast.evaluate.baselines import NormWear
        from normwear_fast.evaluate.run import evaluate
        from normwear_fast.model import FastNormWear

        weights, _ = self._state(module, optimizer)
        if log is None:
            return
        assert self.probe is not None
        encoder = FastNormWear(True, config=self.config, precision="float32")
        encoder.load_state_dict(weights)
        embedder = NormWear(encoder.to(device), f"step {step}")
        rows = evaluate([self.probe], [embedder], resamples=0, seed=self.settings.seed).rows
        scores = {f"{row.name} {row.task.name}": float(row.result.score) for row in rows}
        log.write(PROBES_FILE, {"step": step, **scores})
        shown = ", ".join(f"{name} {score:.4f}" for name, score in scores.items())
        self.say(f"step {step}: probe {shown}")


def _seed_of(seed: int, number: int) -> int:
    """A 63-bit seed of a micro-batch's masks."""
    return int(np.random.SeedSequence((seed, 3, number)).generate_state(1, np.uint64)[0] >> 1)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
