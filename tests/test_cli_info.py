"""The verb `info` with --audit, --against and of compressed files: what it prints, and what it refuses."""

import json
import os
import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from helpers.commands import fails
from helpers.processes import run_fresh
from PIL import Image

from latent_codec import AutoencoderVQ, HierarchicalVQ, LatentCodec
from latent_codec.bitstream import compress, fit_static, read, unpack
from latent_codec.cli import main
from latent_codec.components.codec_facts import facts_of, read_facts
from latent_codec.components.codec_folders import ASSETS
from latent_codec.components.weight_files import config_metadata, save_component
from latent_codec.conversion import from_diffusers
from latent_codec.conversion.checkpoints import save_checkpoint
from latent_codec.evaluation.diffusers_audit import made_for
from latent_codec.evaluation.host_audit import audit_hosts
from latent_codec.families.pipeline_spaces import ROWS
from latent_codec.latents.latent_files import save_latents


def build(seed=0, **config):
    torch.manual_seed(seed)
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        mid_block_add_attention=False,
        **config,
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with codecs `mine`, `tuned` (another decoder), `other` and `wide`, and images in `photos`."""
    folder = tmp_path_factory.mktemp("place")
    mine = build()
    LatentCodec(mine).save_pretrained(folder / "mine")
    with torch.no_grad():
        mine.decoder.conv_out.bias += 0.1
    LatentCodec(mine).save_pretrained(folder / "tuned")
    LatentCodec(build(1, scaling_factor=0.5)).save_pretrained(folder / "other")
    LatentCodec(build(latent_channels=8)).save_pretrained(folder / "wide")
    (folder / "photos").mkdir()
    rng = np.random.default_rng(0)
    for i in range(3):
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        coarse.resize((24, 18), Image.Resampling.BICUBIC).save(folder / f"photos/{i}.png")
    return folder


@pytest.fixture(autouse=True)
def here(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def answer(capsys, *argv):
    capsys.readouterr()
    assert main(["info", *argv, "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return json.loads(out)


def printed(capsys, *argv):
    capsys.readouterr()
    assert main(["info", *argv]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def test_audit(capsys):
    codec = LatentCodec.from_pretrained("mine")
    audits = audit_hosts(codec)
    found = answer(capsys, "mine", "--audit")
    assert found == {
        "codec": "mine",
        "fingerprint": codec.fingerprint,
        "made_for": made_for(codec),
        "hosts": [each.to_dict() for each in audits],
    }
    out = printed(capsys, "mine", "--audit")
    lines = out.splitlines()
    assert lines[0].startswith("made for: ")
    for each in audits:
        assert each.host in out
        for reason in each.reasons:
            assert f"  - {reason}" in lines  # whole, so that it can be searched for and commands copied
        if each.remedy:
            assert f"  what helps: {each.remedy}" in lines


def test_audit_of_the_shipped_codecs(capsys):
    verdicts = {each["host"]: each["verdict"] for each in answer(capsys, "--audit")["hosts"]}
    assert verdicts["Stable Diffusion 1 and 2"] == verdicts["Stable Diffusion XL"] == "as it is"
    assert verdicts["ComfyUI"] == verdicts["A1111"] == "no"
    assert len(answer(capsys, "default-vq", "--audit")["hosts"]) == len(ROWS) + 3


def test_against_with_images(capsys):
    found = answer(capsys, "tuned", "--against", "mine", "--data", "photos")
    assert (found["codec"], found["reference"], found["fit"]) == ("tuned", "mine", "same")
    assert (found["num_images"], found["drift"], found["images"]) == (3, 0.0, "photos")
    assert found["decoder"]["differing"] == ["decoder.conv_out.bias"]
    assert len(found["channels"]) == 4
    assert answer(capsys, "tuned", "--against", "mine", "--data", "photos", "--limit", "2")["num_images"] == 2

    out = printed(capsys, "other", "--against", "mine", "--data", "photos")
    assert out.startswith("other against mine: another latent space: ")
    assert "scaling_factor: 0.5 against 0.18215" in out
    assert "on 3 images of photos." in out
    for word in ("encoder: ", "decoder: ", "correlation", "PSNR", "their latents"):
        assert word in out


def test_against_looks_at_the_sample_photograph(capsys):
    assert "on the sample photograph." in printed(capsys, "tuned", "--against", "mine")


def test_against_itself(capsys):
    found = answer(capsys, "mine", "--against", "mine", "--data", "photos")
    assert found["fit"] == "same" and found["psnr"] == found["psnr_by_reference"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("mine", "--against", "wide"), "no denoiser takes both: latents of mine have 4 channels"),
        (("mine", "--against", "nowhere"), "nowhere does not exist"),
        (("nowhere", "--audit"), "nowhere does not exist"),
        (("mine", "--data", "photos"), "--data is for --against REFERENCE"),
        (("mine", "--against", "tuned", "--data", "mine/config.json"), "config.json"),
        (
            ("mine", "--against", "tuned", "--data", "photos", "--limit", "0"),
            "--limit: expected at least 1, got 0",
        ),
    ],
)
def test_refusals(argv, message, capsys):
    assert message in fails(capsys, "info", *argv)


def test_audit_and_against_are_two_questions(capsys):
    with pytest.raises(SystemExit):
        main(["info", "mine", "--audit", "--against", "tuned"])
    assert "not allowed with" in capsys.readouterr().err


def test_plain_info_is_as_before(capsys):
    found = answer(capsys, "mine")
    assert found["kind"] == "codec" and found["latent_channels"] == 4
    assert Path("mine/config.json").is_file()


@pytest.fixture(scope="module")
def compressed(place):
    """`one.lcf` and `tiles.lcf` of codec `mine` and the entropy model in `entropy`, and the bytes of both."""
    codec = LatentCodec.from_pretrained(place / "mine")
    images = sorted((place / "photos").iterdir())
    model = fit_static(codec, images)
    (place / "entropy").mkdir()
    model.save(place / "entropy")
    fit_static(codec, images[:1]).save(place / "another.safetensors")
    found = {}
    for name, options in (("one", {"quality": 40}), ("tiles", {"quality": 20, "tile": 8})):
        found[name] = compress(codec, images[0], entropy_model=model, **options)
        (place / f"{name}.lcf").write_bytes(found[name])
    return found


def test_compressed_file_without_its_codec(compressed, capsys):
    found, container = answer(capsys, "tiles.lcf"), unpack(compressed["tiles"])
    assert found["kind"] == "compressed latents"
    assert (found["height"], found["width"], found["quality"]) == (18, 24, 20)
    assert (found["grids"], found["downsampling_factors"], found["latent_channels"]) == ([[9, 12]], [2], 4)
    assert (found["tiles"], found["tile_pixels"]) == (9, 8)
    assert found["bytes"] == len(compressed["tiles"])
    assert found["bits_per_pixel"] == pytest.approx(8 * len(compressed["tiles"]) / (18 * 24), abs=1e-6)
    assert found["space_fingerprint"] == LatentCodec.from_pretrained("mine").space_fingerprint
    assert found["entropy_fingerprint"] == container.header.entropy_fingerprint
    bits = 8 * (found["bytes"] - found["header_bytes"])
    assert found["layers"] == [{"layer": 0, "sections": 9, "bits": bits, "damaged": 0}]
    assert found["damage"] is None and found["damaged_sections"] == []
    assert found["codec"] is None and found["bits_without_overhead"] is None

    out = printed(capsys, "one.lcf")
    assert f"\n  layer 0, sections 1, bits {8 * sum(unpack(compressed['one']).lengths):,}, damaged 0\n" in out


def test_compressed_file_next_to_its_codec(compressed, capsys):
    codec = LatentCodec.from_pretrained("mine")
    model = fit_static(codec, sorted(Path("photos").iterdir()))
    expected = read(codec, compressed["one"], entropy_model=model).code_length
    for name in ("mine", "tuned"):
        found = answer(capsys, "one.lcf", "--verbose", "--codec", name, "--entropy", "entropy")
        assert found["codec"] == name
        assert found["bits_without_overhead"] == pytest.approx(expected, abs=0.1)
    found = answer(
        capsys, "one.lcf", "--verbose", "--codec", "mine"
    )  # next to which there is no entropy model
    assert found["codec"] == "mine" and found["bits_without_overhead"] is None

    data = compress(LatentCodec.from_pretrained("default-vq"), "photos/0.png")
    Path("vq.lcf").write_bytes(data)
    assert answer(capsys, "vq.lcf")["codec"] == "default-vq-f8"
    found = answer(capsys, "vq.lcf", "--verbose")
    assert (found["kind"], found["codec"]) == ("compressed indices", "default-vq-f8")
    assert found["codebook_sizes"] == [1024] and "quality" not in found
    if found["coding"] == "fixed length":
        assert found["bits_without_overhead"] == 10 * 3 * 3


def test_damaged_compressed_files_are_reported(compressed, capsys):
    data = compressed["tiles"]
    container = unpack(data)
    start = container.header_bytes + container.lengths[0]
    Path("flipped.lcf").write_bytes(data[:start] + bytes([data[start] ^ 1]) + data[start + 1 :])
    Path("cut.lcf").write_bytes(data[: start + 1])
    for name, lost in (("flipped", [1]), ("cut", list(range(1, 9)))):
        for flags in ([], ["--json"]):
            capsys.readouterr()
            assert main(["info", f"{name}.lcf", *flags]) == 2
            out, err = capsys.readouterr()
            assert err.startswith(f"latent-codec info: {name}.lcf: ") and err.count("\n") == 1
            assert "`latent-codec decompress --partial` decodes the whole sections" in err
        found = json.loads(out)
        assert found["damaged_sections"] == [f"section {each} (layer 0, tile {each})" for each in lost]
        assert found["layers"][0]["damaged"] == len(lost)
        assert found["damage"] in err


def test_info_of_the_shipped_pipeline_by_name(capsys):
    assert main(["info", "fashion-mnist", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["kind"], found["class"], found["name"]) == ("pipeline", "PriorPipeline", "fashion-mnist")


def test_refusals_of_compressed_files(compressed, capsys):
    Path("head.lcf").write_bytes(compressed["one"][:20])
    Path("text.lcf").write_text("hello")
    for argv, message in [
        (("head.lcf",), "head.lcf: the file is cut short: its 20 bytes end in the header"),
        (("text.lcf",), "text.lcf: the data are not a compressed file of latent-codec"),
        (("nowhere.lcf",), "nowhere.lcf: No such file"),
        (("one.lcf", "--codec", "mine"), "--codec and --entropy are for counting bits; add --verbose"),
        (("one.lcf", "--verbose", "--codec", "wide"), "one.lcf was made by another codec"),
        (
            ("one.lcf", "--verbose", "--codec", "mine", "--entropy", "another.safetensors"),
            "not with another.safetensors",
        ),
        (("one.lcf", "--verbose", "--entropy", "entropy"), "--entropy needs --codec"),
        (("mine", "--codec", "mine"), "--codec and --entropy are for"),
        (("mine", "--audit", "--entropy", "entropy"), "--codec and --entropy are for"),
    ]:
        assert message in fails(capsys, "info", *argv), argv


def test_what_needs_no_model_is_said_without_its_libraries(compressed, place):
    codec = LatentCodec.from_pretrained("mine")
    save_latents(
        "latents.safetensors", codec.encode("photos/0.png"), codec=codec, names=["0"], sizes=[(18, 24)]
    )
    shutil.copy("mine/diffusion_pytorch_model.safetensors", "lone.safetensors")
    for suffix in ("safetensors", "ckpt"):
        save_checkpoint(from_diffusers(AutoencoderKL(block_out_channels=(32,)), "ldm"), f"foreign.{suffix}")
    program = (
        "import sys; from latent_codec.cli import main\n"
        "for thing in sys.argv[2:]:\n"
        "    assert main(['info', thing, '--json']) == 0, thing\n"
        "    assert not set(sys.argv[1].split(',')) & sys.modules.keys(), thing\n"
        "    print(end='\\0')\n"
    )
    without_torch = {
        "tiles.lcf": "compressed latents",
        "default": "codec",
        "mine": "codec",
        "foreign.safetensors": "checkpoint",
        "lone.safetensors": "codec",
    }
    without_diffusers = {"latents.safetensors": "latents", "foreign.ckpt": "checkpoint"}
    for unused, things in (("torch,diffusers", without_torch), ("diffusers", without_diffusers)):
        answers = run_fresh(program, unused, *things).stdout.split("\0")
        assert [json.loads(answer)["kind"] for answer in answers[:-1]] == list(things.values())


@pytest.mark.parametrize("name", ["default", "default-vq", str(ASSETS / "fashion-mnist"), "mine", "half"])
def test_facts_of_files_are_those_of_the_codec_that_is_built_of_them(name, place):
    codec = LatentCodec.from_pretrained("mine" if name == "half" else name)
    if name == "half":
        codec.autoencoder.to(torch.bfloat16)
        codec.weights_changed()
        codec.save_pretrained("half")
        codec = LatentCodec.from_pretrained("half")
    read, built = read_facts(name), facts_of(codec)
    assert read.config.items() <= built.config.items()
    assert read.class_name == built.class_name
    for entry in (
        "name",
        "latent_space",
        "num_parameters",
        "space_fingerprint",
        "fingerprint",
        "codebook_sizes",
        "channels",
    ):
        assert getattr(read, entry) == getattr(built, entry)
    if codec.is_discrete:
        assert read.position_sides == [level.side for level in codec.levels]


@pytest.mark.parametrize(
    "component",
    [
        build(scaling_factor=0.5, shift_factor=0.1),
        AutoencoderKL(
            norm_num_groups=8, block_out_channels=(16,), latents_mean=[0.5] * 4, latents_std=[2.0] * 4
        ),
        AutoencoderVQ(block_out_channels=(8,), norm_num_groups=4, num_vq_embeddings=16),
        HierarchicalVQ(hidden_channels=8, residual_channels=4, embed_dim=4, codebook_sizes=8),
        AutoencoderTiny(
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
        ),
    ],
    ids=lambda component: type(component).__name__,
)
def test_facts_of_a_copy_of_weights_alone_are_those_of_the_codec_that_it_opens_as(component, tmp_path):
    save_component(component, tmp_path / "codec")
    lone = shutil.copy(tmp_path / "codec/diffusion_pytorch_model.safetensors", tmp_path / "lone.safetensors")
    read, built = read_facts(lone), facts_of(LatentCodec.from_pretrained(lone))
    for entry in ("name", "class_name", "latent_space", "num_parameters", "space_fingerprint", "fingerprint"):
        assert getattr(read, entry) == getattr(built, entry)
    assert read.codebook_sizes == built.codebook_sizes


def test_only_whole_files_in_their_own_layout_are_codecs_alone(tmp_path, capsys):
    component = AutoencoderKL(block_out_channels=(32,), scaling_factor=0.5)
    state, metadata = component.state_dict(), config_metadata(component)
    others = {
        "ldm": (from_diffusers(component, "ldm"), metadata),
        "more": (state | {"more": torch.zeros(1)}, metadata),
        "prefixed": ({f"vae.{key}": tensor for key, tensor in state.items()}, metadata),
        "wide": (state, config_metadata(AutoencoderKL(block_out_channels=(64,)))),
    }
    for name, (tensors, given) in others.items():
        save_checkpoint(tensors, tmp_path / f"{name}.safetensors", given)
        assert read_facts(tmp_path / f"{name}.safetensors") is None, name
    assert answer(capsys, str(tmp_path / "ldm.safetensors"))["scaling_factor"] == 0.5
    assert answer(capsys, str(tmp_path / "more.safetensors"))["keys"]["unexpected"] == 1
    assert "does not describe the weights" in answer(capsys, str(tmp_path / "wide.safetensors"))["reason"]


def test_keys_count_by_their_names_and_with_verbose_by_the_network(tmp_path, capsys):
    state = from_diffusers(AutoencoderKL(block_out_channels=(32,)), "ldm")
    whole = len(state)
    del state["encoder.mid.block_2.conv1.bias"]
    state["encoder.conv_in.weight"] = torch.zeros(32, 3, 1, 1)
    state |= {"encoder.extra": torch.zeros(1), "loss.logvar": torch.zeros(())}
    save_checkpoint(state, tmp_path / "a.ckpt")
    loss = {"left out: loss.*, the training's losses and discriminator": 1}
    facts = answer(capsys, str(tmp_path / "a.ckpt"))
    assert facts["keys"] == {"mapped": whole - 1, "unexpected": 1} | loss
    assert not {"missing", "unexpected", "misshapen"} & facts.keys()
    facts = answer(capsys, str(tmp_path / "a.ckpt"), "--verbose")
    assert facts["keys"] == {"mapped": whole - 1, "unexpected": 1, "missing": 1} | loss
    assert facts["missing"] == ["encoder.mid.block_2.conv1.bias"] and facts["unexpected"] == ["encoder.extra"]
    assert facts["misshapen"] == ["encoder.conv_in.weight (32, 3, 1, 1) instead of (32, 3, 3, 3)"]


def test_verbose_is_for_files_that_have_more_to_say(compressed, place, capsys):
    for thing in ("mine", "entropy/entropy.safetensors"):
        assert "--verbose is for compressed files" in fails(capsys, "info", thing, "--verbose")


def test_files_that_do_not_agree_are_built_to_be_sure(place, tmp_path, capsys):
    shutil.copytree("mine", tmp_path / "codec")
    config = json.loads((tmp_path / "codec" / "config.json").read_text())
    (tmp_path / "codec" / "config.json").write_text(json.dumps(config | {"scaling_factor": 0.5}))
    assert read_facts(tmp_path / "codec") is None
    assert answer(capsys, str(tmp_path / "codec"))["scaling_factor"] == 0.5
    weights = tmp_path / "codec" / "diffusion_pytorch_model.safetensors"
    (tmp_path / "codec" / "config.json").write_text(json.dumps(config))
    assert read_facts(tmp_path / "codec") is not None
    weights.write_bytes(weights.read_bytes()[:-1])
    assert read_facts(tmp_path / "codec") is None
    assert "diffusion_pytorch_model.safetensors" in fails(capsys, "info", str(tmp_path / "codec"))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs FIFOs")
@pytest.mark.parametrize("verb", ["info", "decompress", "decode"])
@pytest.mark.parametrize("name", ["pipe.lcf", "pipe.safetensors", "pipe"])
def test_a_pipe_is_refused_and_not_waited_for(verb, name, tmp_path, capsys):
    os.mkfifo(tmp_path / name)
    assert main([verb, str(tmp_path / name)]) == 2
    err = capsys.readouterr().err
    assert "pipe" in err and len([line for line in err.splitlines() if line.startswith("latent-codec")]) == 1
