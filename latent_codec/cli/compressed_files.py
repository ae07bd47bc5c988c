"""Arguments about compressed files that several verbs share."""

import argparse
from pathlib import Path

from latent_codec.bitstream.container import MAGIC, SUFFIX
from latent_codec.files import find_files


def add_entropy_argument(parser: argparse.ArgumentParser) -> None:
    action = parser.add_argument(
        "--entropy",
        type=Path,
        metavar="PATH",
        help="use this entropy model, a file or a folder with entropy.safetensors (default: the codec's folder)",
    )
    action.setting = "entropy_model"


def named_files(arguments: list[str]) -> list[tuple[Path, Path]]:
    """Each compressed file with a name for its outputs: its path below the folder given, without its suffix.

    Raises:
        ValueError: if two files would get one name, or a folder holds none.
        OSError: for a path that does not exist.
    """
    named: dict[Path, Path] = {}
    for root in map(Path, arguments):
        root.stat()  # the system's own words if it is missing
        folder = root if root.is_dir() else root.parent
        files = find_files(root, [SUFFIX]) if root.is_dir() else [root]
        if not files:
            raise ValueError(f"no compressed files ({SUFFIX}) in {root}")
        for path in files:
            name = path.relative_to(folder).with_suffix("")
            if name in named:
                raise ValueError(
                    f"{named[name]} and {path} would both be written as {name}; name them in separate calls"
                )
            named[name] = path
    return [(path, name) for name, path in named.items()]


def is_compressed_file(path: Path) -> bool:
    """Whether a file is a compressed one by its first bytes or its suffix; it may be damaged or missing all the same."""
    if path.suffix.lower() == SUFFIX and not path.is_dir():
        return True
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC
