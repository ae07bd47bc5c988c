"""Words that the glossary has replaced, and British spellings, stay out of code, help, messages and pages."""

import re
import subprocess

from helpers import ROOT

REPLACED = (
    "chances?",
    "likeliest",
    "how likely",
    "whole numbers?",
    r"WholeNumber\w*",
    "surroundings",
    "strangers?",
    "beside",
    "came;",
    "does not suffice",
    "mind:",
    r"draw_chances",
    "pictures?",
)
STEMS = (
    "quant|normal|initial|optim|serial|vector|regular|discret|general|real|organ|recogn|minim|maxim|emphas|summar"
    "|character|synchron|standard|special|random|util|factor|binar|token|penal|memor|custom|equal|parametr|linear"
)
BRITISH = (
    r"colour\w*",
    r"grey\w*",
    r"neighbour\w*",
    "centre[sd]?",
    r"behaviour\w*",
    "learnt",
    "modell(?:ed|ing)",
    f"(?:de|re|un)?(?:{STEMS})is(?:e|es|ed|er|ers|ing|ation|ations|able)",
)
OLD = re.compile(rf"(?<![a-z])(?:{'|'.join(REPLACED + BRITISH)})(?![a-z])", re.IGNORECASE)
WHERE_OLD_NAMES_LIVE = {
    "latent_codec/deprecated.py",
    "tests/test_deprecated.py",
    "tests/test_words.py",
    "CHANGELOG.md",
}
OLD_FLAG = "add_old_flag(parser, "


def test_replaced_words_are_gone():
    files = subprocess.run(
        ["git", "ls-files", "*.py", "*.md", "*.toml", ".ci/run"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert len(files) > 200
    found = [
        f"{name}:{number}: {line.strip()}"
        for name in files
        if name not in WHERE_OLD_NAMES_LIVE
        for number, line in enumerate((ROOT / name).read_text(encoding="utf-8").splitlines(), 1)
        if OLD.search(line) and OLD_FLAG not in line
    ]
    assert found == []
