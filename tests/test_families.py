"""A family is a file and a row: one made here gives LatentCodec all that it asks, and nothing else asks for a class."""

import importlib
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from helpers import ROOT
from torch import nn
from torch.nn import functional as F

import latent_codec
from latent_codec import HierarchicalVQ, LatentCodec
from latent_codec.bitstream import compress, decompress
from latent_codec.families import FAMILIES, Encoded, Family, LatentSpace, Level
from latent_codec.previews import LatentPreviewer
from latent_codec.training.autoencoder_task import AutoencoderTask
from latent_codec.training.config import TrainingConfig
from latent_codec.training.task import TaskInputs


class Mosaic(ModelMixin, ConfigMixin):
    """Each square of `side` pixels is the nearest of a few colors: an autoencoder unlike any other here."""

    @register_to_config
    def __init__(self, side: int = 4, num_colors: int = 8, scaling_factor: float = 2.0):
        super().__init__()
        torch.manual_seed(0)
        self.palette = nn.Parameter(torch.rand(num_colors, 3) * 2 - 1)


class MosaicFamily(Family):
    @classmethod
    def latent_shape(cls, config):
        return 3, config["side"]

    @property
    def channels(self):
        return 3

    @property
    def levels(self):
        return [Level(self.autoencoder.palette, self.side_multiple)]

    def encode_raw(self, images, tile=None):
        return Encoded(None, F.avg_pool2d(images, self.side_multiple))

    def encode_with_indices(self, images):
        encoded = self.encode_raw(images)
        means = encoded.raw_latents.permute(0, 2, 3, 1)
        nearest = torch.cdist(means.flatten(0, 2), self.autoencoder.palette).argmin(1)
        return encoded, [nearest.view(means.shape[:3])]

    def latents_of_indices(self, indices):
        return self.autoencoder.palette[indices[0]].permute(0, 3, 1, 2)

    def decode_raw(self, raw_latents, tile=None):
        return raw_latents.repeat_interleave(self.side_multiple, 2).repeat_interleave(self.side_multiple, 3)

    def decode_indices(self, indices, known=None):
        return self.decode_raw(self.latents_of_indices(indices))


@pytest.fixture
def codec(monkeypatch):
    monkeypatch.setitem(FAMILIES, "Mosaic", MosaicFamily)
    return LatentCodec(Mosaic())


@pytest.fixture
def image():
    return torch.rand(3, 14, 10, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_a_new_family_is_a_codec(codec, image):
    assert codec.latent_space == LatentSpace(3, 4, scaling_factor=2.0)
    latents = codec.encode(image)
    assert latents.shape == (1, 3, 4, 3)
    padded = F.pad(image[None], (0, 2, 0, 2), mode="replicate")
    torch.testing.assert_close(latents, F.avg_pool2d(padded, 4) * 2)
    (decoded,) = codec.decode(latents, size=(14, 10), output_type="pt")
    assert decoded.shape == (3, 14, 10)
    torch.testing.assert_close(decoded[:, 0, 0], latents[0, :, 0, 0] / 2)
    assert len(codec.space_fingerprint) == 16 and codec.codebook_sizes == [8]


def test_its_indices_are_compressed_and_previewed(codec, image):
    data = compress(codec, image, tile=None)
    decoded = decompress(codec, data, output_type="pt")
    (expected,) = codec.decode_indices(codec.encode_indices(image), size=(14, 10), output_type="pt")
    assert torch.equal(decoded, expected)
    assert LatentPreviewer.full(codec, max_side=8)(codec.encode(image)).shape[-2:] == (8, 4)


def test_without_its_row_it_is_refused_with_the_reason():
    with pytest.raises(
        ValueError, match="Mosaic is not supported: it is not an autoencoder of images that is known"
    ):
        LatentCodec(Mosaic())


def test_tiles_of_a_family_without_them_are_refused(codec, image):
    with pytest.raises(ValueError, match="expected an integer of pixels"):
        codec.encode(image, tile=-1)
    family = Family(SimpleNamespace(config={"block_out_channels": (1, 1), "latent_channels": 4}))
    with pytest.raises(ValueError, match="tiles of SimpleNamespace are not supported"), family.tiling(64):
        pass


def test_a_linear_start_is_refused_to_a_family_whose_layers_it_does_not_know():
    config = TrainingConfig.from_dict(
        {
            "model": {"class_name": "HierarchicalVQ", "initialization": "linear"},
            "codebook": {"kmeans_crops": 8},
            "data": {"height": 64, "width": 64},
        }
    )
    autoencoder = HierarchicalVQ(hidden_channels=8, residual_channels=4, embed_dim=4, codebook_sizes=8)
    with pytest.raises(
        ValueError, match="for HierarchicalVQ: a linear start knows AutoencoderKL and AutoencoderVQ"
    ):
        AutoencoderTask.check(config, autoencoder, TaskInputs(source=None))


def test_a_config_is_read_without_torch():
    script = (
        "import sys\n"
        "from latent_codec.families import LatentSpace\n"
        "config = {'latent_channels': 4, 'block_out_channels': [8, 8], 'scaling_factor': 0.5}\n"
        "assert LatentSpace.read('AutoencoderKL', config).scaling_factor == 0.5\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


def test_nobody_else_asks_for_an_autoencoders_class():
    question = re.compile(
        r"(isinstance|hasattr|getattr)\((self\.|codec\.)?(uncompiled\()?(autoencoder|vae)\b"
        r"|isinstance\([^)]*\b(HierarchicalVQ|AutoencoderVQ|VQModel|AutoencoderKL|AutoencoderTiny)\b|is_movq"
    )
    asked = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for folder in ("latent_codec", "pipelines", "conversion")
        for path in (ROOT / folder).rglob("*.py")
        if path.parent.name != "families"
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if question.search(line)
    ]
    assert asked == []


def test_modules_of_components_have_what_diffusers_looks_for():
    """Reloading a pipeline, diffusers takes a component's loading methods from the names of its module."""
    for module in latent_codec._COMPONENTS:
        assert importlib.import_module(module).ModelMixin is ModelMixin, module
