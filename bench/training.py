"""Windows a second of pretraining, against a plain port of the published loop, interleaved.

    python -m bench.training                               # small model, this machine
    python -m bench.training --model-size base --batch-size 4
    python -m bench.training --save training               # also writes bench/results/NAME.json

*ours* is `pretrain` itself: series in memory, mixup, masks, scalograms and checks of every step, its CSV
rows included. *published* is its loop in plain words: scalograms stored as files (1.2 MB a window of 4
channels, in the page cache here) and read through a DataLoader, every patch projected, an argsort and
two gathers a sequence, the reference modules under bfloat16 autocast, AdamW as PyTorch makes it, no
compilation. *published, float32* is the same without autocast, which slows down a CPU whose bfloat16
products are no faster. Rounds alternate in one process; the first steps of each are left out.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from bench.saving import save
from normwear_fast import NormWearConfig, scalogram
from normwear_fast.benchmarking import set_allocator_thresholds
from normwear_fast.pretrain.masking import kept_counts
from normwear_fast.pretrain.settings import PretrainSettings, RunSettings
from normwear_fast.pretrain.trainer import pretrain
from normwear_fast.reference import ReferenceNormWear

CHANNELS, SAMPLES = 4, 388
WARMUP_STEPS = 2
"""Steps at the start of every round that are not counted."""


class Series:
    """Noisy waves, in memory."""

    def __init__(self, count: int) -> None:
        generator = np.random.default_rng(0)
        time_s = np.arange(SAMPLES + 2) / 65
        rate = generator.uniform(3, 30, (count, CHANNELS, 1))
        wave = np.sin(rate * time_s) + 0.2 * generator.standard_normal(
            (count, CHANNELS, len(time_s))
        )
        self.values = wave.astype(np.float32)

    def __len__(self) -> int:
        return len(self.values)

    def series(self, index: int) -> np.ndarray:
        return self.values[index]


class StoredScalograms(Dataset[tuple[Tensor, Tensor]]):
    """A file a window: its scalogram (4, 3, 387, 65) and series (4, 388), float32."""

    def __init__(self, folder: Path, windows: Series) -> None:
        self.folder, self.count = folder, len(windows)
        for i in range(len(windows)):
            series = torch.from_numpy(windows.series(i)[None, :, 1 : SAMPLES + 1])
            np.savez(folder / f"{i}.npz", scalogram=scalogram(series)[0], series=series[0])

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        with np.load(self.folder / f"{index}.npz") as file:
            return torch.from_numpy(file["scalogram"]), torch.from_numpy(file["series"])


class PublishedLoop(ReferenceNormWear):
    """The forward pass as the paper's words put it, every patch projected before most are dropped."""

    def loss(self, pixels: Tensor, target: Tensor) -> Tensor:
        """(B, C, 3, 387, 65) and (B, C, 388), random masks."""
        x = self.patch_embed(pixels.flatten(0, 1)) + self.pos_embed[:, 1:]
        sequences, patches, _ = x.shape
        count = kept_counts(self.config)[0]
        shuffle = torch.rand(sequences, patches, device=x.device).argsort(dim=1)
        restore = shuffle.argsort(dim=1)
        kept = shuffle[:, :count, None]
        x = x.gather(1, kept.expand(-1, -1, x.shape[2]))
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(sequences, -1, -1)
        x = torch.cat((cls, x), dim=1)
        for layer in self.encoder_blocks:
            x = layer(x, CHANNELS)
        x = self.decoder_embed(self.norm(x))
        hidden = self.mask_token.expand(sequences, patches - count, -1)
        whole = torch.cat((x[:, 1:], hidden), dim=1)
        whole = whole.gather(1, restore[:, :, None].expand(-1, -1, x.shape[2]))
        x = torch.cat((x[:, :1], whole), dim=1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        x = self.temporal_recon(self.decoder_norm(x).transpose(1, 2))
        return F.mse_loss(self.spatial_recon(x.reshape(len(target), -1, x.shape[2])), target)


def published_rate(
    config: NormWearConfig, data: StoredScalograms, args: argparse.Namespace, autocast: bool
) -> float:
    """Windows a second: the median step of a round."""
    model = PublishedLoop(config).to(args.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, betas=(0.9, 0.95), weight_decay=0.05)
    loader = DataLoader(
        data, args.batch_size, shuffle=True, drop_last=True, num_workers=args.workers
    )
    seconds: list[float] = []
    while len(seconds) < WARMUP_STEPS + args.steps:
        began = time.perf_counter()
        for pixels, target in loader:
            pixels, target = pixels.to(args.device), target.to(args.device)
            with torch.autocast(args.device, torch.bfloat16, enabled=autocast):
                loss = model.loss(pixels, target)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            loss.item()
            now = time.perf_counter()
            seconds.append(now - began)
            began = now
            if len(seconds) == WARMUP_STEPS + args.steps:
                break
    return args.batch_size / statistics.median(seconds[WARMUP_STEPS:])


def our_rate(
    config: NormWearConfig, windows: Series, args: argparse.Namespace, folder: Path
) -> float:
    """Windows a second: the median step of a round of `pretrain`."""
    settings = PretrainSettings(
        steps=WARMUP_STEPS + args.steps,
        batch_size=args.batch_size,
        accumulate=1,
        mask="random",
        precision=args.precision,
    )
    run = RunSettings(
        accelerator=args.device,
        devices=1,
        compile=args.compile,
        checkpoint_every=0,
        picture_every=0,
    )
    pretrain(windows, config, settings, folder, run=run)
    with (folder / "steps.csv").open(newline="") as file:
        rates = [float(row["windows_per_second"]) for row in csv.DictReader(file)]
    return statistics.median(rates[WARMUP_STEPS:])


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    config = NormWearConfig.small() if args.model_size == "small" else NormWearConfig.base()
    windows = Series(args.windows)
    (folder / "stored").mkdir()
    data = StoredScalograms(folder / "stored", windows)
    set_allocator_thresholds(2**30)  # for all three; `pretrain` does so itself
    rates: dict[str, list[float]] = {"ours": [], "published": [], "published, float32": []}
    for i in range(args.rounds):
        rates["published"].append(published_rate(config, data, args, autocast=True))
        rates["ours"].append(our_rate(config, windows, args, folder / f"run{i}"))
        rates["published, float32"].append(published_rate(config, data, args, autocast=False))
        shown = ", ".join(f"{name} {values[-1]:.2f}" for name, values in rates.items())
        print(f"round {i}, windows/s: {shown}", flush=True)
    rows = {
        name: {"windows_per_s": statistics.median(values), "rounds": values}
        for name, values in rates.items()
    }
    over = {
        name: statistics.median(a / b for a, b in zip(rates["ours"], rates[name], strict=True))
        for name in ("published", "published, float32")
    }
    return {
        "model": args.model_size,
        "device": args.device,
        "batch_size": args.batch_size,
        "channels": CHANNELS,
        "our_precision": args.precision,
        "our_compile": args.compile,
        "loader_workers": args.workers,
        "steps_a_round": args.steps,
        "rates": rows,
        "ours_over": over,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model-size", choices=("base", "small"), default="small")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=10, help="counted steps of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--workers", type=int, default=1, help="DataLoader processes")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's)")
    parser.add_argument("--save", metavar="NAME", help="write bench/results/NAME.json")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        row = measure(args, Path(folder))
    print(json.dumps(row, indent=1))
    if args.save:
        save(args.save, {"training": row})
    return 0


if __name__ == "__main__":
    sys.exit(main())
