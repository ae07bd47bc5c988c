"""The verbs `calibrate` and `sample`: what they write, what they say, what they refuse."""

import json
import re
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from helpers.commands import fails, files_in
from PIL import Image
from safetensors.torch import load, load_file

from latent_codec import LatentCodec
from latent_codec.cli import main
from latent_codec.components.codec_folders import WEIGHTS
from latent_codec.evaluation.calibration import measure
from latent_codec.images.sources import open_source


def build(kind=diffusers.AutoencoderKL, levels=2, **config):
    torch.manual_seed(0)
    return kind(
        block_out_channels=(8,) * levels,
        norm_num_groups=4,
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        mid_block_add_attention=False,
        **config,
    )


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The current folder, with images in `photos`, and a run folder `run` with a codec in half precision."""
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    rng = np.random.default_rng(0)
    for i in range(3):
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        coarse.resize((24, 16), Image.Resampling.BICUBIC).save(f"photos/{i}.png")
    LatentCodec(build(sample_size=12).half()).save_pretrained("run/codec")
    Path("run/config.toml").write_text("# how it was trained\n")
    Path("run/codec/README.md").write_text("# the model card\n")
    Path("run/codec/preview.safetensors").write_bytes(b"a sidecar")
    return tmp_path


# ------------------------------------------------------------------------------------------ calibrate


def test_calibrate_updates_a_run_in_place(place, capsys):
    before = files_in("run")
    expected = measure(LatentCodec.from_pretrained("run"), open_source("photos"))
    assert main(["calibrate", "photos", "--codec", "run"]) == 0
    out, err = capsys.readouterr()
    assert err == ""

    after = files_in("run")
    weights = "codec/diffusion_pytorch_model.safetensors"  # its metadata holds the config, too
    assert {name for name in after if after[name] != before[name]} == {"codec/config.json", weights}
    tensors = [load(files[weights]) for files in (before, after)]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])
    assert after.keys() == before.keys()
    config = json.loads(Path("run/codec/config.json").read_text())
    assert config["scaling_factor"] == pytest.approx(expected.scaling_factor)
    assert config["shift_factor"] == pytest.approx(expected.shift_factor)
    assert (config["latents_mean"], config["force_upcast"]) == (None, False)
    assert "_name_or_path" not in config

    assert f"{expected.mean[2]:.4f}" in out and f"{expected.std[2]:.4f}" in out
    assert f"scaling_factor {expected.scaling_factor:.5g}" in out
    assert re.search(r"float16 +\d+\.\d\d dB +\d\.\d{3} dB", out)
    assert "latents made before no longer decode" in out
    assert Path("run/codec").resolve() == Path(out.strip().splitlines()[-1].removeprefix("Codec: "))


def test_what_is_calibrated_already_keeps_its_latent_space(place, capsys):
    """In particular the codec of a run, whose mean and scale the training has folded into its weights."""
    for convention in ([], ["--normalize"]):
        assert main(["calibrate", "photos", "--codec", "run", "--out", "once", *convention]) == 0
        once = LatentCodec.from_pretrained("once")
        capsys.readouterr()
        assert main(["calibrate", "photos", "--codec", "once"]) == 0
        out = capsys.readouterr().out
        assert "Scale and shift were as measured before, and stay." in out and "no longer decode" not in out
        again = LatentCodec.from_pretrained("once")
        assert (again.latent_space, again.space_fingerprint) == (once.latent_space, once.space_fingerprint)
    assert main(["calibrate", "photos/0.png", "--codec", "once"]) == 0
    assert "no longer decode" in capsys.readouterr().out


def test_calibrate_prints_json_and_writes_a_copy(place, capsys):
    before = files_in("run")
    assert main(["calibrate", "photos", "--codec", "run", "--per-channel", "--out", "copy", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert files_in("run") == before
    codec = LatentCodec.from_pretrained("copy")
    assert codec.latent_space.mean == pytest.approx(found["measured"]["mean"])
    assert codec.latent_space.std == pytest.approx(found["measured"]["std"])
    assert found["written"]["latents_std"] == list(codec.latent_space.std)
    assert (codec.latent_space.scaling_factor, codec.latent_space.shift_factor) == (1, 0)
    assert found["space_fingerprint"] == codec.space_fingerprint
    assert found["space_fingerprint_before"] == LatentCodec.from_pretrained("run").space_fingerprint
    assert (found["path"], found["convention"]) == ("copy", "channels")
    assert [each["dtype"] for each in found["measured"]["parity"]] == ["float32", "bfloat16", "float16"]
    assert Path("copy/README.md").read_text() == "# the model card\n"
    plain = diffusers.AutoencoderKL.from_pretrained("copy")
    assert tuple(plain.config.latents_mean) == codec.latent_space.mean


def test_normalize_folds_into_the_weights_and_keeps_half_precision(place, capsys):
    assert main(["calibrate", "photos", "--codec", "run", "--normalize"]) == 0
    assert "latents made before no longer decode" in capsys.readouterr().out
    weights = load_file(Path("run/codec", WEIGHTS))
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    again = measure(LatentCodec.from_pretrained("run"), open_source("photos"))
    # The folded weights are rounded to float16, which has 11 bits.
    assert again.mean == pytest.approx([0] * 4, abs=5e-3)
    assert again.std == pytest.approx([1] * 4, rel=5e-3)


def test_keep_space_leaves_latents_alone(place, capsys):
    before = LatentCodec.from_pretrained("run")
    assert before.autoencoder.config.force_upcast is True
    assert main(["calibrate", "photos", "--codec", "run", "--keep-space"]) == 0
    assert "no longer decode" not in capsys.readouterr().out
    after = LatentCodec.from_pretrained("run")
    assert after.autoencoder.config.force_upcast is False
    assert (after.latent_space, after.fingerprint) == (before.latent_space, before.fingerprint)


def test_calibrate_names_what_it_skipped(place, capsys):
    Path("photos/torn.png").write_bytes(Path("photos/0.png").read_bytes()[:50])
    assert main(["calibrate", "photos", "--codec", "run", "--out", "copy"]) == 0
    out, err = capsys.readouterr()
    assert "3 images" in out
    assert err.startswith("skipped ") and "torn.png" in err and err.count("\n") == 1


def test_calibrate_refuses_before_it_measures(place, capsys):
    LatentCodec(build(diffusers.VQModel, num_vq_embeddings=16)).save_pretrained("vq")
    Path("notes").mkdir()
    Path("notes/todo.txt").write_text("mine")
    before = files_in(".")
    weights = Path("run/codec", WEIGHTS)
    for argv, message in [
        (("nowhere", "--codec", "run"), "nowhere"),
        (("photos", "--codec", weights), "give --out DIR"),
        (("photos", "--codec", "run", "--out", "notes"), "holds other files and no codec"),
        (("photos", "--codec", "run", "--out", "photos/0.png"), "is a file; give a folder"),
        (("photos", "--codec", "vq", "--normalize"), "this VQModel has no quant convolutions"),
        (
            ("photos", "--codec", "vq", "--per-channel"),
            "expected a scale, which is all that a pipeline of VQModel reads",
        ),
        (
            ("photos", "--codec", "run", "--dtype", "float16"),
            "--dtype: expected float32, against which the others are measured, got 'float16'",
        ),
        (("photos", "--codec", "run", "--limit", "0"), "--limit: expected at least 1, got 0"),
    ]:
        assert message in fails(capsys, "calibrate", *argv), argv
    assert files_in(".") == before
    with pytest.raises(SystemExit) as end:
        main(["calibrate", "photos", "--codec", "run", "--normalize", "--keep-space"])
    assert end.value.code == 2


def test_a_shipped_codec_is_never_overwritten(place, capsys, monkeypatch):
    LatentCodec(build()).save_pretrained("assets/default-f8c4")
    monkeypatch.setattr("latent_codec.components.codec_folders.ASSETS", place / "assets")
    before = files_in("assets")
    for name in ("default", "default-f8c4"):
        assert "give --out DIR" in fails(capsys, "calibrate", "photos", "--codec", name)
    monkeypatch.chdir(place / "assets")  # where the shipped name is a folder's name, too
    Path("default").mkdir()
    assert "give --out DIR" in fails(capsys, "calibrate", "../photos", "--codec", "default")
    Path("default").rmdir()
    monkeypatch.chdir(place)
    assert main(["calibrate", "photos", "--codec", "default", "--out", "mine"]) == 0
    assert files_in("assets") == before
    assert LatentCodec.from_pretrained("mine").latent_space.shift_factor != 0


def test_full_disk_leaves_the_codec_as_it_was(place, capsys):
    """A limit on the size of files stands for a full disk: the system refuses the write half way."""
    resource = pytest.importorskip("resource")
    before = files_in(".")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        fails(capsys, "calibrate", "photos", "--codec", "run")
        fails(capsys, "calibrate", "photos", "--codec", "run", "--out", "copy")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert files_in(".") == before


# ------------------------------------------------------------------------------------------ sample


def cells(path, height, width):
    """The images of a grid with gaps of 4 px, row by row, as small as they were before they were enlarged to 96 px a side
    or more."""
    with Image.open(path) as sheet:
        pixels = np.asarray(sheet)
    factor = -(-96 // min(height, width))
    height, width = factor * height, factor * width
    rows, columns = (pixels.shape[0] + 4) // (height + 4), (pixels.shape[1] + 4) // (width + 4)
    assert pixels.shape[:2] == (rows * (height + 4) - 4, columns * (width + 4) - 4)
    return [
        pixels[row * (height + 4) :, column * (width + 4) :][:height:factor, :width:factor].astype(int)
        for row in range(rows)
        for column in range(columns)
    ]


def test_sample_decodes_normal_latents_into_a_grid(place, capsys):
    assert main(["sample", "--codec", "run", "--num", "5", "--seed", "3"]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        "5 samples of 12x12 from 4x6x6 latents, seed 3, see samples.png",
        "drawn: raw latents with mean 0 and std 5.49, the same for every channel",
    ]
    assert err == ""
    codec = LatentCodec.from_pretrained("run")
    generator = torch.Generator().manual_seed(3)
    grid = cells("samples.png", 12, 12)
    assert len(grid) == 6  # three columns, two rows, the last cell empty
    for cell in grid[:5]:
        (expected,) = codec.decode(torch.randn(1, 4, 6, 6, generator=generator))
        assert np.abs(cell - np.asarray(expected, int)).max() <= 1  # alone and in a batch round differently
    assert grid[5].min() == 255


def test_samples_follow_the_seed_and_not_the_number(place, capsys):
    for name, options in {
        "few": ["--num", "2"],
        "again": ["--num", "2"],
        "more": ["--num", "4"],
        "other": ["--num", "2", "--seed", "1"],
        "cold": ["--num", "2", "--temperature", "0"],
    }.items():
        assert main(["sample", "--codec", "run", "--out", f"{name}.png", *options]) == 0
    few, again, more, other, cold = (
        cells(f"{name}.png", 12, 12) for name in ("few", "again", "more", "other", "cold")
    )
    assert np.array_equal(few, again)
    assert np.abs(np.array(few) - np.array(more[:2])).max() <= 1
    assert np.abs(np.array(few) - np.array(other)).max() > 10
    assert np.array_equal(cold[0], cold[1])
    assert np.abs(few[0] - few[1]).max() > 10


@pytest.mark.parametrize("size, pixels", [("16x24", (16, 24)), ("20", (20, 20)), ("13X7", (13, 7))])
def test_sample_size_is_in_pixels(size, pixels, place, capsys):
    argv = ["sample", "--codec", "run", "--num", "1", "--size", size, "--out", "s.png", "--json"]
    assert main(argv) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["size"] == list(pixels)
    assert facts["latent_shape"] == [4, *(-(-side // 2) for side in pixels)]
    assert len(cells("s.png", *pixels)) == 1


def test_one_vector_per_image_gives_images_of_the_training_size(place, capsys):
    global_codec = build(levels=5, sample_size=14, in_channels=1, out_channels=1, latent_channels=3)
    LatentCodec(global_codec).save_pretrained("global")
    assert main(["sample", "--codec", "global", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["latent_shape"], facts["size"], facts["num"]) == ([3, 1, 1], [14, 14], 16)
    assert len(cells("samples.png", 14, 14)) == 16


def test_sample_says_what_it_drew(place, capsys):
    for options, said in [
        (["--per-channel"], r"raw latents with per-channel mean \(.+, .+, .+, .+\) and std \(.+\)"),
        (["--normalize"], r"raw latents from N\(0, I\), as they are"),
        ([], r"raw latents with mean \S+ and std \S+, the same for every channel"),
    ]:
        assert main(["calibrate", "photos", "--codec", "run", "--out", "copy", *options]) == 0
        capsys.readouterr()
        assert main(["sample", "--codec", "copy", "--num", "1"]) == 0
        assert re.fullmatch(f"drawn: {said}", capsys.readouterr().out.splitlines()[1])
    assert main(["sample", "--codec", "copy", "--num", "1", "--temperature", "0.5"]) == 0
    assert "std" in (said := capsys.readouterr().out) and "times 0.5" in said


def test_samples_have_the_spread_of_the_posterior(place, capsys):
    """Whatever the convention, normal latents decode as the aggregate posterior's mean and std ask."""
    sheets = {}
    for name, options in {"channels": ["--per-channel"], "normalized": ["--normalize"]}.items():
        assert main(["calibrate", "photos", "--codec", "run", "--out", name, *options]) == 0
        assert main(["sample", "--codec", name, "--num", "4", "--out", f"{name}.png"]) == 0
        sheets[name] = np.array(cells(f"{name}.png", 12, 12))
    # The same images, up to the rounding of the folded weights to float16.
    assert np.abs(sheets["channels"] - sheets["normalized"]).max() <= 2


def test_sample_refuses_what_it_cannot_do(place, capsys):
    LatentCodec(build(diffusers.VQModel, num_vq_embeddings=16)).save_pretrained("vq")
    for argv, message in [
        (("--codec", "vq"), "its codewords do not follow a normal distribution"),
        (("--codec", "run", "--num", "0"), "--num: expected at least 1, got 0"),
        (
            ("--codec", "run", "--temperature", "-1"),
            "--temperature: expected a number of at least 0, got -1.0",
        ),
        (("--codec", "run", "--temperature", "nan"), "at least 0, got nan"),
        (
            ("--codec", "run", "--size", "big"),
            "--size: expected HEIGHTxWIDTH in pixels, such as 64x96, or one side, got 'big'",
        ),
        (("--codec", "run", "--size", "8x0"), "got '8x0'"),
        (("--codec", "run", "--size", "8x8x8"), "got '8x8x8'"),
        (("--codec", "run", "--out", "grid.xyz", "--num", "1"), "grid.xyz"),
        (("--codec", "nowhere"), "nowhere does not exist"),
    ]:
        assert message in fails(capsys, "sample", *argv), argv
    assert not list(Path().glob("*.png")) and not list(Path().glob("*.xyz"))
