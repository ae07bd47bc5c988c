"""Python in processes of their own, forked from one that has imported libraries, which takes seconds.

`latent_codec` is not among what that one has imported, so that a forked process is as good as a fresh one for our code.
It hashes strings by another seed than this one, as every interpreter does.
What depends on the order of imports, or on how Python itself starts and ends, needs `run_fresh`.
"""

import gc
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
import types
from pathlib import Path

import torch

from helpers import ROOT

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "torch",
        "accelerate",
        "datasets",
        "diffusers.models.autoencoders.autoencoder_kl",
        "diffusers.pipelines.pipeline_utils",
        "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
        "rich.progress",
        "torchmetrics",
    ]
)
COMMAND = "import sys; from latent_codec.cli import main; sys.exit(main(sys.argv[1:]))"


def _environment(changes: dict[str, str]) -> dict[str, str]:
    threads = str(torch.get_num_threads())  # as many as here: sums of floats round by how they are divided
    return {**os.environ, "OMP_NUM_THREADS": threads, "PYTHONPATH": str(ROOT), **changes}


def _become(code: str, words: list[str], folder: Path, environment: dict[str, str], streams: Path) -> None:
    gc.freeze()  # as in tests/conftest.py
    os.setsid()  # a process group of its own, as a terminal's commands have
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(streams / name, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, number)
        os.close(file)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    multiprocessing.set_start_method("fork", force=True)  # as programs have it
    sys.modules["torch"].set_num_threads(int(environment["OMP_NUM_THREADS"]))
    sys.path[:] = [str(ROOT), *(path for path in sys.path if path != str(ROOT))]
    sys.argv = ["-c", *words]
    sys.modules["__main__"] = main = types.ModuleType("__main__")
    exec(compile(code, "<test>", "exec"), vars(main))


class Process:
    """Python `code` with `words` as its arguments, begun; as little of `subprocess.Popen` as tests need."""

    def __init__(self, code: str, *words, cwd: Path | None = None, **environment: str):
        self._folder = tempfile.TemporaryDirectory()
        self._streams = Path(self._folder.name)
        self._process = FORKS.Process(
            target=_become,
            args=(code, list(map(str, words)), cwd or Path.cwd(), _environment(environment), self._streams),
        )
        self._process.start()
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def read(self, stream: str) -> str:
        """What "out" or "err" has got so far."""
        path = self._streams / stream
        return path.read_text(errors="surrogateescape") if path.exists() else ""

    def result(self) -> subprocess.CompletedProcess:
        """Once it has ended."""
        self._process.join()
        out, err = self.read("out"), self.read("err")
        self._folder.cleanup()
        return subprocess.CompletedProcess([], self.poll(), out, err)


def run_forked(code: str, *words, check: bool = True, **options) -> subprocess.CompletedProcess:
    """Python `code` in a forked process, which must succeed if `check`."""
    done = Process(code, *words, **options).result()
    assert not check or done.returncode == 0, done.stderr
    return done


def run_two(code: str, *words, **environment: str) -> subprocess.CompletedProcess:
    """Python `code` in two processes, as launchers leave them; what the first said.

    tests/test_data_parallel.py starts a launcher.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", **environment}
    both = [Process(code, *words, RANK=rank, LOCAL_RANK=rank, **meeting) for rank in "01"]
    first, second = (process.result() for process in both)
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    return first


def run_fresh(
    code: str, *words, check: bool = True, cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess:
    """Python `code` in an interpreter that has imported nothing."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, words)],
        cwd=cwd,
        env=_environment(environment),
        capture_output=True,
        text=True,
    )
    assert not check or done.returncode == 0, done.stderr
    return done
