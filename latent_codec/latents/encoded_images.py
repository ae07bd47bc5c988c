"""Codes of images, computed once: `encode_source` writes them to latent files, `open_encoded` reads them at random.

    ImageSource --encode_source--> folder/00000.safetensors, 00001 ... --open_encoded--> EncodedImages

A prior sees every image's codes in every epoch; encoding them anew each time would take longer than its own step.
"""

import logging
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from latent_codec.codec import LatentCodec
from latent_codec.files import find_files
from latent_codec.images.batches import batch_by_shape, iter_images
from latent_codec.images.sources import FolderImages, ImageSource
from latent_codec.latents.latent_files import (
    Label,
    LatentFile,
    is_latent_file,
    load_latents,
    save_indices,
    save_latents,
)

logger = logging.getLogger(__name__)

MIRRORED = " (mirrored)"
"""What the name of an image's mirror image ends with."""

SUFFIXES = (".safetensors",)
_INDEX_TYPES = (torch.uint8, torch.int16, torch.int32, torch.int64)


class EncodedImages:
    """Indices, or latents, of images by number, from latent files of one latent space.

    All are held in memory: indices in the smallest integers that hold them, latents as they are stored.

    Args:
        files: at least one, in the order of the images.

    Raises:
        ValueError: if the files differ in latent space, in kind or in their number of levels, naming two that do.
    """

    def __init__(self, files: Iterable[LatentFile]):
        self._names: list[str] = []
        self._labels: list[Label] = []
        self._sizes: list[tuple[int, int]] = []
        first, parts = None, []
        for file in files:
            first = first or file
            levels = _levels(file)
            _check_alike(first, file)
            self._names += file.names
            self._labels += file.labels
            self._sizes += file.sizes
            parts.append([_flattened(level, file.path) for level in levels])
        if first is None:
            raise ValueError("expected at least one latent file, got none")
        self.codec_name = first.codec_name
        self.space_fingerprint = first.space_fingerprint
        self.is_discrete = first.indices is not None
        self._levels = [_Packed(level) for level in zip(*parts, strict=True)]

    def __len__(self) -> int:
        return len(self._names)

    def indices(self, index: int) -> list[Tensor]:
        """One image's int64 grids (h, w), top level first.

        Raises:
            ValueError: if the files hold latents.
        """
        if not self.is_discrete:
            raise ValueError(f"these are latents of {self.codec_name}, not indices; use latents(index)")
        return [level[index].to(torch.int64, copy=True) for level in self._levels]

    def latents(self, index: int) -> Tensor:
        """One image's latents as a denoiser takes them, float32 (C, h, w), whatever precision they are stored in.

        Raises:
            ValueError: if the files hold indices.
        """
        if self.is_discrete:
            raise ValueError(f"these are indices of {self.codec_name}, not latents; use indices(index)")
        return self._levels[0][index].to(torch.float32, copy=True)

    def label(self, index: int) -> Label:
        """A class index, a dict of attributes, or None where there is no label."""
        return self._labels[index]

    def name(self, index: int) -> str:
        """Where the image came from."""
        return self._names[index]

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) of the image in pixels, without padding."""
        return self._sizes[index]


def open_encoded(
    paths: str | os.PathLike | Sequence[str | os.PathLike], *, codec: LatentCodec | None = None
) -> EncodedImages:
    """Open latent files for random access.

    Args:
        paths: latent files, or folders of them, which are walked to the bottom, sorted by name.
        codec: whose codes they must be; it is warned of one that shares the latent space and has a decoder of its own.

    Raises:
        ValueError: if there are none, or they are damaged, of several latent spaces or kinds, or not of `codec`.
        OSError: if one cannot be read.
    """
    files = find_latent_files([paths] if isinstance(paths, (str, os.PathLike)) else paths)
    if codec is not None and (warning := load_latents(files[0]).check(codec)):
        warnings.warn(warning, stacklevel=2)
    return EncodedImages(map(load_latents, files))


def are_latent_files(data: Sequence[str | os.PathLike]) -> bool:
    """Whether `data` names latent files, or folders of them; images, tars and data sets are none."""
    paths = [Path(each) for each in data]
    files = [next(iter(find_files(path, SUFFIXES)), path) if path.is_dir() else path for path in paths]
    return all(path.is_file() and is_latent_file(path) for path in files)


def encode_source(
    codec: LatentCodec,
    source: ImageSource,
    folder: str | os.PathLike,
    *,
    images_per_file: int = 1000,
    batch_size: int = 32,
    mirrored: bool = False,
    indices: bool | None = None,
    labels: bool = True,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Path]:
    """Encode a source's images into `folder`/00000.safetensors, 00001.safetensors ..., with names and labels.

    Every file is complete or absent, and a complete one is kept: a run that was killed goes on where it was. An
    image that cannot be read is reported on stderr and left out.

    Args:
        source: what `open_source` gives; images are read in 8 bits.
        images_per_file: of the source, mirror images not counted.
        batch_size: consecutive images of equal size that are encoded together, at most.
        mirrored: each image is followed by its mirror image, left to right, named "NAME (mirrored)".
        indices: True for codebook indices, False for latents; None: indices where the codec decodes from its
            codebook, else latents.
        labels: False leaves them out, and does not read them.
        on_progress: called with (images of the source done, images in all).

    Returns:
        The files, in the order of the images.

    Raises:
        LabelError: for a label that cannot be read, or is neither an integer nor a dict.
        ValueError: if no image can be read, for indices of a codec without a codebook, or if `folder` holds latent
            files of another encoding, which are never overwritten.
        OSError: if a file cannot be written.
    """
    if min(images_per_file, batch_size) < 1:
        got = f"{images_per_file} and {batch_size}"
        raise ValueError(f"expected images_per_file and batch_size of at least 1, got {got}")
    if indices and not codec.is_discrete:
        raise ValueError(f"{codec.name} has no codebook, and so no indices; encode latents")
    folder = Path(folder)
    indices = codec.indices_suffice if indices is None else indices
    report = on_progress or (lambda done, total: None)
    encoding = _Encoding(codec, source, batch_size, mirrored, indices, labels, report)
    numbers = range(len(source))
    parts = {
        folder / f"{start // images_per_file:05d}.safetensors": numbers[start : start + images_per_file]
        for start in numbers[::images_per_file]
    }
    foreign = [path for path in find_files(folder, SUFFIXES) if path not in parts]
    if foreign:
        raise ValueError(
            f"{foreign[0]} does not belong to this encoding, which has {len(parts)} files of "
            f"{images_per_file} images; give another folder, or delete what is in this one"
        )
    for path, part in parts.items():
        if not encoding.is_complete(path, part):
            encoding.write(path, part)
        encoding.on_progress(part.stop, len(source))
    written = [path for path in parts if path.exists()]
    if not written:
        raise ValueError(f"none of the {len(source)} images can be read, the first is {source.name(0)}")
    return written


@dataclass(frozen=True)
class _Encoding:
    """What `encode_source` was asked for; a part is a range of the source's numbers, which makes a file."""

    codec: LatentCodec
    source: ImageSource
    batch_size: int
    mirrored: bool
    indices: bool
    labels: bool
    on_progress: Callable[[int, int], None]

    def is_complete(self, path: Path, part: range) -> bool:
        """Whether the file holds all images of its part that can be read.

        Raises:
            ValueError: if it holds something else, so that it must not be overwritten.
        """
        if not path.exists():
            return False
        try:
            found = load_latents(path)
        except ValueError as error:
            logger.warning("written anew: %s", error)
            return False
        wanted_kind = "indices" if self.indices else "latents"
        if (found.kind, found.space_fingerprint) != (wanted_kind, self.codec.space_fingerprint):
            raise ValueError(
                f"{path} holds {found.kind} of {found.codec_name} (space {found.space_fingerprint}), not {wanted_kind} of "
                f"{self.codec.name} (space {self.codec.space_fingerprint}); give another folder, or delete this one"
            )
        stored, belong = set(found.names), [name for number in part for name in self._names(number)]
        if [name for name in belong if name in stored] != found.names:
            raise ValueError(
                f"{path} holds the images {found.names[0]} to {found.names[-1]}, which do not belong among "
                f"{belong[0]} to {belong[-1]}; give another folder, or delete this one"
            )
        missing = [number for number in part if not stored.issuperset(self._names(number))]
        return not any(True for _ in self._readable(missing))

    def write(self, path: Path, part: range) -> None:
        """Encode a part into its file; there is none if no image of it can be read."""
        names, labels, sizes, codes = [], [], [], []
        for batch, images in batch_by_shape(self._readable(part), max_images=self.batch_size):
            codes.append(self._encode(images.to(self.codec.device)))
            for number in batch:
                label = self.source.label(number) if self.labels else None
                for name in self._names(number):
                    names.append(name)
                    labels.append(label)
                    sizes.append(tuple(images.shape[-2:]))
            self.on_progress(batch[-1] + 1, len(self.source))
        if codes:
            save = save_indices if self.indices else save_latents
            save(path, codes, codec=self.codec, names=names, sizes=sizes, labels=labels)

    def _encode(self, images: Tensor) -> Tensor | list[Tensor]:
        """Images -> latents or index maps of these, each followed by its mirror image if asked for."""
        if self.mirrored:
            images = torch.stack((images, images.flip(-1)), 1).flatten(0, 1)
        if self.indices:
            return [grid.cpu() for grid in self.codec.encode_indices(images)]
        return self.codec.encode(images).cpu()

    def _names(self, number: int) -> list[str]:
        name = self.source.name(number)
        if isinstance(self.source, FolderImages) and self.source.root is not None:
            name = Path(name).relative_to(self.source.root).as_posix()  # as good wherever the folder is
        return [name, name + MIRRORED] if self.mirrored else [name]

    def _readable(self, part: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        return iter_images(self.source, channels=self.codec.channels, indices=part, ahead=self.batch_size)


class _Packed:
    """Tensors of any shapes, one after another in a flat one: an object for each would weigh more than small grids.

    Args:
        parts: flat tensors, and the (N, dims) shapes of what each consists of.
    """

    def __init__(self, parts: Sequence[tuple[Tensor, np.ndarray]]):
        self.values = torch.cat([values for values, _ in parts])
        self.shapes = np.concatenate([shapes for _, shapes in parts])
        self.ends = self.shapes.prod(1, dtype=np.int64).cumsum()

    def __getitem__(self, index: int) -> Tensor:
        shape, end = self.shapes[index].tolist(), int(self.ends[index])
        return self.values[end - math.prod(shape) : end].view(shape)


def _levels(file: LatentFile) -> list[Sequence[Tensor]]:
    """For each level the images' grids (1, h, w); latents (1, C, h, w) are one level."""
    return [file.latents] if file.indices is None else list(zip(*file.indices, strict=True))


def _flattened(tensors: Sequence[Tensor], path: Path) -> tuple[Tensor, np.ndarray]:
    """A part of `_Packed`; indices get the smallest type that holds them."""
    values = torch.cat([tensor.flatten() for tensor in tensors])
    if not values.is_floating_point():
        smallest, largest = (value.item() for value in values.aminmax())
        if smallest < 0:
            raise ValueError(f"{path} is damaged: an index is {smallest}")
        values = values.to(next(each for each in _INDEX_TYPES if largest <= torch.iinfo(each).max))
    return values, np.array([tensor.shape[1:] for tensor in tensors], dtype=np.int32)


def _check_alike(first: LatentFile, other: LatentFile) -> None:
    files = first, other
    kinds = [
        "latents" if each.indices is None else f"{len(_levels(each))} levels of indices" for each in files
    ]
    if first.space_fingerprint != other.space_fingerprint or kinds[0] != kinds[1]:
        raise ValueError(
            f"{first.path} holds {kinds[0]} of {first.codec_name} (space {first.space_fingerprint}), {other.path} {kinds[1]} "
            f"of {other.codec_name} (space {other.space_fingerprint}); open files of one codec and kind at a time"
        )


def find_latent_files(paths: Iterable[str | os.PathLike]) -> list[Path]:
    """Files as given; folders walked to the bottom for theirs. Raises ValueError if there are none."""
    paths = list(map(Path, paths))
    files = [file for path in paths for file in (find_files(path, SUFFIXES) if path.is_dir() else [path])]
    if not files:
        given = ", ".join(map(str, paths)) or "an empty list"
        raise ValueError(f"no latent files (.safetensors) in {given}; `latent-codec encode` writes them")
    return files
