"""Verbs that take a data set of latents in the place of images give what they give of the images."""

import json

import diffusers
import numpy as np
import pytest
import torch
from helpers.commands import fails
from PIL import Image
from safetensors.torch import load_file

from latent_codec import LatentCodec, LatentDataset
from latent_codec.cli import main
from latent_codec.images.sources import open_source
from latent_codec.images.tensors import to_image
from latent_codec.latents.encoding import encode_data_set
from latent_codec.latents.plan import EncodingOptions
from latent_codec.previews import LatentPreviewer

BLOCKS = {
    "block_out_channels": (8, 8),
    "norm_num_groups": 4,
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A codec, eight photographs in two classes, and their latents: the means, and whole posteriors."""
    folder = tmp_path_factory.mktemp("place")
    torch.manual_seed(0)
    codec = LatentCodec(diffusers.AutoencoderKL(**BLOCKS))
    codec.save_pretrained(folder / "mine")
    codec = LatentCodec.from_pretrained(folder / "mine")
    for number in range(8):
        path = folder / "photos" / ("cat", "dog")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (4, 4, 3), np.uint8)
        Image.fromarray(pixels).resize((32, 32)).save(path)
    source = open_source(folder / "photos")
    for name, options in {
        "latents": EncodingOptions(container="webdataset", images_per_shard=3),
        "posteriors": EncodingOptions(container="parquet", posterior="both"),
    }.items():
        encode_data_set(codec, source, folder / name, options, num_workers=0)
    LatentCodec(diffusers.AutoencoderKL(**BLOCKS)).save_pretrained(folder / "other")
    return folder


@pytest.fixture(autouse=True)
def there(place, monkeypatch):
    monkeypatch.chdir(place)


def told(capsys, *argv) -> dict:
    capsys.readouterr()
    assert main([*argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("pooling", ["mean-std", "pyramid", "whole"])
def test_features_of_latents_are_those_of_the_images(pooling, capsys):
    told(capsys, "features", "photos", "--codec", "mine", "--pooling", pooling, "--out", "a.safetensors")
    found = told(capsys, "features", "latents", "--pooling", pooling, "--out", "b.safetensors")
    assert (found["codec"], found["num_images"]) == ("mine", 8)
    one, other = load_file("a.safetensors"), load_file("b.safetensors")
    torch.testing.assert_close(one["vectors"], other["vectors"], atol=1e-5, rtol=1e-5)
    assert told(capsys, "features", "latents", "--limit", "3", "--out", "c.safetensors")["num_images"] == 3


def test_what_needs_images_says_so(capsys):
    assert "--layer: expected images" in fails(capsys, "features", "latents", "--layer", "mid_block")
    assert "--pooling: expected another, as latents holds latents" in fails(
        capsys, "features", "latents", "--pooling", "histogram"
    )
    assert "latents is a data set of latents, and evaluate needs images" in fails(
        capsys, "evaluate", "latents"
    )
    assert "--tiny: expected images" in fails(
        capsys, "fit-preview", "latents", "--codec", "mine", "--tiny", "--out", "copy"
    )
    for argv in (
        ("features", "latents"),
        ("calibrate", "latents"),
        ("fit-preview", "latents", "--out", "copy"),
    ):
        message = fails(capsys, *argv, "--codec", "other")
        assert "latents holds latents of mine (space" in message and message.count("\n") <= 1


def test_calibrating_on_latents_measures_what_the_images_measure(capsys):
    of_images = told(capsys, "calibrate", "photos", "--codec", "mine", "--out", "a", "--keep-space")[
        "measured"
    ]
    of_latents = told(capsys, "calibrate", "posteriors", "--codec", "mine", "--out", "b", "--keep-space")[
        "measured"
    ]
    for name in ("mean", "std"):
        np.testing.assert_allclose(of_latents[name], of_images[name], rtol=1e-4, atol=1e-4)
    assert of_latents["num_images"] == 8
    assert len(of_latents["parity"]) == 3


@pytest.mark.parametrize("folder", ["latents", "posteriors"])
def test_a_data_set_is_decoded(folder, place, capsys, tmp_path):
    assert main(["decode", folder, "--codec", "mine", "--out", str(tmp_path)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{number}.png" for number in range(8)]
    codec = LatentCodec.from_pretrained("mine")
    expected = to_image(codec.roundtrip(place / "photos" / "cat" / "0.png")[0])
    torch.testing.assert_close(to_image(tmp_path / "0.png"), expected, atol=2 / 127.5, rtol=0)  # of 8 bits


def test_a_preview_is_fitted_to_latents_and_their_decodes(capsys):
    told(capsys, "fit-preview", "latents", "--codec", "mine", "--out", "previewed")
    previewer = LatentPreviewer.from_pretrained("previewed", kind="linear")
    assert previewer(LatentDataset("latents")[0]["latents"][None]).shape == (1, 3, 16, 16)


def test_info_counts_verifies_and_draws_a_sheet(capsys, place, tmp_path):
    facts = told(capsys, "info", "latents", "--sheet", str(tmp_path / "a.png"), "--codec", "mine")
    assert facts["kind"] == "data set of latents" and facts["sizes"] == {"32x32": 8}
    assert (facts["images"], facts["labelled"], facts["shards"]) == (8, 8, 3)
    assert facts["checksums"] == "3 of 3 shards are as they were written"
    assert facts["sheet_shows"] == "images decoded by mine"
    assert to_image(tmp_path / "a.png").shape[1] > 90
    told(capsys, "info", "latents", "--sheet", str(tmp_path / "b.png"))
    assert not torch.equal(to_image(tmp_path / "a.png"), to_image(tmp_path / "b.png"))
    assert main(["info", "latents"]) == 0
    assert "space fingerprint" in capsys.readouterr().out


def test_info_names_damaged_and_missing_shards(capsys, place, tmp_path):
    import shutil

    shutil.copytree(place / "latents", tmp_path / "latents")
    first, second, _ = sorted((tmp_path / "latents" / "shards").glob("*.tar"))
    content = bytearray(first.read_bytes())
    content[700] ^= 1
    first.write_bytes(content)
    second.unlink()
    assert main(["info", str(tmp_path / "latents"), "--json"]) == 2
    out, err = capsys.readouterr()
    assert [line.rpartition("/")[2] for line in json.loads(out)["damaged_shards"]] == [
        f"{first.name} is damaged: its checksum differs",
        f"{second.name} is missing",
    ]
    assert err.count("\n") == 1 and f"{second.name} is missing" in err
    assert main(["info", str(tmp_path / "latents"), "--no-checksums", "--json"]) == 2
    assert "--sheet and --no-checksums are for data sets" in fails(capsys, "info", "mine", "--sheet", "a.png")


def test_import_latents(capsys, place, tmp_path):
    np.save(tmp_path / "cat.npy", np.random.default_rng(0).normal(size=(4, 8, 8)).astype(np.float32))
    argv = "import-latents", str(tmp_path / "cat.npy"), "--out", str(tmp_path / "latents")
    assert "--codec: expected the codec whose latents these are" in fails(capsys, *argv)
    assert "expected --raw or --scaled" in fails(capsys, *argv, "--codec", "mine")
    found = told(capsys, *argv, "--codec", "mine", "--scaled")
    assert (found["images"], found["codec"]) == (1, "mine")
    assert main([*argv[:3], str(tmp_path / "raw"), "--codec", "mine", "--raw"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("1 images of mine") and "Note: the standard deviation of the latents is 0.18" in err
