"""The toolbox for the autoencoder side of latent diffusion.

Importing this package is cheap: torch and diffusers are loaded when one of the
names below is first used, so that the command line answers `--help` at once.
"""

from importlib import import_module

__version__ = "0.1.0"

_EXPORTS = {
    "LatentCodec": "latent_codec.codec",
    "LatentSpace": "latent_codec.latent_space",
}

__all__ = ["LatentCodec", "LatentSpace", "__version__"]


def __getattr__(name: str):
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'latent_codec' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
