"""Gradients, autocast, default dtypes, torch.func and tracing around the model."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from helpers import recipe_state_dict
from tiny_model import X, tiny

from normwear_fast import FastNormWear, NormWearConfig, scalogram
from normwear_fast.errors import UsageError


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
def test_gradients_are_those_of_finite_differences(optimized_cwt):
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


def test_autocast_spares_the_scalogram() -> None:
    x = torch.from_numpy(X)
    expected = scalogram(x, "conv")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(scalogram(x, "conv"), expected)


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


def test_torch_func_differentiates_the_model() -> None:
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


def test_tracing_is_refused() -> None:
    with pytest.raises(UsageError, match=r"torch\.jit\.trace cannot follow"):
        torch.jit.trace(tiny().requires_grad_(False), torch.from_numpy(X), check_trace=False)
