"""Variable-length integers (LEB128): seven bits a byte, lowest first; the top bit is set where more bytes follow."""

from latent_codec.bitstream.errors import CorruptError

MAX_BYTES = 5
"""Of integers below 2^32."""


def write_varint(number: int) -> bytes:
    """0 to 2^32 - 1 -> 1 to 5 bytes.

    Raises:
        ValueError: for other numbers.
    """
    if not 0 <= number < 1 << 32:
        raise ValueError(f"expected an integer from 0 to {2**32 - 1}, got {number}")
    parts = []
    while number > 127:
        parts.append(number & 127 | 128)
        number >>= 7
    return bytes([*parts, number])


def read_varint(data: bytes, position: int) -> tuple[int, int]:
    """The number at `position`, and the position after it.

    Raises:
        CorruptError: if the data end within it, or it is written longer than needed.
    """
    number = 0
    for count, byte in enumerate(data[position : position + MAX_BYTES]):
        number |= (byte & 127) << 7 * count
        if byte < 128:
            if (count and not byte) or number >= 1 << 32:
                break
            return number, position + count + 1
    raise CorruptError("a number in it is malformed or cut short")
