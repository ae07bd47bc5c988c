"""Translators between codecs: the image that the target decodes, against decoding and encoding, on 12 Kodak images.

    TRANSLATORS=runs pytest tests/benchmarks/test_translators.py -s -o addopts=

`runs` has run folders of `train translator` between the shipped codecs and TAEF2. Of each: PSNR against the image of
decode_B(translate(encode_A)), of decode_B(encode_B(decode_A(encode_A))), and of the floor, a linear map of 5 x 5 latents; and the time of
translating as a share of decode_A and encode_B: CPU time, one run and one thread, the least of three, so that what else the
machine does hardly counts. Images are Kodak's, their middle 256 px; times are of 512 x 768 px.

With DENOISER=folder, a denoiser that `latent-codec diffusability faces --codec default` left below its --out, also the Frechet distance
of its samples: decoded by the shipped codec, and through each translator from it by the translator's target.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DiTTransformer2DModel
from tables import table
from torch import Tensor

from latent_codec import LatentCodec, LatentTranslator, metrics
from latent_codec.evaluation.denoisers import sample
from latent_codec.evaluation.diffusability import decode_squares
from latent_codec.evaluation.frechet import feature_network, features_of
from latent_codec.images.sources import open_source
from latent_codec.images.tensors import central_window, fit_square, to_uint8
from latent_codec.models.latent_translator import CodecIdentity
from latent_codec.training.translator_task import fit_in_closed_form

pytestmark = pytest.mark.skipif("TRANSLATORS" not in os.environ, reason="TRANSLATORS names a folder of runs")
NUM_IMAGES, SIDE = 12, 256
NUM_LESSONS = 40
"""Photographs that the floor is fitted to, their middles."""
NUM_SAMPLES, NUM_FACES = 256, 600


def seconds(work: Callable[[], object], repeats: int = 3) -> float:
    times = []
    for _ in range(repeats + 1):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times[1:])


@pytest.mark.usefixtures("one_thread")
def test_translated_latents_against_decoding_and_encoding(kodak, shared):
    by_name = codecs(shared)
    chosen = kodak[:: len(kodak) // NUM_IMAGES]
    images = torch.cat([central_window(image[0], (SIDE, SIDE))[None] for image in chosen])
    rows = []
    for name, translator in translators().items():
        ends = by_name[translator.source.name], by_name[translator.target.name]
        floor = linear_map(*ends, shared / "data/photos")
        rows.append([name, translator.num_parameters(), *measured(translator, floor, *ends, images)])
        print(rows[-1])
    columns = ["run", "parameters", "A's own, dB", "B's own, dB", "decode and encode, dB", "linear, dB"]
    columns += ["translated, dB", "translate, ms", "decode and encode, ms", "share, %"]
    table(f"Latents translated, on {NUM_IMAGES} Kodak images of {SIDE} px", columns, rows)
    assert rows, "no run in TRANSLATORS"
    assert all(row[5] < row[6] for row in rows)  # the network is worth its time


@pytest.mark.skipif("DENOISER" not in os.environ, reason="DENOISER names the folder of a denoiser")
def test_samples_decoded_by_another_codec(shared):
    denoiser = DiTTransformer2DModel.from_pretrained(os.environ["DENOISER"]).eval()
    network, by_name = feature_network(), codecs(shared)
    source = by_name["default-f8c4"]
    faces = open_source(shared / "data/faces/faces-train.tar")
    side = source.latent_space.downsampling_factor * denoiser.config.sample_size
    chosen = (faces.image(index * len(faces) // NUM_FACES, 3) for index in range(NUM_FACES))
    real = features_of(torch.stack([to_uint8(fit_square(image, side)) for image in chosen]), network)
    latents = sample(denoiser, NUM_SAMPLES)

    def distance(codec: LatentCodec, latents: Tensor) -> float:
        return metrics.frechet_distance(features_of(decode_squares(codec, latents), network), real)

    own = distance(source, latents)
    rows = [["its own codec", own, 1.0]]
    for name, translator in translators().items():
        if translator.source.name == source.name:
            found = distance(by_name[translator.target.name], source.translate(latents, translator))
            rows.append([name, found, found / own])
    table(
        f"{NUM_SAMPLES} samples of a denoiser against {NUM_FACES} faces, {network.name}",
        ["decoded by", "Frechet distance", "of the first"],
        rows,
    )
    assert min(row[2] for row in rows[1:]) < 1.1


def codecs(shared: Path) -> dict[str, LatentCodec]:
    paths = "default", "default-vq", shared / "checkpoints/taef2_encoder.pth"
    return {codec.name: codec for codec in map(LatentCodec.from_pretrained, paths)}


def translators() -> dict[str, LatentTranslator]:
    runs = sorted(Path(os.environ["TRANSLATORS"]).glob("*/translator"))
    return {run.parent.name: LatentTranslator.from_pretrained(run).eval() for run in runs}


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
