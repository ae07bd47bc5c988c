"""`latent-codec comfyui uninstall`."""

import argparse

from latent_codec.cli.work.printing import print_json
from latent_codec.comfyui.installing import uninstall


def run(args: argparse.Namespace) -> None:
    host = uninstall(args.path)
    if args.json:
        print_json({"path": str(host.file), "version": host.version})
        return
    print(f"{host.file} is removed; restart ComfyUI")
