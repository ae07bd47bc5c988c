"""Code values in a file and decode them: tile by tile, layer by layer, entropy coded or of fixed length, without the codec.

values --to_symbols--> symbols --predict, pass by pass--> less offsets, with frequency tables --rans--> sections
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np

from latent_codec.bitstream import rans
from latent_codec.bitstream.container import Container, Header, Level, pack
from latent_codec.bitstream.entropy_model import CodedPass, EntropyModel, Pass, Prediction, Shape
from latent_codec.bitstream.errors import CorruptError
from latent_codec.bitstream.tables import Tables

Values = list[np.ndarray]
"""Quantized latents or codebook indices, int64 (channels, h, w) for each level."""


@dataclass(frozen=True)
class DecodedValues:
    """The values of a file or of a tile; arrays (channels, h, w) for each level."""

    values: Values
    """Where unknown: the value most probable under the entropy model, 0 without a model."""
    known: list[np.ndarray]
    """bool."""
    predictions: list[Prediction]
    """Of all values, unknown ones too; 0 without a model."""
    code_length: float = 0.0
    """Of the known values in bits under the entropy model, or by the codebook sizes at fixed length: sections have a little more."""

    @classmethod
    def empty(cls, shapes: Sequence[Shape]) -> "DecodedValues":
        return cls(
            values=[np.zeros(shape, np.int64) for shape in shapes],
            known=[np.zeros(shape, bool) for shape in shapes],
            predictions=[Prediction(*np.zeros((2, *shape), np.int64)) for shape in shapes],
        )

    def insert(self, places: list[tuple[slice, ...]], tile: "DecodedValues") -> None:
        """Copy a tile's arrays to its place in each level."""
        for level, place in enumerate(places):
            self.values[level][place] = tile.values[level]
            self.known[level][place] = tile.known[level]
            self.predictions[level].cdf_index[place] = tile.predictions[level].cdf_index
            self.predictions[level].offsets[place] = tile.predictions[level].offsets


def encode_values(model: EntropyModel | None, values: Values, outline: Header) -> bytes:
    """Code an image's values in a file.

    Args:
        model: None for indices of fixed length.
        outline: the header, but for its `num_layers` and `entropy_fingerprint`.

    Raises:
        ValueError: for values of other shapes than the outline's, or beyond a table without escape.
    """
    if [each.shape for each in values] != outline.shapes:
        raise ValueError(f"expected values of shapes {outline.shapes}, got {[each.shape for each in values]}")
    tiles = []
    for tile in outline.tiles():
        parts = [each[place] for each, place in zip(values, tile.slices(outline.levels))]
        if model is None:
            tiles.append(encode_fixed_length(outline.levels, parts))
        else:
            tiles.append(encode_tile(model, parts, outline.step_size_index))
    return pack_tiles(model, tiles, outline)


def pack_tiles(model: EntropyModel | None, tiles: Sequence[list[bytes]], outline: Header) -> bytes:
    """Join the sections of each tile's layers to a file; model and outline as `encode_values` takes them."""
    header = replace(outline, num_layers=len(tiles[0]), entropy_fingerprint=model and model.fingerprint)
    return pack(header, [section for sections in zip(*tiles, strict=True) for section in sections])


def decode_values(model: EntropyModel | None, container: Container) -> DecodedValues:
    """Decode the values of a file.

    Args:
        model: the one it was coded with, which the caller has checked.

    Raises:
        CorruptError: for sections that do not fit the model, naming the first.
    """
    header = container.header
    found, code_length = DecodedValues.empty(header.shapes), 0.0
    for number, tile in enumerate(header.tiles()):
        sections, shapes = container.sections[number :: header.num_tiles], tile.shapes(header.levels)
        try:
            if header.entropy_fingerprint is None:
                part = decode_fixed_length(header.levels, sections, shapes)
            else:
                part = decode_tile(model, sections, shapes, header.step_size_index)
        except CorruptError as error:
            section = (error.section or 0) * header.num_tiles + number
            raise CorruptError(f"{header.section_name(section)} is damaged: {error}", section) from error
        found.insert(tile.slices(header.levels), part)
        code_length += part.code_length
    return replace(found, code_length=code_length)


def encode_tile(model: EntropyModel, values: Values, step_size_index: int = 0) -> list[bytes]:
    """Entropy code a tile's values in the sections of its layers; errors are those of `Tables.entries`."""
    symbols = [np.ascontiguousarray(each, np.int64) for each in model.to_symbols(values)]
    predictor = model.predictor([each.shape for each in symbols], step_size_index)
    known, passes = [np.zeros_like(each) for each in symbols], []
    for number, each in enumerate(predictor.passes):
        prediction = predictor.predict(number, known)
        coded = symbols[each.level].reshape(-1)[each.positions]
        if each.bit is not None:
            coded = coded >> each.bit & 1
        passes.append(CodedPass(each.layer, coded - prediction.offsets, prediction.cdf_index))
        _insert(known[each.level], each, coded)
    return encode_passes(model.tables, passes)


def encode_passes(tables: Tables, passes: Sequence[CodedPass]) -> list[bytes]:
    """Code a tile's passes in the sections of its layers: one rANS stream, cut after each pass, escape bits after each part."""
    entries, escapes = zip(*[tables.entries(each.symbols, each.cdf_index) for each in passes])
    sections = [b""] * (passes[-1].layer + 1)
    for each, words, escape_bits in zip(passes, rans.encode(tables, entries), escapes):
        sections[each.layer] += words + escape_bits
    return sections


def decode_tile(
    model: EntropyModel, sections: Sequence[bytes | None], shapes: Sequence[Shape], step_size_index: int = 0
) -> DecodedValues:
    """The inverse of `encode_tile`, up to the first section that is None.

    Raises:
        CorruptError: for sections that do not fit the model and these shapes, naming the layer as `section`.
    """
    predictor = model.predictor(shapes, step_size_index)
    passes = predictor.passes
    if passes[-1].layer + 1 != len(sections):
        raise CorruptError(f"it has {len(sections)} layers, and its entropy model {passes[-1].layer + 1}")
    found, code_length = DecodedValues.empty(shapes), 0.0
    decoder, is_whole = rans.Decoder(model.tables), True
    for layer, numbers in groupby(range(len(passes)), lambda number: passes[number].layer):
        rest = sections[layer]
        is_whole = is_whole and rest is not None
        for number in numbers:
            each, prediction = passes[number], predictor.predict(number, found.values)
            if is_whole:
                try:
                    entries, rest = decoder.decode(rest, prediction.cdf_index)
                    decoded, rest = model.tables.symbols(entries, prediction.cdf_index, rest)
                except CorruptError as error:
                    raise CorruptError(str(error), layer) from error
                code_length += float(model.tables.code_lengths(decoded, prediction.cdf_index).sum())
            else:
                decoded = model.tables.most_probable[prediction.cdf_index]
            _insert(found.values[each.level], each, decoded + prediction.offsets)
            found.known[each.level].reshape(-1)[each.positions] = is_whole
            found.predictions[each.level].cdf_index.reshape(-1)[each.positions] = prediction.cdf_index
            found.predictions[each.level].offsets.reshape(-1)[each.positions] = prediction.offsets
        if is_whole and rest:
            raise CorruptError(f"{len(rest)} bytes are left over", layer)
    if is_whole:
        decoder.finish(layer)
    return replace(found, values=_values_of(model, passes, found), code_length=code_length)


def _values_of(model: EntropyModel, passes: Sequence[Pass], found: DecodedValues) -> Values:
    """The values of a tile's decoded symbols; 0 for an unknown symbol of no value, which a known one must have."""
    if all(each.bit is None for each in passes):
        return found.values
    values = model.from_symbols(found.values)
    for each in passes:
        indices, known = (arrays[each.level].reshape(-1)[each.positions] for arrays in (values, found.known))
        if ((indices < 0) & known).any():
            raise CorruptError("an index is of no codeword", each.layer)
    return [np.maximum(indices, 0) for indices in values]


def encode_fixed_length(levels: Sequence[Level], values: Values) -> list[bytes]:
    """Code each level in a section: every index in ceil(log2(codebook_size)) bits, highest first."""
    sections = []
    for level, indices in zip(levels, values, strict=True):
        shifts = np.arange(_index_bits(level))[::-1]
        sections.append(np.packbits(indices.reshape(-1, 1) >> shifts & 1).tobytes())
    return sections


def decode_fixed_length(
    levels: Sequence[Level], sections: Sequence[bytes | None], shapes: Sequence[Shape]
) -> DecodedValues:
    """The inverse of `encode_fixed_length`, up to the first section that is None."""
    if len(levels) != len(sections):
        raise CorruptError(f"it has {len(sections)} layers for {len(levels)} levels of fixed length")
    found, code_length = DecodedValues.empty(shapes), 0.0
    for number, (level, section, shape) in enumerate(zip(levels, sections, shapes)):
        if section is None:
            break
        num_bits = _index_bits(level)
        count = shape[1] * shape[2]
        if len(section) != -(-count * num_bits // 8):
            raise CorruptError(f"it has {len(section)} bytes for {count} indices of {num_bits} bits", number)
        bits = np.unpackbits(np.frombuffer(section, np.uint8))
        indices = np.zeros(count, np.int64)
        for bit in range(num_bits):  # a product with all powers of 2 would take 8 bytes for each bit
            indices = indices << 1 | bits[bit : count * num_bits : num_bits]
        if bits[count * num_bits :].any() or (indices >= level.codebook_size).any():
            what = f"an index is beyond the {level.codebook_size} codewords, or bits are left over"
            raise CorruptError(what, number)
        found.values[number][:] = indices.reshape(shape)
        found.known[number][:] = True
        code_length += count * math.log2(level.codebook_size)
    return replace(found, code_length=code_length)


def _index_bits(level: Level) -> int:
    return (level.codebook_size - 1).bit_length()


def _insert(array: np.ndarray, one_pass: Pass, coded: np.ndarray) -> None:
    """Enter a pass's symbols, or binary digits, into a level's array, which is contiguous."""
    if one_pass.bit is None:
        array.reshape(-1)[one_pass.positions] = coded
    else:
        array.reshape(-1)[one_pass.positions] |= coded << one_pass.bit
