"""Python in processes of their own, forked from one that has imported libraries, which takes seconds.

`latent_codec` is not among what that one has imported, so that a forked process is as good as a fresh one for our code.
It hashes strings by another seed than this one, as every interpreter does.
What depends on the order of imports, or on how Python itself starts and ends, needs `run_fresh`.
"""

import json
import os
import select
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from helpers import ROOT
from helpers.fork_server import ADDRESS, start_server

COMMAND = "import sys; from latent_codec.cli import main; sys.exit(main(sys.argv[1:]))"


def _environment(changes: dict[str, str]) -> dict[str, str]:
    threads = str(torch.get_num_threads())  # as many as here: sums of floats round by how they are divided
    return {**os.environ, "OMP_NUM_THREADS": threads, "PYTHONPATH": str(ROOT), **changes}


class Process:
    """Python `code` with `words` as its arguments, begun; as little of `subprocess.Popen` as tests need."""

    def __init__(self, code: str, *words, cwd: Path | None = None, **environment: str):
        self._folder = tempfile.TemporaryDirectory()
        self._streams = Path(self._folder.name)
        start_server()
        folder, path = str(cwd or Path.cwd()), str(ROOT)
        arguments = [code, list(map(str, words)), folder, _environment(environment), path, str(self._streams)]
        with socket.socket(socket.AF_UNIX) as server:
            server.connect(os.environ[ADDRESS])
            server.sendall(json.dumps(arguments).encode() + b"\n")
            self._answers = server.makefile("rb", buffering=0)
        self.pid = int(self._answers.readline())
        self._exit_code = None

    def poll(self) -> int | None:
        if self._exit_code is None and select.select([self._answers], [], [], 0)[0]:
            self._exit_code = int(self._answers.readline())
        return self._exit_code

    def read(self, stream: str) -> str:
        """What "out" or "err" has got so far."""
        path = self._streams / stream
        return path.read_text(errors="surrogateescape") if path.exists() else ""

    def result(self) -> subprocess.CompletedProcess:
        """Once it has ended."""
        select.select([self._answers], [], [])
        exit_code, out, err = self.poll(), self.read("out"), self.read("err")
        self._answers.close()
        self._folder.cleanup()
        return subprocess.CompletedProcess([], exit_code, out, err)


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
