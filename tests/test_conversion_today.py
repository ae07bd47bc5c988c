"""Today's autoencoders: FLUX.2, Wan, Qwen-Image, DC-AE, HunyuanImage and TAEHV against what their original code answers."""

import csv
import json

import diffusers
import pytest
import torch
from safetensors.torch import load_file

from latent_codec import AutoencoderTinyVideo, LatentCodec
from latent_codec.cli import main
from latent_codec.conversion import (
    ConversionError,
    from_diffusers,
    read_foreign,
    to_diffusers,
    write_diffusers,
    write_foreign,
)
from latent_codec.conversion.foreign import recognize

FLUX2 = ["flux2_ae.safetensors", "flux2_comfy.safetensors", "flux2_diffusers_keys.safetensors"]
FLUX2 += ["flux2_small_decoder.safetensors"]
WAN = ["wan21_vae.pth", "wan22_vae.pth"]
DC_AE = ["dcae_f32c32_sana.safetensors", "dcae_f32c32_in.safetensors"]
TAEHV = ["taew2_1.pth", "taew2_2.pth"]
HUNYUAN_IMAGE = "hunyuanimage21_vae.ckpt"
TO = {
    "flux2_ae.safetensors": "flux2",
    "flux2_comfy.safetensors": "flux2-comfy",
    "flux2_diffusers_keys.safetensors": "diffusers",
    "flux2_small_decoder.safetensors": "flux2",
    **dict.fromkeys(WAN, "wan"),
    **dict.fromkeys(DC_AE, "dcae"),
    HUNYUAN_IMAGE: "hunyuan-image",
    **dict.fromkeys(TAEHV, "taehv"),
}
KEY_MAPS = {
    "flux2_ae.safetensors": "flux2",
    "wan21_vae.pth": "wan21",
    "wan22_vae.pth": "wan22",
    "dcae_f32c32_sana.safetensors": "dcae_sana",
    "dcae_f32c32_in.safetensors": "dcae_in",
    HUNYUAN_IMAGE: "hunyuanimage21",
}
# float64 against the goldens' float64; float32 against it
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-10}
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


@pytest.fixture
def golden(shared):
    def load(name, dtype, class_name=None):
        path = shared / "golden/conversion" / name
        expected = load_file(path.with_name(f"{path.name.partition('.')[0]}.expected.safetensors"))
        component = read_foreign(path, class_name=class_name).component(dtype)
        return component, {key: value.to(dtype) for key, value in expected.items()}

    return load


def assert_close(found, expected, tolerance=None):
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance or TOLERANCE[found.dtype])


@pytest.mark.parametrize("name", FLUX2)
@dtypes
@torch.no_grad()
def test_flux2_answers_as_the_original_code(golden, name, dtype):
    component, expected = golden(name, dtype)
    assert type(component) is diffusers.AutoencoderKLFlux2
    posterior = component.encode(expected["input"]).latent_dist
    assert_close(posterior.parameters, expected["moments"])
    assert_close(component.decode(expected["latents_raw"]).sample, expected["recon"])
    packed = torch.nn.functional.pixel_unshuffle(expected["latents_raw"], 2)
    mean, std = component.bn.running_mean, (component.bn.running_var + component.config.batch_norm_eps).sqrt()
    assert_close((packed - mean.view(1, -1, 1, 1)) / std.view(1, -1, 1, 1), expected["latents"])


@pytest.mark.parametrize("name", WAN)
@pytest.mark.parametrize("class_name", ["AutoencoderKLWan", "AutoencoderKLQwenImage"])
@dtypes
@torch.no_grad()
def test_wan_answers_as_the_original_code_at_one_frame(golden, name, class_name, dtype):
    if name == "wan22_vae.pth" and class_name == "AutoencoderKLQwenImage":
        pytest.skip("Qwen-Image's file is Wan 2.1's")
    component, expected = golden(name, dtype, class_name)
    assert type(component) is getattr(diffusers, class_name)
    posterior = component.encode(expected["input"]).latent_dist
    assert_close(posterior.mean, expected["mu"])
    assert_close(posterior.logvar, expected["log_var"])
    mean, std = (
        torch.tensor(component.config[key], dtype=dtype).view(1, -1, 1, 1, 1)
        for key in ("latents_mean", "latents_std")
    )
    assert_close((posterior.mean - mean) / std, expected["latents"])
    # Their upsampling passes through float32, where the last bit of float64 can decide 6e-8.
    decoded = component.decode(expected["mu"]).sample
    assert_close(decoded, expected["recon"], 1e-6 if dtype == torch.float64 else None)


@pytest.mark.parametrize("name", DC_AE)
@dtypes
@torch.no_grad()
def test_dc_ae_answers_as_the_original_code(golden, name, dtype):
    component, expected = golden(name, dtype)
    assert type(component) is diffusers.AutoencoderDC
    tolerance = 1e-6 if dtype == torch.float64 else None  # diffusers takes RMS norms' variance in float32
    assert_close(component.encode(expected["input"]).latent, expected["latents"], tolerance)
    assert_close(component.decode(expected["latents"]).sample, expected["recon"], tolerance)


@dtypes
@torch.no_grad()
def test_hunyuan_image_answers_as_the_original_code(golden, dtype):
    component, expected = golden(HUNYUAN_IMAGE, dtype)
    assert (
        type(component) is diffusers.AutoencoderKLHunyuanImage and component.config.scaling_factor == 0.75289
    )
    assert_close(component.encode(expected["input"]).latent_dist.parameters, expected["moments"])
    assert_close(component.decode(expected["latents"]).sample, expected["recon"])


@pytest.mark.parametrize("name", TAEHV)
@dtypes
@torch.no_grad()
def test_taehv_answers_as_the_original_code_at_one_frame(golden, name, dtype):
    component, expected = golden(name, dtype)
    assert type(component) is AutoencoderTinyVideo
    assert_close(component.encode(expected["input_01"] * 2 - 1).latents, expected["latents"])
    decoded = component.decode(expected["latents"]).sample
    assert_close((decoded / 2 + 0.5).clamp(0, 1), expected["recon_01"])  # where the original clamps


@pytest.mark.parametrize("name", TO)
def test_there_and_back_is_the_same_to_the_bit(shared, name):
    foreign = read_foreign(shared / "golden/conversion" / name)
    component = foreign.component()
    written = from_diffusers(component, TO[name])
    assert set(written) == set(foreign.keys.mapped)
    for key, tensor in written.items():
        assert tensor.dtype == foreign.tensors[key].dtype and torch.equal(tensor, foreign.tensors[key]), key
    counts = foreign.keys.counts()
    assert counts["missing"] == counts["unexpected"] == 0
    assert counts["mapped"] == len(foreign.tensors) - len(foreign.keys.left_out)
    assert foreign.count_keys_by_name() | {"missing": 0} == counts


@pytest.mark.parametrize("name", KEY_MAPS)
def test_every_key_goes_where_the_key_map_says(shared, name):
    foreign = read_foreign(shared / "golden/conversion" / name)
    with (shared / "golden/key_maps" / f"{KEY_MAPS[name]}.tsv").open() as file:
        rows = [row[::2] for row in csv.reader(file, delimiter="\t")][1:]
    found = {
        (key.removeprefix(foreign.prefix), ours)
        for key, parts in foreign.keys.mapped.items()
        for ours in parts.values()
    }
    assert found == {(theirs, theirs if ours == "-" else ours) for theirs, ours in rows}


# ------------------------------------------------------------------------------------- shapes beyond the goldens


FLUX2_TINY = {
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
}
WAN_TINY = {"base_dim": 4, "dim_mult": [1, 2, 2], "num_res_blocks": 1, "temperal_downsample": [True, False]}
DC_TINY = {
    "latent_channels": 4,
    "encoder_block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"),
    "decoder_block_types": ("ResBlock", "EfficientViTBlock", "EfficientViTBlock"),
    "encoder_block_out_channels": (8, 16, 32),
    "decoder_block_out_channels": (8, 32, 64),
    "encoder_layers_per_block": (1, 2, 3),
    "decoder_layers_per_block": (2, 1, 2),
    "encoder_qkv_multiscales": ((), (), (5, 3)),
    "decoder_qkv_multiscales": ((), (), (3,)),
    "decoder_norm_types": ("batch_norm", "rms_norm", "rms_norm"),
    "decoder_act_fns": ("relu", "silu", "silu"),
    "scaling_factor": 0.5,
}
HUNYUAN_TINY = {
    "in_channels": 4,
    "out_channels": 3,
    "latent_channels": 16,
    "block_out_channels": (32, 64, 64),
}
HUNYUAN_TINY |= {
    "layers_per_block": 1,
    "spatial_compression_ratio": 4,
    "sample_size": 384,
    "scaling_factor": 0.75289,
}
NETWORKS = [
    ("AutoencoderKLFlux2", {}, "flux2"),  # as published
    ("AutoencoderKLFlux2", {"decoder_block_out_channels": (96, 192, 384, 384)}, "flux2"),
    ("AutoencoderKLFlux2", FLUX2_TINY, "flux2-comfy"),
    (
        "AutoencoderKLFlux2",
        FLUX2_TINY | {"use_quant_conv": False, "use_post_quant_conv": False},
        "flux2-comfy",
    ),
    ("AutoencoderKLFlux2", FLUX2_TINY | {"decoder_block_out_channels": (96, 32)}, "diffusers"),
    ("AutoencoderKLFlux2", FLUX2_TINY | {"mid_block_add_attention": False}, "flux2"),
    ("AutoencoderKLWan", {}, "wan"),
    ("AutoencoderKLQwenImage", {}, "wan"),
    ("AutoencoderKLQwenImage", WAN_TINY | {"input_channels": 4}, "wan"),
    ("AutoencoderKLWan", WAN_TINY | {"out_channels": 4, "decoder_base_dim": 8}, "wan"),
    (
        "AutoencoderKLWan",
        WAN_TINY
        | {"is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12, "z_dim": 48}
        | {"scale_factor_spatial": 8, "scale_factor_temporal": 2},
        "wan",
    ),
    ("AutoencoderDC", DC_TINY, "dcae"),
    (
        "AutoencoderDC",
        DC_TINY
        | {"encoder_layers_per_block": (0, 2, 3), "decoder_layers_per_block": (0, 1, 2)}
        | {
            "decoder_block_out_channels": (16, 32, 64),
            "decoder_norm_types": "rms_norm",
            "decoder_act_fns": "silu",
        },
        "dcae",
    ),
    (
        "AutoencoderDC",
        DC_TINY | {"downsample_block_type": "conv", "upsample_block_type": "interpolate"},
        "dcae",
    ),
    ("AutoencoderKLHunyuanImage", HUNYUAN_TINY, "hunyuan-image"),
    (
        "AutoencoderTinyVideo",
        {"latent_channels": 8, "patch_size": 2, "num_blocks": 1, "encoder_time_strides": (2, 1)}
        | {"encoder_block_out_channels": (8, 16, 24), "decoder_block_out_channels": (16, 8, 12)}
        | {"decoder_time_strides": (2, 1)},
        "taehv",
    ),
]


def class_of(name):
    return AutoencoderTinyVideo if name == "AutoencoderTinyVideo" else getattr(diffusers, name)


def plain(config):
    """A config's entries as JSON has them, but for those that say nothing of the network."""
    ignored = {
        "sample_size",
        "batch_norm_momentum",
        "dropout",
        "scaling_factor",
        "shift_factor",
        "force_upcast",
    }
    known = {key: value for key, value in config.items() if not key.startswith("_") and key not in ignored}
    return json.loads(json.dumps(known))


@pytest.mark.parametrize(("class_name", "config", "to"), NETWORKS)
def test_names_and_shapes_show_the_whole_config(class_name, config, to):
    """Without memory for weights, so that networks of published sizes are quick."""
    with torch.device("meta"):
        component = class_of(class_name)(**config)
    written = from_diffusers(component, to)
    foreign = recognize(written, class_name=class_name if class_name == "AutoencoderKLQwenImage" else None)
    foreign.keys.check("it")
    expected, found = plain(component.config), plain(foreign.network.config)
    if (
        class_name == "AutoencoderKLWan" and config.get("z_dim") == 48
    ):  # diffusers' defaults are of 16 channels
        expected |= {key: found[key] for key in ("latents_mean", "latents_std")}
    for key in ("encoder", "decoder"):  # entries for all stages, where a config has one
        for entry in ("norm_types", "act_fns"):
            if isinstance(expected.get(f"{key}_{entry}"), str):
                expected[f"{key}_{entry}"] = [expected[f"{key}_{entry}"]] * 3
    if (
        config.get("scale_factor_spatial") is None
        and "dim_mult" in config
        and class_name == "AutoencoderKLWan"
    ):
        expected |= {
            "scale_factor_spatial": 4,
            "scale_factor_temporal": 2,
        }  # diffusers' defaults are of four levels
    assert foreign.network.class_name == class_name and found == expected


CONFIGURED = [(*NETWORKS[index][:2], "diffusers") for index in (8, 9, 11, 14)]
"""Networks of which diffusers' own keys in one file tell too little."""


@pytest.mark.parametrize(
    ("class_name", "config", "to"), [each for each in NETWORKS if each[1]][1:] + CONFIGURED
)
def test_any_network_goes_out_and_comes_back(class_name, config, to, tmp_path):
    torch.manual_seed(0)
    component = class_of(class_name)(**config)
    path = tmp_path / "file.safetensors"
    write_foreign(component, to, path)
    again = read_foreign(path)
    assert again.network.class_name == class_name  # by the metadata
    state = again.component().state_dict()
    assert state.keys() == component.state_dict().keys()
    assert all(torch.equal(tensor, state[key]) for key, tensor in component.state_dict().items())
    write_diffusers(again, tmp_path / "folder")
    opened = class_of(class_name).from_pretrained(tmp_path / "folder").state_dict()
    assert all(torch.equal(tensor, opened[key]) for key, tensor in component.state_dict().items())


@pytest.mark.parametrize(("class_name", "config", "to"), CONFIGURED)
def test_keys_of_diffusers_need_their_config(class_name, config, to):
    torch.manual_seed(0)
    component = class_of(class_name)(**config)
    with pytest.raises(
        ConversionError, match=r"config: expected the config\.json of .*, a diffusers Autoencoder"
    ):
        to_diffusers(component.state_dict())
    again = to_diffusers(component.state_dict(), {"_class_name": class_name, **component.config})
    assert type(again) is type(component) and plain(again.config) == plain(component.config)


@pytest.mark.parametrize("prefix", ["vae.", "first_stage_model."])
@pytest.mark.parametrize("name", ["flux2_ae.safetensors", "wan21_vae.pth", "taew2_1.pth"])
def test_a_whole_model_has_them_under_a_prefix(shared, name, prefix):
    foreign = read_foreign(shared / "golden/conversion" / name)
    whole = {f"{prefix}{key}": tensor for key, tensor in foreign.tensors.items()}
    whole["model.diffusion_model.out.weight"] = torch.zeros(1)
    found = recognize(whole)
    assert found.prefix == prefix and found.format is foreign.format
    assert list(found.keys.left_out) == ["model.diffusion_model.out.weight"]
    found.keys.check("it")


def test_the_layouts_of_flux2_are_one_component(shared):
    components = [read_foreign(shared / "golden/conversion" / name).component() for name in FLUX2[:3]]
    layouts = {"flux2": FLUX2[0], "flux2-comfy": FLUX2[1], "diffusers": FLUX2[2]}
    for component in components:
        for to, name in layouts.items():
            expected = load_file(shared / "golden/conversion" / name)
            written = from_diffusers(component, to)
            assert written.keys() == expected.keys()
            assert all(torch.equal(written[key], expected[key]) for key in expected)


def test_hunyuan_image_goes_to_comfyui_without_prefix_and_frames(shared, tmp_path):
    first = read_foreign(shared / "golden/conversion" / HUNYUAN_IMAGE)
    write_foreign(first.component(), "hunyuan-image-comfy", tmp_path / "comfy.safetensors")
    again = read_foreign(tmp_path / "comfy.safetensors")
    for key in first.keys.mapped:
        tensor, theirs = first.tensors[key], again.tensors[key.removeprefix("vae.")]
        assert torch.equal(theirs, tensor.squeeze(2) if tensor.ndim == 5 else tensor)
    state = again.component().state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in first.component().state_dict().items())


def test_a_still_is_decoded_as_the_last_of_the_frames_that_a_video_of_one_latent_has():
    """TAEHV's layers over all frames, written once more; a frame apart changes the answer, so memory is used."""
    torch.manual_seed(0)
    tiny = AutoencoderTinyVideo(
        latent_channels=4,
        num_blocks=1,
        encoder_block_out_channels=(4, 4, 4),
        decoder_block_out_channels=(4, 4, 4),
        encoder_time_strides=(2, 2),
        decoder_time_strides=(2, 2),
    ).double()
    image = torch.rand(2, 3, 8, 8).double() * 2 - 1
    frames = [(image + 1) / 2] * 4
    layers = list(tiny.encoder)
    frames = [torch.relu(layers[0](frame)) for frame in frames]
    for first in (2, 5):
        pairs = [torch.cat(frames[i : i + 2], 1) for i in range(0, len(frames), 2)]
        frames = [layers[first + 1](layers[first].conv(pair)) for pair in pairs]
        past = [torch.zeros_like(frames[0]), *frames[:-1]]
        block = layers[first + 2]
        frames = [torch.relu(now + block.conv(torch.cat([now, then], 1))) for now, then in zip(frames, past)]
    (frame,) = frames
    torch.testing.assert_close(tiny.encode(image).latents, layers[8](frame), rtol=0, atol=1e-12)

    layers = list(tiny.decoder)
    frames = [torch.relu(layers[1](torch.tanh(frame / 3) * 3)) for frame in [tiny.encode(image).latents]]
    for first in (3, 7):
        past = [torch.zeros_like(frames[0]), *frames[:-1]]
        block = layers[first]
        frames = [torch.relu(now + block.conv(torch.cat([now, then], 1))) for now, then in zip(frames, past)]
        grown = [layers[first + 2].conv(layers[first + 1](frame)).chunk(2, 1) for frame in frames]
        frames = [layers[first + 3](each) for pair in grown for each in pair]
    last = layers[12](torch.relu(frames[-1])) * 2 - 1
    torch.testing.assert_close(tiny.decode(tiny.encode(image).latents).sample, last, rtol=0, atol=1e-12)
    tiny.use_slicing = True
    torch.testing.assert_close(tiny.decode(tiny.encode(image).latents).sample, last, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda tiny: tiny.encode(torch.zeros(1, 3, 1, 8, 8)),
            r"expected an image \(B, 3, H, W\), got shape",
        ),
        (lambda tiny: tiny.decode(torch.zeros(1, 3, 8, 8)), r"expected latents \(B, 16, h, w\)"),
        (lambda tiny: AutoencoderTinyVideo(encoder_time_strides=(2, 2)), "one width more than strides"),
    ],
)
def test_the_tiny_video_autoencoder_refuses_what_it_cannot_take(call, words):
    with torch.device("meta"):
        tiny = AutoencoderTinyVideo()
    with pytest.raises(ValueError, match=words):
        call(tiny)


# ------------------------------------------------------------------------------------- what does not fit


def state_of(class_name, config, to):
    torch.manual_seed(0)
    return from_diffusers(class_of(class_name)(**config), to)


@pytest.mark.parametrize(
    ("network", "change", "words"),
    [
        (NETWORKS[2], {"bn.running_var": None}, r"bn\.running_var missing"),
        (NETWORKS[2], {"bn.weight": torch.ones(16)}, r"bn\.weight unexpected"),
        (
            NETWORKS[2],
            {"bn.running_mean": torch.zeros(4)},
            r"bn\.running_mean has shape \(4,\).*expected \(16,\)",
        ),
        (
            NETWORKS[11],
            {"decoder.stages.2.op_list.0.context_module.main.qkv.conv.weight": None},
            "qkv.* missing",
        ),
        (
            NETWORKS[11],
            {"encoder.stages.2.op_list.1.context_module.main.proj.conv.weight": torch.zeros(32, 32, 1, 1)},
            r"proj\.conv\.weight \(32, 32, 1, 1\) instead of \(32, 96, 1, 1\)",
        ),
        (
            NETWORKS[11],
            {"encoder.stages.2.op_list.2.context_module.main.qkv.conv.weight": torch.zeros(95, 32, 1, 1)},
            r"qkv\.conv\.weight \(95, 32, 1, 1\) instead of \(96, 32, 1, 1\)",
        ),
        (
            NETWORKS[11],
            {"encoder.stages.999999999.x": torch.zeros(1)},
            "1000000000 stages; expected at most 16",
        ),
        (NETWORKS[14], {"vae.encoder.extra": torch.zeros(1)}, r"vae\.encoder\.extra unexpected"),
        (NETWORKS[15], {"decoder.1.bias": None}, r"decoder\.1\.bias missing"),
        (
            ("AutoencoderTinyVideo", {"latent_channels": 32}, "taehv"),
            {},
            "32 latent channels .taehv1_5.: .*relu",
        ),
        (
            ("AutoencoderKLWan", WAN_TINY | {"z_dim": 8}, "wan"),
            {},
            "config: .* does not show latents_mean and latents_std",
        ),
    ],
)
def test_what_does_not_fit_is_named(network, change, words):
    state = state_of(*network) | change
    with pytest.raises(ConversionError, match=words):
        to_diffusers({key: tensor for key, tensor in state.items() if tensor is not None})


def test_latents_of_another_width_need_a_config_with_their_statistics():
    config = WAN_TINY | {"z_dim": 2, "latents_mean": [0.5, -0.5], "latents_std": [2.0, 3.0]}
    config |= {"_class_name": "AutoencoderKLWan"}
    component = to_diffusers(state_of("AutoencoderKLWan", WAN_TINY | {"z_dim": 2}, "wan"), config)
    assert (component.config.latents_mean, component.config.latents_std) == ([0.5, -0.5], [2.0, 3.0])


@pytest.mark.parametrize(
    ("class_name", "config", "to", "words"),
    [
        ("AutoencoderKLFlux2", FLUX2_TINY | {"batch_norm_eps": 1e-5}, "flux2", "batch_norm_eps is 1e-05"),
        ("AutoencoderKLFlux2", FLUX2_TINY | {"use_quant_conv": False}, "flux2", "lacks a quant conv"),
        ("AutoencoderKLFlux2", FLUX2_TINY | {"norm_num_groups": 16}, "flux2-comfy", "16 groups"),
        ("AutoencoderKLFlux2", FLUX2_TINY, "ldm", "it can be as diffusers, flux2, flux2-comfy"),
        ("AutoencoderDC", DC_TINY | {"decoder_act_fns": "silu"}, "dcae", "decoder_act_fns is"),
        ("AutoencoderTinyVideo", {"latent_magnitude": 5}, "taehv", "latent_magnitude is 5"),
    ],
)
def test_what_a_format_cannot_hold_is_refused(class_name, config, to, words):
    with torch.device("meta"):
        component = class_of(class_name)(**config)
    with pytest.raises(ConversionError, match=words):
        from_diffusers(component, to)


# ------------------------------------------------------------------------------------- the command line


def test_info_names_each(shared, capsys):
    words = {
        "flux2": "FLUX.2",
        "wan": "Wan",
        "dcae": "DC-AE",
        "hunyuan-image": "HunyuanImage 2.1",
        "taehv": "TAEHV",
    }
    words |= {"flux2-comfy": "FLUX.2", "diffusers": "AutoencoderKLFlux2"}
    for name, to in TO.items():
        assert main(["info", str(shared / "golden/conversion" / name), "--json"]) == 0
        facts = json.loads(capsys.readouterr().out)
        assert words[to] in facts["format"] and facts["keys"]["unexpected"] == 0
        assert facts["config"] == plain(read_foreign(shared / "golden/conversion" / name).network.config) | {
            key: facts["config"][key] for key in ("sample_size",) if key in facts["config"]
        }
    assert facts["class"] == "AutoencoderTinyVideo"


@pytest.mark.parametrize("name", [*TO, "qwen"])
@torch.no_grad()
def test_convert_gives_a_codec_of_the_originals_latents_and_the_file_back(shared, name, tmp_path, capsys):
    flags = ["--class-name", "AutoencoderKLQwenImage"] if name == "qwen" else []
    name = WAN[0] if name == "qwen" else name
    flags += ["--scaling-factor", "0.41407"] if TO[name] == "dcae" else []
    file, folder = shared / "golden/conversion" / name, tmp_path / "codec"
    assert main(["convert", str(file), str(folder), *flags]) == 0
    assert "0 keys missing" in capsys.readouterr().err
    config = json.loads((folder / "config.json").read_text())
    component = class_of(config["_class_name"]).from_pretrained(folder, torch_dtype=torch.float16)
    first = read_foreign(file)
    state = first.component().state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in component.state_dict().items())

    codec = LatentCodec.from_pretrained(folder)
    expected = load_file(file.with_name(f"{file.name.partition('.')[0]}.expected.safetensors"))
    images = expected["input_01"] * 2 - 1 if "input_01" in expected else expected["input"]
    scale = {"dcae": 0.41407, "hunyuan-image": 0.75289}.get(TO[name], 1.0)
    assert codec.latent_space.scaling_factor == scale
    latents = codec.encode(images.squeeze(2) if images.ndim == 5 else images)
    wanted = expected["latents"].squeeze(2) if expected["latents"].ndim == 5 else expected["latents"]
    assert_close(
        latents, (wanted * scale).float(), 5e-5
    )  # normalizing divides by std, of which some are below 1
    assert codec.decode(latents)[0].size == (96, 64)
    if TO[name] == "diffusers":
        return

    found = {}
    for source, back, its_flags in (
        (file, tmp_path / f"file{file.suffix}", flags),
        (folder, tmp_path / "codec.safetensors", []),
    ):
        assert main(["convert", str(source), str(back), "--to", TO[name], *its_flags]) == 0
        found[source] = again = read_foreign(back)
        assert set(again.tensors) == set(first.keys.mapped)
        assert all(torch.equal(again.tensors[key], first.tensors[key]) for key in again.tensors)
    assert (found[file].wrapper, found[file].prefix) == (first.wrapper, first.prefix)
    assert found[folder].scale.scaling_factor == scale
    assert found[folder].network.class_name == type(codec.autoencoder).__name__


def test_an_unknown_scale_is_asked_for_with_the_published_ones(shared, tmp_path, capsys):
    for name, words in (("sana", "0.41407"), ("in", "0.3189 (f32c32-in) and 0.4552 (f32c32-mix)")):
        file = str(shared / "golden/conversion" / f"dcae_f32c32_{name}.safetensors")
        assert main(["convert", file, str(tmp_path / "new")]) == 2
        message = capsys.readouterr().err
        assert f"published are {words}" in message and message.count("\n") == 1
        assert not (tmp_path / "new").exists()


def test_a_scale_for_a_class_without_one_is_refused(shared, tmp_path, capsys):
    for name in ("wan21_vae.pth", "flux2_ae.safetensors"):
        file = str(shared / "golden/conversion" / name)
        assert main(["convert", file, str(tmp_path / "new"), "--scaling-factor", "0.5"]) == 2
        assert "has no scaling_factor" in capsys.readouterr().err and not (tmp_path / "new").exists()


def test_qwen_images_class_is_asked_for(shared, tmp_path, capsys):
    file = str(shared / "golden/conversion/wan21_vae.pth")
    assert main(["convert", file, str(tmp_path / "wan")]) == 0
    assert "--class-name AutoencoderKLQwenImage" in capsys.readouterr().err
    assert main(["convert", file, str(tmp_path / "qwen"), "--class-name", "AutoencoderKLQwenImage"]) == 0
    wan, qwen = (
        diffusers.AutoencoderKLWan.from_pretrained(tmp_path / "wan"),
        diffusers.AutoencoderKLQwenImage.from_pretrained(tmp_path / "qwen"),
    )
    assert qwen.config.latents_mean == wan.config.latents_mean
    assert all(torch.equal(tensor, qwen.state_dict()[key]) for key, tensor in wan.state_dict().items())
    capsys.readouterr()
    assert main(["convert", file, str(tmp_path / "kl"), "--class-name", "AutoencoderKL"]) == 2
    assert "AutoencoderKLWan or AutoencoderKLQwenImage" in capsys.readouterr().err
    assert not (tmp_path / "kl").exists()
