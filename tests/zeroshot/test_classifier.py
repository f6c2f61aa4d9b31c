"""`ZeroShotClassifier` is encoder, fusion and scores; its parts must fit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from zeroshot_parts import LetterEncoder

from normwear_fast.errors import InputError
from normwear_fast.model import FastNormWear
from normwear_fast.zeroshot import MSiTF, ZeroShotClassifier, score_options
from normwear_fast.zeroshot.fusion import definition

QUESTION, OPTIONS = "is the person still ?", ["yes", "no they run", "the person walks"]


def windows_of(seed: int, *shapes: tuple[int, int]) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def test_classifier_is_encoder_fusion_and_scores(encoder: FastNormWear, fusion: MSiTF) -> None:
    text = LetterEncoder()
    classifier = ZeroShotClassifier(encoder, fusion, text)
    windows = windows_of(0, (2, 390), (1, 130), (3, 200), (2, 390))
    probabilities = classifier.predict_proba(windows, QUESTION, OPTIONS)
    assert probabilities.shape == (4, 3)
    assert probabilities.dtype == np.float32
    assert np.abs(probabilities.sum(axis=1) - 1).max() < 1e-6
    query, options = text.encode([QUESTION]), text.encode(OPTIONS)
    for window, row in zip(windows, probabilities, strict=True):
        tokens = torch.from_numpy(encoder.encode_unit([window], pool="patch")[0])
        with torch.no_grad():
            fused, terms = definition(fusion, tokens[None], query)
        assert np.abs(score_options(fused, options).numpy() - row).max() < 1e-6
        (relevance,) = classifier.relevance([window], QUESTION)
        assert terms is not None
        assert relevance.shape == tokens.shape[:2]
        assert np.abs(relevance.flatten() - terms.relevance[0].numpy()).max() < 1e-7
    # In any order, and however small the budget.
    backwards = classifier.predict_proba(windows[::-1], QUESTION, OPTIONS)
    assert np.abs(backwards[::-1] - probabilities).max() < 1e-6
    split = classifier.predict_proba(windows, QUESTION, OPTIONS, batch_tokens=1200)
    assert np.abs(split - probabilities).max() < 1e-6
    for relevance in classifier.relevance(windows, QUESTION):
        assert abs(float(relevance.sum()) - 1) < 1e-5


def test_texts_are_encoded_once(encoder: FastNormWear, fusion: MSiTF) -> None:
    text = LetterEncoder()
    classifier = ZeroShotClassifier(encoder, fusion, text)
    for options in (OPTIONS, OPTIONS[::-1], [*OPTIONS, "maybe"]):
        classifier.predict_proba(windows_of(1, (1, 65)), QUESTION, options)
    assert sorted(text.encoded) == sorted([QUESTION, *OPTIONS, "maybe"])


def test_other_rates_are_resampled(encoder: FastNormWear, fusion: MSiTF) -> None:
    classifier = ZeroShotClassifier(encoder, fusion, LetterEncoder())
    t = np.arange(600) / 100
    window = np.sin(2 * np.pi * np.array([[1.0], [2.0]]) * t)
    (tokens,) = classifier.relevance([window], QUESTION, sampling_rate=100)
    assert tokens.shape == (2, 560)
    window[1, 5] = np.nan
    with pytest.raises(InputError, match="window 0, channel 1"):
        classifier.predict_proba([window], QUESTION, OPTIONS, 100)
    classifier.predict_proba([window], QUESTION, OPTIONS, 100, missing="interpolate")


def test_parts_must_fit(encoder: FastNormWear, fusion: MSiTF) -> None:
    with pytest.raises(InputError, match="tokens of width 16"):
        ZeroShotClassifier(encoder, MSiTF(16, 24), LetterEncoder())
    with pytest.raises(InputError, match="letters is 20 wide"):
        ZeroShotClassifier(encoder, fusion, LetterEncoder(20))
    classifier = ZeroShotClassifier(encoder, fusion, LetterEncoder())
    for options in (["yes"], ["yes", "yes"]):
        with pytest.raises(InputError, match="two or more different"):
            classifier.predict_proba(windows_of(0, (1, 65)), QUESTION, options)
    with pytest.raises(InputError, match="options is 'yes'; it must be a list"):
        classifier.predict_proba(windows_of(0, (1, 65)), QUESTION, "yes")
    for question in ("", "  ", None):
        with pytest.raises(InputError, match="it must be a sentence"):
            classifier.predict_proba(windows_of(0, (1, 65)), question, OPTIONS)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no window"):
        classifier.predict_proba([], QUESTION, OPTIONS)


def test_a_half_precision_fusion_answers(encoder: FastNormWear, fusion: MSiTF) -> None:
    windows = windows_of(1, (1, 130), (2, 65))
    wanted = ZeroShotClassifier(encoder, fusion, LetterEncoder()).predict_proba(
        windows, QUESTION, OPTIONS
    )
    half = ZeroShotClassifier(encoder, fusion.bfloat16(), LetterEncoder())
    found = half.predict_proba(windows, QUESTION, OPTIONS)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, atol=5e-3)


def test_epochs_of_mne_are_asked_at_their_own_rate(encoder: FastNormWear, fusion: MSiTF) -> None:
    mne = pytest.importorskip("mne")
    data = np.stack(windows_of(1, (2, 300), (2, 300)))
    epochs = mne.EpochsArray(data, mne.create_info(2, 100.0, "eeg"), verbose="ERROR")
    classifier = ZeroShotClassifier(encoder, fusion, LetterEncoder())
    np.testing.assert_array_equal(
        classifier.predict_proba(epochs, QUESTION, OPTIONS),
        classifier.predict_proba(data, QUESTION, OPTIONS, 100.0),
    )
