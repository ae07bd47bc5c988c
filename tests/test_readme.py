"""The README's commands and Python blocks run as they stand; trainings are cut to two steps."""

import re

import numpy as np
import pytest
from diffusers import AutoencoderKL
from helpers import ROOT
from helpers.pages import code_blocks, run_commands
from PIL import Image

from latent_codec.cli import VERBS
from latent_codec.conversion import from_diffusers
from latent_codec.conversion.checkpoints import save_checkpoint
from latent_codec.training.config import preset_names

README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with `image.jpg`, `photos/` and a foreign `vae.ckpt`, as the README's reader has one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    ramp = np.linspace(0, 255, 136)
    for index in range(3):
        pixels = np.stack(
            [np.add.outer(ramp, ramp) / 2, np.full((136, 136), 80.0 * index), np.outer(ramp, ramp) / 255]
        )
        image = Image.fromarray(pixels.transpose(1, 2, 0).astype(np.uint8))
        image.save(tmp_path / "photos" / f"{index}.jpg")
    image.save(tmp_path / "image.jpg")
    autoencoder = AutoencoderKL(block_out_channels=(32,), latent_channels=4)
    save_checkpoint(from_diffusers(autoencoder, "ldm"), tmp_path / "vae.ckpt")
    return tmp_path


def test_the_readme_has_both_first_commands_and_every_verb_and_preset():
    assert "pip install -e . && latent-codec roundtrip\n" in README
    assert 'pip install -e ".[test]" && pytest\n' in README
    table = re.findall(r"^\| (.+?) \| .+ \|$", README, re.MULTILINE)
    named = set(re.findall(r"`([\w-]+)", " ".join(table)))
    assert {verb.partition(" ")[0] for verb in VERBS} <= named
    assert set(preset_names()) <= named


@pytest.mark.parametrize("block", code_blocks(README, "bash"), ids=lambda block: block.split("\n")[0])
def test_commands(block, workplace):
    run_commands(block)


@pytest.mark.parametrize("block", code_blocks(README, "python"), ids=lambda block: block.split("\n")[-2])
def test_python_blocks(block, workplace):
    exec(compile(block, "README.md", "exec"), {})
    if "again.png" in block:
        assert Image.open(workplace / "again.png").size == (136, 136)
