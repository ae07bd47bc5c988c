"""Flags that several verbs share, declared once."""

import argparse
from pathlib import Path
from typing import Any

from latent_codec.errors import SettingError
from latent_codec.images.windows import WINDOWS
from latent_codec.training.stopping import check_minutes


def add_codec_arguments(
    parser: argparse.ArgumentParser,
    default: str | None = "default",
    meaning: str = "the one called default",
    *,
    several: bool = False,
) -> None:
    """`--codec`, `--for-pipeline`, `--config`, `--device` and `--dtype`: what `load_codec` reads; `meaning` says what `default` is,
    `several` whether the argument is a list."""
    parser.add_argument(
        "--codec",
        nargs="+" if several else None,
        default=default,
        metavar="NAME_OR_PATH",
        help="use this codec: a shipped one (default, default-16, default-eq, default-rd, default-vq, garments), a run, diffusers or pipeline folder, a "
        f"checkpoint file, or a hub id (default: {meaning})",
    )
    add_subfolder_argument(parser)
    add_pipeline_argument(parser)
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="read the config.json of a weight file given to --codec here, if neither the file nor its folder has it",
    )
    add_device_argument(parser)
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="compute in this precision; bfloat16 is slow on a CPU without AVX512-BF16 or AMX (default: float32)",
    )


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", help="compute on this device: cpu, cuda, cuda:1, mps ... (default: a GPU if there is one)"
    )


def add_subfolder_argument(parser: argparse.ArgumentParser) -> None:
    """`--subfolder`, which `main` joins to `--codec`."""
    parser.add_argument(
        "--subfolder",
        metavar="NAME",
        help="take the autoencoder in this subfolder of --codec (default: the folder itself, vae, vqvae or movq)",
    )


def add_pipeline_argument(parser: argparse.ArgumentParser) -> None:
    action: Any = parser.add_argument(
        "--for-pipeline",
        metavar="CLASS",
        help="take latents to be those of this pipeline of diffusers, such as Ideogram4Pipeline (default: of the "
        "pipeline whose folder --codec is in, or that it was made for, or the usual ones of the autoencoder's class)",
    )
    action.setting = "model.pipeline"  # of a training


def add_data_arguments(
    parser: argparse.ArgumentParser,
    *,
    nargs: str = "+",
    split: str = "train",
    limit: int | str | None = None,
    least: int = 1,
    what: str = "",
) -> None:
    """DATA, `--split` and `--limit`: what `open_data` reads.

    Args:
        nargs: "+", or "*" where DATA may be left out.
        limit: the default of `--limit`; text says what the default None stands for, where not for all.
        least: the smallest.
        what: what the verb does without DATA.
    """
    # Or [] would replace what an old flag gave.
    may_miss = {"default": argparse.SUPPRESS} if nargs == "*" else {}
    parser.set_defaults(data=[])
    parser.add_argument(
        "data",
        metavar="DATA",
        nargs=nargs,
        **may_miss,
        help="images or folders of them, DICOM or NIfTI files, webdataset tars, an IDX folder (Fashion-MNIST), a saved "
        "data set, hf:owner/name, shapes:COUNTxSIDE (generated, with labelled factors), or audio:PATH (spectrograms of "
        "sound files)" + what,
    ).must_exist = True
    parser.add_argument(
        "--value-range",
        nargs=2,
        type=_range_end,
        metavar=("LOW", "HIGH"),
        help="of gray images of more than 8 bits, clamp values to these; min and max are those of each file or volume "
        "(default: all of 16 bits; -1024 to 3071 HU of CT; min max of other volumes)",
    )
    parser.add_argument(
        "--axis",
        type=int,
        choices=(0, 1, 2),
        default=2,
        help="count the slices of volumes along this side (default: 2, the last)",
    )
    parser.add_argument(
        "--split", default=split, help=f"read this split of data that has splits (default: {split})"
    )
    add_limit_argument(parser, limit, least)


def _range_end(text: str) -> float | str:
    return text if text in ("min", "max") else float(text)


def add_window_argument(parser: argparse.ArgumentParser, what: str) -> None:
    """`--window`, of images that have a unit."""
    parser.add_argument(
        "--window",
        metavar="NAME",
        help=f"{what} by a window of values: {', '.join(WINDOWS)} (of CT), or CENTER,WIDTH, as in --window=-600,1500",
    )


def add_limit_argument(
    parser: argparse.ArgumentParser, default: int | str | None = None, least: int = 1
) -> None:
    parser.add_argument(
        "--limit",
        type=int,
        default=None if isinstance(default, str) else default,
        metavar="N",
        help="take N images, items floor(i * total / N), i = 0 .. N - 1 "
        f"(default: {'all' if default is None else default})",
    ).least = least


def add_index_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--index",
        type=int,
        nargs="+",
        metavar="I",
        help="take these images of DATA, counted from 0, in this order (default: all)",
    )


def add_out_argument(parser: argparse.ArgumentParser, default: str, what: str, metavar: str = "DIR") -> None:
    """`--out` of a verb that makes new files."""
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(default),
        metavar=metavar,
        help=f"write {what} here (default: {default})",
    )


def add_copy_argument(parser: argparse.ArgumentParser, what: str) -> None:
    """`--out` of a verb that changes a codec, or a copy of it."""
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help=f"write a copy of the codec here, with {what}, and leave --codec as it is (default: into --codec)",
    )


def add_training_arguments(parser: argparse.ArgumentParser, what: str | None = None) -> None:
    """`--set` and `--minutes`, of every verb that trains, and `--run` of one that trains `what` for a codec."""
    if what is not None:
        parser.add_argument(
            "--run",
            dest="run_folder",
            type=Path,
            metavar="RUN",
            help=f"train in this run folder (default: runs/CODEC-{what})",
        )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="section.key=value",
        help="override one setting of the training, such as run.steps=500; repeatable",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        metavar="M",
        help="write a checkpoint and stop after M minutes; the same command goes on (default: at the last step)",
    )


def check_safetensors(args: argparse.Namespace) -> None:
    """Refuse an `--out` that does not say what it is."""
    if args.out.suffix != ".safetensors":
        raise ValueError(f"--out: expected a name that ends in .safetensors, got {args.out}")


def check_training(args: argparse.Namespace, trains: bool, advice: str) -> None:
    """Check what `add_training_arguments` adds, which is of no use unless the verb trains.

    Raises:
        SettingError: with `advice` for a flag of no use.
    """
    check_minutes(args.minutes)
    for setting in ("run_folder", "minutes", "set"):
        if not trains and getattr(args, setting):
            raise SettingError(setting, "none without training", getattr(args, setting), advice=advice)


def add_feature_arguments(parser: argparse.ArgumentParser) -> None:
    """`--pooling`, `--layer` and `--side`: how `extract_features` makes vectors."""
    parser.add_argument(
        "--pooling",
        metavar="HOW",
        help="make a vector of a grid: whole, its numbers as they are; mean-std, of each channel; pyramid, the means "
        "in 1x1, 2x2 and 4x4 cells; histogram, the share of each codeword (default: whole of a 1x1 grid, else "
        "histogram of codecs with a codebook, else mean-std)",
    )
    parser.add_argument(
        "--layer",
        metavar="NAME",
        help="take the output of this module of the encoder, such as mid_block (default: the latents)",
    )
    parser.add_argument(
        "--side",
        type=int,
        metavar="PIXELS",
        help="resize images and cut them to squares of this side (default: as the codec was trained, where it makes one "
        "vector of an image; else their own size)",
    ).least = 8


def add_vocoder_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--vocoder",
        metavar="NAME_OR_PATH",
        help="turn spectrograms into sound by this SpeechT5HifiGan, a folder or hub id (default: Griffin-Lim)",
    )


def add_label_argument(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--label", metavar="KEY", help=f"read classes from this attribute of the labels ({default})"
    )


def add_held_out_argument(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument(
        "--held-out", type=float, default=0.2, metavar="SHARE", help=f"{what} (default: %(default)s)"
    )


def add_seed_argument(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--seed", type=int, default=0, metavar="N", help=f"{what} (default: 0)").least = 0


def add_json_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def add_tile_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tile",
        type=int,
        metavar="PIXELS",
        help="work in tiles of this side, such as 512, where memory is short; exact for AutoencoderKL and "
        "AutoencoderVQ (default: the whole image at once)",
    )


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse paths that must exist and do not, and numbers below the least that their flags take.

    Raises:
        ValueError: naming the first.
    """
    for action in args.parser._actions:
        value, least = getattr(args, action.dest, None), getattr(action, "least", None)
        if getattr(action, "must_exist", False) and value is not None:
            for path in map(str, value if isinstance(value, list) else [value]):
                if not _exists(path):
                    raise ValueError(f"{path}: no such file or folder")
        elif None not in (value, least) and value < least:
            raise SettingError(action.dest, f"at least {least}", value)


def _exists(path: str) -> bool:
    """Whether it does; names on the hub (hf:...), URLs, generated images (shapes:), sounds (audio:) and patterns are not looked up."""
    is_pattern = (
        path.startswith(("hf:", "shapes:", "audio:")) or "://" in path or any(mark in path for mark in "{*?[")
    )
    return is_pattern or Path(path).exists()
