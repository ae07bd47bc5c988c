"""Whose latents a codec's are is kept: in its folder, in a run, in what was trained, and in a joined pipeline."""

import json
import shutil
import tomllib
import warnings
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from helpers.autoencoders import build
from helpers.commands import fails
from helpers.training import tiny_config, write_images

import latent_codec
from latent_codec import LatentCodec, PixelCNN
from latent_codec.bitstream import load_entropy_model
from latent_codec.cli import main
from latent_codec.components.codec_facts import read_facts
from latent_codec.components.weight_files import WEIGHTS
from latent_codec.converting import convert
from latent_codec.evaluation.calibration import usual_convention
from latent_codec.pipelines import PriorPipeline
from latent_codec.previews import LatentPreviewer
from latent_codec.training.config import dump_toml, load_config

SD, SD3 = "StableDiffusionPipeline", "StableDiffusion3Pipeline"
"""The first ignores a shift, which the second reads."""
NAMED = ("--for-pipeline", SD)


@pytest.fixture
def codec(tmp_path, monkeypatch):
    """As SD sees a codec with a shift, which is the folder `codec`; `photos` has images for it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    write_images(Path("photos"), 9, size=(32, 32))
    LatentCodec(build("AutoencoderKL", shift_factor=0.5)).save_pretrained("codec")
    assert LatentCodec.from_pretrained("codec").pipeline is None
    return LatentCodec.from_pretrained("codec", pipeline=SD)


def run(*argv) -> None:
    assert main(list(map(str, argv))) == 0


def test_a_saved_codec_opens_as_its_pipeline_sees_it(codec, tmp_path):
    codec.save_pretrained("saved")
    shutil.copyfile(Path("saved", WEIGHTS), "lone.safetensors")
    convert("saved", "converted", to="diffusers")
    for name in ("saved", "lone.safetensors", "converted"):
        for found in (LatentCodec.from_pretrained(name), read_facts(name)):
            assert (found.pipeline, found.fingerprint) == (SD, codec.fingerprint), name
    assert LatentCodec.from_pretrained("saved", pipeline=SD3).latent_space.shift_factor == 0.5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AutoencoderKL.from_pretrained("saved")

    Path("model_index.json").write_text(json.dumps({"_class_name": SD3}))
    assert LatentCodec.from_pretrained("saved").pipeline == SD3  # the pipeline's folder goes before it


def finetune(*argv) -> list[str]:
    """A command that trains the decoder of `codec` for two steps."""
    table = tiny_config(data={"height": 32}, run={"steps": 2, "checkpoint_every": 1}).to_dict()
    del table["model"]["arguments"]
    table["model"] |= {"train": "decoder", "pretrained": "given by --codec"}
    Path("tiny.toml").write_text(dump_toml(table))
    return ["train", "tiny.toml", "--codec", "codec", "--data", "photos", "--out", "run", *argv]


def test_a_run_and_its_codec_are_of_the_pipeline(codec, capsys):
    run(*finetune(*NAMED))

    assert tomllib.loads(Path("run/config.toml").read_text())["model"]["pipeline"] == SD
    after = LatentCodec.from_pretrained("run")
    assert (after.pipeline, after.space_fingerprint) == (SD, codec.space_fingerprint)
    assert codec.space_fingerprint in Path("run/codec/README.md").read_text()

    shutil.rmtree("run/checkpoints/2")
    shutil.rmtree("run/codec")
    run(*finetune(*NAMED))
    assert LatentCodec.from_pretrained("run").fingerprint == after.fingerprint
    words = fails(capsys, *finetune())
    assert f"model.pipeline ({SD} -> None)" in words


def test_a_run_goes_on_that_did_not_record_the_pipeline(codec):
    shutil.move("codec", "vae")
    Path("codec").mkdir()
    shutil.move("vae", "codec/vae")
    Path("codec/model_index.json").write_text(json.dumps({"_class_name": SD}))
    run(*finetune())
    config = Path("run/config.toml")
    assert f'pipeline = "{SD}"' in config.read_text()
    config.write_text(config.read_text().replace(f'pipeline = "{SD}"\n', ""))
    shutil.rmtree("run/checkpoints/2")

    run(*finetune())

    assert f'pipeline = "{SD}"' in config.read_text()


def test_a_new_codec_is_calibrated_for_the_pipeline(codec):
    config = tiny_config(run={"steps": 1}).to_dict()
    Path("tiny.toml").write_text(dump_toml(config))
    latent_codec.train("tiny.toml", "photos", "run", pipeline=SD)
    found = LatentCodec.from_pretrained("run")
    assert (found.pipeline, found.latent_space.scaling_factor, found.latent_space.mean) == (SD, 1, None)


def test_pipelines_that_do_not_fit_are_refused_before_anything_is_written(codec, capsys):
    upscaler = "StableDiffusionUpscalePipeline"
    Path("tiny.toml").write_text(dump_toml(tiny_config(model={"pipeline": upscaler}).to_dict()))
    words = fails(capsys, "train", "tiny.toml", "--data", "photos", "--out", "run")
    assert f"{upscaler} takes a scaling_factor of 0.08333" in words
    with pytest.raises(ValueError, match=r"0\.08333"):
        usual_convention(LatentCodec.from_pretrained("codec", pipeline=upscaler))
    for name, expected in {
        "WanPipeline": "WanPipeline takes AutoencoderKLWan, and this autoencoder is of the class AutoencoderKL",
        "StableDifusionPipeline": "such as StableDiffusionPipeline",
    }.items():
        assert expected in fails(capsys, *finetune("--for-pipeline", name))
    words = fails(capsys, "train", "fashion-mnist-classifier", "--data", "photos", "--out", "run", *NAMED)
    assert words.startswith("latent-codec train: --for-pipeline: expected none for ImageClassifier")
    assert not Path("run/config.toml").exists()


CONTEXT = ("--set=data.height=32", "--set=optimizer.batch_size=2", "--set=model.arguments.hidden=8")


def test_entropy_models_are_of_the_pipelines_latents(codec):
    small = (*CONTEXT, "--set=run.steps=1", *NAMED)
    run("fit-entropy", "photos", "--codec", "codec", "--run", "run", *small)
    assert load_entropy_model("codec", codec=codec).space_fingerprint == codec.space_fingerprint

    run("train", "latent-context", "--codec", "codec", "--data", "photos", "--out", "trained", *small)
    for folder in ("run", "trained"):
        assert f'pipeline = "{SD}"' in Path(folder, "config.toml").read_text()
        assert checkpoint(folder)["space_fingerprint"] == codec.space_fingerprint


def checkpoint(folder: str) -> dict:
    return json.loads(Path(folder, "checkpoints/1/state.json").read_text())


def test_a_tiny_preview_learns_the_pipelines_latents(codec):
    run(
        *("fit-preview", "photos", "--codec", "codec", "--tiny", "--run", "run", *NAMED),
        *("--set=data.height=16", "--set=run.steps=1", "--set=model.arguments.block_out_channels=[8, 8, 8]"),
    )

    assert checkpoint("run")["teacher"] == codec.fingerprint
    assert LatentPreviewer.from_pretrained("codec", pipeline=SD).kind == "tiny"


def test_a_prior_over_latents_is_joined_with_the_pipeline_whose_latents_it_learned(codec, capsys):
    size = {"sample_size": (2, 2), "data_channels": 4, "data": "latents", "latent_steps": (0.1,) * 4}
    prior = PixelCNN(
        **size, hidden_channels=8, num_layers=1, num_mixtures=2, space_fingerprint=codec.space_fingerprint
    )
    prior.save_pretrained("prior")
    join = ("pipeline", "--prior", "prior", "--out", "joined")
    assert "--codec" in fails(capsys, *join, *NAMED)

    run(*join, "--codec", "codec", *NAMED)

    pipe = PriorPipeline.from_pretrained("joined")
    drawn = pipe(num_images=1, output_type="pt", generator=torch.Generator().manual_seed(0))
    latents = pipe.prior.decode_latents(drawn.indices[0])
    torch.testing.assert_close(drawn.images, codec.decode(latents, output_type="pt"))
    assert LatentCodec.from_pretrained("joined").space_fingerprint == codec.space_fingerprint
    assert "space" not in capsys.readouterr().err  # nothing warns of another codec's latents


def test_a_preset_names_the_pipeline():
    assert load_config("finetune-decoder", pipeline=SD).model.pipeline == SD
