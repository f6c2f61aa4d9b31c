"""Training of a fusion module: encoders frozen, labelled windows, answers in words.

Loss: 2 L1 + cosine embedding loss between a fused window and the vector of a sentence that answers
the question. Source: Luo et al. 2026 (arXiv 2412.09758), zero-shot inference.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from normwear_fast.config import MIN_SAMPLES, SAMPLING_RATE
from normwear_fast.errors import InputError, OutputError, UsageError, one_line, reading
from normwear_fast.files import read_npz, read_parquet
from normwear_fast.inputs import prepare, samples_at_model_rate
from normwear_fast.packing import plan_units
from normwear_fast.recordings.base import RATES
from normwear_fast.zeroshot.fusion import MSiTF, score_options
from normwear_fast.zeroshot.text import TextEncoder
from normwear_fast.zeroshot.wording import TaskWording

if TYPE_CHECKING:
    from normwear_fast.model import FastNormWear


@dataclass(frozen=True)
class TrainingSettings:
    """How a fusion module is trained.

    Args:
        epochs: passes over the windows.
        batch_size: windows a step.
        learning_rate: of AdamW, after a linear warm-up over a tenth of the steps; half-cycle
            cosine.
        weight_decay: of AdamW.
        held_out: share of the windows, of every task, kept for judging.
        seed: of the split, the order, the wordings drawn and all noise.
    """

    epochs: int = 20
    batch_size: int = 16
    learning_rate: float = 3e-4
    weight_decay: float = 0.01
    held_out: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        for name, fits, right in (
            ("epochs", self.epochs >= 1, ">= 1"),
            ("batch_size", self.batch_size >= 1, ">= 1"),
            ("learning_rate", 0 < self.learning_rate < 10, "> 0 and below 10"),
            ("weight_decay", 0 <= self.weight_decay < 10, ">= 0 and below 10"),
            ("held_out", 0 <= self.held_out < 1, "in [0, 1)"),
        ):
            if not fits:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be {right}")


@dataclass(frozen=True)
class LabelledWindows:
    """Windows of one or several tasks.

    Args:
        windows: (C_i, L_i) each, the signal's own units.
        sampling_rates: Hz, one a window.
        tasks: name of each window's task.
        labels: class name, class index or number of each window.
    """

    windows: list[NDArray[np.float32]]
    sampling_rates: list[float]
    tasks: list[str]
    labels: list[Any]

    def __len__(self) -> int:
        return len(self.windows)


class TokenStore:
    """Token embeddings of a data set, computed once, in a float16 file: memory need not hold them.

    After the encoder's last LayerNorm values are of order 1, where float16 keeps three digits.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._shapes: list[tuple[int, ...]] = []
        self._starts = [0]
        with self._writing():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("wb")
        self._values: NDArray[np.float16] | None = None

    def append(self, tokens: NDArray[np.float32]) -> None:
        """(C, T, E)."""
        with self._writing():
            self._file.write(tokens.astype(np.float16).tobytes())
        self._shapes.append(tokens.shape)
        self._starts.append(self._starts[-1] + tokens.size)

    def __getitem__(self, index: int) -> Tensor:
        """(C, T, E) float32 of a window."""
        if self._values is None:
            with self._writing():
                self._file.close()
            self._values = np.memmap(self.path, np.float16, "r")
        values = self._values[self._starts[index] : self._starts[index + 1]]
        return torch.from_numpy(values.astype(np.float32)).view(self._shapes[index])

    def close(self) -> None:
        with contextlib.suppress(OSError):  # of what a full disk left in its buffer
            self._file.close()
        self._values = None
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OutputError(f"{self.path}: cannot be written ({one_line(error)})") from None


@dataclass(frozen=True)
class TrainingReport:
    """What training did.

    Args:
        losses: mean loss of each epoch.
        held_out: task -> ``windows``, and for classes ``accuracy`` over all of the task's answers,
            or for numbers ``mean_absolute_error``, the data's values as the answers; both with the
            held-out question and the held-out wording of every answer.
    """

    losses: list[float]
    held_out: dict[str, dict[str, float]]


def train_fusion(
    fusion: MSiTF,
    model: FastNormWear,
    text: TextEncoder,
    data: LabelledWindows,
    wording: Mapping[str, TaskWording],
    settings: TrainingSettings,
    scratch: Path,
    *,
    progress: Callable[[str], None] = lambda line: None,
) -> TrainingReport:
    """Train ``fusion`` in place; the encoders do not change.

    Args:
        fusion: trained on the model's device, left there in evaluation mode.
        model: encodes the windows once.
        text: encodes every sentence once.
        data: the labelled windows.
        wording: task name -> how it is asked and answered.
        settings: see :class:`TrainingSettings`; the same seed on the same machine, library and
            threads gives the same weights.
        scratch: folder for the token embeddings, 2 bytes a value (C T E a window), removed
            afterwards.
        progress: gets a line an epoch.
    Raises: InputError for a label the task does not have; UsageError for a task without wording.
    """
    labels = _labels(data, wording)
    sentences = sorted(
        {s for t, kept in labels.classes.items() for s in _sentences(wording[t], kept)}
    )
    with torch.inference_mode():
        vectors = text.encode(sentences).float().to(model.device)
    vectors = vectors.clone()  # out of inference mode, so that autograd may save them
    rows = {sentence: row for row, sentence in enumerate(sentences)}
    fusion.to(model.device)
    devices = [model.device] if model.device.type == "cuda" else []
    store = TokenStore(scratch / "tokens.float16")
    try:
        _encode(model, data, store, progress)
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(settings.seed)
            rng = np.random.default_rng(settings.seed)
            train, judged = _split(labels, settings.held_out, rng)
            losses = _fit(
                fusion, store, data, labels, wording, vectors, rows, train, settings, rng, progress
            )
        fusion.eval().requires_grad_(False)
        results = _judge(fusion, store, data, labels, wording, vectors, rows, judged)
    finally:
        store.close()
    report = TrainingReport(losses, results)
    fusion.source = "trained here"
    fusion.description = {
        "text_encoder": text.name,
        "encoder": model.provenance(),
        "tasks": sorted(labels.members),
        "settings": asdict(settings),
        "report": asdict(report),
    }
    return report


@dataclass(frozen=True)
class _Labels:
    names: list[str]
    """Of each window, as its task's wording knows it."""
    classes: dict[str, list[str]]
    """Task -> every answer it may get."""
    members: dict[str, list[int]]
    """Task -> its windows."""


def _labels(data: LabelledWindows, wording: Mapping[str, TaskWording]) -> _Labels:
    if not len(data):
        raise InputError("no labelled window to train on")
    names: list[str] = []
    classes: dict[str, list[str]] = {}
    members: dict[str, list[int]] = {}
    for index, (task, label) in enumerate(zip(data.tasks, data.labels, strict=True)):
        if task not in wording:
            raise UsageError(
                f"window {index}: task {task!r} has no wording; known are {', '.join(wording)}"
            )
        try:
            names.append(wording[task].label(label))
        except InputError as error:
            raise InputError(f"window {index} of task {task!r}: {error}") from None
        members.setdefault(task, []).append(index)
    for task, windows in members.items():
        seen = sorted({names[i] for i in windows})
        classes[task] = list(wording[task].classes) or sorted(seen, key=float)
    return _Labels(names, classes, members)


def _sentences(wording: TaskWording, labels: Sequence[str]) -> list[str]:
    answers = [a for label in labels for a in wording.training_answers(label)]
    held_out = [wording.held_out_answer(label) for label in labels]
    return [*wording.questions, *answers, *held_out]


def _encode(
    model: FastNormWear,
    data: LabelledWindows,
    store: TokenStore,
    progress: Callable[[str], None],
) -> None:
    samples = [
        samples_at_model_rate(window.shape[1], rate, "always")
        for window, rate in zip(data.windows, data.sampling_rates, strict=True)
    ]
    counts = [
        model._window_tokens((window.shape[0], max(n, MIN_SAMPLES)))
        for window, n in zip(data.windows, samples, strict=True)
    ]
    for unit in plan_units(counts, model.batch_tokens_default()):
        prepared = [
            prepare(data.windows[i], data.sampling_rates[i], samples[i], "always", "error", i)
            for i in unit
        ]
        for tokens in model.encode_unit(prepared, pool="patch"):
            store.append(tokens)
        if unit.stop * 10 // len(data) > unit.start * 10 // len(data):
            progress(f"encoded {unit.stop} of {len(data)} windows")


def _split(labels: _Labels, share: float, rng: np.random.Generator) -> tuple[list[int], list[int]]:
    """Windows to train on and to judge by, the share taken of every task's every label."""
    train: list[int] = []
    judged: list[int] = []
    for windows in labels.members.values():
        by_label: dict[str, list[int]] = {}
        for index in windows:
            by_label.setdefault(labels.names[index], []).append(index)
        # Labels that are numbers are mostly single: they are split together.
        groups = by_label.values() if len(by_label) * 4 <= len(windows) else [windows]
        for group in groups:
            order = rng.permutation(group).tolist()
            kept = int(len(order) * share)
            judged += order[:kept]
            train += order[kept:]
    return sorted(train), sorted(judged)


def _fit(
    fusion: MSiTF,
    store: TokenStore,
    data: LabelledWindows,
    labels: _Labels,
    wording: Mapping[str, TaskWording],
    vectors: Tensor,
    rows: Mapping[str, int],
    train: Sequence[int],
    settings: TrainingSettings,
    rng: np.random.Generator,
    progress: Callable[[str], None],
) -> list[float]:
    fusion.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(
        fusion.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    steps = settings.epochs * -(-len(train) // settings.batch_size)
    warm_up = max(1, steps // 10)

    def rate(step: int) -> float:
        if step < warm_up:
            return (step + 1) / warm_up
        return 0.5 * (1 + np.cos(np.pi * (step - warm_up) / max(1, steps - warm_up)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    losses = []
    for epoch in range(settings.epochs):
        total = 0.0
        order = rng.permutation(train)
        for start in range(0, len(order), settings.batch_size):
            batch = order[start : start + settings.batch_size].tolist()
            asked, answered = [], []
            for index in batch:
                words = wording[data.tasks[index]]
                asked.append(rows[str(rng.choice(words.training_questions()))])
                answers = words.training_answers(labels.names[index])
                answered.append(rows[str(rng.choice(answers))])
            tokens = [store[index].to(vectors.device) for index in batch]
            fused = fusion.fuse(tokens, vectors[asked])
            target = vectors[answered]
            alike = torch.ones(len(batch), device=vectors.device)
            loss = 2 * F.l1_loss(fused, target) + F.cosine_embedding_loss(fused, target, alike)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(fusion.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += float(loss.detach()) * len(batch)
        losses.append(total / len(order))
        progress(f"epoch {epoch + 1} of {settings.epochs}: loss {losses[-1]:.4f}")
    return losses


@torch.inference_mode()
def _judge(
    fusion: MSiTF,
    store: TokenStore,
    data: LabelledWindows,
    labels: _Labels,
    wording: Mapping[str, TaskWording],
    vectors: Tensor,
    rows: Mapping[str, int],
    judged: Sequence[int],
) -> dict[str, dict[str, float]]:
    results: dict[str, dict[str, float]] = {}
    for task, classes in labels.classes.items():
        windows = [index for index in judged if data.tasks[index] == task]
        if not windows:
            continue
        words = wording[task]
        question = vectors[[rows[words.held_out_question()]]]
        options = vectors[[rows[words.held_out_answer(label)] for label in classes]]
        chosen = []
        for index in windows:
            fused = fusion.fuse([store[index].to(vectors.device)], question)
            chosen.append(classes[int(score_options(fused, options).argmax())])
        truth = [labels.names[index] for index in windows]
        result = {"windows": float(len(windows))}
        if words.classes:
            result["accuracy"] = float(
                np.mean([a == b for a, b in zip(chosen, truth, strict=True)])
            )
        else:
            errors = [abs(float(a) - float(b)) for a, b in zip(chosen, truth, strict=True)]
            result["mean_absolute_error"] = float(np.mean(errors))
        results[task] = result
    return results


def at_model_rate(
    data: LabelledWindows, preprocess: Literal["reference", "none"]
) -> LabelledWindows:
    """Windows as the commands make them of recordings: gaps filled, 65 Hz, preprocessed.

    Args:
        preprocess: ``reference`` or ``none``.
    Raises: InputError for a channel without a value, naming the window.
    """
    from normwear_fast.preprocess import prepare_window

    windows = []
    for index, (window, rate) in enumerate(zip(data.windows, data.sampling_rates, strict=True)):
        samples = round(window.shape[1] / rate * SAMPLING_RATE)
        channels = [(channel, rate, 0.0) for channel in window.astype(np.float64)]
        prepared = prepare_window(channels, samples, preprocess=preprocess).data
        if prepared is None:
            raise InputError(f"window {index} has a channel without any value")
        windows.append(prepared)
    return LabelledWindows(windows, [SAMPLING_RATE] * len(windows), data.tasks, data.labels)


def read_labelled(path: str | Path, *, task: str | None = None) -> LabelledWindows:
    """Labelled windows of an NPZ or a Parquet file.

    NPZ: ``data`` (n, C, L), ``sampling_rate`` (a number, or n), ``label`` (n,) and optionally
    ``task`` (n,) names. Parquet: a row a window, ``data`` a list of channels, each a list of
    samples, ``sampling_rate``, ``label`` and optionally ``task``; windows may differ in shape.

    Args:
        path: ends in .npz or .parquet.
        task: of every window, where the file names none.
    Raises: InputError that names the file and what it lacks.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    readers = {".npz": _read_npz, ".parquet": _read_parquet}
    if path.suffix not in readers:
        raise InputError(f"{path}: labelled windows are read from .npz or .parquet")
    columns = readers[path.suffix](path)
    missing = [name for name in ("data", "sampling_rate", "label") if name not in columns]
    if missing:
        raise InputError(f"{path}: has no {', '.join(missing)}; it has {', '.join(columns)}")
    windows = list(columns["data"])
    count = len(windows)
    if not count:
        raise InputError(f"{path}: holds no window")
    with reading(path, InputError, "sampling_rate is no number of Hz, or one a window"):
        rates = np.asarray(columns["sampling_rate"], np.float64).reshape(-1)
    rates = np.repeat(rates, count) if len(rates) == 1 else rates
    labels = list(columns["label"])
    named = columns.get("task")
    if named is None and task is None:
        raise InputError(f"{path}: has no task; name the task of all its windows")
    tasks = [str(name) for name in named] if named is not None else [str(task)] * count
    for name, values in (("sampling_rate", rates), ("label", labels), ("task", tasks)):
        if len(values) != count:
            raise InputError(f"{path}: {count} windows but {len(values)} values of {name}")
    if not ((rates >= RATES[0]) & (rates <= RATES[1])).all():
        raise InputError(
            f"{path}: every sampling_rate must be a positive number of Hz, {RATES[0]:g} to {RATES[1]:g}"
        )
    for index, window in enumerate(windows):
        if window.ndim != 2 or 0 in window.shape:
            raise InputError(
                f"{path}, window {index}: has shape {window.shape}; it must be (channels, samples)"
            )
    return LabelledWindows(windows, rates.tolist(), tasks, labels)


def _read_npz(path: Path) -> dict[str, Any]:
    columns: dict[str, Any] = dict(read_npz(path, InputError))
    for name in ("label", "task"):
        if name in columns:
            columns[name] = columns[name].reshape(-1).tolist()
    if "data" in columns:
        data = columns["data"]
        if data.ndim != 3 or data.dtype.kind not in "fiu":
            raise InputError(
                f"{path}: data is {data.dtype} {data.shape}; it must be numbers (n, C, L)"
            )
        columns["data"] = list(data.astype(np.float32))
    return columns


def _read_parquet(path: Path) -> dict[str, Any]:
    table = read_parquet(path, InputError)
    with reading(path, InputError, "not a table of windows"):
        columns: dict[str, Any] = {
            name: table[name].to_pylist() for name in table.column_names if name != "data"
        }
    if "data" in table.column_names:
        windows = []
        for index, channels in enumerate(table["data"]):
            what = "data must be a list of channels of one length"
            with reading(f"{path}, row {index}", InputError, what):
                rows = [row.values.to_numpy(zero_copy_only=False) for row in channels]
                windows.append(np.stack(rows).astype(np.float32))
        columns["data"] = windows
    return columns
