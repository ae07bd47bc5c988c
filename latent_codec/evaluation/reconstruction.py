"""Send images through a codec and measure what came back, what lay between, and what it cost."""

import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean

from torch import Tensor

from latent_codec import deprecated, metrics
from latent_codec.codec import LatentCodec
from latent_codec.evaluation.codes import CodeMeter, CodeStatistics
from latent_codec.evaluation.cost import CostMeter, device_name
from latent_codec.evaluation.frechet import FrechetMeter, load_feature_network
from latent_codec.evaluation.latents import LatentMeter, LatentStatistics
from latent_codec.images.batches import batch_by_shape, iter_images
from latent_codec.images.sources import Data, ImageSource, open_source, spread
from latent_codec.torch_settings import ignoring_caller_settings

BATCH_PIXELS = 512 * 512
"""Neighbouring images of one size go through together up to this many pixels."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A measured number, or None and the reason why there is none."""

    value: float | None
    note: str = ""
    """How it was measured, or why it was not."""


@dataclass(frozen=True, kw_only=True)
class ImageFigures:
    """One image's figures; None where the image is too small for a metric or its weights are absent."""

    name: str
    index: int
    """Place in the source."""
    width: int
    height: int
    psnr: float
    ssim: float | None
    ms_ssim: float | None
    lpips: float | None


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What `evaluate_codec` found. Means are over images, each counting the same whatever its size."""

    codec: str
    fingerprint: str
    device: str
    dtype: str
    psnr: Figure
    ssim: Figure
    ms_ssim: Figure
    lpips: Figure
    frechet: Figure
    latents: LatentStatistics
    codes: CodeStatistics | None
    """Of a codec with a codebook."""
    encode_seconds_per_megapixel: float
    decode_seconds_per_megapixel: float
    peak_memory_bytes: int | None
    peak_memory_note: str
    images: list[ImageFigures]
    skipped: list[str]
    """One line for each image that could not be read, naming it and the reason."""

    def by_quality(self) -> list[ImageFigures]:
        """The images from lowest to highest PSNR."""
        return sorted(self.images, key=lambda image: (image.psnr, image.index))

    def to_dict(self) -> dict:
        """Plain data for JSON, which knows no infinity: an infinite PSNR becomes None, its note says so."""
        found = asdict(self) | {"latents": self.latents.to_dict(), "num_images": len(self.images)}
        found["codes"] = self.codes.to_dict() if self.codes else None
        for image in found["images"]:
            image["psnr"] = _finite(image["psnr"])
        found["psnr"]["value"] = _finite(self.psnr.value)
        return found


def evaluate_codec(
    codec: LatentCodec,
    source: ImageSource,
    *,
    limit: int | None = None,
    frechet_crop: int = 128,
    on_progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Encode and decode the images of `source`, and measure.

    Originals and reconstructions are compared as files of 8 bits per channel would hold them.
    Latents are posterior means. Images that cannot be read are left out and listed.

    Args:
        limit: at most so many images, spread evenly over the source; None means all.
        frechet_crop: side in pixels of the crops whose features are compared.
        on_progress: called with (images done, images in all).

    Raises:
        ValueError: if no image could be read.
    """
    device = codec.device
    indices = spread(len(source), limit)
    lpips = metrics.load_lpips("squeeze").to(device) if metrics.lpips_available("squeeze") else None
    network = load_feature_network(device)
    frechet = FrechetMeter(network, frechet_crop) if network else None
    latent_meter = LatentMeter(codec.latent_space.channels)
    code_meter = CodeMeter(codec) if codec.is_discrete else None
    cost = CostMeter(device)
    images: list[ImageFigures] = []
    skipped: list[str] = []
    has_posterior = not codec.is_discrete

    with ignoring_caller_settings():
        readable = iter_images(source, channels=codec.channels, indices=indices, on_skip=skipped.append)
        for batch_indices, originals in batch_by_shape(readable, max_pixels=BATCH_PIXELS):
            originals = originals.to(device)
            if not images:
                reconstruct(codec, originals)  # first calls allocate and tune
            height, width = originals.shape[2:]
            megapixels = len(originals) * height * width / 1e6
            latents = cost.timed("encode", lambda: codec.encode(originals), megapixels)  # noqa: B023
            decoded = cost.timed(
                "decode",
                lambda: codec.decode(latents, size=(height, width), output_type="pt"),  # noqa: B023
                megapixels,
            )
            reconstructions = metrics.round_to_8_bits(decoded)
            latent_meter.add(latents)
            if has_posterior and (posterior := codec.posterior(originals)):
                latent_meter.add_posterior(posterior.mean, posterior.logvar)
            else:
                has_posterior = False
            if code_meter:
                code_meter.add(codec.encode_indices(originals), (height, width))
            if frechet:
                frechet.add(originals, reconstructions)
            images += _compare(source, batch_indices, originals, reconstructions, lpips)
            if on_progress:
                on_progress(len(images) + len(skipped), len(indices))
    if not images:
        raise ValueError(f"no image could be read; the first of {len(skipped)}: {skipped[0]}")

    return Evaluation(
        codec=codec.name,
        fingerprint=codec.fingerprint,
        device=device_name(device),
        dtype=str(codec.dtype).removeprefix("torch."),
        psnr=_mean_psnr(images),
        ssim=_mean(images, "ssim", "too small: SSIM needs 6 px per side"),
        ms_ssim=_mean(images, "ms_ssim", f"too small: MS-SSIM needs {metrics.MS_SSIM_MIN_SIDE} px per side"),
        lpips=_mean_lpips(images, codec, available=lpips is not None),
        frechet=_frechet(frechet),
        latents=latent_meter.statistics(),
        codes=code_meter.statistics() if code_meter else None,
        encode_seconds_per_megapixel=cost.seconds_per_megapixel("encode"),
        decode_seconds_per_megapixel=cost.seconds_per_megapixel("decode"),
        peak_memory_bytes=cost.peak_bytes,
        peak_memory_note=cost.memory_note,
        images=images,
        skipped=skipped,
    )


def evaluate(
    data: Data | ImageSource,
    codec: str | os.PathLike | LatentCodec = "default",
    *,
    limit: int | None = None,
    split: str = "test",
    frechet_crop: int = 128,
    on_progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Encode and decode images, and measure: `latent_codec.evaluate("photos/").psnr.value`.

    Args:
        data: images as `open_source` takes them, or an open source.
        codec: an open one, or what `LatentCodec.from_pretrained` takes.
        split: of data that has splits.
        limit, frechet_crop, on_progress: as `evaluate_codec`.

    Raises:
        ValueError: if there are no such data or codec, or no image could be read.
    """
    source = data if isinstance(data, ImageSource) else open_source(data, split=split)
    codec = codec if isinstance(codec, LatentCodec) else LatentCodec.from_pretrained(codec)
    return evaluate_codec(codec, source, limit=limit, frechet_crop=frechet_crop, on_progress=on_progress)


def reconstruct(codec: LatentCodec, images: Tensor) -> Tensor:
    """(N, C, H, W) in [-1, 1] through the codec and back, rounded as an 8-bit file would be."""
    height, width = images.shape[2:]
    return metrics.round_to_8_bits(codec.decode(codec.encode(images), size=(height, width), output_type="pt"))


def lpips_trained(codec: LatentCodec) -> bool | None:
    """Whether the codec's training minimised LPIPS, as its model card says; None where no card tells.

    The trainer writes `lpips_trained: true` or `false` in the front matter of the codec's README.md.
    """
    from huggingface_hub import metadata_load

    card = Path(codec.autoencoder.config.get("_name_or_path") or "") / "README.md"
    try:
        front_matter = metadata_load(card) if card.is_file() else None
    except Exception:  # a card is prose that people write; YAML can fail in many ways
        return None
    answer = (front_matter or {}).get("lpips_trained")
    return answer if isinstance(answer, bool) else None


def _compare(
    source: ImageSource,
    indices: list[int],
    originals: Tensor,
    reconstructions: Tensor,
    lpips: metrics.PerceptualDistance | None,
) -> list[ImageFigures]:
    height, width = originals.shape[2:]
    side = min(height, width)
    nothing = [None] * len(indices)
    psnr = metrics.psnr(reconstructions, originals).tolist()
    ssim = metrics.ssim(reconstructions, originals).tolist() if side >= 6 else nothing
    ms_ssim = (
        metrics.ms_ssim(reconstructions, originals).tolist() if side >= metrics.MS_SSIM_MIN_SIDE else nothing
    )
    perceptual = lpips is not None and side >= metrics.LPIPS_MIN_SIDE["squeeze"]
    distances = lpips(reconstructions, originals).tolist() if perceptual else nothing
    return [
        ImageFigures(
            name=source.name(index),
            index=index,
            width=width,
            height=height,
            psnr=psnr[place],
            ssim=ssim[place],
            ms_ssim=ms_ssim[place],
            lpips=distances[place],
        )
        for place, index in enumerate(indices)
    ]


def _mean(images: list[ImageFigures], metric: str, why_not: str) -> Figure:
    values = [value for image in images if (value := getattr(image, metric)) is not None]
    if not values:
        return Figure(value=None, note=f"the images are {why_not}")
    if len(values) == len(images):
        return Figure(value=mean(values))
    return Figure(
        value=mean(values), note=f"of {len(values)} of {len(images)} images; the others are {why_not}"
    )


def _mean_psnr(images: list[ImageFigures]) -> Figure:
    equal = sum(math.isinf(image.psnr) for image in images)
    note = "dB, 8 bits per channel, mean over images"
    if equal:
        note += f"; infinite because {equal} of {len(images)} came back identical"
    return Figure(value=mean(image.psnr for image in images), note=note)


def _mean_lpips(images: list[ImageFigures], codec: LatentCodec, *, available: bool) -> Figure:
    if not available:
        return Figure(value=None, note=f"the weights {metrics.lpips_weights('squeeze')} are not there")
    found = _mean(images, "lpips", f"too small: LPIPS needs {metrics.LPIPS_MIN_SIDE['squeeze']} px per side")
    if found.value is None:
        return found
    trained = {
        True: "the codec was trained on LPIPS, which flatters it",
        False: "",
        None: "no model card says whether the codec was trained on LPIPS",
    }[lpips_trained(codec)]
    return Figure(value=found.value, note="; ".join(filter(None, ["SqueezeNet", trained, found.note])))


def _frechet(meter: FrechetMeter | None) -> Figure:
    if meter is None:
        return Figure(
            value=None, note="neither Inception's nor SqueezeNet's weights are in torch's hub folder"
        )
    try:
        distance = meter.distance()
    except ValueError as error:
        return Figure(value=None, note=str(error))
    return Figure(value=distance, note=f"{meter.network.name}, {meter.crops}")


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def __getattr__(name: str):
    return deprecated.find_name(__name__, name)
