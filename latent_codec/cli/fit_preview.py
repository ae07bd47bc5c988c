"""Fit previews to a codec: what its latents look like, in a fraction of the time that its decoder takes.

  latent-codec fit-preview --codec runs/mine --images photos/           seconds: a 1x1 map from latents to RGB
  latent-codec fit-preview --codec runs/mine                              without images, from random latents
  latent-codec fit-preview --codec runs/mine --images photos/ --tiny    trains a tiny decoder besides
  latent-codec fit-preview --codec stabilityai/sd-vae-ft-mse --out mine

Everything goes into preview.safetensors in the codec's folder, where LatentPreviewer.from_pretrained finds it. Of a
discrete codec it holds the colours of the codewords, too. A tiny decoder that was trained for the same codec before is kept.

--tiny is `latent-codec train tiny-preview`, with its run folder in --run; the same command goes on with a run that was
stopped. A shipped codec, one from the hub and a single file stay as they are: --out names a folder for a copy.
"""

import argparse
from pathlib import Path

from latent_codec import deprecated
from latent_codec.cli.arguments import (
    add_codec_arguments,
    add_json_argument,
    add_limit_argument,
    load_codec,
)
from latent_codec.cli.codec_copies import folder_for_sidecar
from latent_codec.cli.progress import showing


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_codec_arguments(parser)
    parser.add_argument(
        "--images",
        nargs="+",
        metavar="DATA",
        help="images to fit to: folders, webdataset tars, hf:owner/name (default: none, random latents)",
    )
    deprecated.add_old_flag(parser, "--pictures", nargs="+")
    parser.add_argument("--split", default="train", help="of data that has splits (default: train)")
    add_limit_argument(parser, 24)
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="copy the codec here, with its preview, and leave --codec alone",
    )
    parser.add_argument("--tiny", action="store_true", help="train a tiny decoder as well; needs --images")
    parser.add_argument(
        "--run",
        dest="run_folder",
        type=Path,
        metavar="RUN",
        help="run folder of --tiny (default: runs/CODEC-preview)",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        help="of --tiny: checkpoint and stop after this long; the same command goes on",
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="section.key=value", help="override a setting of --tiny"
    )
    add_json_argument(parser)


def run(args: argparse.Namespace) -> None:
    import contextlib
    import json
    import sys

    _check(args)

    from latent_codec.images.sources import open_source
    from latent_codec.previews.fitting import fit_linear
    from latent_codec.previews.preview_files import NAME, StoredPreview, read_preview, write_preview

    codec = load_codec(args)
    folder = folder_for_sidecar(args.codec, codec, args.out)
    source = None
    if args.images:
        source = open_source(args.images if len(args.images) > 1 else args.images[0], split=args.split)
    with showing("fitting") as report:
        fit = fit_linear(codec, source, num_images=args.limit, on_progress=report)
    for reason in fit.skipped:
        print(f"skipped {reason}", file=sys.stderr)

    path, tiny = folder / NAME, None
    if path.is_file():
        with contextlib.suppress(ValueError):  # of what this codec was before, or damaged
            tiny = read_preview(path, codec).tiny
    write_preview(path, codec, StoredPreview(fit.weight, fit.bias, fit.palette, tiny))
    found = {
        "codec": codec.name,
        "fingerprint": codec.fingerprint,
        "path": str(path),
        "images": fit.num_images,
        "seconds": fit.seconds,
        "correlation": fit.correlation,
        "palette_correlation": fit.palette_correlation,
    }
    if args.tiny:
        result, last = _train_tiny(args, codec, source)
        found["tiny"] = {"step": result.step, "finished": result.finished, "psnr": last.get("psnr")}
        if result.finished and result.is_main_process:
            tiny = result.network.cpu()
            write_preview(path, codec, StoredPreview(fit.weight, fit.bias, fit.palette, tiny))
    elif tiny is not None:
        found["tiny"] = {"kept": True}
    print(json.dumps(found, indent=1, allow_nan=False) if args.json else _report(found))


def _check(args: argparse.Namespace) -> None:
    """Refuse flags that do not go together, before the codec is loaded."""
    if args.limit < 1:
        raise ValueError(f"--limit is {args.limit}; at least 1")
    if args.tiny and not args.images:
        raise ValueError("--tiny learns from images: name some by --images")
    if args.minutes is not None and args.minutes <= 0:
        raise ValueError(f"--minutes is {args.minutes}; above 0")
    for flag, value in (("run", args.run_folder), ("minutes", args.minutes), ("set", args.set)):
        if value and not args.tiny:
            raise ValueError(f"--{flag} is of --tiny, which is missing")


def _train_tiny(args: argparse.Namespace, codec, source):
    """Train the preset; how it ended, and the last line of its metrics."""
    from latent_codec.training import loop
    from latent_codec.training.config import load_config
    from latent_codec.training.report import read_metrics
    from latent_codec.training.tiny_decoder_task import build_tiny_decoder

    config = load_config("tiny-preview", args.set, args.codec)
    out = args.run_folder or Path(f"runs/{codec.name.replace('/', '-')}-preview")
    try:
        result = loop.train(config, build_tiny_decoder(config, source), source, out, max_minutes=args.minutes)
    except loop.NonFiniteLossError as error:
        raise ValueError(str(error)) from error
    return result, (read_metrics(out) or [{}])[-1]


def _report(found: dict) -> str:
    number = found["images"]
    fitted_to = f"{number} image{'s' * (number > 1)}" if number else "random latents"
    lines = [f"{found['codec']}: linear preview fitted to {fitted_to} in {found['seconds']:.1f} s"]
    for name, what in (("correlation", "latents"), ("palette_correlation", "indices")):
        if found[name] is not None:
            lines.append(
                f"from {what}: correlation {found[name]:.3f} with the downscaled decode, on held-out images"
            )
    tiny = found.get("tiny", {})
    if tiny.get("kept"):
        lines.append("the tiny decoder that was there is kept")
    elif tiny and tiny["finished"]:
        lines.append(
            f"tiny decoder: {tiny['step']} steps, {tiny['psnr']:.2f} dB to the codec's own decode of training crops"
        )
    elif tiny:
        lines.append(f"the tiny decoder stopped at step {tiny['step']}; the same command goes on from there")
    return "\n".join([*lines, f"Preview: {found['path']}"])
