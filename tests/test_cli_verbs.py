"""How a verb is added, found and named, and how its help reads."""

import argparse
import sys
from pathlib import Path

import pytest

from latent_codec import cli
from latent_codec.cli import GROUPS, VERBS, main, module_name, work
from latent_codec.cli.messages import as_typed, one_line
from latent_codec.errors import SettingError

ARGUMENTS = '''"""Count letters.

Examples:
  latent-codec count-letters word
"""

from latent_codec.errors import SettingError


def add_arguments(parser):
    parser.add_argument("word", metavar="WORD", help="what to count")
    parser.add_argument("--limit", type=int, help="count N letters at most")
    parser.add_argument("--set", action="append", help="override a setting")


def check(args):
    if not args.word.isalpha():
        raise SettingError("word", "letters", args.word, advice="`limit=3` stops before `run.steps=1`")
'''
WORK = '''"""The work."""

import logging


def run(args):
    logging.getLogger("latent_codec.counting").warning("Note: %d letters", len(args.word))
    print(len(args.word[: args.limit]))
'''


@pytest.fixture
def count_letters(tmp_path, monkeypatch):
    """A verb in a folder of its own: a pair of files and a row."""
    for package, name, source in ((cli, "arguments", ARGUMENTS), (work, "work", WORK)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "count_letters.py").write_text(source)
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path / name)])
    monkeypatch.setitem(VERBS, "count-letters", ("inspect", "count letters"))
    yield
    for package in (cli, work):
        sys.modules.pop(f"{package.__name__}.count_letters", None)
        vars(package).pop("count_letters", None)


@pytest.mark.usefixtures("count_letters")
def test_a_verb_is_a_pair_of_files_and_a_row(capsys):
    assert main(["count-letters", "word", "--limit", "3"]) == 0
    assert capsys.readouterr() == ("3\n", "Note: 4 letters\n")
    for argv, ends in (
        (["--help"], ("count-letters      count letters", "where the input was at fault.")),
        (["count-letters", "--help"], ("Count letters.", "latent-codec count-letters word")),
    ):
        with pytest.raises(SystemExit):
            main(argv)
        text = capsys.readouterr().out
        assert ends[0] in text and text.rstrip().endswith(ends[1])


@pytest.mark.usefixtures("count_letters")
def test_a_verb_may_have_two_words(monkeypatch, capsys):
    monkeypatch.setitem(VERBS, "count letters", ("inspect", "count letters"))
    assert main(["count", "letters", "word"]) == 0
    assert capsys.readouterr() == ("4\n", "Note: 4 letters\n")
    assert main(["count", "letters", "12"]) == 2
    assert capsys.readouterr().err.startswith("latent-codec count letters: WORD: expected letters")
    for argv, status, said in (
        (["count", "letters", "--help"], 0, "usage: latent-codec count letters"),
        (["count", "--help"], 0, "  count letters      count letters\n"),
        (["count"], 2, "latent-codec count: the following arguments are required: second; see"),
        (["count", "words"], 2, "latent-codec count: argument second: invalid choice: 'words'"),
    ):
        with pytest.raises(SystemExit) as end:
            main(argv)
        assert end.value.code == status
        assert said in "".join(capsys.readouterr())


@pytest.mark.usefixtures("count_letters")
def test_a_setting_is_named_by_the_flags_of_the_verb(capsys):
    assert main(["count-letters", "12"]) == 2
    assert capsys.readouterr().err == (
        "latent-codec count-letters: WORD: expected letters, got '12'; --limit 3 stops before --set run.steps=1\n"
    )


def test_a_setting_without_a_flag_keeps_its_name_in_python():
    parser = argparse.ArgumentParser()
    parser.add_argument("--tile")
    assert as_typed(parser, "crop", "3") == "crop=3"
    assert as_typed(parser, "run.steps", None) == "run.steps"
    error = SettingError("tile", "an integer", 0, advice="leave `crop` out")
    assert one_line(error, parser) == "--tile: expected an integer, got 0; leave crop out"
    assert one_line(MemoryError(), parser).startswith("out of memory: work in tiles, such as --tile 512")


FOLDER = Path(cli.__file__).parent
IN_PAIRS = [verb for verb in VERBS if (FOLDER / "work" / f"{module_name(verb)}.py").is_file()]


def test_every_verb_is_in_a_group_and_has_its_file():
    for verb, (group, summary) in VERBS.items():
        assert group in GROUPS and summary
        assert (FOLDER / f"{module_name(verb)}.py").is_file()


@pytest.mark.parametrize("argv", [[], *([verb] for verb in IN_PAIRS)])
def test_help_fits_into_79_columns(argv, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit):
        main([*argv, "--help"])
    assert not [line for line in capsys.readouterr().out.splitlines() if len(line) > 79]
