"""Means over images with their 95 % intervals, and differences of two codecs on the same images."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from scipy.stats import t as student_t

CONFIDENCE = 0.95
LESS_IS_BETTER = ("lpips", "gmsd", "edge_error")


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean over images."""

    mean: float
    low: float
    """Lower end of the 95 % interval of the mean, by Student's t."""
    high: float

    @property
    def excludes_0(self) -> bool:
        return not self.low <= 0 <= self.high


@dataclass(frozen=True, kw_only=True)
class PairedDifference(Interval):
    """One's figure minus another's on the same image, over images."""

    ahead: bool | None
    """Whether the one is better; None where the interval holds 0, and no difference is seen."""


def mean_interval(values: Sequence[float]) -> Interval | None:
    """mean +- t_{n-1} s / sqrt(n), with s the standard deviation of the n values; None of fewer than two."""
    count = len(values)
    if count < 2:
        return None
    middle = mean(values)
    half = float(student_t.ppf((1 + CONFIDENCE) / 2, count - 1)) * stdev(values) / math.sqrt(count)
    return Interval(mean=middle, low=middle - half, high=middle + half)


def paired_difference(ours: Sequence, theirs: Sequence, metric: str) -> PairedDifference | None:
    """Ours minus theirs over the images of both, in the metric's own unit.

    Args:
        ours, theirs: for each image an object with an attribute `metric`, a float or None.
    """
    pairs = [
        (getattr(mine, metric), getattr(other, metric)) for mine, other in zip(ours, theirs, strict=True)
    ]
    differences = [a - b for a, b in pairs if a is not None and b is not None and math.isfinite(a - b)]
    found = mean_interval(differences)
    if found is None:
        return None
    ahead = (found.mean > 0) != (metric in LESS_IS_BETTER) if found.excludes_0 else None
    return PairedDifference(mean=found.mean, low=found.low, high=found.high, ahead=ahead)
