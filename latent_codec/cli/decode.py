"""Turn latent files back into pictures, cropped to their first size.

  latent-codec decode latents/cat.safetensors       writes decoded/cat.png
  latent-codec decode latents/*.safetensors --out pictures

Latents of another latent space than the codec's are refused. A codec whose decoder alone differs
(a fine-tuned one) decodes them, and it is said on stderr.
"""

import argparse
import sys
from pathlib import Path, PurePosixPath

from latent_codec.cli.arguments import add_codec_arguments, add_tile_argument, load_codec, with_progress
from latent_codec.cli.compressed_files import is_compressed_file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", metavar="FILE", help="latent files")
    parser.add_argument(
        "--out", default="decoded", metavar="DIR", help="where to write PNGs (default: decoded)"
    )
    add_codec_arguments(parser)
    add_tile_argument(parser)


def run(args: argparse.Namespace) -> None:
    from latent_codec.latent_files import load_latents
    from latent_codec.pictures import write_picture

    for file in args.files:
        if is_compressed_file(Path(file)):
            raise ValueError(f"{file} is a compressed file: `latent-codec decompress` opens it")
    codec = load_codec(args)
    taken: set[str] = set()
    for file in with_progress(args.files, "decode"):
        found = load_latents(file)
        if warning := found.check(codec):
            print(f"latent-codec decode: {warning}", file=sys.stderr)
        for index, (name, size) in enumerate(zip(found.names, found.sizes)):
            if found.latents is not None:
                (image,) = codec.decode(found.latents[index], size=size, output_type="pt", tile=args.tile)
            else:
                (image,) = codec.decode_indices(found.indices[index], size=size, output_type="pt")
            path = Path(args.out) / f"{_free_stem(name, taken)}.png"
            write_picture(image.cpu(), path)
            print(path)


def _free_stem(name: str, taken: set[str]) -> str:
    """A file name for a picture: its own, numbered if taken; folders in it, which a stranger may have put there, go."""
    stem = PurePosixPath(name.replace("\\", "/").replace("\0", "")).stem or "picture"
    free, number = stem, 1
    while free in taken:
        number += 1
        free = f"{stem}-{number}"
    taken.add(free)
    return free
