"""Training the fusion module: it answers in unseen words, repeats by seed, and refuses bad labels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from zeroshot_parts import MOTION, TINY, LetterEncoder, motion

from normwear_fast.config import NormWearConfig
from normwear_fast.errors import InputError, UsageError
from normwear_fast.model import FastNormWear
from normwear_fast.zeroshot import (
    WORDING,
    MSiTF,
    SentenceTransformerTextEncoder,
    TrainingSettings,
    ZeroShotClassifier,
    train_fusion,
)
from normwear_fast.zeroshot.training import LabelledWindows, read_labelled

UNSEEN = {
    "Standing": "The individual keeps quiet and does not move at all.",
    "Walking": "They are out on a walk through the park.",
    "Running": "An athlete is racing at full speed.",
    "Badminton": "A player smashes the shuttle over the net.",
}
DISTRACTORS = ["The person is sleeping in bed.", "Somebody eats soup.", "A driver parks the car."]


def test_trained_fusion_answers_in_words_it_never_saw(
    sentences: SentenceTransformerTextEncoder, tmp_path: Path
) -> None:
    """Random encoder, real sentences: judged by wording and answers absent from training."""
    encoder = FastNormWear(True, config=NormWearConfig.small(), precision="float32")
    torch.manual_seed(0)
    fusion = MSiTF(128, sentences.width)
    settings = TrainingSettings(epochs=15, batch_size=8, learning_rate=2e-3)
    report = train_fusion(
        fusion, encoder, sentences, motion("train"), {"motion": MOTION}, settings, tmp_path
    )
    assert report.losses[-1] < 0.35 * report.losses[0]
    assert not list(tmp_path.iterdir())
    assert not fusion.training
    test = motion("test")
    windows, labels = test.windows[::2], test.labels[::2]
    classifier = ZeroShotClassifier(encoder, fusion, sentences)
    truth = np.array([list(MOTION.classes).index(label) for label in labels])

    def accuracy(question: str, options: list[str]) -> float:
        chosen = classifier.predict_proba(windows, question, options, 10.0).argmax(axis=1)
        return float((chosen == truth).mean())

    held_out = [MOTION.held_out_answer(label) for label in MOTION.classes]
    assert accuracy(MOTION.held_out_question(), held_out) > 0.6  # chance 0.25
    unseen = [UNSEEN[label] for label in MOTION.classes]
    assert accuracy("Tell me about the physical activity.", unseen + DISTRACTORS) > 0.5  # 0.14


def labelled(count: int = 12) -> LabelledWindows:
    """Two classes that differ in amplitude, and a number; ragged."""
    rng = np.random.default_rng(0)
    windows, tasks, labels = [], [], []
    for i in range(count):
        scale = 1.0 + 4.0 * (i % 2)
        windows.append(
            (scale * rng.standard_normal((1 + i % 2, 65 + 9 * (i % 3)))).astype(np.float32)
        )
        numbered = i % 3 == 2
        tasks.append("noninvasive-bp/systolic" if numbered else "driver-fatigue/fatigue")
        labels.append(100.0 + 10 * (i % 2) if numbered else i % 2)
    return LabelledWindows(windows, [65.0] * count, tasks, labels)


def test_training_repeats_by_seed(encoder: FastNormWear, tmp_path: Path) -> None:
    def train(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(9)
        fusion = MSiTF(TINY.embed_dim, 24)
        settings = TrainingSettings(epochs=2, batch_size=5, held_out=0.4, seed=seed)
        state = torch.random.get_rng_state()
        report = train_fusion(
            fusion, encoder, LetterEncoder(), labelled(), WORDING, settings, tmp_path
        )
        assert torch.equal(state, torch.random.get_rng_state())
        assert set(report.held_out) == {"driver-fatigue/fatigue", "noninvasive-bp/systolic"}
        assert "mean_absolute_error" in report.held_out["noninvasive-bp/systolic"]
        return fusion.state_dict()

    first, second, other = train(1), train(1), train(2)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_training_refuses_what_it_cannot_use(encoder: FastNormWear, tmp_path: Path) -> None:
    def train(data: LabelledWindows) -> None:
        train_fusion(
            MSiTF(32, 24), encoder, LetterEncoder(), data, WORDING, TrainingSettings(), tmp_path
        )

    window = [np.zeros((1, 65), np.float32)]
    with pytest.raises(InputError, match="no labelled window"):
        train(LabelledWindows([], [], [], []))
    with pytest.raises(UsageError, match="task 'sleep' has no wording"):
        train(LabelledWindows(window, [65.0], ["sleep"], [0]))
    with pytest.raises(InputError, match="window 0 of task 'wesad/stress': label '7'"):
        train(LabelledWindows(window, [65.0], ["wesad/stress"], [7]))
    with pytest.raises(UsageError, match="epochs is 0"):
        TrainingSettings(epochs=0)


def test_labelled_files_are_read_or_refused(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    np.savez(tmp_path / "a.npz", data=np.ones((3, 2, 70)), sampling_rate=50.0, label=[0, 1, 0])
    data = read_labelled(tmp_path / "a.npz", task="wesad/stress")
    assert (len(data), data.sampling_rates, data.labels) == (3, [50.0] * 3, [0, 1, 0])
    assert data.windows[0].shape == (2, 70)
    with pytest.raises(InputError, match="has no task"):
        read_labelled(tmp_path / "a.npz")
    rows = {
        "data": [[[1.0, 2.0], [3.0, 4.0]], [[5.0]]],
        "sampling_rate": [10.0, 20.0],
        "label": ["x", "y"],
        "task": ["t", "u"],
    }
    pq.write_table(pa.table(rows), tmp_path / "b.parquet")
    data = read_labelled(tmp_path / "b.parquet")
    assert [window.tolist() for window in data.windows] == rows["data"]
    assert (data.sampling_rates, data.tasks, data.labels) == ([10.0, 20.0], ["t", "u"], ["x", "y"])
    pq.write_table(
        pa.table(rows | {"data": [[[1.0], [2.0, 3.0]], [[1.0]]]}), tmp_path / "c.parquet"
    )
    np.savez(tmp_path / "d.npz", data=np.ones((3, 2, 70)), sampling_rate=50.0, label=[0, 1])
    np.savez(tmp_path / "e.npz", data=np.array([{}], dtype=object), sampling_rate=1.0, label=[0])
    np.savez(tmp_path / "f.npz", x=np.ones(3))
    for name, message in (
        ("c.parquet", "row 0: data must be a list of channels of one length"),
        ("d.npz", "3 windows but 2 values of label"),
        ("e.npz", "not an NPZ file of plain arrays"),
        ("f.npz", "has no data, sampling_rate, label"),
        ("g.npz", "no such file"),
    ):
        with pytest.raises(InputError, match=message):
            read_labelled(tmp_path / name, task="t")
