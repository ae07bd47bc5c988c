"""Show what each group of a hierarchical codec's latents says.

For codecs whose latents are groups, each given those above it (NVAE, the
class HierarchicalKL). A row of the sheet keeps an image's latents of the top k
groups and draws all others from the prior: what its images have in common is
what those groups say. The first row keeps nothing, the last one all.

Measured on DATA: KL, the nats per image that a group says, and -ELBO in bits
per dim if only the groups down to this one are inferred and the others drawn.

Examples:
  latent-codec groups fashion_mnist/ --codec runs/nvae
  latent-codec groups faces.tar --codec runs/faces --image face.jpg \\
      --num 6 --temperature 0.7 --out face-groups.png
"""

import argparse
import math
from pathlib import Path

from latent_codec.cli import arguments
from latent_codec.errors import SettingError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_data_arguments(parser, limit=200)
    parser.add_argument(
        "--image", type=Path, metavar="IMAGE", help="keep the latents of this image (default: DATA's first)"
    ).must_exist = True
    parser.add_argument(
        "--num", type=int, default=8, metavar="N", help="draw N images in each row (default: %(default)s)"
    ).least = 1
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.8,
        metavar="T",
        help="draw from the prior with T times its standard deviations, 0 for its means (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="S",
        help="seed the random number generators with S (default: %(default)s)",
    )
    arguments.add_out_argument(parser, "groups.png", "the sheet", "IMAGE")
    arguments.add_codec_arguments(parser, None, "a run of nvae-fashion-mnist, say")
    arguments.add_json_argument(parser)


def check(args: argparse.Namespace) -> None:
    if args.codec is None:
        raise SettingError(
            "codec", "a codec with groups of latents, such as a run of the preset nvae-fashion-mnist"
        )
    if not 0 <= args.temperature < math.inf:
        raise SettingError("temperature", "a number of at least 0", args.temperature)
