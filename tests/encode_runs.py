"""A small ragged cohort, a small model, and runs of `encode` with them."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from normwear_fast import FastNormWear, NormWearConfig
from normwear_fast.encode import (
    EncodeSettings,
    Summary,
    encode_recordings,
    load_embeddings,
    pipeline,
)
from normwear_fast.encode.output import PATCHES

TINY = NormWearConfig(
    embed_dim=64, depth=2, num_heads=1, decoder_embed_dim=64, decoder_num_heads=1, decoder_depth=1
)
SETTINGS = EncodeSettings(window=2.0, batch_tokens=1000, unit_tokens=1500)
"""A unit is four windows of the two-channel recording: several units a recording."""
PATCH = replace(SETTINGS, pool="patch")


def models(threads: int | None = None, seed: int = 0) -> list[FastNormWear]:
    return [FastNormWear(True, config=TINY, precision="float32", seed=seed).freeze()]


def make_cohort(folder: Path) -> Path:
    """Ragged: 1 to 3 channels, other rates, other lengths, a gap, and small ones that share a unit."""
    rng = np.random.default_rng(7)
    for name, channels, rate, seconds in (
        ("a", 2, 65.0, 33.0),
        ("b", 1, 100.0, 9.0),
        ("c/d", 3, 30.0, 7.0),
        ("c/e", 2, 250.0, 12.5),
        ("f", 1, 64.0, 50.0),
    ):
        data = rng.standard_normal((channels, round(rate * seconds)))
        if name == "c/e":
            data[1, 600:1100] = np.nan
        path = folder / f"{name}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        names = np.array([f"S{i}" for i in range(channels)])
        np.savez(path, data=data, sampling_rate=rate, channels=names)
    return folder


def run(cohort: Path, output: Path, settings: EncodeSettings = SETTINGS, **options: Any) -> Summary:
    load = options.pop("load_models", models)
    return encode_recordings([cohort], output, settings, load, **options)


def rows(output: Path) -> list[tuple[Any, ...]]:
    """Every row, embeddings as bytes, in the inputs' order."""
    table = load_embeddings(output)
    return [
        (*row[:4], tuple(row[4]), *row[5:7], None if row[7] is None else row[7].tobytes())
        for row in table.itertuples(index=False, name=None)
    ]


class StopAfter(pipeline.Silent):
    """Sends a signal to this process when so many units have been encoded."""

    def __init__(self, units: int, number: int = signal.SIGINT) -> None:
        self.units, self.number = units, number

    def advance(self, windows: int) -> None:
        self.units -= 1
        if self.units == 0:
            signal.raise_signal(self.number)


def content(output: Path) -> dict[str, bytes]:
    """Every file of the store but the root's, which names the run."""
    store = output / PATCHES
    files = {p.relative_to(store).as_posix(): p for p in store.rglob("*") if p.is_file()}
    root = json.loads(files.pop("zarr.json").read_text())["attributes"]
    assert root["format"] == "normwear-fast patches"
    assert root["run"] == json.loads((output / "manifest.json").read_text())["run"]
    return {name: path.read_bytes() for name, path in files.items()}
