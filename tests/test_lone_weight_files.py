"""Weight files without their folder: settings that weights do not show are read from a config or asked for, never assumed."""

import json
import re
import shutil

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, VQModel
from helpers.training import write_images
from safetensors.torch import load_file, save_file

from latent_codec import AutoencoderTinyGN, AutoencoderVQ, HierarchicalVQ, LatentCodec
from latent_codec.cli import main
from latent_codec.components.weight_files import WEIGHTS, save_component
from latent_codec.conversion import ConversionError, read_foreign, write_foreign
from latent_codec.conversion.settings import SettingsNeededError

TINY = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
TINY |= {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
BUILD = {
    "kl": lambda: AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        norm_num_groups=8,
        scaling_factor=0.5,
        shift_factor=0.25,
        act_fn="relu",
    ),
    "vq": lambda: AutoencoderVQ(
        block_out_channels=(16,),
        norm_num_groups=4,
        l2_normalized=True,
        num_vq_embeddings=8,
        scaling_factor=2.0,
    ),
    "plain vq": lambda: VQModel(block_out_channels=(16,), norm_num_groups=4, num_vq_embeddings=8),
    "tiny": lambda: AutoencoderTiny(**TINY, act_fn="gelu", latent_magnitude=2, scaling_factor=0.5),
    "tiny gn": lambda: AutoencoderTinyGN(**TINY, latent_magnitude=2),
    "tiny gn without norms": lambda: AutoencoderTinyGN(**TINY, use_midblock_gn=False),
    "hierarchical": lambda: HierarchicalVQ(
        hidden_channels=8, embed_dim=4, codebook_sizes=(8, 6), l2_normalized=True, scaling_factor=0.5
    ),
    "three levels": lambda: HierarchicalVQ(
        strides=(4, 2, 8), hidden_channels=8, embed_dim=4, codebook_sizes=8, num_residual_blocks=0
    ),
}
kinds = pytest.mark.parametrize("kind", BUILD)


def build(kind):
    torch.manual_seed(0)
    return BUILD[kind]().eval()


def bare(folder, target):
    """The weights of a folder in a file without metadata."""
    target.parent.mkdir(exist_ok=True)
    save_file(load_file(folder / WEIGHTS), target)
    return target


@torch.no_grad()
def assert_same_codec(found, expected):
    image = torch.rand(1, 3, 64, 64) * 2 - 1
    assert type(found.autoencoder) is type(expected.autoencoder)
    assert found.latent_space == expected.latent_space
    assert (found.fingerprint, found.space_fingerprint) == (expected.fingerprint, expected.space_fingerprint)
    assert torch.equal(found.encode(image), expected.encode(image))


@kinds
def test_a_copy_of_our_weights_opens_as_its_folder_does(tmp_path, kind):
    LatentCodec(build(kind)).save_pretrained(tmp_path / "codec")
    shutil.copy(tmp_path / "codec" / WEIGHTS, tmp_path / "copy.safetensors")
    expected = LatentCodec.from_pretrained(tmp_path / "codec")
    assert_same_codec(LatentCodec.from_pretrained(tmp_path / "copy.safetensors"), expected)


@kinds
def test_a_config_next_to_the_file_or_given_is_used_and_none_is_asked_for(tmp_path, kind):
    save_component(build(kind), tmp_path / "codec")
    expected = LatentCodec.from_pretrained(tmp_path / "codec")
    lone = bare(tmp_path / "codec", tmp_path / "lone" / "my.safetensors")
    with pytest.raises(SettingsNeededError, match=r"my\.safetensors, .* does not show .*config=config\.json"):
        LatentCodec.from_pretrained(lone)
    config = tmp_path / "codec" / "config.json"
    assert_same_codec(LatentCodec.from_pretrained(lone, config=config), expected)
    shutil.copy(config, lone.parent)
    assert_same_codec(LatentCodec.from_pretrained(lone), expected)
    assert read_foreign(lone).settings == "config.json next to the file"


@pytest.mark.parametrize("name", ["default", "default-vq"])
def test_copies_of_the_shipped_weights_open_as_the_shipped_codecs(tmp_path, name):
    expected = LatentCodec.from_pretrained(name)
    shutil.copy(expected.folder / WEIGHTS, tmp_path / "my.safetensors")
    assert_same_codec(LatentCodec.from_pretrained(tmp_path / "my.safetensors"), expected)


def test_every_verb_with_a_codec_takes_the_config(tmp_path, capsys):
    save_component(build("kl"), tmp_path / "codec")
    lone = bare(tmp_path / "codec", tmp_path / "lone" / "my.safetensors")
    write_images(tmp_path / "images", 1)
    assert main(["roundtrip", str(tmp_path / "images"), "--codec", str(lone)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    flags = [
        "--codec",
        str(lone),
        "--config",
        str(tmp_path / "codec/config.json"),
        "--out",
        str(tmp_path / "out"),
    ]
    assert main(["roundtrip", str(tmp_path / "images"), *flags]) == 0
    assert main(["info", str(lone)]) == 0
    out = capsys.readouterr().out
    assert "does not show norm_num_groups" in out
    assert "give it: --config config.json, or convert it with --norm-num-groups N" in out


def test_the_verb_converts_by_config_or_by_groups(tmp_path, capsys):
    vae = AutoencoderKL(block_out_channels=(32,), norm_num_groups=8)
    save_component(vae, tmp_path / "codec")
    lone = bare(tmp_path / "codec", tmp_path / "lone" / "my.safetensors")
    config = tmp_path / "codec" / "config.json"
    assert main(["convert", str(lone), str(tmp_path / "asked")]) == 2
    assert re.search("norm.num.groups.N", capsys.readouterr().err) and not (tmp_path / "asked").exists()
    assert main(["convert", str(lone), str(tmp_path / "a"), "--config", str(config)]) == 0
    assert "settings that weights do not show: the given config.json" in capsys.readouterr().err
    groups = ["--norm-num-groups", "8", "--scale", "sd1"]
    assert main(["convert", str(lone), str(tmp_path / "b"), *groups]) == 0
    assert "the class's defaults for the others" in capsys.readouterr().err
    configs = [json.loads((tmp_path / each / "config.json").read_text()) for each in ("codec", "a", "b")]
    assert configs[0] == configs[1] == configs[2]
    assert main(["convert", str(lone), str(tmp_path / "c"), "--norm-num-groups", "5", "--scale", "sd1"]) == 2
    assert (
        main(["convert", str(lone), str(tmp_path / "c"), "--norm-num-groups", "4", "--config", str(config)])
        == 2
    )
    assert "norm_num_groups is 4 as asked, and 8 by the given config.json" in capsys.readouterr().err
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"block_out_channels": [16, 64]}, r"block_out_channels is \[16, 64\] there and \(16, 32\) here"),
        ({"layers_per_block": 10**9}, "layers_per_block is 1000000000 there and 1 here"),
        ({"latent_channels": 8}, "latent_channels is 8 there"),
        ({"_class_name": "VQModel"}, "is of class 'VQModel', expected 'AutoencoderKL'"),
        ({"norm_num_groups": 5}, "makes no network"),
        ({"norm_num_groups": "many"}, "makes no network"),
        ({"act_fn": ["silu"]}, "makes no network"),
        ({"scaling_factor": "large"}, "scale or shift 'large'"),
        ({"shift_factor": float("nan")}, "scale or shift nan"),
    ],
)
def test_a_config_of_other_weights_is_refused(tmp_path, change, words):
    save_component(build("kl"), tmp_path / "codec")
    lone = bare(tmp_path / "codec", tmp_path / "lone" / "my.safetensors")
    config = json.loads((tmp_path / "codec/config.json").read_text()) | change
    (lone.parent / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConversionError, match=words):
        LatentCodec.from_pretrained(lone)


def test_the_default_scale_of_a_config_without_one_is_named(tmp_path):
    save_component(AutoencoderKL(block_out_channels=(32,)), tmp_path / "codec")
    config = json.loads((tmp_path / "codec/config.json").read_text())
    del config["scaling_factor"], config["shift_factor"]
    lone = bare(tmp_path / "codec", tmp_path / "lone" / "my.safetensors")
    (lone.parent / "config.json").write_text(json.dumps(config))
    scale = read_foreign(lone).scale
    assert scale.scaling_factor == 0.18215 and "default" in scale.rule


def test_originals_fix_their_settings_and_say_so(shared):
    for name, words in (("ldm_kl_f8.ckpt", "32 groups"), ("rosinality_vqvae2.pt", "original code")):
        assert words in read_foreign(shared / "golden/conversion" / name).settings


def test_a_foreign_export_opens_with_all_of_its_config(tmp_path):
    vae = AutoencoderKL(block_out_channels=(32,), sample_size=64, force_upcast=False, scaling_factor=0.5)
    (file,) = write_foreign(vae, "ldm", tmp_path / "vae.safetensors")
    again = read_foreign(file).component()
    names = ("sample_size", "force_upcast", "scaling_factor", "norm_num_groups")
    assert [again.config[name] for name in names] == [64, False, 0.5, 32]


def test_halves_with_different_configs_are_refused(tmp_path):
    for name, factor in (("a", 1.0), ("b", 0.5)):
        write_foreign(AutoencoderTiny(scaling_factor=factor), "taesd", tmp_path / name)
    halves = [tmp_path / "a/taesd_encoder.safetensors", tmp_path / "b/taesd_decoder.safetensors"]
    with pytest.raises(ConversionError, match="different configs in their metadata"):
        read_foreign(halves)
    assert read_foreign([halves[0], tmp_path / "a/taesd_decoder.safetensors"]).scale.scaling_factor == 1


def test_a_config_is_not_for_folders(tmp_path):
    save_component(build("kl"), tmp_path / "codec")
    with pytest.raises(ValueError, match="has its own"):
        LatentCodec.from_pretrained(tmp_path / "codec", config=tmp_path / "codec/config.json")
