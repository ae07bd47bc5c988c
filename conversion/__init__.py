"""Conversion of foreign checkpoints to diffusers components and back, with every key accounted for."""

from importlib import import_module

_EXPORTS = {
    "Conversion": "converting",
    "ConversionError": "renaming",
    "FORMATS": "foreign",
    "Foreign": "foreign",
    "KeyReport": "renaming",
    "convert": "converting",
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
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)


def __dir__() -> list[str]:
    return __all__
