"""Fit previews to a codec: images of its latents, in a fraction of its
decoder's time.

Everything goes into preview.safetensors in the codec's folder, where
LatentPreviewer.from_pretrained finds it. Of a discrete codec it holds the
colors of the codewords, too. A tiny decoder that was trained for the same
codec before is kept.

--tiny is `latent-codec train tiny-preview`, with its run folder in --run; the
same command continues a run that was stopped. A shipped codec, one from the
hub and a single file are never changed: --out names a folder for a copy.

Examples:
  latent-codec fit-preview photos/ --codec runs/mine
                                   a linear map from latents to RGB, in seconds
  latent-codec fit-preview --codec runs/mine
                                   without images, from random latents
  latent-codec fit-preview photos/ --codec runs/mine --tiny
                                   trains a tiny decoder as well
  latent-codec fit-preview --codec stabilityai/sd-vae-ft-mse --out mine
"""

import argparse
from pathlib import Path

from latent_codec.cli.arguments import (
    add_codec_arguments,
    add_data_arguments,
    add_json_argument,
    check_at_least,
)
from latent_codec.errors import SettingError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_data_arguments(parser, nargs="*", limit=24, what=" (default: none, random latents)")
    add_codec_arguments(parser)
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="copy the codec here, with its preview, and leave --codec as it is (default: into --codec)",
    )
    parser.add_argument("--tiny", action="store_true", help="train a tiny decoder as well, on DATA")
    parser.add_argument(
        "--run",
        dest="run_folder",
        type=Path,
        metavar="RUN",
        help="train --tiny in this run folder (default: runs/CODEC-preview)",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        metavar="M",
        help="write a checkpoint and stop --tiny after M minutes; the same command continues (default: to its last step)",
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="section.key=value", help="override a setting of --tiny"
    )
    add_json_argument(parser)


def check(args: argparse.Namespace) -> None:
    check_at_least(args, limit=1)
    if args.tiny and not args.data:
        raise ValueError("--tiny learns from images: name some as DATA")
    if args.minutes is not None and args.minutes <= 0:
        raise SettingError("minutes", "a number above 0", args.minutes)
    for flag, value in (("run", args.run_folder), ("minutes", args.minutes), ("set", args.set)):
        if value and not args.tiny:
            raise ValueError(f"--{flag} is of --tiny, which is missing")
