"""Latents to levels, at the least sum of squared error and bits, and levels to latents."""

import numpy as np

from latent_codec.bitstream.entropy_model import CodedPass, LatentEntropyModel, Prediction


def quantize(
    model: LatentEntropyModel, latents: np.ndarray, steps_index: int, rate_weight: float = 0.0
) -> tuple[np.ndarray, list[CodedPass]]:
    """Levels of a tile, pass by pass, each with the least

        (z / step - what the level comes back as, in steps)^2 + rate_weight bits

    of three: the two nearest, and the likeliest. What a choice does to the chances of later passes is not weighed. For
    steps s of a uniform quantizer at high rate, bits are worth 2 ln(2) / 12 s^2 = 0.116 s^2 each (Sullivan and Wiegand,
    "Rate-distortion optimization for video compression", 1998, give the same trade-off as a function of the step).

    Args:
        latents: float32 (C, h, w), finite.
        rate_weight: of a bit, in squared steps; 0 rounds to the nearest.

    Returns:
        int64 (C, h, w), and what the coder gets of it.
    """
    scaled = (
        latents.astype(np.float64) / model.steps[steps_index].astype(np.float64)[:, None, None]
    ).reshape(-1)
    levels = np.zeros(latents.shape, np.int64)
    coded = []
    predictor = model.predictor([latents.shape], steps_index)
    for number, each in enumerate(predictor.passes):
        prediction = predictor.predict(number, [levels])
        targets = scaled[each.positions] - prediction.offsets
        lower = np.floor(targets).astype(np.int64)
        candidates = np.stack([lower, lower + 1, model.tables.likeliest[prediction.numbers]])
        numbers = np.broadcast_to(prediction.numbers, candidates.shape)
        errors = targets - (candidates + _shifts(model, candidates, numbers))
        costs = errors**2
        if rate_weight:
            costs += rate_weight * model.tables.costs(candidates.reshape(-1), numbers.reshape(-1)).reshape(
                costs.shape
            )
        best = np.take_along_axis(candidates, costs.argmin(0)[None], 0)[0]
        levels.reshape(-1)[each.positions] = best + prediction.offsets
        coded.append(CodedPass(each.layer, best, prediction.numbers))
    return levels, coded


def reconstruct(
    model: LatentEntropyModel, levels: np.ndarray, prediction: Prediction, steps_index: int
) -> np.ndarray:
    """int64 levels (C, h, w) -> float32 latents, (level + shift) step: a sum and a product, rounded as IEEE 754 has it."""
    shifts = _shifts(model, levels - prediction.offsets, prediction.numbers)
    return (levels.astype(np.float32) + shifts) * model.steps[steps_index][:, None, None]


def _shifts(model: LatentEntropyModel, values: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """float32: what lies between a value less its offset and the mean of its latents, in steps; 0 beyond its table."""
    tables = model.tables
    symbols = values - tables.minimums[numbers]
    last = (tables.sizes - tables.escapes)[numbers] - 1
    shifts = model.shifts[tables.offsets[numbers] + np.clip(symbols, 0, np.maximum(last, 0))]
    return np.where((symbols < 0) | (symbols > last), np.float32(0), shifts)
