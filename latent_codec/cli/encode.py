"""Turn images into latent files, which `latent-codec decode` turns back and
priors train on.

Plain images give a file each; of a.png and a.jpg in one folder both keep their
suffix: a.png.safetensors, a.jpg.safetensors. Of folders and tars every image
in a raster format that Pillow reads is taken, whatever its suffix; the rest is
counted and named on stderr.

With --format, or --shard, and of tars, IDX files and hf:owner/name always, it
writes a data set instead: shards of 1000 images with their labels, captions
and whatever else goes with them, and index.json, which says what they are.
  webdataset   tars: KEY.latents.npy, KEY.json, KEY.cls, KEY.txt
  parquet      for `datasets.load_dataset("parquet", ...)`
  safetensors  latent files, which priors train on and `decode` opens

For training, images are brought to a common size: --size 512 cuts squares,
and with --buckets they keep their aspect ratio, as in kohya's scripts. --flip
and --augment add versions of each image; --posterior both stores mean and log
variance, so that a trainer can draw samples.

The same command again continues where it was stopped: complete shards are
kept. Images that could not be read are tried again. Give every data set a
folder of its own, or the URL of one (s3://..., gs://...).

More devices and machines: --engine accelerate for a few GPUs of a machine,
--engine ray for the rest. Whatever is killed meanwhile, the same command ends
with the same files. docs/scale.md plans data sets of up to 10^9 images.

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
  latent-codec encode photos/ --format webdataset --size 512 --buckets --flip
  latent-codec encode "train-{000..003}.tar" --codec runs/mine --out encoded
  latent-codec encode fashion_mnist/ --split test --codec runs/mine
  latent-codec encode hf:owner/name --codec runs/mine --out encoded
  accelerate launch --num_processes 4 -m latent_codec.cli encode photos/ \\
    --format webdataset --engine accelerate
  latent-codec encode photos/ --format webdataset --out s3://bucket/latents \\
    --engine ray --ray-address auto
"""

import argparse

from latent_codec.cli import arguments

IMAGES_PER_SHARD = 1000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_data_arguments(parser)
    parser.add_argument(
        "--out",
        default="latents",
        metavar="PATH",
        help="write into this folder (default: latents), or, of plain images, into one file, NAME.safetensors",
    )
    parser.add_argument(
        "--format",
        dest="container",
        choices=("webdataset", "parquet", "safetensors"),
        help="write a data set of such shards (default: safetensors for data sets, a file each for plain images)",
    )
    parser.add_argument(
        "--shard",
        dest="images_per_shard",
        type=int,
        metavar="N",
        help=f"write a data set with N images in a shard (default: {IMAGES_PER_SHARD})",
    ).least = 1
    parser.add_argument(
        "--size",
        type=int,
        metavar="PIXELS",
        help="resize images and cut them to squares of this side, or to buckets of that area (default: their own sizes)",
    ).least = 8
    parser.add_argument(
        "--buckets",
        action="store_true",
        help="keep aspect ratios: cut images to the nearest of the sizes whose sides are multiples of --bucket-step and "
        "whose area is at most that of --size",
    )
    parser.add_argument(
        "--bucket-step",
        type=int,
        default=64,
        metavar="PIXELS",
        help="take such sides of buckets (default: %(default)s)",
    ).least = 1
    parser.add_argument(
        "--no-upscale",
        dest="upscale",
        action="store_false",
        help="do not enlarge images that are smaller than --size: cut them to multiples of the step",
    )
    parser.add_argument(
        "--flip", action="store_true", help="add each image's mirror image after it, in a data set"
    )
    parser.add_argument(
        "--augment",
        type=int,
        default=0,
        metavar="N",
        help="add N random windows of each image, half of them mirrored (default: 0)",
    ).least = 0
    parser.add_argument(
        "--posterior",
        choices=("mean", "sample", "both"),
        default="mean",
        help="store the posterior's mean, a sample, or both mean and log variance (default: mean)",
    )
    action = parser.add_argument(
        "--store-dtype",
        choices=("float32", "float16", "bfloat16"),
        help="store the latents of a data set in this precision; bfloat16 in safetensors only (default: --dtype)",
    )
    action.setting = "dtype"
    parser.add_argument(
        "--no-labels",
        dest="labels",
        action="store_false",
        help="leave the labels of DATA out, such as lists, which a data set does not hold",
    )
    arguments.add_seed_argument(parser, "seed of samples and random windows")
    parser.add_argument(
        "--batch-size",
        type=int,
        default=32,
        metavar="N",
        help="encode N images of equal size together, fewer where they are larger than 256x256, in a data set "
        "(default: %(default)s)",
    ).least = 1
    parser.add_argument(
        "--engine",
        choices=("local", "accelerate", "ray"),
        default="local",
        help="encode a data set on this machine with one device (local), in the processes that `accelerate launch` has "
        "started (accelerate), or on all devices of a cluster of Ray (ray) (default: local)",
    )
    parser.add_argument(
        "--ray-address",
        metavar="HOST:PORT",
        help="connect to the cluster of Ray whose head this is, or auto (default: start Ray on this machine)",
    )
    parser.add_argument(
        "--num-workers",
        type=int,
        metavar="N",
        help="decode images in N processes, in a data set (default: one for each CPU, up to 8, and none for few images); "
        "with --engine ray, have N workers that decode and encode (default: one for each GPU, or else each CPU)",
    ).least = 0
    arguments.add_json_argument(parser)
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--indices", action="store_true", help="store codebook indices, or refuse")
    kind.add_argument("--latents", action="store_true", help="store latents, of a codec with a codebook too")
    arguments.add_codec_arguments(parser)
    arguments.add_tile_argument(parser)
