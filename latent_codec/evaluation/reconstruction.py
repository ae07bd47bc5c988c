"""Send images through a codec and measure what came back, what lay between, and what it cost."""

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from latent_codec import deprecated
from latent_codec.codec import LatentCodec
from latent_codec.evaluation.codes import CodeMeter, CodeStatistics
from latent_codec.evaluation.cost import CostMeter, device_name
from latent_codec.evaluation.equivariance import Equivariance, EquivarianceMeter
from latent_codec.evaluation.frechet import NO_FEATURES, FrechetMeter, load_feature_network
from latent_codec.evaluation.latents import LatentMeter, LatentStatistics
from latent_codec.evaluation.meters import Batch, Figure
from latent_codec.evaluation.quality import ImageFigures, QualityMeter
from latent_codec.files import plain
from latent_codec.images.batches import batch_by_shape, iter_images
from latent_codec.images.origins import Origin, as_stored
from latent_codec.images.sources import Data, ImageSource, open_source, spread
from latent_codec.images.tensors import pad_to_multiple, shrunk_by
from latent_codec.torch_settings import ignoring_caller_settings

BATCH_PIXELS = 512 * 512
"""Neighboring images of one size go through together up to this many pixels."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What `evaluate` found. Means are over images, each counting the same whatever its size."""

    codec: str
    fingerprint: str
    device: str
    dtype: str
    psnr: Figure
    rmse: Figure
    """In the unit of images that have one: Hounsfield units."""
    ssim: Figure
    ms_ssim: Figure
    lpips: Figure
    frechet: Figure
    latents: LatentStatistics
    equivariance: Equivariance
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
        return plain(found | {"codes": self.codes and self.codes.to_dict()})


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

    Originals and reconstructions are compared as files of 8 bits per channel would hold them; gray of more than 8 bits, DICOM
    and NIfTI in their own values.
    Latents are posterior means. Images that cannot be read are left out and listed.

    Args:
        data: images as `open_source` takes them, or an open source.
        codec: an open one, or what `LatentCodec.from_pretrained` takes.
        limit: at most N images, spread evenly over the source; None means all.
        split: of data that has splits.
        frechet_crop: side in pixels of the crops whose features are compared.
        on_progress: called with (images done, images in all).

    Raises:
        ValueError: if there are no such data or codec, or no image could be read.
    """
    source = data if isinstance(data, ImageSource) else open_source(data, split=split)
    codec = codec if isinstance(codec, LatentCodec) else LatentCodec.from_pretrained(codec)
    device = codec.device
    indices = spread(len(source), limit)
    network = load_feature_network(device)
    quality = QualityMeter(lpips_trained(codec))
    frechet = FrechetMeter(network, frechet_crop) if network else None
    latents = LatentMeter(codec.latent_space.channels, codec.latent_space.arrange)
    codes = CodeMeter(codec) if codec.is_discrete else None
    equivariance = EquivarianceMeter(codec)
    meters = [meter for meter in (quality, frechet, latents, equivariance, codes) if meter]
    cost = CostMeter(device)
    skipped: list[str] = []

    with ignoring_caller_settings():
        readable = iter_images(source, channels=codec.channels, indices=indices, on_skip=skipped.append)
        for batch_indices, originals in batch_by_shape(readable, max_pixels=BATCH_PIXELS):
            originals = originals.to(device)
            if not quality.images:
                reconstruct(codec, originals)  # first calls allocate and tune
            batch = round_trip(codec, source, batch_indices, originals, cost)
            for meter in meters:
                meter.add(batch)
            if on_progress:
                on_progress(len(quality.images) + len(skipped), len(indices))
    if not quality.images:
        raise ValueError(f"no image could be read; the first of {len(skipped)}: {skipped[0]}")

    return Evaluation(
        codec=codec.name,
        fingerprint=codec.fingerprint,
        device=device_name(device),
        dtype=str(codec.dtype).removeprefix("torch."),
        **quality.result(),
        frechet=frechet.result() if frechet else Figure(value=None, note=NO_FEATURES),
        latents=latents.result(),
        equivariance=equivariance.result(),
        codes=codes and codes.result(),
        encode_seconds_per_megapixel=cost.seconds_per_megapixel("encode"),
        decode_seconds_per_megapixel=cost.seconds_per_megapixel("decode"),
        peak_memory_bytes=cost.peak_bytes,
        peak_memory_note=cost.memory_note,
        images=quality.images,
        skipped=skipped,
    )


def round_trip(
    codec: LatentCodec, source: ImageSource, indices: list[int], originals: Tensor, cost: CostMeter
) -> Batch:
    """Send images of one size, (N, C, H, W) in [-1, 1] on the codec's device, through it, and note what that costs.

    For a decoder that enlarges they are shrunk first, so that reconstructions have their size.
    """
    encoded = _as_encoded(codec, originals)
    height, width = originals.shape[2:]
    megapixels = len(originals) * height * width / 1e6
    encoding = cost.timed("encode", partial(codec.encode_all, encoded), megapixels)
    decode = partial(codec.decode, encoding.latents, size=tuple(encoded.shape[2:]), output_type="pt")
    decoded = cost.timed("decode", decode, megapixels)[..., :height, :width]
    origins = [source.origin(each) for each in indices]
    return Batch(
        originals=originals,
        encoding=encoding,
        reconstructions=as_stored(decoded, origins),
        origins=origins,
        names=[source.name(each) for each in indices],
        indices=indices,
    )


def reconstruct(codec: LatentCodec, images: Tensor, origins: Sequence[Origin | None] | None = None) -> Tensor:
    """(N, C, H, W) in [-1, 1] through the codec and back, as `round_trip`, rounded as their files would be: to 8 bits, or as
    their origins say."""
    encoded = _as_encoded(codec, images)
    decoded = codec.decode(codec.encode(encoded), size=tuple(encoded.shape[2:]), output_type="pt")
    return as_stored(decoded[..., : images.shape[2], : images.shape[3]], origins or [None] * len(images))


def _as_encoded(codec: LatentCodec, images: Tensor) -> Tensor:
    """The images that the codec decodes to the size of `images`, or up to `upscale` - 1 rows and columns more."""
    return shrunk_by(pad_to_multiple(images, codec.upscale), codec.upscale)


def lpips_trained(codec: LatentCodec) -> bool | None:
    """Whether the codec's training minimized LPIPS, as its model card says; None where no card tells.

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


evaluate_codec = deprecated.evaluate_codec


def __getattr__(name: str):
    return deprecated.find_name(__name__, name)
