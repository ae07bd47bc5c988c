"""Measure a codec's latents and its half-precision safety on images, and write both into its config.

  latent-codec calibrate photos/ --codec runs/mine                  scaling_factor and shift_factor
  latent-codec calibrate photos/ --codec runs/mine --normalize      mean 0, std 1 for every pipeline
  latent-codec calibrate photos/ --codec stabilityai/sd-vae-ft-mse --out calibrated --keep-space

Mean and standard deviation of every latent channel are measured (posterior noise included), the
largest activation, and what bfloat16 and float16 lose against float32: force_upcast tells
pipelines that float16 is not safe. Scale and shift can be written in three ways:

  (default)      one scaling_factor and one shift_factor for all channels: Stable Diffusion 3 and
                 FLUX read both, Stable Diffusion 1 and 2 the scale alone
  --per-channel  latents_mean and latents_std, with a scale of 1: read by SDXL's pipelines alone
  --normalize    mean and std folded into the weights of quant_conv and post_quant_conv, so that
                 every pipeline agrees; images come back as before

All three change the latents: those made before no longer decode, and a denoiser trained on them
no longer fits. --keep-space leaves them alone and writes force_upcast only. Where scale and shift are
already those measured, the default leaves them alone too.

A codec's own folder is updated in place, complete or not at all, its weights stored in the precision
they had. A shipped codec, one from the hub and a single file stay as they are: name --out.
"""

import argparse
from pathlib import Path

from latent_codec.cli.arguments import (
    add_codec_arguments,
    add_data_argument,
    add_json_argument,
    add_limit_argument,
    load_codec,
)
from latent_codec.cli.progress import showing


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_data_argument(parser)
    add_codec_arguments(parser)
    parser.add_argument("--split", default="train", help="of data that has splits (default: train)")
    add_limit_argument(parser, 256)
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="write the calibrated codec here, and leave --codec alone"
    )
    conventions = parser.add_mutually_exclusive_group()
    for flag, convention, text in (
        ("--normalize", "normalize", "fold mean and std into the weights"),
        ("--per-channel", "channels", "write latents_mean and latents_std"),
        ("--keep-space", "keep", "leave the latents as they are; write force_upcast only"),
    ):
        conventions.add_argument(flag, dest="convention", action="store_const", const=convention, help=text)
    parser.set_defaults(convention="scale")
    add_json_argument(parser)


def run(args: argparse.Namespace) -> None:
    import json
    import sys

    if args.dtype != "float32":
        raise ValueError(f"--dtype is {args.dtype}; float32 is measured, and the others against it")

    from latent_codec import LatentCodec
    from latent_codec.components.codec_folders import find_weights, is_foreign_file
    from latent_codec.components.weight_files import check_folder_to_save
    from latent_codec.evaluation.calibration import calibrate
    from latent_codec.images.sources import open_source

    source = open_source(args.data[0] if len(args.data) == 1 else args.data, split=args.split)
    codec = load_codec(args)
    weights = Path(args.codec) if is_foreign_file(args.codec) else find_weights(args.codec)
    folder = check_folder_to_save(args.out or _own_folder(args.codec, weights))
    before = codec.space_fingerprint

    with showing("calibrating") as report:
        measured = calibrate(codec, source, args.convention, limit=args.limit, on_progress=report)
    for reason in measured.skipped:
        print(f"skipped {reason}", file=sys.stderr)

    _save(codec, folder, _stored_dtypes(weights, args.config))
    saved = LatentCodec.from_pretrained(folder)
    found = {
        "codec": codec.name,
        "data": args.data,
        "convention": args.convention,
        "measured": measured.to_dict(),
        "written": {
            **saved.latent_space.to_config(),
            "force_upcast": bool(saved.autoencoder.config.get("force_upcast")),
        },
        "space_fingerprint_before": before,
        "space_fingerprint": saved.space_fingerprint,
        "path": str(args.out or folder),
    }
    if args.json:
        print(json.dumps(found, indent=1, allow_nan=False))
    else:
        _print_report(found, measured.parity_note)
        if args.convention == "scale" and saved.space_fingerprint == before:
            print("Scale and shift were as measured before, and stay.")


def _own_folder(name: str, weights: Path) -> Path:
    """The codec's folder, if the person who named the codec named a folder of theirs.

    Raises:
        ValueError: for a shipped codec, one from the hub, or a file.
    """
    if not weights.resolve().is_relative_to(Path(name).resolve()) or Path(name).is_file():
        raise ValueError(
            f"{name} is a shipped codec, one from the hub or a single file, and stays as it is; "
            "give --out DIR for the calibrated copy"
        )
    return weights.parent


def _stored_dtypes(weights: Path, config: Path | None) -> set:
    """Dtypes of the codec's weights in their file, whatever else is in it; `config` is the one given for it."""
    from latent_codec.components.codec_folders import is_foreign_file
    from latent_codec.components.loading import open_weights

    if not is_foreign_file(weights):
        return set(open_weights(weights).dtypes.values())
    from latent_codec.conversion.foreign import read_foreign
    from latent_codec.conversion.settings import given_settings

    foreign = read_foreign(weights, settings=None if config is None else given_settings(config))
    return {foreign.tensors[key].dtype for key in foreign.keys.mapped}


def _save(codec, folder: Path, dtypes: set) -> None:
    """Save in the precision in which the weights were stored, so that a half-precision codec stays half as large."""
    import torch

    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    if dtype not in (torch.float16, torch.bfloat16):
        dtype = torch.float32
    torch.nn.Module.to(codec.autoencoder, dtype=dtype)
    codec.save_pretrained(folder)


def _print_report(found: dict, parity_note: str) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    measured, written = found["measured"], found["written"]
    latents = Table(box=box.SIMPLE)
    for heading in ("latent channel", "mean", "std"):
        latents.add_column(heading, justify="right")
    for channel, (mean, std) in enumerate(zip(measured["mean"], measured["std"])):
        latents.add_row(str(channel), f"{mean:.4f}", f"{std:.4f}")
    latents.add_row("all", f"{measured['shift_factor']:.4f}", f"{1 / measured['scaling_factor']:.4f}")

    precisions = Table(box=box.SIMPLE)
    for heading in ("precision", "PSNR", "lost"):
        precisions.add_column(heading, justify="right")
    for each in measured["parity"]:
        if each["psnr"] is None:
            precisions.add_row(each["dtype"], "not finite", "all")
        else:
            precisions.add_row(each["dtype"], f"{each['psnr']:.2f} dB", f"{each['psnr_lost']:.3f} dB")

    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(f"{found['codec']}: {measured['num_images']} images, raw latents as measured")
    console.print(latents)
    console.print(precisions)
    console.print(f"Precisions: of {parity_note}.")
    console.print(f"Largest activation: {measured['largest_activation']:.4g}; float16 ends at 65504.")
    console.print("Written: " + ", ".join(f"{key} {_short(value)}" for key, value in written.items()))
    if found["space_fingerprint"] != found["space_fingerprint_before"]:
        console.print(
            f"The latent space is another one ({found['space_fingerprint_before']} -> {found['space_fingerprint']}): "
            "latents made before no longer decode."
        )
    console.print(f"Codec: {found['path']}")


def _short(value) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_short, value))}]"
    return f"{value:.5g}" if isinstance(value, float) else str(value)
