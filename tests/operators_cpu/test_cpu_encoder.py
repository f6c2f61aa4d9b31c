"""The encoder on the CPU backends: published numbers, ragged windows, repeatable bits, the choice."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cpu_operators import CPU, NAMES, NATIVE
from helpers import ENCODER_GOLDENS, golden, golden_config, recipe_state_dict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bench import native_checks
from normwear_fast import _native, backends, engine, native
from normwear_fast.backends import TORCH
from normwear_fast.config import NormWearConfig
from normwear_fast.errors import UsageError
from normwear_fast.model import FastNormWear

TINY = NormWearConfig(embed_dim=32, depth=3, num_heads=2, decoder_embed_dim=16, decoder_depth=0)


def encoder(monkeypatch, name: str, config: NormWearConfig, precision: str, method: bool = True):
    monkeypatch.setitem(backends.BACKENDS, "native", lambda: native.backend(name))
    model = FastNormWear(method, config=config, precision=precision, backend="native")
    return model.requires_grad_(False)


GOLDEN_LIMITS = {"bfloat16": (0.999, 0.995), "int8": (0.998, 0.995)}


@pytest.fixture(scope="module")
def golden_weights():
    known = {}

    def load(model, arrays):
        key = (str(arrays["config"]), int(arrays["weight_seed"]))
        if key not in known:
            known[key] = recipe_state_dict(model.state_dict(), key[1])
        model.load_state_dict(known[key])

    return load


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("file", [f for f in ENCODER_GOLDENS if "base" not in f or "L128" in f])
def test_golden(name, file, monkeypatch, golden_weights):
    arrays = golden(file)
    base = "base" in file
    if base and name != native.instruction_sets()[0]:
        pytest.skip(
            "not run: the base model runs on the best instruction set, the small one on all"
        )
    if name == "portable" and arrays["x"].size > 1_000:
        pytest.skip("not run: portable code takes the shorter files")
    config = golden_config(arrays)
    model = encoder(monkeypatch, name, config, "float32", "scipy" not in file)
    golden_weights(model, arrays)
    x = torch.from_numpy(arrays["x"])
    for precision in ("float32", "bfloat16", "int8"):
        model.precision = precision
        out = model(x).double()
        key = "out_rows" if base else "out"
        got = out[:, :, torch.from_numpy(arrays["rows"]).long()] if base else out
        expected = torch.from_numpy(arrays[key]).double()
        assert torch.isfinite(out).all()
        if precision == "float32":
            assert (got - expected).abs().max() < (1e-4 if base else 2e-5)
            continue
        cosine = torch.nn.functional.cosine_similarity(got, expected, dim=-1)
        mean, worst = GOLDEN_LIMITS[precision]
        assert cosine.mean() >= mean
        assert cosine.min() >= worst


@pytest.mark.skipif(not NATIVE, reason="normwear_fast._C was not built")
@settings(max_examples=25, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_fuzz_ragged_windows_against_the_plain_backend(data):
    name = data.draw(st.sampled_from(native.instruction_sets()))
    method = data.draw(st.booleans())
    shapes = data.draw(
        st.lists(st.tuples(st.integers(1, 5), st.integers(11, 150)), min_size=1, max_size=6)
    )
    pool = data.draw(st.sampled_from(["mean", "cls", "patch"]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    windows = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    plain = FastNormWear(method, config=TINY, precision="float32", backend="torch")
    with pytest.MonkeyPatch.context() as patch:
        fast = encoder(patch, name, TINY, "float32", method)
        got = fast.encode_unit(windows, pool=pool, batch_tokens=2_000)
    for mine, expected in zip(got, plain.encode_unit(windows, pool=pool), strict=True):
        assert mine.shape == expected.shape
        assert np.abs(mine - expected).max() < 2e-5


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_the_same_bits_in_any_company_and_on_any_threads(name, precision, monkeypatch, rng):
    model = encoder(monkeypatch, name, TINY, precision)
    windows = [rng.standard_normal((2, n)).astype(np.float32) for n in (60, 390, 60, 130)]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        together = model.encode_unit(windows)
        torch.set_num_threads(2)
        again = model.encode_unit(windows)
        alone = [model.encode_unit([window])[0] for window in windows]
    finally:
        torch.set_num_threads(threads)
    for a, b, c in zip(together, again, alone, strict=True):
        assert np.array_equal(a, b)
        assert np.array_equal(a, c)


def test_a_float64_model_takes_the_definition():
    model = FastNormWear(config=TINY).double().requires_grad_(False)
    x = torch.randn(1, 2, 60, dtype=torch.float64)
    plain = FastNormWear(config=TINY, backend="torch").double().requires_grad_(False)
    assert (model(x) - plain(x)).abs().max() < 1e-12


@pytest.mark.skipif(not NATIVE, reason="normwear_fast._C was not built")
def test_the_checks_of_another_machine_see_a_broken_operator(monkeypatch):
    """bench/native_checks.py, which bench.gpu_check runs on its machine too."""
    known = dict(native_checks.checks())
    assert len(known) == 22 * len(native.instruction_sets())
    check = known[f"{native.instruction_sets()[0]} bias_gelu float32"]
    good = check()
    assert good["error"] <= good["bound"]
    assert good["stable"]
    monkeypatch.setattr(native, "bias_gelu", lambda kernels, x, bias: x.mul_(1.001))
    assert not check()["error"] <= good["bound"]
    monkeypatch.setattr(native, "bias_gelu", lambda kernels, x, bias: x.fill_(torch.nan))
    assert not check()["error"] <= good["bound"]


@pytest.mark.parametrize(("gain", "chosen"), [(0.55, "avx512"), (1.9, "avx512bf16")])
def test_bfloat16_products_are_used_where_they_pay(gain, chosen, monkeypatch):
    monkeypatch.delenv("NORMWEAR_FAST_ISA", raising=False)
    monkeypatch.setattr(native, "instruction_sets", lambda: native.INSTRUCTION_SETS[1:])
    monkeypatch.setattr(native, "bfloat16_gain", lambda name: gain)
    assert native.default_instruction_set() == chosen


@pytest.mark.skipif(not NATIVE, reason="normwear_fast._C was not built")
def test_auto_is_the_faster_precision(monkeypatch):
    """Of the CPU: what the measured products say, and float32 for sets without bfloat16 products."""
    for name in native.instruction_sets():
        monkeypatch.setenv("NORMWEAR_FAST_ISA", name)
        has_bfloat16 = name in ("amx", "avx512bf16")
        assert native.kernels(name).native_bfloat16 == has_bfloat16
        assert engine.cpu_has_bfloat16.__wrapped__() == has_bfloat16


def test_the_backend_is_chosen_by_device_and_build(monkeypatch):
    if NATIVE:
        assert backends.select_backend("auto", CPU).name == "native"
        assert "normwear-fast" in FastNormWear(config=TINY).provenance()["blas"]
        monkeypatch.setenv("NORMWEAR_FAST_ISA", "portable")
        assert native.backend.__wrapped__().blas == "normwear-fast portable"
        monkeypatch.setenv("NORMWEAR_FAST_ISA", "mmx")
        with pytest.raises(UsageError, match=r"mmx.*portable"):
            native.backend.__wrapped__()
    with pytest.raises(UsageError, match="runs on cpu only"):
        backends.select_backend("native", torch.device("cuda"))
    with pytest.raises(UsageError, match=r"int8.*native"):
        FastNormWear(config=TINY, precision="int8", backend="torch").encode(np.ones((1, 1, 60)))
    monkeypatch.setattr(_native, "load", lambda: (None, "it was not built"))
    native.backend.cache_clear()
    try:
        assert backends.select_backend("auto", CPU) is TORCH
        with pytest.raises(UsageError, match="it was not built"):
            backends.select_backend("native", CPU)
    finally:
        native.backend.cache_clear()
