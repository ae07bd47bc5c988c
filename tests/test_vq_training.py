"""Trainings with a codebook: its start, its learning, its restarts, its checkpoint, in one process and in two."""

import shutil
from pathlib import Path

import pytest
import torch
from helpers.processes import run_forked, run_two
from helpers.training import run_tiny, tiny_config, weights, write_images
from safetensors.torch import load_file

from latent_codec import AutoencoderVQ, LatentCodec
from latent_codec.cli import main
from latent_codec.images.sources import open_source
from latent_codec.models.gumbel_quantizer import GumbelQuantizer
from latent_codec.models.initialization import initialize_linear_code
from latent_codec.models.quantizers import k_means, nearest_codewords
from latent_codec.training.build import build_autoencoder
from latent_codec.training.checkpoints import latest_checkpoint
from latent_codec.training.config import dump_toml
from latent_codec.training.data import TrainingCrops
from latent_codec.training.report import read_metrics

ARGUMENTS = {
    "AutoencoderVQ": {
        "block_out_channels": [8, 8],
        "norm_num_groups": 4,
        "latent_channels": 4,
        "num_vq_embeddings": 16,
        "mid_block_add_attention": False,
    },
    "HierarchicalVQ": {
        "strides": [2, 2],
        "hidden_channels": 8,
        "residual_channels": 4,
        "num_residual_blocks": 1,
        "embed_dim": 4,
        "codebook_sizes": 16,
    },
}
SUFFIXES = {"AutoencoderVQ": [""], "HierarchicalVQ": ["_1", "_2"]}
CODEBOOKS = {
    "AutoencoderVQ": ["quantize.embedding.weight"],
    "HierarchicalVQ": ["codebooks.0.embedding.weight", "codebooks.1.embedding.weight"],
}


def sections(name: str, codebook: dict | None = None, arguments: dict | None = None, **others) -> dict:
    """A tiny run's sections for the class `name`; `arguments` go over its own."""
    model = {"class_name": name, "arguments": {**ARGUMENTS[name], **(arguments or {})}}
    return {
        "model": {**model, **others.pop("model", {})},
        "codebook": {"kmeans_crops": 8, **(codebook or {})},
        **others,
    }


@pytest.fixture(scope="module")
def make_images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images") / "images")


@pytest.mark.parametrize("name", ARGUMENTS)
def test_metrics_tell_what_every_codebook_does(name, tmp_path, make_images):
    run_tiny(make_images, tmp_path / "run", **sections(name))
    for line in read_metrics(tmp_path / "run"):
        for suffix in SUFFIXES[name]:
            commitment, codebook = (line[f"{term}{suffix}"] for term in ("commitment", "codebook"))
            assert commitment == pytest.approx(codebook, rel=1e-5) and commitment > 0
            assert 1 <= line[f"perplexity{suffix}"] <= line[f"used_codes{suffix}"] <= 16
            assert (
                line[f"dead_codes{suffix}"] == line[f"restarted_codes{suffix}"] == 0
            )  # none is given up before some hundred steps
        terms = sum(line[f"commitment{suffix}"] for suffix in SUFFIXES[name])
        assert line["loss"] == pytest.approx(line["mse"] + 0.25 * terms, rel=1e-4)
        assert "kl" not in line and "bits_per_dim" not in line


@pytest.mark.parametrize("name", ARGUMENTS)
def test_k_means_leaves_few_codewords_unused_where_a_random_start_leaves_most(name, tmp_path, make_images):
    used = {}
    for crops in (0, 8):
        run = tmp_path / str(crops)
        run_tiny(make_images, run, **sections(name, {"kmeans_crops": crops}, run={"steps": 1}))
        used[crops] = [read_metrics(run)[0][f"used_codes{suffix}"] for suffix in SUFFIXES[name]]
    assert min(used[8]) >= 11 and max(used[0]) <= 8, used


FULL = {  # what a checkpoint may forget
    "optimizer": {"accumulation": 2},
    "objective": {"gan_weight": 0.5, "gan_ramp": 1, "discriminator_width": 8, "discriminator_layers": 2},
    "run": {"steps": 6, "checkpoint_every": 3},
}


@pytest.mark.parametrize(
    ("name", "codebook", "arguments"),
    [
        ("AutoencoderVQ", {"learning": "ema"}, {}),
        ("AutoencoderVQ", {"learning": "gradient"}, {"l2_normalized": True, "gradient": "rotation"}),
        ("AutoencoderVQ", {"start_step": 3}, {}),
        ("AutoencoderVQ", {"start_step": 4, "learning": "gradient"}, {}),
        ("HierarchicalVQ", {"learning": "ema"}, {}),
        ("HierarchicalVQ", {"start_step": 2, "learning": "gradient"}, {}),
    ],
)
def test_a_stopped_run_goes_on_to_the_same_bits(name, codebook, arguments, tmp_path, make_images):
    codebook = {"restart_below": 0.9, "decay": 0.8, **codebook}
    settings = sections(name, codebook, arguments, **FULL)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run_tiny(make_images, whole, **settings)
    shutil.copytree(whole, stopped)
    shutil.rmtree(stopped / "checkpoints" / "6")
    assert latest_checkpoint(stopped).name == "3"
    assert run_tiny(make_images, stopped, **settings).finished

    for file in ("model", "ema", "codebooks", "discriminator"):
        expected, found = (weights(run / "checkpoints" / "6", file) for run in (whole, stopped))
        assert expected.keys() == found.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected), file
    expected, found = (
        [{**line, "images_per_second": None} for line in read_metrics(run)] for run in (whole, stopped)
    )
    assert found == expected
    restarted = [
        line.get(f"restarted_codes{suffix}", 0) for line in expected[3:] for suffix in SUFFIXES[name]
    ]
    assert sum(restarted) > 0
    for line in expected:
        begun = line["step"] > codebook.get("start_step", 0)
        assert all((f"perplexity{suffix}" in line) == begun for suffix in SUFFIXES[name])
        assert line["gan_adaptive_weight"] > 0 and {"gan", "discriminator"} <= line.keys()


def test_minutes_stop_a_run_that_goes_on_to_the_same_bits(tmp_path, make_images):
    settings = sections(
        "AutoencoderVQ",
        {"restart_below": 0.9, "decay": 0.8},
        run={"steps": 4, "log_every": 4, "calibration_images": 0},
    )
    run_tiny(make_images, tmp_path / "whole", **settings)
    (tmp_path / "tiny.toml").write_text(dump_toml(tiny_config(**settings).to_dict()))
    command = [
        "train",
        str(tmp_path / "tiny.toml"),
        "--data",
        str(make_images),
        "--out",
        str(tmp_path / "run"),
    ]
    assert main([*command, "--minutes", "1e-9"]) == 0
    assert latest_checkpoint(tmp_path / "run").name == "1"
    assert main(command) == 0
    for file in ("model", "ema", "codebooks"):
        expected, found = (weights(tmp_path / run / "checkpoints" / "4", file) for run in ("whole", "run"))
        assert all(torch.equal(found[key], expected[key]) for key in expected), file


@pytest.mark.parametrize("learning", ["ema", "gradient"])
def test_accumulated_micro_batches_teach_the_codebook_as_one_batch_does(learning, tmp_path, make_images):
    found = {}
    for batch_size, accumulation in ((4, 1), (2, 2)):
        run = tmp_path / str(accumulation)
        optimizer = {"batch_size": batch_size, "accumulation": accumulation}
        codebook = {"learning": learning, "restart_below": 0}
        run_tiny(
            make_images, run, **sections("AutoencoderVQ", codebook, optimizer=optimizer, run={"steps": 1})
        )
        found[accumulation] = (
            weights(run / "checkpoints" / "1"),
            weights(run / "checkpoints" / "1", "codebooks"),
        )
    (one, one_learner), (two, two_learner) = found[1], found[2]
    assert torch.equal(one_learner["0.usage"], two_learner["0.usage"])
    torch.testing.assert_close(one_learner["0.sums"], two_learner["0.sums"], rtol=1e-5, atol=1e-5)
    key = "autoencoder.quantize.embedding.weight"
    # Adam's first step is the gradient's sign times the rate, 5e-4 here, where rounding may decide
    torch.testing.assert_close(one[key], two[key], rtol=1e-4, atol=1e-5 if learning == "ema" else 1e-3)
    assert (one_learner["0.usage"].sum() - 4 * 8 * 8).abs() < 1e-2


def test_gradient_learning_moves_codewords_by_the_optimizer_and_ema_by_averages(tmp_path, make_images):
    optimizer_state = {}
    for learning in ("ema", "gradient"):
        run = tmp_path / learning
        run_tiny(make_images, run, **sections("AutoencoderVQ", {"learning": learning, "restart_below": 0}))
        checkpoint = run / "checkpoints" / "3"
        codebook = weights(checkpoint)["autoencoder.quantize.embedding.weight"]
        learner = weights(checkpoint, "codebooks")
        averages = learner["0.sums"] / learner["0.usage"][:, None]
        agree = torch.allclose(codebook, averages, rtol=1e-3, atol=1e-4)
        assert agree == (learning == "ema")
        state = torch.load(checkpoint / "optimizer.pt", weights_only=True)["optimizer"]["state"]
        optimizer_state[learning] = [tuple(entry["exp_avg"].shape) for entry in state.values()]
    assert (16, 4) not in optimizer_state["ema"] and (16, 4) in optimizer_state["gradient"]


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_restarted_codeword_is_restarted_in_the_moving_average_too(name, tmp_path, make_images):
    settings = sections(name, {"restart_below": 0.9, "decay": 0.8}, run={"steps": 5})
    run_tiny(make_images, tmp_path / "run", **settings)
    last = read_metrics(tmp_path / "run")[-1]
    model, ema = (weights(tmp_path / "run" / "checkpoints" / "5", file) for file in ("model", "ema"))
    for suffix, key in zip(SUFFIXES[name], CODEBOOKS[name]):
        alike = (model[f"autoencoder.{key}"] == ema[f"module.{key}"]).all(1)
        assert 0 < last[f"restarted_codes{suffix}"] == alike.sum() < 16


def test_averaged_unit_codewords_are_unit_codewords(tmp_path, make_images):
    settings = sections("AutoencoderVQ", {"decay": 0.5}, {"l2_normalized": True}, run={"steps": 4})
    run_tiny(make_images, tmp_path / "run", **settings, optimizer={"learning_rate": 1e-2})
    for file, prefix in (("model", "autoencoder"), ("ema", "module")):
        codebook = weights(tmp_path / "run" / "checkpoints" / "4", file)[
            f"{prefix}.quantize.embedding.weight"
        ]
        torch.testing.assert_close(codebook.norm(dim=1), torch.ones(16), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_finished_run_opens_as_a_codec(name, tmp_path, make_images):
    preset = tmp_path / "tiny.toml"
    preset.write_text(dump_toml(tiny_config(**sections(name), run={"log_every": 3}).to_dict()))
    run = tmp_path / "run"
    assert main(["train", str(preset), "--data", str(make_images), "--out", str(run)]) == 0
    codec = LatentCodec.from_pretrained(run)
    assert type(codec.autoencoder).__name__ == name and codec.is_discrete
    averaged = weights(run / "checkpoints" / "3", "ema")
    saved = codec.autoencoder.state_dict()
    for key in CODEBOOKS[name]:
        assert torch.equal(saved[key], averaged[f"module.{key}"])
    source = open_source(make_images)
    image = torch.stack([TrainingCrops(source, size=(24, 24), channels=3, seed=0)[0]])
    grids = codec.encode_indices(image)
    decoded = codec.decode_indices(grids, size=(24, 24), output_type="pt")
    again = codec.decode(codec.encode(image), size=(24, 24), output_type="pt")
    torch.testing.assert_close(decoded, again, rtol=0, atol=1e-4)  # through the scale and back
    assert decoded.shape == image.shape
    latents = codec.encode(image)
    assert 0.3 < float(latents.std()) < 3  # the scale was measured
    if name == "HierarchicalVQ":
        usage = weights(run / "checkpoints" / "3", "codebooks")
        for level in (0, 1):
            shares = usage[f"{level}.usage"] / usage[f"{level}.usage"].sum()
            torch.testing.assert_close(saved[f"usage_{level}"], shares)


def test_decoder_only_keeps_encoder_and_codebook_to_the_bit(tmp_path, make_images):
    run_tiny(make_images, tmp_path / "first", **sections("AutoencoderVQ", arguments={"l2_normalized": True}))
    first = LatentCodec.from_pretrained(tmp_path / "first")

    tuned = tiny_config(
        model={"arguments": {}, "pretrained": str(tmp_path / "first"), "train": "decoder"},
        optimizer={"learning_rate": 1e-2},
        codebook={"restart_below": 0.9},
        run={"log_every": 3},
    )
    preset = tmp_path / "tiny.toml"
    preset.write_text(dump_toml(tuned.to_dict()))
    assert main(["train", str(preset), "--data", str(make_images), "--out", str(tmp_path / "second")]) == 0
    second = LatentCodec.from_pretrained(tmp_path / "second")
    before, after = first.autoencoder.state_dict(), second.autoencoder.state_dict()
    for key in before:
        kept = key.partition(".")[0] in ("encoder", "quant_conv", "quantize")
        assert torch.equal(before[key], after[key]) == kept, key
    assert second.space_fingerprint == first.space_fingerprint
    assert second.fingerprint != first.fingerprint
    line = read_metrics(tmp_path / "second")[-1]
    assert line["commitment"] > 0 and "restarted_codes" not in line


def test_the_decoder_of_a_gumbel_vqgan_trains_on_its_most_probable_codes(tmp_path, make_images):
    torch.manual_seed(0)
    first = LatentCodec(
        AutoencoderVQ(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
            latent_channels=4,
            num_vq_embeddings=16,
            assignment="linear",
        )
    )
    first.save_pretrained(tmp_path / "first")
    model = {"arguments": {}, "pretrained": str(tmp_path / "first"), "train": "decoder"}
    preset = tmp_path / "tiny.toml"
    preset.write_text(dump_toml(tiny_config(model=model, run={"log_every": 3}).to_dict()))
    assert main(["train", str(preset), "--data", str(make_images), "--out", str(tmp_path / "second")]) == 0
    second = LatentCodec.from_pretrained(tmp_path / "second")
    assert second.space_fingerprint == first.space_fingerprint and second.fingerprint != first.fingerprint
    assert read_metrics(tmp_path / "second")[-1]["commitment"] == 0


def test_a_gumbel_codebook_learns_by_gradient_at_a_falling_temperature(tmp_path, make_images, monkeypatch):
    temperatures, forward = [], GumbelQuantizer.forward

    def recorded(self, latents):
        temperatures.append(self.temperature)
        return forward(self, latents)

    monkeypatch.setattr(GumbelQuantizer, "forward", recorded)
    settings = sections("AutoencoderVQ", {"kind": "gumbel"}, run={"steps": 4, "calibration_images": 0})
    network = run_tiny(make_images, tmp_path, **settings).network
    assert network.config.assignment == "linear"
    assert temperatures[:4] == sorted(temperatures[:4], reverse=True) and temperatures[0] == 1
    assert temperatures[2] == pytest.approx((1 + 1 / 16) / 2)
    first = build_autoencoder(tiny_config(**settings))
    for key in ("quantize.embedding.weight", "quantize.proj.weight"):
        assert not torch.equal(network.state_dict()[key], first.state_dict()[key])
    assert read_metrics(tmp_path)[-1]["codeword_kl"] > 0


@pytest.mark.parametrize(
    ("others", "message"),
    [
        (
            {"objective": {"kl_weight": 1e-6}},
            "objective.kl_weight: expected 0 for AutoencoderVQ, which has no posterior",
        ),
        (
            {"objective": {"reconstruction": "gaussian"}},
            'objective.reconstruction: expected "l1" or "mse" for AutoencoderVQ',
        ),
        (
            {"model": {"initialization": "linear"}, "codebook": {"kmeans_crops": 0}},
            "codebook.kmeans_crops: expected above 0 for a linear start",
        ),
        ({"codebook": {"start_step": 3}}, "codebook.start_step: expected a step before the run ends at 3"),
        ({"codebook": {"decay": 1.0}}, "codebook.decay: expected from 0 to below 1, got 1.0"),
        ({"codebook": {"restart_below": 1.0}}, "codebook.restart_below: expected from 0 to below 1, got 1.0"),
        (
            {"codebook": {"learning": "adam"}},
            "codebook.learning: expected one of 'ema', 'gradient', got 'adam'",
        ),
        ({"codebook": {"restarts": True}}, "unknown key in .codebook.: 'restarts'"),
    ],
)
def test_settings_that_a_codebook_cannot_have_are_refused(others, message, tmp_path, make_images):
    others = dict(others)
    with pytest.raises(ValueError, match=message):
        run_tiny(
            make_images, tmp_path / "run", **sections("AutoencoderVQ", others.pop("codebook", None), **others)
        )
    assert not (tmp_path / "run").exists()


def smooth_images(count: int = 48, side: int = 16) -> torch.Tensor:
    """Waves of random direction, length and color, (N, 3, side, side) in [-1, 1]."""
    generator = torch.Generator().manual_seed(0)
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    frequency = torch.randn(count, 2, 1, 1, generator=generator) * 0.25
    phase = torch.rand(count, 3, 1, 1, generator=generator) * 6.28
    waves = frequency[:, :1] * row + frequency[:, 1:] * column
    return 0.8 * torch.sin(waves + phase)


def test_a_linear_start_is_k_means_of_the_images_blocks():
    arguments = {"block_out_channels": [16, 48], "norm_num_groups": 4, "num_vq_embeddings": 64}
    config = tiny_config(**sections("AutoencoderVQ", arguments=arguments))
    images = smooth_images()
    random, linear = build_autoencoder(config), build_autoencoder(config)
    initialize_linear_code(linear, images, quantizer=linear.quantize)
    blocks = torch.nn.functional.pixel_unshuffle(images, 2).movedim(1, -1).flatten(0, 2)
    # What 4 latent channels can hold of the blocks, by k-means with as many codewords.
    mean = blocks.mean(0)
    _, _, directions = torch.linalg.svd(blocks - mean, full_matrices=False)
    projected = (blocks - mean) @ directions[:4].T
    centers = k_means(projected, 64)
    painted = centers[nearest_codewords(projected, centers)] @ directions[:4] + mean
    block_error = float((painted - blocks).square().mean())
    with torch.no_grad():
        linear_error, random_error = (
            float((each(images).sample - images).square().mean()) for each in (linear, random)
        )
        used = len(linear.encode_indices(images).unique())
    # The decoder sees neighboring codewords as well, which can only help.
    assert linear_error < 1.1 * block_error < 0.2 * random_error
    assert used >= 60


RECORDER = """
import os, sys
from safetensors.torch import save_file
from latent_codec.cli import main
from latent_codec.models.quantizers import CodebookLearner

folder = sys.argv.pop(1)
update, numbers = CodebookLearner.update, {}
def recorded(self, step, **calls):
    terms, restarted = update(self, step, **calls)
    number = numbers.setdefault(id(self), len(numbers))
    state = {"codebook": self.quantizer.embedding.weight.detach(), "restarted": restarted, **self.state_dict()}
    state = {name: tensor.clone() for name, tensor in state.items()}
    save_file(state, f"{folder}/{os.environ.get('RANK', 'alone')}-{step}-{number}.safetensors")
    return terms, restarted
CodebookLearner.update = recorded
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("name", "codebook"),
    [
        ("AutoencoderVQ", {"learning": "ema"}),
        ("HierarchicalVQ", {"learning": "gradient", "start_step": 1}),
    ],
)
def test_two_processes_keep_one_codebook_that_learns_from_the_doubled_batch(name, codebook, tmp_path):
    make_images = write_images(tmp_path / "images", 9)
    codebook = {"restart_below": 0.99, "decay": 0.5, **codebook}
    settings = sections(name, codebook, run={"steps": 3, "calibration_images": 0})
    folders = {}
    for name_of_run, batch_size in (("two", 2), ("one", 4)):
        folders[name_of_run] = tmp_path / f"{name_of_run} recorded"
        folders[name_of_run].mkdir()
        config = tiny_config(**settings, optimizer={"batch_size": batch_size, "clip_norm": 1e9})
        preset = tmp_path / f"{name_of_run}.toml"
        preset.write_text(dump_toml(config.to_dict()))
        words = ["train", preset, "--data", make_images, "--out", tmp_path / name_of_run]
        start = run_two if name_of_run == "two" else run_forked
        start(RECORDER, folders[name_of_run], *words, ACCELERATE_USE_CPU="true")

    begin = codebook.get("start_step", 0)
    num_levels = len(SUFFIXES[name])
    for step in range(begin + 1, 4):
        for level in range(num_levels):
            first, second = (recorded(folders["two"], rank, step, level) for rank in (0, 1))
            assert first.keys() == second.keys()
            assert all(torch.equal(first[key], second[key]) for key in first), (step, level)
    for level in range(num_levels):  # before candidates for a restart, which differ, make a difference
        two, one = (
            recorded(folders[run], rank, begin + 1, level) for run, rank in (("two", 0), ("one", "alone"))
        )
        assert torch.equal(two["restarted"], one["restarted"]) and one["restarted"].any()
        torch.testing.assert_close(two["usage"], one["usage"])
        kept = ~one["restarted"]
        # the same sums in another order
        for key in ("codebook", "sums"):
            torch.testing.assert_close(two[key][kept], one[key][kept], rtol=1e-4, atol=1e-4)
    two, one = (read_metrics(tmp_path / run)[begin] for run in ("two", "one"))
    assert two.keys() == one.keys()
    for key in one.keys() - {"images_per_second"}:
        assert two[key] == pytest.approx(one[key], rel=1e-3, abs=1e-5), key


def recorded(folder: Path, rank: int | str, step: int, level: int) -> dict[str, torch.Tensor]:
    return load_file(folder / f"{rank}-{step}-{level}.safetensors")


def test_level_dropout_trains_the_levels_and_goes_on_to_the_same_bits(tmp_path, make_images):
    settings = sections("HierarchicalVQ", run={"checkpoint_every": 1}) | {"objective": {"level_dropout": 0.5}}
    run_tiny(make_images, tmp_path / "whole", **settings)
    last = read_metrics(tmp_path / "whole")[-1]["step"]
    run_tiny(make_images, tmp_path / "plain", **sections("HierarchicalVQ"))
    assert read_metrics(tmp_path / "whole")[0]["mse"] != read_metrics(tmp_path / "plain")[0]["mse"]
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    newest = latest_checkpoint(tmp_path / "again")
    before = weights(newest)
    shutil.rmtree(newest)
    assert latest_checkpoint(tmp_path / "again") is not None
    run_tiny(make_images, tmp_path / "again", **settings)
    after = weights(tmp_path / "again" / "checkpoints" / str(last))
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_level_dropout_needs_levels(tmp_path, make_images):
    settings = sections("AutoencoderVQ") | {"objective": {"level_dropout": 0.5}}
    with pytest.raises(
        ValueError, match=r"level_dropout: expected 0 but for a HierarchicalVQ of two or more levels, got 0.5"
    ):
        run_tiny(make_images, tmp_path, **settings)
