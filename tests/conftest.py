"""Fixtures shared by the tests, which run this checkout, on the CPU, without network."""

import gc
import os
import sys
from pathlib import Path

import pytest
from helpers import ROOT, SHARED
from helpers.fork_server import start_server

import latent_codec

# `pipelines` and `conversion` are next to the package in a checkout and inside it once installed.
latent_codec.__path__.append(str(ROOT))

os.environ.setdefault("HF_HUB_OFFLINE", "1")
gc.disable()  # until all is imported, and none of that is garbage
if "PYTEST_XDIST_WORKER" in os.environ:  # one test a core, in subprocesses too, unless told otherwise
    import torch  # here, so that the workers start before it is imported

    torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", "1")))
if (SHARED / "torch_home").is_dir():
    os.environ.setdefault("TORCH_HOME", str(SHARED / "torch_home"))


def pytest_configure(config):
    """Before workers start, which share it."""
    if getattr(config.option, "numprocesses", None):
        start_server()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of data and golden files next to the checkout; tests that need it skip without it."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the data folder {SHARED}, which is absent")
    return SHARED


@pytest.fixture(autouse=True)
def no_progress_lines(monkeypatch):
    """What is shown of work over 2 s depends on the machine's load; the tests of it set their own limits."""
    from latent_codec.cli import progress

    monkeypatch.setattr(progress, "FIRST_LINE_AFTER", float("inf"))


@pytest.fixture(autouse=True)
def small_linear_starts(monkeypatch):
    """Principal components of few crops are as much a start for trainings of two steps."""
    if task := sys.modules.get("latent_codec.training.autoencoder_task"):
        monkeypatch.setattr(task, "_LINEAR_START_VECTORS", 128)


def pytest_collection_finish():
    """Keep the garbage collector from what has been imported, through which each full collection takes 0.3 s.

    Accelerate asks for one after every training.
    """
    gc.freeze()
    gc.enable()
