"""Latents and indices as small files, exact to the bit on every machine; FORMAT.md specifies them."""

from latent_codec.bitstream.compression import PartialWarning, compress, decompress, ideal_bits, read
from latent_codec.bitstream.container import unpack
from latent_codec.bitstream.errors import (
    BitstreamError,
    CorruptError,
    NewerFormatError,
    NotCompressedError,
    TooLargeError,
    TruncatedError,
    WrongCodecError,
    WrongEntropyModelError,
)
from latent_codec.bitstream.static_entropy import StaticEntropy, fit_static, load_entropy_model

__all__ = [
    "BitstreamError",
    "CorruptError",
    "NewerFormatError",
    "NotCompressedError",
    "PartialWarning",
    "StaticEntropy",
    "TooLargeError",
    "TruncatedError",
    "WrongCodecError",
    "WrongEntropyModelError",
    "compress",
    "decompress",
    "fit_static",
    "ideal_bits",
    "load_entropy_model",
    "read",
    "unpack",
]
