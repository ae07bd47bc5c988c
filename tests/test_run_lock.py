"""Two trainings on one run folder: one trains, the other is told who does; a killed one is in nobody's way."""

import json
import os
import random
import re
import signal
import socket
import time
from pathlib import Path

import pytest
from helpers.processes import Process, run_forked
from helpers.training import tiny_config, write_images

from latent_codec.training.config import dump_toml
from latent_codec.training.report import read_metrics
from latent_codec.training.run_lock import lock_run

STEPS = 40
HOLD = """
import os, sys, time
from pathlib import Path
from latent_codec.training.run_lock import lock_run
with lock_run(Path(sys.argv[1])):
    print("locked", flush=True)
    while not Path(sys.argv[2]).exists():
        time.sleep(0.01)
"""
# A process that has imported everything, and trains once a file says so: when two start is then a matter of our choosing.
TRAIN = """
import sys, time
from pathlib import Path
from latent_codec.cli import main
import latent_codec.training.loop
print("ready", flush=True)
while not Path(sys.argv[1]).exists():
    time.sleep(0.001)
sys.exit(main(["train", *sys.argv[2:]]))
"""
# Python code that runs before `lock_run`, as on a file system that has no locks.
NO_LOCKS = """
import errno, fcntl
def lockf(*arguments):
    raise OSError(errno.ENOLCK, "No locks available")
fcntl.lockf = lockf
"""


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lock")
    sections = {
        "data": {"num_workers": 2},
        "run": {"steps": STEPS, "checkpoint_every": 5, "log_every": 1, "calibration_images": 0},
    }
    (folder / "tiny.toml").write_text(dump_toml(tiny_config(**sections).to_dict()))
    write_images(folder / "images")
    return [folder / "tiny.toml", "--data", folder / "images", "--out"]


def wait_for_steps(process, run, count: int) -> None:
    deadline = time.monotonic() + 240
    while len(read_metrics(run)) < count:
        assert process.poll() is None, process.read("err")
        assert time.monotonic() < deadline
        time.sleep(0.02)


def once_it_says(word: str, code, *arguments, **options) -> Process:
    process = Process(code, *arguments, **options)
    while word not in process.read("out"):
        assert process.poll() is None, process.read("err")
        time.sleep(0.01)
    return process


def ready(go: Path, *arguments) -> Process:
    """A process that trains once `go` exists."""
    return once_it_says("ready", TRAIN, go, *arguments, ACCELERATE_USE_CPU="true")


def children(pid: int) -> list[int]:
    """Loader processes, not what Python keeps for itself."""
    import psutil

    return [each.pid for each in psutil.Process(pid).children()]


def test_the_second_is_told_who_trains_and_writes_nothing(tmp_path):
    holder = once_it_says("locked", HOLD, tmp_path / "run", tmp_path / "let go")
    try:
        before = sorted(path.name for path in (tmp_path / "run").iterdir())
        expected = rf"run_folder: expected a run folder that no other process trains in, .*run.; process {holder.pid} on {re.escape(socket.gethostname())} since \d{{4}}-"
        with pytest.raises(ValueError, match=expected), lock_run(tmp_path / "run"):
            raise AssertionError("both hold the lock")
        assert sorted(path.name for path in (tmp_path / "run").iterdir()) == before
    finally:
        (tmp_path / "let go").touch()
        holder.result()
    with lock_run(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / ".lock").read_text())["process"] == os.getpid()


def test_a_folder_in_which_nothing_began_is_not_left_behind(tmp_path):
    with lock_run(tmp_path / "run"), lock_run(tmp_path / "run"):
        assert (tmp_path / "run" / ".lock").is_file()
    assert not (tmp_path / "run").exists()
    with lock_run(tmp_path / "run"):
        (tmp_path / "run" / "config.toml").touch()
    assert (tmp_path / "run" / "config.toml").is_file()


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with (
        pytest.raises(ValueError, match=r"run_folder: expected a run's folder, .*; it holds thesis.tex"),
        lock_run(tmp_path),
    ):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_forked_process_does_not_keep_the_lock(tmp_path):
    """Neither does one that lives on, nor one that ends while its parent trains."""
    code = HOLD.replace("    while", "    if os.fork() == 0:\n        time.sleep(600)\n    while")
    code = code.replace(
        "    print(", "    if os.fork() == 0:\n        os._exit(0)\n    os.wait()\n    print("
    )
    holder = once_it_says("locked", code, tmp_path / "run", tmp_path / "never")
    try:
        with pytest.raises(ValueError, match="no other process trains in"), lock_run(tmp_path / "run"):
            pass
        while not children(holder.pid):
            time.sleep(0.01)
        os.kill(holder.pid, signal.SIGKILL)
        holder.result()
        with lock_run(tmp_path / "run"):
            pass
    finally:
        os.killpg(holder.pid, signal.SIGKILL)


def test_a_file_system_without_locks_is_told_and_trained_on(tmp_path):
    (tmp_path / "let go").touch()
    done = run_forked(NO_LOCKS + HOLD, tmp_path / "run", tmp_path / "let go")
    assert done.stdout == "locked\n"
    assert "cannot be locked (No locks available), as on some network drives" in done.stderr


def test_kill_with_two_loaders_alive_and_resume_at_once(arguments, tmp_path):
    run = tmp_path / "run"
    go = [tmp_path / "first", tmp_path / "second"]
    first, second = ready(go[0], *arguments, run), ready(go[1], *arguments, run, "--set", "run.steps=12")
    go[0].touch()
    wait_for_steps(first, run, 6)
    loaders = children(first.pid)
    os.kill(first.pid, signal.SIGKILL)
    alive = [pid for pid in loaders if Path(f"/proc/{pid}").exists()]
    first.result()
    go[1].touch()
    done = second.result()
    assert len(alive) == 2
    assert done.returncode == 0, done.stderr
    steps = [line["step"] for line in read_metrics(run)]
    assert steps == list(range(1, max(steps) + 1)) and max(steps) >= 12


def test_of_two_starts_one_trains(arguments, tmp_path):
    go = [tmp_path / "first", tmp_path / "second"]
    words = [*arguments, tmp_path / "run", "--set", "run.checkpoint_every=20"]
    both = [ready(each, *words) for each in go]
    go[0].touch()
    time.sleep(random.uniform(0, 0.5))
    go[1].touch()
    done = sorted((process.result() for process in both), key=lambda each: each.returncode)
    assert [each.returncode for each in done] == [0, 2], done
    refused = done[1].stderr.strip().splitlines()
    assert re.search(r"run.; (process \d+ on .* since|another process)", refused[-1]), refused
    steps = [line["step"] for line in read_metrics(tmp_path / "run")]
    assert steps == list(range(1, STEPS + 1))
