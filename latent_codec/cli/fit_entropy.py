"""Fit an entropy model to a codec, for small compressed files.

The context model is `latent-codec train latent-context` (or index-context, of
a codec with a codebook), with its run folder in --run; the same command
resumes a run that was stopped. --static counts values instead: an order-0
model in a minute, with larger files.

The model goes into entropy.safetensors in the codec's folder, where compress,
decompress and rd find it, and serves all rates of the codec. Compressed files
are bound to it: another model, even of the same codec, does not open them. So
an earlier model is kept as entropy-FINGERPRINT.safetensors, for `decompress
--entropy`.

A shipped codec, one from the hub and a single file stay unchanged: --out names
a folder for a copy.

Examples:
  latent-codec fit-entropy photos/ --codec runs/mine       a quarter of an hour
  latent-codec fit-entropy photos/ --codec default --out mine
  latent-codec fit-entropy photos/ --codec runs/mine --static
"""

import argparse

from latent_codec.cli import arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_data_arguments(parser, limit=400)
    arguments.add_codec_arguments(parser)
    arguments.add_copy_argument(parser, "its entropy model")
    parser.add_argument("--static", action="store_true", help="count values, without training")
    arguments.add_training_arguments(parser, "entropy")
    arguments.add_json_argument(parser)


def check(args: argparse.Namespace) -> None:
    arguments.check_training(args, not args.static, "leave it or `static` out")
