"""Settings that names and shapes of weights do not show: groups of norms, activation, scale. A config or the caller gives them.

Original codes fix these values, and their formats state them. Files in diffusers' own key layout come from networks of
any settings, and need the config that was next to them: given, in the file's metadata, or still next to it.
"""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from latent_codec.components.weight_files import MAX_CONFIG_BYTES, config_in
from latent_codec.conversion.checkpoints import Checkpoint
from latent_codec.conversion.renaming import (
    ConversionError,
    ConversionSettingError,
    Format,
    Network,
    Scale,
    as_tuple,
)

_SAME_LAYOUT = {
    "AutoencoderVQ": ("VQModel",),
    "AutoencoderTiny": ("AutoencoderTinyGN",),
}
"""Classes whose weights look like a format's class's."""
_WHERE_NONE = {
    "vq_embed_dim": "latent_channels",
    "decoder_base_dim": "base_dim",
    "decoder_block_out_channels": "block_out_channels",
}
"""Entries of a config that mean another one where they are None."""


class Settings(NamedTuple):
    """A diffusers config for a checkpoint, or a part of one, and how it is known."""

    config: Mapping
    rule: str


class SettingsNeededError(ConversionSettingError):
    """A checkpoint whose format is known, and whose settings are not."""

    def __init__(self, name: str, title: str, not_shown: str):
        groups = ", or convert it with `norm_num_groups=N`" if "norm_num_groups" in not_shown else ""
        super().__init__(
            "config",
            f"the config.json of {name}, a {title} in its own key layout, which does not show {not_shown}",
            advice=f"put it next to the file, or give it: `config=config.json`{groups}",
        )
        self.name, self.title, self.not_shown = name, title, not_shown

    def __reduce__(self):
        return type(self), (self.name, self.title, self.not_shown)


def read_diffusers_config(path: str | os.PathLike) -> dict | None:
    """The config.json of a diffusers model; None if the file is something else, such as an original code's yaml.

    Raises:
        ConversionError: if it is no file of a config's size.
    """
    return config_in({"config": read_config_file(Path(path)).decode("utf-8", "replace")})


def read_config_file(path: Path, max_bytes: int = MAX_CONFIG_BYTES) -> bytes:
    """Read a config.json or an original code's yaml.

    Raises:
        ConversionError: if it is no file of a config's size.
    """
    if not path.is_file():
        raise ConversionError(f"{path} is not a file; give a config.json, or the original's yaml")
    if path.stat().st_size > max_bytes:
        raise ConversionError(f"{path} has {path.stat().st_size:,} bytes; a config has a few thousand")
    return path.read_bytes()


def given_settings(path: str | os.PathLike) -> Settings:
    """The settings in the config.json that someone names.

    Raises:
        ConversionError: if it is none.
    """
    config = read_diffusers_config(path)
    if config is None:
        raise ConversionError(
            f"{path} is not the config.json of a diffusers model, which names its _class_name"
        )
    return Settings(config, f"the given {Path(path).name}")


def settings_of_files(opened: Sequence[Checkpoint]) -> Settings | None:
    """The config in the metadata of a weight file or of two halves, or else in the config.json next to it.

    Raises:
        ConversionError: if two halves have different ones.
    """
    configs = [config_in(each.metadata) for each in opened]
    if any(config != configs[0] for config in configs):
        names = " and ".join(each.path.name for each in opened)
        raise ConversionError(f"{names} have different configs in their metadata; they are not of one model")
    if configs[0] is not None:
        return Settings(configs[0], "the config in the file's metadata")
    neighbor = opened[0].path.parent / "config.json"
    config = read_diffusers_config(neighbor) if neighbor.is_file() else None
    return config and Settings(config, f"{neighbor.name} next to the file")


def combine(asked: Settings | None, found: Settings | None) -> Settings | None:
    """A found config, which the entries asked for must not contradict; or these entries where none is found.

    Raises:
        ConversionError: if it contradicts them.
    """
    if asked is None or found is None:
        return asked or found
    for key, value in asked.config.items():
        if found.config.get(key, value) != value:
            raise ConversionError(f"{key} is {value} as asked, and {found.config[key]} by {found.rule}")
    return found


def settle(name: str, format: Format, inferred: Mapping, settings: Settings | None) -> tuple[str, dict, str]:
    """Complete an inferred config by given settings.

    Args:
        name: of the file, for messages.
        inferred: what names and shapes show, and what the format's original code fixes.
        settings: None if nothing is given.

    Returns:
        The name of the class, its config, and how the settings are known.

    Raises:
        SettingsNeededError: if the format leaves settings open and none are given.
        ConversionError: if the settings are of another class, or differ from what is inferred.
    """
    if settings is None:
        if format.fixed is None:
            raise SettingsNeededError(name, format.title, format.not_shown)
        settings = Settings({}, format.fixed)
    class_name = settings.config.get("_class_name", format.class_name)
    if class_name not in (format.class_name, *_SAME_LAYOUT.get(format.class_name, ())):
        raise ConversionError(
            f"{name} is a {format.title}, and {settings.rule} is of class {class_name!r}, expected {format.class_name!r}"
        )
    given = {key: value for key, value in settings.config.items() if not key.startswith("_")}
    differing = [
        f"{key} is {given[key]} there and {inferred[key]} here"
        for key in given.keys() & inferred.keys()
        if _comparable(key, given[key], inferred) != _comparable(key, inferred[key], inferred)
    ]
    if differing:
        raise ConversionError(
            f"{settings.rule} does not describe the weights of {name}: {'; '.join(sorted(differing))}"
        )
    config = format.defaults(inferred) | given | dict(inferred)
    if not config.keys() >= set(format.required):
        raise SettingsNeededError(name, format.title, format.not_shown)
    return class_name, config, settings.rule


def scale_of_config(network: Network, settings: Settings | None) -> Scale | None:
    """The scale that a diffusers config says, or leaves at its class's default.

    Args:
        network: its class has the defaults.
        settings: what was given; parts of a config that do not name its class say nothing of the scale.

    Raises:
        ConversionError: for a scale or shift that is no finite number.
    """
    if settings is None or "_class_name" not in settings.config:
        return None
    said = "scaling_factor" in settings.config
    if said:
        values = [network.config["scaling_factor"], network.config.get("shift_factor")]
    else:
        values = [network.default("scaling_factor", None), network.default("shift_factor", None)]
    if values[0] is None:
        return None
    for value in values:
        if value is not None and (type(value) not in (int, float) or not math.isfinite(value)):
            raise ConversionError(
                f"{settings.rule} has the scale or shift {value!r}, expected a finite number"
            )
    rule = settings.rule if said else f"the class's default, since {settings.rule} does not say it"
    return Scale(*values, rule)


def _comparable(key: str, value, inferred: Mapping):
    """A config's value, of which some can be written in two ways, in one of them."""
    if key in _WHERE_NONE and value is None:
        return inferred[_WHERE_NONE[key]]
    if key == "codebook_sizes" and isinstance(value, int):
        return (value,) * len(inferred["strides"])
    if isinstance(value, str) and isinstance(inferred[key], tuple):  # one for all stages
        return (value,) * len(inferred[key])
    return as_tuple(value)
