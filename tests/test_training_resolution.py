"""What a configuration leaves open, and how a run decides it: the precision, and settings that are shares of the run."""

import logging
import tomllib

import pytest
import torch
from helpers.training import run_tiny, tiny_config, weights, write_images

from latent_codec.cli import main
from latent_codec.precision import computes_bfloat16
from latent_codec.training.autoencoder_task import AutoencoderTask
from latent_codec.training.build import build_autoencoder
from latent_codec.training.config import IN_STEPS, dump_toml, load_config, preset_names
from latent_codec.training.resolution import resolve
from latent_codec.training.task import TaskInputs

EMULATES = computes_bfloat16("cpu") is False


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images") / "images")


def stored(run) -> dict:
    return tomllib.loads((run / "config.toml").read_text())


def in_steps(config) -> dict[str, int | float]:
    return {
        f"{section}.{name}": getattr(getattr(config, section), name)
        for section, names in IN_STEPS.items()
        for name in names
    }


# ---------------------------------------------------------------------------------------- shares of a run


@pytest.mark.parametrize("name", preset_names())
@pytest.mark.parametrize("steps", [3, 100])
def test_every_preset_can_be_tried_in_a_few_steps(name, steps, tmp_path):
    whole, short = (
        resolve(load_config(name, overrides), tmp_path / "run", "cpu")
        for overrides in ([], [f"run.steps={steps}"])
    )
    assert short.run.steps == steps
    for setting, count in in_steps(short).items():
        assert isinstance(count, int)
        if setting not in ("objective.gan_ramp", "objective.gan_start") or short.objective.gan_weight:
            assert count < steps
            assert count <= max(in_steps(whole)[setting] * steps / whole.run.steps, setting.endswith("ramp"))
    if short.kind.name == "codec" and not short.model.pretrained:
        with torch.device("meta"):
            AutoencoderTask.check(short, build_autoencoder(short), TaskInputs(source=None))


def test_what_shrinks_with_a_run_is_said_and_what_was_set_stays(tmp_path, caplog):
    caplog.set_level(logging.INFO, "latent_codec")
    overrides = ["run.steps=100", "optimizer.warmup_steps=7"]
    config = resolve(load_config("faces-vqvae2", overrides), tmp_path / "run", "cpu")
    assert (config.codebook.start_step, config.optimizer.warmup_steps) == (8, 7)  # 200 of 2500
    assert "codebook.start_step 8 (shares of 100 steps)" in caplog.text


def test_a_setting_in_steps_beyond_the_end_is_refused_with_a_way_out(tmp_path, images):
    with pytest.raises(
        ValueError, match=r"start_step: expected a step before the run ends at 3, or a share .*, got 9"
    ):
        run_tiny(images, tmp_path / "run", **codebook(start_step=9))


def codebook(**settings) -> dict:
    arguments = {
        "strides": [4],
        "hidden_channels": 8,
        "residual_channels": 4,
        "embed_dim": 4,
        "codebook_sizes": 8,
        "block_out_channels": None,
    }
    return {
        "model": {"class_name": "HierarchicalVQ", "arguments": {k: v for k, v in arguments.items() if v}},
        "codebook": {"kmeans_crops": 8, **settings},
    }


def tried(tmp_path, images, *overrides, preset=None) -> int:
    return main(
        ["train", str(preset or tmp_path / "vq.toml"), "--data", str(images), "--out", str(tmp_path / "run")]
        + [word for override in overrides for word in ("--set", override)]
    )


@pytest.fixture
def vq_preset(tmp_path):
    table = tiny_config().to_dict() | {"objective": {}}
    table["model"] = codebook()["model"]
    table["codebook"] = {"kmeans_crops": 8, "start_step": 4}
    table["run"] |= {"steps": 20, "log_every": 20, "calibration_images": 0}
    table["optimizer"]["warmup_steps"] = 10
    (tmp_path / "vq.toml").write_text(dump_toml(table))
    return tmp_path / "vq.toml"


def test_a_quick_try_goes_on_as_a_longer_run_with_the_steps_that_it_began_with(
    vq_preset, tmp_path, images, capsys
):
    assert tried(tmp_path, images, "run.steps=5") == 0
    assert stored(tmp_path / "run")["codebook"]["start_step"] == 1
    assert stored(tmp_path / "run")["optimizer"]["warmup_steps"] == 2
    assert tried(tmp_path, images, "run.steps=6") == 0
    assert stored(tmp_path / "run")["codebook"]["start_step"] == 1
    assert "codebook.start_step 1, optimizer.warmup_steps 2 (as the run began)" in capsys.readouterr().err
    assert tried(tmp_path, images, "run.steps=6", "codebook.start_step=2") == 2
    assert "codebook.start_step (1 -> 2)" in capsys.readouterr().err


def test_a_run_of_an_older_version_goes_on(vq_preset, tmp_path, images, capsys):
    """Its config.toml holds what was then: numbers of steps as the preset has them, whatever run.steps, and bf16."""
    settings = ["run.steps=8", "codebook.start_step=4", "optimizer.warmup_steps=10"]
    assert tried(tmp_path, images, *settings) == 0
    assert tried(tmp_path, images, "run.steps=9") == 0
    assert stored(tmp_path / "run")["codebook"]["start_step"] == 4
    assert stored(tmp_path / "run")["optimizer"]["warmup_steps"] == 10


# ---------------------------------------------------------------------------------------------- precision


def test_bfloat16_arithmetic_is_told_from_a_cpus_flags(tmp_path):
    info = tmp_path / "cpuinfo"
    for text, computes in [
        ("processor : 0\nflags\t: fpu avx512f avx512_bf16\n", True),
        ("processor : 0\nflags\t: fpu avx2 amx_bf16\n", True),
        ("processor : 0\nflags\t: fpu avx2 avx512f\n", False),
        ("processor : 0\nFeatures\t: fp asimd\n", None),  # not an x86
    ]:
        info.write_text(text)
        assert computes_bfloat16("cpu", info) is computes
    assert computes_bfloat16("cpu", tmp_path / "none") is None
    assert computes_bfloat16("meta", info) is None


def test_precision_is_decided_when_a_run_begins_and_stored(tmp_path, images):
    config = tiny_config(run={"precision": "auto"})
    result = run_tiny(images, tmp_path / "run", run={"precision": "auto"})
    expected = "bf16" if computes_bfloat16("cpu") else "fp32"
    assert result.config.run.precision == stored(tmp_path / "run")["run"]["precision"] == expected
    assert config.run.precision == "auto"
    run_tiny(images, tmp_path / "same", run={"precision": expected})
    found, same = (weights(tmp_path / name / "checkpoints" / "3") for name in ("run", "same"))
    assert all(torch.equal(found[key], same[key]) for key in same)


def test_a_run_that_began_in_bf16_goes_on_in_it_and_another_precision_is_refused(tmp_path, images, caplog):
    caplog.set_level(logging.INFO, "latent_codec")
    run_tiny(images, tmp_path / "run", run={"precision": "bf16"})
    first = caplog.text
    caplog.clear()
    result = run_tiny(images, tmp_path / "run", run={"precision": "auto", "steps": 4})
    assert result.config.run.precision == stored(tmp_path / "run")["run"]["precision"] == "bf16"
    second = caplog.text
    assert ("about 20 to 30 times slower" in first) == EMULATES
    assert ("began in bf16 and goes on in it" in second) == EMULATES
    with pytest.raises(ValueError, match=r"run.precision \(bf16 -> fp32\)"):
        run_tiny(images, tmp_path / "run", run={"precision": "fp32", "steps": 5})


def test_a_precision_that_is_asked_for_is_taken(tmp_path):
    for precision in ("fp32", "bf16"):
        config = tiny_config(run={"precision": precision})
        assert resolve(config, tmp_path, "cpu") == config
    config = tiny_config(run={"precision": "auto"})
    assert resolve(config, tmp_path, "mps").run.precision == "fp32"  # not known to compute in bfloat16


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_command_line_says_what_bfloat16_costs(dtype, images, tmp_path, capsys):
    arguments = [str(images / "00.png"), "--out", str(tmp_path), "--device", "cpu", "--dtype", dtype]
    assert main(["roundtrip", *arguments]) == 0
    said = capsys.readouterr().err.count("about 20 to 30 times slower than float32")
    assert said == (EMULATES and dtype == "bfloat16")
