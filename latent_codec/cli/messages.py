"""Errors and notes as the command line says them: one line on stderr, with its own flags for the library's settings."""

import argparse
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from latent_codec.errors import SettingError


def is_foreseen(error: Exception) -> bool:
    """Whether input, files or memory are at fault, and not this program, which shows a traceback."""
    if isinstance(error, (ValueError, OSError, MemoryError)):
        return True
    # Asked by name, so that safetensors need not be imported for it.
    return _is_out_of_memory(error) or type(error).__name__ == "SafetensorError"


def one_line(error: Exception, parser: argparse.ArgumentParser) -> str:
    """The error's message for who typed a command, without line breaks."""
    text = " ".join(_text(error, parser).split())
    if _is_out_of_memory(error) and _option(parser, "tile"):
        return f"out of memory: work in tiles, such as --tile 512 ({text or 'no more is known'})"
    return text or type(error).__name__


def _text(error: Exception, parser: argparse.ArgumentParser) -> str:
    if isinstance(error, SettingError):
        return error.describe(lambda setting, value: as_typed(parser, setting, value))
    if not (isinstance(error, OSError) and error.strerror):
        return str(error)
    if not isinstance(error.filename, str):
        return error.strerror
    path = Path(error.filename)
    if isinstance(error, (FileExistsError, NotADirectoryError)):
        for each in (path, *path.parents):
            if each.is_file():
                return f"{each} is a file, where a folder is needed; name another"
    return f"{path}: {error.strerror}"


def as_typed(parser: argparse.ArgumentParser, setting: str, value: str | None) -> str:
    """A setting of the library as it is typed for this verb: `tile` -> --tile, `run.steps` -> --set run.steps=...; else as in Python."""
    option = _option(parser, setting)
    if option is not None:
        return option if value is None else f"{option} {value}"
    written = setting if value is None else f"{setting}={value}"
    return f"--set {written}" if "." in setting and _option(parser, "set") else written


def _option(parser: argparse.ArgumentParser, setting: str) -> str | None:
    """The flag, or the positional argument's name, that sets `setting`: its `dest`, or the action's `setting` where that differs."""
    for action in parser._actions:
        if getattr(action, "setting", action.dest) == setting and action.help != argparse.SUPPRESS:
            return action.option_strings[-1] if action.option_strings else action.metavar
    return None


def _is_out_of_memory(error: Exception) -> bool:
    """Asked by name, so that torch need not be imported for it."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or "DefaultCPUAllocator" in str(error)


class _Lines(logging.Handler):
    """Shows what the library reports as lines on stderr, above the progress bar where there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr)


@contextmanager
def shown(verb: str) -> Iterator[None]:
    """Show the library's log on stderr, and each warning as one line without its place in the code, which users of a verb cannot change."""

    def in_words(message, category, filename, lineno, line=None) -> str:
        if issubclass(category, UserWarning):
            return f"latent-codec {verb}: Note: {' '.join(str(message).split())}\n"
        return before(message, category, filename, lineno, line)

    before, warnings.formatwarning = warnings.formatwarning, in_words
    logger, lines = logging.getLogger("latent_codec"), _Lines()
    level = logger.level
    logger.addHandler(lines)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        warnings.formatwarning = before
        logger.removeHandler(lines)
        logger.setLevel(level)
