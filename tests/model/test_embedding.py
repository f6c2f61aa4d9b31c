"""`get_embedding` and `forward`: the published numbers, the reference's, and every kind of input."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import torch
from helpers import ENCODER_GOLDENS, golden, golden_config, golden_weights
from tiny_model import TINY, X, tiny
from torch._subclasses.fake_tensor import FakeTensorMode

from normwear_fast import FastNormWear, scalogram
from normwear_fast.errors import InputError, UsageError
from normwear_fast.reference import ReferenceNormWear


def cosine(a, b):
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ENCODER_GOLDENS)
def test_embeddings_are_the_published_ones(name, precision):
    arrays = golden(name)
    model = FastNormWear("scipy" not in name, config=golden_config(arrays), precision=precision)
    model.load_state_dict(golden_weights(arrays))
    with torch.inference_mode():
        out = model.get_embedding(arrays["x"]).numpy()
    base = "_base_" in name
    got, expected = (
        (out[:, :, arrays["rows"]], arrays["out_rows"]) if base else (out, arrays["out"])
    )
    assert got.shape == expected.shape
    if precision == "float32":
        assert np.abs(got - expected).max() <= (1e-4 if base else 2e-5)
    else:
        similarity = cosine(got, expected)
        assert similarity.mean() >= 0.999
        assert similarity.min() >= 0.995


def test_same_numbers_as_the_reference_on_its_own_scalogram(model):
    reference = ReferenceNormWear(TINY).eval()
    reference.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 77)
    with torch.inference_mode():
        expected = reference(scalogram(x))
        assert (model(x) - expected).abs().max() < 2e-5


def test_get_embedding_takes_numpy_and_tensors_alike(model):
    x = np.random.default_rng().standard_normal((2, 2, 50)).astype(np.float32)
    with torch.inference_mode():
        a = model.get_embedding(x, sampling_rate=64, device="cpu")
        b = model.get_embedding(torch.from_numpy(x), 64)
        c = model.get_embedding(x.astype(np.float64).tolist())
    assert isinstance(a, torch.Tensor)
    assert torch.equal(a, b)
    assert torch.equal(a, c)


def test_upstream_resamples_only_above_256_hz(model):
    from normwear_fast.preprocess import resample_sinc

    x = np.random.default_rng().standard_normal((1, 2, 1200)).astype(np.float32)
    with torch.inference_mode():
        as_it_is = model.get_embedding(x, 256)
        assert torch.equal(as_it_is, model.get_embedding(x, 65))
        above = model.get_embedding(x, 300)  # upstream crashes here on NumPy input
        assert torch.equal(above, model.get_embedding(resample_sinc(x, 300)))
        assert torch.equal(model.get_embedding(x, 300, resample="never"), as_it_is)
        always = model.get_embedding(x, 130, resample="always")
    assert always.shape[2] == model.get_embedding(x[..., :600]).shape[2]


def test_get_embedding_names_window_and_channel_of_a_nan(model):
    x = np.zeros((3, 2, 40), np.float32)
    x[1, 1, 7] = np.nan
    with pytest.raises(InputError, match="window 1, channel 1"):
        model.get_embedding(x)
    x[1, 1, 7] = np.inf
    with pytest.raises(InputError, match="window 1, channel 1"):
        model.get_embedding(x)


@pytest.mark.parametrize(
    ("x", "rate", "message"),
    [
        (np.zeros((2, 40)), 65, "(batch, channels, samples)"),
        (np.zeros((1, 1, 10)), 65, "11"),
        (np.zeros((1, 0, 40)), 65, "(batch, channels, samples)"),
        (np.zeros((1, 1, 40)), 0, "sampling_rate"),
        (np.zeros((1, 1, 40)), float("nan"), "sampling_rate"),
        (np.array([[["a"]]]), 65, "real numbers"),
        (np.zeros((1, 1, 40), complex), 65, "real numbers"),
    ],
)
def test_get_embedding_refuses(model, x, rate, message):
    with pytest.raises(InputError) as caught:
        model.get_embedding(x, rate)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_channel_order_permutes_the_output(model):
    x = torch.randn(2, 5, 60)
    order = torch.randperm(5)
    with torch.inference_mode():
        assert (model(x)[:, order] - model(x[:, order])).abs().max() < 2e-5


def test_channels_see_each_other_through_cls_only_within_their_window(model):
    x = torch.randn(2, 3, 60)
    changed = x.clone()
    changed[0, 2] += 1
    with torch.inference_mode():
        before, after = model(x), model(changed)
    assert (before[0, 0] - after[0, 0]).abs().max() > 1e-4
    assert torch.equal(before[1], after[1])


def test_ragged_equals_one_by_one_and_keeps_the_order(model):
    rng = np.random.default_rng()
    shapes = [(int(rng.integers(1, 15)), int(rng.integers(11, 200))) for _ in range(12)]
    windows = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    for pool in ("mean", "cls", "patch"):
        together = model.encode(windows, pool=pool, resample="never")
        assert isinstance(together, list)
        for window, got in zip(windows, together, strict=True):
            alone = model.encode(window[None], pool=pool, resample="never")[0]
            assert got.shape == alone.shape
            assert np.abs(got - alone).max() < 2e-5


def test_same_plan_same_bits(model):
    rng = np.random.default_rng()
    windows = [rng.standard_normal((2, 40 + 9 * (i % 3))).astype(np.float32) for i in range(9)]
    first = model.encode_unit(windows)
    again = model.encode_unit(windows)
    twin = copy.deepcopy(model).encode_unit(windows)
    for a, b, c in zip(first, again, twin, strict=True):
        assert np.array_equal(a, b)
        assert np.array_equal(a, c)


def test_batch_composition_stays_within_parity(model):
    windows = np.random.default_rng().standard_normal((17, 2, 50)).astype(np.float32)
    whole = model.encode(windows)
    for budget in (160, 300, 5_000):
        assert np.abs(model.encode(windows, batch_tokens=budget) - whole).max() < 2e-5


def test_forward_in_parts_equals_forward_at_once(model, monkeypatch):
    x = torch.randn(7, 2, 40)
    with torch.inference_mode():
        whole = model(x)
        monkeypatch.setattr(model, "batch_tokens_default", lambda device=None: 350)  # 3 windows
        assert (model(x) - whole).abs().max() < 2e-5


def test_double_precision_is_the_reference_in_double(model):
    model = copy.deepcopy(model).double()
    x = torch.randn(1, 2, 45, dtype=torch.float64)
    expected = model(x.clone().requires_grad_())
    with torch.inference_mode():
        got = model(x)
    assert got.dtype == torch.float64
    assert (got - expected).abs().max() < 1e-12
    # A precision that is asked for is that.
    asked = [each.encode(X, precision="float32") for each in (model, tiny())]
    assert not np.array_equal(asked[0], model.encode(X))
    assert np.abs(asked[0] - asked[1]).max() < 2e-5


def test_half_precision_parameters_still_take_a_float32_series():
    model = tiny().to(torch.bfloat16)
    x = np.random.default_rng().standard_normal((1, 2, 60)).astype(np.float32)
    full = tiny().encode(x, pool="patch")
    assert cosine(model.encode(x, pool="patch"), full).mean() > 0.999


def test_masked_values_are_missing() -> None:
    model = tiny()
    x = np.random.default_rng().standard_normal((2, 2, 130)).astype(np.float32)
    junk = x.copy()
    junk[1, 0, 40:60] = 9999
    masked = np.ma.masked_greater(junk, 100)
    gaps = np.where(junk > 100, np.nan, junk)
    for windows in (masked, list(masked)):
        with pytest.raises(InputError, match="window 1, channel 0 holds NaN"):
            model.encode(windows)
        filled = model.encode(windows, missing="interpolate")
        assert np.array_equal(filled, model.encode(gaps, missing="interpolate"))
    with pytest.raises(InputError, match="window 1, channel 0 holds NaN"):
        model.get_embedding(masked)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", [">f4", ">i2", "longdouble", "bfloat16", "float16"])
def test_numbers_of_any_real_kind_are_taken(model: FastNormWear, kind: str) -> None:
    x = np.random.default_rng().integers(-200, 200, (2, 2, 130)).astype(np.float32)
    other = torch.from_numpy(x).bfloat16() if kind == "bfloat16" else x.astype(kind)
    assert np.array_equal(model.encode(other), model.encode(x))
    assert torch.equal(model.get_embedding(other), model.get_embedding(x))


@pytest.mark.parametrize("call", ["encode", "get_embedding"])
def test_complex_numbers_are_refused(model: FastNormWear, call: str) -> None:
    x = np.ones((2, 2, 130), np.complex64)
    for values in (x, torch.from_numpy(x)):
        with pytest.raises(InputError, match=r"complex64; (they|it) must be real"):
            getattr(model, call)(values)


def test_windows_of_different_lengths_are_for_encode_alone(model: FastNormWear) -> None:
    windows = [np.ones((2, 130)), np.ones((2, 64))]
    with pytest.raises(InputError, match="lists of different lengths; they must be one array"):
        model.get_embedding(windows)
    assert len(model.encode(windows)) == 2


@pytest.mark.parametrize("backend", ["torch", "native"])
@pytest.mark.parametrize(("amplitude", "offset"), [(1.0, 0.0), (1e3, 0.0), (0.1, 1.0), (4e2, 1e5)])
def test_scipys_scalogram_is_that_of_the_published_code(
    backend: str, amplitude: float, offset: float
) -> None:
    """Smooth signals, gravity and raw counts: sums that nearly cancel, in float64 there and here."""
    model = tiny(optimized_cwt=False, backend=backend)
    t = np.arange(388) / 65  # one row of patches more than the other scalogram has
    x = offset + amplitude * np.sin(2 * np.pi * 1.3 * t + np.arange(2)[:, None])
    x = x[None].astype(np.float32)
    plain = model.get_embedding(x).detach()
    fast = model.requires_grad_(False).get_embedding(x)
    assert 0 < (fast - plain).abs().max() < 2e-5


def test_tensors_without_values_have_a_shape() -> None:
    """Fake ones, and the meta device's: the native engine read their addresses."""
    model = tiny().requires_grad_(False)
    twin = copy.deepcopy(model)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with mode:
            assert model(torch.zeros(2, 3, 130)).shape == (2, 3, 183, 32)
        assert model(mode.from_tensor(torch.zeros(1, 3, 130))).shape == (1, 3, 183, 32)
        twin.to("meta")
        assert twin(torch.zeros(1, 3, 130, device="meta")).shape == (1, 3, 183, 32)
        assert twin.requires_grad_()(torch.zeros(1, 3, 130, device="meta")).requires_grad
    fake = {name: mode.from_tensor(value) for name, value in model.state_dict().items()}
    for hollow in (twin, copy.deepcopy(model)):
        if hollow is not twin:
            hollow.load_state_dict(fake, assign=True)
        for call in (hollow.encode, hollow.requires_grad_(False)):
            with pytest.raises(UsageError, match="without values only forward's shape is known"):
                call(torch.zeros(1, 3, 130))
    assert torch.isfinite(model(torch.zeros(1, 3, 130))).all()


@pytest.mark.parametrize(
    ("pool", "channels", "shape"),
    [("mean", "keep", (0, 3, 32)), ("cls", "mean", (0, 32)), ("patch", "concat", (0, 183, 96))],
)
def test_no_windows_have_the_shape_of_some(
    model: FastNormWear, pool: str, channels: str, shape: tuple[int, ...]
) -> None:
    empty = np.empty((0, 3, 260))
    assert model.encode(empty, 130, pool=pool, channels=channels).shape == shape
    for as_numpy in (True, False):
        listed = model.encode([], pool=pool, channels=channels, convert_to_numpy=as_numpy)
        assert (listed.ndim, len(listed)) == (len(shape), 0)


@pytest.mark.parametrize("backend", ["torch", "native"])
def test_the_other_scalogram_is_float32_on_raw_counts(backend: str) -> None:
    """What README says of it: the published code, and the fast path, are some 1e-2 off in a token."""
    t = np.arange(390) / 65
    x = 1e3 * (30 + np.sin(2 * np.pi * 1.3 * t + np.arange(2)[:, None]))
    x = x[None].astype(np.float32)
    exact = tiny().double().get_embedding(x).detach()
    plain = tiny().get_embedding(x).detach()
    fast = tiny(backend=backend).requires_grad_(False).get_embedding(x)
    for found in (plain, fast):
        assert 1e-3 < (found - exact).abs().max() < 5e-2
