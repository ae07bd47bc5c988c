"""Turn images into latent files, which `latent-codec decode` turns back and priors train on.

  latent-codec encode cat.jpg                       writes latents/cat.safetensors
  latent-codec encode photos/ --out latents         one file for each image; subfolders are kept
  latent-codec encode photos/ --out all.safetensors one file for all

Of a.png and a.jpg in one folder both keep their suffix: a.png.safetensors, a.jpg.safetensors. Of folders and tars every
image in a raster format that Pillow reads is taken, whatever its suffix; the rest is counted and named on stderr.

A data set is written as files of 1000 images (--shard) with their labels, 00000.safetensors and on:

  latent-codec encode "train-{000..003}.tar" --codec runs/mine --out codes
  latent-codec encode fashion_mnist/ --split train --codec runs/mine --out codes
  latent-codec encode hf:owner/name --codec runs/mine --out codes
  latent-codec encode photos/ --shard 1000 --out codes

The same command again goes on where it was stopped: files that are complete are kept. --mirrored adds each
image's mirror image, which a prior may learn from as well where left and right mean the same. Give every data
set a folder of its own.

Images that cannot be read are left out and named on stderr. Of plain images the exit status is then 2.

A codec with a codebook gives indices, every other codec latents. With --latents a codec with a codebook
gives the latents that a denoiser takes. So does without it a codec whose latents pipelines decode
without the codebook (Kandinsky's MoVQ); --indices then gives indices.

A latent file records names, sizes, labels and the codec's fingerprints, so that it is not decoded by mistake
with a codec of another latent space.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from latent_codec.cli.arguments import (
    add_codec_arguments,
    add_data_argument,
    add_tile_argument,
    check_paths,
    load_codec,
    output_names,
)
from latent_codec.cli.progress import showing, with_progress

IMAGES_PER_FILE = 1000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_data_argument(parser)
    parser.add_argument(
        "--out",
        default="latents",
        metavar="PATH",
        help="a folder (default: latents), or, of plain images, NAME.safetensors, for one file",
    )
    parser.add_argument(
        "--shard",
        type=int,
        metavar="N",
        help=f"write files of N images (default: {IMAGES_PER_FILE} for data sets, a file each for plain images)",
    )
    parser.add_argument(
        "--mirrored",
        action="store_true",
        help="add each image's mirror image after it, in files of N images",
    )
    parser.add_argument(
        "--no-labels",
        action="store_true",
        help="leave the labels of DATA out, such as lists, which a latent file does not hold",
    )
    parser.add_argument("--split", default="train", help="of data that has splits (default: train)")
    parser.add_argument(
        "--batch-size",
        type=int,
        default=32,
        metavar="N",
        help="images of equal size encoded together, in files of N images (default: %(default)s)",
    )
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--indices", action="store_true", help="store codebook indices, or refuse")
    kind.add_argument("--latents", action="store_true", help="store latents, of a codec with a codebook too")
    add_codec_arguments(parser)
    add_tile_argument(parser)


def run(args: argparse.Namespace) -> int:
    check_paths(args.data)
    for flag, number in (("--shard", args.shard), ("--batch-size", args.batch_size)):
        if number is not None and number < 1:
            raise ValueError(f"{flag} is {number}; at least 1")

    from latent_codec.images.sources import FolderImages, open_source

    source = open_source(args.data, split=args.split)
    if args.shard is not None or not isinstance(source, FolderImages):
        _encode_source(source, args)
        return 0
    if args.no_labels:
        raise ValueError(f"--no-labels goes with files of many images; add --shard {IMAGES_PER_FILE}")
    if args.mirrored:
        raise ValueError(f"--mirrored goes with files of many images; add --shard {IMAGES_PER_FILE}")
    images = output_names(source.listing)
    codec = load_codec(args)
    args.indices = args.indices or (codec.indices_suffice and not args.latents)
    if args.indices and not codec.is_discrete:
        raise ValueError(f"{codec.name} has no codebook, and so no indices; leave --indices out")
    if args.indices and args.tile:
        raise ValueError("indices have no tiled form; leave --tile out")
    failed = []
    if args.out.endswith(".safetensors"):
        encoded = list(_encode_each(codec, images, args, failed))
        if encoded:
            names = [(name.parent / path.name).as_posix() for path, name, _, _ in encoded]
            _save(
                Path(args.out),
                [codes for _, _, codes, _ in encoded],
                codec,
                names,
                [size for *_, size in encoded],
                args,
            )
            print(args.out)
    else:
        for path, name, codes, size in _encode_each(codec, images, args, failed):
            out = Path(args.out) / name.with_name(f"{name.name}.safetensors")
            _save(out, [codes], codec, names=[path.name], sizes=[size], args=args)
            print(out)
    return 2 if failed else 0


def _encode_source(source, args: argparse.Namespace) -> None:
    from latent_codec.images.sources import LabelError
    from latent_codec.latents.encoded_images import encode_source

    if args.out.endswith(".safetensors"):
        raise ValueError(f"this data goes into a folder of several files; {args.out} names a single one")
    if args.tile:
        raise ValueError("--tile is for plain images in a file each; leave it out of this")
    codec = load_codec(args)
    try:
        with showing("encoding") as report:
            files = encode_source(
                codec,
                source,
                args.out,
                images_per_file=IMAGES_PER_FILE if args.shard is None else args.shard,
                batch_size=args.batch_size,
                mirrored=args.mirrored,
                indices=True if args.indices else False if args.latents else None,
                labels=not args.no_labels,
                on_progress=report,
            )
    except LabelError as error:
        raise ValueError(f"{error}; leave labels out by --no-labels") from error
    for file in files:
        print(file)


def _encode_each(
    codec, images: list[tuple[Path, Path]], args: argparse.Namespace, failed: list[Path]
) -> Iterator[tuple]:
    """Path, name, latents (or index grids) and (height, width) of each image; one that cannot be read goes to `failed`."""
    from latent_codec.images.tensors import ImageError, to_image

    for path, name in with_progress(images, "encoding"):
        try:
            image = to_image(path, channels=codec.channels)
        except ImageError as error:
            failed.append(path)
            print(f"latent-codec encode: {error}", file=sys.stderr)
            continue
        codes = codec.encode_indices(image) if args.indices else codec.encode(image, tile=args.tile)
        yield path, name, codes, tuple(image.shape[-2:])


def _save(out: Path, codes, codec, names: list[str], sizes: list, args: argparse.Namespace) -> None:
    from latent_codec.latents.latent_files import save_indices, save_latents

    save = save_indices if args.indices else save_latents
    save(out, codes, codec=codec, names=names, sizes=sizes)
