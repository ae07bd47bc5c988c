"""Traversals: one dimension of a latent vector at a time, sorted by what it says."""

import json

import pytest
import torch
from helpers.autoencoders import build
from helpers.commands import fails
from helpers.one_vector import LabelledImages, one_vector_codec
from helpers.training import write_images
from PIL import Image

from latent_codec import LatentCodec
from latent_codec.analysis.traversals import traverse
from latent_codec.cli import main


@pytest.fixture(scope="module")
def codec() -> LatentCodec:
    """With another scale and shift than 1 and 0."""
    return one_vector_codec(scaling_factor=0.5, shift_factor=0.25)


def noise(count: int) -> LabelledImages:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, 8, 8), generator=generator).byte()
    return LabelledImages(images, [None] * count)


def test_a_row_sets_one_dimension_of_the_prior(codec):
    found = traverse(codec, values=(-1, 0, 2))
    assert sorted(each.index for each in found) == [0, 1, 2, 3] and all(each.kl is None for each in found)
    assert [each.change for each in found] == sorted((each.change for each in found), reverse=True)
    for each in found:
        raw = torch.zeros(3, 4, 1, 1)
        raw[:, each.index] = torch.tensor([-1.0, 0, 2]).view(3, 1, 1)
        with torch.no_grad():
            expected = codec.autoencoder.decode(raw).sample.clamp(-1, 1)
        torch.testing.assert_close(each.images, expected, rtol=0, atol=1e-5)
        change = (expected[2] - expected[0]).square().mean().sqrt()
        assert each.change == pytest.approx(float(change), abs=1e-5)


def test_dimensions_are_sorted_by_kl(codec):
    source = noise(20)
    found = traverse(codec, source, image=source.image(0))
    posterior = codec.posterior(torch.stack([source.image(index) for index in range(20)]))
    kl = (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean(0).flatten() / 2
    assert [each.index for each in found] == kl.argsort(descending=True).tolist()
    torch.testing.assert_close(torch.tensor([each.kl for each in found]), kl.sort(descending=True).values)

    raw = codec.posterior(source.image(0)).mean.repeat(7, 1, 1, 1)
    raw[:, found[0].index] = torch.arange(-3.0, 4).view(7, 1, 1)
    torch.testing.assert_close(
        found[0].images, codec.autoencoder.decode(raw).sample.clamp(-1, 1), rtol=0, atol=1e-4
    )


def test_without_posterior_values_are_standard_deviations_from_the_mean():
    config = {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4}
    blocks = {"num_encoder_blocks": (1,) * 4, "num_decoder_blocks": (1,) * 4}
    autoencoder = build("AutoencoderTiny", **config, **blocks)
    autoencoder.register_to_config(sample_size=8)
    codec, source = LatentCodec(autoencoder), noise(20)
    found = traverse(codec, source, values=(-1, 1))
    latents = codec.encode(torch.stack([source.image(index) for index in range(20)]))
    mean, std = latents.mean(0, keepdim=True), latents.std(0, correction=0)
    moved = mean.repeat(2, 1, 1, 1)
    moved[:, found[0].index] += torch.tensor([-1.0, 1]).view(2, 1, 1) * std[found[0].index]
    assert found[0].kl is None
    torch.testing.assert_close(found[0].images, codec.decode(moved, output_type="pt"), rtol=0, atol=1e-4)


def test_the_verb(codec, tmp_path, capsys):
    codec.save_pretrained(mine := tmp_path / "mine")
    images, out = write_images(tmp_path / "images", 4), tmp_path / "seen.png"
    common = ["--codec", mine, "--out", out]
    assert main(["traverse", str(images), *map(str, common), "--top", "2", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    kl = [each["kl_nats"] for each in facts["dimensions"]]
    assert len(kl) == 4 and kl == sorted(kl, reverse=True) and facts["kl_nats"] == pytest.approx(sum(kl))
    with Image.open(out) as sheet:
        assert sheet.height < 3 * 64 + 40 and sheet.width > 7 * 64
    assert main(["traverse", *map(str, common), "--values", "-1", "1"]) == 0
    assert "no KL without DATA" in capsys.readouterr().out

    LatentCodec(build("AutoencoderKL")).save_pretrained(tmp_path / "grid")
    words = fails(capsys, "traverse", "--codec", tmp_path / "grid", "--out", out)
    assert "a traversal needs a codec with one vector per image, and grid has a grid of latents" in words
    assert f"{tmp_path} is a folder; give an image's name" in fails(capsys, "traverse", "--out", tmp_path)
    assert "--values: expected finite numbers, got nan" in fails(
        capsys, "traverse", *common, "--values", "nan"
    )
