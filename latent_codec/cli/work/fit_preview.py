"""`latent-codec fit-preview`."""

import argparse
import contextlib
import sys
from pathlib import Path

from latent_codec.cli.progress import showing
from latent_codec.cli.work.codec_copies import folder_for_sidecar
from latent_codec.cli.work.opening import load_codec, open_data, open_latents
from latent_codec.cli.work.printing import print_json
from latent_codec.errors import SettingError
from latent_codec.latents.data_set import LatentDataset
from latent_codec.previews.fitting import fit_linear
from latent_codec.previews.preview_files import NAME, StoredPreview, read_preview, write_preview
from latent_codec.training import loop
from latent_codec.training.config import load_config
from latent_codec.training.report import read_metrics
from latent_codec.training.tiny_decoder_task import build_tiny_decoder


def run(args: argparse.Namespace) -> None:
    codec = load_codec(args)
    source = (open_latents(args, codec) or open_data(args)) if args.data else None
    if args.tiny and isinstance(source, LatentDataset):
        raise SettingError("tiny", "images, on which a tiny decoder is trained; leave it out of latents")
    folder = folder_for_sidecar(args.codec, codec, args.out)
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
        config = load_config("tiny-preview", args.set, args.codec, codec.pipeline)
        out = args.run_folder or Path(f"runs/{codec.name.replace('/', '-')}-preview")
        network = build_tiny_decoder(config, source, codec)
        result = loop.train(config, network, source, out, codec=codec, max_minutes=args.minutes)
        psnr = (read_metrics(out) or [{}])[-1].get("psnr")
        found["tiny"] = {"step": result.step, "finished": result.finished, "psnr": psnr}
        if result.finished and result.is_main_process:
            tiny = result.network.cpu()
            write_preview(path, codec, StoredPreview(fit.weight, fit.bias, fit.palette, tiny))
    elif tiny is not None:
        found["tiny"] = {"kept": True}
    if args.json:
        print_json(found)
    else:
        print(_report(found))


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
        lines.append(
            f"the tiny decoder stopped at step {tiny['step']}; the same command continues from there"
        )
    return "\n".join([*lines, f"Preview: {found['path']}"])
