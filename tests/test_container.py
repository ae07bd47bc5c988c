import random
import tracemalloc
import zlib
from contextlib import suppress
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from bitstream_samples import (
    GOLDEN,
    SPACE,
    index_model,
    index_outline,
    index_values,
    latent_model,
    latent_outline,
    latent_values,
    model_name,
    models,
    outline,
    outlines,
    samples,
    values_of,
)
from other_reader import Sidecar
from other_reader import read as read_otherwise

from latent_codec.bitstream.coding import decode_values, encode_values
from latent_codec.bitstream.container import (
    MAGIC,
    MAX_FILE_BYTES,
    Header,
    Level,
    Tile,
    pack,
    read_file,
    unpack,
)
from latent_codec.bitstream.entropy_model import Pass, Prediction
from latent_codec.bitstream.errors import (
    BitstreamError,
    CorruptError,
    NewerFormatError,
    NotCompressedError,
    TooLargeError,
    TruncatedError,
)
from latent_codec.bitstream.quantization import reconstruct
from latent_codec.bitstream.sidecars import load_entropy_model
from latent_codec.bitstream.varints import read_varint, write_varint

NAMES = list(outlines())
MODELS = models()


def model_of(name: str):
    """None for fixed length."""
    return MODELS.get(model_name(name))


def golden(name: str) -> bytes:
    return (GOLDEN / f"{name}.lcf").read_bytes()


def decoded(name: str, data: bytes) -> list[np.ndarray]:
    found = decode_values(model_of(name), unpack(data))
    assert all(mask.all() for mask in found.known)
    return found.values


def signed(data: bytes, version: int = 1) -> bytes:
    """The header of `data`, magic to fields, given its length and checksum anew, with nothing behind it."""
    length = len(MAGIC) + 1 + 1 + len(data) + 4
    start = MAGIC + bytes([version, length]) + data
    return start + zlib.crc32(start).to_bytes(4, "little")


def fields_of(data: bytes) -> bytes:
    """What stands between a file's header length and its checksum."""
    length, position = read_varint(data, 5)
    return data[position : length - 4]


@cache
def written() -> dict[str, bytes]:
    return samples()


@pytest.mark.parametrize("name", NAMES)
def test_golden_files_are_written_to_the_byte_and_read(name):
    assert written()[name] == golden(name)
    for found, expected in zip(decoded(name, golden(name)), values_of(name), strict=True):
        np.testing.assert_array_equal(found, expected)


FINGERPRINTS = {
    "latents": "4df2380fa065c4a0",
    "indices": "cef217ee7dca7fdc",
    "latents-context": "5a9fe0cc87cc2c55",
    "indices-context": "62fee7e6faa8c713",
    "grid-context": "800a6f4953d56fdb",
}


@pytest.mark.parametrize("name, fingerprint", FINGERPRINTS.items())
def test_golden_sidecars(name, fingerprint, tmp_path):
    model, path = MODELS[name], GOLDEN / f"{name}.entropy.safetensors"
    stored = load_entropy_model(path)
    assert stored.fingerprint == model.fingerprint == Sidecar(path.read_bytes()).fingerprint.hex()
    assert stored.fingerprint == fingerprint
    model.save(tmp_path / "again.safetensors")
    again = load_entropy_model(tmp_path / "again.safetensors")
    assert again.fingerprint == model.fingerprint
    for key, array in stored.arrays().items():
        np.testing.assert_array_equal(again.arrays()[key], array)


@pytest.mark.parametrize("name", NAMES)
def test_a_reader_written_from_the_specification_reads_the_golden_files(name):
    model = model_name(name) in MODELS and GOLDEN / f"{model_name(name)}.entropy.safetensors"
    found, latents = read_otherwise(golden(name), Sidecar(model.read_bytes()) if model else None)
    expected = values_of(name)
    for values, its in zip(found, expected, strict=True):
        assert len(values) == its.size
        np.testing.assert_array_equal([values[place] for place in np.ndindex(its.shape)], its.reshape(-1))
    if not name.startswith("latents"):
        return
    container = unpack(golden(name))
    prediction = decode_values(model_of(name), container).predictions[0]
    reconstructed = reconstruct(model_of(name), expected[0], prediction, container.header.step_size_index)
    its = np.array([latents[place] for place in np.ndindex(reconstructed.shape)])
    np.testing.assert_array_equal(its, reconstructed.reshape(-1))


def contexts_of(name: str):
    """A golden file of one tile, as it is decoded, and the passes that it has."""
    container, model = unpack(golden(name)), model_of(name)
    header = container.header
    return decode_values(model, container), model.predictor(header.shapes, header.step_size_index).passes


def test_golden_files_of_contexts_use_what_the_format_has():
    """Layers as it numbers them, most tables, offsets to both sides, and escapes in a layer's first pass."""
    found, passes = contexts_of("latents-context")
    assert [each.layer for each in passes] == [0, 1, 1, 1, 1, 2, 2, 3, 3]
    (prediction,) = found.predictions
    assert {-2, -1, 0, 1, 2} < set(prediction.offsets.flat)
    assert len(set(prediction.cdf_index.flat)) > len(MODELS["latents-context"].tables) / 2
    assert (np.abs(found.values[0].reshape(-1)[passes[5].positions]) > 500).any()
    _, passes = contexts_of("grid-context")
    assert [each.layer for each in passes] == np.repeat([0, 1, 1, 2, 3], 4).tolist()
    _, passes = contexts_of("indices-context")
    assert [each.layer for each in passes] == [0] * 5 * 3 + [1] * 5 * 4
    _, passes = contexts_of("indices-context-top")
    assert [each.layer for each in passes] == [0] * 5 * 3


@pytest.mark.parametrize("name", ["latents-context", "latents-context-tiled"])
def test_latents_of_context_files_are_pinned(name):
    container, model = unpack(golden(name)), model_of(name)
    found = decode_values(model, container)
    latents = reconstruct(model, found.values[0], found.predictions[0], container.header.step_size_index)
    assert latents.dtype == np.float32
    pins = {"latents-context": 959346784, "latents-context-tiled": 3438766198}
    assert zlib.crc32(latents.astype("<f4").tobytes()) == pins[name]


def test_header_of_one_tile_and_four_layers_is_at_most_64_bytes():
    header = Header(
        height=4000,
        width=6000,
        levels=(Level(side=8, channels=4),),
        num_layers=4,
        space_fingerprint=SPACE,
        entropy_fingerprint=SPACE,
        step_size_index=95,
    )
    sections = [bytes(2000)] * 4
    data = pack(header, sections)
    assert len(data) - 8000 <= 64
    found = unpack(data)
    assert (found.header, found.header_bytes) == (header, len(data) - 8000)
    assert (list(found.sections), found.lengths, found.missing) == (sections, (2000,) * 4, [])


@pytest.mark.parametrize("num_sections", [1, 11, 12, 13, 14, 15, 16, 3000])
def test_header_length_counts_itself(num_sections):
    header = outline(
        (Level(side=8, codebook_size=9),), num_layers=1, height=8, width=8 * num_sections, tile=1
    )
    sections = [bytes([number % 251]) * (number % 3) for number in range(num_sections)]
    assert list(unpack(pack(header, sections)).sections) == sections
    with pytest.raises(ValueError, match=f"sections, got {num_sections + 1}"):
        pack(header, [*sections, b""])


@pytest.mark.parametrize("size", [(1, 1), (16, 16), (17, 1), (75, 101), (33, 48)])
@pytest.mark.parametrize("tile", [None, 1, 2, 100])
def test_tiles_cover_every_position_of_every_level_once(size, tile):
    header = replace(index_outline(), height=size[0], width=size[1], tile=tile)
    assert header.shapes[0][1:] == (-(-size[0] // 16), -(-size[1] // 16))
    covered = [np.zeros(shape, int) for shape in header.shapes]
    tiles = list(header.tiles())
    assert len(tiles) == header.num_tiles
    for each in tiles:
        for level, where in enumerate(each.slices(header.levels)):
            assert covered[level][where].shape == each.shapes(header.levels)[level]
            covered[level][where] += 1
    assert all((each == 1).all() for each in covered)
    values = index_values(header)
    data = encode_values(index_model(), values, header)
    for found, expected in zip(decode_values(index_model(), unpack(data)).values, values):
        np.testing.assert_array_equal(found, expected)
    assert Tile(top=1, left=2, height=3, width=4).shapes(header.levels) == [(1, 3, 4), (1, 12, 16)]


def test_errors_are_told_apart():
    data = golden("latents")
    header_bytes = unpack(data).header_bytes
    for other in (b"", b"LCF\x8c", b"\x89PNG\r\n\x1a\n", b"\x8cLCG" + data[4:]):
        with pytest.raises(NotCompressedError, match="not a compressed file"):
            unpack(other)
    for length in range(1, header_bytes):
        with pytest.raises(TruncatedError, match="in the header"):
            unpack(data[:length])
    for length in (header_bytes, len(data) - 1):
        with pytest.raises(TruncatedError, match=r"section 0 \(layer 0, tile 0\)"):
            unpack(data[:length])
    with pytest.raises(CorruptError, match="1 bytes follow"):
        unpack(data + b"\0")
    damaged = bytearray(data)
    damaged[-1] ^= 1
    with pytest.raises(CorruptError, match=r"section 0 .* is damaged") as error:
        unpack(bytes(damaged))
    assert error.value.section == 0
    for position in range(6, header_bytes):
        damaged = bytearray(data)
        damaged[position] ^= 16
        with pytest.raises(CorruptError, match="header is damaged"):
            unpack(bytes(damaged))
    fields = fields_of(data)
    with pytest.raises(NewerFormatError, match="expected version 1 of the file, got 2"):
        unpack(signed(b"what a later version wants", version=2))
    with pytest.raises(NewerFormatError, match="features 0x8"):
        unpack(signed(bytes([fields[0] | 8]) + fields[1:]))
    with pytest.raises(CorruptError, match="got 0"):
        unpack(signed(fields, version=0))


def test_headers_that_contradict_themselves_are_corrupt():
    fields = fields_of(golden("indices"))
    assert fields[:9] == bytes([3, 75, 101, 2, 16, 5, 4, 16, 2])
    unpack(signed(fields[: 9 + 16] + 2 * bytes(1 + 4)))  # two empty sections
    for position, value, words in [
        (0, 0, "malformed"),
        (1, 0, "is 0"),
        (3, 0, "malformed"),
        (3, 17, "17 levels"),
        (4, 15, "sides of 15, 4"),
        (5, 0, "codebook"),
        (6, 0, "is 0"),
        (8, 0, "0 layers"),
        (8, 3, "no room for 3 sections"),
        (8, 1, "left over"),
    ]:
        changed = bytearray(fields)
        changed[position] = value
        with pytest.raises(CorruptError, match=words):
            unpack(signed(bytes(changed)))
    with pytest.raises(CorruptError, match="malformed"):  # 1 in two bytes
        unpack(signed(fields[:3] + b"\x82\0" + fields[4:]))


@pytest.mark.parametrize(
    "fields",
    [
        {"height": 2**20, "width": 2**20},
        {"height": 2**31, "width": 1},
        {
            "height": 1,
            "width": 1,
            "levels": (Level(side=2**31, codebook_size=2), Level(side=1, codebook_size=2)),
        },
        {"height": 2**14, "width": 2**14},
    ],
)
def test_claims_of_size_take_no_memory(fields):
    numbers = [1, fields["height"], fields["width"]]
    levels = fields.get("levels", (Level(side=1, codebook_size=2),))
    numbers += [len(levels), *(number for level in levels for number in (level.side, level.codebook_size)), 1]
    data = signed(b"".join(map(write_varint, numbers)) + bytes(8 + 5))
    tracemalloc.start()
    with pytest.raises(TooLargeError):
        unpack(data)
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()


def test_a_writer_is_held_to_the_same_bounds():
    with pytest.raises(TooLargeError, match="use smaller tiles"):
        latent_outline(tile=None, height=10000, width=20000)
    assert latent_outline(tile=128, height=10000, width=20000).num_tiles == 10 * 20
    with pytest.raises(ValueError, match="expected"):
        encode_values(None, index_values(index_outline())[:1], index_outline())


@pytest.mark.parametrize("name", ["latents-tiled", "indices-tiled"])
def test_a_part_of_a_file_is_read_as_far_as_whole_sections_go(name):
    data, expected = golden(name), values_of(name)
    whole = unpack(data)
    lengths = np.cumsum([whole.header_bytes, *whole.lengths])
    for length in range(whole.header_bytes, len(data)):
        found = unpack(data[:length], partial=True)
        num_whole = int((lengths[1:] <= length).sum())
        empty = [section == b"" for section in whole.sections]
        assert [section is not None for section in found.sections] == [
            number < num_whole or is_empty for number, is_empty in enumerate(empty)
        ]
        assert len(found.missing) == found.sections.count(None)
    number = whole.header.num_tiles  # the first of the second layer, or of none
    damaged = bytearray(data)
    damaged[lengths[1]] ^= 1  # tile 1
    found = unpack(bytes(damaged), partial=True)
    assert found.missing == ["section 1 (layer 0, tile 1)"]
    decoded_parts = decode_values(model_of(name), found)
    lost = list(whole.header.tiles())[1]
    for level, where in enumerate(lost.slices(whole.header.levels)):
        mask = np.ones_like(decoded_parts.known[level])
        mask[where] = False
        np.testing.assert_array_equal(decoded_parts.known[level], mask)
        np.testing.assert_array_equal(decoded_parts.values[level][mask], expected[level][mask])
        most_probable = most_probable_values(name, whole.header, level)
        np.testing.assert_array_equal(decoded_parts.values[level][~mask], most_probable[~mask])
    if number < whole.header.num_sections:
        found = unpack(data[: lengths[number]], partial=True)
        decoded_parts = decode_values(model_of(name), found)
        assert decoded_parts.known[0].all() and not decoded_parts.known[1].any()
        np.testing.assert_array_equal(decoded_parts.values[0], expected[0])


@pytest.mark.parametrize("name", [name for name in NAMES if "context" in name])
def test_a_lost_section_costs_the_rest_of_its_tile_alone(name):
    whole, expected, model = unpack(golden(name)), values_of(name), model_of(name)
    header, tiles = whole.header, list(whole.header.tiles())
    for number in range(header.num_sections):
        sections = [None if each == number else section for each, section in enumerate(whole.sections)]
        found = decode_values(model, replace(whole, sections=tuple(sections)))
        layer, tile = divmod(number, header.num_tiles)
        masks = [np.ones(shape, bool) for shape in header.shapes]
        shapes = tiles[tile].shapes(header.levels)
        parts = [np.zeros(shape, bool) for shape in shapes]
        for each in model.predictor(shapes, header.step_size_index).passes:
            parts[each.level].reshape(-1)[each.positions] = each.layer < layer
        for mask, where, part in zip(masks, tiles[tile].slices(header.levels), parts):
            mask[where] = part
        for level, mask in enumerate(masks):
            np.testing.assert_array_equal(found.known[level], mask)
            np.testing.assert_array_equal(found.values[level][mask], expected[level][mask])
            if header.is_indices:
                assert found.values[level].min() >= 0
                assert found.values[level].max() < header.levels[level].codebook_size


def most_probable_values(name: str, header: Header, level: int) -> np.ndarray:
    """The value with the most of 2^16 in each table; 0 where a file has no tables."""
    model, shape = model_of(name), header.shapes[level]
    if model is None:
        return np.zeros(shape, np.int64)
    found = []
    for channel in range(shape[0]):
        table = header.step_size_index * shape[0] + channel if name.startswith("latents") else level
        start = int(model.tables.sizes[:table].sum())
        ends = [*model.tables.starts[start + 1 : start + model.tables.sizes[table]].tolist(), 2**16]
        frequencies = np.array(ends) - model.tables.starts[start : start + model.tables.sizes[table]]
        if model.tables.escapes[table]:
            frequencies = frequencies[:-1]
        found.append(model.tables.minimums[table] + frequencies.argmax())
    return np.broadcast_to(np.array(found)[:, None, None], shape)


def mutated(data: bytes, others: list[bytes], dice: random.Random) -> bytes:
    """One accident: a flipped bit, an end cut off, a part of another file, two sections swapped, bytes lost or doubled."""
    kind, position = dice.randrange(6), dice.randrange(len(data))
    if kind == 0:
        changed = bytearray(data)
        changed[position] ^= 1 << dice.randrange(8)
        return bytes(changed)
    if kind == 1:
        return data[:position]
    if kind == 2:
        other = dice.choice(others)
        start = dice.randrange(len(other))
        return data[:position] + other[start : start + dice.randrange(1, 100)] + data[position + 50 :]
    if kind == 3:
        parts = unpack(data)
        sections = list(parts.sections)
        first, second = dice.randrange(len(sections)), dice.randrange(len(sections))
        sections[first], sections[second] = sections[second], sections[first]
        return data[: parts.header_bytes] + b"".join(sections)
    end = position + dice.randrange(1, 20)
    return data[:position] + (data[end:] if kind == 4 else data[position:end] + data[position:])


def test_no_accident_goes_unseen(count=10_000):
    dice, files = random.Random(0), [golden(name) for name in NAMES]
    for _ in range(count):
        data = dice.choice(files)
        damaged = mutated(data, files, dice)
        if damaged in files:
            continue
        with pytest.raises(BitstreamError):
            unpack(damaged)
        with suppress(BitstreamError):
            unpack(damaged, partial=True)


def test_damage_that_is_signed_anew_ends_in_an_error_or_in_values(count=400):
    """What checksums would have caught: the decoders themselves neither crash nor run away."""
    dice = random.Random(1)
    for _ in range(count):
        name = dice.choice(NAMES)
        parts = unpack(golden(name))
        sections = [bytearray(section) for section in parts.sections]
        for _ in range(dice.randrange(1, 4)):
            section = dice.choice([each for each in sections if each] or [bytearray(1)])
            section[dice.randrange(len(section))] ^= 1 << dice.randrange(8)
            if dice.randrange(4) == 0:
                del section[dice.randrange(len(section)) :]
        if dice.randrange(4) == 0:
            dice.shuffle(sections)
        data = pack(parts.header, [bytes(section) for section in sections])
        try:
            values = decoded(name, data)
        except CorruptError as error:
            assert 0 <= error.section < len(sections)
            continue
        assert [each.shape for each in values] == parts.header.shapes


class Alternating:
    """An entropy model of one channel in two passes, a checkerboard: the second's tables depend on the first's values."""

    space_fingerprint = SPACE
    fingerprint = "fedcba9876543210"
    tables = latent_model().tables
    layers = (0, 1)

    def predictor(self, shapes, step_size_index):
        return AlternatingPredictor(shapes, self.layers)

    def to_symbols(self, values):
        return list(values)

    def from_symbols(self, symbols):
        return list(symbols)


class OneLayer(Alternating):
    """Both passes in one section."""

    layers = (0, 0)


class AlternatingPredictor:
    def __init__(self, shapes, layers):
        ((_, height, width),) = shapes
        is_second = np.add.outer(np.arange(height), np.arange(width)).reshape(-1) % 2
        self.passes = [Pass(0, np.flatnonzero(is_second == number), layers[number]) for number in (0, 1)]

    def predict(self, number, values):
        count = len(self.passes[number].positions)
        if number == 0:
            return Prediction(np.zeros(count, np.int64), np.zeros(count, np.int64))
        neighbors = np.roll(values[0], 1, axis=2).reshape(-1)[self.passes[1].positions]
        return Prediction(np.clip(neighbors, -2, 2) + 3, neighbors // 2)


@pytest.mark.parametrize("size", [(1, 1), (9, 17), (75, 101), (500, 500)])
@pytest.mark.parametrize("model, num_layers", [(Alternating(), 2), (OneLayer(), 1)])
def test_later_passes_may_depend_on_earlier_ones(model, num_layers, size):
    header = latent_outline(height=size[0], width=size[1], tile=20)
    header = replace(header, levels=(Level(side=8),), entropy_fingerprint=Alternating.fingerprint)
    values = latent_values(header)
    data = encode_values(model, values, header)
    found = unpack(data)
    assert found.header.num_layers == num_layers
    np.testing.assert_array_equal(decode_values(model, found).values[0], values[0])


def test_more_sections_than_a_reader_takes_on_are_refused_before_the_table_is_read():
    levels = (Level(side=8, channels=1),)
    fields = {"height": 8192, "width": 8192, "levels": levels, "space_fingerprint": "0" * 16}
    Header(**fields, num_layers=1, entropy_fingerprint="0" * 16, tile=1)
    with pytest.raises(TooLargeError, match="at most 1048576 sections, got 2097152"):
        Header(**fields, num_layers=2, entropy_fingerprint="0" * 16, tile=1)


def test_a_file_larger_than_any_image_needs_is_refused(tmp_path):
    with (tmp_path / "sparse.lcf").open("wb") as file:
        file.write(golden("latents"))
        file.truncate(MAX_FILE_BYTES + 1)
    with pytest.raises(TooLargeError, match="no compressed image"):
        read_file(tmp_path / "sparse.lcf")
    (tmp_path / "whole.lcf").write_bytes(golden("latents"))
    assert read_file(tmp_path / "whole.lcf") == golden("latents")
    with pytest.raises(ValueError, match="folder"):
        read_file(tmp_path)
