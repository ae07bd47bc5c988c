"""Bring latents that another program cached into a data set of latents, which
`latent_codec.LatentDataset`, webdataset and datasets read.

DATA: caches of kohya's sd-scripts (.npz), arrays (.npy, .npz), tensors (.pt,
.safetensors), or folders of them. An array may hold one image, (C, h, w), or
many, (N, C, h, w). With twice the codec's channels it is mean and log
variance, as diffusers' latent_dist.parameters has them. Captions are read from
NAME.txt or NAME.caption next to NAME; where all files are in subfolders, the
subfolder is the class.

Nothing in such files says whose latents they are: --codec says it, and is
believed. Latents are --raw as the encoder gave them, or --scaled as a denoiser
takes them. kohya's names tell that (SD, SDXL and SD3 raw, FLUX.1 scaled); of
other files one of the two must be given. Standard deviations far from 1 are
remarked on, since denoisers are trained on about 1.

Files that cannot be read are left out and named on stderr, and the exit status
is then 2. The same command again goes on where it was stopped.

Examples:
  latent-codec import-latents train/ --codec sd-vae --out latents
                                             kohya's caches, with captions
  latent-codec import-latents cached/ --codec sd-vae --raw --out latents
  latent-codec import-latents moments.npy --codec sd-vae --raw --format parquet
"""

import argparse

from latent_codec.cli import arguments

CONTAINERS = ("webdataset", "parquet", "safetensors")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "data", metavar="DATA", nargs="+", help="files of latents, or folders of them"
    ).must_exist = True
    values = parser.add_mutually_exclusive_group()
    values.add_argument(
        "--raw",
        dest="values",
        action="store_const",
        const="raw",
        help="the latents are as the encoder gave them: scale and shift them",
    )
    values.add_argument(
        "--scaled",
        dest="values",
        action="store_const",
        const="scaled",
        help="the latents are as a denoiser takes them: leave them as they are",
    )
    parser.add_argument(
        "--out",
        default="latents",
        metavar="DIR",
        help="write into this folder, or the URL of one (default: latents)",
    )
    parser.add_argument(
        "--format", choices=CONTAINERS, default="webdataset", help="of the shards (default: %(default)s)"
    )
    parser.add_argument(
        "--shard", type=int, default=1000, metavar="N", help="images in a shard (default: %(default)s)"
    ).least = 1
    arguments.add_codec_arguments(parser, None, "required")
    arguments.add_json_argument(parser)


def check(args: argparse.Namespace) -> None:
    if args.codec is None:
        raise ValueError(
            "--codec: expected the codec whose latents these are, as nothing in the files says it"
        )
