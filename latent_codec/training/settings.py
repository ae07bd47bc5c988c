"""Sections of a configuration: dataclasses whose fields hold their ranges, checked in one place when built; and TOML."""

import difflib
import json
import math
import operator
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from latent_codec.errors import SettingError

_KINDS_OF_VALUES = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "a string",
    dict: "a table",
    list: "a list",
}


_HOLDS = {"least": operator.ge, "above": operator.gt, "most": operator.le, "below": operator.lt}


def limited(default: Any, **limits: float) -> Any:
    """A setting with a range: of a tuple, that of each value; None is always in it.

    Args:
        limits: `least` or `above`, and `most` or `below`.
    """
    return field(default=default, metadata={"limits": limits})


def in_steps(default: int, least: int = 0) -> Any:
    """A number of steps; or, below 1 and with a decimal point, a share of `run.steps`, which `resolve` makes a number of."""
    return field(default=default, metadata={"limits": {"least": least}, "in_steps": True})


@dataclass(frozen=True, kw_only=True)
class Section:
    """A table of settings; `DataConfig` is [data]. Built with a value of another type or out of its range it raises SettingError.

    Integers pass as floats, lists as tuples.
    """

    def __post_init__(self):
        for each in fields(self):
            name = f"{self.table_name()}.{each.name}"
            value = _typed(getattr(self, each.name), each.type, name)
            object.__setattr__(self, each.name, value)  # frozen from now on
            limits = each.metadata.get("limits", {})
            numbers = value if isinstance(value, tuple) else () if value is None else (value,)
            if each.metadata.get("in_steps") and isinstance(value, float):
                if not 0 <= value < 1:
                    expected = f"an integer number of steps, {_described(**limits)}, or a share of run.steps below 1, such as 0.1"
                    raise SettingError(name, expected, value)
            elif not all(
                _HOLDS[limit](number, bound) for number in numbers for limit, bound in limits.items()
            ):
                raise SettingError(name, _described(**limits), value)

    @classmethod
    def table_name(cls) -> str:
        return cls.__name__.removesuffix("Config").lower()

    @classmethod
    def from_table(cls, table: Any) -> "Section":
        """Build from a TOML table, naming the near match of an unknown key."""
        if not isinstance(table, dict):
            raise SettingError(cls.table_name(), f"a table [{cls.table_name()}]", table)
        check_keys(table, [each.name for each in fields(cls)], f"key in [{cls.table_name()}]:")
        return cls(**table)

    def error(self, key: str, expected: str, *, advice: str = "") -> SettingError:
        """The error of a setting that does not fit."""
        return SettingError(f"{self.table_name()}.{key}", expected, getattr(self, key), advice=advice)

    def changed(self) -> list[str]:
        """Names of the settings that are not their defaults."""
        default = type(self)()
        return [each.name for each in fields(self) if getattr(self, each.name) != getattr(default, each.name)]


def _described(least=None, above=None, most=None, below=None) -> str:
    if most is None and below is None:
        return f"above {above}" if least is None else f"at least {least}"
    return f"from {least} to {most}" if below is None else f"from {least} to below {below}"


def check_keys(table: Iterable[str], allowed: Iterable[str], what: str) -> None:
    """Refuse a key that is not allowed, naming the near match."""
    for key in table:
        if key not in allowed:
            raise ValueError(
                f"unknown {what} {key!r}{near_match(key, allowed)}. Allowed: {', '.join(allowed)}."
            )


def near_match(word: str, words: Iterable[str]) -> str:
    """ " (did you mean 'steps'?)", or nothing, to put behind an unknown word in a message."""
    matches = difflib.get_close_matches(word, list(words), n=1)
    return f" (did you mean {matches[0]!r}?)" if matches else ""


def _typed(value: Any, kind: Any, name: str) -> Any:
    """`value` as a field's annotation wants it."""
    origin, options = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        if value not in options:
            raise SettingError(name, f"one of {', '.join(map(repr, options))}", value)
        return value
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in options:
            return None
        options = [option for option in options if option is not type(None)]
        return _typed(value, type(value) if type(value) in options else options[0], name)
    if origin is tuple and options[-1] is Ellipsis:
        if not isinstance(value, (list, tuple)) or not value:
            raise SettingError(name, "a list of one or more", value)
        return tuple(_typed(item, options[0], name) for item in value)
    if origin is tuple:
        if not isinstance(value, (list, tuple)) or len(value) != len(options):
            raise SettingError(name, f"a list of {len(options)}", value)
        return tuple(_typed(item, option, name) for item, option in zip(value, options))
    kind = origin or kind
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise SettingError(name, _KINDS_OF_VALUES[kind], value)
    if kind is float and not math.isfinite(value):
        raise SettingError(name, "a finite number", value)
    return value


def dump_toml(table: dict[str, Any]) -> str:
    """Write nested tables as TOML (tomllib only reads)."""
    lines = []
    for section, values in table.items():
        lines.append(f"[{section}]")
        nested = {key: value for key, value in values.items() if isinstance(value, dict)}
        lines += [f"{key} = {_toml_value(value)}" for key, value in values.items() if key not in nested]
        for key, inner in nested.items():
            lines += ["", f"[{section}.{key}]"]
            lines += [f"{name} = {_toml_value(value)}" for name, value in inner.items() if value is not None]
        lines.append("")
    return "\n".join(lines)


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)  # whose escapes TOML shares
    return repr(value)
