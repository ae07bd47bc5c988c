"""Values to a file and back: tile by tile, pass by pass, entropy coded or of fixed length. No codec is needed here."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from latent_codec.bitstream import rans
from latent_codec.bitstream.container import Container, Header, Level, Tile, pack
from latent_codec.bitstream.entropy_model import EntropyModel, Shape
from latent_codec.bitstream.errors import CorruptError

Values = list[np.ndarray]
"""int64 (channels, h, w) for each level."""


def encode_values(model: EntropyModel | None, values: Values, outline: Header) -> bytes:
    """The file of a picture's values.

    Args:
        model: None for indices of fixed length.
        outline: what the header says, but for its `num_passes` and `entropy_fingerprint`.

    Raises:
        ValueError: for values of other shapes than the outline's, or that have no symbol.
    """
    if [each.shape for each in values] != outline.shapes:
        raise ValueError(
            f"values of shapes {[each.shape for each in values]} came; expected {outline.shapes}"
        )
    tiles = []
    for tile in outline.tiles():
        parts = _parts(values, tile, outline)
        if model is None:
            tiles.append(encode_fixed_length(outline.levels, parts))
        else:
            tiles.append(encode_tile(model, parts, outline.steps_index))
    header = replace(outline, num_passes=len(tiles[0]), entropy_fingerprint=model and model.fingerprint)
    return pack(header, [section for sections in zip(*tiles, strict=True) for section in sections])


def decode_values(model: EntropyModel | None, container: Container) -> tuple[Values, list[np.ndarray]]:
    """The values in a file, 0 where they are unknown, and where they are known: bool (h, w) for each level.

    Args:
        model: the one it was coded with, which the caller has checked.

    Raises:
        CorruptError: for sections that do not fit the model, naming the first.
    """
    header = container.header
    values = [np.zeros(shape, np.int64) for shape in header.shapes]
    known = [np.zeros(shape[1:], bool) for shape in header.shapes]
    for number, tile in enumerate(header.tiles()):
        sections, shapes = container.sections[number :: header.num_tiles], tile.shapes(header.levels)
        if sections[0] is None:
            continue
        try:
            if header.entropy_fingerprint is None:
                parts, masks = decode_fixed_length(header.levels, sections, shapes)
            else:
                parts, masks = decode_tile(model, sections, shapes, header.steps_index)
        except CorruptError as error:
            section = (error.section or 0) * header.num_tiles + number
            raise CorruptError(f"{header.section_name(section)} is damaged: {error}", section) from error
        for level, where in enumerate(tile.slices(header.levels)):
            values[level][where] = parts[level]
            known[level][where[1:]] = masks[level].all(0)
    return values, known


def values_bits(model: EntropyModel | None, values: Values, header: Header) -> float:
    """What the model, or codebooks of fixed length, say that values cost: the least that a file's sections can have."""
    if model is None or header.entropy_fingerprint is None:
        return sum(each.size * math.log2(level.codebook_size) for each, level in zip(values, header.levels))
    return sum(
        model.tables.bits(each, numbers)
        for tile in header.tiles()
        for each, numbers in _coded(model, _parts(values, tile, header), header.steps_index)
    )


def encode_tile(model: EntropyModel, values: Values, steps_index: int = 0) -> list[bytes]:
    """Entropy code a tile; its passes are one stream of rANS, cut where each ends, escape bits behind each part.

    Raises:
        ValueError: for a value that has no symbol.
    """
    coded = [model.tables.symbols(each, numbers) for each, numbers in _coded(model, values, steps_index)]
    words = rans.encode(model.tables, [symbols for symbols, _ in coded])
    return [each + escape_bits for each, (_, escape_bits) in zip(words, coded)]


def decode_tile(
    model: EntropyModel, sections: Sequence[bytes | None], shapes: Sequence[Shape], steps_index: int = 0
) -> tuple[Values, list[np.ndarray]]:
    """The inverse of `encode_tile`, up to the first section that is None.

    Returns:
        The values, 0 where they are not known; and where they are, bool (channels, h, w) for each level.

    Raises:
        CorruptError: for sections that do not fit the model and these shapes, naming the pass as `section`.
    """
    passes = model.passes(shapes)
    if len(passes) != len(sections):
        raise CorruptError(f"it has {len(sections)} passes, and its entropy model {len(passes)}")
    values = [np.zeros(shape, np.int64) for shape in shapes]
    known = [np.zeros(shape, bool) for shape in shapes]
    decoder = rans.Decoder(model.tables)
    for number, (each, section) in enumerate(zip(passes, sections)):
        if section is None:
            break
        try:
            numbers = model.table_numbers(passes, number, values, steps_index)
            symbols, escape_bits = decoder.decode(section, numbers)
            decoded = model.tables.values(symbols, numbers, escape_bits)
            if number == len(passes) - 1:
                decoder.finish()
        except CorruptError as error:
            raise CorruptError(str(error), number) from error
        values[each.level].reshape(-1)[each.positions] = decoded
        known[each.level].reshape(-1)[each.positions] = True
    return values, known


def encode_fixed_length(levels: Sequence[Level], values: Values) -> list[bytes]:
    """A section for each level: every index in ceil(log2(codebook_size)) bits, highest first."""
    sections = []
    for level, indices in zip(levels, values, strict=True):
        shifts = np.arange(_index_bits(level))[::-1]
        sections.append(np.packbits(indices.reshape(-1, 1) >> shifts & 1).tobytes())
    return sections


def decode_fixed_length(
    levels: Sequence[Level], sections: Sequence[bytes | None], shapes: Sequence[Shape]
) -> tuple[Values, list[np.ndarray]]:
    """The inverse of `encode_fixed_length`, up to the first section that is None, as `decode_tile` gives it."""
    if len(levels) != len(sections):
        raise CorruptError(f"it has {len(sections)} passes for {len(levels)} levels of fixed length")
    values = [np.zeros(shape, np.int64) for shape in shapes]
    known = [np.zeros(shape, bool) for shape in shapes]
    for number, (level, section, shape) in enumerate(zip(levels, sections, shapes)):
        if section is None:
            break
        num_bits = _index_bits(level)
        count = shape[1] * shape[2]
        if len(section) != -(-count * num_bits // 8):
            raise CorruptError(f"{len(section)} bytes came for {count} indices of {num_bits} bits", number)
        bits = np.unpackbits(np.frombuffer(section, np.uint8))
        weights = 1 << np.arange(num_bits, dtype=np.int64)[::-1]
        indices = bits[: count * num_bits].reshape(count, num_bits) @ weights
        if bits[count * num_bits :].any() or (indices >= level.codebook_size).any():
            raise CorruptError(
                f"an index is beyond the {level.codebook_size} codewords, or bits are left over", number
            )
        values[number][:] = indices.reshape(shape)
        known[number][:] = True
    return values, known


def _index_bits(level: Level) -> int:
    return (level.codebook_size - 1).bit_length()


def _parts(values: Values, tile: Tile, header: Header) -> Values:
    return [each[where] for each, where in zip(values, tile.slices(header.levels))]


def _coded(model: EntropyModel, values: Values, steps_index: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Each pass's values and the numbers of their tables, which are asked for with what a decoder knows by then."""
    passes = model.passes([each.shape for each in values])
    known = [np.zeros_like(each) for each in values]
    for number, each in enumerate(passes):
        numbers = model.table_numbers(passes, number, known, steps_index)
        coded = values[each.level].reshape(-1)[each.positions]
        yield coded, numbers
        known[each.level].reshape(-1)[each.positions] = coded
