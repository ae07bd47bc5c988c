"""Make a vector of each image, for classifiers, search or plots.

The vectors are latents, or what a layer of the encoder gives (--layer), of a
codec: as they are, where it makes one vector of an image; else pooled over
positions (--pooling). A codec that makes one vector gets images as it was
trained on: resized, and cut to squares.

The file is safetensors: `vectors` (N, D) in float32 and `indices` (N,) of the
images in DATA; the metadata name the images, their labels and the codec.

DATA may be a data set of latents, which is not encoded again. Images that
cannot be read are left out and named on stderr; the exit status is then 2.

Examples:
  latent-codec features photos/ --out photos.safetensors --csv
  latent-codec features latents/             what `encode` wrote
  latent-codec features photos/ --codec runs/mine --layer mid_block
  latent-codec features photos/ --codec default-vq --pooling histogram
"""

import argparse

from latent_codec.cli import arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_data_arguments(parser)
    arguments.add_out_argument(parser, "features.safetensors", "the features", "FILE")
    parser.add_argument("--csv", action="store_true", help="write them as a table too, FILE with suffix .csv")
    arguments.add_feature_arguments(parser)
    arguments.add_codec_arguments(parser, None, "the one called default; of a data set of latents, theirs")
    arguments.add_json_argument(parser)


def check(args: argparse.Namespace) -> None:
    arguments.check_safetensors(args)
