"""`latent-codec fit-entropy`."""

import argparse
import contextlib
import sys
from pathlib import Path

from accelerate import PartialState

from latent_codec import LatentCodec
from latent_codec.bitstream import IndexContextEntropy, LatentContextEntropy, fit_static, load_entropy_model
from latent_codec.bitstream.entropy_model import FILE_NAME, EntropyModel
from latent_codec.bitstream.targets import RATE_WEIGHT
from latent_codec.cli.progress import showing
from latent_codec.cli.work.codec_copies import folder_for_sidecar
from latent_codec.cli.work.opening import limited, load_codec, open_data
from latent_codec.cli.work.printing import print_json
from latent_codec.images.batches import iter_images
from latent_codec.images.sources import ImageSource
from latent_codec.latents.encoded_images import encode_source, open_encoded
from latent_codec.training import loop
from latent_codec.training.config import load_config
from latent_codec.training.entropy_task import build_context, context_class
from latent_codec.training.processes import on_cpu, start_missing_processes
from latent_codec.training.report import read_metrics
from latent_codec.training.run_lock import lock_run

PRESETS = {"LatentContext": "latent-context", "IndexContext": "index-context"}


def run(args: argparse.Namespace) -> int:
    start_missing_processes()
    processes = PartialState(cpu=on_cpu())
    codec = load_codec(args)
    with processes.main_process_first():
        folder = folder_for_sidecar(args.codec, codec, args.out)
    source = limited(open_data(args), args.limit)
    found = {"codec": codec.name, "space_fingerprint": codec.space_fingerprint}
    if not args.static:
        model, fitted = _train(args, codec, source, processes)
    elif processes.is_main_process:
        model, fitted = _count(codec, source)
    if not processes.is_main_process:
        return 0
    found |= fitted
    if model is not None:
        found |= _save(model, folder / FILE_NAME)
    if args.json:
        print_json(found)
    else:
        print(_report(found))
    return 128 + found["signal"] if found.get("signal") else 0


def _save(model: EntropyModel, path: Path) -> dict:
    """Write the sidecar, and keep another model that was there; return facts to report."""
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


def _count(codec: LatentCodec, source: ImageSource) -> tuple[EntropyModel, dict]:
    """Fit a static model; return it with facts to report."""
    skipped: list[str] = []
    with showing("encoding") as report:
        images = iter_images(source, channels=codec.channels, on_skip=skipped.append, on_progress=report)
        model = fit_static(codec, (image for _, image in images))
    for line in skipped:
        print(f"skipped: {line}", file=sys.stderr)
    return model, {"images": len(source) - len(skipped)}


def _train(
    args: argparse.Namespace, codec: LatentCodec, source: ImageSource, processes: PartialState
) -> tuple[EntropyModel | None, dict]:
    """Train a context model; return it, None if the training is not at its end, with facts to report."""
    class_name = context_class(codec).__name__
    config = load_config(PRESETS[class_name], args.set, args.codec, codec.pipeline)
    out = args.run_folder or Path(f"runs/{codec.name.replace('/', '-')}-entropy")
    with lock_run(out):
        with processes.main_process_first(), showing("encoding") as report:
            files = encode_source(codec, source, out / "codes", labels=False, on_progress=report)
        encoded = open_encoded(files, codec=codec)
        with showing("surveying latents"):
            context = build_context(config, encoded, codec)
        result = loop.train(
            config,
            context,
            encoded,
            out,
            codec=codec,
            max_minutes=args.minutes,
            data_name=f"codes of {codec.name}",
        )
    last = (read_metrics(out) or [{}])[-1]
    facts = {
        "images": len(encoded),
        "run": str(out),
        "step": result.step,
        "finished": result.finished,
        "signal": result.signal,
        "bits_per_position": last.get("bits_per_position"),
        "held_out_bits_per_position": last.get("held_out_bits_per_position"),
    }
    if not (result.finished and result.is_main_process):
        return None, facts
    with showing("exporting the entropy model"):
        if class_name == "IndexContext":
            return IndexContextEntropy.export(result.network.cpu(), codec), facts
        return LatentContextEntropy.export(result.network.cpu(), codec, RATE_WEIGHT), facts


def _report(found: dict) -> str:
    count = "1 image" if found["images"] == 1 else f"{found['images']} images"
    lines = [f"{found['codec']}: fitted to {count}"]
    if found.get("bits_per_position") is not None:
        held_out = found["held_out_bits_per_position"]
        rest = "" if held_out is None else f", {held_out:.3f} of held-out images"
        lines.append(f"{found['bits_per_position']:.3f} bits per position of training windows{rest}")
    if "path" not in found:
        return "\n".join([*lines, f"stopped at step {found['step']}; the same command resumes there"])
    if found["kept"]:
        lines.append(f"The earlier model is kept as {found['kept']}, which opens its files")
    lines.append(
        f"Entropy model: {found['path']}, {found['bytes']:,} bytes, fingerprint {found['fingerprint']}"
    )
    return "\n".join(lines)
