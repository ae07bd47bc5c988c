"""How well a diffusion model trains on the latents of codecs."""

import json
from statistics import mean

import diffusers
import pytest
import torch
from helpers.autoencoders import build
from helpers.commands import fails
from torch.nn import functional as F

from latent_codec import LatentCodec
from latent_codec.cli import main
from latent_codec.errors import SettingError
from latent_codec.evaluation import denoisers
from latent_codec.evaluation.denoisers import DenoiserTraining, sample, train_denoiser
from latent_codec.evaluation.diffusability import between_neighbors, measure_diffusability, patches_of
from latent_codec.evaluation.diffusability_result import (
    CodecDiffusability,
    DenoiserCurve,
    Diffusability,
    samples_sheet,
    steps_to,
)
from latent_codec.evaluation.frechet import FeatureNetwork, features_of, frechet
from latent_codec.metrics import frechet_distance, lpips_available

COLORS = FeatureNetwork(
    "colors of 2x2 parts", lambda images: F.adaptive_avg_pool2d(images, 2).flatten(1), min_side=8
)
DATA = "shapes:120x32"


@pytest.fixture(autouse=True, scope="module")
def small():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "WIDTH": 16,
            "NUM_HEADS": 2,
            "NUM_LAYERS": 1,
            "LEARNING_RATE": 1e-2,
            "WARMUP_STEPS": 10,
        }.items():
            patch.setattr(denoisers, name, value)
        yield


@pytest.fixture(scope="module")
def codecs(tmp_path_factory):
    """Folders of two codecs of 4 px and one of 8 px per position."""
    folder = tmp_path_factory.mktemp("codecs")
    made = {
        "first": build("AutoencoderKL"),
        "second": build("AutoencoderKL"),
        "gray": build("AutoencoderKL", in_channels=1, out_channels=1),
    }
    with torch.no_grad():
        made["second"].decoder.conv_out.bias += 0.2
    for name, autoencoder in made.items():
        LatentCodec(autoencoder).save_pretrained(folder / name)
    return folder


def test_a_denoiser_learns_what_the_latents_are():
    torch.manual_seed(0)
    wanted = torch.randn(1, 2, 4, 4)
    latents = wanted + 0.1 * torch.randn(200, 2, 4, 4)
    untrained, trained = train_denoiser(latents, steps=0), train_denoiser(latents, steps=100)
    errors = [(sample(each, 20, seed=1) - wanted).square().mean() for each in (untrained, trained)]
    assert errors[1] < 0.6 * errors[0]
    torch.testing.assert_close(
        sample(trained, 20, seed=1)[:3], sample(trained, 20, seed=1)[:3], rtol=0, atol=0
    )


def test_a_training_goes_on_as_if_it_had_not_stopped():
    latents = torch.randn(40, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    whole, stopped = (DenoiserTraining(latents, seed=3, patch=2) for _ in range(2))
    losses = [whole.step() for _ in range(4)]
    for _ in range(2):
        stopped.step()
    again = DenoiserTraining(latents, seed=3, patch=2)
    again.load_state_dict(stopped.state_dict())
    assert [again.step() for _ in range(2)] == losses[2:]
    assert torch.equal(sample(again.denoiser, 2), sample(whole.denoiser, 2))


def test_samples_of_an_ideal_denoiser_follow_the_ode():
    """Of latents that are all 0 the velocity is x / t, whose solution is a straight line to 0: every step is exact."""
    network = denoisers._build(1, 4, 1, seed=0)
    network.forward = lambda x, times, classes, return_dict: (x / (times / 1000)[:, None, None, None],)
    assert sample(network, 3).abs().max() < 1e-6


def test_half_way_between_neighbors_on_the_sphere():
    latents = torch.tensor([[2.0, 0], [0, 2], [-1, 0.1], [0.1, 3]])[:, :, None, None]
    middles = between_neighbors(latents, torch.tensor([0, 1]))[..., 0, 0]
    for middle, (one, other) in zip(middles, ((0, 3), (1, 3))):
        a, b = latents[one].flatten(), latents[other].flatten()
        angle = torch.acos(F.cosine_similarity(a, b, dim=0))
        torch.testing.assert_close(middle, (torch.sin(angle / 2) / torch.sin(angle)) * (a + b))


def test_steps_to_a_distance_are_interpolated():
    assert steps_to([100, 50, 25], [10, 20, 40], 25) == pytest.approx(40)
    assert steps_to([100, 50, 25], [10, 20, 40], 50 / 2**0.5) == pytest.approx(30)
    assert steps_to([100, 50, 25], [10, 20, 40], 200) == 10
    assert steps_to([100, 50, 25], [10, 20, 40], 20) is None


def result(*codecs: tuple[float, list[list[float]]]) -> Diffusability:
    """Of each codec its iFID and its curves."""
    samples = torch.zeros(8, 3, 8, 8, dtype=torch.uint8)
    facts = {
        "fingerprint": "",
        "channels": 4,
        "grid": 8,
        "patch": 2,
        "std": [1.0] * 4,
        "reconstructions": 1.0,
    }
    made = [
        CodecDiffusability(
            name=str(place), interpolated=proxy, **facts,
            curves=[DenoiserCurve(seed=seed, distances=each, seconds=1.0, samples=samples) for seed, each in enumerate(curves)],
        )
        for place, (proxy, curves) in enumerate(codecs)
    ]  # fmt: skip
    return Diffusability(
        steps=[10, 20], codecs=made, half=1.0, network="", num_images=200, num_samples=100, side=8, num_enlarged=0, device="cpu",
        skipped=[],
    )  # fmt: skip


def test_codecs_are_compared_seed_by_seed_and_by_ranks():
    found = result((1, [[80, 40], [80, 20]]), (2, [[40, 30], [40, 30]]), (3, [[60, 28], [60, 30]]))
    assert found.steps_to_first("1") == [10, None] and found.steps_to_first("2")[0] == pytest.approx(
        15.3, abs=0.1
    )
    assert found.codecs[0].mean(-1) == 30 and found.codecs[0].spread(-1) == pytest.approx(14.14, abs=0.01)
    assert result((1, [[8, 2]]), (2, [[8, 4]]), (3, [[8, 3]])).correlation() == pytest.approx(0.5)
    assert result((1, [[8, 2]]), (2, [[8, 4]])).correlation() is None
    assert samples_sheet(found).shape[0] == 3


def test_frechet_distance_of_images_is_that_of_their_features():
    torch.manual_seed(0)
    images, others = (torch.randint(0, 256, (30, 3, 16, 16), dtype=torch.uint8) for _ in range(2))
    expected = frechet_distance(*(COLORS.features(each.float() / 127.5 - 1) for each in (images, others)))
    assert frechet(images, others.float() / 127.5 - 1, COLORS) == pytest.approx(expected, rel=1e-4)
    with pytest.raises(ValueError, match="need images of 8 px or more, got 4x4"):
        features_of(images[..., :4, :4], COLORS)


def test_all_denoisers_have_as_many_tokens():
    kl, dc = (LatentCodec(build(name), name=name) for name in ("AutoencoderKL", "AutoencoderKLWan"))
    factors = [codec.latent_space.downsampling_factor for codec in (kl, dc)]
    assert factors[0] < factors[1]
    size = 8 * factors[1]
    patches = patches_of([kl, dc], size)
    assert [size // factor // patch for factor, patch in zip(factors, patches)] == [4, 4]
    assert patches_of([kl], 4 * factors[0]) == [1]
    for size, words in (
        (2 * factors[1], f"at least {4 * factors[1]} px, 4x4 latents of AutoencoderKLWan"),
        (4 * factors[1] + 1, "a multiple of"),
    ):
        with pytest.raises(SettingError, match=words):
            patches_of([kl, dc], size)


@pytest.fixture(scope="module")
def measured(codecs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("measured")
    opened = [codecs / "first", codecs / "second"]
    told = []
    found = measure_diffusability(
        DATA, opened, seeds=2, steps=8, size=32, num_samples=24, folder=folder, network=COLORS,
        on_estimate=lambda *estimate: told.append(estimate),
    )  # fmt: skip
    assert told and told[0][1] == 4
    return found, opened, folder


def test_denoisers_of_equal_latents_are_equal(measured):
    """The two codecs' encoders are the same, so that only the decoder tells their samples apart."""
    found, _, folder = measured
    first, second = found.codecs
    assert found.steps == [2, 4, 6, 8] and (first.grid, first.patch) == (8, 2)
    assert [curve.seed for curve in first.curves] == [0, 1]
    assert first.curves[0].distances != first.curves[1].distances
    assert first.mean(-1) == mean(curve.distances[-1] for curve in first.curves) and first.spread(-1) > 0
    assert first.reconstructions != second.reconstructions
    assert all(0 < each <= 8 for each in found.steps_to_first("first")) and found.correlation() is None
    shown = json.loads(json.dumps(found.to_dict()))
    assert shown["codecs"][1]["curves"][1]["distances"] == second.curves[1].distances
    weights = [
        diffusers.DiTTransformer2DModel.from_pretrained(path).state_dict()["proj_out_2.weight"]
        for path in sorted(folder.glob("*-seed0-*")) if path.is_dir()
    ]  # fmt: skip
    assert len(weights) == 2 and torch.equal(*weights)


def test_what_is_finished_is_not_done_again(measured):
    found, opened, folder = measured
    again = measure_diffusability(
        DATA, opened, seeds=2, steps=8, size=32, num_samples=24, folder=folder, network=COLORS,
        on_estimate=lambda *_: pytest.fail("trains again"),
    )  # fmt: skip
    assert again.to_dict() == found.to_dict()


def test_a_killed_measurement_goes_on_from_its_last_mark(measured, tmp_path):
    found, opened, _ = measured
    trained = []

    def kill(done: int, total: int, what: str) -> None:
        if "training" in what:
            trained.append(done)
        if what.startswith("first, seed 0") and done == 5:
            raise KeyboardInterrupt

    settings = {"seeds": 1, "steps": 8, "size": 32, "num_samples": 24, "folder": tmp_path, "network": COLORS}
    with pytest.raises(KeyboardInterrupt):
        measure_diffusability(DATA, opened[:1], on_progress=kill, **settings)
    done = len(trained)
    again = measure_diffusability(
        DATA, opened[:1], on_progress=lambda done, _, what: trained.append(done) if "training" in what else None, **settings
    )  # fmt: skip
    assert trained[:done] == [1, 2, 3, 4, 5] and trained[done:] == [5, 6, 7, 8]
    assert again.codecs[0].curves[0].distances == found.codecs[0].curves[0].distances


def test_too_few_images_and_codecs_of_other_images_are_refused(codecs, tmp_path, capsys):
    with pytest.raises(ValueError, match="expected 100 images or more to train a denoiser, got 20"):
        measure_diffusability(DATA, [codecs / "first"], limit=20, size=32, network=COLORS)
    command = "diffusability", DATA, "--out", tmp_path, "--codec", codecs / "first"
    words = fails(capsys, *command, codecs / "gray")
    assert "first takes images of 3 channels and gray of 1" in words
    assert "--size: expected a multiple of 4 px for first, got 33" in fails(capsys, *command, "--size", "33")


@pytest.mark.skipif(
    not lpips_available("squeeze"), reason="SqueezeNet's weights are not in torch's hub folder"
)
def test_the_verb_prints_and_writes_what_it_found(codecs, tmp_path, capsys):
    command = ["diffusability", DATA, "--out", tmp_path, "--size", 32, "--seeds", 1, "--samples", 16]
    command = [*map(str, [*command, "--codec", codecs / "first", codecs / "second"])]
    assert main([*command, "--steps", "4"]) == 0
    out, err = capsys.readouterr()
    assert "Frechet distance from 120 images" in out and "Steps until as near as first after 4" in out
    assert "2 denoisers to train, about" in err and "Note: give 2,000 images or more" in err
    names = {"curves.png", "samples.png", "diffusability.json", "summary.md", "summary.tex", "runs"}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert main([*command, "--steps", "0", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["steps"] == [] and shown["codecs"][0]["interpolated"] > 0
