"""Tables of order 0: one for each level of indices, or for each channel of latents at each of many step sizes.

    images --codec--> indices, or latents --quantize by each step--> levels --count--> tables

A sidecar, `entropy.safetensors`, holds the integers as they are used, and the numbers that levels come back as.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from latent_codec.bitstream.entropy_model import Pass, Prediction, Shape
from latent_codec.bitstream.sensitivity import coarsest_steps, decoder_sensitivity
from latent_codec.bitstream.stored_entropy import StoredEntropy
from latent_codec.bitstream.tables import TOTAL, Tables, cumulative_tables
from latent_codec.codec import ImageLike, LatentCodec
from latent_codec.models.scalar_quantizer import ScalarQuantizer

NUM_STEPS = 101
STEPS_PER_OCTAVE = 16
COVERAGE = 0.9999
"""Share of the levels that have symbols of their own; the others escape."""
MAX_SYMBOLS = 2048
CROP = 32
"""Positions a side of the latents that the decoder's sensitivity is found from."""


@dataclass(frozen=True, kw_only=True, eq=False)
class StaticEntropy(StoredEntropy):
    """Tables that know nothing of a value but its level, or its channel and step size.

    Indices are a pass for each level; latents are one pass, channel by channel.

    Raises:
        ValueError: for numbers of tables, steps and shifts that do not belong together.
    """

    kind = "static"

    tables: Tables
    """Of indices: one per level, top first. Of latents: number steps_index * channels + channel."""
    space_fingerprint: str
    codec_name: str
    """For messages."""
    steps: np.ndarray | None = None
    """float32 (num_steps, channels), falling, in the latents' unit; None for indices."""
    shifts: np.ndarray | None = None
    """float32, flat like `tables.starts`: what lies between a level and the mean of its latents, in steps."""

    def __post_init__(self):
        if (self.steps is None) != (self.shifts is None):
            raise ValueError("steps and shifts go together: both for latents, neither for indices")
        if self.steps is None:
            return
        for name, dimensions in (("steps", 2), ("shifts", 1)):
            array = getattr(self, name)
            if array.dtype != np.float32 or array.ndim != dimensions or not np.isfinite(array).all():
                raise ValueError(f"{name} are {array.dtype} of shape {array.shape}; expected finite float32")
        if self.steps.size != len(self.tables) or self.shifts.shape != self.tables.starts.shape:
            raise ValueError(
                f"{len(self.tables)} tables came with steps of shape {self.steps.shape} and {len(self.shifts)} shifts"
            )
        if (self.steps <= 0).any():
            raise ValueError("a step is not above 0")

    @property
    def is_indices(self) -> bool:
        return self.steps is None

    @property
    def num_steps(self) -> int:
        """Step sizes to choose from; 0 for indices."""
        return 0 if self.steps is None else len(self.steps)

    def predictor(self, shapes: Sequence[Shape], steps_index: int) -> "StaticPredictor":
        """A pass for each level, row by row."""
        if len(shapes) > len(self.tables) or (not self.is_indices and shapes[0][0] != self.steps.shape[1]):
            raise ValueError(f"these tables are not for values of shapes {list(shapes)}")
        passes = [Pass(level, np.arange(np.prod(shape)), level) for level, shape in enumerate(shapes)]
        if self.is_indices:
            return StaticPredictor(passes, [np.full(len(each.positions), each.level) for each in passes])
        channels, height, width = shapes[0]
        return StaticPredictor(passes, [steps_index * channels + np.arange(channels).repeat(height * width)])

    def arrays(self) -> dict[str, np.ndarray]:
        arrays = self.tables.arrays()
        if self.steps is not None:
            arrays |= {"steps": self.steps, "shifts": self.shifts}
        return arrays

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray], **names: str) -> "StaticEntropy":
        tables = Tables.from_arrays(arrays)
        return cls(tables=tables, steps=arrays.pop("steps", None), shifts=arrays.pop("shifts", None), **names)


@dataclass(frozen=True)
class StaticPredictor:
    """Tables that no value changes."""

    passes: list[Pass]
    numbers: list[np.ndarray]

    def predict(self, number: int, values: Sequence[np.ndarray]) -> Prediction:
        numbers = self.numbers[number]
        return Prediction(numbers, np.zeros_like(numbers))


def fit_static(codec: LatentCodec, images: Iterable[ImageLike]) -> StaticEntropy:
    """Count what a codec makes of images.

    Unseen indices and levels count as half a time seen. Steps follow from what the decoder makes of errors in each channel.

    Args:
        images: each of any size; a few dozen are enough for latents, for K indices some hundred K positions.

    Raises:
        ValueError: for no images, a channel that never changes, or a codebook of more than 2^16 codewords.
    """
    if codec.indices_suffice:
        return _fit_indices(codec, images)
    return _fit_latents(codec, images)


def _fit_indices(codec: LatentCodec, images: Iterable[ImageLike]) -> StaticEntropy:
    sizes = codec.codebook_sizes
    if max(sizes) > TOTAL:
        raise ValueError(
            f"a codebook of {max(sizes)} codewords has no table of 16 bits, which ends at {TOTAL}; "
            "compress its indices without an entropy model"
        )
    counts = [np.full(size, 0.5) for size in sizes]
    num_images = 0
    for image in images:
        num_images += 1
        for count, grid in zip(counts, codec.encode_indices(image)):
            count += np.bincount(grid.cpu().numpy().reshape(-1), minlength=len(count))
    if not num_images:
        raise ValueError("no images came; give at least one")
    tables = Tables.concatenate(
        [cumulative_tables(count) for count in counts], [0] * len(counts), escapes=False
    )
    return StaticEntropy(tables=tables, space_fingerprint=codec.space_fingerprint, codec_name=codec.name)


def _fit_latents(codec: LatentCodec, images: Iterable[ImageLike]) -> StaticEntropy:
    parts, crop = [], None
    for image in images:
        latents = codec.encode(image)
        crop = latents[..., :CROP, :CROP] if crop is None else crop
        parts.append(latents.float().cpu().movedim(1, 0).flatten(1).numpy())
    if crop is None:
        raise ValueError("no images came; give at least one")
    channels = np.sort(np.concatenate(parts, 1), axis=1)
    deviations = channels.std(1, dtype=np.float64)
    if not (deviations > 0).all():
        raise ValueError(
            f"channel {int(deviations.argmin())} of {codec.name} is the same everywhere in these images"
        )
    octaves = np.arange(NUM_STEPS) / STEPS_PER_OCTAVE
    coarsest = coarsest_steps(decoder_sensitivity(codec, crop)).numpy()
    steps = (coarsest * 2.0 ** -octaves[:, None]).astype(np.float32)
    fitted = [_fit_channel(values, step) for row in steps for values, step in zip(channels, row.tolist())]
    starts, minimums, shifts = zip(*fitted)
    return StaticEntropy(
        tables=Tables.concatenate(list(starts), list(minimums), escapes=True),
        space_fingerprint=codec.space_fingerprint,
        codec_name=codec.name,
        steps=steps,
        shifts=np.concatenate(shifts).astype(np.float32),
    )


def _fit_channel(values: np.ndarray, step: float) -> tuple[np.ndarray, int, np.ndarray]:
    """Starts, minimum and shifts of the table of one channel's values, which are sorted, at one step."""
    quantizer = ScalarQuantizer(steps=(step,))
    levels = quantizer.encode(torch.from_numpy(values).view(1, 1, 1, -1)).flatten().numpy()
    beyond = int((1 - COVERAGE) / 2 * len(levels))
    minimum = max(int(levels[beyond]), -(MAX_SYMBOLS // 2))
    maximum = min(int(levels[-1 - beyond]), MAX_SYMBOLS // 2 - 1)
    inside = slice(*np.searchsorted(levels, [minimum, maximum + 1]))
    symbols, num_symbols = levels[inside] - minimum, maximum - minimum + 1
    counts = np.bincount(symbols, minlength=num_symbols).astype(np.float64)
    distances = values[inside] / np.float64(step) - levels[inside]
    # A few values more, in the middle, hold the mean of rare levels near the middle.
    shifts = np.bincount(symbols, distances, num_symbols) / (counts + 8)
    starts = cumulative_tables(np.append(counts, len(levels) - len(symbols)) + 0.5)
    return starts, minimum, np.append(shifts, 0)
