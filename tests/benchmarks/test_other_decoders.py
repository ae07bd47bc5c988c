"""Other decoders for the shipped codec's latents: how much faster a distilled one is, and whether one that enlarges is sharper
than bicubic enlargement.

    RUNS=folder pytest tests/benchmarks/test_other_decoders.py -s -o addopts=

trains both as their presets do, for few steps, or takes them from the folder where they are finished, and prints tables over
the middle 384 px of the Kodak images. Times are those of one thread, decoders alternating, the median of `ROUNDS`; for the second table
images are shrunk by two first, encoded, and decoded to their size again. Needs the data folder next to the checkout; about
15 minutes of one idle core.
"""

import time
from statistics import median

import pytest
import torch
from tables import table
from torch import Tensor

import latent_codec
from latent_codec import LatentCodec, metrics
from latent_codec.evaluation.reconstruction import reconstruct
from latent_codec.images.tensors import center_crop, shrunk_by

pytestmark = pytest.mark.usefixtures("one_thread")

ROUNDS = 5
SMALLER = "model.widths=[32, 48, 128, 128]", "model.layers_per_block=0"
SHORT = "run.precision=fp32", "run.calibration_images=0"
DISTILLING = "run.steps=200", "data.height=96", "optimizer.ema_decay=0.98", "optimizer.warmup_steps=10"
ENLARGING = "run.steps=60", "data.height=192", "optimizer.ema_decay=0.9", "optimizer.warmup_steps=5"


@pytest.fixture(scope="module")
def originals(kodak) -> list[Tensor]:
    return [center_crop(image, 384) for image in kodak]


@pytest.fixture(scope="module")
def teacher() -> LatentCodec:
    return LatentCodec.from_pretrained("default")


def trained(shared, runs, preset: str, *settings: str) -> LatentCodec:
    run = latent_codec.train(preset, shared / "data/photos", runs / preset, settings=[*SHORT, *settings])
    return LatentCodec.from_pretrained(run.folder)


def quality(images: list[Tensor], originals: list[Tensor]) -> list[float]:
    """Mean PSNR and LPIPS."""
    found = [metrics.compare(*pair, ("psnr", "lpips")) for pair in zip(images, originals)]
    return [sum(float(each[name][0]) for each in found) / len(found) for name in ("psnr", "lpips")]


def decoding_times(codecs: list[LatentCodec], latents: Tensor) -> list[float]:
    """Median seconds of decoding, in turn."""
    seconds: list[list[float]] = [[] for _ in codecs]
    for _ in range(ROUNDS + 1):
        for codec, found in zip(codecs, seconds):
            start = time.process_time()
            codec.decode(latents, output_type="pt")
            found.append(time.process_time() - start)
    return [median(each[1:]) for each in seconds]


def test_a_distilled_decoder(shared, runs, originals, teacher):
    student = trained(shared, runs, "distill-decoder", *SMALLER, *DISTILLING)
    assert student.space_fingerprint == teacher.space_fingerprint
    latents = [teacher.encode(image) for image in originals]
    times = decoding_times([teacher, student], latents[0])
    rows = []
    for name, codec, seconds in zip(("default", "distilled"), (teacher, student), times):
        decoder = sum(each.numel() for each in codec.autoencoder.decoder.parameters())
        figures = quality(
            [metrics.round_to_8_bits(codec.decode(each, output_type="pt")) for each in latents], originals
        )
        rows.append([name, decoder / 1e6, seconds, times[0] / seconds, *figures])
    columns = ["decoder", "M parameters", "s per image", "times as fast", "PSNR, dB", "LPIPS"]
    table("Distilled decoder", columns, rows)


def test_a_decoder_that_enlarges(shared, runs, originals, teacher):
    larger = trained(shared, runs, "upscale-decoder", *ENLARGING)
    assert larger.space_fingerprint == teacher.space_fingerprint
    small = [shrunk_by(image, 2) for image in originals]
    decoded = [teacher.roundtrip(image, output_type="pt") for image in small]
    enlarged = [
        torch.nn.functional.interpolate(each, scale_factor=2.0, mode="bicubic").clamp(-1, 1)
        for each in decoded
    ]
    bicubic = [metrics.round_to_8_bits(each) for each in enlarged]
    times = decoding_times([teacher, larger], teacher.encode(small[0]))
    rows = [
        ["default, enlarged by a bicubic filter", times[0], *quality(bicubic, originals)],
        [
            "upscale-decoder",
            times[1],
            *quality([reconstruct(larger, image) for image in originals], originals),
        ],
    ]
    table("Kodak shrunk by two, decoded to its size", ["decoder", "s per image", "PSNR, dB", "LPIPS"], rows)
