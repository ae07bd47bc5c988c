"""What rate-distortion trials found: curves, means at equal bytes, and Bjontegaard's differences.

Bits per pixel are those of the whole file, over the pixels of the original. Means are over images, each counting the
same whatever its size.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import mean

from scipy.interpolate import PchipInterpolator

from latent_codec.evaluation.intervals import LESS_IS_BETTER, PairedDifference, paired_difference
from latent_codec.files import plain

METRICS = {"psnr": "PSNR", "ms_ssim": "MS-SSIM", "lpips": "LPIPS", "gmsd": "GMSD", "haarpsi": "HaarPSI"}
MIN_POINTS, MIN_OVERLAP = 4, 1.0
"""Of the two curves of a BD-rate: points of each, and range of quality of both, in dB."""
CURVE = "curve"
"""The comparison at each of a compressor's own rates; the others are at equal bytes."""


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """Fidelity of an image to its original; None where it is too small for a metric, or weights are absent."""

    psnr: float | None
    """In dB; infinite where nothing differs."""
    ms_ssim: float | None
    lpips: float | None
    """By SqueezeNet; less is better."""
    gmsd: float | None = None
    """Less is better."""
    haarpsi: float | None = None

    def better(self, other: "Fidelity", metric: str) -> bool:
        """Whether this is nearer to the original; False where one has no figure."""
        mine, others = upward(metric, getattr(self, metric)), upward(metric, getattr(other, metric))
        return mine is not None and others is not None and mine > others


@dataclass(frozen=True, kw_only=True)
class Trial(Fidelity):
    """One image through one compressor, or the mean of several."""

    comparison: str
    compressor: str
    quality: int | None
    """None of a compressor with one rate, and of means over different ones."""
    num_bytes: float
    bits_per_pixel: float
    fits: bool = True
    """False where even the coarsest quality takes more bytes than it may."""
    image: str = ""
    index: int = -1
    """Place in the source."""
    file: str = ""
    """Below the folder of files."""


@dataclass(frozen=True, kw_only=True)
class Rival:
    """A compressor at equal bytes."""

    mean: Trial
    num_larger: int
    """Images of which even its coarsest file is larger than it may be: these count against us."""
    num_ours_better: dict[str, int | None]
    """Images on which our codec is better, by metric; None where that has no figures."""
    more_bytes: float
    """All its files over all of ours, minus 1."""
    differences: dict[str, PairedDifference | None]
    """By metric; None where fewer than two images have finite figures."""


@dataclass(frozen=True, kw_only=True)
class BDRate:
    """Bjontegaard's difference: how many percent more (less: negative) our files take at equal quality."""

    percent: float | None
    note: str
    """The range of quality that both curves have, or why there is no figure."""


@dataclass(kw_only=True)
class RateDistortion:
    """What `measure_rate_distortion` found."""

    codec: str
    compressors: list[str]
    """Ours first."""
    comparisons: list[str]
    """At equal bytes."""
    trials: list[Trial] = field(default_factory=list)
    ceilings: list[Fidelity] = field(default_factory=list)
    """What comes back of unquantized latents, for each image."""
    skipped: list[str] = field(default_factory=list)
    """One line for each image that could not be read."""
    device: str = ""
    """What our codec and the metrics ran on."""

    @property
    def num_images(self) -> int:
        return len({trial.index for trial in self.trials})

    @property
    def has_curves(self) -> bool:
        return any(trial.comparison == CURVE for trial in self.trials)

    @property
    def ceiling(self) -> Fidelity | None:
        return Fidelity(**_means(self.ceilings)) if self.ceilings else None

    def select(self, comparison: str, compressor: str) -> list[Trial]:
        return [
            each for each in self.trials if (each.comparison, each.compressor) == (comparison, compressor)
        ]

    def curve(self, compressor: str) -> list[Trial]:
        """The mean over images at each quality, coarsest first."""
        trials = self.select(CURVE, compressor)
        qualities = dict.fromkeys(trial.quality for trial in trials)
        return [_mean_trial([each for each in trials if each.quality == quality]) for quality in qualities]

    def rivals(self, comparison: str) -> list[Rival]:
        """Every compressor at the bytes of our files, ours first."""
        ours, found = self.select(comparison, self.codec), []
        for name in self.compressors:
            trials = self.select(comparison, name)
            counts = {
                metric: sum(mine.better(other, metric) for mine, other in zip(ours, trials, strict=True))
                if any(getattr(mine, metric) is not None for mine in ours)
                else None
                for metric in METRICS
            }
            num_larger = sum(not trial.fits for trial in trials)
            found.append(
                Rival(
                    mean=_mean_trial(trials),
                    num_larger=num_larger,
                    num_ours_better=counts,
                    more_bytes=sum(each.num_bytes for each in trials) / sum(each.num_bytes for each in ours)
                    - 1,
                    differences={metric: paired_difference(ours, trials, metric) for metric in METRICS},
                )
            )
        return found

    def bd_rates(self) -> dict[str, dict[str, BDRate]]:
        """By compressor and metric, of our codec against each of the others."""
        return {
            name: {metric: bd_rate(self.curve(name), self.curve(self.codec), metric) for metric in METRICS}
            for name in self.compressors[1:]
        }

    def to_dict(self) -> dict:
        """Plain data for JSON, which knows no infinity: an infinite PSNR becomes None."""
        return plain(
            {
                "codec": self.codec,
                "device": self.device,
                "num_images": self.num_images,
                "curves": {name: [_figures(each) for each in self.curve(name)] for name in self.compressors},
                "ceiling": self.ceiling and asdict(self.ceiling),
                "bd_rates": {
                    name: {metric: asdict(each) for metric, each in by_metric.items()}
                    for name, by_metric in self.bd_rates().items()
                },
                "equal_bytes": {
                    comparison: [
                        _figures(rival.mean)
                        | {key: each for key, each in asdict(rival).items() if key != "mean"}
                        for rival in self.rivals(comparison)
                    ]
                    for comparison in self.comparisons
                },
                "trials": [asdict(trial) for trial in self.trials],
                "skipped": self.skipped,
            }
        )


def upward(metric: str, value: float | None) -> float | None:
    """A figure on a scale where more is better: MS-SSIM in dB, -10 log10(1 - x), and -LPIPS and -GMSD."""
    if value is None or metric in ("psnr", "haarpsi"):
        return value
    if metric in LESS_IS_BETTER:
        return -value
    return -10 * math.log10(1 - value) if value < 1 else math.inf


def bd_rate(anchor: Sequence[Trial], test: Sequence[Trial], metric: str) -> BDRate:
    """Bjontegaard's difference of rate (VCEG-M33): the mean of log rate between two curves, over the quality of both.

    exp(integral of (ln rate of test - ln rate of anchor) over quality / its length) - 1, negative where `test` takes fewer
    bytes. Log rate is interpolated over `upward` quality by piecewise cubics that keep it monotone (PCHIP), as JCTVC-L1100
    has it in place of one cubic, and never extrapolated. Points that cost more and are no better than others are left out.
    There is no figure where a curve has fewer than `MIN_POINTS` others, nor, for PSNR and MS-SSIM in dB, where the range of both is
    less than `MIN_OVERLAP`: a point or two would decide it.
    """
    curves = [_frontier(points, metric) for points in (anchor, test)]
    if not all(curves):
        return BDRate(percent=None, note=f"no figures of {METRICS[metric]}")
    fewest = min(map(len, curves))
    if fewest < MIN_POINTS:
        whose = "ours" if fewest == len(curves[1]) else "theirs"
        return BDRate(percent=None, note=f"needs {MIN_POINTS} rates, {whose} has {fewest}")
    low, high = max(each[0][0] for each in curves), min(each[-1][0] for each in curves)
    if low >= high:
        reaches = [f"{_range(metric, each[0][0], each[-1][0])}" for each in curves]
        return BDRate(percent=None, note=f"no overlap: theirs has {reaches[0]}, ours {reaches[1]}")
    if metric in ("psnr", "ms_ssim") and high - low < MIN_OVERLAP:
        return BDRate(percent=None, note=f"overlap of {high - low:.2f} dB, needs {MIN_OVERLAP:g} dB")
    areas = [PchipInterpolator(*zip(*each)).integrate(low, high) for each in curves]
    percent = 100 * math.expm1((areas[1] - areas[0]) / (high - low))
    return BDRate(percent=percent, note=_range(metric, low, high))


def _frontier(points: Sequence[Trial], metric: str) -> list[tuple[float, float]]:
    """(quality, ln rate), both rising."""
    found: list[tuple[float, float]] = []
    for point in sorted(points, key=lambda each: each.bits_per_pixel):
        quality = upward(metric, getattr(point, metric))
        if quality is None or not math.isfinite(quality):
            continue
        if not found or quality > found[-1][0]:
            found.append((quality, math.log(point.bits_per_pixel)))
    return found


def _range(metric: str, low: float, high: float) -> str:
    """Upward qualities in the metric's own numbers, the worse one first."""
    if metric == "psnr":
        return f"{low:.2f} to {high:.2f} dB"
    if metric == "haarpsi":
        return f"{low:.4f} to {high:.4f}"
    if metric in LESS_IS_BETTER:
        return f"{-low:.3f} to {-high:.3f}"
    return f"{1 - 10 ** (-low / 10):.4f} to {1 - 10 ** (-high / 10):.4f}"


def _mean_trial(trials: Sequence[Trial]) -> Trial:
    first = trials[0]
    return Trial(
        comparison=first.comparison,
        compressor=first.compressor,
        quality=first.quality if len({trial.quality for trial in trials}) == 1 else None,
        num_bytes=mean(trial.num_bytes for trial in trials),
        bits_per_pixel=mean(trial.bits_per_pixel for trial in trials),
        **_means(trials),
    )


def _means(found: Sequence[Fidelity]) -> dict[str, float | None]:
    values = {metric: [x for each in found if (x := getattr(each, metric)) is not None] for metric in METRICS}
    return {metric: mean(each) if each else None for metric, each in values.items()}


def _figures(trial: Trial) -> dict:
    """A mean without what belongs to one image."""
    single = ("comparison", "fits", "image", "index", "file")
    return {key: value for key, value in asdict(trial).items() if key not in single}
