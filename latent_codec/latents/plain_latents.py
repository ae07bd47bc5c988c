"""Latents of other programs: plain arrays (.npy, .npz) and tensors (.pt), which say nothing of the codec that made them.

Only what has the shape of latents is read, nothing that a file names is run, and no more memory is taken than MAX_BYTES.
"""

import math
import os
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from latent_codec.files import check_is_file

MAX_BYTES = 2**29
"""Of all arrays of a file that are read: a compressed one may claim any number."""
_MAX_ENTRIES = 1000
_NUMPY = b"\x93NUMPY"
_ZIP = b"PK\x03\x04"


@dataclass(frozen=True, kw_only=True)
class PlainLatents:
    """What a file of plain arrays or tensors holds."""

    path: Path
    kind: str
    """For messages: "a NumPy array (.npy)"."""
    arrays: dict[str, Tensor]
    """Name -> array as it was stored; those with other values than numbers are left out."""

    def latents(self, *channels: int) -> list[Tensor]:
        """Each image's latents, (1, C, h, w), of one of these numbers of channels C.

        They are the array whose name has "latent" in it, or the only one that there is.

        Raises:
            ValueError: if none is a floating-point array (C, h, w) or (N, C, h, w), saying what there is.
        """
        named = [array for name, array in self.arrays.items() if "latent" in name.lower()]
        found = []
        for array in named or (self.arrays.values() if len(self.arrays) == 1 else []):
            batch = array[None] if array.ndim == 3 else array
            if batch.ndim == 4 and batch.shape[1] in channels and batch.numel() and batch.is_floating_point():
                found += batch.split(1)
        if not found:
            listed = " or ".join(map(str, channels))
            expected = f"floating-point latents (C, h, w) or (N, C, h, w) with C = {listed}"
            raise ValueError(f"{self.path} is {self}; expected {expected}")
        return found

    def __str__(self) -> str:
        """What the file is: kind, names, shapes and dtypes."""
        listed = [
            f"{name} {tuple(array.shape)} {str(array.dtype).removeprefix('torch.')}".strip()
            for name, array in self.arrays.items()
        ]
        more = f" and {len(listed) - 4} more" if len(listed) > 4 else ""
        return f"{self.kind} of {', '.join(listed[:4])}{more}" if listed else f"{self.kind} without numbers"


def read_plain_latents(path: str | os.PathLike) -> PlainLatents | None:
    """Read a file of plain arrays or tensors, known by its content; None for every other file.

    Raises:
        ValueError: if it is damaged, would run code, or is larger than MAX_BYTES.
        OSError: if it cannot be read.
    """
    path = Path(path)
    check_is_file(path)
    with path.open("rb") as file:
        head = file.read(8)
        if head.startswith(_NUMPY):
            file.seek(0)
            kind, arrays = "a NumPy array (.npy)", {"": _read_array(file, path, path.stat().st_size)}
        elif head.startswith(_ZIP) and (names := _numpy_entries(path)):
            kind, arrays = "a NumPy archive (.npz)", dict(_read_archive(path, names))
        elif head.startswith(_ZIP) or (head.startswith(b"\x80") and head[1:2] in b"\x02\x03\x04\x05"):
            kind, arrays = "a file of torch.save (.pt)", dict(_read_tensors(path))
        else:
            return None
    kept = {name: each for name, each in arrays.items() if each is not None}
    return PlainLatents(path=path, kind=kind, arrays=kept)


def _numpy_entries(path: Path) -> list[zipfile.ZipInfo]:
    try:
        with zipfile.ZipFile(path) as archive:
            return [entry for entry in archive.infolist() if entry.filename.endswith(".npy")]
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError) as error:
        raise ValueError(f"{path} is a damaged or truncated zip file ({error})") from error


def _read_archive(path: Path, entries: list[zipfile.ZipInfo]) -> Iterator[tuple[str, Tensor | None]]:
    total = sum(entry.file_size for entry in entries)
    if len(entries) > _MAX_ENTRIES or total > MAX_BYTES:
        expected = f"expected at most {_MAX_ENTRIES} of {MAX_BYTES} bytes"
        raise ValueError(f"{path} holds {len(entries)} arrays of {total} bytes; {expected}")
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in entries:
                with archive.open(entry) as file:
                    yield entry.filename.removesuffix(".npy"), _read_array(file, path, entry.file_size)
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{path} is a damaged or truncated zip file ({error})") from error


def _read_array(file: BinaryIO, path: Path, num_bytes: int) -> Tensor | None:
    """An array whose header and data are `num_bytes`; None for what is no array of numbers."""
    try:
        version = np.lib.format.read_magic(file)
        readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version not in readers:
            raise ValueError(f"it has version {version} of the format")
        shape, in_columns, dtype = readers[version](file)
        if min(shape, default=0) < 0:
            raise ValueError(f"its shape is {shape}")
    except Exception as error:  # of numpy, or of Python's parser that it calls, as the damage is
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path} is a damaged NumPy array: {reason}") from error
    if dtype.kind not in "fiub":
        return None
    need = math.prod(shape) * dtype.itemsize
    if need > MAX_BYTES:
        raise ValueError(f"{path} holds an array of {need} bytes; expected at most {MAX_BYTES}")
    data = file.read(need) if need < num_bytes else b""
    if len(data) != need:
        raise ValueError(f"{path} is cut short: its array of shape {shape} needs {need} bytes")
    array = np.frombuffer(data, dtype).reshape(shape, order="F" if in_columns else "C")
    try:
        return torch.from_numpy(np.ascontiguousarray(array, dtype.newbyteorder("=")).copy())
    except TypeError:  # float128, which torch has not
        return None


def _read_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """A tensor, or those in a dict or list."""
    from latent_codec.conversion.checkpoints import read_pickled
    from latent_codec.tensors import check_dense

    found = read_pickled(path)
    if isinstance(found, Tensor):
        entries = {"": found}
    elif isinstance(found, dict):
        entries = {str(name): each for name, each in found.items()}
    elif isinstance(found, list | tuple):
        entries = {f"latents {number}": each for number, each in enumerate(found)}
    else:
        entries = {}
    for name, each in entries.items():
        if isinstance(each, Tensor):
            try:
                check_dense(each, "latents")
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error
            if each.untyped_storage().nbytes() < each.nbytes or each.nbytes > MAX_BYTES:
                expected = f"expected at most {MAX_BYTES}, in full"
                raise ValueError(f"{path} holds a tensor of {each.nbytes} bytes; {expected}")
            yield name, each.detach()
