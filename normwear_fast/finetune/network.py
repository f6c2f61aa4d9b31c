"""What is trained: an encoder, a pooling, a head; and which parameters at which rate.

[CLS] or mean of each channel's tokens -> channels concatenated or averaged -> standardise -> Linear
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from normwear_fast.errors import UsageError
from normwear_fast.evaluate.registry import Task
from normwear_fast.model import FastNormWear
from normwear_fast.optimization import decays
from normwear_fast.packing import scalogram_method
from normwear_fast.scalograms import scalogram

TokenPool = Literal["mean", "cls"]
HeadChannels = Literal["concat", "mean"]

LORA_TARGETS = r"\d+\.(variate_encoder|cls_fusion)\.(attn\.(qkv|proj)|mlp\.(fc1|fc2))"
"""Names below ``encoder_blocks`` of the layers that get adapters: all its matrix products."""


class Head(nn.Module):
    """A linear head on standardised features.

    The features' mean and deviation, and those of regression targets, are those of the training
    windows before training: constants, so that every mode trains the same well-scaled problem.

    Args:
        features: width of a window's pooled embedding.
        task: classes give one output each, regression targets one each.
        seed: of the initial weights, normal with deviation 0.01.
    """

    feature_mean: Tensor
    feature_std: Tensor
    target_mean: Tensor
    target_std: Tensor

    def __init__(self, features: int, task: Task, seed: int = 0) -> None:
        super().__init__()
        outputs = len(task.classes or task.targets)
        self.kind = task.kind
        self.linear = nn.Linear(features, outputs)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.linear.weight.normal_(std=0.01, generator=generator)
            self.linear.bias.zero_()
        self.register_buffer("feature_mean", torch.zeros(features))
        self.register_buffer("feature_std", torch.ones(features))
        if task.kind == "reg":
            self.register_buffer("target_mean", torch.zeros(outputs))
            self.register_buffer("target_std", torch.ones(outputs))

    @torch.no_grad()
    def standardise(self, features: Tensor, targets: Tensor | None = None) -> None:
        """Takes mean and deviation from the training part; what does not vary keeps its scale.

        Args:
            features: (n, F).
            targets: (n, targets) of a regression.
        """
        for name, values in (("feature", features), ("target", targets)):
            if values is None:
                continue
            mean, std = values.double().mean(0), values.double().std(0, correction=0)
            getattr(self, f"{name}_mean").copy_(mean)
            getattr(self, f"{name}_std").copy_(
                torch.where(std > 1e-6 * mean.abs(), std, torch.ones_like(std))
            )

    def forward(self, features: Tensor) -> Tensor:
        """(n, F) -> (n, classes) logits, or (n, targets) in units of the targets' deviation."""
        return self.linear((features - self.feature_mean) / self.feature_std)

    def predict(self, features: Tensor) -> Tensor:
        """(n, F) -> (n, classes) probabilities, or (n, targets) in the targets' own unit."""
        return self.finish(self(features))

    def finish(self, out: Tensor) -> Tensor:
        """What ``forward`` gave as probabilities, or in the targets' own unit."""
        if self.kind == "class":
            return out.softmax(dim=-1)
        return out * self.target_std + self.target_mean


class FineTuneNetwork(nn.Module):
    """Encoder and head in one differentiable forward: (B, C, L) at 65 Hz -> (B, outputs).

    Args:
        encoder: gives the tokens.
        head: on the pooled tokens.
        pool, channel_pool: as of `FastNormWear.encode`.
        precision: ``bfloat16`` is autocast around the encoder alone: rounded, a series has no second
            difference left, and the head is small.
    """

    def __init__(
        self,
        encoder: FastNormWear,
        head: Head,
        pool: TokenPool,
        channel_pool: HeadChannels,
        *,
        precision: str = "float32",
    ) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head
        self.pool, self.channel_pool = pool, channel_pool
        self.autocast = precision == "bfloat16"

    def features(self, x: Tensor) -> Tensor:
        """(B, C, L) -> (B, F): what ``encode`` gives, differentiable."""
        config = self.encoder.config
        spectrum = scalogram(
            x,
            scalogram_method(self.encoder.optimized_cwt),
            wavelet=config.wavelet,
            num_scales=config.num_scales,
        ).float()
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.autocast):
            tokens, _ = self.encoder.encode_scalogram(spectrum)
        tokens = tokens.float()
        pooled = tokens[:, :, 0] if self.pool == "cls" else tokens.mean(dim=2)
        return pooled.flatten(1) if self.channel_pool == "concat" else pooled.mean(dim=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


# --- what is trained -------------------------------------------------------------------------------


def encoder_parameters(encoder: FastNormWear) -> dict[str, nn.Parameter]:
    """The encoder's parameters that can be trained: neither the decoder's nor the position table."""
    return {
        name: parameter
        for name, parameter in encoder.named_parameters()
        if name.startswith(("cls_token", "patch_embed.", "encoder_blocks.", "norm."))
    }


def layer_of(name: str, depth: int) -> int:
    """Which layer a parameter of the network belongs to: 0 the patches and [CLS], 1 to ``depth`` the
    blocks with their fusion, ``depth + 1`` the final norm and the head."""
    name = name.removeprefix("encoder.")
    if name.startswith("encoder_blocks."):
        return int(name.split(".")[1]) + 1
    return 0 if name.startswith(("cls_token", "patch_embed.")) else depth + 1


def parameter_groups(
    network: FineTuneNetwork, learning_rate: float, weight_decay: float, layer_decay: float
) -> list[dict[str, Any]]:
    """AdamW's groups of everything that requires gradients.

    A layer's rate is ``learning_rate * layer_decay ** (depth + 1 - layer)``; matrices decay, vectors
    (biases, norms, [CLS]) do not.
    """
    depth = network.encoder.config.depth
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = layer_of(name, depth)
        decayed = decays(parameter)
        group = groups.setdefault(
            (layer, decayed),
            {
                "params": [],
                "names": [],
                "lr": learning_rate * layer_decay ** (depth + 1 - layer),
                "weight_decay": weight_decay if decayed else 0.0,
            },
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return [groups[key] for key in sorted(groups)]


# --- LoRA ------------------------------------------------------------------------------------------


def add_lora(encoder: FastNormWear, rank: int, seed: int) -> None:
    """Puts adapters on every qkv, proj, fc1 and fc2 of the encoder; they alone require gradients."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise UsageError(
            "mode lora needs peft; install it with: pip install 'normwear-fast[train]'"
        ) from None
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=LORA_TARGETS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, encoder.encoder_blocks)


@torch.no_grad()
def merge_lora(encoder: FastNormWear) -> None:
    """Adds the adapters to the weights they stand beside and takes them away."""
    from peft.tuners.lora import LoraLayer

    for name, module in list(encoder.encoder_blocks.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge(safe_merge=True)
            parent, _, child = name.rpartition(".")
            setattr(encoder.encoder_blocks.get_submodule(parent), child, module.get_base_layer())
    del encoder.encoder_blocks.peft_config


def require_gradients(encoder: FastNormWear, mode: str, *, lora_rank: int, seed: int) -> None:
    """Makes the encoder's parameters of a mode trainable, and no others."""
    encoder.requires_grad_(False)
    if mode == "lora":
        add_lora(encoder, lora_rank, seed)
    elif mode == "full":
        for parameter in encoder_parameters(encoder).values():
            parameter.requires_grad_(True)
