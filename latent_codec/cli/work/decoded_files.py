"""The file that a decoded image becomes: a PNG, or what its origin says, sounds by the vocoder that `--vocoder` names."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image
from torch import Tensor

from latent_codec.cli.progress import progress, showing
from latent_codec.errors import SettingError
from latent_codec.images.decoding import printable
from latent_codec.images.origins import Origin, Wholes
from latent_codec.images.tensors import to_image, write_image


def load_vocoder(args: argparse.Namespace):
    """The `Vocoder` that `--vocoder` names; None for Griffin-Lim."""
    if args.vocoder is None:
        return None
    from latent_codec.images.vocoders import Vocoder  # transformers and all

    with showing(f"opening {args.vocoder}"):
        return Vocoder.from_pretrained(args.vocoder)


def check_vocoder(origin: Origin | None, vocoder) -> None:
    """Refuse a vocoder for what is no spectrogram.

    Raises:
        SettingError: naming it.
    """
    if vocoder is not None and (origin is None or origin.kind != "sound"):
        expected = "none where images are no spectrograms of recordings (audio:)"
        raise SettingError("vocoder", expected, vocoder.name)


def write_decoded(image: Tensor, origin: Origin | None, path: Path, vocoder=None) -> None:
    """Write an image, (C, H, W) in [-1, 1], as its origin says; None: as the suffix says.

    Raises:
        SettingError: if there is a vocoder, and the image is no spectrogram.
    """
    check_vocoder(origin, vocoder)
    if origin is None:
        write_image(image, path)
    elif vocoder is None:
        origin.write(image, path)
    else:
        origin.write(image, path, vocoder)


def base_name(name: str) -> str:
    """The last part of a name, which is not to be trusted with folders."""
    return PurePosixPath(name.replace("\\", "/").replace("\0", "")).name or "image"


def incomplete(wholes: Wholes, verb: str) -> Iterator[tuple[str, Origin, np.ndarray]]:
    """The parts of what is not whole, which `verb` writes one by one, with a note; each with the stem of its file."""
    for parts in wholes.rest():
        first, _ = parts[0]
        found = f"{len(parts)} of {first.count} slices of {printable(first.whole)}"
        print(f"latent-codec {verb}: Note: {found}: written one by one", file=sys.stderr)
        digits = len(str(first.count - 1))
        for origin, part in parts:
            yield f"{base_name(origin.whole)}-{origin.number:0{digits}d}", origin, part


def write_sounds(
    spectrograms: Sequence[Tensor | Image.Image] | Tensor, origin: Origin, out: Path, vocoder
) -> list[Path]:
    """A sound for each spectrogram, next to `out`: morph.png -> morph-00.wav and so on."""
    digits = len(str(len(spectrograms) - 1))
    paths = [out.with_name(f"{out.stem}-{n:0{digits}d}{origin.suffix}") for n in range(len(spectrograms))]
    for image, path in zip(progress(spectrograms, "writing sounds"), paths):
        image = to_image(image, channels=1) if isinstance(image, Image.Image) else image
        write_decoded(image, origin, path, vocoder)
    return paths
