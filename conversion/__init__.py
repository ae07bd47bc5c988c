"""Conversion of foreign checkpoints to diffusers components and back, with every key accounted for."""

from importlib import import_module

from latent_codec import deprecated

_EXPORTS = {
    "ConversionError": "renaming",
    "FORMATS": "foreign",
    "Foreign": "foreign",
    "KeyReport": "renaming",
    "detect": "foreign",
    "from_diffusers": "foreign",
    "open_checkpoint": "checkpoints",
    "read_foreign": "foreign",
    "to_diffusers": "foreign",
    "write_diffusers": "writing",
    "write_foreign": "writing",
}
__all__ = sorted(_EXPORTS)


def __getattr__(name: str):
    if name in _EXPORTS:
        return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    return deprecated.find_name(__name__, name)


def __dir__() -> list[str]:
    return __all__
