"""Pages of the documentation: their code runs as it stands, with trainings cut to two steps and not calibrated."""

import re
import runpy
import shlex
from glob import glob

from helpers import ROOT
from latent_codec.cli import main
from latent_codec.metrics import lpips_available

DOCS = ROOT / "docs"
PAGES = {path.stem: path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *DOCS.glob("*.md")]}
MAKE_IMAGES = runpy.run_path(str(DOCS / "make_images.py"))
SHORT = ("run.steps=2", "optimizer.batch_size=1", "run.calibration_images=0")


def code_blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of a Markdown page that are in this language."""
    return re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)


def run_page(page: str, name: str) -> None:
    """Run a page's commands and Python blocks, in its order, in the current folder."""
    for block in re.findall(r"```(?:bash|python)\n.*?```", page, re.DOTALL):
        for commands in code_blocks(block, "bash"):
            run_commands(commands)
        for code in code_blocks(block, "python"):
            exec(compile(code, f"{name}.md", "exec"), {})


def run_commands(block: str) -> None:
    """Run a block of commands, a line each, in this process and the current folder; each must succeed."""
    for line in block.strip().splitlines():
        program, *words = shlex.split(line)
        arguments = [each for word in words for each in (sorted(glob(word)) if "*" in word else [word])]
        if program == "python":
            script, *arguments = arguments
            assert not runpy.run_path(script)["main"](arguments), line
            continue
        assert program == "latent-codec"
        if arguments[0] == "train" and "--data" in arguments:
            settings = SHORT if lpips_available() else (*SHORT, "objective.lpips_weight=0")
            arguments += [word for setting in settings for word in ("--set", setting)]
        assert main(arguments) == 0, line
