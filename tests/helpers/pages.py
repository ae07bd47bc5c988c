"""Pages of the documentation: their code runs as it stands, with trainings cut to two steps."""

import re
import shlex
from glob import glob

from latent_codec.cli import main
from latent_codec.metrics import lpips_available

SHORT = ("run.steps=2", "optimizer.batch_size=1", "run.calibration_images=2")


def code_blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of a Markdown page that are in this language."""
    return re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)


def run_commands(block: str) -> None:
    """Run a block of commands, a line each, in the current folder; each must succeed."""
    for line in block.strip().splitlines():
        program, *words = shlex.split(line)
        assert program == "latent-codec"
        arguments = [each for word in words for each in (sorted(glob(word)) if "*" in word else [word])]
        if arguments[0] == "train":
            settings = SHORT if lpips_available() else (*SHORT, "objective.lpips_weight=0")
            arguments += [word for setting in settings for word in ("--set", setting)]
        assert main(arguments) == 0, line
