"""Latents and indices as small files, exact to the bit on every machine; FORMAT.md specifies them."""

from latent_codec.bitstream.compression import (
    DEFAULT_QUALITY,
    PartialWarning,
    compress,
    decompress,
    ideal_bits,
    prepare,
    read,
    sidecar,
)
from latent_codec.bitstream.container import unpack
from latent_codec.bitstream.context_entropy import IndexContextEntropy, LatentContextEntropy
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
from latent_codec.bitstream.sidecars import load_entropy_model
from latent_codec.bitstream.static_entropy import StaticEntropy, fit_static

__all__ = [
    "DEFAULT_QUALITY",
    "BitstreamError",
    "CorruptError",
    "IndexContextEntropy",
    "LatentContextEntropy",
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
    "prepare",
    "read",
    "sidecar",
    "unpack",
]
