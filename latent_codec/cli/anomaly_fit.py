"""Fit a detector of unusual images to normal ones.

The detector is a folder. It knows what a codec makes of normal images: how
large its errors are, how unlikely (-ELBO, of codecs with a posterior) and how
far apart their features. One share of the images is held out: they set the
thresholds, which a new normal image is above with the probability of
--false-alarms. The codec should not have been trained on any of them: it errs
less on images that it knows. scores.png in the folder shows their scores and
the thresholds.

Images that cannot be read are left out and named on stderr.

Examples:
  latent-codec anomaly fit good/ --codec runs/mine --out detector
  latent-codec anomaly score new/ --detector detector
  latent-codec anomaly fit good/ --error lpips --false-alarms 0.01
  latent-codec anomaly fit fashion_mnist/ --label class --normal 6 --out shirts
"""

import argparse

from latent_codec.cli import arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_data_arguments(parser, what="; all of them normal, or by --label")
    arguments.add_out_argument(parser, "detector", "the detector's folder")
    parser.add_argument(
        "--error",
        choices=("mse", "lpips"),
        default="mse",
        help="measure the error of reconstructions by this (default: mse)",
    )
    parser.add_argument(
        "--false-alarms",
        type=float,
        default=0.05,
        metavar="SHARE",
        help="take at most this share of normal images for unusual (default: 0.05)",
    )
    arguments.add_held_out_argument(parser, "hold out this share of the images, for ranks and threshold")
    add_label_arguments(parser, "take only the images with this label")
    arguments.add_feature_arguments(parser)
    arguments.add_codec_arguments(parser)
    arguments.add_json_argument(parser)


def add_label_arguments(parser: argparse.ArgumentParser, what: str) -> None:
    """`--label` and `--normal`; `what` says what the label is for."""
    parser.add_argument(
        "--label",
        metavar="NAME",
        help=f'{what}: "class" where a label is a number, else the name of an attribute; with --normal',
    )
    parser.add_argument(
        "--normal", type=int, metavar="VALUE", help="the value of --label that normal images have"
    )
