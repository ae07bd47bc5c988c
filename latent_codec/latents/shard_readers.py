"""Samples of a shard by number: webdataset's tars, Parquet and latent files.

A shard is opened once, which reads where everything is in it, and a sample is read when it is asked for. Local files are
mapped into memory, so that a data set may be larger than that.
"""

import io
import json
import tarfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeAlias

import numpy as np

Buffer: TypeAlias = Any
"""Bytes of a shard, or an `mmap` of its file."""
Fields: TypeAlias = dict[str, Any]
"""Of a sample: its key, name, size, crop, bucket, flipped, label, caption and extra, those that it has."""
Arrays: TypeAlias = dict[str, np.ndarray]
"""Of a sample, by name: latents; mean and logvar; indices."""

ORIGIN = "latent-codec.origin.json"
"""What an image stands for, among the further entries of a row of Parquet."""
TENSORS = ("latents", "mean", "logvar", "indices")
_SAFETENSORS = {"F16": "<f2", "F32": "<f4", "F64": "<f8", "BF16": "<u2", "I64": "<i8"}
"""NumPy's names of dtypes; a bfloat16 is the upper half of a float32."""
_BLOCK = 512
"""Bytes of a header of a tar."""
_ROW_GROUPS = 8
"""Of Parquet, that are held at a time."""


class ShardReader(Protocol):
    """The samples of a shard."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> tuple[Fields, Arrays]: ...


def open_shard(container: str, data: Buffer) -> ShardReader:
    """Open a shard of a container, "webdataset", "parquet" or "safetensors".

    Raises:
        ValueError: if it is damaged.
    """
    readers: Mapping[str, Callable[[Buffer], ShardReader]] = {
        "webdataset": TarShard,
        "parquet": ParquetShard,
        "safetensors": SafetensorsShard,
    }
    return readers[container](data)


class TarShard:
    """A tar whose members share their name up to the first dot with the others of their sample."""

    def __init__(self, data: Buffer):
        self._data = memoryview(data)
        self._headers: dict[bytes, tuple[np.dtype, tuple[int, ...]]] = {}
        samples: dict[str, dict[str, tuple[int, int]]] = {}
        for name, start, size in _plain_members(data) or _members(data):
            folder, _, base = name.rpartition("/")
            stem, _, suffix = base.partition(".")
            samples.setdefault(f"{folder}/{stem}" if folder else stem, {})[suffix] = start, size
        self._samples = list(samples.items())

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, number: int) -> tuple[Fields, Arrays]:
        key, members = self._samples[number]
        fields: Fields = {"key": key}
        arrays: Arrays = {}
        extra = {}
        for suffix, place in members.items():
            data = self._data[place[0] : sum(place)]
            name = suffix.removesuffix(".npy")
            if name != suffix and name.partition(".")[0] in TENSORS:
                arrays[name] = self._array(data)
            elif suffix == "json":
                fields |= json.loads(bytes(data))
            elif suffix == "txt":
                fields["caption"] = str(data, "utf-8")
            elif suffix != "cls":
                extra[suffix] = bytes(data)
        if extra:
            fields["extra"] = extra
        return fields, arrays

    def _array(self, data: memoryview) -> np.ndarray:
        """A .npy file; a header that was seen before is not parsed again."""
        end = 10 + int.from_bytes(data[8:10], "little")
        header = bytes(data[:end])
        if header not in self._headers:
            file = io.BytesIO(header)
            if np.lib.format.read_magic(file) != (1, 0):
                raise ValueError("expected version 1.0 of the .npy format")
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            self._headers[header] = dtype, shape
        dtype, shape = self._headers[header]
        return np.frombuffer(data, dtype, offset=end).reshape(shape)


def _members(data: Buffer) -> list[tuple[str, int, int]]:
    """Name, place and size of each file in a tar.

    Raises:
        ValueError: if it is damaged.
    """
    file = io.BytesIO(data) if isinstance(data, bytes) else data
    file.seek(0)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            return [(each.name, each.offset_data, each.size) for each in tar if each.isreg()]
    except tarfile.TarError as error:
        raise ValueError(f"it is no whole tar ({error})") from error


def _plain_members(data: Buffer) -> list[tuple[str, int, int]] | None:
    """The same in a fifteenth of the time; None of a tar with long names or anything else than files, or a damaged one."""
    members, start = [], 0
    while True:
        header = data[start : start + _BLOCK]
        if len(header) == _BLOCK and not header.strip(b"\0"):
            return members
        name, size, kind, prefix = header[:100], header[124:136], header[156:157], header[345:500]
        if kind != tarfile.REGTYPE or prefix.strip(b"\0") or not size[:-1].isdigit() or not name.isascii():
            return None
        length = int(size[:-1], 8)
        members.append((name.rstrip(b"\0").decode(), start + _BLOCK, length))
        start += _BLOCK - (-length // _BLOCK) * _BLOCK


class SafetensorsShard:
    """A latent file, whose tensors are read where they are."""

    def __init__(self, data: Buffer):
        self._data = memoryview(data)
        self._start = 8 + int.from_bytes(self._data[:8], "little")
        try:
            self._entries = json.loads(bytes(self._data[8 : self._start]))
            metadata = self._entries.pop("__metadata__")
            self._fields = {
                name: json.loads(metadata[f"{name}s"])
                for name in ("name", "size", "label", "caption", "origin")
                if f"{name}s" in metadata
            }
            self._num_levels = sum(key.startswith("indices.0.") for key in self._entries)
            self._length = len(self._fields["name"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"it is no whole latent file ({error})") from error

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, number: int) -> tuple[Fields, Arrays]:
        fields = {name: values[number] for name, values in self._fields.items()}
        if not self._num_levels:
            return fields, {"latents": self._array(f"latents.{number}")}
        levels = range(self._num_levels)
        return fields, {f"indices.{level}": self._array(f"indices.{number}.{level}") for level in levels}

    def _array(self, key: str) -> np.ndarray:
        entry = self._entries[key]
        start, end = (self._start + offset for offset in entry["data_offsets"])
        values = np.frombuffer(self._data[start:end], _SAFETENSORS[entry["dtype"]])
        if entry["dtype"] == "BF16":
            values = (values.astype("<u4") << 16).view("<f4")
        return values.reshape(entry["shape"])


class ParquetShard:
    """A table with a row for each sample; groups of rows are read when one of them is asked for."""

    def __init__(self, data: Buffer):
        import pyarrow as pa
        from pyarrow import parquet

        try:
            self._file = parquet.ParquetFile(pa.py_buffer(data))
            metadata = self._file.metadata
            rows = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
        except pa.ArrowException as error:
            raise ValueError(f"it is no whole Parquet file ({error})") from error
        self._ends = np.array(rows, np.int64).cumsum()
        self._groups: OrderedDict[int, tuple[list[Fields], dict[str, _Nested]]] = OrderedDict()

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, number: int) -> tuple[Fields, Arrays]:
        group = int(np.searchsorted(self._ends, number, side="right"))
        if group not in self._groups:
            self._groups[group] = self._read(group)
            if len(self._groups) > _ROW_GROUPS:
                self._groups.popitem(last=False)
        fields, columns = self._groups[group]
        row = number - (int(self._ends[group - 1]) if group else 0)
        return fields[row], {name: column[row] for name, column in columns.items()}

    def _read(self, group: int) -> "tuple[list[Fields], dict[str, _Nested]]":
        import pyarrow as pa

        try:
            table = self._file.read_row_group(group).combine_chunks()
        except pa.ArrowException as error:
            raise ValueError(f"its rows cannot be read ({error})") from error
        names = [name for name in table.column_names if name.partition(".")[0] in TENSORS]
        columns = {name: _Nested(table[name].chunk(0)) for name in names}
        return [_fields_of_row(row) for row in table.drop_columns(names).to_pylist()], columns


def _fields_of_row(row: dict[str, Any]) -> Fields:
    """A row's columns as the fields of a sample."""
    size = row.pop("height"), row.pop("width")
    attributes, extra = (json.loads(row.pop(name) or "null") for name in ("attributes", "extra"))
    fields = row | {"size": size, "label": row["label"] if attributes is None else attributes}
    if extra and ORIGIN in extra:
        fields["origin"] = json.loads(extra.pop(ORIGIN))
    if extra:
        fields["extra"] = {suffix: text.encode() for suffix, text in extra.items()}
    return fields


class _Nested:
    """A column of nested lists, as arrays."""

    def __init__(self, column):
        self._offsets = []
        while hasattr(column, "offsets"):
            self._offsets.append(column.offsets.to_numpy())
            column = column.values
        self._values = column.to_numpy()

    def __getitem__(self, row: int) -> np.ndarray:
        start, end = row, row + 1
        shape = [1]
        for offsets in self._offsets:
            starts = offsets[start : end + 1]
            shape.append(int(starts[1] - starts[0]))
            start, end = int(starts[0]), int(starts[-1])
        return self._values[start:end].reshape(shape[1:])
