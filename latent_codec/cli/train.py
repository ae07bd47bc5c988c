"""Train a codec, a prior, an entropy model, a classifier or a preview.

What is trained is a preset, or a TOML file of your own: copy one of
latent_codec/presets, change it and name the copy, or change single settings by
--set. Settings in steps shrink with `--set run.steps=100`.

The run folder receives config.toml (everything that decides the result),
metrics.jsonl, samples/, checkpoints/, codec/ and, at the end, curves.png.
codec/ is a diffusers folder with the averaged weights, ready for
`--codec runs/mine`: written with each checkpoint and when the run is stopped,
and calibrated at the end; until then its model card says that it is
unfinished. A prior's run has prior/ instead, a classifier's classifier/.

The same command resumes a run that was stopped or killed, to the same weights.
Ctrl-C and SIGTERM stop after the current step, with a checkpoint; one process
at a time trains in a run folder. Exit status: 0 at the end and after
--minutes, 130 after Ctrl-C, 143 after SIGTERM (under a launcher, the
launcher's own), 2 with one line where the input was at fault.

Several processes or machines: `accelerate launch --num_processes 2 -m
latent_codec.cli train ...`. Every process takes `optimizer.batch_size` images,
so that two processes make the step of one with twice the batch.

Examples:
  latent-codec train --list
  latent-codec train autoencoder --data photos/ --out runs/mine
  latent-codec train autoencoder --data photos/ --out runs/mine --minutes 5
  latent-codec train finetune-decoder --data photos/ --codec default
  latent-codec train beta-vae --data photos/ --set objective.kl_weight=10
  latent-codec train pixelsnail-faces --data faces.tar --codec runs/faces
"""

import argparse
import sys
from pathlib import Path

from latent_codec.cli.arguments import add_subfolder_argument
from latent_codec.cli.progress import showing

FIRST_IMAGES = 64  # at least as many of a stream are kept, for the samples and a linear start


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "preset", metavar="PRESET", nargs="?", help="a shipped preset's name, or a .toml file"
    )
    parser.add_argument(
        "--list",
        action="store_true",
        help="list the shipped presets: what each trains, and how long that takes",
    )
    parser.add_argument(
        "--data",
        nargs="+",
        metavar="DATA",
        help="folders, webdataset tars, an IDX folder (Fashion-MNIST), or hf:owner/name",
    )
    parser.add_argument(
        "--out", dest="run_folder", type=Path, metavar="RUN", help="run folder (default: runs/PRESET)"
    )
    parser.add_argument(
        "--codec",
        metavar="NAME_OR_PATH",
        help="the codec to start from or to learn from (default: the preset's)",
    )
    add_subfolder_argument(parser)
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="section.key=value",
        help="override one setting, such as run.steps=500; repeatable",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        help="checkpoint and stop after this many minutes; the same command goes on (default: none)",
    )
    parser.add_argument(
        "--stream",
        action="store_true",
        help="read hf:owner/name while training, without downloading it first",
    )
    parser.add_argument("--split", default="train", help="split of the data set (default: train)")
    parser.add_argument(
        "--tracker",
        dest="trackers",
        action="append",
        default=[],
        metavar="NAME",
        help="tensorboard, wandb, ...; repeatable",
    )


def run(args: argparse.Namespace) -> int:
    from latent_codec.training.config import load_config, preset_names, preset_notes

    if args.list:
        for name in preset_names():
            notes = preset_notes(name)
            print(f"{name}\n    {notes.summary}.\n    Duration: {notes.duration}.")
        return 0
    if not args.preset:
        raise ValueError(f"name a preset ({', '.join(preset_names())}) or a .toml file.")
    config = load_config(args.preset, args.set, args.codec)
    if not args.data:
        raise ValueError("--data is missing: a folder of images, tars, an IDX folder or hf:owner/name.")
    if args.minutes is not None and args.minutes <= 0:
        raise ValueError(f"--minutes is {args.minutes}; above 0.")

    from latent_codec.training.processes import start_missing_processes

    start_missing_processes()

    from latent_codec.training.run_lock import lock_run

    out = args.run_folder or Path("runs") / Path(args.preset).name.removesuffix(".toml")
    with lock_run(out):
        return _train_and_finish(args, config, out)


def _train_and_finish(args: argparse.Namespace, config, out: Path) -> int:
    from latent_codec.training import loop
    from latent_codec.training.build import load_codec
    from latent_codec.training.finish import is_finished

    with showing("preparing the training"):
        codec = load_codec(config)
        source, stream = _open_data(args, config, out, codec)
        network = config.kind.load("build")(config, source, codec)
    data_name = ", ".join(map(_name, args.data))
    try:
        result = loop.train(
            config,
            network,
            source,
            out,
            codec=codec,
            stream=stream,
            trackers=tuple(args.trackers),
            max_minutes=args.minutes,
            data_name=data_name,
        )
    except loop.NonFiniteLossError as error:
        raise ValueError(str(error)) from error
    config = result.config
    if not result.is_main_process:
        return 0
    if result.skipped:
        names = ", ".join(result.skipped[:5]) + (", ..." if len(result.skipped) > 5 else "")
        print(f"{len(result.skipped)} image(s) could not be read: {names}", file=sys.stderr)
    folder = out / config.kind.name
    if not result.finished:
        print(f"wrote {folder}: the averaged weights so far", file=sys.stderr)
        print(f"stopped at step {result.step} of {config.run.steps}; the same command goes on from there.")
        return 128 + result.signal if result.signal else 0
    if is_finished(config, out, result.step):
        print(f"{out} is finished, all {result.step} steps of it.", file=sys.stderr)
        print(folder)
        return 0
    with showing("finishing the run") as report:
        finish = config.kind.load("finish")
        print(finish(config, result.network, source, out, data_name=data_name, on_progress=report))
    return 0


def _open_data(args: argparse.Namespace, config, out: Path, codec):
    """The images, or their codes, and the stream if there is to be one; then the images are its first."""
    from latent_codec.errors import SettingError
    from latent_codec.images.sources import open_source, open_stream
    from latent_codec.training.data import first_images

    kind = config.kind
    if args.stream and not kind.streams:
        raise SettingError(
            "stream", f"none for {config.model.class_name}, which trains on data at hand", True
        )
    if kind.learns_codes:
        return _encode_once(args, config, out, codec), None
    if not args.stream:
        return open_source(args.data, split=args.split), None
    if len(args.data) > 1:
        raise ValueError(f"--stream takes one dataset, hf:owner/name, not {', '.join(args.data)}.")
    stream = open_stream(args.data[0], split=args.split)
    count = max(config.run.calibration_images, FIRST_IMAGES)
    print(
        f"Note: samples and calibration take the first {count} images of the stream, whose length is not known",
        file=sys.stderr,
    )
    return first_images(stream, count, name=args.data[0]), stream


def _encode_once(args: argparse.Namespace, config, out: Path, codec):
    """Codes, computed by the main process where there are none yet; the images themselves for a prior over pixels."""
    from accelerate import PartialState

    from latent_codec.training.prior_data import open_codes
    from latent_codec.training.processes import on_cpu

    with PartialState(cpu=on_cpu()).main_process_first(), showing("encoding") as report:
        return open_codes(config, args.data, out, codec, split=args.split, on_progress=report)


def _name(data: str) -> str:
    """Data as the model card names it: without this machine's folders."""
    from latent_codec.images.decoding import printable

    path = Path(data.removeprefix("hf:"))
    return printable(data if data.startswith("hf:") and not path.exists() else path.resolve().name)
