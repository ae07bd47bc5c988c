"""`convert --host`, `--embed` and `--fold-scale`: names, formats, sidecars and cards of what is written."""

import json
import re
from types import SimpleNamespace

import diffusers
import pytest
import torch
from helpers import ROOT
from safetensors.torch import load_file

from latent_codec import AutoencoderTinyGN, LatentCodec, LatentPreviewer
from latent_codec.bitstream.sidecars import load_entropy_model
from latent_codec.cli import main
from latent_codec.components.weight_files import WEIGHTS, metadata_of
from latent_codec.conversion import embedding
from latent_codec.conversion.hosts import HOSTS, ROWS
from latent_codec.conversion.renaming import ConversionError
from latent_codec.converting import convert
from latent_codec.errors import SettingError
from latent_codec.exporting import latent2rgb

SMALL_SD = {
    "block_out_channels": (8, 16, 32, 32),
    "layers_per_block": 2,
    "norm_num_groups": 4,
    "mid_block_add_attention": True,
}


@pytest.fixture
def small_network(monkeypatch):
    """Stable Diffusion's network, 16 times narrower, for `embed`: its 84 million weights take seconds to write."""
    monkeypatch.setitem(embedding.NETWORKS, "sd", SMALL_SD)


def kl(**config):
    torch.manual_seed(0)
    types = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    narrow = {"block_out_channels": (4, 8, 16, 16), "norm_num_groups": 2}
    return LatentCodec(diffusers.AutoencoderKL(**types | narrow | config))


def tiny(kind=diffusers.AutoencoderTiny, **config):
    torch.manual_seed(0)
    return LatentCodec(kind(**config))


@pytest.fixture(scope="module")
def images():
    return torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def assert_same(one, other, images):
    """Latents as a denoiser has them, and images, up to float32."""
    latents = one.encode(images)
    torch.testing.assert_close(other.encode(images), latents, rtol=1e-5, atol=1e-5)
    decoded = [each.decode(latents, output_type="pt") for each in (one, other)]
    torch.testing.assert_close(decoded[1], decoded[0], rtol=1e-5, atol=1e-5)


def test_a_codec_is_embedded_as_a_folder_whose_card_says_so(tmp_path, small_network, images):
    codec = kl(scaling_factor=0.7)
    codec.save_pretrained(tmp_path / "mine")
    (tmp_path / "mine" / "README.md").write_text("---\nlicense: mit\n---\n\n# Mine\n")
    done = convert(tmp_path / "mine", tmp_path / "wide", embed="sd")
    assert done.written == [tmp_path / "wide"]
    assert "block_out_channels 4-8-16-16 as 8-16-32-32" in done.changes
    wide = LatentCodec.from_pretrained(tmp_path / "wide")
    assert tuple(wide.autoencoder.config.block_out_channels) == SMALL_SD["block_out_channels"]
    assert wide.latent_space == codec.latent_space
    assert_same(codec, wide, images)
    text = (tmp_path / "wide" / "README.md").read_text()
    assert text.startswith("---\nlicense: mit\n---\n# mine\n") and text.endswith("# Mine\n")
    assert "by latent-codec (--embed sd)" in text and "- norm_num_groups 2 as 4" in text
    assert isinstance(diffusers.AutoencoderKL.from_pretrained(tmp_path / "wide"), diffusers.AutoencoderKL)


def test_changes_go_with_any_format(tmp_path, small_network, images):
    codec = kl(scaling_factor=0.7, shift_factor=0.2)
    codec.save_pretrained(tmp_path / "mine")
    convert(tmp_path / "mine", tmp_path / "folded", fold_scale="sdxl", dtype=torch.float32)
    folded = LatentCodec.from_pretrained(tmp_path / "folded")
    assert folded.latent_space.scaling_factor == 0.13025 and folded.latent_space.shift_factor == 0.0
    assert_same(codec, folded, images)
    done = convert(tmp_path / "mine", tmp_path / "both", embed="sd", fold_scale="flux")
    assert (done.scaling_factor, done.shift_factor) == (0.3611, 0.1159)
    assert_same(codec, LatentCodec.from_pretrained(tmp_path / "both"), images)
    with pytest.raises(ConversionError, match="group norms have 4 groups"):  # of the small network
        convert(tmp_path / "mine", tmp_path / "x.safetensors", embed="sd", to="ldm")


def test_a_checkpoint_file_is_changed_on_its_way(tmp_path, small_network, images):
    codec = kl()
    codec.save_pretrained(tmp_path / "mine")
    file = (tmp_path / "mine" / WEIGHTS).rename(tmp_path / "mine.safetensors")
    done = convert(file, tmp_path / "wide", embed="sd")
    assert done.source == "diffusers AutoencoderKL" and done.changes
    assert_same(codec, LatentCodec.from_pretrained(tmp_path / "wide"), images)
    assert "Converted from the diffusers AutoencoderKL" in (tmp_path / "wide" / "README.md").read_text()


def test_sidecars_stay_where_latents_do(tmp_path):
    done = convert("default", tmp_path / "folded", fold_scale="sd1")
    assert "SD 1 and 2 folded into the weights" in done.changes[-1]
    shipped, folded = LatentCodec.from_pretrained("default"), LatentCodec.from_pretrained(tmp_path / "folded")
    assert folded.space_fingerprint != shipped.space_fingerprint
    latents = shipped.encode(torch.zeros(1, 3, 32, 32))
    torch.testing.assert_close(folded.encode(torch.zeros(1, 3, 32, 32)), latents, rtol=1e-4, atol=1e-4)
    previews = [
        LatentPreviewer.from_pretrained(each, kind="linear") for each in ("default", tmp_path / "folded")
    ]
    assert torch.equal(previews[0](latents), previews[1](latents))
    models = [load_entropy_model(each.folder, codec=each) for each in (shipped, folded)]
    assert all((models[0].arrays()[key] == each).all() for key, each in models[1].arrays().items())
    assert "preview.safetensors, entropy.safetensors" in (tmp_path / "folded" / "README.md").read_text()
    convert("default", tmp_path / "scaled", scale="sd1")  # other latents
    assert not (tmp_path / "scaled" / "preview.safetensors").exists()
    convert("default", tmp_path / "copy")
    assert (tmp_path / "copy" / "entropy.safetensors").is_file()


@pytest.mark.parametrize(
    ("host", "family", "channels", "names"),
    [
        ("comfyui", "sdxl", 4, "taesdxl_{}.safetensors"),
        ("comfyui", "flux", 16, "taef1_{}.safetensors"),
        ("a1111", "sd1", 4, "taesd_{}.pth"),
        ("a1111", None, 16, "taesd3_{}.pth"),
    ],
)
def test_tiny_autoencoders_get_the_names_that_a_host_looks_for(
    tmp_path, host, family, channels, names, images
):
    codec = tiny(latent_channels=channels)
    codec.save_pretrained(tmp_path / "mine")
    place = tmp_path / "models"
    place.mkdir()
    (place / "other.pth").write_text("stays")
    done = convert(tmp_path / "mine", place, host=host, family=family)
    assert done.written == [place / names.format(side) for side in ("encoder", "decoder")]
    assert (place / "other.pth").read_text() == "stays"
    assert ("vae_approx" if host == "comfyui" else "VAE-taesd") in done.place
    state = codec.autoencoder.state_dict()
    if host == "a1111":  # which reads them with torch.load
        keys = torch.load(done.written[0], weights_only=True)
        assert torch.equal(keys["0.weight"], state["encoder.layers.0.weight"])
    with pytest.raises(ValueError, match=r"_encoder.* exists; name another"):
        convert(tmp_path / "mine", place, host=host, family=family)


def test_taef2_gets_comfyuis_name(tmp_path):
    codec = tiny(AutoencoderTinyGN, latent_channels=32, use_midblock_gn=True)
    codec.save_pretrained(tmp_path / "mine")
    done = convert(tmp_path / "mine", tmp_path / "out", host="comfyui")
    assert [each.name for each in done.written] == ["taef2_encoder.safetensors", "taef2_decoder.safetensors"]
    assert done.place == "ComfyUI 0.33.0 looks for them in models/vae_approx"


def test_a_narrow_codec_for_comfyui_is_one_file_of_stable_diffusions_network(tmp_path):
    done = convert("default", tmp_path / "vae", host="comfyui", fold_scale="sd1", dtype=torch.bfloat16)
    (file,) = done.written
    assert file == tmp_path / "vae" / "default-f8c4.safetensors"
    assert done.place == "ComfyUI 0.3.64 looks for it in models/vae"
    state = load_file(file)
    assert state["decoder.conv_in.weight"].shape == (512, 4, 3, 3)
    assert state["encoder.mid.attn_1.q.weight"].shape == (512, 512, 1, 1)
    assert "encoder.down.0.block.1.conv2.weight" in state
    metadata = metadata_of(file)
    shipped = LatentCodec.from_pretrained("default")
    assert json.loads(metadata["latent_space"]) == {
        "codec": "default-f8c4",
        "space_fingerprint": shipped.space_fingerprint,
    }
    assert float(metadata["scaling_factor"]) == 0.18215


def test_diffusers_gets_the_shift_that_its_pipelines_ask_for(tmp_path):
    kl(shift_factor=None).save_pretrained(tmp_path / "mine")
    done = convert(tmp_path / "mine", tmp_path / "out", host="diffusers")
    assert LatentCodec.from_pretrained(tmp_path / "out").autoencoder.config.shift_factor == 0.0
    assert "shift_factor 0.0 instead of none" in done.changes[0]


def test_a_host_may_be_combined_with_a_format(tmp_path):
    kl(block_out_channels=(8, 8, 8, 8), mid_block_add_attention=False).save_pretrained(tmp_path / "mine")
    done = convert(tmp_path / "mine", tmp_path / "out", host="invokeai")
    assert done.changes == ("mid_block_add_attention False as True",)
    assert LatentCodec.from_pretrained(tmp_path / "out").autoencoder.config.mid_block_add_attention
    tiny().save_pretrained(tmp_path / "tiny")
    done = convert(tmp_path / "tiny", tmp_path / "folder", host="comfyui", to="diffusers")
    assert done.written == [tmp_path / "folder"]


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (lambda: kl(layers_per_block=3), {"embed": "sd"}, "layers_per_block is 3, and 2 there"),
        (lambda: kl(block_out_channels=(8, 8, 8, 8), norm_num_groups=1), {"embed": "sd"}, "would fit"),
        (lambda: tiny(), {"embed": "sd"}, "an AutoencoderKL is embedded"),
        (lambda: tiny(), {"fold_scale": "sd1"}, "folded into an AutoencoderKL's quant convs"),
        (lambda: kl(latent_channels=8), {"host": "a1111"}, "loads no AutoencoderKL of 8 latent channels"),
        (lambda: kl(in_channels=1, out_channels=1), {"host": "comfyui"}, "its in_channels is 1, and 3 there"),
        (lambda: tiny(), {"host": "comfyui"}, "family: expected one of sd1, sdxl"),
        (lambda: tiny(), {"host": "comfyui", "family": "flux"}, "whose latents have 4 channels"),
        (lambda: tiny(), {"family": "sd1"}, "none without a host"),
        (lambda: kl(), {"embed": "sd", "calibrate": "."}, "calibrate"),
    ],
)
def test_what_cannot_be_exact_is_refused_in_one_line(tmp_path, make, settings, message):
    make().save_pretrained(tmp_path / "mine")
    with pytest.raises(ValueError, match=re.escape(message)) as refused:
        convert(tmp_path / "mine", tmp_path / "out", **settings)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_a_linear_preview_is_comfyuis_latent2rgb(tmp_path, capsys):
    assert main(["convert", "default", "--to", "latent2rgb"]) == 0
    factors = json.loads(capsys.readouterr().out)
    assert factors == latent2rgb("default")
    latents = torch.randn(1, 4, 5, 6)
    weight, bias = (torch.tensor(each) for each in factors.values())
    rgb = latents[0].permute(1, 2, 0) @ weight + bias  # as latent_preview.py of ComfyUI has it
    expected = LatentPreviewer.from_pretrained("default", kind="linear")(latents)[0].permute(1, 2, 0)
    torch.testing.assert_close(rgb.clamp(-1, 1), expected, rtol=0, atol=1e-6)
    assert main(["convert", "default", str(tmp_path / "factors.json"), "--to", "latent2rgb"]) == 0
    assert json.loads((tmp_path / "factors.json").read_text()) == factors
    kl().save_pretrained(tmp_path / "mine")
    with pytest.raises(ValueError, match="`latent-codec fit-preview` fits one"):
        latent2rgb(tmp_path / "mine")
    with pytest.raises(SettingError, match="leave one of them out"):
        convert("default", to="latent2rgb", embed="sd")


def test_the_command_line_names_its_flags(tmp_path, capsys):
    tiny().save_pretrained(tmp_path / "mine")
    assert main(["convert", str(tmp_path / "mine"), str(tmp_path / "out"), "--host", "comfyui"]) == 2
    assert "--family: expected one of sd1, sdxl" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "mine")]) == 2
    assert "DESTINATION: expected a folder" in capsys.readouterr().err
    command = [
        "convert",
        str(tmp_path / "mine"),
        str(tmp_path / "out"),
        "--host",
        "comfyui",
        "--family",
        "sd1",
    ]
    assert main(command) == 0
    done = SimpleNamespace(**capsys.readouterr()._asdict())
    assert done.out.splitlines() == [
        str(tmp_path / "out" / f"taesd_{side}.safetensors") for side in ("encoder", "decoder")
    ]
    assert "looks for them in models/vae_approx" in done.err


def test_diffusers_reads_the_single_file_with_the_folders_config(tmp_path):
    codec = kl(
        block_out_channels=(32, 32, 32, 32), norm_num_groups=32, layers_per_block=2, scaling_factor=0.13025
    )
    codec.save_pretrained(tmp_path / "mine")
    (file,) = convert(tmp_path / "mine", tmp_path / "mine.safetensors", to="ldm").written
    single = diffusers.AutoencoderKL.from_single_file(str(file), config=str(tmp_path / "mine"))
    assert single.config.scaling_factor == 0.13025
    state = codec.autoencoder.state_dict()
    assert all(torch.equal(each, state[key]) for key, each in single.state_dict().items())


def test_every_row_of_the_table_is_on_the_page():
    page = (ROOT / "docs" / "hosts.md").read_text(encoding="utf-8")
    for row in ROWS:
        assert str(row.version) in page and row.place in page
        assert all(f"`{name}_" in page for name in row.names.values())
        assert row.suffix == ".safetensors" or row.suffix in page
    for host in HOSTS:
        assert f"--host {host}" in page
