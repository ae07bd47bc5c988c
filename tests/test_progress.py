"""What is shown on stderr while a verb works."""

import gc
import os
import pty
import re
import subprocess
import sys
import time

import pytest
from helpers import ROOT

from latent_codec.cli import progress
from latent_codec.cli.progress import loading_libraries, showing


@pytest.fixture
def at_once(monkeypatch):
    """Every report is due."""
    monkeypatch.setattr(progress, "FIRST_LINE_AFTER", 0.0)
    monkeypatch.setattr(progress, "LINE_EVERY", 0.0)
    monkeypatch.setattr(progress, "_LOOK_EVERY", 1000.0)  # reports alone


def test_libraries_are_loaded_without_the_garbage_collector_which_goes_on_afterwards():
    with pytest.raises(ImportError), loading_libraries():
        assert not gc.isenabled()
        raise ImportError
    assert gc.isenabled()


@pytest.mark.usefixtures("at_once")
def test_a_part_reports_what_is_done(capsys):
    with showing("measuring") as report:
        report(0, 3)
        report(1, 3)
        report(5, 7, "comparing")
        report(7, 7)

    assert _lines(capsys) == [
        "measuring: 0 of 3, # s",
        "measuring: 1 of 3, # s, about # s left",
        "comparing: 5 of 7, # s",  # nothing is known of this phase's speed yet
        "comparing: 7 of 7, # s",
    ]


@pytest.mark.usefixtures("at_once")
def test_a_part_inside_another_is_shown_after_it(capsys):
    for _ in progress.progress(["a.png"], "encoding"):
        with showing("tiles") as report:
            report(2, 4)

    assert _lines(capsys)[-1] == "encoding: 0 of 1, # s; tiles: 2 of 4, # s, about # s left"


def test_what_is_done_soon_says_nothing(capsys, monkeypatch):
    monkeypatch.setattr(progress, "FIRST_LINE_AFTER", 1000.0)
    with showing("loading"):
        pass
    for item in progress.progress(range(3), "encoding"):
        assert item < 3
    with pytest.raises(KeyError), showing("decoding"):
        raise KeyError

    assert capsys.readouterr().err == ""


def test_work_that_reports_nothing_is_seen(capsys, monkeypatch):
    monkeypatch.setattr(progress, "FIRST_LINE_AFTER", 0.0)
    monkeypatch.setattr(progress, "LINE_EVERY", 0.01)
    seen = ""
    with showing("opening default"):
        for _ in range(600):  # a minute at most, on a machine that is busy
            seen += capsys.readouterr().err
            if seen.count("\n") > 1:
                break
            time.sleep(0.1)

    assert re.fullmatch(r"(opening default: \d+ s\n){2,}", seen)


def test_a_terminal_gets_a_bar_and_results_stay_clean():
    script = """
import time
from latent_codec.cli import progress
progress.BAR_AFTER = 0.0
for item in progress.progress(range(3), "encoding"):
    time.sleep(0.3)
    print("result", item)
"""
    terminal, stderr = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "80"}
    done = subprocess.run(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=stderr, cwd=ROOT, env=environment
    )
    os.close(stderr)
    shown = os.read(terminal, 100_000).decode()
    os.close(terminal)

    assert done.returncode == 0
    assert done.stdout == b"result 0\nresult 1\nresult 2\n"
    assert "encoding" in shown and "2/3" in shown and "result" not in shown


def test_a_closed_stderr_does_no_harm():
    script = "import sys; from latent_codec.cli.progress import showing\nwith showing('encoding') as report: report(1, 2)"
    command = f'exec 2>&-; exec {sys.executable} -c "{script}"'
    assert subprocess.run(["bash", "-c", command], cwd=ROOT).returncode == 0


def _lines(capsys) -> list[str]:
    """Of stderr, with # for seconds."""
    return [re.sub(r"\d+ s", "# s", line) for line in capsys.readouterr().err.splitlines()]
