"""The masked autoencoder against the published implementation's numbers, and its masks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import golden, golden_config, golden_weights

from normwear_fast import scalogram
from normwear_fast.config import NormWearConfig
from normwear_fast.pretrain.autoencoder import MaskedAutoencoder
from normwear_fast.pretrain.masking import draw_noise, kept_patches
from normwear_fast.pretrain.pixels import SeriesPatches, gather_patches, patch_pixels

SCHEMES = ("random", "structured")


def golden_inputs(scheme):
    arrays = golden(f"mae_{scheme}")
    model = MaskedAutoencoder(golden_config(arrays), seed=None)
    model.load_state_dict(golden_weights(arrays), strict=True)
    pixels = scalogram(torch.tensor(arrays["x"]), "conv")[:, :, :, :387]
    if scheme == "random":
        noise = torch.tensor(arrays["noise"])
    else:
        noise = (torch.tensor(arrays["noise_t"]), torch.tensor(arrays["noise_f"]))
    return arrays, model, pixels, torch.tensor(arrays["target"]), noise


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_golden(scheme, mode):
    arrays, model, pixels, target, noise = golden_inputs(scheme)
    model.train(mode == "train")
    loss, reconstruction, mask = model(pixels, target, mask=scheme, noise=noise)
    loss.backward()
    assert np.array_equal(mask.numpy(), arrays["mask"])
    assert abs(loss.item() - float(arrays[f"{mode}_loss"])) <= 1e-6
    assert np.abs(reconstruction.detach().numpy() - arrays[f"{mode}_pred"]).max() <= 5e-6
    parameters = dict(model.named_parameters())
    names = [name for name in arrays if name.startswith(f"{mode}_grad.")]
    assert len(names) == 6
    for name in names:
        wanted = arrays[name]
        got = parameters[name.removeprefix(f"{mode}_grad.")].grad.numpy()
        assert np.abs(got - wanted).max() <= 1e-5 * np.abs(wanted).max(), name


@pytest.mark.parametrize("scheme", SCHEMES)
def test_patches_from_the_series(scheme):
    """The product with one matrix against the scalogram's definition, over a block's border."""
    config = NormWearConfig.small()
    series = torch.randn(70, config.pretrain_samples)
    kept = kept_patches(draw_noise(config, scheme, len(series)), scheme, config)
    wanted = gather_patches(patch_pixels(scalogram(series[:, None], "conv")[:, 0], config), kept)
    got = SeriesPatches(config)(series, kept)
    assert got.shape == (70, 111 if scheme == "random" else 102, 135)
    assert (got - wanted).abs().max() <= 2e-6 * wanted.abs().max()
