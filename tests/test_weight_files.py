"""Weight files carry their config: what is written by every way of saving, and what is read of it."""

import json

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors import safe_open
from safetensors.torch import save_file

from latent_codec import LatentCodec
from latent_codec.components.weight_files import (
    WEIGHTS,
    config_in,
    config_metadata,
    metadata_of,
    save_component,
)
from latent_codec.conversion.writing import write_component, write_foreign


def kl(**config):
    torch.manual_seed(0)
    return AutoencoderKL(block_out_channels=(32,), layers_per_block=1, latent_channels=4, **config).eval()


@pytest.mark.parametrize("how", ["codec", "component", "converted"])
def test_config_in_the_weights_is_the_one_next_to_them(tmp_path, how):
    vae = kl(scaling_factor=0.25, norm_num_groups=8)
    {
        "codec": lambda: LatentCodec(vae).save_pretrained(tmp_path / "mine"),
        "component": lambda: save_component(vae, tmp_path / "mine"),
        "converted": lambda: write_component(vae, tmp_path / "mine"),
    }[how]()
    written = json.loads((tmp_path / "mine/config.json").read_text())
    assert config_in(metadata_of(tmp_path / "mine" / WEIGHTS)) == written
    assert (written["_class_name"], written["norm_num_groups"], written["scaling_factor"]) == (
        "AutoencoderKL",
        8,
        0.25,
    )
    with safe_open(tmp_path / "mine" / WEIGHTS, framework="pt") as stored:
        assert stored.metadata()["format"] == "pt"  # which transformers and older diffusers ask for


def test_config_does_not_say_where_the_component_was_opened(tmp_path):
    kl().save_pretrained(tmp_path / "secret")
    vae = AutoencoderKL.from_pretrained(tmp_path / "secret")
    assert "_name_or_path" in vae.config
    save_component(vae, tmp_path / "mine")
    assert "secret" not in (tmp_path / "mine" / WEIGHTS).read_bytes()[:20_000].decode("latin1")
    assert "secret" not in (tmp_path / "mine/config.json").read_text()


def test_diffusers_opens_what_is_saved(tmp_path):
    vae = kl(norm_num_groups=8)
    save_component(vae, tmp_path)
    again = AutoencoderKL.from_pretrained(tmp_path)
    assert again.config.norm_num_groups == 8
    assert all(torch.equal(a, b) for a, b in zip(vae.state_dict().values(), again.state_dict().values()))


def test_foreign_exports_carry_the_config(tmp_path):
    (file,) = write_foreign(kl(scaling_factor=0.25), "ldm", tmp_path / "vae.safetensors")
    assert config_in(metadata_of(file))["scaling_factor"] == 0.25
    with safe_open(file, framework="pt") as stored:
        assert stored.metadata()["scaling_factor"] == "0.25"


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "not json",
        "[1]",
        '{"vae": {}}',
        '{"_class_name": 3}',
        "[" * 100_000,
        '{"_class_name": "%s"}' % ("A" * 2**20),
    ],
    ids=["absent", "empty", "words", "list", "another program's", "number", "nested", "huge"],
)
def test_other_metadata_are_no_config(tmp_path, text):
    metadata = {} if text is None else {"config": text}
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors", metadata)
    assert config_in(metadata_of(tmp_path / "a.safetensors")) is None
    assert config_in(metadata) is None


def test_config_metadata_and_config_in_are_inverse():
    assert config_in(config_metadata(kl())) == json.loads(kl().to_json_string())
