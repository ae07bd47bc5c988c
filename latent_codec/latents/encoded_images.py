"""Codes of images, computed once: `encode_source` writes them to latent files, `open_encoded` reads them at random.

    ImageSource --encode_source--> folder/shards/00000-1f0c9b3a.safetensors ... --open_encoded--> EncodedImages

A prior sees every image's codes in every epoch; encoding them anew each time would take longer than its own step.
"""

import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from latent_codec.codec import LatentCodec
from latent_codec.files import find_files
from latent_codec.images.sources import ImageSource
from latent_codec.latents.data_set import LatentDataset
from latent_codec.latents.data_set_index import read_index
from latent_codec.latents.encoding import encode_data_set
from latent_codec.latents.latent_files import Label, LatentFile, is_latent_file, load_latents
from latent_codec.latents.locations import SHARDS, is_data_set
from latent_codec.latents.plan import EncodingOptions
from latent_codec.latents.samples import MIRRORED as MIRRORED

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
        paths: latent files, data sets of latents, or folders of latent files, which are walked to the bottom, sorted by name.
        codec: whose codes they must be; it is warned of one that shares the latent space and has a decoder of its own.

    Raises:
        ValueError: if there are none, or they are damaged, of several latent spaces or kinds, or not of `codec`.
        OSError: if one cannot be read.
    """
    listed = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    files = iter(_latent_files(listed))
    first = next(files)
    if codec is not None and (warning := first.check(codec)):
        warnings.warn(warning, stacklevel=2)
    return EncodedImages(chain([first], files))


def _latent_files(paths: Sequence[str | os.PathLike]) -> Iterator[LatentFile]:
    """The latent files that paths name, read one after another."""
    if not paths:
        find_latent_files(paths)  # says so
    for path in paths:
        index = read_index(path, {}) if is_data_set(path) else None
        if index is not None and index.container != "safetensors":
            yield from LatentDataset(path, sample=False).latent_files()
            continue
        files = find_latent_files([path]) if index is None else map(index.path, index.shards)
        yield from map(load_latents, files)


def are_latent_files(data: Sequence[str | os.PathLike]) -> bool:
    """Whether `data` names latent files, or folders or data sets of them; images, and tars of them, are none."""
    paths = [Path(each) for each in data if not is_data_set(each)]
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
    """Encode a source's images into latent files below `folder`, with names and labels: `encode_data_set` on this machine.

    Args:
        images_per_file: of the source, mirror images not counted.
        mirrored: each image is followed by its mirror image, left to right, named "NAME (mirrored)".
        indices: True for codebook indices, False for latents; None: indices where the codec decodes from its
            codebook, else latents.
        labels: False leaves them out, and does not read them.
        on_progress: called with (images of the source done, images in all).

    Returns:
        The files, in the order of the images.

    Raises:
        LabelError, ValueError, OSError: as `encode_data_set`.
    """
    options = EncodingOptions(
        kind="indices" if (codec.indices_suffice if indices is None else indices) else "latents",
        flip=mirrored,
        labels=labels,
        images_per_shard=images_per_file,
    )
    report = on_progress and (lambda counts: on_progress(counts.kept + counts.done, counts.total))
    index, _ = encode_data_set(codec, source, folder, options, batch_size=batch_size, on_progress=report)
    return [Path(folder, SHARDS, each["name"]) for each in index["shards"]]


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
