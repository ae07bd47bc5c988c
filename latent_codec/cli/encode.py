"""Turn images into latent files, which `latent-codec decode` turns back and
priors train on.

Plain images give a file each; of a.png and a.jpg in one folder both keep their
suffix: a.png.safetensors, a.jpg.safetensors. Of folders and tars every image
in a raster format that Pillow reads is taken, whatever its suffix; the rest is
counted and named on stderr.

A data set (tars, IDX, hf:owner/name), or a folder with --shard, is written as
files of 1000 images with their labels, 00000.safetensors and on. The same
command again continues where it was stopped: complete files are kept. Give
every data set a folder of its own.

Images that cannot be read are left out and named on stderr. Of plain images
the exit status is then 2.

A codec with a codebook gives indices, every other codec latents. With
--latents a codec with a codebook gives the latents that a denoiser takes. So
does without it a codec whose latents pipelines decode without the codebook
(Kandinsky's MoVQ); --indices then gives indices.

A latent file records names, sizes, labels and the codec's fingerprints, so
that it is not decoded by mistake with a codec of another latent space.

Examples:
  latent-codec encode cat.jpg                writes latents/cat.safetensors
  latent-codec encode photos/ --out latents  one file for each image;
                                             subfolders are kept
  latent-codec encode photos/ --out all.safetensors
                                             one file for all
  latent-codec encode photos/ --shard 1000 --out encoded
  latent-codec encode "train-{000..003}.tar" --codec runs/mine --out encoded
  latent-codec encode fashion_mnist/ --split test --codec runs/mine
  latent-codec encode hf:owner/name --codec runs/mine --out encoded
"""

import argparse

from latent_codec.cli import arguments

IMAGES_PER_FILE = 1000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_data_arguments(parser)
    parser.add_argument(
        "--out",
        default="latents",
        metavar="PATH",
        help="write into this folder (default: latents), or, of plain images, into one file, NAME.safetensors",
    )
    parser.add_argument(
        "--shard",
        type=int,
        metavar="N",
        help=f"write files of N images (default: {IMAGES_PER_FILE} for data sets, a file each for plain images)",
    ).least = 1
    parser.add_argument(
        "--mirrored", action="store_true", help="add each image's mirror image after it, in files of N images"
    )
    parser.add_argument(
        "--no-labels",
        action="store_true",
        help="leave the labels of DATA out, such as lists, which a latent file does not hold",
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        default=32,
        metavar="N",
        help="encode N images of equal size together, in files of N images (default: %(default)s)",
    ).least = 1
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--indices", action="store_true", help="store codebook indices, or refuse")
    kind.add_argument("--latents", action="store_true", help="store latents, of a codec with a codebook too")
    arguments.add_codec_arguments(parser)
    arguments.add_tile_argument(parser)
