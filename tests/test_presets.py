"""Every shipped preset says how to run it, builds the model it promises, and trains."""

import json
import math
import re
import shlex
import tomllib
from importlib.resources import files

import pytest
import torch
from helpers.training import tiny_config, write_images

from latent_codec import HierarchicalVQ, LatentCodec
from latent_codec.cli import build_parser, main
from latent_codec.images.sources import open_source
from latent_codec.latents.encoded_images import encode_source, open_encoded
from latent_codec.training.build import build_autoencoder, load_codec
from latent_codec.training.classifier_task import build_classifier
from latent_codec.training.config import TrainingConfig, load_config, preset_names, preset_notes
from latent_codec.training.hierarchical_kl_task import build_hierarchical_kl
from latent_codec.training.loop import train
from latent_codec.training.prior_task import build_prior
from latent_codec.training.report import read_metrics
from latent_codec.training.resolution import resolve

LARGE = ["sd-f8c4", "sd3-f8c16", "vqgan-f8"]
GLOBAL = ["faces-global", "fashion-mnist-global"]
FINETUNING = [
    "finetune-decoder",
    "distill-decoder",
    "upscale-decoder",
    "equivariant",
    "compatible",
    "default-f8c16-rd",
]
NEW = [name for name in preset_names() if name not in FINETUNING and load_config(name).kind.name == "codec"]
HIERARCHIES = [name for name in preset_names() if load_config(name).kind.name == "hierarchical"]
PRIORS = [name for name in preset_names() if load_config(name).kind.name == "prior"]
CLASSIFIERS = [name for name in preset_names() if load_config(name).kind.name == "classifier"]
SMALL = [name for name in NEW if name not in LARGE]


def preset_text(name: str) -> str:
    return (files("latent_codec") / "presets" / f"{name}.toml").read_text(encoding="utf-8")


def header(name: str) -> str:
    """The comment that the preset opens with, as one paragraph."""
    opening = re.match(r"(?:#.*\n)+", preset_text(name))
    assert opening, f"{name} does not open with a comment"
    return " ".join(line.removeprefix("#").strip() for line in opening.group().splitlines())


def short(name: str, *overrides: str) -> TrainingConfig:
    """The preset, cut to two steps of two images. LPIPS, whose weights are not everywhere, is left out."""
    config = load_config(name)
    settings = ["run.steps=2", "run.log_every=1", "optimizer.batch_size=2"]
    if config.kind.name == "codec":
        settings += ["objective.lpips_weight=0", "codebook.kmeans_crops=8"]
        settings.append(f"codebook.start_step={int(config.codebook.start_step > 0)}")
    return load_config(name, [*settings, *overrides])


def losses_of(run) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_the_presets_that_the_documentation_names_are_there():
    assert set(preset_names()) >= {
        "autoencoder",
        "beta-vae",
        "default-f8c16",
        "default-f8c4",
        "denoising",
        "faces-global",
        "fashion-mnist-global",
        "fashion-mnist-vq",
        "finetune-decoder",
        "nvae-faces",
        "nvae-fashion-mnist",
        "pixelcnn-codes",
        "pixelcnn-fashion-mnist",
        "pixelcnn-fashion-mnist-vq",
        "pixelcnn-latents",
        "pixelsnail-bottom",
        "pixelsnail-faces",
        "pixelsnail-fashion-mnist-vq",
        "pixelsnail-middle",
        "pixelsnail-top",
        "sd-f8c4",
        "sd3-f8c16",
        "vqgan-f8",
        "vqvae-2017",
        "vqvae2-three-level",
        "vqvae2-two-level",
    }


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_opens_with_a_command_that_runs_it(name):
    first_line = preset_text(name).splitlines()[0]
    command = shlex.split(first_line.removeprefix("#"))
    assert command[:2] == ["latent-codec", "train"]

    args = build_parser("train").parse_args(command[1:])

    assert args.preset == name
    assert args.data, "the command needs --data to run"


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_states_its_duration_result_and_source(name):
    text = header(name)
    for what in ("Expected:", "Source:"):
        assert re.search(rf"{what} \S+", text), f"{name} does not say its {what}"
    assert re.search(r"Expected:.*\d.*Source:", text) and re.search(r"\d", preset_notes(name).duration)
    assert re.search(r"arXiv:\d{4}\.\d{5}|Science|ICML|ICLR|model card", text)


@pytest.mark.parametrize("name", preset_names())
def test_a_presets_notes_are_one_line_each(name):
    notes = preset_notes(name)
    assert 30 < len(notes.summary) < 120 and not notes.summary.endswith(".")
    assert "\n" not in "".join(notes) and not notes.duration.endswith(".")


def test_the_list_of_presets_says_what_each_is_and_takes(capsys):
    assert main(["train", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if not line.startswith(" ")] == preset_names()
    start = lines.index("autoencoder")
    assert lines[start + 1].strip().startswith("The plain autoencoder: one image in")
    assert "10 minutes" in lines[start + 2]


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_is_run_as_it_is_written_and_crops_by_whole_latents(name, tmp_path):
    config = resolve(load_config(name), tmp_path, "meta")
    written = tomllib.loads(preset_text(name))
    del written["preset"]
    written["run"].setdefault("precision", "fp32")  # where nothing is known of the device
    written["run"].setdefault("log_every", config.run.log_every)
    assert TrainingConfig.from_dict(written) == config
    if config.kind.name != "codec":
        return
    levels = len(config.model.arguments.get("block_out_channels", [1] * 4))
    strides = config.model.arguments.get("strides", [2] * (levels - 1))
    assert all(side % math.prod(strides) == 0 for side in config.data.size)


@pytest.mark.parametrize(
    ("name", "latent_channels", "parameters"),
    # Stable Diffusion 1's VAE has 83,653,863. Stable Diffusion 3's 12 further channels add 12 inputs to the decoder
    # and 24 outputs to the encoder, by way of 3x3 convolutions; the two 1x1 convolutions, 72 + 20, are gone.
    [("sd-f8c4", 4, 83_653_863), ("sd3-f8c16", 16, 83_653_863 + 12 * 512 * 9 + 24 * (512 * 9 + 1) - 92)],
)
def test_the_large_presets_have_the_shape_of_their_originals(name, latent_channels, parameters):
    with torch.device("meta"):
        autoencoder = build_autoencoder(load_config(name))
    assert sum(weight.numel() for weight in autoencoder.parameters()) == parameters
    assert autoencoder.config.latent_channels == latent_channels
    assert (autoencoder.quant_conv is None) == (autoencoder.post_quant_conv is None) == (name == "sd3-f8c16")
    latents = autoencoder.encode(torch.zeros(1, 3, 64, 64, device="meta")).latent_dist.mean
    assert latents.shape == (1, latent_channels, 8, 8)


def test_vqgan_f8_has_the_shape_of_latent_diffusions_vq_f8():
    """ch 128, ch_mult [1, 2, 2, 4], two residual blocks, z 4, n_embed 16384, attention where 256 px have become 32."""
    config = load_config("vqgan-f8")
    with torch.device("meta"):
        autoencoder = build_autoencoder(config)
    assert autoencoder.encode(torch.zeros(1, 3, 256, 256, device="meta")).latents.shape == (1, 4, 32, 32)
    assert autoencoder.quantizers[0].embedding.weight.shape == (16384, 4)
    down, up = autoencoder.encoder.down_blocks, autoencoder.decoder.up_blocks
    assert [block.resnets[-1].out_channels for block in down] == [128, 256, 256, 512]
    assert [len(block.resnets) for block in down] == [2] * 4
    assert [hasattr(block, "attentions") for block in down] == [False, False, False, True]
    assert [hasattr(block, "attentions") for block in up] == [True, False, False, False]
    # A head of its own for every few channels would be another network: the original's attention has one.
    assert down[3].attentions[0].heads == autoencoder.encoder.mid_block.attentions[0].heads == 1


@pytest.mark.parametrize(
    ("name", "side", "grids", "codebook_size"),
    [
        ("vqvae-2017", 128, [32], 512),  # arXiv:1711.00937, section 4.2
        ("vqvae2-two-level", 512, [32, 64], 512),
        ("vqvae2-three-level", 512, [32, 64, 128], 512),
        ("fashion-mnist-vq", 28, [7], 128),
    ],
)
def test_a_hierarchical_preset_makes_the_grids_that_it_names(name, side, grids, codebook_size):
    autoencoder = build_autoencoder(load_config(name))
    assert autoencoder.grid_shapes(side, side) == [(grid, grid) for grid in grids]
    assert [quantizer.codebook_size for quantizer in autoencoder.quantizers] == [codebook_size] * len(grids)
    assert all(quantizer.beta == 0.25 for quantizer in autoencoder.quantizers)


@pytest.mark.parametrize("name", HIERARCHIES)
def test_a_hierarchy_has_five_groups_over_three_scales_and_trains(name, tmp_path):
    config = short(name, "data.held_out=0")
    channels = config.model.arguments.get("in_channels", 3)
    source = open_source(write_images(tmp_path / "images", 4, channels, size=(109, 89)))
    network = build_hierarchical_kl(config)
    assert [shape[1:] for shape in network.group_shapes(*config.data.size)] == [
        (4, 4),
        *[(8, 8)] * 2,
        *[(16, 16)] * 2,
    ]
    assert train(config, network, source, tmp_path / "run").finished
    assert all(map(math.isfinite, losses_of(tmp_path / "run")))


@pytest.mark.parametrize("name", GLOBAL)
def test_a_global_preset_turns_a_image_into_one_vector(name):
    config = load_config(name)
    autoencoder = build_autoencoder(config)
    image = torch.zeros(2, autoencoder.config.in_channels, *config.data.size)
    latents = autoencoder.encode(image).latent_dist.mean
    assert latents.shape == (2, config.model.arguments["latent_channels"], 1, 1)
    assert autoencoder.decode(latents).sample.shape == image.shape


def test_the_objectives_are_settings_of_one_network():
    """The three share all but the objective, so that a difference between their results is the objective's."""
    plain, denoising, variational = (load_config(name) for name in ("autoencoder", "denoising", "beta-vae"))
    for section in ("model", "data", "optimizer", "run"):
        assert getattr(plain, section) == getattr(denoising, section) == getattr(variational, section)
    assert plain.objective.posterior == "mean" and plain.objective.kl_weight == 0
    assert denoising.objective.input_noise > 0
    assert variational.objective.kl_weight > 1 and variational.objective.is_likelihood


@pytest.mark.parametrize("name", SMALL)
def test_a_small_preset_trains(name, tmp_path):
    # A single latent needs its whole crop, and so does the coarsest of ten scales; a grid of them may be smaller.
    overrides, size = (
        ([], (109, 89)) if name in (*GLOBAL, "faces-multi-scale") else (["data.height=32"], (45, 37))
    )
    config = short(name, *overrides)
    channels = config.model.arguments.get("in_channels", 3)
    source = open_source(write_images(tmp_path / "images", 4, channels, size=size))

    result = train(config, build_autoencoder(config), source, tmp_path / "run")

    assert result.finished
    losses = losses_of(tmp_path / "run")
    assert len(losses) == 2 and all(map(math.isfinite, losses))


def labeled_images(folder, channels=1, size=(28, 28)):
    """Ten images of two classes, a subfolder each."""
    for name in ("bags", "boots"):
        write_images(folder / name, 10, channels, size=size)
    return open_source(folder)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_classifier_preset_trains(name, tmp_path):
    config, source = short(name), labeled_images(tmp_path / "images")
    result = train(config, build_classifier(config, source), source, tmp_path / "run")
    assert result.finished and result.network.config.num_classes == 2
    assert all(map(math.isfinite, losses_of(tmp_path / "run")))


@pytest.mark.parametrize("name", PRIORS)
def test_a_prior_preset_trains_on_the_codec_it_is_for(name, tmp_path):
    """The prior as it is, over few codes: those of a codec with the levels of its own, or over few latents."""
    arguments = load_config(name).model.arguments
    is_faces, is_fashion = "faces" in name, "fashion" in name
    channels, strides = (1, [4]) if is_fashion else (3, [4] if name == "pixelcnn-codes" else [4, 2, 2])
    size = (28, 28) if is_fashion else (112, 96) if is_faces else (32, 32)
    narrow = ["model.arguments.hidden_channels=16"]
    if arguments.get("attention_channels"):
        narrow += ["model.arguments.attention_channels=16"]
    if not is_faces and not is_fashion:
        narrow += ["data.height=32", "data.held_out=0.2"]
    source = labeled_images(tmp_path / "images", channels, size)
    codec = None
    if arguments.get("data") != "pixels":
        torch.manual_seed(0)
        small = {"hidden_channels": 8, "residual_channels": 4, "embed_dim": 4, "codebook_sizes": 8}
        if arguments.get("data") == "latents":
            autoencoder = build_autoencoder(tiny_config()).eval()
            narrow += ["model.arguments.num_mixtures=2"]
        else:
            autoencoder = HierarchicalVQ(in_channels=channels, strides=strides, **small)
        LatentCodec(autoencoder).save_pretrained(tmp_path / "codec")
        narrow += [f"prior.codec={tmp_path / 'codec'}"]
    config = short(name, *narrow, "run.precision=fp32")
    codec = load_codec(config)
    if codec is not None:
        source = open_encoded(encode_source(codec, source, tmp_path / "codes"), codec=codec)

    result = train(config, build_prior(config, source, codec), source, tmp_path / "run")

    assert result.finished
    assert all(map(math.isfinite, losses_of(tmp_path / "run")))
    assert ("held_out_bits_per_index" in read_metrics(tmp_path / "run")[-1]) == (config.data.held_out > 0)


def test_finetune_decoder_starts_from_a_codec_and_keeps_its_encoder(tmp_path):
    given = build_autoencoder(tiny_config())
    given.save_pretrained(tmp_path / "codec")
    config = short("finetune-decoder", f"model.pretrained={tmp_path / 'codec'}", "data.height=32")
    source = open_source(write_images(tmp_path / "images", 4, size=(40, 48)))

    result = train(config, build_autoencoder(config), source, tmp_path / "run")

    trained, before = result.network.state_dict(), given.state_dict()
    for key, tensor in before.items():
        if key.startswith(("encoder.", "quant_conv.")):
            assert torch.equal(trained[key], tensor), key
    assert not torch.equal(trained["decoder.conv_out.weight"], before["decoder.conv_out.weight"])
    assert load_config("finetune-decoder").model.pretrained == "default"
