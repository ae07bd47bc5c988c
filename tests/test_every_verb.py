"""A codec of every class through the verbs: sizes, RGBA where its images have it, latents by pipeline, bad input."""

import json

import numpy as np
import pytest
import torch
from helpers.autoencoders import CONFIGS, build
from helpers.commands import fails
from PIL import Image

from latent_codec import LatentCodec
from latent_codec.cli import main
from latent_codec.cli.work.codec_copies import folder_for_sidecar
from latent_codec.evaluation.latents import LatentMeter
from latent_codec.evaluation.meters import Batch
from latent_codec.families import FAMILIES
from latent_codec.families.pipeline_spaces import PIPELINES

COMPRESSED = ("AutoencoderDC", "AutoencoderKLQwenImage21", "VQModel", "ConsistencyDecoderVAE")
"""One of each kind, as fitting takes a second or two: without a posterior, RGBA, indices, sampled images."""
MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def run(*argv) -> None:
    assert main(list(map(str, argv))) == 0


def write_image(path, width: int, height: int, channels: int = 3):
    """A smooth image, with some of it transparent where it has four channels."""
    coarse = np.random.default_rng(1).integers(0, 256, (3, 4, channels), np.uint8)
    Image.fromarray(coarse, MODES[channels]).resize((width, height), Image.BILINEAR).save(path)
    return path


@pytest.mark.parametrize("name", CONFIGS)
def test_images_come_back_from_every_class(name, tmp_path, capsys):
    autoencoder = build(name)
    made = LatentCodec(autoencoder)
    made.save_pretrained(codec := tmp_path / "codec")
    size = (32, 32) if name == "AutoencoderRAE" else (37, 50)
    image = write_image(tmp_path / "cat.png", *size, made.channels)
    mode = MODES[made.channels]

    run("info", codec, "--json")
    facts = json.loads(capsys.readouterr().out)
    run("encode", image, "--codec", codec, "--latents", "--out", tmp_path)
    run("decode", tmp_path / "cat.safetensors", "--codec", codec, "--out", tmp_path / "decoded")
    if name in COMPRESSED:
        run("fit-entropy", image, "--codec", codec, "--static")
        run("compress", image, "--codec", codec, "--out", tmp_path)
        run("decompress", tmp_path / "cat.lcf", "--codec", codec, "--out", tmp_path / "decompressed")

    assert facts["class"] == type(autoencoder).__name__ and facts["pipeline"] is None
    assert facts["fingerprint"] == made.fingerprint
    for folder in ("decoded", "decompressed") if name in COMPRESSED else ("decoded",):
        with Image.open(tmp_path / folder / "cat.png") as found:
            assert (found.size, found.mode) == (size, mode)
    again = np.asarray(Image.open(tmp_path / "decoded" / "cat.png"))
    expected = np.asarray(made.decode(made.encode(image), size=size[::-1])[0])
    assert np.abs(again.astype(int) - expected).max() <= 1  # encoded in a file and reopened


def test_a_context_model_is_fitted_where_the_decoder_hardly_notices_a_channel(tmp_path):
    autoencoder = build("AutoencoderTiny")
    autoencoder.decoder.layers[0].weight.data[:, 0] *= 1e-5
    LatentCodec(autoencoder).save_pretrained(codec := tmp_path / "codec")
    image = write_image(tmp_path / "cat.png", 64, 64)
    small = (
        "--set=run.steps=1",
        "--set=data.height=32",
        "--set=data.held_out=0",
        "--set=model.arguments.hidden=8",
    )
    run("fit-entropy", image, "--codec", codec, "--run", tmp_path / "run", *small)
    run("compress", image, "--codec", codec, "--out", tmp_path)
    run("decompress", tmp_path / "cat.lcf", "--codec", codec, "--out", tmp_path / "back")
    assert Image.open(tmp_path / "back" / "cat.png").size == (64, 64)


def test_rate_distortion_of_transparent_images_is_refused_with_what_measures_them(tmp_path, capsys):
    LatentCodec(build("AutoencoderKLQwenImage21")).save_pretrained(codec := tmp_path / "codec")
    image = write_image(tmp_path / "cat.png", 64, 64, channels=4)
    words = fails(capsys, "rd", image, "--codec", codec, "--out", tmp_path)
    assert "expected gray or RGB" in words and "compress --psnr" in words and "`evaluate`" in words


@pytest.fixture(scope="module")
def flux2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flux2")
    LatentCodec(build("AutoencoderKLFlux2")).save_pretrained(folder / "vae")
    return folder / "vae"


def test_kl_is_measured_for_each_packed_channel(flux2, tmp_path):
    codec = LatentCodec.from_pretrained(flux2)
    image = codec.roundtrip(write_image(tmp_path / "cat.png", 64, 64), output_type="pt")
    meter = LatentMeter(codec.latent_space.channels, codec.latent_space.arrange)

    encoding = codec.encode_all(image)
    meter.add(Batch(originals=image, encoding=encoding, reconstructions=image))

    posterior = encoding.posterior
    kl = (posterior.mean.square() + posterior.var - 1 - posterior.logvar) / 2
    packed = kl.mean(dim=0).unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).mean(dim=(1, 3)).flatten()
    torch.testing.assert_close(torch.tensor(meter.result().kl), packed, rtol=1e-4, atol=1e-6)


def test_a_file_is_decoded_for_the_pipeline_that_it_names(flux2, tmp_path, capsys):
    image, ideogram = write_image(tmp_path / "cat.png", 48, 32), "Ideogram4Pipeline"
    run("encode", image, "--codec", flux2, "--for-pipeline", ideogram, "--out", tmp_path)
    run("info", tmp_path / "cat.safetensors", "--json")
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["pipeline"] == ideogram

    run("decode", tmp_path / "cat.safetensors", "--codec", flux2, "--out", tmp_path / "decoded")

    codec = LatentCodec.from_pretrained(flux2)
    decoded = np.asarray(Image.open(tmp_path / "decoded" / "cat.png")).astype(int)
    assert np.abs(decoded - np.asarray(codec.decode(codec.encode(image))[0])).max() <= 1
    words = fails(
        capsys, "decode", tmp_path / "cat.safetensors", "--codec", flux2, "--for-pipeline", "Flux2Pipeline"
    )
    assert "for Ideogram4Pipeline" in words and "for Flux2Pipeline" in words


def test_info_says_whose_latents_it_shows(flux2, capsys):
    run("info", flux2)
    words = capsys.readouterr().out
    assert "as FLUX.2's pipelines see them, the usual ones of AutoencoderKLFlux2" in words
    assert "2x2 positions are packed into channels, ordered channel, row, column" in words
    assert "--for-pipeline names one" in words

    run("info", flux2, "--for-pipeline", "Ideogram4Pipeline")
    words = capsys.readouterr().out
    assert "as Ideogram4Pipeline sees them (Ideogram 4)" in words
    assert "row, column, channel; the denoiser takes each position as a token" in words
    assert "--for-pipeline" not in words


def test_what_is_fitted_for_a_pipeline_is_found_for_it(tmp_path):
    """A copy that a sidecar goes to is the codec, as the pipeline sees it: here without its shift."""
    named = ("--for-pipeline", "StableDiffusionPipeline")
    LatentCodec(build("AutoencoderKL", shift_factor=0.5)).save_pretrained(codec := tmp_path / "codec")
    image, copy = write_image(tmp_path / "cat.png", 64, 64), tmp_path / "copy"
    run("fit-entropy", image, "--codec", codec, *named, "--static", "--out", copy)
    assert folder_for_sidecar(str(codec), LatentCodec.from_pretrained(codec, pipeline=named[1]), copy) == copy
    run("compress", image, "--codec", copy, *named, "--out", tmp_path)
    run("decompress", tmp_path / "cat.lcf", "--codec", copy, *named, "--out", tmp_path / "back")
    assert Image.open(tmp_path / "back" / "cat.png").size == (64, 64)


def test_pipelines_of_other_classes_are_refused_in_one_line(flux2, tmp_path, capsys):
    image = write_image(tmp_path / "cat.png", 64, 64)
    words = fails(capsys, "encode", image, "--codec", flux2, "--for-pipeline", "WanPipeline")
    assert "WanPipeline takes AutoencoderKLWan" in words and "of the class AutoencoderKLFlux2" in words
    words = fails(capsys, "encode", image, "--codec", flux2, "--for-pipeline", "Flux3Pipeline")
    assert "Flux2Pipeline" in words and "got Flux3Pipeline" in words

    (tmp_path / "model_index.json").write_text('{"_class_name": "QwenImagePipeline"}')
    LatentCodec(build("AutoencoderKL")).save_pretrained(tmp_path / "vae")
    words = fails(capsys, "roundtrip", image, "--codec", tmp_path, "--out", tmp_path)
    assert "QwenImagePipeline takes AutoencoderKLQwenImage" in words and "AutoencoderKL;" in words


@pytest.mark.parametrize(
    "name, pipeline",
    [
        ("AutoencoderRAE", "FluxPipeline"),
        ("AutoencoderKLMochi", "WanPipeline"),
        ("AutoencoderKL", "KandinskyV22Pipeline"),
        ("HierarchicalVQ", "StableDiffusionPipeline"),
    ],
)
def test_a_pipeline_takes_what_it_calls_as_its_own(name, pipeline):
    codec = LatentCodec(build(name))
    with pytest.raises(ValueError, match=f"{pipeline} takes .* of the class {name}"):
        codec.family.check_pipeline(pipeline, name)


def test_every_pipeline_takes_the_classes_of_its_row():
    for name, row in PIPELINES.items():
        for class_name in row.autoencoders:
            FAMILIES[class_name].check_pipeline(name, class_name)


@pytest.mark.parametrize("frames", [torch.zeros(1, 3, 2, 16, 16), np.zeros((1, 2, 16, 16, 3), np.uint8)])
def test_frames_are_refused(frames):
    codec = LatentCodec(build("AutoencoderKL"), name="mine")
    with pytest.raises(
        ValueError, match=r"mine: expected images, which have no frames, got .* \(1, .*one by one"
    ):
        codec.encode(frames)
