"""The masked autoencoder: the published numbers, its masks, its variants, and two processes as one."""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers import golden, golden_config, golden_weights
from hypothesis import given, settings
from hypothesis import strategies as st
from pretrain_runs import TINY

from normwear_fast import FastNormWear, scalogram
from normwear_fast.config import NormWearConfig
from normwear_fast.errors import InputError, UsageError
from normwear_fast.pretrain.autoencoder import MaskedAutoencoder
from normwear_fast.pretrain.masking import draw_noise, kept_patches, mask_of, smallest
from normwear_fast.pretrain.pixels import SeriesPatches, gather_patches, patch_pixels
from normwear_fast.reference import ReferenceNormWear
from normwear_fast.weights import load_checkpoint, save_pretrained

SCHEMES = ("random", "structured")
SMALL = NormWearConfig.small()


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


# -- the published numbers -------------------------------------------------------------------------


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


# -- masks -----------------------------------------------------------------------------------------


@given(
    draws=st.lists(st.sampled_from([0.0, 0.25, 0.5, 1e-40, 0.75]), min_size=1, max_size=40),
    data=st.data(),
)
@settings(max_examples=60)
def test_smallest_is_a_stable_sort(draws, data):
    """The selection against the definition, ties and subnormal draws included."""
    count = data.draw(st.integers(1, len(draws)))
    noise = torch.tensor([draws], dtype=torch.float32)
    wanted = noise.argsort(dim=1, stable=True)[:, :count].sort(dim=1).values
    assert torch.equal(smallest(noise, count), wanted)


def test_structured_mask_keeps_a_patch_if_its_row_and_its_column_stay():
    rows, columns = torch.rand(5, 43), torch.rand(5, 13)
    kept = kept_patches((rows, columns), "structured", SMALL)
    mask = mask_of(kept, 559).view(5, 43, 13)
    keep_row = rows.argsort(dim=1).argsort(dim=1) < 17
    keep_column = columns.argsort(dim=1).argsort(dim=1) < 6
    assert torch.equal(mask == 0, keep_row[:, :, None] & keep_column[:, None, :])


@pytest.mark.parametrize(
    ("noise", "scheme"),
    [
        (torch.rand(8, 558), "random"),
        ((torch.rand(8, 43), torch.rand(8, 13)), "random"),
        (torch.rand(8, 559), "structured"),
        ((torch.rand(8, 13), torch.rand(8, 43)), "structured"),
        (torch.rand(8, 559, dtype=torch.float64), "random"),
        (torch.rand(8, 559), "blocks"),
    ],
)
def test_noise_that_does_not_fit(noise, scheme):
    with pytest.raises(InputError, match="mask"):
        kept_patches(noise, scheme, SMALL)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_patches_from_the_series(scheme):
    """The product with one matrix against the scalogram's definition, over a block's border."""
    series = torch.randn(70, SMALL.pretrain_samples)
    kept = kept_patches(draw_noise(SMALL, scheme, len(series)), scheme, SMALL)
    wanted = gather_patches(patch_pixels(scalogram(series[:, None], "conv")[:, 0], SMALL), kept)
    got = SeriesPatches(SMALL)(series, kept)
    assert got.shape == (70, 111 if scheme == "random" else 102, 135)
    assert (got - wanted).abs().max() <= 2e-6 * wanted.abs().max()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_masks_do_not_follow_the_default_dtype(scheme):
    torch.manual_seed(0)
    wanted = draw_noise(TINY, scheme, 4)
    model = MaskedAutoencoder(TINY)
    series = torch.randn(1, 4, 388)
    pixels = scalogram(series, "conv")[:, :, :, :387]
    torch.set_default_dtype(torch.float64)
    try:
        torch.manual_seed(0)
        found = draw_noise(TINY, scheme, 4)
        loss, _, mask = model(pixels, series, mask=scheme)
    finally:
        torch.set_default_dtype(torch.float32)
    pairs = zip(found, wanted, strict=True) if scheme == "structured" else [(found, wanted)]
    assert all(torch.equal(*pair) for pair in pairs)
    assert mask.dtype == torch.float32
    assert loss.isfinite()


def test_config_of_another_kind():
    with pytest.raises(UsageError, match="config is a dict; it must be a NormWearConfig"):
        MaskedAutoencoder(TINY.to_dict())


# -- variants --------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", ["scalogram", "series"])
@pytest.mark.parametrize("fusion", ["cls", "mean", "none"])
def test_variants_train_save_and_load(fusion, tokens, tmp_path):
    config = replace(TINY, fusion=fusion, tokens=tokens)
    model = MaskedAutoencoder(config)
    target = torch.randn(2, 4, 388)
    pixels = target[:, :, None] if tokens == "series" else scalogram(target)
    loss, reconstruction, mask = model(pixels, target, mask="structured")
    loss.backward()
    assert reconstruction.shape == target.shape
    assert mask.shape == (8, 43 if tokens == "series" else 559)
    assert int((1 - mask).sum(1).unique()) == (17 if tokens == "series" else 102)
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []
    assert any("cls_fusion" in name for name in model.state_dict()) == (fusion != "none")
    save_pretrained(tmp_path, model.state_dict(), config, optimized_cwt=True)
    assert load_checkpoint(tmp_path).config == config
    if fusion == "mean" or tokens == "series":
        with pytest.raises(UsageError, match=f"fusion '{fusion}' on tokens of the {tokens}"):
            FastNormWear.from_pretrained(tmp_path)
    else:
        x = torch.randn(1, 2, 388)
        fast = FastNormWear.from_pretrained(tmp_path, precision="float32")
        plain = ReferenceNormWear(config, seed=None)
        plain.load_state_dict(model.state_dict())
        with torch.inference_mode():
            assert (fast(x) - plain(scalogram(x))).abs().max() <= 1e-5


@pytest.mark.parametrize("fusion", ["cls", "mean", "none"])
def test_what_a_fusion_block_takes(fusion):
    """Row by row against the words: its outputs replace [CLS], and nothing else changes."""
    layer = ReferenceNormWear(replace(TINY, fusion=fusion), decoder=False).encoder_blocks[0]
    x = torch.randn(6, 11, 32)  # two windows of three channels
    with torch.inference_mode():
        each = layer.variate_encoder(x)
        out = layer(x, 3)
        assert torch.equal(out[:, 1:], each[:, 1:])
        for window in range(2):
            rows = each[3 * window : 3 * window + 3]
            if fusion == "none":
                wanted = rows[:, 0]
            else:
                given = rows[:, 0] if fusion == "cls" else rows.mean(dim=1)
                wanted = layer.cls_fusion(given[None])[0]
            torch.testing.assert_close(out[3 * window : 3 * window + 3, 0], wanted)


def test_scalogram_that_does_not_fit():
    model = MaskedAutoencoder(TINY)
    with pytest.raises(InputError, match=r"\(B, 4, 3, 387, 65\) and \(B, 4, 388\) are right"):
        model(torch.randn(2, 4, 3, 389, 65), torch.randn(2, 4, 388))
    with pytest.raises(InputError, match="4 rows for 8 channels"):
        model(torch.randn(2, 4, 3, 387, 65), torch.randn(2, 4, 388), noise=torch.rand(4, 559))


# -- the released layout ---------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["folder", "model.pth", "bare.pth"])
def test_released_layout_both_ways(form, tmp_path):
    """Names, order, shapes and dtypes of ours are the reference's; each loads the other strictly."""
    ours, reference = MaskedAutoencoder(TINY, seed=1), ReferenceNormWear(TINY, seed=2)

    def layout(module):
        return [(n, tuple(v.shape), v.dtype) for n, v in module.state_dict().items()]

    assert layout(ours) == layout(reference)
    for source, into in ((ours, reference), (reference, MaskedAutoencoder(TINY, seed=3))):
        weights = {name: value.clone() for name, value in source.state_dict().items()}
        if form == "folder":
            save_pretrained(tmp_path, weights, TINY, optimized_cwt=True)
            checkpoint = load_checkpoint(tmp_path)
        else:
            held = {f"module.{name}": value for name, value in weights.items()}
            path = tmp_path / form
            torch.save({"model": held, "epoch": 3} if form == "model.pth" else held, path)
            checkpoint = load_checkpoint(path, config=TINY)
        into.load_state_dict(checkpoint.state_dict, strict=True)
        for name, value in into.state_dict().items():
            assert torch.equal(value, weights[name]), name


# -- two processes ---------------------------------------------------------------------------------


def _one_of_two(rank, folder):
    """Gradients of half of the batch under DDP, in train mode and with frozen statistics."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    try:
        for mode in ("train", "eval"):
            _half_of_the_batch(rank, folder, mode)
        # DDP's objects are gone by now, in both: destroyed after their group, one in five never ended.
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _half_of_the_batch(rank, folder, mode):
    _, model, pixels, target, noise = golden_inputs("structured")
    model.train(mode == "train")
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    half = tuple(draw[4 * rank : 4 * rank + 4] for draw in noise)
    part = slice(rank, rank + 1)
    loss, _, _ = parallel(pixels[part], target[part], mask="structured", noise=half)
    loss.backward()
    if rank == 0:
        gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        buffers = dict(model.named_buffers())
        torch.save({"grad": gradients, "buffers": buffers}, f"{folder}/{mode}.pt")


def test_two_processes_are_one_with_the_joined_batch(tmp_path):
    """The decoder's batch statistics are of both halves, and so are their gradients."""
    mp.start_processes(_one_of_two, (os.fspath(tmp_path),), nprocs=2, start_method="spawn")
    for mode in ("train", "eval"):
        _, model, pixels, target, noise = golden_inputs("structured")
        model.train(mode == "train")
        model(pixels, target, mask="structured", noise=noise)[0].backward()
        got = torch.load(tmp_path / f"{mode}.pt", weights_only=True)
        for name, value in model.named_parameters():
            if value.requires_grad:
                # Summing in another order is all that differs; the key bias's gradient is zero but
                # for rounding, so every qkv bias is judged whole, by its largest value.
                error = (got["grad"][name] - value.grad).abs().max()
                assert error <= 1e-5 * value.grad.abs().max(), (mode, name)
        for name, value in model.named_buffers():
            torch.testing.assert_close(got["buffers"][name], value, rtol=1e-5, atol=1e-6)
