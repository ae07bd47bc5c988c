"""Compress images to small files (.lcf), which `decompress` turns back.

For each image NAME it writes NAME.lcf; subfolders are kept, and of a.png and
a.jpg in one folder both keep their suffix: a.png.lcf, a.jpg.lcf.

Latents are quantized: --quality chooses one of the entropy model's step sizes.
Indices of a codebook are stored without loss, at one rate; with a target a
codec of several levels leaves out the lowest levels that do not fit. Latents
need an entropy model, entropy.safetensors in the codec's folder, which
`fit-entropy` makes; indices do without one, too, at fixed length. A file names
its codec and entropy model by fingerprints and needs both to be decoded.

Next to NAME.lcf of a gray image of more than 8 bits, DICOM or NIfTI there is
NAME.lcr, with which `decompress` writes the original units; with --max-error
it also has what the codec lost, up to that bound. Of a recording (audio:) it
says how the spectrogram becomes a sound again.

Without --codec it takes the shipped codec that is better at the rate:
default-rd where --target-bpp is 0.2 or more, else default.

Each file is decoded to its values before it is written. It prints bytes, bits
per pixel of the original and, in brackets, the bits per pixel without
overhead: the code length of the values under the entropy model, or log2 of the
codebook size at fixed length. With several images the last line is their
total.

An image that cannot be read, or does not fit the target, is left out and named
on stderr; the exit status is then 2.

Examples:
  latent-codec compress cat.jpg                   writes compressed/cat.lcf
  latent-codec compress photos/ --out small
  latent-codec compress photos/ --quality 30      coarser than 50, smaller
  latent-codec compress photos/ --target-bpp 0.25
  latent-codec compress photos/ --target-bytes 2000 --psnr
  latent-codec compress photos/ --codec default-vq
  latent-codec compress chest/ --max-error 5      of DICOM: 5 Hounsfield units
"""

import argparse

from latent_codec.cli import arguments
from latent_codec.cli.compressed_files import add_entropy_argument
from latent_codec.errors import SettingError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_data_arguments(parser)
    arguments.add_out_argument(parser, "compressed", "NAME.lcf")
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--quality",
        type=int,
        metavar="Q",
        help="quantize latents with these step sizes, 0 being the coarsest (default: 50)",
    ).least = 0
    size.add_argument(
        "--target-bpp",
        type=float,
        metavar="B",
        help="take at most B bits per pixel of the original, header included",
    )
    size.add_argument(
        "--target-bytes", type=int, metavar="N", help="take at most N bytes for each file"
    ).least = 1
    parser.add_argument(
        "--tile",
        type=int,
        default=1024,
        metavar="PIXELS",
        help="code larger images in tiles of this side, which decode independently; 0: never (default: 1024)",
    ).least = 0
    parser.add_argument(
        "--max-error",
        type=float,
        metavar="E",
        help="add corrections, so that no value of a gray image of more than 8 bits, DICOM or NIfTI is off by more than E "
        "in its unit; 0: none of integers",
    )
    parser.add_argument("--psnr", action="store_true", help="decode every file to pixels, and compare")
    add_entropy_argument(parser)
    arguments.add_codec_arguments(parser, None, "default-rd where --target-bpp is 0.2 or more, else default")
    arguments.add_json_argument(parser)


def check(args: argparse.Namespace) -> None:
    if args.max_error is not None and not 0 <= args.max_error < float("inf"):
        raise SettingError("max_error", "a number from 0", args.max_error)
    if args.target_bpp is not None and not 0 < args.target_bpp < float("inf"):
        raise SettingError("target_bpp", "above 0", args.target_bpp)
