"""Rate control: fit a file into a number of bytes by its levels of indices, or by the step sizes of its latents."""

from dataclasses import replace

import numpy as np

from latent_codec.bitstream.coding import Values, encode_passes, encode_values, pack_tiles
from latent_codec.bitstream.container import Header
from latent_codec.bitstream.entropy_model import EntropyModel
from latent_codec.bitstream.quantization import quantize
from latent_codec.errors import SettingError

RATE_WEIGHT = 0.12
"""Of a bit in squared steps, by default."""
_STRONGEST = 16
"""Largest factor of the rate weight, between two step sizes."""
_TRIES = 6
_FINER_STEPS = 4
_ENOUGH = 0.99
"""Share of the target at which the search ends."""


def compress_indices(
    model: EntropyModel | None, indices: Values, outline: Header, target_bytes: int | None
) -> tuple[bytes, Values]:
    """Write the smaller of an entropy coded file and one of fixed length; with `target_bytes`, of as many levels as fit.

    Args:
        indices: int64 (1, h, w) for each level.

    Raises:
        SettingError: if the first level does not fit.
    """
    models = [None] if model is None else [model, None]
    for count in range(len(indices), 0, -1):
        kept, some_levels = indices[:count], replace(outline, levels=outline.levels[:count])
        data = min((encode_values(each, kept, some_levels) for each in models), key=len)
        if target_bytes is None or len(data) <= target_bytes:
            return data, kept
    what = "indices" if len(indices) == 1 else "the first level of indices"
    expected, advice = f"at least {len(data)} bytes for {what}", "a codec of latents has many rates"
    raise SettingError("target_bytes", expected, target_bytes, advice=advice)


def compress_latents(
    model: EntropyModel, latents: np.ndarray, outline: Header, step_size_index: int, rate_weight: float
) -> tuple[bytes, Values]:
    """Write a file of latents, float32 (C, h, w), at a step size."""
    quantized, tiles = np.zeros(latents.shape, np.int64), []
    for tile in outline.tiles():
        (place,) = tile.slices(outline.levels)
        quantized[place], passes = quantize(model, latents[place], step_size_index, rate_weight)
        tiles.append(encode_passes(model.tables, passes))
    return pack_tiles(model, tiles, replace(outline, step_size_index=step_size_index)), [quantized]


def compress_latents_to(
    model: EntropyModel, latents: np.ndarray, outline: Header, target_bytes: int, rate_weight: float
) -> tuple[bytes, Values]:
    """Search the largest file of at most `target_bytes`: bisect the step sizes and, between two of them, the rate weight.

    Raises:
        SettingError: if the coarsest step sizes take more.
    """
    best = b"", []
    smallest = None

    def fits(step_size_index: int, weight: float) -> bool:
        nonlocal best, smallest
        data, values = compress_latents(model, latents, outline, step_size_index, weight)
        smallest = min(smallest or len(data), len(data))
        if len(best[0]) < len(data) <= target_bytes:
            best = data, values
        return len(data) <= target_bytes

    low, high = -1, model.num_step_sizes
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle, rate_weight) else (low, middle)
    # Finer step sizes fit at a higher rate weight, searched in octaves: sizes only nearly fall with it.
    weight = max(rate_weight, RATE_WEIGHT / 4)
    for finer in range(high, min(high + _FINER_STEPS, model.num_step_sizes)):
        light, heavy = 0.0, float(np.log2(_STRONGEST))
        for _ in range(_TRIES):
            if len(best[0]) >= _ENOUGH * target_bytes:
                break
            middle = (light + heavy) / 2
            light, heavy = (light, middle) if fits(finer, weight * 2**middle) else (middle, heavy)
    if not best[0]:
        raise SettingError("target_bytes", f"at least {smallest} bytes for this image", target_bytes)
    return best
