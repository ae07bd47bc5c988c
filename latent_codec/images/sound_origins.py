"""The sound that a spectrogram stands for: a decoded image becomes a .wav file, next to a PNG of the spectrogram."""

import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
from torch import Tensor

from latent_codec.images.decoding import MIN_SIDE
from latent_codec.images.origins import Origin
from latent_codec.images.sound_files import WAV, write_wav
from latent_codec.images.spectrograms import MelScale
from latent_codec.images.tensors import write_image
from latent_codec.images.vocoders import Vocoder


@dataclass(frozen=True, kw_only=True)
class SoundOrigin(MelScale, Origin):
    """A mono recording, or a piece of one, at the sample rate of its scale."""

    kind: ClassVar[str] = "sound"

    num_samples: int

    def __post_init__(self):
        super().__post_init__()
        if type(self.num_samples) is not int or not 1 <= self.num_samples < 2**31:
            raise ValueError(f"num_samples: expected 1 to 2^31 - 1, got {self.num_samples!r}")

    @classmethod
    def of(cls, scale: MelScale, num_samples: int) -> "SoundOrigin":
        return cls(**asdict(scale), num_samples=num_samples)

    @property
    def suffix(self) -> str:
        return WAV

    def describe(self) -> str:
        seconds = self.num_samples / self.sample_rate
        return f"sound, {seconds:.2f} s at {self.sample_rate} Hz, {self.floor_db:g} to {self.ceiling_db:g} dB"

    @property
    def size(self) -> tuple[int, int]:
        """(bands, frames) of the image."""
        return self.bands, -(-self.num_samples // self.hop)

    def for_size(self, height: int, width: int) -> "SoundOrigin | None":
        return replace(self, num_samples=width * self.hop) if height == self.bands else None

    def restore(self, image: Tensor, vocoder: Vocoder | None = None) -> np.ndarray:
        """Samples (num_samples,), fewer of a window of the image, float32 in about -1 to 1, by Griffin-Lim unless there is a vocoder.

        Raises:
            ValueError: for an image of other bands; a vocoder of another scale.
        """
        bands, frames = image.shape[1:]
        if bands != self.bands or frames < MIN_SIDE:
            expected = f"{self.bands} bands and {MIN_SIDE} frames or more"
            raise ValueError(f"expected a spectrogram of {expected}, got {bands}x{frames}")
        image = image.detach().cpu()
        found = vocoder.samples(image, self) if vocoder else self.invert(image)
        return found[: self.num_samples].numpy()

    def write(self, image: Tensor, path: str | os.PathLike, vocoder: Vocoder | None = None) -> None:
        """Write a .wav file, and the image as a PNG of the same name."""
        write_wav(self.restore(image, vocoder), self.sample_rate, path)
        write_image(image, Path(path).with_suffix(".png"))
