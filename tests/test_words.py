"""Words that the glossary has replaced stay replaced, in code, help, messages and pages."""

import re
import subprocess

from helpers import ROOT

REPLACED = ("pictures?", "Pictures?[A-Z]?", "whole numbers?", "WholeNumber", "draw_chances")
WHERE_OLD_NAMES_LIVE = {
    "latent_codec/deprecated.py",
    "tests/test_deprecated.py",
    "tests/test_words.py",
    "CHANGELOG.md",
}
OLD_FLAG = "add_old_flag(parser, "


def test_replaced_words_are_gone():
    files = subprocess.run(
        ["git", "ls-files", "*.py", "*.md", "*.toml"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert len(files) > 200
    words = re.compile(rf"(?<![a-z])({'|'.join(REPLACED)})(?![a-z])")
    found = [
        f"{name}:{number}: {line.strip()}"
        for name in files
        if name not in WHERE_OLD_NAMES_LIVE
        for number, line in enumerate((ROOT / name).read_text(encoding="utf-8").splitlines(), 1)
        if words.search(line) and OLD_FLAG not in line
    ]
    assert found == []
