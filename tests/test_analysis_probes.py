"""What a linear classifier tells from features, and which images their features group."""

import json
import os
import sys

import numpy as np
import pytest
import torch
from helpers.autoencoders import build
from helpers.commands import fails, write_idx
from PIL import Image

from latent_codec import LatentCodec
from latent_codec.analysis.clusters import contact_sheet, find_clusters, plane_map
from latent_codec.analysis.features import Features
from latent_codec.analysis.probes import mistakes_sheet, probe
from latent_codec.cli import main
from latent_codec.errors import SettingError
from latent_codec.images.labels import class_in, class_names, shown_name
from latent_codec.images.sources import SomeImages, open_source
from latent_codec.images.tensors import enlarged_to, write_image


@pytest.fixture(scope="module")
def bars(tmp_path_factory):
    """12x12 px, 60 and 30 images of class 0, 1 or 2: a bright bar at the left, in the middle or at the right."""
    folder, random = tmp_path_factory.mktemp("bars"), np.random.default_rng(0)
    for prefix, count in (("train", 60), ("t10k", 30)):
        classes = np.arange(count, dtype=np.uint8) % 3
        images = random.integers(0, 60, (count, 12, 12), np.uint8)
        for image, each in zip(images, classes):
            image[:, 4 * each : 4 * each + 4] += 180
        write_idx(folder / f"{prefix}-images-idx3-ubyte", images)
        write_idx(folder / f"{prefix}-labels-idx1-ubyte", classes)
    return folder


@pytest.fixture(scope="module")
def codec(tmp_path_factory):
    """A folder with a random codec of gray images, whose grid is 3x3."""
    folder = tmp_path_factory.mktemp("codec")
    LatentCodec(build("AutoencoderKL", in_channels=1, out_channels=1)).save_pretrained(folder)
    return folder


def made_features(vectors, labels=None) -> Features:
    """Of no codec."""
    count = len(vectors)
    return Features(
        names=[f"image {number}" for number in range(count)],
        indices=list(range(count)),
        vectors=torch.as_tensor(vectors, dtype=torch.float32),
        labels=[None] * count if labels is None else labels,
        codec="mine",
        space_fingerprint="0" * 16,
        fingerprint="0" * 16,
        pooling="whole",
    )


def test_a_probe_tells_what_is_linearly_separable(bars, codec):
    found = probe(open_source(bars), LatentCodec.from_pretrained(codec), pooling="whole", held_out=0.25)
    assert (found.num_train, found.num_test) == (45, 15)
    assert found.truth.bincount().tolist() == [5, 5, 5]  # a share of each class
    assert found.features.accuracy == found.pixels.accuracy == found.pca.accuracy == 1
    assert found.confusion.tolist() == [[5, 0, 0], [0, 5, 0], [0, 0, 5]]
    assert (found.features.num_features, found.pca.num_features, found.pixels.num_features) == (36, 36, 144)
    assert found.lead_over_pca == (0, 0, 0) and found.largest_share == pytest.approx(1 / 3)
    assert mistakes_sheet(found, open_source(bars), ["left", "middle", "right"]) is None


def test_mistakes_are_counted_and_shown(bars, codec):
    """Labels that have nothing to do with the images."""
    source = open_source(bars)
    source.labels = np.random.default_rng(0).permutation(source.labels)
    found = probe(source, LatentCodec.from_pretrained(codec), held_out=0.5)
    mistakes = int((found.features.predicted != found.truth).sum())
    assert mistakes > 0 and found.features.accuracy == pytest.approx(1 - mistakes / 30)
    assert int(found.confusion.sum() - found.confusion.trace()) == mistakes
    assert found.confusion.sum(1).tolist() == found.truth.bincount().tolist()
    correct = [each.predicted == found.truth for each in (found.features, found.pca)]
    mean, low, high = found.lead_over_pca
    assert mean == pytest.approx(float(correct[0].double().mean() - correct[1].double().mean()))
    assert low <= mean <= high
    assert mistakes_sheet(found, source, ["left", "middle", "right"]).dtype == torch.uint8


def test_the_verb_probes_a_split_and_shows_confusions(bars, codec, tmp_path, capsys):
    argv = ["probe", bars, "--codec", codec, "--test-split", "test", "--out", tmp_path / "out"]
    assert main([*map(str, argv)]) == 0
    words = capsys.readouterr().out
    assert "3 classes, learned from 60 images, tested on 30 others." in words and "pixels, 12x12" in words
    with Image.open(tmp_path / "out/confusion.png") as image:
        assert image.width > 300
    found = json.loads((tmp_path / "out/probe.json").read_text())
    assert found["num_test"] == 30 and sum(map(sum, found["confusion"])) == 30
    assert found["of"]["pooling"] == "mean-std" and found["class_names"] == ["0", "1", "2"]


def test_classes_are_called_by_what_names_them(bars, tmp_path):
    assert class_names(open_source(bars), "class", [0, 2]) == ["0", "2"]
    assert class_names(open_source(bars), "Smiling", [0, 1]) == ["not Smiling", "Smiling"]
    for kind in ("cat", "dog"):
        (tmp_path / kind).mkdir()
        Image.new("L", (8, 8)).save(tmp_path / kind / "a.png")
    assert class_names(open_source(tmp_path), "class", [0, 1]) == ["cat", "dog"]


def test_clusters_are_compared_with_classes():
    apart = torch.tensor([0.0, 0.1, 0.2, 9.0, 9.1, 5.0])[:, None]
    found = find_clusters(made_features(apart, [0, 0, 1, 2, 2, 7]), 3)
    assert found.sizes == [3, 2, 1] and found.assignments.tolist() == [0, 0, 0, 1, 1, 2]
    assert found.purity == pytest.approx(5 / 6) and 0 < found.nmi < 1
    assert found.main_classes() == [(0, pytest.approx(2 / 3)), (2, 1.0), (7, 1.0)]
    torch.testing.assert_close(found.distances[1], torch.tensor(0.0), atol=1e-5, rtol=0)

    without = find_clusters(made_features(apart), 2)
    assert without.purity is without.nmi is without.main_classes() is None
    assert without.to_dict()["clusters"][0] == {"size": 3, "main_class": None, "share": None}


def test_there_are_no_more_clusters_than_different_images():
    found = find_clusters(made_features([[0.0], [1.0], [5.0], [5.0]]))
    assert found.sizes == [2, 1, 1]


@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
def test_empty_clusters_are_left_out():
    assert sum(find_clusters(made_features([[0.0], [1e-30], [1.0]], [0, 1, 2])).sizes) == 3


def test_large_numbers_are_no_classes():
    with pytest.raises(
        ValueError, match=r"and a\.png has id 1000000000000; expected an integer from 0 to 999,999"
    ):
        class_in({"id": 10**12}, "id", "a.png")


def test_names_fit_into_titles():
    name = os.fsdecode(b"new\nline $x$ caf\xe9 ") + "y" * 99
    assert shown_name(name) == "new line $x$ caf? yyy..."
    assert enlarged_to(Image.new("L", (8, 8)), 96).size == (96, 96)
    assert enlarged_to(Image.new("L", (8, 1200)), 96).size == (8, 1200)


def test_the_verb_groups_and_maps_images(bars, codec, tmp_path, capsys):
    argv = ["cluster", bars, "--codec", codec, "--pooling", "whole", "--limit", "30", "--out", tmp_path]
    assert main([*map(str, argv)]) == 0
    words = capsys.readouterr().out
    assert "Purity 1.0000, NMI 1.0000, against 3 classes (class)." in words
    shades = torch.from_numpy(np.array(Image.open(tmp_path / "map.png"))).flatten(0, 1).unique(dim=0)
    assert len(shades) > 10  # there are thumbnails
    found = json.loads((tmp_path / "clusters.json").read_text())
    assert [each["size"] for each in found["clusters"]] == [10, 10, 10]
    assert len(found["images"]) == 30 and set(found["images"].values()) == {0, 1, 2}


def test_sheets_have_a_row_for_each_cluster_and_a_place_for_each_thumbnail(bars):
    vectors = torch.tensor([[0.0, 0.0], [0.0, 0.1], [5.0, 5.0]])
    found, source = find_clusters(made_features(vectors), 2), open_source(bars)
    assert contact_sheet(found, source).shape[1] > 2 * 64
    plane = plane_map(found, source, method="pca")
    framed = (plane != 255).any(0).nonzero()
    assert framed.amin(0).tolist() == [0, 0] and plane.shape[1] == plane.shape[2]
    with pytest.raises(SettingError, match="method: expected tsne or pca, got 'umap'"):
        plane_map(found, source, method="umap")


def test_bad_input_is_one_line(bars, codec, tmp_path, capsys, monkeypatch):
    source = open_source(bars)
    with pytest.raises(ValueError, match="expected images of two classes or more, but all 20 are of class 0"):
        probe(SomeImages(source, range(0, 60, 3)), LatentCodec.from_pretrained(codec))
    with pytest.raises(ValueError, match="there is one image; give images of others"):
        probe(SomeImages(source, [0]), LatentCodec.from_pretrained(codec))
    with pytest.raises(
        SettingError, match=r"held_out: expected a share that holds out an image of 2, got 0\.2"
    ):
        probe(SomeImages(source, [0, 1]), LatentCodec.from_pretrained(codec))
    for vectors, words in (
        (torch.zeros(5, 2), "all images have the same"),
        (torch.ones(1, 2), "there is one"),
    ):
        with pytest.raises(ValueError, match=f"expected two different images or more, but {words}"):
            find_clusters(made_features(vectors))

    given = (bars, "--codec", codec, "--out", tmp_path)
    assert "--held-out: expected a share above 0 and below 1, got 1.0" in fails(
        capsys, "probe", *given, "--held-out", "1"
    )
    for verb in ("probe", "cluster"):
        words = fails(capsys, verb, *given, "--label", "Smiling")
        assert 'label is "Smiling", and train-00000 has the label 0' in words
    words = fails(capsys, "probe", *given, "--test-split", "train")
    assert "--test-split: expected another split of DATA, got 'train'" in words
    for folder, kinds in (("one", "ab"), ("other", "bc")):
        for number, kind in enumerate(kinds * 2):
            write_image(torch.full((1, 8, 8), number / 4), tmp_path / folder / kind / f"{number}.png")
    one = (tmp_path / "one", *given[1:])
    words = fails(capsys, "probe", *one, "--test-split", "test")
    assert "got 'test'; DATA has no splits; name others by --test-data" in words
    words = fails(capsys, "probe", *one, "--test-data", tmp_path / "other")
    assert "expected images of the classes a, b, got b, c; give folders of the same names" in words
    words = fails(capsys, "cluster", *given, "--clusters", "61")
    assert "--clusters: expected 2 to 60, the number of different images, got 61" in words
    assert "has splits 'train' and 'test', not \"none\"".replace('"', "'") in fails(
        capsys, "probe", *given, "--test-split", "none"
    )
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    assert 'pip install "latent-codec[analysis]"' in fails(capsys, "probe", *given)
