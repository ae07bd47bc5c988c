import os
from pathlib import Path

import pytest
import torch
from judges import PRESET, train_judge
from torch import Tensor

from latent_codec.evaluation.cost import device_name
from latent_codec.images.sources import SomeImages, open_source
from latent_codec.models.classifier import ImageClassifier
from latent_codec.training.config import load_config
from latent_codec.training.labelled_data import hold_out


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


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> Path:
    """Where trainings are kept: a new folder, or that of RUNS=folder, whose runs are taken as they are or continued."""
    return Path(os.environ["RUNS"]) if "RUNS" in os.environ else tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="session")
def judge(shared, runs) -> ImageClassifier:
    """Of garments: trained on the half of the images that the shipped classifier was not trained on, with a seed of its own."""
    source = open_source(shared / "data/fashion_mnist")
    shipped = load_config(PRESET)
    _, unseen = hold_out(source, shipped.data.held_out, shipped.run.seed)
    return train_judge(SomeImages(source, unseen), runs / "judge")
