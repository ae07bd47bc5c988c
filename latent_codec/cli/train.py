"""Train a codec, a prior, an entropy model, a classifier, a preview or a
translator of latents.

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
  latent-codec train translator --data photos/ --codec mine --target default
"""

import argparse
from pathlib import Path
from typing import Any

from latent_codec.cli import arguments
from latent_codec.training.stopping import check_minutes


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
        help="folders, webdataset tars, an IDX folder (Fashion-MNIST), hf:owner/name, or shapes:COUNTxSIDE",
    )
    parser.add_argument(
        "--out", dest="run_folder", type=Path, metavar="RUN", help="run folder (default: runs/PRESET)"
    )
    parser.add_argument(
        "--codec",
        metavar="NAME_OR_PATH",
        help="the codec to start from or to learn from (default: the preset's)",
    )
    parser.add_argument(
        "--reference",
        metavar="NAME_OR_PATH",
        help="the codec whose latents the trained ones stay near, of an objective with a reference_weight (default: the preset's)",
    )
    target: Any = parser.add_argument(
        "--target",
        metavar="NAME_OR_PATH",
        help="the codec whose latents a translator gives, from those of --codec (default: the preset's)",
    )
    target.setting = "translator.target"
    arguments.add_subfolder_argument(parser)
    arguments.add_pipeline_argument(parser)
    arguments.add_training_arguments(parser)
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


def check(args: argparse.Namespace) -> None:
    from latent_codec.training.config import load_config, preset_names

    if args.list:
        return
    if not args.preset:
        raise ValueError(f"name a preset ({', '.join(preset_names())}) or a .toml file.")
    load_config(args.preset, args.set, args.codec, args.for_pipeline, args.reference, args.target)
    if not args.data:
        raise ValueError("--data is missing: a folder of images, tars, an IDX folder or hf:owner/name.")
    check_minutes(args.minutes)
