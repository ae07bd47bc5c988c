"""Take the nodes of latent-codec away from a ComfyUI again.

Removes the file that `comfyui install` wrote, unless it was changed since.

Examples:
  latent-codec comfyui uninstall ~/ComfyUI
"""

import argparse
from pathlib import Path

from latent_codec.cli import arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_path_argument(parser)
    arguments.add_json_argument(parser)


def add_path_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "path",
        type=Path,
        metavar="PATH",
        help="folder of a ComfyUI, or the base folder that it was told to use",
    ).must_exist = True
