"""The scripts in examples/ run, on a tiny pipeline from a folder."""

import os
import runpy
import signal
import threading
import time

import pytest
import torch
from helpers import ROOT
from helpers.pages import PAGES
from helpers.training import write_images
from PIL import Image
from test_swap_in import build_codec

from latent_codec import LatentCodec

EXAMPLES = {path.stem: path for path in (ROOT / "examples").glob("*.py")}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    build_codec().save_pretrained(folder / "codec")
    run_example("tiny_pipeline", folder / "tiny", "--codec", folder / "codec", "--size", 32)
    return str(folder / "tiny")


def run_example(name, *arguments):
    return runpy.run_path(str(EXAMPLES[name]))["main"]([str(argument) for argument in arguments])


def test_every_example_is_tested():
    of_pipelines = ["finetune_decoder", "preview_generation", "swap_vae", "tiny_pipeline"]
    assert sorted(EXAMPLES) == [*of_pipelines, "train_dit_on_latents"]
    for name in of_pipelines:
        assert f"python examples/{name}.py PIPELINE" in EXAMPLES[name].read_text()
    assert (
        f"python examples/{EXAMPLES['train_dit_on_latents'].name} " in PAGES["data-sets"]
    )  # whose code runs


def test_tiny_pipeline_refuses_a_size_that_the_codec_cannot_have(tmp_path):
    with pytest.raises(ValueError, match="expected a multiple of 16 pixels for default-f8c4, got 100"):
        run_example("tiny_pipeline", tmp_path / "tiny", "--size", 100)


def test_swap_vae(pipeline, tmp_path, capsys):
    codec = LatentCodec.from_pretrained(pipeline)
    with torch.no_grad():
        codec.autoencoder.decoder.conv_out.bias.add_(1)
    codec.weights_changed()
    codec.save_pretrained(tmp_path / "codec")
    out = tmp_path / "pair.png"
    run_example("swap_vae", pipeline, "a cat", "--codec", tmp_path / "codec", "--steps", 2, "--out", out)
    pair = Image.open(out)
    width = (pair.width - 4) // 2
    left, right = (pair.crop((x, 0, x + width, pair.height)) for x in (0, width + 4))
    assert left.tobytes() != right.tobytes()
    assert "differ" not in capsys.readouterr().out

    run_example("swap_vae", pipeline, "a cat", "--codec", "default", "--steps", 1, "--out", out)
    assert "The encoders or scales differ" in capsys.readouterr().out


def test_preview_generation(pipeline, tmp_path, capsys):
    run_example("preview_generation", pipeline, "a cat", "--steps", 3, "--out", tmp_path / "run")
    shown = sorted(path.name for path in (tmp_path / "run" / "steps").iterdir())
    assert shown[-1] == "step_0002.png"
    # Where two previews look the same, WebP keeps one for both.
    assert 1 <= Image.open(tmp_path / "run" / "run.webp").n_frames <= len(shown)
    assert Image.open(tmp_path / "run" / "image.png").size == (32, 32)
    assert "step 2 shows x_0" in capsys.readouterr().out


def test_finetune_decoder(pipeline, tmp_path):
    images = write_images(tmp_path / "photos", size=(40, 40))
    settings = ["run.steps=2", "run.calibration_images=2", "data.height=32", "optimizer.batch_size=2"]
    settings += ["objective.lpips_weight=0", "run.precision=fp32"]
    arguments = [word for setting in settings for word in ("--set", setting)]
    run_example("finetune_decoder", pipeline, images, "--out", tmp_path / "out", *arguments)
    before, after = (
        LatentCodec.from_pretrained(pipeline),
        LatentCodec.from_pretrained(tmp_path / "out" / "pipeline"),
    )
    assert after.space_fingerprint == before.space_fingerprint
    assert after.fingerprint != before.fingerprint


@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM])
def test_finetune_decoder_saves_what_there_is_when_it_is_stopped(pipeline, tmp_path, which, capsys):
    images = write_images(tmp_path / "photos", size=(40, 40))
    settings = ["run.steps=1000", "data.height=32", "optimizer.batch_size=2", "objective.lpips_weight=0"]
    arguments = [word for setting in settings for word in ("--set", setting)]
    stop = threading.Thread(target=stop_once_there_is, args=(tmp_path / "out" / "run" / "config.toml", which))
    stop.start()
    status = run_example("finetune_decoder", pipeline, images, "--out", tmp_path / "out", *arguments)
    stop.join()
    assert status == 128 + which
    assert "gets the decoder so far" in capsys.readouterr().err
    before, after = (LatentCodec.from_pretrained(each) for each in (pipeline, tmp_path / "out" / "pipeline"))
    assert after.space_fingerprint == before.space_fingerprint


def stop_once_there_is(path, which) -> None:
    while not path.exists():
        time.sleep(0.05)
    # Before the loop handles signals they end a program as they always do.
    while signal.getsignal(which) in (signal.SIG_DFL, signal.SIG_IGN, signal.default_int_handler):
        time.sleep(0.05)
    os.kill(os.getpid(), which)
