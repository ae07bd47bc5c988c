"""An entropy coder of integers alone: range asymmetric numeral systems, many lanes at a time in NumPy.

rANS (Duda, arXiv:1311.2540, section 2.3) keeps its message in one number x. With a symbol's frequency f out of 2^16,
which begins at c,

    encode: x -> (x // f) 2^16 + c + x mod f            decode: x -> f (x // 2^16) + x mod 2^16 - c

A lane is such a number, 2^32 <= x < 2^48, which gives and takes words of 16 bits at its low end. (States of 32 bits
would do, but rounding x // f would then cost about 0.005 bits a symbol, 1 % of a coarse image.) Symbol i of a pass
belongs to lane i mod num_lanes. The encoder runs backwards, so that the decoder runs forwards.

A lane that starts at 2^32 wastes 32 bits. Only lane 0 does: it codes the end of the stream alone, and the words that it
gives are taken back as the starts of the other lanes. What is left costs a byte per lane. FORMAT.md says this exactly.
"""

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np

from latent_codec.bitstream.errors import CorruptError
from latent_codec.bitstream.tables import PRECISION, Tables
from latent_codec.bitstream.varints import read_varint, write_varint

LOWER = 1 << 32
"""States are at least this, and below 2^16 times this."""
STATE_BYTES = 6
WORD = (1 << 16) - 1
MAX_LANES = 256


def encode(tables: Tables, passes: Sequence[np.ndarray], num_lanes: int | None = None) -> list[bytes]:
    """Symbols -> the words of each pass; those of the first follow the lanes' states.

    Args:
        passes: the symbols of each, int64 as `Tables.symbols` gives them; at least one pass, which may be empty.
        num_lanes: 1 to 256; None: by the size of the result, of which the lanes then cost 0.4 %, or 32 bytes.
            Where all symbols together are too short to start so many, there is one.

    Raises:
        ValueError: for no passes, or another number of lanes.
    """
    if not passes:
        raise ValueError("no passes came; give at least one, empty where there is nothing to code.")
    if num_lanes is None:
        num_lanes = _best_num_lanes(tables, passes)
    if not 1 <= num_lanes <= MAX_LANES:
        raise ValueError(f"num_lanes is {num_lanes}; allowed are 1 to {MAX_LANES}.")

    state, tails, num_interleaved = _encode_alone(tables, passes, 2 * (num_lanes - 1))
    states = np.array([state], np.int64)
    heads = [np.empty(0, np.int64) for _ in passes]
    if num_interleaved:
        starts = _take(tails, 2 * (num_lanes - 1)).reshape(-1, 2)
        states = np.append(states, LOWER | starts[:, 0] << 16 | starts[:, 1])
        before = np.cumsum([0, *map(len, passes)])
        for index in reversed(range(len(passes))):
            symbols = passes[index][: max(num_interleaved - before[index], 0)]
            heads[index] = _encode_lanes(tables, symbols, states)
    words = [np.append(head, tail[::-1]).astype("<u2").tobytes() for head, tail in zip(heads, tails)]
    stored = states.astype("<u8").view(np.uint8).reshape(-1, 8)[:, :STATE_BYTES].tobytes()
    return [write_varint(len(states)) + write_varint(num_interleaved) + stored + words[0], *words[1:]]


class Decoder:
    """Decodes one stream, pass by pass: the numbers of a pass's tables may depend on the symbols before.

    Raises:
        CorruptError: from every method, for what `encode` cannot have written.
    """

    def __init__(self, tables: Tables):
        self._tables = tables
        self._states: np.ndarray | None = None
        self._num_interleaved = 0
        """Symbols that the lanes have still to decode together; those after them are lane 0's."""
        self._returned: list[int] = []
        """Words that the other lanes' starts were made of, for lane 0 to read, last first."""

    def decode(self, data: bytes, numbers: np.ndarray) -> tuple[np.ndarray, bytes]:
        """The symbols of the next pass, int64 (n,), and what `data` hold behind its words.

        Args:
            data: as `encode` gave them for the pass.
            numbers: of the tables, (n,): only these say how much is decoded.
        """
        if self._states is None:
            data = self._read_head(data)
        words = np.frombuffer(data, "<u2", len(data) // 2).astype(np.int64)
        keys = numbers.astype(np.int64) << PRECISION
        count = min(self._num_interleaved, len(keys))
        symbols = np.empty(len(keys), np.int64)
        num_read = self._decode_lanes(keys[:count], words, symbols)
        self._num_interleaved -= count
        if not self._num_interleaved:
            self._join()
            num_read += self._decode_alone(keys[count:].tolist(), words[num_read:].tolist(), symbols[count:])
        return symbols, data[2 * num_read :]

    def finish(self) -> None:
        """To be called after the last pass: whether every lane came to where the encoder started it."""
        if (
            self._num_interleaved
            or self._returned
            or self._states is None
            or self._states.tolist() != [LOWER]
        ):
            raise CorruptError("its words do not lead back to where the encoder started")

    def _read_head(self, data: bytes) -> bytes:
        num_lanes, position = read_varint(data, 0)
        num_interleaved, position = read_varint(data, position)
        end = position + STATE_BYTES * num_lanes
        if not 1 <= num_lanes <= MAX_LANES or (num_lanes == 1) != (num_interleaved == 0) or end > len(data):
            raise CorruptError(f"its stream claims {num_lanes} lanes over {num_interleaved} symbols")
        parts = np.frombuffer(data[position:end], np.uint8).reshape(num_lanes, STATE_BYTES).astype(np.int64)
        states = (parts << 8 * np.arange(STATE_BYTES)).sum(1)
        if (states < LOWER).any():
            raise CorruptError("its stream starts with a state that no encoder leaves")
        self._states, self._num_interleaved = states, num_interleaved
        return data[end:]

    def _decode_lanes(self, keys: np.ndarray, words: np.ndarray, symbols: np.ndarray) -> int:
        """Fill `symbols` lane by lane; the number of words read."""
        keys_of, ends, frequencies = self._tables.keys, self._tables.ends, self._tables.frequencies
        num_lanes, position, available = len(self._states), 0, len(words)
        for first in range(0, len(keys), num_lanes):
            slots = keys[first : first + num_lanes]
            states = self._states[: len(slots)]
            slots = (states & WORD) + slots
            found = ends.searchsorted(slots, "right")
            symbols[first : first + len(slots)] = found
            states >>= PRECISION
            states *= frequencies.take(found)
            slots -= keys_of.take(found)
            states += slots
            low = (states < LOWER).nonzero()[0]
            if low.size:
                end = position + low.size
                if end > available:
                    raise CorruptError("it ends before its symbols do")
                states[low] = states[low] << 16 | words[position:end]
                position = end
        return position

    def _join(self) -> None:
        """Take the lanes but the first apart into the words that they were started with."""
        starts, self._states = self._states[1:], self._states[:1]
        if len(starts):
            if (starts >> 32 != 1).any():
                raise CorruptError("its words do not lead back to where the encoder started")
            self._returned = np.stack((starts >> 16 & WORD, starts & WORD), 1).flatten().tolist()[::-1]

    def _decode_alone(self, keys: list[int], words: list[int], symbols: np.ndarray) -> int:
        """Fill `symbols` by lane 0; the number of words read."""
        keys_of, ends, frequencies = self._tables.lists
        state, position, returned = int(self._states[0]), 0, self._returned
        found = []
        for key in keys:
            slot = key + (state & WORD)
            symbol = bisect_right(ends, slot)
            state = frequencies[symbol] * (state >> PRECISION) + slot - keys_of[symbol]
            if state < LOWER:
                if returned:
                    word = returned.pop()
                elif position < len(words):
                    word = words[position]
                    position += 1
                else:
                    raise CorruptError("it ends before its symbols do")
                state = state << 16 | word
            found.append(symbol)
        symbols[:] = found
        self._states[0] = state
        return position


def _best_num_lanes(tables: Tables, passes: Sequence[np.ndarray]) -> int:
    num_bits = sum((PRECISION - np.log2(tables.frequencies[symbols])).sum() for symbols in passes)
    num_bytes = int(num_bits / 8)
    return min(MAX_LANES, max(num_bytes // 256, min(32, num_bytes // 32), 1))


def _encode_alone(
    tables: Tables, passes: Sequence[np.ndarray], num_words: int
) -> tuple[int, list[list[int]], int]:
    """Lane 0 over the end of the stream, until it has given `num_words` words; over all of it for 0.

    Returns:
        Its state, the words of each pass as they came, and how many symbols are left; none are if it gave fewer.
    """
    keys, _, frequencies = tables.lists
    state, words = LOWER, [[] for _ in passes]
    left = sum(map(len, passes))
    num_given = 0
    for symbols, given in zip(reversed(passes), reversed(words)):
        for symbol in reversed(symbols.tolist()):
            if num_words and num_given >= num_words:
                return state, words, left
            frequency = frequencies[symbol]
            if state >= frequency << 32:
                given.append(state & WORD)
                num_given += 1
                state >>= 16
            quotient, rest = divmod(state, frequency)
            state = (quotient << PRECISION) + (keys[symbol] & WORD) + rest
            left -= 1
    return state, words, left


def _take(words: list[list[int]], count: int) -> np.ndarray:
    """Remove the `count` words that came last, and return them, the last first."""
    taken = []
    for given in words:
        while given and len(taken) < count:
            taken.append(given.pop())
    return np.array(taken, np.int64)


def _encode_lanes(tables: Tables, symbols: np.ndarray, states: np.ndarray) -> np.ndarray:
    """The words of a pass, in the decoder's order; changes `states`."""
    starts, frequencies = tables.keys[symbols] & WORD, tables.frequencies[symbols]
    limits = frequencies << 32
    words = [np.empty(0, np.int64)]
    for first in reversed(range(0, len(symbols), len(states))):
        block = slice(first, first + len(states))
        current = states[: len(symbols[block])]
        high = (current >= limits[block]).nonzero()[0]
        if high.size:
            words.append(current[high] & WORD)
            current[high] >>= 16
        quotients, rests = np.divmod(current, frequencies[block])
        current[:] = (quotients << PRECISION) + starts[block] + rests
    return np.concatenate(words[::-1])
