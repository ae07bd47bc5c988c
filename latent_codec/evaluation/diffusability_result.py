"""What `measure_diffusability` gives: distances over steps, of each codec and seed; its curves and samples."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean, stdev

from scipy.stats import spearmanr
from torch import Tensor

from latent_codec.files import plain
from latent_codec.images.figures import new_figure
from latent_codec.images.sheets import sheet


@dataclass(frozen=True, kw_only=True)
class DenoiserCurve:
    """One denoiser's training."""

    seed: int
    distances: list[float]
    """Frechet distance of its samples from the images, at each mark."""
    seconds: float
    """Of training and sampling."""
    samples: Tensor = field(repr=False)
    """The first of the last mark, uint8 (NUM_SHOWN, C, side, side)."""


@dataclass(frozen=True, kw_only=True)
class CodecDiffusability:
    """What the denoisers made of one codec's latents."""

    name: str
    fingerprint: str
    channels: int
    """Of the latents."""
    grid: int
    """Positions of the latents along a side."""
    patch: int
    """Of these in a token."""
    std: list[float]
    """Of each channel of the latents; far from 1 they are not calibrated."""
    reconstructions: float
    """Frechet distance of reconstructions from the images, which samples hardly get below."""
    interpolated: float
    """iFID: the same of images decoded half-way between latents and their nearest neighbors' (arXiv:2603.05630)."""
    curves: list[DenoiserCurve]

    def mean(self, mark: int) -> float:
        """Over seeds, at mark number `mark`."""
        return mean(curve.distances[mark] for curve in self.curves)

    def spread(self, mark: int) -> float | None:
        """Standard deviation over seeds; None of one."""
        values = [curve.distances[mark] for curve in self.curves]
        return stdev(values) if len(values) > 1 else None


@dataclass(frozen=True, kw_only=True)
class Diffusability:
    """What `measure_diffusability` found; the others are compared with the first codec."""

    steps: list[int]
    """The marks; empty where no denoiser was trained."""
    codecs: list[CodecDiffusability]
    half: float
    """Frechet distance of one half of the images from the other: what is sampling noise."""
    network: str
    """Whose features these distances are of."""
    num_images: int
    num_samples: int
    side: int
    num_enlarged: int
    """Images with a shorter side below `side`."""
    device: str
    skipped: list[str]
    """One line for each image that could not be read."""

    def steps_to_first(self, name: str) -> list[float | None]:
        """Of each seed: steps after which a codec's samples are as near as the first codec's at the end, or None if never.

        Logarithms of distances are interpolated linearly between marks; before the first mark nothing is known, and it stands for
        all steps until it.
        """
        first, codec = self.codecs[0], self._named(name)
        return [
            steps_to(curve.distances, self.steps, reference.distances[-1])
            for curve, reference in zip(codec.curves, first.curves)
        ]

    def correlation(self, figure: str = "interpolated") -> float | None:
        """Spearman's rank correlation over codecs of a figure of `CodecDiffusability` and the samples' last distance.

        None of fewer than three codecs, or where all are equal.
        """
        if len(self.codecs) < 3 or not self.steps:
            return None
        found = spearmanr(
            [getattr(each, figure) for each in self.codecs], [each.mean(-1) for each in self.codecs]
        ).statistic
        return float(found) if math.isfinite(found) else None

    def to_dict(self) -> dict:
        """Plain data for JSON, without the samples."""
        codecs = []
        for each in self.codecs:
            found = asdict(each) | {"steps_to_first": self.steps_to_first(each.name) if self.steps else []}
            found["curves"] = [
                {key: value for key, value in curve.items() if key != "samples"} for curve in found["curves"]
            ]
            codecs.append(found)
        correlations = {figure: self.correlation(figure) for figure in ("interpolated", "reconstructions")}
        return plain(vars(self) | {"codecs": codecs, "correlations": correlations})

    def _named(self, name: str) -> CodecDiffusability:
        return next(each for each in self.codecs if each.name == name)


def steps_to(distances: Sequence[float], steps: Sequence[int], target: float) -> float | None:
    """The steps after which a curve first is at `target` or below, as `Diffusability.steps_to_first` counts them."""
    for place, distance in enumerate(distances):
        if distance > target:
            continue
        if place == 0:
            return float(steps[0])
        before, after = math.log(distances[place - 1]), math.log(max(distance, 1e-12))
        share = (before - math.log(max(target, 1e-12))) / (before - after)
        return steps[place - 1] + share * (steps[place] - steps[place - 1])
    return None


def plot_diffusability(found: Diffusability, path: Path) -> None:
    """Draw distance over steps, of each codec the mean and the range over seeds, as a PNG at `path`."""
    with new_figure(path, (7, 4.5)) as figure:
        axis = figure.subplots()
        for place, each in enumerate(found.codecs):
            color = f"C{place}"
            columns = list(zip(*(curve.distances for curve in each.curves)))
            axis.plot(found.steps, [mean(column) for column in columns], "o-", color=color, label=each.name)
            axis.fill_between(
                found.steps, [*map(min, columns)], [*map(max, columns)], color=color, alpha=0.2, linewidth=0
            )
            axis.axhline(each.reconstructions, color=color, linestyle=":", linewidth=1)
        axis.set_yscale("log")
        axis.set_xlabel("training steps of the denoiser")
        axis.set_ylabel("Frechet distance of its samples")
        axis.set_title(f"Mean and range over seeds; dotted: reconstructions. {found.network}", fontsize=8)
        axis.legend()


def samples_sheet(found: Diffusability) -> Tensor:
    """A `sheet` with a row for each codec: samples of the first seed at the end, from the same noise where latents have one shape."""
    rows = [list(each.curves[0].samples) for each in found.codecs]
    return sheet(rows, row_titles=[each.name for each in found.codecs], side=2 * found.side)
