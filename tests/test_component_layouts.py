"""Every layout that people have a diffusers autoencoder in is opened, as the codec that it is."""

import json
import re
import shutil
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

import diffusers
import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from latent_codec import LatentCodec
from latent_codec.cli import main
from latent_codec.components.codec_folders import WEIGHTS, find_weights

KL = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
    "latent_channels": 4,
}
IMAGE = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
INDEX = {"_class_name": "ModularPipeline"}


@pytest.fixture(scope="module")
def model() -> diffusers.AutoencoderKL:
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(**KL).eval()


def make(layout: str, model, folder: Path) -> None:
    match layout:
        case "safetensors":
            model.save_pretrained(folder)
        case "bin":
            model.save_pretrained(folder, safe_serialization=False)
        case "legacy bin":
            model.save_pretrained(folder)
            state = load_file(folder / WEIGHTS)
            (folder / WEIGHTS).unlink()
            torch.save(state, folder / "diffusion_pytorch_model.bin", _use_new_zipfile_serialization=False)
        case "variant" | "variant bin":
            model.save_pretrained(folder, variant="fp16", safe_serialization=layout == "variant")
        case "shards":
            model.save_pretrained(folder, max_shard_size="100KB")
        case "bin shards":
            model.save_pretrained(folder, max_shard_size="100KB", safe_serialization=False)
        case "variant shards":
            model.save_pretrained(folder, max_shard_size="100KB", variant="fp16")
        case "model.safetensors":
            model.save_pretrained(folder)
            (folder / WEIGHTS).rename(folder / "model.safetensors")
        case "pipeline":
            model.save_pretrained(folder / "vae")
            (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
        case "modular":
            model.save_pretrained(folder / "vae")
            (folder / "modular_model_index.json").write_text(json.dumps(INDEX))


LAYOUTS = [
    "safetensors",
    "bin",
    "legacy bin",
    "variant",
    "variant bin",
    "shards",
    "bin shards",
    "variant shards",
    "model.safetensors",
    "pipeline",
    "modular",
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_opens_as_the_same_codec(layout, model, tmp_path):
    make(layout, model, tmp_path / "mine")
    codec, expected = LatentCodec.from_pretrained(tmp_path / "mine"), LatentCodec(model)
    assert torch.equal(codec.encode(IMAGE), expected.encode(IMAGE))
    assert codec.fingerprint == expected.fingerprint
    assert codec.name == "mine"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_opens_from_the_hub_and_nothing_else_is_fetched(layout, model, tmp_path, monkeypatch):
    """The hub stands in a folder; huggingface_hub's own filter of patterns decides what comes."""
    make(layout, model, tmp_path / "repository")
    repository, cache = tmp_path / "repository", tmp_path / "cache"
    (repository / "unet").mkdir()
    (repository / "unet" / WEIGHTS).write_bytes(b"large")
    if layout == "safetensors":  # the other forms of the same weights stay there
        for name in ("diffusion_pytorch_model.bin", "diffusion_pytorch_model.fp16.safetensors"):
            (repository / name).write_bytes(b"large")

    def snapshot_download(name, *, allow_patterns):
        from huggingface_hub.utils import filter_repo_objects

        assert name == "owner/name"
        files = [str(path.relative_to(repository)) for path in repository.rglob("*") if path.is_file()]
        for file in filter_repo_objects(files, allow_patterns=allow_patterns):
            (cache / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(repository / file, cache / file)
        return str(cache)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    codec = LatentCodec.from_pretrained("owner/name")
    assert codec.fingerprint == LatentCodec(model).fingerprint and codec.name == "owner/name"
    assert not any(path.is_file() and path.read_bytes() == b"large" for path in cache.rglob("*"))


def test_a_subfolder_of_the_hub_is_fetched_alone(model, tmp_path, monkeypatch):
    """Offline, huggingface_hub answers from its cache, whose layout this is."""
    snapshot = tmp_path / "models--owner--name" / "snapshots" / ("0" * 40)
    (snapshot.parents[1] / "refs").mkdir(parents=True)
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    make("bin", model, snapshot / "deep" / "ema_vae")
    offline = partial(huggingface_hub.snapshot_download, cache_dir=tmp_path, local_files_only=True)
    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    fingerprint = LatentCodec(model).fingerprint
    assert LatentCodec.from_pretrained("owner/name", subfolder="deep/ema_vae").fingerprint == fingerprint
    assert LatentCodec.from_pretrained("owner/name/deep/ema_vae").fingerprint == fingerprint
    with pytest.raises(ValueError, match=r"owner/name has no vae2/config\.json"):
        LatentCodec.from_pretrained("owner/name/vae2")


def test_a_variant_is_chosen_only_where_it_is_the_only_one(model, tmp_path):
    model.save_pretrained(tmp_path, variant="fp16")
    assert find_weights(tmp_path).name == "diffusion_pytorch_model.fp16.safetensors"
    model.save_pretrained(tmp_path, variant="ema")
    with pytest.raises(ValueError, match="the variants ema, fp16: name one file"):
        find_weights(tmp_path)
    named = LatentCodec.from_pretrained(tmp_path / "diffusion_pytorch_model.ema.safetensors")
    assert named.fingerprint == LatentCodec(model).fingerprint
    model.save_pretrained(tmp_path)
    assert find_weights(tmp_path).name == WEIGHTS


def test_a_half_precision_variant_has_the_fingerprint_of_its_rounded_weights(model, tmp_path):
    half = diffusers.AutoencoderKL(**KL).eval()
    half.load_state_dict(model.state_dict())
    half.half().save_pretrained(tmp_path, variant="fp16")
    codec = LatentCodec.from_pretrained(tmp_path)
    assert codec.dtype == torch.float32
    assert codec.fingerprint == LatentCodec(half.float()).fingerprint != LatentCodec(model).fingerprint


def test_attention_of_2022_is_read_as_diffusers_reads_it(model, tmp_path):
    model.save_pretrained(tmp_path)
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for key, tensor in load_file(tmp_path / WEIGHTS).items():
        for new, old in names.items():
            key = key.replace(f".{new}.", f".{old}.")
        renamed[key] = tensor
    assert any("query" in key for key in renamed)
    save_file(renamed, tmp_path / WEIGHTS)
    assert LatentCodec.from_pretrained(tmp_path).fingerprint == LatentCodec(model).fingerprint


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "is not an index of shards"),
        ("[]", "it has no weight_map"),
        (json.dumps({"weight_map": {"a": "../../secret.safetensors"}}), "is not the name of a shard"),
        (json.dumps({"weight_map": {"a": "/etc/passwd"}}), "is not the name of a shard"),
        (json.dumps({"weight_map": {"a": "diffusion_pytorch_model/../x.bin"}}), "is not the name of a shard"),
        (json.dumps({"weight_map": {"a": ["x"]}}), "is not the name of a shard"),
        (json.dumps({"weight_map": {"a": "diffusion_pytorch_model-9.safetensors"}}), "is missing"),
        ("[" * 100_000, "nested too deep"),
        (json.dumps({"weight_map": {str(n): "model.bin" for n in range(70_000)}}), "at most 65536 tensors"),
        (
            json.dumps({"weight_map": {str(n): f"model-{n}.bin" for n in range(2_000)}}),
            "at most 1000 shards, got 2000",
        ),
    ],
)
def test_an_index_names_shards_next_to_it_or_is_refused(index, message, model, tmp_path):
    make("shards", model, tmp_path)
    (tmp_path / f"{WEIGHTS}.index.json").write_text(index)
    with pytest.raises(ValueError, match=message) as caught:
        LatentCodec.from_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value) and len(str(caught.value)) < 600


def test_shards_and_index_must_agree(model, tmp_path):
    make("shards", model, tmp_path)
    path = tmp_path / f"{WEIGHTS}.index.json"
    index = json.loads(path.read_text())
    key = next(iter(index["weight_map"]))
    for changed, message in [
        ({k: name for k, name in index["weight_map"].items() if k != key}, "which .* has in no file"),
        (index["weight_map"] | {"more": index["weight_map"][key]}, r"1 keys \(more\) in shards that do not"),
    ]:
        path.write_text(json.dumps(index | {"weight_map": changed}))
        with pytest.raises(ValueError, match=message):
            LatentCodec.from_pretrained(tmp_path)


def test_a_bin_that_would_run_code_is_not_opened(model, tmp_path):
    make("bin", model, tmp_path)
    torch.save({"a": Runs()}, tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match=r"would run .*system; it was not opened"):
        LatentCodec.from_pretrained(tmp_path)


class Runs:
    def __reduce__(self):
        import os

        return os.system, ("echo",)


def test_a_training_checkpoint_is_no_component(model, tmp_path):
    make("bin", model, tmp_path)
    state = model.state_dict()
    for content in ({"state_dict": state}, state | {"step": 3}):
        torch.save(content, tmp_path / "diffusion_pytorch_model.bin")
        with pytest.raises(ValueError, match="holds other things than a component's tensors"):
            LatentCodec.from_pretrained(tmp_path)


def test_a_modular_index_says_where_its_autoencoder_is(tmp_path):
    for entries, place in [
        ({"pretrained_model_name_or_path": "owner/name", "subfolder": "vae"}, "owner/name/vae"),
        ({"repo": "owner/vae", "subfolder": ""}, "owner/vae"),
    ]:
        index = INDEX | {"vae": ["diffusers", "AutoencoderKL", entries]}
        (tmp_path / "modular_model_index.json").write_text(json.dumps(index))
        with pytest.raises(ValueError, match=f"its index names {place}$"):
            LatentCodec.from_pretrained(tmp_path)


# ---------------------------------------------------------------------------------------- the command line


def test_every_verb_with_a_codec_has_a_subfolder(capsys):
    from latent_codec.cli import VERBS

    for verb in VERBS:
        with pytest.raises(SystemExit):
            main([verb, "--help"])
        text = capsys.readouterr().out
        takes_several = "--codec NAME_OR_PATH [NAME_OR_PATH ...]" in text  # each with its own, in its path
        assert bool(re.search("^  --codec ", text, re.MULTILINE)) <= (
            "--subfolder" in text or takes_several
        ), verb


def test_a_codec_of_the_page_may_be_in_a_subfolder(model, tmp_path):
    from latent_codec.ui.desk import Desk

    make("bin", model, tmp_path / "whole" / "first_stage")
    desk = Desk([tmp_path / "whole" / "first_stage"])
    assert desk.codec("first_stage").fingerprint == LatentCodec(model).fingerprint
    desk.close()


def test_a_subfolder_is_opened_and_kept_to(model, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make("bin", model, tmp_path / "whole" / "first_stage")
    from PIL import Image

    Image.new("RGB", (16, 16), "red").save("a.png")
    argv = ["a.png", "--codec", "whole", "--subfolder", "first_stage", "--device", "cpu"]
    assert main(["encode", *argv, "--out", "latents"]) == 0
    assert main(["roundtrip", "a.png", *argv[1:], "--out", "out.png", "--subfolder", "vae"]) == 2
    assert "whole has no vae/config.json" in capsys.readouterr().err
    for codec, name in (("default", "default"), ("nowhere.safetensors", "nowhere")):
        assert main(["encode", "a.png", "--codec", codec, "--subfolder", "vae", "--out", "x"]) == 2
        assert f"to look for the subfolder vae in, got {name}" in capsys.readouterr().err


@pytest.mark.parametrize("layout", ["bin", "variant", "shards"])
def test_a_copy_of_any_layout_is_the_same_codec(layout, model, tmp_path):
    from latent_codec.cli.work.codec_copies import folder_for_sidecar

    make(layout, model, tmp_path / "mine")
    codec = LatentCodec.from_pretrained(tmp_path / "mine")
    copy = folder_for_sidecar(str(tmp_path / "mine"), codec, tmp_path / "copy")
    assert LatentCodec.from_pretrained(copy).fingerprint == codec.fingerprint


@pytest.mark.parametrize("layout", ["bin", "variant", "shards", "variant shards"])
def test_saving_over_any_layout_leaves_one_set_of_weights(layout, model, tmp_path):
    make(layout, model, tmp_path)
    codec = LatentCodec.from_pretrained(tmp_path)
    with torch.no_grad():
        codec.autoencoder.decoder.conv_in.bias += 1
    codec.weights_changed()
    codec.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir() if fnmatch(path.name, "diffusion*")] == [WEIGHTS]
    assert LatentCodec.from_pretrained(tmp_path).fingerprint == codec.fingerprint
    plain = diffusers.AutoencoderKL.from_pretrained(tmp_path)
    assert LatentCodec(plain).fingerprint == codec.fingerprint
