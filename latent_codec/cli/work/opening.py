"""Open what arguments name: the device, the codec, the data; and look at where results go."""

import argparse
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from latent_codec import LatentCodec
from latent_codec.cli.progress import progress, showing
from latent_codec.errors import SettingError
from latent_codec.images.sources import FolderImages, ImageSource, SomeImages, open_source, spread
from latent_codec.images.tensors import ImageError, to_image, write_image
from latent_codec.latents.data_set import LatentDataset
from latent_codec.latents.locations import is_data_set
from latent_codec.precision import EMULATED, computes_bfloat16
from latent_codec.torch_settings import usable_device

MAX_IN_SHEET = 64
"""Images of DATA that one sheet shows, a row each."""


def settings_of(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Arguments of the verb that a function of the library takes under the same names."""
    return {name: getattr(args, name) for name in names}


def device_of(args: argparse.Namespace) -> str:
    """What `--device` names, or a GPU if there is one.

    Raises:
        ValueError: if this machine lacks it.
    """
    device = usable_device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "meta":
        raise ValueError(f"device {device} is not available here: its tensors have no values")
    return str(device)


def load_codec(args: argparse.Namespace, pipeline: str | None = None, name: str | None = None) -> LatentCodec:
    """The codec that `--codec`, `--for-pipeline`, `--config`, `--device` and `--dtype` name.

    Args:
        pipeline: whose latents it has where `--for-pipeline` is not given, such as that of a latent file.
        name: instead of `--codec`.
    """
    name = name or args.codec
    with showing(f"opening {name}"):
        device = device_of(args)
        note_emulated(args.dtype, device)
        dtype = getattr(torch, args.dtype)
        pipeline = args.for_pipeline or pipeline
        return LatentCodec.from_pretrained(
            name, pipeline=pipeline, config=args.config, dtype=dtype, device=device
        )


def load_codecs(args: argparse.Namespace) -> list[LatentCodec]:
    """The codecs that `--codec` names where it takes several, as `load_codec` opens each.

    Raises:
        ValueError: for two whose images differ in channels.
    """
    from latent_codec.evaluation.codec_comparison import check_comparable  # metrics and all, for two verbs

    codecs = [load_codec(args, name=name) for name in args.codec]
    if len(codecs) > 1:
        check_comparable(codecs)
    return codecs


def note_emulated(dtype: str, device: str) -> None:
    """Say what bfloat16 costs on a CPU that emulates it."""
    if dtype == "bfloat16" and device.startswith("cpu") and computes_bfloat16(device) is False:
        print(f"Note: {EMULATED}", file=sys.stderr)


def check_writable(path: Path, *, is_image: bool = False) -> None:
    """Whether a file, or an image, can be written there, which is better known before the work than after it.

    Raises:
        ValueError: if it is a folder, or has no suffix of an image.
        OSError: if the system says no.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give {'an image' if is_image else 'a file'}'s name")
    there = next(folder for folder in path.absolute().parents if folder.exists())
    try:
        with TemporaryDirectory(prefix=".", dir=there) as folder:
            probe = Path(folder) / path.name
            write_image(Image.new("L", (1, 1)), probe) if is_image else probe.touch()
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    except ValueError as error:
        raise ValueError(str(error).replace(str(probe), str(path))) from None


def open_data(args: argparse.Namespace) -> ImageSource:
    """The images that DATA and `--split` name.

    Raises:
        ValueError: for a data set of latents, which holds none.
    """
    if any(map(is_data_set, args.data)):
        raise ValueError(
            f"{args.data[0]} is a data set of latents, and {args.verb} needs images: give those that were encoded"
        )
    return open_source(args.data, split=args.split, value_range=args.value_range, axis=args.axis)


def open_latents(args: argparse.Namespace, codec: LatentCodec | None = None) -> LatentDataset | None:
    """The data sets of latents that DATA names; None where it names images.

    Args:
        codec: whose latents they must be; None: the one that `--codec` names, if it is given.
    """
    if not all(map(is_data_set, args.data)) or not args.data:
        return None
    with showing(f"opening {args.data[0]}"):
        dataset = LatentDataset(args.data, sample=False)
        note = dataset.check(codec or args.codec) if codec or args.codec else None
    if note:
        print(f"latent-codec {args.verb}: Note: {note}", file=sys.stderr)
    return dataset


def limited(source: ImageSource, limit: int | None) -> ImageSource:
    """The images of a source that `--limit` chooses."""
    chosen = spread(len(source), limit)
    if len(chosen) == len(source):
        return source
    if isinstance(source, FolderImages):  # which stays one, for the names of its images below their folder
        return source.part(chosen)
    return SomeImages(source, chosen)


def few_images(args: argparse.Namespace) -> ImageSource:
    """The images that DATA, `--index` and `--limit` name, so few that a sheet shows them all.

    Raises:
        SettingError: for an index that DATA has not, or more images than a sheet shows.
    """
    source = open_data(args)
    for index in args.index or []:
        if not 0 <= index < len(source):
            raise SettingError("index", f"numbers from 0 to {len(source) - 1}, of the images in DATA", index)
    source = limited(source if args.index is None else SomeImages(source, args.index), args.limit)
    if len(source) > MAX_IN_SHEET:
        expected = f"at most {MAX_IN_SHEET} images"
        raise SettingError("data", expected, len(source), advice="choose some by `index` or `limit`")
    return source


class NamedImages:
    """The images of DATA one by one, each with a name for what is made of it.

        images = NamedImages(open_data(args), args)
        for index, name, image in images.read(channels, "round trips"): ...
        images.failed    # why others could not be read

    Raises:
        ValueError: if two images would get one name, or there is none.
    """

    def __init__(self, source: ImageSource, args: argparse.Namespace):
        self.source, self.verb = source, args.verb
        self.failed: list[str] = []
        chosen = spread(len(source), args.limit)
        if isinstance(source, FolderImages):
            self.names = output_names({index: source.listing[index] for index in chosen})
        else:
            self.names = {index: Path(f"{index:06d}") for index in chosen}

    def read(self, channels: int, what: str) -> Iterator[tuple[int, Path, Tensor]]:
        """Yield index, name and image in [-1, 1], and show progress; those that cannot be read are reported."""
        is_folder = type(self.source) is FolderImages
        for index, name in progress(self.names.items(), what):
            try:
                if is_folder and self.source.origin(index) is None:  # which `image` rounds to 8 bits
                    image = to_image(self.source.paths[index], channels=channels)
                else:
                    image = self.source.image(index, channels)
            except ImageError as error:
                self.fail(str(error))
                continue
            yield index, name, image

    def fail(self, reason: str) -> None:
        """Report an image that is left out."""
        self.failed.append(reason)
        print(f"latent-codec {self.verb}: {reason}", file=sys.stderr)


def output_names(listing: dict[int, tuple[Path, Path]]) -> dict[int, Path]:
    """A name for what is made of each image: its path below the folder given, without its suffix.

    Of two that differ in their suffix only (a.png, a.jpg) both keep theirs. An image listed twice has one name.

    Args:
        listing: of images by index, each with its path relative to the folder given.

    Raises:
        ValueError: if two images would get one name all the same.
    """
    first: dict[Path, int] = {}
    for index, (path, relative) in listing.items():
        other = listing[first.setdefault(relative, index)][0]
        if os.path.realpath(other) != os.path.realpath(path):
            raise ValueError(
                f"{other} and {path} would both be written as {relative.with_suffix('')}; name them in separate "
                "calls, each with its own --out"
            )
    names = {relative: relative.with_suffix("") for relative in first}
    while twins := {name for name, count in Counter(names.values()).items() if count > 1}:
        names = {relative: relative if name in twins else name for relative, name in names.items()}
    return {index: names[relative] for relative, index in first.items()}
