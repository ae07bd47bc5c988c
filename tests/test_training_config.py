import dataclasses
import tomllib

import pytest
from helpers.training import tiny_config

from latent_codec.errors import SettingError
from latent_codec.training.build import build_autoencoder
from latent_codec.training.config import OptimizerConfig, TrainingConfig, dump_toml, load_config


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"optimizr": {}}, "unknown section 'optimizr' .did you mean 'optimizer'"),
        ({"run": {"step": 3}}, r"unknown key in \[run\]: 'step' .did you mean 'steps'"),
        ({"run": {"steps": "many"}}, "run.steps: expected an integer, got 'many'"),
        ({"run": {"steps": 2.5}}, "run.steps: expected an integer, got 2.5"),
        ({"run": {"steps": True}}, "run.steps: expected an integer, got True"),
        ({"run": {"steps": 0}}, "run.steps: expected at least 1, got 0"),
        ({"run": {"seed": -1}}, "run.seed: expected at least 0, got -1"),
        (
            {"run": {"precision": "fp8"}},
            "run.precision: expected one of 'auto', 'fp32', 'bf16', 'fp16', got 'fp8'",
        ),
        ({"run": 3}, r"run: expected a table \[run\], got 3"),
        ({"data": {"scale": [1.0]}}, r"data.scale: expected a list of 2, got \[1.0\]"),
        ({"data": {"scale": [2.0, 1.0]}}, "data.scale: expected the smaller factor first"),
        ({"data": {"flip": 1}}, "data.flip: expected true or false, got 1"),
        ({"optimizer": {"learning_rate": 0}}, "learning_rate: expected above 0, got 0.0"),
        ({"optimizer": {"learning_rate": float("inf")}}, "expected a finite number"),
        ({"optimizer": {"betas": [0.9, 1.0]}}, "from 0 to below 1"),
        ({"optimizer": {"clip_norm": 0}}, "clip_norm: expected above 0, got 0.0"),
        ({"optimizer": {"ema_decay": 1}}, "ema_decay: expected from 0 to below 1, got 1.0"),
        ({"objective": {"gan_ramp": 0}}, "gan_ramp: expected at least 1, got 0"),
        ({"objective": {"gan_start": -1}}, "gan_start: expected at least 0, got -1"),
        (
            {"objective": {"lpips_start": 1.5}},
            "lpips_start: expected an integer number of steps, at least 0, or a share .*, got 1.5",
        ),
        ({"codebook": {"start_step": -0.1}}, "start_step: expected an integer number of steps, .*, got -0.1"),
        ({"codebook": {"start_step": "late"}}, "start_step: expected an integer, got 'late'"),
        (
            {"optimizer": {"warmup_steps": 1.0}},
            "warmup_steps: expected an integer number of steps, .*, got 1.0",
        ),
        ({"optimizer": {"warmup_steps": True}}, "warmup_steps: expected an integer, got True"),
        ({"objective": {"kl_weight": -1}}, "kl_weight: expected at least 0, got -1.0"),
        ({"objective": {"dropped_pixels": 1.0}}, "dropped_pixels: expected from 0 to below 1, got 1.0"),
        (
            {"objective": {"posterior": "mean", "kl_weight": 1}},
            'kl_weight: expected 0 where .*, got 1.0; `objective.posterior="sample"`',
        ),
        ({"model": {"train": "decoder"}}, 'model.train: expected "all" where there is no encoder to keep'),
        (
            {"model": {"pretrained": "x", "arguments": {"latent_channels": 2}}},
            "model.arguments: expected none where model.pretrained names a network",
        ),
        (
            {"model": {"pretrained": "x", "initialization": "linear"}},
            "would overwrite the pretrained weights",
        ),
        (
            {"model": {"pretrained": "x", "initialization": "even"}},
            'model.initialization: expected "random".*, got .even.',
        ),
        (
            {"model": {"class_name": "PixelCNN"}, "objective": {"kl_weight": 1}},
            r"objective.kl_weight: expected none for PixelCNN: .* codec .AutoencoderKL, .*, got 1.0",
        ),
        (
            {"data": {"label": "class"}},
            "data.label: expected none for AutoencoderKL: .* prior .* classifier",
        ),
        (
            {"model": {"class_name": "PixelCN"}},
            r"model.class_name: expected one of .*did you mean 'PixelCNN'",
        ),
    ],
)
def test_wrong_settings_say_what_is_expected_and_what_was_given(table, message):
    with pytest.raises(ValueError, match=message):
        TrainingConfig.from_dict(table)


def test_settings_are_checked_however_a_section_is_built():
    with pytest.raises(SettingError) as error:
        OptimizerConfig(batch_size=0)
    assert (error.value.setting, error.value.expected, error.value.got) == (
        "optimizer.batch_size",
        "at least 1",
        0,
    )
    with pytest.raises(SettingError, match=r"data.height: expected at least 8, got 4"):
        dataclasses.replace(tiny_config().data, height=4)


def test_a_codec_for_a_preset_that_builds_its_own_network_is_refused():
    with pytest.raises(ValueError, match="codec: expected none: autoencoder builds a network of its own"):
        load_config("autoencoder", codec="default")
    assert load_config("finetune-decoder", codec="mine").model.pretrained == "mine"


def test_a_network_to_start_from_takes_the_place_of_the_one_that_the_preset_builds():
    config = load_config("latent-context", ["model.pretrained=runs/rd/entropy"])
    assert (config.model.pretrained, config.model.arguments) == ("runs/rd/entropy", {})
    with pytest.raises(SettingError, match=r"model.arguments: expected none where"):
        load_config("latent-context", ["model.pretrained=it", "model.arguments.hidden=8"])


def test_configuration_survives_its_file():
    config = tiny_config(
        data={"width": 24, "scale": [0.5, 1.5]},
        optimizer={"betas": [0.5, 0.75], "fan_in_reference": 9, "learning_rate": 1e-5},
        model={"arguments": {"block_out_channels": [8], "act_fn": 'odd "name"\\\n'}},
    )
    assert TrainingConfig.from_dict(tomllib.loads(dump_toml(config.to_dict()))) == config


def test_configuration_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        tiny_config().run.steps = 5


def test_overrides_are_toml_values_and_bare_words_are_strings():
    config = load_config(
        "default-f8c4",
        ["run.steps=7", "run.precision=fp32", "data.scale=[0.5, 2]", "model.arguments.latent_channels = 8"],
    )
    assert (config.run.steps, config.run.precision, config.data.scale) == (7, "fp32", (0.5, 2.0))
    assert config.model.arguments["latent_channels"] == 8


@pytest.mark.parametrize(
    ("preset", "overrides", "message"),
    [
        ("defalt-f8c4", [], "no preset 'defalt-f8c4' .did you mean 'default-f8c4'.*There are: "),
        ("default-f8c4", ["run.steps"], "override 'run.steps': expected section.key=value"),
        ("default-f8c4", ["steps=3"], "override 'steps=3': expected section.key=value"),
        ("default-f8c4", ["run.steps.more=3"], r"run.steps is \d+, so run.steps.more cannot be set"),
        ("default-f8c4", ["run.stepps=3"], "did you mean 'steps'"),
    ],
)
def test_wrong_presets_and_overrides_are_refused(preset, overrides, message):
    with pytest.raises(ValueError, match=message):
        load_config(preset, overrides)


def test_a_file_of_ones_own_is_read_and_its_faults_named(tmp_path):
    mine = tmp_path / "mine.toml"
    mine.write_text("[run]\nsteps = 5\n")
    assert load_config(str(mine)).run.steps == 5
    mine.write_text('[preset]\nsummary = "mine"\nduration = "a day"\n\n[run]\nsteps = 6\n')
    assert load_config(str(mine)).run.steps == 6
    for text in (b"[run\n", b"\xff", b"a = " + b"[" * 100_000):
        mine.write_bytes(text)
        with pytest.raises(ValueError, match=r"mine\.toml is not valid TOML"):
            load_config(str(mine))
    with pytest.raises(ValueError, match=r"expected a file, got /dev/zero, which is a device"):
        load_config("/dev/zero")
    with pytest.raises(FileNotFoundError):
        load_config(str(tmp_path / "other.toml"))


def test_new_autoencoder_follows_arguments_and_seed():
    first, again = (build_autoencoder(tiny_config()) for _ in range(2))
    other = build_autoencoder(tiny_config(run={"seed": 1}))

    assert all(a.equal(b) for a, b in zip(first.parameters(), again.parameters()))
    assert not first.encoder.conv_in.weight.equal(other.encoder.conv_in.weight)
    assert len(first.config.down_block_types) == 2
    assert first.config.scaling_factor == 1, "nothing was measured yet"
    gray = build_autoencoder(tiny_config(model={"arguments": {"block_out_channels": [32], "in_channels": 1}}))
    assert gray.config.out_channels == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"latent_chanels": 4}, "'latent_chanels' .did you mean 'latent_channels'"),
        ({"block_out_channels": 64}, "block_out_channels: expected a list, one per resolution, got 64"),
        ({"block_out_channels": []}, "expected a list, one per resolution"),
        ({"block_out_channels": [8], "norm_num_groups": 3}, "num_groups|divisible"),
        ({"block_out_channels": [32], "latent_channels": "four"}, "do not make an AutoencoderKL"),
    ],
)
def test_wrong_model_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        build_autoencoder(tiny_config(model={"arguments": arguments}))
