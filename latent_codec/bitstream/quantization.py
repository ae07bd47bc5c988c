"""Rate-distortion-optimized quantization (RDOQ) of latents, and reconstruction."""

import numpy as np

from latent_codec.bitstream.entropy_model import CodedPass, EntropyModel, Prediction


def quantize(
    model: EntropyModel, latents: np.ndarray, step_size_index: int, rate_weight: float = 0.0
) -> tuple[np.ndarray, list[CodedPass]]:
    """Quantize a tile's latents z, pass by pass, each to the candidate q with the least squared error plus rate,

        (z / step_size - q - shift of q)^2 + rate_weight code_length(q)

    of three: the two nearest integers, and the most probable symbol. Effects on later passes are ignored. For a uniform
    quantizer of step size s at high rate a bit is worth 2 ln(2) / 12 s^2 = 0.116 s^2 (Sullivan and Wiegand,
    "Rate-distortion optimization for video compression", 1998, give the same trade-off as a function of the step size).

    Args:
        latents: float32 (C, h, w), finite.
        rate_weight: of a bit, in squared steps; 0 rounds to the nearest.

    Returns:
        Quantized latents, int64 (C, h, w), and their passes for the entropy coder.
    """
    step_sizes = model.step_sizes[step_size_index].astype(np.float64)
    scaled = (latents.astype(np.float64) / step_sizes[:, None, None]).reshape(-1)
    quantized, passes = np.zeros(latents.shape, np.int64), []
    predictor = model.predictor([latents.shape], step_size_index)
    for number, each in enumerate(predictor.passes):
        prediction = predictor.predict(number, [quantized])
        targets = scaled[each.positions] - prediction.offsets
        lower = np.floor(targets).astype(np.int64)
        candidates = np.stack([lower, lower + 1, model.tables.most_probable[prediction.cdf_index]])
        cdf_index = np.broadcast_to(prediction.cdf_index, candidates.shape)
        costs = (targets - (candidates + _shifts(model, candidates, cdf_index))) ** 2
        if rate_weight:
            costs += rate_weight * model.tables.code_lengths(candidates, cdf_index)
        best = np.take_along_axis(candidates, costs.argmin(0)[None], 0)[0]
        quantized.reshape(-1)[each.positions] = best + prediction.offsets
        passes.append(CodedPass(each.layer, best, prediction.cdf_index))
    return quantized, passes


def reconstruct(
    model: EntropyModel, quantized: np.ndarray, prediction: Prediction, step_size_index: int
) -> np.ndarray:
    """Dequantize int64 (C, h, w) to float32 latents, (q + shift of q) step_size: a sum and a product, rounded as in IEEE 754."""
    shifts = _shifts(model, quantized - prediction.offsets, prediction.cdf_index)
    return (quantized.astype(np.float32) + shifts) * model.step_sizes[step_size_index][:, None, None]


def _shifts(model: EntropyModel, symbols: np.ndarray, cdf_index: np.ndarray) -> np.ndarray:
    """From symbols to the means of their latents, in steps, float32; 0 for an escaped symbol."""
    tables = model.tables
    entries = symbols - tables.minimums[cdf_index]
    last = (tables.sizes - tables.escapes)[cdf_index] - 1
    shifts = model.shifts[tables.offsets[cdf_index] + np.clip(entries, 0, np.maximum(last, 0))]
    return np.where((entries < 0) | (entries > last), np.float32(0), shifts)
