"""Attributes: a direction found in latents, its file, and images moved along it."""

import json
import math

import numpy as np
import pytest
import torch
from helpers.autoencoders import build
from helpers.commands import write_idx
from helpers.one_vector import LabelledImages, one_vector_codec, plain_image, ramps
from PIL import Image
from safetensors.torch import save_file

from latent_codec import LatentCodec, SettingError
from latent_codec.analysis.attributes import ENTRY, AttributeDirection, apply_attribute, fit_attribute
from latent_codec.cli import main
from latent_codec.components.weight_files import metadata_of

DARK, BRIGHT, RED = plain_image(10, 10, 10), plain_image(240, 240, 240), plain_image(240, 30, 30)


def latent(codec: LatentCodec, image: torch.Tensor) -> torch.Tensor:
    return codec.encode(image.float() / 127.5 - 1)[0]


def labelled(*groups: tuple[int, torch.Tensor, dict]) -> LabelledImages:
    """Equal images of each group, so that every share of them has the same means."""
    images = [(image, label) for count, image, label in groups for _ in range(count)]
    return LabelledImages(*zip(*images))


@pytest.fixture(scope="module")
def codec() -> LatentCodec:
    return one_vector_codec()


def test_the_direction_is_the_difference_of_means(codec):
    source = labelled((8, DARK, {"Bright": False}), (12, BRIGHT, {"Bright": True}))
    found = fit_attribute(codec, source, "Bright", held_out=0.4)
    torch.testing.assert_close(
        found.direction, latent(codec, BRIGHT) - latent(codec, DARK), rtol=0, atol=1e-5
    )
    assert found.auc == 1.0 and (found.num_images, found.num_held_out) == (12, 8)
    assert found.num_positive == 7 and found.label == "Bright" and found.codec == "tiny"

    moved = apply_attribute(codec, DARK.float() / 127.5 - 1, found, [0, 1])
    ends = codec.decode(torch.stack([latent(codec, DARK), latent(codec, BRIGHT)]), output_type="pt")
    torch.testing.assert_close(moved, ends, rtol=0, atol=1e-4)


def test_what_another_label_explains_is_left_out(codec):
    """Most bright images are red, too; at equal redness dark and bright ones differ as the gray ones do."""
    source = labelled(
        (12, DARK, {"Bright": 0, "Red": 0}),
        (8, BRIGHT, {"Bright": 1, "Red": 0}),
        (30, RED, {"Bright": 1, "Red": 1}),
    )
    gray = latent(codec, BRIGHT) - latent(codec, DARK)
    plain = fit_attribute(codec, source, "Bright")
    found = fit_attribute(codec, source, "Bright", without=["Red"])
    torch.testing.assert_close(found.direction, gray, rtol=0, atol=1e-5)
    assert (plain.direction - gray).norm() > 0.1 * gray.norm() and found.without == ("Red",)


def test_a_classifier_finds_a_direction_of_the_same_length_along_it(codec):
    source = ramps(60)
    means, classifier = (
        fit_attribute(codec, source, "Down", method=method) for method in ("means", "classifier")
    )
    apart = (means.direction * classifier.direction).sum() / classifier.direction.square().sum()
    assert float(apart) == pytest.approx(1, abs=1e-4)
    assert not torch.allclose(means.direction, classifier.direction, rtol=0.01)


def test_one_value_of_a_class_against_all_others(codec):
    images = [DARK, BRIGHT, RED] * 10
    found = fit_attribute(codec, LabelledImages(images, [0, 1, 2] * 10), "class=2")
    assert found.num_positive == 8 and found.auc > 0.5


def test_a_file_names_its_codec_and_is_refused_by_another(codec, tmp_path):
    found = fit_attribute(codec, ramps(20), "Down")
    found.save(path := tmp_path / "bright.safetensors")
    again = AttributeDirection.load(path, codec)
    assert torch.equal(again.direction, found.direction) and again.to_dict() == found.to_dict()

    other = LatentCodec(build("AutoencoderKL"), name="other")
    with pytest.raises(
        ValueError, match=r"bright.safetensors is one in the latents of tiny \(space .*, not of other"
    ):
        AttributeDirection.load(path, other)
    with pytest.raises(ValueError, match="the direction is one in the latents of tiny"):
        apply_attribute(other, DARK.float(), found, [0])
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="is not the direction of an attribute"):
        AttributeDirection.load(path)


@pytest.mark.parametrize(
    ("direction", "changes"),
    [
        (torch.zeros(()), {}),
        (torch.ones(4), {}),
        (torch.full((4, 1, 1), math.inf), {}),
        (torch.ones(5, 1, 1), {}),
        (torch.ones(4, 1, 1), {"label": 3}),
        (torch.ones(4, 1, 1), {"without": [3]}),
        (torch.ones(4, 1, 1), {"surplus": 3}),
        (torch.ones(4, 1, 1), None),
    ],
)
def test_a_damaged_direction_is_refused(codec, tmp_path, direction, changes):
    fit_attribute(codec, ramps(20), "Down").save(path := tmp_path / "down.safetensors")
    facts = json.loads(metadata_of(path)[ENTRY])
    facts = None if changes is None else facts | changes
    save_file({"direction": direction}, path, {ENTRY: json.dumps(facts)})
    with pytest.raises(
        ValueError, match=r"is not the direction of an attribute|is damaged: it has 5 numbers"
    ):
        AttributeDirection.load(path, codec)


@pytest.mark.parametrize(
    ("source", "label", "words"),
    [
        (
            LabelledImages([DARK] * 9, [{"Bright": -1}] * 9),
            "Bright",
            "and image 0 has Bright -1; expected an integer",
        ),
        (ramps(8), "Smiling", '^label is "Smiling", and image 0 has the label'),
        (ramps(2), "Down", "2 or more of the images have"),
        (LabelledImages([DARK], [{"Bright": True}]), "Bright", "2 or more of the images have"),
        (
            labelled((20, DARK, {"Bright": True})),
            "Bright",
            "20 of 20 have it; give more images, or another label",
        ),
        (LabelledImages([DARK] * 9, [2] * 9), "class", "true or false, got 'class'; .*`label=class=2`"),
        (LabelledImages([DARK] * 9, [2] * 9), "class=x", "NAME or NAME=VALUE"),
        (LabelledImages([DARK] * 9, [None] * 9), "class=1", "image 0 has no label"),
    ],
)
def test_labels_that_make_no_direction_are_refused(codec, source, label, words):
    with pytest.raises(ValueError, match=words):
        fit_attribute(codec, source, label)


def test_a_label_is_not_held_equal_to_what_says_the_same(codec):
    source = ramps(20)
    source.labels = [{"Down": each["Down"], "Up": not each["Down"]} for each in source.labels]
    for other in ("Down", "Up"):
        with pytest.raises(
            SettingError, match=f"without: expected labels that do not say what .*, got '{other}'"
        ):
            fit_attribute(codec, source, "Down", without=[other])


def test_the_verbs(codec, tmp_path, capsys):
    codec.save_pretrained(mine := tmp_path / "mine")
    data = tmp_path / "data"
    data.mkdir()
    pixels = (
        np.arange(40, dtype=np.uint8)[:, None, None] * 6
        + np.arange(100, dtype=np.uint8).reshape(1, 10, 10) // 10
    )
    write_idx(data / "train-images-idx3-ubyte", pixels)
    write_idx(data / "train-labels-idx1-ubyte", (np.arange(40) // 20).astype(np.uint8))
    direction, strip = tmp_path / "late.safetensors", tmp_path / "strip.png"

    fit = ["attribute", "fit", data, "--label", "class", "--codec", mine, "--out", direction]
    assert main([*map(str, fit), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["auc"] == 1.0 and facts["codec"] == "mine" and facts["num_held_out"] == 8
    apply = ["attribute", "apply", data, "--index", 0, 39, "--direction", direction, "--out", strip]
    assert main([*map(str, apply), "--codec", str(mine), "--amounts", "-2", "0", "2"]) == 0
    assert capsys.readouterr().out.startswith("class of 2 images at 3 amounts, see")
    assert Image.open(strip).width >= 4 * 96

    LatentCodec(build("AutoencoderKL")).save_pretrained(tmp_path / "grid")
    for argv, words in (
        ([*apply, "--codec", tmp_path / "grid"], "late.safetensors is one in the latents of mine"),
        ([*apply, "--codec", mine, "--amounts", "nan"], "--amounts: expected finite numbers, got nan"),
        (
            [*fit, "--codec", tmp_path / "grid"],
            "an attribute needs a codec with one vector per image, and grid has a grid",
        ),
        ([*fit, "--label", "Smiling"], 'label is "Smiling", and train-00000 has the label 0'),
        ([*fit, "--out", tmp_path / "late.json"], "--out: expected a name that ends in .safetensors"),
        ([*apply, "--out", tmp_path / "strip.gif"], "cannot write a .gif"),
        ([*fit, "--held-out", "1"], "--held-out: expected a share above 0 and below 1, got 1.0"),
    ):
        capsys.readouterr()
        assert main(list(map(str, argv))) == 2
        err = capsys.readouterr().err
        assert words in err and err.count("\n") == 1


def test_equal_seeds_hold_out_equal_images(codec):
    one, two, other = (fit_attribute(codec, ramps(30), "Down", seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one.direction, two.direction) and not torch.equal(one.direction, other.direction)
