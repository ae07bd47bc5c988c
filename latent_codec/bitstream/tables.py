"""Frequency tables (CDFs) in integers, and the entries of symbols in them: the only probabilities that a decoder knows.

    symbols --entries--> entries + escape bits --rans--> bytes --rans--> entries + escape bits --symbols--> symbols

Tables are computed once, when an entropy model is exported, and shipped: a decoder only adds and compares integers.
"""

from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np

from latent_codec.bitstream.checks import check, check_array
from latent_codec.bitstream.errors import CorruptError

PRECISION = 16
TOTAL = 1 << PRECISION
"""Sum of the frequencies of every table."""

MAX_PREFIX = 31
"""Most zeros before the first one of an escaped symbol, which is less than 2^32 - 1 beyond its table."""


def pmf_to_quantized_cdf(probabilities: np.ndarray) -> np.ndarray:
    """Round probabilities, or counts, to frequencies of at least 1 that add up to 2^16, and accumulate them.

    By largest remainder: frequencies below 1 become 1, the others share the rest in proportion, rounded down, and
    the largest remainders get one more each, the first of equals first.

    Args:
        probabilities: (..., num_symbols), not negative, in any unit; at most 2^16 symbols. All 0 means uniform.

    Returns:
        uint16, same shape: the start of each symbol; the first is 0, and the last symbol ends at 2^16.

    Raises:
        ValueError: for no or too many symbols, and for values that are negative or not finite.
    """
    probabilities = np.asarray(probabilities, np.float64)
    num_symbols = probabilities.shape[-1] if probabilities.ndim else 0
    check(1 <= num_symbols <= TOTAL, f"probabilities of 1 to {TOTAL} symbols", num_symbols)
    are_usable = np.isfinite(probabilities).all() and (probabilities >= 0).all()
    check(are_usable, "probabilities that are finite and not negative", "others")
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
    """Frequency tables of any lengths, one after another.

    Entry s of table t is the symbol minimums[t] + s. The last entry of a table that escapes is its escape symbol, for all
    symbols beyond the table; each that occurs follows in the section's escape bits.

    Raises:
        ValueError: if a table is empty, does not start at 0, or has an entry of frequency 0.
    """

    starts: np.ndarray
    """uint16, flat: of the entries of all tables."""
    sizes: np.ndarray
    """int32 (num_tables,): entries of each table, the escape symbol included."""
    minimums: np.ndarray
    """int32 (num_tables,): each table's first symbol."""
    escapes: np.ndarray
    """bool (num_tables,): whether the table's last entry is an escape symbol."""

    def __post_init__(self):
        types = {"starts": np.uint16, "sizes": np.int32, "minimums": np.int32, "escapes": np.bool_}
        for name, dtype in types.items():
            shape = (None,) if name == "starts" else (len(self.sizes),)
            check_array(np.asarray(getattr(self, name)), name, dtype, shape)
        check(len(self.sizes) > 0, "at least one table", "none")
        total = int(self.sizes.sum(dtype=np.int64))
        is_sum = (self.sizes >= 1).all() and total == len(self.starts)
        check(is_sum, f"sizes above 0 with the sum {len(self.starts)} of the starts", total)
        if self.starts[self.offsets].any() or (self.frequencies < 1).any():
            raise ValueError("expected tables that start at 0 and ascend")

    @classmethod
    def concatenate(cls, starts: list[np.ndarray], minimums: list[int], *, escapes: bool) -> "Tables":
        """From one array of `pmf_to_quantized_cdf` and one minimum per table."""
        return cls(
            starts=np.concatenate(starts).astype(np.uint16),
            sizes=np.array([len(each) for each in starts], np.int32),
            minimums=np.array(minimums, np.int32),
            escapes=np.full(len(starts), escapes),
        )

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> "Tables":
        """The inverse of `arrays`, which are taken out; KeyError for a missing one."""
        return cls(**{each.name: arrays.pop(each.name) for each in fields(cls)})

    def arrays(self) -> dict[str, np.ndarray]:
        """By the names in an entropy model's file."""
        return {each.name: getattr(self, each.name) for each in fields(self)}

    def __len__(self) -> int:
        return len(self.sizes)

    @cached_property
    def offsets(self) -> np.ndarray:
        """The first entry of each table in the flat arrays, int64 (num_tables,)."""
        sizes = self.sizes.astype(np.int64)
        return sizes.cumsum() - sizes

    @cached_property
    def keys(self) -> np.ndarray:
        """Starts, each plus its table's number times 2^16: one ascending sequence, int64."""
        return np.repeat(np.arange(len(self), dtype=np.int64) << PRECISION, self.sizes) + self.starts

    @cached_property
    def ends(self) -> np.ndarray:
        """Like `keys`, the end of each entry."""
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

    def entries(self, symbols: np.ndarray, cdf_index: np.ndarray) -> tuple[np.ndarray, bytes]:
        """The entries of symbols in the flat arrays, and the escape bits of symbols beyond their tables.

        An escaped symbol is a bit, 1 above the table and 0 below, and then its distance d >= 0 from the table's edge
        in Exp-Golomb code: one zero less than d + 1 has bits, then d + 1. Zeros fill the last byte.

        Args:
            symbols: integers, (n,).
            cdf_index: numbers of their tables, (n,).

        Raises:
            ValueError: for a symbol beyond a table without escape, or 2^32 - 1 and more beyond one with it.
        """
        symbols, cdf_index = symbols.astype(np.int64), self._checked(cdf_index, len(symbols))
        minimums, lengths = self.minimums[cdf_index].astype(np.int64), self._num_symbols[cdf_index]
        beyond = (symbols < minimums) | (symbols >= minimums + lengths)
        if not beyond.any():
            return self.offsets[cdf_index] + symbols - minimums, b""
        if not self.escapes[cdf_index[beyond]].all():
            first = int(np.flatnonzero(beyond & ~self.escapes[cdf_index])[0])
            raise ValueError(
                f"expected a symbol from {minimums[first]} to {minimums[first] + lengths[first] - 1} for a table without "
                f"escape, got {symbols[first]}"
            )
        above = symbols[beyond] >= (minimums + lengths)[beyond]
        distances = np.where(
            above, symbols[beyond] - (minimums + lengths)[beyond], (minimums - 1 - symbols)[beyond]
        )
        furthest, allowed = int(distances.max()), 2 ** (MAX_PREFIX + 1) - 2
        check(furthest <= allowed, f"symbols at most {allowed} beyond their tables", furthest)
        codes = [
            f"{int(side)}{'0' * ((d + 1).bit_length() - 1)}{d + 1:b}"
            for side, d in zip(above, distances.tolist())
        ]
        bits = np.frombuffer("".join(codes).encode(), np.uint8) - ord("0")
        local = np.where(beyond, lengths, symbols - minimums)
        return self.offsets[cdf_index] + local, np.packbits(bits).tobytes()

    def symbols(self, entries: np.ndarray, cdf_index: np.ndarray, data: bytes) -> tuple[np.ndarray, bytes]:
        """The inverse of `entries`: int64 (n,), and the rest of `data` after the escape bits that it begins with.

        Raises:
            CorruptError: if the escape bits end early or make no code.
        """
        cdf_index = self._checked(cdf_index, len(entries))
        local = entries - self.offsets[cdf_index]
        symbols = self.minimums[cdf_index] + local
        escaped = np.flatnonzero(self.escapes[cdf_index] & (local == self._num_symbols[cdf_index])).tolist()
        most = len(escaped) * (2 + 2 * MAX_PREFIX) + 7 >> 3
        bits = np.unpackbits(np.frombuffer(data[:most], np.uint8)).tobytes()
        position = 0
        for index in escaped:
            one = bits.find(1, position + 1, position + 2 + MAX_PREFIX)
            end = 2 * one - position
            if one < 0 or end > len(bits):
                raise CorruptError("its escape bits end early or make no code")
            distance = int(bits[one:end].translate(_DIGITS), 2) - 1
            table = cdf_index[index]
            edge = int(self.minimums[table])
            above = edge + self._num_symbols[table] + distance
            symbols[index] = above if bits[position] else edge - 1 - distance
            position = end
        num_bytes = -(-position // 8)
        if 1 in bits[position : 8 * num_bytes]:
            raise CorruptError("its escape bits do not end in zeros")
        return symbols, data[num_bytes:]

    def code_lengths(self, symbols: np.ndarray, cdf_index: np.ndarray) -> np.ndarray:
        """The ideal code length of each symbol in bits, -log2 p, and the escape bits of those beyond. float64, same shape."""
        minimums, lengths = self.minimums[cdf_index].astype(np.int64), self._num_symbols[cdf_index]
        distances = np.maximum(symbols - minimums - lengths, minimums - 1 - symbols)
        is_beyond = distances >= 0
        found = self._code_lengths[self.offsets[cdf_index] + np.where(is_beyond, lengths, symbols - minimums)]
        found[is_beyond] += 2 * np.floor(np.log2(distances[is_beyond] + 1)) + 2
        return found

    @cached_property
    def _code_lengths(self) -> np.ndarray:
        """Of entries."""
        return PRECISION - np.log2(self.frequencies)

    @cached_property
    def most_probable(self) -> np.ndarray:
        """The symbol of the highest frequency in each table, escapes aside: the first of equals. int64 (num_tables,)."""
        found = []
        for start, count in zip(self.offsets.tolist(), self._num_symbols.tolist()):
            found.append(int(self.frequencies[start : start + count].argmax()) if count else 0)
        return self.minimums + np.array(found, np.int64)

    @cached_property
    def _num_symbols(self) -> np.ndarray:
        """Entries of each table, the escape symbol aside."""
        return self.sizes.astype(np.int64) - self.escapes

    def _checked(self, cdf_index: np.ndarray, count: int) -> np.ndarray:
        check(len(cdf_index) == count, f"a cdf_index for each of {count} symbols", len(cdf_index))
        lowest, highest = cdf_index.min(initial=0), cdf_index.max(initial=0)
        fits = 0 <= lowest <= highest < len(self)
        check(fits, f"cdf_index of 0 to {len(self) - 1}", f"{lowest} to {highest}")
        return cdf_index


_DIGITS = bytes(ord("0") + (byte & 1) for byte in range(256))
