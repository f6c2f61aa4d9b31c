"""The module under `torch.compile` and `torch.export`, and what importing it loads."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from torch.export import Dim

from normwear_fast import FastNormWear, NormWearConfig
from normwear_fast.errors import UsageError

CONFIG = NormWearConfig(embed_dim=32, depth=2, num_heads=2, decoder_embed_dim=16, decoder_depth=0)
TOLERANCE = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 6e-2}
"""Of standardised outputs: the rounding of a different order of the same sums."""


def build(
    precision: str = "float32", optimized_cwt: bool = True, **options: object
) -> FastNormWear:
    model = FastNormWear(
        optimized_cwt,
        config=CONFIG,
        precision="float32" if precision == "float64" else precision,
        **options,
    )
    # Fresh weights, not the seeded ones: biases and norms that are not zero and one.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.requires_grad_(False)
    return model.double() if precision == "float64" else model


def test_import_stays_light() -> None:
    """torch.compiler.disable or lru_cache under dynamo would load torch._dynamo: two seconds."""
    program = (
        "import sys, torch; before = set(sys.modules)\n"
        "from normwear_fast import FastNormWear\n"
        "print(*sorted(set(sys.modules) - before))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    heavy = ("torch._dynamo", "torch._inductor", "triton", "sympy", "matplotlib", "sklearn", "pywt")
    assert [name for name in run.stdout.split() if name.startswith(heavy)] == []


# --- torch.compile ----------------------------------------------------------------------------------


def compiled(model: FastNormWear, **options: object) -> torch.nn.Module:
    torch.compiler.reset()
    return torch.compile(model, backend="aot_eager", fullgraph=True, **options)


@pytest.mark.parametrize(("optimized_cwt", "dynamic"), [(True, None), (False, True)])
def test_compiled_inference_is_the_engine(optimized_cwt: bool, dynamic: bool | None) -> None:
    model = build(optimized_cwt=optimized_cwt)
    program = compiled(model, dynamic=dynamic)
    for shape in ((2, 3, 64), (1, 3, 131), (2, 3, 700)):
        x = torch.randn(shape)
        assert torch.equal(program(x), model(x))
        with torch.inference_mode():
            assert torch.equal(program(x), model(x))


def test_compiled_by_inductor() -> None:
    model = build("bfloat16")
    torch.compiler.reset()
    program = torch.compile(lambda x: model(x).mean((1, 2)) + 1, fullgraph=True)
    x = torch.randn(2, 3, 64)
    assert torch.allclose(program(x), model(x).mean((1, 2)) + 1, atol=1e-6)


def test_compiled_runs_the_weights_of_the_moment() -> None:
    model = build()
    program = compiled(model)
    x = torch.randn(1, 2, 64)
    before = program(x)
    model.load_state_dict({name: 1.1 * value for name, value in model.state_dict().items()})
    assert torch.equal(program(x), model(x))
    assert not torch.allclose(program(x), before)
    with torch.no_grad():
        model.norm.weight.mul_(2)
    assert torch.equal(program(x), model(x))


def test_compiled_copies_are_their_own_models() -> None:
    model = build()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.norm.bias.add_(1)
    x = torch.randn(1, 2, 64)
    assert torch.equal(compiled(model)(x), model(x))
    assert torch.equal(compiled(twin)(x), twin(x))
    assert not torch.allclose(twin(x), model(x))


def test_compiled_frozen_and_double() -> None:
    x = torch.randn(1, 2, 64)
    frozen = build().freeze()
    assert torch.equal(compiled(frozen)(x), frozen(x))
    double = build("float64")
    assert compiled(double)(x).dtype == torch.float64
    assert torch.equal(compiled(double)(x), double(x))


def test_compiled_with_gradients_is_the_plain_model() -> None:
    model = build().requires_grad_(True)
    model.pos_embed.requires_grad_(False)
    program = compiled(model, dynamic=False)
    x = torch.randn(1, 2, 64)
    expected, got = model(x), program(x)
    assert got.requires_grad
    assert torch.allclose(got, expected, atol=1e-5)
    wanted = torch.autograd.grad(expected.square().mean(), model.cls_token)[0]
    found = torch.autograd.grad(got.square().mean(), model.cls_token)[0]
    assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-7)
    with torch.no_grad():  # and back to the engine
        assert torch.equal(program(x), model(x))


def test_compiled_adapters_run_in_the_plain_model() -> None:
    class Adapter(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    model = build()
    program, x = compiled(model), torch.randn(1, 2, 64)
    before = program(x)
    layer = model.encoder_blocks[0].variate_encoder.mlp
    adapter = Adapter(layer.fc1.in_features, layer.fc1.out_features)
    adapter.load_state_dict(layer.fc1.state_dict())
    layer.fc1 = adapter.requires_grad_(False)
    for run in (program, compiled(model)):
        out = run(x)
        assert out.is_contiguous()  # as the node's fake result is
        assert torch.equal(out, model(x))
        assert not torch.allclose(out, before)


def test_opcheck_of_the_nodes() -> None:
    model = build()
    x = torch.randn(2, 3, 64)
    tokens, width = model(x).shape[2:]
    torch.library.opcheck(torch.ops.normwear.forward.default, (x, model._handle, tokens, width))
    for method in ("conv", "scipy"):
        for samples in (62, 639, 640, 641, 700):
            arguments = (samples, method, "mexh", CONFIG.num_scales)
            torch.library.opcheck(torch.ops.normwear.wavelet_bank.default, arguments)


# --- torch.export -----------------------------------------------------------------------------------


def exported(model: FastNormWear, *shape: int) -> torch.export.ExportedProgram:
    dynamic = {"x": {0: Dim("B")}}
    return torch.export.export(model, (torch.randn(shape),), dynamic_shapes=dynamic)


@pytest.mark.parametrize("optimized_cwt", [True, False])
@pytest.mark.parametrize("precision", ["float64", "float32", "bfloat16"])
def test_exported_program(tmp_path, precision: str, optimized_cwt: bool) -> None:
    model = build(precision, optimized_cwt)
    channels, samples = 3, 100
    program = exported(model, 2, channels, samples)
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    for batch in (1, 2, 5):
        x = torch.randn(batch, channels, samples)
        assert torch.allclose(loaded(x), model(x), rtol=0, atol=TOLERANCE[precision])
    nodes = [str(node.target) for node in program.graph.nodes if "normwear" in str(node.target)]
    assert (
        len(nodes)
        == 1 + CONFIG.depth * 4 + sum(map(CONFIG.has_fusion, range(CONFIG.depth))) * 4 + 1
    )


def test_exported_program_on_raw_counts() -> None:
    """SciPy's scalogram in float64, as the model has it: in float32 a token is some 1e-2 off."""
    model = build(optimized_cwt=False)
    t = torch.arange(100) / 65
    x = 1e5 + 400 * torch.sin(2 * torch.pi * 1.3 * t + torch.arange(2)[:, None])[None]
    program = exported(model, 2, 2, 100).module()
    assert torch.allclose(program(x), model(x), rtol=0, atol=2e-5)


def test_exported_snapshot_of_the_current_weights() -> None:
    """The weights at the time of export: those put in place by hand since the last call, too."""
    model = build()
    x = torch.randn(1, 2, 64)
    model(x)
    model.norm.bias = torch.nn.Parameter(model.norm.bias + 1, requires_grad=False)
    expected = model(x)
    model.norm.bias = torch.nn.Parameter(model.norm.bias + 1, requires_grad=False)
    program = exported(model, 2, 2, 64).module()
    assert torch.allclose(program(x), expected + 1, atol=1e-5)
    with torch.no_grad():
        model.norm.bias.add_(1)
    assert torch.allclose(program(x), expected + 1, atol=1e-5)
    # The trace left the model as it was.
    assert torch.allclose(model(x), expected + 2, atol=1e-5)


def test_exported_inside_another_module() -> None:
    class Head(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = build()
            self.linear = torch.nn.Linear(CONFIG.embed_dim, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(self.encoder(x).mean((1, 2)))

    head = Head()
    x = torch.randn(3, 2, 64)
    assert torch.allclose(exported(head, 2, 2, 64).module()(x), head(x), atol=1e-5)


def test_exported_frozen_model_holds_nothing_twice() -> None:
    model = build()
    x = torch.randn(1, 2, 64)
    expected = model(x)
    program = exported(model.freeze(), 2, 2, 64)
    assert program.state_dict == {}
    assert torch.allclose(program.module()(x), expected, atol=1e-5)


def test_export_says_what_it_cannot_do() -> None:
    model = build()
    model.precision = "int8"
    with pytest.raises(UsageError, match="'int8' cannot be exported"):
        exported(model, 2, 2, 64)
