"""Find the direction of an attribute in a codec's latents.

For codecs with one vector per image. The direction goes from images without
the attribute to images with it: the difference between the means of both, or
that of a linear classifier. Labels are those of DATA: an attribute that is
true or false, or NAME=VALUE for one value against all others, where NAME is
"class" if labels are numbers.

Where smiles go along with another attribute, so does their direction;
--without holds it equal, by regression on both.

A share of the images is held out: AUC is how probably one that has the
attribute is further along the direction than one that has not. The file names
the codec, and other codecs refuse it.

Examples:
  latent-codec attribute fit faces.tar --label Smiling --without Male \\
      --codec runs/faces --out smiling.safetensors
  latent-codec attribute fit fashion_mnist/ --label class=8 \\
      --out bag.safetensors
"""

import argparse
from pathlib import Path

from latent_codec.cli import arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_data_arguments(parser)
    parser.add_argument("--label", required=True, metavar="L", help="find the direction of this label")
    parser.add_argument(
        "--without", nargs="+", default=[], metavar="L", help="hold these labels equal (default: none)"
    )
    parser.add_argument(
        "--method",
        choices=("means", "classifier"),
        default="means",
        help="take the difference of means, or a logistic regression (default: %(default)s)",
    )
    arguments.add_held_out_argument(parser, "measure AUC on this share of the images")
    arguments.add_seed_argument(parser, "draw them by this seed")
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FILE",
        help="write the direction here, as .safetensors",
    )
    arguments.add_codec_arguments(parser, "garments", "the shipped one-vector codec, garments")
    arguments.add_json_argument(parser)


def check(args: argparse.Namespace) -> None:
    arguments.check_safetensors(args)
