"""Samples of a data set of latents: prepared from images, grouped into batches, encoded.

    image --prepare--> samples with pixels --batches--> those of one size --encode_batch--> samples with arrays

`prepare` needs no codec, and runs in any process; each step is a function of the image's name and the options.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from latent_codec.codec import LatentCodec, NonFiniteError
from latent_codec.images.buckets import Frame, Framing, Size, cut
from latent_codec.images.image_source import MAX_SIDECAR_BYTES, ImageSource
from latent_codec.images.origins import Origin
from latent_codec.images.sources import checked_label
from latent_codec.images.tensors import ImageError
from latent_codec.latents.latent_files import Label
from latent_codec.latents.plan import EncodingOptions, stored_name

MIRRORED = " (mirrored)"
"""What the name of an image's mirror image ends with."""

_PIXELS_OF_ONE = 256 * 256
"""A batch has at most as many pixels as its number of images would have at 256x256."""
_PIXELS_ON_CPU = 2 * _PIXELS_OF_ONE
"""More at once takes memory and makes no CPU faster."""
_BATCHES_WAITING = 8


@dataclass(kw_only=True)
class Sample:
    """A version of an image: itself, its mirror image, or a random window of it."""

    number: int
    """Of the image in its source."""
    version: int
    name: str
    key: str
    """Of its files in a webdataset tar, without what comes after the first dot."""
    original: Size
    """(height, width) of the image in its file."""
    frame: Frame
    label: Label = None
    sidecars: dict[str, bytes] = field(default_factory=dict)
    """What else the source's sample has, by suffix; "txt" is the caption."""
    origin: Origin | None = None
    """What the image stands for, where that is no 8-bit one."""
    pixels: np.ndarray | None = None
    """(C, h, w) from 0 to 255, uint8, or float32 where there is an origin, until they are encoded."""
    arrays: dict[str, Tensor] = field(default_factory=dict)
    """latents; or mean and logvar; or indices (indices.0, indices.1 ... of several levels)."""

    @property
    def caption(self) -> str | None:
        text = self.sidecars.get("txt")
        return None if text is None else text.decode(errors="replace").strip()


@dataclass(frozen=True)
class Unreadable:
    """An image that cannot be read, and why."""

    number: int
    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


@dataclass(frozen=True)
class Preparing:
    """Makes samples of a source's images; small, so that worker processes can have it."""

    source: ImageSource
    options: EncodingOptions
    channels: int
    framing: Framing

    @classmethod
    def of(cls, source: ImageSource, options: EncodingOptions, codec: LatentCodec) -> "Preparing":
        return cls(source, options, codec.channels, options.framing(codec.family.side_multiple))

    def __call__(self, number: int) -> list[Sample] | Unreadable:
        """An image's versions, in their order.

        Raises:
            LabelError: for a label that cannot be read.
            OSError: if the source itself cannot be read.
        """
        name = stored_name(self.source, number)
        label = checked_label(self.source.label(number), name) if self.options.labels else None
        try:
            pixels, origin = self.source.pixels(number, self.channels), self.source.origin(number)
        except ImageError as error:
            return Unreadable(number, name, str(error).removeprefix(f"{self.source.name(number)}: "))
        original = pixels.shape[1], pixels.shape[2]
        key, sidecars = self.source.key(number), _bounded(self.source.sidecars(number))
        return [
            Sample(
                number=number,
                version=version,
                name=name + suffix,
                key=key + ending,
                original=original,
                frame=frame,
                label=label,
                sidecars=sidecars,
                origin=_origin_in(frame, original, origin),
                pixels=np.ascontiguousarray(cut(pixels, frame).numpy()),
            )
            for version, (suffix, ending, frame) in enumerate(self._versions(name, original))
        ]

    def _versions(self, name: str, size: Size) -> Iterator[tuple[str, str, Frame]]:
        """What is added to the name and to the key of each version, and its frame."""
        frame = self.framing.frame(*size)
        yield "", "", frame
        if self.options.flip:
            yield MIRRORED, "-flipped", Frame(frame.resized, frame.window, True)
        for number in range(1, self.options.augment + 1):
            rng = np.random.default_rng(seed_of(self.options.seed, f"{name}\0window {number}"))
            yield f" (augmented {number})", f"-aug{number}", self.framing.random_frame(*size, rng)


def original_name(name: str) -> str:
    """The name of the image that a sample is a version of."""
    name = name.removesuffix(MIRRORED)
    stem, separator, number = name.rpartition(" (augmented ")
    return stem if separator and number.removesuffix(")").isdigit() else name


def seed_of(seed: int, text: str) -> int:
    """64 bits for a generator, that depend on a seed and a text."""
    return int.from_bytes(hashlib.sha256(f"{seed}\0{text}".encode(errors="surrogateescape")).digest()[:8])


def batches(samples: Iterable[Sample], batch_size: int) -> Iterator[list[Sample]]:
    """Group a shard's samples by size, by a rule that depends on nothing but their order and sizes.

    A batch is full when it has `batch_size` samples, or as many pixels as those would have at 256x256. When as many
    pixels wait as 8 batches have, those of the size that has waited longest are a batch; at the end so are all others,
    in their order.
    """
    full = batch_size * _PIXELS_OF_ONE
    waiting: dict[Size, list[Sample]] = {}
    pixels_waiting = 0
    for sample in samples:
        size = sample.frame.size
        pixels = size[0] * size[1]
        group = waiting.setdefault(size, [])
        group.append(sample)
        pixels_waiting += pixels
        is_full = len(group) >= max(min(batch_size, full // pixels), 1)
        if is_full or pixels_waiting >= _BATCHES_WAITING * full:
            oldest = size if is_full else next(iter(waiting))
            group = waiting.pop(oldest)
            pixels_waiting -= len(group) * oldest[0] * oldest[1]
            yield group
    yield from waiting.values()


def encode_batch(
    codec: LatentCodec, samples: Sequence[Sample], options: EncodingOptions, images: Tensor | None = None
) -> None:
    """Encode samples of one size: their pixels become arrays.

    Args:
        images: their pixels, (B, C, h, w) from 0 to 255; None: those of the samples.

    Raises:
        NonFiniteError: if values overflow the stored dtype.
    """
    images = stack_pixels(samples) if images is None else images
    images = images.to(codec.device, non_blocking=True)
    height, width = images.shape[-2:]
    at_once = max(_PIXELS_ON_CPU // (height * width), 1) if images.device.type == "cpu" else len(images)
    dtype = getattr(torch, options.stored_dtype(codec))
    for start in range(0, len(images), at_once):
        part = samples[start : start + at_once]
        encoded = _encoded(codec, part, options, images[start : start + at_once].float() / 127.5 - 1)
        for name, batch in encoded.items():
            batch = batch.cpu()
            if batch.is_floating_point() and batch.dtype != dtype:
                batch = batch.to(dtype)
                if not torch.isfinite(batch).all():
                    raise NonFiniteError(f"{codec.name}: {name} overflow {dtype}; store them as float32")
            for sample, array in zip(part, batch):
                sample.arrays[name] = array
    for sample in samples:
        sample.pixels = None


def _encoded(
    codec: LatentCodec, samples: Sequence[Sample], options: EncodingOptions, images: Tensor
) -> dict[str, Tensor]:
    """What is stored of images in [-1, 1], by name; each tensor is a batch."""
    if options.kind == "indices":
        levels = codec.encode_indices(images)
        names = ["indices"] if len(levels) == 1 else [f"indices.{level}" for level in range(len(levels))]
        return dict(zip(names, levels))
    if options.posterior == "mean":
        return {"latents": codec.encode(images)}
    mean, posterior, _ = codec.encode_all(images)
    logvar = codec.latent_space.normalize_log_variance(posterior.logvar.float())
    if options.posterior == "both":
        return {"mean": mean, "logvar": logvar}
    noise = [
        torch.randn(
            mean.shape[1:], generator=torch.Generator().manual_seed(seed_of(options.seed, sample.name))
        )
        for sample in samples
    ]
    std = torch.exp(0.5 * logvar)
    return {"latents": (mean.float() + std * torch.stack(noise).to(mean.device)).to(mean.dtype)}


def _origin_in(frame: Frame, original: Size, origin: Origin | None) -> Origin | None:
    """What an image in its frame stands for: only the whole image has its place."""
    is_whole = frame.size == frame.resized == original and not frame.flipped
    return origin if origin is None or is_whole else origin.without_place()


def stack_pixels(samples: Sequence[Sample]) -> Tensor:
    """(B, C, h, w) from 0 to 255, uint8 unless some have more bits."""
    return torch.from_numpy(np.stack([sample.pixels for sample in samples]))


def _bounded(sidecars: dict[str, bytes]) -> dict[str, bytes]:
    """Those that are in bounds, the smallest first."""
    kept, total = {}, 0
    for suffix, content in sorted(sidecars.items(), key=lambda each: (len(each[1]), each[0])):
        total += len(content)
        if total <= MAX_SIDECAR_BYTES:
            kept[suffix] = content
    return dict(sorted(kept.items()))
