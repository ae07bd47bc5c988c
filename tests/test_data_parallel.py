"""Two processes on the CPU (gloo), started as the manual says, against one process with the doubled batch."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import ROOT
from helpers.processes import COMMAND, Process
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

# In place of the command line, which begins alike: each of its processes tells its environment and its arguments, and
# lives, as the launcher does, until they have served.
LAUNCHED = """
import json, os, sys, time
from pathlib import Path
if "RANK" not in os.environ:
    from latent_codec.training.processes import start_missing_processes
    start_missing_processes()
told, *words = sys.argv[1:]
file = Path(told, os.environ["RANK"])
file.with_suffix(".partial").write_text(json.dumps([dict(os.environ), words]))
file.with_suffix(".partial").rename(file)
while not Path(told, "done").exists():
    time.sleep(0.05)
"""


def launch(told: Path, *words) -> list[subprocess.CompletedProcess]:
    """The command line in two processes as `accelerate launch` starts them, but forked: importing takes 9 s in each."""
    told.mkdir()
    (told / "launched.py").write_text(LAUNCHED)
    command = [Path(sys.executable).parent / "accelerate", "launch", "--num_processes", "2"]
    if torch.accelerator.is_available():
        command.append("--cpu")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{told}"}
    launcher = subprocess.Popen(
        [*command, "-m", "launched", told, *words], env=environment, stderr=subprocess.PIPE, text=True
    )
    ranks = [told / "0", told / "1"]
    try:
        while not all(rank.exists() for rank in ranks):
            assert launcher.poll() is None, launcher.stderr.read()
            time.sleep(0.05)
        found = [json.loads(rank.read_text()) for rank in ranks]
        both = [Process(COMMAND, *arguments, **variables) for variables, arguments in found]
        results = [process.result() for process in both]
    finally:
        (told / "done").touch()
    _, said = launcher.communicate()
    assert launcher.returncode == 0, said
    return results


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folders of the run in two processes and of the one in a single process, and what the first said."""
    folder = tmp_path_factory.mktemp("parallel")
    images = write_images(folder / "images", 9)
    optimizer = {"batch_size": 2, "accumulation": 2, "clip_norm": 1e9}
    (folder / "tiny.toml").write_text(dump_toml(tiny_config(**SECTIONS, optimizer=optimizer).to_dict()))
    (images / "08.png").write_bytes(b"no image")
    train = ["train", folder / "tiny.toml", "--data", images, "--out", folder / "two"]
    first, second = launch(folder / "told", *train)
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert second.stdout == ""
    run_tiny(images, folder / "one", **SECTIONS, optimizer={**optimizer, "batch_size": 4})
    return folder / "two", folder / "one", first


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
