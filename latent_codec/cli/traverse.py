"""Show what each dimension of a latent vector changes.

For codecs with one vector per image. Each row of the sheet sets one dimension
to -3 ... 3 and leaves the others at 0, the middle of the prior N(0, 1), or
with --image at those of an image. Rows are sorted by KL, what a dimension says
of an image, measured on DATA, and without DATA by how much it changes.

A dimension of about 0 nats is not used: its row shows one image. A high beta
(objective.kl_weight) leaves fewer in use. Without posterior, in a plain
autoencoder, the values are standard deviations from the mean over DATA.

Examples:
  latent-codec traverse
  latent-codec traverse fashion_mnist/ --codec garments
  latent-codec traverse faces.tar --codec runs/faces --image face.jpg \\
      --top 16 --out faces.png
"""

import argparse
from pathlib import Path

from latent_codec.cli import arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_data_arguments(parser, nargs="*", limit=1000, what=" (default: none, and no KL)")
    parser.add_argument(
        "--values",
        type=float,
        nargs="+",
        default=[-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0],
        metavar="V",
        help="set a dimension to these values (default: -3 -2 -1 0 1 2 3)",
    )
    parser.add_argument(
        "--image", type=Path, metavar="IMAGE", help="start from the latents of this image (default: 0)"
    ).must_exist = True
    parser.add_argument(
        "--top", type=int, metavar="N", help="show the first N dimensions in the sheet (default: all)"
    ).least = 1
    arguments.add_out_argument(parser, "traversal.png", "the sheet", "IMAGE")
    arguments.add_codec_arguments(parser, "garments", "the shipped one-vector codec, garments")
    arguments.add_json_argument(parser)
