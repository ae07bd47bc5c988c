"""Make a vector of each image, for classifiers, search or plots.

The vectors are latents, or what a layer of the encoder gives (--layer), of a
codec: as they are, where it makes one vector of an image; else pooled over
positions (--pooling). A codec that makes one vector gets images as it was
trained on: resized, and cut to squares.

The file is safetensors: `vectors` (N, D) in float32 and `indices` (N,) of the
images in DATA; the metadata name the images, their labels and the codec.

Images that cannot be read are left out and named on stderr; the exit status
is then 2.

Examples:
  latent-codec features photos/ --out photos.safetensors --csv
  latent-codec features photos/ --codec runs/mine --layer mid_block
  latent-codec features photos/ --codec default-vq --pooling histogram
"""

import argparse
from pathlib import Path

from latent_codec.cli.arguments import (
    add_codec_arguments,
    add_data_arguments,
    add_json_argument,
    check_at_least,
    check_paths,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_data_arguments(parser)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("features.safetensors"),
        metavar="FILE",
        help="write the features here (default: %(default)s)",
    )
    parser.add_argument("--csv", action="store_true", help="write them as a table too, FILE with suffix .csv")
    add_feature_arguments(parser)
    add_codec_arguments(parser)
    add_json_argument(parser)


def add_feature_arguments(parser: argparse.ArgumentParser) -> None:
    """`--pooling`, `--layer` and `--side`: how `extract_features` makes vectors."""
    parser.add_argument(
        "--pooling",
        metavar="HOW",
        help="make a vector of a grid: whole, its numbers as they are; mean-std, of each channel; pyramid, the means "
        "in 1x1, 2x2 and 4x4 cells; histogram, the share of each codeword (default: whole of a 1x1 grid, else "
        "histogram of codecs with a codebook, else mean-std)",
    )
    parser.add_argument(
        "--layer",
        metavar="NAME",
        help="take the output of this module of the encoder, such as mid_block (default: the latents)",
    )
    parser.add_argument(
        "--side",
        type=int,
        metavar="PIXELS",
        help="resize images and cut them to squares of this side (default: as the codec was trained, where it makes one "
        "vector of an image; else their own size)",
    )


def check(args: argparse.Namespace) -> None:
    check_paths(args.data)
    check_at_least(args, limit=1, side=8)
    if args.out.suffix != ".safetensors":
        raise ValueError(f"--out: expected a name that ends in .safetensors, got {args.out}")
