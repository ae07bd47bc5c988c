"""`shapes:` is a data source like the others, whose labels are the factors that its images were drawn from."""

import pickle

import numpy as np
import pytest
import torch

from latent_codec.images.shapes import FACTORS, ShapeImages
from latent_codec.images.sources import open_source


def test_names_give_count_and_side():
    assert (len(open_source("shapes:")), open_source("shapes:").size(0)) == (10_000, (64, 64))
    assert len(open_source("shapes:12")) == 12
    assert open_source("shapes:12x32").read(11).shape == (3, 32, 32)
    assert open_source("shapes:12x32").read(11, channels=1).shape == (1, 32, 32)


@pytest.mark.parametrize(
    "name", ["shapes:0", "shapes:5x8", "shapes:5x2000", "shapes:five", "shapes:5x", "shapes:5x32x3"]
)
def test_other_names_are_refused(name):
    with pytest.raises(ValueError, match="shapes:"):
        open_source(name)


def test_a_list_of_sources_and_other_splits_are_refused(tmp_path):
    with pytest.raises(ValueError, match="alone"):
        open_source(["shapes:", str(tmp_path)])
    with pytest.raises(ValueError, match="'valid'"):
        open_source("shapes:", split="valid")
    with pytest.raises(IndexError, match="0 to 4"):
        open_source("shapes:5").read(5)


def test_images_depend_on_their_number_and_split_alone():
    source = open_source("shapes:20x32")
    again = pickle.loads(pickle.dumps(source))
    assert all(source.read(index).equal(again.read(index)) for index in range(20))
    assert all(source.label(index) == ShapeImages(100, 32).label(index) for index in range(20))
    test = open_source("shapes:20x32", split="test")
    assert [source.label(index) for index in range(20)] != [test.label(index) for index in range(20)]


def test_factors_are_drawn_evenly_and_alone():
    source = open_source("shapes:6000")
    labels = np.array([list(source.label(index).values()) for index in range(6000)])
    for column, values in enumerate(FACTORS.values()):
        shares = np.bincount(labels[:, column], minlength=values) / 6000
        assert len(shares) == values and np.abs(shares - 1 / values).max() < 0.03
    correlations = np.corrcoef(labels.T) - np.eye(len(FACTORS))
    assert np.abs(correlations).max() < 0.05


def test_every_factor_shows_in_the_image(monkeypatch):
    """Any two values of any factor give other images, and a shape never leaves its image."""
    source = ShapeImages(1, 64)
    middle = {"shape": 1, "color": 0, "size": 1, "angle": 1, "x": 3, "y": 3}
    for factor, values in FACTORS.items():
        for base in ({}, {"shape": 0}, {"shape": 2}):
            images = []
            for value in range(values):
                monkeypatch.setattr(
                    ShapeImages, "label", lambda self, index, f=factor, v=value, b=base: middle | b | {f: v}
                )
                images.append(source.read(0).float())
            for first in range(values):
                for second in range(first):
                    assert (images[first] - images[second]).abs().mean() > 0.15, (factor, base)


def test_a_shape_stays_inside(monkeypatch):
    source = ShapeImages(1, 64)
    for corner in (0, 7):
        for shape in range(3):
            for angle in range(5):
                factors = {"shape": shape, "color": 1, "size": 3, "angle": angle, "x": corner, "y": corner}
                monkeypatch.setattr(ShapeImages, "label", lambda self, index, f=factors: f)
                image = source.read(0)
                edge = torch.cat([image[:, 0], image[:, -1], image[:, :, 0], image[:, :, -1]], dim=1)
                assert edge.eq(edge[:, :1]).all()
