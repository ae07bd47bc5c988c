import copy
import json
import re
import shutil
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from helpers.autoencoders import build as build_tiny
from PIL import Image
from safetensors.torch import load_file, save_file

from latent_codec import LatentCodec, LatentSpace
from latent_codec.components.codec_folders import WEIGHTS
from latent_codec.conversion.embedding import SD, misfits
from latent_codec.errors import SettingError
from latent_codec.families import family_of
from latent_codec.images.tensors import pad_to_multiple

BLOCKS = {
    "block_out_channels": (8, 8, 8),
    "norm_num_groups": 4,
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
}


def kl(**config):
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(**{**BLOCKS, "force_upcast": False, **config})


def vq(**config):
    torch.manual_seed(0)
    return diffusers.VQModel(**{**BLOCKS, "num_vq_embeddings": 16, **config})


def movq():
    torch.manual_seed(0)
    return diffusers.VQModel(
        block_out_channels=(32, 32, 32),
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["AttnUpDecoderBlock2D"] * 3,
        norm_type="spatial",
        num_vq_embeddings=16,
    )


def tiny():
    torch.manual_seed(0)
    return diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
    )


def dc():
    return build_tiny("AutoencoderDC")


def asymmetric():
    return build_tiny("AsymmetricAutoencoderKL")


def hunyuan_image():
    return build_tiny("AutoencoderKLHunyuanImage")


def kvae():
    return build_tiny("AutoencoderKLKVAE")


MODELS = [kl, vq, movq, tiny, dc, asymmetric, hunyuan_image, kvae]


def photo(height=24, width=20, channels=3, seed=0):
    """A smooth image, (channels, height, width) in [-1, 1]."""
    coarse = torch.rand(1, channels, 4, 4, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")[0]


def pil(image):
    return Image.fromarray(((image + 1) * 127.5).round().byte().permute(1, 2, 0).numpy())


def reference_latents(autoencoder, images):
    """What diffusers' own code computes, without our space."""
    with torch.no_grad():
        output = autoencoder.encode(images)
    if "latent_dist" in output:
        return output.latent_dist.mode()
    return output.latents if "latents" in output else output.latent


# ------------------------------------------------------------------------------------------ every model


@pytest.mark.parametrize("build", MODELS)
def test_encode_and_decode_are_diffusers_own_with_scale_padding_and_crop(build):
    codec = LatentCodec(build())
    image = photo(23, 18)
    padded = pad_to_multiple(image[None], 4)
    assert padded.shape == (1, 3, 24, 20)

    latents = codec.encode(image)
    raw_latents = reference_latents(codec.autoencoder, padded)
    assert latents.shape == (1, codec.latent_space.channels, 6, 5)
    assert torch.equal(latents, codec.latent_space.normalize(raw_latents))

    decoded = codec.decode(latents, size=(23, 18), output_type="pt")
    options = {"force_not_quantize": True} if build is movq else {}
    with torch.no_grad():
        expected = codec.autoencoder.decode(codec.latent_space.denormalize(latents), **options).sample
    assert decoded.shape == (1, 3, 23, 18)
    # Scaling and unscaling rounds; VQModel also adds and subtracts z around the codeword.
    torch.testing.assert_close(decoded, expected[:, :, :23, :18].clamp(-1, 1), rtol=0, atol=2e-5)


@pytest.mark.parametrize("build", MODELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_float32(build, dtype, tmp_path):
    build().save_pretrained(tmp_path)
    image = photo()
    exact = LatentCodec.from_pretrained(tmp_path)
    codec = LatentCodec.from_pretrained(tmp_path, dtype=dtype)
    latents = codec.encode(image)
    assert codec.dtype == latents.dtype == dtype
    decoded = codec.decode(latents, output_type="pt")
    assert decoded.dtype == torch.float32
    if not codec.is_discrete:  # there another codeword may win
        # bfloat16 keeps 8 bits, and a dozen layers add up; a wrong scale or shift would show far above it.
        spread = exact.encode(image).float().std()
        torch.testing.assert_close(latents.float(), exact.encode(image), rtol=0.1, atol=0.1 * spread.item())


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_other_image_channels(channels):
    codec = LatentCodec(kl(in_channels=channels, out_channels=channels))
    latents = codec.encode(pil(photo()))
    assert codec.channels == channels
    assert codec.decode(latents, output_type="pt").shape == (1, channels, 24, 20)
    assert codec.decode(latents)[0].mode == {1: "L", 3: "RGB", 4: "RGBA"}[channels]


# ------------------------------------------------------------------------------------------ what encode takes


def test_every_form_of_one_image_gives_the_same_latents(tmp_path):
    codec = LatentCodec(kl())
    image = pil(photo())
    image.save(tmp_path / "image.png")
    array = np.array(image)
    image = torch.from_numpy(array).permute(2, 0, 1) / 127.5 - 1
    forms = [
        tmp_path / "image.png",
        str(tmp_path / "image.png"),
        image,
        array,
        array.astype(np.float32) / 255,
        array.astype(np.float64)[None] / 255,
        image,
        image[None].double(),
    ]
    expected = codec.encode(image)
    for form in forms:
        torch.testing.assert_close(codec.encode(form), expected, rtol=0, atol=1e-5)  # x / 255 * 2 - 1 rounds
    # A batch of eight may be computed in another order.
    torch.testing.assert_close(codec.encode(forms), expected.expand(8, -1, -1, -1), rtol=0, atol=1e-5)


def test_images_of_different_sizes_in_one_call():
    codec = LatentCodec(kl())
    sizes = [(8, 8), (23, 18), (16, 40)]
    images = [photo(*size, seed=index) for index, size in enumerate(sizes)]
    latents = codec.encode(images)
    assert [tuple(each.shape) for each in latents] == [(1, 4, 2, 2), (1, 4, 6, 5), (1, 4, 4, 10)]
    decoded = codec.decode(latents, size=sizes, output_type="pt")
    assert [tuple(each.shape) for each in decoded] == [(3, *size) for size in sizes]
    for index, image in enumerate(images):
        alone = codec.decode(codec.encode(image), size=sizes[index], output_type="pt")[0]
        assert torch.equal(decoded[index], alone)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(3, 16, 16, dtype=torch.uint8), "uint8 tensor .* / 127.5 - 1"),
        (torch.full((3, 16, 16), 200.0), r"must be in \[-1, 1\].*200"),
        (torch.full((3, 16, 16), float("nan")), r"must be in \[-1, 1\]"),
        (torch.zeros(16, 16, 3), r"\(16, 16, 3\).*C, H, W"),
        (torch.zeros(2, 3, 3, 16, 16), r"\(2, 3, 3, 16, 16\)"),
        (np.zeros((16, 16, 3), np.int64), "int64 array"),
        (np.full((16, 16, 3), 7.0), r"must be in \[0, 1\]"),
        ([], "expected at least one image, got none"),
        (torch.zeros(0, 3, 16, 16), "expected at least one image, got none"),
        (None, "NoneType is no image"),
        ("nowhere.png", "nowhere.png: no such file"),
    ],
)
def test_refuses_what_is_no_image(images, message):
    with pytest.raises(ValueError, match=message):
        LatentCodec(kl()).encode(images)


# ------------------------------------------------------------------------------------------ posterior


def test_mean_unless_sample_and_generator_decides_the_sample():
    codec = LatentCodec(kl())
    image = photo()
    draws = [codec.encode(image, sample=True, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(codec.encode(image), codec.encode(image))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])

    with torch.no_grad():
        posterior = codec.autoencoder.encode(image[None]).latent_dist
    expected = posterior.sample(torch.Generator().manual_seed(1)) * codec.latent_space.scaling_factor
    torch.testing.assert_close(draws[0], expected)


def test_sampling_without_a_posterior_is_refused():
    with pytest.raises(ValueError, match="AutoencoderTiny has no posterior to sample from"):
        LatentCodec(tiny()).encode(photo(), sample=True)


def test_latents_may_feed_a_training_denoiser_and_no_gradient_reaches_the_codec():
    codec = LatentCodec(kl())
    latents = codec.encode(photo())
    assert not latents.requires_grad
    denoiser = torch.nn.Conv2d(4, 4, 1)
    denoiser(latents).square().mean().backward()  # inference tensors would raise here
    assert denoiser.weight.grad is not None
    assert all(parameter.grad is None for parameter in codec.autoencoder.parameters())


# ------------------------------------------------------------------------------------------ decode


def test_output_types_agree():
    codec = LatentCodec(kl())
    latents = codec.encode([photo(seed=1), photo(seed=2)])
    tensor = codec.decode(latents, output_type="pt")
    array = codec.decode(latents, output_type="np")
    images = codec.decode(latents)
    assert tensor.shape == (2, 3, 24, 20)
    assert tensor.abs().max() <= 1
    np.testing.assert_allclose(array, (tensor.permute(0, 2, 3, 1).numpy() + 1) / 2, atol=1e-6)
    for index, image in enumerate(images):
        assert np.abs(np.asarray(image) - array[index] * 255).max() <= 0.501  # rounding to 8 bits


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"size": (18, 23)},
            r"height, width\) = \(18, 23\) does not belong .* 24x20; height may be 21 to 24",
        ),
        ({"size": [(24, 20), (24, 20)]}, "expected 1 sizes, one for each image, got 2"),
        ({"output_type": "jpeg"}, "output_type is 'jpeg'; allowed are"),
        ({"tile": 0}, "tile is 0; expected an integer of pixels, at least 1"),
    ],
)
def test_refuses_wrong_arguments_of_decode(arguments, message):
    codec = LatentCodec(kl())
    with pytest.raises(ValueError, match=message):
        codec.decode(torch.zeros(1, 4, 6, 5), **arguments)


@pytest.mark.parametrize(
    ("latents", "message"),
    [
        (torch.zeros(1, 8, 6, 5), r"expected latents of codec, \(B, 4, h, w\), got shape \(1, 8, 6, 5\)"),
        (torch.zeros(4, 6, 5), r"got shape \(4, 6, 5\)"),
        (
            torch.zeros(1, 4, 6, 5, dtype=torch.int64),
            "expected latents as a floating-point tensor, got int64",
        ),
        (torch.full((1, 4, 6, 5), float("inf")), "latents hold NaN or infinity"),
        ([np.zeros((1, 4, 6, 5))], "expected latents as a tensor, got ndarray"),
    ],
)
def test_refuses_what_are_no_latents(latents, message):
    with pytest.raises(ValueError, match=message):
        LatentCodec(kl()).decode(latents)


def test_sizes_may_be_numpy_or_torch_integers():
    codec, latents = LatentCodec(kl()), torch.zeros(1, 4, 6, 5)
    for size in (np.array([23, 18]), torch.zeros(23, 18).shape, (np.int64(23), np.int64(18)), [(23, 18)]):
        assert codec.decode(latents, size=size)[0].size == (18, 23)


def overflowing(**config):
    """A KL whose weights float16 holds and whose activations it does not."""
    autoencoder = kl(**config)
    with torch.no_grad():
        for conv in (autoencoder.encoder.conv_in, autoencoder.decoder.conv_in):
            conv.weight.mul_(2e5)
            assert conv.weight.abs().max() < 65504
    return autoencoder.half()


def test_overflow_in_float16_is_an_error_that_names_the_remedy(tmp_path):
    overflowing(force_upcast=False).save_pretrained(tmp_path)
    codec = LatentCodec.from_pretrained(tmp_path, dtype=torch.float16)
    with pytest.raises(
        ValueError, match="non-finite latents in float16: use bfloat16 or float32, or run `latent"
    ):
        codec.encode(photo())
    with pytest.raises(ValueError, match="non-finite images in float16: use bfloat16"):
        codec.decode(torch.ones(1, 4, 6, 5))


def test_force_upcast_computes_in_float32_and_leaves_the_component_as_it_was(tmp_path):
    overflowing(force_upcast=True).save_pretrained(tmp_path)
    exact = LatentCodec.from_pretrained(tmp_path)
    codec = LatentCodec.from_pretrained(tmp_path, dtype=torch.float16)
    latents = codec.encode(photo())
    # The weights are float16's own, so all that differs is the rounding of the result.
    assert torch.equal(latents, exact.encode(photo()).half())
    assert torch.equal(
        codec.decode(latents, output_type="pt"), exact.decode(latents.float(), output_type="pt")
    )
    assert {parameter.dtype for parameter in codec.autoencoder.parameters()} == {torch.float16}


@pytest.mark.parametrize("build", [kl, dc, kvae])
def test_tiles_cover_the_image_and_are_switched_off_again(build):
    codec = LatentCodec(build())
    image = photo(70, 90)
    whole, tiled = codec.encode(image), codec.encode(image, tile=32)
    assert tiled.shape == whole.shape
    if build is kl:  # exact but for rounding, where diffusers' blending is not
        torch.testing.assert_close(tiled, whole, atol=1e-4, rtol=0)
    else:
        assert not torch.equal(tiled, whole)
    assert codec.decode(whole, size=(70, 90), output_type="pt", tile=32).shape == (1, 3, 70, 90)
    assert torch.equal(codec.encode(image), whole)
    torch.testing.assert_close(codec.encode(image, tile=128), whole, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "build, reason",
    [
        (tiny, "diffusers' tiles of it take 4 latent channels for granted"),
        (asymmetric, "diffusers has no tiles for it"),
        (hunyuan_image, "diffusers' tiled encoder of it expects video"),
    ],
)
def test_tiles_that_a_class_does_not_have_are_refused_with_the_reason(build, reason):
    codec = LatentCodec(build())
    name = type(codec.autoencoder).__name__
    expected = f"tile: expected None, as tiles of {name} are not supported ({reason}), got 64"
    with pytest.raises(SettingError, match=f"^{re.escape(expected)}$"):
        codec.encode(photo(), tile=64)


# ------------------------------------------------------------------------------------------ indices


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lookup", [False, True])
def test_indices_are_the_nearest_codewords_and_decode_as_latents_do(dtype, lookup, tmp_path):
    vq(lookup_from_codebook=lookup).save_pretrained(tmp_path)
    codec = LatentCodec.from_pretrained(tmp_path, dtype=dtype)
    images = [photo(seed=1), photo(seed=2)]
    (indices,) = codec.encode_indices(images)
    assert indices.shape == (2, 6, 5)
    assert indices.dtype == torch.int64

    raw_latents = codec.latent_space.denormalize(codec.encode(images).float())
    codebook = codec.autoencoder.quantize.embedding.weight.float()
    distances = (raw_latents[:, None] - codebook[None, :, :, None, None]).square().sum(2)
    won = distances.gather(1, indices[:, None]).squeeze(1)
    # Scaling rounds the latents once each way.
    torch.testing.assert_close(
        won, distances.min(1).values, rtol=0, atol=1e-2 if dtype is torch.bfloat16 else 1e-6
    )

    decoded = codec.decode_indices([indices], size=(23, 18), output_type="pt")
    assert decoded.shape == (2, 3, 23, 18)
    if dtype is torch.float32:
        from_latents = codec.decode(codec.encode(images), size=(23, 18), output_type="pt")
        torch.testing.assert_close(decoded, from_latents)


def test_indices_equal_those_of_diffusers_quantizer():
    codec = LatentCodec(vq())
    (indices,) = codec.encode_indices(photo())
    with torch.no_grad():
        expected = codec.autoencoder.quantize(codec.autoencoder.encode(photo()[None]).latents)[2][2]
    assert torch.equal(indices.flatten(), expected)


@pytest.mark.parametrize(
    ("grids", "message"),
    [
        (
            torch.zeros(1, 2, 2, dtype=torch.int64),
            "expected a list of index maps, one for each level, got a tensor",
        ),
        ([torch.zeros(1, 2, 2, dtype=torch.int64)] * 2, "expected a list of one index map, got 2"),
        (
            [torch.zeros(2, 2, dtype=torch.int64)],
            r"expected indices \(B, h, w\) in torch.int64, got shape \(2, 2\) in torch.int64",
        ),
        ([torch.zeros(1, 2, 2)], "float32"),
        ([torch.full((1, 2, 2), 16)], "indices: expected 0 to 15, indices of its codebook; got 16 to 16"),
    ],
)
def test_refuses_what_are_no_indices(grids, message):
    with pytest.raises(ValueError, match=message):
        LatentCodec(vq()).decode_indices(grids)


def test_indices_need_a_codebook_and_one_size():
    with pytest.raises(ValueError, match="AutoencoderKL, which has no codebook; use encode and decode"):
        LatentCodec(kl()).encode_indices(photo())
    with pytest.raises(ValueError, match="differ in size"):
        LatentCodec(vq()).encode_indices([photo(8, 8), photo(16, 16)])


# ------------------------------------------------------------------------------------------ fingerprints


def test_fingerprints_are_16_hex_digits_and_repeat():
    first, second = LatentCodec(kl()), LatentCodec(kl())
    assert first.fingerprint == second.fingerprint != first.space_fingerprint
    assert len(first.fingerprint) == len(first.space_fingerprint) == 16
    assert int(first.fingerprint, 16) and int(first.space_fingerprint, 16)


@pytest.mark.parametrize(
    ("part", "space_changes"),
    [
        ("decoder.conv_out.bias", False),
        ("post_quant_conv.weight", False),
        ("encoder.conv_in.bias", True),
        ("quant_conv.weight", True),
        ("quantize.embedding.weight", True),
    ],
)
def test_decoder_changes_only_the_whole_fingerprint(part, space_changes):
    before, changed = LatentCodec(vq()), vq()
    with torch.no_grad():
        changed.get_parameter(part).view(-1)[0].add_(1e-3)
    after = LatentCodec(changed)
    assert after.fingerprint != before.fingerprint
    assert (after.space_fingerprint != before.space_fingerprint) == space_changes


@pytest.mark.parametrize("change", [{"scaling_factor": 0.2}, {"shift_factor": 0.1}])
def test_scale_and_shift_change_both_fingerprints(change):
    codec = LatentCodec(kl())
    before = codec.fingerprint, codec.space_fingerprint
    codec.latent_space = replace(codec.latent_space, **change)
    assert codec.fingerprint != before[0]
    assert codec.space_fingerprint != before[1]
    assert LatentSpace.from_config(codec.autoencoder) == codec.latent_space


@pytest.mark.parametrize("stored", [torch.float16, torch.float32])
def test_dtype_at_opening_changes_no_fingerprint(stored, tmp_path):
    kl().to(stored).save_pretrained(tmp_path)
    found = {
        LatentCodec.from_pretrained(tmp_path, dtype=dtype).fingerprint
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    }
    assert len(found) == 1


def test_space_of_another_grid_is_refused_and_changes_nothing():
    codec = LatentCodec(kl())
    before = codec.latent_space
    with pytest.raises(ValueError, match="does not fit AutoencoderKL"):
        codec.latent_space = LatentSpace(5, 4, scaling_factor=0.9)
    assert LatentSpace.from_config(codec.autoencoder) == codec.latent_space == before


def test_space_of_a_class_without_shift_refuses_one():
    codec = LatentCodec(dc())
    codec.latent_space = replace(codec.latent_space, scaling_factor=0.5)
    assert codec.autoencoder.config.scaling_factor == 0.5
    with pytest.raises(
        ValueError, match=r"AutoencoderDC has no shift_factor, so no pipeline would read 0\.1"
    ):
        codec.latent_space = replace(codec.latent_space, shift_factor=0.1)


# ------------------------------------------------------------------------------------------ opening and saving


def test_save_and_reopen(tmp_path):
    codec = LatentCodec(kl(scaling_factor=0.3))
    codec.save_pretrained(tmp_path / "mine")
    again = LatentCodec.from_pretrained(tmp_path / "mine")
    assert again.name == "mine"
    assert again.latent_space == codec.latent_space
    assert again.fingerprint == codec.fingerprint
    assert torch.equal(again.encode(photo()), codec.encode(photo()))
    assert not again.autoencoder.training


def test_saving_keeps_the_model_card_and_sidecars_but_no_path_of_this_machine(tmp_path):
    LatentCodec(kl()).save_pretrained(tmp_path / "a")
    (tmp_path / "a" / "README.md").write_text("# card")
    codec = LatentCodec.from_pretrained(tmp_path / "a")
    LatentCodec(kl(scaling_factor=0.7)).save_pretrained(tmp_path / "b")
    (tmp_path / "b" / "preview.safetensors").write_bytes(b"sidecar")
    codec.save_pretrained(tmp_path / "b")
    assert (tmp_path / "b" / "README.md").read_text() == "# card"
    assert (tmp_path / "b" / "preview.safetensors").read_bytes() == b"sidecar"
    assert str(tmp_path) not in (tmp_path / "b" / "config.json").read_text()
    assert LatentCodec.from_pretrained(tmp_path / "b").fingerprint == codec.fingerprint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_saving_into_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    LatentCodec(kl()).save_pretrained(".")
    assert LatentCodec.from_pretrained(tmp_path / "here").name == "here"


def test_saving_never_replaces_a_folder_of_other_things(tmp_path):
    (tmp_path / "letters.txt").write_text("dear")
    with pytest.raises(ValueError, match="holds other files and no codec"):
        LatentCodec(kl()).save_pretrained(tmp_path)
    assert (tmp_path / "letters.txt").read_text() == "dear"


@pytest.mark.parametrize("place", [".", "vae", "vqvae", "movq", "codec"])
def test_finds_the_autoencoder_of_a_pipeline_or_run(place, tmp_path):
    kl().save_pretrained(tmp_path / place)
    if place in ("vae", "vqvae", "movq"):
        (tmp_path / "model_index.json").write_text("{}")
    assert LatentCodec.from_pretrained(tmp_path).fingerprint == LatentCodec(kl()).fingerprint


@pytest.mark.parametrize("inside", ["", "vae", "codec", f"vae/{WEIGHTS}"])
def test_is_named_after_the_folder_that_people_know(inside, tmp_path):
    for place in ("", "vae", "codec"):
        kl().save_pretrained(tmp_path / "moon" / place)
    assert LatentCodec.from_pretrained(tmp_path / "moon" / inside).name == "moon"


def test_a_folder_that_is_called_vae_and_is_no_part_of_a_pipeline_keeps_its_name(tmp_path):
    kl().save_pretrained(tmp_path / "runs" / "vae")
    assert LatentCodec.from_pretrained(tmp_path / "runs" / "vae").name == "vae"


@pytest.mark.parametrize("place", ["", "vae/"])
def test_hub_id_is_found_in_the_hubs_cache(place, tmp_path, monkeypatch):
    """The cache as huggingface_hub lays it out, so that no network is needed."""
    repository = tmp_path / "models--some-one--some.codec"
    snapshot = repository / "snapshots" / ("0" * 40)
    kl().save_pretrained(snapshot / place)
    if place:
        (snapshot / "model_index.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    codec = LatentCodec.from_pretrained("some-one/some.codec")
    assert codec.name == "some-one/some.codec"
    assert codec.fingerprint == LatentCodec(kl()).fingerprint


def test_subfolder_and_weight_file(tmp_path):
    kl().save_pretrained(tmp_path / "here" / "deep")
    assert LatentCodec.from_pretrained(tmp_path, subfolder="here/deep").latent_space.channels == 4
    assert LatentCodec.from_pretrained(tmp_path / "here" / "deep" / WEIGHTS).latent_space.channels == 4
    kl().save_pretrained(tmp_path / "half", variant="fp16")
    assert LatentCodec.from_pretrained(tmp_path / "half" / "diffusion_pytorch_model.fp16.safetensors")


def test_deprecated_attention_keys_of_old_checkpoints_open(tmp_path):
    """As `stabilityai/sd-vae-ft-mse` and its age have them: query, key, value, proj_attn."""
    kl().save_pretrained(tmp_path)
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = load_file(tmp_path / WEIGHTS)
    old = {}
    for key, tensor in state.items():
        for new_name, old_name in names.items():
            key = key.replace(f".{new_name}.", f".{old_name}.")
        old[key] = tensor
    assert old.keys() != state.keys()
    save_file(old, tmp_path / WEIGHTS, {"format": "pt"})
    assert LatentCodec.from_pretrained(tmp_path).fingerprint == LatentCodec(kl()).fingerprint


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no-such-codec", r"no-such-codec does not exist; give .* shipped codec \(default"),
        ("nobody/nothing", "nobody/nothing is neither a folder here nor could it be had from the hub"),
        ("./no/such/folder", "does not exist"),
    ],
)
def test_wrong_names(name, message, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=message):
        LatentCodec.from_pretrained(name)


def test_to_converts_in_place_and_keeps_fingerprints():
    codec = LatentCodec(kl())
    fingerprint = LatentCodec(kl()).fingerprint
    assert codec.to(torch.bfloat16) is codec and codec.dtype == torch.bfloat16
    assert codec.to("cpu", torch.float32).dtype == torch.float32 and codec.fingerprint == fingerprint
    with pytest.raises(ValueError, match=r"got torch\.float64"):
        codec.to(torch.float64)
    with pytest.raises(ValueError, match="device nonsense is not available here"):
        codec.to("nonsense")


def test_to_refuses_a_dtype_that_weights_exceed():
    with pytest.raises(ValueError, match=r"beyond float16's 6\.55e"):
        codec = LatentCodec(kl())
        codec.autoencoder.quant_conv.weight.data[0] = 1e5
        codec.to(torch.float16)


def test_repr_shows_what_info_shows():
    codec = LatentCodec(vq(), name="<mine>")
    shown = repr(codec)
    assert shown.startswith("LatentCodec <mine>\n  class: VQModel\n")
    assert "dtype: float32" in shown and "codebook sizes: [" in shown and "fingerprint" not in shown
    assert codec.fingerprint in repr(codec)  # once it is known
    assert "&lt;mine&gt;" in codec._repr_html_() and "<th>class</th><td>VQModel</td>" in codec._repr_html_()


def test_roundtrip_gives_reconstructions_of_the_same_sizes():
    codec = LatentCodec(kl())
    images = [torch.rand(3, 21, 33) * 2 - 1, torch.rand(3, 16, 40) * 2 - 1]
    found = codec.roundtrip(images, output_type="pt")
    assert [each.shape for each in found] == [each.shape for each in images]
    expected = codec.decode(codec.encode(images[0]), size=(21, 33), output_type="pt")[0]
    torch.testing.assert_close(found[0], expected, rtol=0, atol=0)
    (image,) = codec.roundtrip(Image.new("RGB", (20, 12)))
    assert image.size == (20, 12)


def test_wrong_dtype(tmp_path):
    with pytest.raises(ValueError, match=r"expected one of float32, bfloat16, float16, got torch\.int8"):
        LatentCodec.from_pretrained(tmp_path, dtype=torch.int8)


def _foreign_file(folder):
    (folder / "model.ckpt").write_bytes(b"x")
    return folder / "model.ckpt"


def _empty_folder(folder):
    return folder


def _pipeline_without_vae(folder):
    (folder / "model_index.json").write_text("{}")
    return folder


def _no_subfolder_weights(folder):
    (folder / WEIGHTS).unlink()
    return folder


def _truncated(folder):
    weights = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(weights[: len(weights) // 2])
    return folder


def _config_of_another_shape(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"latent_channels": 8}))
    return folder


def _nonsense_config(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"block_out_channels": "wide"}))
    return folder


def _broken_json(folder):
    (folder / "config.json").write_text("{")
    return folder


def _json_list(folder):
    (folder / "config.json").write_text("[]")
    return folder


def _video_model(folder):
    (folder / "config.json").write_text('{"_class_name": "AutoencoderKLAllegro"}')
    return folder


def _lost_key(folder):
    state = load_file(folder / WEIGHTS)
    del state["encoder.conv_in.bias"]
    save_file(state, folder / WEIGHTS, {"format": "pt"})
    return folder


def _extra_key(folder):
    save_file(load_file(folder / WEIGHTS) | {"loss.x": torch.zeros(1)}, folder / WEIGHTS, {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("break_it", "from_codec", "message"),
    [
        (_foreign_file, False, "model.ckpt begins with .*give a safetensors file"),
        (_empty_folder, False, "is no codec: it has neither config.json"),
        (_pipeline_without_vae, False, "has no autoencoder under vae, vqvae, movq"),
        (_no_subfolder_weights, True, "safetensors is missing"),
        (_truncated, True, "a damaged or truncated one"),
        (_config_of_another_shape, True, r"does not fit its config.json: expected .* of shape"),
        (_nonsense_config, True, r"config.json: expected .* of type"),
        (_broken_json, True, "is not the config of a diffusers model"),
        (_json_list, True, "is not the config of a diffusers model"),
        (_video_model, True, "AutoencoderKLAllegro is not supported: it works on video"),
        (_lost_key, True, r"1 keys \(encoder.conv_in.bias\) missing, 0 keys unexpected"),
        (_extra_key, True, r"0 keys missing, 1 keys \(loss.x\) unexpected"),
    ],
)
def test_broken_codecs_give_one_line(break_it, from_codec, message, tmp_path):
    if from_codec:
        kl().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        LatentCodec.from_pretrained(break_it(tmp_path))
    assert "\n" not in str(caught.value)


def test_missing_subfolder(tmp_path):
    kl().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has no vae/config\.json"):
        LatentCodec.from_pretrained(tmp_path, subfolder="vae")


def test_shipped_default_opens():
    from latent_codec.components.codec_folders import DEFAULT

    codec = LatentCodec.from_pretrained()
    assert codec.name == DEFAULT
    assert (codec.latent_space.channels, codec.latent_space.downsampling_factor) == (4, 8)
    assert type(codec.autoencoder) is diffusers.AutoencoderKL


def test_shipped_discrete_codec_opens_and_its_indices_do_not_depend_on_the_precision():
    codec = LatentCodec.from_pretrained("default-vq")
    assert (codec.name, codec.codebook_sizes) == ("default-vq-f8", [1024])
    assert codec.fingerprint == LatentCodec.from_pretrained("default-vq-f8").fingerprint
    image = torch.nn.functional.interpolate(torch.rand(1, 3, 16, 20) * 2 - 1, scale_factor=8, mode="bilinear")
    (indices,) = codec.encode_indices(image)
    assert indices.shape == (1, 16, 20)
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(
            LatentCodec.from_pretrained("default-vq", dtype=dtype).encode_indices(image)[0], indices
        )


def test_the_shipped_codec_of_garments_has_one_vector_per_image():
    codec = LatentCodec.from_pretrained("garments")
    assert (codec.name, codec.channels) == ("garments", 1)
    assert sum(path.stat().st_size for path in codec.folder.iterdir()) <= 1e6
    latents = codec.encode(torch.rand(2, 1, 28, 28) * 2 - 1)
    assert latents.shape == (2, 16, 1, 1)
    assert codec.decode(latents, size=(28, 28), output_type="pt").shape == (2, 1, 28, 28)


def test_the_shipped_codec_of_16_channels_has_the_layout_of_sd3():
    codec = LatentCodec.from_pretrained("default-16")
    assert (codec.name, codec.latent_space.channels, codec.latent_space.downsampling_factor) == (
        "default-f8c16",
        16,
        8,
    )
    config = codec.autoencoder.config
    assert type(codec.autoencoder) is diffusers.AutoencoderKL
    assert not config.use_quant_conv and not config.use_post_quant_conv
    assert misfits(config, SD) == []


def test_shipped_codecs_are_small():
    from latent_codec.components.codec_folders import ASSETS, SHIPPED

    for name in SHIPPED.values():
        most = 11e6 if name in ("default-f8c16", "default-f8c16-rd") else 8e6
        assert sum(path.stat().st_size for path in (ASSETS / name).iterdir()) <= most


def test_failed_save_leaves_the_old_codec(tmp_path):
    """A limit on the size of files stands for a full disk: the system refuses the write half way."""
    resource = pytest.importorskip("resource")
    LatentCodec(kl()).save_pretrained(tmp_path / "mine")
    shutil.copytree(tmp_path / "mine", tmp_path / "before")
    codec = LatentCodec(kl(scaling_factor=0.7))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            codec.save_pretrained(tmp_path / "mine")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    for path in (tmp_path / "before").iterdir():
        assert (tmp_path / "mine" / path.name).read_bytes() == path.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["before", "mine"]


def _content(file):
    """A file's bytes; of a safetensors file header and data apart, since the order of its metadata varies."""
    data = file.read_bytes()
    if file.suffix != ".safetensors":
        return data
    start = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:start]), data[start:]


@pytest.mark.parametrize("name", ["default", "default-vq"])
def test_weights_are_laid_out_channels_last_with_the_same_fingerprints_and_files(name, tmp_path):
    codec = LatentCodec.from_pretrained(name)
    before = {key: tensor.clone() for key, tensor in codec.autoencoder.state_dict().items()}
    codec.save_pretrained(tmp_path / "contiguous")
    image = torch.rand(3, 32, 48) * 2 - 1
    with torch.no_grad():
        (expected,) = codec.family.decode_raw(codec.latent_space.denormalize(codec.encode(image)))
    weight = codec.autoencoder.decoder.conv_in.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    assert all(torch.equal(tensor, before[key]) for key, tensor in codec.autoencoder.state_dict().items())

    again = LatentCodec.from_pretrained(name)
    assert (codec.fingerprint, codec.space_fingerprint) == (again.fingerprint, again.space_fingerprint)
    codec.save_pretrained(tmp_path / "channels_last")
    for file in (tmp_path / "contiguous").iterdir():
        assert _content(file) == _content(tmp_path / "channels_last" / file.name)

    contiguous = copy.deepcopy(again.autoencoder)
    with torch.no_grad():
        latents = again.latent_space.denormalize(codec.encode(image))
        found = family_of(contiguous).decode_raw(latents)[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)  # rounding of sums in another order
