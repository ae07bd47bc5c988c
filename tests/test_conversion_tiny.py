"""TAESD and TAEF2 against what the original code answers, against its constructors' names, and there and back."""

import shutil

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from latent_codec import AutoencoderTinyGN, LatentCodec, LatentSpace
from latent_codec.cli import main
from latent_codec.conversion import (
    ConversionError,
    from_diffusers,
    read_foreign,
    to_diffusers,
    write_diffusers,
    write_foreign,
)

FILES = {"taesd": "golden/conversion/taesd_c4", "taef2": "checkpoints/taef2"}
CLASSES = {"taesd": diffusers.AutoencoderTiny, "taef2": AutoencoderTinyGN}


def halves(shared, name):
    return [shared / f"{FILES[name]}_{side}.pth" for side in ("encoder", "decoder")]


def original_keys(latent_channels: int, use_midblock_gn: bool) -> dict[str, tuple[int, ...]]:
    """Names and shapes that the original's Encoder and Decoder give, layer by layer."""

    def conv(name, out, into, bias=True):
        return {f"{name}.weight": (out, into, 3, 3)} | ({f"{name}.bias": (out,)} if bias else {})

    def block(name, normed):
        keys = {}
        for layer in (0, 2, 4):
            keys |= conv(f"{name}.conv.{layer}", 64, 64)
        if normed:
            keys |= {f"{name}.pool.0.weight": (256, 64, 1, 1), f"{name}.pool.3.weight": (64, 256, 1, 1)}
            keys |= {f"{name}.pool.1.weight": (256,), f"{name}.pool.1.bias": (256,)}
        return keys

    keys = conv("encoder.0", 64, 3) | block("encoder.1", False)
    for first in (2, 6, 10):  # three times a stride-2 convolution and three blocks
        keys |= conv(f"encoder.{first}", 64, 64, bias=False)
        for layer in range(first + 1, first + 4):
            keys |= block(f"encoder.{layer}", use_midblock_gn and first == 10)
    keys |= conv("encoder.14", latent_channels, 64)
    keys |= conv("decoder.1", 64, latent_channels)  # 0 is the clamp and 2 a ReLU
    for first in (3, 8, 13):  # three times three blocks, an upsampling, a convolution
        for layer in range(first, first + 3):
            keys |= block(f"decoder.{layer}", use_midblock_gn and first == 3)
        keys |= conv(f"decoder.{first + 4}", 64, 64, bias=False)
    return keys | block("decoder.18", False) | conv("decoder.19", 3, 64)


def original_state(latent_channels: int = 16, use_midblock_gn: bool = False) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = original_keys(latent_channels, use_midblock_gn)
    return {key: 0.1 * torch.randn(shape, generator=generator) for key, shape in shapes.items()}


@pytest.mark.parametrize(("name", "tolerance"), [("taesd", 1e-6), ("taef2", 1e-5)])
@torch.no_grad()
def test_answers_are_those_of_the_original_code(shared, name, tolerance):
    foreign = read_foreign(halves(shared, name))
    model = foreign.component(torch.float32)
    assert type(model) is CLASSES[name]
    expected = load_file(shared / f"{FILES[name]}.expected.safetensors")
    # Computed in float32, in another order: the range comes from [-1, 1] here.
    latents = model.encode(expected["input_01"] * 2 - 1).latents
    torch.testing.assert_close(latents, expected["latents"], rtol=0, atol=tolerance)
    decoded = model.decode(expected.get("decoder_input", expected["latents"])).sample
    torch.testing.assert_close(decoded / 2 + 0.5, expected["recon_01"], rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("swapped", [False, True])
def test_there_and_back_is_identical_to_the_bit(shared, name, swapped, tmp_path):
    paths = halves(shared, name)
    foreign = read_foreign(paths[::-1] if swapped else paths)
    component = foreign.component()
    counts = foreign.keys.counts()
    assert counts == {"mapped": len(foreign.tensors), "missing": 0, "unexpected": 0}
    written = write_foreign(component, "taesd", tmp_path / "pair")
    assert [path.name for path in written] == ["taesd_encoder.safetensors", "taesd_decoder.safetensors"]
    for source, copy in zip(paths, written):
        before, after = torch.load(source, weights_only=True), load_file(copy)
        assert before.keys() == after.keys()
        for key in before:
            assert before[key].dtype == after[key].dtype and torch.equal(before[key], after[key]), key


@pytest.mark.parametrize("use_midblock_gn", [False, True])
@pytest.mark.parametrize("latent_channels", [4, 16, 32])
def test_keys_are_those_of_the_original_constructors(latent_channels, use_midblock_gn):
    network_class = AutoencoderTinyGN if use_midblock_gn else diffusers.AutoencoderTiny
    torch.manual_seed(0)
    model = network_class(latent_channels=latent_channels)
    written = from_diffusers(model, "taesd")
    expected = original_keys(latent_channels, use_midblock_gn)
    assert {key: tuple(tensor.shape) for key, tensor in written.items()} == expected
    again = to_diffusers(written)
    assert type(again) is network_class
    state = model.state_dict()
    assert state.keys() == again.state_dict().keys()
    assert all(torch.equal(tensor, state[key]) for key, tensor in again.state_dict().items())
    for key in model.config:
        if not key.startswith("_"):
            mine, theirs = again.config[key], model.config[key]
            assert mine == theirs or tuple(mine) == tuple(theirs), key


@pytest.mark.parametrize(
    "config",
    [
        {"encoder_block_out_channels": (8, 4, 12), "num_encoder_blocks": (0, 2, 1)},
        {"decoder_block_out_channels": (12, 4, 8), "num_decoder_blocks": (1, 0, 2)},
        {"in_channels": 1, "out_channels": 4},
    ],
)
def test_other_shapes_are_read_from_diffusers_layout(config):
    three = {"encoder_block_out_channels": (8,) * 3, "decoder_block_out_channels": (8,) * 3}
    model = AutoencoderTinyGN(
        **{**three, "num_encoder_blocks": (1, 2, 3), "num_decoder_blocks": (3, 2, 1), **config},
        latent_channels=5,
    )
    again = to_diffusers(model.state_dict(), {"_class_name": "AutoencoderTinyGN", **model.config})
    assert type(again) is AutoencoderTinyGN
    assert {key: again.config[key] for key in config} == config
    assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in again.state_dict().items())
    with pytest.raises(ConversionError, match="the original code's always"):
        from_diffusers(model, "taesd")


def test_written_codec_folder_is_the_component(shared, tmp_path):
    foreign = read_foreign(halves(shared, "taef2"))
    write_diffusers(foreign, tmp_path / "codec")
    codec = LatentCodec.from_pretrained(tmp_path / "codec")
    assert type(codec.autoencoder) is AutoencoderTinyGN
    assert codec.latent_space == LatentSpace(32, 8, scaling_factor=1.0, shift_factor=0.0)
    single = LatentCodec.from_pretrained(tmp_path / "codec" / "diffusion_pytorch_model.safetensors")
    assert single.fingerprint == codec.fingerprint


def test_the_verb_converts_pairs_both_ways(shared, tmp_path, capsys):
    sources = [str(path) for path in halves(shared, "taesd")]
    assert main(["convert", *sources, str(tmp_path / "codec")]) == 0
    codec = LatentCodec.from_pretrained(tmp_path / "codec")
    assert type(codec.autoencoder) is diffusers.AutoencoderTiny and codec.latent_space == LatentSpace(4, 8)
    assert main(["convert", str(tmp_path / "codec"), str(tmp_path / "pair"), "--to", "taesd"]) == 0
    for source, side in zip(sources, ("encoder", "decoder")):
        before = torch.load(source, weights_only=True)
        after = load_file(tmp_path / "pair" / f"taesd_{side}.safetensors")
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def without(state, *keys):
    return {key: tensor for key, tensor in state.items() if key not in keys}


HOSTILE = {
    "a key missing": (lambda state: without(state, "decoder.9.conv.2.bias"), "decoder.9.conv.2.bias missing"),
    "a key too many": (
        lambda state: state | {"encoder.3.conv.6.weight": torch.zeros(1)},
        "conv.6.weight unexp",
    ),
    "a block too few": (
        lambda state: without(state, *(key for key in state if key.startswith("encoder.5."))),
        "missing",
    ),
    "another shape": (
        lambda state: state | {"encoder.1.conv.0.bias": torch.zeros(63)},
        r"\(63,\) instead of",
    ),
    "halves of two models": (
        lambda state: (
            state | {"encoder.14.weight": torch.zeros(4, 64, 3, 3), "encoder.14.bias": torch.zeros(4)}
        ),
        "gives 4 latent channels and the decoder takes 16",
    ),
    "a bias between levels": (
        lambda state: state | {"encoder.6.bias": torch.zeros(64)},
        "encoder.6 is neither",
    ),
    "several widths": (
        lambda state: state | {"encoder.6.weight": torch.zeros(32, 64, 3, 3)},
        "levels are 64, 64, 32, 64 wide",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_does_not_fit_is_refused_and_nothing_is_written(name, tmp_path):
    change, message = HOSTILE[name]
    state = change(original_state())
    with pytest.raises(ConversionError, match=message):
        to_diffusers(state)
    paths = []
    for side in ("encoder", "decoder"):
        half = {key.removeprefix(f"{side}."): each for key, each in state.items() if key.startswith(side)}
        paths.append(tmp_path / f"{side}.safetensors")
        save_file(half, paths[-1])
    with pytest.raises(ConversionError, match=message):
        write_diffusers(read_foreign(paths), tmp_path / "codec")
    assert not (tmp_path / "codec").exists()


def test_norms_at_half_of_the_middle_are_missing_or_unexpected():
    state = original_state(32, use_midblock_gn=True)
    decoder_only = without(state, *(key for key in state if key.startswith("encoder.") and ".pool." in key))
    with pytest.raises(ConversionError, match=r"pool.*missing"):
        to_diffusers(decoder_only)
    moved = state | {
        f"encoder.7.pool.{rest}": state[f"encoder.11.pool.{rest}"] for rest in ("0.weight", "1.bias")
    }
    with pytest.raises(ConversionError, match=r"encoder.7.pool.*unexpected"):
        to_diffusers(moved)
    with pytest.raises(ConversionError, match="widens 64 channels to 128; TAEF2's branch has 4 times"):
        to_diffusers(state | {"decoder.3.pool.0.weight": torch.zeros(128, 64, 1, 1)})


@pytest.mark.parametrize("name", FILES)
def test_the_other_half_is_found_next_to_it(name, shared):
    whole = read_foreign(halves(shared, name)).component(torch.float32).state_dict()
    for half in halves(shared, name):
        found = LatentCodec.from_pretrained(half).autoencoder.state_dict()
        assert found.keys() == whole.keys() and all(torch.equal(found[key], whole[key]) for key in whole)


def test_one_half_alone_and_the_same_half_twice_are_refused(shared, tmp_path):
    encoder, _ = halves(shared, "taesd")
    alone = shutil.copy(encoder, tmp_path)
    with pytest.raises(
        ConversionError, match="is the encoder of a tiny autoencoder; give the decoder's file too"
    ):
        read_foreign(alone)
    with pytest.raises(ConversionError, match="are not the encoder and the decoder"):
        read_foreign([encoder, encoder])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: AutoencoderTinyGN(use_midblock_gn=False), "it has no group norms, and TAEF2 has"),
        (
            lambda: AutoencoderTinyGN(latent_magnitude=2),
            "its latent_magnitude is 2, and the original code's always 3",
        ),
        (
            lambda: diffusers.AutoencoderTiny(act_fn="gelu"),
            "its act_fn is gelu, and the original code's always relu",
        ),
        (lambda: diffusers.AutoencoderTiny(num_encoder_blocks=(1, 1, 1, 1)), "its num_encoder_blocks is"),
    ],
)
def test_what_the_original_cannot_hold_is_not_written(build, message):
    with pytest.raises(ConversionError, match=message):
        from_diffusers(build(), "taesd")
