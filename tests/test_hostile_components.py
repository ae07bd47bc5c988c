"""Folders that are damaged or made to hurt: one line, exit code 2, and nothing large is allocated or waited for."""

import json
import os
import shutil
import struct
from pathlib import Path

import diffusers
import pytest
from helpers.processes import run_forked

from latent_codec import LatentCodec
from latent_codec.cli import main
from latent_codec.components.codec_folders import WEIGHTS
from latent_codec.models.context_network import IndexContext
from latent_codec.models.hierarchical_vq import HierarchicalVQ
from latent_codec.models.pixelcnn import PixelCNN
from latent_codec.models.tiny_decoder import TinyDecoder

KL = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
    "latent_channels": 4,
}
BILLION = 10**9


@pytest.fixture
def folder(tmp_path) -> Path:
    diffusers.AutoencoderKL(**KL).save_pretrained(tmp_path / "mine")
    return tmp_path / "mine"


def change_config(folder: Path, **entries) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | entries))


def refused(capsys, folder: Path, *verb: str) -> str:
    """The one line that a verb says of a folder that it does not open."""
    capsys.readouterr()
    assert main([*(verb or ("info",)), str(folder)]) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.count("\n") == 1 and len(error) < 1000
    assert str(folder) in error
    return error


# --------------------------------------------------------------------------------------------- config.json


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"scaling_factor": "large"}, "expected scaling_factor of type float, got 'large'"),
        ({"scaling_factor": [0.5]}, "expected scaling_factor of type float, got [0.5]"),
        ({"scaling_factor": -1}, "scaling_factor is -1; it must be a positive number"),
        ({"scaling_factor": float("nan")}, "scaling_factor is nan"),
        ({"shift_factor": {}}, "expected shift_factor of type"),
        ({"shift_factor": ""}, "expected shift_factor of type"),
        ({"latents_mean": "zero", "latents_std": [1] * 4}, "expected latents_mean of type"),
        ({"latents_mean": [0] * 4, "latents_std": [1, 1, "1", 1]}, "expected latents_std of type"),
        (
            {"latents_mean": [0] * 4, "latents_std": [1, 1]},
            "expected 4 entries of latents_mean and latents_std, one per channel, got 4 and 2",
        ),
        ({"latents_mean": [[0]] * 4, "latents_std": [1] * 4}, "expected latents_mean of type"),
        ({"block_out_channels": "wide"}, "expected block_out_channels of type"),
        ({"block_out_channels": [8, None]}, "expected block_out_channels of type"),
        ({"sample_size": "big"}, "expected sample_size of type int, got 'big'"),
        ({"act_fn": 5}, "expected act_fn of type str, got 5"),
        ({"act_fn": "none such"}, "makes no AutoencoderKL"),
        ({"norm_num_groups": 0}, "makes no AutoencoderKL"),
        ({"block_out_channels": []}, "makes no AutoencoderKL"),
        ({"_class_name": 3}, "it names no _class_name"),
        ({"_class_name": "Popen"}, "Popen is not supported"),
        ({"quantization_config": {"load_in_4bit": True}}, "describes quantized weights"),
    ],
)
def test_a_wrong_entry_is_named_with_its_file(entries, message, folder, capsys):
    change_config(folder, **entries)
    error = refused(capsys, folder)
    assert message in error and "config.json" in error


def test_an_entry_of_a_latent_space_is_a_number_whoever_sets_it():
    model = diffusers.AutoencoderKL(**KL)
    for entries, message in [
        ({"scaling_factor": "1"}, "expected a number as scaling_factor, got '1'"),
        ({"shift_factor": [1]}, r"expected a number as shift_factor, got \[1\]"),
        ({"shift_factor": ""}, "expected a number as shift_factor, got ''"),
        ({"latents_mean": 0.5, "latents_std": 1.0}, "expected a list of numbers as latents_mean, got 0.5"),
    ]:
        before = dict(model.config)
        model.register_to_config(**entries)
        with pytest.raises(ValueError, match=message):
            LatentCodec(model)
        model.register_to_config(**before)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"[" * 1_000_000, "nested too deep"),
        (b'{"a":' * 200_000, "nested too deep"),
        (b"{}" + b" " * 5_000_000, "expected at most 4194304 bytes"),
        (b"\xff\xfe", "is not the config"),
        (b'{"_class_name": ' + b"9" * 100_000 + b"}", "is not the config"),
        (b"", "is not the config"),
    ],
)
def test_a_config_that_is_no_config_is_refused(text, message, folder, capsys):
    (folder / "config.json").write_bytes(text)
    error = refused(capsys, folder)
    assert message in error and str(folder / "config.json") in error


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs FIFOs")
@pytest.mark.parametrize("kind", ["folder", "fifo", "loop", "device"])
@pytest.mark.parametrize("name", ["config.json", WEIGHTS])
def test_what_is_no_file_is_not_waited_for(kind, name, folder, capsys):
    path = folder / name
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "loop":
        path.symlink_to(path)
    else:
        path.symlink_to("/dev/zero")
    refused(capsys, folder)


# ------------------------------------------------------------------------------ sizes, before anything is built


def write_empty_tensors(path: Path, number: int) -> None:
    """A valid safetensors file of tensors without values."""
    entries = {
        f"encoder.{index}.weight": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
        for index in range(number)
    }
    header = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)


MODELS = {
    "kl": lambda: diffusers.AutoencoderKL(**KL),
    "levels": lambda: HierarchicalVQ(
        strides=(4, 2), hidden_channels=8, residual_channels=4, embed_dim=4, codebook_sizes=5
    ),
    "prior": lambda: PixelCNN(codebook_size=5, hidden_channels=8, num_layers=2),
    "tiny": lambda: TinyDecoder(block_out_channels=(8, 8), num_blocks=(1, 1)),
    "context": lambda: IndexContext([4, 8], embedding=4, hidden=8),
}
LARGE = [
    ("kl", {"layers_per_block": BILLION}),
    ("kl", {"layers_per_block": 900_000}),
    ("kl", {"block_out_channels": [BILLION, BILLION]}),
    ("kl", {"block_out_channels": [900_000, 900_000]}),
    ("kl", {"latent_channels": 10**18}),
    ("kl", {"block_out_channels": [8] * 300_000, "down_block_types": ["DownEncoderBlock2D"] * 300_000}),
    ("levels", {"num_residual_blocks": BILLION}),
    ("levels", {"codebook_sizes": BILLION}),
    ("levels", {"codebook_sizes": [900_000] * 2}),
    ("levels", {"strides": [2] * 100_000}),
    ("levels", {"strides": [2**4000, 2]}),
    ("prior", {"num_layers": BILLION}),
    ("prior", {"num_layers": 900_000}),
    ("prior", {"codebook_size": BILLION}),
    ("tiny", {"num_blocks": [BILLION, 1]}),
    ("tiny", {"num_blocks": [900_000, 1]}),
    ("context", {"codebook_sizes": [900_000] * 10_000}),
    ("context", {"codebook_sizes": [BILLION]}),
]
OPEN = """
import resource, sys
from latent_codec.families import component_class
from latent_codec.components.loading import find_weights_in, load_component
from latent_codec.models.classifier import ImageClassifier
from latent_codec.models.context_network import IndexContext
from latent_codec.models.pixelcnn import PixelCNN
from latent_codec.models.tiny_decoder import TinyDecoder
from pathlib import Path
import diffusers, torch

ours = {each.__name__: each for each in (IndexContext, PixelCNN, TinyDecoder)}
find = lambda name: ours.get(name) or component_class(name)
load_component(find_weights_in(Path(sys.argv[1])), find)
before = resource.getrusage(resource.RUSAGE_SELF)
for folder in sys.argv[2:]:
    try:
        load_component(find_weights_in(Path(folder)), find)
    except ValueError as error:
        print(str(error).replace("\\n", "<line>"))
    else:
        print("opened")
after = resource.getrusage(resource.RUSAGE_SELF)
print(after.ru_maxrss - before.ru_maxrss, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
"""


def test_nothing_is_built_that_its_weights_do_not_bound(tmp_path):
    """All in one process, whose peak of memory and processor time hold for each of them."""
    folders, names = [], [name for name, _ in LARGE]
    for name, model in MODELS.items():
        model().save_pretrained(tmp_path / name)
    for number, (name, entries) in enumerate(LARGE):
        for padded in {False, names.index(name) == number}:  # one of each model
            folder = tmp_path / f"{number}-{name}-{padded}"
            shutil.copytree(tmp_path / name, folder)
            change_config(folder, **entries)
            if padded:  # as many tensors as a file may have
                write_empty_tensors(folder / WEIGHTS, 60_000)
            folders.append(str(folder))
    done = run_forked(OPEN, tmp_path / "kl", *folders)
    *lines, last = done.stdout.splitlines()
    for folder, line in zip(folders, lines, strict=True):
        assert folder in line and line != "opened" and "<line>" not in line and len(line) < 1000
    grown, seconds = last.split()
    assert int(grown) < 2**20  # KiB
    print(f"{int(grown) / 1024:.0f} MiB, {float(seconds):.1f} s for {len(folders)} folders")


def test_a_file_of_very_many_tensors_is_refused(folder, capsys):
    write_empty_tensors(folder / WEIGHTS, 70_000)
    assert "expected at most 65536 tensors, got 70000" in refused(capsys, folder)
    assert "expected at most 65536 tensors" in refused(capsys, folder / WEIGHTS)
    header = b'{"a":"' + b" " * 2**25 + b'"}'
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header)
    assert "expected a header of at most 33554432 bytes" in refused(capsys, folder)


@pytest.mark.parametrize("entry", [{"shape": [2**68], "data_offsets": [0, 2**70]}, None])
def test_a_header_that_is_no_header_of_safetensors_is_refused(entry, folder, capsys):
    metadata = {"format": "pt", "config": (folder / "config.json").read_text()}
    header = {
        "__metadata__": ["a list"] if entry is None else metadata,
        "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
    }
    header["a"] |= entry or {}
    text = json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
    assert WEIGHTS in refused(capsys, folder)
