"""Several codecs side by side: the figures against planted faults, what is refused, the verb and its files."""

import json

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from latent_codec import LatentCodec, metrics
from latent_codec.cli import main
from latent_codec.evaluation.codec_comparison import DRIFT, compare_codecs, crops_sheet
from latent_codec.images.sources import open_source


def network(channels: int = 3) -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(8,),
        norm_num_groups=2,
        latent_channels=4,
        mid_block_add_attention=False,
    )


class Planted(LatentCodec):
    """A codec that gives images back with a known fault."""

    def __init__(self, name, fault):
        super().__init__(network(), name=name)
        self._fault, self._images = fault, None

    def encode(self, images, **kwargs):
        self._images = images.clone()
        return super().encode(images, **kwargs)

    def encode_all(self, images):
        self._images = images.clone()
        return super().encode_all(images)

    def decode(self, latents, **kwargs):
        return self._fault(self._images)


def green(images):
    return images + torch.tensor([0.0, 4 / 127.5, 0.0]).view(3, 1, 1)


def blurred(images):
    return torch.nn.functional.avg_pool2d(
        torch.nn.functional.pad(images, (2, 2, 2, 2), mode="replicate"), 5, 1
    )


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Smooth images, away from black and white, so that a drift is not cut off."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for number, size in enumerate([(64, 48), (64, 48), (40, 56), (150, 140), (48, 48)]):
        coarse = Image.fromarray(rng.integers(60, 190, (6, 6, 3), dtype=np.uint8))
        coarse.resize(size, Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def compared(photos):
    codecs = [Planted("exact", lambda images: images), Planted("green", green), Planted("blurred", blurred)]
    return codecs, compare_codecs(photos, codecs)


def test_a_planted_drift_in_green_is_found(compared):
    exact, drifted, _ = compared[1].codecs
    found = drifted.drift("green")
    assert found.mean == pytest.approx(4, abs=0.5) and found.excludes_0
    for channel in ("red", "blue"):
        assert drifted.drift(channel).mean == pytest.approx(0, abs=1e-3)
    assert drifted.drift("green_red").mean < -1 and drifted.drift("green_red").excludes_0
    assert drifted.spread("green") < 0.5
    assert all(exact.drift(channel).mean == 0 for channel in DRIFT)


def test_blur_is_less_sharp_and_wrong_at_edges_and_drifts_not(compared):
    exact, _, soft = compared[1].codecs
    assert (exact.mean("sharpness"), exact.mean("edge_error")) == (1, 0)
    assert soft.mean("sharpness") < 0.95 and soft.mean("edge_error") > 0.05
    assert soft.contrast().mean < 0 and abs(soft.drift("green").mean) < 0.5


def test_differences_are_paired_with_the_first_codec(compared):
    found = compared[1].differences("edge_error")
    assert set(found) == {"green", "blurred"}
    soft = compared[1].codecs[2].images
    assert found["blurred"].mean == pytest.approx(np.mean([image.edge_error for image in soft]))
    assert found["blurred"].ahead is False
    assert found["green"].mean == pytest.approx(0, abs=0.02)  # up to rounding to 8 bits


def test_contrast_is_that_of_lightness(photos):
    halved = compare_codecs(
        photos,
        [
            Planted("exact", lambda images: images),
            Planted("half", lambda images: images.mean((2, 3), True) / 2 + images / 2),
        ],
    ).codecs[1]
    assert halved.contrast().mean == pytest.approx(-0.5, abs=0.05)


def test_lab_of_known_colors():
    """Corners of sRGB, as CIE's formulas give them (Lindbloom's tables)."""
    colors = torch.tensor([[255, 255, 255], [0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255]]) / 127.5 - 1
    expected = [
        [100, 0, 0],
        [0, 0, 0],
        [53.24, 80.09, 67.20],
        [87.73, -86.18, 83.18],
        [32.30, 79.19, -107.86],
    ]
    assert torch.allclose(metrics.lab(colors.view(5, 3, 1, 1)).flatten(1), torch.tensor(expected), atol=0.02)
    gray = metrics.lab(torch.zeros(1, 1, 1, 1)).flatten()
    assert gray.tolist() == pytest.approx([53.389, 0, 0], abs=0.002)


def test_the_crop_shows_where_codecs_differ(photos):
    def spoiled(images):
        found = images.clone()
        found[:, :, -20:, -20:] = 1
        return found

    codecs = [Planted("exact", lambda images: images), Planted("spoiled", spoiled)]
    source = open_source([photos / "3.png"])
    shown = crops_sheet(codecs, source, compare_codecs(source, codecs))
    assert shown.shape[2] > 3 * 128  # the original and two codecs
    assert (shown == 255).all(0).float().mean() > 0.01


def test_codecs_of_other_channels_are_refused_by_name(photos):
    gray = LatentCodec(network(channels=1), name="gray")
    with pytest.raises(ValueError, match="color takes images of 3 channels and gray of 1"):
        compare_codecs(photos, [LatentCodec(network(), name="color"), gray])
    with pytest.raises(ValueError, match="at least two codecs"):
        compare_codecs(photos, [gray])


def test_the_verb_compares_and_writes(photos, tmp_path, capsys):
    for name in ("a", "b"):
        LatentCodec(network(), name=name).save_pretrained(tmp_path / name)
    out = tmp_path / "out"
    command = [
        "evaluate",
        str(photos),
        "--codec",
        str(tmp_path / "a"),
        str(tmp_path / "b"),
        "--out",
        str(out),
    ]
    assert main([*command, "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "Minus a, image by image" in printed and "crops.png" in printed
    found = json.loads((out / "comparison.json").read_text())
    assert [each["name"] for each in found["codecs"]] == ["a", "b"]
    assert found["differences"]["psnr"]["b"]["mean"] == 0
    assert "summary.tex" in printed and (out / "crops.png").is_file()


def test_the_verb_refuses_several_codecs_for_a_prior(photos, capsys):
    assert main(["evaluate", str(photos), "--prior", "fashion-mnist", "--codec", "a", "b"]) == 2
    assert "--prior reads one codec's" in capsys.readouterr().err
