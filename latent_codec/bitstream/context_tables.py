"""Tables of a mixture of Gaussians: for each deviation and each place of the mean between two levels."""

from dataclasses import dataclass

import numpy as np

from latent_codec.bitstream.tables import Tables, cumulative_tables

DEVIATIONS_PER_OCTAVE = 8
SMALLEST, LARGEST = -5, 5
"""log2 of the deviations, in steps."""
FRACTIONS = 16
"""Places of the mean between two levels, where the deviation is below a step; half as many for each octave above."""
TAIL = 2.0**-12
"""Chance of values beyond a table's symbols, either side, at most; they escape."""
_ROUNDS = 8


@dataclass(frozen=True, kw_only=True, eq=False)
class DeviationTables:
    """Table number = firsts[deviation] + (fraction >> drops[deviation]), fraction from 0 to FRACTIONS - 1.

    Deviation i is 2^(SMALLEST + i / DEVIATIONS_PER_OCTAVE) steps; fraction j means a mean of j / FRACTIONS - 1/2 steps.
    """

    tables: Tables
    shifts: np.ndarray
    """float32, flat like `tables.starts`: from a level to the mean of its latents, in steps."""
    firsts: np.ndarray
    """int32."""
    drops: np.ndarray
    """int32."""


def mixture_tables(weights: np.ndarray, scales: np.ndarray, rate_weight: float) -> DeviationTables:
    """Tables of sum_k weights[k] N(mean, (scales[k] deviation)^2), quantised as `quantization.quantize` does.

    A level's interval is where it has the least squared error plus rate: between levels v and v + 1 it ends at
    v + 1/2 + rate_weight (bits(v + 1) - bits(v)) / 2, and bits follow from the intervals in turn (entropy-constrained
    scalar quantisation; Chou, Lookabaugh and Gray, 1989), so that both are found by turns.
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
    return DeviationTables(
        tables=Tables.concatenate(starts, minimums, escapes=True),
        shifts=np.concatenate(shifts).astype(np.float32),
        firsts=np.array(firsts, np.int32),
        drops=np.array(drops, np.int32),
    )


def _table(
    weights: np.ndarray, deviations: np.ndarray, mean: float, rate_weight: float
) -> tuple[np.ndarray, int, np.ndarray]:
    """Starts, the first value and shifts of one table."""
    reach = 1
    while (weights * _upper_tail(reach / deviations)).sum() > TAIL:
        reach += max(1, reach // 8)
    values = np.arange(-reach, reach + 1)
    middles = values[:-1] + 0.5
    edges = middles
    for _ in range(_ROUNDS):
        bounds = np.concatenate([[-reach - 1.0], edges, [reach + 1.0]])
        chances = _chance(weights, deviations, bounds - mean)
        bits = -np.log2(np.maximum(chances, 2.0**-18))
        edges = np.maximum.accumulate(middles + rate_weight * np.diff(bits) / 2)
    firsts = _first_moment(weights, deviations, bounds - mean) + mean * chances
    centres = np.divide(firsts, chances, out=values.astype(np.float64), where=chances > 2.0**-20)
    shifts = np.clip(centres - values, -0.75, 0.75)
    starts = cumulative_tables(np.append(chances, max(1 - chances.sum(), 0)))
    return starts, -reach, np.append(shifts, 0)


def _upper_tail(x: np.ndarray) -> np.ndarray:
    """Of a standard normal variable."""
    import torch

    return torch.special.erfc(torch.from_numpy(np.asarray(x, np.float64)) / 2**0.5).numpy() / 2


def _chance(weights: np.ndarray, deviations: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """Of the intervals between bounds, from the mean."""
    tails = _upper_tail(bounds / deviations[:, None])
    return weights @ (tails[:, :-1] - tails[:, 1:])


def _first_moment(weights: np.ndarray, deviations: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """Integral of the distance from the mean over the intervals between bounds."""
    density = np.exp(-((bounds / deviations[:, None]) ** 2) / 2) / np.sqrt(2 * np.pi) * deviations[:, None]
    return weights @ (density[:, :-1] - density[:, 1:])
