"""Fit an entropy model to a codec: how likely its values are, which decides how small its compressed files get.

  latent-codec fit-entropy photos/ --codec runs/mine                 trains a context model, in a quarter of an hour
  latent-codec fit-entropy photos/ --codec default --out mine        the shipped codec, copied to mine/
  latent-codec fit-entropy photos/ --codec runs/mine --static        counts alone, in a minute: larger files

Everything goes into entropy.safetensors in the codec's folder, where compress, decompress and rd find it. One model serves
all rates of a codec. Files are bound to it: another model, even of the same codec, does not open them. So one that was there
is kept as entropy-FINGERPRINT.safetensors, by which `decompress --entropy` opens its files.

The context model is `latent-codec train latent-context` (or index-context, of a codec with a codebook), with its run folder in
--run; the same command goes on with a run that was stopped. A shipped codec, one from the hub and a single file stay as they
are: --out names a folder for a copy.
"""

import argparse
import contextlib
import sys
from pathlib import Path

from latent_codec.cli.arguments import (
    add_codec_arguments,
    add_data_argument,
    add_json_argument,
    add_limit_argument,
    load_codec,
)
from latent_codec.cli.codec_copies import folder_for_sidecar
from latent_codec.cli.progress import showing

PRESETS = {"LatentContext": "latent-context", "IndexContext": "index-context"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_data_argument(parser)
    add_codec_arguments(parser)
    parser.add_argument("--split", default="train", help="of data that has splits (default: train)")
    add_limit_argument(parser, 400)
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="copy the codec here, with its entropy model, and leave --codec alone",
    )
    parser.add_argument("--static", action="store_true", help="count values alone, and train nothing")
    parser.add_argument(
        "--run", dest="run_folder", type=Path, metavar="RUN", help="run folder (default: runs/CODEC-entropy)"
    )
    parser.add_argument(
        "--minutes", type=float, help="checkpoint and stop after this long; the same command goes on"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="section.key=value",
        help="override a setting of the training",
    )
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    import json

    _check(args)

    from latent_codec.training.processes import on_cpu, start_missing_processes

    start_missing_processes()

    from accelerate import PartialState

    from latent_codec.images.sources import SomeImages, open_source, spread

    processes = PartialState(cpu=on_cpu())
    is_main_process = processes.is_main_process
    codec = load_codec(args)
    with processes.main_process_first():
        folder = folder_for_sidecar(args.codec, codec, args.out)
    source = open_source(args.data if len(args.data) > 1 else args.data[0], split=args.split)
    if len(source) > args.limit:
        source = SomeImages(source, spread(len(source), args.limit))
    found = {"codec": codec.name, "space_fingerprint": codec.space_fingerprint}
    if args.static:
        model, fitted = _count(codec, source) if is_main_process else (None, {})
    else:
        model, fitted = _train(args, codec, source, processes)
    if not is_main_process:
        return 0
    found |= fitted
    if model is not None:
        found |= _save(model, folder / "entropy.safetensors")
    print(json.dumps(found, indent=1, allow_nan=False) if args.json else _report(found))
    return 128 + found["signal"] if found.get("signal") else 0


def _check(args: argparse.Namespace) -> None:
    """Refuse flags that do not go together, before the codec is loaded."""
    if args.limit < 1:
        raise ValueError(f"--limit is {args.limit}; at least 1")
    if args.minutes is not None and args.minutes <= 0:
        raise ValueError(f"--minutes is {args.minutes}; above 0")
    for flag, value in (("run", args.run_folder), ("minutes", args.minutes), ("set", args.set)):
        if value and args.static:
            raise ValueError(f"--{flag} is of a training, and --static trains nothing: leave one of them out")


def _save(model, path: Path) -> dict:
    """Write the sidecar, beside another one that was there; what to report."""
    from latent_codec.bitstream import load_entropy_model

    kept = None
    if path.is_file():
        with contextlib.suppress(ValueError):  # damaged
            before = load_entropy_model(path)
            if before.fingerprint != model.fingerprint:
                kept = path.with_name(f"entropy-{before.fingerprint}.safetensors")
                before.save(kept)
    model.save(path)
    return {
        "path": str(path),
        "bytes": path.stat().st_size,
        "fingerprint": model.fingerprint,
        "kept": None if kept is None else str(kept),
    }


def _count(codec, source):
    """The tables of order 0, and what to report."""
    from latent_codec.bitstream import fit_static
    from latent_codec.images.batches import iter_images

    skipped: list[str] = []
    with showing("encoding") as report:
        images = iter_images(source, channels=codec.channels, on_skip=skipped.append, on_progress=report)
        model = fit_static(codec, (image for _, image in images))
    for line in skipped:
        print(f"skipped: {line}", file=sys.stderr)
    return model, {"images": len(source) - len(skipped)}


def _train(args: argparse.Namespace, codec, source, processes):
    """Train the preset; the model, None if the training is not at its end, and what to report."""
    from latent_codec.bitstream import IndexContextEntropy, LatentContextEntropy
    from latent_codec.bitstream.targets import RATE_WEIGHT
    from latent_codec.latents.encoded_images import encode_source, open_encoded
    from latent_codec.training import loop
    from latent_codec.training.config import load_config
    from latent_codec.training.entropy_task import build_context, context_class
    from latent_codec.training.report import read_metrics
    from latent_codec.training.run_lock import lock_run

    class_name = context_class(codec).__name__
    config = load_config(PRESETS[class_name], args.set, args.codec)
    out = args.run_folder or Path(f"runs/{codec.name.replace('/', '-')}-entropy")
    try:
        with lock_run(out):
            with processes.main_process_first(), showing("encoding") as report:
                files = encode_source(codec, source, out / "codes", labels=False, on_progress=report)
            encoded = open_encoded(files, codec=codec)
            with showing("surveying latents"):
                context = build_context(config, encoded, codec)
            result = loop.train(
                config, context, encoded, out, max_minutes=args.minutes, data_name=f"codes of {codec.name}"
            )
    except loop.NonFiniteLossError as error:
        raise ValueError(str(error)) from error
    last = (read_metrics(out) or [{}])[-1]
    found = {
        "images": len(encoded),
        "run": str(out),
        "step": result.step,
        "finished": result.finished,
        "signal": result.signal,
        "bits_per_position": last.get("bits_per_position"),
        "held_out_bits_per_position": last.get("held_out_bits_per_position"),
    }
    if not (result.finished and result.is_main_process):
        return None, found
    context = result.network.cpu()
    with showing("exporting the entropy model"):
        if class_name == "IndexContext":
            return IndexContextEntropy.export(context, codec), found
        return LatentContextEntropy.export(context, codec, RATE_WEIGHT), found


def _report(found: dict) -> str:
    count = "1 image" if found["images"] == 1 else f"{found['images']} images"
    lines = [f"{found['codec']}: fitted to {count}"]
    if found.get("bits_per_position") is not None:
        held_out = found["held_out_bits_per_position"]
        beside = "" if held_out is None else f", {held_out:.3f} of images held out"
        lines.append(f"{found['bits_per_position']:.3f} bits per position of training windows{beside}")
    if "path" not in found:
        return "\n".join([*lines, f"stopped at step {found['step']}; the same command goes on from there"])
    if found["kept"]:
        lines.append(f"The model that was there opens its files still: it is kept as {found['kept']}")
    lines.append(
        f"Entropy model: {found['path']}, {found['bytes']:,} bytes, fingerprint {found['fingerprint']}"
    )
    return "\n".join(lines)
