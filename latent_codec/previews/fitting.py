"""Fitting previews in closed form: from images, or from random latents decoded once.

images --encode--> latents, indices --+--ridge regression--> 1x1 map, or 3x3
    |                                   +--means per codeword--> palette
    +--mean over f x f blocks--> colors+
                                        |
random latents --decode--> blocks ------+      where there are no images
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from latent_codec.codec import LatentCodec
from latent_codec.images.batches import iter_images
from latent_codec.images.sources import ImageSource, spread
from latent_codec.images.tensors import center_crop, pad_to_multiple
from latent_codec.models.quantizers import codeword_sums, nearest_codewords
from latent_codec.previews.full import rgb
from latent_codec.previews.palette import Palette
from latent_codec.previews.previewer import LatentPreviewer, unpacked, with_border
from latent_codec.regression import ridge_regression
from latent_codec.torch_settings import ignoring_caller_settings

if TYPE_CHECKING:
    from latent_codec.latents.data_set import LatentDataset

Source: TypeAlias = "ImageSource | LatentDataset | None"

SIDE = 192
"""Images are cropped to their center, at most this many pixels a side, and random latents make images of at most this side."""

LATENT_SIDE = 24
"""Random latents have at most this side."""

NUM_RANDOM = 8
"""Images decoded from random latents."""

SPECTRUM = 1.0
"""Exponent of random latents' spectrum: images' own, whose amplitude falls as 1 / frequency (Field, 1987).

A 1x1 map fitted to the shipped codec's decodes of such noise correlates by 0.983 with its decodes of Kodak's images, as
one fitted to photographs does; fitted to white noise by 0.965, to noise of exponent 1.5 by 0.980, and to constant
grids, each of one random latent, by 0.976.
"""

PRIOR_COUNT = 4.0
"""Positions that the prediction from a codeword's vector counts as, added to the positions that have the codeword."""

SUFFICIENT = 0.9
"""A 1x1 map that correlates less than this with the colors that it is fitted to gives way to a 3x3 map.

FLUX.2's latents hold color less plainly than others: see `NUM_IMAGES`.
"""

MIN_SAMPLES = 10
"""Positions that a 3x3 map is fitted to at least, per number that it is made of."""

NUM_IMAGES, NUM_OF_COARSE = 24, 96
"""Images that are fitted to unless told otherwise: where a 1x1 map is sufficient, and where it is too coarse.

A 3x3 map has nine times as much to learn. Maps of TAEF2's latents, fitted to N photographs, correlate with its decodes of
Kodak's 12 images by (mean, and least):

       N    1x1            3x3
      24    0.808, 0.738   0.919, 0.892
      96    0.820, 0.756   0.928, 0.898
     996    0.825, 0.759   0.931, 0.906
"""

NUM_HELD_OUT = 4


@dataclass(frozen=True)
class Fit:
    """A fitted preview, and how good it is."""

    weight: Tensor
    """Of the linear map, (3, C) or (3, C, 3, 3)."""
    bias: Tensor
    palette: Palette | None
    """Of discrete codecs."""
    num_images: int
    """0: fitted to random latents."""
    seconds: float
    """What fitting took, without the codec's loading and the correlations."""
    correlation: float | None
    """With the downscaled full decode of images that were held out, Pearson's over all values, mean over images;
    None without such images."""
    palette_correlation: float | None
    """The same from indices."""
    skipped: tuple[str, ...]
    """One line for each image that could not be read, naming it and the reason."""


@dataclass(frozen=True)
class Sample:
    """What a regression learns from, of one batch."""

    latents: Tensor
    """(B, C, h, w), float32 on the CPU, unpacked where the space packs 2x2 positions."""
    indices: list[Tensor]
    """Of each level, (B, h_l, w_l), top first; none of continuous codecs."""
    colors: Tensor
    """(B, 3, h, w) in [-1, 1]."""


@ignoring_caller_settings()
def fit_linear(
    codec: LatentCodec,
    source: Source = None,
    *,
    num_images: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Fit:
    """Fit the linear map, and of a discrete codec the palette.

    Colors are those of the images: a map fitted to what the codec decodes them to is no better (on Kodak both
    correlate by 0.983 with the shipped codec's decodes), and takes three times as long.

    Args:
        codec: not changed.
        source: images of the kind that it is for; or latents of this codec, which are decoded, as then there are no other
            colors; None: random latents, decoded once.
        num_images: at most, spread over `source`; of 8 or more every eighth, up to 4, are held out. None: `NUM_IMAGES`,
            or `NUM_OF_COARSE` where a 1x1 map of those is too coarse.
        on_progress: called with (done, total).

    Raises:
        ValueError: if no image can be read.
    """
    start, skipped = time.perf_counter(), []
    to_samples = _image_samples if isinstance(source, ImageSource) else _latent_samples
    held_out: list[int] = []
    if source is None:
        samples = list(_random_samples(codec, on_progress))
    else:
        chosen = spread(len(source), num_images or NUM_IMAGES)
        held_out = chosen[7::8][:NUM_HELD_OUT]
        fitted = [index for index in chosen if index not in held_out]
        samples = list(to_samples(codec, source, fitted, skipped, on_progress))
        if num_images is None and samples and fit_pointwise(samples)[2] < SUFFICIENT:
            more = [index for index in spread(len(source), NUM_OF_COARSE) if index not in chosen]

            def report(done: int, total: int) -> None:
                if on_progress:
                    on_progress(len(fitted) + done, len(fitted) + total)

            samples += to_samples(codec, source, more, skipped, report)
        if not samples:
            raise ValueError(f"no image could be read; the first of {len(skipped)}: {skipped[0]}")
    weight, bias = fit_map(samples)
    codebooks = [level.codebook.detach().float().cpu() for level in codec.levels]
    palette = fit_palette(codebooks, samples) if codec.is_discrete else None
    seconds = time.perf_counter() - start
    previewer = LatentPreviewer.linear(weight, bias, space=codec.latent_space, palette=palette)
    correlations = _held_out_correlations(codec, source, held_out, previewer)
    num_images = 0 if source is None else len(samples)
    return Fit(weight, bias, palette, num_images, seconds, *correlations, tuple(skipped))


def fit_map(samples: list[Sample]) -> tuple[Tensor, Tensor]:
    """Fit colors as a 1x1 map of the latents, or as a 3x3 map where that is too coarse.

    Returns:
        Weight (3, C) or (3, C, 3, 3), and bias (3,), of a `LinearPreview`.
    """
    weight, bias, correlates = fit_pointwise(samples)
    positions = sum(sample.latents[:, 0].numel() for sample in samples)
    if correlates >= SUFFICIENT or positions < MIN_SAMPLES * 9 * weight.shape[1]:
        return weight, bias
    weight, bias = ridge_regression(
        (F.unfold(with_border(sample.latents), 3).mT.flatten(0, 1), _rows(sample.colors))
        for sample in samples
    )
    return weight.view(3, -1, 3, 3), bias


def fit_pointwise(samples: list[Sample]) -> tuple[Tensor, Tensor, float]:
    """Weight (3, C) and bias (3,) of a 1x1 map, and its correlation with the colors that it is fitted to."""
    weight, bias = ridge_regression((_rows(sample.latents), _rows(sample.colors)) for sample in samples)
    shown = torch.cat([_rows(sample.latents) @ weight.T + bias for sample in samples])
    return weight, bias, correlation(shown, torch.cat([_rows(sample.colors) for sample in samples]))


def fit_palette(codebooks: list[Tensor], samples: list[Sample]) -> Palette:
    """Colors of the codewords: level by level from the top, each the mean of what the levels above left over.

    So the upper levels show all they can while the lower ones are unknown. A codeword's mean is drawn to what a
    regression on the codewords' vectors says, which is all there is for those that no sample has.

    Args:
        codebooks: codewords of each level, (codebook_size, dim), top first.
        samples: with indices of these levels.
    """
    colors = torch.cat([_rows(sample.colors) for sample in samples]).double()
    mean = colors.mean(0)
    left = [sample.colors.double() - mean.view(1, 3, 1, 1) for sample in samples]
    tables = []
    for level, codebook in enumerate(codebooks):
        maps = [sample.indices[level] for sample in samples]
        there = [F.adaptive_avg_pool2d(each, indices.shape[1:]) for each, indices in zip(left, maps)]
        chosen, residuals = (torch.cat([*parts]) for parts in (map(torch.flatten, maps), map(_rows, there)))
        counts, sums = codeword_sums(residuals, chosen, len(codebook))
        means = sums / counts.clamp_min(1).unsqueeze(1)
        weight, bias = ridge_regression([(codebook, means, counts)])
        prior = codebook.double() @ weight.double().T + bias.double()
        table = (sums + PRIOR_COUNT * prior) / (counts + PRIOR_COUNT).unsqueeze(1)
        left = [
            each - F.interpolate(table[indices].permute(0, 3, 1, 2), size=each.shape[2:])
            for each, indices in zip(left, maps)
        ]
        tables.append(table)
    return Palette(mean, tables)


def correlation(a: Tensor, b: Tensor) -> float:
    """Pearson's correlation of two tensors of one shape, over all their values; 0 where one is constant."""
    a, b = (each.double().flatten() - each.double().mean() for each in (a, b))
    return float(a @ b / (a.norm() * b.norm()).clamp_min(1e-12))


def downscaled_decode(codec: LatentCodec, latents: Tensor) -> Tensor:
    """The full decode's mean over each raw latent's block, RGB (B, 3, h, w) on the CPU: what a linear preview aims at."""
    shape = unpacked(latents, codec.latent_space).shape[2:]
    return _blocks(codec.decode(latents, output_type="pt"), shape)


def colored_noise(shape: tuple[int, ...], exponent: float, generator: torch.Generator) -> Tensor:
    """Gaussian noise of unit variance whose amplitude falls as 1 / frequency^exponent, (..., height, width)."""
    height, width = shape[-2:]
    frequency = (torch.fft.fftfreq(height)[:, None].square() + torch.fft.rfftfreq(width).square()).sqrt()
    frequency[0, 0] = 1 / max(height, width)
    spectrum = torch.fft.rfft2(torch.randn(shape, generator=generator)) * frequency**-exponent
    noise = torch.fft.irfft2(spectrum, s=(height, width))
    return noise / noise.std()


def _image_samples(
    codec: LatentCodec,
    source: ImageSource,
    chosen: list[int],
    skipped: list[str],
    on_progress: Callable[[int, int], None] | None,
) -> Iterator[Sample]:
    for _, image in iter_images(
        source, channels=codec.channels, indices=chosen, on_skip=skipped.append, on_progress=on_progress
    ):
        image = _middle(image, codec)
        if codec.is_discrete:
            indices = codec.encode_indices(image)
            latents = _latents_of(codec, indices)
        else:
            indices, latents = [], codec.encode(image).float()
        latents = unpacked(latents.cpu(), codec.latent_space)
        yield Sample(latents, [each.cpu() for each in indices], _blocks(image[None], latents.shape[2:]))


def _latent_samples(
    codec: LatentCodec,
    dataset: "LatentDataset",
    chosen: list[int],
    skipped: list[str],
    on_progress: Callable[[int, int], None] | None,
) -> Iterator[Sample]:
    """The middle of stored latents, and the colors that they are decoded to."""
    for done, number in enumerate(chosen, 1):
        latents, indices, decoded = _decoded(codec, dataset, number)
        latents = unpacked(latents.cpu(), codec.latent_space)
        yield Sample(latents, indices, _blocks(decoded, latents.shape[2:]))
        if on_progress:
            on_progress(done, len(chosen))


def _decoded(
    codec: LatentCodec, dataset: "LatentDataset", number: int
) -> tuple[Tensor, list[Tensor], Tensor]:
    """The middle of an image's latents, or of its indices and their latents, and what they decode to."""
    sample = dataset[number]
    if dataset.is_discrete:
        sides = [level.side for level in codec.levels]
        rows, columns = (min(length, max(SIDE // sides[0], 1)) for length in sample["indices"][0].shape)
        indices = [
            center_crop(level[None], (rows * sides[0] // side, columns * sides[0] // side))
            for level, side in zip(sample["indices"], sides)
        ]
        return _latents_of(codec, indices), indices, codec.decode_indices(indices, output_type="pt")
    latents = sample["latents"][None]
    side = max(SIDE // codec.latent_space.downsampling_factor, 1)
    height, width = latents.shape[2:]
    latents = center_crop(latents, (min(height, side), min(width, side)))
    return latents, [], codec.decode(latents, output_type="pt")


def _random_samples(codec: LatentCodec, on_progress: Callable[[int, int], None] | None) -> Iterator[Sample]:
    """Latents with the spectrum of images, decoded one image at a time."""
    generator = torch.Generator().manual_seed(0)
    multiple, factor = codec.family.side_multiple, codec.latent_space.downsampling_factor
    side = -(-min(SIDE, LATENT_SIDE * factor) // multiple) * multiple // factor
    for done in range(1, NUM_RANDOM + 1):
        if codec.is_discrete:
            indices = _random_indices(codec, side, generator)
            latents = _latents_of(codec, indices)
            decoded = codec.decode_indices(indices, output_type="pt")
        else:
            shape = (1, codec.latent_space.channels, side, side)
            indices, latents = [], colored_noise(shape, SPECTRUM, generator)
            decoded = codec.decode(latents, output_type="pt")
        latents = unpacked(latents.cpu(), codec.latent_space)
        yield Sample(latents, indices, _blocks(decoded, latents.shape[2:]))
        if on_progress:
            on_progress(done, NUM_RANDOM)


def _random_indices(codec: LatentCodec, side: int, generator: torch.Generator) -> list[Tensor]:
    """Index maps of the codewords nearest to colored noise that has the codebooks' own mean and covariance."""
    found = []
    for level in codec.levels:
        codebook = level.codebook.detach().float().cpu()
        length = side * codec.levels[-1].side // level.side
        noise = colored_noise((codebook.shape[1], length, length), SPECTRUM, generator).flatten(1).T
        values, vectors = torch.linalg.eigh(codebook.T.cov().view(codebook.shape[1], -1).double())
        scaled = (vectors * values.clamp_min(0).sqrt()).float()
        found.append(nearest_codewords(noise @ scaled.T + codebook.mean(0), codebook).view(1, length, length))
    return found


def _latents_of(codec: LatentCodec, indices: list[Tensor]) -> Tensor:
    """Scaled latents of indices, float32."""
    raw_latents = codec.family.latents_of_indices([each.to(codec.device) for each in indices]).float()
    return codec.latent_space.normalize(raw_latents)


def _middle(image: Tensor, codec: LatentCodec) -> Tensor:
    """The middle of an image as the codec pads it, (C, H, W)."""
    height, width = image.shape[-2:]
    image = center_crop(image, (min(height, SIDE), min(width, SIDE)))
    return pad_to_multiple(image, codec.family.side_multiple)


def _held_out_correlations(
    codec: LatentCodec, source: Source, held_out: list[int], previewer: LatentPreviewer
) -> tuple[float | None, float | None]:
    found: list[float] = []
    found_of_indices: list[float] = []
    if held_out and not isinstance(source, ImageSource):
        for number in held_out:
            latents, indices, decoded = _decoded(codec, source, number)
            shape = unpacked(latents, codec.latent_space).shape[2:]
            if indices:
                found_of_indices.append(correlation(previewer.indices(indices), _blocks(decoded, shape)))
            found.append(correlation(previewer(latents), _blocks(decoded, shape)))
        return tuple(fmean(each) if each else None for each in (found, found_of_indices))
    for _, image in iter_images(source, channels=codec.channels, indices=held_out, on_skip=lambda line: None):
        latents = codec.encode(_middle(image, codec))
        decoded = downscaled_decode(codec, latents)
        found.append(correlation(previewer(latents), decoded))
        if codec.is_discrete:
            found_of_indices.append(correlation(previewer.indices(codec.encode_indices(image)), decoded))
    return tuple(fmean(each) if each else None for each in (found, found_of_indices))


def _blocks(images: Tensor, shape: tuple[int, int]) -> Tensor:
    """The mean color of each of `shape` blocks, (B, 3, h, w)."""
    return F.adaptive_avg_pool2d(rgb(images.float().cpu()), tuple(shape))


def _rows(values: Tensor) -> Tensor:
    """(B, C, h, w) -> (B h w, C)."""
    return values.permute(0, 2, 3, 1).flatten(0, 2)
