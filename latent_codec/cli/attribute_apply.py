"""Move images along the direction of an attribute.

Writes a sheet: for each image a row, the image and then what is decoded at
each amount. 0 is its reconstruction, 1 as far as images with the attribute are
from images without it, and negative amounts take it away.

Examples:
  latent-codec attribute apply face.jpg --direction smiling.safetensors \\
      --codec runs/faces --amounts -2 -1 0 1 2
  latent-codec attribute apply fashion_mnist/ --split test --index 0 2 1 \\
      --direction bag.safetensors
"""

import argparse
from pathlib import Path

from latent_codec.cli import arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_data_arguments(parser)
    arguments.add_index_argument(parser)
    parser.add_argument(
        "--direction",
        type=Path,
        required=True,
        metavar="FILE",
        help="move along this direction, which `attribute fit` wrote",
    ).must_exist = True
    parser.add_argument(
        "--amounts",
        type=float,
        nargs="+",
        default=[-2.0, -1.0, 0.0, 1.0, 2.0],
        metavar="A",
        help="move by these amounts (default: -2 -1 0 1 2)",
    )
    arguments.add_out_argument(parser, "attribute.png", "the sheet", "IMAGE")
    arguments.add_codec_arguments(parser, "garments", "the shipped one-vector codec, garments")
    arguments.add_json_argument(parser)
