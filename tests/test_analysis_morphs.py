"""Morphs: from image to image through latents, of codecs with one vector, a grid, and codebooks."""

import json
import shutil
from itertools import pairwise

import pytest
import torch
from helpers.autoencoders import build
from helpers.commands import fails
from helpers.one_vector import one_vector_codec, plain_image
from helpers.training import write_images
from PIL import Image

from latent_codec import LatentCodec
from latent_codec.analysis.morphs import interpolate, morph
from latent_codec.cli import main
from latent_codec.errors import SettingError
from latent_codec.images.animations import write_animation


def noise(count: int, height: int = 16, width: int = 16) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return list(torch.rand(count, 3, height, width, generator=generator) * 2 - 1)


def test_spherical_steps_stay_as_far_from_the_origin_and_turn_evenly():
    a, b = (
        torch.nn.functional.normalize(
            torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0)), dim=2
        )
        * 8
    )
    steps = [interpolate(a, b, share, "spherical") for share in (0, 0.25, 0.5, 0.75, 1)]
    torch.testing.assert_close(steps[0], a)
    torch.testing.assert_close(steps[-1], b)
    for step in steps:
        torch.testing.assert_close(step.norm(dim=1), torch.full((3,), 8.0))
    cosines = torch.stack([(one * other).sum(1) for one, other in pairwise(steps)])
    torch.testing.assert_close(cosines, cosines[:1].expand_as(cosines))
    torch.testing.assert_close(interpolate(a, b, 0.25), 0.75 * a + 0.25 * b)


@pytest.mark.parametrize("factor", [2.0, -1.0, 0.0])
def test_where_no_arc_is_the_shortest_spherical_is_linear(factor):
    a = torch.tensor([[1.0, 2.0, 3.0]])
    torch.testing.assert_close(interpolate(a, factor * a, 0.25, "spherical"), 0.75 * a + 0.25 * factor * a)


@pytest.mark.parametrize(
    "name", ["AutoencoderKL", "AutoencoderTiny", "VQModel", "HierarchicalVQ", "VQModel, spatial norms"]
)
@pytest.mark.parametrize("way", ["linear", "spherical"])
def test_a_morph_goes_from_reconstruction_to_reconstruction(name, way):
    codec = LatentCodec(build(name), name="mine")
    images = noise(3)
    seen = []
    found = morph(codec, images, steps=3, way=way, on_progress=lambda *counts: seen.append(counts))
    ends = codec.roundtrip(images, output_type="pt")
    assert found.frames.shape == (5, 3, 16, 16) and seen[-1] == (5, 5)
    torch.testing.assert_close(found.frames[::2], ends, rtol=0, atol=1e-4)  # alone and in a batch
    first, second = found.legs
    assert torch.equal(first[-1], second[0]) and len(first) == len(second) == 3
    assert "mine has a grid of" in found.note and "cross-fade" in found.note


def test_halfway_a_discrete_codec_decodes_codewords():
    """And not the blend of two: every vector is in the codebook."""
    codec = LatentCodec(build("VQModel"))
    images = noise(2)
    halfway = morph(codec, images, steps=3).frames[1:2]
    codebook = codec.levels[0].codebook
    one, other = (codebook[grid[0]] for grid in (codec.encode_indices(image)[0] for image in images))
    distances = torch.cdist(((one + other) / 2).flatten(0, 1).double(), codebook.double())
    indices = distances.argmin(1).view(1, *one.shape[:2])
    torch.testing.assert_close(halfway, codec.decode_indices([indices], output_type="pt"), rtol=0, atol=1e-4)


def test_one_vector_gets_the_middle_square_at_its_size():
    codec = one_vector_codec()
    large = torch.cat([plain_image(9, 9, 9, 32), plain_image(200, 20, 20, 32), plain_image(9, 9, 9, 32)], 2)
    small = plain_image(20, 200, 20)
    images = [large / 127.5 - 1, small / 127.5 - 1]
    found = morph(codec, images, steps=2)
    assert found.note is None and found.frames.shape == (2, 3, 8, 8)
    red = codec.roundtrip(plain_image(200, 20, 20) / 127.5 - 1, output_type="pt")
    torch.testing.assert_close(found.frames[:1], red, rtol=0, atol=1e-4)


def test_images_of_a_grid_codec_are_cut_to_what_they_share():
    codec = LatentCodec(build("AutoencoderKL"))
    assert morph(codec, [noise(1, 24, 40)[0], noise(1, 32, 20)[0]], steps=2).frames.shape == (2, 3, 24, 20)


@pytest.mark.parametrize(
    ("count", "changes", "words"),
    [
        (1, {}, "images: expected two images or more, got 1"),
        (2, {"steps": 1}, "steps: expected at least 2"),
        (2, {"way": "straight"}, "way: expected linear or spherical, got 'straight'"),
    ],
)
def test_what_makes_no_morph_is_refused(count, changes, words):
    with pytest.raises(SettingError, match=words):
        morph(one_vector_codec(), noise(count), **changes)


def test_the_verb_writes_a_strip_and_an_animation(tmp_path, capsys):
    codec = one_vector_codec()
    codec.save_pretrained(tmp_path / "codec")
    images = write_images(tmp_path / "images", 3)
    strip, animation = tmp_path / "strip.png", tmp_path / "morph.webp"
    argv = [
        "interpolate",
        images,
        "--index",
        2,
        0,
        "--codec",
        tmp_path / "codec",
        "--steps",
        4,
        "--way",
        "spherical",
    ]
    argv += ["--out", strip, "--animation", animation, "--json"]
    assert main(list(map(str, argv))) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["num_frames"] == 4 and facts["images"] == ["02", "00"] and facts["note"] is None
    with Image.open(strip) as found:
        assert found.width >= 4 * 96
    with Image.open(animation) as found:
        assert found.size == (192, 192)  # frames that are equal are one

    LatentCodec(build("AutoencoderKL")).save_pretrained(tmp_path / "grid")
    assert (
        main(
            [
                "interpolate",
                str(images),
                "--codec",
                str(tmp_path / "grid"),
                "--steps",
                "2",
                "--out",
                str(strip),
            ]
        )
        == 0
    )
    out, err = capsys.readouterr()
    assert "4 frames" not in out and "3 frames of 24x24 through 3 images" in out
    assert err.startswith("Note: grid has a grid of 4x6x6 latents") and err.count("\n") == 1


def test_bad_input_is_one_line(tmp_path, capsys):
    images = write_images(tmp_path / "images", 2)
    for more, words in (
        (["--index", 0], "DATA: expected two images or more, got 1"),
        (["--index", 0, 2], "--index: expected numbers from 0 to 1, of the images in DATA, got 2"),
        (["--animation", "morph.gif"], "morph.gif: an animation needs a name that ends in .webp or .mp4"),
    ):
        assert words in fails(capsys, "interpolate", images, "--out", tmp_path / "strip.png", *more)
    write_images(tmp_path / "images", 65, size=(8, 8))
    assert "at most 64 images, got 65; choose some by --index or --limit" in fails(
        capsys, "interpolate", images
    )


def test_an_animated_webp_has_every_frame(tmp_path):
    frames = [Image.new("RGB", (9, 8), color) for color in ("red", "green", "blue")]
    write_animation(frames, tmp_path / "a.webp")
    with Image.open(tmp_path / "a.webp") as found:
        assert found.n_frames == 3 and found.size == (9, 8)


def test_an_mp4_needs_ffmpeg(tmp_path, monkeypatch):
    frames = [Image.new("RGB", (9, 8), color) for color in ("red", "green", "blue")]
    if shutil.which("ffmpeg"):
        write_animation(frames, tmp_path / "a.mp4")
        assert (tmp_path / "a.mp4").read_bytes()[4:8] == b"ftyp"
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match="MP4 is written by ffmpeg, which is not installed here"):
        write_animation(frames, tmp_path / "b.mp4")
    assert not (tmp_path / "b.mp4").exists()
