"""Trainings of priors and classifiers: what they are built for, what they learn from, and how they go on."""

import gzip
import math
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.processes import COMMAND, run_two
from helpers.training import gradients, weights
from PIL import Image
from safetensors.torch import load_file

from latent_codec import HierarchicalVQ, LatentCodec, PixelCNN, PixelSNAIL
from latent_codec.cli import main
from latent_codec.components.prior_folders import load_prior
from latent_codec.images.sources import open_source
from latent_codec.latents.encoded_images import encode_source, open_encoded
from latent_codec.training.build import build_autoencoder
from latent_codec.training.classifier_task import build_classifier
from latent_codec.training.config import TrainingConfig, dump_toml
from latent_codec.training.labelled_data import Labels, hold_out
from latent_codec.training.loop import train
from latent_codec.training.prior_task import build_prior
from latent_codec.training.report import read_metrics

SNAIL = {
    "class_name": "PixelSNAIL",
    "arguments": {
        "hidden_channels": 8,
        "num_blocks": 1,
        "num_layers": 1,
        "attention_channels": 8,
        "num_heads": 2,
    },
}
CNN = {"class_name": "PixelCNN", "arguments": {"hidden_channels": 8, "num_layers": 2, "kernel_size": 3}}
RUN = {"steps": 4, "log_every": 1, "precision": "fp32", "checkpoint_every": 2, "sample_every": 2}
OPTIMIZER = {"batch_size": 4, "learning_rate": 1e-3, "warmup_steps": 1}


def configuration(model: dict, codec: Path | None = None, **sections: dict) -> TrainingConfig:
    table = {
        "model": model,
        "data": {"height": 16, "flip": False},
        "optimizer": OPTIMIZER,
        "run": dict(RUN),
    }
    if codec is not None:
        table["prior"] = {"codec": str(codec)}
    for name, values in sections.items():
        table[name] = {**table.get(name, {}), **values}
    return TrainingConfig.from_dict(table)


@pytest.fixture(scope="module")
def idx(tmp_path_factory) -> Path:
    """24 gray images of 16 px in Fashion-MNIST's layout: noise, on black in class 0 and on white in class 1."""
    folder = tmp_path_factory.mktemp("idx")
    random = np.random.default_rng(0)
    labels = np.arange(24) % 2
    pixels = (random.integers(0, 56, (24, 16, 16)) + 200 * labels[:, None, None]).astype(np.uint8)
    for split, prefix in (("images-idx3", 3), ("labels-idx1", 1)):
        values = pixels if prefix == 3 else labels.astype(np.uint8)
        header = bytes((0, 0, 8, prefix)) + struct.pack(f">{prefix}I", *values.shape)
        (folder / f"train-{split}-ubyte.gz").write_bytes(gzip.compress(header + values.tobytes()))
    return folder


def save(autoencoder, folder: Path) -> Path:
    LatentCodec(autoencoder.eval(), name=folder.name).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def two_levels(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    small = {"hidden_channels": 8, "residual_channels": 4, "num_residual_blocks": 1, "embed_dim": 4}
    model = HierarchicalVQ(in_channels=1, strides=(2, 2), codebook_sizes=(6, 5), **small)
    with torch.no_grad():
        for quantizer in model.quantizers:
            quantizer.embedding.weight.mul_(0.3)  # near the latents, so that several are chosen
    return save(model, tmp_path_factory.mktemp("codecs") / "two")


@pytest.fixture(scope="module")
def continuous(tmp_path_factory) -> Path:
    arguments = {"in_channels": 1, "block_out_channels": [8, 8], "norm_num_groups": 4, "latent_channels": 2}
    config = TrainingConfig.from_dict(
        {"model": {"arguments": {**arguments, "mid_block_add_attention": False}}}
    )
    return save(build_autoencoder(config), tmp_path_factory.mktemp("codecs") / "kl")


def run_prior(config: TrainingConfig, idx: Path, out: Path, encoded=None):
    codec = LatentCodec.from_pretrained(config.prior.codec) if config.prior.codec else None
    source = encoded or open_source(idx)
    if codec is not None and encoded is None:
        source = open_encoded(encode_source(codec, source, out.parent / f"{out.name}-codes"), codec=codec)
    return train(config, build_prior(config, source, codec), source, out), source, codec


def test_a_prior_is_built_for_its_codec_and_data(idx, two_levels, tmp_path):
    config = configuration(SNAIL, two_levels, data={"label": "class"}, run={"steps": 1})
    result, source, codec = run_prior(config, idx, tmp_path / "top")
    prior = result.network.config
    assert (prior.codebook_size, prior.num_classes, tuple(prior.sample_size)) == (6, 2, (4, 4))
    assert prior.space_fingerprint == codec.space_fingerprint and prior.condition_channels is None
    counts = torch.bincount(torch.cat([source.indices(n)[0].flatten() for n in range(len(source))]))
    assert list(prior.most_frequent) == [int(counts.argmax())] and (counts > 0).sum() > 1

    bottom = configuration(SNAIL, two_levels, prior={"level": 1}, run={"steps": 1})
    result, *_ = run_prior(bottom, idx, tmp_path / "bottom")
    prior = result.network.config
    assert (prior.codebook_size, prior.condition_channels, tuple(prior.sample_size)) == (5, 4, (8, 8))
    assert prior.num_classes is None


def test_training_lowers_the_bits_to_what_the_codes_hold(idx, two_levels, tmp_path):
    config = configuration(
        SNAIL,
        two_levels,
        optimizer={"learning_rate": 1e-2, "batch_size": 8},
        run={"steps": 40, "sample_every": 40},
    )
    result, source, _ = run_prior(config, idx, tmp_path / "run")
    lines = read_metrics(tmp_path / "run")
    codes = torch.stack([source.indices(number)[0] for number in range(len(source))])
    shares = torch.bincount(codes.flatten()) / codes.numel()
    order_0 = -(shares[shares > 0] * shares[shares > 0].log2()).sum()
    assert lines[0]["bits_per_index"] == pytest.approx(math.log2(6), abs=0.5)
    assert np.mean([line["bits_per_index"] for line in lines[-5:]]) < order_0
    assert lines[0]["loss"] == pytest.approx(lines[0]["bits_per_index"] * math.log(2), rel=1e-5)
    # what was logged at a step is what the trained network then says of its images
    with torch.no_grad():
        bits = -result.network.eval().log_prob(codes).mean() / math.log(2)
    assert float(bits) == pytest.approx(lines[-1]["bits_per_index"], abs=0.3)


def test_held_out_bits_are_of_the_average_on_images_never_trained_on(idx, two_levels, tmp_path):
    config = configuration(SNAIL, two_levels, data={"held_out": 0.25, "label": "class"})
    result, source, _ = run_prior(config, idx, tmp_path / "run")
    trained, held_out = hold_out(source, 0.25, seed=0)
    assert len(held_out) == 6 and sorted([*trained, *held_out]) == list(range(24))
    codes = torch.stack([source.indices(number)[0] for number in held_out])
    labels = torch.tensor([source.label(number) for number in held_out])
    with torch.no_grad():
        bits = -result.network.log_prob(codes, None, labels).mean() / math.log(2)
    lines = read_metrics(tmp_path / "run")
    assert ["held_out_bits_per_index" in line for line in lines] == [False, True, False, True]
    assert lines[-1]["held_out_bits_per_index"] == pytest.approx(float(bits), rel=1e-5)


def test_mirror_images_are_held_out_with_their_original(idx, two_levels, tmp_path):
    codec = LatentCodec.from_pretrained(two_levels)
    source = open_encoded(encode_source(codec, open_source(idx), tmp_path, mirrored=True))
    _, held_out = hold_out(source, 0.25, seed=3)
    assert len(held_out) == 12 and {number ^ 1 for number in held_out} == set(held_out)
    assert hold_out(source, 0.25, seed=4)[1] != held_out
    with pytest.raises(
        ValueError, match=r"data.held_out: expected a share of the 24 images .*, got 0.01; it is 0 of them"
    ):
        hold_out(source, 0.01, seed=0)


@pytest.mark.parametrize("model", ["snail", "pixels", "latents", "condition-codes"])
def test_a_resumed_run_ends_in_the_same_weights_dropout_included(
    model, idx, two_levels, continuous, tmp_path
):
    dropout = {"dropout": 0.5}
    if model == "snail":
        config = configuration(
            SNAIL | {"arguments": SNAIL["arguments"] | dropout}, two_levels, prior={"level": 1}
        )
    elif model == "condition-codes":
        arguments = SNAIL["arguments"] | dropout | {"condition_codebook_size": 6}
        config = configuration(SNAIL | {"arguments": arguments}, two_levels, prior={"level": 1})
    elif model == "pixels":
        config = configuration(CNN | {"arguments": CNN["arguments"] | dropout | {"data": "pixels"}})
    else:
        arguments = CNN["arguments"] | dropout | {"data": "latents", "num_mixtures": 2}
        config = configuration(CNN | {"arguments": arguments}, continuous)
    _, source, _ = run_prior(config, idx, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "4")
    run_prior(config, idx, tmp_path / "again", source)
    for name in ("model", "ema"):
        mine, theirs = (weights(tmp_path / run / "checkpoints" / "4", name) for run in ("whole", "again"))
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    before = weights(tmp_path / "whole" / "checkpoints" / "2")
    moved = {key for key in before if not torch.equal(before[key], mine.get(f"module.{key}", before[key]))}
    assert moved  # the average moved on, too
    without = configuration(
        {**config.to_dict()["model"], "arguments": config.model.arguments | {"dropout": 0.0}},
        Path(config.prior.codec) if config.prior.codec else None,
        prior=config.to_dict()["prior"],
        run={"steps": 1},
    )
    run_prior(without, idx, tmp_path / "without", source)
    assert read_metrics(tmp_path / "without")[0]["loss"] != read_metrics(tmp_path / "whole")[0]["loss"]


def test_pixels_are_learned_as_values_of_8_bits(idx, tmp_path):
    arguments = CNN["arguments"] | {"data": "pixels", "data_channels": 1}
    config = configuration(CNN | {"arguments": arguments}, data={"held_out": 0.25, "label": "class"})
    result, source, _ = run_prior(config, idx, tmp_path / "run")
    _, held_out = hold_out(source, 0.25, seed=0)
    pixels = torch.stack([source.read(number, 1) for number in held_out]).long()
    labels = torch.tensor([source.label(number) for number in held_out])
    with torch.no_grad():
        bits = -result.network.log_prob(pixels, None, labels).mean() / math.log(2)
    assert read_metrics(tmp_path / "run")[-1]["held_out_bits_per_index"] == pytest.approx(
        float(bits), rel=1e-5
    )
    width, height = Image.open(tmp_path / "run/samples/00000004.png").size
    assert height == 4 * 128 + 3 * 4 < width  # 16 px, enlarged, in four rows with titles


def test_latents_are_quantized_over_their_own_range(idx, continuous, tmp_path):
    arguments = CNN["arguments"] | {
        "data": "latents",
        "num_mixtures": 2,
        "latent_maximum": 31,
        "latent_minimum": -32,
    }
    config = configuration(CNN | {"arguments": arguments}, continuous)
    result, source, _ = run_prior(config, idx, tmp_path / "run")
    prior = result.network
    assert isinstance(prior, PixelCNN) and prior.num_values == 64 and prior.config.data_channels == 2
    latents = torch.stack([source.latents(number) for number in range(len(source))])
    reach = torch.tensor(prior.config.latent_steps) * 31
    torch.testing.assert_close(reach, latents.abs().amax((0, 2, 3)), rtol=0.05, atol=0)


def test_codes_on_disk_and_images_train_the_same(idx, two_levels, tmp_path, capsys):
    (tmp_path / "tiny.toml").write_text(
        dump_toml(configuration(SNAIL, run={"steps": 2, "log_every": 2}).to_dict())
    )
    preset, codec = str(tmp_path / "tiny.toml"), ["--codec", str(two_levels)]
    assert main(["encode", str(idx), *codec, "--out", str(tmp_path / "codes")]) == 0
    for data, out in ((idx, "images"), (tmp_path / "codes", "codes-run")):
        assert main(["train", preset, "--data", str(data), *codec, "--out", str(tmp_path / out)]) == 0
    mine, theirs = (weights(tmp_path / out / "checkpoints" / "2") for out in ("images", "codes-run"))
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    capsys.readouterr()
    # a second call has nothing to do
    assert main(["train", preset, "--data", str(idx), *codec, "--out", str(tmp_path / "images")]) == 0
    out, err = capsys.readouterr()
    assert out.strip() == str(tmp_path / "images" / "prior") and "is finished, all 2 steps" in err

    prior = load_prior(tmp_path / "images")
    stored = load_file(tmp_path / "images/checkpoints/2/ema.safetensors")
    assert isinstance(prior, PixelSNAIL)
    for key, value in prior.state_dict().items():
        assert torch.equal(value, stored[f"module.{key}"])
    card = (tmp_path / "images/prior/README.md").read_text()
    assert "training_steps: 2" in card and "bits_per_index" in card and str(tmp_path) not in card


def test_windows_of_all_levels_show_the_same_place(idx, two_levels, tmp_path):
    from latent_codec.training.prior_data import PriorData

    codec = LatentCodec.from_pretrained(two_levels)
    source = open_encoded(encode_source(codec, open_source(idx), tmp_path))
    config = configuration(SNAIL, two_levels, data={"height": 8, "width": 12}, prior={"level": 1})
    data = PriorData(config, source, codec)
    assert data.shapes == [(2, 3), (4, 6)]
    places = set()
    for position in range(200):
        (top, bottom), _ = data.train[position]
        number = data.train.numbers[data.train._order[position]]
        whole_top, whole_bottom = source.indices(number)
        found = [
            (row, column)
            for row in range(3)
            for column in range(2)
            if torch.equal(whole_top[row : row + 2, column : column + 3], top)
            and torch.equal(whole_bottom[2 * row : 2 * row + 4, 2 * column : 2 * column + 6], bottom)
        ]
        assert found
        places.update(found)
    assert len(places) == 6


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"arguments": {"codebook_size": 7}}}, r"codebook_size = 7, and two and the data have 6"),
        (
            {"model": {"arguments": {"num_classes": 1}}, "data": {"label": "class"}},
            r"num_classes = 1.* have 2",
        ),
        (
            {"model": {"arguments": {"hiden_channels": 7}}},
            r"'hiden_channels' \(did you mean 'hidden_channels'",
        ),
        ({"prior": {"level": 2}}, r"prior.level: expected from 0 to 1, the levels of two, got 2"),
        ({"prior": {"level": -1}}, r"prior.level: expected at least 0, got -1"),
        ({"prior": {"level": 1}, "model": {"arguments": {"condition_codebook_size": 9}}}, r"= 9.* have 6"),
        (
            {"data": {"height": 18}},
            r"data.height: expected a multiple of 4, the pixels of a position on the top level of two, got 18",
        ),
        (
            {"data": {"height": 32}},
            r"a window that one of the 24 images holds, got .32x32.*8x8 positions",
        ),
        ({"data": {"label": "Smiling"}}, r'data.label is "Smiling", and train-00000 has the label 0'),
        (
            {"data": {"scale": [0.5, 1]}},
            r"data.scale: expected its default: codes are learned as they were encoded",
        ),
        (
            {"model": {"class_name": "PixelCNN", "arguments": {"data": "latents"}}},
            r"model.arguments.data: expected .codes.*files of indices of two, got .latents.",
        ),
        ({"objective": {"kl_weight": 1.0}}, r"objective.kl_weight: expected none for PixelSNAIL: .* codec"),
        (
            {"model": {"train": "decoder", "initialization": "linear"}},
            r"model.initialization: expected none for PixelSNAIL: .* codec",
        ),
    ],
)
def test_what_does_not_fit_is_refused_naming_both(idx, two_levels, tmp_path, sections, message):
    model = {**SNAIL, **sections.get("model", {})}
    model["arguments"] = (
        {**SNAIL["arguments"], **model["arguments"]}
        if model["class_name"] == "PixelSNAIL"
        else model["arguments"]
    )
    others = {name: values for name, values in sections.items() if name != "model"}
    with pytest.raises(ValueError, match=message):
        run_prior(configuration(model, two_levels, **others), idx, tmp_path / "run")


def test_a_prior_needs_a_codec_unless_it_is_over_pixels(idx, two_levels, tmp_path, capsys):
    (tmp_path / "codes.toml").write_text(dump_toml(configuration(SNAIL).to_dict()))
    arguments = CNN["arguments"] | {"data": "pixels"}
    (tmp_path / "pixels.toml").write_text(dump_toml(configuration(CNN | {"arguments": arguments}).to_dict()))
    out = ["--data", str(idx), "--out", str(tmp_path / "run")]
    assert main(["train", str(tmp_path / "codes.toml"), *out]) == 2
    assert "name or folder of the codec that a PixelSNAIL learns from" in capsys.readouterr().err
    assert main(["train", str(tmp_path / "pixels.toml"), *out, "--codec", str(two_levels)]) == 2
    assert "expected none for a prior over pixels" in capsys.readouterr().err
    assert main(["train", str(tmp_path / "codes.toml"), *out, "--codec", str(two_levels), "--stream"]) == 2
    assert "expected none for PixelSNAIL, which trains on data at hand" in capsys.readouterr().err
    assert not (tmp_path / "run" / "config.toml").exists()


def test_codes_of_another_codec_are_refused(idx, two_levels, continuous, tmp_path, capsys):
    (tmp_path / "tiny.toml").write_text(dump_toml(configuration(SNAIL).to_dict()))
    encode_source(LatentCodec.from_pretrained(continuous), open_source(idx), tmp_path / "codes")
    command = [
        "train",
        str(tmp_path / "tiny.toml"),
        "--data",
        str(tmp_path / "codes"),
        "--codec",
        str(two_levels),
    ]
    assert main([*command, "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert "kl" in error and "two" in error


def test_a_prior_goes_on_from_a_pretrained_one_of_the_same_codec_only(idx, two_levels, continuous, tmp_path):
    config = configuration(SNAIL, two_levels, run={"steps": 2})
    result, source, codec = run_prior(config, idx, tmp_path / "first")
    result.network.save_pretrained(tmp_path / "first" / "prior")
    further = configuration(
        {"class_name": "PixelSNAIL", "pretrained": str(tmp_path / "first")}, two_levels, run={"steps": 1}
    )
    prior = build_prior(further, source, codec)
    for key, value in prior.state_dict().items():
        assert torch.equal(value, result.network.state_dict()[key])
    bottom = configuration(
        {"class_name": "PixelSNAIL", "pretrained": str(tmp_path / "first")}, two_levels, prior={"level": 1}
    )
    with pytest.raises(
        ValueError, match=r"the prior .*first has codebook_size = 6, and two and the data have 5"
    ):
        build_prior(bottom, source, codec)


def test_a_classifier_learns_to_tell_the_classes_apart_and_says_how_well(idx, tmp_path):
    model = {
        "class_name": "ImageClassifier",
        "arguments": {"in_channels": 1, "block_out_channels": [8, 8], "norm_num_groups": 4},
    }
    settings = {
        "data": {"label": "class", "held_out": 0.5},
        "optimizer": {"learning_rate": 1e-2, "batch_size": 6, "ema_decay": 0.5},
    }
    config = configuration(model, **settings, run={"steps": 20, "sample_every": 10, "checkpoint_every": 10})
    source = open_source(idx)
    result = train(config, build_classifier(config, source), source, tmp_path / "run")
    assert result.network.config.num_classes == 2
    lines = read_metrics(tmp_path / "run")
    _, held_out = hold_out(source, 0.5, seed=0)
    images = torch.stack([source.read(number, 1) for number in held_out]) / 127.5 - 1
    labels = torch.tensor([source.label(number) for number in held_out])
    with torch.no_grad():
        right = (result.network.eval()(images).argmax(1) == labels).float().mean()
    assert lines[-1]["held_out_accuracy"] == pytest.approx(float(right)) and right > 0.9
    assert lines[-1]["loss"] < lines[0]["loss"]

    shutil.copytree(tmp_path / "run", tmp_path / "again")
    shutil.rmtree(tmp_path / "again/checkpoints/20")
    train(config, build_classifier(config, source), source, tmp_path / "again")
    mine, theirs = (weights(tmp_path / run / "checkpoints/20") for run in ("run", "again"))
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)

    without = configuration(model)
    with pytest.raises(ValueError, match=r"data.label: expected what a classifier learns"):
        build_classifier(without, source)
    few = configuration(model | {"arguments": model["arguments"] | {"num_classes": 2}}, **settings)
    classifier = build_classifier(few, source)
    assert Labels(source, "class").num_classes == classifier.config.num_classes


def test_two_processes_train_a_prior_as_one_with_twice_the_batch(idx, two_levels, tmp_path):
    sections = {"data": {"label": "class"}, "prior": {"level": 1}, "run": {"steps": 1}}
    table = configuration(SNAIL, optimizer={"batch_size": 2, "clip_norm": 1e9}, **sections).to_dict()
    (tmp_path / "tiny.toml").write_text(dump_toml(table))
    options = ["--data", idx, "--codec", two_levels, "--out", tmp_path / "two"]
    process = run_two(COMMAND, "train", tmp_path / "tiny.toml", *options)
    assert "4 images a step, 2 process(es) on cpu" in process.stderr
    assert process.stdout.strip() == str(tmp_path / "two" / "prior")
    config = configuration(SNAIL, two_levels, optimizer={"batch_size": 4, "clip_norm": 1e9}, **sections)
    run_prior(config, idx, tmp_path / "one")
    two, one = (gradients(tmp_path / run / "checkpoints" / "1") for run in ("two", "one"))
    assert two.keys() == one.keys()
    scale = max(gradient.abs().max().item() for gradient in one.values())
    for number in one:
        # the same sums in another order: float32 rounding
        torch.testing.assert_close(two[number], one[number], rtol=1e-3, atol=5e-5 * scale)
