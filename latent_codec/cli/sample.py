"""Generate images with a prior, as one image with a grid of them.

PIPELINE is a codec joined with its priors, as `latent-codec pipeline` writes
it, or a run folder with one in pipeline/. A row of the grid holds one label's
images; those of a single label, or without labels, fill a square. An image
follows only from the seed, its label and its number: a larger --num adds
images to the same first ones. Images of fewer than 96 px a side are shown
enlarged by a whole factor, pixel by pixel.

--keep is classifier-based rejection sampling (VQ-VAE-2): of the --num images
of a label it keeps those whose label the pipeline's classifier gives the
highest probability, highest first.

With --codec the verb decodes random latents of a trained VAE instead. z ~ N(0,
I) goes through the codec's own scale and shift: where calibration found the
latents of images away from mean 0 and std 1, the samples follow that mean and
std, per channel where the config has them per channel. It prints the
distribution.

Every position of the latents is sampled independently. A codec with a single
position per image gives whole images from that, and so does a hierarchy of
groups (HierarchicalKL), whose latents are independent; others give textures,
since a denoiser or a prior is needed for the dependence between positions.
Discrete codecs are refused for that reason.

Of a codec that was trained on recordings (audio:) every sample is also written
as a sound, samples-00.wav with samples-00.png and so on.

Examples:
  latent-codec sample       the shipped garments, a row for every class
  latent-codec sample --label sneaker bag --num 8
                            some classes, by name or number
  latent-codec sample --num 16 --keep 0.25
                            the quarter that the classifier prefers
  latent-codec sample runs/joined --preview growing.png
                            growing.png is rewritten while it samples
  latent-codec sample runs/joined --size 256x384 --top-p 0.95 --seed 7
  latent-codec sample --codec runs/faces --num 64 --temperature 0.8 \\
      --out faces.png
"""

import argparse
import math
from pathlib import Path

from latent_codec.cli import arguments
from latent_codec.errors import SettingError

DEFAULT_PIPELINE = "fashion-mnist"
OF_PIPELINES = ("label", "keep", "top_k", "top_p", "preview")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "pipeline",
        nargs="?",
        metavar="PIPELINE",
        help=f"a pipeline's folder, a run folder, or the shipped {DEFAULT_PIPELINE} (default: the shipped one)",
    )
    parser.add_argument(
        "--label",
        nargs="+",
        metavar="L",
        help="generate images of these classes, by name or number (default: every class)",
    )
    parser.add_argument(
        "--num",
        type=int,
        default=16,
        metavar="N",
        help="generate N images of every label, or N in all without labels (default: %(default)s)",
    ).least = 1
    parser.add_argument(
        "--keep",
        type=_share_or_number,
        metavar="SHARE",
        help="keep this share (0.25) or number (4) of a label's images, those of the highest probability of the label by "
        "the classifier (default: all)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="S",
        help="seed the random number generators with S; a larger --num adds samples to the same first ones (default: %(default)s)",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=1.0,
        metavar="T",
        help="divide the logits by T, 0 for the most probable value; with --codec, sample from N(0, T^2) (default: %(default)s)",
    )
    parser.add_argument(
        "--top-k", type=int, metavar="K", help="sample among the K most probable values (default: all)"
    )
    parser.add_argument(
        "--top-p",
        type=float,
        metavar="P",
        help="sample among the most probable values that together have the probability P (default: all)",
    )
    parser.add_argument(
        "--size",
        metavar="HxW",
        help="generate images of this size in pixels, such as 64x96 or 64 (default: the size of the training)",
    )
    parser.add_argument(
        "--preview",
        type=Path,
        metavar="IMAGE",
        help="rewrite this image while the grid grows, at most twice a second (default: none)",
    )
    arguments.add_out_argument(parser, "samples.png", "the grid", "IMAGE")
    arguments.add_vocoder_argument(parser)
    arguments.add_codec_arguments(parser, None, "a pipeline")
    arguments.add_json_argument(parser)


def check(args: argparse.Namespace) -> None:
    if args.codec is None and args.seed < 0:
        raise SettingError("seed", "at least 0", args.seed)
    if not 0 <= args.temperature < math.inf:
        raise SettingError("temperature", "a number of at least 0", args.temperature)
    args.size = _parse_size(args.size) if args.size else None
    given = [f"--{name.replace('_', '-')}" for name in OF_PIPELINES if getattr(args, name) is not None]
    if args.codec is not None and (args.pipeline is not None or given):
        what = given[0] if args.pipeline is None else f"the pipeline {args.pipeline}"
        raise ValueError(
            f"{what} samples from a prior and --codec {args.codec} decodes random latents; leave one out"
        )


def _parse_size(text: str) -> tuple[int, int]:
    sides = text.lower().split("x")
    if not (1 <= len(sides) <= 2 and all(side.isdecimal() and int(side) > 0 for side in sides)):
        raise SettingError("size", "HEIGHTxWIDTH in pixels, such as 64x96, or one side", text)
    return int(sides[0]), int(sides[-1])


def _share_or_number(text: str) -> float | int:
    try:
        return int(text) if text.isdecimal() else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text} is neither a share such as 0.25 nor a number such as 4"
        ) from None
