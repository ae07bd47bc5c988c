"""Run the code of the pages of docs/, section by section, and keep the images that they show.

    python docs/make_images.py FOLDER                       all pages: half an hour of one core
    python docs/make_images.py FOLDER ideas pixel anomal    of one page the sections that begin like this

The code runs in FOLDER, as a reader runs it. ideas.md needs `fashion_mnist/` there, and the other pages nothing. What is
printed is where the pages' figures are from. Trainings that FOLDER has already are not repeated, and one that was stopped goes
on. An image `images/NAME` of a page is the file NAME that the section's code wrote there.
"""

import argparse
import os
import re
import shlex
import shutil
from pathlib import Path

from PIL import Image

from latent_codec.cli import main as latent_codec
from latent_codec.images.tensors import enlarged

DOCS = Path(__file__).resolve().parent
IMAGES = DOCS / "images"
PHOTOGRAPH = "lighthouse.png"
"""A crop of Kodak's image 21, which no command makes."""
MIN_HEIGHT = 128
"""Of the images, in pixels."""
FULL_COLOR = ("three.png", "kinds.png")
"""Others have at most 256 colors."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("page", nargs="?", default="*", help="name of the one page (default: all)")
    parser.add_argument(
        "titles", nargs="*", metavar="TITLE", help="how a section's title begins (default: all)"
    )
    args = parser.parse_args()
    (args.folder / "docs/images").mkdir(parents=True, exist_ok=True)
    shutil.copy(IMAGES / PHOTOGRAPH, args.folder / "docs/images" / PHOTOGRAPH)
    shutil.copytree(DOCS.parent / "examples", args.folder / "examples", dirs_exist_ok=True)
    os.chdir(args.folder)
    for page in sorted(DOCS.glob(f"{args.page}.md")):
        for title, section in sections(page.read_text(encoding="utf-8")).items():
            chosen = not args.titles or title.lower().startswith(tuple(each.lower() for each in args.titles))
            if chosen and shown_images(section) and re.search(r"```(bash|python)", section):
                print(f"\n## {page.stem}: {title}", flush=True)
                run(section)
                keep_images(section, IMAGES)
    kept = sum(path.stat().st_size for path in IMAGES.rglob("*.png"))
    print(f"\nimages: {kept / 1e6:.2f} MB")


def sections(page: str) -> dict[str, str]:
    """The sections of a Markdown page by their titles, in its order; what comes before the first one is `Start`."""
    first, *others = re.split(r"^## ", page, flags=re.MULTILINE)
    return {"Start": first} | dict(part.split("\n", 1) for part in others)


def run(section: str) -> None:
    """Run a section's commands and Python blocks, in its order, in the current folder.

    Raises:
        SystemExit: at a command that fails.
    """
    for language, code in re.findall(r"```(bash|python)\n(.*?)```", section, re.DOTALL):
        if language == "python":
            print(f"\n{code}", flush=True)
            exec(compile(code, "docs", "exec"), {})
            continue
        for line in code.splitlines():
            print(f"\n$ {line}", flush=True)
            if status := latent_codec(shlex.split(line)[1:]):
                raise SystemExit(status)


def shown_images(section: str) -> list[str]:
    """The names of a section's images, below `images/`."""
    return re.findall(r"!\[[^\]]*\]\((?:docs/)?images/([^)]+)\)", section)


def keep_images(section: str, images: Path) -> None:
    """Copy the images that a section shows from the current folder to `images`.

    They are PNG files of at most 256 colors, but for those of `FULL_COLOR`; low ones are enlarged by a whole factor.
    """
    for name in shown_images(section):
        (images / name).parent.mkdir(parents=True, exist_ok=True)
        with Image.open(name) as image:
            shown = enlarged(image.convert("RGB"), -(-MIN_HEIGHT // image.height))
        kept = shown if name in FULL_COLOR else shown.quantize(256, dither=Image.Dither.NONE)
        kept.save(images / name, optimize=True)
        print(f"{name}: {shown.width}x{shown.height} px, {(images / name).stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
