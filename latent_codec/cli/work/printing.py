"""Results on stdout: JSON, tables, sizes."""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from latent_codec.files import plain, replacing


def print_json(found) -> None:
    """Print a result for machines; infinite and undefined numbers, which JSON lacks, are null."""
    print(json.dumps(plain(found), allow_nan=False))


def write_json(found, path: Path) -> None:
    """Write what `print_json` prints to a file, indented, complete or not at all."""
    with replacing(path) as written:
        written.write_text(json.dumps(plain(found), indent=1, allow_nan=False) + "\n")


def finish_report(
    args: argparse.Namespace,
    found: dict,
    files: Iterable[Path],
    skipped: Iterable[str],
    show: Callable[[], None],
) -> None:
    """Say what was skipped, and print a result with the files that hold it: by `show`, or as JSON."""
    names = [*map(str, files)]
    for reason in skipped:
        print(f"skipped {reason}", file=sys.stderr)
    if args.json:
        print_json(found | {"files": names})
    else:
        show()
        print(f"Written: {', '.join(names)}")


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], *, justify: str = "lr") -> None:
    """Print a table.

    Args:
        headings: of the columns; all empty for none.
        rows: cells as text; an empty row draws a line between sections.
        justify: l or r for each column, left or right; the last one for all that follow.
    """
    found = Table(box=box.SIMPLE, show_header=any(headings))
    for heading, side in zip(headings, justify.ljust(len(headings), justify[-1])):
        found.add_column(heading, justify="left" if side == "l" else "right", overflow="fold")
    for row in rows:
        if row:
            found.add_row(*row)
        else:
            found.add_section()
    Console(highlight=False, markup=False).print(found)


def by(shape: Iterable[int]) -> str:
    """[480, 640] -> "480x640"."""
    return "x".join(map(str, shape))


def for_people(value) -> str:
    """A value of a report as text: -, 1,024, 1x2 + 3x4, or a line for each entry."""
    if value is None or value == []:
        return "-"
    if isinstance(value, dict):
        return "".join(f"\n  {_spaced(key)}  {for_people(each)}" for key, each in value.items())
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "".join(f"\n  {_image(each) if 'size' in each else _pairs(each)}" for each in value)
    if isinstance(value, list) and value and isinstance(value[0], list):
        return " + ".join(map(by, value))
    if isinstance(value, list):
        return ", ".join(f"{each:.4g}" if isinstance(each, float) else str(each) for each in value)
    return f"{value:,}" if type(value) is int else str(value)


def _image(facts: dict) -> str:
    shapes = " + ".join(map(by, facts.get("grids") or [facts["shape"]]))
    label = f", label {facts['label']}" if "label" in facts else ""
    return f"{facts['name']}: {by(facts['size'])} -> {shapes}{label}"


def _pairs(facts: dict) -> str:
    return ", ".join(f"{_spaced(key)} {for_people(value)}" for key, value in facts.items())


def _spaced(key: str) -> str:
    """A name's underscores as spaces; what is no name stays."""
    return key.replace("_", " ") if key.isidentifier() else key
