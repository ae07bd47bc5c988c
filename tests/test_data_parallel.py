"""Two processes on the CPU (gloo), started as the manual says, against one process with the doubled batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT
from helpers.training import gradients, run_tiny, tiny_config, write_images

from latent_codec import LatentCodec
from latent_codec.training.config import dump_toml
from latent_codec.training.report import read_metrics

# The most that can go wrong between processes: a learned likelihood outside of the network, a discriminator with
# its adaptive weight, noise, accumulation.
SECTIONS = {
    "objective": {
        "reconstruction": "gaussian",
        "kl_weight": 1.0,
        "input_noise": 0.1,
        "gan_weight": 0.5,
        "gan_ramp": 1,
        "discriminator_width": 8,
        "discriminator_layers": 2,
    },
    "run": {"steps": 1, "calibration_images": 0},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folders of the run in two processes and of the one in a single process, and what the first said."""
    folder = tmp_path_factory.mktemp("parallel")
    images = write_images(folder / "images", 9)
    optimizer = {"batch_size": 2, "accumulation": 2, "clip_norm": 1e9}
    (folder / "tiny.toml").write_text(dump_toml(tiny_config(**SECTIONS, optimizer=optimizer).to_dict()))
    (images / "08.png").write_bytes(b"no image")
    command = ["accelerate", "launch", "--num_processes", "2", "-m", "latent_codec.cli", "train"]
    command[0] = str(Path(sys.executable).parent / command[0])
    if torch.accelerator.is_available():
        command.insert(2, "--cpu")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        [*command, folder / "tiny.toml", "--data", images, "--out", folder / "two"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    run_tiny(images, folder / "one", **SECTIONS, optimizer={**optimizer, "batch_size": 4})
    return folder / "two", folder / "one", process


def test_two_processes_give_the_gradients_of_the_doubled_batch(runs):
    two, one = (gradients(run / "checkpoints" / "1") for run in runs[:2])
    assert two.keys() == one.keys()
    scale = max(gradient.abs().max().item() for gradient in one.values())
    for number in one:
        # The same sums in another order: float32 rounding, through the layers, some 1e-6 of the largest gradient
        # and more on some CPUs. A process left out would move them by some 1e-1.
        torch.testing.assert_close(two[number], one[number], rtol=1e-3, atol=5e-5 * scale)


def test_two_processes_log_the_means_over_both(runs):
    two, one = (read_metrics(run)[0] for run in runs[:2])
    assert two.keys() == one.keys()
    for name in one.keys() - {"images_per_second"}:
        # the difference of two logits' means is small against either
        assert two[name] == pytest.approx(one[name], rel=1e-4, abs=1e-5), name


def test_one_process_writes_and_speaks_for_both(runs):
    folder, _, process = runs
    assert process.stdout.strip() == str(folder / "codec")
    assert "8 images a step, 2 process(es) on cpu" in process.stderr
    assert LatentCodec.from_pretrained(folder).channels == 3
