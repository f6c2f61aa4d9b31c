"""Fine-tuning in plain PyTorch: how noisy is a window of PPG? A head first, then the last layer too.

    python examples/fine_tune.py

`normwear-fast finetune` does it for labelled recordings: validation by subject, early stopping, LoRA.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from normwear_fast import FastNormWear, NormWearError, preprocess

EXAMPLES = Path(__file__).resolve().parent
rng = np.random.default_rng(0)


def noisy_windows(ppg: np.ndarray, rate: float, count: int) -> tuple[Tensor, Tensor]:
    """Windows of 6 s (B, 1, 390) with white noise, and their signal-to-noise ratios (B,) in bels."""
    samples, windows, ratios = round(6 * rate), [], rng.uniform(-1, 2, count)
    for ratio in ratios:
        start = rng.integers(len(ppg) - samples)
        window = ppg[start : start + samples]
        noise = rng.normal(0, window.std() * 10 ** (-ratio / 2), samples)
        windows.append(preprocess((window + noise)[None], rate, samples=390))  # as in pretraining
    return torch.tensor(np.stack(windows)).float(), torch.tensor(ratios).float()


def main() -> None:
    torch.manual_seed(0)
    table = EXAMPLES / "cohort" / "ppg" / "ppg_timer_ms.csv"
    timer_ms, ppg = np.loadtxt(table, delimiter=",", skiprows=1, unpack=True)
    rate = 1000 / np.diff(timer_ms).mean()  # 117 Hz
    early, late = np.array_split(ppg[timer_ms >= 36_000], 2)  # settled by 36 s
    x, y = noisy_windows(early, rate, 128)
    x_test, y_test = noisy_windows(late, rate, 64)

    model = FastNormWear.from_pretrained(EXAMPLES / "weights" / "tiny").requires_grad_(False)

    def embed(x: Tensor) -> Tensor:
        return model(x).mean(dim=(1, 2))  # (B, C, T, E), mean over channels and tokens

    # Nothing of the encoder requires a gradient yet: the call is the fast path, and made once.
    frozen = embed(x)
    mean, std = frozen.mean(dim=0), frozen.std(dim=0)
    head = nn.Linear(frozen.shape[1], 1)

    def loss(embeddings: Tensor, y: Tensor) -> Tensor:
        return mse_loss(head((embeddings - mean) / std)[:, 0], y)

    def report(stage: str) -> None:
        with torch.no_grad():  # the fast path, with the weights of this moment
            print(f"{stage}: RMSE {10 * loss(embed(x_test), y_test).sqrt():.1f} dB")

    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        loss(frozen, y).backward()
        optimizer.step()
    report("head on frozen embeddings")

    # From here the same call is differentiable. The head came first: a random one's first steps would
    # distort what the encoder knows (Kumar et al. 2022, arXiv 2202.10054).
    last = model.encoder_blocks[-1].requires_grad_(True)
    optimizer = torch.optim.AdamW([*last.parameters(), *head.parameters()])
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-4, total_steps=10)
    for _ in range(10):
        x, y = noisy_windows(early, rate, 16)  # fresh noise: the windows alone are few
        optimizer.zero_grad()
        loss(embed(x), y).backward()
        optimizer.step()
        schedule.step()
    report("head and last layer")
    print("One recording of one person, noise of our own: this shows the way, and is no result.")


if __name__ == "__main__":
    try:
        main()
    except NormWearError as error:
        sys.exit(f"error: {error}")
