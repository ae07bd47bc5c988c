"""Measure how well a linear classifier tells classes from a codec's features.

Logistic regression learns the images' labels from their features
(`latent-codec features --help` says what these are), and is tested on other
images: on a share of DATA that is held out, or on --test-split or --test-data.
The same is done with raw pixels (32x32 at most), and with as many principal
components of them as there are features. All vectors are standardized.

It prints the accuracies, and how far the features are ahead of the principal
components with a 95 % interval, paired by image; and leaves in --out the
confusion matrix (confusion.png), test images by the most frequent confusions
(mistakes.png), and all figures (probe.json).

Labels are numbers in IDX folders, subfolders' names, or attributes, of which
--label names one.

Examples:
  latent-codec probe fashion_mnist/ --codec garments --test-split test
  latent-codec probe faces.tar --codec runs/faces --label Smiling
  latent-codec probe kinds/ --layer mid_block --held-out 0.5
"""

import argparse

from latent_codec.cli import arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_data_arguments(parser, least=2)
    arguments.add_label_argument(parser, 'default: "class", labels that are numbers')
    arguments.add_held_out_argument(parser, "test on this share of each class, drawn by --seed")
    parser.add_argument("--test-split", metavar="NAME", help="test on this split of DATA instead")
    parser.add_argument(
        "--test-data",
        nargs="+",
        metavar="DATA",
        help="test on these images instead, of --test-split if they have splits",
    ).must_exist = True
    arguments.add_feature_arguments(parser)
    arguments.add_codec_arguments(parser)
    arguments.add_out_argument(parser, "latent-codec-out/probe", "images and figures")
    arguments.add_seed_argument(parser, "seed of all that is random")
    arguments.add_json_argument(parser)


def check(args: argparse.Namespace) -> None:
    if not 0 < args.held_out < 1:
        raise ValueError(f"--held-out: expected a share above 0 and below 1, got {args.held_out}")
