"""Turn latent files back into pictures, cropped to their first size.

  latent-codec decode latents/cat.safetensors       writes decoded/cat.png
  latent-codec decode latents/ --out pictures           every latent file in it; subfolders are kept

Latents of another latent space than the codec's are refused. A codec whose decoder alone differs
(a fine-tuned one) decodes them, and it is said on stderr.
"""

import argparse
import sys
from pathlib import Path, PurePosixPath

from latent_codec.cli.arguments import add_codec_arguments, add_tile_argument, load_codec
from latent_codec.cli.compressed_files import is_compressed_file
from latent_codec.cli.progress import with_progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", metavar="FILE", help="latent files, or folders of them")
    parser.add_argument(
        "--out", default="decoded", metavar="DIR", help="where to write PNGs (default: decoded)"
    )
    add_codec_arguments(parser)
    add_tile_argument(parser)


def run(args: argparse.Namespace) -> None:
    from latent_codec.latent_files import load_latents
    from latent_codec.pictures import write_picture

    files = _find_files(args.files)
    for file, _ in files:
        if is_compressed_file(file):
            raise ValueError(f"{file} is a compressed file: `latent-codec decompress` opens it")
    codec = load_codec(args)
    taken: set[Path] = set()
    for file, folder in with_progress(files, "decoding"):
        found = load_latents(file)
        if warning := found.check(codec):
            print(f"latent-codec decode: {warning}", file=sys.stderr)
        for index, (name, size) in enumerate(zip(found.names, found.sizes)):
            if found.latents is not None:
                (image,) = codec.decode(found.latents[index], size=size, output_type="pt", tile=args.tile)
            else:
                (image,) = codec.decode_indices(found.indices[index], size=size, output_type="pt")
            path = Path(args.out) / _free_path(folder, name, taken)
            write_picture(image.cpu(), path)
            print(path)


def _find_files(arguments: list[str]) -> list[tuple[Path, Path]]:
    """Each latent file with the folder, below `--out`, for its pictures: the one that it has in a folder given.

    Raises:
        ValueError: if a folder holds none.
    """
    from latent_codec.encoded_pictures import find_latent_files

    return [
        (file, file.parent.relative_to(root) if root.is_dir() else Path())
        for root in map(Path, arguments)
        for file in find_latent_files([root])
    ]


def _free_path(folder: Path, name: str, taken: set[Path]) -> Path:
    """A file for a picture: under its own name, numbered if taken; folders in the name, which a stranger may have put there, go."""
    stem = PurePosixPath(name.replace("\\", "/").replace("\0", "")).stem or "picture"
    free, number = folder / f"{stem}.png", 1
    while free in taken:
        number += 1
        free = folder / f"{stem}-{number}.png"
    taken.add(free)
    return free
