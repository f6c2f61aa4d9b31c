"""Who owns the weights: whatever changes them or their layers, the fast path notices or steps aside."""

from __future__ import annotations

import copy
import io
import pickle
import weakref

import numpy as np
import pytest
import torch
from helpers import recipe_state_dict
from tiny_model import TINY, X, changes, tiny, two_orders
from torch.nn.utils import parametrize, prune

from normwear_fast import FastNormWear, scalogram
from normwear_fast import model as model_module
from normwear_fast.errors import UsageError
from normwear_fast.reference import ReferenceNormWear


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

    def data_twice():  # the second would lie where the first has been, were that not held
        data()
        data()

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
        data_twice,
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


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD])
def test_a_fused_optimisers_step_is_noticed(kind: type[torch.optim.Optimizer]) -> None:
    """On a CPU it bumps no version."""
    model = tiny()
    optimiser = kind(model.parameters(), lr=1e-2, fused=True)  # type: ignore[call-arg]
    before = model.encode(X)
    model(torch.from_numpy(X))[:, :, 0].square().mean().backward()
    optimiser.step()
    torch.optim.SGD([torch.nn.Parameter(torch.ones(1))]).step()  # a head's, after it
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
    elif what == "last hook":
        model.norm.register_forward_hook(lambda module, args, out: 2 * out)
    elif what == "fusion":
        del model.encoder_blocks[2].cls_fusion
    elif what == "pre-hook":
        layer.mlp.register_forward_pre_hook(lambda module, args: (2 * args[0],))
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
    ("what", "message"),
    [
        ("adapter", "qkv is a Adapter, not a plain layer"),
        ("subclass", "mlp is a Other, not a plain layer"),
        ("forward", "mlp is a MLP, not a plain layer"),
        ("hook", "hooks"),
        ("pre-hook", "hooks"),
        ("last hook", "norm has forward hooks"),
        ("fusion", "encoder_blocks.2 has no cls_fusion"),
        ("eps", "has eps"),
        ("heads", "heads"),
        ("prune", "hooks"),
        ("bias", "no bias"),
    ],
)
def test_layers_that_compute_something_else_run_in_the_plain_model(
    what: str, message: str, after: bool
) -> None:
    """The published drop-in computes them; folded weights would leave them out without a word."""
    model, x = tiny(), torch.from_numpy(X)
    if after and what != "subclass":  # a layer's class is not looked at again
        model.encode(X)
    adapt(model, what)
    expected = model(x)
    assert expected.requires_grad
    expected = expected.detach()
    model_module._say_plain_once.cache_clear()
    with torch.no_grad(), pytest.warns(RuntimeWarning, match="; the plain model runs") as said:
        assert torch.equal(model(x), expected)
    assert said[0].filename == __file__
    with pytest.raises(UsageError, match=message):
        model.encode(X)


@pytest.mark.parametrize(
    "kind", ["register_module_forward_hook", "register_module_forward_pre_hook"]
)
def test_global_hooks_run_in_the_plain_model(kind: str) -> None:
    model, seen = tiny().requires_grad_(False), []
    model.encode(X)
    model_module._say_plain_once.cache_clear()
    register = getattr(torch.nn.modules.module, kind)
    handle = register(lambda layer, *values: seen.append(layer))
    try:
        with pytest.raises(UsageError, match="global forward hooks"):
            model.encode(X)
        with pytest.warns(RuntimeWarning, match="global forward hooks"):
            model(torch.from_numpy(X))
    finally:
        handle.remove()
    assert model.norm in seen


def test_a_hook_on_the_model_itself_costs_nothing() -> None:
    """It runs whichever way the model goes: no reason to fold the weights anew at every call."""
    model, seen = tiny().requires_grad_(False), []
    model.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    model(torch.from_numpy(X))
    engine = model._engine()
    model(torch.from_numpy(X))
    assert model._engine() is engine
    assert len(seen) == 2


def test_a_model_that_is_let_go_takes_its_weights_along() -> None:
    """At once, not when Python's collector comes by: a GPU's memory is wanted for the next one."""
    model = tiny()
    model.encode(X)
    held = weakref.ref(model.cls_token), weakref.ref(model._engine())
    del model
    assert [reference() for reference in held] == [None, None]


def test_a_parametrized_weight_is_read(model: FastNormWear) -> None:
    class Twice(torch.nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return 2 * weight

    twin = copy.deepcopy(model)
    layer = twin.encoder_blocks[0].variate_encoder.mlp.fc1
    parametrize.register_parametrization(layer, "weight", Twice())
    x = torch.from_numpy(X)
    assert np.abs(twin.encode(X, pool="patch") - twin(x).detach().numpy()).max() < 2e-5
    assert np.abs(twin.encode(X) - model.encode(X)).max() > 1e-3


def test_the_scalogram_may_be_changed() -> None:
    model = tiny()
    first = model.encode(X)
    model.optimized_cwt = False
    assert np.array_equal(model.encode(X), tiny(optimized_cwt=False).encode(X))
    assert model.provenance()["scalogram"] == "scipy"
    model.optimized_cwt = True
    assert np.array_equal(model.encode(X), first)


@pytest.mark.parametrize(("name", "value"), [("backend", "torch"), ("precision", "bfloat16")])
def test_backend_and_precision_may_be_changed(name: str, value: str) -> None:
    model = tiny()
    first = model.encode(X)
    setattr(model, name, value)
    assert np.array_equal(model.encode(X), tiny(**{name: value}).encode(X))
    assert model.provenance()[name] == value
    assert not np.array_equal(model.encode(X), first)


def test_copies_of_a_compiled_model_are_their_own() -> None:
    model, x = tiny(), torch.from_numpy(X)
    model.compile()
    pickle.loads(pickle.dumps(model))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.cls_token.add_(torch.arange(32.0))
        assert (twin(x) - tiny()(x)).abs().max() > 1e-3


def test_half_weights_give_float32() -> None:
    model = tiny().half()
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            assert model(torch.from_numpy(X)).dtype == torch.float32


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
    for again in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model).double().float()):
        assert again.provenance()["weights"] == first
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
    fewer_bits = copy.deepcopy(again).bfloat16().provenance()["weights"]
    assert fewer_bits["source"] == "changed after loading"
    assert record == again.freeze().provenance()["weights"]


def test_a_frozen_model_says_what_it_lacks() -> None:
    model = tiny().freeze()
    assert model.freeze() is model
    with pytest.raises(UsageError, match="frozen for encoding: it has no gradients"):
        model(torch.from_numpy(X).requires_grad_())
    wide = tiny().double()
    expected = wide.encode(X)
    assert np.array_equal(wide.freeze().encode(X), expected)


def test_inference_tensors_may_be_weights() -> None:
    model = tiny()
    expected = model.encode(X)
    with torch.inference_mode():
        weights = {name: value.clone() for name, value in model.state_dict().items()}
        model.load_state_dict(weights, assign=True)
    assert np.array_equal(model.encode(X), expected)
