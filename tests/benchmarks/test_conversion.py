"""What converting a Stable-Diffusion-shaped autoencoder costs: seconds, and memory against the file's size.

pytest tests/benchmarks/test_conversion.py -s -o addopts=
"""

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from processes import run_script
from safetensors.torch import save_file
from tables import table

from latent_codec.conversion import from_diffusers
from latent_codec.training.build import build_autoencoder
from latent_codec.training.config import load_config

CONVERT = """
import json, sys, time
from pathlib import Path
import diffusers.models.modeling_utils
from latent_codec.cli import main
import latent_codec.cli.work.convert, latent_codec.codec, latent_codec.conversion.writing, latent_codec.conversion.foreign

def kilobytes(name):
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))

Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
before, start = kilobytes("VmRSS:"), time.perf_counter()
assert main(["convert", *sys.argv[1:], "--json"]) == 0
seconds = time.perf_counter() - start
print(json.dumps([seconds, (kilobytes("VmHWM:") - before) * 1024]), file=sys.stderr)
"""


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_memory_and_time_of_a_stable_diffusion_shape(tmp_path, suffix):
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("peak memory is read from /proc")
    torch.manual_seed(0)
    component = build_autoencoder(load_config("sd-f8c4"))
    assert isinstance(component, AutoencoderKL)
    source, folder, back = tmp_path / f"vae{suffix}", tmp_path / "folder", tmp_path / f"back{suffix}"
    state = from_diffusers(component, "ldm")
    if suffix == ".safetensors":
        save_file(state, source)
    else:
        torch.save({"state_dict": state}, source)
    size = source.stat().st_size
    rows = []
    for name, arguments in (
        ("to a diffusers folder", [source, folder, "--scale", "sd1"]),
        ("and back", [folder, back, "--to", "ldm"]),
    ):
        run = run_script(CONVERT, *arguments)
        seconds, memory = json.loads(run.stderr.strip().splitlines()[-1])
        rows.append([name, size / 1e6, seconds, memory / 1e6, memory / size])
    table(
        f"{suffix}, 83.7 M parameters in float32",
        [
            "conversion",
            "file, MB",
            "seconds",
            "peak above the imported process, MB",
            "of the file (goal: 2.2)",
        ],
        rows,
    )
    assert all(row[-1] > 0 for row in rows)
