"""Files of a size: which levels of indices fit, or which step sizes of latents, without a pixel being decoded."""

from dataclasses import replace

import numpy as np

from latent_codec.bitstream.coding import Values, encode_passes, encode_values, pack_tiles
from latent_codec.bitstream.container import Header
from latent_codec.bitstream.entropy_model import EntropyModel, LatentEntropyModel
from latent_codec.bitstream.quantization import quantize

RATE_WEIGHT = 0.12
"""What a bit is worth in squared steps, where nothing else is asked for."""
_STRONGEST = 16
"""Times the asked rate weight, at most, where steps alone would miss a size."""
_TRIES = 6
_FINER_STEPS = 4
_ENOUGH = 0.99
"""Part of the bytes asked for at which the search ends."""


def compress_indices(
    model: EntropyModel | None, grids: Values, outline: Header, target_bytes: int | None
) -> tuple[bytes, Values]:
    """The smaller of an entropy coded file and one of fixed length; with `target_bytes`, of as many levels as fit.

    Args:
        grids: int64 (1, h, w) for each level.

    Raises:
        ValueError: if not even the first level fits.
    """
    models = [None] if model is None else [model, None]
    for count in range(len(grids), 0, -1):
        kept, some_levels = grids[:count], replace(outline, levels=outline.levels[:count])
        data = min((encode_values(each, kept, some_levels) for each in models), key=len)
        if target_bytes is None or len(data) <= target_bytes:
            return data, kept
    levels = "its indices" if len(grids) == 1 else "its first level alone"
    raise ValueError(
        f"target_bytes is {target_bytes}, and {levels} take {len(data)} bytes: indices have one rate. Allow as many, or use a "
        "codec of latents"
    )


def compress_latents(
    model: LatentEntropyModel, latents: np.ndarray, outline: Header, steps_index: int, rate_weight: float
) -> tuple[bytes, Values]:
    """A file of latents, float32 (C, h, w), at a step size."""
    levels, tiles = np.zeros(latents.shape, np.int64), []
    for tile in outline.tiles():
        (where,) = tile.slices(outline.levels)
        levels[where], passes = quantize(model, latents[where], steps_index, rate_weight)
        tiles.append(encode_passes(model.tables, passes))
    return pack_tiles(model, tiles, replace(outline, steps_index=steps_index)), [levels]


def compress_latents_to(
    model: LatentEntropyModel, latents: np.ndarray, outline: Header, target_bytes: int, rate_weight: float
) -> tuple[bytes, Values]:
    """The largest file found of at most `target_bytes`: by bisection the finest steps, and between two of them the rate weight.

    Raises:
        ValueError: if the coarsest steps take more.
    """
    best = b"", []
    smallest = None

    def fits(steps_index: int, weight: float) -> bool:
        nonlocal best, smallest
        data, values = compress_latents(model, latents, outline, steps_index, weight)
        smallest = min(smallest or len(data), len(data))
        if len(best[0]) < len(data) <= target_bytes:
            best = data, values
        return len(data) <= target_bytes

    low, high = -1, model.num_steps
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle, rate_weight) else (low, middle)
    # Finer steps are too many bytes unless bits weigh more: how much more, in octaves. Sizes do not quite fall with the weight.
    weight = max(rate_weight, RATE_WEIGHT / 4)
    for finer in range(high, min(high + _FINER_STEPS, model.num_steps)):
        light, heavy = 0.0, float(np.log2(_STRONGEST))
        for _ in range(_TRIES):
            if len(best[0]) >= _ENOUGH * target_bytes:
                break
            middle = (light + heavy) / 2
            light, heavy = (light, middle) if fits(finer, weight * 2**middle) else (middle, heavy)
    if not best[0]:
        raise ValueError(
            f"target_bytes is {target_bytes}, and the smallest file of this image has {smallest}: allow as many"
        )
    return best
