"""A process that has imported libraries and forks others: one for all workers of a run of tests.

A connection sends, as a line of JSON, the arguments of `become`. It gets a line with the forked process's number, and
one with its exit code once that has ended. The server imports at its first connection, and ends with its parent.
"""

import atexit
import gc
import importlib
import json
import multiprocessing
import os
import shutil
import socketserver
import subprocess
import sys
import tempfile
import types
from pathlib import Path

LIBRARIES = [
    "torch",
    "accelerate",
    "datasets",
    "diffusers.models.autoencoders.autoencoder_kl",
    "diffusers.pipelines.pipeline_utils",
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
    "rich.progress",
    "torchmetrics",
]
ADDRESS = "TESTS_FORK_SERVER"  # its socket, in the environment
FORK = multiprocessing.get_context("fork")


def start_server() -> None:
    """Start the process that forks others, for this process and those that it starts."""
    if ADDRESS in os.environ:
        return
    address = Path(tempfile.mkdtemp(prefix="forks-"), "socket")
    server = subprocess.Popen(
        [sys.executable, "-P", __file__, address],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,  # Ctrl-C is for the tests
    )
    server.stdout.readline()  # it listens
    os.environ[ADDRESS] = str(address)
    atexit.register(server.terminate)
    atexit.register(shutil.rmtree, address.parent)


def become(code: str, words: list[str], folder: str, environment: dict[str, str], path: str, streams: str):
    """Python with `code`, as far as the code can tell."""
    gc.freeze()  # as in tests/conftest.py
    os.setsid()  # a process group of its own, as a terminal's commands have
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(Path(streams, name), os.O_WRONLY | os.O_CREAT)
        os.dup2(file, number)
        os.close(file)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.modules["torch"].set_num_threads(int(environment["OMP_NUM_THREADS"]))
    sys.path[:] = [path, *(each for each in sys.path if each != path)]
    sys.argv = ["-c", *words]
    sys.modules["__main__"] = main = types.ModuleType("__main__")
    exec(compile(code, "<test>", "exec"), vars(main))


class Handler(socketserver.StreamRequestHandler):
    """In a process of its own, the parent of the one that is asked for."""

    def handle(self) -> None:
        process = FORK.Process(target=become, args=json.loads(self.rfile.readline()))
        process.start()
        self.wfile.write(b"%d\n" % process.pid)
        process.join()
        self.wfile.write(b"%d\n" % process.exitcode)


class Server(socketserver.ForkingMixIn, socketserver.UnixStreamServer):
    request_queue_size = 64
    block_on_close = False
    parent = os.getppid()

    def verify_request(self, *_) -> bool:
        for name in LIBRARIES:
            importlib.import_module(name)
        return True

    def service_actions(self) -> None:
        super().service_actions()
        if os.getppid() != self.parent:
            sys.exit()


if __name__ == "__main__":
    with Server(sys.argv[1], Handler) as server:
        print(flush=True)
        server.serve_forever()
