"""An entropy coder in integer arithmetic: range asymmetric numeral systems, many interleaved lanes at a time in NumPy.

rANS (Duda, arXiv:1311.2540, section 2.3) keeps its message in one number x. With a symbol's frequency f out of 2^16
and its start c in the table,

    encode: x -> (x // f) 2^16 + c + x mod f            decode: x -> f (x // 2^16) + x mod 2^16 - c

A lane is such a number, 2^32 <= x < 2^48, which writes and reads words of 16 bits at its low end. (States of 32 bits
would do, but rounding x // f would then cost about 0.005 bits a symbol, 1 % of a coarse image.) Symbol i of a pass
belongs to lane i mod num_lanes. The encoder runs backwards, so that the decoder runs forwards.

A lane that starts at 2^32 wastes 32 bits. Only lane 0 does: it codes the end of the stream by itself, and the words that it
writes become the starts of the other lanes. The remaining cost is a byte per lane. FORMAT.md specifies this exactly.
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
    """Encode symbols to the words of each pass; those of the first follow the lanes' states.

    Args:
        passes: the symbols of each, int64 entries as from `Tables.entries`; at least one pass, which may be empty.
        num_lanes: 1 to 256; None: by the size of the result, of which the lanes then cost 0.4 %, or 32 bytes.
            Where the symbols are too few to start them, there is one.

    Raises:
        ValueError: for no passes, or another number of lanes.
    """
    if not passes:
        raise ValueError("expected at least one pass, got none; it may be empty")
    if num_lanes is None:
        num_bits = sum((PRECISION - np.log2(tables.frequencies[symbols])).sum() for symbols in passes)
        num_bytes = int(num_bits / 8)
        num_lanes = min(MAX_LANES, max(num_bytes // 256, min(32, num_bytes // 32), 1))
    if not 1 <= num_lanes <= MAX_LANES:
        raise ValueError(f"expected num_lanes of 1 to {MAX_LANES}, got {num_lanes}")

    state, tails, num_interleaved = _encode_last(tables, passes, 2 * (num_lanes - 1))
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
    """Decodes one stream, pass by pass: the tables of a pass may depend on the symbols before.

    Raises:
        CorruptError: from every method, for data that `encode` cannot have written.
    """

    def __init__(self, tables: Tables):
        self._tables = tables
        self._states: np.ndarray | None = None
        self._num_interleaved = 0
        """Symbols that the lanes have yet to decode together; later ones are lane 0's."""
        self._returned: list[int] = []
        """Words of the other lanes' starts, for lane 0 to read, last first."""

    def decode(self, data: bytes, cdf_index: np.ndarray) -> tuple[np.ndarray, bytes]:
        """Decode the symbols of the next pass, int64 entries (n,); with the rest of `data` after its words.

        Args:
            data: as from `encode`, for the pass.
            cdf_index: numbers of the tables, (n,).
        """
        if self._states is None:
            data = self._read_head(data)
        words = np.frombuffer(data, "<u2", len(data) // 2).astype(np.int64)
        keys = cdf_index.astype(np.int64) << PRECISION
        count = min(self._num_interleaved, len(keys))
        symbols = np.empty(len(keys), np.int64)
        num_read = self._decode_lanes(keys[:count], words, symbols)
        self._num_interleaved -= count
        if not self._num_interleaved:
            self._join()
            num_read += self._decode_last(keys[count:].tolist(), words[num_read:].tolist(), symbols[count:])
        return symbols, data[2 * num_read :]

    def finish(self, section: int | None = None) -> None:
        """Check after the last pass, in `section`, that every lane is back at its start."""
        is_read = self._states is not None and not self._num_interleaved and not self._returned
        if not is_read or self._states.tolist() != [LOWER]:
            raise CorruptError("its words do not lead back to the encoder's start", section)

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
        """Fill `symbols` by all lanes; return the number of words read."""
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
        """Take the lanes but the first apart into the words of their starts."""
        starts, self._states = self._states[1:], self._states[:1]
        if len(starts):
            if (starts >> 32 != 1).any():
                raise CorruptError("its words do not lead back to the encoder's start")
            self._returned = np.stack((starts >> 16 & WORD, starts & WORD), 1).flatten().tolist()[::-1]

    def _decode_last(self, keys: list[int], words: list[int], symbols: np.ndarray) -> int:
        """Fill `symbols` by lane 0; return the number of words read."""
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


def _encode_last(
    tables: Tables, passes: Sequence[np.ndarray], num_words: int
) -> tuple[int, list[list[int]], int]:
    """Encode the end of the stream by lane 0, until it has written `num_words` words; all of the stream for 0.

    Returns:
        Its state, the words of each pass in the order written, and the number of symbols left; 0 if it wrote fewer words.
    """
    keys, _, frequencies = tables.lists
    state, words = LOWER, [[] for _ in passes]
    left = sum(map(len, passes))
    num_written = 0
    for symbols, written in zip(reversed(passes), reversed(words)):
        for symbol in reversed(symbols.tolist()):
            if num_words and num_written >= num_words:
                return state, words, left
            frequency = frequencies[symbol]
            if state >= frequency << 32:
                written.append(state & WORD)
                num_written += 1
                state >>= 16
            quotient, rest = divmod(state, frequency)
            state = (quotient << PRECISION) + (keys[symbol] & WORD) + rest
            left -= 1
    return state, words, left


def _take(words: list[list[int]], count: int) -> np.ndarray:
    """Remove the `count` words written last, and return them, the last first."""
    taken = []
    for written in words:
        while written and len(taken) < count:
            taken.append(written.pop())
    return np.array(taken, np.int64)


def _encode_lanes(tables: Tables, symbols: np.ndarray, states: np.ndarray) -> np.ndarray:
    """Encode a pass to its words, in the decoder's order; changes `states`."""
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
