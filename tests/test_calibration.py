"""Calibration: statistics against plain sums, conventions against each other, half-precision safety."""

import dataclasses
import math

import diffusers
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from helpers.autoencoders import build as build_tiny
from helpers.one_vector import LabelledImages, one_vector_codec
from helpers.training import write_images
from PIL import Image
from torch import nn

from latent_codec import AutoencoderVQ, LatentCodec, LatentSpace, metrics
from latent_codec.codec import NonFiniteError
from latent_codec.evaluation import calibration
from latent_codec.evaluation.calibration import (
    Calibration,
    _raw_moments,
    calibrate,
    check_convention,
    measure,
    usual_convention,
)
from latent_codec.images.sources import open_source
from latent_codec.images.tensors import center_crop, fit_square, to_image


def build(kind=AutoencoderKL, **config):
    torch.manual_seed(0)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    config = {"block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1, **blocks, **config}
    return kind(**config)


def uneven(**config):
    """An AutoencoderKL whose latent channels differ in mean and spread, and whose posterior is no point."""
    autoencoder = build(mid_block_add_attention=False, **config)
    with torch.no_grad():
        autoencoder.encoder.conv_out.weight[:4] *= torch.tensor([1.0, 20.0, 0.1, 5.0]).view(-1, 1, 1, 1)
        autoencoder.encoder.conv_out.bias[:4] += torch.tensor([3.0, -2.0, 0.0, 0.5])
        autoencoder.encoder.conv_out.bias[4:] = torch.tensor([-2.0, 1.0, -3.0, 0.0])
    return autoencoder


def dc():
    torch.manual_seed(0)
    return diffusers.AutoencoderDC(
        latent_channels=4,
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
    )


def tiny():
    torch.manual_seed(0)
    return diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )


def vq():
    return build(diffusers.VQModel, num_vq_embeddings=16)


def our_vq():
    return build(AutoencoderVQ, num_vq_embeddings=16)


def movq():
    return build(
        diffusers.VQModel,
        num_vq_embeddings=16,
        norm_type="spatial",
        block_out_channels=(32, 32),
        up_block_types=["AttnUpDecoderBlock2D"] * 2,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Smooth images, one of them of odd size."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i, size in enumerate([(24, 24), (32, 16), (17, 23), (16, 16), (24, 16)]):
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        coarse.resize(size, Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def source(folder):
    return open_source(folder)


def images_of(folder):
    """(1, 3, H, W) in [-1, 1], padded to even sides."""
    for path in sorted(folder.iterdir()):
        image = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)[None] / 127.5 - 1
        yield nn.functional.pad(image, (0, image.shape[3] % 2, 0, image.shape[2] % 2), mode="replicate")


def draws_of_raw_latents(autoencoder, folder, count=200):
    """Sampled posteriors of all images, (C, values): what calibration describes by two moments."""
    torch.manual_seed(1)
    with torch.no_grad():
        posteriors = [autoencoder.encode(image).latent_dist for image in images_of(folder)]
    draws = [posterior.sample()[0].flatten(1) for posterior in posteriors for _ in range(count)]
    return torch.cat(draws, 1).double()


# ------------------------------------------------------------------------------------------ LatentCodec's part


def test_posterior_is_diffusers_own_over_the_padded_image():
    codec = LatentCodec(uneven(scaling_factor=0.5, shift_factor=1.0))
    image = torch.rand(3, 15, 16) * 2 - 1
    padded = torch.cat([image, image[:, -1:]], 1)[None]
    posterior = codec.posterior(image)
    with torch.no_grad():  # of weights laid out as the codec left them
        expected = codec.autoencoder.encode(padded).latent_dist
    assert torch.equal(posterior.mean, expected.mean)
    assert torch.equal(posterior.var, expected.var)
    assert posterior.mean.shape == (1, 4, 8, 8)
    assert torch.equal(codec.latent_space.normalize(posterior.mean), codec.encode(image))
    assert not posterior.mean.requires_grad
    with pytest.raises(ValueError, match="differ in size"):
        codec.posterior([image, image[:, :8]])


@pytest.mark.parametrize("build", [vq, tiny, dc])
def test_codecs_without_a_posterior_say_so(build):
    assert LatentCodec(build()).posterior(torch.zeros(3, 16, 16)) is None


def test_fingerprints_follow_weights_once_told():
    codec = LatentCodec(uneven())
    before = codec.fingerprint, codec.space_fingerprint
    with torch.no_grad():
        codec.autoencoder.decoder.conv_out.bias += 1
    codec.weights_changed()
    assert codec.fingerprint != before[0]
    assert codec.space_fingerprint == before[1]


# ------------------------------------------------------------------------------------------ measuring


def test_mean_and_std_are_those_of_sampled_posteriors(folder, source):
    autoencoder = uneven()
    found = measure(LatentCodec(autoencoder), source)
    draws = draws_of_raw_latents(autoencoder, folder)
    # 200 draws of about 500 positions: the standard error of a mean or std is about 0.3 % of the std.
    std = draws.std(1)
    assert (torch.tensor(found.mean) - draws.mean(1)).abs().div(std).max() < 0.02
    assert torch.tensor(found.std).div(std).sub(1).abs().max() < 0.02
    assert found.shift_factor == pytest.approx(float(draws.mean()), abs=0.02 * float(draws.std()))
    assert 1 / found.scaling_factor == pytest.approx(float(draws.std()), rel=0.02)
    assert found.num_images == 5


@pytest.mark.parametrize("build", [vq, tiny, dc])
def test_codecs_without_posterior_are_measured_on_their_latents(build, folder, source):
    autoencoder = build().eval()
    found = measure(LatentCodec(autoencoder), source)
    with torch.no_grad():
        outputs = [autoencoder.encode(image) for image in images_of(folder)]
    raw = torch.cat([output[0][0].flatten(1) for output in outputs], 1).double()
    assert found.mean == pytest.approx(raw.mean(1).tolist(), abs=1e-5)
    assert found.std == pytest.approx(raw.std(1, correction=0).tolist(), rel=1e-4)
    assert {each.dtype: each.psnr is None for each in found.parity} == {
        "float32": False,
        "bfloat16": False,
        "float16": False,
    }


class Affine(AutoencoderKL):
    """A codec known to the last digit: raw latents are 4 pixels + 10, with a posterior variance of 9."""

    def encode(self, image):
        moments = torch.cat([4 * image + 10, torch.full_like(image, math.log(9))], 1)
        return AutoencoderKLOutput(latent_dist=DiagonalGaussianDistribution(moments))

    def decode(self, raw_latents):
        return DecoderOutput(sample=(raw_latents - 10) / 4)


def test_a_known_codec_gives_its_known_scale_and_shift(tmp_path):
    """As many black as white pixels: raw latents are 6 and 14, their variance 4^2 + 9."""
    board = np.indices((16, 16)).sum(0) % 2 * 255
    Image.fromarray(board.astype(np.uint8)).save(tmp_path / "board.png")
    codec = LatentCodec(
        Affine(in_channels=1, out_channels=1, latent_channels=1, block_out_channels=(8,), norm_num_groups=4)
    )
    found = measure(codec, open_source(tmp_path))
    assert (found.mean, found.shift_factor) == ((pytest.approx(10),), pytest.approx(10))
    assert (found.std, found.scaling_factor) == ((pytest.approx(5),), pytest.approx(1 / 5))
    calibrate(codec, found, "scale")
    assert codec.latent_space == LatentSpace(
        1, 1, scaling_factor=found.scaling_factor, shift_factor=found.shift_factor
    )
    assert torch.allclose(codec.encode(torch.ones(1, 1, 2, 2)), torch.full((1, 1, 2, 2), 4 / 5), atol=1e-6)


def test_unreadable_images_are_left_out_and_named(folder, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "2.png").write_bytes((folder / "2.png").read_bytes()[:60])
    seen = []
    found = measure(LatentCodec(uneven()), open_source(tmp_path), on_progress=lambda *at: seen.append(at))
    assert found.num_images == 4
    assert len(found.skipped) == 1 and "2.png" in found.skipped[0]
    assert seen[:5] == [(done, 5, "measuring latents") for done in range(1, 6)]
    assert seen[5:] == [(done, 4, "checking half precision") for done in range(1, 5)]


def test_nothing_to_measure_is_refused(source, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"no image could be read; the first of 1: .*broken.png"):
        measure(LatentCodec(uneven()), open_source(tmp_path))
    with pytest.raises(ValueError, match="bfloat16; calibration wants float32"):
        measure(LatentCodec(uneven().to(torch.bfloat16)), source)

    dead = tiny()
    with torch.no_grad():
        for parameter in dead.encoder.layers[-1].parameters():
            parameter.zero_()
    with pytest.raises(ValueError, match="the same everywhere"):
        measure(LatentCodec(dead), source)

    damaged = uneven()
    with torch.no_grad():
        damaged.decoder.conv_out.bias.fill_(torch.nan)
    with pytest.raises(NonFiniteError, match="not finite even in float32"):
        measure(LatentCodec(damaged), source)


# ------------------------------------------------------------------------------------------ writing


def test_normalized_latents_have_mean_0_and_std_1_and_decode_as_before(folder, source, tmp_path):
    codec = LatentCodec(uneven())
    image = next(images_of(folder))
    before = codec.decode(codec.encode(image), output_type="pt")
    fingerprint = codec.space_fingerprint
    calibrate(codec, measure(codec, source), "normalize")

    draws = draws_of_raw_latents(codec.autoencoder, folder)
    # The standard error of sampling, as above.
    assert torch.allclose(draws.mean(1), torch.zeros(4, dtype=torch.float64), atol=0.02)
    assert torch.allclose(draws.std(1), torch.ones(4, dtype=torch.float64), atol=0.02)
    # float32 rounding, in units of [-1, 1].
    assert torch.allclose(codec.decode(codec.encode(image), output_type="pt"), before, atol=1e-5)
    assert codec.space_fingerprint != fingerprint

    codec.save_pretrained(tmp_path / "codec")
    again = LatentCodec.from_pretrained(tmp_path / "codec")
    assert again.latent_space == codec.latent_space
    assert (again.fingerprint, again.space_fingerprint) == (codec.fingerprint, codec.space_fingerprint)
    assert torch.equal(again.encode(image), codec.encode(image))
    measured_again = measure(again, source)
    assert measured_again.mean == pytest.approx([0] * 4, abs=1e-5)
    assert measured_again.std == pytest.approx([1] * 4, rel=1e-5)


def test_every_pipelines_convention_agrees_on_a_normalized_codec(folder, source):
    codec = LatentCodec(uneven())
    calibrate(codec, measure(codec, source), "normalize")
    config = codec.autoencoder.config
    raw = codec.posterior(next(images_of(folder))).mean
    assert torch.equal(raw * config.scaling_factor, raw)  # Stable Diffusion 1 and 2
    assert torch.equal((raw - config.shift_factor) * config.scaling_factor, raw)  # Stable Diffusion 3, FLUX
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1) for values in (config.latents_mean, config.latents_std)
    )
    assert torch.equal((raw - mean) * config.scaling_factor / std, raw)  # SDXL
    assert torch.equal(codec.latent_space.normalize(raw), raw)
    assert torch.equal(codec.latent_space.denormalize(raw), raw)


@pytest.mark.parametrize("convention", ["scale", "channels"])
def test_written_space_brings_latents_to_mean_0_and_std_1(convention, folder, source, tmp_path):
    codec = LatentCodec(uneven())
    weights = {key: tensor.clone() for key, tensor in codec.autoencoder.state_dict().items()}
    calibrate(codec, measure(codec, source), convention)
    codec.save_pretrained(tmp_path / "codec")
    again = LatentCodec.from_pretrained(tmp_path / "codec")

    latents = again.latent_space.normalize(draws_of_raw_latents(again.autoencoder, folder)[None, :, None])[
        0, :, 0
    ]
    moments = (
        (latents.mean(), latents.std())
        if convention == "scale"
        else (*latents.mean(1).tolist(), *latents.std(1).tolist())
    )
    expected = (0, 1) if convention == "scale" else (0,) * 4 + (1,) * 4
    assert [float(each) for each in moments] == pytest.approx(expected, abs=0.02)  # error of sampling
    assert all(torch.equal(tensor, weights[key]) for key, tensor in again.autoencoder.state_dict().items())
    config = again.autoencoder.config
    assert (config.latents_mean is None) == (config.latents_std is None) == (convention == "scale")
    assert (config.shift_factor == 0) == (config.scaling_factor == 1) == (convention == "channels")


def test_each_convention_clears_the_other(source):
    codec = LatentCodec(uneven())
    found = measure(codec, source)
    calibrate(codec, found, "channels")
    calibrate(codec, found, "scale")
    assert (
        codec.latent_space.mean is None
        and codec.latent_space.std is None
        and codec.latent_space.shift_factor != 0
    )
    calibrate(codec, found, "channels")
    assert (codec.latent_space.mean, codec.latent_space.shift_factor) == (found.mean, 0)


def test_keep_writes_force_upcast_alone(source):
    codec = LatentCodec(uneven(force_upcast=True, scaling_factor=0.7))
    space, fingerprint = codec.latent_space, codec.fingerprint
    calibrate(codec, measure(codec, source), "keep")
    assert (codec.latent_space, codec.fingerprint) == (space, fingerprint)
    assert codec.autoencoder.config.force_upcast is False


def test_calibrate_measures_data_and_leaves_a_scale_that_fits(folder, source):
    codec, expected = LatentCodec(uneven()), LatentCodec(uneven())
    measured = calibrate(codec, folder, limit=2)
    calibrate(expected, measure(expected, source, num_images=2), "scale")
    assert measured.num_images == 2 and codec.latent_space == expected.latent_space

    written = codec.autoencoder.config.scaling_factor
    codec.autoencoder.register_to_config(scaling_factor=written * (1 + 1e-6))
    again = LatentCodec(codec.autoencoder)
    calibrate(again, measured)
    assert again.autoencoder.config.scaling_factor == written * (1 + 1e-6)


def test_a_dead_channel_is_not_turned_into_noise(source):
    autoencoder = uneven(use_quant_conv=False, use_post_quant_conv=False)
    with torch.no_grad():
        autoencoder.encoder.conv_out.weight[2] = 0
        autoencoder.encoder.conv_out.bias[6] = -30
    codec = LatentCodec(autoencoder)
    found = measure(codec, source)
    assert found.std[2] < 1e-5
    calibrate(codec, found, "channels")
    assert codec.latent_space.std[2] == pytest.approx(max(found.std) / 1000)
    assert codec.latent_space.std[:2] == found.std[:2]
    assert codec.encode(torch.rand(1, 3, 16, 16))[0, 2].abs().max() < 1e-2


@pytest.mark.parametrize(
    "build, convention, written",
    [
        (vq, "scale", {"scaling_factor", "force_upcast"}),
        (our_vq, "scale", {"scaling_factor", "force_upcast"}),
        (tiny, "scale", {"scaling_factor", "shift_factor", "force_upcast"}),
        (dc, "scale", {"scaling_factor"}),
        (movq, "keep", {"force_upcast"}),
        (dc, "keep", set()),
    ],
)
def test_each_class_gets_what_its_config_has(build, convention, written, source, tmp_path):
    codec = LatentCodec(build())
    before = dict(codec.autoencoder.config)
    found = dataclasses.replace(measure(codec, source, num_images=1), force_upcast=True)
    calibrate(codec, found, convention)
    config = codec.autoencoder.config
    assert {key for key in config if config[key] != before.get(key)} == written
    assert config.keys() == before.keys()
    if convention == "scale":
        assert codec.latent_space.scaling_factor == found.scaling_factor
        assert codec.latent_space.shift_factor == (found.shift_factor if build is tiny else 0)
    codec.save_pretrained(tmp_path / "codec")
    assert LatentCodec.from_pretrained(tmp_path / "codec").latent_space == codec.latent_space


@pytest.mark.parametrize(
    "build, convention, message",
    [
        (tiny, "normalize", "this AutoencoderTiny has no quant convolutions"),
        (lambda: uneven(use_quant_conv=False), "normalize", "this AutoencoderKL has no quant convolutions"),
        (vq, "normalize", "this VQModel has no quant convolutions"),
        (vq, "channels", "expected a scale, which is all that a pipeline of VQModel reads"),
        (movq, "scale", "no pipeline reads a scale from this VQModel"),
    ],
)
def test_conventions_without_a_reader_are_refused(build, convention, message):
    codec = LatentCodec(build())
    before = dict(codec.autoencoder.config)
    found = Calibration(1, (0.0,) * 4, (1.0,) * 4, 0.5, 0.5, 1.0, (), 1, 128, True, True)
    with pytest.raises(ValueError, match=message):
        check_convention(codec, convention)
    with pytest.raises(ValueError, match=message):
        calibrate(codec, found, convention)
    assert dict(codec.autoencoder.config) == before


# ------------------------------------------------------------------------------------------ half precision


def amplified(factor):
    """The same function as `uneven`, with activations `factor` times as large between two layers of the decoder."""
    autoencoder = uneven()
    with torch.no_grad():
        block = autoencoder.decoder.mid_block.resnets[0]
        block.conv1.weight *= factor
        block.conv1.bias *= factor
        # Group norm divides by the factor again; its epsilon counts for less.
        assert isinstance(block.norm2, nn.GroupNorm)
    return autoencoder


def test_activations_within_float16_need_no_upcast(source):
    found = measure(LatentCodec(amplified(1)), source)
    assert found.force_upcast is False
    assert [each.dtype for each in found.parity] == ["float32", "bfloat16", "float16"]
    assert all(each.psnr_lost < 0.5 for each in found.parity)
    assert found.largest_activation < 1000


@pytest.mark.parametrize("factor, finite", [(2e4, True), (1e7, False)])
def test_huge_activations_force_an_upcast(factor, finite, source):
    """Near the limit of float16, though finite; and beyond it, where float16 gives nothing."""
    codec = LatentCodec(amplified(factor))
    found = measure(codec, source)
    assert found.force_upcast is True
    assert found.largest_activation > calibration.FLOAT16_MAX / 4
    float16 = found.parity[2]
    assert (float16.psnr is not None) == (float16.psnr_lost is not None) == finite
    assert all(each.psnr is not None for each in found.parity[:2])  # bfloat16 reaches as far as float32
    calibrate(codec, found, "keep")
    assert codec.autoencoder.config.force_upcast is True


def offset():
    """Activations small, but on an offset that eats float16's digits: the decoder's last layer subtracts it."""
    autoencoder = uneven(force_upcast=False)
    with torch.no_grad():
        autoencoder.decoder.conv_norm_out.bias += 5000
        head = autoencoder.decoder.conv_out
        head.bias -= 5000 * head.weight.sum((1, 2, 3))
    return autoencoder


def test_lost_quality_forces_an_upcast(source):
    found = measure(LatentCodec(offset()), source)
    assert found.parity[2].psnr_lost > calibration.TOLERATED_LOSS
    assert found.largest_activation < calibration.FLOAT16_MAX / 4
    assert found.force_upcast is True


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_on_a_cpu_agrees_with_real_arithmetic(folder, source, dtype):
    """Rounding after every layer against arithmetic in the dtype, which takes too long but for such a codec."""
    found = measure(LatentCodec(offset()), source, num_images=4)
    half = LatentCodec(offset().to(dtype))
    figures = []
    for image in list(images_of(folder))[:4]:
        decoded = half.decode(half.encode(image), output_type="pt")
        figures.append(-10 * math.log10((decoded - image).square().mean() / 4))
    emulated_loss = next(each.psnr_lost for each in found.parity if str(dtype) == f"torch.{each.dtype}")
    real_loss = found.parity[0].psnr - np.mean(figures)
    assert real_loss > 0.5
    assert emulated_loss == pytest.approx(real_loss, rel=0.5)  # both are one draw of rounding errors


def test_half_precision_is_checked_on_small_crops_which_the_result_names(tmp_path):
    for index, side in enumerate((300, 40)):
        noise = np.random.default_rng(index).integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{index}.png")
    codec = LatentCodec(uneven())
    found = measure(codec, open_source(tmp_path))

    assert (found.parity_num_images, found.parity_side, found.parity_emulated) == (2, 128, True)
    assert found.parity_note.startswith(
        "the middle of 2 images, at most 128x128; half precision is float32 rounded"
    )
    figures = []
    for index in range(2):
        image = center_crop(to_image(tmp_path / f"{index}.png"), (128, 128) if index == 0 else (40, 40))
        decoded = codec.decode(codec.encode(image), size=tuple(image.shape[1:]), output_type="pt")
        figures.append(metrics.psnr(decoded, image[None]).item())
    assert found.parity[0].psnr == pytest.approx(np.mean(figures))


def test_a_slow_check_of_half_precision_takes_fewer_images(source, monkeypatch):
    monkeypatch.setattr(calibration, "LEAST_BUDGET", 0.0)
    found = measure(LatentCodec(uneven()), source)
    assert found.num_images == 5 and found.parity_num_images == 1
    assert found.parity_note.startswith("the middle of 1 image, ")
    assert all(each.psnr is not None for each in found.parity)


def test_parts_that_stay_in_float32_are_not_rounded():
    """AutoencoderVQ's encoder and codebook stay in float32 in half precision, so that indices are those of float32."""
    codec = LatentCodec(build(AutoencoderVQ, num_vq_embeddings=8))
    kept = set(codec.autoencoder._keep_in_fp32_modules)
    assert "encoder" in kept and "decoder" not in kept
    for dtype in calibration.HALVES:
        half = calibration._in_half_precision(codec, dtype)
        for name, part in half.autoencoder.named_children():
            assert any(layer._forward_hooks for layer in part.modules()) is (name not in kept), name


def test_measuring_changes_nothing(source):
    codec = LatentCodec(uneven(force_upcast=True))
    fingerprint, config = codec.fingerprint, dict(codec.autoencoder.config)
    measure(codec, source)
    codec.weights_changed()
    assert (codec.fingerprint, dict(codec.autoencoder.config)) == (fingerprint, config)
    assert not any(layer._forward_hooks for layer in codec.autoencoder.modules())
    assert {parameter.dtype for parameter in codec.autoencoder.parameters()} == {torch.float32}


def test_codecs_stored_in_half_precision_are_measured_in_float32(source, tmp_path):
    LatentCodec(uneven().half()).save_pretrained(tmp_path / "half")
    rounded = uneven().half().float()
    stored = measure(LatentCodec.from_pretrained(tmp_path / "half"), source)
    assert stored == measure(LatentCodec(rounded), source)


# ------------------------------------------------------------------------------------------ statistics of families

PER_CHANNEL = {
    "AutoencoderKLFlux2": ("Flux2Pipeline", "ErnieImagePipeline", "Ideogram4Pipeline", "BriaFibo2Pipeline"),
    "AutoencoderKLWan 2.2": (None, "WanPipeline"),
    "AutoencoderKLQwenImage": ("QwenImagePipeline",),
    "AutoencoderKLLTXVideo": (None,),
    "AutoencoderKLMochi": (None,),
    "AutoencoderKLCosmos": (None,),
}
ONE_SCALE = {
    "PaellaVQModel": (None,),
    "AutoencoderDC": ("SanaPipeline", "SanaSprintPipeline"),
    "AutoencoderKLCogVideoX": (None,),
    "AutoencoderKL": ("Kandinsky5T2IPipeline", "FluxPipeline"),
}


def found_of(codec):
    """A measurement as `measure` would give it, of two images, without the half-precision check."""
    moments = [
        _raw_moments(codec, torch.rand(3, 64, 64, generator=generator(seed)) * 2 - 1) for seed in (0, 1)
    ]
    means = torch.cat([mean for mean, _ in moments], 1)
    squares = torch.cat([mean.square() + variance for mean, variance in moments], 1).mean(1)
    mean, std = means.mean(1), (squares - means.mean(1).square()).sqrt()
    overall = mean.mean(), (squares.mean() - mean.mean().square()).sqrt()
    return Calibration(
        2,
        tuple(mean.tolist()),
        tuple(std.tolist()),
        1 / overall[1].item(),
        overall[0].item(),
        1.0,
        (),
        1,
        128,
        True,
        True,
    )


def generator(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("name", "pipeline"), [(name, pipeline) for name, each in PER_CHANNEL.items() for pipeline in each]
)
def test_per_channel_families_get_mean_0_and_std_1(name, pipeline, tmp_path):
    """Posterior noise included, in config or weights; as it is read again from the folder."""
    codec = LatentCodec(build_tiny(name), pipeline=pipeline)
    before, found = codec.space_fingerprint, found_of(codec)

    calibrate(codec, found)

    codec.save_pretrained(tmp_path)
    saved = LatentCodec.from_pretrained(tmp_path, pipeline=pipeline)
    assert saved.latent_space == codec.latent_space and saved.fingerprint == codec.fingerprint
    assert saved.space_fingerprint != before
    mean, std = (torch.tensor(each) for each in codec.latent_space.statistics())
    floor = codec.family.least_std(pipeline)
    torch.testing.assert_close(mean, torch.tensor(found.mean))
    torch.testing.assert_close(std, torch.tensor(found.divisors).clamp_min(floor), rtol=1e-4, atol=0)
    calibrate(codec, found)
    assert codec.fingerprint == saved.fingerprint


@pytest.mark.parametrize(
    ("name", "pipeline"), [(name, pipeline) for name, each in ONE_SCALE.items() for pipeline in each]
)
def test_other_families_get_the_scale_that_their_pipelines_read(name, pipeline, tmp_path):
    codec = LatentCodec(build_tiny(name), pipeline=pipeline)
    found = found_of(codec)

    calibrate(codec, found)

    codec.save_pretrained(tmp_path)
    space = LatentCodec.from_pretrained(tmp_path, pipeline=pipeline).latent_space
    assert space.scaling_factor == pytest.approx(
        found.scaling_factor * (0.5 if pipeline == "SanaSprintPipeline" else 1)
    )
    assert space.shift_factor == (found.shift_factor if pipeline == "FluxPipeline" else 0)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (
            "AutoencoderRAE",
            "it normalizes its latents itself, by statistics in its weights; keep the space as it is",
        ),
        ("VQModel, spatial norms", "its raw latents are its latents"),
        ("AutoencoderKLKVAE", "its config has no place for one"),
    ],
)
def test_nothing_to_calibrate_is_told_with_the_reason(name, reason):
    with pytest.raises(ValueError, match=f"no pipeline reads a scale from this [A-Za-z]+: {reason}"):
        usual_convention(LatentCodec(build_tiny(name)))


@pytest.mark.parametrize("name", ["AutoencoderKLFlux2", "AutoencoderRAE"])
def test_half_precision_is_measured_of_every_family(name, tmp_path):
    source = open_source(write_images(tmp_path, 1))
    measured = measure(LatentCodec(build_tiny(name)), source, num_images=1)
    assert [each.dtype for each in measured.parity] == ["float32", "bfloat16", "float16"]
    assert len(measured.mean) == len(LatentCodec(build_tiny(name)).latent_space.statistics()[0])


def test_codecs_of_one_vector_are_measured_on_vectors():
    """On images as the codec was trained on them, and not on the grids that larger ones give."""
    codec = one_vector_codec()
    generator = torch.Generator().manual_seed(0)
    images = [torch.randint(0, 256, (3, 20, 16), generator=generator, dtype=torch.uint8) for _ in range(4)]
    squares = [((fit_square(image / 127.5 - 1, 8) + 1) * 127.5).round().byte() for image in images]
    wide, fitting = (measure(codec, LabelledImages(each, [None] * 4)) for each in (images, squares))
    assert wide.mean == pytest.approx(fitting.mean, abs=0.02) and wide.std == pytest.approx(
        fitting.std, abs=0.02
    )
