"""Frequency tables of a mixture of Gaussians: for each deviation and each fraction of the mean between two integers."""

import numpy as np
import torch

from latent_codec.bitstream.tables import Tables, pmf_to_quantized_cdf

DEVIATIONS_PER_OCTAVE = 8
SMALLEST, LARGEST = -5, 5
"""log2 of the deviations, in steps."""
FRACTIONS = 16
"""Of the mean between two integers, where the deviation is below a step; half as many for each octave above."""
TAIL = 2.0**-12
"""Largest probability, on either side, of the symbols beyond a table; they escape."""
_ROUNDS = 8


def mixture_tables(weights: np.ndarray, scales: np.ndarray, rate_weight: float) -> dict:
    """Compute tables of sum_k weights[k] N(mean, (scales[k] deviation)^2) under RDOQ, as `quantization.quantize` does it.

    A symbol's interval has the least squared error plus rate for it: between symbols v and v + 1 it ends at
    v + 1/2 + rate_weight (bits(v + 1) - bits(v)) / 2. Code lengths follow from the intervals in turn (entropy-constrained
    scalar quantization; Chou, Lookabaugh and Gray, 1989), so that both are computed alternately.

    Returns:
        `tables`, `shifts`, `firsts` and `drops` of a LatentContextEntropy, whose deviation i is
        2^(SMALLEST + i / DEVIATIONS_PER_OCTAVE) steps, and whose fraction j is a mean of j / FRACTIONS - 1/2 steps:
        cdf_index = firsts[deviation] + (fraction >> drops[deviation]).
    """
    count = (LARGEST - SMALLEST) * DEVIATIONS_PER_OCTAVE + 1
    starts, minimums, shifts, firsts, drops = [], [], [], [], []
    for index in range(count):
        deviation = 2.0 ** (SMALLEST + index / DEVIATIONS_PER_OCTAVE)
        drop = int(np.clip(np.ceil(np.log2(deviation)) + 1, 0, np.log2(FRACTIONS)))
        firsts.append(len(starts))
        drops.append(drop)
        for fraction in range(FRACTIONS >> drop):
            mean = ((fraction << drop) + ((1 << drop) - 1) / 2) / FRACTIONS - 0.5
            table, minimum, its_shifts = _table(weights, scales * deviation, mean, rate_weight)
            starts.append(table)
            minimums.append(minimum)
            shifts.append(its_shifts)
    return {
        "tables": Tables.concatenate(starts, minimums, escapes=True),
        "shifts": np.concatenate(shifts).astype(np.float32),
        "firsts": np.array(firsts, np.int32),
        "drops": np.array(drops, np.int32),
    }


def _table(
    weights: np.ndarray, deviations: np.ndarray, mean: float, rate_weight: float
) -> tuple[np.ndarray, int, np.ndarray]:
    """Starts, the minimum and shifts of one table."""
    reach = 1
    while (weights * _upper_tail(reach / deviations)).sum() > TAIL:
        reach += max(1, reach // 8)
    values = np.arange(-reach, reach + 1)
    middles = values[:-1] + 0.5
    edges = middles
    for _ in range(_ROUNDS):
        bounds = np.concatenate([[-reach - 1.0], edges, [reach + 1.0]])
        probabilities = _probabilities(weights, deviations, bounds - mean)
        bits = -np.log2(np.maximum(probabilities, 2.0**-18))
        edges = np.maximum.accumulate(middles + rate_weight * np.diff(bits) / 2)
    moments = _first_moment(weights, deviations, bounds - mean) + mean * probabilities
    centers = np.divide(moments, probabilities, out=values.astype(np.float64), where=probabilities > 2.0**-20)
    shifts = np.clip(centers - values, -0.75, 0.75)
    starts = pmf_to_quantized_cdf(np.append(probabilities, max(1 - probabilities.sum(), 0)))
    return starts, -reach, np.append(shifts, 0)


def _upper_tail(x: np.ndarray) -> np.ndarray:
    """Of a standard normal variable."""
    return torch.special.erfc(torch.from_numpy(np.asarray(x, np.float64)) / 2**0.5).numpy() / 2


def _probabilities(weights: np.ndarray, deviations: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """Of the intervals between bounds, from the mean."""
    tails = _upper_tail(bounds / deviations[:, None])
    return weights @ (tails[:, :-1] - tails[:, 1:])


def _first_moment(weights: np.ndarray, deviations: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """Integral of the distance from the mean over the intervals between bounds."""
    density = np.exp(-((bounds / deviations[:, None]) ** 2) / 2) / np.sqrt(2 * np.pi) * deviations[:, None]
    return weights @ (density[:, :-1] - density[:, 1:])
