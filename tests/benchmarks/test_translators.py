"""Translators between codecs: the image that the target decodes, against decoding and encoding, on 12 Kodak images.

    TRANSLATORS=runs pytest tests/benchmarks/test_translators.py -s -o addopts=

`runs` has run folders of `train translator` between the shipped codecs and TAEF2. Of each: PSNR against the image of
decode_B(translate(encode_A)), of decode_B(encode_B(decode_A(encode_A))), and of the floor, a linear map of 5 x 5 latents; and the time of
translating as a share of decode_A and encode_B: CPU time, one run and one thread, the least of three, so that what else the
machine does hardly counts. Images are Kodak's, their middle 256 px; times are of 512 x 768 px.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tables import table
from torch import Tensor

from latent_codec import LatentCodec, LatentTranslator, metrics
from latent_codec.images.sources import open_source
from latent_codec.images.tensors import central_window
from latent_codec.models.latent_translator import CodecIdentity
from latent_codec.training.translator_task import fit_in_closed_form

pytestmark = pytest.mark.skipif("TRANSLATORS" not in os.environ, reason="TRANSLATORS names a folder of runs")
NUM_IMAGES, SIDE = 12, 256
NUM_LESSONS = 100
"""Photographs that the floor is fitted to, their middles."""


def seconds(work: Callable[[], object], repeats: int = 3) -> float:
    times = []
    for _ in range(repeats + 1):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times[1:])


@pytest.mark.usefixtures("one_thread")
def test_translated_latents_against_decoding_and_encoding(kodak, shared):
    taef2 = shared / "checkpoints/taef2_encoder.pth"
    codecs = [LatentCodec.from_pretrained(path) for path in ("default", "default-vq", taef2)]
    by_name = {codec.name: codec for codec in codecs}
    chosen = kodak[:: len(kodak) // NUM_IMAGES]
    images = torch.cat([central_window(image[0], (SIDE, SIDE))[None] for image in chosen])
    rows = []
    for run in sorted(Path(os.environ["TRANSLATORS"]).glob("*/translator")):
        translator = LatentTranslator.from_pretrained(run).eval()
        ends = by_name[translator.source.name], by_name[translator.target.name]
        floor = linear_map(*ends, shared / "data/photos")
        rows.append(
            [run.parent.name, translator.num_parameters(), *measured(translator, floor, *ends, images)]
        )
        print(rows[-1])
    columns = ["run", "parameters", "A's own, dB", "B's own, dB", "decode and encode, dB", "linear, dB"]
    columns += ["translated, dB", "translate, ms", "decode and encode, ms", "share, %"]
    table(f"Latents translated, on {NUM_IMAGES} Kodak images of {SIDE} px", columns, rows)
    assert rows, "no run in TRANSLATORS"
    assert all(row[5] < row[6] for row in rows)  # the network is worth its time


@torch.no_grad()
def linear_map(source: LatentCodec, target: LatentCodec, photos: Path) -> LatentTranslator:
    ends = [CodecIdentity.of(codec).to_config() for codec in (source, target)]
    translator = LatentTranslator(*ends, kernel_size=5, num_blocks=0).eval()
    data = open_source(photos)
    chosen = [data.image(index * len(data) // NUM_LESSONS, 3) for index in range(NUM_LESSONS)]
    middles = [central_window(image, (SIDE, SIDE))[None] for image in chosen]
    fit_in_closed_form(translator, [(source.encode(each), target.encode(each)) for each in middles])
    return translator


def measured(
    translator: LatentTranslator,
    floor: LatentTranslator,
    source: LatentCodec,
    target: LatentCodec,
    images: Tensor,
) -> list[float]:
    """PSNR of each way, and the times of translating and of decoding and encoding, of 512 x 768 px."""
    latents = in_ones(source.encode, images)
    decoded = in_ones(decoder(source), latents)
    of_target = [
        in_ones(target.encode, images),
        in_ones(target.encode, decoded),
        source.translate(latents, floor),
        source.translate(latents, translator),
    ]
    factor = source.latent_space.downsampling_factor
    whole = torch.nn.functional.interpolate(latents[:1], (512 // factor, 768 // factor))
    quick = seconds(lambda: source.translate(whole, translator))
    slow = seconds(lambda: target.encode(source.decode(whole, output_type="pt")), 1)
    ways = [decoded, *(in_ones(decoder(target), each) for each in of_target)]
    return [*(psnr(each, images) for each in ways), 1e3 * quick, 1e3 * slow, 100 * quick / slow]


def decoder(codec: LatentCodec) -> Callable[[Tensor], Tensor]:
    return lambda latents: codec.decode(latents, output_type="pt")


def in_ones(work: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
    return torch.cat([work(each[None]) for each in batch])


def psnr(images: Tensor, originals: Tensor) -> float:
    return float(metrics.psnr(images, originals).mean())
