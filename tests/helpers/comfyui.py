"""A ComfyUI server of its own, on loopback and on the CPU, and what it is asked through HTTP and its WebSocket."""

import base64
import io
import json
import os
import shutil
import socket
import struct
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from uuid import uuid4

from PIL import Image

from helpers import ROOT


class ComfyUI:
    """A server that runs until `close`, in a base folder of its own.

    Args:
        checkout: of ComfyUI.
        python: of an environment that has what ComfyUI and latent_codec need.
        base: where its custom_nodes, input, output and models are.
    """

    def __init__(self, checkout: Path, python: str, base: Path):
        self.base = base
        for name in ("custom_nodes", "input", "output", "models", "user", "temp"):
            (base / name).mkdir(exist_ok=True)
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self._log = base / "server.log"
        arguments = [
            *(
                "main.py",
                "--cpu",
                "--listen",
                "127.0.0.1",
                "--port",
                str(self.port),
                "--base-directory",
                base,
            ),
            *("--database-url", "sqlite:///:memory:", "--disable-api-nodes", "--disable-auto-launch"),
            *("--preview-method", "latent2rgb"),
        ]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [python, *map(str, arguments)], cwd=checkout, env=environment, stdout=log, stderr=log
            )
        self._wait_for_start()

    def _wait_for_start(self) -> None:
        for _ in range(600):
            assert self._process.poll() is None, self.log
            try:
                self.get("/system_stats")
                return
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.5)
        raise AssertionError(self.log)

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(60)

    def get(self, path: str) -> dict:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=60) as answer:
            return json.load(answer)

    def post(self, path: str, data: dict) -> dict:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            json.dumps(data).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.loads(answer.read() or b"{}")
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode()) from error

    def queue(self, workflow: dict, client: str = "") -> str:
        return self.post("/prompt", {"prompt": workflow, "client_id": client})["prompt_id"]

    def result(self, prompt: str) -> dict:
        """What the history says of a prompt, once it has ended."""
        for _ in range(2400):
            history = self.get(f"/history/{prompt}")
            if prompt in history:
                return history[prompt]
            assert self._process.poll() is None, self.log
            time.sleep(0.05)
        raise AssertionError(self.log)

    def run(self, workflow: dict) -> dict:
        """The outputs of a workflow in API format, by node; it must succeed."""
        found = self.result(self.queue(workflow))
        assert found["status"]["status_str"] == "success", json.dumps(found["status"], indent=1)
        return found["outputs"]

    def error(self, workflow: dict) -> str:
        """The message that a workflow fails with."""
        messages = dict(self.result(self.queue(workflow))["status"]["messages"])
        return messages["execution_error"]["exception_message"].strip()

    def path(self, file: dict) -> Path:
        """Of a file that a node says it has written."""
        return self.base / file["type"] / file["subfolder"] / file["filename"]


class Listener:
    """A client of the server's WebSocket: as little of RFC 6455 as it takes to read what a server sends."""

    def __init__(self, server: ComfyUI):
        self.client = uuid4().hex
        self._socket = socket.create_connection(("127.0.0.1", server.port), timeout=120)
        key = base64.b64encode(os.urandom(16)).decode()
        self._socket.sendall(
            f"GET /ws?clientId={self.client} HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nUpgrade: websocket\r\n"
            f"Connection: Upgrade\r\nSec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        self._stream = self._socket.makefile("rb")
        assert b" 101 " in self._stream.readline()
        while self._stream.readline() != b"\r\n":
            pass

    def close(self) -> None:
        self._stream.close()
        self._socket.close()

    def message(self) -> tuple[str, dict] | Image.Image:
        """The next message: its type and data, or a preview."""
        data = b""
        while True:
            head, length = self._stream.read(2)
            if length > 125:
                size, form = {126: (2, ">H"), 127: (8, ">Q")}[length]
                (length,) = struct.unpack(form, self._stream.read(size))
            data += self._stream.read(length)
            if head & 0x80:
                break
        if head & 0xF == 1:
            message = json.loads(data)
            return message["type"], message["data"]
        return Image.open(io.BytesIO(data[8:]))  # after the kinds of message and of image

    def until_end(self, prompt: str) -> list:
        """All messages up to the end of a prompt."""
        found = []
        while True:
            found.append(self.message())
            match found[-1]:
                case (
                    "execution_success" | "execution_error" | "execution_interrupted",
                    {"prompt_id": ended},
                ):
                    if ended == prompt:
                        return found


def copy_nodes(base: Path) -> None:
    """Give a server the tiny model of tests."""
    shutil.copy(Path(__file__).with_name("comfyui_model.py"), base / "custom_nodes" / "tiny_model.py")
