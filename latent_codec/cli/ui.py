"""Open a page in the browser to try codecs by hand.

Round trip: an image through a codec and back. Compare: codecs, JPEG, WebP and
AVIF at equal bytes. Compress: an image to a .lcf file, and what each section
of it shows. Latents: look at them, morph, turn them, complete them by a prior.
Watch: a pipeline of diffusers as it draws.

The page works without a network. It is served to this machine only, unless
--host says otherwise; whoever reaches it can use the codecs and pipelines that
it was started with, and can read no other file. It needs the extra [ui]:
pip install "latent-codec[ui]". Ctrl-C ends it.

Examples:
  latent-codec ui --open                      with the shipped codecs
  latent-codec ui cat.jpg                     and an image of your own
  latent-codec ui --codec runs/mine runs/sharper
  latent-codec ui --pipeline my-pipeline      watch one of your own
"""

import argparse
from importlib.util import find_spec
from pathlib import Path

from latent_codec.cli import arguments
from latent_codec.errors import SettingError

PORT = 7860


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "image",
        nargs="?",
        type=Path,
        metavar="IMAGE",
        help="open with this image (default: a sample photograph)",
    ).must_exist = True
    parser.add_argument(
        "--codec",
        nargs="+",
        default=[],
        metavar="NAME_OR_PATH",
        help="offer these codecs, too, and choose the first: run, diffusers or pipeline folders, checkpoint files, hub ids "
        "(default: the shipped ones, default, default-16, default-eq, default-rd, default-vq and garments)",
    )
    parser.add_argument(
        "--pipeline",
        nargs="+",
        type=Path,
        default=[],
        metavar="FOLDER",
        help="offer these pipelines of diffusers to watch (default: a small one with random weights)",
    ).must_exist = True
    parser.add_argument(
        "--host", default="127.0.0.1", help="serve to this address (default: 127.0.0.1, this machine only)"
    )
    parser.add_argument(
        "--port",
        type=int,
        default=PORT,
        metavar="N",
        help=f"serve at this port, or the next free one (default: {PORT})",
    ).least = 1
    parser.add_argument("--open", action="store_true", help="open the page in the browser")
    arguments.add_device_argument(parser)
    arguments.add_json_argument(parser)


def check(args: argparse.Namespace) -> None:
    if args.port > 65535:
        raise SettingError("port", "at most 65535", args.port)
    if find_spec("gradio") is None:
        raise ValueError('the page needs gradio: pip install "latent-codec[ui]"')
