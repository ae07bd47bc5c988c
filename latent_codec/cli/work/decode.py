"""`latent-codec decode`."""

import argparse
import sys
from collections.abc import Iterable, Iterator
from functools import cache, partial
from itertools import chain
from pathlib import Path, PurePosixPath

from torch import Tensor

from latent_codec import LatentCodec
from latent_codec.cli.progress import progress
from latent_codec.cli.work.decoded_files import base_name, incomplete, load_vocoder, write_decoded
from latent_codec.cli.work.opening import load_codec
from latent_codec.components.codec_facts import shipped_name
from latent_codec.components.codec_folders import DEFAULT
from latent_codec.errors import SettingError
from latent_codec.images.origins import Origin, RangeOrigin, Wholes
from latent_codec.images.windows import window_range
from latent_codec.latents.data_set import LatentDataset
from latent_codec.latents.latent_files import LatentFile, load_latents
from latent_codec.latents.plain_latents import PlainLatents, read_plain_latents


def run(args: argparse.Namespace) -> None:
    files = [file for file, _ in args.files if not file.is_dir()]
    plain = {file: found for file in files if (found := read_plain_latents(file)) is not None}
    if plain and args.codec is None:
        file, found = next(iter(plain.items()))
        raise SettingError("codec", f"the codec of {file}, which is {found} and does not name it")
    load = cache(partial(load_codec, args))  # by pipeline and name

    def load_for(found: LatentFile) -> LatentCodec:
        name = args.codec or shipped_name(found.space_fingerprint, found.pipeline) or DEFAULT
        return load(found.pipeline, name)

    vocoder = load_vocoder(args)
    window = None if args.window is None else window_range(args.window)
    taken: set[Path] = set()
    for file, folder in progress(args.files, "decoding"):
        images = (
            _decode_plain(load(None, args.codec), plain[file], file, args.tile)
            if file in plain
            else chain.from_iterable(
                _decode(load_for(found), found, args.tile) for found in _latent_files(file)
            )
        )
        wholes = Wholes()
        for name, image, origin in images:
            image = image.cpu()
            if window is not None and not isinstance(origin, RangeOrigin):
                raise SettingError("window", f"none: {name} has no unit", args.window)
            if window is not None:
                path = args.out / _free_path(folder, _stem(name), ".png", taken)
                write_decoded(origin.windowed(image, window), None, path, vocoder)
            elif origin is None or origin.whole is None or vocoder is not None:
                suffix = origin.suffix if origin else ".png"
                path = args.out / _free_path(folder, _stem(name), suffix, taken)
                write_decoded(image, origin, path, vocoder)
            elif (parts := wholes.add(origin, origin.part(image))) is not None:
                path = args.out / _free_path(folder, base_name(origin.whole), origin.suffix, taken)
                origin.write_parts(parts, path)
            else:
                continue
            print(path)
        for stem, origin, part in incomplete(wholes, "decode"):
            path = args.out / _free_path(folder, stem, origin.suffix, taken)
            origin.write_parts([(origin, part)], path)
            print(path)


def _latent_files(path: Path) -> Iterable[LatentFile]:
    """A latent file, or those that a data set is made of."""
    return LatentDataset(path, sample=False).latent_files() if path.is_dir() else [load_latents(path)]


def _decode_plain(
    codec: LatentCodec, plain: PlainLatents, file: Path, tile: int | None
) -> Iterator[tuple[str, Tensor, Origin | None]]:
    batches = plain.latents(codec.latent_space.channels)
    print(
        f"latent-codec decode: Note: {file} is {plain}; whether its latents are of {codec.name} cannot be checked",
        file=sys.stderr,
    )
    for latents in batches:
        (image,) = codec.decode(latents, output_type="pt", tile=tile)
        yield file.name, image, None


def _decode(
    codec: LatentCodec, found: LatentFile, tile: int | None
) -> Iterator[tuple[str, Tensor, Origin | None]]:
    if warning := found.check(codec):
        print(f"latent-codec decode: {warning}", file=sys.stderr)
    for index, (name, size, origin) in enumerate(zip(found.names, found.sizes, found.origins)):
        if found.latents is not None:
            (image,) = codec.decode(found.latents[index], size=size, output_type="pt", tile=tile)
        else:
            (image,) = codec.decode_indices(found.indices[index], size=size, output_type="pt")
        yield name, image, origin


def _stem(name: str) -> str:
    """What to call the file of an image: its own name without suffix, and, as it is not to be trusted, without folders."""
    base = base_name(name)
    stem, bracket, number = base.partition("[")  # of a slice: brain.nii.gz[12]
    if bracket and number.endswith("]"):
        base = f"{stem.removesuffix('.gz')}-{number[:-1]}"
        return base.replace(".nii-", "-").replace(".dcm-", "-")
    return PurePosixPath(base).stem


def _free_path(folder: Path, stem: str, suffix: str, taken: set[Path]) -> Path:
    """A file for an image, numbered if its name is taken."""
    free, number = folder / f"{stem}{suffix}", 1
    while free in taken:
        number += 1
        free = folder / f"{stem}-{number}{suffix}"
    taken.add(free)
    return free
