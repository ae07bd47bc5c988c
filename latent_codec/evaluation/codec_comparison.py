"""Several codecs on the same images: figures paired image by image, drift of color and contrast, sharpness, edges.

found = compare_codecs("photos/", ["default", "runs/mine"])
found.differences("psnr")["mine"]   # mean, and the 95 % interval, of mine minus the first codec's
"""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import mean

import torch
from torch import Tensor

from latent_codec import metrics
from latent_codec.codec import LatentCodec
from latent_codec.evaluation.cost import CostMeter, device_name
from latent_codec.evaluation.intervals import Interval, PairedDifference, mean_interval, paired_difference
from latent_codec.evaluation.meters import Batch
from latent_codec.evaluation.quality import TITLES, ImageFigures, QualityMeter
from latent_codec.evaluation.reconstruction import BATCH_PIXELS, reconstruct, round_trip
from latent_codec.files import plain
from latent_codec.images.batches import batch_by_shape, iter_images
from latent_codec.images.sheets import sheet
from latent_codec.images.sources import Data, ImageSource, open_source, spread
from latent_codec.images.tensors import pad_to_size
from latent_codec.torch_settings import ignoring_caller_settings

QUALITY = {"psnr": "PSNR, dB"} | TITLES | {"sharpness": "sharpness", "edge_error": "edge error"}
"""Figures of an image, and what a table calls them."""
DRIFT = {
    "red": "red, 1/255",
    "green": "green, 1/255",
    "blue": "blue, 1/255",
    "lightness": "L*",
    "green_red": "a* (green to red)",
    "blue_yellow": "b* (blue to yellow)",
}
"""Channels whose error has a mean, the drift, and a standard deviation."""
SHARPEST = 0.1
"""Share of an image's pixels, those of the steepest slopes, that the edge error is of: outlines and letters."""
NUM_CROPS, CROP_SIDE = 4, 128


@dataclass(frozen=True, kw_only=True)
class ComparedImage(ImageFigures):
    """One image through one codec."""

    sharpness: float
    """Mean slope of the reconstruction's luma over the original's; below 1 it is blurred."""
    edge_error: float
    """How much of the slopes is lost or false where the original's are steepest: 0 none, 1 as much as there is."""
    drift: dict[str, float]
    """Mean of reconstruction minus original, by the names of `DRIFT`."""
    spread: dict[str, float]
    """Standard deviation of the same over the pixels."""
    contrast: float
    """Standard deviation of L* over the original's, minus 1; nan of an image of one lightness."""


@dataclass(frozen=True, kw_only=True)
class ComparedCodec:
    """What a codec made of all images."""

    name: str
    fingerprint: str
    dtype: str
    images: list[ComparedImage]
    encode_seconds_per_megapixel: float
    decode_seconds_per_megapixel: float

    def mean(self, figure: str) -> float | None:
        """Of one of `QUALITY`, over the images that have it."""
        values = [value for each in self.images if (value := getattr(each, figure)) is not None]
        return mean(values) if values else None

    def drift(self, channel: str) -> Interval | None:
        """Mean over images of their mean error in one channel of `DRIFT`; None of a single image."""
        return mean_interval([each.drift[channel] for each in self.images])

    def spread(self, channel: str) -> float:
        """Mean over images of the error's standard deviation."""
        return mean(each.spread[channel] for each in self.images)

    def contrast(self) -> Interval | None:
        """Mean over images of the change of contrast."""
        return mean_interval([each.contrast for each in self.images if math.isfinite(each.contrast)])


@dataclass(frozen=True, kw_only=True)
class CodecComparison:
    """What `compare_codecs` found; the others are compared with the first codec."""

    codecs: list[ComparedCodec]
    device: str
    skipped: list[str]
    """One line for each image that could not be read."""

    def differences(self, figure: str) -> dict[str, PairedDifference | None]:
        """Of one of `QUALITY`: each other codec's minus the first one's, by name; None of fewer than two images."""
        first, *others = self.codecs
        return {each.name: paired_difference(each.images, first.images, figure) for each in others}

    def to_dict(self) -> dict:
        """Plain data for JSON."""
        codecs = [
            asdict(each)
            | {figure: each.mean(figure) for figure in QUALITY}
            | {
                "drift": {channel: _as_dict(each.drift(channel)) for channel in DRIFT},
                "spread": {channel: each.spread(channel) for channel in DRIFT},
                "contrast": _as_dict(each.contrast()),
            }
            for each in self.codecs
        ]
        differences = {
            figure: {name: _as_dict(found) for name, found in self.differences(figure).items()}
            for figure in QUALITY
        }
        return plain(
            {"codecs": codecs, "differences": differences, "device": self.device, "skipped": self.skipped}
        )


def compare_codecs(
    data: Data | ImageSource,
    codecs: Sequence[str | os.PathLike | LatentCodec],
    *,
    limit: int | None = None,
    split: str = "test",
    on_progress: Callable[[int, int], None] | None = None,
) -> CodecComparison:
    """Send the same images through several codecs, and compare each with the first, image by image.

    Args:
        data: images as `open_source` takes them, or an open source.
        codecs: at least two, open or as `LatentCodec.from_pretrained` takes them.
        limit: at most N images, spread evenly over the source; None means all.
        split: of data that has splits.
        on_progress: called with (images done, images in all).

    Raises:
        ValueError: for fewer than two codecs, for codecs whose images differ in channels, naming two, or if no image could be
            read.
    """
    source = data if isinstance(data, ImageSource) else open_source(data, split=split)
    opened = [each if isinstance(each, LatentCodec) else LatentCodec.from_pretrained(each) for each in codecs]
    check_comparable(opened)
    names, indices, skipped = distinct_names(opened), spread(len(source), limit), []
    found: list[list[ComparedImage]] = [[] for _ in opened]
    costs = [CostMeter(codec.device) for codec in opened]
    with ignoring_caller_settings():
        readable = iter_images(source, channels=opened[0].channels, indices=indices, on_skip=skipped.append)
        for numbers, originals in batch_by_shape(readable, max_pixels=BATCH_PIXELS):
            for codec, images, cost in zip(opened, found, costs):
                if not images:
                    reconstruct(codec, originals)  # first calls allocate and tune
                images += _compared(round_trip(codec, source, numbers, originals.to(codec.device), cost))
            if on_progress:
                on_progress(len(found[0]) + len(skipped), len(indices))
    if not found[0]:
        raise ValueError(f"no image could be read; the first of {len(skipped)}: {skipped[0]}")
    compared = [
        ComparedCodec(
            name=name,
            fingerprint=codec.fingerprint,
            dtype=str(codec.dtype).removeprefix("torch."),
            images=images,
            encode_seconds_per_megapixel=cost.seconds_per_megapixel("encode"),
            decode_seconds_per_megapixel=cost.seconds_per_megapixel("decode"),
        )
        for name, codec, images, cost in zip(names, opened, found, costs)
    ]
    return CodecComparison(codecs=compared, device=device_name(opened[0].device), skipped=skipped)


def check_comparable(codecs: Sequence[LatentCodec]) -> None:
    """Raises ValueError for fewer than two codecs, or two whose images differ in channels."""
    if len(codecs) < 2:
        raise ValueError(f"expected at least two codecs to compare, got {len(codecs)}")
    first = codecs[0]
    for other in codecs[1:]:
        if other.channels != first.channels:
            raise ValueError(
                f"{first.name} takes images of {first.channels} channels and {other.name} of {other.channels}: expected codecs "
                "of equal images to compare"
            )


def distinct_names(codecs: Sequence[LatentCodec]) -> list[str]:
    """The codecs' names, with a number where several have one."""
    names = [codec.name for codec in codecs]
    return [
        name if names.count(name) == 1 else f"{name} ({names[: place + 1].count(name)})"
        for place, name in enumerate(names)
    ]


def crops_sheet(codecs: Sequence[LatentCodec], source: ImageSource, comparison: CodecComparison) -> Tensor:
    """A `sheet` with a row for each of a few images, from the first codec's worst to its best by PSNR: the original's crop in which
    reconstructions differ most from each other, and the same crop of every codec."""
    ranked = sorted(comparison.codecs[0].images, key=lambda image: (image.psnr, image.index))
    chosen = [ranked[place] for place in spread(len(ranked), min(NUM_CROPS, len(ranked)))]
    rows, titles = [], []
    places = {image.index: place for place, image in enumerate(comparison.codecs[0].images)}
    for image in chosen:
        original = source.image(image.index, codecs[0].channels)
        origins = [source.origin(image.index)]
        shown = [original, *(reconstruct(codec, original[None], origins)[0].cpu() for codec in codecs)]
        shown = [pad_to_size(each, (CROP_SIDE, CROP_SIDE)) for each in shown]
        top, left = _where_they_differ(torch.stack(shown[1:]))
        rows.append([each[:, top : top + CROP_SIDE, left : left + CROP_SIDE] for each in shown])
        figures = [f"{each.images[places[image.index]].psnr:.1f}" for each in comparison.codecs]
        titles.append(f"{os.path.basename(image.name)}\n{' / '.join(figures)} dB")
    columns = ["original", *(each.name for each in comparison.codecs)]
    return sheet(rows, row_titles=titles, column_titles=columns, side=2 * CROP_SIDE)


def _where_they_differ(images: Tensor) -> tuple[int, int]:
    """Top and left of the window of CROP_SIDE, on a grid of its quarters, with the largest variance between images."""
    variance = images.var(0).mean(0)[None, None]
    step = CROP_SIDE // 4
    windows = torch.nn.functional.avg_pool2d(variance, CROP_SIDE, step)[0, 0]
    row, column = divmod(int(windows.argmax()), windows.shape[1])
    return row * step, column * step


def _compared(batch: Batch) -> list[ComparedImage]:
    quality = QualityMeter()
    quality.add(batch)
    images, references = (metrics.as_rgb(each) for each in (batch.reconstructions, batch.originals))
    lab, wanted = metrics.lab(images), metrics.lab(references)
    errors = torch.cat(((images - references) * 127.5, lab - wanted), 1).flatten(2)
    contrast = lab[:, 0].flatten(1).std(1) / wanted[:, 0].flatten(1).std(1) - 1
    sharpness, edge_error = _edges(images, references)
    return [
        ComparedImage(
            **vars(figures),
            sharpness=float(sharpness[place]),
            edge_error=float(edge_error[place]),
            drift=dict(zip(DRIFT, errors[place].mean(1).tolist())),
            spread=dict(zip(DRIFT, errors[place].std(1).tolist())),
            contrast=float(contrast[place]),
        )
        for place, figures in enumerate(quality.images)
    ]


def _edges(images: Tensor, references: Tensor) -> tuple[Tensor, Tensor]:
    """Sharpness and edge error of each image; the sharpness is 1 where the original has no slope."""
    slopes, wanted = _slopes(images), _slopes(references)
    steep = wanted.norm(dim=1)
    limit = steep.topk(math.ceil(SHARPEST * steep.shape[1]), dim=1).values[:, -1:]
    at_edges = (steep >= limit).float()
    error = ((slopes - wanted).norm(dim=1) * at_edges).sum(1) / (steep * at_edges).sum(1).clamp_min(1e-6)
    total = steep.mean(1)
    sharpness = torch.where(total > 0, slopes.norm(dim=1).mean(1) / total.clamp_min(1e-6), 1.0)
    return sharpness, error


def _slopes(images: Tensor) -> Tensor:
    """Differences of luma (ITU-R BT.709) to the next pixel at the right and below: (N, 2, pixels)."""
    luma = torch.einsum("c,nchw->nhw", images.new_tensor([0.2126, 0.7152, 0.0722]), images)
    luma = torch.nn.functional.pad(luma[:, None], (0, 1, 0, 1), mode="replicate")[:, 0]
    across, down = luma[:, :-1, 1:] - luma[:, :-1, :-1], luma[:, 1:, :-1] - luma[:, :-1, :-1]
    return torch.stack((across, down), 1).flatten(2)


def _as_dict(found: Interval | None) -> dict | None:
    return None if found is None else asdict(found)
