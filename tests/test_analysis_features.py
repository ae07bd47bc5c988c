"""A vector of each image: pooled, of a layer, of codes; in files."""

import csv
import json
import os

import pytest
import torch
from helpers.autoencoders import build
from helpers.commands import fails
from helpers.training import write_images
from safetensors.torch import load_file, save_file

from latent_codec import LatentCodec, extract_features
from latent_codec.analysis.features import load_features, save_features
from latent_codec.cli import main
from latent_codec.components.weight_files import metadata_of
from latent_codec.evaluation.one_vector import fit_image, vector_side
from latent_codec.images.sources import open_source


@pytest.fixture(scope="module")
def codec():
    return LatentCodec(build("AutoencoderKL"), name="mine")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Three images of 24x24 and one of 24x40."""
    folder = write_images(tmp_path_factory.mktemp("images"), count=3)
    write_images(folder / "wide", count=1, size=(24, 40))
    return open_source(folder)


def close(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_pooling_is_what_it_says(codec, source):
    latents = codec.encode(source.image(0))[0]
    channels, height, width = latents.shape

    found = extract_features(source, codec)
    assert found.pooling == "mean-std" and found.vectors.shape == (4, 2 * channels)
    close(found.vectors[0], torch.cat((latents.mean((1, 2)), latents.std((1, 2), correction=0))))

    pyramid = extract_features(source, codec, pooling="pyramid").vectors[0]
    assert len(pyramid) == 21 * channels
    close(pyramid[:channels], latents.mean((1, 2)))
    corners = latents[:, : height // 2, : width // 2].mean((1, 2))
    close(pyramid[channels : 5 * channels : 4], corners)

    with pytest.raises(
        ValueError, match=r"expected images of one size for whole, got .* 144 and 240 numbers"
    ):
        extract_features(source, codec, pooling="whole")
    whole = extract_features(source, codec, pooling="whole", side=16)
    assert whole.vectors.shape == (4, channels * 16) and whole.side == 16


def test_a_histogram_is_the_shares_of_codewords(source):
    codec = LatentCodec(build("HierarchicalVQ"))
    found = extract_features(source, codec)
    top, bottom = codec.encode_indices(source.image(0))
    assert found.pooling == "histogram" and found.vectors.shape == (4, sum(codec.codebook_sizes))
    counts = [torch.bincount(each.flatten(), minlength=16) / each.numel() for each in (top, bottom)]
    close(found.vectors[0], torch.cat(counts))


@pytest.mark.parametrize(
    "name, layer",
    [
        ("AutoencoderKL", "mid_block"),
        ("HierarchicalVQ", "encoders.1"),
        ("AutoencoderTiny", "layers"),
        ("AutoencoderDC", "down_blocks.0"),
        ("AutoencoderKLWan", "mid_block"),
        ("AutoencoderKLHunyuanVideo15", "mid_block"),
        ("AutoencoderRAE", "encoder"),
    ],
)
def test_a_layer_of_every_family_has_features(name, layer, source):
    codec = LatentCodec(build(name))
    found = extract_features(source, codec, layer=layer, limit=2)
    assert found.vectors.shape[0] == 2 and found.vectors.shape[1] > 0 and found.layer == layer
    assert not any(module._forward_hooks for module in codec.autoencoder.modules())


def test_a_codec_of_one_vector_gets_images_as_it_was_trained():
    codec = LatentCodec(build("AutoencoderKL", sample_size=4))
    assert vector_side(codec) == 4
    assert fit_image(torch.zeros(3, 9, 12), codec).shape == (3, 4, 4)
    assert fit_image(torch.zeros(3, 3, 5), codec).shape == (3, 3, 3)  # which `encode` continues to 4x4
    grids = LatentCodec(build("AutoencoderKL"))
    assert vector_side(grids) is None
    assert fit_image(torch.zeros(3, 9, 12), grids).shape == (3, 9, 12)
    assert fit_image(torch.zeros(3, 9, 12), LatentCodec(build("AutoencoderRAE"))).shape == (3, 32, 32)


def test_the_whole_of_one_vector_are_its_latents(source):
    codec = LatentCodec(build("AutoencoderKL", sample_size=4))
    found = extract_features(source, codec)
    assert found.pooling == "whole" and found.vectors.shape == (4, 4)
    close(found.vectors[:1], codec.encode(fit_image(source.image(0), codec)).flatten(1))


def test_what_is_saved_is_loaded(codec, source, tmp_path):
    found = extract_features(source, codec)
    save_features(found, path := tmp_path / "features.safetensors")
    again = load_features(path)
    assert torch.equal(again.vectors, found.vectors) and again.to_dict() == found.to_dict()
    assert (again.names, again.indices, again.labels) == (found.names, found.indices, found.labels)
    with pytest.raises(ValueError, match=r"features of mine .*, not of other .*; use the codec mine"):
        again.check(LatentCodec(build("AutoencoderKL", latent_channels=2), name="other"))


@pytest.mark.parametrize(
    "changes", [{"names": 3}, {"labels": None}, {"pooling": "max"}, {"surplus": 1}, None]
)
def test_a_damaged_file_is_refused(codec, source, tmp_path, changes):
    save_features(extract_features(source, codec), path := tmp_path / "features.safetensors")
    metadata, tensors = metadata_of(path), load_file(path)
    told = json.loads(metadata["features"])
    metadata["features"] = json.dumps(None if changes is None else told | changes)
    save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match=r"features.safetensors is damaged"):
        load_features(path)
    save_file(tensors | {"vectors": torch.ones(4)}, path, metadata | {"features": json.dumps(told)})
    with pytest.raises(ValueError, match=r"features.safetensors is damaged"):
        load_features(path)


def test_names_need_not_be_utf8(codec, source, tmp_path):
    found = extract_features(source, codec)
    save_features(found, path := tmp_path / os.fsdecode(b"caf\xe9.safetensors"))
    assert load_features(path).to_dict() == found.to_dict()


def test_the_verb_writes_a_file_and_a_table(codec, source, tmp_path, capsys):
    codec.save_pretrained(tmp_path / "codec")
    argv = [
        source.root,
        "--codec",
        tmp_path / "codec",
        "--out",
        tmp_path / "f.safetensors",
        "--csv",
        "--json",
    ]
    assert main(["features", *map(str, argv)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["num_images"] == 4 and told["num_features"] == 8 and told["pooling"] == "mean-std"
    assert main(["info", str(tmp_path / "f.safetensors"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out).items() >= {"kind": "features", "num_features": 8}.items()
    vectors = load_file(tmp_path / "f.safetensors")["vectors"]
    with open(tmp_path / "f.csv", newline="") as file:
        headings, *rows = csv.reader(file)
    assert headings[:3] == ["name", "label", "feature_0"] and len(rows) == 4
    close(torch.tensor([float(value) for value in rows[3][2:]]), vectors[3])


def test_bad_input_is_one_line(codec, source, tmp_path, capsys):
    codec.save_pretrained(tmp_path / "codec")
    given = ("features", source.root, "--codec", tmp_path / "codec")
    words = fails(capsys, *given, "--out", tmp_path / "f.csv")
    assert "--out: expected a name that ends in .safetensors" in words
    out = ("--out", tmp_path / "f.safetensors")
    words = fails(capsys, *given, *out, "--pooling", "max")
    assert "--pooling: expected one of whole, mean-std, pyramid, histogram, got 'max'" in words
    words = fails(capsys, *given, *out, "--pooling", "histogram")
    assert "no codebook" in words and "--pooling mean-std" in words
    words = fails(capsys, *given, *out, "--layer", "middle")
    assert "--layer: expected a module of the encoder, got 'middle'; " in words
    assert "mid_block" in words
    words = fails(capsys, *given, *out, "--layer", "decoder")
    assert "--layer: expected a module of the encoder" in words
    words = fails(capsys, *given, *out, "--pooling", "pyramid", "--side", "8")
    assert "expected a grid of at least 4x4 for pyramid, got '2x2'" in words
    assert not (tmp_path / "f.safetensors").exists()
