"""Runs in processes of their own: killed at random, killed in the middle of a checkpoint, stopped by Ctrl-C."""

import os
import random
import signal
import time

import pytest
import torch
from helpers.processes import Process, run_forked
from helpers.training import tiny_config, weights, write_images

from latent_codec import LatentCodec
from latent_codec.training.checkpoints import latest_checkpoint
from latent_codec.training.config import dump_toml
from latent_codec.training.report import read_metrics

STEPS = 20

# Train the same run to its end in every folder given; what a real disk does at any moment, `DIE_AT` does at a
# moment of our choosing: the process is killed when the optimizer's part of that checkpoint is half written.
SCRIPT = """
import os, signal, sys
import torch
from latent_codec.cli import main

save = torch.save
def die(state, file):
    save(state, file)
    if os.path.basename(os.path.dirname(file.name)) == os.environ.get("DIE_AT"):
        file.truncate(file.tell() // 2)
        os.kill(os.getpid(), signal.SIGKILL)
torch.save = die
preset, images, *runs = sys.argv[1:]
sys.exit(max(main(["train", preset, "--data", images, "--out", run]) for run in runs))
"""


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    sections = {
        "objective": {"kl_weight": 1e-3, "input_noise": 0.1},
        "data": {"num_workers": 1},
        "run": {"steps": STEPS, "checkpoint_every": 4, "log_every": 5, "calibration_images": 0},
    }
    (folder / "tiny.toml").write_text(dump_toml(tiny_config(**sections).to_dict()))
    write_images(folder / "images")
    return [SCRIPT, folder / "tiny.toml", folder / "images"]


def wait_for_step(process, run, step) -> None:
    """Until `run` has logged `step`."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        lines = read_metrics(run)
        if lines and lines[-1]["step"] >= step:
            return
        assert process.poll() is None, process.read("err")
        time.sleep(0.01)
    raise AssertionError(f"step {step} was not reached")


def averages(run) -> dict[str, torch.Tensor]:
    """The averaged weights of a run's newest checkpoint."""
    stored = weights(latest_checkpoint(run), "ema")
    return {
        key.removeprefix("module."): tensor for key, tensor in stored.items() if key.startswith("module.")
    }


def test_killed_runs_go_on_to_the_weights_of_an_uninterrupted_one(command, tmp_path):
    whole, killed, torn = tmp_path / "whole", tmp_path / "killed", tmp_path / "torn"

    process = Process(*command, killed)
    wait_for_step(process, killed, random.randrange(5, 11))
    os.killpg(process.pid, signal.SIGKILL)
    process.result()
    assert latest_checkpoint(killed) is None or int(latest_checkpoint(killed).name) < STEPS

    assert run_forked(*command, torn, check=False, DIE_AT="12").returncode == -signal.SIGKILL
    assert sorted(path.name[:4] for path in (torn / "checkpoints").iterdir()) == [".12.", "4", "8"]
    averaged, codec = averages(torn), LatentCodec.from_pretrained(torn).autoencoder.state_dict()
    assert averaged.keys() == codec.keys() and all(torch.equal(codec[key], averaged[key]) for key in codec)

    run_forked(*command, killed, torn, whole)

    for run in (killed, torn):
        for name in ("model", "ema"):
            expected, found = (weights(each / "checkpoints" / str(STEPS), name) for each in (whole, run))
            assert expected.keys() == found.keys()
            assert all(torch.equal(found[key], expected[key]) for key in expected), (run.name, name)
        assert not list(run.rglob("*.partial"))
        expected, found = (
            [{**line, "images_per_second": None} for line in read_metrics(each)] for each in (whole, run)
        )
        assert found == expected
        assert [line["step"] for line in found] == list(range(5, STEPS + 1, 5))
        assert (run / "codec" / "config.json").is_file()


def test_ctrl_c_reaches_the_loader_too_and_still_ends_on_a_checkpoint(command, tmp_path):
    process = Process(*command, tmp_path / "run")
    wait_for_step(process, tmp_path / "run", 5)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: every process of the group
    done = process.result()

    assert done.returncode == 128 + signal.SIGINT, done.stderr
    assert "stopping after this step, with a checkpoint" in done.stderr
    stopped = int(latest_checkpoint(tmp_path / "run").name)
    assert 5 <= stopped < STEPS
    assert (
        f"training_steps: {stopped}\nunfinished: true\n"
        in (tmp_path / "run" / "codec" / "README.md").read_text()
    )
    averaged = averages(tmp_path / "run")
    codec = LatentCodec.from_pretrained(tmp_path / "run").autoencoder.state_dict()
    assert averaged.keys() == codec.keys() and all(torch.equal(codec[key], averaged[key]) for key in codec)
