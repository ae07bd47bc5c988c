"""The file that a decoded image becomes: a PNG, or what its origin says, sounds by the vocoder that `--vocoder` names."""

import argparse
from pathlib import Path

from torch import Tensor

from latent_codec.cli.progress import showing
from latent_codec.errors import SettingError
from latent_codec.images.origins import Origin
from latent_codec.images.tensors import write_image


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
