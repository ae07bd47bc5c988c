"""Turn latents of one codec into latents of another, without decoding and
encoding: latent files -> latent files, which the other codec decodes.

`latent-codec train translator --codec A --target B --data photos/` makes a
translator. It knows both codecs by the fingerprints of their latent spaces:
latents of other codecs are refused, and the files written name the target.

Names, sizes, labels and captions are kept. A data set of latents becomes a
data set of latents; where it has means and variances, of the means.

Examples:
  latent-codec translate latents/cat.safetensors --translator runs/translator
                                       writes translated/cat.safetensors
  latent-codec translate latents/ --translator runs/translator --out vq
  latent-codec decode vq/ --codec default-vq
"""

import argparse
from pathlib import Path

from latent_codec.cli import arguments
from latent_codec.cli.decode import find_latent_files

SUFFIXES = (".safetensors",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "files",
        nargs="+",
        metavar="FILE",
        help="latent files, folders of them, or data sets of latents",
    )
    parser.add_argument(
        "--translator",
        type=Path,
        required=True,
        metavar="PATH",
        help="a translator's folder, or the run folder that it was trained in",
    )
    arguments.add_out_argument(parser, "translated", "latent files")
    arguments.add_device_argument(parser)
    arguments.add_json_argument(parser)


def check(args: argparse.Namespace) -> None:
    args.files = find_latent_files(args.files, SUFFIXES)
