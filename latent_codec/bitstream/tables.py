"""Integer probability tables, and how values become their symbols: all that a decoder may know of a probability.

    values --symbols--> symbols + escape bits --rans--> bytes --rans--> symbols + escape bits --values--> values

A table is made once, when an entropy model is exported, and shipped: a decoder adds and compares integers alone.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from latent_codec.bitstream.errors import CorruptError

PRECISION = 16
TOTAL = 1 << PRECISION
"""What the frequencies of every table add up to."""

MAX_PREFIX = 31
"""Zeros before the first one of an escaped value, at most: it lies less than 2^32 - 1 beyond its table."""


def cumulative_tables(probabilities: np.ndarray) -> np.ndarray:
    """Probabilities, or counts, as integers that add up to 2^16, each at least 1: where every symbol starts.

    By largest remainder: what would get less than 1 gets 1, the others share the rest in proportion, rounded down, and
    the largest remainders get one more each, the first of equals first.

    Args:
        probabilities: (..., num_symbols), not negative, in any unit; at most 2^16 symbols. All 0 counts as all alike.

    Returns:
        uint16, same shape: starts; the first is 0, and after the last symbol stands 2^16.

    Raises:
        ValueError: for no or too many symbols, and for values that are negative or not finite.
    """
    probabilities = np.asarray(probabilities, np.float64)
    num_symbols = probabilities.shape[-1] if probabilities.ndim else 0
    if not 1 <= num_symbols <= TOTAL:
        raise ValueError(f"probabilities of {num_symbols} symbols came; a table has 1 to {TOTAL}.")
    if not np.isfinite(probabilities).all() or (probabilities < 0).any():
        raise ValueError("probabilities must be finite and not negative.")
    rows = probabilities.reshape(-1, num_symbols)
    frequencies = np.stack([_frequencies(row) for row in rows]) if len(rows) else rows.astype(np.int64)
    return (frequencies.cumsum(-1) - frequencies).astype(np.uint16).reshape(probabilities.shape)


def _frequencies(row: np.ndarray) -> np.ndarray:
    largest = row.max()
    row = row / largest if largest > 0 else np.ones_like(row)
    floored = np.zeros(len(row), bool)
    while True:
        remaining = TOTAL - int(floored.sum())
        quotas = np.where(floored, 1.0, row * (remaining / row[~floored].sum()))
        too_small = quotas < 1
        if not too_small.any():
            break
        floored |= too_small
    frequencies = np.maximum(np.floor(quotas), 1).astype(np.int64)
    remainders = quotas - frequencies
    missing = TOTAL - int(frequencies.sum())
    frequencies[np.argsort(-remainders, kind="stable")[:missing]] += 1
    return frequencies


@dataclass(frozen=True, kw_only=True, eq=False)
class Tables:
    """Tables of any lengths, one after another.

    Symbol s of table t stands for the value minimums[t] + s, but for the last symbol of a table that escapes: it stands
    for all values beyond, and each that occurs follows in the section's escape bits.

    Raises:
        ValueError: if a table is empty, does not start at 0, or has a symbol of frequency 0.
    """

    starts: np.ndarray
    """uint16, flat: of the symbols of all tables."""
    sizes: np.ndarray
    """int32 (num_tables,): symbols of each table, the escape included."""
    minimums: np.ndarray
    """int32 (num_tables,): value of each table's first symbol."""
    escapes: np.ndarray
    """bool (num_tables,): whether the table's last symbol is an escape."""

    def __post_init__(self):
        types = {"starts": np.uint16, "sizes": np.int32, "minimums": np.int32, "escapes": np.bool_}
        for name, dtype in types.items():
            array = np.asarray(getattr(self, name))
            if array.ndim != 1 or array.dtype != dtype:
                raise ValueError(
                    f"{name} are {array.dtype} of shape {array.shape}; expected {np.dtype(dtype)}, flat."
                )
        if not len(self.sizes) == len(self.minimums) == len(self.escapes) > 0:
            raise ValueError(
                f"{len(self.sizes)} sizes, {len(self.minimums)} minimums and {len(self.escapes)} escapes came; "
                "there is one of each per table."
            )
        if (self.sizes < 1).any() or int(self.sizes.sum(dtype=np.int64)) != len(self.starts):
            raise ValueError(f"sizes of tables do not add up to the {len(self.starts)} starts that came.")
        if self.starts[self.offsets].any() or (self.frequencies < 1).any():
            raise ValueError("a table starts at 0, and each symbol lies at least 1 beyond the one before.")

    @classmethod
    def concatenate(cls, starts: list[np.ndarray], minimums: list[int], *, escapes: bool) -> "Tables":
        """From one array of `cumulative_tables` and one minimum per table."""
        return cls(
            starts=np.concatenate(starts).astype(np.uint16),
            sizes=np.array([len(each) for each in starts], np.int32),
            minimums=np.array(minimums, np.int32),
            escapes=np.full(len(starts), escapes),
        )

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> "Tables":
        """The inverse of `arrays`, which are taken out.

        Raises:
            KeyError: for a missing array.
        """
        return cls(**{name: arrays.pop(name) for name in ("starts", "sizes", "minimums", "escapes")})

    def arrays(self) -> dict[str, np.ndarray]:
        """By the names in an entropy model's file."""
        return {name: getattr(self, name) for name in ("starts", "sizes", "minimums", "escapes")}

    def __len__(self) -> int:
        return len(self.sizes)

    @cached_property
    def offsets(self) -> np.ndarray:
        """Where each table begins in the flat arrays, int64 (num_tables,)."""
        sizes = self.sizes.astype(np.int64)
        return sizes.cumsum() - sizes

    @cached_property
    def keys(self) -> np.ndarray:
        """Starts, each plus its table's number times 2^16: one ascending sequence, int64."""
        return np.repeat(np.arange(len(self), dtype=np.int64) << PRECISION, self.sizes) + self.starts

    @cached_property
    def ends(self) -> np.ndarray:
        """Like `keys`, where each symbol ends."""
        return np.append(self.keys[1:], len(self) << PRECISION)

    @cached_property
    def frequencies(self) -> np.ndarray:
        """int64, flat."""
        ends = np.append(self.starts[1:], 0).astype(np.int64)
        ends[self.offsets + self.sizes - 1] = TOTAL
        return ends - self.starts

    @cached_property
    def lists(self) -> tuple[list[int], list[int], list[int]]:
        """`keys`, `ends` and `frequencies` as lists, which are faster for one symbol at a time."""
        return self.keys.tolist(), self.ends.tolist(), self.frequencies.tolist()

    def symbols(self, values: np.ndarray, numbers: np.ndarray) -> tuple[np.ndarray, bytes]:
        """Values to places in the flat arrays, and the escape bits of those beyond their tables.

        An escaped value v is a bit, 1 above the table and 0 below, and then its distance d >= 0 from the table's edge
        in Exp-Golomb code: as many zeros as d + 1 has bits after its first, then d + 1. Zeros fill the last byte.

        Args:
            values: integers, (n,).
            numbers: of their tables, (n,).

        Raises:
            ValueError: for a value beyond a table without escape, or 2^32 - 1 and more beyond one with it.
        """
        values, numbers = values.astype(np.int64), self._checked(numbers, len(values))
        minimums, lengths = self.minimums[numbers].astype(np.int64), self._num_values[numbers]
        beyond = (values < minimums) | (values >= minimums + lengths)
        if not beyond.any():
            return self.offsets[numbers] + values - minimums, b""
        if not self.escapes[numbers[beyond]].all():
            first = int(np.flatnonzero(beyond & ~self.escapes[numbers])[0])
            raise ValueError(
                f"value {values[first]} has no symbol in its table, which has {minimums[first]} to "
                f"{minimums[first] + lengths[first] - 1} and no escape."
            )
        above = values[beyond] >= (minimums + lengths)[beyond]
        distances = np.where(
            above, values[beyond] - (minimums + lengths)[beyond], (minimums - 1 - values)[beyond]
        )
        if int(distances.max()) + 1 >= 1 << (MAX_PREFIX + 1):
            raise ValueError(
                f"a value lies {distances.max()} beyond its table; the farthest is {2 ** (MAX_PREFIX + 1) - 2}."
            )
        codes = [
            f"{int(side)}{'0' * ((d + 1).bit_length() - 1)}{d + 1:b}"
            for side, d in zip(above, distances.tolist())
        ]
        bits = np.frombuffer("".join(codes).encode(), np.uint8) - ord("0")
        symbols = np.where(beyond, lengths, values - minimums)
        return self.offsets[numbers] + symbols, np.packbits(bits).tobytes()

    def values(self, symbols: np.ndarray, numbers: np.ndarray, data: bytes) -> tuple[np.ndarray, bytes]:
        """The inverse of `symbols`: int64 (n,), and what `data` hold behind the escape bits that they begin with.

        Raises:
            CorruptError: if the escape bits end early or make no code.
        """
        numbers = self._checked(numbers, len(symbols))
        local = symbols - self.offsets[numbers]
        values = self.minimums[numbers] + local
        escaped = np.flatnonzero(self.escapes[numbers] & (local == self._num_values[numbers])).tolist()
        most = len(escaped) * (2 + 2 * MAX_PREFIX) + 7 >> 3
        bits = np.unpackbits(np.frombuffer(data[:most], np.uint8)).tobytes()
        position = 0
        for index in escaped:
            one = bits.find(1, position + 1, position + 2 + MAX_PREFIX)
            end = 2 * one - position
            if one < 0 or end > len(bits):
                raise CorruptError("its escape bits end early or make no code")
            distance = int(bits[one:end].translate(_DIGITS), 2) - 1
            number = numbers[index]
            edge = int(self.minimums[number])
            values[index] = (
                edge + self._num_values[number] + distance if bits[position] else edge - 1 - distance
            )
            position = end
        num_bytes = -(-position // 8)
        if 1 in bits[position : 8 * num_bytes]:
            raise CorruptError("its escape bits do not end in zeros")
        return values, data[num_bytes:]

    def costs(self, values: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """What an ideal coder needs for each value under these tables, in bits: -log2 p, and an escape's own. float64 (n,)."""
        minimums, lengths = self.minimums[numbers].astype(np.int64), self._num_values[numbers]
        above, below = values - minimums - lengths, minimums - 1 - values
        distances = np.maximum(above, below)
        symbols = np.where(distances >= 0, lengths, values - minimums)
        costs = self._bits_of_symbols[self.offsets[numbers] + symbols]
        beyond = np.flatnonzero(distances >= 0)
        costs[beyond] += 2 * np.floor(np.log2(distances[beyond] + 1)) + 2
        return costs

    def bits(self, values: np.ndarray, numbers: np.ndarray) -> float:
        """The sum of `costs`.

        Raises:
            ValueError: for a value that has no symbol.
        """
        self.symbols(values, numbers)
        return float(self.costs(values, numbers).sum())

    @cached_property
    def _bits_of_symbols(self) -> np.ndarray:
        return PRECISION - np.log2(self.frequencies)

    @cached_property
    def likeliest(self) -> np.ndarray:
        """The value of each table that has the highest frequency, escapes aside: the first of equals. int64 (num_tables,)."""
        found = []
        for start, count in zip(self.offsets.tolist(), self._num_values.tolist()):
            found.append(int(self.frequencies[start : start + count].argmax()) if count else 0)
        return self.minimums + np.array(found, np.int64)

    @cached_property
    def _num_values(self) -> np.ndarray:
        return self.sizes.astype(np.int64) - self.escapes

    def _checked(self, numbers: np.ndarray, count: int) -> np.ndarray:
        if len(numbers) != count:
            raise ValueError(f"{len(numbers)} table numbers came for {count} values; give one for each.")
        if count and not 0 <= numbers.min() <= numbers.max() < len(self):
            raise ValueError(
                f"table numbers run from {numbers.min()} to {numbers.max()}; there are tables 0 to {len(self) - 1}."
            )
        return numbers


_DIGITS = bytes(ord("0") + (byte & 1) for byte in range(256))
