"""Volumes: NIfTI files, and what DICOM files make together, read slice by slice and put together again.

    volume = nifti_volume(Path("brain.nii.gz"), "brain", axis=2)
    image = volume.image(12)                      # (1, H, W) in [-1, 1], upright
    origin = volume.origin(12)                    # its place in the volume, and its range in the volume's units
    write_volume([(origin, origin.stored(image)), ...], path)

Needs `pip install "latent-codec[medical]"`. What a header says of a patient is not kept, not even in memory.
"""

import gzip
import logging
import math
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from latent_codec.files import replacing
from latent_codec.images.decoding import MIN_SIDE, ImageError, count_of_nonfinite, printable
from latent_codec.images.origins import (
    UNITS,
    GrayOrigin,
    RangeOrigin,
    ValueRange,
    as_type,
    check_range,
    from_range,
    is_measured,
    with_measured,
)

DTYPES = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "float32", "float64")
"""Types of voxels."""
CT_RANGE = (-1024.0, 3071.0)
"""Hounsfield units of 12 bits: the same for every scan, so that equal tissue is equally bright."""
NO_PIXELS = "DICOM without an image"
_MOST_PACKED = 1032
"""How many bytes one of gzip can stand for."""
_MAX_SIDE = 32767  # of a NIfTI file, whose sides are 16-bit integers
_CACHED = 2
"""Volumes whose voxels a process holds: those that cannot be read in part."""

Affine = tuple[float, ...]
"""The upper three rows of the matrix from voxel to world, in mm: x to the right, y to the front, z up (RAS)."""


logger = logging.getLogger(__name__)

_clamped: set[tuple[Path, ...]] = set()
_MAX_NOTES = 5


class Sliced:
    """What is counted along a side of a volume: slices, in a plane of two other sides."""

    shape: tuple[int, ...]
    """Of the volume's voxels: three sides, then further ones (time)."""
    affine: Affine
    axis: int
    """The side that slices are counted along."""

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of a slice."""
        rows, columns = upright(self.affine, self.axis)[0]
        return self.shape[rows], self.shape[columns]

    @property
    def count(self) -> int:
        """Slices of the volume."""
        return math.prod(self.shape) // math.prod(self.size)


@dataclass(frozen=True, kw_only=True)
class Volume(Sliced):
    """What is known of a volume without its voxels."""

    name: str
    """What to call it, below the folder that was given; of the user's files, not of their headers."""
    files: tuple[Path, ...]
    shape: tuple[int, ...]
    dtype: str
    affine: Affine
    steps: tuple[float, ...] = ()
    """Between the volumes along the further sides: seconds."""
    slope: float = 1.0
    intercept: float = 0.0
    """value = slope * voxel + intercept, in its unit."""
    unit: str = ""
    inverted: bool = False
    """Whether small values are bright (MONOCHROME1)."""
    value_range: ValueRange | None = None
    """In its unit, the values that become -1 and 1; None: as `usual_range`, or else the smallest and the largest."""
    usual_range: tuple[float, float] | None = None
    """That of its kind, where one is usual."""
    padding: float | None = None
    """A voxel, as stored, that stands for no measurement."""
    axis: int = 2
    problem: str | None = None
    """Why it cannot be read."""
    version: int = 0
    """When its files were last written, ns."""

    def __len__(self) -> int:
        return self.count

    def origin(self, number: int) -> "SliceOrigin":
        """What a slice stands for; reads the voxels where `value_range` is None.

        Raises:
            ImageError: for a volume that cannot be read.
        """
        low, high = self.range_of_values()
        return SliceOrigin(
            volume=self.name,
            number=number,
            shape=self.shape,
            axis=self.axis,
            affine=self.affine,
            steps=self.steps,
            dtype=self.dtype,
            slope=self.slope,
            intercept=self.intercept,
            unit=self.unit,
            inverted=self.inverted,
            low=low,
            high=high,
        )

    def range_of_values(self) -> tuple[float, float]:
        """The range in numbers; where none is stated or usual, that of the volume without its padding.

        Raises:
            ImageError: for a volume that cannot be read, or has no value in the range.
        """
        if self.value_range is None and self.usual_range is not None:
            return self.usual_range
        if self.value_range is None or is_measured(self.value_range):
            return _ranges.get(self, self._measured_range)
        return check_range(*self.value_range)

    def _measured_range(self) -> tuple[float, float]:
        ends = []
        for number in range(len(self)) if self.reads_slices else [None]:
            voxels = self.stored(number)
            if self.value_range is None and self.padding is not None and (voxels != self.padding).any():
                voxels = voxels[voxels != self.padding]
            ends += [self.slope * float(each) + self.intercept for each in (voxels.min(), voxels.max())]
        try:
            return with_measured(self.value_range or ("min", "max"), min(ends), max(ends))
        except ValueError as error:
            raise ImageError(f"{self.path(None)}: {error}") from None

    @property
    def reads_slices(self) -> bool:
        """Whether one slice can be read without the others."""
        return False

    def voxels(self) -> np.ndarray:
        """All of its voxels as stored. Raises ImageError."""
        raise NotImplementedError

    def _voxels_of(self, number: int) -> np.ndarray:
        """Those of one slice, as stored, in an array with a side of 1 along `axis`; where `reads_slices`."""
        raise NotImplementedError

    def stored(self, number: int | None) -> np.ndarray:
        """Voxels as stored and checked: all, or those of one slice, upright.

        Raises:
            ImageError: for a volume that cannot be read, or has voxels that are not finite.
        """
        if self.problem:
            raise ImageError(f"{self.path(number)}: {self.problem}")
        height, width = self.size
        if min(height, width) < MIN_SIDE:
            size = f"slices of {width}x{height} voxels (width x height)"
            raise ImageError(
                f"{self.path(number)}: {size} are too few, an image has at least {MIN_SIDE}x{MIN_SIDE}"
            )
        if number is not None and self.reads_slices:
            voxels = _slice_of(self._voxels_of(number), 0, self.affine, self.axis)
        else:
            voxels = _voxels.get(self, self.voxels)
            voxels = voxels if number is None else _slice_of(voxels, number, self.affine, self.axis)
        if voxels.dtype.kind == "f" and not np.isfinite(voxels).all():
            raise ImageError(f"{self.path(number)}: {count_of_nonfinite(voxels).replace('values', 'voxels')}")
        return voxels

    def image(self, number: int) -> Tensor:
        """A slice as (1, H, W) in [-1, 1], upright, with all its bits; values beyond the range are clamped."""
        voxels = self.stored(number)
        low, high = self.range_of_values()
        values = voxels.astype(np.float64) * self.slope + self.intercept
        if self.value_range is None and self.usual_range is not None:
            self._note_clamped(values[voxels != self.padding] if self.padding is not None else values)
        image = from_range(values, low, high)
        return (-image if self.inverted else image)[None]

    def _note_clamped(self, values: np.ndarray) -> None:
        """Say once of a volume that values are beyond its usual range; of many such volumes, of the first few."""
        low, high = self.range_of_values()
        if not values.size or (values.min() >= low and values.max() <= high) or self.files in _clamped:
            return
        if len(_clamped) < _MAX_NOTES:
            logger.warning(
                "Note: %s has values from %g to %g %s; those beyond %g and %g are clamped: state another value range, such "
                "as min max, to keep them",
                *(printable(str(self.path(None))), values.min(), values.max(), self.unit, low, high),
            )
        _clamped.add(self.files)

    def name_of(self, number: int) -> str:
        """What to call a slice in messages: its file, with its number where there are several in it."""
        path = str(self.path(number))
        return path if len(self) == 1 or (len(self.files) > 1 and self.axis == 2) else f"{path}[{number}]"

    def path(self, number: int | None) -> Path:
        """The file that a slice is in."""
        return self.files[number if len(self.files) > 1 and number is not None and self.axis == 2 else 0]


class _Kept:
    """The last few results of a function by what it was called for; a thread that wants one that is being made waits."""

    def __init__(self, count: int | None):
        self._count, self._lock = count, threading.Lock()
        self._found: OrderedDict = OrderedDict()

    def get(self, volume: Volume, make):
        key = volume.files, volume.version, volume.value_range
        with self._lock:
            if key not in self._found:
                self._found[key] = make()
                if self._count is not None and len(self._found) > self._count:
                    self._found.popitem(last=False)
            self._found.move_to_end(key)
            return self._found[key]


_voxels, _ranges = _Kept(_CACHED), _Kept(None)


def _renew_locks() -> None:
    """A lock that another thread held during a fork would stay locked in the child for ever."""
    _voxels._lock, _ranges._lock = threading.Lock(), threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_locks)


@dataclass(frozen=True, kw_only=True)
class NiftiVolume(Volume):
    """A NIfTI file."""

    @property
    def reads_slices(self) -> bool:
        return not self.files[0].name.lower().endswith(".gz")  # which is unpacked from its start for each

    def voxels(self) -> np.ndarray:
        return self._read(...)

    def _voxels_of(self, number: int) -> np.ndarray:
        place = _place(number, self.shape, self.axis)
        return self._read(tuple(slice(None) if each is None else slice(each, each + 1) for each in place))

    def _read(self, where) -> np.ndarray:
        import nibabel

        try:
            # In the order of the file, whose voxels may be mapped into memory; some files have two sides.
            stored = nibabel.load(self.files[0]).dataobj.get_unscaled().reshape(self.shape, order="F")
            return np.asarray(stored[where]).astype(self.dtype, copy=False)
        except Exception as error:  # nibabel raises what it trips over
            raise ImageError(f"{self.files[0]}: {damaged(error)}") from error


def damaged(error: Exception) -> str:
    """Why a volume cannot be read, without the error's own words: they may quote a header."""
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno)
    if isinstance(error, MemoryError):
        return "does not fit into memory"
    return f"damaged or cut short ({type(error).__name__})"


def nifti_volume(
    path: Path, name: str, *, axis: int = 2, value_range: ValueRange | None = None
) -> NiftiVolume:
    """Open a NIfTI file by its header; one that cannot be read has a `problem`."""
    import nibabel

    def problematic(problem: str) -> NiftiVolume:
        return NiftiVolume(
            name=name, files=(path,), shape=(1, 1, 1), dtype="uint8", affine=_IDENTITY, problem=problem
        )

    try:
        image = nibabel.load(path)
        shape, header = tuple(int(side) for side in image.shape), image.header
        dtype = np.dtype(image.get_data_dtype())
        affine = np.asarray(image.affine, np.float64)
        slope, intercept = image.dataobj.slope, image.dataobj.inter
        steps = tuple(float(each) for each in header.get_zooms()[3:])
        facts = path.stat()
    except Exception as error:  # nibabel raises what it trips over
        return problematic(damaged(error))
    shape = (*shape, *(1,) * (3 - len(shape)))
    if dtype.newbyteorder("=").name not in DTYPES:
        what = "color" if dtype.names else dtype.name
        return problematic(f"its voxels are {what}, and {', '.join(DTYPES)} are read: convert them")
    if len(shape) > 7 or not all(1 <= side <= _MAX_SIDE for side in shape):
        return problematic(f"a volume of {'x'.join(map(str, shape))} voxels is not read")
    if math.prod(shape) * dtype.itemsize > _MOST_PACKED * facts.st_size:
        return problematic(f"damaged or cut short: it announces {'x'.join(map(str, shape))} voxels")
    if not is_affine(affine[:3].ravel().tolist()):
        return problematic("its geometry is no finite matrix that can be inverted: correct its affine")
    return NiftiVolume(
        name=name,
        files=(path,),
        shape=shape,
        dtype=dtype.newbyteorder("=").name,
        affine=tuple(affine[:3].ravel().tolist()),
        steps=steps,
        slope=float(slope),
        intercept=float(intercept),
        value_range=value_range,
        axis=axis,
        version=facts.st_mtime_ns,
    )


_IDENTITY: Affine = (1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0)


def is_affine(numbers: Sequence[Any]) -> bool:
    """Whether 12 numbers are the upper rows of an affine that can be inverted."""
    are_numbers = len(numbers) == 12 and all(
        isinstance(each, int | float) and not isinstance(each, bool) and math.isfinite(each)
        for each in numbers
    )
    if not are_numbers or max(map(abs, numbers)) > 1e9:
        return False
    directions = np.array(numbers, np.float64).reshape(3, 4)[:, :3]
    lengths = np.linalg.norm(directions, axis=0)
    return bool((lengths > 1e-9).all() and abs(np.linalg.det(directions / lengths)) > 1e-6)


def upright(affine: Affine, axis: int) -> tuple[tuple[int, int], tuple[bool, bool]]:
    """How a slice is shown as radiologists show it: the axes of its rows and columns, and which of them run backwards.

    Up is the head, or in axial slices the face; left is the patient's right side, or the face.
    """
    directions = np.array(affine).reshape(3, 4)[:, :3]
    directions = directions / np.linalg.norm(directions, axis=0)
    through = int(np.abs(directions[:, axis]).argmax())
    up = 1 if through == 2 else 2
    across = 3 - through - up
    one, other = (each for each in range(3) if each != axis)
    rows, columns = (one, other) if abs(directions[up, one]) > abs(directions[up, other]) else (other, one)
    return (rows, columns), (bool(directions[up, rows] > 0), bool(directions[across, columns] > 0))


def _place(number: int, shape: Sequence[int], axis: int) -> list[int | None]:
    """A slice's place along each side; None along those in its plane."""
    counted = [*range(len(shape) - 1, 2, -1), axis]  # the volume is the fastest, then time
    place: list[int | None] = [None] * len(shape)
    for side, where in zip(counted, np.unravel_index(number, [shape[each] for each in counted])):
        place[side] = int(where)
    return place


def _in_volume(voxels: np.ndarray, number: int, affine: Affine, axis: int) -> np.ndarray:
    """A slice as a view of the volume, upright: writing to it writes to the volume."""
    (rows, columns), (backwards, mirrored) = upright(affine, axis)
    place = _place(number, voxels.shape, axis)
    view = voxels[tuple(slice(None) if each is None else each for each in place)]
    view = view if rows < columns else view.T
    return view[:: -1 if backwards else 1, :: -1 if mirrored else 1]


def _slice_of(voxels: np.ndarray, number: int, affine: Affine, axis: int) -> np.ndarray:
    return np.ascontiguousarray(_in_volume(voxels, number, affine, axis))


@dataclass(frozen=True, kw_only=True)
class SliceOrigin(Sliced, RangeOrigin):
    """A slice of a volume: where it is in it, and what its values are. It is written as NIfTI."""

    kind: ClassVar[str] = "slice"
    suffix: ClassVar[str] = ".nii.gz"  # type: ignore[assignment]

    volume: str
    """The name of the volume's file or folder; slices of one name are one volume."""
    number: int
    """Of the slice along `axis`, further sides of the volume being slower."""
    shape: tuple[int, ...]
    axis: int
    affine: Affine
    steps: tuple[float, ...]
    dtype: str
    slope: float
    intercept: float
    unit: str
    inverted: bool
    low: float
    high: float

    def __post_init__(self):
        for name in ("shape", "affine", "steps"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        integers = (self.number, self.axis, *self.shape)
        if not all(type(each) is int for each in integers) or self.axis not in (0, 1, 2):
            raise ValueError("the place of a slice is no integers")
        if not 3 <= len(self.shape) <= 7 or not all(1 <= side <= _MAX_SIDE for side in self.shape):
            raise ValueError(f"expected a volume of 3 to 7 sides, got {self.shape}")
        if not is_affine(self.affine):
            raise ValueError("its affine is no 12 numbers that can be inverted")
        if not 0 <= self.number < self.count:
            raise ValueError(f"expected a slice from 0 to {self.count - 1}, got {self.number}")
        if not isinstance(self.volume, str) or self.dtype not in DTYPES or self.unit not in UNITS:
            raise ValueError("the name, dtype or unit of a volume is malformed")
        numbers = (self.slope, self.intercept, *self.steps)
        if not all(
            type(each) in (int, float) and math.isfinite(each) and abs(each) < 1e30 for each in numbers
        ):
            raise ValueError("expected finite numbers as slope, intercept and steps of a volume")
        if not self.slope or len(self.steps) != len(self.shape) - 3 or type(self.inverted) is not bool:
            raise ValueError("the slope, the steps or the inversion of a volume is malformed")
        check_range(self.low, self.high)

    @property
    def whole(self) -> str:
        return self.volume

    def stored(self, image: Tensor) -> np.ndarray:
        """Voxels as the file stores them."""
        return as_type((self.values(image) - self.intercept) / self.slope, self.dtype)

    part = stored

    def restore(self, image: Tensor) -> np.ndarray:
        """Values in its unit, rounded to those that the file can store."""
        stored = self.stored(image)
        if self.slope == 1 and self.intercept == 0:
            return stored
        return stored.astype(np.float64) * self.slope + self.intercept

    def write(self, image: Tensor, path: str | os.PathLike) -> None:
        self.write_stored(self.stored(image), path)

    def write_stored(self, stored: np.ndarray, path: str | os.PathLike) -> None:
        self.write_parts([(self, stored)], path)

    def write_parts(self, parts: Sequence[tuple["SliceOrigin", np.ndarray]], path: str | os.PathLike) -> None:
        """Write all slices as a volume; or one, as a volume of one slice that is where it was in the world."""
        write_volume([(_alone(origin), part) for origin, part in parts] if len(parts) == 1 else parts, path)

    def without_place(self) -> GrayOrigin:
        return GrayOrigin(dtype="float32", low=self.low, high=self.high, unit=self.unit)


def _alone(origin: SliceOrigin) -> SliceOrigin:
    """The origin of a slice as a volume of its own."""
    place = _place(origin.number, origin.shape, origin.axis)
    affine = np.array(origin.affine).reshape(3, 4)
    affine[:, 3] += affine[:, origin.axis] * (place[origin.axis] or 0)
    shape = [1 if axis == origin.axis else side for axis, side in enumerate(origin.shape[:3])]
    return replace(origin, number=0, shape=tuple(shape), steps=(), affine=tuple(affine.ravel().tolist()))


def write_volume(parts: Sequence[tuple[SliceOrigin, np.ndarray]], path: str | os.PathLike) -> None:
    """Write all slices of a volume, as stored, as a NIfTI file with the volume's geometry and scale, and nothing else.

    Raises:
        ValueError: for slices of another size, or of several volumes.
        ImportError: where nibabel is absent.
    """
    import nibabel

    first = parts[0][0]
    for origin, voxels in parts:
        if replace(origin, number=first.number) != first:
            raise ValueError(f"{first.volume}: its slices are of several volumes; decode them one by one")
        if voxels.shape != first.size:
            got = "x".join(map(str, voxels.shape))
            raise ValueError(
                f"{first.volume}: expected slices of {'x'.join(map(str, first.size))} voxels, got {got}"
            )
    array = np.zeros(first.shape, first.dtype)
    for origin, voxels in parts:
        _in_volume(array, origin.number, origin.affine, origin.axis)[...] = voxels
    header = nibabel.Nifti1Header()
    header.set_data_dtype(array.dtype)
    header.set_data_shape(array.shape)
    affine = np.vstack([np.array(first.affine).reshape(3, 4), [0, 0, 0, 1]])
    header.set_sform(affine, code="scanner")
    header.set_zooms((*np.linalg.norm(affine[:3, :3], axis=0), *map(abs, first.steps)))
    header.set_xyzt_units("mm", "sec")
    header["scl_slope"], header["scl_inter"] = first.slope, first.intercept
    header["vox_offset"] = 352
    with (
        replacing(path) as partial,
        open(partial, "wb") as file,
        gzip.GzipFile("", "wb", compresslevel=6, fileobj=file, mtime=0) as packed,  # no name, no time
    ):
        packed.write(header.binaryblock + bytes(4) + array.tobytes(order="F"))
