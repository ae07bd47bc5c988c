"""Flags that several verbs share, declared once."""

import argparse
import os
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from latent_codec.cli.progress import showing


def add_codec_arguments(
    parser: argparse.ArgumentParser, default: str | None = "default", meaning: str = "the one called default"
) -> None:
    """`--codec`, `--config`, `--device` and `--dtype`: what `load_codec` reads; `meaning` says what `default` is."""
    parser.add_argument(
        "--codec",
        default=default,
        metavar="NAME_OR_PATH",
        help="a shipped codec (default, default-vq), a run, diffusers or pipeline folder, a checkpoint file, or a hub id "
        f"(default: {meaning})",
    )
    add_subfolder_argument(parser)
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="the config.json of a weight file that --codec names, if neither the file nor its folder has it",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps ... (default: a GPU if there is one)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="precision of the codec's arithmetic; bfloat16 is slow on a CPU without AVX512-BF16 or AMX (default: float32)",
    )


def add_subfolder_argument(parser: argparse.ArgumentParser) -> None:
    """`--subfolder`, which `main` joins to `--codec`."""
    parser.add_argument(
        "--subfolder",
        metavar="NAME",
        help="where in the folder or hub repository of --codec the autoencoder is (default: itself, vae, vqvae or movq)",
    )


def add_data_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "data",
        metavar="DATA",
        nargs="+",
        help="images or folders of them, webdataset tars, an IDX folder (Fashion-MNIST), or hf:owner/name",
    )


def add_limit_argument(parser: argparse.ArgumentParser, default: int | None = None) -> None:
    parser.add_argument(
        "--limit",
        type=int,
        default=default,
        metavar="N",
        help="take N images, items floor(i * total / N) of the listing, i = 0 .. N - 1 "
        f"(default: {'all' if default is None else default})",
    )


def add_json_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def add_tile_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tile",
        type=int,
        metavar="PIXELS",
        help="work in tiles of this side, such as 512, where memory is short; exact for AutoencoderKL and AutoencoderVQ "
        "(default: the whole image at once)",
    )


def check_paths(arguments: Iterable[str]) -> None:
    """Refuse files and folders that are not there, before the libraries that read them are loaded.

    Raises:
        ValueError: naming the first that is missing; names on the hub (hf:...) and patterns are not looked up.
    """
    for each in arguments:
        is_pattern = each.startswith("hf:") or any(mark in each for mark in "{*?[")
        if not is_pattern and not Path(each).exists():
            raise ValueError(f"{each}: no such file or folder")


def named_images(arguments: list[str]) -> list[tuple[Path, Path]]:
    """The images that arguments name, as `output_names` gives them.

    Raises:
        ValueError: if two images would get one name, or nothing is found.
    """
    from latent_codec.images.files import list_images

    return output_names(list_images(arguments)) if arguments else []


def output_names(listing: list[tuple[Path, Path]]) -> list[tuple[Path, Path]]:
    """Each image with a name for what is made of it.

    That is its path below the folder given, without its suffix; of two that differ in their suffix alone (a.png,
    a.jpg) both keep theirs.

    Args:
        listing: of images, each with its path relative to the folder given.

    Raises:
        ValueError: if two images would get one name all the same.
    """
    paths: dict[Path, Path] = {}
    for path, relative in listing:
        if os.path.realpath(paths.setdefault(relative, path)) != os.path.realpath(path):
            raise ValueError(
                f"{paths[relative]} and {path} would both be written as {relative.with_suffix('')}; name them in separate "
                "calls, each with its own --out"
            )
    names = {relative: relative.with_suffix("") for relative in paths}
    while twins := {name for name, count in Counter(names.values()).items() if count > 1}:
        names = {relative: relative if name in twins else name for relative, name in names.items()}
    return [(path, names[relative]) for relative, path in paths.items()]


def by(shape: Iterable[int]) -> str:
    """[480, 640] -> "480x640"."""
    return "x".join(map(str, shape))


def device_of(args: argparse.Namespace) -> str:
    """What `--device` names, or a GPU if there is one.

    Raises:
        ValueError: if this machine lacks it.
    """
    import torch

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=device).item()  # which is where a device without values (meta) is told
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device {device} is not available here: {reason}") from error
    return device


def load_codec(args: argparse.Namespace):
    """The LatentCodec that `--codec`, `--config`, `--device` and `--dtype` name."""
    with showing(f"opening {args.codec}"):
        import torch

        from latent_codec import LatentCodec

        device = device_of(args)
        note_emulated(args.dtype, device)
        return LatentCodec.from_pretrained(
            args.codec, config=args.config, dtype=getattr(torch, args.dtype), device=device
        )


def note_emulated(dtype: str, device: str) -> None:
    """Say what bfloat16 costs on a CPU that emulates it."""
    if dtype == "bfloat16" and device.startswith("cpu"):
        from latent_codec.precision import EMULATED, computes_bfloat16

        if computes_bfloat16(device) is False:
            print(f"Note: {EMULATED}", file=sys.stderr)
