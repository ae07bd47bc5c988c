"""Send images through a codec and back, and show what is lost.

For each image NAME it writes NAME-roundtrip.png: original | reconstruction |
difference, where mid-gray means equal. A denoising codec shows the image
denoised. Of a codec with a codebook it prints the shape of the indices and the
bits per pixel that they take at fixed length, log2(codebook size) each; with
several levels it also writes NAME-levels.png, the image from the top level
only to all of them. Of a.png and a.jpg in one folder both keep their suffix in
NAME; images of other data sets have their number.

Gray images of more than 8 bits, DICOM and NIfTI are compared in their own
units, and the reconstruction is also written in them: NAME-decoded.png (16
bits), .tif or .nii.gz, for volumes one file with all slices.

Of recordings (audio:) the images are spectrograms, one below the other, and
NAME-decoded.wav is the sound of the second, with its .png.

Sizes are height x width. An image that cannot be read is left out and named on
stderr; the exit status is then 2.

Examples:
  latent-codec roundtrip                  the sample photograph of matplotlib
  latent-codec roundtrip cat.jpg dog.png  images of your own, a line each
  latent-codec roundtrip photos/ --codec runs/mine --out results
  latent-codec roundtrip audio:talk.wav --codec runs/speech
"""

import argparse

from latent_codec.cli import arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_data_arguments(parser, nargs="*", what=" (default: a sample photograph)")
    parser.add_argument(
        "--out", default=".", metavar="DIR", help="write the images here (default: the current folder)"
    )
    arguments.add_codec_arguments(parser)
    arguments.add_vocoder_argument(parser)
    arguments.add_window_argument(parser, "show the images")
    arguments.add_tile_argument(parser)
    arguments.add_json_argument(parser)
