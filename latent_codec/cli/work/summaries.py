"""The tables that a verb prints, as Markdown for a page and as LaTeX for a paper."""

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from latent_codec.cli.work.printing import finish_report, table
from latent_codec.files import replacing

SUMMARIES = ("summary.md", "summary.tex")
_LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
        **{each: f"\\{each}" for each in "&%$#_{}"},
    }
)


@dataclass(frozen=True, kw_only=True)
class Table:
    """What is printed as a table: `title` above it, `note` below."""

    title: str
    headings: Sequence[str]
    """All empty for none."""
    rows: Sequence[Sequence[str]]
    """Cells as text; an empty row separates."""
    justify: str = "lr"
    """As in `printing.table`."""
    note: str = ""

    def print(self) -> None:
        if self.title:
            print(self.title)
        table(self.headings, self.rows, justify=self.justify)
        if self.note:
            print(self.note)

    def sides(self) -> str:
        """l or r for each column."""
        return self.justify.ljust(len(self.headings), self.justify[-1])[: len(self.headings)]


def finish_tables(
    args: argparse.Namespace,
    found: dict,
    files: Iterable[Path],
    skipped: Iterable[str],
    tables: Sequence[Table],
) -> None:
    """Write the tables, and print them with the files, or the result as JSON."""

    def show() -> None:
        for each in tables:
            each.print()

    finish_report(args, found, [*files, *write_summaries(tables, args.out)], skipped, show)


def write_summaries(tables: Iterable[Table], folder: Path) -> list[Path]:
    """Write the tables to summary.md and summary.tex (which needs no LaTeX package) in `folder`."""
    tables, paths = list(tables), [folder / name for name in SUMMARIES]
    for path, form in zip(paths, (_markdown, _latex)):
        with replacing(path) as written:
            written.write_text("\n".join(map(form, tables)), encoding="utf-8")
    return paths


def _markdown(each: Table) -> str:
    def line(cells: Iterable[str]) -> str:
        return f"| {' | '.join(cell.replace('|', chr(92) + '|').replace(chr(10), ' ') for cell in cells)} |\n"

    rule = "".join("|---" if side == "l" else "|--:" for side in each.sides()) + "|\n"
    parts = [
        each.title.replace("\n", " "),
        line(each.headings) + rule + "".join(map(line, filter(None, each.rows))),
    ]
    return "\n\n".join(part.rstrip("\n") for part in [*parts, each.note.replace("\n", " ")] if part) + "\n"


def _latex(each: Table) -> str:
    def line(cells: Iterable[str]) -> str:
        return " & ".join(cell.replace("\n", " ").translate(_LATEX) for cell in cells) + r" \\" + "\n"

    head = line(each.headings) + "\\hline\n" if any(each.headings) else ""
    rows = "".join(line(row) if row else "\\hline\n" for row in each.rows).removesuffix("\\hline\n")
    caption = " ".join(part for part in (each.title, each.note) if part).replace("\n", " ")
    return (
        "\\begin{table}\n\\centering\n"
        f"\\caption{{{caption.translate(_LATEX)}}}\n"
        f"\\begin{{tabular}}{{{each.sides()}}}\n\\hline\n{head}{rows}\\hline\n\\end{{tabular}}\n\\end{{table}}\n"
    )
