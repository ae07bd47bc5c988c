"""Encode on this machine: images are decoded in worker processes, and shards written by a thread.

    worker processes --samples--> feeder thread --batches--> network (this thread) --samples--> writer thread --> shards

Each arrow is a queue of bounded length, so that the network waits only where another stage is slower than it.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import chain, groupby
from operator import itemgetter
from queue import Empty, Full, Queue
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from latent_codec.images.tensors import ImageError
from latent_codec.latents.engines.accounting import Accounting, Progress
from latent_codec.latents.plan import Shard
from latent_codec.latents.samples import (
    Sample,
    Unreadable,
    batches,
    encode_batch,
    stack_pixels,
)
from latent_codec.latents.shards import Job, ShardBuilder
from latent_codec.torch_settings import ignoring_caller_settings

logger = logging.getLogger(__name__)

_LOOK_EVERY = 0.2
"""Seconds between looks at whether another stage has failed."""
_BATCHES_AHEAD = 2
_BYTES_AHEAD = 2**28
"""Of prepared images that wait for the network."""
_BYTES_AT_ONCE = 2**18
"""Of prepared images that a worker hands over together: each time costs as much as a small image."""
_SIZES_ASKED = 16
"""Images whose headers tell how large images of their own sizes are."""
_MIN_IMAGES = 32
"""As many images for each process make up for starting it."""


def run(job: Job, on_progress: Progress | None = None, *, num_workers: int | None = None) -> Accounting:
    """Encode the missing shards of a job. An image that cannot be read is reported on the log and left out.

    Args:
        num_workers: processes that decode images; 0: the feeder thread does it; None: one for each CPU, up to 8, and
            none for few images.

    Raises:
        LabelError: for a label that cannot be read.
        ValueError: as `Job.missing`, `encode_batch`.
        OSError: if a shard cannot be written, or a worker process was killed.
    """
    missing = job.missing()
    accounting = Accounting.of(job.plan, missing)
    report = on_progress or (lambda accounting: None)
    report(accounting)
    if missing:
        workers = default_workers(accounting.total - accounting.kept) if num_workers is None else num_workers
        _Run(job, missing, accounting, report, workers).run()
    accounting.ended = time.monotonic()
    report(accounting)
    return accounting


def default_workers(num_images: int) -> int:
    """Worker processes for so many images: one for each CPU that this process may use, up to 8."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cpus, 8, num_images // _MIN_IMAGES)


def _bytes_of_one(job: Job, missing: Sequence[Shard]) -> int:
    """How much a prepared image takes, at most as far as some headers tell."""
    options = job.options
    pixels = options.size**2 if options.size is not None else 1
    if options.size is None:
        first = missing[0].numbers
        for number in first[:: max(len(first) // _SIZES_ASKED, 1)]:
            with suppress(ImageError):
                height, width = job.source.size(number)
                pixels = max(pixels, height * width)
    return pixels * job.codec.channels * (1 + options.flip + options.augment)


class _Prepared(Dataset):
    """Samples of images, by the number of their shard among the missing ones and their own; errors are given, not raised."""

    def __init__(self, prepare: Callable[[int], list[Sample] | Unreadable]):
        self.prepare = prepare

    def __getitem__(
        self, place: tuple[int, range]
    ) -> tuple[int, list[list[Sample] | Unreadable | Exception]]:
        shard, numbers = place
        return shard, [self._of_one(number) for number in numbers]

    def _of_one(self, number: int) -> list[Sample] | Unreadable | Exception:
        try:
            return self.prepare(number)
        except Exception as error:  # which the loader would raise with a traceback as its message
            return error


class _Numbers(Sampler):
    """Of the images of the missing shards, `at_once` at a time; a shard that another run has written meanwhile is passed over."""

    def __init__(self, job: Job, missing: Sequence[Shard], at_once: int):
        self.job, self.missing, self.at_once = job, missing, at_once

    def __iter__(self) -> Iterator[tuple[int, range]]:
        for place, shard in enumerate(self.missing):
            if not self.job.folder.is_complete(shard):
                for start in range(0, len(shard.numbers), self.at_once):
                    yield place, shard.numbers[start : start + self.at_once]


class _Run:
    """The three stages and the queues between them."""

    def __init__(
        self, job: Job, missing: Sequence[Shard], accounting: Accounting, report: Progress, num_workers: int
    ):
        self.job, self.missing, self.accounting, self.report = job, missing, accounting, report
        self.batches: Queue = Queue(_BATCHES_AHEAD)
        self.encoded: Queue = Queue(2 * _BATCHES_AHEAD)
        self.failed: BaseException | None = None
        self.stopped = threading.Event()
        bytes_of_one = _bytes_of_one(job, missing)
        at_once = max(min(job.batch_size, _BYTES_AT_ONCE // bytes_of_one), 1)
        ahead = min(2 * job.batch_size, _BYTES_AHEAD // bytes_of_one) // at_once
        self.loader = DataLoader(
            _Prepared(job.prepare),
            sampler=_Numbers(job, missing, at_once),
            batch_size=None,
            num_workers=num_workers,
            prefetch_factor=-(-max(ahead, 1) // num_workers) if num_workers else None,
            collate_fn=_as_it_is,
            generator=torch.Generator(),  # or it would draw a seed from the caller's
        )

    def run(self) -> None:
        loaded = iter(self.loader)  # starts the processes, before there are threads
        threads = [
            threading.Thread(target=self._guard, args=(stage, *args), daemon=True)
            for stage, *args in ((self._feed, loaded), (self._write,))
        ]
        try:
            for thread in threads:
                thread.start()
            with suppress(_Stopped):
                self._encode()
        except RuntimeError as error:
            if (in_words := _in_words(error)) is error:
                raise
            raise in_words from error
        finally:
            self.stopped.set()
            for thread in threads:
                thread.join()
            del loaded
        if self.failed is not None:
            raise self.failed

    def _feed(self, loaded: Iterator) -> None:
        """Group what the workers give into batches: (shard, samples, pixels); an unreadable image has no pixels, the end of a shard no samples."""
        for place, found in groupby(loaded, key=itemgetter(0)):
            for batch in batches(self._readable(place, found), self.job.batch_size):
                self._put(self.batches, (place, batch, self._pixels(batch)))
            self._put(self.batches, (place, None, None))
        self._put(self.batches, None)

    def _readable(self, place: int, found: Iterator) -> Iterator[Sample]:
        """The samples of a shard, whose unreadable images take another way."""
        for prepared in chain.from_iterable(several for _, several in found):
            if isinstance(prepared, Exception):
                raise prepared
            if isinstance(prepared, Unreadable):
                self._put(self.batches, (place, prepared, None))
            else:
                yield from prepared

    def _pixels(self, batch: list[Sample]) -> Tensor:
        pixels = stack_pixels(batch)
        for sample in batch:
            sample.pixels = None
        return pixels.pin_memory() if self.job.codec.device.type == "cuda" else pixels

    @ignoring_caller_settings()
    def _encode(self) -> None:
        """The network: this thread."""
        accounting = self.accounting
        while True:
            with self._waiting("decoding"):
                found = self._get(self.batches)
            if found is None:
                break
            place, samples, pixels = found
            if isinstance(samples, Unreadable):
                logger.warning("skipped: %s", samples)
                accounting.unreadable(samples)
            elif samples is not None:
                if accounting.first_batch is None:
                    accounting.first_batch = time.monotonic()
                    accounting.waits.clear()
                encode_batch(self.job.codec, samples, self.job.options, pixels)
                accounting.encoded(samples)
            with self._waiting("writing"):
                self._put(self.encoded, (place, samples))
            self.report(accounting)
        self._put(self.encoded, None)
        while self.encoded.unfinished_tasks and self.failed is None:
            time.sleep(0.005)

    def _write(self) -> None:
        builders: dict[int, ShardBuilder] = {}
        while (found := self._get(self.encoded)) is not None:
            place, samples = found
            if place not in builders:
                builders[place] = ShardBuilder(self.missing[place], self.job.options, self.job.codec)
            if isinstance(samples, Unreadable):
                builders[place].skip(samples)
            elif samples is not None:
                builders[place].add(samples)
            else:
                self.job.folder.commit(builders.pop(place).build(), self.job.options)
            self.encoded.task_done()
        self.encoded.task_done()

    @contextmanager
    def _waiting(self, stage: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        waits = self.accounting.waits
        waits[stage] = waits.get(stage, 0.0) + time.monotonic() - began

    def _guard(self, stage: Callable[..., None], *args: Any) -> None:
        try:
            stage(*args)
        except _Stopped:
            pass
        except BaseException as error:
            self.failed = _in_words(error) if isinstance(error, RuntimeError) else error
            self.stopped.set()

    def _put(self, queue: Queue, item: Any) -> None:
        while True:
            self._check()
            with suppress(Full):
                queue.put(item, timeout=_LOOK_EVERY)
                return

    def _get(self, queue: Queue) -> Any:
        """The next item; after the end of another stage, what is still there."""
        while True:
            with suppress(Empty):
                return queue.get(timeout=_LOOK_EVERY)
            self._check()

    def _check(self) -> None:
        """Leave a stage where another has failed."""
        if self.stopped.is_set():
            raise _Stopped


class _Stopped(Exception):
    """Another stage has ended the run."""


def _as_it_is(found):
    return found


def _in_words(error: RuntimeError) -> Exception:
    """A worker that was killed, as an error that says what to do; others as they are."""
    text = str(error)
    if "DataLoader worker" not in text:
        return error
    return ChildProcessError(
        f"a process that decodes images ended before its work was done ({' '.join(text.split())}): perhaps memory is short; "
        "the same command goes on where it was, and fewer worker processes take less"
    )
