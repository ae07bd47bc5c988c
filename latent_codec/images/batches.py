"""Walk through the images of a source, and stack them to batches."""

import logging
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from latent_codec.images.sources import ImageSource, spread
from latent_codec.images.tensors import ImageError

logger = logging.getLogger(__name__)


def iter_images(
    source: ImageSource,
    limit: int | None = None,
    channels: int = 3,
    *,
    indices: Sequence[int] | None = None,
    ahead: int = 0,
    on_skip: Callable[[str], None] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Yield the index and the image, float32 (channels, H, W) in [-1, 1], of every image that can be read.

    Args:
        limit: at most N images, spread evenly over the source (`spread`); None: all.
        indices: the images themselves, in this order, instead of a limit.
        ahead: how many more images threads read while one is worked on.
        on_skip: called with a line for every image that cannot be read; None logs a warning.
        on_progress: called with (images done, images in all) once the caller is done with an image.

    Raises:
        ValueError: if `limit` is less than 1.
    """
    indices = spread(len(source), limit) if indices is None else indices
    skip = on_skip or (lambda line: logger.warning("skipped: %s", line))
    for done, (index, read) in enumerate(_readings(source, indices, channels, ahead), 1):
        try:
            image = read()
        except ImageError as error:
            skip(str(error))
        else:
            yield index, image
        if on_progress:
            on_progress(done, len(indices))


def _readings(
    source: ImageSource, indices: Sequence[int], channels: int, ahead: int
) -> Iterator[tuple[int, Callable[[], Tensor]]]:
    """Each index with a function that gives its image or raises."""
    if not ahead:
        yield from ((index, lambda index=index: source.image(index, channels)) for index in indices)
        return
    upcoming = iter(indices)
    with ThreadPoolExecutor() as threads:

        def submit(count: int) -> list:
            chosen = islice(upcoming, count)
            return [(index, threads.submit(source.image, index, channels)) for index in chosen]

        waiting = deque(submit(ahead))
        while waiting:
            index, reading = waiting.popleft()
            waiting.extend(submit(1))
            yield index, reading.result


def batch_by_shape(
    items: Iterable[tuple], *, max_images: float = math.inf, max_pixels: float = math.inf
) -> Iterator[tuple[Any, ...]]:
    """Stack consecutive items of equal shapes.

    Args:
        items: (index, image), or an index and several tensors, as the index maps of several levels.
        max_images: of a batch.
        max_pixels: of a batch, counted in the last tensor of every item; one larger image is a batch.

    Yields:
        The list of indices, and for each tensor of an item the stack of a batch's.
    """
    batch: list[tuple] = []
    for item in items:
        _, *tensors = item
        num_pixels = (len(batch) + 1) * math.prod(tensors[-1].shape[-2:])
        is_full = len(batch) >= max_images or num_pixels > max_pixels
        if batch and (is_full or any(a.shape != b.shape for a, b in zip(tensors, batch[0][1:]))):
            yield _stacked(batch)
            batch = []
        batch.append(item)
    if batch:
        yield _stacked(batch)


def _stacked(batch: list[tuple]) -> tuple:
    indices, *parts = zip(*batch)
    return list(indices), *map(torch.stack, parts)
