"""FastNormWear as its users meet it: the drop-in call, `encode`, and who owns the weights."""

from __future__ import annotations

import copy
import io
import os
import pickle
import signal
import threading
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest
import torch
from helpers import ENCODER_GOLDENS, golden, golden_config, golden_weights, recipe_state_dict
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrize, prune

from normwear_fast import FastNormWear, NormWearConfig, backends, engine, scalogram, transfer
from normwear_fast import model as model_module
from normwear_fast.errors import InputError, UsageError
from normwear_fast.packing import plan_micro_batches, plan_units
from normwear_fast.reference import ReferenceNormWear

TINY = NormWearConfig(embed_dim=32, depth=3, num_heads=2, decoder_embed_dim=16, decoder_depth=1)


def tiny(optimized_cwt=True, precision="float32", **kwargs):
    model = FastNormWear(optimized_cwt, config=TINY, precision=precision, **kwargs)
    model.load_state_dict(recipe_state_dict(model.state_dict(), 5))
    return model


@pytest.fixture(scope="module")
def model():
    return tiny()


def cosine(a, b):
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ENCODER_GOLDENS)
def test_encoder_golden(name, precision):
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


# --- get_embedding --------------------------------------------------------------------------------


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


# --- properties -----------------------------------------------------------------------------------


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
        monkeypatch.setattr(model, "batch_tokens_default", lambda device=None: 200)
        assert (model(x) - whole).abs().max() < 2e-5


# --- encode ---------------------------------------------------------------------------------------


def two_orders(tokens: np.ndarray) -> float:
    """How far two orders of summing bring the mean of (windows, C, T, E) tokens apart."""
    return tokens.shape[2] * np.finfo(np.float32).eps * float(np.abs(tokens).max())


def test_encode_shapes(model):
    x = np.random.default_rng().standard_normal((4, 3, 40)).astype(np.float32)
    tokens = 1 + 13 * 4
    for pool, axis in (("mean", ()), ("cls", ()), ("patch", (tokens,))):
        assert model.encode(x, pool=pool).shape == (4, 3, *axis, 32)
        assert model.encode(x, pool=pool, channels="mean").shape == (4, *axis, 32)
        assert model.encode(x, pool=pool, channels="concat").shape == (4, *axis, 96)
    everything = model.encode(x, pool="patch")
    assert np.abs(model.encode(x) - everything.mean(2)).max() <= two_orders(everything)
    assert np.abs(model.encode(x, pool="cls") - everything[:, :, 0]).max() < 2e-5
    joined = model.encode(x, channels="concat").reshape(4, 3, 32)
    assert np.array_equal(joined, model.encode(x))
    tensor = model.encode(x, convert_to_numpy=False)
    assert isinstance(tensor, torch.Tensor)
    assert np.array_equal(tensor.numpy(), model.encode(x))


def test_encode_resamples_each_window_from_its_own_rate(model):
    rng = np.random.default_rng()
    windows = [rng.standard_normal((2, 400)), rng.standard_normal((2, 400))]
    out = model.encode(windows, sampling_rate=[130, 32.5], pool="patch")
    assert [o.shape[1] for o in out] == [1 + 13 * (200 // 9), 1 + 13 * (800 // 9)]
    slow = model.encode(windows, sampling_rate=[200, 300], pool="patch", resample="upstream")
    assert [o.shape[1] for o in slow] == [1 + 13 * (400 // 9), 1 + 13 * (87 // 9)]


def test_encode_of_nothing(model):
    assert len(model.encode([])) == 0


def test_encode_missing_values(model):
    x = np.random.default_rng().standard_normal((3, 2, 40)).astype(np.float32)
    broken = x.copy()
    broken[2, 1, 5:8] = np.nan
    with pytest.raises(InputError, match="window 2, channel 1"):
        model.encode(broken)
    filled = x.copy()
    filled[2, 1, 4:9] = np.linspace(x[2, 1, 4], x[2, 1, 8], 5)
    got = model.encode(broken, missing="interpolate")
    assert np.abs(got - model.encode(filled)).max() < 2e-5
    broken[0, 0] = np.nan
    with pytest.raises(InputError, match="window 0, channel 0 holds no value"):
        model.encode(broken, missing="interpolate")


@pytest.mark.parametrize(
    ("windows", "options", "message"),
    [
        (np.zeros((2, 40)), {}, "(windows, channels, samples)"),
        ([np.zeros(40)], {}, "window 0 is (40,)"),
        ([np.zeros((0, 40))], {}, "window 0 is (0, 40)"),
        ([np.zeros((1, 40)), np.zeros((1, 10))], {}, "window 1 has 10 samples"),
        ([np.zeros((1, 40))], {"pool": "max"}, "pool is 'max'"),
        ([np.zeros((1, 40))], {"channels": "sum"}, "channels is 'sum'"),
        ([np.zeros((1, 40))], {"missing": "drop"}, "missing is 'drop'"),
        ([np.zeros((1, 40))], {"resample": "maybe"}, "resample is 'maybe'"),
        ([np.zeros((1, 40))], {"sampling_rate": [65, 65]}, "2 values for 1 windows"),
        ([np.zeros((1, 40))], {"batch_tokens": 20}, "batch_tokens=20"),
        ([np.full((1, 40), 1e300)], {}, "beyond float32"),
        ([np.array([["x"] * 40])], {}, "real numbers"),
    ],
)
def test_encode_refuses(model, windows, options, message):
    with pytest.raises(InputError) as caught:
        model.encode(windows, **options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


BUDGET = 300
"""Tokens of a micro-batch in what follows: a unit is 2,400."""


def ragged(count=84):
    """float64, so that preparing makes an array; mixed, so that a unit is not packed in its order."""
    rng = np.random.default_rng(11)
    return [rng.standard_normal((1 + i % 3, 20 + 13 * (i % 4))) for i in range(count)]


def planned(model, windows):
    """The windows of every micro-batch, unit by unit."""
    tokens = [model._window_tokens(w.shape) for w in windows]
    for unit in plan_units(tokens, engine.UNIT_BATCHES * BUDGET):
        shapes, counts = (
            [values[i] for i in unit] for values in ([w.shape for w in windows], tokens)
        )
        yield (
            unit,
            [
                [unit[i] for i in batch.windows]
                for batch in plan_micro_batches(shapes, counts, BUDGET)
            ],
        )


@pytest.mark.parametrize("ahead", [0, 2])
@pytest.mark.parametrize("pool", ["mean", "cls", "patch"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_units_in_a_row_are_units_one_by_one(pool, precision, ahead, monkeypatch):
    """To the bit, whatever the host is ahead: no micro-batch has windows of two units."""
    model, windows = tiny(precision=precision), ragged()
    alone = []
    for unit, _ in planned(model, windows):
        prepared = [windows[i].astype(np.float32) for i in unit]
        alone += model.encode_unit(prepared, pool=pool, batch_tokens=BUDGET)
    monkeypatch.setitem(transfer.IN_FLIGHT, "cpu", ahead)
    model = tiny(precision=precision)
    together = model.encode(windows, pool=pool, batch_tokens=BUDGET)
    for a, b in zip(alone, together, strict=True):
        assert np.array_equal(a, b)


@pytest.mark.parametrize("ahead", [0, 2])
def test_windows_are_prepared_a_micro_batch_at_a_time(ahead, monkeypatch):
    """Each just before its micro-batch is sent, the next unit's under the last one's compute."""
    model, windows, steps, alive = tiny(), ragged(), [], []
    prepare, run, fetch = model_module.prepare, engine.Engine.run, transfer.Transfers.fetch

    def prepared(window, rate, samples, resample, missing, index):
        steps.append(index)
        result = prepare(window, rate, samples, resample, missing, index)
        alive.append(weakref.ref(result))
        return result

    def ran(*arguments):
        assert not [1 for reference in alive if reference() is not None]  # packed, and let go
        steps.append("run")
        return run(*arguments)

    def fetched(self, result):
        wait = fetch(self, result)

        def waited():
            steps.append("wait")
            return wait()

        return waited

    monkeypatch.setitem(transfer.IN_FLIGHT, "cpu", ahead)
    monkeypatch.setattr(model_module, "prepare", prepared)
    monkeypatch.setattr(engine.Engine, "run", ran)
    monkeypatch.setattr(transfer.Transfers, "fetch", fetched)
    model.encode(windows, batch_tokens=BUDGET)
    batches = [batch for _, batches in planned(model, windows) for batch in batches]
    assert len(batches) > 2 * engine.UNIT_BATCHES
    expected = []
    for number, batch in enumerate(batches):
        expected += [*batch, "run", *["wait"] * (number >= ahead)]
    assert steps == expected + ["wait"] * ahead


def test_a_late_error_names_its_window_and_leaves_the_model_usable(monkeypatch):
    monkeypatch.setitem(transfer.IN_FLIGHT, "cpu", 2)
    model, windows = tiny(), ragged()
    whole = model.encode(windows, batch_tokens=BUDGET)
    units = list(planned(model, windows))
    (last, batches), late = units[-1], units[-1][1][-1][-1]
    assert len(units) > 2
    assert late > last.start

    def refused(changes, **options):
        broken = [changes.get(i, window) for i, window in enumerate(windows)]
        with pytest.raises(InputError) as caught:
            model.encode(broken, batch_tokens=BUDGET, **options)
        assert caught.value.__suppress_context__  # one error, however often it was met
        for a, b in zip(whole, model.encode(windows, batch_tokens=BUDGET), strict=True):
            assert np.array_equal(a, b)
        return str(caught.value)

    gap = windows[late].copy()
    gap[-1, 3] = np.nan
    message = refused({late: gap})
    assert message.startswith(f"window {late}, channel {len(gap) - 1} holds NaN or inf")
    # Of two in a unit the first in the order given, whichever is packed first.
    order = [i for batch in batches for i in batch]
    first, second = next((i, j) for j, i in pairwise(order) if i < j)
    empty = {i: np.full_like(windows[i], np.nan) for i in (first, second)}
    assert refused(empty, missing="interpolate").startswith(f"window {first}, channel 0 holds no")
    huge = {first: windows[first] * 1e300}
    assert refused(huge | {second: empty[second]}).startswith(f"window {first} holds values beyond")
    assert refused({late: np.zeros((2, 10))}) == (
        f"window {late} has 10 samples at 65 Hz; 11 are needed"
    )
    assert f"window {late} of 3 channels and 300 samples" in refused({late: np.zeros((3, 300))})


@pytest.mark.parametrize("ahead", [0, 2])
def test_a_run_that_is_left_early(ahead, monkeypatch):
    """Whether closed or only dropped: the model goes on, and nothing of the run is kept."""
    monkeypatch.setitem(transfer.IN_FLIGHT, "cpu", ahead)
    model, windows = tiny(), [w.astype(np.float32) for w in ragged()]
    whole = model.encode_unit(windows, batch_tokens=BUDGET)
    results, run = [], engine.Engine.run

    def ran(*arguments):
        result = run(*arguments)
        results.append(weakref.ref(result))
        return result

    monkeypatch.setattr(engine.Engine, "run", ran)
    left = model._run_unit(windows, "mean", BUDGET, None)
    next(left)
    left.close()
    del left
    assert len(results) == ahead + 1
    assert not [1 for reference in results if reference() is not None]
    for a, b in zip(whole, model.encode_unit(windows, batch_tokens=BUDGET), strict=True):
        assert np.array_equal(a, b)


def test_a_micro_batch_that_fails_leaves_the_model_usable(monkeypatch):
    """Between the copy in and the copy out, with others on their way; and in the copy out itself."""
    monkeypatch.setitem(transfer.IN_FLIGHT, "cpu", 2)
    model, windows = tiny(), ragged()
    whole = model.encode(windows, batch_tokens=BUDGET)
    for owner, name in ((engine.Engine, "run"), (transfer.Transfers, "fetch")):
        inner, calls = getattr(owner, name), []

        def fails(*arguments, inner=inner, calls=calls):
            calls.append(1)
            if len(calls) == 4:
                raise RuntimeError("out of memory")
            return inner(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fails)
            with pytest.raises(RuntimeError, match="out of memory"):
                model.encode(windows, batch_tokens=BUDGET)
        for a, b in zip(whole, model.encode(windows, batch_tokens=BUDGET), strict=True):
            assert np.array_equal(a, b)


def test_threads_share_a_model(monkeypatch):
    """Their micro-batches take turns; everyone gets what is theirs."""
    monkeypatch.setitem(transfer.IN_FLIGHT, "cpu", 2)
    model = tiny()
    rng = np.random.default_rng(3)
    sets = [
        [rng.standard_normal((1 + i % 2, 20 + 13 * ((i + n) % 4))) for i in range(24)]
        for n in range(4)
    ]
    alone = [model.encode(windows, batch_tokens=BUDGET) for windows in sets]
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(lambda w: model.encode(w, batch_tokens=BUDGET), sets))
    for expected, got in zip(alone, together, strict=True):
        for a, b in zip(expected, got, strict=True):
            assert np.array_equal(a, b)


def test_copies_have_their_streams_once_a_model():
    model = tiny()
    x = np.random.default_rng().standard_normal((1, 1, 40)).astype(np.float32)
    model.encode(x)
    kept = model._transfers
    model.encode(x)
    assert kept is not None
    assert model._transfers is kept
    assert copy.deepcopy(model)._transfers is None
    assert pickle.loads(pickle.dumps(model))._transfers is None
    model.double().encode(x)
    assert model._transfers is not kept
    assert model._transfers.dtype == torch.float64


# --- who owns the weights -------------------------------------------------------------------------


def changes(model, x, change):
    before = model.encode(x)
    change()
    return not np.array_equal(model.encode(x), before)


def test_the_cache_follows_every_way_weights_change(model):
    model = copy.deepcopy(model)
    x = np.random.default_rng().standard_normal((1, 2, 40)).astype(np.float32)
    linear = model.encoder_blocks[1].variate_encoder.mlp.fc1
    assert not changes(model, x, lambda: None)

    def in_place():
        with torch.no_grad():
            linear.weight.mul_(1.5)

    def in_inference_mode():
        with torch.inference_mode():
            linear.weight.mul_(1.5)

    def data():
        linear.weight.data = linear.weight.data * 1.5

    def replaced():
        linear.weight = torch.nn.Parameter(linear.weight.detach() * 1.5)

    def module():
        fresh = torch.nn.Linear(linear.in_features, linear.out_features)
        model.encoder_blocks[1].variate_encoder.mlp.fc1 = fresh

    def loaded():
        model.load_state_dict(recipe_state_dict(model.state_dict(), 99))

    def assigned():
        model.load_state_dict(recipe_state_dict(model.state_dict(), 98), assign=True)

    def optimiser_step():
        optimiser = torch.optim.SGD(model.parameters(), lr=0.5)
        model(torch.from_numpy(x)).square().mean().backward()
        optimiser.step()

    for change in (
        in_place,
        in_inference_mode,
        data,
        replaced,
        module,
        loaded,
        assigned,
        optimiser_step,
    ):
        assert changes(model, x, change), change.__name__
        reference = ReferenceNormWear(TINY).eval()
        reference.load_state_dict(model.state_dict())
        with torch.inference_mode():
            expected = reference(scalogram(torch.from_numpy(x))).mean(2).numpy()
        assert np.abs(model.encode(x) - expected).max() < 2e-5, change.__name__


def test_built_in_inference_mode_still_notices_changes():
    with torch.inference_mode():
        model = tiny()
        x = np.random.default_rng().standard_normal((1, 1, 40)).astype(np.float32)
        assert changes(model, x, lambda: model.norm.bias.add_(1))


def test_gradients_flow_through_the_drop_in(model):
    model = copy.deepcopy(model)
    x = torch.randn(2, 2, 40, requires_grad=True)
    out = model.get_embedding(x)
    assert out.requires_grad
    with torch.inference_mode():
        assert (model.get_embedding(x.detach()) - out).abs().max() < 2e-5
    out.square().mean().backward()
    assert torch.isfinite(x.grad).all()
    encoder = [p for n, p in model.named_parameters() if p.requires_grad and "decoder" not in n]
    assert sum(p.grad is not None for p in encoder) > 50
    model.requires_grad_(False)
    assert not model.get_embedding(x.detach()).requires_grad


def test_a_head_trains_on_a_frozen_encoder(model):
    model = copy.deepcopy(model).requires_grad_(False)
    head = torch.nn.Linear(32, 2)
    x = np.random.default_rng().standard_normal((2, 1, 40)).astype(np.float32)
    model.encode(x)  # buffers made in inference mode must serve outside it
    for embedding in (
        model.get_embedding(x),
        model(torch.from_numpy(x)),
        model.encode(x, convert_to_numpy=False),
    ):
        head.zero_grad()
        head(embedding).square().sum().backward()
        assert (head.weight.grad != 0).any()


@pytest.mark.parametrize("optimized_cwt", [True, False])
def test_gradcheck(optimized_cwt):
    config = NormWearConfig(embed_dim=8, depth=1, num_heads=2, decoder_embed_dim=8, decoder_depth=1)
    model = FastNormWear(optimized_cwt, config=config).double()
    model.load_state_dict(recipe_state_dict(model.state_dict(), 1))
    x = torch.randn(1, 2, 12, dtype=torch.float64, requires_grad=True)
    qkv = model.encoder_blocks[0].cls_fusion.attn.qkv.bias

    def run(x, bias):
        # the parameter's value goes in by hand: gradcheck perturbs its own copy
        with torch.no_grad():
            kept = qkv.detach().clone()
        out = torch.func.functional_call(
            model, {"encoder_blocks.0.cls_fusion.attn.qkv.bias": bias}, (x,)
        )
        assert torch.equal(qkv, kept)
        return out

    assert torch.autograd.gradcheck(run, (x, qkv.detach().clone().requires_grad_()))


def test_double_precision_is_the_reference_in_double(model):
    model = copy.deepcopy(model).double()
    x = torch.randn(1, 2, 45, dtype=torch.float64)
    expected = model(x.clone().requires_grad_())
    with torch.inference_mode():
        got = model(x)
    assert got.dtype == torch.float64
    assert (got - expected).abs().max() < 1e-12


def test_freeze_keeps_encoding_and_drops_the_rest():
    model = tiny()
    x = np.random.default_rng().standard_normal((2, 2, 40)).astype(np.float32)
    before = model.encode(x)
    held = sum(p.numel() for p in model.parameters())
    assert model.freeze() is model
    assert held > 0
    assert not list(model.parameters())
    assert np.array_equal(model.encode(x), before)
    tokens = model.get_embedding(x)
    assert np.abs(tokens.mean(2).numpy() - before).max() <= two_orders(tokens.numpy())
    model.to("cpu")
    assert np.array_equal(model.encode(x), before)
    with pytest.raises(UsageError, match="frozen"):
        model.state_dict()
    with pytest.raises(UsageError, match="frozen"):
        model.load_state_dict({})
    with pytest.raises(UsageError, match="frozen in float32"):
        model.encode(x, precision="bfloat16")
    with pytest.raises(UsageError, match="dtype"):
        model.double()


def test_an_adapter_is_refused_rather_than_ignored(model):
    model = copy.deepcopy(model)

    class Adapter(torch.nn.Linear):
        pass

    model.encoder_blocks[0].variate_encoder.attn.qkv = Adapter(32, 96)
    with pytest.raises(UsageError, match="qkv is a Adapter"):
        model.encode(np.zeros((1, 1, 40), np.float32))
    assert model(torch.zeros(1, 1, 40)).requires_grad


def test_random_weights_say_so(model):
    fresh = FastNormWear(config=TINY, seed=12)
    assert "random (seed 12)" in repr(fresh)
    assert fresh.provenance()["weights"] == {"source": "random", "seed": 12}
    assert fresh.provenance()["scalogram"] == "scipy"
    assert not fresh.optimized_cwt


def test_constructor_refuses(tmp_path):
    with pytest.raises(UsageError, match="use_cwt"):
        FastNormWear(use_cwt=False, config=TINY)
    with pytest.raises(UsageError, match="float17"):
        FastNormWear(config=TINY, precision="float17")
    with pytest.raises(UsageError, match="abacus"):
        FastNormWear(config=TINY, backend="abacus")


def test_half_precision_parameters_still_take_a_float32_series():
    model = tiny().to(torch.bfloat16)
    x = np.random.default_rng().standard_normal((1, 2, 60)).astype(np.float32)
    full = tiny().encode(x, pool="patch")
    assert cosine(model.encode(x, pool="patch"), full).mean() > 0.999


def test_pickle_and_copy_survive():
    model = tiny()
    x = np.random.default_rng().standard_normal((1, 1, 40)).astype(np.float32)
    expected = model.encode(x)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)  # our own object, written a line above
    assert np.array_equal(again.encode(x), expected)


def test_save_and_load_bit_for_bit(tmp_path):
    model = tiny(optimized_cwt=False)
    model.save_pretrained(tmp_path / "saved")
    again = FastNormWear.from_pretrained(tmp_path / "saved", precision="float32")
    assert again.config == TINY
    assert not again.optimized_cwt
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    x = np.random.default_rng().standard_normal((1, 2, 40)).astype(np.float32)
    assert np.array_equal(model.encode(x), again.encode(x))
    assert again.provenance()["weights"]["sha256"]


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("default", [torch.bfloat16, torch.float16, torch.float64, "meta"])
def test_torchs_defaults_change_nothing(precision: str, default: torch.dtype | str) -> None:
    """A text encoder's bfloat16 default made buffers half as long as the native kernels wrote."""
    model = tiny()
    x = np.random.default_rng().standard_normal((2, 3, 90)).astype(np.float32)
    pools = ("mean", "cls", "patch")
    before = [model.encode(x, pool=pool, precision=precision) for pool in pools]
    dtype = torch.get_default_dtype()
    try:
        if isinstance(default, str):
            torch.set_default_device(default)
        else:
            torch.set_default_dtype(default)
        model._engines.clear()
        after = [model.encode(x, pool=pool, precision=precision) for pool in pools]
    finally:
        torch.set_default_dtype(dtype)
        torch.set_default_device(None)
    for a, b in zip(before, after, strict=True):
        assert np.array_equal(a, b)


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


@pytest.mark.parametrize("kind", [">f4", ">i2", "longdouble", "bfloat16", "complex64"])
def test_numbers_of_other_kinds(kind: str) -> None:
    model = tiny()
    x = np.random.default_rng().integers(-200, 200, (2, 2, 130)).astype(np.float32)
    expected = model.encode(x)
    other = torch.from_numpy(x).bfloat16() if kind == "bfloat16" else x.astype(kind)
    if kind != "complex64":
        assert np.array_equal(model.encode(other), expected)
        assert torch.equal(model.get_embedding(other), model.get_embedding(x))
        return
    for call in (model.encode, model.get_embedding):
        for values in (other, torch.from_numpy(other)):
            with pytest.raises(InputError, match=r"complex64; (they|it) must be real"):
                call(values)


def test_a_missing_native_engine_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> backends.Backend:
        raise UsageError("backend 'native' needs normwear_fast._C: it was not built")

    monkeypatch.setitem(backends.BACKENDS, "native", missing)
    backends._say_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="it was not built; plain PyTorch runs instead"):
        assert backends.select_backend("auto", torch.device("cpu")) is backends.TORCH
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backends.select_backend("auto", torch.device("cpu"))


@pytest.mark.parametrize("backend", ["torch", "native"])
@pytest.mark.parametrize(("amplitude", "offset"), [(1.0, 0.0), (1e3, 0.0), (0.1, 1.0), (4e2, 1e5)])
def test_scipys_scalogram_is_that_of_the_published_code(
    backend: str, amplitude: float, offset: float
) -> None:
    """Smooth signals, gravity and raw counts: sums that nearly cancel, in float64 there and here."""
    model = tiny(optimized_cwt=False, backend=backend)
    t = np.arange(390) / 65
    x = offset + amplitude * np.sin(2 * np.pi * 1.3 * t + np.arange(2)[:, None])
    x = x[None].astype(np.float32)
    plain = model.get_embedding(x).detach()
    fast = model.requires_grad_(False).get_embedding(x)
    assert 0 < (fast - plain).abs().max() < 2e-5


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("optimized_cwt", [True, False])
@pytest.mark.parametrize("backend", ["torch", "native"])
def test_autocast_changes_nothing(backend: str, optimized_cwt: bool, precision: str) -> None:
    """The engine's precision is its own; operands of two dtypes were an error of torch's."""
    model = tiny(optimized_cwt, precision, backend=backend).requires_grad_(False)
    x = torch.randn(2, 2, 130)
    expected, encoded = model(x), model.encode(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(x), expected)
        assert np.array_equal(model.encode(x), encoded)
        assert torch.is_autocast_enabled("cpu")


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
    listed = model.encode([], pool=pool, channels=channels, convert_to_numpy=False)
    assert (listed.ndim, len(listed)) == (len(shape), 0)


# --- what the fast path must notice, or leave to the plain model ------------------------------------


X = np.random.default_rng(3).standard_normal((2, 2, 130)).astype(np.float32)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD])
def test_a_fused_optimisers_step_is_noticed(kind: type[torch.optim.Optimizer]) -> None:
    """On a CPU it bumps no version."""
    model = tiny()
    optimiser = kind(model.parameters(), lr=1e-2, fused=True)  # type: ignore[call-arg]
    before = model.encode(X)
    model(torch.from_numpy(X))[:, :, 0].square().mean().backward()
    optimiser.step()
    expected = copy.deepcopy(model).encode(X)
    assert np.abs(expected - before).max() > 1e-3
    assert np.array_equal(model.encode(X), expected)


def test_other_models_optimisers_change_nothing() -> None:
    model, head = tiny(), torch.nn.Linear(2, 1)
    model.encode(X)
    engine = model._engine()
    optimiser = torch.optim.AdamW(head.parameters(), fused=True)
    head(torch.ones(1, 2)).sum().backward()
    optimiser.step()
    assert model._engine() is engine


class Adapter(torch.nn.Linear):
    """LoRA as it is written by hand: children in a subclass of Linear."""

    def __init__(self, base: torch.nn.Linear) -> None:
        super().__init__(base.in_features, base.out_features)
        self.weight, self.bias = base.weight, base.bias
        self.down = torch.nn.Linear(base.in_features, 2, bias=False)
        self.up = torch.nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + self.up(self.down(x))


def adapt(model: FastNormWear, what: str) -> None:
    layer = model.encoder_blocks[1].variate_encoder
    if what == "adapter":
        layer.attn.qkv = Adapter(layer.attn.qkv)
    elif what == "subclass":
        layer.mlp.__class__ = type("Other", (type(layer.mlp),), {"forward": lambda self, x: -x})
    elif what == "forward":
        plain = layer.mlp.forward
        layer.mlp.forward = lambda x: 2 * plain(x)
    elif what == "hook":
        model.patch_embed.proj.register_forward_hook(lambda module, args, out: 2 * out)
    elif what == "eps":
        layer.norm1.eps = 1e-1
    elif what == "heads":
        layer.attn.num_heads = 1
    elif what == "prune":
        prune.random_unstructured(model.patch_embed.proj, "weight", 0.5)
    else:
        layer.mlp.fc1.bias = None


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize(
    "what", ["adapter", "subclass", "forward", "hook", "eps", "heads", "prune", "bias"]
)
def test_layers_that_compute_something_else_run_in_the_plain_model(what: str, after: bool) -> None:
    """The published drop-in computes them; folded weights would leave them out without a word."""
    model, x = tiny(), torch.from_numpy(X)
    if after and what not in ("subclass", "eps", "heads"):  # a changed attribute is not looked for
        model.encode(X)
    adapt(model, what)
    expected = model(x).detach()
    model_module._say_plain_once.cache_clear()
    with torch.no_grad(), pytest.warns(RuntimeWarning, match="; the plain model runs instead"):
        assert torch.equal(model(x), expected)
    with pytest.raises(UsageError, match=r"hooks|not a plain layer|has eps|heads|no bias"):
        model.encode(X)


def test_a_parametrized_weight_is_read(model: FastNormWear) -> None:
    class Twice(torch.nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return 2 * weight

    twin = copy.deepcopy(model)
    layer = twin.encoder_blocks[0].variate_encoder.mlp.fc1
    parametrize.register_parametrization(layer, "weight", Twice())
    x = torch.from_numpy(X)
    assert (twin.encode(X, pool="patch") - twin(x).detach().numpy()).max() < 2e-5
    assert np.abs(twin.encode(X) - model.encode(X)).max() > 1e-3


def test_the_scalogram_may_be_changed() -> None:
    model = tiny()
    first = model.encode(X)
    model.optimized_cwt = False
    assert np.array_equal(model.encode(X), tiny(optimized_cwt=False).encode(X))
    assert model.provenance()["scalogram"] == "scipy"
    model.optimized_cwt = True
    assert np.array_equal(model.encode(X), first)


def test_copies_of_a_compiled_model_are_their_own() -> None:
    model, x = tiny(), torch.from_numpy(X)
    model.compile()
    pickle.loads(pickle.dumps(model))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.cls_token.add_(torch.arange(32.0))
        assert (twin(x) - tiny()(x)).abs().max() > 1e-3


@pytest.mark.parametrize("value", [1e20, -1e30, 9.97e36, 1e300])
def test_fill_values_are_no_samples(model: FastNormWear, value: float) -> None:
    """Their variances overflow float32, and the kernels gave finite numbers that meant nothing."""
    x = X.astype(np.float64)
    x[1, 0, 40] = value
    with pytest.raises(InputError, match=r"window 1 holds values beyond .* make fill values NaN"):
        model.encode(x)
    with pytest.raises(InputError, match="window 1, channel 0 holds values beyond"):
        model.get_embedding(x)


def test_autocast_spares_the_scalogram() -> None:
    x = torch.from_numpy(X)
    expected = scalogram(x, "conv")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(scalogram(x, "conv"), expected)


def test_half_weights_give_float32() -> None:
    model = tiny().half()
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            assert model(torch.from_numpy(X)).dtype == torch.float32


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_weights_are_float32_whatever_the_default_is(default: torch.dtype) -> None:
    before = torch.get_default_dtype()
    expected = tiny()
    torch.set_default_dtype(default)
    try:
        model = tiny()
    finally:
        torch.set_default_dtype(before)
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected.state_dict()[name])
        assert value.dtype == expected.state_dict()[name].dtype


def test_the_processs_precision_is_not_the_plain_backends() -> None:
    model = tiny(backend="torch").requires_grad_(False)
    expected = model.encode(X)
    library = torch.backends.mkldnn
    before = torch.get_float32_matmul_precision(), library.conv.fp32_precision
    try:
        torch.set_float32_matmul_precision("medium")
        library.conv.fp32_precision = "bf16"
        assert np.array_equal(model.encode(X), expected)
        assert torch.get_float32_matmul_precision() == "medium"
        assert library.conv.fp32_precision == "bf16"
    finally:
        torch.set_float32_matmul_precision(before[0])
        library.conv.fp32_precision = before[1]


def test_provenance_tells_weights_apart(tmp_path) -> None:
    model = FastNormWear(config=TINY)
    assert model.provenance()["weights"] == {"source": "random", "seed": 0}
    with torch.no_grad():
        model.cls_token.add_(1)
    first = model.provenance()["weights"]
    assert first["source"] == "changed after loading"
    assert first["began_as"] == "random"
    assert "changed after loading" in repr(model)
    assert model.provenance()["weights"] == first
    assert copy.deepcopy(model).provenance()["weights"] == first
    assert pickle.loads(pickle.dumps(model)).double().float().provenance()["weights"] == first
    assert copy.deepcopy(model).half().float().provenance()["weights"]["sha256"] != first["sha256"]
    with torch.no_grad():
        model.norm.weight.mul_(2)
    assert model.provenance()["weights"]["sha256"] != first["sha256"]
    loaded = [tiny().provenance()["weights"], tiny().provenance()["weights"]]
    assert loaded[0] == loaded[1]
    assert loaded[0]["source"] == "load_state_dict"
    assert len(loaded[0]["sha256"]) == 64
    model.save_pretrained(tmp_path)
    again = FastNormWear.from_pretrained(tmp_path)
    record = again.provenance()["weights"]
    assert record == copy.deepcopy(again).double().provenance()["weights"]  # moves change no weight
    assert record == again.freeze().provenance()["weights"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"optimized_cwt": "weights.pth"}, "optimized_cwt is 'weights.pth'"),
        ({"weight_path": None}, "weight_path is None"),
        ({"config": {"depth": 2}}, "config is a dict"),
    ],
)
def test_arguments_in_the_wrong_place(arguments, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        FastNormWear(**arguments)


def test_a_frozen_model_says_what_it_lacks() -> None:
    model = tiny().freeze()
    assert model.freeze() is model
    with pytest.raises(UsageError, match="frozen for encoding: it has no gradients"):
        model(torch.from_numpy(X).requires_grad_())
    wide = tiny().double()
    expected = wide.encode(X)
    assert np.array_equal(wide.freeze().encode(X), expected)


def test_torch_func() -> None:
    model, x = tiny(), torch.from_numpy(X)
    weights = {name: value.detach() for name, value in model.named_parameters()}

    def loss(weights, x):
        return torch.func.functional_call(model, weights, (x,)).square().mean()

    found = torch.func.grad(loss)(weights, x)
    model(x).square().mean().backward()
    torch.testing.assert_close(found["norm.weight"], model.norm.weight.grad, rtol=1e-4, atol=1e-6)
    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, x[:, None])
    assert each["norm.weight"].shape == (2, 32)
    model.requires_grad_(False)
    _, tangent = torch.func.jvp(model, (x,), (torch.ones_like(x),))
    assert tangent.abs().max() > 0
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        out = torch.autograd.forward_ad.unpack_dual(model(dual))
    torch.testing.assert_close(out.tangent, tangent)


def test_inference_tensors_as_weights() -> None:
    model = tiny()
    expected = model.encode(X)
    with torch.inference_mode():
        weights = {name: value.clone() for name, value in model.state_dict().items()}
        model.load_state_dict(weights, assign=True)
    assert np.array_equal(model.encode(X), expected)


def test_tracing_is_refused(model: FastNormWear) -> None:
    with pytest.raises(UsageError, match=r"torch\.jit\.trace cannot follow"):
        torch.jit.trace(model.requires_grad_(False), torch.from_numpy(X), check_trace=False)
    model.requires_grad_()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_fork_while_another_thread_encodes_leaves_the_child_free() -> None:
    model = tiny(backend="torch").requires_grad_(False)
    model._lock.acquire()  # as that thread would have it
    try:
        child = os.fork()
        if child == 0:
            signal.alarm(30)
            os._exit(0 if threading.Thread(target=model._engine).start() is None else 1)
    finally:
        model._lock.release()
    # The lock of the child is free for any of its threads.
    assert os.waitpid(child, 0)[1] == 0


def test_rates_of_other_types(model: FastNormWear) -> None:
    expected = model.get_embedding(np.tile(X, 4), 520.0)
    for rate in (np.float32(520), torch.tensor(520.0), np.int64(520)):
        assert torch.equal(model.get_embedding(np.tile(X, 4), rate), expected)


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
