"""The scikit-learn transformer against `encode` and scikit-learn's own checks; mne objects as input."""

from __future__ import annotations

import pickle
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from normwear_fast import FastNormWear, NormWearConfig
from normwear_fast.errors import InputError, UsageError

pytest.importorskip("sklearn")

from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.utils.estimator_checks import check_estimator

from normwear_fast.sklearn import NormWearTransformer

TINY = NormWearConfig(
    embed_dim=24, depth=2, num_heads=2, decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2
)

TOO_SHORT = "fewer than 11 samples"
# Checks whose data has windows of 1 to 10 samples: a scalogram's patches need 11.
EXPECTED_FAILED_CHECKS = dict.fromkeys(
    [
        "check_dict_unchanged",
        "check_dont_overwrite_parameters",
        "check_dtype_object",
        "check_estimators_dtypes",
        "check_estimators_fit_returns_self",
        "check_estimators_nan_inf",
        "check_estimators_overwrite_params",
        "check_estimators_pickle",
        "check_f_contiguous_array_estimator",
        "check_fit2d_1feature",
        "check_fit2d_1sample",
        "check_fit2d_predict1d",
        "check_fit_check_is_fitted",
        "check_fit_idempotent",
        "check_fit_score_takes_y",
        "check_methods_sample_order_invariance",
        "check_methods_subset_invariance",
        "check_n_features_in",
        "check_n_features_in_after_fitting",
        "check_pipeline_consistency",
        "check_positive_only_tag_during_fit",
        "check_readonly_memmap_input",
        "check_transformer_data_not_an_array",
        "check_transformer_general",
    ],
    TOO_SHORT,
)


class Twin(NormWearTransformer):
    """The same transformer with its minimum at 1 sample: shorter windows are held to 11."""

    def _encode(self, windows: Any) -> Any:
        short = max(0, 11 - windows.shape[-1])
        return super()._encode(np.pad(windows, ((0, 0), (0, 0), (0, short)), mode="edge"))


def signals(*shape: int) -> np.ndarray:
    return np.random.default_rng(5).normal(size=shape)


@pytest.fixture(scope="module")
def model() -> FastNormWear:
    return FastNormWear(True, config=TINY, precision="float32")


def reasons(error: BaseException | None) -> str:
    """What an error and its causes say."""
    texts = []
    while error is not None:
        texts.append(str(error))
        error = error.__cause__ or error.__context__
    return " | ".join(texts)


@pytest.mark.filterwarnings("ignore")
def test_the_only_excuse_is_11_samples() -> None:
    """Every listed check fails, and for that reason; every other one passes."""
    results = check_estimator(
        NormWearTransformer(config=TINY),
        expected_failed_checks=EXPECTED_FAILED_CHECKS,
        on_skip=None,
        on_fail="raise",
    )
    failed = [one for one in results if one["status"] == "xfail"]
    assert {one["check_name"] for one in failed} == set(EXPECTED_FAILED_CHECKS)
    for one in failed:
        assert "11 are needed" in reasons(one["exception"]), one["check_name"]
    rest = {one["status"] for one in results} - {"xfail"}
    assert rest <= {"passed", "skipped"}
    assert sum(one["status"] == "passed" for one in results) >= 15


@pytest.mark.filterwarnings("ignore")
def test_a_twin_without_the_minimum_passes_every_check() -> None:
    results = check_estimator(Twin(config=TINY), on_skip=None, on_fail="raise")
    assert all(one["status"] in ("passed", "skipped") for one in results)
    assert [one["check_name"] for one in results if one["status"] == "skipped"] in (
        [],
        ["check_array_api_input"],
    )
    passed = {one["check_name"] for one in results if one["status"] == "passed"}
    assert set(EXPECTED_FAILED_CHECKS) <= passed


@pytest.mark.parametrize("pool", ["mean", "cls"])
@pytest.mark.parametrize("channels", ["concat", "mean"])
def test_transform_is_encode(model: FastNormWear, pool: Any, channels: Any) -> None:
    X = signals(5, 3, 128)
    transformer = NormWearTransformer(model, sampling_rate=64, pool=pool, channels=channels)
    out = transformer.fit_transform(X)
    np.testing.assert_array_equal(out, model.encode(X, 64, pool=pool, channels=channels))
    assert out.shape == (5, 24 * (3 if channels == "concat" else 1))
    assert out.dtype == np.float32
    names = transformer.get_feature_names_out()
    assert list(names[:2]) == ["normweartransformer0", "normweartransformer1"]
    assert len(names) == out.shape[1]
    np.testing.assert_array_equal(transformer.transform(X.tolist()), out)


def test_two_dimensions_are_one_channel(model: FastNormWear) -> None:
    X = signals(4, 130)
    out = NormWearTransformer(model).fit_transform(X)
    np.testing.assert_array_equal(out, model.encode(X[:, None], channels="concat"))


def test_in_a_pipeline_and_a_grid(model: FastNormWear) -> None:
    time = np.arange(130) / 65
    labels = np.arange(24) % 2
    rates = np.where(labels, 9.0, 2.0)[:, None]
    X = np.sin(2 * np.pi * rates * time + signals(24, 1)) + 0.1 * signals(24, 130)
    pipeline = make_pipeline(NormWearTransformer(model), LogisticRegression(max_iter=2000))
    assert pipeline.fit(X[:16], labels[:16]).score(X[16:], labels[16:]) > 0.8
    grid = GridSearchCV(pipeline, {"normweartransformer__pool": ["mean", "cls"]}, cv=2)
    grid.fit(X, labels)
    assert set(grid.cv_results_["param_normweartransformer__pool"]) == {"mean", "cls"}


def test_clones_share_a_model_and_fitted_ones_pickle(model: FastNormWear) -> None:
    transformer = NormWearTransformer(model, sampling_rate=100, channels="mean")
    twin = clone(transformer)
    assert twin.weights is model
    assert twin.get_params(deep=False) == transformer.get_params(deep=False)
    with pytest.raises(NotFittedError):
        twin.transform(signals(2, 130))
    X = signals(3, 2, 200)
    out = transformer.fit(X).transform(X)
    again = pickle.loads(pickle.dumps(transformer)).transform(X)
    np.testing.assert_array_equal(out, again)


def test_clones_keep_the_output_and_the_requests(model: FastNormWear) -> None:
    pandas = pytest.importorskip("pandas")
    transformer = NormWearTransformer(model).set_output(transform="pandas")
    transformer._metadata_request = {"fit": "asked for"}
    twin = clone(transformer)
    assert isinstance(twin.fit_transform(signals(2, 130)), pandas.DataFrame)
    assert twin._metadata_request == transformer._metadata_request
    twin.set_output(transform="default")
    assert isinstance(transformer.fit_transform(signals(2, 130)), pandas.DataFrame)


@pytest.mark.parametrize(
    "options",
    [
        {"precision": "nonsense"},
        {"precision": "bfloat16"},
        {"optimized_cwt": False},
        {"config": NormWearConfig.base()},
        {"device": "cuda"},
    ],
)
def test_arguments_that_contradict_the_model_are_refused(
    model: FastNormWear, options: dict[str, Any]
) -> None:
    with pytest.raises(UsageError, match=f"{next(iter(options))} is .* the model given as weights"):
        NormWearTransformer(model, **options).fit(signals(2, 130))


def test_arguments_that_agree_with_the_model_are_not(model: FastNormWear) -> None:
    X = signals(2, 130)
    agreeing = NormWearTransformer(
        model, optimized_cwt=True, config=TINY, precision="float32", device="cpu"
    )
    np.testing.assert_array_equal(
        agreeing.fit_transform(X), NormWearTransformer(model).fit_transform(X)
    )


def test_weights_may_be_a_folder(model: FastNormWear, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    X = signals(2, 130)
    out = NormWearTransformer(tmp_path, precision="float32").fit_transform(X)
    np.testing.assert_array_equal(out, NormWearTransformer(model).fit_transform(X))


@pytest.mark.parametrize(
    ("options", "X", "words"),
    [
        ({"pool": "patch"}, signals(2, 130), "pool is 'patch'"),
        ({"channels": "keep"}, signals(2, 130), "channels is 'keep'"),
        ({}, signals(2, 10), "11 are needed"),
        ({"sampling_rate": 0.0}, signals(2, 130), "sampling_rate"),
        ({}, np.full((2, 130), np.nan), "NaN"),
        ({}, signals(2, 2, 2, 130), "dim 4"),
    ],
)
def test_input_that_is_no_windows_is_refused(
    model: FastNormWear, options: dict[str, Any], X: Any, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        NormWearTransformer(model, **options).fit(X)


def test_another_shape_than_fitted_is_refused(model: FastNormWear) -> None:
    transformer = NormWearTransformer(model).fit(signals(2, 3, 130))
    with pytest.raises(InputError, match=r"\(3, 131\).*\(3, 130\)"):
        transformer.transform(signals(2, 3, 131))
    with pytest.raises(ValueError, match=r"\(1, 130\).*\(3, 130\)|130 features.*3 features"):
        transformer.transform(signals(2, 130))


# ---------------------------------------------------------------- mne


@pytest.fixture(scope="module")
def mne() -> Any:
    return pytest.importorskip("mne")


def test_encode_takes_raw(model: FastNormWear, mne: Any) -> None:
    info = mne.create_info(["Fz", "ECG", "STI", "Cz"], 64.1, ["eeg", "ecg", "stim", "eeg"])
    info["bads"] = ["Cz"]
    data = signals(4, round(64.1 * 20)) * 1e-5
    raw = mne.io.RawArray(data, info, verbose="ERROR")
    out = model.encode(raw)
    edges = np.ceil(np.arange(4) * 6 * 64.1).astype(int)
    expected = model.encode([data[:2, a:b] for a, b in pairwise(edges.tolist())], 64.1)
    assert out.shape == (3, 2, 24)
    np.testing.assert_array_equal(out, expected)


def test_encode_takes_epochs(model: FastNormWear, mne: Any) -> None:
    info = mne.create_info(2, 100.0, "eeg")
    data = signals(4, 2, 200) * 1e-5
    epochs = mne.EpochsArray(data, info, verbose="ERROR")
    np.testing.assert_array_equal(
        model.encode(epochs, pool="cls", channels="mean"),
        model.encode(data, 100.0, pool="cls", channels="mean"),
    )


def test_a_list_of_mne_objects_is_refused(model: FastNormWear, mne: Any) -> None:
    raws = [
        mne.io.RawArray(signals(1, length), mne.create_info(1, 65.0, "eeg"), verbose="ERROR")
        for length in (800, 900)
    ]
    for objects in (raws, tuple(raws), [signals(1, 400), raws[0]]):
        with pytest.raises(InputError, match=r"one at a time.*mne\.concatenate_raws"):
            model.encode(objects)


def test_equal_windows_of_epochs_and_raw(mne: Any) -> None:
    from normwear_fast.mne import equal_windows_of, with_own_rate

    data = signals(4, 2, 200) * 1e-5
    epochs = mne.EpochsArray(data, mne.create_info(2, 100.0, "eeg"), verbose="ERROR")
    windows, rate = equal_windows_of(epochs)
    np.testing.assert_array_equal(windows, data)
    assert rate == 100.0
    series = signals(2, 1160)
    raw = mne.io.RawArray(series, mne.create_info(2, 65.0, "eeg"), verbose="ERROR")
    expected = np.stack([series[:, :390], series[:, 390:780]])
    np.testing.assert_array_equal(equal_windows_of(raw)[0], expected)
    odd = mne.io.RawArray(series, mne.create_info(2, 64.1, "eeg"), verbose="ERROR")
    with pytest.raises(InputError, match=r"have 384 or 385 samples; use encode"):
        equal_windows_of(odd)
    assert with_own_rate(series, 30) == (series, 30)
    assert with_own_rate(epochs, 30)[1] == 100.0


def test_a_transformer_takes_no_mne_object(model: FastNormWear, mne: Any) -> None:
    info = mne.create_info(2, 100.0, "eeg")
    epochs = mne.EpochsArray(signals(4, 2, 200), info, verbose="ERROR")
    with pytest.raises(InputError, match="X is an mne object; give its values"):
        NormWearTransformer(model).fit(epochs)


def test_a_raw_with_stretches_not_recorded(model: FastNormWear, mne: Any) -> None:
    raw = mne.io.RawArray(signals(1, 1300), mne.create_info(1, 65.0, "eeg"), verbose="ERROR")
    raw.set_annotations(mne.Annotations([7.0], [2.0], ["BAD_ACQ_SKIP"]))
    with pytest.raises(InputError, match="window 1"):
        model.encode(raw)
    assert np.isfinite(model.encode(raw, missing="interpolate")).all()
    assert len(raw.annotations) == 1


def test_a_raw_that_cannot_be_cut(model: FastNormWear, mne: Any) -> None:
    short = mne.io.RawArray(signals(1, 300), mne.create_info(1, 65.0, "eeg"), verbose="ERROR")
    with pytest.raises(InputError, match=r"lasts 4\.61\d* s, less than a window of 6 s"):
        model.encode(short)
    trigger = mne.io.RawArray(signals(1, 900), mne.create_info(1, 65.0, "stim"), verbose="ERROR")
    with pytest.raises(InputError, match="no channel that holds data"):
        model.encode(trigger)
