"""Compressed files of the shipped codecs on Kodak: fidelity, bits against their bounds, sizes hit, time.

    pytest tests/benchmarks/test_compressed_files.py -s -o addopts=          a quarter of an hour of one core

LATENT_PRIOR and INDEX_PRIOR may name priors over the same values, as `latent-codec train pixelcnn-latents` (with the steps
of QUALITY as model.arguments.latent_steps) and `pixelcnn-codes` make them: their bits are printed as the bound of
a model that goes value by value.
"""

import math
import os
import time
from pathlib import Path
from statistics import mean

import numpy as np
import pytest
import torch
from tables import table

from latent_codec import LatentCodec
from latent_codec.bitstream import decompress, prepare, read, sidecar, unpack
from latent_codec.bitstream.coding import decode_tile, encode_tile
from latent_codec.bitstream.quantization import quantize
from latent_codec.components.prior_folders import load_prior
from latent_codec.evaluation.image_formats import image_formats
from latent_codec.evaluation.rate_distortion import fidelity
from latent_codec.images.tensors import to_image, to_pil

pytestmark = pytest.mark.usefixtures("one_thread")

QUALITY = 50
RATE = 0.15


def codec_and_model(name: str):
    codec = LatentCodec.from_pretrained(name)
    model = sidecar(codec)
    if model is None:
        pytest.skip(f"the shipped codec {name} has no entropy model")
    return codec, model


def order_zero_bits(arrays: list[np.ndarray]) -> float:
    """Of values under their own frequencies, which no table of order 0 can beat."""
    _, counts = np.unique(np.concatenate([each.reshape(-1) for each in arrays]), return_counts=True)
    return float(-(counts * np.log2(counts / counts.sum())).sum())


def largest_within(num_bytes: int, compressor, image) -> bytes:
    """The finest file that is not larger, by bisection; the coarsest if all are."""
    low, high = 0, len(compressor.qualities)
    best = compressor.encode(image, compressor.qualities[0])
    while high - low > 1:
        middle = (low + high) // 2
        file = compressor.encode(image, compressor.qualities[middle])
        if len(file) <= num_bytes:
            low, best = middle, file
        else:
            high = middle
    return best


def test_default_codec_at_a_rate(kodak):
    codec, model = codec_and_model("default")
    found, overheads, headers, misses = {}, [], [], []
    for image in kodak:
        original, num_pixels = image[0], image[0, 0].numel()
        target = int(RATE * num_pixels / 8)
        data = prepare(codec, original, entropy_model=model).compress(target_bytes=target)
        container, decoded = unpack(data), read(codec, data, entropy_model=model)
        overheads.append((sum(container.lengths) - decoded.code_length / 8, sum(container.lengths)))
        headers.append(container.header_bytes)
        misses.append(len(data) / target)
        ours = to_image(decompress(codec, data, entropy_model=model))
        (whole,) = codec.decode(codec.encode(original))
        rows = {"default-f8c4": (len(data), ours), "default-f8c4, unquantized": (None, to_image(whole))}
        for each in image_formats():
            file = largest_within(len(data), each, to_pil(original))
            rows[each.name] = (len(file), to_image(each.decode(file)))
        for name, (size, image) in rows.items():
            figures = fidelity(image, original)
            bits = None if size is None else 8 * size / num_pixels
            found.setdefault(name, []).append((bits, figures.psnr, figures.ms_ssim, figures.lpips))
    table(
        f"Kodak ({len(kodak)} images) at the bytes of default-f8c4's file for {RATE} bits per pixel",
        ["", "bits per pixel", "PSNR", "MS-SSIM", "LPIPS"],
        [
            [name, *("-" if column[0] is None else mean(column) for column in zip(*rows))]
            for name, rows in found.items()
        ],
    )
    print(
        f"headers {min(headers)} to {max(headers)} bytes (at most 64); of the target {min(misses):.4f} to {max(misses):.4f}"
    )
    print(f"payload over the model's own bits: {max(over for over, _ in overheads):.0f} bytes at most")
    psnr, lpips = (
        {name: mean(row[place] for row in rows) for name, rows in found.items()} for place in (1, 3)
    )
    assert psnr["default-f8c4"] >= psnr["default-f8c4, unquantized"] - 0.5
    assert lpips["default-f8c4"] < min(lpips["jpeg"], lpips["webp"])
    assert all(over <= 0.005 * size + 64 for over, size in overheads) and max(headers) <= 64
    assert max(misses) <= 1 and min(misses) >= 0.98


def test_contexts_against_factorized_tables(kodak):
    codec, model = codec_and_model("default")
    encoded = [codec.encode(image)[0].numpy() for image in kodak]
    num_pixels = sum(image[0, 0].numel() for image in kodak)
    rows = []
    for quality in (30, 40, QUALITY, 60, 70):
        levels = [quantize(model, latents, quality)[0] for latents in encoded]
        factorized = sum(
            order_zero_bits([each[channel] for each in levels]) for channel in range(len(levels[0]))
        )
        sections = [encode_tile(model, [each], quality) for each in levels]
        context = 8 * sum(len(section) for each in sections for section in each)
        prior = prior_bits(levels, quality) if quality == QUALITY else None
        saved = f"{context / factorized - 1:+.1%}"
        bound = "-" if prior is None else prior / num_pixels
        rows.append([quality, factorized / num_pixels, context / num_pixels, saved, bound])
        assert context <= 0.92 * factorized
    table(
        "default-f8c4 on Kodak, rounded levels: bits per pixel",
        ["quality", "(a) factorized, their own frequencies", "(b) contexts", "", "(d) value by value"],
        rows,
    )


def prior_bits(levels: list[np.ndarray], quality: int) -> float | None:
    if "LATENT_PRIOR" not in os.environ:
        return None
    prior = load_prior(Path(os.environ["LATENT_PRIOR"])).eval()
    lowest, highest = prior.config.latent_minimum, prior.config.latent_maximum
    total = 0.0
    with torch.no_grad():
        for each in levels:
            values = torch.from_numpy(each).clamp(lowest, highest)[None] - lowest
            total -= float(prior.log_prob(values).double().sum()) / math.log(2)
    return total


def test_indices_on_kodak(kodak):
    codec, model = codec_and_model("default-vq")
    num_pixels = sum(image[0, 0].numel() for image in kodak)
    grids, sizes, ideal = [], 0, 0.0
    for image in kodak:
        data = prepare(codec, image[0], entropy_model=model).compress()
        decoded = read(codec, data, entropy_model=model)
        np.testing.assert_array_equal(decoded.values[0], codec.encode_indices(image)[0].numpy())
        sizes += 8 * len(data)
        ideal += decoded.code_length
        grids.append(decoded.values[0])
    count = sum(each.size for each in grids)
    own = order_zero_bits(grids)
    rows = [
        ["fixed length", 10.0, 10 * count / num_pixels],
        ["order 0, their own frequencies", own / count, own / num_pixels],
        ["contexts", ideal / count, ideal / num_pixels],
        ["contexts, whole files", sizes / count, sizes / num_pixels],
    ]
    if "INDEX_PRIOR" in os.environ:
        prior = load_prior(Path(os.environ["INDEX_PRIOR"])).eval()
        with torch.no_grad():
            nats = -sum(float(prior.log_prob(torch.from_numpy(each)).double().sum()) for each in grids)
        rows.append(["PixelCNN", nats / math.log(2) / count, nats / math.log(2) / num_pixels])
    table("default-vq-f8 on Kodak", ["", "bits per index", "bits per pixel"], rows)
    print(f"contexts against order 0: {ideal / own - 1:+.1%} (at most -8 %)")
    assert sizes <= 0.92 * own


def test_sizes_are_hit_without_decoding_pixels(kodak):
    codec, model = codec_and_model("default")
    shares = []
    for image in kodak[:6]:
        prepared = prepare(codec, image[0], entropy_model=model)
        for target in (2000, 3000, 5000, 7373, 10000):
            size = len(prepared.compress(target_bytes=target))
            shares.append(size / target)
            assert size <= target
    print(f"\n{len(shares)} files: {min(shares):.4f} to {max(shares):.4f} of the bytes asked for (0.98 to 1)")
    assert min(shares) >= 0.98


def test_time_of_a_grid(kodak):
    codec, model = codec_and_model("default")
    latents = codec.encode(kodak[0][..., :512, :512])[0].numpy()
    levels, _ = quantize(model, latents, QUALITY)
    sections = encode_tile(model, [levels], QUALITY)
    times = []
    for _ in range(12):
        wall, processor = time.perf_counter(), time.process_time()
        found = decode_tile(model, sections, [levels.shape], QUALITY)
        times.append((1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - processor)))
    np.testing.assert_array_equal(found.values[0], levels)
    wall, processor = (min(column) for column in zip(*times))
    print(
        f"\nentropy decode of 64x64x4 at quality {QUALITY}: {wall:.0f} ms, {processor:.0f} ms of processor time (at most 100)"
    )
