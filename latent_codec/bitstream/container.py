"""The compressed file: a header that accounts for every byte, and sections, one for each quality layer of each tile.

    magic | version | header length | content and fingerprints | length and CRC of each section | CRC | sections

FORMAT.md specifies it. Nothing is read, and no memory reserved, before the header's checksum and the bounds below hold.
"""

import math
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from latent_codec import deprecated
from latent_codec.bitstream.errors import (
    CorruptError,
    NewerFormatError,
    NotCompressedError,
    TooLargeError,
    TruncatedError,
)
from latent_codec.bitstream.varints import MAX_BYTES, read_varint, write_varint
from latent_codec.errors import SettingError
from latent_codec.files import check_is_file

MAGIC = b"\x8cLCF"
VERSION = 1
SUFFIX = ".lcf"

INDICES, ENTROPY_CODED, TILED = 1, 2, 4
"""Features: a reader must know all of a file's."""

MAX_PIXELS = 2**28
MAX_VALUES = 2**25
"""Quantized latents or indices of all tiles together: a quarter of a gigabyte as 64-bit integers."""
MAX_TILE_VALUES = 2**22
MAX_LEVELS = 16
MAX_LAYERS = 1024
MAX_SECTIONS = 2**20
MAX_FILE_BYTES = 2**28 + 2**24
"""Eight bytes for each value, and a header."""

_CRC_BYTES = 4
_FINGERPRINT_BYTES = 8


@dataclass(frozen=True, kw_only=True)
class Level:
    """One grid of values: quantized latents, or one level of codebook indices."""

    side: int
    """Pixels per position, in height and in width."""
    channels: int = 1
    codebook_size: int | None = None
    """Of indices, with 1 channel; None for latents."""


@dataclass(frozen=True, kw_only=True)
class Tile:
    """A rectangle of the image that is coded independently."""

    top: int
    left: int
    height: int
    width: int
    """In positions of the first level."""

    @classmethod
    def whole(cls, header: "Header") -> "Tile":
        """All of the image, padded to multiples of the first level's side."""
        side = header.levels[0].side
        return cls(top=0, left=0, height=-(-header.height // side), width=-(-header.width // side))

    def slices(self, levels: Sequence[Level]) -> list[tuple[slice, slice, slice]]:
        """Its place in each level's array (channels, h, w)."""
        found = []
        for level in levels:
            scale = levels[0].side // level.side
            rows = slice(self.top * scale, (self.top + self.height) * scale)
            columns = slice(self.left * scale, (self.left + self.width) * scale)
            found.append((slice(None), rows, columns))
        return found

    def shapes(self, levels: Sequence[Level]) -> list[tuple[int, int, int]]:
        """(channels, h, w) of its part of each level."""
        scales = [levels[0].side // level.side for level in levels]
        return [(level.channels, self.height * n, self.width * n) for level, n in zip(levels, scales)]


@dataclass(frozen=True, kw_only=True)
class Header:
    """The header of a file, without the table of sections.

    Raises:
        ValueError: for fields that do not fit each other.
        TooLargeError: for more than MAX_PIXELS, MAX_VALUES, MAX_TILE_VALUES or MAX_SECTIONS.
    """

    height: int
    width: int
    """Of the image in pixels, without padding."""
    levels: tuple[Level, ...]
    """Coarsest first; each level's side is a multiple of the next one's."""
    num_layers: int
    """Quality layers."""
    space_fingerprint: str
    """Of the codec, 16 hex digits."""
    entropy_fingerprint: str | None = None
    """Of the entropy model, 16 hex digits; None: indices of fixed length, which need none."""
    step_size_index: int = 0
    """Of the entropy model's step sizes; 0 for indices."""
    tile: int | None = None
    """Side of a tile in positions of the first level; None: the image is one tile."""

    steps_index = deprecated.attribute("steps_index", "step_size_index")

    def __post_init__(self):
        if not 1 <= len(self.levels) <= MAX_LEVELS or not 1 <= self.num_layers <= MAX_LAYERS:
            raise ValueError(f"it has {len(self.levels)} levels and {self.num_layers} layers")
        if min(self.height, self.width, *(min(level.side, level.channels) for level in self.levels)) < 1:
            raise ValueError("a length, a side or a number of channels in it is 0")
        if any(upper.side % lower.side for upper, lower in pairwise(self.levels)):
            sides = ", ".join(str(level.side) for level in self.levels)
            raise ValueError(f"its levels have sides of {sides} pixels")
        if len({level.codebook_size is None for level in self.levels}) > 1:
            raise ValueError("it mixes latents and indices")
        if self.is_indices and any(level.channels != 1 or level.codebook_size < 1 for level in self.levels):
            raise ValueError("a level of indices has one channel and a codebook")
        if self.entropy_fingerprint is None and not self.is_indices:
            raise ValueError("it holds latents of fixed length")
        if self.tile is not None and self.tile < 1:
            raise ValueError("its tiles have no positions")
        num_pixels, num_values = self.height * self.width, _count(self.shapes)
        if num_pixels > MAX_PIXELS or num_values > MAX_VALUES:
            raise TooLargeError(
                f"expected at most {MAX_PIXELS} pixels and {MAX_VALUES} values, got {self.height} x {self.width} pixels and "
                f"{num_values} values"
            )
        if (largest := _count(next(self.tiles()).shapes(self.levels))) > MAX_TILE_VALUES:
            raise TooLargeError(
                f"expected tiles of at most {MAX_TILE_VALUES} values, got {largest}; use smaller tiles"
            )
        if (count := self.num_sections) > MAX_SECTIONS:
            raise TooLargeError(f"expected at most {MAX_SECTIONS} sections, got {count}; use larger tiles")

    @property
    def is_indices(self) -> bool:
        return self.levels[0].codebook_size is not None

    @property
    def shapes(self) -> list[tuple[int, int, int]]:
        """(channels, h, w) of each level's array, for the image padded to multiples of the first level's side."""
        return Tile.whole(self).shapes(self.levels)

    @property
    def num_tiles(self) -> int:
        whole, side = Tile.whole(self), self.tile
        return 1 if side is None else -(-whole.height // side) * -(-whole.width // side)

    def tiles(self) -> Iterator[Tile]:
        """Row by row; those at the bottom and on the right can be smaller."""
        whole = Tile.whole(self)
        side = self.tile or max(whole.height, whole.width)
        for top in range(0, whole.height, side):
            for left in range(0, whole.width, side):
                yield Tile(
                    top=top,
                    left=left,
                    height=min(side, whole.height - top),
                    width=min(side, whole.width - left),
                )

    @property
    def num_sections(self) -> int:
        return self.num_layers * self.num_tiles

    def section_name(self, number: int) -> str:
        """Sections are in the order of layers, and within a layer of tiles."""
        return f"section {number} (layer {number // self.num_tiles}, tile {number % self.num_tiles})"


@dataclass(frozen=True, kw_only=True)
class Container:
    """The header and the sections of a file."""

    header: Header
    header_bytes: int
    lengths: tuple[int, ...]
    """Bytes of each section."""
    sections: tuple[bytes | None, ...]
    """None where a section is missing or damaged, in partial reading only."""
    trailing_bytes: int = 0
    """After the last section, in partial reading only."""
    top: int = 0
    left: int = 0
    """Pixels of the file's image above and to the left of this part."""

    @property
    def missing(self) -> list[str]:
        """Names of the missing or damaged sections."""
        lost = (number for number, section in enumerate(self.sections) if section is None)
        return list(map(self.header.section_name, lost))

    def around(self, top: int, left: int, height: int, width: int) -> "Container":
        """The tiles that a region of pixels touches, as the file of a smaller image.

        Raises:
            SettingError: if the region is empty or not in the image.
        """
        header = self.header
        if not (0 <= top < top + height <= header.height and 0 <= left < left + width <= header.width):
            expected = f"(top, left, height, width) within the image of {header.height}x{header.width} pixels"
            raise SettingError("region", expected, (top, left, height, width))
        if header.tile is None:
            return self
        side = header.tile * header.levels[0].side
        per_row = -(-header.width // side)
        rows = range(top // side, (top + height - 1) // side + 1)
        columns = range(left // side, (left + width - 1) // side + 1)
        tiles = [row * per_row + column for row in rows for column in columns]
        numbers = [layer * header.num_tiles + tile for layer in range(header.num_layers) for tile in tiles]
        first_row, first_column = rows[0] * side, columns[0] * side
        return replace(
            self,
            header=replace(
                header,
                height=min(header.height, (rows[-1] + 1) * side) - first_row,
                width=min(header.width, (columns[-1] + 1) * side) - first_column,
            ),
            lengths=tuple(self.lengths[number] for number in numbers),
            sections=tuple(self.sections[number] for number in numbers),
            top=first_row,
            left=first_column,
        )


def read_file(path: str | os.PathLike) -> bytes:
    """The bytes of a compressed file, for `unpack`.

    Raises:
        ValueError: if it is not a file.
        TooLargeError: for more than MAX_FILE_BYTES.
        OSError: if it cannot be read.
    """
    check_is_file(path)
    with open(path, "rb") as file:
        data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise TooLargeError(f"expected at most {MAX_FILE_BYTES} bytes, got more; this is no compressed image")
    return data


def pack(header: Header, sections: Sequence[bytes]) -> bytes:
    """Write a file.

    Raises:
        ValueError: if the header is for another number of sections.
    """
    if len(sections) != header.num_sections:
        raise ValueError(f"expected {header.num_sections} sections, got {len(sections)}")
    features = INDICES * header.is_indices
    features |= ENTROPY_CODED * (header.entropy_fingerprint is not None) | TILED * (header.tile is not None)
    numbers = [features, header.height, header.width, len(header.levels)]
    for level in header.levels:
        numbers += [level.side, level.codebook_size if header.is_indices else level.channels]
    if not header.is_indices:
        numbers.append(header.step_size_index)
    if header.tile is not None:
        numbers.append(header.tile)
    numbers.append(header.num_layers)
    body = b"".join(map(write_varint, numbers))
    body += bytes.fromhex(header.space_fingerprint) + bytes.fromhex(header.entropy_fingerprint or "")
    body += b"".join(write_varint(len(section)) + _crc(section) for section in sections)
    length = len(MAGIC) + 1 + len(body) + _CRC_BYTES
    length += next(n for n in range(1, MAX_BYTES + 1) if len(write_varint(length + n)) == n)
    start = MAGIC + bytes([VERSION]) + write_varint(length) + body
    return b"".join([start, _crc(start), *sections])


def unpack(data: bytes, *, partial: bool = False) -> Container:
    """Read a file's header and sections, and check every checksum.

    Args:
        partial: give None for sections that are cut off or damaged, instead of raising an error.

    Raises:
        NotCompressedError: if it is not a compressed file.
        NewerFormatError: if it has a later version, or unknown features.
        TruncatedError: if it is cut short; also in partial reading if its header is.
        CorruptError: if it is damaged.
        TooLargeError: if its header announces more than MAX_PIXELS, MAX_VALUES, MAX_TILE_VALUES or MAX_SECTIONS.
    """
    start, numbers_from = _checked_start(data)
    header, lengths, checksums = _parse(start, numbers_from)
    position, sections = len(start) + _CRC_BYTES, []
    for number, (length, checksum) in enumerate(zip(lengths, checksums)):
        section = data[position : position + length]
        position += length
        if len(section) == length and _crc(section) == checksum:
            sections.append(section)
        elif partial:
            sections.append(None)
        elif len(section) < length:
            raise TruncatedError(
                f"the file is cut short: it has {len(data)} of {len(start) + _CRC_BYTES + sum(lengths)} bytes, and "
                f"ends in {header.section_name(number)}. Partial decoding gives the sections before."
            )
        else:
            raise CorruptError(f"{header.section_name(number)} is damaged: its checksum is wrong", number)
    if position < len(data) and not partial:
        raise CorruptError(f"{len(data) - position} bytes follow the last section")
    return Container(
        header=header,
        header_bytes=len(start) + _CRC_BYTES,
        lengths=tuple(lengths),
        sections=tuple(sections),
        trailing_bytes=max(len(data) - position, 0),
    )


def _checked_start(data: bytes) -> tuple[bytes, int]:
    """Check the header: give it without its checksum, with the position of the first number of this version."""
    if not data.startswith(MAGIC) and not (data and MAGIC.startswith(data)):
        raise NotCompressedError("the data are not a compressed file of latent-codec")
    cut = TruncatedError(f"the file is cut short: its {len(data)} bytes end in the header")
    try:
        length, position = read_varint(data, len(MAGIC) + 1)
    except CorruptError as error:
        if len(data) < len(MAGIC) + 1 + MAX_BYTES:
            raise cut from error
        raise CorruptError("the header is damaged: its length is malformed") from error
    if length < position + _CRC_BYTES:
        raise CorruptError(f"the header is damaged: it claims {length} bytes")
    if len(data) < length:
        raise cut
    start = data[: length - _CRC_BYTES]
    if _crc(start) != data[len(start) : length]:
        raise CorruptError("the header is damaged: its checksum is wrong")
    version = data[len(MAGIC)]
    if version > VERSION:
        raise NewerFormatError(f"expected version {VERSION} of the file, got {version}; update latent-codec")
    if version < VERSION:
        raise CorruptError(f"expected version {VERSION} of the file, got {version}")
    return start, position


def _parse(start: bytes, position: int) -> tuple[Header, list[int], list[bytes]]:
    def number() -> int:
        nonlocal position
        value, position = read_varint(start, position)
        return value

    def taken(count: int) -> bytes:
        nonlocal position
        position += count
        if position > len(start):
            raise CorruptError("it ends early")
        return start[position - count : position]

    try:
        features = number()
        unknown = features & ~(INDICES | ENTROPY_CODED | TILED)
        if unknown:
            what = f"the file needs features {unknown:#x}, which this latent-codec does not know"
            raise NewerFormatError(f"{what}; update it")
        is_indices = bool(features & INDICES)
        height, width, num_levels = number(), number(), number()
        if num_levels > MAX_LEVELS:
            raise CorruptError(f"it has {num_levels} levels")
        levels = []
        for _ in range(num_levels):
            side, size = number(), number()
            level = Level(side=side, codebook_size=size) if is_indices else Level(side=side, channels=size)
            levels.append(level)
        header = Header(
            height=height,
            width=width,
            levels=tuple(levels),
            step_size_index=0 if is_indices else number(),
            tile=number() if features & TILED else None,
            num_layers=number(),
            space_fingerprint=taken(_FINGERPRINT_BYTES).hex(),
            entropy_fingerprint=taken(_FINGERPRINT_BYTES).hex() if features & ENTROPY_CODED else None,
        )
        if header.num_sections * (1 + _CRC_BYTES) > len(start) - position:
            raise CorruptError(f"it has no room for {header.num_sections} sections")
        lengths, checksums = [], []
        for _ in range(header.num_sections):
            lengths.append(number())
            checksums.append(taken(_CRC_BYTES))
        if position != len(start):
            raise CorruptError(f"{len(start) - position} bytes are left over")
    except (NewerFormatError, TooLargeError):
        raise
    except ValueError as error:
        raise CorruptError(f"the header is malformed: {error}") from error
    return header, lengths, checksums


def _count(shapes: Sequence[tuple[int, int, int]]) -> int:
    return sum(map(math.prod, shapes))


def _crc(data: bytes) -> bytes:
    return zlib.crc32(data).to_bytes(_CRC_BYTES, "little")
