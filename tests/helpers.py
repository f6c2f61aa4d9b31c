"""What several test files share: the reference numbers and their weights, full disks, commands."""

from __future__ import annotations

import argparse
import json
import resource
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from importlib import import_module
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from normwear_fast.config import NormWearConfig
from normwear_fast.reference import ReferenceNormWear


@contextmanager
def full_disk(size: int = 0) -> Iterator[None]:
    """Refuses, with an OSError, to make any file longer than ``size`` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


GOLDEN = Path(__file__).parent / "golden"
BASIC_MOTIONS = Path(__file__).parent / "data" / "imu" / "basic_motions.npz"
ENCODER_GOLDENS = tuple(sorted(path.stem for path in GOLDEN.glob("encoder_*.npz")))


def golden(name: str) -> dict[str, np.ndarray]:
    """The arrays of ``tests/golden/<name>.npz``."""
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as arrays:
        return {key: arrays[key] for key in arrays.files}


def golden_config(arrays: Mapping[str, np.ndarray]) -> NormWearConfig:
    return NormWearConfig(**json.loads(str(arrays["config"])))


def recipe_state_dict(initial: Mapping[str, Tensor], weight_seed: int) -> dict[str, Tensor]:
    """The weights of the reference numbers: every entry from a generator seeded by its name.

    The recipe is tests/golden/README.md's; position tables and counters stay as initialised.
    """
    weights = {}
    for name, value in initial.items():
        if name.endswith(("pos_embed", "num_batches_tracked")):
            weights[name] = value.detach().clone()
            continue
        generator = np.random.RandomState((zlib.crc32(name.encode()) + weight_seed) % 2**32)
        z = generator.standard_normal(tuple(value.shape)).astype(np.float32)
        if name.endswith("running_var"):
            z = 1 + 0.1 * np.abs(z)
        elif name.endswith("running_mean"):
            z = 0.1 * z
        elif name in ("cls_token", "mask_token"):
            z = 0.02 * z
        elif z.ndim >= 2:
            z = z / np.sqrt(np.prod(z.shape[1:]))
        elif name.endswith("weight"):
            z = 1 + 0.1 * z
        else:
            z = 0.05 * z
        weights[name] = torch.from_numpy(z.astype(np.float32))
    return weights


@lru_cache(maxsize=2)
def _recipe_weights(config: NormWearConfig, weight_seed: int) -> dict[str, Tensor]:
    return recipe_state_dict(ReferenceNormWear(config, seed=None).state_dict(), weight_seed)


def golden_weights(arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """The state dict a reference file was made with; kept, since the released size takes seconds."""
    return _recipe_weights(golden_config(arrays), int(arrays["weight_seed"]))


def write_llama(path: Path, words: Sequence[str]) -> Path:
    """A Llama of 24 channels and a word tokenizer without a pad token, as a folder."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(path)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=12,
    )
    transformers.LlamaModel(config).save_pretrained(path)
    return path


def ends(child: BaseProcess, seconds: float = 30) -> bool:
    """Whether a process ends by itself; one that does not is killed."""
    child.join(seconds)
    alive = child.is_alive()
    if alive:
        child.kill()
        child.join()
    return not alive


def run_command(name: str, *words: object) -> int:
    """Runs a subcommand's own code, in this process: its errors are raised."""
    module = import_module(f"normwear_fast.cli.{name}")
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    return int(module.run(parser.parse_args([str(word) for word in words])))
