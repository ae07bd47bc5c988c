"""Turn compressed files (.lcf) back into images, or into latent files.

It takes the codec and the entropy model that compressed the file, and refuses
others by their fingerprints; a codec with another decoder (a fine-tuned one)
will do. Files of shipped codecs find theirs without --codec. `latent-codec
info FILE` prints the fingerprints and the codec's name.

Of an image in units of its own (NAME.lcr next to NAME.lcf) it writes 16-bit
PNG or TIFF, float TIFF or, for a volume, one NAME.nii.gz, unless --format,
--region or --partial asks for an image to look at. A spectrogram becomes
NAME.wav with NAME.png, by Griffin-Lim unless --vocoder names a HiFi-GAN.

An image of more than 4 million pixels is decoded in tiles of 1024 pixels a
side, one by one, so that it needs the memory of a tile and 7 bytes for each
pixel. Tiles overlap and fade into each other. --region decodes only the tiles
that it touches. A codec with attention or group norm decodes tiles and regions
slightly differently than the whole image.

--latents stops before the decoder: latents, or codebook indices, exact to the
bit on every machine, in the format that `latent-codec encode` writes, for
`latent-codec decode`, denoisers and priors.

A file that is cut short or damaged is refused. --partial decodes its whole
sections and names the missing ones on stderr: lost tiles are gray, and lost
quality layers the entropy model's most probable values. A file that cannot be
decoded is named on stderr, the others are written, and the exit status is 2.

Examples:
  latent-codec decompress compressed/cat.lcf     writes decompressed/cat.png
  latent-codec decompress compressed/ --out images
  latent-codec decompress compressed/cat.lcf --format webp
  latent-codec decompress compressed/cat.lcf --latents
  latent-codec decompress map.lcf --region 2048,1024,512,768
"""

import argparse

from latent_codec.cli import arguments
from latent_codec.cli.compressed_files import add_entropy_argument, named_files
from latent_codec.errors import SettingError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "files", nargs="+", metavar="FILE", help="compressed files (.lcf), or folders of them"
    )
    arguments.add_out_argument(parser, "decompressed", "files")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--latents", action="store_true", help="write latent files, without decoding pixels")
    what.add_argument(
        "--region",
        type=_region,
        metavar="TOP,LEFT,HEIGHT,WIDTH",
        help="decode only this part of the image, in pixels",
    )
    parser.add_argument("--partial", action="store_true", help="decode the whole sections of a damaged file")
    parser.add_argument(
        "--format",
        choices=("png", "webp", "tif", "avif", "jpg"),
        help="write images in this format; png, webp and tif are lossless (default: png)",
    )
    parser.add_argument(
        "--tile",
        type=int,
        metavar="PIXELS",
        help="decode tiles of this side one by one; 0: the image at once (default: 1024 above 4 million pixels)",
    ).least = 0
    arguments.add_vocoder_argument(parser)
    add_entropy_argument(parser)
    arguments.add_codec_arguments(parser, None, "the shipped codec that made the file")


def check(args: argparse.Namespace) -> None:
    for name in ("format", "tile"):
        if args.latents and getattr(args, name) is not None:
            advice = "leave it or `latents` out"
            raise SettingError(name, "none for latent files", getattr(args, name), advice=advice)
    args.files = named_files(args.files)


def _region(text: str) -> tuple[int, int, int, int]:
    try:
        top, left, height, width = map(int, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected TOP,LEFT,HEIGHT,WIDTH in integers, got {text!r}"
        ) from None
    return top, left, height, width
