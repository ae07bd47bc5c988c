"""`latent-codec calibrate`."""

import argparse
import sys
from pathlib import Path

import torch

from latent_codec import LatentCodec
from latent_codec.cli.progress import showing
from latent_codec.cli.work.codec_copies import own_folder
from latent_codec.cli.work.opening import load_codec, open_data, open_latents
from latent_codec.cli.work.printing import print_json, table
from latent_codec.components.codec_folders import find_weights, is_foreign_file
from latent_codec.components.loading import open_weights
from latent_codec.components.weight_files import check_folder_to_save
from latent_codec.conversion.foreign import read_foreign
from latent_codec.conversion.settings import given_settings
from latent_codec.evaluation.calibration import calibrate, usual_convention
from latent_codec.latents.locations import is_data_set


def run(args: argparse.Namespace) -> None:
    is_latents = all(map(is_data_set, args.data))
    source = None if is_latents else open_data(args)
    codec = load_codec(args)
    if is_latents:
        source = open_latents(args, codec)
    weights = Path(args.codec) if is_foreign_file(args.codec) else find_weights(args.codec)
    folder = check_folder_to_save(args.out or own_folder(args.codec))
    convention = args.convention or usual_convention(codec)
    before = codec.space_fingerprint

    with showing("calibrating") as report:
        measured = calibrate(codec, source, convention, limit=args.limit, on_progress=report)
    for reason in measured.skipped:
        print(f"skipped {reason}", file=sys.stderr)

    torch.nn.Module.to(codec.autoencoder, dtype=_stored_dtype(weights, args.config))
    codec.save_pretrained(folder)
    saved = LatentCodec.from_pretrained(folder, pipeline=codec.pipeline)
    found = {
        "codec": codec.name,
        "data": args.data,
        "convention": convention,
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
        print_json(found)
    else:
        _print_report(found, measured.parity_note)
        if not args.convention and saved.space_fingerprint == before:
            print("Scale and shift were as measured before, and stay.")


def _stored_dtype(weights: Path, config: Path | None) -> torch.dtype:
    """The half precision that all of the codec's weights have in their file, or float32; `config` is the one given for it."""
    if is_foreign_file(weights):
        foreign = read_foreign(weights, settings=None if config is None else given_settings(config))
        dtypes = {foreign.tensors[key].dtype for key in foreign.keys.mapped}
    else:
        dtypes = set(open_weights(weights).dtypes.values())
    return next((dtype for dtype in (torch.float16, torch.bfloat16) if dtypes == {dtype}), torch.float32)


def _print_report(found: dict, parity_note: str) -> None:
    measured, written = found["measured"], found["written"]
    print(f"{found['codec']}: {measured['num_images']} images, raw latents as measured")
    rows = [
        (str(channel), f"{mean:.4f}", f"{std:.4f}")
        for channel, (mean, std) in enumerate(zip(measured["mean"], measured["std"]))
    ]
    rows.append(("all", f"{measured['shift_factor']:.4f}", f"{1 / measured['scaling_factor']:.4f}"))
    table(("latent channel", "mean", "std"), rows, justify="r")
    rows = [
        (each["dtype"], "not finite", "all")
        if each["psnr"] is None
        else (each["dtype"], f"{each['psnr']:.2f} dB", f"{each['psnr_lost']:.3f} dB")
        for each in measured["parity"]
    ]
    table(("precision", "PSNR", "lost"), rows, justify="r")
    print(f"Precisions: of {parity_note}.")
    print(f"Largest activation: {measured['largest_activation']:.4g}; float16 ends at 65504.")
    print("Written: " + ", ".join(f"{key} {_short(value)}" for key, value in written.items()))
    if found["space_fingerprint"] != found["space_fingerprint_before"]:
        print(
            f"The latent space is another one ({found['space_fingerprint_before']} -> {found['space_fingerprint']}): "
            "latents made before no longer decode."
        )
    print(f"Codec: {found['path']}")


def _short(value) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_short, value))}]"
    return f"{value:.5g}" if isinstance(value, float) else str(value)
