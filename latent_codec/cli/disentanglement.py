"""Measure whether each latent dimension follows one factor of variation.

Factors are the attributes of the images' labels whose values are integers, or
true and false, such as those of `shapes:`. It prints of every factor which
dimension says most of it and how much (mutual information, as a share of the
factor's entropy), the gap to the second dimension, and how often a random
forest guesses the factor of held-out images from all dimensions; then

  MIG               the mean gap (arXiv:1802.04942)
  disentanglement   1: a dimension serves one factor alone
  completeness      1: a factor is held by one dimension alone
  informativeness   the mean share of right guesses

The last three are DCI (Eastwood and Williams, ICLR 2018). In --out it leaves
a heat map of factors and dimensions, and every figure. It needs a codec that
makes one vector of an image, and scikit-learn: pip install
"latent-codec[analysis]".

Examples:
  latent-codec train shapes-global --data shapes:20000x32 --out runs/shapes
  latent-codec disentanglement shapes:5000x32 --codec runs/shapes
  latent-codec disentanglement faces.tar --codec runs/faces --factor Smiling
"""

import argparse

from latent_codec.cli import arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_data_arguments(parser, split="test", least=100)
    parser.add_argument(
        "--factor",
        action="append",
        metavar="NAME",
        help="count this attribute of the labels as a factor; give it again for more (default: every attribute that is "
        "an integer, or true and false)",
    )
    arguments.add_codec_arguments(parser, "garments", "the shipped one-vector codec, garments")
    arguments.add_out_argument(parser, "latent-codec-out/disentanglement", "the heat map and figures")
    arguments.add_json_argument(parser)
