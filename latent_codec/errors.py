"""Errors about a setting that a caller chose, with their parts as fields."""

import re
from collections.abc import Callable
from typing import Any

_NOT_GIVEN: Any = object()


class SettingError(ValueError):
    """A setting that does not fit, in parts, so that each face of the package names the setting in its own way.

    In Python the message is: tile: expected at least 64, got 3; pass `tile=512`. The command line writes `--tile` for `tile` and
    `--tile 512` for what is between backticks in the advice.

    Args:
        setting: its name in Python: an argument (`tile`), or `section.key` of a training's config.
        expected: what it may be.
        got: what it was; left out where the fault is that nothing was given.
        advice: what to do; settings in it are between backticks, as `name` or `name=value`.
    """

    def __init__(self, setting: str, expected: str, got: Any = _NOT_GIVEN, *, advice: str = ""):
        super().__init__(setting, expected, got, advice)
        self.setting, self.expected, self.got, self.advice = setting, expected, got, advice

    def __str__(self) -> str:
        return self.describe()

    def __reduce__(self):
        given = () if self.got is _NOT_GIVEN else (self.got,)
        return _again, (type(self), self.setting, self.expected, given, self.advice)

    def describe(self, name: Callable[[str, str | None], str] | None = None) -> str:
        """Write the message in one line; `name(setting, value or None)` writes a setting, by default as Python would."""
        head = name(self.setting, None) if name else self.setting
        got = "" if self.got is _NOT_GIVEN else f", got {self.got!r}"
        advice = self.advice
        if name:
            advice = re.sub(r"`([\w.]+)(?:=([^`]*))?`", lambda found: name(found[1], found[2]), advice)
        return f"{head}: expected {self.expected}{got}" + (f"; {advice}" if advice else "")


def _again(kind: type[SettingError], setting: str, expected: str, given: tuple, advice: str) -> SettingError:
    return kind(setting, expected, *given, advice=advice)
