"""Tiles against the untiled network: difference, seams, memory and time; diffusers' blending tiles too.

    pytest tests/benchmarks/test_tiling.py -s -o addopts=

Memory is that of a process above what it holds with the network and the latents loaded; scratch is what its nameless files
hold at most. On one core of 2.5 GHz the decodes of 2048 px take about half an hour, that of 4096 px two hours.
"""

import json
from contextlib import contextmanager
from math import isfinite

import pytest
import torch
from diffusers import AutoencoderKL
from processes import run_script
from tables import table
from torch import Tensor
from torch.nn import functional as F

from latent_codec import LatentCodec
from latent_codec.components.codec_folders import ASSETS
from latent_codec.models.tiling import decode_tiled, encode_tiled
from latent_codec.training.build import build_autoencoder
from latent_codec.training.config import load_config

pytestmark = pytest.mark.usefixtures("one_thread")

needs_default = pytest.mark.skipif(
    not (ASSETS / "default-f8c4").is_dir(), reason="needs the shipped codec latent_codec/assets/default-f8c4"
)

DECODE = """
import json, os, sys, threading, time
from pathlib import Path
import torch
from latent_codec.models.tiling import decode_tiled, encode_tiled
from latent_codec.training.build import build_autoencoder
from latent_codec.training.config import load_config

side, tile = int(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(1)
torch.set_grad_enabled(False)
autoencoder = build_autoencoder(load_config("sd-f8c4")).eval()
latents = torch.randn(1, 4, side // 8, side // 8, generator=torch.Generator().manual_seed(0))
autoencoder.decode(latents[..., :8, :8])  # so that libraries are loaded
peak = {"scratch": 0}


def memory(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def scratch():
    total = 0
    for link in Path("/proc/self/fd").iterdir():
        try:
            if "(deleted)" in os.readlink(link):
                total += os.stat(link).st_blocks * 512
        except OSError:
            pass  # closed meanwhile
    return total


def watch():
    while True:
        peak["scratch"] = max(peak["scratch"], scratch())
        time.sleep(0.05)


loaded = memory("VmRSS")
threading.Thread(target=watch, daemon=True).start()
start, cpu_start = time.perf_counter(), time.process_time()
image = decode_tiled(autoencoder.decoder, autoencoder.post_quant_conv, latents, tile) if tile else autoencoder.decode(latents).sample
seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
print(json.dumps({
    "resident": memory("VmHWM") - loaded,
    "scratch": peak["scratch"],
    "seconds": seconds,
    "cpu_seconds": cpu_seconds,
    "sample": image[..., ::61, ::53].flatten().tolist(),
}))
"""


def decode_in_a_process(side: int, tile: int | None) -> dict:
    return json.loads(run_script(DECODE, side, tile or 0).stdout.splitlines()[-1])


@contextmanager
def blending_tiles(autoencoder: AutoencoderKL, tile: int):
    """diffusers' own tiles of `tile` pixels, overlapping by a quarter."""
    autoencoder.enable_tiling()
    autoencoder.tile_sample_min_size, autoencoder.tile_latent_min_size = tile, tile // 8
    yield
    autoencoder.disable_tiling()


def seam_energy(difference: Tensor, period: int) -> float:
    """Mean absolute gradient of a difference (1, C, H, W) across borders `period` apart, over that elsewhere."""
    at_borders, elsewhere = [], []
    for axis in (2, 3):
        jumps = difference.diff(dim=axis).abs().mean((0, 1, 5 - axis))
        is_border = torch.arange(1, len(jumps) + 1) % period == 0
        at_borders.append(jumps[is_border])
        elsewhere.append(jumps[~is_border])
    return (torch.cat(at_borders).mean() / torch.cat(elsewhere).mean()).item()


def compare(title: str, autoencoder: AutoencoderKL, image: Tensor, tile: int) -> float:
    """Print how far tiles are from the untiled encoder and decoder; the largest difference of exact ones."""
    with torch.no_grad():
        latents = autoencoder.encode(image).chunk(2, 1)[0]
        decoded = autoencoder.decode(latents).sample
        tiled = (
            encode_tiled(autoencoder.encoder, autoencoder.quant_conv, image, tile).chunk(2, 1)[0],
            decode_tiled(autoencoder.decoder, autoencoder.post_quant_conv, latents, tile),
        )
        with blending_tiles(autoencoder, tile):
            blended = autoencoder.encode(image).chunk(2, 1)[0], autoencoder.decode(latents).sample
    rows = []
    for name, (its_latents, its_decoded), period in (
        ("exact", tiled, tile),
        ("diffusers' blending", blended, tile * 3 // 4),
    ):
        difference = its_decoded - decoded
        rows.append(
            [
                name,
                f"{(its_latents - latents).abs().max():.1e}",
                f"{difference.abs().max():.1e}",
                f"{difference.abs().mean():.1e}",
                f"{difference.mean((0, 2, 3)).abs().max():.1e}",
                seam_energy(difference, period),
            ]
        )
    table(
        f"{title}, tiles of {tile} px against none (latents' deviation {latents.std():.2f}, images' {decoded.std():.2f})",
        [
            "tiles",
            "latents, max",
            "images, max (goal 1e-3)",
            "mean",
            "tone shift",
            "gradient at borders / elsewhere",
        ],
        rows,
    )
    return (tiled[1] - decoded).abs().max().item()


@needs_default
def test_default_codec_at_3000x2000_by_512(kodak):
    landscapes = [each if each.shape[3] > each.shape[2] else each.mT for each in kodak]
    rows = [
        torch.cat([landscapes[(row + column) % len(kodak)] for column in range(4)], 3) for row in range(4)
    ]
    image = torch.cat(rows, dim=2)[..., :2000, :3000]
    autoencoder = LatentCodec.from_pretrained("default").autoencoder
    assert compare("3000x2000, default-f8c4", autoencoder, image, 512) <= 1e-3


def test_stable_diffusion_shape_at_1024_px(kodak):
    autoencoder = build_autoencoder(load_config("sd-f8c4")).eval()
    image = F.interpolate(kodak[0][..., :512, :512], scale_factor=2, mode="bicubic").clamp(-1, 1)
    assert compare("1024x1024, sd-f8c4's shape, random weights", autoencoder, image, 256) <= 1e-3


def test_memory_and_time_of_a_2048_px_decode():
    whole, tiled = decode_in_a_process(2048, None), decode_in_a_process(2048, 512)
    rows = [
        [
            name,
            f"{run['resident'] / 2**30:.2f}",
            f"{run['scratch'] / 2**30:.2f}",
            f"{run['seconds']:.0f}",
            f"{run['cpu_seconds']:.0f}",
        ]
        for name, run in (("512 px", tiled), ("none", whole))
    ]
    table(
        "2048x2048 decode, sd-f8c4's shape, one thread",
        ["tiles", "resident GiB", "scratch GiB", "seconds", "of which CPU"],
        rows,
    )
    print(f"resident ratio {tiled['resident'] / whole['resident']:.3f} (goal: at most 1/6)")
    print(f"time ratio {tiled['seconds'] / whole['seconds']:.2f} (goal: at most 2.5)")
    difference = max(abs(a - b) for a, b in zip(tiled["sample"], whole["sample"]))
    print(f"largest difference at {len(whole['sample'])} places: {difference:.1e}")
    assert difference <= 1e-3
    assert tiled["resident"] <= whole["resident"] / 6


def test_a_4096_px_decode_finishes():
    run = decode_in_a_process(4096, 512)
    print(
        f"\n4096x4096 decode by 512-px tiles: {run['resident'] / 2**30:.2f} GiB resident, "
        f"{run['scratch'] / 2**30:.2f} GiB scratch, {run['seconds']:.0f} s, of which CPU {run['cpu_seconds']:.0f} s"
    )
    assert all(map(isfinite, run["sample"]))
