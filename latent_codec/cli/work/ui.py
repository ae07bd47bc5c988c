"""`latent-codec ui`."""

import argparse
import signal
import sys
import threading
import time
from contextlib import suppress

from latent_codec.cli.progress import showing
from latent_codec.cli.work.opening import device_of
from latent_codec.cli.work.printing import print_json
from latent_codec.ui.desk import Desk
from latent_codec.ui.serving import LOOPBACK, serve


def run(args: argparse.Namespace) -> None:
    with showing("starting the page"):
        desk = Desk(args.codec, args.pipeline, image=args.image, device=device_of(args))
        try:
            page, url = serve(desk, host=args.host, port=args.port, opens_browser=args.open)
        except BaseException:
            desk.close()
            raise
    threading.Thread(target=desk.warm_up, daemon=True).start()
    try:
        if args.json:
            print_json({"url": url, "codecs": list(desk.codecs), "pipelines": list(desk.pipelines)})
        else:
            print(f"{url} (Ctrl-C ends it)")
        sys.stdout.flush()
        if args.host not in LOOPBACK:
            print(
                f"Note: everybody who reaches {args.host} can use the page; 127.0.0.1 is this machine only",
                file=sys.stderr,
            )
        _wait(page)
    finally:
        page.close()
        desk.close()


def _wait(page) -> None:
    """Until somebody ends it, which is no error."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with suppress(KeyboardInterrupt):
        while page.is_running:
            time.sleep(0.2)
