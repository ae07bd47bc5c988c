"""FLUX.2, Wan and Qwen-Image: latents as their pipelines compute them, in tiny random builds."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderKLQwenImage21,
    AutoencoderKLWan,
    BriaFibo2Pipeline,
    Flux2Pipeline,
    HunyuanImageRefinerPipeline,
    QwenImageEditPipeline,
    QwenImagePipeline,
)
from helpers.autoencoders import build

from latent_codec import LatentCodec, LatentSpace
from latent_codec.components.codec_facts import facts_of, read_facts
from latent_codec.families.latent_space import (
    CHANNEL_FIRST,
    POSITION_FIRST,
    pack_positions,
    unpack_positions,
)
from latent_codec.families.pipeline_spaces import PIPELINES
from latent_codec.latents.latent_files import load_latents, save_latents


def flux2() -> AutoencoderKLFlux2:
    return build("AutoencoderKLFlux2")


def wan21() -> AutoencoderKLWan:
    return build("AutoencoderKLWan")


def wan22() -> AutoencoderKLWan:
    return build("AutoencoderKLWan 2.2")


def qwen(channels: int = 3) -> AutoencoderKLQwenImage:
    return build("AutoencoderKLQwenImage", input_channels=channels)


def qwen21() -> AutoencoderKLQwenImage21:
    return build("AutoencoderKLQwenImage21")


class Around:
    """What a pipeline's own encoding code asks of its pipeline."""

    def __init__(self, vae, pipeline):
        self.vae, self.latent_channels = vae, vae.config.get("z_dim")
        for name in ("_patchify_latents", "_unpatchify_latents"):
            if hasattr(pipeline, name):
                setattr(self, name, getattr(pipeline, name))


def images(channels: int = 3, height: int = 32, width: int = 48) -> torch.Tensor:
    return torch.rand(2, channels, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


@torch.no_grad()
def test_flux2s_latents_are_its_pipelines():
    autoencoder, given = flux2(), images()

    latents = LatentCodec(autoencoder).encode(given)

    expected = Flux2Pipeline._encode_vae_image(Around(autoencoder, Flux2Pipeline), given, None)
    assert latents.shape == (2, 16, 4, 6)
    torch.testing.assert_close(latents, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_fibo_2_unpacks_again():
    autoencoder, given = flux2(), images()

    codec = LatentCodec(autoencoder, pipeline="BriaFibo2Pipeline")

    (expected,) = BriaFibo2Pipeline.prepare_image_latents(
        Around(autoencoder, BriaFibo2Pipeline), [given], 1, "cpu", torch.float32
    )
    assert (codec.latent_space.channels, codec.latent_space.downsampling_factor) == (4, 4)
    torch.testing.assert_close(codec.encode(given), expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_ernie_and_ideogram_decode_their_own_latents():
    """The last lines of their pipelines, which have no encoding code."""
    autoencoder, given = flux2(), images()
    mean, variance = autoencoder.bn.running_mean, autoencoder.bn.running_var

    ernie = LatentCodec(autoencoder, pipeline="ErnieImagePipeline")
    latents = ernie.encode(given)
    raw = latents * torch.sqrt(variance + 1e-5).view(1, -1, 1, 1) + mean.view(1, -1, 1, 1)
    expected = autoencoder.decode(Flux2Pipeline._unpatchify_latents(raw)).sample.clamp(-1, 1)
    torch.testing.assert_close(ernie.decode(latents, output_type="pt"), expected, rtol=0, atol=1e-5)

    ideogram = LatentCodec(autoencoder, pipeline="Ideogram4Pipeline")
    latents = ideogram.encode(given)
    tokens = ideogram.latent_space.pack(latents) * torch.sqrt(variance + 1e-4) + mean
    grid = tokens.view(2, 4, 6, 2, 2, 4).permute(0, 5, 1, 3, 2, 4).reshape(2, 4, 8, 12)
    expected = autoencoder.decode(grid).sample.clamp(-1, 1)
    torch.testing.assert_close(ideogram.decode(latents, output_type="pt"), expected, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("channels", [3, 4])
def test_qwens_latents_are_its_pipelines(channels):
    autoencoder, given = qwen(channels), images(channels)

    codec = LatentCodec(autoencoder)
    latents = codec.encode(given)

    expected = QwenImageEditPipeline._encode_vae_image(
        Around(autoencoder, QwenImageEditPipeline), given.unsqueeze(2), None
    )
    torch.testing.assert_close(latents, expected[:, :, 0], rtol=0, atol=1e-5)
    space = LatentCodec(autoencoder, pipeline="QwenImagePipeline").latent_space
    assert torch.equal(space.pack(latents), QwenImagePipeline._pack_latents(latents, 2, 16, 4, 6))
    assert codec.decode(latents)[0].mode == ("RGBA" if channels == 4 else "RGB")


@torch.no_grad()
def test_wan_22_is_a_codec_of_one_frame():
    autoencoder, given = wan22(), images(height=40)

    codec = LatentCodec(autoencoder)
    latents = codec.encode(given)

    padded = torch.nn.functional.pad(given, (0, 0, 0, 8), mode="replicate")
    raw = autoencoder.encode(padded.unsqueeze(2)).latent_dist.mode()
    mean, std = (
        torch.tensor(autoencoder.config[key]).view(1, -1, 1, 1, 1) for key in ("latents_mean", "latents_std")
    )
    torch.testing.assert_close(codec.latent_space.pack(latents), (raw - mean) / std, rtol=0, atol=1e-5)
    assert codec.decode(latents, size=(40, 48))[0].size == (48, 40)


@pytest.mark.parametrize("order", [CHANNEL_FIRST, POSITION_FIRST])
def test_packing_moves_each_position_where_its_order_says(order):
    grid = torch.arange(2 * 3 * 4 * 6.0).view(2, 3, 4, 6)

    packed = pack_positions(grid, order)

    channel, row, column = 2, 1, 0
    place = channel * 4 + row * 2 + column if order == CHANNEL_FIRST else (row * 2 + column) * 3 + channel
    assert torch.equal(packed[:, place], grid[:, channel, row::2, column::2])
    assert torch.equal(unpack_positions(packed, order), grid)
    with pytest.raises(ValueError, match="expected even sides to pack 2x2 positions, got 3x6"):
        pack_positions(grid[:, :, :3], order)


@pytest.mark.parametrize(
    "name", ["Flux2Pipeline", "FluxPipeline", "QwenImagePipeline", "WanPipeline", "BriaFiboPipeline"]
)
def test_unpack_undoes_pack(name):
    space = PIPELINES[name].latent_space(8, 8, {"latents_mean": [0.0] * 8, "latents_std": [1.0] * 8})
    latents = torch.randn(2, 8, 4, 6)

    assert torch.equal(space.unpack(space.pack(latents), (4, 6)), latents)
    assert torch.equal(space.unpack(latents), latents)


def test_what_does_not_unpack_is_refused():
    space = LatentSpace(4, 8, tokens=2)
    for packed, size, message in (
        (torch.zeros(1, 6, 16), None, r"expected the size \(rows, columns\)"),
        (torch.zeros(1, 6, 16), (4, 8), "expected 8 tokens of 16 channels for latents of 4x8, got 6 of 16"),
        (torch.zeros(1, 4, 2, 4, 4), None, "expected one frame, got 2 frames"),
    ):
        with pytest.raises(ValueError, match=message):
            space.unpack(packed, size)


@pytest.mark.parametrize(
    "make, pipeline", [(flux2, "Ideogram4Pipeline"), (wan22, "WanPipeline"), (qwen, "Krea2Pipeline")]
)
def test_a_pipelines_folder_gives_its_space(make, pipeline, tmp_path):
    make().save_pretrained(tmp_path / "vae")
    (tmp_path / "model_index.json").write_text(f'{{"_class_name": "{pipeline}"}}')

    codec = LatentCodec.from_pretrained(tmp_path)

    assert codec.pipeline == pipeline
    assert codec.latent_space == LatentCodec(make(), pipeline=pipeline).latent_space
    bare = LatentCodec.from_pretrained(tmp_path, pipeline=PIPELINES[pipeline].pipelines[0])
    assert bare.fingerprint == codec.fingerprint


@pytest.mark.parametrize("make", [flux2, wan22, qwen])
def test_facts_are_read_without_building(make, tmp_path):
    LatentCodec(make()).save_pretrained(tmp_path)

    facts = read_facts(tmp_path)

    built = facts_of(LatentCodec.from_pretrained(tmp_path))
    assert replace(facts, config=built.config) == built
    assert facts.channels == built.channels and facts.position_sides == built.position_sides


def test_spaces_that_differ_have_other_fingerprints():
    autoencoder = flux2()
    names = ("Flux2Pipeline", "ErnieImagePipeline", "Ideogram4Pipeline", "BriaFibo2Pipeline")
    assert len({LatentCodec(autoencoder, pipeline=name).space_fingerprint for name in names}) == 4
    assert (
        LatentCodec(autoencoder).space_fingerprint
        == LatentCodec(autoencoder, pipeline=names[0]).space_fingerprint
    )


def test_pipelines_that_take_other_autoencoders_are_refused():
    for autoencoder, pipeline in (
        (flux2(), "WanPipeline"),
        (wan22(), "Flux2Pipeline"),
        (AutoencoderKL(), "Krea2Pipeline"),
    ):
        with pytest.raises(
            ValueError, match=f"{pipeline} takes .* of the class {type(autoencoder).__name__}"
        ):
            LatentCodec(autoencoder, pipeline=pipeline)
    with pytest.raises(ValueError, match=r"such as .*Flux2Pipeline, .*; got Flux3Pipeline"):
        LatentCodec(flux2(), pipeline="Flux3Pipeline")


def test_silent_deviations_are_the_pipelines():
    """Kandinsky 5 ignores FLUX.1's shift, GLM-Image the scale, SD 1 the shift."""
    statistics = {"latents_mean": [0.5] * 4, "latents_std": [2.0] * 4}
    config = {"scaling_factor": 0.5, "shift_factor": 0.1, **statistics}
    raw = torch.full((1, 4, 2, 2), 3.0)
    for pipeline, expected in {
        "StableDiffusionPipeline": 1.5,
        "Kandinsky5T2IPipeline": 1.5,
        "FluxPipeline": 1.45,
        "GlmImagePipeline": 1.25,
        "StableDiffusionXLPipeline": 0.625,
        "KandinskyV22Pipeline": 3.0,
        "SanaSprintPipeline": 0.75,
    }.items():
        latents = PIPELINES[pipeline].latent_space(4, 8, config).normalize(raw)
        np.testing.assert_allclose(latents, expected, rtol=1e-6, err_msg=pipeline)


STILLS = (
    "AutoencoderKLHunyuanVideo",
    "AutoencoderKLHunyuanVideo15",
    "AutoencoderKLHunyuanImageRefiner",
    "AutoencoderKLCogVideoX",
    "AutoencoderKLLTXVideo",
    "AutoencoderKLMagvit",
    "AutoencoderKLMochi",
    "AutoencoderKLCosmos",
    "AutoencoderKLKVAEVideo",
    "AutoencoderKLTemporalDecoder",
)


@torch.no_grad()
@pytest.mark.parametrize("name", STILLS)
def test_video_autoencoders_are_codecs_of_one_frame(name, tmp_path):
    """Latents are the class's own of one frame, scaled; saved, reopened and padded as any codec's."""
    autoencoder, given = build(name), images(height=64, width=96)
    codec = LatentCodec(autoencoder)

    latents = codec.encode(given)

    is_video = name != "AutoencoderKLTemporalDecoder"
    each = [
        autoencoder.encode(one.unsqueeze(2) if is_video else one).latent_dist.mode() for one in given.split(1)
    ]
    raw = torch.cat([one[:, :, 0] if is_video else one for one in each])
    torch.testing.assert_close(codec.latent_space.denormalize(latents), raw, rtol=0, atol=1e-5)
    factor = codec.latent_space.downsampling_factor
    assert latents.shape == (2, codec.latent_space.channels, 64 // factor, 96 // factor)
    codec.save_pretrained(tmp_path)
    again = LatentCodec.from_pretrained(tmp_path)
    assert again.fingerprint == codec.fingerprint
    assert again.decode(again.encode(images(height=50, width=70)), size=(50, 70))[0].size == (70, 50)


@torch.no_grad()
def test_cosmos_takes_the_statistics_of_the_first_frame():
    space = LatentCodec(build("AutoencoderKLCosmos")).latent_space
    np.testing.assert_allclose(space.mean, [0.0, 0.4, 0.8, 1.2])


@torch.no_grad()
def test_the_refiners_denoiser_is_handed_every_channel_twice():
    autoencoder, given = build("AutoencoderKLHunyuanImageRefiner"), images(height=64, width=96)
    codec = LatentCodec(autoencoder, pipeline="HunyuanImageRefinerPipeline")

    packed = codec.latent_space.pack(codec.encode(given))

    own = HunyuanImageRefinerPipeline._reorder_image_tokens(
        autoencoder.encode(given.unsqueeze(2)).latent_dist.mode()
    )
    torch.testing.assert_close(packed, own * autoencoder.config.scaling_factor, rtol=0, atol=1e-5)
    restored = HunyuanImageRefinerPipeline._restore_image_tokens_order(packed)
    assert torch.equal(codec.latent_space.unpack(packed), restored[:, :, 0])


@torch.no_grad()
def test_stable_cascades_latents_are_times_its_scale_when_decoded():
    autoencoder = build("PaellaVQModel")
    codec, given = LatentCodec(autoencoder), images()

    latents = codec.encode(given)

    raw = autoencoder.encode((given + 1) / 2).latents
    torch.testing.assert_close(latents * autoencoder.config.scale_factor, raw, rtol=0, atol=1e-5)
    expected = autoencoder.decode(autoencoder.config.scale_factor * latents).sample.clamp(0, 1)
    torch.testing.assert_close((codec.decode(latents, output_type="pt") + 1) / 2, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_consistency_decoder_answers_the_same_each_time():
    autoencoder = build("ConsistencyDecoderVAE")
    codec = LatentCodec(autoencoder)
    latents = codec.encode(images())
    assert torch.equal(codec.decode(latents, output_type="pt"), codec.decode(latents, output_type="pt"))


@torch.no_grad()
def test_rae_takes_squares_of_one_size():
    autoencoder = build("AutoencoderRAE")
    codec, given = LatentCodec(autoencoder), images(height=32, width=32)

    latents = codec.encode(given)

    assert latents.shape == (2, 64, 4, 4)
    torch.testing.assert_close(latents, autoencoder.encode((given + 1) / 2).latent, rtol=0, atol=1e-5)
    assert codec.decode(latents)[0].size == (32, 32)
    with pytest.raises(
        ValueError, match="expected images of 32x32 pixels, the one size that AutoencoderRAE takes, got 32x48"
    ):
        codec.encode(images())


@torch.no_grad()
@pytest.mark.parametrize(
    ("make", "tile"),
    [(make, 24) for make in (flux2, wan21, wan22, qwen, qwen21)] + [(wan21, tile) for tile in (16, 40, 1000)],
)
def test_tiles_are_exact(make, tile):
    family = LatentCodec(make().double()).family
    given = images(family.channels, 64, 96).double()

    moments = family.encode_raw(given).posterior.parameters
    raw = moments.chunk(2, dim=1)[0]

    tiled = family.encode_raw(given, tile).posterior.parameters
    torch.testing.assert_close(tiled, moments, rtol=0, atol=1e-10)
    torch.testing.assert_close(family.decode_raw(raw, tile), family.decode_raw(raw), rtol=0, atol=1e-10)


def test_latent_files_record_the_pipeline(tmp_path):
    codec = LatentCodec(flux2(), name="mine", pipeline="Ideogram4Pipeline")
    save_latents(
        tmp_path / "a.safetensors",
        codec.encode(images()),
        codec=codec,
        names=["a", "b"],
        sizes=[(32, 48)] * 2,
    )

    file = load_latents(tmp_path / "a.safetensors", codec=codec)

    assert file.pipeline == "Ideogram4Pipeline"
    with pytest.raises(ValueError, match=r"of mine for Ideogram4Pipeline \(space .*, not of other \(space"):
        file.check(LatentCodec(flux2(), name="other"))
