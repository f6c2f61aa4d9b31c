"""Windows and a question in words to probabilities of answers in words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from normwear_fast.config import MIN_SAMPLES, SAMPLING_RATE
from normwear_fast.errors import InputError
from normwear_fast.inputs import prepare, rate_list, samples_at_model_rate, window_list
from normwear_fast.mne import with_own_rate
from normwear_fast.packing import plan_units
from normwear_fast.zeroshot.fusion import FusionTerms, MSiTF, score_options
from normwear_fast.zeroshot.text import TextEncoder, checked_texts

if TYPE_CHECKING:
    from normwear_fast.model import FastNormWear


class ZeroShotClassifier:
    """NormWear, a fusion module and the text encoder it was trained with.

    A text is encoded once however often it is asked; the fusion module moves to the encoder's
    device, where the tokens already are; windows pass in groups of at most the token budget.

    Args:
        model: encoder of the windows.
        fusion: of the model's width and the text encoder's.
        text: any :class:`TextEncoder`.
    Raises: InputError where the three do not fit together.
    """

    def __init__(self, model: FastNormWear, fusion: MSiTF, text: TextEncoder) -> None:
        if fusion.embed_dim != model.config.embed_dim:
            raise InputError(
                f"the fusion module reads tokens of width {fusion.embed_dim}; the encoder's are "
                f"{model.config.embed_dim} wide"
            )
        if fusion.query_dim != text.width:
            raise InputError(
                f"the fusion module was trained with a text encoder of width {fusion.query_dim}; "
                f"{text.name} is {text.width} wide"
            )
        self.model = model
        self.fusion = fusion.eval()
        self.text = text
        self._vectors: dict[str, Tensor] = {}

    def predict_proba(
        self,
        windows: ArrayLike | Tensor | Sequence[ArrayLike | Tensor],
        question: str,
        options: Sequence[str],
        sampling_rate: float | Sequence[float] = SAMPLING_RATE,
        *,
        missing: Literal["error", "interpolate"] = "error",
        batch_tokens: int | None = None,
    ) -> NDArray[np.float32]:
        """Probability of each answer for each window.

        Args:
            windows: (B, C, L), or a list of (C_i, L_i), the signal's own units.
            question: a sentence.
            options: the answers, as sentences; a probability is relative to the others offered.
            sampling_rate: Hz, one number or one a window.
            missing: what NaN and inf do, as in ``encode``.
            batch_tokens: tokens in flight; the model's budget for its device otherwise.
        Returns: (n, O) float32, rows sum to 1.
        Raises: InputError for bad windows, an empty text, repeated options or fewer than two.
        """
        if isinstance(options, str):
            raise InputError(f"options is {options!r}; it must be a list of answers")
        options = list(options)
        if len(options) < 2 or len(set(options)) < len(options):
            raise InputError(f"options are {options!r}; they must be two or more different answers")
        answers = self._encode_texts(options)
        with torch.inference_mode():
            fused = self.fused(
                windows, question, sampling_rate, missing=missing, batch_tokens=batch_tokens
            )
            return score_options(fused, answers).float().cpu().numpy()

    def fused(
        self,
        windows: ArrayLike | Tensor | Sequence[ArrayLike | Tensor],
        question: str,
        sampling_rate: float | Sequence[float] = SAMPLING_RATE,
        *,
        missing: Literal["error", "interpolate"] = "error",
        batch_tokens: int | None = None,
    ) -> Tensor:
        """The windows' vectors in the text encoder's space, (n, Q) on the model's device."""
        query = self._encode_texts([question])
        budget = batch_tokens or self.model.batch_tokens_default()
        parts = []
        with torch.inference_mode():
            for tokens in self._groups(windows, sampling_rate, missing, batch_tokens):
                parts.append(self.fusion.fuse(tokens, query, batch_tokens=budget))
        return torch.cat(parts)

    def terms(
        self,
        windows: ArrayLike | Tensor | Sequence[ArrayLike | Tensor],
        question: str,
        sampling_rate: float | Sequence[float] = SAMPLING_RATE,
        *,
        missing: Literal["error", "interpolate"] = "error",
        batch_tokens: int | None = None,
    ) -> list[FusionTerms]:
        """What each token weighs and why, per window as (C, T) tensors on the CPU.

        Token 0 is [CLS]; token 1 + 13 t + s covers patch row t (9 samples of 65 Hz) and the s-th of
        13 groups of five wavelet scales.
        """
        query = self._encode_texts([question])
        budget = batch_tokens or self.model.batch_tokens_default()
        out: list[FusionTerms] = []
        with torch.inference_mode():
            for tokens in self._groups(windows, sampling_rate, missing, batch_tokens):
                for terms in self.fusion.terms(tokens, query, batch_tokens=budget):
                    out.append(FusionTerms(*(value.cpu() for value in terms)))
        return out

    def relevance(
        self,
        windows: ArrayLike | Tensor | Sequence[ArrayLike | Tensor],
        question: str,
        sampling_rate: float | Sequence[float] = SAMPLING_RATE,
        *,
        missing: Literal["error", "interpolate"] = "error",
        batch_tokens: int | None = None,
    ) -> list[NDArray[np.float32]]:
        """How much each token has to do with the question.

        Args: as :meth:`predict_proba`.
        Returns: per window (C, T), token order as in :meth:`terms`; a window's values sum to 1.
        """
        terms = self.terms(
            windows, question, sampling_rate, missing=missing, batch_tokens=batch_tokens
        )
        return [window.relevance.numpy() for window in terms]

    def _encode_texts(self, texts: Sequence[str]) -> Tensor:
        texts = checked_texts(texts)
        new = list(dict.fromkeys(text for text in texts if text not in self._vectors))
        if new:
            with torch.inference_mode():
                vectors = self.text.encode(new).float()
            self._vectors.update(zip(new, vectors, strict=True))
        return torch.stack([self._vectors[text] for text in texts]).to(self.model.device)

    def _groups(
        self,
        windows: Any,
        sampling_rate: float | Sequence[float],
        missing: str,
        batch_tokens: int | None,
    ) -> Iterator[list[Tensor]]:
        """Token embeddings of consecutive windows, a group at most the budget (or one window)."""
        model = self.model
        self.fusion.to(model.device)
        windows, sampling_rate = with_own_rate(windows, sampling_rate)
        items = window_list(windows)
        if not items:
            raise InputError("no window to classify")
        rates = rate_list(sampling_rate, len(items))
        samples = [
            samples_at_model_rate(item.shape[1], rate, "always")
            for item, rate in zip(items, rates, strict=True)
        ]
        counts = [
            model._window_tokens((item.shape[0], max(n, MIN_SAMPLES)))
            for item, n in zip(items, samples, strict=True)
        ]
        for unit in plan_units(counts, batch_tokens or model.batch_tokens_default()):
            prepared = [prepare(items[i], rates[i], samples[i], "always", missing, i) for i in unit]
            group: list[Tensor | None] = [None] * len(prepared)
            for i, tokens in model._run_unit(prepared, "patch", batch_tokens, None):
                group[i] = tokens
            yield [tokens for tokens in group if tokens is not None]
