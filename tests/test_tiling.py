import gc
import os
import resource
import tempfile
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from latent_codec import LatentCodec
from latent_codec.models.autoencoder_vq import AutoencoderVQ
from latent_codec.models.feature_maps import FeatureMap
from latent_codec.models.tiling import decode_tiled, encode_tiled

WIDTHS = (4, 8, 8)


def blocks(kind: str = "", widths=WIDTHS) -> dict:
    return {
        "block_out_channels": widths,
        "norm_num_groups": 2,
        "down_block_types": [f"{kind}DownEncoderBlock2D"] * len(widths),
        "up_block_types": [f"{kind}UpDecoderBlock2D"] * len(widths),
    }


def with_spread(autoencoder):
    """Norms that scale and shift, so that a wrong one shows."""
    for module in autoencoder.modules():
        if isinstance(module, torch.nn.GroupNorm):
            torch.nn.init.uniform_(module.weight, 0.5, 2)
            torch.nn.init.uniform_(module.bias, -1, 1)
    return autoencoder.eval()


def kl(**config):
    torch.manual_seed(0)
    return with_spread(diffusers.AutoencoderKL(**{**blocks(), "force_upcast": False, **config}))


def vq(kind: str = "", **config):
    torch.manual_seed(0)
    return with_spread(AutoencoderVQ(**{**blocks(kind), "num_vq_embeddings": 16, **config}))


def make_images(*shape, dtype=torch.float64):
    return torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=dtype) * 2 - 1


def untiled(autoencoder, images):
    with torch.no_grad():
        encoded = autoencoder.encode(images)
        raw = encoded.latents if "latents" in encoded else encoded.latent_dist.mean
        return encoded, raw, decoded(autoencoder, raw)


def decoded(autoencoder, raw):
    options = {} if isinstance(autoencoder, diffusers.AutoencoderKL) else {"force_not_quantize": True}
    with torch.no_grad():
        return autoencoder.decode(raw, **options).sample


def assert_exact(autoencoder, images, tile, tolerance=1e-10):
    encoded, raw, sample = untiled(autoencoder, images)
    tiled = encode_tiled(autoencoder.encoder, autoencoder.quant_conv, images, tile)
    moments = encoded.latents if "latents" in encoded else encoded.latent_dist.parameters
    torch.testing.assert_close(tiled, moments, atol=tolerance, rtol=0)
    torch.testing.assert_close(
        decode_tiled(autoencoder.decoder, autoencoder.post_quant_conv, raw, tile),
        sample,
        atol=tolerance,
        rtol=0,
    )


@pytest.mark.parametrize("tile", [4, 7, 16, 64])
@pytest.mark.parametrize("size", [(4, 4), (16, 20), (4, 36)])
def test_any_tile_of_any_size_is_exact(size, tile):
    """A tile of one cell, one that divides nothing, a remainder one cell wide, a tile larger than the image, 1x1 latents."""
    assert_exact(kl().double(), make_images(1, 3, *size), tile)


@pytest.mark.parametrize(
    "autoencoder",
    [
        kl(layers_per_block=2),
        kl(layers_per_block=3, mid_block_add_attention=False),
        kl(use_quant_conv=False, use_post_quant_conv=False),
        kl(in_channels=1, out_channels=1, act_fn="gelu"),
        kl(in_channels=4, out_channels=4, latent_channels=16),
        kl(**blocks(widths=(8, 4))),
        kl(**blocks(widths=(4,))),
        kl(**blocks("Attn")),
        vq(),
        vq("Attn", vq_embed_dim=2),
        vq(mid_block_add_attention=False),
    ],
    ids=lambda each: type(each).__name__,
)
def test_every_shape_of_network_is_exact(autoencoder):
    assert_exact(autoencoder.double(), make_images(2, autoencoder.config.in_channels, 8, 12), 6)


def test_one_pixel_tiles_are_exact():
    assert_exact(kl(**blocks(widths=(4, 4))).double(), make_images(1, 3, 4, 6), 1)


@pytest.mark.parametrize("autoencoder", [kl(), vq()], ids=["kl", "vq"])
def test_float32_differs_by_rounding(autoencoder):
    assert_exact(autoencoder, make_images(1, 3, 20, 36, dtype=torch.float32), 16, tolerance=2e-5)


def test_bfloat16_differs_by_its_rounding():
    exact, half = kl(), kl().bfloat16()
    images = make_images(1, 3, 16, 20, dtype=torch.float32)
    _, raw, _ = untiled(exact, images)
    _, half_raw, half_sample = untiled(half, images.bfloat16())
    tiled_raw = encode_tiled(half.encoder, half.quant_conv, images.bfloat16(), 8).chunk(2, 1)[0]
    tiled_sample = decode_tiled(half.decoder, half.post_quant_conv, half_raw, 8)
    assert tiled_raw.dtype == tiled_sample.dtype == torch.bfloat16
    for ours, theirs, reference in (
        (tiled_raw, half_raw, raw),
        (tiled_sample, half_sample, decoded(exact, half_raw.float())),
    ):
        error = (theirs.float() - reference).square().mean().sqrt()
        assert (ours.float() - reference).square().mean().sqrt() < 1.5 * error


# ---------------------------------------------------------------------------------------------- codec


@pytest.mark.parametrize("build", [kl, vq, lambda: diffusers.VQModel(**blocks(), num_vq_embeddings=16)])
def test_a_codec_encodes_and_decodes_the_same_with_tiles(build):
    codec = LatentCodec(build())
    images = [make_images(3, 21, 30, dtype=torch.float32), make_images(3, 9, 5, dtype=torch.float32)]
    sizes = [(21, 30), (9, 5)]
    latents, tiled = codec.encode(images), codec.encode(images, tile=8)
    for ours, theirs in zip(tiled, latents):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)
        assert ours.is_contiguous() and not ours.requires_grad
    whole = codec.decode(latents, size=sizes, output_type="pt")
    parts = codec.decode(latents, size=sizes, output_type="pt", tile=np.int64(9))
    assert [each.shape for each in parts] == [(3, 21, 30), (3, 9, 5)]
    for ours, theirs in zip(parts, whole):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)


def test_a_tile_may_be_a_number_of_few_bits():
    """Its square is larger than they hold."""
    codec, calls = LatentCodec(kl()), []
    codec.autoencoder.decoder.conv_out.register_forward_hook(lambda *_: calls.append(1))
    codec.decode(torch.zeros(1, 4, 8, 8), tile=np.int16(512))
    assert calls == [1]


def test_samples_follow_the_generator_as_untiled_ones_do():
    codec, image = LatentCodec(kl()), make_images(3, 16, 20, dtype=torch.float32)
    drawn = [
        codec.encode(image, sample=True, generator=torch.Generator().manual_seed(3), tile=tile)
        for tile in (None, 8)
    ]
    torch.testing.assert_close(*drawn, atol=2e-5, rtol=0)
    with pytest.raises(ValueError, match="AutoencoderVQ has no posterior to sample from"):
        LatentCodec(vq()).encode(image, sample=True, tile=8)


def test_scale_and_shift_hold_with_tiles():
    codec, image = (
        LatentCodec(kl(scaling_factor=0.5, shift_factor=0.3)),
        make_images(3, 8, 8, dtype=torch.float32),
    )
    latents = codec.encode(image)
    torch.testing.assert_close(codec.encode(image, tile=4), latents, atol=1e-5, rtol=0)
    ours, theirs = (codec.decode(latents, output_type="pt", tile=tile) for tile in (4, None))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_force_upcast_computes_tiles_in_float32(tmp_path):
    kl(force_upcast=True).half().save_pretrained(tmp_path)
    codec = LatentCodec.from_pretrained(tmp_path, dtype=torch.float16)
    exact = LatentCodec.from_pretrained(tmp_path)
    latents = codec.encode(make_images(3, 16, 16, dtype=torch.float32))
    ours = codec.decode(latents, output_type="pt", tile=8)
    torch.testing.assert_close(ours, exact.decode(latents.float(), output_type="pt"), atol=2e-5, rtol=0)
    assert codec.dtype == torch.float16


def test_the_autoencoder_stays_as_it_was():
    codec, image = LatentCodec(kl()), make_images(3, 16, 20, dtype=torch.float32)
    before, latents = dict(vars(codec.autoencoder)), codec.encode(image)
    codec.decode(codec.encode(image, tile=8), tile=8)
    assert vars(codec.autoencoder) == before
    assert torch.equal(codec.encode(image), latents)
    assert not any(module._forward_hooks for module in codec.autoencoder.modules())


@pytest.mark.parametrize("tile", [0, -8, 2.5, "8", True])
def test_what_is_no_tile_is_named(tile):
    codec = LatentCodec(kl())
    for call in (
        lambda: codec.encode(make_images(3, 8, 8), tile=tile),
        lambda: codec.decode(torch.zeros(1, 4, 2, 2), tile=tile),
    ):
        with pytest.raises(ValueError, match=f"tile is {tile!r}; expected an integer of pixels, at least 1"):
            call()


def test_networks_without_exact_tiles_are_refused():
    movq = diffusers.VQModel(
        block_out_channels=(32, 32),
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["AttnUpDecoderBlock2D"] * 2,
        norm_type="spatial",
        num_vq_embeddings=16,
    )
    for autoencoder in (movq, diffusers.AutoencoderTiny()):
        with pytest.raises(ValueError, match="expected None"):
            LatentCodec(autoencoder).decode(torch.zeros(1, autoencoder.config.latent_channels, 4, 4), tile=64)
    altered = kl()
    altered.decoder.mid_block.resnets[0] = torch.nn.Identity()
    with pytest.raises(ValueError, match="a Identity has no tiled form"):
        decode_tiled(altered.decoder, altered.post_quant_conv, torch.zeros(1, 4, 2, 2), 8)


# ------------------------------------------------------------------------------------- memory, scratch


@pytest.mark.parametrize("tile", [8, 16])
def test_no_layer_sees_more_than_a_tile_and_its_halo(tile):
    autoencoder, largest = kl(), 0

    def watch(module, inputs, output):
        nonlocal largest
        for each in (inputs[0], output):
            sides = [
                max(0, side - 5) for side in each.shape[2:]
            ]  # a coarse position is two wide; one row of padding
            largest = max(largest, each.shape[1] * sides[0] * sides[1])

    for module in autoencoder.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(watch)
    latents = encode_tiled(
        autoencoder.encoder, autoencoder.quant_conv, make_images(1, 3, 32, 40, dtype=torch.float32), tile
    ).chunk(2, 1)[0]
    decode_tiled(autoencoder.decoder, autoencoder.post_quant_conv, latents, tile)
    assert tile**2 * WIDTHS[0] / 4 < largest <= tile**2 * WIDTHS[0]


def scratch_files(folder: Path) -> list[str]:
    """Files in `folder`, and those without a name that this process still holds open there."""
    links = (Path("/proc/self/fd") / each for each in os.listdir("/proc/self/fd"))
    opened = [os.readlink(link) for link in links if link.is_symlink()]
    return [each.name for each in folder.iterdir()] + [each for each in opened if str(folder) in each]


@pytest.fixture
def scratch(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")
def test_scratch_is_gone_after_success_and_after_an_error(scratch):
    codec, held = LatentCodec(kl()), []
    codec.autoencoder.decoder.conv_out.register_forward_hook(lambda *_: held.extend(scratch_files(scratch)))
    latents = codec.encode(make_images(3, 16, 16, dtype=torch.float32), tile=8)
    codec.decode(latents, tile=8)
    gc.collect()
    assert held and not scratch_files(scratch)

    codec.autoencoder.decoder.conv_out.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        codec.decode(latents, tile=8)
    gc.collect()
    assert not scratch_files(scratch)


def test_a_full_disk_is_an_error_that_names_the_folder(scratch):
    codec, before = LatentCodec(kl()), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(OSError, match=f"{scratch} has no room for a feature map of .* set TMPDIR"):
            codec.decode(torch.zeros(1, 4, 8, 8), tile=8)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert codec.decode(torch.zeros(1, 4, 8, 8), tile=8)[0].size == (32, 32)


@torch.no_grad()
def test_statistics_survive_a_mean_far_from_zero():
    """Where float32 sums of squares would leave nothing of the variance."""
    values = make_images(1, 8, 40, 36) + torch.arange(8).view(1, 8, 1, 1) / 4 + 3000
    norm = with_spread(torch.nn.Sequential(torch.nn.GroupNorm(2, 8))).double()[0]
    values, expected = values.float(), norm(values.float().double())
    norm = norm.float()
    x = FeatureMap(values.shape[1:], torch.float32, "cpu")
    for top in range(0, 40, 16):
        for left in range(0, 36, 16):
            rows, columns = slice(top, min(top + 16, 40)), slice(left, min(left + 16, 36))
            x.write(rows, columns, values[..., rows, columns])
    found = x.read(*x.everywhere, x.normalization(norm, F.silu))
    # Rounding of 3000 to float32, 1.2e-4, times scale: group norm's own.
    torch.testing.assert_close(found.double(), F.silu(expected), atol=4e-3, rtol=0)
