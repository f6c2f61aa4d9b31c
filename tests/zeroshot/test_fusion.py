"""The fusion module: the published numbers, its fast form against its definition, and its scores."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from helpers import golden, recipe_state_dict
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from normwear_fast.errors import InputError
from normwear_fast.zeroshot import MSiTF, score_options
from normwear_fast.zeroshot.fusion import definition

VARIANTS: dict[str, dict[str, bool]] = {
    "fused": {},
    "fused_relevance_only": {"relevance_only": True},
    "fused_no_query": {"use_query": False},
    "fused_no_recency": {"recency": False},
}


@pytest.fixture(scope="module")
def released() -> tuple[MSiTF, dict[str, Any]]:
    """The fusion module at the released size with the reference numbers' weights."""
    arrays = golden("msitf")
    module = MSiTF()
    module.load_state_dict(recipe_state_dict(module.state_dict(), int(arrays["weight_seed"])))
    return module.eval().requires_grad_(False), arrays


def tensor(arrays: dict[str, Any], name: str) -> Tensor:
    return torch.from_numpy(arrays[name])


def test_state_dict_has_the_released_names_and_shapes(released: Any) -> None:
    module, arrays = released
    names = [f"{name} {tuple(value.shape)}" for name, value in module.state_dict().items()]
    assert sorted(names) == sorted(arrays["names"].tolist())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("form", ["definition", "forward", "fuse", "gradients"])
def test_every_form_gives_the_published_numbers(released: Any, form: str, variant: str) -> None:
    module, arrays = released
    embedding, query = tensor(arrays, "embedding"), tensor(arrays, "query")
    options = VARIANTS[variant]
    if form == "definition":
        fused, _ = definition(module, embedding, query, **options)
    elif form == "forward":
        fused = module(embedding, query, **options)
    elif form == "gradients":
        fused = module(embedding.clone().requires_grad_(), query, **options).detach()
    else:
        fused = module.fuse(list(embedding), query, batch_tokens=7, **options)
    assert (fused - tensor(arrays, variant)).abs().max() < 1e-5


def test_terms_and_probabilities_are_the_published_ones(released: Any) -> None:
    module, arrays = released
    terms = module.terms(list(tensor(arrays, "embedding")), tensor(arrays, "query"))
    for name in ("relevance", "importance", "recency"):
        values = torch.stack([getattr(window, name).flatten() for window in terms])
        assert (values - tensor(arrays, name)).abs().max() < 1e-6
    fused = module(tensor(arrays, "embedding"), tensor(arrays, "query"))
    probabilities = score_options(fused, tensor(arrays, "options"))
    assert (probabilities - tensor(arrays, "probabilities")).abs().max() < 1e-6


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("width", [8, 40])  # narrower than a token: the keys; wider: their factor
def test_fast_form_is_the_definition(width: int, training: bool, variant: str) -> None:
    torch.manual_seed(1)
    module = MSiTF(16, width).double().train(training)
    shapes = [(1, 1), (3, 7), (3, 7), (2, 14), (1, 30)]
    windows = [torch.randn(*shape, 16, dtype=torch.float64) for shape in shapes]
    query = torch.randn(len(shapes), width, dtype=torch.float64)
    for i, window in enumerate(windows):
        torch.manual_seed(i)
        plain, plain_terms = definition(module, window[None], query[i : i + 1], **VARIANTS[variant])
        for grad in (True, False):
            torch.manual_seed(i)
            with torch.set_grad_enabled(grad):
                fast = module.fuse([window], query[i : i + 1], batch_tokens=4, **VARIANTS[variant])
            assert (fast - plain).abs().max() < 1e-12
        if variant == "fused" and not training:
            (terms,) = module.terms([window], query[i : i + 1])
            assert plain_terms is not None
            for a, b in zip(terms, plain_terms, strict=True):
                assert (a.flatten() - b.flatten()).abs().max() < 1e-12
    if not training:  # ragged together is each alone; one question for all is that question each
        alone = torch.cat(
            [module.fuse([w], query[i : i + 1], **VARIANTS[variant]) for i, w in enumerate(windows)]
        )
        together = module.fuse(windows, query, batch_tokens=11, **VARIANTS[variant])
        assert (together - alone).abs().max() < 1e-12
        shared = module.fuse(windows, query[:1], **VARIANTS[variant])
        repeated = module.fuse(windows, query[:1].expand(5, -1), **VARIANTS[variant])
        assert (shared - repeated).abs().max() < 1e-12


def test_gradients_are_the_definitions() -> None:
    torch.manual_seed(2)
    module = MSiTF(6, 10).double()
    embedding = torch.randn(2, 3, 5, 6, dtype=torch.float64, requires_grad=True)
    query = torch.randn(2, 10, dtype=torch.float64, requires_grad=True)
    inputs = [embedding, query, *(p for n, p in module.named_parameters() if ".var." not in n)]
    grads = []
    for fused in (module.eval()(embedding, query), definition(module, embedding, query)[0]):
        grads.append(torch.autograd.grad(fused.square().sum(), inputs))
    for fast, plain in zip(*grads, strict=True):
        assert (fast - plain).abs().max() <= 1e-10 * max(1.0, float(plain.abs().max()))


def test_factor_follows_the_weights() -> None:
    torch.manual_seed(3)
    module = MSiTF(8, 20).eval()
    embedding, query = torch.randn(2, 1, 9, 8), torch.randn(2, 20)
    with torch.no_grad():
        before = module(embedding, query, relevance_only=True)
        module.k.weight.mul_(torch.linspace(0.1, 3, 8))
        after = module(embedding, query, relevance_only=True)
        plain, _ = definition(module, embedding, query, relevance_only=True)
    assert (after - plain).abs().max() < 1e-5
    assert (after - before).abs().max() > 1e-4


@pytest.mark.parametrize("query_dim", [6, 20])
def test_factor_follows_a_fused_optimiser(query_dim: int) -> None:
    """Whose steps on a CPU leave no trace in the parameters: neither result nor gradient is stale."""
    torch.manual_seed(3)
    module = MSiTF(8, query_dim).eval()
    embedding, query = torch.randn(2, 1, 9, 8), torch.randn(2, query_dim)
    optimizer = torch.optim.AdamW(module.parameters(), 0.1, fused=True)
    for _ in range(2):
        with torch.no_grad():
            assert (
                module(embedding, query) - definition(module, embedding, query)[0]
            ).abs().max() < 1e-4
        grads = []
        for fused in (module(embedding, query), definition(module, embedding, query)[0]):
            grads.append(
                torch.autograd.grad(fused.square().sum(), [module.k.weight, module.q.weight])
            )
        for fast, plain in zip(*grads, strict=True):
            assert (fast - plain).abs().max() <= 1e-3 * plain.abs().max()
        module(embedding, query).square().sum().backward()
        optimizer.step()


def test_factor_is_kept_and_no_copy_takes_it_along() -> None:
    torch.manual_seed(3)
    module = MSiTF(8, 20).eval()
    embedding, query = torch.randn(2, 1, 9, 8), torch.randn(2, 20)
    with torch.no_grad():
        module(embedding, query)
        kept = module._factor
        module(embedding, query)
        assert module._factor is kept is not None
        for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert twin._factor is None
            assert torch.equal(twin(embedding, query), module(embedding, query))
        module.k = torch.nn.Linear(8, 20)
        plain, _ = definition(module, embedding, query)
        assert (module(embedding, query) - plain).abs().max() < 1e-5
    exported = torch.export.export(module, (embedding, query)).module()
    assert (exported(embedding, query) - plain).abs().max() < 1e-5


class _MostRows(TorchDispatchMode):
    """The most rows that any operation's result of a width had."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, Tensor) and value.ndim and value.is_floating_point():
                width = value.shape[-1]
                self.rows[width] = max(self.rows.get(width, 0), value.numel() // max(1, width))
        return out


@pytest.mark.parametrize("grad", [False, True])
def test_keys_and_values_stay_within_the_token_budget(grad: bool) -> None:
    module = MSiTF(16, 48).eval().requires_grad_(grad)
    windows, query = list(torch.randn(5, 2, 60, 16)), torch.randn(1, 48)
    most = {}
    for name, budget in (("bounded", 250), ("unbounded", 600)):  # weights have up to 192 rows
        with _MostRows() as seen, torch.set_grad_enabled(grad):
            fused = module.fuse(windows, query, batch_tokens=budget)
            if grad:
                fused.sum().backward()
        most[name] = seen.rows
    assert most["bounded"][48] <= 192
    assert most["unbounded"][48] <= 192  # no key or value of a token exists, whatever the budget
    plain = MSiTF(16, 8).eval()
    with _MostRows() as seen, torch.no_grad():
        plain.fuse(windows, torch.randn(1, 8), batch_tokens=250)
    assert seen.rows[8] == 250  # keys narrower than a token are formed, a budget at a time


@pytest.mark.parametrize(
    ("embedding", "query", "options", "message"),
    [
        (torch.zeros(2, 5, 16), torch.zeros(2, 24), {}, "must be (B, C, P, 16)"),
        (torch.zeros(2, 1, 5, 8), torch.zeros(2, 24), {}, "8 wide"),
        (torch.zeros(2, 1, 5, 16), torch.zeros(3, 24), {}, "must be (2, 24)"),
        (torch.zeros(2, 1, 5, 16), torch.zeros(2, 20), {}, "text encoder of width 24"),
        (torch.zeros(2, 0, 5, 16), torch.zeros(2, 24), {}, "without channels"),
        (torch.zeros(2, 1, 5, 16), None, {}, "needs a query"),
        (
            torch.zeros(2, 1, 5, 16),
            torch.zeros(2, 24),
            {"relevance_only": True, "use_query": False},
            "needs use_query=True",
        ),
    ],
)
def test_fusion_says_what_is_wrong(
    embedding: Tensor, query: Tensor | None, options: dict[str, bool], message: str
) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
        MSiTF(16, 24)(embedding, query, **options)


def test_nan_is_not_hidden() -> None:
    module = MSiTF(16, 24).eval()
    embedding = torch.randn(2, 1, 5, 16)
    embedding[1, 0, 3, 2] = float("nan")
    fused = module(embedding, torch.randn(1, 24))
    assert fused[0].isfinite().all()
    assert fused[1].isnan().all()


def test_scores_are_those_worked_out_by_hand() -> None:
    fused = torch.tensor([[0.0, 0.0]])
    options = torch.tensor([[1.0, 0.0], [1.0, 2.0]])  # distances 1 and 3
    expected = torch.softmax(torch.tensor([[1 - 0.25, 1 - 0.75]]), dim=1)
    assert torch.allclose(score_options(fused, options), expected, atol=1e-7)
    assert torch.allclose(score_options(fused, torch.zeros(2, 2)), torch.full((1, 2), 0.5))
    for dtype in (torch.float16, torch.bfloat16):  # in which these values are exact
        assert torch.equal(
            score_options(fused.to(dtype), options.to(dtype)), score_options(fused, options)
        )
    assert score_options(fused.double(), options).dtype == torch.float64
    with pytest.raises(InputError, match="one width"):
        score_options(fused, torch.zeros(2, 3))
