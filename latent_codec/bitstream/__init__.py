"""Latents and indices in small files, exact to the bit on every machine; FORMAT.md specifies them."""

from importlib import import_module

from latent_codec import deprecated

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
    "load_entropy_model": "sidecars",
    "prepare": "compression",
    "read": "compression",
    "sidecar": "sidecars",
    "unpack": "container",
}
"""Name -> module, imported when the name is first used: a file's header is read without torch."""

__all__ = list(_EXPORTS)


def __getattr__(name: str):
    if name in _EXPORTS:
        return getattr(import_module(f"latent_codec.bitstream.{_EXPORTS[name]}"), name)
    if name == "ideal_bits":
        return deprecated.ideal_bits
    raise AttributeError(f"module 'latent_codec.bitstream' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
