"""Previews measured: fidelity to the full decode on Kodak's images, time to fit, and cost against the decoder's.

    pytest tests/benchmarks/test_previews.py -s -o addopts=

A correlation is Pearson's over all values of an image, with the codec's decode averaged over each latent's block; the mean
over 12 images, and the least. Times are of processor time next to wall time where the machine may be busy otherwise.
"""

import io
import os
import statistics
import time

import pytest
import torch
from torch.nn import functional as F

from latent_codec import AutoencoderTinyGN, LatentCodec
from latent_codec.images.sources import open_source
from latent_codec.images.tensors import center_crop, to_pil
from latent_codec.metrics import psnr
from latent_codec.models.tiny_decoder import TinyDecoder
from latent_codec.previews import LatentPreviewer
from latent_codec.previews.fitting import correlation, downscaled_decode, fit_linear
from latent_codec.training.build import build_autoencoder
from latent_codec.training.config import load_config


def timed(function, rounds: int) -> tuple[float, float]:
    """Median milliseconds by the clock and of processor time, after one call to warm up."""
    clock, processor = [], []
    for turn in range(rounds + 1):
        start, start_processor = time.perf_counter(), time.process_time()
        function()
        if turn:
            clock.append(1e3 * (time.perf_counter() - start))
            processor.append(1e3 * (time.process_time() - start_processor))
    return statistics.median(clock), statistics.median(processor)


def previewer_of(codec: LatentCodec, fit) -> LatentPreviewer:
    return LatentPreviewer.linear(fit.weight, fit.bias, space=codec.latent_space, palette=fit.palette)


def described(values: list[float]) -> str:
    return f"{statistics.mean(values):.4f} (least {min(values):.4f})"


@pytest.mark.parametrize("name", ["default", "default-vq"])
def test_linear_previews_and_palettes_on_kodak(shared, name):
    codec = LatentCodec.from_pretrained(name)
    photos, kodak = (open_source(shared / "data" / folder) for folder in ("photos", "kodak"))
    print()
    previewers = {"shipped": LatentPreviewer.from_pretrained(name, kind="linear")}
    for origin, source in (("photos", photos), ("random latents", None)):
        start = time.process_time()
        fit = fit_linear(codec, source)
        processor = time.process_time() - start
        previewers[origin] = previewer_of(codec, fit)
        print(
            f"{name}, {origin}: fitted in {fit.seconds:.1f} s ({processor:.1f} s of processor time, the held-out decodes included)"
        )
    found = {origin: ([], []) for origin in previewers}
    for index in range(len(kodak)):
        image = kodak.read(index).float() / 127.5 - 1
        latents = codec.encode(image)
        decoded = downscaled_decode(codec, latents)
        grids = codec.encode_indices(image) if codec.is_discrete else None
        for origin, previewer in previewers.items():
            found[origin][0].append(correlation(previewer(latents), decoded))
            if grids:
                found[origin][1].append(correlation(previewer.indices(grids), decoded))
    for origin, (of_latents, of_indices) in found.items():
        print(f"{name}, {origin}: correlation from latents {described(of_latents)}", end="")
        print(f", from indices {described(of_indices)}" if of_indices else "")
    assert min(statistics.mean(values) for pair in found.values() for values in pair if values) > 0.9


@pytest.mark.skipif(
    "TINY_PREVIEW" not in os.environ, reason="TINY_PREVIEW names RUN/preview of the preset tiny-preview"
)
def test_a_tiny_decoder_on_kodak(shared):
    codec, kodak = LatentCodec.from_pretrained("default"), open_source(shared / "data" / "kodak")
    tiny = LatentPreviewer.tiny(
        TinyDecoder.from_pretrained(os.environ["TINY_PREVIEW"]), space=codec.latent_space
    )
    linear = LatentPreviewer.from_pretrained("default", kind="linear")
    found = {"tiny": ([], []), "linear, enlarged by bicubic interpolation": ([], [])}
    for index in range(0, len(kodak), 2):
        latents = codec.encode(center_crop(kodak.read(index).float() / 127.5 - 1, 384))
        decoded = codec.decode(latents, output_type="pt")
        enlarged = F.interpolate(linear(latents), size=decoded.shape[2:], mode="bicubic").clamp(-1, 1)
        for (fidelity, correlations), shown in zip(found.values(), (tiny(latents), enlarged)):
            fidelity.append(float(psnr(shown, decoded)))
            correlations.append(correlation(shown, decoded))
    print()
    for name, (fidelity, correlations) in found.items():
        print(
            f"{name}: {statistics.mean(fidelity):.2f} dB, correlation {described(correlations)} to the full decode"
        )


def test_cost_of_a_linear_preview_as_jpeg():
    previewer = LatentPreviewer.from_pretrained("default", kind="linear")
    latents = torch.randn(1, 4, 64, 64)

    def preview() -> None:
        to_pil(previewer(latents)[0]).save(io.BytesIO(), format="JPEG")

    clock, processor = timed(preview, 200)
    print(
        f"\nlinear preview of 64x64 latents and JPEG: {clock:.2f} ms ({processor:.2f} ms of processor time); at most 3"
    )


@torch.no_grad()
def test_cost_of_a_tiny_decoder_against_the_stable_diffusion_shape():
    latents = torch.randn(1, 4, 64, 64)
    tiny = LatentPreviewer.tiny(TinyDecoder())
    full = LatentCodec(build_autoencoder(load_config("sd-f8c4")))
    shipped = LatentCodec.from_pretrained("default")
    rows = {
        "tiny": timed(lambda: tiny(latents), 3),
        "default": timed(lambda: shipped.decode(latents, output_type="pt"), 2),
        "sd-f8c4": timed(lambda: full.decode(latents, output_type="pt"), 1),
    }
    print()
    for name, (clock, processor) in rows.items():
        print(f"{name}, decode of 512 px: {clock / 1e3:.2f} s ({processor / 1e3:.2f} s of processor time)")
    print(f"tiny / sd-f8c4: {rows['tiny'][1] / rows['sd-f8c4'][1]:.4f} of processor time; at most 0.125")


def test_taef2_on_kodak(shared):
    model = AutoencoderTinyGN()
    for name, shift in (("encoder", 0), ("decoder", 1)):  # their files count the decoder's clamp as a layer
        weights = torch.load(shared / "checkpoints" / f"taef2_{name}.pth", weights_only=True)
        split = [(*key.split(".", 1), tensor) for key, tensor in weights.items()]
        layers = {f"layers.{int(index) - shift}.{rest}": tensor for index, rest, tensor in split}
        getattr(model, name).load_state_dict(layers)
    codec = LatentCodec(model)
    full, kodak = LatentPreviewer.full(codec), open_source(shared / "data" / "kodak")
    linear = previewer_of(codec, fit_linear(codec, open_source(shared / "data" / "photos")))
    fidelity, correlations = [], []
    for index in range(len(kodak)):
        image = kodak.read(index).float() / 127.5 - 1
        latents = codec.encode(image)
        decoded = full(latents)
        fidelity.append(float(psnr(decoded, image[None])))
        blocks = F.avg_pool2d(decoded, 8)
        correlations.append(correlation(linear(latents), blocks))
    print(f"\nTAEF2: PSNR {statistics.mean(fidelity):.2f} dB on {len(kodak)} images")
    print(f"TAEF2: linear preview fitted on photos, correlation {described(correlations)}")
