"""MIG and DCI know vectors that hold a factor each from vectors that mix them, and the verb says so in figures and an image."""

import json

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from helpers.commands import fails
from PIL import Image

from latent_codec.analysis.disentanglement import factors_of, measure_disentanglement
from latent_codec.analysis.features import extract_features
from latent_codec.cli import main

COUNT = 2000


@pytest.fixture(scope="module")
def factors():
    generator = np.random.default_rng(0)
    return {name: generator.integers(values, size=COUNT) for name, values in {"a": 3, "b": 4, "c": 8}.items()}


def noise(dims: int) -> torch.Tensor:
    return torch.randn(COUNT, dims, generator=torch.Generator().manual_seed(0))


def test_a_dimension_per_factor_scores_one(factors):
    vectors = torch.cat([torch.tensor(np.stack(list(factors.values()), 1)).float(), noise(2)], dim=1)
    found = measure_disentanglement(vectors, factors)
    assert found.mig > 0.98 and found.disentanglement > 0.98 and found.completeness > 0.98
    assert found.informativeness == 1
    assert [int(np.argmax(row)) for row in found.mutual_information] == [0, 1, 2]


def test_mixed_dimensions_score_lower_and_still_inform(factors):
    turn, _ = torch.linalg.qr(noise(3)[:3])
    each = torch.tensor(np.stack(list(factors.values()), 1)).float()
    mixed = (each - each.mean(0)) / each.std(0) @ turn
    found = measure_disentanglement(mixed, factors)
    assert found.mig < 0.6 and found.disentanglement < 0.4 and found.completeness < 0.4
    assert found.informativeness > 0.8


def test_a_factor_held_twice_has_no_gap(factors):
    """Equation 6's reason for the gap: a copied factor is not disentangled, however much a dimension says of it."""
    one = torch.tensor(factors["c"]).float()[:, None]
    found = measure_disentanglement(torch.cat([one, one, noise(1)], dim=1), {"c": factors["c"]})
    assert found.gaps[0] == pytest.approx(0, abs=1e-6)
    assert max(found.mutual_information[0]) > 0.98


def test_noise_says_nothing(factors):
    found = measure_disentanglement(noise(4), factors)
    assert np.max(found.mutual_information) < 0.06 and found.mig < 0.02
    assert np.allclose(found.accuracies, found.baselines, atol=0.08)


def test_too_few_dimensions_or_images_are_refused(factors):
    with pytest.raises(ValueError, match="vectors of 2 numbers or more, got 2000 with 1"):
        measure_disentanglement(noise(1), factors)
    with pytest.raises(ValueError, match="100 images or more"):
        measure_disentanglement(noise(3)[:50], {name: values[:50] for name, values in factors.items()})


@pytest.fixture(scope="module")
def one_vector(tmp_path_factory):
    """The folder of a codec of one vector per image of 16 px."""
    arguments = dict(  # noqa: C408
        down_block_types=["DownEncoderBlock2D"] * 5,
        up_block_types=["UpDecoderBlock2D"] * 5,
        block_out_channels=[4] * 5,
        norm_num_groups=2,
        latent_channels=3,
        sample_size=16,
        mid_block_add_attention=False,
    )
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("one") / "codec"
    AutoencoderKL(**arguments).save_pretrained(path)
    return str(path)


def test_the_verb_prints_figures_and_draws(one_vector, tmp_path, capsys):
    arguments = ["disentanglement", "shapes:120x16", "--codec", one_vector, "--out", str(tmp_path / "out")]
    assert main([*arguments, "--factor", "shape", "--factor", "x", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["factors"] == ["shape", "x"] and told["num_images"] == 120
    assert json.loads((tmp_path / "out" / "disentanglement.json").read_text())["mig"] == told["mig"]
    assert min(Image.open(tmp_path / "out" / "disentanglement.png").size) > 100
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("shape", "angle", "MIG", "informativeness"))


def test_the_same_images_give_the_same_figures(one_vector):
    features = extract_features("shapes:120x16", one_vector)
    factors = factors_of(features, ["size"])
    first, again = (measure_disentanglement(features.vectors, factors).to_dict() for _ in range(2))
    assert first == again


def test_bad_input_is_one_line(one_vector, tmp_path, capsys):
    def refused(*words: str) -> str:
        return fails(capsys, "disentanglement", *words, "--out", tmp_path / "out")

    assert "one vector" in refused("shapes:120x16", "--codec", "default")
    assert "100" in refused("shapes:50x16", "--codec", one_vector)
    assert "hue" in refused("shapes:120x16", "--codec", one_vector, "--factor", "hue")
    for number in range(2):
        Image.new("RGB", (16, 16)).save(tmp_path / f"{number}.png")
    assert "attributes" in refused(tmp_path, "--codec", one_vector)
