"""Trainings of entropy models' networks: what they learn, how they go on, and that files get as short as the loss says."""

import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from helpers.training import weights
from test_bitstream import BLOCKS, build, make_image

from latent_codec import LatentCodec
from latent_codec.bitstream import IndexContextEntropy, LatentContextEntropy
from latent_codec.bitstream.coding import encode_tile
from latent_codec.bitstream.sensitivity import coarsest_step_sizes, decoder_sensitivity
from latent_codec.cli import main
from latent_codec.images.sources import open_source
from latent_codec.images.tensors import write_image
from latent_codec.latents.encoded_images import encode_source, open_encoded
from latent_codec.metrics import psnr
from latent_codec.models.context_network import LIMIT, ONE, IndexContext, LatentContext, is_frozen
from latent_codec.training.build import load_codec
from latent_codec.training.config import TrainingConfig
from latent_codec.training.entropy_task import build_context, channel_units
from latent_codec.training.labelled_data import hold_out
from latent_codec.training.loop import train
from latent_codec.training.report import read_metrics

CLASSES = {"kl": "LatentContext", "vq": "IndexContext", "hierarchical": "IndexContext"}
SIDE = 32  # of the images, each of which is a window


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Codecs `kl`, `vq` and `hierarchical`, 12 smooth images in `photos`, and each codec's codes of them in `codes`."""
    folder = tmp_path_factory.mktemp("entropy")
    for seed in range(12):
        write_image(make_image(SIDE, SIDE, seed), folder / f"photos/{seed:02d}.png")
    for kind in CLASSES:
        codec = build(kind)
        codec.save_pretrained(folder / kind)
        encode_source(codec, open_source(folder / "photos"), folder / "codes" / kind)
    return folder


def configuration(folder: Path, kind: str, **sections: dict) -> TrainingConfig:
    table = {
        "model": {
            "class_name": CLASSES[kind],
            "teacher": str(folder / kind),
            "arguments": {"hidden": 8} | ({"embedding": 4} if kind != "kl" else {"group": 2}),
        },
        "data": {"height": SIDE, "flip": False, "held_out": 0.25},
        "optimizer": {"batch_size": 4, "learning_rate": 1e-2, "warmup_steps": 2, "ema_decay": 0.9},
        "run": {"steps": 10, "log_every": 1, "precision": "fp32", "sample_every": 10},
    }
    for name, values in sections.items():
        table[name] |= values
    return TrainingConfig.from_dict(table)


def source_of(folder: Path, kind: str):
    codec = LatentCodec.from_pretrained(folder / kind)
    return open_encoded(folder / "codes" / kind, codec=codec), codec


def run(config: TrainingConfig, folder: Path, kind: str, out: Path, **options):
    source, codec = source_of(folder, kind)
    return train(config, build_context(config, source, codec), source, out, **options)


@pytest.fixture(scope="module")
def trained(place):
    """Of each codec, the run of 40 steps in `runs/KIND`, and its network."""
    found = {}
    for kind in CLASSES:
        config = configuration(place, kind, run={"steps": 40, "sample_every": 4})
        found[kind] = run(config, place, kind, place / "runs" / kind).network
    return found


@pytest.mark.parametrize("kind", CLASSES)
def test_bits_of_images_never_trained_on_fall(place, trained, kind):
    lines = read_metrics(place / "runs" / kind)
    held_out = [line["held_out_bits_per_position"] for line in lines if "held_out_bits_per_position" in line]
    assert len(held_out) == 10 and held_out[-1] < 0.95 * held_out[0]
    assert all(line["loss"] == line["bits_per_position"] for line in lines)
    if kind == "kl":
        return
    # what surrounds an index says more than how often it occurs
    source, _ = source_of(place, kind)
    used, kept = hold_out(source, 0.25, seed=0)
    order_0 = 0.0
    for level, size in enumerate(trained[kind].config.codebook_sizes):
        counts = sum(torch.bincount(source.indices(n)[level].flatten(), minlength=size) for n in used)
        bits = -torch.log2((counts + 0.5) / (counts + 0.5).sum())
        order_0 += sum(float(bits[source.indices(n)[level]].sum()) for n in kept)
    num_positions = sum(source.indices(n)[-1].numel() for n in kept)
    assert held_out[-1] < 0.97 * order_0 / num_positions


@pytest.mark.parametrize("kind", CLASSES)
def test_held_out_bits_are_of_the_average_and_of_images_held_out(place, kind, tmp_path):
    arguments = {"hidden": 8} | ({"num_steps": 1} if kind == "kl" else {"embedding": 4})
    config = configuration(place, kind, model={"arguments": arguments}, run={"steps": 4, "sample_every": 4})
    network = run(config, place, kind, tmp_path / "run").network
    source, _ = source_of(place, kind)
    _, kept = hold_out(source, 0.25, seed=0)
    assert len(kept) == 3
    total = num_positions = 0
    with torch.no_grad():
        for number in kept:
            if kind == "kl":
                steps = network.step_sizes()
                levels = torch.round(source.latents(number) / steps[0][:, None, None])
                total += float(network(levels[None], steps).sum())
                num_positions += levels[0].numel()
            else:
                grids = [grid[None] for grid in source.indices(number)]
                total += float(network(grids).sum())
                num_positions += grids[-1].numel()
    found = read_metrics(tmp_path / "run")[-1]["held_out_bits_per_position"]
    assert found == pytest.approx(total / num_positions, rel=1e-5)


@pytest.mark.parametrize("kind", CLASSES)
def test_files_are_as_long_as_the_loss_says(place, trained, kind):
    network, (source, codec) = trained[kind], source_of(place, kind)
    assert is_frozen(network)
    is_latents = kind == "kl"
    model = (
        LatentContextEntropy.export(network, codec, 0.0)
        if is_latents
        else IndexContextEntropy.export(network, codec)
    )
    assert model.num_step_sizes == (101 if is_latents else 0)
    # at finer steps this little-trained network expects deviations beyond the widest tables
    for step_size_index in (0, 30, 60, 85) if is_latents else (0,):
        said = written = num_sections = 0
        for number in range(4):
            with torch.no_grad():
                if is_latents:
                    steps = network.step_sizes()[step_size_index]
                    grids = [torch.round(source.latents(number) / steps[:, None, None]).long()]
                    said += float(network(grids[0][None].float(), steps[None]).sum())
                else:
                    grids = [grid[None] for grid in source.indices(number)]
                    said += float(network(grids).sum())
            sections = encode_tile(model, [grid.numpy() for grid in grids], step_size_index)
            written += 8 * sum(map(len, sections))
            num_sections += len(sections)
        # a section holds its coder's last state, too, and ends on a whole byte
        assert said < written < 1.02 * said + 40 * num_sections


@pytest.mark.parametrize("kind", ["kl", "hierarchical"])
def test_a_stopped_run_ends_in_the_same_weights(place, kind, tmp_path):
    config = configuration(place, kind, run={"steps": 5, "checkpoint_every": 4})
    run(config, place, kind, tmp_path / "whole")
    stopped = run(config, place, kind, tmp_path / "stopped", max_minutes=1e-9)
    assert (stopped.step, stopped.finished) == (1, False) and not is_frozen(stopped.network)
    run(config, place, kind, tmp_path / "stopped")
    shutil.copytree(tmp_path / "whole", tmp_path / "later")  # beyond the rounding
    shutil.rmtree(tmp_path / "later" / "checkpoints" / "5")
    run(config, place, kind, tmp_path / "later")
    for name in ("model", "ema"):
        whole = weights(tmp_path / "whole" / "checkpoints" / "5", name)
        for other in ("stopped", "later"):
            found = weights(tmp_path / other / "checkpoints" / "5", name)
            assert found.keys() == whole.keys() and all(torch.equal(found[key], whole[key]) for key in whole)
    lines, others = (read_metrics(tmp_path / each) for each in ("whole", "stopped"))
    for line, other in zip(lines, others, strict=True):
        assert {**line, "images_per_second": 0} == {**other, "images_per_second": 0}


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_numbers_are_rounded_from_six_tenths_on(place, kind, tmp_path):
    config = configuration(place, kind, run={"steps": 5, "checkpoint_every": 1, "keep_checkpoints": 5})
    run(config, place, kind, tmp_path)
    for step in range(1, 6):
        for name in ("model", "ema"):
            found = weights(tmp_path / "checkpoints" / str(step), name)
            shifts = torch.cat([value for key, value in found.items() if key.endswith("shifts")])
            assert (shifts >= 0).all() if step > 3 else (shifts == -1).all()


def test_a_single_step_gives_a_model_too(place, tmp_path):
    network = run(configuration(place, "vq", run={"steps": 1}), place, "vq", tmp_path).network
    assert IndexContextEntropy.export(network, load_codec(configuration(place, "vq"))).num_steps == 0


def test_a_network_is_built_for_its_codec(place):
    source, codec = source_of(place, "kl")
    config = configuration(place, "kl")
    network = build_context(config, source, codec)
    used, _ = hold_out(source, 0.25, seed=0)
    latents = torch.stack([source.latents(number) for number in used])
    torch.testing.assert_close(torch.tensor(network.config.units), channel_units(latents))
    # what has no neighbors is expected at the mean
    means = network.networks[0].layers[2].bias[:3] * torch.tensor(network.config.units)
    torch.testing.assert_close(means.detach(), latents.mean((0, 2, 3)))
    state, again = network.state_dict(), build_context(config, source, codec).state_dict()
    assert all(torch.equal(state[key], again[key]) for key in state)

    source, codec = source_of(place, "hierarchical")
    network = build_context(configuration(place, "hierarchical"), source, codec)
    assert list(network.config.codebook_sizes) == [6, 24]
    # before any training it says how often codewords occur
    grids = [torch.stack([source.indices(n)[level] for n in range(len(source))]) for level in (0, 1)]
    network.requires_grad_(False)
    for forks in network.forks:
        forks.weight.zero_()
    used, _ = hold_out(source, 0.25, seed=0)
    for level, bits in enumerate(network([grid[used] for grid in grids]).sum(0)):
        counts = torch.bincount(grids[level][used].flatten())
        shares = counts[counts > 0] / counts.sum()
        expected = -(shares * shares.log2()).sum() * counts.sum()
        assert float(bits) == pytest.approx(float(expected), rel=0.02)


def test_features_reach_channels_whose_mean_is_far_from_0():
    noise = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    latents = noise * torch.tensor([0.5, 2.0, 1e-3]).view(3, 1, 1) + torch.tensor([0.2, -20.0, 0.01]).view(
        3, 1, 1
    )
    units = channel_units(latents)
    assert units[0] == pytest.approx(0.5, rel=0.05)  # as a channel around 0
    features = latents / units.view(3, 1, 1) * ONE
    assert ((features.abs() > LIMIT).float().mean((0, 2, 3)) < 0.003).all()
    assert (features.std((0, 2, 3)) > 3).all()  # and are not all alike


def test_many_channels_are_coded_in_four_groups(place, tmp_path):
    """Passes, and networks, do not grow with the channels."""
    torch.manual_seed(0)
    codec = LatentCodec(diffusers.AutoencoderKL(**BLOCKS, latent_channels=6))
    codec.save_pretrained(tmp_path / "six")
    files = encode_source(codec, open_source(place / "photos"), tmp_path / "codes")
    config = configuration(place, "kl", model={"teacher": str(tmp_path / "six"), "arguments": {"hidden": 8}})
    network = build_context(config, open_encoded(files), codec)
    assert network.config.group == 2
    assert len(network.networks) == 1 + 4 * 3


def test_a_network_goes_on_from_a_pretrained_one_of_the_same_codec(place, trained, tmp_path):
    for kind in ("kl", "hierarchical"):
        trained[kind].save_pretrained(tmp_path / kind)
        model = {"pretrained": str(tmp_path / kind), "arguments": {}}
        source, codec = source_of(place, kind)
        network = build_context(configuration(place, kind, model=model), source, codec)
        state, expected = network.state_dict(), trained[kind].state_dict()
        assert all(torch.equal(state[key], expected[key]) for key in expected)
    source, codec = source_of(place, "vq")
    with pytest.raises(ValueError, match="expected a context model for vq, got"):
        build_context(configuration(place, "vq", model=model), source, codec)


@pytest.mark.parametrize(
    ("kind", "sections", "message"),
    [
        (
            "vq",
            {"model": {"class_name": "LatentContext"}},
            "model.class_name: expected IndexContext for vq, got 'LatentContext'",
        ),
        ("kl", {"model": {"class_name": "IndexContext"}}, "model.class_name: expected LatentContext for kl"),
        (
            "kl",
            {"model": {"teacher": None}},
            "model.teacher: expected .* codec that a LatentContext learns from; name it as `codec`",
        ),
        (
            "kl",
            {"data": {"height": 64}},
            r"a window that one of the .* images holds, got .64x64.*00.png has 16x16",
        ),
        (
            "hierarchical",
            {"data": {"height": 30}},
            "data.height: expected a multiple of 4, .* of hierarchical, got 30",
        ),
        ("kl", {"data": {"held_out": 0.01}}, r"of the 12 images.*`data.held_out=0` trains on all"),
        ("kl", {"data": {"scale": [0.5, 1.0]}}, "data.scale: expected its default"),
        ("kl", {"model": {"arguments": {"hiden": 8}}}, "'hiden' .did you mean 'hidden'"),
        (
            "kl",
            {"model": {"arguments": {"units": [1.0]}}},
            "expected 1 coarsest step sizes, one per unit, got 3",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(place, kind, sections, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        config = configuration(place, kind, **sections)
        run(config, place, kind, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_values_of_the_other_kind_are_refused(place):
    source, _ = source_of(place, "kl")
    with pytest.raises(ValueError, match="expected indices of vq, got files of latents"):
        build_context(configuration(place, "vq"), source, LatentCodec.from_pretrained(place / "vq"))


def test_a_run_goes_on_with_its_own_codec_alone(place, tmp_path):
    shutil.copytree(place / "kl", tmp_path / "kl")
    shutil.copytree(place / "codes/kl", tmp_path / "codes/kl")
    config = configuration(tmp_path, "kl", run={"steps": 2})
    run(config, tmp_path, "kl", tmp_path / "run")
    before = LatentCodec.from_pretrained(tmp_path / "kl").space_fingerprint
    other = build("kl", seed=1)
    other.save_pretrained(tmp_path / "kl")
    shutil.rmtree(tmp_path / "codes/kl")
    encode_source(other, open_source(place / "photos"), tmp_path / "codes/kl")
    with pytest.raises(
        ValueError, match=rf"space fingerprint {before}.*, got .kl .{other.space_fingerprint}"
    ):
        run(config, tmp_path, "kl", tmp_path / "run")


def test_nothing_need_be_held_out(place, tmp_path):
    run(configuration(place, "vq", data={"held_out": 0.0}, run={"steps": 2}), place, "vq", tmp_path)
    lines = read_metrics(tmp_path)
    assert len(lines) == 2 and "held_out_bits_per_position" not in lines[-1]


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_train_writes_the_network_with_a_card(place, kind, tmp_path, capsys):
    preset, network_class = {
        "kl": ("latent-context", LatentContext),
        "vq": ("index-context", IndexContext),
    }[kind]
    argv = ["train", preset, "--data", str(place / "photos"), "--codec", str(place / kind)]
    argv += ["--out", str(tmp_path / "run"), "--set=run.steps=2", "--set=data.height=32"]
    argv += ["--set=model.arguments.hidden=8"]
    assert main([*argv, "--stream"]) == 2
    assert (
        f"expected none for {network_class.__name__}, which trains on data at hand" in capsys.readouterr().err
    )
    assert not (tmp_path / "run").exists()
    assert main(argv) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "run" / "entropy")
    network = network_class.from_pretrained(tmp_path / "run/entropy")
    stored, average = network.state_dict(), weights(tmp_path / "run/checkpoints/2", "ema")
    assert is_frozen(network) and all(torch.equal(stored[key], average[f"module.{key}"]) for key in stored)
    card = (tmp_path / "run/entropy/README.md").read_text()
    assert f"A {network_class.__name__}, trained" in card and f'teacher = "{kind}"' in card
    assert str(place) not in card
    assert main(argv) == 0
    assert "is finished, all 2 steps of it" in capsys.readouterr().err


def test_sensitivity_is_what_the_decoders_derivatives_say():
    """Mean squared error of white noise of variance v is v |J|^2 over the number of values, |J| being Frobenius' norm."""
    codec = build("kl")
    crops = torch.randn(64, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [0.3, 1.0, 2.0]
    ).view(3, 1, 1)

    def decode(latents: torch.Tensor) -> torch.Tensor:
        raw = latents / codec.latent_space.scaling_factor + codec.latent_space.shift_factor
        return codec.autoencoder.decode(raw[None]).sample[0]

    expected = torch.zeros(3)
    for crop in crops[:16]:
        jacobian = torch.func.jacrev(decode)(crop).detach()  # (3, 8, 8, C, 4, 4)
        expected += jacobian.square().sum((0, 1, 2, 4, 5)) / (4 * 3 * 8 * 8) / 16
    found = decoder_sensitivity(codec, crops)
    # 1024 draws of noise in each channel, and decoders bend a little
    torch.testing.assert_close(found.float(), expected, rtol=0.2, atol=0)
    assert torch.equal(found, decoder_sensitivity(codec, crops))


@pytest.mark.parametrize("wanted", [30.0, 40.0])
def test_the_coarsest_steps_leave_the_psnr_that_was_asked_for(wanted):
    codec = build("kl")
    images = torch.stack([make_image(64, 64, seed) for seed in range(4)])
    latents = codec.encode(images)
    steps = coarsest_step_sizes(decoder_sensitivity(codec, latents), wanted).float().view(-1, 1, 1)
    decoded, rounded = (
        codec.decode(each, output_type="pt") for each in (latents, torch.round(latents / steps) * steps)
    )
    assert float(psnr(rounded, decoded).mean()) == pytest.approx(wanted, abs=1.5)
    # in equal parts
    parts = steps.flatten().double().square() / 12 * decoder_sensitivity(codec, latents)
    torch.testing.assert_close(parts, torch.full_like(parts, 10 ** (-wanted / 10) / 3), rtol=1e-5, atol=0)


def test_a_channel_that_never_changes_is_named():
    codec = build("kl")
    latents = torch.randn(2, 3, 8, 8)
    latents[:, 1] = 0.5
    with pytest.raises(ValueError, match="channel 1 of kl is constant"):
        decoder_sensitivity(codec, latents)
