"""NormWear as the paper states it: plain modules, released parameter names, one obvious forward.

Everything fast in this package is held to this file.
Source: Luo et al. 2026 (arXiv 2412.09758); constants pinned by the reference numbers in tests/golden.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normwear_fast.config import NormWearConfig
from normwear_fast.positions import position_table, resize_positions

LAYER_EPS = 1e-6
"""LayerNorm epsilon inside every block, encoder, fusion and decoder."""

FINAL_EPS = 1e-5
"""LayerNorm epsilon of ``norm`` and ``decoder_norm``: PyTorch's default."""


class Attention(nn.Module):
    """Multi-head self-attention; the qkv output is laid out (3, heads, head size)."""

    def __init__(self, width: int, num_heads: int, qkv_bias: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.num_heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each (batch, heads, tokens, head size)
        out = F.scaled_dot_product_attention(query, key, value)
        return self.proj(out.transpose(1, 2).reshape(batch, tokens, width))


class MLP(nn.Module):
    """Linear, exact (erf) GELU, Linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm Transformer block: (B, T, width) -> (B, T, width)."""

    def __init__(self, width: int, num_heads: int, hidden: int, qkv_bias: bool = True) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=LAYER_EPS)
        self.attn = Attention(width, num_heads, qkv_bias)
        self.norm2 = nn.LayerNorm(width, eps=LAYER_EPS)
        self.mlp = MLP(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class EncoderLayer(nn.Module):
    """A block over each channel's tokens; where it has one, a fusion block over a window's channels.

    The fusion block takes the channels' [CLS] tokens, or the mean of each channel's tokens where
    ``config.fusion`` is ``mean``; its outputs become the [CLS] tokens.
    """

    def __init__(self, config: NormWearConfig, layer: int) -> None:
        super().__init__()
        sizes = (config.embed_dim, config.num_heads, config.hidden_dim)
        self.variate_encoder = Block(*sizes)
        self.fuses_mean = config.fusion == "mean"
        if config.has_fusion(layer):
            self.cls_fusion = Block(*sizes)

    def forward(self, x: Tensor, channels: int) -> Tensor:
        """(B * C, T, E) -> (B * C, T, E), channels of a window adjacent."""
        x = self.variate_encoder(x)
        if "cls_fusion" in self._modules:
            each = x.mean(dim=1) if self.fuses_mean else x[:, 0]
            fused = self.cls_fusion(each.view(-1, channels, x.shape[-1])).view(-1, 1, x.shape[-1])
            x = torch.cat((fused, x[:, 1:]), dim=1)
        return x


class PatchEmbed(nn.Module):
    """(S, 3, rows, scales) -> (S, 13 h, E), token 13 t + s; rows beyond 9 h are dropped.

    Where ``config.tokens`` is ``series``: (S, 1, samples) -> (S, samples // 9, E).
    """

    def __init__(self, config: NormWearConfig) -> None:
        super().__init__()
        self.proj: nn.Conv1d | nn.Conv2d
        if config.tokens == "series":
            self.proj = nn.Conv1d(1, config.embed_dim, config.patch_size[0], config.patch_size[0])
        else:
            self.proj = nn.Conv2d(3, config.embed_dim, config.patch_size, config.patch_size)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.proj(pixels).flatten(2).transpose(1, 2)


class SpatialReconstruction(nn.Module):
    """The decoder's last step, across channels: (B, 4 D, samples) -> (B, 4, samples)."""

    def __init__(self, config: NormWearConfig) -> None:
        super().__init__()
        width = config.pretrain_channels * config.decoder_embed_dim
        self.norm = nn.BatchNorm1d(width)
        self.conv1 = nn.Conv1d(width, config.embed_dim // 2, 1)
        self.conv2 = nn.Conv1d(config.embed_dim // 2, config.pretrain_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(F.gelu(self.conv1(self.norm(x))))


@contextmanager
def _float32_by_default() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class ReferenceNormWear(nn.Module):
    """The published model with the released state-dict names.

    Args:
        config: sizes; the released model by default.
        decoder: whether the pretraining decoder's parameters exist too. The encoder never uses them;
            without them the state dict holds the encoder's names only.
        seed: of the random initial weights; the global generator is left alone. None leaves zeros
            (beside the position tables) for weights that are about to be loaded.
    """

    def __init__(
        self, config: NormWearConfig | None = None, *, decoder: bool = True, seed: int | None = 0
    ) -> None:
        super().__init__()
        self.config = config = config or NormWearConfig()
        self.has_decoder = decoder
        width, inner = config.embed_dim, config.decoder_embed_dim
        # One initialisation, below, instead of two; and float32, whatever the process makes by default.
        with _float32_by_default(), torch.device("meta"):
            self.patch_embed = PatchEmbed(config)
            self.cls_token = nn.Parameter(torch.empty(1, 1, width))
            self.pos_embed = nn.Parameter(torch.empty(1, config.grid_tokens, width), False)
            self.encoder_blocks = nn.ModuleList(
                EncoderLayer(config, layer) for layer in range(config.depth)
            )
            self.norm = nn.LayerNorm(width, eps=FINAL_EPS)
            if decoder:
                hidden = int(inner * config.mlp_ratio)
                self.decoder_embed = nn.Linear(width, inner)
                self.mask_token = nn.Parameter(torch.empty(1, 1, inner))
                self.decoder_pos_embed = nn.Parameter(
                    torch.empty(1, config.grid_tokens, inner), False
                )
                self.decoder_blocks = nn.ModuleList(
                    Block(inner, config.decoder_num_heads, hidden, qkv_bias=False)
                    for _ in range(config.decoder_depth)
                )
                self.decoder_norm = nn.LayerNorm(inner, eps=FINAL_EPS)
                self.temporal_recon = nn.Linear(config.grid_tokens, config.pretrain_samples)
                self.spatial_recon = SpatialReconstruction(config)
        self.to_empty(device="cpu")
        self.reset_parameters(seed)

    @torch.no_grad()
    def reset_parameters(self, seed: int | None = 0) -> None:
        """Fills every parameter and buffer: sin-cos tables, Xavier weights, zero biases, unit norms."""
        generator = torch.Generator().manual_seed(seed or 0)
        for name, value in self.state_dict(keep_vars=True).items():
            if name.endswith("pos_embed"):
                grid = (self.config.grid_rows, self.config.grid_columns)
                value.copy_(position_table(value.shape[-1], *grid))
            elif seed is None:
                value.zero_()
            elif name in ("cls_token", "mask_token"):
                value.normal_(std=0.02, generator=generator)
            elif value.ndim >= 2:
                fan_out, fan_in = value.shape[0], value[0].numel()
                bound = math.sqrt(6.0 / (fan_in + fan_out))
                value.uniform_(-bound, bound, generator=generator)
            else:
                value.fill_(1.0 if name.endswith(("weight", "running_var")) else 0.0)

    def embed(self, scalogram: Tensor) -> Tensor:
        """(S, 3, rows, scales) -> (S, T, E): patches, positions, [CLS] in front."""
        patches = self.patch_embed(scalogram)
        columns = self.config.grid_columns
        positions = resize_positions(self.pos_embed, patches.shape[1] // columns, columns)
        cls = (self.cls_token + positions[:, :1]).expand(len(patches), -1, -1)
        return torch.cat((cls, patches + positions[:, 1:]), dim=1)

    def encode_scalogram(self, scalogram: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(B, C, 3, rows, scales) -> the output (B, C, T, E) and the rows after each layer."""
        batch, channels = scalogram.shape[:2]
        x = self.embed(scalogram.flatten(0, 1))
        hidden = []
        for layer in self.encoder_blocks:
            x = layer(x, channels)
            hidden.append(x.unflatten(0, (batch, channels)))
        return self.norm(hidden[-1]), tuple(hidden)

    def forward(
        self, scalogram: Tensor, *, return_hidden: bool = False
    ) -> Tensor | tuple[Tensor, tuple[Tensor, ...]]:
        """Token embeddings of a batch of scalograms.

        Args:
            scalogram: (B, C, 3, rows, scales) from :func:`normwear_fast.scalograms`.
            return_hidden: also return the rows after every layer (after fusion where it has one).

        Returns:
            (B, C, T, E), T = 1 + 13 (rows // 9), row 0 the channel's [CLS]; with ``return_hidden`` a
            pair of it and a tuple of ``depth`` tensors of that shape.
        """
        out, hidden = self.encode_scalogram(scalogram)
        return (out, hidden) if return_hidden else out
