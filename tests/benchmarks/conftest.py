import pytest
from torch import Tensor

from latent_codec.evaluation.reconstruction import read_image
from latent_codec.picture_sources import open_source


@pytest.fixture(scope="module")
def kodak(shared) -> list[Tensor]:
    """The Kodak pictures, (1, 3, H, W) each."""
    source = open_source(shared / "data/kodak")
    return [read_image(source, index, 3)[None] for index in range(len(source))]
