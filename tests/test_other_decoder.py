"""Other decoders for the same latents: smaller ones, ones that enlarge, how they start, and what is refused."""

import shutil

import diffusers
import pytest
import torch
from helpers.autoencoders import build
from helpers.training import tiny_config, write_images

from latent_codec import AutoencoderKLOtherDecoder, LatentCodec, SettingError, evaluate
from latent_codec.cli import main
from latent_codec.evaluation.host_findings import factor_limits
from latent_codec.images.tensors import shrunk_by
from latent_codec.models.autoencoder_kl_other_decoder import with_other_decoder
from latent_codec.models.other_decoder_start import start_other_decoder
from latent_codec.training.config import dump_toml


@pytest.fixture(scope="module")
def known():
    """An AutoencoderKL of widths 8, 8, 16 whose decoder's layers all do something."""
    return build("AutoencoderKL").eval()


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("photos"), 3, size=(32, 32))


def test_another_decoder_leaves_the_latents_and_opens_again(known, tmp_path):
    codec = LatentCodec(known)
    narrow = with_other_decoder(known, width=0.5, layers_per_block=0)
    assert isinstance(narrow, diffusers.AutoencoderKL)
    assert narrow.config.decoder_block_out_channels == [4, 4, 8]
    assert [len(block.resnets) for block in narrow.decoder.up_blocks] == [1, 1, 1]
    LatentCodec(narrow).save_pretrained(tmp_path / "narrow")

    again = LatentCodec.from_pretrained(tmp_path / "narrow")
    assert type(again.autoencoder) is AutoencoderKLOtherDecoder
    assert again.space_fingerprint == codec.space_fingerprint and again.fingerprint != codec.fingerprint
    image = torch.rand(1, 3, 30, 32) * 2 - 1
    torch.testing.assert_close(again.encode(image), codec.encode(image), rtol=0, atol=0)
    assert again.roundtrip(image, output_type="pt").shape == image.shape


def test_an_enlarging_decoder_gives_larger_images_also_in_tiles(known):
    codec = LatentCodec(with_other_decoder(known, upscale=2))
    image = torch.rand(1, 3, 30, 29) * 2 - 1
    latents = codec.encode(image)

    whole = codec.decode(latents, size=(30, 29), output_type="pt")
    assert whole.shape == (1, 3, 60, 58) and codec.decode(latents)[0].size == (64, 64)
    tiled = codec.decode(latents, size=(30, 29), output_type="pt", tile=16)
    torch.testing.assert_close(tiled, whole, rtol=0, atol=1e-5)  # sums are rounded in another order
    codec.autoencoder.enable_tiling()
    codec.autoencoder.tile_sample_min_size, codec.autoencoder.tile_latent_min_size = 16, 4
    assert codec.autoencoder.decode(latents).sample.shape == (1, 3, 64, 64)
    (finding,) = factor_limits(codec, by_config=4)
    assert "it takes 4 pixels per latent position, and 8 come out" in finding.reason
    with pytest.raises(ValueError, match="does not belong to these latents, which decode to 32x32"):
        codec.decode(latents, size=(60, 58))


@torch.no_grad()
def test_a_decoder_starts_near_the_known_one(known):
    latents = torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    wanted = known.decoder(latents)

    def error(**shape) -> float:
        other = with_other_decoder(known, **shape).eval()
        start_other_decoder(other.decoder, known.decoder, latents)
        given = other.decoder(latents)
        if "upscale" in shape:
            given = torch.nn.functional.pixel_shuffle(given, 2)[..., ::2, ::2]
        return float((given - wanted).square().mean() / wanted.var())

    assert error(upscale=2) < 1e-6  # every subpixel starts as its pixel
    same = AutoencoderKLOtherDecoder.from_config(known.config).eval()
    start_other_decoder(same.decoder, known.decoder, latents)
    torch.testing.assert_close(same.decoder(latents), wanted, rtol=0, atol=1e-4)
    assert error(layers_per_block=0) < 0.5 and error(width=0.5) < 0.5  # at random it would be above 1


@torch.no_grad()
def test_subpixels_start_as_the_best_linear_ones(known):
    latents = torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    images = torch.nn.functional.interpolate(known.decoder(latents), scale_factor=2, mode="bicubic")
    other = with_other_decoder(known, upscale=2).eval()
    start_other_decoder(other.decoder, known.decoder, latents, torch.nn.functional.pixel_unshuffle(images, 2))
    given = torch.nn.functional.pixel_shuffle(other.decoder(latents), 2)
    nearest = torch.nn.functional.interpolate(known.decoder(latents), scale_factor=2)
    assert (given - images).square().mean() < 0.8 * (nearest - images).square().mean()


def train(folder, photos, *settings: str, **sections) -> list[str]:
    """A command that gives the codec in `folder` another decoder, in four steps."""
    table = tiny_config(
        data={"height": 32},
        run={"steps": 4, "checkpoint_every": 2, "log_every": 4, "calibration_images": 1},
        objective={"posterior": "mean"},
        **sections,
    ).to_dict()
    del table["model"]["arguments"]
    table["model"] |= {"train": "decoder", "pretrained": "given by --codec"}
    (folder / "tiny.toml").write_text(dump_toml(table))
    command = ["train", str(folder / "tiny.toml"), "--codec", str(folder / "known"), "--data", str(photos)]
    chosen = (word for setting in settings for word in ("--set", setting))
    return [*command, "--out", str(folder / "run"), *chosen]


def test_a_distilled_decoder_keeps_its_space_and_resumes_exactly(known, photos, tmp_path, capsys):
    before = LatentCodec(known)
    before.save_pretrained(tmp_path / "known")
    command = train(tmp_path, photos, "model.width=0.5", "objective.target=decode")

    assert main(command) == 0, capsys.readouterr().err

    after = LatentCodec.from_pretrained(tmp_path / "run")
    assert type(after.autoencoder) is AutoencoderKLOtherDecoder
    assert after.space_fingerprint == before.space_fingerprint and after.latent_space == before.latent_space
    old, new = before.autoencoder.state_dict(), after.autoencoder.state_dict()
    assert all(torch.equal(old[key], new[key]) for key in old if not before.is_of_decoder(key))
    assert before.space_fingerprint in (tmp_path / "run" / "codec" / "README.md").read_text()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    shutil.rmtree(tmp_path / "run" / "codec")
    assert main(command) == 0
    assert LatentCodec.from_pretrained(tmp_path / "run").fingerprint == after.fingerprint


def test_an_enlarging_decoder_is_trained_and_measured_on_images_of_its_size(known, photos, tmp_path, capsys):
    before = LatentCodec(known)
    before.save_pretrained(tmp_path / "known")
    assert main(train(tmp_path, photos, "model.upscale=2")) == 0, capsys.readouterr().err
    codec = LatentCodec.from_pretrained(tmp_path / "run")
    assert codec.upscale == 2 and codec.space_fingerprint == before.space_fingerprint

    found = evaluate(photos, codec, limit=1)
    assert found.psnr.value > 0 and found.equivariance.half_size.value is None
    image = torch.rand(1, 3, 32, 32)
    torch.testing.assert_close(
        codec.decode(codec.encode(shrunk_by(image, 2)), output_type="pt").shape, image.shape
    )
    words = ["roundtrip", str(photos), "--codec", str(tmp_path / "run"), "--out", str(tmp_path / "out")]
    assert main(words) == 2
    assert "decodes to 2 times the size of what it encodes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["model.width=0.5", "model.train=all"],
            "model.width: expected its default where no new decoder is trained, got 0.5",
        ),
        (["objective.target=decode", "model.upscale=2"], 'expected "image" for a decoder that enlarges by 2'),
        (["objective.target=decode", "objective.posterior=sample"], "which both decoders decode"),
        (["model.widths=[4, 8, 24]"], "at most those that it has, [8, 8, 16]"),
        (["model.layers_per_block=3"], "at most as many as it has, 1, got 3"),
        (["model.upscale=2", "data.height=36"], "expected a multiple of 8"),
    ],
)
def test_what_does_not_fit_is_told_in_one_line(settings, message, known, photos, tmp_path, capsys):
    LatentCodec(known).save_pretrained(tmp_path / "known")
    assert main(train(tmp_path, photos, *settings)) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert message in line


def test_only_an_autoencoder_kl_gets_another_decoder():
    with pytest.raises(
        SettingError, match="expected an AutoencoderKL, where another decoder is asked for, got"
    ):
        with_other_decoder(build("AutoencoderVQ"), width=0.5)
