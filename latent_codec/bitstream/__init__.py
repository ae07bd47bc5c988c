"""Latents and indices as small files, exact to the bit on every machine; FORMAT.md specifies them."""

from importlib import import_module

_EXPORTS = {
    "DEFAULT_QUALITY": "compression",
    "BitstreamError": "errors",
    "CorruptError": "errors",
    "IndexContextEntropy": "context_entropy",
    "LatentContextEntropy": "context_entropy",
    "NewerFormatError": "errors",
    "NotCompressedError": "errors",
    "PartialWarning": "compression",
    "StaticEntropy": "static_entropy",
    "TooLargeError": "errors",
    "TruncatedError": "errors",
    "WrongCodecError": "errors",
    "WrongEntropyModelError": "errors",
    "compress": "compression",
    "decompress": "compression",
    "fit_static": "static_entropy",
    "ideal_bits": "compression",
    "load_entropy_model": "sidecars",
    "prepare": "compression",
    "read": "compression",
    "sidecar": "compression",
    "unpack": "container",
}
"""Name -> module, imported when the name is first used: what a file says of itself is read without torch."""

__all__ = list(_EXPORTS)


def __getattr__(name: str):
    if name in _EXPORTS:
        return getattr(import_module(f"latent_codec.bitstream.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module 'latent_codec.bitstream' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
