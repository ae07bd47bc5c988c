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

from latent_codec.cli import arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_data_arguments(
        parser,
        nargs="*",
        limit="24, or 96 where colors depend on neighboring latents",
        what=" (default: none, random latents)",
    )
    arguments.add_codec_arguments(parser)
    arguments.add_copy_argument(parser, "its preview")
    parser.add_argument("--tiny", action="store_true", help="train a tiny decoder as well, on DATA")
    arguments.add_training_arguments(parser, "preview")
    arguments.add_json_argument(parser)


def check(args: argparse.Namespace) -> None:
    if args.tiny and not args.data:
        raise ValueError("--tiny learns from images: name some as DATA")
    arguments.check_training(args, args.tiny, "leave it out, or add `tiny`")
