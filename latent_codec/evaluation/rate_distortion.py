"""Rate and distortion of a codec and of other compressors, through files on disk.

    image --encode--> file, whose size counts --decode--> image, compared with the original

Bits per pixel are those of the whole file, over the pixels of the original.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import cache
from itertools import islice
from pathlib import Path
from statistics import mean
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from latent_codec import metrics
from latent_codec.evaluation.cost import device_name
from latent_codec.evaluation.rate_distortion_result import CURVE, METRICS, Fidelity, RateDistortion, Trial
from latent_codec.images.batches import iter_images
from latent_codec.images.sources import ImageSource, spread
from latent_codec.images.tensors import to_image, to_pil

SAMPLES = 3
"""Images that choose the qualities of curves."""
PROBES = 6
"""Qualities at which they are encoded for it."""


class Compressor(Protocol):
    """What turns an image into a file and back."""

    name: str
    suffix: str
    """Of its files."""
    qualities: Sequence[int | None]
    """All that it has, coarsest first; [None] where there is one rate."""

    def encode(self, image: Image.Image, quality: int | None) -> bytes: ...

    def decode(self, data: bytes) -> Image.Image: ...


def measure_rate_distortion(
    ours: Compressor,
    others: Sequence[Compressor],
    source: ImageSource,
    folder: Path,
    *,
    channels: int = 3,
    qualities: Sequence[int | None] | None = None,
    rates: Sequence[float] = (0.15,),
    limit: int | None = None,
    device: str | torch.device = "cpu",
    reconstruct: Callable[[Tensor], Tensor] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> RateDistortion:
    """Compress every image by every compressor at several rates, and at equal bytes.

    At equal bytes, image by image: our file is the largest of at most so many bits per pixel, each other one the
    largest of at most as many bytes as ours. Where even the coarsest quality takes more, it is used, and marked.
    Files are searched by bisection, as if they grew with quality; what is found never exceeds its bound.

    Args:
        folder: where the files go, for each image a folder of its own.
        channels: of the images: 1 or 3.
        qualities: of our curve; None: six that take about 0.05 to 0.5 bits per pixel. The others' follow ours. None at
            all ([]) leaves the curves out: only the comparisons take about a quarter of the time.
        rates: bits per pixel of the comparisons at equal bytes; of a codec with one rate there is one comparison, at
            its own bytes, and these are not looked at.
        limit: at most N images, spread evenly over the source; None means all.
        device: where metrics are computed.
        reconstruct: images (N, C, H, W) to what would come back of them without any loss in the files.
        on_progress: called with (trials done, trials in all).

    Raises:
        ValueError: if no image could be read, a compressor cannot take one, or two have one name.
    """
    has_rates = len(ours.qualities) > 1
    comparisons = {f"{rate:g} bpp": rate for rate in rates} if has_rates else {"its own rate": math.inf}
    compressors = [ours, *others]
    if ours.name in {each.name for each in others}:
        raise ValueError(
            f"the codec is called {ours.name}, as one of the others is: rename it, or leave that out"
        )
    result = RateDistortion(
        codec=ours.name,
        compressors=[each.name for each in compressors],
        comparisons=list(comparisons),
        device=device_name(device),
    )
    indices = spread(len(source), limit)
    curves = _qualities_of_curves(compressors, _sample(source, indices, channels), qualities)
    per_image = sum(map(len, curves.values())) + len(comparisons) * len(compressors)

    def add(trial: Trial) -> Trial:
        result.trials.append(trial)
        if on_progress:
            on_progress(len(result.trials) + per_image * len(result.skipped), per_image * len(indices))
        return trial

    readable = iter_images(source, channels=channels, indices=indices, on_skip=result.skipped.append)
    for index, image in readable:
        tests = ImageTrials(source.name(index), index, image.to(device), folder / f"{index:04d}")
        for compressor in compressors:
            for quality in curves[compressor.name]:
                add(tests.run(CURVE, compressor, quality))
        for comparison, rate in comparisons.items():
            bound = rate * image[0].numel() / 8
            ours_there = add(tests.run_within(comparison, ours, bound))
            for compressor in others:
                add(tests.run_within(comparison, compressor, ours_there.num_bytes))
        if reconstruct is not None:
            result.ceilings.append(fidelity(reconstruct(tests.original[None])[0], tests.original))
    if not result.trials:
        raise ValueError(f"no image could be read; the first of {len(result.skipped)}: {result.skipped[0]}")
    return result


def fidelity(image: Tensor, original: Tensor) -> Fidelity:
    """Compare an image with its original, both (C, H, W) in [-1, 1] on one device."""
    found = metrics.compare(image[None], original[None], tuple(METRICS))
    return Fidelity(**{metric: figure for metric, (figure,) in found.items()})


class ImageTrials:
    """One image and its files, in a folder of its own.

    Args:
        original: (C, H, W) in [-1, 1].
    """

    def __init__(self, name: str, index: int, original: Tensor, folder: Path):
        self.name, self.index, self.original, self.folder = name, index, original, folder
        self._image = to_pil(original)
        self._encoded: dict[tuple[str, int | None], bytes] = {}
        self._measured = cache(self._measure)
        folder.mkdir(parents=True, exist_ok=True)

    def run(
        self, comparison: str, compressor: Compressor, quality: int | None, bound: float = math.inf
    ) -> Trial:
        """What the file of this quality takes and gives."""
        found = self._measured(compressor, quality)
        return replace(found, comparison=comparison, fits=found.num_bytes <= bound)

    def run_within(self, comparison: str, compressor: Compressor, bound: float) -> Trial:
        """The finest quality that takes at most `bound` bytes; the coarsest where none does."""
        return self.run(comparison, compressor, self._largest_within(bound, compressor), bound)

    def _measure(self, compressor: Compressor, quality: int | None) -> Trial:
        """Write the file, read it, decode it, measure."""
        label = "" if quality is None else f"-q{quality}"
        path = self.folder / f"{compressor.name.replace('/', '-')}{label}{compressor.suffix}"
        path.write_bytes(self._encode(compressor, quality))
        num_bytes = path.stat().st_size
        decoded = to_image(compressor.decode(path.read_bytes()), channels=len(self.original))
        return Trial(
            comparison=CURVE,
            compressor=compressor.name,
            quality=quality,
            num_bytes=num_bytes,
            bits_per_pixel=8 * num_bytes / self.original[0].numel(),
            image=self.name,
            index=self.index,
            file=f"{self.folder.name}/{path.name}",
            **asdict(fidelity(decoded.to(self.original.device), self.original)),
        )

    def _largest_within(self, num_bytes: float, compressor: Compressor) -> int | None:
        qualities = compressor.qualities
        if not self._fits(compressor, qualities[0], num_bytes):
            return qualities[0]
        # What the curve has encoded already narrows the search.
        known = [place for place, each in enumerate(qualities) if (compressor.name, each) in self._encoded]
        low = max(place for place in known if self._fits(compressor, qualities[place], num_bytes))
        high = min((place for place in known if place > low), default=len(qualities))
        while high - low > 1:
            middle = (low + high) // 2
            if self._fits(compressor, qualities[middle], num_bytes):
                low = middle
            else:
                high = middle
        return qualities[low]

    def _fits(self, compressor: Compressor, quality: int | None, num_bytes: float) -> bool:
        return len(self._encode(compressor, quality)) <= num_bytes

    def _encode(self, compressor: Compressor, quality: int | None) -> bytes:
        key = compressor.name, quality
        if key not in self._encoded:
            self._encoded[key] = compressor.encode(self._image, quality)
        return self._encoded[key]


def _qualities_of_curves(
    compressors: Sequence[Compressor], sample: Sequence[Image.Image], qualities: Sequence[int | None] | None
) -> dict[str, list[int | None]]:
    """Ours as given, or six over 0.05 to 0.5 bits per pixel; the others' eight from half our lowest rate to twice our highest.

    Qualities that are given bound all of them: a format that does not go as low has its coarsest one only.
    """
    if not sample or (qualities is not None and not qualities):
        return {each.name: [] for each in compressors}
    ours, *others = compressors
    stretch = 4 if qualities is None else 1
    qualities = _qualities_between(ours, sample, 0.05, 0.5, 6, 4) if qualities is None else list(qualities)
    ends = [_rate(ours, sample, quality) for quality in (qualities[0], qualities[-1])]
    return {ours.name: qualities} | {
        each.name: _qualities_between(each, sample, min(ends) / 2, max(ends) * 2, 8, stretch)
        for each in others
    }


def _qualities_between(
    compressor: Compressor, sample: Sequence[Image.Image], low: float, high: float, count: int, stretch: float
) -> list[int | None]:
    """Qualities near `count` rates between two, in bits per pixel, coarsest first, by interpolation between a few.

    A compressor that does not go as low starts where it does, and goes on to `stretch` times as much at least.
    """
    qualities = compressor.qualities
    places = np.unique(np.linspace(0, len(qualities) - 1, PROBES).round().astype(int))
    found = np.maximum.accumulate([_rate(compressor, sample, qualities[place]) for place in places])
    low = max(low, found[0])
    rates = np.geomspace(low, max(high, stretch * low), count)
    chosen = np.interp(np.log(rates), np.log(found), places).round().astype(int)
    return [qualities[place] for place in np.unique(chosen)]


def _rate(compressor: Compressor, sample: Sequence[Image.Image], quality: int | None) -> float:
    return mean(8 * len(compressor.encode(each, quality)) / (each.width * each.height) for each in sample)


def _sample(source: ImageSource, indices: Sequence[int], channels: int) -> list[Image.Image]:
    """SAMPLES images that can be read, spread over the source where all can be."""
    first = [indices[place] for place in spread(len(indices), SAMPLES)]
    order = [*first, *(index for index in indices if index not in first)]
    readable = iter_images(source, channels=channels, indices=order, on_skip=lambda line: None)
    return [to_pil(image) for _, image in islice(readable, SAMPLES)]
