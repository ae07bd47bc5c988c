"""How well reconstructions keep images: PSNR, SSIM, MS-SSIM and LPIPS, image by image."""

import math
from dataclasses import dataclass
from statistics import mean

from latent_codec import metrics
from latent_codec.evaluation.meters import Batch, Figure
from latent_codec.images.origins import RangeOrigin

METRICS = ("psnr", "ssim", "ms_ssim", "lpips")
TITLES = {"ssim": "SSIM", "ms_ssim": "MS-SSIM", "lpips": "LPIPS"}


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
    unit: str | None = None
    """Of an image with values of its own: "HU"; empty where it is not known."""
    rmse: float | None = None
    """Root mean square error in its unit."""
    largest_error: float | None = None


class QualityMeter:
    """Gathers ImageFigures, and takes their means, each image counting the same whatever its size.

    Args:
        lpips_trained: whether the codec was trained on LPIPS, which the figure's note tells; None where that is unknown.
    """

    def __init__(self, lpips_trained: bool | None = None):
        self.images: list[ImageFigures] = []
        self._lpips_trained = lpips_trained

    def add(self, batch: Batch) -> None:
        """Compare the reconstructions with the originals."""
        height, width = batch.originals.shape[2:]
        found = metrics.compare(batch.reconstructions, batch.originals, METRICS)
        self.images += [
            ImageFigures(
                name=name,
                index=index,
                width=width,
                height=height,
                **dict(zip(METRICS, figures)),
                **_in_units(batch, place),
            )
            for place, (name, index, *figures) in enumerate(zip(batch.names, batch.indices, *found.values()))
        ]

    def result(self) -> dict[str, Figure]:
        """The mean of each metric."""
        equal = sum(math.isinf(image.psnr) for image in self.images)
        in_units = sum(image.unit is not None for image in self.images)
        depth = "of each image's own range" if in_units == len(self.images) else "8 bits per channel"
        note = f"dB, {depth}, mean over images"
        if equal:
            note += f"; infinite because {equal} of {len(self.images)} came back identical"
        psnr = Figure(value=mean(image.psnr for image in self.images), note=note)
        return {"psnr": psnr, "rmse": self._rmse()} | {metric: self._mean(metric) for metric in TITLES}

    def _rmse(self) -> Figure:
        """The mean of images with values of their own, where they share a unit."""
        units = {image.unit for image in self.images if image.rmse is not None}
        if len(units) != 1:
            why = "the images have no unit" if not units else "the images have several units"
            return Figure(value=None, note=why)
        errors = [(image.rmse, image.largest_error) for image in self.images if image.rmse is not None]
        (unit,) = units
        largest = max(largest for _, largest in errors)
        named = unit or "in the images' own values"
        return Figure(
            value=mean(rmse for rmse, _ in errors), note=f"{named}, mean over images; at most {largest:.4g}"
        )

    def _mean(self, metric: str) -> Figure:
        if metric == "lpips" and not metrics.lpips_available():
            return Figure(value=None, note=f"the weights {metrics.lpips_weights()} are not there")
        why_not = f"too small: {TITLES[metric]} needs {metrics.MIN_SIDES[metric]} px per side"
        values = [value for image in self.images if (value := getattr(image, metric)) is not None]
        if not values:
            return Figure(value=None, note=f"the images are {why_not}")
        notes = ["SqueezeNet"] if metric == "lpips" else []
        if metric == "lpips" and self._lpips_trained is None:
            notes.append("no model card says whether the codec was trained on LPIPS")
        elif metric == "lpips" and self._lpips_trained:
            notes.append("the codec was trained on LPIPS, which flatters it")
        if len(values) < len(self.images):
            notes.append(f"of {len(values)} of {len(self.images)} images; the others are {why_not}")
        return Figure(value=mean(values), note="; ".join(notes))


def _in_units(batch: Batch, place: int) -> dict:
    """Errors in the unit of an image that has one."""
    origin = batch.origins[place] if batch.origins else None
    if not isinstance(origin, RangeOrigin):
        return {}
    rmse, largest = origin.errors(batch.reconstructions[place], batch.originals[place])
    return {"unit": origin.unit, "rmse": rmse, "largest_error": largest}
