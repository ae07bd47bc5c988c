"""Add the nodes of latent-codec to a ComfyUI: any codec as a VAE, live previews
while it samples, compressed files, priors, and comparisons of codecs.

Writes one file of two lines, PATH/custom_nodes/latent_codec_nodes.py, which
imports this package. ComfyUI's own Python must have it, too: install it there,
and run this verb there. Restart ComfyUI to see the nodes, in the category
`latent codec`. docs/comfyui.md shows them, examples/comfyui/ has workflows.

Examples:
  latent-codec comfyui install ~/ComfyUI
  latent-codec comfyui uninstall ~/ComfyUI
"""

import argparse

from latent_codec.cli import arguments
from latent_codec.cli.comfyui_uninstall import add_path_argument


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_path_argument(parser)
    arguments.add_json_argument(parser)
