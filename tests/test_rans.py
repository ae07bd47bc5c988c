import random

import numpy as np
import pytest

from latent_codec.bitstream.errors import CorruptError
from latent_codec.bitstream.rans import LOWER, Decoder, encode
from latent_codec.bitstream.tables import TOTAL, Tables, pmf_to_quantized_cdf


def random_tables(random_state, num_tables=5, largest=60, escapes=True) -> Tables:
    starts = [
        pmf_to_quantized_cdf(random_state.dirichlet(np.full(size, 0.3)))
        for size in random_state.integers(2, largest, num_tables)
    ]
    return Tables.concatenate(
        starts, random_state.integers(-40, 1, num_tables, dtype=np.int32).tolist(), escapes=escapes
    )


def draw(tables: Tables, numbers: np.ndarray, random_state) -> np.ndarray:
    """Symbols as the tables expect them."""
    keys = (numbers.astype(np.int64) << 16) + random_state.integers(0, TOTAL, len(numbers))
    return tables.ends.searchsorted(keys, "right")


def decoded(tables: Tables, passes: list[bytes], numbers: list[np.ndarray]) -> list[np.ndarray]:
    decoder, found = Decoder(tables), []
    for data, each in zip(passes, numbers, strict=True):
        symbols, rest = decoder.decode(data, each)
        assert not rest
        found.append(symbols)
    decoder.finish()
    return found


def decoded_one_by_one(tables: Tables, passes: list[bytes], numbers: list[np.ndarray]) -> list[list[int]]:
    """The decoder that FORMAT.md describes, a symbol at a time."""
    data = passes[0]
    fields, position = [], 0
    while len(fields) < 2:
        shift = value = 0
        while data[position] & 128:
            value |= (data[position] & 127) << shift
            shift, position = shift + 7, position + 1
        fields.append(value | data[position] << shift)
        position += 1
    num_lanes, interleaved = fields
    lanes = [
        int.from_bytes(data[position + 6 * k : position + 6 * k + 6], "little") for k in range(num_lanes)
    ]
    passes = [data[position + 6 * num_lanes :], *passes[1:]]
    returned, done, found = [], 0, []
    for data, each in zip(passes, numbers, strict=True):
        words = [data[k] | data[k + 1] << 8 for k in range(0, len(data), 2)]
        symbols = []
        for index, number in enumerate(each.tolist()):
            lane = index % num_lanes if done < interleaved else 0
            slot = lanes[lane] & 65535
            starts = tables.starts[
                tables.offsets[number] : tables.offsets[number] + tables.sizes[number]
            ].tolist()
            symbol = max(s for s, start in enumerate(starts) if start <= slot)
            frequency = (*starts, 65536)[symbol + 1] - starts[symbol]
            lanes[lane] = frequency * (lanes[lane] >> 16) + slot - starts[symbol]
            symbols.append(int(tables.offsets[number]) + symbol)
            done += 1
            if lanes[lane] < LOWER:
                queue = returned or words
                lanes[lane] = lanes[lane] << 16 | queue.pop(0)
            if done == interleaved:
                returned = [word for state in lanes[1:] for word in (state >> 16 & 65535, state & 65535)]
                assert all(state >> 32 == 1 for state in lanes[1:])
        assert not words
        found.append(symbols)
    assert lanes[0] == LOWER and not returned
    return found


@pytest.mark.parametrize("num_lanes", [None, 1, 2, 5, 32, 256])
@pytest.mark.parametrize("counts", [(0,), (1,), (2,), (0, 0, 1), (997,), (1, 0, 33, 600, 2), (4099, 5000)])
def test_symbols_come_back(num_lanes, counts):
    random_state = np.random.default_rng(sum(counts))
    tables = random_tables(random_state)
    numbers = [random_state.integers(0, len(tables), count) for count in counts]
    passes = [draw(tables, each, random_state) for each in numbers]
    stream = encode(tables, passes, num_lanes)
    assert len(stream) == len(passes)
    for found, expected in zip(decoded(tables, stream, numbers), passes):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("num_lanes", [1, 3, 16])
def test_another_decoder_reads_the_same_stream(num_lanes):
    random_state = np.random.default_rng(1)
    tables = random_tables(random_state, largest=12)
    numbers = [random_state.integers(0, len(tables), count) for count in (400, 0, 333, 500)]
    passes = [draw(tables, each, random_state) for each in numbers]
    stream = encode(tables, passes, num_lanes)
    assert stream[0][0] == num_lanes
    assert decoded_one_by_one(tables, stream, numbers) == [each.tolist() for each in passes]


@pytest.mark.parametrize("seed", range(20))
def test_random_tables_of_all_sizes(seed):
    random_state = np.random.default_rng(seed)
    tables = random_tables(
        random_state, int(random_state.integers(1, 40)), int(random_state.integers(3, 3000))
    )
    numbers = [random_state.integers(0, len(tables), random_state.integers(0, 3000)) for _ in range(3)]
    passes = [draw(tables, each, random_state) for each in numbers]
    for found, expected in zip(decoded(tables, encode(tables, passes), numbers), passes):
        np.testing.assert_array_equal(found, expected)


def test_one_symbol_costs_nothing_and_the_largest_alphabet_16_bits_each():
    certain = Tables.concatenate([pmf_to_quantized_cdf([7.0])], [3], escapes=False)
    numbers = np.zeros(5000, np.int64)
    (stream,) = encode(certain, [numbers])
    assert len(stream) == 1 + 1 + 6  # lanes, interleaved symbols, lane 0
    assert decoded(certain, [stream], [numbers])[0].tolist() == [0] * 5000

    uniform = Tables.concatenate([pmf_to_quantized_cdf(np.ones(TOTAL))], [0], escapes=False)
    symbols = np.random.default_rng(0).integers(0, TOTAL, 5000)
    (stream,) = encode(uniform, [symbols])
    assert 0 <= len(stream) - 2 * 5000 <= 0.005 * 10000 + 64
    np.testing.assert_array_equal(decoded(uniform, [stream], [numbers])[0], symbols)


def test_rare_symbols_next_to_a_nearly_certain_one():
    tables = Tables.concatenate([pmf_to_quantized_cdf([1.0, 1e-9])], [0], escapes=False)
    assert tables.frequencies.tolist() == [TOTAL - 1, 1]
    symbols = (np.random.default_rng(0).random(20000) < 0.01).astype(np.int64)
    numbers = np.zeros(len(symbols), np.int64)
    np.testing.assert_array_equal(decoded(tables, encode(tables, [symbols], 8), [numbers])[0], symbols)


@pytest.mark.parametrize("scale", [0.15, 0.4, 1.0, 3.0, 30.0])
@pytest.mark.parametrize("count", [64, 1000, 16384, 65536])
def test_size_is_the_models_own_bits(scale, count):
    random_state = np.random.default_rng(0)
    values = np.arange(-200, 201)
    table = pmf_to_quantized_cdf(np.exp(-np.abs(values) / scale))
    tables = Tables.concatenate([table], [-200], escapes=False)
    numbers = np.zeros(count, np.int64)
    symbols = draw(tables, numbers, random_state)
    stream = encode(tables, np.array_split(symbols, 4))
    ideal = tables.code_lengths(values[symbols], numbers).sum() / 8
    assert ideal <= sum(map(len, stream)) <= 1.005 * ideal + 64


def test_tables_add_up_and_follow_the_probabilities():
    random_state = np.random.default_rng(0)
    for size in (1, 2, 3, 17, 1000, TOTAL - 1, TOTAL):
        probabilities = (
            random_state.dirichlet(np.full(size, 0.05)) if size < 2000 else random_state.random(size)
        )
        frequencies = np.diff(np.append(pmf_to_quantized_cdf(probabilities).astype(np.int64), TOTAL))
        assert len(frequencies) == size and frequencies.min() >= 1 and frequencies.sum() == TOTAL
    frequencies = np.diff(np.append(pmf_to_quantized_cdf([0.5, 0.25, 0.125, 0.125]).astype(np.int64), TOTAL))
    assert frequencies.tolist() == [32768, 16384, 8192, 8192]


def test_largest_remainders_get_what_is_left_the_first_of_equals_first():
    starts = pmf_to_quantized_cdf(np.ones(3))  # 21845 1/3 each
    assert starts.dtype == np.uint16
    assert starts.tolist() == [0, 21846, 43691]
    assert pmf_to_quantized_cdf([3, 0, 0, 1]).tolist() == [
        0,
        49151,
        49152,
        49153,
    ]  # 49150.5 and 16383.5 next to two ones
    assert pmf_to_quantized_cdf([0, 0]).tolist() == [0, 32768]
    rows = pmf_to_quantized_cdf([[[1, 1], [3, 1]]])
    assert rows.shape == (1, 2, 2) and rows[0, :, 1].tolist() == [32768, 49152]
    np.testing.assert_array_equal(pmf_to_quantized_cdf([5e-324, 5e-324]), [0, 32768])
    np.testing.assert_array_equal(pmf_to_quantized_cdf([1e308, 1e308]), [0, 32768])


@pytest.mark.parametrize(
    "probabilities, words",
    [
        ([], "got 0"),
        (np.ones(TOTAL + 1), "got 65537"),
        ([0.5, -0.1], "not negative"),
        ([0.5, np.nan], "finite"),
        (0.5, "got 0"),
    ],
)
def test_probabilities_that_make_no_table_are_refused(probabilities, words):
    with pytest.raises(ValueError, match=words):
        pmf_to_quantized_cdf(probabilities)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"starts": np.array([0, 9, 9, 0, 1], np.uint16)}, "ascend"),
        ({"starts": np.array([1, 5, 9, 0, 1], np.uint16)}, "start at 0"),
        ({"starts": np.array([0, 5, 9, 0], np.uint16)}, "the sum 4 of the starts"),
        ({"starts": np.array([0, 5, 9, 0, 1], np.int64)}, "starts in uint16 of shape .*, got int64"),
        ({"sizes": np.array([5, 0], np.int32)}, "sizes above 0"),
        ({"minimums": np.array([0], np.int32)}, r"minimums in int32 of shape \(2,\), got"),
    ],
)
def test_tables_that_cannot_be_are_refused(changes, words):
    fields = {
        "starts": np.array([0, 5, 9, 0, 1], np.uint16),
        "sizes": np.array([3, 2], np.int32),
        "minimums": np.array([0, 0], np.int32),
        "escapes": np.array([False, True]),
    }
    Tables(**fields)
    with pytest.raises(ValueError, match=words):
        Tables(**(fields | changes))


def escaping_tables() -> Tables:
    return Tables.concatenate(
        [pmf_to_quantized_cdf([1, 2, 1, 1]), pmf_to_quantized_cdf([1])], [-1, 5], escapes=True
    )  # -1, 0, 1 and escape; nothing but an escape


def test_values_beyond_their_table_escape():
    tables = escaping_tables()
    far = 2**32 - 2
    values = np.array([0, -2, 1, 2, -7, 500, -1 - far - 1, 2 + far, 5, 4, 5 + far, -1], np.int64)
    numbers = np.array([0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 0])
    symbols, escape_bits = tables.entries(values, numbers)
    found, rest = tables.symbols(symbols, numbers, escape_bits + b"more")
    np.testing.assert_array_equal(found, values)
    assert rest == b"more"
    for wrong in (numbers[:3], numbers + 1, numbers - 1):
        with pytest.raises(ValueError, match="cdf_index"):
            tables.entries(values, wrong)
    with pytest.raises(ValueError, match="beyond their tables"):
        tables.entries(np.array([3 + far]), np.array([0]))


def test_escape_bits_are_side_and_exp_golomb():
    tables = escaping_tables()
    for value, code in ((2, "11"), (-2, "01"), (3, "1010"), (-4, "0011"), (5, "100100")):
        _, escape_bits = tables.entries(np.array([value]), np.array([0]))
        assert f"{int.from_bytes(escape_bits):08b}" == code.ljust(8, "0")


def test_values_without_a_symbol_are_refused():
    tables = Tables.concatenate([pmf_to_quantized_cdf([1, 1])], [4], escapes=False)
    with pytest.raises(ValueError, match=r"from 4 to 5 .*, got 6"):
        tables.entries(np.array([4, 6]), np.array([0, 0]))


def test_damaged_escape_bits_are_found():
    tables = escaping_tables()
    numbers = np.zeros(3, np.int64)
    symbols, escape_bits = tables.entries(np.array([90, 0, -70]), numbers)
    for damaged in (b"", escape_bits[:-1], b"\0" * 40, escape_bits[:-1] + b"\xff"):
        with pytest.raises(CorruptError):
            tables.symbols(symbols, numbers, damaged)


@pytest.fixture
def stream():
    random_state = np.random.default_rng(0)
    tables = random_tables(random_state)
    numbers = [random_state.integers(0, len(tables), 700) for _ in range(2)]
    passes = [draw(tables, each, random_state) for each in numbers]
    return tables, numbers, encode(tables, passes, 8)


def test_unread_words_are_handed_back(stream):
    tables, numbers, (first, _) = stream
    decoder = Decoder(tables)
    _, rest = decoder.decode(first + b"\1\2\3", numbers[0])
    assert rest == b"\1\2\3"


def test_a_stream_cut_short_ends_in_an_error(stream):
    tables, numbers, (first, second) = stream
    for length in range(0, len(first), 7):
        with pytest.raises(CorruptError):
            decoded(tables, [first[:length], second], numbers)
    with pytest.raises(CorruptError):
        decoded(tables, [first, second[:-2]], numbers)
    with pytest.raises(CorruptError):
        Decoder(tables).finish()


def test_damaged_streams_end_in_an_error_or_in_symbols(stream):
    """And of 200 flipped bits the states by themselves find all but a few, without any checksum."""
    tables, numbers, parts = stream
    random.seed(0)
    missed = 0
    for _ in range(200):
        damaged = [bytearray(part) for part in parts]
        part = random.choice(damaged)
        part[random.randrange(len(part))] ^= 1 << random.randrange(8)
        decoder = Decoder(tables)
        try:
            for data, each in zip(damaged, numbers):
                symbols, rest = decoder.decode(bytes(data), each)
                assert len(symbols) == len(each) and symbols.min() >= 0 and symbols.max() < len(tables.starts)
                if rest:
                    raise CorruptError("unread words")
            decoder.finish()
            missed += 1
        except CorruptError:
            pass
    assert missed <= 1


def test_numbers_of_lanes_that_cannot_be_are_refused(stream):
    tables, _, _ = stream
    with pytest.raises(ValueError, match="num_lanes of 1 to 256, got 0"):
        encode(tables, [np.zeros(3, np.int64)], 0)
    with pytest.raises(ValueError, match="got 257"):
        encode(tables, [np.zeros(3, np.int64)], 257)
    with pytest.raises(ValueError, match="at least one pass"):
        encode(tables, [])
    for head in (
        b"\0\0",
        b"\2\0" + bytes(12),
        b"\1\5" + bytes(6),
        b"\xff\xff\xff\xff\x7f\1",
        b"\x81\0\0",
        b"\1\0" + bytes(6),
    ):
        with pytest.raises(CorruptError):
            Decoder(tables).decode(head, np.zeros(1, np.int64))
