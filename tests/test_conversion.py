"""Conversion against what the original code answers, and against key lists written from its naming rules."""

import itertools
import json
import os
import random
import re
import subprocess
import sys

import pytest
import torch
from diffusers import AutoencoderKL, VQModel
from safetensors.torch import load_file, save_file

from latent_codec import LatentCodec
from latent_codec.cli import main
from latent_codec.components.weight_files import config_metadata
from latent_codec.conversion import ConversionError, from_diffusers, read_foreign, to_diffusers
from latent_codec.conversion.foreign import detect, recognize, shapes_of
from latent_codec.conversion.ldm_config import read_config
from latent_codec.conversion.scales import SCALES
from latent_codec.converting import convert
from latent_codec.errors import SettingError
from latent_codec.models.autoencoder_vq import AutoencoderVQ
from latent_codec.models.hierarchical_vq import HierarchicalVQ

KL_GOLDEN = ["ldm_kl_f8.ckpt", "sd_full_kl_f8.safetensors", "flux_style_c16.safetensors"]
VQ_GOLDEN = ["taming_vqgan_f16_attn.ckpt", "ldm_vq_f4_noattn.ckpt"]
FILES = {"ldm": [*KL_GOLDEN, *VQ_GOLDEN], "taming": VQ_GOLDEN, "vq-vae-2": ["rosinality_vqvae2.pt"]}
# float32 against the goldens' float64, values of about 1 after some hundred layers; float64 against itself
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


@pytest.fixture
def golden(shared):
    def load(name, dtype):
        path = shared / "golden/conversion" / name
        expected = load_file(path.with_name(f"{path.name.partition('.')[0]}.expected.safetensors"))
        expected = {
            key: value.to(dtype) if value.is_floating_point() else value for key, value in expected.items()
        }
        return read_foreign(path).component(dtype), expected

    return load


def assert_close(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE[found.dtype])


@pytest.mark.parametrize("name", KL_GOLDEN)
@dtypes
@torch.no_grad()
def test_kl_autoencoders_answer_as_the_original_code(golden, name, dtype):
    component, expected = golden(name, dtype)
    assert type(component) is AutoencoderKL
    posterior = component.encode(expected["input"]).latent_dist
    assert_close(posterior.parameters, expected["moments"])
    assert_close(component.decode(expected["moments"].chunk(2, 1)[0]).sample, expected["recon"])


@pytest.mark.parametrize("name", VQ_GOLDEN)
@dtypes
@torch.no_grad()
def test_vq_autoencoders_answer_as_the_original_code(golden, name, dtype):
    component, expected = golden(name, dtype)
    assert type(component) is AutoencoderVQ
    assert_close(component.encode(expected["input"]).latents, expected["latents"])
    assert_close(component.quantize_latents(expected["latents"]).quantized, expected["quantized"])
    assert_close(component.decode_indices(expected["indices"]), expected["recon"])
    if dtype == torch.float64:
        assert torch.equal(component.encode_indices(expected["input"]), expected["indices"])


@dtypes
@torch.no_grad()
def test_vq_vae_2_answers_as_the_original_code(golden, dtype):
    component, expected = golden("rosinality_vqvae2.pt", dtype)
    top, bottom = component.encode_indices(expected["input"])
    assert torch.equal(top, expected["indices_top"]) and torch.equal(bottom, expected["indices_bottom"])
    assert_close(component(expected["input"]).sample, expected["recon"])


@pytest.mark.parametrize(("to", "name"), [(to, name) for to, names in FILES.items() for name in names])
def test_there_and_back_is_the_same_to_the_bit(shared, to, name):
    foreign = read_foreign(shared / "golden/conversion" / name)
    written = from_diffusers(foreign.component(), to)
    derived = {"quantize_t.embed_avg", "quantize_b.embed_avg"} if to == "vq-vae-2" else set()
    assert {foreign.prefix + key for key in written} - derived == set(foreign.keys.mapped)
    for key in foreign.keys.mapped:
        tensor = written[key.removeprefix(foreign.prefix)]
        assert tensor.dtype == foreign.tensors[key].dtype and torch.equal(tensor, foreign.tensors[key])


@pytest.mark.parametrize(
    ("name", "counts", "prefix", "wrapper"),
    [
        ("ldm_kl_f8.ckpt", {"loss": 3}, "", "state_dict"),
        ("sd_full_kl_f8.safetensors", {"loss": 3, "outside": 3}, "first_stage_model.", None),
        ("flux_style_c16.safetensors", {}, "", None),
        ("rosinality_vqvae2.pt", {"quantize": 2}, "", None),
    ],
)
def test_every_key_is_counted(shared, name, counts, prefix, wrapper):
    foreign = read_foreign(shared / "golden/conversion" / name)
    found = foreign.keys.counts()
    assert (foreign.prefix, foreign.wrapper) == (prefix, wrapper)
    assert {
        rule.removeprefix("left out: ").partition(".")[0].partition("_")[0].split()[0]: number
        for rule, number in found.items()
        if rule.startswith("left out")
    } == counts
    assert found["mapped"] + sum(counts.values()) == len(foreign.tensors)
    assert found["missing"] == found["unexpected"] == 0
    assert foreign.count_keys_by_name() | {"missing": 0} == found


# ------------------------------------------------------------------ the original's naming rules, written once more


def original_keys(
    widths,
    blocks,
    attention,
    in_channels,
    out_channels,
    z_channels,
    embed_dim,
    double_z,
    quant_convs,
    codes,
    gumbel=False,
):
    """Names and shapes that latent-diffusion's and taming's constructors give, in the order they build them.

    Written from the rules of their Encoder and Decoder: `down` and `up` are lists by level from the image
    inwards, each with `block` and `attn` lists and a `downsample` (not at the last level) or `upsample` (not at
    level 0); a residual block has `nin_shortcut` where its width changes.
    """
    keys = {}

    def conv(name, out, into, side):
        keys[f"{name}.weight"], keys[f"{name}.bias"] = (out, into, side, side), (out,)

    def norm(name, width):
        keys[f"{name}.weight"], keys[f"{name}.bias"] = (width,), (width,)

    def residual(name, into, out):
        norm(f"{name}.norm1", into)
        conv(f"{name}.conv1", out, into, 3)
        norm(f"{name}.norm2", out)
        conv(f"{name}.conv2", out, out, 3)
        if into != out:
            conv(f"{name}.nin_shortcut", out, into, 1)

    def attend(name, width):
        norm(f"{name}.norm", width)
        for each in ("q", "k", "v", "proj_out"):
            conv(f"{name}.{each}", width, width, 1)

    def middle(name, width):
        residual(f"{name}.block_1", width, width)
        attend(f"{name}.attn_1", width)
        residual(f"{name}.block_2", width, width)

    levels = len(widths)
    conv("encoder.conv_in", widths[0], in_channels, 3)
    width = widths[0]
    for level in range(levels):
        for block in range(blocks):
            residual(f"encoder.down.{level}.block.{block}", width, widths[level])
            width = widths[level]
            if level in attention:
                attend(f"encoder.down.{level}.attn.{block}", width)
        if level < levels - 1:
            conv(f"encoder.down.{level}.downsample.conv", width, width, 3)
    middle("encoder.mid", width)
    norm("encoder.norm_out", width)
    conv("encoder.conv_out", 2 * z_channels if double_z else z_channels, width, 3)

    conv("decoder.conv_in", width, z_channels, 3)
    middle("decoder.mid", width)
    for level in reversed(range(levels)):
        for block in range(blocks + 1):
            residual(f"decoder.up.{level}.block.{block}", width, widths[level])
            width = widths[level]
            if level in attention:
                attend(f"decoder.up.{level}.attn.{block}", width)
        if level:
            conv(f"decoder.up.{level}.upsample.conv", width, width, 3)
    norm("decoder.norm_out", width)
    conv("decoder.conv_out", out_channels, width, 3)

    if quant_convs:
        factor = 2 if double_z else 1
        conv("quant_conv", factor * embed_dim, factor * z_channels, 1)
        conv("post_quant_conv", z_channels, embed_dim, 1)
    if codes and gumbel:
        conv("quantize.proj", codes, embed_dim, 1)
        keys["quantize.embed.weight"] = (codes, embed_dim)
    elif codes:
        keys["quantize.embedding.weight"] = (codes, embed_dim)
    return keys


def random_shape(number):
    generator = random.Random(number)
    levels = 6 if number == 0 else generator.randint(2, 6)
    z_channels = generator.choice([3, 4, 8, 16, 32])
    is_vq = number % 2
    channels = generator.choice([1, 3, 4])
    blocks = 4 if number == 0 else generator.randint(1, max(1, min(4, 10 // levels)))  # small ones are quick
    return {
        "widths": [32 * generator.choice([1, 1, 2]) for _ in range(levels)],
        "blocks": blocks,
        "attention": {level for level in range(levels) if generator.random() < 0.3},
        "in_channels": channels,
        "out_channels": channels,
        "z_channels": z_channels,
        "embed_dim": generator.choice([z_channels, 2 * z_channels]) if is_vq else z_channels,
        "double_z": not is_vq,
        "quant_convs": bool(is_vq or generator.random() < 0.6),
        "codes": generator.choice([16, 37]) if is_vq else 0,
    }


def build(shape):
    """Our component of such a shape, weights random in every entry."""
    kinds = [level in shape["attention"] for level in range(len(shape["widths"]))]
    config = {
        "in_channels": shape["in_channels"],
        "out_channels": shape["out_channels"],
        "block_out_channels": tuple(shape["widths"]),
        "layers_per_block": shape["blocks"],
        "down_block_types": tuple(
            "AttnDownEncoderBlock2D" if each else "DownEncoderBlock2D" for each in kinds
        ),
        "up_block_types": tuple(
            "AttnUpDecoderBlock2D" if each else "UpDecoderBlock2D" for each in reversed(kinds)
        ),
        "latent_channels": shape["z_channels"],
        "norm_num_groups": 32,
    }
    if shape["codes"]:
        return AutoencoderVQ(**config, num_vq_embeddings=shape["codes"], vq_embed_dim=shape["embed_dim"])
    return AutoencoderKL(
        **config, use_quant_conv=shape["quant_convs"], use_post_quant_conv=shape["quant_convs"]
    )


COVERING = (
    "0 1 3 4 5 6 7 8 11 12 13 15 16 17 19 21 23 24 25 26 28 31 32 33 35 38 39 42 46 47 49 51 55 57 59 60 61"
)
"""Of the first 64 random shapes some that have, together, each pair of entries that any of the 64 has: levels, blocks,
channels, codes, quant convs, where attention is, and where widths grow or shrink."""


@pytest.mark.parametrize("number", map(int, COVERING.split()))
def test_any_shape_goes_out_under_the_originals_names_and_comes_back(number):
    torch.manual_seed(number)
    shape = random_shape(number)
    component = build(shape)

    written = from_diffusers(component, "taming" if shape["codes"] else "ldm")

    assert {key: tuple(tensor.shape) for key, tensor in written.items()} == original_keys(**shape)
    again = to_diffusers(written)
    state = component.state_dict()
    assert again.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[key]) for key, tensor in again.state_dict().items())
    ignored = {"sample_size", "_name_or_path", "scaling_factor", "_use_default_values"}
    for key in component.config.keys() - ignored:
        assert again.config[key] == component.config[key] or list(again.config[key]) == list(
            component.config[key]
        ), key


@pytest.mark.parametrize(("blocks", "sizes", "channels"), [(1, 16, 3), (3, (16, 24), 1), (2, 8, 4)])
def test_any_vq_vae_2_goes_out_and_comes_back(blocks, sizes, channels):
    component = HierarchicalVQ(
        in_channels=channels,
        hidden_channels=16,
        num_residual_blocks=blocks,
        residual_channels=6,
        embed_dim=4,
        codebook_sizes=sizes,
    )
    written = from_diffusers(component, "vq-vae-2")
    last = 1 + blocks  # the ReLU after the residual blocks
    assert {
        f"dec.blocks.{last + 1}.weight",
        f"dec.blocks.{last + 3}.bias",
        f"dec_t.blocks.{last + 1}.bias",
    } <= set(written)
    assert (
        f"enc_b.blocks.{4 + blocks}.conv.3.weight" in written
        and f"enc_t.blocks.{2 + blocks}.conv.1.bias" in written
    )
    assert (
        written["quantize_t.embed_avg"].shape
        == written["quantize_t.embed"].shape
        == (4, component.config.codebook_sizes if isinstance(sizes, int) else sizes[0])
    )
    again = to_diffusers(written)
    state = component.state_dict()
    assert again.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[key]) for key, tensor in again.state_dict().items())


@torch.no_grad()
def test_gumbel_vqgan_chooses_by_its_layer_and_comes_back():
    """taming's GumbelQuantize in evaluation: argmax of proj, embedded; GumbelVQ's decoder sees that alone."""
    torch.manual_seed(0)
    state = small(codes=16, gumbel=True, double_z=False)
    component = to_diffusers(state)
    assert component.config.assignment == "linear"
    image = torch.rand(1, 3, 8, 12) * 2 - 1
    latents = component.encode(image).latents
    weight, bias = state["quantize.proj.weight"], state["quantize.proj.bias"]
    expected = torch.nn.functional.conv2d(latents, weight, bias).argmax(1)
    assert torch.equal(component.encode_indices(image), expected)
    codewords = state["quantize.embed.weight"][expected].movedim(-1, 1)
    assert torch.equal(component.quantize_latents(latents).quantized, codewords)
    back = from_diffusers(component, "taming")
    assert back.keys() == state.keys() and all(torch.equal(back[key], state[key]) for key in state)


def test_statistics_of_moving_averages_are_left_out():
    state = small(codes=16, double_z=False)
    averages = {
        "quantize.embedding.cluster_size": torch.ones(16),
        "quantize.embedding.embed_avg": torch.ones(16, 4),
    }
    foreign = recognize(state | averages)
    foreign.keys.check("it")
    assert set(foreign.keys.left_out) == set(averages)
    assert from_diffusers(foreign.component(), "taming").keys() == state.keys()


# ---------------------------------------------------------------------------------------- what does not fit


def small(**changes):
    shape = {
        "widths": [32, 32],
        "blocks": 1,
        "attention": set(),
        "in_channels": 3,
        "out_channels": 3,
        "z_channels": 4,
        "embed_dim": 4,
        "double_z": True,
        "quant_convs": True,
        "codes": 0,
    } | changes
    return {key: torch.rand(value) for key, value in original_keys(**shape).items()}


def without(key):
    state = small()
    del state[key]
    return state


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (without("encoder.mid.block_2.conv1.bias"), r"encoder\.mid\.block_2\.conv1\.bias missing"),
        (without("quant_conv.bias"), r"quant_conv\.bias missing"),
        (without("encoder.conv_in.weight"), r"encoder\.conv_in\.weight is missing"),
        (small() | {"encoder.extra": torch.zeros(1)}, r"encoder\.extra unexpected"),
        (small() | {"position_ids": torch.zeros(1)}, r"position_ids unexpected"),
        (
            small() | {"encoder.norm_out.bias": torch.zeros(31)},
            r"encoder\.norm_out\.bias \(31,\) instead of \(32,\) of another shape",
        ),
        (small(embed_dim=8), "embed_dim is 8 and z_channels 4"),
        (small(widths=[32, 48]), r"\[32, 48\] channels wide.*32 groups"),
        (
            small() | {f"first_stage_model.{key}": value for key, value in small().items()},
            "holds two autoencoders.*no prefix.*first_stage_model",
        ),
        ({"weight": torch.zeros(2)}, "no autoencoder that is known here: its keys are weight"),
        (
            {"0.weight": torch.zeros(2, 2, 3, 3), "1.conv.0.weight": torch.zeros(2)},
            "the encoder of a tiny autoencoder",
        ),
        ({}, "no autoencoder"),
    ],
)
def test_what_does_not_fit_is_named(state, words):
    with pytest.raises(ConversionError, match=words):
        to_diffusers(state)


def test_all_problems_come_at_once():
    state = without("quant_conv.bias") | {
        "encoder.extra": torch.zeros(1),
        "encoder.norm_out.bias": torch.zeros(31),
    }
    with pytest.raises(
        ConversionError, match=r"quant_conv\.bias missing; encoder\.extra unexpected; encoder\.norm_out"
    ):
        to_diffusers(state)


@pytest.mark.parametrize(
    ("config", "to", "words"),
    [
        ({"norm_num_groups": 16}, "ldm", "16 groups"),
        ({"act_fn": "relu"}, "ldm", "relu"),
        ({}, "taming", "AutoencoderKL cannot be written as taming; it can be as diffusers, ldm"),
        ({"up_block_types": ("AttnUpDecoderBlock2D",)}, "ldm", "attention is at other levels"),
    ],
)
def test_what_a_format_cannot_hold_is_refused(config, to, words):
    component = AutoencoderKL(**{"block_out_channels": (32,), "latent_channels": 4} | config)
    with pytest.raises(ConversionError, match=words):
        from_diffusers(component, to)


def test_levels_of_vq_vae_2_that_the_original_lacks_are_refused():
    with pytest.raises(ConversionError, match=r"strides are \(4, 2, 2\)"):
        from_diffusers(
            HierarchicalVQ(strides=(4, 2, 2), hidden_channels=8, embed_dim=4, codebook_sizes=8), "vq-vae-2"
        )


# ------------------------------------------------------------------------------------------- scales


@pytest.mark.parametrize(
    ("others", "channels", "scale"),
    [
        ({"cond_stage_model.transformer.text_model.x": 1}, 4, SCALES["sd1"]),
        ({"cond_stage_model.model.positional_embedding": 1}, 4, SCALES["sd1"]),
        ({"conditioner.embedders.0.x": 1}, 4, SCALES["sdxl"]),
        ({"model.diffusion_model.joint_blocks.0.x": 1}, 16, SCALES["sd3"]),
        ({"model.diffusion_model.double_blocks.0.x": 1}, 16, SCALES["flux"]),
        ({"cond_stage_model.transformer.x": 1, "scale_factor": 0.25}, 4, (0.25, None)),
        ({"cond_stage_model.transformer.x": 1}, 16, None),
        ({"model.diffusion_model.out.weight": 1}, 4, None),
    ],
)
def test_scales_follow_from_what_is_next_to_the_autoencoder(others, channels, scale):
    state = {f"first_stage_model.{k}": v for k, v in small(z_channels=channels, embed_dim=channels).items()}
    state |= {key: torch.tensor(float(value)) for key, value in others.items()}
    foreign = recognize(state)
    assert (foreign.scale and foreign.scale[:2]) == scale
    component = foreign.component()
    if scale:
        assert (component.config.scaling_factor, component.config.shift_factor) == scale


def test_families_scales_are_those_of_diffusers_configs():
    """By the published configs: SD 1 and 2, SDXL, SD3, FLUX.1."""
    assert SCALES == {
        "sd1": (0.18215, None),
        "sdxl": (0.13025, None),
        "sd3": (1.5305, 0.0609),
        "flux": (0.3611, 0.1159),
    }


# ------------------------------------------------------------------------------------- the command line


def test_info_says_what_a_foreign_file_is(shared, tmp_path, capsys):
    assert main(["info", str(shared / "golden/conversion/sd_full_kl_f8.safetensors"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["prefix"] == "first_stage_model." and facts["class"] == "AutoencoderKL"
    assert facts["config"]["block_out_channels"] == [32, 32, 64, 64] and facts["scaling_factor"] == 0.18215
    assert facts["keys"]["mapped"] == 244 and facts["tensors"] == 250
    save_file(without("quant_conv.bias"), tmp_path / "broken.safetensors")
    assert main(["info", str(tmp_path / "broken.safetensors"), "--verbose"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^missing +quant_conv\.bias$", out, re.M)


@pytest.fixture
def foreign_file(tmp_path):
    torch.manual_seed(0)
    component = build(random_shape(2) | {"blocks": 1, "widths": [32, 32], "attention": {1}})
    path = tmp_path / "vae.safetensors"
    save_file(from_diffusers(component, "ldm"), path)
    return component, path


def test_convert_there_and_back(foreign_file, tmp_path, capsys):
    _, path = foreign_file
    folder, back = tmp_path / "folder", tmp_path / "back.ckpt"
    assert main(["convert", str(path), str(folder), "--scaling-factor", "0.5", "--shift-factor", "0.1"]) == 0
    out, err = capsys.readouterr()
    assert out.split() == [str(folder)]
    assert "0 keys missing" in err and "scaling_factor 0.5, shift_factor 0.1: as asked" in err
    codec = LatentCodec.from_pretrained(folder)
    assert (codec.latent_space.scaling_factor, codec.latent_space.shift_factor) == (0.5, 0.1)
    assert "vae.safetensors" in (folder / "README.md").read_text()

    assert main(["convert", str(folder), str(back), "--to", "ldm", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["written"] == [str(back)]
    first, again = load_file(path), torch.load(back, weights_only=True)["state_dict"]
    assert first.keys() == again.keys() and all(torch.equal(first[key], again[key]) for key in first)

    third = tmp_path / "third.safetensors"
    assert main(["convert", str(folder), str(third), "--to", "ldm", "--dtype", "float16"]) == 0
    assert {tensor.dtype for tensor in load_file(third).values()} == {torch.float16}
    assert read_foreign(third).scale[:2] == (0.5, 0.1)  # by the file's metadata
    plain = LatentCodec.from_pretrained(third)
    assert plain.latent_space.scaling_factor == 0.5 and plain.dtype == torch.float32


def test_convert_in_python_says_what_it_found(foreign_file, tmp_path):
    _, path = foreign_file
    with pytest.raises(SettingError) as caught:
        convert(path, tmp_path / "folder")
    assert caught.value.setting == "scale" and isinstance(caught.value, ConversionError)
    with pytest.raises(SettingError, match=r"one of diffusers, .*, ldm"):
        convert(path, tmp_path / "folder", to="other", scale="sd1")
    assert not (tmp_path / "folder").exists()
    done = convert(path, tmp_path / "folder", scale="sd1", dtype=torch.float16)
    assert done.written == [tmp_path / "folder"] and done.scaling_factor == 0.18215
    assert done.keys["mapped"] == len(load_file(path)) and done.prefix is None
    for name in ("entry", "config"):
        with pytest.raises(SettingError, match=f"{name}: .* is a codec"):
            convert(tmp_path / "folder", tmp_path / "new.pt", to="ldm", **{name: "x"})
    back = convert(tmp_path / "folder", tmp_path / "back.pt", to="ldm")
    assert back.keys == {"mapped": done.keys["mapped"]} and back.written == [tmp_path / "back.pt"]


def test_a_folder_in_half_precision_keeps_its_bits(foreign_file, tmp_path):
    _, path = foreign_file
    assert main(["convert", str(path), str(tmp_path / "half"), "--scale", "sd1", "--dtype", "bfloat16"]) == 0
    assert main(["convert", str(tmp_path / "half"), str(tmp_path / "half.pt"), "--to", "ldm"]) == 0
    back = torch.load(tmp_path / "half.pt", weights_only=True)
    assert all(torch.equal(back[key], tensor.bfloat16()) for key, tensor in load_file(path).items())


def test_a_codec_whose_config_leaves_the_scale_open_converts_with_the_one_it_computes_with(
    foreign_file, tmp_path, capsys
):
    _, path = foreign_file
    folder = tmp_path / "folder"
    assert main(["convert", str(path), str(folder), "--scaling-factor", "1"]) == 0
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"scaling_factor": None}))
    assert LatentCodec.from_pretrained(folder).latent_space.scaling_factor == 1
    capsys.readouterr()
    assert main(["convert", str(folder), str(tmp_path / "again")]) == 0
    assert "scaling_factor 1: the codec's own config" in capsys.readouterr().err


def test_an_unknown_scale_is_asked_for_and_warned_of(foreign_file, tmp_path, capsys):
    _, path = foreign_file
    assert main(["convert", str(path), str(tmp_path / "file.safetensors"), "--scale", "sd1"]) == 2
    assert "expected the name of a folder" in capsys.readouterr().err
    assert main(["convert", str(path), str(tmp_path / "folder")]) == 2
    assert "scale" in capsys.readouterr().err and not (tmp_path / "folder").exists()
    with pytest.warns(UserWarning, match="taken as 1"):
        assert LatentCodec.from_pretrained(path).latent_space.scaling_factor == 1


def test_calibrate_measures_the_scale(foreign_file, tmp_path, capsys):
    from helpers.training import write_images

    _, path = foreign_file
    images = write_images(tmp_path / "images", channels=random_shape(2)["in_channels"])
    assert main(["convert", str(path), str(tmp_path / "folder"), "--calibrate", str(images), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    space = LatentCodec.from_pretrained(tmp_path / "folder").latent_space
    assert facts["scaling_factor"] == space.scaling_factor != 1 and "measured" in facts["scale_known_by"]


def config_file(tmp_path, **changes):
    dd = {"double_z": True, "z_channels": 4, "resolution": 64, "in_channels": 3, "out_ch": 3, "ch": 32}
    dd |= {"ch_mult": [1, 1], "num_res_blocks": 1, "attn_resolutions": []} | changes
    model = {
        "params": {"scale_factor": 0.3, "first_stage_config": {"params": {"embed_dim": 4, "ddconfig": dd}}}
    }
    path = tmp_path / "model.yaml"
    path.write_text(json.dumps({"model": model}))  # json is yaml
    return path


def test_a_given_config_has_to_agree_and_says_the_scale(tmp_path, capsys):
    path = tmp_path / "vae.safetensors"
    save_file(small(), path)
    good = ["convert", str(path), str(tmp_path / "good"), "--config", str(config_file(tmp_path))]
    assert main(good) == 0
    assert LatentCodec.from_pretrained(tmp_path / "good").latent_space.scaling_factor == 0.3
    for changes, words in (
        ({"ch": 64}, "ch times ch_mult is (64, 64) there and (32, 32) here"),
        ({"attn_resolutions": [32]}, "attention levels is [1] there and [] here"),
        ({"num_res_blocks": 2}, "num_res_blocks is 2 there and 1 here"),
    ):
        config = config_file(tmp_path, **changes)
        assert main(["convert", str(path), str(tmp_path / "bad"), "--config", str(config)]) == 2
        assert words in capsys.readouterr().err
        assert not (tmp_path / "bad").exists()
    config.write_text("{unclosed: [")
    assert main(["convert", str(path), str(tmp_path / "bad"), "--config", str(config)]) == 2
    assert "is no yaml" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--shift-factor", "1"], "expected none without a scaling factor"),
        (["--to", "ldm"], "expected a file name that ends in one of .safetensors"),
        (["--to", "taming", "--scale", "sd1", "NAME.pt"], "AutoencoderKL cannot be written as taming"),
    ],
)
def test_convert_refuses_flags_that_do_not_fit(foreign_file, tmp_path, capsys, flags, words):
    _, path = foreign_file
    destination = tmp_path / "new"
    if flags[-1] == "NAME.pt":
        destination, flags = tmp_path / "new.pt", flags[:-1]
    assert main(["convert", str(path), str(destination), *flags]) == 2
    assert words in capsys.readouterr().err and not destination.exists()


@pytest.mark.parametrize(
    ("place", "scale"),
    [
        *itertools.product(["flag", "metadata", "weights", "yaml"], ["0", "-1"]),
        ("metadata", "abc"),
        ("metadata", "nan"),
        ("weights", "inf"),
        ("yaml", ".inf"),
    ],
)
def test_a_scale_that_no_codec_can_have_is_refused_wherever_it_stands(place, scale, tmp_path, capsys):
    metadata = {"scaling_factor": scale} if place == "metadata" else None
    weights = {"scale_factor": torch.tensor(float(scale))} if place == "weights" else {}
    path, flags = tmp_path / "vae.safetensors", []
    save_file(small() | weights, path, metadata)
    if place == "flag":
        flags = ["--scaling-factor", scale]
    if place == "yaml":
        config = config_file(tmp_path)
        config.write_text(config.read_text().replace('"scale_factor": 0.3', f'"scale_factor": {scale}'))
        flags = ["--config", str(config)]
    assert main(["convert", str(path), str(tmp_path / "new"), *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "scal" in line and not (tmp_path / "new").exists()
    assert "vae.safetensors" in line or place in ("flag", "yaml")


def test_nothing_is_written_when_a_key_has_no_place(foreign_file, tmp_path, capsys):
    _, path = foreign_file
    broken = tmp_path / "broken.safetensors"
    save_file(load_file(path) | {"encoder.extra": torch.zeros(1)}, broken)
    before = set(tmp_path.iterdir())
    assert main(["convert", str(broken), str(tmp_path / "folder"), "--scale", "sd1"]) == 2
    assert "encoder.extra unexpected" in capsys.readouterr().err
    assert set(tmp_path.iterdir()) == before


def test_single_files_in_diffusers_names_open_too(tmp_path):
    little = {"widths": [32, 32], "blocks": 1, "attention": {1}}
    for component in (build(random_shape(4) | little), build(random_shape(5) | little)):
        path = tmp_path / "vae.safetensors"
        save_file(component.state_dict(), path, config_metadata(component))
        again = read_foreign(path).component()
        assert type(again) is type(component)
        assert from_diffusers(component, "diffusers").keys() == component.state_dict().keys()
        assert all(
            torch.equal(tensor, component.state_dict()[key]) for key, tensor in again.state_dict().items()
        )
    component = build(random_shape(6) | little)
    old, config = component.state_dict(), {"_class_name": "AutoencoderKL", **component.config}
    renames = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for new, name in renames.items():
        old = {key.replace(f".{new}.", f".{name}."): tensor for key, tensor in old.items()}
    assert any(".query." in key for key in old)
    again = to_diffusers(old, config).state_dict()
    for new, name in renames.items():
        again = {key.replace(f".{new}.", f".{name}."): tensor for key, tensor in again.items()}
    assert again.keys() == old.keys() and all(torch.equal(again[key], old[key]) for key in old)


def test_a_plain_vqmodel_goes_out_as_taming(tmp_path):
    plain = VQModel(block_out_channels=(32,), latent_channels=4, num_vq_embeddings=16, norm_num_groups=32)
    written = from_diffusers(plain, "taming")
    assert torch.equal(written["quantize.embedding.weight"], plain.quantize.embedding.weight)
    assert detect(shapes_of(written))[0].names[0] == "taming"


class Bomb:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


def hostile(kind, path, marker):
    """Write a file of a kind, and give the words that its error needs."""
    state = small()
    if kind == "bomb":
        torch.save({"state_dict": state, "callbacks": Bomb(marker)}, path.with_suffix(".ckpt"))
        return path.with_suffix(".ckpt"), r"would run .*open"
    if kind == "truncated":
        save_file(state, path)
        path.write_bytes(path.read_bytes()[:-100])
        return path, "damaged or truncated"
    if kind == "huge header":
        path.write_bytes((1 << 40).to_bytes(8, "little") + b'{"a":1}')
        return path, "no safetensors file, or a damaged"
    if kind == "transposed":
        state["decoder.conv_in.weight"] = torch.zeros(4, 32, 3, 3)
    if kind == "no convolution":
        state["encoder.conv_out.weight"] = torch.zeros(8)
    if kind == "two autoencoders":
        state |= {f"vae.{key}": tensor + 1 for key, tensor in state.items()}
    if kind == "two discriminators too many":
        state |= {"encoder.loss.a": torch.zeros(1), "encoder.loss.b": torch.zeros(1)}
    save_file(state, path)
    words = {
        "transposed": "the encoder gives 8 channels and the decoder takes 32",
        "no convolution": "encoder.conv_out.weight is missing or no convolution",
        "two autoencoders": "holds two autoencoders",
        "two discriminators too many": "encoder.loss.a, encoder.loss.b unexpected",
    }
    return path, words[kind]


@pytest.mark.parametrize(
    "kind",
    [
        "bomb",
        "truncated",
        "huge header",
        "transposed",
        "no convolution",
        "two autoencoders",
        "two discriminators too many",
    ],
)
def test_hostile_files_convert_to_nothing(tmp_path, capsys, kind):
    marker = tmp_path / "marker"
    path, words = hostile(kind, tmp_path / "x.safetensors", marker)
    before = set(tmp_path.iterdir())
    assert main(["convert", str(path), str(tmp_path / "folder"), "--scale", "sd1"]) == 2
    assert re.search(words, capsys.readouterr().err)
    assert set(tmp_path.iterdir()) == before and not marker.exists()
    with pytest.raises(ValueError, match=words):
        LatentCodec.from_pretrained(path)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[" * 50_000, "is no yaml: maximum recursion depth"),
        ("[" * 2_000_000, "bytes; a config has a few thousand"),
        ("ddconfig: {ch: " + "9" * 5000 + "}", "is no yaml: Exceeds the limit"),
        ("ddconfig: {ch: x, ch_mult: [1, a]}", "has an entry of another kind than expected"),
        ("ddconfig: {resolution: big, attn_resolutions: 3, ch_mult: 1}", "has an entry of another kind"),
        ("{ddconfig: {}, scale_factor: [1]}", "has the scale_factor '[1]', expected a finite number"),
        ("\0\1", "is no yaml"),
        (None, "is not a file"),
    ],
    ids=["deep", "large", "digits", "words for numbers", "other kinds", "scale", "binary", "pipe"],
)
def test_hostile_configs_end_in_one_line(tmp_path, capsys, content, words):
    save_file(small(), tmp_path / "vae.safetensors")
    config = tmp_path / "model.yaml"
    os.mkfifo(config) if content is None else config.write_text(content)
    command = ["convert", str(tmp_path / "vae.safetensors"), str(tmp_path / "new"), "--config", str(config)]
    assert main(command) == 2
    message = capsys.readouterr().err
    assert words in message and "model.yaml" in message and message.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_aliases_of_a_yaml_are_followed_once(tmp_path):
    lines = ["a0: &a0 {ddconfig: {ch: 1}}"]
    lines += [
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 60)
    ]  # 9^59 mappings by their paths
    (tmp_path / "model.yaml").write_text("\n".join(lines))
    assert read_config(tmp_path / "model.yaml") == {"ddconfig": {"ch": 1}}


def test_a_pipe_is_no_checkpoint(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    assert main(["convert", str(tmp_path / "pipe"), str(tmp_path / "new")]) == 2
    assert "pipe is a pipe or a device" in capsys.readouterr().err
    with pytest.raises(ValueError, match="not a file"):
        read_foreign(tmp_path / "pipe")


def test_a_decoder_alone_is_refused_without_diffusers(tmp_path):
    """Which takes longer to import than all else that this needs."""
    save_file({"1.weight": torch.zeros(2)}, tmp_path / "decoder.safetensors")
    code = (
        "import sys; from latent_codec.cli import main; "
        f"assert main(['convert', {str(tmp_path / 'decoder.safetensors')!r}, {str(tmp_path / 'new')!r}]) == 2; "
        "assert 'diffusers' not in sys.modules; "
        f"assert main(['convert', 'a.pt', {str(tmp_path / 'new')!r}, '--shift-factor', '1']) == 2"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "is the decoder of a tiny autoencoder" in done.stderr
