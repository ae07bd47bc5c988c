"""Whole runs of a tiny network: objectives, precision, averages, data, and every way to stop and go on."""

import dataclasses
import json
import os
import resource
import shutil
import signal

import datasets
import numpy as np
import pytest
import torch
from helpers.training import gradients, run_tiny, tiny_config, weights, write_images
from PIL import Image

from latent_codec import LatentCodec
from latent_codec.cli import main
from latent_codec.images.sources import open_source
from latent_codec.metrics import lpips_available
from latent_codec.training.build import build_autoencoder
from latent_codec.training.config import OptimizerConfig, dump_toml
from latent_codec.training.data import TrainingCrops, first_images
from latent_codec.training.loop import NonFiniteLossError, train
from latent_codec.training.optimization import (
    MovingAverage,
    build_optimizer,
    learning_rate,
    set_learning_rate,
)
from latent_codec.training.report import read_metrics

LATENT_DIFFUSION = {
    "reconstruction": "l1",
    "kl_weight": 1e-6,
    "gan_weight": 0.5,
    "gan_start": 1,
    "gan_ramp": 2,
    "discriminator_width": 8,
    "discriminator_layers": 2,
}


@pytest.fixture(scope="module")
def make_images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data") / "images")


def same_weights(run, other, step, names=("model", "ema")) -> bool:
    for name in names:
        mine, theirs = (weights(each / "checkpoints" / str(step), name) for each in (run, other))
        if mine.keys() != theirs.keys() or not all(torch.equal(mine[key], theirs[key]) for key in mine):
            return False
    return True


def recorded(run) -> list[dict]:
    """The lines of metrics.jsonl without the speed, which is the machine's."""
    return [
        {key: value for key, value in line.items() if key != "images_per_second"}
        for line in read_metrics(run)
    ]


@pytest.mark.parametrize(
    ("objective", "data", "terms"),
    [
        ({"posterior": "mean"}, {}, {"mse"}),
        ({"posterior": "mean", "input_noise": 0.3}, {}, {"mse"}),
        ({"posterior": "mean", "dropped_pixels": 0.3, "dropped_patch": 4}, {}, {"mse"}),
        ({"reconstruction": "gaussian", "kl_weight": 1.0}, {}, {"gaussian_nll", "kl", "bits_per_dim"}),
        (
            {"reconstruction": "bernoulli", "kl_weight": 1.0},
            {"binarize": True},
            {"bernoulli_nll", "kl", "bits_per_dim"},
        ),
        ({"kl_weight": 10.0}, {}, {"mse", "kl"}),
        (
            LATENT_DIFFUSION,
            {},
            {"l1", "kl", "gan", "gan_adaptive_weight", "discriminator", "logits_real", "logits_fake"},
        ),
    ],
)
def test_every_objective_trains_the_same_network_and_logs_its_terms(
    tmp_path, make_images, objective, data, terms
):
    result = run_tiny(make_images, tmp_path / "run", objective=objective, data=data)

    lines = read_metrics(tmp_path / "run")
    assert result.finished and [line["step"] for line in lines] == [1, 2, 3]
    always = {"step", "loss", "psnr", "gradient_norm", "learning_rate", "images_per_second"}
    assert lines[-1].keys() == terms | always
    before = build_autoencoder(tiny_config()).state_dict()
    after = weights(tmp_path / "run" / "checkpoints" / "3")
    assert all(not torch.equal(before[key], after[f"autoencoder.{key}"]) for key in before)


def test_latent_diffusion_recipe_with_lpips_trains(tmp_path, make_images):
    if not lpips_available("squeeze"):
        pytest.skip("needs the LPIPS weights, which are absent")
    objective = LATENT_DIFFUSION | {"lpips_weight": 0.1, "lpips_start": 1}
    run_tiny(make_images, tmp_path, objective=objective, data={"height": 24}, run={"steps": 2})
    first, second = read_metrics(tmp_path)
    assert "lpips" not in first and second["lpips"] > 0


def test_training_lowers_the_loss(tmp_path, make_images):
    run_tiny(
        make_images,
        tmp_path,
        objective={"posterior": "mean"},
        optimizer={"learning_rate": 5e-3},
        run={"steps": 40},
    )
    losses = [line["loss"] for line in read_metrics(tmp_path)]
    assert np.mean(losses[-5:]) < 0.3 * losses[0]


def watch(autoencoder) -> tuple[list, list]:
    """What reaches the encoder and what leaves the decoder, pass by pass."""
    inputs, outputs = [], []
    autoencoder.encoder.register_forward_pre_hook(lambda module, given: inputs.append(given[0].detach()))
    autoencoder.decoder.register_forward_hook(lambda module, given, output: outputs.append(output.detach()))
    return inputs, outputs


@pytest.mark.parametrize(
    "corruption", [{"input_noise": 0.5}, {"dropped_pixels": 0.4, "dropped_patch": 4}, {}]
)
def test_denoising_sees_a_corrupted_image_and_is_compared_with_the_clean_one(
    tmp_path, make_images, corruption
):
    config = tiny_config(
        objective={"posterior": "mean", **corruption}, run={"steps": 1, "calibration_images": 0}
    )
    autoencoder, source = build_autoencoder(config), open_source(make_images)
    inputs, outputs = watch(autoencoder)
    train(config, autoencoder, source, tmp_path)

    crops = TrainingCrops(source, size=(16, 16))
    clean = torch.stack([crops[0], crops[1]])
    assert torch.equal(inputs[0], clean) == (not corruption)
    found = read_metrics(tmp_path)[0]["mse"]
    assert found == pytest.approx((outputs[0] - clean).square().mean().item(), rel=1e-5)


def test_images_reach_the_network_from_minus_one_to_one(tmp_path):
    (tmp_path / "images").mkdir()
    for name, value in (("black", 0), ("white", 255)):
        Image.new("RGB", (24, 24), (value,) * 3).save(tmp_path / "images" / f"{name}.png")
    config = tiny_config(run={"steps": 1})
    autoencoder = build_autoencoder(config)
    inputs, _ = watch(autoencoder)
    train(config, autoencoder, open_source(tmp_path / "images"), tmp_path / "run")
    assert set(inputs[0].unique().tolist()) == {-1.0, 1.0}


@pytest.mark.parametrize(("channels", "height", "width"), [(1, 16, 24), (3, 24, 8), (4, 16, 16)])
def test_any_channels_and_non_square_crops(tmp_path, channels, height, width):
    make_images = write_images(tmp_path / "images", 3, channels, size=(20, 30))
    arguments = tiny_config().model.arguments | {"in_channels": channels}
    result = run_tiny(
        make_images,
        tmp_path / "run",
        model={"arguments": arguments},
        data={"height": height, "width": width},
        objective=LATENT_DIFFUSION | {"discriminator_layers": 1},
        run={"steps": 2},
    )
    assert result.finished and result.network.config.in_channels == channels
    with Image.open(tmp_path / "run" / "samples" / "00000002.png") as samples:
        assert samples.height >= 2 * height and samples.width >= 3 * width


def test_bfloat16_computes_in_half_and_keeps_float32_masters(tmp_path, make_images):
    config = tiny_config(run={"precision": "bf16"})
    autoencoder = build_autoencoder(config)
    seen = []
    autoencoder.decoder.conv_in.register_forward_hook(lambda module, given, output: seen.append(output.dtype))
    result = train(config, autoencoder, open_source(make_images), tmp_path)

    assert seen[0] == torch.bfloat16
    kept = [*autoencoder.parameters(), *result.network.parameters()]
    kept += [*gradients(tmp_path / "checkpoints" / "3").values()]
    for name in ("model", "ema"):
        kept += [t for key, t in weights(tmp_path / "checkpoints" / "3", name).items() if key != "n_averaged"]
    assert {tensor.dtype for tensor in kept} == {torch.float32}


def test_float16_on_the_cpu_is_refused(tmp_path, make_images):
    with pytest.raises(ValueError, match=r'run.precision: expected "bf16" or "fp32" on a CPU'):
        run_tiny(make_images, tmp_path / "run", run={"precision": "fp16"})
    assert not (tmp_path / "run").exists()


def test_moving_average_follows_its_formula(tmp_path, make_images):
    run_tiny(
        make_images,
        tmp_path,
        optimizer={"ema_decay": 0.3},
        run={"steps": 5, "checkpoint_every": 1, "keep_checkpoints": 5},
    )
    stored = [weights(tmp_path / "checkpoints" / str(step)) for step in range(1, 6)]
    averaged = weights(tmp_path / "checkpoints" / "5", "ema")
    for key, average in stored[0].items():
        for step, now in enumerate(stored[1:], 2):
            decay = min(0.3, step / (9 + step))
            average = decay * average + (1 - decay) * now[key]
        torch.testing.assert_close(averaged[key.replace("autoencoder.", "module.")], average)


def test_moving_average_switched_off_is_the_weights_themselves(tmp_path, make_images):
    run_tiny(make_images, tmp_path, optimizer={"ema_decay": 0.0})
    averaged = weights(tmp_path / "checkpoints" / "3", "ema")
    for key, tensor in weights(tmp_path / "checkpoints" / "3").items():
        assert torch.equal(tensor, averaged[key.replace("autoencoder.", "module.")])


def test_two_accumulated_batches_give_the_gradients_of_a_doubled_one(tmp_path, make_images):
    cuts = {"whole": {"batch_size": 4}, "cut": {"batch_size": 2, "accumulation": 2}}
    for name, cut in cuts.items():
        run_tiny(
            make_images,
            tmp_path / name,
            optimizer={**cut, "clip_norm": 1e9},
            objective={"kl_weight": 0.1},
            run={"steps": 1},
        )
    whole, cut = (gradients(tmp_path / name / "checkpoints" / "1") for name in cuts)
    scale = max(gradient.abs().max().item() for gradient in whole.values())
    for number in whole:  # the same sums in another order: float32 rounding
        torch.testing.assert_close(cut[number], whole[number], rtol=1e-4, atol=1e-6 * scale)
    one, other = (recorded(tmp_path / name)[0] for name in cuts)
    assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)


def test_clipping_scales_the_gradient_to_the_norm_and_logs_it_unclipped(tmp_path, make_images):
    for name, norm in (("free", 1e9), ("clipped", 1e-3)):
        run_tiny(make_images, tmp_path / name, optimizer={"clip_norm": norm}, run={"steps": 1})
    free, clipped = (gradients(tmp_path / name / "checkpoints" / "1") for name in ("free", "clipped"))

    def norm(tensors):
        return torch.stack([tensor.square().sum() for tensor in tensors.values()]).sum().sqrt().item()

    assert norm(clipped) == pytest.approx(1e-3, rel=1e-3)
    for name in ("free", "clipped"):
        assert read_metrics(tmp_path / name)[0]["gradient_norm"] == pytest.approx(norm(free), rel=1e-4)


def test_learning_rate_is_a_pure_function_of_the_step():
    config = OptimizerConfig(learning_rate=0.1, warmup_steps=4, final_fraction=0.1)
    assert [learning_rate(step, config, 104) for step in range(4)] == pytest.approx([0.025, 0.05, 0.075, 0.1])
    assert learning_rate(4, config, 104) == pytest.approx(0.1)
    assert learning_rate(54, config, 104) == pytest.approx(0.055)  # half way down the cosine
    assert learning_rate(104, config, 104) == pytest.approx(0.01)
    linear = dataclasses.replace(config, schedule="linear")
    assert learning_rate(29, linear, 104) == pytest.approx(0.1 * (0.1 + 0.9 * 0.75))
    constant = dataclasses.replace(config, schedule="constant", warmup_steps=0)
    assert {learning_rate(step, constant, 104) for step in (0, 50, 103)} == {0.1}


def test_wide_layers_learn_slower_by_their_fan_in():
    narrow, wide = torch.nn.Conv2d(2, 3, 3), torch.nn.Conv2d(32, 3, 3)  # 18 and 288 inputs to a sum
    judge = torch.nn.Linear(72, 1)
    config = OptimizerConfig(learning_rate=0.1, fan_in_reference=36, discriminator_learning_rate=0.3)
    optimizer = build_optimizer([*narrow.parameters(), *wide.parameters()], judge.parameters(), config)

    factors = {
        id(parameter): group["factor"] for group in optimizer.param_groups for parameter in group["params"]
    }
    assert factors[id(narrow.weight)] == factors[id(narrow.bias)] == factors[id(wide.bias)] == 1
    assert factors[id(wide.weight)] == pytest.approx(36 / 288)
    assert factors[id(judge.weight)] == pytest.approx(3 * 36 / 72)
    assert factors[id(judge.bias)] == pytest.approx(3)


def test_a_scalar_learns_ten_times_as_fast():
    """Adam's step has the same size in every weight: at a network's rate a log std would take thousands of steps."""
    scalar, vector, judged = (torch.nn.Parameter(torch.zeros(shape)) for shape in ((), (1,), ()))
    config = OptimizerConfig(learning_rate=1e-3, discriminator_learning_rate=2e-3, fan_in_reference=9)
    optimizer = build_optimizer([scalar, vector], [judged], config)
    set_learning_rate(optimizer, 1e-3)
    (scalar + vector.sum() + judged).backward()
    optimizer.step()

    assert vector.item() == pytest.approx(-1e-3, rel=1e-3)
    assert scalar.item() == pytest.approx(-1e-2, rel=1e-3)
    assert judged.item() == pytest.approx(-2e-2, rel=1e-3)


def test_soap_learns_faster_where_errors_vary_along_other_axes_than_the_weights():
    """Least squares by a matrix between two that shrink other directions than the coordinates, by up to 10 each."""
    losses = {}
    for kind in ("adamw", "soap"):
        torch.manual_seed(0)
        axes = [torch.linalg.qr(torch.randn(16, 16))[0] for _ in range(2)]
        left, right = (axis @ torch.diag(torch.logspace(0, -1, 16)) @ axis.T for axis in axes)
        wanted = left @ torch.randn(16, 16) @ right
        weight, offset = torch.nn.Parameter(torch.zeros(16, 16)), torch.nn.Parameter(torch.zeros(()))
        config = OptimizerConfig(kind=kind, learning_rate=0.1, betas=(0.95, 0.95), warmup_steps=0)
        optimizer = build_optimizer([weight, offset], [], config)
        for step in range(200):
            set_learning_rate(optimizer, learning_rate(step, config, 200))
            optimizer.zero_grad()
            loss = (left @ weight @ right + offset - wanted).square().mean()
            loss.backward()
            optimizer.step()
        losses[kind] = loss.item()
    assert losses["soap"] < losses["adamw"] / 5, losses  # 1.8e-5 and 2.2e-4


def test_soap_goes_on_to_the_weights_of_an_uninterrupted_run(tmp_path, make_images):
    """Past the tenth step, where its axes are found anew, and with a discriminator whose gradients come late."""
    sections = {
        "objective": {"gan_weight": 0.1, "gan_start": 6, "discriminator_layers": 1, "discriminator_width": 8},
        "optimizer": {"kind": "soap", "betas": [0.95, 0.95]},
        "run": {"steps": 14, "checkpoint_every": 8, "keep_checkpoints": 2},
    }
    run_tiny(make_images, tmp_path / "whole", **sections)
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "14")
    run_tiny(make_images, tmp_path / "again", **sections)
    assert same_weights(tmp_path / "whole", tmp_path / "again", 14)


def test_what_is_not_trained_is_averaged_to_the_bit():
    """Files of float16 hold many zeros of either sign, which count in fingerprints; codebooks move without gradients."""
    network = torch.nn.ParameterDict(
        {name: torch.nn.Parameter(torch.tensor([-0.0, 1.0])) for name in ("trained", "frozen", "codebook")}
    )
    network["frozen"].requires_grad_(False)
    network["codebook"].requires_grad_(False)
    average = MovingAverage(network, decay=0.75)
    for _ in range(60):
        network["trained"].data += 1
        network["codebook"].data += 1
        average.update_parameters(network)

    frozen = average.module["frozen"]
    assert frozen.tolist() == [0, 1] and frozen.signbit().tolist() == [True, False]
    assert torch.equal(average.module["trained"], average.module["codebook"])
    assert average.module["trained"].tolist() == pytest.approx(
        [57, 58], abs=0.01
    )  # 3 steps behind: 0.75 / 0.25


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory, make_images):
    folder = tmp_path_factory.mktemp("pretrained") / "mine"
    autoencoder = build_autoencoder(tiny_config())
    autoencoder.register_to_config(scaling_factor=0.7, shift_factor=0.1)
    LatentCodec(autoencoder).save_pretrained(folder)
    return folder


def decoder_only(pretrained, tmp_path) -> list[str]:
    preset = tmp_path / "decoder.toml"
    table = tiny_config(
        objective={"posterior": "mean"}, optimizer={"weight_decay": 0.1}, run={"log_every": 3}
    ).to_dict()
    del table["model"]["arguments"]
    table["model"] |= {"train": "decoder", "pretrained": "given by --codec"}
    preset.write_text(dump_toml(table))
    return ["train", str(preset), "--codec", str(pretrained)]


def test_decoder_only_leaves_the_latents_alone_to_the_bit(tmp_path, make_images, pretrained, capsys):
    argv = [*decoder_only(pretrained, tmp_path), "--data", str(make_images), "--out", str(tmp_path / "run")]
    assert main(argv) == 0

    before, after = (LatentCodec.from_pretrained(each) for each in (pretrained, tmp_path / "run"))
    old, new = (codec.autoencoder.state_dict() for codec in (before, after))
    for key in old:
        kept = key.startswith(("encoder.", "quant_conv."))
        assert torch.equal(old[key], new[key]) == kept, key
    assert before.space_fingerprint == after.space_fingerprint
    assert before.fingerprint != after.fingerprint
    assert (after.latent_space.scaling_factor, after.latent_space.shift_factor) == (0.7, 0.1)
    card = (tmp_path / "run" / "codec" / "README.md").read_text()
    assert (
        f"those of mine, to the bit in float32, and its latents decode here: space fingerprint {before.space_fingerprint}"
        in card
    )
    assert str(tmp_path) not in card + (tmp_path / "run" / "codec" / "config.json").read_text()


def test_decoder_only_does_not_go_on_with_another_encoder(tmp_path, make_images, pretrained, capsys):
    argv = [*decoder_only(pretrained, tmp_path), "--data", str(make_images), "--out", str(tmp_path / "run")]
    assert main([*argv, "--minutes", "1e-9"]) == 0
    kept = pretrained.parent / "kept"
    pretrained.rename(kept)
    try:
        LatentCodec(build_autoencoder(tiny_config(run={"seed": 5}))).save_pretrained(pretrained)
        assert main(argv) == 2
    finally:
        shutil.rmtree(pretrained)
        kept.rename(pretrained)
    assert "was started with, whose encoder it keeps" in capsys.readouterr().err


def test_corrupt_images_are_skipped_counted_and_reported(tmp_path, capsys):
    folder = write_images(tmp_path / "images", 4)
    (folder / "01.png").write_bytes(b"no image")
    (folder / "02.png").write_bytes((folder / "03.png").read_bytes()[:60])
    argv = ["train", preset_file(tmp_path), "--data", str(folder), "--out", str(tmp_path / "run")]

    assert main(argv) == 0
    error = capsys.readouterr().err
    assert "2 image(s) could not be read: " in error
    assert "01.png" in error and "02.png" in error
    assert read_metrics(tmp_path / "run")[-1]["step"] == 3


def test_a_folder_without_one_readable_image_is_refused(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"none of the 1 images can be read, the first is .*a\.png"):
        run_tiny(tmp_path / "images", tmp_path / "run")


FINISHES_AT_ONCE = {
    "log_every": 3,
    "calibration_images": 0,
}  # tests/test_training_finish.py sees to curves and scale


def preset_file(tmp_path, **sections) -> str:
    path = tmp_path / "tiny.toml"
    run = FINISHES_AT_ONCE | sections.pop("run", {})
    path.write_text(dump_toml(tiny_config(**sections, run=run).to_dict()))
    return str(path)


def interrupt_at(autoencoder, number: int, which=signal.SIGTERM) -> None:
    """Send this process a signal in the middle of the `number`-th training step."""
    steps = []

    def raise_signal(module, given):
        if torch.is_grad_enabled():
            steps.append(1)
            if len(steps) == number:
                signal.raise_signal(which)

    autoencoder.decoder.register_forward_pre_hook(raise_signal)


STEADY = {"steps": 7, "log_every": 3, "checkpoint_every": 3}


@pytest.mark.parametrize("which", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_with_a_checkpoint_from_which_the_run_goes_on_to_the_same_bits(
    tmp_path, make_images, which, caplog
):
    sections = {"objective": LATENT_DIFFUSION | {"input_noise": 0.1}, "run": STEADY}
    run_tiny(make_images, tmp_path / "whole", **sections)

    config = tiny_config(**sections)
    autoencoder = build_autoencoder(config)
    interrupt_at(autoencoder, 5, which)
    before = signal.getsignal(signal.SIGINT)
    stopped = train(config, autoencoder, open_source(make_images), tmp_path / "run")
    assert (stopped.step, stopped.finished, stopped.signal) == (5, False, which)
    assert "stopping after this step" in caplog.text
    assert signal.getsignal(signal.SIGINT) is before
    went_on = run_tiny(make_images, tmp_path / "run", **sections)

    assert went_on.finished
    assert same_weights(tmp_path / "whole", tmp_path / "run", 7, ("model", "ema", "discriminator"))
    assert recorded(tmp_path / "whole") == recorded(tmp_path / "run")
    assert [line["step"] for line in recorded(tmp_path / "run")] == [3, 6, 7]


def test_minutes_stop_a_run_that_the_same_command_goes_on_with(tmp_path, make_images, capsys):
    argv = ["train", preset_file(tmp_path), "--data", str(make_images), "--out", str(tmp_path / "run")]

    assert main([*argv, "--minutes", "1e-9"]) == 0
    assert "stopped at step 1 of 3; the same command goes on from there" in capsys.readouterr().out
    card = (tmp_path / "run" / "codec" / "README.md").read_text()
    assert "training_steps: 1\nunfinished: true\n" in card and "after 1 of 3 steps" in card
    assert LatentCodec.from_pretrained(tmp_path / "run").channels == 3
    assert main(argv) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "run" / "codec")
    assert "nfinished" not in (tmp_path / "run" / "codec" / "README.md").read_text()

    # Once more: nothing is left to do, and nothing is done.
    weights_file = tmp_path / "run" / "codec" / "diffusion_pytorch_model.safetensors"
    written = weights_file.stat().st_mtime_ns
    assert main(argv) == 0
    shown = capsys.readouterr()
    assert "is finished, all 3 steps of it" in shown.err and shown.out.strip().endswith("codec")
    assert weights_file.stat().st_mtime_ns == written

    # More steps are a change that a run may make.
    assert main([*argv, "--set", "run.steps=4"]) == 0
    assert weights_file.stat().st_mtime_ns > written
    assert "training_steps: 4" in (tmp_path / "run" / "codec" / "README.md").read_text()


def test_a_run_killed_before_its_codec_was_finished_finishes_it(tmp_path, make_images, capsys):
    sections = {"objective": {"posterior": "mean"}, "run": FINISHES_AT_ONCE}
    run_tiny(
        make_images, tmp_path / "run", **sections
    )  # trains, and does not finish as the command line does
    argv = ["train", preset_file(tmp_path, **sections), "--data", str(make_images)]
    card = tmp_path / "run" / "codec" / "README.md"
    assert "training_steps: 3\nunfinished: true\n" in card.read_text()
    assert main([*argv, "--out", str(tmp_path / "run")]) == 0
    assert "training_steps: 3\n" in card.read_text() and "unfinished" not in card.read_text()
    assert LatentCodec.from_pretrained(tmp_path / "run").channels == 3


def test_another_configuration_in_the_same_folder_is_refused_naming_the_keys(tmp_path, make_images):
    run_tiny(make_images, tmp_path, run={"steps": 1})
    with pytest.raises(ValueError, match=r"a run with this configuration") as error:
        run_tiny(
            make_images,
            tmp_path,
            objective={"kl_weight": 0.5},
            optimizer={"betas": [0.5, 0.9]},
            data={"height": 24},
        )
    message = str(error.value)
    for named in (
        "data.height (16 -> 24)",
        "objective.kl_weight (0.0 -> 0.5)",
        "optimizer.betas (",
        "`run_folder`",
    ):
        assert named in message
    assert "optimizer.learning_rate" not in message


def test_a_folder_that_is_no_run_is_refused_and_left_alone(tmp_path, make_images):
    (tmp_path / ".hidden").touch()  # what file managers leave
    (tmp_path / "cat.png").touch()
    with pytest.raises(
        ValueError, match=r"run_folder: expected a run's folder, or a new or empty one.*; it holds cat\.png"
    ):
        run_tiny(make_images, tmp_path, run={"steps": 1})
    assert sorted(each.name for each in tmp_path.iterdir()) == [".hidden", "cat.png"]
    (tmp_path / "cat.png").unlink()
    run_tiny(make_images, tmp_path, run={"steps": 1})


def test_other_data_or_another_batch_is_refused_and_the_same_batch_cut_otherwise_is_not(
    tmp_path, make_images
):
    run_tiny(make_images, tmp_path / "run", run={"steps": 1})
    with pytest.raises(
        ValueError, match=r"a run with images_per_step = 4, got .* trained with images_per_step = 2"
    ):
        run_tiny(make_images, tmp_path / "run", optimizer={"batch_size": 4})
    fewer = write_images(tmp_path / "fewer", 5)
    with pytest.raises(ValueError, match=r"a run with num_images = 5, got .* trained with num_images = 6"):
        run_tiny(fewer, tmp_path / "run")
    assert run_tiny(make_images, tmp_path / "run", optimizer={"batch_size": 1, "accumulation": 2}).finished


def test_a_damaged_checkpoint_is_named(tmp_path, make_images):
    run_tiny(make_images, tmp_path, run={"steps": 1})
    file = tmp_path / "checkpoints" / "1" / "ema.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"checkpoint .*checkpoints/1 cannot be resumed from.*Remove it"):
        run_tiny(make_images, tmp_path)


def test_only_the_newest_checkpoints_stay_and_half_written_ones_are_swept_away(tmp_path, make_images):
    run_tiny(make_images, tmp_path, run={"steps": 1})
    half = tmp_path / "checkpoints" / ".4.abc.partial" / "4"
    half.mkdir(parents=True)
    (half / "model.safetensors").write_bytes(b"half")
    run_tiny(make_images, tmp_path, run={"steps": 5, "checkpoint_every": 1, "keep_checkpoints": 2})
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["4", "5"]


def test_a_non_finite_loss_stops_with_step_and_term_and_keeps_the_checkpoint(tmp_path, make_images, capsys):
    sections = {
        "optimizer": {"learning_rate": 1e30, "warmup_steps": 0},
        "run": {"checkpoint_every": 1, "steps": 5, "log_every": 1},
    }
    with pytest.raises(NonFiniteLossError, match=r"step 1: .*mse.* is not finite.*checkpoints/1\b"):
        run_tiny(make_images, tmp_path / "run", **sections)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["1"]
    assert len(read_metrics(tmp_path / "run")) == 1

    argv = ["train", preset_file(tmp_path, **sections), "--data", str(make_images)]
    assert main([*argv, "--out", str(tmp_path / "again")]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("latent-codec train: step 1: ") and "is not finite" in last


@pytest.mark.parametrize("limit", [4_000, 60_000, 130_000])
def test_a_full_disk_leaves_one_line_and_no_half_checkpoint(tmp_path, make_images, limit, capsys):
    # Files that may not grow beyond a limit stand in for the full disk: model, average and optimizer fail in turn.
    argv = ["train", preset_file(tmp_path, run={"checkpoint_every": 1}), "--data", str(make_images)]
    argv += ["--out", str(tmp_path / "run")]
    assert main([*argv, "--minutes", "1e-9"]) == 0
    sizes = {file.name: file.stat().st_size for file in (tmp_path / "run" / "checkpoints" / "1").iterdir()}
    assert max(sizes.values()) > limit, sizes
    capsys.readouterr()

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        code = main(argv)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == 2 and error.startswith("latent-codec train: ")
    assert "2 cannot be written" in error and "File too large" in error
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["1"]
    assert main(argv) == 0, "with room on the disk it goes on"


def stream_of(make_images, num_shards=3):
    files = [str(path) for path in sorted(make_images.iterdir())]
    columns = {"image": files, "text": ["a caption"] * len(files)}
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    return datasets.Dataset.from_dict(columns, features=features).to_iterable_dataset(num_shards=num_shards)


def test_a_stream_trains_and_resumes_to_the_same_bits(tmp_path, make_images):
    config = tiny_config(run=STEADY)

    def run(out, **options):
        stream = stream_of(make_images)
        source = first_images(stream, 4, name="a stream")
        return train(config, build_autoencoder(config), source, out, stream=stream, **options)

    assert run(tmp_path / "whole").finished
    for step in (1, 2, 3):
        stopped = run(tmp_path / "run", max_minutes=1e-9)
        assert (stopped.step, stopped.finished) == (step, False)
    assert run(tmp_path / "run").finished

    assert same_weights(tmp_path / "whole", tmp_path / "run", 7)
    assert recorded(tmp_path / "whole") == recorded(tmp_path / "run")
    state = json.loads((tmp_path / "run" / "checkpoints" / "7" / "state.json").read_text())
    assert state["streams"][0]["num_examples"] == 14, "two images a step, none lost and none seen twice"


def test_the_command_line_streams(tmp_path, make_images, capsys):
    # what `datasets` reads by name, it also reads by path
    argv = ["train", preset_file(tmp_path), "--data", f"hf:{make_images}", "--stream"]
    assert main([*argv, "--out", str(tmp_path / "run")]) == 0
    state = json.loads((tmp_path / "run" / "checkpoints" / "3" / "state.json").read_text())
    assert state["streams"][0]["num_examples"] == 6
    card = (tmp_path / "run" / "codec" / "README.md").read_text()
    assert "for 3 steps on images." in card and str(tmp_path) not in card


def test_running_out_of_memory_is_one_line(tmp_path, make_images, capsys):
    argv = ["train", preset_file(tmp_path, data={"height": 2**22}), "--data", str(make_images)]
    assert main([*argv, "--out", str(tmp_path / "run")]) == 2
    assert "can't allocate memory" in capsys.readouterr().err.strip().splitlines()[-1]


def test_first_images_of_a_stream_are_a_source(make_images):
    source = first_images(stream_of(make_images, num_shards=1), 4, name="a stream")
    assert len(source) == 4
    assert torch.equal(source.read(2), open_source(make_images).read(2))
    with pytest.raises(ValueError, match="a stream gives no images"):
        first_images(stream_of(make_images).take(0), 4, name="a stream")


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"data": {"height": 17}},
            "data.height: expected a multiple of 2, a latent's side in pixels, got 17",
        ),
        ({"data": {"width": 19}}, "data.width: expected a multiple of 2, a latent's side in pixels, got 19"),
        (
            {"objective": {"gan_weight": 1.0}},
            "data.height: expected at least 24 for the discriminator, got 16",
        ),
        (
            {"objective": {"lpips_weight": 1.0}},
            r"data.height: expected at least 17 for LPIPS \(squeeze\), got 16",
        ),
    ],
)
def test_what_would_fail_late_is_refused_at_once(tmp_path, make_images, sections, message):
    with pytest.raises(ValueError, match=message):
        run_tiny(make_images, tmp_path / "run", **sections)
    assert not (tmp_path / "run").exists()


def test_tensorboard_is_an_optional_tracker(tmp_path, make_images, capsys):
    pytest.importorskip("tensorboard", reason="needs the extra `train`")
    config = tiny_config(run={"steps": 2})
    train(
        config,
        build_autoencoder(config),
        open_source(make_images),
        tmp_path / "run",
        trackers=("tensorboard",),
    )
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / "latent-codec"))
    events.Reload()
    lines = read_metrics(tmp_path / "run")
    found = [event.value for event in events.Scalars("loss")]
    assert found == pytest.approx([line["loss"] for line in lines], rel=1e-6)


def test_a_tracker_that_is_not_there_is_refused(tmp_path, make_images, capsys):
    argv = ["train", preset_file(tmp_path), "--data", str(make_images), "--out", str(tmp_path / "run")]
    assert main([*argv, "--tracker", "tensorbord"]) == 2
    assert "expected one that accelerate knows" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train"], "name a preset (autoencoder, "),
        (["train", "default-f8c4"], "--data is missing"),
        (["train", "default-f8c5", "--data", "x"], "did you mean 'default-f8c4'"),
        (["train", "default-f8c4", "--data", "nowhere"], "nowhere: no such file or folder"),
        (["train", "nowhere.toml", "--data", "x"], "nowhere.toml: No such file or directory"),
        (
            ["train", "default-f8c4", "--data", "x", "--set", "run.seed=one"],
            "expected an integer, got 'one'",
        ),
        (
            ["train", "default-f8c4", "--data", "x", "--codec", "mine"],
            "or take a preset that starts from a codec",
        ),
        (
            ["train", "default-f8c4", "--data", "x", "--minutes", "0"],
            "--minutes: expected a number above 0, got 0.0",
        ),
        (["train", "default-f8c4", "--data", "x", "--stream"], "x cannot be streamed"),
        (
            ["train", "default-f8c4", "--data", "hf:a/b", "hf:c/d", "--stream"],
            "--data: expected one dataset, hf:owner/name",
        ),
    ],
)
def test_bad_commands_get_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, argv, message):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and len(error.splitlines()) == 1
    assert os.listdir(tmp_path) == []


def test_an_encoder_factor_of_zero_leaves_the_encoder_alone_and_trains_the_rest(tmp_path, make_images):
    config = tiny_config(optimizer={"encoder_factor": 0.0})
    before = build_autoencoder(config).state_dict()
    run_tiny(make_images, tmp_path, optimizer={"encoder_factor": 0.0})
    after = weights(tmp_path / "checkpoints" / "3")
    for key, tensor in before.items():
        of_encoder = key.startswith(("encoder.", "quant_conv."))
        assert torch.equal(tensor, after[f"autoencoder.{key}"]) == of_encoder, key


CODEBOOK = {
    "model": {"class_name": "AutoencoderVQ", "arguments": {"num_vq_embeddings": 8}},
    "codebook": {"start_step": 2, "kmeans_crops": 4},
    "run": {"steps": 4, "checkpoint_every": 2},
}


def test_a_codebook_begins_at_its_start_step(tmp_path, make_images):
    run_tiny(make_images, tmp_path, **CODEBOOK)
    lines = read_metrics(tmp_path)
    assert ["perplexity" in line for line in lines] == [False, False, True, True]
    assert ["commitment" in line for line in lines] == [False, False, True, True]
    codec = LatentCodec(train_again(tmp_path, make_images).network)
    indices = codec.encode_indices(sorted(make_images.iterdir()))[0]
    assert len(indices.unique()) > 2


def train_again(out, make_images):
    config = tiny_config(**CODEBOOK)
    return train(config, build_autoencoder(config), open_source(make_images), out)


def test_a_codebook_that_begins_after_a_resumption_is_the_same(tmp_path, make_images):
    run_tiny(make_images, tmp_path / "whole", **CODEBOOK)
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "4")
    train_again(tmp_path / "again", make_images)
    assert same_weights(tmp_path / "whole", tmp_path / "again", 4, ("model", "ema", "codebooks"))


def test_a_codebook_that_would_never_begin_is_refused(tmp_path, make_images):
    with pytest.raises(ValueError, match=r"codebook.start_step: expected a step before the run ends at 4"):
        run_tiny(make_images, tmp_path, **CODEBOOK | {"codebook": {"start_step": 4}})
