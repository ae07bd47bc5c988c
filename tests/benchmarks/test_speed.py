"""Speed as ratios within one run: against diffusers' tiny autoencoder, a bare training loop, torch.compile.

    pytest tests/benchmarks/test_speed.py -s -o addopts=

The two sides of a ratio take turns, so that whatever else the machine does falls on both.
"""

import json
import statistics
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from PIL import Image
from torch.nn import functional as F

from latent_codec import LatentCodec
from latent_codec.components.codec_folders import ASSETS
from latent_codec.images.sources import open_source
from latent_codec.metrics import psnr
from latent_codec.training.build import build_autoencoder
from latent_codec.training.config import load_config
from latent_codec.training.loop import train

ROUNDS = 10
needs_default = pytest.mark.skipif(
    not (ASSETS / "default-f8c4").is_dir(), reason="needs the shipped codec latent_codec/assets/default-f8c4"
)


def median_seconds(sides: dict[str, Callable], rounds: int = ROUNDS) -> dict[str, float]:
    """Median time of each side over `rounds` turns, after one turn to warm up."""
    times = {name: [] for name in sides}
    for turn in range(rounds + 1):
        for name, side in sides.items():
            start = time.perf_counter()
            side()
            if turn:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def roundtrip(autoencoder, image: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        encoded = autoencoder.encode(image)
        latents = encoded.latents if "latents" in encoded else encoded.latent_dist.mode()
        return autoencoder.decode(latents).sample


@needs_default
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_roundtrip_of_512_px_against_autoencoder_tiny(dtype):
    image = torch.rand(1, 3, 512, 512, dtype=dtype) * 2 - 1
    ours = LatentCodec.from_pretrained("default", dtype=dtype).autoencoder
    tiny = AutoencoderTiny().eval().to(dtype)

    seconds = median_seconds(
        {"default": lambda: roundtrip(ours, image), "tiny": lambda: roundtrip(tiny, image)}
    )

    ratio = seconds["default"] / seconds["tiny"]
    print(
        f"\n512x512 encode + decode, {dtype}: {seconds['default']:.2f} s, AutoencoderTiny {seconds['tiny']:.2f} s"
    )
    print(f"ratio {ratio:.2f} (goal: at most 1.25)")
    assert roundtrip(ours, image).shape == image.shape


def test_training_step_of_the_stable_diffusion_shape_against_a_bare_loop(tmp_path):
    steps, size = 4, 256
    rng = np.random.default_rng(0)
    images = tmp_path / "images"  # apart from the runs, whose samples are images, too
    images.mkdir()
    for index in range(4):
        pixels = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / f"{index}.png")
    overrides = [
        f"run.steps={steps}",
        "run.log_every=1",
        "run.checkpoint_every=1000",
        f"data.height={size}",
        "optimizer.batch_size=1",
        "optimizer.accumulation=1",
        "objective.reconstruction=l1",
        "objective.lpips_weight=0",
        "objective.gan_weight=0",
    ]
    config = load_config("sd-f8c4", overrides)
    autoencoder = build_autoencoder(config)
    image = torch.rand(1, 3, size, size) * 2 - 1

    def our_steps(out) -> list[float]:
        train(config, autoencoder, open_source(images), out)
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        return [1 / line["images_per_second"] for line in lines[1:]]

    def bare_steps() -> list[float]:
        optimizer = torch.optim.AdamW(
            autoencoder.parameters(), lr=1e-6, betas=config.optimizer.betas, weight_decay=0, fused=True
        )
        seconds = []
        for _ in range(steps):
            start = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=config.run.precision == "bf16"):
                posterior = autoencoder.encode(image).latent_dist
                decoded = autoencoder.decode(posterior.sample()).sample
            kl = posterior.kl().sum() / image.numel()
            loss = F.l1_loss(decoded.float(), image) + config.objective.kl_weight * kl
            loss.backward()
            torch.nn.utils.clip_grad_norm_(autoencoder.parameters(), config.optimizer.clip_norm)
            optimizer.step()
            optimizer.zero_grad()
            seconds.append(time.perf_counter() - start)
        return seconds[1:]

    ours, bare = [], []
    for turn in range(2):
        bare += bare_steps()
        ours += our_steps(tmp_path / f"run{turn}")

    ratio = statistics.median(ours) / statistics.median(bare)
    print(f"\ntraining step, 83.7 M parameters, batch 1 of {size} px, {config.run.precision}: ", end="")
    print(f"{statistics.median(ours):.2f} s, bare loop {statistics.median(bare):.2f} s")
    print(f"ratio {ratio:.3f} (goal: at most 1.0)")
    assert len(ours) == len(bare)


@needs_default
def test_compiled_encode_and_decode():
    image = torch.rand(1, 3, 512, 512) * 2 - 1
    eager = LatentCodec.from_pretrained("default").autoencoder
    compiled = LatentCodec.from_pretrained("default").autoencoder
    compiled.encoder = torch.compile(compiled.encoder)
    compiled.decoder = torch.compile(compiled.decoder)

    # Fused kernels sum in another order: float32 rounding, on values of about 1.
    torch.testing.assert_close(roundtrip(compiled, image), roundtrip(eager, image), atol=2e-3, rtol=0)
    seconds = median_seconds(
        {"eager": lambda: roundtrip(eager, image), "compiled": lambda: roundtrip(compiled, image)}
    )

    print(
        f"\n512x512 encode + decode, eager {seconds['eager']:.2f} s, torch.compile {seconds['compiled']:.2f} s"
    )
    print(f"speed ratio {seconds['eager'] / seconds['compiled']:.2f}")


@needs_default
def test_bfloat16_parity_on_kodak(shared):
    """float16, whose convolutions crawl on a CPU, is measured by `latent-codec calibrate`."""
    source = open_source(shared / "data" / "kodak")
    scores = {}
    for dtype in (torch.float32, torch.bfloat16):
        codec = LatentCodec.from_pretrained("default", dtype=dtype)
        values = []
        for index in range(len(source)):
            image = source.read(index).float()[None] / 127.5 - 1
            decoded = codec.decode(codec.encode(image), output_type="pt")
            values.append(psnr(decoded, image).item())
        scores[dtype] = statistics.mean(values)
    print()
    for dtype, score in scores.items():
        print(f"{dtype!s:16} {score:.3f} dB ({score - scores[torch.float32]:+.3f})")
    assert scores[torch.float32] - scores[torch.bfloat16] <= 0.05


@needs_default
def test_codec_call_overhead(benchmark):
    """What LatentCodec adds to its autoencoder on a small image, in pytest-benchmark's table."""
    codec = LatentCodec.from_pretrained("default")
    image = torch.zeros(3, 64, 64)
    benchmark(lambda: codec.decode(codec.encode(image), output_type="pt"))


def test_default_shape_matches_the_preset():
    """The shipped weights are the preset's network, so that the ratios above speak of it."""
    if not (ASSETS / "default-f8c4").is_dir():
        pytest.skip("needs the shipped codec latent_codec/assets/default-f8c4")
    shipped = AutoencoderKL.from_pretrained(ASSETS / "default-f8c4")
    built = build_autoencoder(load_config("default-f8c4"))
    assert {k: v.shape for k, v in shipped.state_dict().items()} == {
        k: v.shape for k, v in built.state_dict().items()
    }
