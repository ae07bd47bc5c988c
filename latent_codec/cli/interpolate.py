"""Morph one image into the next, through the latents between them.

DATA is two images or more, in this order. Writes a strip to --out: for each
image after the first a row, from the one before to this one. With --animation
also a WebP or MP4 (which ffmpeg writes) of all frames.

What you see depends on the codec. With one vector per image (garments, or what
the presets fashion-mnist-global and faces-global train) the images between
are images of their kind; such a codec gets the middle square of each image, of
the size that it was trained on. With a grid of latents every position blends
with its own, so that the two images cross-fade. The codewords of a discrete
codec are blended before they are quantized.

Linear paths lead through latents nearer to the mean than those of images are;
spherical ones stay as far from it as these.

Recordings (audio:) become sounds: of each frame also a .wav file and a .png of
its spectrum, morph-0.wav and so on. A shorter one is followed by silence.

Examples:
  latent-codec interpolate boot.png bag.png --codec garments
  latent-codec interpolate fashion_mnist/ --split test --index 0 2 1 \\
      --codec garments --steps 12 --animation morph.webp
  latent-codec interpolate cat.jpg dog.jpg --codec default-vq --steps 5
  latent-codec interpolate audio:yes.wav audio:no.wav --codec runs/speech
"""

import argparse
from pathlib import Path

from latent_codec.cli import arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_data_arguments(parser)
    arguments.add_index_argument(parser)
    parser.add_argument(
        "--steps",
        type=int,
        default=9,
        metavar="N",
        help="show N images from one image to the next, both included (default: %(default)s)",
    ).least = 2
    parser.add_argument(
        "--way",
        choices=("linear", "spherical"),
        default="linear",
        help="walk in a straight line, or on an arc around the origin (default: %(default)s)",
    )
    arguments.add_out_argument(parser, "morph.png", "the strip", "IMAGE")
    parser.add_argument(
        "--animation", type=Path, metavar="FILE", help="write all frames here, .webp or .mp4 (default: none)"
    )
    arguments.add_vocoder_argument(parser)
    arguments.add_codec_arguments(parser)
    arguments.add_json_argument(parser)
