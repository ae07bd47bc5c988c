"""Crops to train on, in an order that a killed run resumes exactly.

`TrainingCrops` makes each crop a pure function of its position in an endless sequence (position -> epoch and
place -> image, window, flip), so a run that is resumed, or moved from one process to two, sees what it would
have seen; `PositionSampler` says which positions each process takes. `StreamedCrops` is for data that can only
be read in order: it remembers where it is.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from latent_codec.errors import SettingError
from latent_codec.images.sources import DatasetImages, ImageSource, encoded_image, image_column
from latent_codec.images.tensors import ImageError, pad_to_size, read_pixels
from latent_codec.training.config import TrainingConfig

logger = logging.getLogger(__name__)
# Independent streams of randomness under one seed.
_ORDER, _CROP = 0, 1


class EpochOrder:
    """Which image each position of an endless sequence shows: a permutation per epoch.

    Epoch = position // count, place = position % count; the image is permutation(seed, epoch)[place].

    Args:
        count: images in an epoch.
        seed: at least 0.
        cumulative_weights: running sum of how often each is to be drawn, relative to the others; None: all equally.
    """

    def __init__(self, count: int, seed: int, cumulative_weights: np.ndarray | None = None):
        self.count, self.seed = count, seed
        self._cumulative = cumulative_weights
        self._latest: tuple[int, np.ndarray] | None = None

    def __getitem__(self, position: int) -> int:
        epoch, place = divmod(position, self.count)
        if self._latest is None or self._latest[0] != epoch:
            self._latest = epoch, self._draw(np.random.default_rng((self.seed, _ORDER, epoch)))
        return int(self._latest[1][place])

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_latest": None}

    def _draw(self, rng: np.random.Generator) -> np.ndarray:
        order = rng.permutation(self.count)
        if self._cumulative is None:
            return order
        # Systematic sampling: one draw in each of `count` equal strata of the total weight.
        draws = (order + rng.random(self.count)) / self.count * self._cumulative[-1]
        return np.searchsorted(self._cumulative, draws, side="right").clip(max=self.count - 1)


@dataclass(eq=False, repr=False, kw_only=True)
class _Crops:
    """How crops are cut, of images in an order that `seed` decides; the arguments are described in `TrainingCrops`."""

    size: tuple[int, int]
    channels: int = 3
    seed: int = 0
    flip: bool = True
    scale: tuple[float, float] = (1.0, 1.0)
    pad_small: bool = False

    def __post_init__(self):
        self.size, self.scale = tuple(self.size), tuple(self.scale)
        for name, fits, expected in (
            (
                "size",
                len(self.size) == 2 and min(self.size) >= 1,
                "(height, width) in pixels, each at least 1",
            ),
            ("channels", self.channels in (1, 3, 4), "1, 3 or 4"),
            ("seed", self.seed >= 0, "at least 0"),
            ("scale", 0 < self.scale[0] <= self.scale[1], "(smallest, largest) resize factor, above 0"),
        ):
            if not fits:
                raise SettingError(name, expected, getattr(self, name))

    @classmethod
    def configured(cls, config: TrainingConfig, images, channels: int, **others) -> Self:
        """Of a source or a stream, as a run's [data] says; `others` are arguments of the class's own."""
        data = config.data
        return cls(
            images,
            size=data.size,
            channels=channels,
            seed=config.run.seed,
            flip=data.flip,
            scale=data.scale,
            pad_small=data.pad_small,
            **others,
        )

    def cut(self, pixels: Tensor, rng: np.random.Generator) -> Tensor:
        """A crop of an image's pixels, (C, H, W) from 0 to 255: float32 (C, h, w) in [-1, 1]."""
        if self.pad_small:
            pixels = pad_to_size(pixels, self.size)
        return random_resized_crop(pixels, self.size, self.scale, self.flip, rng)


@dataclass(eq=False, repr=False)
class TrainingCrops(_Crops, Dataset):
    """Random resized crops of a source's images: `crops[position]`, float32 (C, h, w) in [-1, 1].

    The image is `EpochOrder`'s, window and flip come from a generator seeded by (seed, position). They depend on
    nothing else: not the process, not the worker, not the cache.

    An image that cannot be read is replaced by the next one that can, reported once on stderr, and its name
    listed in `skipped`.

    Args:
        source: what `open_source` gives.
        size: (height, width) of the crops, pixels.
        channels: 1, 3 or 4.
        seed: at least 0.
        flip: mirror half of the crops left to right.
        scale: (smallest, largest) factor by which an image is resized before the crop, drawn log-uniformly; 1 keeps
            its own pixels. An image too small for the crop is enlarged just enough.
        pad_small: continue it beyond its last row and column instead, as LatentCodec does.
        by_area: draw images in proportion to their area, so that every pixel is seen about equally often. Reads
            every image's header once, at the start.
        cache_bytes: decoded images kept in memory, shared out among the workers of a DataLoader; 0 keeps none.
        label_of: the class of an image of the source, by its number; then a crop comes with it, as (crop, class).
    """

    source: ImageSource
    _: KW_ONLY
    by_area: bool = False
    cache_bytes: int = 2 << 30
    label_of: Callable[[int], int] | None = None

    def __post_init__(self):
        super().__post_init__()
        areas = _cumulative_areas(self.source) if self.by_area else None
        self._order = EpochOrder(len(self.source), self.seed, areas)
        self._cache: dict[int, Tensor] = {}
        self._cached_bytes = 0
        # In shared memory, so that the parent sees what its workers could not read.
        self._unreadable = torch.zeros(len(self.source), dtype=torch.bool).share_memory_()

    @classmethod
    def configured(cls, config: TrainingConfig, images: ImageSource, channels: int, **others) -> Self:
        """As `_Crops.configured`; the source may have no images."""
        by_area = config.data.by_area and len(images) > 0
        cache_bytes = int(config.data.cache_gigabytes * 2**30)
        return super().configured(
            config, images, channels, by_area=by_area, cache_bytes=cache_bytes, **others
        )

    def __len__(self) -> int:
        """Images in an epoch; positions go on beyond it."""
        return len(self.source)

    def __getitem__(self, position: int) -> Tensor | tuple[Tensor, int]:
        index, pixels = self._readable(self.image_index(position))
        crop = self.cut(pixels, np.random.default_rng((self.seed, _CROP, position)))
        return crop if self.label_of is None else (crop, self.label_of(index))

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_cache": {}, "_cached_bytes": 0}

    @property
    def skipped(self) -> list[str]:
        """Names of the images that could not be read so far."""
        return [self.source.name(index) for index in self._unreadable.nonzero().flatten().tolist()]

    def image_index(self, position: int) -> int:
        """Which image of the source a position shows, if it can be read."""
        return self._order[position]

    def _readable(self, first: int) -> tuple[int, Tensor]:
        """The image at `first`, or the next one that can be read, and its number."""
        for step in range(len(self)):
            index = (first + step) % len(self)
            if self._unreadable[index]:
                continue
            try:
                return index, self._pixels(index)
            except ImageError as error:
                self._unreadable[index] = True
                logger.warning(f"skipped: {error}")
        raise ValueError(f"none of the {len(self)} images can be read, the first is {self.source.name(0)}")

    def _pixels(self, index: int) -> Tensor:
        if index in self._cache:
            return self._cache[index]
        pixels = self.source.pixels(index, self.channels)
        worker = get_worker_info()
        if self._cached_bytes + pixels.nbytes <= self.cache_bytes // (worker.num_workers if worker else 1):
            self._cache[index] = pixels
            self._cached_bytes += pixels.nbytes
        return pixels


def random_resized_crop(
    pixels: Tensor, size: tuple[int, int], scale: tuple[float, float], flip: bool, rng: np.random.Generator
) -> Tensor:
    """Resize by a log-uniform factor, cut a uniform window, perhaps mirror it.

    Only the window is resized: (h, w) / factor of the image's own pixels, rounded to whole ones, by an
    antialiased bicubic filter; with factor 1 the pixels are untouched.

    Args:
        pixels: (C, H, W) from 0 to 255, uint8 or float32.
        size: (h, w) of the crop.
        scale: (smallest, largest) factor; raised where the image would be smaller than the crop.

    Returns:
        float32, (C, h, w), in [-1, 1].
    """
    height, width = pixels.shape[-2:]
    draw, down, across, mirror = rng.random(4)
    factor = scale[0] * (scale[1] / scale[0]) ** draw
    factor = max(factor, size[0] / height, size[1] / width)
    window = min(round(size[0] / factor), height), min(round(size[1] / factor), width)
    top, left = int(down * (height - window[0] + 1)), int(across * (width - window[1] + 1))
    crop = pixels[:, top : top + window[0], left : left + window[1]].float()
    if window != tuple(size):
        crop = F.interpolate(crop[None], size, mode="bicubic", antialias=True)[0].clamp_(0, 255)
    crop = crop / 127.5 - 1
    return crop.flip(-1) if flip and mirror < 0.5 else crop


def _check_process(process_index: int, num_processes: int) -> None:
    if not 0 <= process_index < num_processes:
        raise SettingError("process_index", f"from 0 to {num_processes - 1}", process_index)


def _cumulative_areas(source: ImageSource) -> np.ndarray:
    """Running sum of the images' areas; one that cannot be opened has none."""
    areas = np.zeros(len(source))
    for index in range(len(source)):
        try:
            areas[index] = np.prod(source.size(index))
        except ImageError:
            continue
    if not areas.any():
        raise ValueError(f"none of the {len(source)} images can be opened, the first is {source.name(0)}")
    return areas.cumsum()


@dataclass(eq=False)
class PositionSampler:
    """Batches of positions for one process, from any optimizer step on; for `DataLoader(batch_sampler=...)`.

    At optimizer step s, micro-batch k, process r of P: positions ((s * accumulation + k) * P + r) * batch_size
    + 0 ... batch_size - 1. So the processes together see, micro-batch by micro-batch, what one process with a batch
    P times as large sees. Do not let accelerate shard the loader again.

    Args:
        start_step: first optimizer step.
        batch_size: of one micro-batch in one process.
        num_steps: optimizer steps to give; None: without end.
    """

    start_step: int = 0
    _: KW_ONLY
    batch_size: int
    accumulation: int = 1
    process_index: int = 0
    num_processes: int = 1
    num_steps: int | None = None

    def __post_init__(self):
        if min(self.batch_size, self.accumulation) < 1 or self.start_step < 0:
            expected = "at least 1 each, and start_step at least 0"
            got = self.batch_size, self.accumulation, self.start_step
            raise SettingError("batch_size, accumulation", expected, got)
        _check_process(self.process_index, self.num_processes)

    def __iter__(self) -> Iterator[list[int]]:
        micro_batch = self.start_step * self.accumulation
        end = None if self.num_steps is None else micro_batch + self.num_steps * self.accumulation
        while micro_batch != end:
            first = (micro_batch * self.num_processes + self.process_index) * self.batch_size
            yield list(range(first, first + self.batch_size))
            micro_batch += 1


def first_images(stream, count: int, *, name: str) -> ImageSource:
    """The first images of a stream by random access, kept in memory as they were encoded.

    For what needs the same images again and again: samples, calibration, a linear start.

    Args:
        stream: a `datasets.IterableDataset`, as `open_stream` gives it.
        count: at most.
        name: of the stream, for messages.

    Raises:
        ValueError: if the stream has no images.
    """
    import datasets

    column = image_column(stream.features or {}, None, name)
    undecoded = stream.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    cells = list(undecoded.take(count))
    if not cells:
        raise ValueError(f"{name} gives no images")
    features = datasets.Features({column: datasets.Image()})
    return DatasetImages(datasets.Dataset.from_list(cells, features=features), column, name)


@dataclass(eq=False, repr=False)
class StreamedCrops(_Crops, IterableDataset):
    """Endless crops of a streamed Hugging Face dataset, split over processes and resumable to the very crop.

    Only the order of the shards is shuffled, anew in every epoch: the contents of a shuffle buffer would be lost
    on resume. Shards are dealt out to the processes where their number divides evenly; otherwise every process
    reads every shard and keeps one example in `num_processes`.

    Images are decoded ahead by threads, so use it in a DataLoader with `num_workers=0`. `state_dict()` says
    where the last crop given came from; `load_state_dict` goes on after it.

    Args:
        stream: a `datasets.IterableDataset`, as `open_stream` gives it.
        column: which column holds the images; None: the first of type Image.
        size, channels, seed, flip, scale: as for `TrainingCrops`.
        num_threads: how many images to decode at a time.
    """

    stream: Any
    _: KW_ONLY
    column: str | None = None
    process_index: int = 0
    num_processes: int = 1
    num_threads: int = 4

    def __post_init__(self):
        import datasets

        super().__post_init__()
        _check_process(self.process_index, self.num_processes)
        self.column = image_column(self.stream.features or {}, self.column, "the stream")
        undecoded = datasets.Image(decode=False)
        self.stream = self.stream.select_columns([self.column]).cast_column(self.column, undecoded)
        self.skipped: list[str] = []
        # Shards finished in this epoch, place inside the shard under way, examples seen by this process in all.
        self._state = {"epoch": 0, "shards_done": 0, "shard": None, "num_examples": 0}

    def state_dict(self) -> dict:
        """The state of this process: plain numbers and strings, to be saved for each process."""
        return {**self._state, "seed": self.seed, "num_processes": self.num_processes}

    def load_state_dict(self, state: dict) -> None:
        """Go on where `state_dict` was taken.

        Raises:
            ValueError: if it was taken with another seed or number of processes, which order the data otherwise.
        """
        for key in ("seed", "num_processes"):
            if state[key] != getattr(self, key):
                raise ValueError(
                    f"this stream was saved with {key}={state[key]} and cannot go on with {getattr(self, key)}"
                )
        self._state = {key: state[key] for key in self._state}

    def __iter__(self) -> Iterator[Tensor]:
        """Crops, float32 (C, h, w) in [-1, 1].

        Raises:
            ValueError: if a whole epoch, or 1,000 images in a row, give nothing to read.
        """
        if get_worker_info() is not None:
            raise ValueError("StreamedCrops decodes in threads of its own: use DataLoader(num_workers=0)")
        num_failed = 0
        waiting = deque()
        with ThreadPoolExecutor(self.num_threads) as pool:
            for state, name, cell in self._examples():
                waiting.append((state, name, pool.submit(self._crop, name, cell, state["num_examples"])))
                if len(waiting) < 2 * self.num_threads:
                    continue
                self._state, name, crop = waiting.popleft()
                try:
                    yield crop.result()
                    num_failed = 0
                except ImageError as error:
                    num_failed += 1
                    if name not in self.skipped:
                        self.skipped.append(name)
                        logger.warning(f"skipped: {error}")
                    if num_failed == 1000:
                        raise ValueError(f"1000 images in a row cannot be read, the last: {error}") from None

    def _examples(self) -> Iterator[tuple[dict, str, dict | None]]:
        """Undecoded images without end, with their names; each after the state that goes on behind it."""
        from datasets.distributed import split_dataset_by_node

        epoch, shards_done = self._state["epoch"], self._state["shards_done"]
        shard_state, count = self._state["shard"], self._state["num_examples"]
        num_shards = self.stream.num_shards
        deal_shards = num_shards % self.num_processes == 0
        while True:
            count_before = count if shards_done == 0 and shard_state is None else None
            order = np.random.default_rng((self.seed, _ORDER, epoch)).permutation(num_shards)
            if deal_shards:
                order = order[self.process_index :: self.num_processes]
            for place in range(shards_done, len(order)):
                shard = self.stream.shard(num_shards, int(order[place]))
                if not deal_shards:
                    shard = split_dataset_by_node(shard, self.process_index, self.num_processes)
                if shard_state is not None:
                    shard.load_state_dict(shard_state)
                for number, example in enumerate(shard):
                    count += 1
                    state = {
                        "epoch": epoch,
                        "shards_done": place,
                        "shard": shard.state_dict(),
                        "num_examples": count,
                    }
                    cell = example[self.column]
                    yield state, (cell or {}).get("path") or f"shard {order[place]}, image {number}", cell
                shard_state = None
            if count == count_before:
                raise ValueError(
                    f"the stream gives process {self.process_index} of {self.num_processes} no images"
                )
            epoch, shards_done = epoch + 1, 0

    def _crop(self, name: str, cell: dict | None, number: int) -> Tensor:
        pixels = read_pixels(encoded_image(cell, name), channels=self.channels, name=name)
        return self.cut(pixels, np.random.default_rng((self.seed, _CROP, number, self.process_index)))
