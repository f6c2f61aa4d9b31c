"""A whole evaluation: data sets by models by protocols, to one table, one JSON and one report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from normwear_fast.errors import require
from normwear_fast.evaluate import metrics
from normwear_fast.evaluate.baselines import Embedder, embeddings
from normwear_fast.evaluate.probe import (
    ProbeResult,
    Protocol,
    compare,
    comparison_table,
    concatenate_channels,
    probe,
    replace_nan,
    shuffle_channels,
)
from normwear_fast.evaluate.registry import Task
from normwear_fast.evaluate.samples import SampleSet
from normwear_fast.evaluate.splits import default_split

_MAP_POINTS = 1500  # of the embedding map: more hide each other


@dataclass
class Row:
    """One cell of the evaluation."""

    dataset: str
    task: Task
    model: str
    protocol: str
    result: ProbeResult
    has_group: bool

    @property
    def name(self) -> str:
        return self.dataset if self.task.name == "label" else f"{self.dataset} {self.task.name}"


@dataclass
class Evaluation:
    """All probes, and what compares them."""

    rows: list[Row]
    comparisons: list[dict[str, Any]]
    averages: list[dict[str, Any]]
    maps: list[tuple[str, np.ndarray, list[str]]]
    settings: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Plain values; the same run gives the same digits."""
        results = [
            {
                "dataset": row.dataset,
                "task": row.task.name,
                "group": row.task.group if row.has_group else None,
                "model": row.model,
                "protocol": row.protocol,
            }
            | row.result.summary()
            for row in self.rows
        ]
        return {
            "settings": self.settings,
            "results": results,
            "averages": self.averages,
            "comparisons": self.comparisons,
        }


def evaluate(
    sets: Sequence[SampleSet],
    embedders: Sequence[Embedder],
    *,
    protocols: Sequence[Protocol] = ("full",),
    shuffle: bool = False,
    resamples: int = 1000,
    seed: int = 0,
    cache: Path | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Evaluation:
    """Probe every task of every set with every model's features.

    Args:
        sets, embedders: each must have names of its own.
        protocols: any of `full`, `partial`, `folds`.
        shuffle: put every sample's channels in a random order of its own first.
        resamples: bootstrap draws of an interval, and permutations of a comparison; 0 for neither.
        seed: of everything that is drawn.
        cache: folder of the features; None keeps none.
        say: told what is being done, one line at a time.
    """
    require("sklearn.linear_model", "probing", "eval")
    rows: list[Row] = []
    maps: list[tuple[str, np.ndarray, list[str]]] = []
    for samples in sets:
        is_test = samples.is_test
        if is_test is None and set(protocols) != {"folds"}:
            is_test = default_split(samples.dataset, samples.subjects, samples.labels[0], seed)
            say(f"{samples.name}: no split in it; a fifth is held out, seed {seed}")
        for embedder in embedders:
            say(f"{samples.name}: features of {embedder.name} for {len(samples)} samples")
            features = embeddings(samples, embedder, cache)
            nan_samples = replace_nan(features)
            maps.append((f"{samples.name}, {embedder.name}", *_map(samples, features, seed)))
            if shuffle:
                features = shuffle_channels(features, seed)
            x = concatenate_channels(features)
            for task, y in zip(samples.tasks, samples.labels, strict=True):
                for protocol in protocols:
                    held_out = np.zeros(len(y), bool) if is_test is None else is_test
                    result = probe(
                        x,
                        y,
                        held_out,
                        samples.subjects,
                        task,
                        protocol=protocol,
                        resamples=resamples,
                        seed=seed,
                    )
                    if nan_samples:
                        result.notes.append(
                            f"{nan_samples} of {len(x)} samples had NaN features, taken as 0"
                        )
                    known = samples.dataset is not None
                    rows.append(Row(samples.name, task, embedder.name, protocol, result, known))
            del features, x
    return Evaluation(
        rows=rows,
        comparisons=_comparisons(rows, resamples, seed),
        averages=_averages(rows),
        maps=maps,
        settings={
            "datasets": [
                {"name": samples.name, "samples": len(samples), "windows": samples.fingerprint()}
                for samples in sets
            ],
            "models": [embedder.identity() | {"name": embedder.name} for embedder in embedders],
            "protocols": list(protocols),
            "shuffle_channels": shuffle,
            "resamples": resamples,
            "seed": seed,
        },
    )


def _map(samples: SampleSet, features: np.ndarray, seed: int) -> tuple[np.ndarray, list[str]]:
    """Points of the embedding map: channels by modality, else samples by class or channel."""
    count, channels, _ = features.shape
    drawn = np.sort(
        np.random.default_rng(seed).permutation(count)[: max(1, _MAP_POINTS // channels)]
    )
    modalities = samples.dataset.modalities if samples.dataset else ()
    if len(set(modalities)) > 1 and len(modalities) == channels:
        points = features[drawn].reshape(len(drawn) * channels, -1)
        return points, list(modalities) * len(drawn)
    points = features[drawn].reshape(len(drawn), -1)
    task, y = samples.tasks[0], samples.labels[0]
    if task.kind == "class":
        return points, [task.classes[k] for k in y[drawn]]
    return points, [samples.name] * len(drawn)


def _comparisons(rows: Sequence[Row], resamples: int, seed: int) -> list[dict[str, Any]]:
    if not resamples:
        return []
    found = []
    cells: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if len(row.result.test_index):
            cells.setdefault((row.dataset, row.task.name, row.protocol), []).append(row)
    for (dataset, task, protocol), same in cells.items():
        for first, second in combinations(same, 2):
            difference, p_value = compare(
                first.result, second.result, permutations=resamples, seed=seed
            )
            found.append(
                {
                    "dataset": dataset,
                    "task": task,
                    "protocol": protocol,
                    "models": [first.model, second.model],
                    "difference": difference,
                    "p_value": p_value,
                }
            )
    return found


def _averages(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Group, micro and macro averages over the registry's tasks, of two or more."""
    cells: dict[tuple[str, str], list[tuple[str, float]]] = {}
    for row in rows:
        if row.has_group:
            cells.setdefault((row.model, row.protocol), []).append(
                (row.task.group, row.result.score)
            )
    return [
        {"model": model, "protocol": protocol, "averages": metrics.averages(scores)}
        for (model, protocol), scores in cells.items()
        if len(scores) > 1
    ]


def table_rows(evaluation: Evaluation) -> list[dict[str, str]]:
    """The results as text, one row a probe."""
    found = []
    for row in evaluation.rows:
        result = row.result
        interval = result.interval
        found.append(
            {
                "data": row.name,
                "model": row.model,
                "protocol": row.protocol,
                "train": str(result.train),
                "test": str(result.test),
                "metric": result.metric.replace("_", " "),
                "score %": f"{100 * result.score:.2f}",
                "95 % interval": f"{100 * interval.low:.2f} to {100 * interval.high:.2f}"
                if interval
                else "",
                "accuracy %": f"{100 * result.scores['accuracy']:.2f}"
                if "accuracy" in result.scores
                else "",
            }
        )
    return found


def write_report(evaluation: Evaluation, output: Path) -> list[Path]:
    """`results.json`, `report.html`, and every picture as PNG and SVG under `pictures/`."""
    import json
    import re

    from normwear_fast import plots
    from normwear_fast.files import replacing

    figures: list[tuple[str, Any]] = []
    for protocol in dict.fromkeys(row.protocol for row in evaluation.rows):
        own = [row for row in evaluation.rows if row.protocol == protocol]
        models, tasks, scores = comparison_table(
            [(row.model, row.name, row.result.score) for row in own]
        )
        intervals = np.full((*scores.shape, 2), np.nan)
        for row in own:
            if row.result.interval:
                at = models.index(row.model), tasks.index(row.name)
                intervals[at] = row.result.interval.low, row.result.interval.high
        figures.append((f"scores, {protocol}", plots.bars(models, tasks, scores, intervals)))
        if len(tasks) > 2:
            figures.append((f"radar, {protocol}", plots.radar(models, tasks, scores)))
        if len(models) > 1 and len(tasks) > 1:
            ranks = metrics.critical_difference(models, scores)
            figure = plots.critical_difference(
                ranks.models, ranks.ranks, ranks.distance, tasks=ranks.tasks
            )
            figures.append((f"critical difference, {protocol}", figure))
    for row in evaluation.rows:
        result = row.result
        if len(result.classes) and len(result.test_index):
            names = [row.task.classes[k] for k in result.classes]
            # Positions among the classes that trained; a label can skip a class.
            truth = np.searchsorted(result.classes, result.truth)
            guess = result.prediction.argmax(axis=1)
            what = f"{row.name}, {row.model}, {row.protocol}"
            figures.append((f"confusion, {what}", plots.confusion(truth, guess, names)))
            figures.append((f"ROC, {what}", plots.roc(truth, result.prediction, names)))
    for name, points, groups in evaluation.maps:
        if len(points) >= 3:
            figures.append((f"map, {name}", plots.embedding_map(points, groups)))
    path = output / "results.json"
    with replacing(path) as temporary:
        text = json.dumps(evaluation.to_json(), indent=1) + "\n"
        temporary.write_text(text, encoding="utf-8")
    written = [path]
    pictures: list[tuple[str, Any]] = []
    for name, figure in figures:
        stem = re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")
        for kind in ("svg", "png"):
            written.append(plots.save(figure, output / "pictures" / f"{stem}.{kind}"))
        pictures.append((name, written[-1]))
    sections: list[tuple[str, Any]] = [("Results", table_rows(evaluation))]
    notes = [
        {"data": row.name, "model": row.model, "protocol": row.protocol, "note": note}
        for row in evaluation.rows
        for note in row.result.notes
    ]
    if notes:
        sections.append(("Notes", notes))
    if evaluation.averages:
        averages = [
            {"model": entry["model"], "protocol": entry["protocol"]}
            | {name: f"{100 * value:.2f}" for name, value in entry["averages"].items()}
            for entry in evaluation.averages
        ]
        sections.append(("Averages (%)", averages))
    if evaluation.comparisons:
        pairs = [
            {
                "data": f"{entry['dataset']} {entry['task']}",
                "protocol": entry["protocol"],
                "models": " - ".join(entry["models"]),
                "difference (points)": f"{100 * entry['difference']:+.2f}",
                "permutation p": f"{entry['p_value']:.4f}",
            }
            for entry in evaluation.comparisons
        ]
        sections.append(("Comparisons", pairs))
    sections += pictures
    written.append(plots.html_report(output / "report.html", "Linear probing", sections))
    return written
