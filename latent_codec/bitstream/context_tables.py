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
        deviations = scales * deviation
        reach = 1
        while (weights * _upper_tail(reach / deviations)).sum() > TAIL:
            reach += max(1, reach // 8)
        firsts.append(len(starts))
        drops.append(drop)
        fractions = np.arange(FRACTIONS >> drop)
        means = ((fractions << drop) + ((1 << drop) - 1) / 2) / FRACTIONS - 0.5
        its_starts, its_shifts = _tables(weights, deviations, means, reach, rate_weight)
        starts += [*its_starts]
        minimums += [-reach] * len(means)
        shifts.append(its_shifts.reshape(-1))
    return {
        "tables": Tables.concatenate(starts, minimums, escapes=True),
        "shifts": np.concatenate(shifts).astype(np.float32),
        "firsts": np.array(firsts, np.int32),
        "drops": np.array(drops, np.int32),
    }


def _tables(
    weights: np.ndarray, deviations: np.ndarray, means: np.ndarray, reach: int, rate_weight: float
) -> tuple[np.ndarray, np.ndarray]:
    """Starts and shifts of the tables of -reach to reach, a row for each mean."""
    values = np.arange(-reach, reach + 1)
    middles = values[:-1] + 0.5
    means = means[:, None]
    edges = np.broadcast_to(middles, (len(means), len(middles)))
    for _ in range(_ROUNDS):
        bounds = np.pad(edges, ((0, 0), (1, 1)), constant_values=((0, 0), (-reach - 1, reach + 1)))
        probabilities = _probabilities(weights, deviations, bounds - means)
        bits = -np.log2(np.maximum(probabilities, 2.0**-18))
        edges = np.maximum.accumulate(middles + rate_weight * np.diff(bits) / 2, axis=1)
    moments = _first_moment(weights, deviations, bounds - means) + means * probabilities
    centers = np.broadcast_to(values, probabilities.shape).astype(np.float64)
    np.divide(moments, probabilities, out=centers, where=probabilities > 2.0**-20)
    shifts = np.clip(centers - values, -0.75, 0.75)
    beyond = np.array([[max(1 - each.sum(), 0)] for each in probabilities])
    starts = pmf_to_quantized_cdf(np.append(probabilities, beyond, axis=1))
    return starts, np.append(shifts, np.zeros_like(beyond), axis=1)


def _upper_tail(x: np.ndarray) -> np.ndarray:
    """Of a standard normal variable."""
    return torch.special.erfc(torch.from_numpy(np.asarray(x, np.float64)) / 2**0.5).numpy() / 2


def _probabilities(weights: np.ndarray, deviations: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """Of the intervals between bounds, from the mean: (rows, bounds) -> (rows, bounds - 1)."""
    tails = _upper_tail(bounds[:, None] / deviations[:, None])
    return _mixed(weights, tails[..., :-1] - tails[..., 1:])


def _first_moment(weights: np.ndarray, deviations: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """Integral of the distance from the mean over the intervals between bounds."""
    density = np.exp(-((bounds[:, None] / deviations[:, None]) ** 2) / 2) / np.sqrt(2 * np.pi)
    density *= deviations[:, None]
    return _mixed(weights, density[..., :-1] - density[..., 1:])


def _mixed(weights: np.ndarray, parts: np.ndarray) -> np.ndarray:
    """Each row's sum over the mixture, (rows, components, n) -> (rows, n)."""
    return np.stack([weights @ each for each in parts])
