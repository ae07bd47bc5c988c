"""Run the code of docs/ideas.md, section by section, and keep the images that the page shows.

    python docs/make_images.py FOLDER                the whole page: half an hour of one core
    python docs/make_images.py FOLDER pixel anomal   the sections whose titles begin like this

The code runs in FOLDER, which has `fashion_mnist/`, as the page's reader has it. What it prints is where the page's figures
are from. Trainings that FOLDER has already are not repeated, and one that was stopped goes on. An image `images/NAME` of the
page is the file NAME that the section's code wrote there.
"""

import argparse
import os
import re
import shlex
from pathlib import Path

from PIL import Image

from latent_codec.cli import main as latent_codec
from latent_codec.images.tensors import enlarged

PAGE = Path(__file__).resolve().parent / "ideas.md"
MIN_HEIGHT = 128
"""Of the images, in pixels."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "titles", nargs="*", metavar="TITLE", help="how a section's title begins (default: all)"
    )
    args = parser.parse_args()
    os.chdir(args.folder)
    for title, section in sections(PAGE.read_text(encoding="utf-8")).items():
        if not args.titles or title.lower().startswith(tuple(each.lower() for each in args.titles)):
            print(f"\n## {title}", flush=True)
            run(section)
            keep_images(section, PAGE.parent / "images")
    kept = sum(path.stat().st_size for path in (PAGE.parent / "images").rglob("*.png"))
    print(f"\nimages: {kept / 1e6:.2f} MB")


def sections(page: str) -> dict[str, str]:
    """The sections of a Markdown page by their titles, in its order."""
    return dict(part.split("\n", 1) for part in re.split(r"^## ", page, flags=re.MULTILINE)[1:])


def run(section: str) -> None:
    """Run a section's commands and Python blocks, in its order, in the current folder.

    Raises:
        SystemExit: at a command that fails.
    """
    for language, code in re.findall(r"```(bash|python)\n(.*?)```", section, re.DOTALL):
        if language == "python":
            print(f"\n{code}", flush=True)
            exec(compile(code, str(PAGE), "exec"), {})
            continue
        for line in code.splitlines():
            print(f"\n$ {line}", flush=True)
            if status := latent_codec(shlex.split(line)[1:]):
                raise SystemExit(status)


def shown_images(section: str) -> list[str]:
    """The names of a section's images, below `images/`."""
    return re.findall(r"!\[[^\]]*\]\(images/([^)]+)\)", section)


def keep_images(section: str, images: Path) -> None:
    """Copy the images that a section shows from the current folder to `images`.

    They are PNG files of at most 256 colors; low ones are enlarged by a whole factor.
    """
    for name in shown_images(section):
        (images / name).parent.mkdir(parents=True, exist_ok=True)
        with Image.open(name) as image:
            shown = enlarged(image.convert("RGB"), -(-MIN_HEIGHT // image.height))
        shown.quantize(256, dither=Image.Dither.NONE).save(images / name, optimize=True)
        print(f"{name}: {shown.width}x{shown.height} px, {(images / name).stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
