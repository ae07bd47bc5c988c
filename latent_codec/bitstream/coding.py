"""Values to a file and back: tile by tile, layer by layer, entropy coded or of fixed length. No codec is needed here."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from latent_codec.bitstream import rans
from latent_codec.bitstream.container import Container, Header, Level, Tile, pack
from latent_codec.bitstream.entropy_model import CodedPass, EntropyModel, Pass, Prediction, Shape
from latent_codec.bitstream.errors import CorruptError
from latent_codec.bitstream.tables import Tables

Values = list[np.ndarray]
"""int64 (channels, h, w) for each level."""


@dataclass(frozen=True)
class DecodedValues:
    """What a file, or a tile, says of every value; arrays (channels, h, w) for each level."""

    values: Values
    """Where unknown: the value that the entropy model thinks likeliest, 0 without a model."""
    known: list[np.ndarray]
    """bool."""
    predictions: list[Prediction]
    """Of all values, unknown ones too; numbers and offsets are 0 without a model."""

    @classmethod
    def empty(cls, shapes: Sequence[Shape]) -> "DecodedValues":
        def zeros():
            return [np.zeros(shape, np.int64) for shape in shapes]

        return cls(
            values=zeros(),
            known=[np.zeros(shape, bool) for shape in shapes],
            predictions=[Prediction(*each) for each in zip(zeros(), zeros())],
        )

    def insert(self, where: list[tuple[slice, ...]], tile: "DecodedValues") -> None:
        """Take over what a tile says, level by level, where it lies."""
        for level, place in enumerate(where):
            self.values[level][place] = tile.values[level]
            self.known[level][place] = tile.known[level]
            self.predictions[level].numbers[place] = tile.predictions[level].numbers
            self.predictions[level].offsets[place] = tile.predictions[level].offsets


def encode_values(model: EntropyModel | None, values: Values, outline: Header) -> bytes:
    """The file of an image's values.

    Args:
        model: None for indices of fixed length.
        outline: what the header says, but for its `num_layers` and `entropy_fingerprint`.

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
    return pack_tiles(model, tiles, outline)


def pack_tiles(model: EntropyModel | None, tiles: Sequence[list[bytes]], outline: Header) -> bytes:
    """The file of an image's tiles, each the sections of its layers; model and outline as `encode_values` takes them."""
    header = replace(outline, num_layers=len(tiles[0]), entropy_fingerprint=model and model.fingerprint)
    return pack(header, [section for sections in zip(*tiles, strict=True) for section in sections])


def decode_values(model: EntropyModel | None, container: Container, tile: int | None = None) -> DecodedValues:
    """The values in a file, or in one of its tiles.

    Args:
        model: the one it was coded with, which the caller has checked.
        tile: its number; None: all of them, each in its place.

    Raises:
        CorruptError: for sections that do not fit the model, naming the first.
    """
    header = container.header
    if tile is not None:
        return _decode_numbered_tile(model, container, tile, list(header.tiles())[tile])
    found = DecodedValues.empty(header.shapes)
    for number, each in enumerate(header.tiles()):
        found.insert(each.slices(header.levels), _decode_numbered_tile(model, container, number, each))
    return found


def _decode_numbered_tile(
    model: EntropyModel | None, container: Container, number: int, tile: Tile
) -> DecodedValues:
    header = container.header
    sections, shapes = container.sections[number :: header.num_tiles], tile.shapes(header.levels)
    try:
        if header.entropy_fingerprint is None:
            return decode_fixed_length(header.levels, sections, shapes)
        return decode_tile(model, sections, shapes, header.steps_index)
    except CorruptError as error:
        section = (error.section or 0) * header.num_tiles + number
        raise CorruptError(f"{header.section_name(section)} is damaged: {error}", section) from error


def values_bits(model: EntropyModel | None, values: Values, header: Header) -> float:
    """What the model, or codebooks of fixed length, say that values cost: the least that a file's sections can have."""
    if model is None or header.entropy_fingerprint is None:
        return sum(each.size * math.log2(level.codebook_size) for each, level in zip(values, header.levels))
    return sum(
        model.tables.bits(each.values, each.numbers)
        for tile in header.tiles()
        for each in _coded_passes(model, _parts(values, tile, header), header.steps_index)
    )


def encode_tile(model: EntropyModel, values: Values, steps_index: int = 0) -> list[bytes]:
    """Entropy code a tile: the sections of its layers.

    Raises:
        ValueError: for a value that has no symbol.
    """
    return encode_passes(model.tables, list(_coded_passes(model, values, steps_index)))


def encode_passes(tables: Tables, passes: Sequence[CodedPass]) -> list[bytes]:
    """The sections of a tile's layers: one stream of rANS, cut where each pass ends, escape bits behind each part.

    Raises:
        ValueError: for a value that has no symbol.
    """
    symbols, escapes = zip(*[tables.symbols(each.values, each.numbers) for each in passes])
    sections = [b""] * (passes[-1].layer + 1)
    for each, words, escape_bits in zip(passes, rans.encode(tables, symbols), escapes):
        sections[each.layer] += words + escape_bits
    return sections


def decode_tile(
    model: EntropyModel, sections: Sequence[bytes | None], shapes: Sequence[Shape], steps_index: int = 0
) -> DecodedValues:
    """The inverse of `encode_tile`, up to the first section that is None.

    Raises:
        CorruptError: for sections that do not fit the model and these shapes, naming the layer as `section`.
    """
    predictor = model.predictor(shapes, steps_index)
    passes = predictor.passes
    if passes[-1].layer + 1 != len(sections):
        raise CorruptError(f"it has {len(sections)} layers, and its entropy model {passes[-1].layer + 1}")
    found = DecodedValues.empty(shapes)
    decoder, rest, is_whole = rans.Decoder(model.tables), b"", True
    for number, each in enumerate(passes):
        is_first_of_layer = number == 0 or passes[number - 1].layer != each.layer
        is_last_of_layer = number == len(passes) - 1 or passes[number + 1].layer != each.layer
        section = sections[each.layer]
        is_whole = is_whole and section is not None
        prediction = predictor.predict(number, found.values)
        if is_whole:
            try:
                symbols, rest = decoder.decode(section if is_first_of_layer else rest, prediction.numbers)
                decoded, rest = model.tables.values(symbols, prediction.numbers, rest)
                if is_last_of_layer and rest:
                    raise CorruptError(f"{len(rest)} bytes are left over")
                if number == len(passes) - 1:
                    decoder.finish()
            except CorruptError as error:
                raise CorruptError(str(error), each.layer) from error
        else:
            decoded = model.tables.likeliest[prediction.numbers]
        _insert(found.values[each.level], each, decoded + prediction.offsets)
        found.known[each.level].reshape(-1)[each.positions] = is_whole
        found.predictions[each.level].numbers.reshape(-1)[each.positions] = prediction.numbers
        found.predictions[each.level].offsets.reshape(-1)[each.positions] = prediction.offsets
    return replace(found, values=_values_of(model, passes, found))


def _values_of(model: EntropyModel, passes: Sequence[Pass], found: DecodedValues) -> Values:
    """Of the codes that a tile was decoded to; where they are not known and no value has such a code, 0.

    Raises:
        CorruptError: for a known code that no value has, naming the layer.
    """
    if all(each.bit is None for each in passes):
        return found.values
    values = model.values(found.values)
    for each in passes:
        indices, known = (arrays[each.level].reshape(-1)[each.positions] for arrays in (values, found.known))
        if ((indices < 0) & known).any():
            raise CorruptError("an index is of no codeword", each.layer)
    return [np.maximum(indices, 0) for indices in values]


def encode_fixed_length(levels: Sequence[Level], values: Values) -> list[bytes]:
    """A section for each level: every index in ceil(log2(codebook_size)) bits, highest first."""
    sections = []
    for level, indices in zip(levels, values, strict=True):
        shifts = np.arange(_index_bits(level))[::-1]
        sections.append(np.packbits(indices.reshape(-1, 1) >> shifts & 1).tobytes())
    return sections


def decode_fixed_length(
    levels: Sequence[Level], sections: Sequence[bytes | None], shapes: Sequence[Shape]
) -> DecodedValues:
    """The inverse of `encode_fixed_length`, up to the first section that is None, as `decode_tile` gives it."""
    if len(levels) != len(sections):
        raise CorruptError(f"it has {len(sections)} layers for {len(levels)} levels of fixed length")
    found = DecodedValues.empty(shapes)
    for number, (level, section, shape) in enumerate(zip(levels, sections, shapes)):
        if section is None:
            break
        num_bits = _index_bits(level)
        count = shape[1] * shape[2]
        if len(section) != -(-count * num_bits // 8):
            raise CorruptError(f"{len(section)} bytes came for {count} indices of {num_bits} bits", number)
        bits = np.unpackbits(np.frombuffer(section, np.uint8))
        indices = np.zeros(count, np.int64)
        for number_of_bit in range(
            num_bits
        ):  # a product with all powers of 2 would take 8 bytes for each bit
            indices = indices << 1 | bits[number_of_bit : count * num_bits : num_bits]
        if bits[count * num_bits :].any() or (indices >= level.codebook_size).any():
            raise CorruptError(
                f"an index is beyond the {level.codebook_size} codewords, or bits are left over", number
            )
        found.values[number][:] = indices.reshape(shape)
        found.known[number][:] = True
    return found


def _index_bits(level: Level) -> int:
    return (level.codebook_size - 1).bit_length()


def _parts(values: Values, tile: Tile, header: Header) -> Values:
    return [each[where] for each, where in zip(values, tile.slices(header.levels))]


def _coded_passes(model: EntropyModel, values: Values, steps_index: int) -> Iterator[CodedPass]:
    """Predictions are asked for with what a decoder knows by then."""
    codes = [np.ascontiguousarray(each, np.int64) for each in model.codes(values)]
    predictor = model.predictor([each.shape for each in codes], steps_index)
    known = [np.zeros_like(each) for each in codes]
    for number, each in enumerate(predictor.passes):
        prediction = predictor.predict(number, known)
        coded = codes[each.level].reshape(-1)[each.positions]
        if each.bit is not None:
            coded = coded >> each.bit & 1
        yield CodedPass(each.layer, coded - prediction.offsets, prediction.numbers)
        _insert(known[each.level], each, coded)


def _insert(array: np.ndarray, one_pass: Pass, coded: np.ndarray) -> None:
    """Enter what a pass codes into a level's array, which is contiguous."""
    if one_pass.bit is None:
        array.reshape(-1)[one_pass.positions] = coded
    else:
        array.reshape(-1)[one_pass.positions] |= coded << one_pass.bit
