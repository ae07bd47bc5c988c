"""What the command line loads before it refuses an argument, and what it does without a standard output."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import sys
from latent_codec.cli import main
try:
    status = main(sys.argv[1:])
except SystemExit as end:
    status = end.code
assert not {"torch", "numpy", "diffusers"} & sys.modules.keys(), "libraries were loaded"
sys.exit(status)
"""

REFUSALS = [
    "calibrate x --dtype bfloat16",
    "compress nowhere.png",
    "compress . --quality -1",
    "compress . --target-bpp 0",
    "compress . --tile -1",
    "convert x.ckpt new.bin --to ldm",
    "decode nowhere.safetensors",
    "decompress . --tile -1",
    "decompress x.lcf --latents --format png",
    "encode nowhere.png",
    "encode . --shard 0",
    "evaluate . --label 3",
    "fit-entropy . --limit 0",
    "fit-preview --limit 0",
    "info . --data .",
    "info . --verbose",
    "pipeline --prior a a a a --out new",
    "rd . --bpp many",
    "roundtrip nowhere.png",
    "sample --num 0",
    "train nothing --data .",
    "train autoencoder",
    "train --unknown",
    "ui --pipeline nowhere",
    "ui --port 0",
]


@pytest.mark.parametrize("command", REFUSALS)
def test_an_argument_is_refused_before_any_library_is_loaded(command, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *command.split()], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2 and len(complaints(done.stderr)) == 1, done.stderr
    assert not list(tmp_path.iterdir())


def complaints(err: str) -> list[str]:
    """Lines of standard error without progress, which a busy machine shows."""
    return [line for line in err.splitlines() if not line.startswith("loading libraries")]


def run(command: list[str], redirection: str) -> subprocess.CompletedProcess:
    shell = f'exec "$@" {redirection}'
    call = ["bash", "-c", shell, "bash", sys.executable, "-m", "latent_codec.cli", *command]
    return subprocess.run(call, capture_output=True, text=True)


@pytest.mark.skipif(os.name != "posix", reason="needs a POSIX shell")
@pytest.mark.parametrize(
    ("redirection", "status"),
    [(">&-", 0), ("2>&-", 0), (">&- 2>&-", 0), (">/dev/full", 2), ("| head -c 0", 0)],
)
def test_without_a_standard_output_there_is_no_traceback(redirection, status):
    if "full" in redirection and not os.path.exists("/dev/full"):
        pytest.skip("there is no /dev/full")
    done = run(["info", "default"], redirection)
    assert done.returncode == status
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr
    if status:
        assert len(complaints(done.stderr)) == 1 and "No space left on device" in done.stderr


@pytest.mark.skipif(os.name != "posix", reason="needs a POSIX shell")
def test_a_refusal_is_one_without_a_standard_error_too():
    assert run(["info", "nowhere"], "2>&-").returncode == 2
