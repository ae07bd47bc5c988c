"""Where images come from: folders, tars, IDX files, Hugging Face datasets and generated shapes, all by random access.

    source = open_source("photos-{000..003}.tar")
    source.read(17)      # uint8 (3, H, W), sRGB
    source.label(17)     # int, dict or None

A source is small and picklable, so that every DataLoader worker can hold one.
"""

import gzip
import json
import logging
import math
import os
import re
import reprlib
import zlib
from collections.abc import Sequence
from contextlib import suppress
from copy import copy
from dataclasses import replace
from functools import lru_cache
from glob import glob
from itertools import product
from pathlib import Path
from typing import Self

import numpy as np
from PIL import Image
from torch import Tensor

from latent_codec.errors import SettingError
from latent_codec.files import human_bytes, modified
from latent_codec.images.decoding import SUFFIXES, ImageError, open_regular, printable
from latent_codec.images.files import SIDECARS, LeftOut, list_images
from latent_codec.images.image_source import MAX_SIDECAR_BYTES, as_key
from latent_codec.images.image_source import ImageSource as ImageSource
from latent_codec.images.origins import GrayOrigin, Origin, ValueRange, check_value_range, gray_origin
from latent_codec.images.shapes import SHAPES, ShapeImages
from latent_codec.images.tar_samples import Sample, read_tar_samples
from latent_codec.images.tensors import read_image, to_image, to_uint8
from latent_codec.images.volume_names import (
    DICOM,
    NIFTI,
    is_dicom,
    is_nifti_name,
    is_volume_name,
    missing_package,
)
from latent_codec.images.volumes import NO_PIXELS, Volume, nifti_volume

logger = logging.getLogger(__name__)

HUB = "hf:"
AUDIO = "audio:"
_CAPTIONS = ("caption", "text", "prompt")
MAX_UNPACKED_BYTES = 768 * 2**20  # EMNIST's largest set takes 547 MB
_DEEP_SUFFIXES = frozenset({".png", ".tif", ".tiff", ".pgm", ".pnm"})
"""Of formats that may have more than 8 bits of gray."""
_TAR_SUFFIXES = (".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")

Data = str | os.PathLike | Sequence[str | os.PathLike]


class SomeImages(ImageSource):
    """Some images of a source, by their indices there."""

    def __init__(self, source: ImageSource, indices: Sequence[int]):
        self._source, self._indices = source, list(indices)

    def __len__(self) -> int:
        return len(self._indices)

    def name(self, index: int) -> str:
        return self._source.name(self._indices[index])

    def label(self, index: int) -> int | dict | None:
        return self._source.label(self._indices[index])

    def key(self, index: int) -> str:
        return self._source.key(self._indices[index])

    def sidecars(self, index: int) -> dict[str, bytes]:
        return self._source.sidecars(self._indices[index])

    def origin(self, index: int) -> Origin | None:
        return self._source.origin(self._indices[index])

    def part(self, indices: Sequence[int]) -> ImageSource | None:
        return self._source.part([self._indices[index] for index in indices])

    def read(self, index: int, channels: int = 3) -> Tensor:
        return self._source.read(self._indices[index], channels)

    def image(self, index: int, channels: int = 3) -> Tensor:
        return self._source.image(self._indices[index], channels)

    @property
    def reading(self) -> str:
        return self._source.reading

    def size(self, index: int) -> tuple[int, int]:
        return self._source.size(self._indices[index])


def spread(count: int, limit: int | None) -> list[int]:
    """Choose `limit` of range(count), evenly spread: floor(i * count / limit) for i = 0 .. limit - 1.

    Every `limit` chooses by it, so that the same number is the same images.
    All of them where `limit` is None or reaches `count`.

    Raises:
        ValueError: if `limit` is less than 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"a limit of {limit} images leaves nothing to measure; give 1 or more")
    if limit is None or limit >= count:
        return list(range(count))
    return [position * count // limit for position in range(limit)]


def open_source(
    data: Data,
    *,
    split: str = "train",
    column: str | None = None,
    value_range: ValueRange | None = None,
    axis: int = 2,
) -> ImageSource:
    """Open images for random access.

    Args:
        data: one of
            a folder of images, walked to the bottom; or a list of images and folders; among them DICOM and NIfTI files,
            slice by slice (extra [medical]);
            tars in the webdataset layout, uncompressed: a path, a list, "photos-{000..003}.tar", "photos-*.tar",
            or a folder that holds them;
            a folder with IDX files (MNIST's layout: train-images-idx3-ubyte, t10k-..., gzipped or not);
            a folder written by `Dataset.save_to_disk`, or "hf:owner/name" ("hf:owner/name:config"), which is
            downloaded if it is not cached;
            "shapes:COUNTxSIDE": generated images of labelled shapes, see `ShapeImages`;
            "audio:PATH" or "audio:BANDSxFRAMES:PATH": spectrograms of sound files, see `RecordingImages`.
        split: of IDX files and shapes ("train" or "test") and Hugging Face datasets; folders and tars have none.
        column: which image of a sample, if it has several: a dataset's column, or a suffix inside tars ("jpg").
        value_range: of image files that are gray with more than 8 bits, the values that become -1 and 1.
        axis: of volumes, that their slices are counted along: 0, 1 or 2.

    Raises:
        ValueError: if there is nothing to read there, or a file is damaged as a whole.
        SettingError: for a value range or axis of data that has none.
    """
    given = [os.fspath(data)] if isinstance(data, (str, os.PathLike)) else [os.fspath(path) for path in data]
    source = _open(given, split, column, value_range, axis)
    if type(source) is not FolderImages:
        if value_range is not None:
            raise SettingError("value_range", "none of data that is no image files", value_range)
        if axis != 2:
            raise SettingError("axis", "2, as is usual, of data that is no files of volumes", axis)
    return source


def _open(
    given: list[str], split: str, column: str | None, value_range: ValueRange | None, axis: int
) -> ImageSource:
    if any(path.startswith(HUB) for path in given):
        if len(given) > 1:
            raise ValueError(f"give one Hugging Face dataset at a time, not {', '.join(given)}")
        return DatasetImages(_load_hub(given[0], split, streaming=False), column, given[0])
    if any(path.startswith(SHAPES) for path in given):
        if len(given) > 1:
            raise ValueError(f"give {SHAPES} alone, not {', '.join(given)}")
        return ShapeImages.named(given[0], split)
    if any(path.startswith(AUDIO) for path in given):
        from latent_codec.images.recordings import (
            RecordingImages,
            parse_audio,
        )  # with scipy's signal processing

        given, scale, frames = parse_audio(given)
        paths = [path for pattern in given for path in _expand(pattern)]
        root = paths[0] if len(paths) == 1 and paths[0].is_dir() else None
        return RecordingImages(paths, root, scale, frames)
    paths = [path for pattern in given for path in _expand(pattern)]
    if len(paths) == 1 and paths[0].is_dir():
        folder = paths[0]
        if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
            return _open_saved(folder, split, column)
        if any(folder.glob("*idx3-ubyte*")):
            return IdxImages(folder, split)
        tars = sorted(folder.glob("*.tar"))
        if tars and any(entry.suffix.lower() in SUFFIXES for entry in folder.iterdir()):
            raise ValueError(f"{folder} holds both tars and images: name the tars, or move one of them")
        if tars:
            return TarImages(tars, column)
        return FolderImages(paths, folder, value_range=value_range, axis=axis)
    tars = [path for path in paths if path.name.lower().endswith(_TAR_SUFFIXES)]
    if tars and len(tars) < len(paths):
        other = next(path for path in paths if path not in tars)
        raise ValueError(f"tars and other files cannot be mixed: {tars[0]}, {other}")
    return TarImages(tars, column) if tars else FolderImages(paths, None, value_range=value_range, axis=axis)


def _expand(pattern: str) -> list[Path]:
    """Expand "{000..003}", "{a,b}" and wildcards; a pattern without them is itself.

    Raises:
        FileNotFoundError: for a path that does not exist or a pattern that matches nothing.
    """
    if Path(pattern).exists():
        return [Path(pattern)]
    parts = [_alternatives(part) for part in re.split(r"(\{[^{}]*\})", pattern)]
    paths = []
    for path in map("".join, product(*parts)):
        matches = sorted(glob(path))
        if not matches:
            raise FileNotFoundError(f"{path}: no such file or folder")
        paths += map(Path, matches)
    return paths


def _alternatives(part: str) -> list[str]:
    """ "{000..003}" -> 000, 001, 002, 003; "{a,b}" -> a, b; anything else is itself."""
    numbers = re.fullmatch(r"\{(\d+)\.\.(\d+)\}", part)
    if numbers:
        first, last = numbers.groups()
        return [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
    return part[1:-1].split(",") if part.startswith("{") and "," in part else [part]


class FolderImages(ImageSource):
    """Image files. Where all of them are in subfolders of one folder, the subfolder is the class.

    `listing` has each path, and the path relative to the folder that it was found in.

    A DICOM or NIfTI file is as many images as it has slices; the files of a DICOM series are in the order of their places.

    Args:
        value_range: the values that become -1 and 1 in gray images of more than 8 bits, others being clamped; "min" and
            "max" are those of each file or volume. None: all of 16 bits, or 0 and 1 for floats; -1024 to 3071 HU for
            computed tomography, the smallest and largest value of any other volume.
        axis: that slices of volumes are counted along.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        root: Path | None,
        *,
        value_range: ValueRange | None = None,
        axis: int = 2,
    ):
        if axis not in (0, 1, 2):
            raise SettingError("axis", "0, 1 or 2", axis)
        self.value_range = None if value_range is None else check_value_range(value_range)
        self.axis = axis
        self.listing = self._find(paths)
        volumes = open_volumes(self.listing, axis=axis, value_range=self.value_range)
        self.slices: list[tuple[Volume, int] | None] | None = None
        if volumes is not None:
            self.listing, self.slices = volumes
        self.paths = [path for path, _ in self.listing]
        self.root = root
        self.classes: list[str] | None = None
        if root is not None:
            tops = [path.relative_to(root).parts[:-1][:1] for path in self.paths]
            if all(tops):
                self.classes = sorted({top[0] for top in tops})

    def _find(self, paths: Sequence[Path]) -> list[tuple[Path, Path]]:
        return list_images(paths)

    def __len__(self) -> int:
        return len(self.paths)

    def slice(self, index: int) -> tuple[Volume, int] | None:
        """The volume that an image is from, and its number there; None: a file that is one image."""
        return None if self.slices is None else self.slices[index]

    def name(self, index: int) -> str:
        found = self.slice(index)
        return str(self.paths[index]) if found is None else found[0].name_of(found[1])

    def label(self, index: int) -> int | None:
        if self.classes is None:
            return None
        return self.classes.index(self.paths[index].relative_to(self.root).parts[0])

    def key(self, index: int) -> str:
        return as_key(self.listing[index][1].as_posix())

    def part(self, indices: Sequence[int]) -> Self:
        some = copy(self)
        some.listing = [self.listing[index] for index in indices]
        some.paths = [path for path, _ in some.listing]
        some.slices = self.slices and [self.slices[index] for index in indices]
        return some

    def sidecars(self, index: int) -> dict[str, bytes]:
        """The files next to it that differ in their suffix only, one of `SIDECARS`; none of a slice's, which may name a patient."""
        found: dict[str, bytes] = {}
        if self.slice(index) is not None:
            return found
        for suffix in SIDECARS:
            with (
                suppress(FileNotFoundError),
                open_regular(self.paths[index].with_suffix(f".{suffix}")) as file,
            ):
                found["txt" if suffix == "caption" else suffix] = file.read(MAX_SIDECAR_BYTES + 1)
        return found

    def stored(self, index: int) -> np.ndarray | None:
        """Values as the file stores them, upright, before anything is clamped; None of an image of 8 bits."""
        if (found := self.slice(index)) is not None:
            return found[0].stored(found[1])
        origin = self.origin(index)
        return origin.stored(self.image(index, 1)) if isinstance(origin, GrayOrigin) else None

    @property
    def reading(self) -> str:
        if self.value_range is None and self.axis == 2:
            return ""
        return f"value range {self.value_range}, axis {self.axis}"

    def origin(self, index: int) -> Origin | None:
        if (found := self.slice(index)) is not None:
            return found[0].origin(found[1])
        path = self.paths[index]
        if path.suffix.lower() not in _DEEP_SUFFIXES:
            return None
        return _gray_origin(path, modified(path), self.value_range)

    def read(self, index: int, channels: int = 3) -> Tensor:
        if self.slice(index) is None and (self.value_range is None or self.origin(index) is None):
            return super().read(index, channels)
        return to_uint8(self.image(index, channels))

    def image(self, index: int, channels: int = 3) -> Tensor:
        """An image with all its bits, float32 in [-1, 1]."""
        if (found := self.slice(index)) is not None:
            return to_image(found[0].image(found[1]), channels=channels)
        origin = self.origin(index)
        if not isinstance(origin, GrayOrigin):
            return super().image(index, channels)
        value_range = None if self.value_range is None else (origin.low, origin.high)
        return read_image(self._image(index), channels=channels, value_range=value_range)

    def size(self, index: int) -> tuple[int, int]:
        found = self.slice(index)
        return super().size(index) if found is None else found[0].size

    def _image(self, index: int) -> Path:
        return self.paths[index]


def open_volumes(
    listing: Sequence[tuple[Path, Path]],
    *,
    axis: int,
    value_range: ValueRange | None,
) -> tuple[list[tuple[Path, Path]], list[tuple[Volume, int] | None]] | None:
    """Put the slices of DICOM and NIfTI files in the place of the files; None where there are none.

    Returns:
        The listing with an entry for each image, and for each its volume and number there. The relative path of a slice is
        the volume's name with the number.

    Raises:
        ImageError: if a package is absent, or no image is left.
    """
    kinds = [_volume_kind(path) for path, _ in listing]
    if not any(kinds):
        return None
    for (path, _), kind in zip(listing, kinds):
        if kind and (reason := missing_package(kind)):
            raise ImageError(f"{path}: {reason}")
    volumes: list[tuple[int, Volume]] = []
    if DICOM in kinds:
        from latent_codec.images.dicom import dicom_volumes

        files = [each for each, kind in zip(listing, kinds) if kind == DICOM]
        places = [place for place, kind in enumerate(kinds) if kind == DICOM]
        found, left_out = dicom_volumes(files, axis=axis, value_range=value_range)
        volumes += [(places[place], volume) for place, volume in found]
        _note_left_out(left_out, listing)
    for place, ((path, relative), kind) in enumerate(zip(listing, kinds)):
        if kind == NIFTI:
            name = re.sub(r"\.nii(\.gz)?$", "", relative.as_posix(), flags=re.IGNORECASE)
            volumes.append((place, nifti_volume(path, name, axis=axis, value_range=value_range)))
    taken = {relative.with_suffix("").as_posix() for (_, relative), kind in zip(listing, kinds) if not kind}
    by_place: dict[int, list[Volume]] = {}
    for place, volume in sorted(volumes, key=lambda each: each[0]):
        name, number = volume.name, 1
        while name in taken:
            number += 1
            name = f"{volume.name}-{number}"
        taken.add(name)
        by_place.setdefault(place, []).append(replace(volume, name=name))
    images: list[tuple[Path, Path]] = []
    slices: list[tuple[Volume, int] | None] = []
    for place, (entry, kind) in enumerate(zip(listing, kinds)):
        if not kind:
            images.append(entry)
            slices.append(None)
        for volume in by_place.get(place, []):
            count = len(volume)
            for number in range(count):
                ending = f"-{number:0{len(str(count - 1))}d}" if count > 1 else ""
                images.append((volume.path(number), Path(f"{volume.name}{ending}.slice")))
                slices.append((volume, number))
    if not images:
        raise ImageError(f"{listing[0][0]}: no images: {NO_PIXELS}")
    return images, slices


@lru_cache(maxsize=64)
def _gray_origin(path: Path, changed: int, value_range: ValueRange | None) -> GrayOrigin | None:
    """`gray_origin`, found once while an image is read; `changed` is when its file was written."""
    return gray_origin(path, value_range)


def _volume_kind(path: Path) -> str | None:
    """`DICOM`, `NIFTI`, or None for an image."""
    if is_volume_name(path.name):
        return NIFTI if is_nifti_name(path.name) else DICOM
    if path.suffix.lower() in SUFFIXES:
        return None
    try:
        with open_regular(path) as file:
            return DICOM if is_dicom(file) else None
    except OSError:
        return None  # as reading it will say


def _note_left_out(left_out: Sequence[tuple[Path, str]], listing: Sequence[tuple[Path, Path]]) -> None:
    reasons = LeftOut()
    for relative, reason in left_out:
        reasons.add(reason, str(relative))
    if left_out and len(left_out) < len(listing):
        logger.warning("Note: left out %s", reasons)


class TarImages(ImageSource):
    """Images in uncompressed tars, webdataset layout: members of one sample share their name up to the first dot.

    One pass over the headers finds every member's place; the images themselves are read when asked for.
    A sample's label is its `.json` (a dict), else its `.cls` (an int). What is left out is counted and named in a note
    on the log.
    """

    def __init__(self, tars: Sequence[Path], column: str | None = None):
        self.tars = [Path(tar) for tar in tars]
        self._samples: list[Sample] = []
        notes = []
        for number, tar in enumerate(self.tars):
            samples, left_out = read_tar_samples(tar, number, column)
            self._samples += samples
            if left_out:
                notes.append(f"{printable(str(tar))}: left out {left_out}")
        if not self._samples:
            kind = f".{column} members" if column else "images"
            raise ValueError("; ".join([f"no {kind} in {', '.join(map(str, self.tars))}", *notes]))
        for note in notes:
            logger.warning("Note: %s", note)

    def __len__(self) -> int:
        return len(self._samples)

    def name(self, index: int) -> str:
        return self._samples[index].name

    def label(self, index: int) -> int | dict | None:
        """The sample's label.

        Raises:
            LabelError: if it cannot be read, or is of another type, such as a list.
        """
        sample = self._samples[index]
        if sample.label is None:
            return None
        kind, *place = sample.label
        try:
            label = json.loads(self._bytes(sample.tar, *place))
        except (ValueError, RecursionError) as error:  # RecursionError: lists in lists in lists ...
            what = f"{sample.name}: its .{kind} label cannot be read ({error})"
            raise LabelError(f"{what}; expected an integer or an object in JSON") from None
        return checked_label(label, f"{sample.name}: its .{kind} label")

    def key(self, index: int) -> str:
        return as_key(self._samples[index].name.partition("/")[2])

    def part(self, indices: Sequence[int]) -> Self:
        samples = [self._samples[index] for index in indices]
        used = {tar: place for place, tar in enumerate(sorted({sample.tar for sample in samples}))}
        some = copy(self)
        some.tars = [self.tars[tar] for tar in used]
        some._samples = [replace(sample, tar=used[sample.tar]) for sample in samples]
        return some

    def sidecars(self, index: int) -> dict[str, bytes]:
        """The further members of its sample."""
        sample = self._samples[index]
        return {
            suffix: self._bytes(sample.tar, offset, size)
            for suffix, (offset, size) in sample.others
            if size <= MAX_SIDECAR_BYTES
        }

    def _image(self, index: int) -> bytes:
        sample = self._samples[index]
        return self._bytes(sample.tar, *sample.place)

    def _bytes(self, number: int, offset: int, size: int) -> bytes:
        with open_regular(self.tars[number]) as tar:
            tar.seek(offset)
            return tar.read(size)


class LabelError(ValueError):
    """A label that cannot be read, or is of another type than an integer or a dict."""


def checked_label(label, name: str) -> int | dict | None:
    """A label, if it is one: an integer, a dict of attributes, or None.

    Raises:
        LabelError: for anything else, such as a list, naming it.
    """
    if label is None or isinstance(label, dict) or type(label) is int:  # which True is not
        return label
    expected = f"expected an integer or an object with attributes, got {type(label).__name__}"
    raise LabelError(f"{name} is {reprlib.repr(label)}; {expected}")


class IdxImages(ImageSource):
    """Gray images and class labels in IDX files, the layout of MNIST and its kin; packed ones are held in memory."""

    def __init__(self, folder: Path, split: str = "train"):
        if split not in ("train", "test"):
            raise ValueError(f"{folder} has splits 'train' and 'test', not {split!r}")
        prefix = "train" if split == "train" else "t10k"
        images = _idx_file(folder, f"{prefix}-images?idx3-ubyte")
        labels = _idx_file(folder, f"{prefix}-labels?idx1-ubyte")
        if images is None:
            raise FileNotFoundError(f"{folder}: no {prefix}-images-idx3-ubyte, with or without .gz")
        self.split = split
        self.images = _read_idx(images, num_dims=3)
        self.labels = None if labels is None else _read_idx(labels, num_dims=1)
        if self.labels is not None and len(self.labels) != len(self.images):
            raise ValueError(f"{images} holds {len(self.images)} images, {labels} {len(self.labels)} labels")

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        return f"{self.split}-{index:05d}"

    def label(self, index: int) -> int | None:
        return None if self.labels is None else int(self.labels[index])

    def _image(self, index: int) -> Image.Image:
        return Image.fromarray(self.images[index])


def _idx_file(folder: Path, pattern: str) -> Path | None:
    matches = sorted([*folder.glob(pattern), *folder.glob(pattern + ".gz")])
    return matches[0] if matches else None


def _read_idx(path: Path, num_dims: int) -> np.ndarray:
    """Read an IDX file of bytes: two zeros, type 8 (uint8), the number of dimensions, then each of them, big-endian.

    The header is compared with the file before anything is allocated. What is not compressed stays in the file,
    mapped into memory.
    """
    start = 4 + 4 * num_dims
    is_packed = path.suffix == ".gz"
    try:
        with open_regular(path) as stored, gzip.GzipFile(fileobj=stored) if is_packed else stored as file:
            header = file.read(start)
            if header[:4] != bytes((0, 0, 8, num_dims)):
                kind = f"IDX file of bytes in {num_dims} dimensions"
                raise ValueError(f"{path} is no {kind}: it starts {header[:4].hex()}")
            if len(header) < start:
                raise ValueError(f"{path} is cut short: its header ends after {len(header)} of {start} bytes")
            shape = tuple(np.frombuffer(header, ">u4", offset=4).tolist())
            count = math.prod(shape)
            if is_packed and count > MAX_UNPACKED_BYTES:
                raise ValueError(
                    f"{path} announces {human_bytes(count)}, and packed files of at most "
                    f"{human_bytes(MAX_UNPACKED_BYTES)} are unpacked into memory: unpack it by gunzip"
                )
            if is_packed:
                values, num_read = np.empty(count, np.uint8), 0
                while num_read < count and (more := file.readinto(values[num_read:])):
                    num_read += more
                values, is_longer = values[:num_read], bool(file.read(1))
            else:
                size = path.stat().st_size - start
                is_longer = size > count
                values = np.memmap(path, np.uint8, "r", start) if size == count > 0 else range(size)
    except (EOFError, zlib.error, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ValueError(f"{path} cannot be read ({reason})") from None
    if is_longer or len(values) != count:
        found = "more are there" if is_longer else f"{len(values)} there"
        damage = "is damaged" if is_longer else "is cut short"
        raise ValueError(f"{path} {damage}: {count} values announced, {found}")
    if not count:
        raise ValueError(f"{path} is empty: it announces {'x'.join(map(str, shape))} values")
    return values.reshape(shape)


class DatasetImages(ImageSource):
    """A Hugging Face `datasets.Dataset` with a column of images.

    Its label is the column "label" or the first of type ClassLabel; without any, a dict of the plain columns.
    """

    def __init__(self, dataset, column: str | None, name: str):
        import datasets

        features = dataset.features
        self._title = name
        self._column = image_column(features, column, name)
        dataset = dataset.with_format(None)
        images = dataset.select_columns([self._column])
        self._images = images.cast_column(self._column, datasets.Image(decode=False))

        classes = [key for key, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
        plain = [key for key, feature in features.items() if isinstance(feature, datasets.Value)]
        self._class = "label" if "label" in classes else classes[0] if classes else None
        self.classes: list[str] | None = features[self._class].names if self._class else None
        columns = [self._class] if classes else plain
        self._labels = dataset.select_columns(columns) if columns else None
        others = [key for key in plain if key not in columns or key in _CAPTIONS]
        self._others = dataset.select_columns(others) if others else None

    def __len__(self) -> int:
        return len(self._images)

    def name(self, index: int) -> str:
        return f"{self._title}[{index}]"

    def label(self, index: int) -> int | dict | None:
        if self._labels is None:
            return None
        row = self._labels[index]
        return row[self._class] if self._class else row

    def key(self, index: int) -> str:
        return f"{index:08d}"

    def sidecars(self, index: int) -> dict[str, bytes]:
        """Its other plain columns, as JSON; the first that is named as captions are is the caption."""
        if self._others is None:
            return {}
        row = self._others[index]
        caption = next((row[name] for name in _CAPTIONS if isinstance(row.get(name), str)), None)
        found = {"columns.json": json.dumps(row, sort_keys=True, default=str).encode()}
        return found if caption is None else found | {"txt": caption.encode()}

    def _image(self, index: int) -> bytes | str:
        return encoded_image(self._images[index][self._column], self.name(index))


def image_column(features: dict, column: str | None, name: str) -> str:
    """The column of a dataset that holds images: `column`, else the first of type Image."""
    import datasets

    columns = [key for key, feature in features.items() if isinstance(feature, datasets.Image)]
    if column is None and columns:
        return columns[0]
    if column not in columns:
        wanted = "no column of images" if column is None else f"no column {column!r} of images"
        raise ValueError(f"{name} has {wanted}; its columns: {', '.join(features)}")
    return column


def encoded_image(cell: dict | None, name: str) -> bytes | str:
    """The bytes or the path in a cell of an undecoded `datasets.Image` column."""
    if cell is None or (cell["bytes"] is None and cell["path"] is None):
        raise ImageError(f"{name}: there is no image in this row")
    return cell["path"] if cell["bytes"] is None else cell["bytes"]


def open_stream(data: str, *, split: str = "train"):
    """Open "hf:owner/name" as a `datasets.IterableDataset`, without downloading it; for `StreamedCrops`.

    Raises:
        ValueError: if `data` does not start with "hf:".
        OSError: if the hub cannot be reached or has no such dataset.
    """
    if not data.startswith(HUB):
        raise ValueError(f"{data} cannot be streamed: only {HUB}owner/name can; open it by open_source")
    return _load_hub(data, split, streaming=True)


def _load_hub(data: str, split: str, streaming: bool):
    name, _, config = data.removeprefix(HUB).partition(":")
    if not name.strip("/ "):
        raise ValueError(f"expected {HUB}owner/name, got {data!r}; name a data set")
    import datasets

    return datasets.load_dataset(name, config or None, split=split, streaming=streaming)


def _open_saved(folder: Path, split: str, column: str | None) -> DatasetImages:
    import datasets

    dataset = datasets.load_from_disk(str(folder))
    if isinstance(dataset, datasets.DatasetDict):
        if split not in dataset:
            raise ValueError(f"{folder} has the splits {', '.join(dataset)}, not {split}")
        dataset = dataset[split]
    return DatasetImages(dataset, column, str(folder))
