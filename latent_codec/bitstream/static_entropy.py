"""The static (order-0) entropy model: a table for each level of indices, or each channel of latents at each step size.

images --codec--> indices, or latents --quantize at each step size--> symbols --count--> tables
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from latent_codec.bitstream.checks import check
from latent_codec.bitstream.entropy_model import EntropyModel, Pass, Prediction, Shape
from latent_codec.bitstream.sensitivity import coarsest_step_sizes, decoder_sensitivity
from latent_codec.bitstream.tables import TOTAL, Tables, pmf_to_quantized_cdf
from latent_codec.codec import ImageLike, LatentCodec
from latent_codec.models.scalar_quantizer import ScalarQuantizer

NUM_STEP_SIZES = 101
STEP_SIZES_PER_OCTAVE = 16
COVERAGE = 0.9999
"""Share of the quantized latents with entries of their own; the others escape."""
MAX_SYMBOLS = 2048
CROP = 32
"""Side in positions of the latents that measure the decoder's sensitivity."""


@dataclass(frozen=True, kw_only=True, eq=False)
class StaticEntropy(EntropyModel):
    """A static (order-0) model: its tables depend only on a value's level, or on its channel and step size.

    Indices are a pass for each level; latents are one pass, channel by channel. Tables of indices: one per level, top first.
    Of latents: number step_size_index * channels + channel.
    """

    kind = "static"

    def __post_init__(self):
        super().__post_init__()
        if not self.is_indices:
            size = self.step_sizes.size
            check(size == len(self.tables), f"a table for each of {size} step sizes", len(self.tables))

    def predictor(self, shapes: Sequence[Shape], step_size_index: int) -> "StaticPredictor":
        fits = self.is_indices or shapes[0][0] == self.step_sizes.shape[1]
        check(fits and len(shapes) <= len(self.tables), "values of the entropy model's shapes", list(shapes))
        passes = [Pass(level, np.arange(np.prod(shape)), level) for level, shape in enumerate(shapes)]
        if self.is_indices:
            return StaticPredictor(passes, [np.full(len(each.positions), each.level) for each in passes])
        channels, height, width = shapes[0]
        cdf_index = step_size_index * channels + np.arange(channels).repeat(height * width)
        return StaticPredictor(passes, [cdf_index])


@dataclass(frozen=True)
class StaticPredictor:
    """Predicts the same tables whatever was decoded."""

    passes: list[Pass]
    cdf_indices: list[np.ndarray]

    def predict(self, number: int, symbols: Sequence[np.ndarray]) -> Prediction:
        cdf_index = self.cdf_indices[number]
        return Prediction(cdf_index, np.zeros_like(cdf_index))


def fit_static(codec: LatentCodec, images: Iterable[ImageLike]) -> StaticEntropy:
    """Fit a static model: count the symbols of images.

    Unseen symbols count as seen half a time. Step sizes follow from the decoder's sensitivity to errors in each channel.

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
        got = f"{max(sizes)}; compress without an entropy model"
        raise ValueError(f"expected at most {TOTAL} codewords for a table of 16 bits, got {got}")
    counts = [np.full(size, 0.5) for size in sizes]
    num_images = 0
    for image in images:
        num_images += 1
        for count, indices in zip(counts, codec.encode_indices(image)):
            count += np.bincount(indices.cpu().numpy().reshape(-1), minlength=len(count))
    if not num_images:
        raise ValueError("expected at least one image, got none")
    starts = list(map(pmf_to_quantized_cdf, counts))
    tables = Tables.concatenate(starts, [0] * len(starts), escapes=False)
    return StaticEntropy(tables=tables, space_fingerprint=codec.space_fingerprint, codec_name=codec.name)


def _fit_latents(codec: LatentCodec, images: Iterable[ImageLike]) -> StaticEntropy:
    parts, crop = [], None
    for image in images:
        latents = codec.encode(image)
        crop = latents[..., :CROP, :CROP] if crop is None else crop
        parts.append(latents.float().cpu().movedim(1, 0).flatten(1).numpy())
    if crop is None:
        raise ValueError("expected at least one image, got none")
    channels = np.sort(np.concatenate(parts, 1), axis=1)
    deviations = channels.std(1, dtype=np.float64)
    if not (deviations > 0).all():
        raise ValueError(f"channel {int(deviations.argmin())} of {codec.name} is constant over these images")
    octaves = np.arange(NUM_STEP_SIZES) / STEP_SIZES_PER_OCTAVE
    coarsest = coarsest_step_sizes(decoder_sensitivity(codec, crop)).numpy()
    step_sizes = (coarsest * 2.0 ** -octaves[:, None]).astype(np.float32)
    fitted = [_fit_channel(*each) for row in step_sizes for each in zip(channels, row.tolist())]
    starts, minimums, shifts = zip(*fitted)
    return StaticEntropy(
        tables=Tables.concatenate(list(starts), list(minimums), escapes=True),
        space_fingerprint=codec.space_fingerprint,
        codec_name=codec.name,
        step_sizes=step_sizes,
        shifts=np.concatenate(shifts).astype(np.float32),
    )


def _fit_channel(latents: np.ndarray, step_size: float) -> tuple[np.ndarray, int, np.ndarray]:
    """Starts, minimum and shifts of the table of one channel's latents, which are sorted, at one step size."""
    quantizer = ScalarQuantizer(steps=(step_size,))
    quantized = quantizer.encode(torch.from_numpy(latents).view(1, 1, 1, -1)).flatten().numpy()
    beyond = int((1 - COVERAGE) / 2 * len(quantized))
    minimum = max(int(quantized[beyond]), -(MAX_SYMBOLS // 2))
    maximum = min(int(quantized[-1 - beyond]), MAX_SYMBOLS // 2 - 1)
    inside = slice(*np.searchsorted(quantized, [minimum, maximum + 1]))
    entries, num_entries = quantized[inside] - minimum, maximum - minimum + 1
    counts = np.bincount(entries, minlength=num_entries).astype(np.float64)
    distances = latents[inside] / np.float64(step_size) - quantized[inside]
    # Eight more latents at 0 distance keep the shifts of rare symbols small.
    shifts = np.bincount(entries, distances, num_entries) / (counts + 8)
    starts = pmf_to_quantized_cdf(np.append(counts, len(quantized) - len(entries)) + 0.5)
    return starts, minimum, np.append(shifts, 0)
