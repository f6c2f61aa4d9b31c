"""The masked autoencoder NormWear was pretrained as: released names, kept tokens only.

Source: Luo et al. 2026 (arXiv 2412.09758), pretraining; constants pinned by the reference numbers
``tests/golden/mae_*.npz``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from normwear_fast.config import NormWearConfig, check_config
from normwear_fast.errors import InputError
from normwear_fast.pretrain.masking import MaskScheme, Noise, draw_noise, kept_patches, mask_of
from normwear_fast.pretrain.pixels import gather_patches, patch_pixels
from normwear_fast.reference import ReferenceNormWear


class _SumOverProcesses(torch.autograd.Function):
    """The sum of a tensor over all processes; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total = value.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        dist.all_reduce(total)
        return total


class JoinedBatchNorm(nn.BatchNorm1d):
    """BatchNorm1d whose training statistics are of the batch of all processes, differentiably.

    PyTorch's SyncBatchNorm does the same on a GPU only. One process, or evaluation mode, is
    BatchNorm1d itself.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float

    def forward(self, x: Tensor) -> Tensor:
        """(B, features, samples) -> the same."""
        joined = self.training and dist.is_available() and dist.is_initialized()
        if not joined or dist.get_world_size() == 1:
            return super().forward(x)
        return self._joined(x)

    @torch.compiler.disable
    def _joined(self, x: Tensor) -> Tensor:
        values = x.float()
        count = torch.full((1,), x.shape[0] * x.shape[2], dtype=values.dtype, device=x.device)
        sums = _SumOverProcesses.apply(torch.cat((values.sum((0, 2)), count)))
        mean, total = sums[:-1] / sums[-1], sums[-1].detach()
        centred = values - mean[:, None]  # a second pass: no difference of large squares
        var = _SumOverProcesses.apply(centred.square().sum((0, 2))) / total
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * total / (total - 1), self.momentum)
        scale = self.weight * (var + self.eps).rsqrt()
        return (centred * scale[:, None] + self.bias[:, None]).to(x.dtype)


class MaskedAutoencoder(ReferenceNormWear):
    """NormWear with its pretraining decoder; the state dict has the released names.

    Args:
        config: sizes, and the paper's variants of fusion and tokens.
        seed: of the random initial weights; None leaves zeros for weights about to be loaded.
    """

    def __init__(self, config: NormWearConfig | None = None, *, seed: int | None = 0) -> None:
        check_config(config)
        super().__init__(config, decoder=True, seed=seed)
        norm = JoinedBatchNorm(self.spatial_recon.norm.num_features)
        norm.load_state_dict(self.spatial_recon.norm.state_dict())
        self.spatial_recon.norm = norm
        self.patches = self.config.grid_tokens - 1

    def forward(  # type: ignore[override]
        self,
        scalogram: Tensor,
        target: Tensor,
        *,
        mask: MaskScheme = "random",
        noise: Noise | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Hides patches, and reconstructs the series from the others.

        Args:
            scalogram: (B, C, 3, 387, 65), C = 4 in the released model; (B, C, 1, 388), the series, where
                ``config.tokens`` is ``series``.
            target: (B, C, 388), what to reconstruct.
            mask: ``random`` keeps 111 of the 559 patches of every channel, ``structured`` 17 patch rows
                times 6 patch columns.
            noise: the uniform draws the masks are made from, row b * C + c, float32 in [0, 1):
                (B C, 559), or for ``structured`` the pair (B C, 43) and (B C, 13). None draws them.

        Returns:
            The mean squared error over all samples; the reconstruction (B, C, 388); the masks (B C, 559),
            1 = removed.

        Raises:
            InputError: shapes other than these.
        """
        self._check(scalogram, target)
        sequences = target.shape[0] * target.shape[1]
        if noise is None:
            noise = draw_noise(self.config, mask, sequences, device=target.device)
        kept = kept_patches(noise, mask, self.config)
        if len(kept) != sequences:
            raise InputError(f"mask noise has {len(kept)} rows for {sequences} channels")
        pixels = gather_patches(patch_pixels(scalogram.flatten(0, 1), self.config), kept)
        reconstruction = self.reconstruct(pixels, kept)
        loss = F.mse_loss(reconstruction.float(), target)
        return loss, reconstruction, mask_of(kept, self.patches)

    def reconstruct(self, pixels: Tensor, kept: Tensor) -> Tensor:
        """(S, k, pixels) kept patches and (S, k) their indices -> (S / C, C, samples)."""
        return self.decode(self.encode_kept(pixels, kept), kept)

    def encode_kept(self, pixels: Tensor, kept: Tensor) -> Tensor:
        """The encoder over [CLS] and the kept patches: (S, k, pixels) -> (S, 1 + k, E)."""
        projection = self.patch_embed.proj
        tokens = F.linear(pixels, projection.weight.flatten(1), projection.bias)
        tokens = tokens + self.pos_embed[0, 1:][kept]
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(len(tokens), -1, -1)
        x = torch.cat((cls.to(tokens.dtype), tokens), dim=1)
        for layer in self.encoder_blocks:
            x = layer(x, self.config.pretrain_channels)
        return self.norm(x)

    def decode(self, latent: Tensor, kept: Tensor) -> Tensor:
        """(S, 1 + k, E) -> the series (S / C, C, samples)."""
        latent = self.decoder_embed(latent)
        hidden = self.mask_token.to(latent.dtype).expand(len(latent), self.patches, -1)
        index = kept[:, :, None].expand(-1, -1, latent.shape[2])
        x = torch.cat((latent[:, :1], hidden.scatter(1, index, latent[:, 1:])), dim=1)
        x = x + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        x = self.decoder_norm(x)
        x = self.temporal_recon(x.transpose(1, 2))  # (S, D, samples)
        return self.spatial_recon(x.reshape(-1, self.spatial_recon.norm.num_features, x.shape[2]))

    def _check(self, scalogram: Tensor, target: Tensor) -> None:
        config = self.config
        channels, samples = config.pretrain_channels, config.pretrain_samples
        shape = [*target.shape[:1], channels]
        if config.tokens == "series":
            wanted = [*shape, 1, samples]
        else:
            wanted = [*shape, 3, config.grid_rows * config.patch_size[0], config.num_scales]
        if list(target.shape) != [*shape, samples] or list(scalogram.shape) != wanted:
            raise InputError(
                f"scalogram {tuple(scalogram.shape)} and target {tuple(target.shape)}; "
                f"(B, {', '.join(map(str, wanted[1:]))}) and (B, {channels}, {samples}) are right"
            )
