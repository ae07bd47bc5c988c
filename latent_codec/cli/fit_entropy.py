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
from pathlib import Path

from latent_codec.cli.arguments import (
    add_codec_arguments,
    add_data_arguments,
    add_json_argument,
    check_at_least,
    check_paths,
)
from latent_codec.errors import SettingError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_data_arguments(parser, limit=400)
    add_codec_arguments(parser)
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="copy the codec here, with its entropy model, instead of writing to --codec",
    )
    parser.add_argument("--static", action="store_true", help="count values, without training")
    parser.add_argument(
        "--run",
        dest="run_folder",
        type=Path,
        metavar="RUN",
        help="train in this run folder (default: runs/CODEC-entropy)",
    )
    parser.add_argument(
        "--minutes", type=float, help="checkpoint and stop after this many minutes; the same command resumes"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="section.key=value",
        help="override a setting of the training; repeatable",
    )
    add_json_argument(parser)


def check(args: argparse.Namespace) -> None:
    check_paths(args.data)
    check_at_least(args, limit=1)
    if args.minutes is not None and args.minutes <= 0:
        raise SettingError("minutes", "above 0", args.minutes)
    for setting in ("run_folder", "minutes", "set"):
        if args.static and getattr(args, setting):
            advice = "leave it or `static` out"
            raise SettingError(setting, "none without training", getattr(args, setting), advice=advice)
