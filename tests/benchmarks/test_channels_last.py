"""Codecs on a CPU with weights laid out channels last, against the same codecs with contiguous ones; one thread.

    pytest tests/benchmarks/test_channels_last.py -s -o addopts=

The two sides take turns, and of each the least processor time counts, so that other programs on the machine fall out.
"""

import copy
import time
from collections.abc import Callable

import pytest
import torch
from diffusers import AutoencoderTiny

from latent_codec import HierarchicalVQ, LatentCodec
from latent_codec.models.memory_format import use_channels_last
from latent_codec.models.tiny_decoder import TinyDecoder

pytestmark = pytest.mark.usefixtures("one_thread")


def least_seconds(sides: dict[str, Callable[[], None]], rounds: int = 5) -> dict[str, float]:
    """Processor time of each side, the least of `rounds` turns."""
    seconds = dict.fromkeys(sides, float("inf"))
    for _ in range(rounds):
        for name, side in sides.items():
            start = time.process_time()
            side()
            seconds[name] = min(seconds[name], time.process_time() - start)
    return seconds


def compare(name: str, before: Callable[[], None], now: Callable[[], None]) -> float:
    seconds = least_seconds({"before": before, "now": now})
    ratio = seconds["now"] / seconds["before"]
    print(
        f"\n{name}: {seconds['before']:.3f} s contiguous, {seconds['now']:.3f} s as it is, ratio {ratio:.3f}"
    )
    return ratio


@pytest.mark.parametrize(
    ("name", "side"), [("default", 512), ("default-vq", 512), ("tiny", 512), ("hierarchical", 256)]
)
def test_encode_and_decode(name, side):
    build = {"tiny": AutoencoderTiny, "hierarchical": HierarchicalVQ}.get(name)
    now = LatentCodec.from_pretrained(name) if build is None else LatentCodec(build())
    before = LatentCodec(copy.deepcopy(now.autoencoder))
    before.family.channels_last = False
    image = torch.rand(3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = before.encode(image)

    def encode_and_decode(codec):
        codec.encode(image)
        codec.decode(latents, output_type="pt")

    difference = (
        (now.decode(latents, output_type="pt") - before.decode(latents, output_type="pt")).abs().max()
    )
    ratio = compare(
        f"{name}, {side} px, encode + decode",
        lambda: encode_and_decode(before),
        lambda: encode_and_decode(now),
    )
    print(f"goal of default: at most 0.82; largest difference of a decoded value {difference:.1e}")
    assert ratio > 0 and difference < 1e-3


@torch.no_grad()
def test_tiny_decoder_of_previews():
    before = TinyDecoder().eval()
    now = copy.deepcopy(before)
    use_channels_last(now)
    latents = torch.randn(1, 4, 64, 64)
    assert compare("TinyDecoder, 512 px", lambda: before(latents), lambda: now(latents)) > 0
