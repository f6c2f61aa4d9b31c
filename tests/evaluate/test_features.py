"""Features of every model: statistics, NormWear, Chronos, MOMENT and CLAP; computed once."""

from __future__ import annotations

import itertools
import json
import sys
import types
import warnings
from typing import Any

import numpy as np
import pytest
from evaluation_sets import small_set
from raw_sets import make_ppg_bp

from normwear_fast.errors import InputError, OutputError, UsageError
from normwear_fast.evaluate import baselines
from normwear_fast.evaluate.prepare import prepare
from normwear_fast.evaluate.run import evaluate
from normwear_fast.evaluate.samples import load_samples


def published_statistics(x: np.ndarray, rate: float) -> np.ndarray:
    """The sixteen, written out for one series from their definitions."""
    from scipy.stats import kurtosis, skew

    values = [x.mean(), x.std(), x.max(), x.min(), skew(x), kurtosis(x)]
    values += [np.quantile(x, q) for q in (0.25, 0.5, 0.75)]
    bins = len(x) // 2
    magnitude = np.abs(np.fft.fft(x))[:bins]
    frequency = np.fft.fftfreq(len(x), 1 / rate)[:bins]
    share = magnitude / magnitude.sum()
    centroid = np.sum(frequency * share)
    values += [centroid, np.sqrt(np.sum((frequency - centroid) ** 2 * share)), frequency.mean()]
    values.append(frequency[magnitude.argmax()])
    for q in (0.25, 0.5, 0.75):
        values.append(frequency[min(np.searchsorted(np.cumsum(share), q), bins - 1)])
    return np.nan_to_num(np.sign(values) * np.log1p(np.abs(values)))


@pytest.mark.parametrize("length", [2, 11, 390, 391])
def test_the_sixteen_statistics_are_their_definitions(length):
    random = np.random.default_rng(length)
    x = 5 + 3 * random.standard_normal((3, 2, length)).cumsum(axis=-1)
    found = baselines.channel_statistics(x, 65.0)
    assert found.shape == (3, 2, 16)
    for index in itertools.product(range(3), range(2)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            np.testing.assert_allclose(
                found[index], published_statistics(x[index], 65.0), rtol=1e-9, atol=1e-9
            )


def test_statistics_of_a_constant_channel_are_finite():
    for value in (0.0, 4.2, 1e30):
        found = baselines.channel_statistics(np.full(390, value), 65.0)
        assert np.isfinite(found).all()
        assert found[4] == found[5] == 0


def test_features_of_ragged_windows_keep_their_order(tiny):
    samples = small_set()
    for embedder in (baselines.Statistics(), tiny):
        together = baselines.embeddings(samples, embedder)
        assert together.shape[:2] == (12, 2)
        assert together.dtype == np.float32
        alone = np.concatenate(
            [
                embedder.embed([window], np.array([rate]))
                for window, rate in zip(samples.windows, samples.sampling_rates, strict=True)
            ]
        )
        np.testing.assert_allclose(together, alone, atol=2e-5)
    with pytest.raises(InputError, match="windows of one length; found \\[130, 200\\]"):
        baselines.embeddings(samples, baselines.Raw())


def test_normwear_features_are_the_models_mean_over_tokens(tiny):
    import torch

    samples = small_set(2, (130,))
    found = baselines.embeddings(samples, tiny)
    with torch.inference_mode():
        whole = tiny.model.get_embedding(np.stack(samples.windows), sampling_rate=65)
    np.testing.assert_allclose(found, np.asarray(whole.mean(dim=2)), atol=1e-5)


def test_samples_of_other_channel_counts_are_refused():
    samples = small_set()
    samples.windows[5] = samples.windows[5][:1]
    with pytest.raises(InputError, match="sample 5 has 1 channels, sample 0 has 2"):
        baselines.embeddings(samples, baselines.Statistics())


def test_features_are_computed_once(tmp_path, monkeypatch):
    calls = []
    original = baselines.Statistics.embed

    def counted(self: Any, windows: Any, rates: Any) -> Any:
        calls.append(len(windows))
        return original(self, windows, rates)

    monkeypatch.setattr(baselines.Statistics, "embed", counted)
    samples = small_set()
    first = baselines.embeddings(samples, baselines.Statistics(), tmp_path)
    again = baselines.embeddings(small_set(), baselines.Statistics(), tmp_path)
    np.testing.assert_array_equal(first, again)
    assert calls == [12]
    changed = small_set()
    changed.windows[3] = changed.windows[3] + 1
    baselines.embeddings(changed, baselines.Statistics(), tmp_path)
    slower = small_set(rate=64.0)
    baselines.embeddings(slower, baselines.Statistics(), tmp_path)
    assert calls == [12] * 3
    # A file cut short is computed again; nothing half-written is left.
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:50])
    np.testing.assert_array_equal(
        first, baselines.embeddings(small_set(), baselines.Statistics(), tmp_path)
    )
    assert calls == [12] * 4
    assert not list(tmp_path.glob("*.tmp"))
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(OutputError, match="features cannot be kept there"):
        baselines.embeddings(small_set(), baselines.Statistics(), blocked)


def test_the_cache_knows_weights_from_weights(tiny):
    from normwear_fast.model import FastNormWear

    other = FastNormWear(optimized_cwt=True, config=tiny.model.config, seed=1)
    scipy = FastNormWear(optimized_cwt=False, config=tiny.model.config)
    identities = [
        json.dumps(baselines.NormWear(model).identity(), sort_keys=True, default=str)
        for model in (tiny.model, other, scipy)
    ]
    assert len(set(identities)) == 3
    same = FastNormWear(optimized_cwt=True, config=tiny.model.config)
    assert baselines.NormWear(same).identity() == tiny.identity()


@pytest.mark.parametrize(
    ("name", "package"), [("chronos", "chronos"), ("moment", "momentfm"), ("clap", "transformers")]
)
def test_a_missing_package_says_how_to_get_it(monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UsageError, match=f"needs the package {package}; pip install"):
        baselines.embeddings(small_set(), baselines.BASELINES[name]())


def test_chronos_takes_the_last_tokens_state(monkeypatch):
    import torch

    class Pipeline:
        @classmethod
        def from_pretrained(cls, model: str, device_map: str) -> Pipeline:
            assert (model, device_map) == ("amazon/chronos-t5-large", "cpu")
            return cls()

        def embed(self, series: torch.Tensor) -> tuple[torch.Tensor, None]:
            tokens = torch.cat([series, 10 * series.mean(dim=1, keepdim=True)], dim=1)
            return tokens[..., None].repeat(1, 1, 4).to(torch.bfloat16), None

    monkeypatch.setitem(sys.modules, "chronos", types.SimpleNamespace(ChronosPipeline=Pipeline))
    samples = small_set()
    found = baselines.embeddings(samples, baselines.Chronos())
    assert found.shape == (12, 2, 4)
    expected = np.stack([10 * window.mean(axis=1) for window in samples.windows])
    np.testing.assert_allclose(found[..., 0], expected, rtol=0.01, atol=0.01)


def test_moment_pads_on_the_left_and_masks(monkeypatch):
    import torch

    class Pipeline(torch.nn.Module):
        @classmethod
        def from_pretrained(cls, model: str, model_kwargs: dict[str, str]) -> Pipeline:
            assert model_kwargs == {"task_name": "embedding"}
            return cls()

        def init(self) -> None:
            self.ready = True

        def forward(self, x_enc: torch.Tensor, input_mask: torch.Tensor) -> Any:
            assert self.ready
            assert x_enc.shape[1:] == (1, 512)
            assert (x_enc[:, 0][input_mask == 0] == 0).all()
            sums = torch.stack([x_enc[:, 0, -1], input_mask.sum(dim=1)], dim=1)
            return types.SimpleNamespace(embeddings=sums)

    monkeypatch.setitem(sys.modules, "momentfm", types.SimpleNamespace(MOMENTPipeline=Pipeline))
    samples = small_set(lengths=(130, 600))
    found = baselines.embeddings(samples, baselines.Moment())
    assert found[0, 0].tolist() == [samples.windows[0][0, -1], 130]
    assert found[1, 1].tolist() == [samples.windows[1][1, -1], 512]


def test_clap_runs_through_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.ClapAudioConfig(
        hidden_size=32,
        patch_embeds_hidden_size=16,
        depths=[1, 1],
        num_attention_heads=[2, 2],
        num_hidden_layers=2,
        projection_dim=8,
        spec_size=64,
        num_mel_bins=16,
        window_size=4,
        enable_fusion=False,
    )
    try:
        model = transformers.ClapAudioModelWithProjection(config)
        model.save_pretrained(tmp_path)
    except Exception as error:
        pytest.skip(f"a tiny CLAP cannot be built with this transformers: {error}")
    transformers.ClapFeatureExtractor(
        feature_size=16, truncation="rand_trunc", max_length_s=2, fft_window_size=256
    ).save_pretrained(tmp_path)
    found = baselines.embeddings(small_set(2, (130,)), baselines.Clap(model=str(tmp_path)))
    assert found.shape == (2, 2, 8)
    assert np.isfinite(found).all()


def test_a_prepared_set_is_evaluated_with_its_groups(tmp_path):
    make_ppg_bp(tmp_path / "raw")
    prepare("ppg-bp", tmp_path / "raw", tmp_path / "out", seed=0)
    found = load_samples(tmp_path / "out")
    # Twelve samples of four people cannot hold out a person of each class.
    found.is_test = np.arange(12) % 3 == 2
    result = evaluate([found], [baselines.Statistics()], resamples=20)
    assert [row.task.name for row in result.rows] == [task.name for task in found.tasks]
    (entry,) = result.averages
    scores = [row.result.score for row in result.rows]
    assert entry["averages"]["disease risk"] == pytest.approx(np.mean(scores))
    assert entry["averages"]["micro"] == pytest.approx(np.mean(scores))


def test_nan_embeddings_are_reported():
    class Broken:
        name = "broken"

        def identity(self) -> dict[str, Any]:
            return {}

        def embed(self, windows: Any, rates: Any) -> np.ndarray:
            features = np.stack([window.std(axis=1, keepdims=True) for window in windows])
            features[[1, 8]] = np.nan
            return features

    result = evaluate([small_set()], [Broken()], resamples=0)
    assert "2 of 12 samples had NaN features, taken as 0" in result.rows[0].result.notes
