"""Translators between codecs: the image that the target decodes, against decoding and encoding, on 12 Kodak images.

    TRANSLATORS=runs pytest tests/benchmarks/test_translators.py -s -o addopts=

`runs` has run folders of `train translator` between the shipped codecs and TAEF2. Of each: PSNR against the image of
decode_B(translate(encode_A)), of decode_B(encode_B(decode_A(encode_A))), and of the linear map alone; and the time of
translating as a share of decode_A and encode_B, in one run and one thread, the least of three. Images are Kodak's every
other one, their middle 256 px.
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
from latent_codec.images.tensors import central_window

pytestmark = pytest.mark.skipif("TRANSLATORS" not in os.environ, reason="TRANSLATORS names a folder of runs")
NUM_IMAGES, SIDE = 12, 256


def seconds(work: Callable[[], object], repeats: int = 3) -> float:
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times[1:])


@pytest.mark.usefixtures("one_thread")
def test_translated_latents_against_decoding_and_encoding(kodak, shared):
    paths = {
        "default-f8c4": "default",
        "default-vq-f8": "default-vq",
        "taef2_encoder": shared / "checkpoints/taef2_encoder.pth",
    }
    codecs = {name: LatentCodec.from_pretrained(path) for name, path in paths.items()}
    images = torch.cat(
        [central_window(image[0], (SIDE, SIDE))[None] for image in kodak[:: len(kodak) // NUM_IMAGES]]
    )
    latents = {name: in_ones(codec.encode, images) for name, codec in codecs.items()}
    decoded = {name: in_ones(decoder(codec), latents[name]) for name, codec in codecs.items()}
    own = {name: psnr(each, images) for name, each in decoded.items()}
    rows, slow = [], {}
    for run in sorted(Path(os.environ["TRANSLATORS"]).glob("*/translator")):
        translator = LatentTranslator.from_pretrained(run).eval()
        source, target = codecs[translator.source.name], codecs[translator.target.name]
        pair = translator.source.name, translator.target.name
        if pair not in slow:
            again = in_ones(target.encode, decoded[source.name])
            slow[pair] = psnr(in_ones(decoder(target), again), images)
        of_source = latents[source.name]
        with torch.no_grad():
            linear = psnr(in_ones(decoder(target), translator.linearly(of_source)), images)
        translated = source.translate(of_source, translator)
        quick = psnr(in_ones(decoder(target), translated), images)
        whole = torch.nn.functional.interpolate(of_source[:1], (64, 96))  # of 512 x 768 px
        quick_time = seconds(lambda: source.translate(whole, translator))
        slow_time = seconds(lambda: target.encode(source.decode(whole, output_type="pt")), 1)
        rows.append(
            [
                run.parent.name,
                *pair,
                translator.num_parameters(),
                own[pair[0]],
                own[pair[1]],
                slow[pair],
                linear,
                quick,
            ]
            + [quick - slow[pair], 1e3 * quick_time, 1e3 * slow_time, 100 * quick_time / slow_time]
        )
    columns = [
        "run",
        "from",
        "to",
        "parameters",
        "A's own, dB",
        "B's own, dB",
        "decode and encode, dB",
        "linear, dB",
    ]
    columns += ["translated, dB", "difference, dB", "translate, ms", "decode and encode, ms", "share, %"]
    table(f"Latents translated, on {NUM_IMAGES} Kodak images of {SIDE} px", columns, rows)
    assert rows, "no run in TRANSLATORS"
    assert all(row[7] < row[8] for row in rows if row[3] > 10_000)  # the network is worth its time


def decoder(codec: LatentCodec) -> Callable[[Tensor], Tensor]:
    return lambda latents: codec.decode(latents, output_type="pt")


def in_ones(work: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
    return torch.cat([work(each[None]) for each in batch])


def psnr(images: Tensor, originals: Tensor) -> float:
    return float(metrics.psnr(images, originals).mean())
