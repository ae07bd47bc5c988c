"""`latent-codec comfyui install`."""

import argparse
import logging
import sys
from pathlib import Path

from latent_codec.cli.work.printing import print_json
from latent_codec.comfyui.installing import install

logger = logging.getLogger(__name__)


def run(args: argparse.Namespace) -> None:
    host = install(args.path)
    if host.environment is not None and Path(sys.prefix).resolve() != host.environment:
        logger.warning(
            "Note: ComfyUI seems to run in %s, and this is %s: install latent-codec there, too",
            host.environment,
            sys.prefix,
        )
    if args.json:
        print_json({"path": str(host.file), "version": host.version})
        return
    version = f"ComfyUI {host.version}" if host.version else "ComfyUI"
    print(f"{host.file}: the nodes of latent-codec for {version}; restart it to see them")
