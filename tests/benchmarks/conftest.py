import pytest
import torch
from torch import Tensor

from latent_codec.evaluation.cost import device_name
from latent_codec.images.sources import open_source


def pytest_report_header() -> str:
    return f"measured on {device_name('cpu')} unless a test takes fewer threads"


@pytest.fixture
def one_thread():
    """One thread of torch's, so that times compare."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def kodak(shared) -> list[Tensor]:
    """The Kodak images, (1, 3, H, W) each."""
    source = open_source(shared / "data/kodak")
    return [source.image(index, 3)[None] for index in range(len(source))]
