"""The verb `fit-preview`: what it writes, what it says, what it refuses."""

import json
import re
from pathlib import Path

import pytest
import torch
from helpers.commands import fails, files_in
from helpers.training import write_images
from test_previews import build, smooth

from latent_codec import AutoencoderVQ, LatentCodec
from latent_codec.cli import main
from latent_codec.components.codec_folders import ASSETS, WEIGHTS
from latent_codec.previews import LatentPreviewer

SMALL = [
    "--set=model.arguments.block_out_channels=[8, 8]",
    "--set=data.height=16",
    "--set=optimizer.batch_size=2",
    "--set=run.log_every=1",
]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The current folder, with images in `photos`, a run folder `run` and a discrete codec `vq`."""
    monkeypatch.chdir(tmp_path)
    write_images(Path("photos"), 9)
    build().save_pretrained("run/codec")
    Path("run/codec/README.md").write_text("# the model card\n")
    build(AutoencoderVQ).save_pretrained("vq")
    return tmp_path


def test_it_fits_to_images_and_writes_into_the_codecs_folder(place, capsys):
    before = files_in("run")
    assert main(["fit-preview", "--codec", "run", "photos"]) == 0
    out, err = capsys.readouterr()
    after = files_in("run")
    assert after.pop("codec/preview.safetensors") and after == before
    assert err == ""
    first, second, last = out.splitlines()
    assert re.fullmatch(r"run: linear preview fitted to 8 images in \d+\.\d s", first)
    assert re.fullmatch(
        r"from latents: correlation -?[01]\.\d{3} with the downscaled decode, on held-out images", second
    )
    assert Path(last.removeprefix("Preview: ")).resolve() == Path("run/codec/preview.safetensors").resolve()
    assert LatentPreviewer.from_pretrained("run").kind == "linear"


def test_without_images_it_takes_random_latents_and_is_the_same_each_time(place, capsys):
    assert main(["fit-preview", "--codec", "vq", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    first = Path("vq/preview.safetensors").read_bytes()
    assert (found["images"], found["correlation"], found["palette_correlation"]) == (0, None, None)
    assert found["fingerprint"] == LatentCodec.from_pretrained("vq").fingerprint
    assert main(["fit-preview", "--codec", "vq"]) == 0
    assert "fitted to random latents" in capsys.readouterr().out
    assert Path("vq/preview.safetensors").read_bytes() == first
    previewer = LatentPreviewer.from_pretrained("vq")
    assert previewer.indices(torch.full((1, 2, 3), -1)).shape == (1, 3, 2, 3)


def test_held_out_images_of_a_discrete_codec_are_compared_by_indices_too(place, capsys):
    assert main(["fit-preview", "--codec", "vq", "photos", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert -1 <= found["correlation"] <= 1 and -1 <= found["palette_correlation"] <= 1
    assert main(["fit-preview", "--codec", "vq", "photos", "--limit", "7", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["images"], found["correlation"]) == (7, None)


def test_a_preview_of_older_weights_or_a_damaged_one_is_replaced(place, capsys):
    assert main(["fit-preview", "--codec", "run"]) == 0
    build(seed=1).save_pretrained("run/codec")
    assert main(["fit-preview", "--codec", "run"]) == 0
    LatentPreviewer.from_pretrained("run")
    Path("run/codec/preview.safetensors").write_bytes(b"cut short")
    assert main(["fit-preview", "--codec", "run"]) == 0
    LatentPreviewer.from_pretrained("run")


def test_a_shipped_codec_is_copied_to_the_bit(place, capsys, monkeypatch):
    # what is copied does not depend on what is fitted, which takes its time with a codec of full size
    from latent_codec.previews import fitting

    monkeypatch.setattr(fitting, "NUM_RANDOM", 1)
    monkeypatch.setattr(fitting, "SIDE", 32)
    before = files_in(ASSETS / "default-f8c4")
    assert "which are never changed; give --out DIR" in fails(capsys, "fit-preview", "--codec", "default")
    for _ in range(2):  # the second time the copy is there
        assert main(["fit-preview", "--codec", "default", "--out", "copy"]) == 0
    assert files_in(ASSETS / "default-f8c4") == before
    copied = files_in("copy")
    assert copied.keys() == {
        "config.json",
        "README.md",
        "preview.safetensors",
        "entropy.safetensors",
        WEIGHTS,
    }
    for name in copied.keys() - {"preview.safetensors"}:
        assert copied[name] == before[name]
    assert LatentPreviewer.from_pretrained("copy").kind == "linear"


def test_a_folder_of_something_else_is_left_alone(place, capsys):
    Path("full").mkdir()
    Path("full/letter.txt").write_text("dear")
    assert "holds other files and no codec" in fails(capsys, "fit-preview", "--codec", "run", "--out", "full")
    message = fails(capsys, "fit-preview", "--codec", "run", "--out", "vq")
    for codec in ("run", "vq"):
        assert LatentCodec.from_pretrained(codec).fingerprint in message
    assert not Path("vq/preview.safetensors").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--tiny"], "--tiny learns from images: name some as DATA"),
        (["--limit", "0"], "--limit: expected at least 1, got 0"),
        (
            ["--minutes", "3"],
            "--minutes: expected none without training, got 3.0; leave it out, or add --tiny",
        ),
        (["--set", "run.steps=3"], "--set: expected none without training"),
        (["--tiny", "photos", "--minutes", "0"], "--minutes: expected a number above 0, got 0.0"),
        (["nowhere"], "nowhere: no such file or folder"),
        (["--codec", "nowhere"], "nowhere does not exist"),
    ],
)
def test_wrong_flags_write_nothing(place, capsys, argv, message):
    assert message in fails(capsys, "fit-preview", "--codec", "run", *argv)
    assert not Path("run/codec/preview.safetensors").exists()


def test_tiny_trains_resumes_and_is_kept(place, capsys):
    argv = ["fit-preview", "--codec", "run", "photos", "--tiny", "--run", "r", *SMALL]
    assert main([*argv, "--set=run.steps=2"]) == 0
    out, err = capsys.readouterr()
    assert re.search(r"tiny decoder: 2 steps, -?\d+\.\d\d dB to the codec's own decode", out)
    assert "steps 0 to 2" in err and Path("r/checkpoints/2").is_dir()
    previewer = LatentPreviewer.from_pretrained("run")
    assert previewer.kind == "tiny"
    latents = smooth(1, 4, 4, 5)
    images = previewer(latents)
    assert images.shape == (1, 3, 8, 10)

    assert main(["fit-preview", "--codec", "run"]) == 0
    assert "the tiny decoder that was there is kept" in capsys.readouterr().out
    assert torch.equal(LatentPreviewer.from_pretrained("run")(latents), images)

    assert main([*argv, "--set=run.steps=3"]) == 0
    assert "steps 2 to 3" in capsys.readouterr().err
    assert not torch.equal(LatentPreviewer.from_pretrained("run")(latents), images)


def test_train_makes_the_tiny_decoder_alone(place, capsys):
    argv = ["train", "tiny-preview", "--data", "photos", "--codec", "run", "--out", "r", "--set=run.steps=1"]
    assert main([*argv, *SMALL]) == 0
    assert capsys.readouterr().out.strip() == str(Path("r/preview"))
    from latent_codec.models.tiny_decoder import TinyDecoder

    decoder = TinyDecoder.from_pretrained("r/preview")
    assert decoder.config.latent_channels == 4 and decoder.upsampling_factor == 2
    card = Path("r/preview/README.md").read_text()
    assert 'teacher = "run"' in card and str(place) not in card
