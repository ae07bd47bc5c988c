"""Measure a codec on images that it was not trained on.

It prints PSNR, SSIM, MS-SSIM, LPIPS and the Frechet distance of the
reconstructions; mean, spread and KL of every latent channel, and its distance
from a standard normal; what latents lose when they are turned or shrunk, and
how much of them is high frequencies, which tell how well a diffusion model
trains on them (EQ-VAE, arXiv:2502.09509); time per megapixel and the most
memory held. In --out it leaves the worst, the median and the best image
(images.png), the latents' histograms (latents.png), every figure of every
image (evaluation.json), and the tables for a page or a paper (summary.md,
summary.tex).

Of a codec with a codebook it prints how many codewords the images use,
perplexity, and the entropy of the indices in bits per index and per pixel,
next to the bits that indices of fixed length take; and leaves the codewords,
each decoded (codebook.png), and the median image's indices (indices.png).

Several codecs are compared on the same images: PSNR, SSIM, MS-SSIM, LPIPS,
sharpness and the error at edges and letters side by side; of each but the
first the mean difference from it, image by image, with its 95 % interval;
drift of colors and of contrast; time per megapixel. A sheet (crops.png) shows
for four images the original's crop in which the codecs differ most, and every
codec's next to it.

With --prior it measures the likelihood of the images under a prior instead. It
prints of every level bits per index, next to the bits of two coders for the
same indices: a static (order-0) model, fitted to them, and fixed length (log2
K). Bits per dim are bits over height x width x channels of the images. Priors
with classes read each image's class from its label; --label names the
attribute where labels have several. A prior over pixels needs no codec.

A figure that is not available (weights absent, images too small, too few
crops) is left empty with the reason; weights of metrics are never downloaded.

Examples:
  latent-codec evaluate photos/                    the shipped codec
  latent-codec evaluate photos/ --codec runs/mine  your own
  latent-codec evaluate photos/ --codec default runs/mine TAESD/
                                   three codecs side by side
  latent-codec evaluate "test-{000..003}.tar" --json > figures.json
  latent-codec evaluate photos/ --prior runs/joined
                                   a pipeline, with its codec and priors
  latent-codec evaluate photos/ --prior runs/prior --codec runs/mine
  latent-codec evaluate encoded/ --prior runs/prior --codec runs/mine
                                   latent files of `latent-codec encode`
"""

import argparse

from latent_codec.cli import arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_data_arguments(parser, split="test")
    arguments.add_codec_arguments(
        parser, None, "the one called default; with --prior the pipeline's own", several=True
    )
    parser.add_argument(
        "--prior",
        metavar="PATH",
        help="measure the likelihood under this prior: its folder, a run folder, or a pipeline's",
    )
    arguments.add_label_argument(parser, 'default: "class", labels that are numbers')
    parser.add_argument(
        "--frechet-crop",
        type=int,
        default=128,
        metavar="PIXELS",
        help="compare crops of this side by the Frechet distance (default: %(default)s)",
    )
    arguments.add_out_argument(parser, "latent-codec-out/evaluate", "images and figures")
    arguments.add_json_argument(parser)


def check(args: argparse.Namespace) -> None:
    if args.prior is not None and len(args.codec or ()) > 1:
        raise ValueError(f"--prior reads one codec's indices or latents, got {len(args.codec)} after --codec")
    if args.label is not None and args.prior is None:
        raise ValueError(
            f"--label {args.label} names a prior's classes, and there is no --prior; leave it out"
        )
