"""Anomalies: detectors, their scores and thresholds, heat maps, and the verbs `anomaly fit` and `anomaly score`."""

import json
import math
from dataclasses import replace

import pytest
import torch
from helpers.autoencoders import build
from helpers.commands import fails
from PIL import Image
from safetensors.torch import load_file, save_file

from latent_codec import LatentCodec, SettingError
from latent_codec.analysis.anomalies import (
    area_under_curve,
    fit_detector,
    heat_map,
    image_as_seen,
    score_anomalies,
)
from latent_codec.analysis.anomaly_sheet import anomaly_sheet
from latent_codec.analysis.detectors import load_detector
from latent_codec.analysis.heat_maps import NormalErrorMeter, blend, local_error
from latent_codec.cli import main
from latent_codec.images.sources import open_source
from latent_codec.images.tensors import write_image
from latent_codec.metrics import lpips_available, lpips_distance

SIDE, NUM_NORMAL, NUM_UNUSUAL = 20, 30, 6


def write_images(folder, count: int, noise: float, seed: int):
    """Smooth images, noisy where `noise` says so, in subfolders, which are classes: normal is 0, unusual 1."""
    generator = torch.Generator().manual_seed(seed)
    ramp = torch.linspace(-0.5, 0.5, SIDE)
    for number in range(count):
        slope = torch.rand(3, 2, 1, generator=generator) - 0.5
        image = slope[:, :1] * ramp.view(1, -1, 1) + slope[:, 1:] * ramp.view(1, 1, -1)
        image = image + noise * torch.randn(3, SIDE, SIDE, generator=generator)
        write_image(image, folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A codec, normal images to learn from, and others with classes."""
    folder = tmp_path_factory.mktemp("anomalies")
    LatentCodec(build("AutoencoderKL"), name="mine").save_pretrained(folder / "mine")
    write_images(folder / "normal", NUM_NORMAL, 0, seed=0)
    write_images(folder / "new" / "0", NUM_UNUSUAL, 0, seed=1)
    write_images(folder / "new" / "1", NUM_UNUSUAL, 0.5, seed=2)
    return folder


@pytest.fixture(scope="module")
def codec(place):
    return LatentCodec.from_pretrained(place / "mine")


@pytest.fixture(scope="module")
def detector(place, codec):
    return fit_detector(place / "normal", codec, false_alarms=0.1, held_out=0.4)


def test_noise_among_smooth_images_is_found(place, codec, detector, tmp_path):
    detector.save(tmp_path / "detector")
    opened = load_detector(tmp_path / "detector")
    found = score_anomalies(opened, place / "new", codec, label="class", normal=0)

    assert list(found.scores) == ["combined", "reconstruction", "elbo", "features"]
    assert found.auc["reconstruction"].value == 1 and found.auc["combined"].value > 0.9
    error = found.scores["reconstruction"]
    equal = replace(found, scores=found.scores | {"combined": torch.ones_like(error)})
    assert equal.ranked() == error.argsort(descending=True).tolist()
    assert opened.to_dict() == detector.to_dict()
    again = score_anomalies(detector, place / "new", codec)
    assert again.auc is None
    for name, scores in found.scores.items():
        torch.testing.assert_close(again.scores[name], scores, rtol=0, atol=0)
    assert json.dumps(found.to_dict(), allow_nan=False)


def test_scores_are_their_equations(place, codec, detector):
    image = open_source(place / "new").image(0)[None]
    found = score_anomalies(detector, place / "new", codec, limit=1)
    encoding = codec.encode_all(image)
    error = float((codec.decode(encoding.latents, output_type="pt") - image).square().mean())
    variance = detector.error_variance
    nats = 0.5 * math.log(2 * math.pi * variance) + error / (2 * variance) - math.log(2 / 255)
    nats += float(encoding.posterior.kl()) / image.numel()
    flat = encoding.latents.double().flatten(2)
    vector = torch.cat((flat.mean(2), flat.std(2, correction=0)), 1)[0] - detector.feature_mean
    distance = (vector @ torch.linalg.inv(detector.feature_covariance) @ vector).sqrt()

    # float32 latents and images, summed in another order
    assert float(found.scores["reconstruction"]) == pytest.approx(error, rel=1e-4)
    assert float(found.scores["elbo"]) == pytest.approx(nats / math.log(2), rel=1e-4)
    assert float(found.scores["features"]) == pytest.approx(float(distance), rel=1e-3)
    ranks = [
        float((detector.references[name] < found.scores[name]).double().mean())
        for name in ("reconstruction", "elbo", "features")
    ]
    assert float(found.scores["combined"]) == pytest.approx(sum(ranks) / 3)


@pytest.mark.parametrize("count, share, place_of_threshold", [(19, 0.05, 19), (100, 0.05, 96), (12, 0.1, 12)])
def test_a_threshold_keeps_false_alarms_to_their_share(detector, count, share, place_of_threshold):
    scores = torch.arange(1, count + 1, dtype=torch.float64)
    ranked = replace(detector, false_alarms=share, references={"features": scores})
    assert ranked.threshold("features") == place_of_threshold
    assert (count + 1 - place_of_threshold) / (count + 1) <= share  # of a new image among them


def test_area_under_the_curve_is_scikit_learns():
    metrics = pytest.importorskip("sklearn.metrics")
    generator = torch.Generator().manual_seed(0)
    is_normal = torch.rand(200, generator=generator) < 0.5
    scores = (torch.randn(200, generator=generator) - is_normal.float()).mul(3).round().double()  # with ties
    found = area_under_curve(scores, is_normal)
    assert found.value == pytest.approx(metrics.roc_auc_score(~is_normal, scores))
    assert 0.5 < found.low < found.value < found.high < 1
    # Hanley and McNeil (1982): the standard error is about 0.03 here
    assert 0.06 < found.high - found.low < 0.18


def test_a_heat_map_shows_what_is_worse_than_at_equal_gradient():
    """Errors grow with the gradient in normal images; a small error where all is smooth is the unusual one."""
    generator = torch.Generator().manual_seed(0)
    busy = torch.cat((torch.zeros(8, 3, 32, 32), torch.randn(8, 3, 32, 32, generator=generator)), 3).clamp(
        -1, 1
    )
    noise = torch.randn(busy.shape, generator=generator) * torch.where(busy == 0, 0.01, 0.3)
    meter = NormalErrorMeter()
    meter.add(busy + noise, busy)
    normal = meter.result()

    images = busy + noise
    images[:, :, 12:20, 8:16] += 0.3
    maps = normal.heat_map(images, busy)

    flat = local_error(images, busy).flatten(1).argmax(1) % 64
    assert (flat > 32).all()  # where the plain error is largest
    peaks = maps.flatten(1).argmax(1)
    assert ((peaks // 64 - 15.5).abs() < 4).all() and ((peaks % 64 - 11.5).abs() < 4).all()
    usual = normal.heat_map(busy + noise, busy)
    assert 0.6 < float(usual[:, :, 36:].mean()) < 1.2 and float(usual[:, :, :24].max()) < 1


def test_a_blend_is_gray_where_errors_are_normal_and_red_where_not():
    heat = torch.ones(4, 6)
    heat[:, 3:] = 100
    shown = blend(torch.full((3, 4, 6), 0.5), heat)
    assert (shown[:, :, :3] == 0.5).all()
    assert (shown[0, :, 3:] > 0.8).all() and (shown[1:, :, 3:] < 0).all()


def test_a_sheet_has_three_kinds_of_images_and_their_heat_maps(place, codec, detector):
    source = open_source(place / "new")
    found = score_anomalies(detector, source, codec)
    image = anomaly_sheet(detector, codec, source, found, columns=3)
    assert image.dtype == torch.uint8 and image.shape[0] == 3
    assert image.shape[1] >= 6 * 96 and image.shape[2] >= 3 * 96
    seen = image_as_seen(detector, codec, source, 0)
    assert heat_map(detector, codec, seen).shape == seen.shape[1:]


def test_codes_have_no_elbo(place, tmp_path):
    codec = LatentCodec(build("VQModel"), name="codes")
    detector = fit_detector(place / "normal", codec, held_out=0.7)
    assert list(detector.references) == ["combined", "reconstruction", "features"]
    assert detector.pooling == "histogram"
    with pytest.raises(
        SettingError, match=r"by: expected one of combined, reconstruction, features, got 'elbo'"
    ):
        score_anomalies(detector, place / "new", codec, by="elbo")


@pytest.mark.skipif(not lpips_available(), reason="needs the weights of LPIPS")
def test_the_error_may_be_lpips(place, codec):
    detector = fit_detector(place / "normal", codec, error="lpips", held_out=0.7)
    found = score_anomalies(detector, place / "new", codec, limit=1)
    image = open_source(place / "new").image(0)
    expected = lpips_distance(codec.roundtrip(image, output_type="pt"), image[None])
    torch.testing.assert_close(found.scores["reconstruction"].float(), expected)


def test_what_cannot_be_is_said_in_python(place, codec, detector, tmp_path):
    other = LatentCodec(build("AutoencoderKL", latent_channels=6), name="other")
    with pytest.raises(ValueError, match=r"fitted to mine .* not to other .*; give that codec, or fit"):
        score_anomalies(detector, place / "new", other)
    with pytest.raises(SettingError, match=r"at least 19 held-out normal images .* got '6 of 30'; give more"):
        fit_detector(place / "normal", codec)
    with pytest.raises(SettingError, match=r"at least 19 .* got '0 of 1'"):
        fit_detector(place / "normal" / "0.png", codec)
    with pytest.raises(
        SettingError, match=r"at most 4,096 features, .* got 'whole, 9,216'; take `pooling=mean-std`"
    ):
        fit_detector(place / "normal", codec, pooling="whole", side=192, limit=2)
    same = [str(place / "normal" / "0.png")] * NUM_NORMAL
    with pytest.raises(
        ValueError, match=r"all normal images have the same features .*; give images that differ"
    ):
        fit_detector(same, codec, held_out=0.7)
    for name in ("false_alarms", "held_out"):
        with pytest.raises(SettingError, match=f"{name}: expected a share between 0 and 1, got 1.5"):
            fit_detector(place / "normal", codec, **{name: 1.5})
    detector.save(tmp_path / "detector")
    tensors = load_file(tmp_path / "detector" / "detector.safetensors")
    tensors["feature_mean"][0] = math.nan
    save_file(tensors, tmp_path / "detector" / "detector.safetensors")
    with pytest.raises(ValueError, match=r"cannot be read .*NaN or infinity.*; fit it again"):
        load_detector(tmp_path / "detector")
    with pytest.raises(ValueError, match=r"holds other files and no detector"):
        detector.save(place)


@pytest.mark.parametrize(
    ("settings", "tensors", "word"),
    [
        ({"false_alarms": "0.1"}, {}, "false_alarms"),
        ({"false_alarms": 1e-9}, {}, "false_alarms"),
        ({"error_variance": None}, {}, "error_variance"),
        ({"side": "8"}, {}, "side"),
        ({"codec_path": ["mine"]}, {}, "codec_path"),
        ({"pooling": "max"}, {}, "pooling"),
        ({"surplus": 1}, {}, "surplus"),
        ({}, {"feature_mean": torch.zeros(())}, "0-d tensor"),
        ({}, {"feature_covariance": torch.zeros(8, 8)}, "feature_covariance"),
        ({}, {"normal_error": torch.ones(3)}, "normal_error"),
        ({}, {"reference.combined": torch.arange(12.0).flip(0)}, "references"),
    ],
)
def test_a_damaged_detector_is_refused(detector, tmp_path, settings, tensors, word):
    detector.save(tmp_path)
    path, weights = tmp_path / "detector.json", tmp_path / "detector.safetensors"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    save_file(load_file(weights) | tensors, weights)
    with pytest.raises(ValueError, match=rf"cannot be read \(.*{word}.*\); fit it again"):
        load_detector(tmp_path)


def test_two_images_have_no_covariance(place, codec):
    with pytest.raises(ValueError, match="2 normal images are too few for the covariance of 8 features"):
        fit_detector(place / "normal", codec, limit=4, held_out=0.5, false_alarms=0.4)


def test_the_verbs(place, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(place)
    shares = ("--held-out", "0.4", "--false-alarms", "0.1")
    assert main(["anomaly", "fit", "normal", "--codec", "mine", *shares, "--out", str(tmp_path / "d")]) == 0
    out = capsys.readouterr().out
    assert "12 normal images" in out and "10.0% of them" in out
    with Image.open(tmp_path / "d" / "scores.png") as image:
        assert image.width > 600

    labels = ("--label", "class", "--normal", "1", "--false-alarms", "0.3", "--held-out", "0.5")
    assert (
        main(["anomaly", "fit", "new", "--codec", "mine", *labels, "--out", str(tmp_path / "one"), "--json"])
        == 0
    )
    assert json.loads(capsys.readouterr().out)["num_fitted"] == NUM_UNUSUAL / 2
    words = fails(capsys, "anomaly fit", "new", "--codec", "mine", "--label", "class", "--normal", "7")
    assert "--normal: expected a value of class that some images have, got 7; these images have 0, 1" in words

    monkeypatch.chdir(tmp_path)
    new = str(place / "new")
    score = ["anomaly", "score", new, "--detector", "d", "--heat-maps", "2"]
    assert main([*score, "--label", "class", "--normal", "0"]) == 0
    out = capsys.readouterr().out
    assert "ROC AUC" in out and "unusual: combined above" in out
    folder = tmp_path / "latent-codec-out" / "anomaly"
    assert sorted(path.name for path in folder.iterdir()) == [
        "anomalies.json",
        "heat-maps",
        "report.png",
        "scores.csv",
    ]
    assert len(list((folder / "heat-maps").iterdir())) == 2
    columns = "name,unusual,combined,reconstruction,elbo,features,normal\n"
    assert (folder / "scores.csv").read_text().startswith(columns)
    assert main([*score, "--heat-maps", "1", "--by", "features", "--json"]) == 0
    assert len(list((folder / "heat-maps").iterdir())) == 1  # those of the earlier call are gone
    found = json.loads(capsys.readouterr().out)
    assert found["by"] == "features" and len(found["images"]) == 2 * NUM_UNUSUAL and "auc" not in found

    LatentCodec(build("AutoencoderKL", latent_channels=6)).save_pretrained("other")
    for extra, words in (
        (("--codec", "other"), "the detector was fitted to mine"),
        (("--label", "class", "--normal", "7"), "--normal: expected a value of class that some images have"),
        (("--label", "Smiling", "--normal", "1"), 'label is "Smiling", and'),
        (
            ("--label", "class"),
            "--normal: expected the value that normal images have, got None; it goes with --label",
        ),
        (
            ("--detector", "other"),
            "other holds no detector (detector.json); `latent-codec anomaly fit` makes one",
        ),
    ):
        assert words in fails(capsys, "anomaly score", new, "--detector", "d", *extra)
