"""NormWear embeddings as a scikit-learn transformer, for Pipelines and grid searches."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

try:
    from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
    from sklearn.utils.validation import check_is_fitted, validate_data
except ImportError as error:
    raise ImportError(
        "NormWearTransformer needs scikit-learn >= 1.5; pip install 'normwear-fast[eval]'"
    ) from error

from normwear_fast.config import SAMPLING_RATE, NormWearConfig
from normwear_fast.errors import InputError, UsageError
from normwear_fast.mne import is_mne
from normwear_fast.model import FastNormWear


class NormWearTransformer(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """Windows to embeddings. The weights are frozen: `fit` loads them and looks at X's shape alone.

    Args:
        weights: as `FastNormWear.from_pretrained` takes it: hub id, folder, `.safetensors` or `.pth`;
            or a FastNormWear, which clones share and which decides what the arguments from
            `optimized_cwt` to `device` would; None for random, seeded weights, for trials.
        sampling_rate: Hz of X.
        pool: over a channel's tokens: ``mean``, or its ``cls``.
        channels: ``concat`` them, or ``mean`` over them.
        optimized_cwt: the scalogram; None for what the weights say.
        config: sizes, where the weights do not say them.
        precision: as of FastNormWear.
        device: where the model runs; a model given as `weights` stays where it is.
        batch_tokens: tokens in flight; None for the device's default.

    Attributes:
        model_: the FastNormWear.
        window_shape_: (channels, samples) of the windows seen in `fit`.
        n_features_in_: samples of a 2-D X, channels of a 3-D X.
    """

    def __init__(
        self,
        weights: str | Path | FastNormWear | None = None,
        *,
        sampling_rate: float = SAMPLING_RATE,
        pool: Literal["mean", "cls"] = "mean",
        channels: Literal["concat", "mean"] = "concat",
        optimized_cwt: bool | None = None,
        config: NormWearConfig | None = None,
        precision: str = "auto",
        device: str = "cpu",
        batch_tokens: int | None = None,
    ) -> None:
        self.weights = weights
        self.sampling_rate = sampling_rate
        self.pool = pool
        self.channels = channels
        self.optimized_cwt = optimized_cwt
        self.config = config
        self.precision = precision
        self.device = device
        self.batch_tokens = batch_tokens

    def __sklearn_clone__(self) -> NormWearTransformer:
        # The parameters are immutable but for a model, whose copy in every fold would fill memory.
        twin = type(self)(**self.get_params(deep=False))
        # What scikit-learn's own clone carries over: requests for metadata, and `set_output`.
        for name in ("_metadata_request", "_sklearn_output_config"):
            if hasattr(self, name):
                setattr(twin, name, copy.deepcopy(getattr(self, name)))
        return twin

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.three_d_array = True
        tags.transformer_tags.preserves_dtype = []  # embeddings are float32
        return tags

    def fit(self, X: ArrayLike, y: Any = None) -> NormWearTransformer:
        """Loads the weights; X (n, L) is one channel, X (n, C, L) several; y is not used.

        Raises:
            InputError: X of another form, or an unknown pooling.
            UsageError: an argument that contradicts the model given as `weights`.
        """
        if self.pool not in ("mean", "cls"):
            raise InputError(f"pool is {self.pool!r}; it must be 'mean' or 'cls'")
        if self.channels not in ("concat", "mean"):
            raise InputError(f"channels is {self.channels!r}; it must be 'concat' or 'mean'")
        windows = self._windows(X, reset=True)
        self.window_shape_ = windows.shape[1:]
        if isinstance(self.weights, FastNormWear):
            self._check_agrees(self.weights)
            self.model_ = self.weights
        elif self.weights is None:
            optimized = True if self.optimized_cwt is None else self.optimized_cwt
            self.model_ = FastNormWear(optimized, config=self.config, precision=self.precision)
        else:
            self.model_ = FastNormWear.from_pretrained(
                self.weights,
                optimized_cwt=self.optimized_cwt,
                config=self.config,
                precision=self.precision,
            )
        if self.model_ is not self.weights:
            self.model_.to(self.device)
        # The shape is known to be encodable before a long transform finds that it is not.
        self._encode(windows[:1])
        return self

    def transform(self, X: ArrayLike) -> NDArray[np.float32]:
        """Embeddings.

        Args:
            X: (n, L) or (n, C, L) finite numbers, in the signal's own units; shaped as in `fit`.

        Returns:
            (n, C E) float32 for ``concat``, (n, E) for ``mean``.

        Raises:
            InputError: another shape than in `fit`, or fewer than 11 samples at 65 Hz.
        """
        check_is_fitted(self)
        windows = self._windows(X, reset=False)
        if windows.shape[1:] != self.window_shape_:
            raise InputError(
                f"X has windows of (channels, samples) {windows.shape[1:]}; fit saw "
                f"{self.window_shape_}"
            )
        return self._encode(windows)

    def _check_agrees(self, model: FastNormWear) -> None:
        """A UsageError unless each argument is at its default or what the model has anyway."""
        place = model.device.type
        places = (place, f"{place}:{model.device.index or 0}", model.device)
        if self.config is not None and self.config != model.config:
            raise UsageError("config is not that of the model given as weights; leave config out")
        for name, given, default, has in (
            ("optimized_cwt", self.optimized_cwt, None, (model.optimized_cwt,)),
            ("precision", self.precision, "auto", (model.precision, model.resolved_precision)),
            ("device", self.device, "cpu", places),
        ):
            if given != default and given not in has:
                raise UsageError(
                    f"{name} is {given!r}, but the model given as weights has {has[0]!r}; leave {name} "
                    "out, or give the weights' file or folder"
                )

    def _windows(self, X: ArrayLike, *, reset: bool) -> NDArray[Any]:
        """X as (n, C, L)."""
        if is_mne(X):
            raise InputError(
                "X is an mne object; give its values, X.get_data(), and its sampling_rate, "
                "X.info['sfreq']"
            )
        dtypes = [np.float64, np.float32]
        if getattr(X, "ndim", None) != 3 and not _nested(X, 3):
            return validate_data(self, X, reset=reset, dtype=dtypes)[:, None]
        values = validate_data(self, X, reset=reset, dtype=dtypes, ensure_2d=False, allow_nd=True)
        if reset:
            self.n_features_in_ = values.shape[1]
        return values

    def _encode(self, windows: NDArray[Any]) -> NDArray[np.float32]:
        return self.model_.encode(
            windows,
            self.sampling_rate,
            pool=self.pool,
            channels=self.channels,
            batch_tokens=self.batch_tokens,
            show_progress_bar=False,
        )

    @property
    def _n_features_out(self) -> int:
        count = self.window_shape_[0] if self.channels == "concat" else 1
        return count * self.model_.config.embed_dim


def _nested(X: Any, depth: int) -> bool:
    """Whether X is lists of lists, so deep. Array-likes are not asked: they may only turn into one."""
    while depth and isinstance(X, list | tuple) and len(X):
        X, depth = X[0], depth - 1
    return not depth or getattr(X, "ndim", -1) == depth
