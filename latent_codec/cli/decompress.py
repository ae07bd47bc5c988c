"""Turn compressed files back into images, or into latent files.

  latent-codec decompress compressed/cat.lcf                        writes decompressed/cat.png
  latent-codec decompress compressed/ --out images                every .lcf in it; subfolders are kept
  latent-codec decompress compressed/cat.lcf --format webp          without loss, like png and tif
  latent-codec decompress compressed/cat.lcf --latents              writes decompressed/cat.safetensors
  latent-codec decompress map.lcf --region 2048,1024,512,768        rows from 2048, columns from 1024: 512 high, 768 wide

It takes the codec and the entropy model that compressed the file, and refuses others by their fingerprints; a codec with
another decoder alone (a fine-tuned one) will do. `latent-codec info FILE` says whose a file is.

An image of more than 4 million pixels is decoded in tiles of 1024 pixels a side, one by one, so that it needs the memory of a tile
and 7 bytes for each pixel. They overlap and fade into each other; a codec with attention or group norm paints them slightly
differently than all at once. --tile chooses another side, and 0 decodes the image at once.

--latents stops before the decoder: latents, or grids of indices, exact to the bit on every machine, in the format that
`latent-codec encode` writes, for `latent-codec decode`, denoisers and priors. --region decodes the tiles that it touches
alone, which a codec with attention or group norm paints slightly differently than in the whole image.

A file that is cut short or damaged is refused. With --partial what is whole of it is decoded, and what is missing is named on
stderr: lost tiles come out gray, and lost layers as the entropy model expects them. A file that cannot be
decoded is named on stderr, the others are written, and the exit status is 2.
"""

import argparse
from pathlib import Path

from latent_codec.cli.arguments import add_codec_arguments, load_codec
from latent_codec.cli.compressed_files import (
    add_entropy_argument,
    first_sentence,
    named_files,
    shipped_name,
    what_is_whole,
)
from latent_codec.cli.progress import progress, showing


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "files", nargs="+", metavar="FILE", help="compressed files (.lcf), or folders of them"
    )
    parser.add_argument(
        "--out", default="decompressed", metavar="DIR", help="where to write (default: decompressed)"
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--latents", action="store_true", help="write latent files; no pixel is decoded")
    what.add_argument(
        "--region",
        type=_region,
        metavar="TOP,LEFT,HEIGHT,WIDTH",
        help="this part of the image alone, in pixels",
    )
    parser.add_argument("--partial", action="store_true", help="decode what is whole of a damaged file")
    parser.add_argument(
        "--format", choices=("png", "webp", "tif", "avif", "jpg"), help="of images (default: png)"
    )
    parser.add_argument(
        "--tile",
        type=int,
        metavar="PIXELS",
        help="side of the tiles to decode one by one; 0: never tile (default: 1024 above 4 million pixels)",
    )
    add_entropy_argument(parser)
    add_codec_arguments(parser)


def run(args: argparse.Namespace) -> int:
    import sys

    if args.latents and args.format:
        raise ValueError(f"--format {args.format} is of images, and --latents writes none: leave one out")
    if args.latents and args.tile is not None:
        raise ValueError("--tile is for decoding pixels, and --latents decodes none: leave one out")
    if args.tile is not None and args.tile < 0:
        raise ValueError(f"expected --tile of at least 0, got {args.tile}")
    files = named_files(args.files)

    from latent_codec.bitstream import load_entropy_model
    from latent_codec.bitstream.compression import sidecar
    from latent_codec.bitstream.container import read_file

    codec = load_codec(args)
    model = sidecar(codec) if args.entropy is None else load_entropy_model(args.entropy)
    failed = False
    for path, name in progress(files, "decompressing"):
        data = b""
        try:
            data = read_file(path)
            out = _decompress(codec, model, data, path, name, args)
        except ValueError as error:
            failed = True
            print(f"latent-codec decompress: {path}: {_message(error, path, data)}", file=sys.stderr)
            continue
        print(out)
    return 2 if failed else 0


def _decompress(codec, model, data: bytes, path: Path, name: Path, args: argparse.Namespace) -> Path:
    """Decode a file and write what was asked for, whose path is returned."""
    import sys
    import warnings

    from latent_codec.bitstream import PartialWarning, decompress, unpack
    from latent_codec.bitstream.compression import tile_for
    from latent_codec.images.tensors import write_image
    from latent_codec.latents.latent_files import save_indices, save_latents

    header = unpack(data, partial=True).header
    with warnings.catch_warnings(record=True) as warned, showing(f"decoding {path.name}") as report:
        warnings.simplefilter("always", PartialWarning)
        found = decompress(
            codec,
            data,
            entropy_model=model,
            region=args.region,
            latents=args.latents,
            partial=args.partial,
            tile=tile_for(header) if args.tile is None else args.tile or None,
            on_progress=report,
        )
    for warning in warned:
        print(f"latent-codec decompress: {path}: {warning.message}", file=sys.stderr)
    suffix = "safetensors" if args.latents else args.format or "png"
    out = Path(args.out) / name.with_name(f"{name.name}.{suffix}")
    if args.latents:
        save = save_indices if header.is_indices else save_latents
        save(out, found, codec=codec, names=[path.name], sizes=[(header.height, header.width)])
    else:
        write_image(found, out)
    return out


def _message(error: ValueError, path: Path, data: bytes) -> str:
    """What is wrong, and what to do about it on the command line."""
    from latent_codec.bitstream import (
        CorruptError,
        NotCompressedError,
        TruncatedError,
        WrongCodecError,
        WrongEntropyModelError,
        unpack,
    )
    from latent_codec.latents.latent_files import is_latent_file

    what = first_sentence(error)
    if isinstance(error, NotCompressedError) and is_latent_file(path):
        return f"{what}. It is a latent file: `latent-codec decode` opens it"
    if isinstance(error, WrongCodecError):
        shipped = shipped_name(unpack(data, partial=True).header.space_fingerprint)
        return f"{what}. Pass --codec {shipped or 'with the one that made it'}"
    if isinstance(error, WrongEntropyModelError):
        return f"{what}. Pass that one by --entropy"
    if isinstance(error, (TruncatedError, CorruptError)):
        return f"{what}. {what_is_whole(data)}"
    return " ".join(str(error).split())


def _region(text: str) -> tuple[int, int, int, int]:
    words = text.split(",")
    if len(words) != 4:
        raise argparse.ArgumentTypeError(f"{text!r} is no TOP,LEFT,HEIGHT,WIDTH")
    try:
        return tuple(map(int, words))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no TOP,LEFT,HEIGHT,WIDTH of integers") from None
