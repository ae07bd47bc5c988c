"""Measure how well a diffusion model trains on the latents of codecs.

It trains the same small denoiser (a DiT of 1.4 million parameters, by flow
matching) on each codec's latents of the same images, for the same steps, and
draws samples after a quarter, a half, three quarters and all of them. It
prints the Frechet distance of the decoded samples from the images, mean and
standard deviation over seeds, and after how many steps each codec is as near
as the first codec at the end. Next to it:

  half of the images  their distance from the other half: what is noise
  reconstructions     what samples hardly get below
  iFID                of images decoded between latents and their nearest
                      neighbors (arXiv:2603.05630): a forecast without a
                      denoiser; with three codecs or more, its rank
                      correlation with what the denoisers gave

Distances are of a network's features, which the table names; figures of
another network, size, or number of images and samples cannot be compared.
How long it takes is said before the first denoiser is trained: with the
defaults about five minutes for each codec and seed on two CPU cores. What is
finished is kept in --out: the same command goes on where it was stopped, and
with further codecs or seeds it measures those only.

In --out it leaves curves (curves.png), samples (samples.png), every figure
(diffusability.json), tables for a page or a paper (summary.md, summary.tex)
and the denoisers, as folders of diffusers' DiTTransformer2DModel (runs/).

Examples:
  latent-codec diffusability photos/ --codec default runs/equivariant
  latent-codec diffusability faces.tar --codec default runs/a runs/b --seeds 1
  latent-codec diffusability photos/ --codec default runs/a --steps 0
                                   no denoiser: reconstructions and iFID
"""

import argparse

from latent_codec.cli import arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_data_arguments(parser, limit=10_000, least=100)
    arguments.add_codec_arguments(parser, ["default"], several=True)
    parser.add_argument(
        "--seeds", type=int, default=3, metavar="N", help="train N denoisers for each codec (default: 3)"
    ).least = 1
    parser.add_argument(
        "--steps",
        type=int,
        default=2000,
        metavar="N",
        help="train each for N steps of 32 images; 0 trains none (default: 2000)",
    ).least = 0
    parser.add_argument(
        "--size",
        type=int,
        default=64,
        metavar="PIXELS",
        help="resize images and cut them to squares of this side (default: 64)",
    ).least = 16
    parser.add_argument(
        "--samples",
        type=int,
        default=500,
        metavar="N",
        help="draw N samples after each quarter of the steps (default: 500)",
    ).least = 16
    arguments.add_out_argument(parser, "latent-codec-out/diffusability", "curves, samples and figures")
    arguments.add_json_argument(parser)
