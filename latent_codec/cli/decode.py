"""Turn latent files back into images, cropped to their first size.

  latent-codec decode latents/cat.safetensors       writes decoded/cat.png
  latent-codec decode latents/ --out images           every latent file in it; subfolders are kept

  latent-codec decode cache/cat.npz --codec mine        latents of another program: an array (.npy, .npz) or tensor (.pt)

Latents of another latent space than the codec's are refused. A codec whose decoder alone differs
(a fine-tuned one) decodes them, and it is said on stderr. Plain arrays and tensors say nothing of their codec: --codec has to
name it, and it cannot be checked. They are (C, h, w) or (N, C, h, w), scaled and shifted as a denoiser takes them; of several
arrays in a file, those with "latent" in their names.
"""

import argparse
import sys
from pathlib import Path, PurePosixPath

from latent_codec.cli.arguments import add_codec_arguments, add_tile_argument, load_codec
from latent_codec.cli.compressed_files import is_compressed_file
from latent_codec.cli.progress import with_progress
from latent_codec.files import check_is_file, find_files

SUFFIXES = (".safetensors", ".npy", ".npz", ".pt", ".pth")
"""What folders are searched for."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "files", nargs="+", metavar="FILE", help="latent files, .npy, .npz or .pt files, or folders of them"
    )
    parser.add_argument(
        "--out", default="decoded", metavar="DIR", help="where to write PNGs (default: decoded)"
    )
    add_codec_arguments(parser, None, "the one called default; plain arrays and tensors need it")
    add_tile_argument(parser)


def run(args: argparse.Namespace) -> None:
    files = _find_files(args.files)
    for file, _ in files:
        if is_compressed_file(file):
            raise ValueError(f"{file} is a compressed file: `latent-codec decompress` opens it")
    names_codec, args.codec = args.codec is not None, args.codec or "default"

    from latent_codec.images.tensors import write_image
    from latent_codec.latents.latent_files import load_latents
    from latent_codec.latents.plain_latents import read_plain_latents

    plain = {file: found for file, _ in files if (found := read_plain_latents(file)) is not None}
    if plain and not names_codec:
        file, found = next(iter(plain.items()))
        raise ValueError(
            f"{file} is {found}, and no latent file, which says whose latents they are; name it by --codec"
        )
    codec = load_codec(args)
    taken: set[Path] = set()
    for file, folder in with_progress(files, "decoding"):
        if file in plain:
            batches = plain[file].latents(codec.latent_space.channels)
            print(
                f"latent-codec decode: Note: {file} is {plain[file]}; whether its latents are of {codec.name} "
                "cannot be checked",
                file=sys.stderr,
            )
            for latents in batches:
                (image,) = codec.decode(latents, output_type="pt", tile=args.tile)
                path = Path(args.out) / _free_path(folder, file.name, taken)
                write_image(image.cpu(), path)
                print(path)
            continue
        found = load_latents(file)
        if warning := found.check(codec):
            print(f"latent-codec decode: {warning}", file=sys.stderr)
        for index, (name, size) in enumerate(zip(found.names, found.sizes)):
            if found.latents is not None:
                (image,) = codec.decode(found.latents[index], size=size, output_type="pt", tile=args.tile)
            else:
                (image,) = codec.decode_indices(found.indices[index], size=size, output_type="pt")
            path = Path(args.out) / _free_path(folder, name, taken)
            write_image(image.cpu(), path)
            print(path)


def _find_files(arguments: list[str]) -> list[tuple[Path, Path]]:
    """Each file with the folder, below `--out`, for its images: the one that it has in a folder given.

    Raises:
        ValueError: if a folder holds none.
    """
    found = []
    for root in map(Path, arguments):
        if not root.is_dir():
            check_is_file(root)
            found.append((root, Path()))
            continue
        files = find_files(root, SUFFIXES)
        if not files:
            raise ValueError(
                f"no latent files ({', '.join(SUFFIXES)}) in {root}; `latent-codec encode` writes them"
            )
        found += [(file, file.parent.relative_to(root)) for file in files]
    return found


def _free_path(folder: Path, name: str, taken: set[Path]) -> Path:
    """A file for an image: under its own name, numbered if taken; folders in the name, which a stranger may have put there, go."""
    stem = PurePosixPath(name.replace("\\", "/").replace("\0", "")).stem or "image"
    free, number = folder / f"{stem}.png", 1
    while free in taken:
        number += 1
        free = folder / f"{stem}-{number}.png"
    taken.add(free)
    return free
