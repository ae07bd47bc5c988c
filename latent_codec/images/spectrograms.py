"""Sound as an image of its spectrum, and back: log-mel spectrograms.

    samples --STFT--> magnitudes --mel filters--> bands --log, [floor, ceiling] -> [-1, 1]--> image (1, bands, frames)
    image --[-1, 1] -> magnitudes of bands--> magnitudes (mel_to_magnitudes) --Griffin-Lim--> samples

The top row of an image is the highest band. Half of the spectrum is lost on the way, its phases; Griffin-Lim finds some that
fit the magnitudes, and a vocoder has learned to.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from latent_codec.errors import SettingError


@dataclass(frozen=True, kw_only=True)
class MelScale:
    """How samples become an image. By default as SpeechT5's vocoder expects it: 62.5 frames a second, 80 bands."""

    sample_rate: int = 16_000
    """Samples a second."""
    hop: int = 256
    """Samples from one frame to the next."""
    window: int = 1024
    """Samples of the Hann window, and of the Fourier transform."""
    bands: int = 80
    """Rows of the image."""
    lowest_hz: float = 80.0
    highest_hz: float = 7600.0
    floor_db: float = -80.0
    """What -1 stands for: 20 log10 of the magnitude in a band, of samples in [-1, 1]."""
    ceiling_db: float = 20.0
    """What 1 stands for; a sine at full scale reaches 17 to 22 dB."""

    def __post_init__(self):
        for name in ("sample_rate", "hop", "window", "bands"):
            if type(getattr(self, name)) is not int:
                raise SettingError(name, "an integer", getattr(self, name))
        for name, fits, expected in (
            ("sample_rate", 1000 <= self.sample_rate <= 192_000, "1000 to 192000 samples a second"),
            ("window", 16 <= self.window <= 16_384, "16 to 16384 samples"),
            ("hop", 1 <= self.hop <= self.window // 2, f"1 to {self.window // 2} samples, half the window"),
            (
                "bands",
                8 <= self.bands <= min(512, self.window // 2),
                f"8 to {min(512, self.window // 2)} bands",
            ),
            (
                "lowest_hz",
                0 <= self.lowest_hz < self.highest_hz,
                f"0 to less than {self.highest_hz:g}, the highest",
            ),
            (
                "highest_hz",
                self.highest_hz <= self.sample_rate / 2,
                f"at most {self.sample_rate / 2:g}, half the sample rate",
            ),
            (
                "floor_db",
                -300 <= self.floor_db < self.ceiling_db <= 300,
                f"-300 to less than {self.ceiling_db:g}, the ceiling",
            ),
        ):
            if not fits:
                raise SettingError(name, expected, getattr(self, name))

    def spectrogram(self, samples: Tensor) -> Tensor:
        """Samples in [-1, 1], (num_samples,), as an image (1, bands, 1 + num_samples // hop); frame i is centered at sample i hop."""
        filters = _filters(self)
        bands = filters @ _stft(samples.float(), self).abs()
        level = 20 * bands.clamp(min=1e-15).log10()
        share = (level - self.floor_db) / (self.ceiling_db - self.floor_db)
        return share.clamp(0, 1).mul(2).sub(1).flip(0)[None]

    def levels(self, image: Tensor) -> Tensor:
        """An image (1 or 3 channels, whose mean is taken, bands, frames) in decibels, (bands, frames), lowest band first."""
        share = (image[:3].float().mean(0).clamp(-1, 1) + 1) / 2
        return (self.floor_db + share * (self.ceiling_db - self.floor_db)).flip(0)

    def invert(self, image: Tensor, *, iterations: int = 32) -> Tensor:
        """Samples of a spectrogram, float32 (frames * hop,), which `griffin_lim` finds."""
        bands = 10 ** (self.levels(image) / 20)
        return griffin_lim(mel_to_magnitudes(bands, self), self, iterations=iterations)


@lru_cache(maxsize=8)
def _filters(scale: MelScale) -> Tensor:
    """Triangular filters (bands, window // 2 + 1), evenly spaced on Slaney's mel scale, each of area 1 over frequency in Hz.

    The scale (Auditory Toolbox, 1998) is linear up to 1 kHz, 200/3 Hz a mel, and logarithmic above, 27 mels for a factor 6.4.
    """
    step, knee, per_octave = 200 / 3, 1000.0, np.log(6.4) / 27
    ends = np.array([scale.lowest_hz, scale.highest_hz])
    low, high = np.where(
        ends < knee, ends / step, knee / step + np.log(np.maximum(ends, 1) / knee) / per_octave
    )
    mels = np.linspace(low, high, scale.bands + 2)
    corners = np.where(mels < knee / step, mels * step, knee * np.exp((mels - knee / step) * per_octave))
    frequencies = np.linspace(0, scale.sample_rate / 2, scale.window // 2 + 1)
    left, center, right = (corners[i : i + scale.bands, None] for i in range(3))
    rising, falling = (frequencies - left) / (center - left), (right - frequencies) / (right - center)
    triangles = np.minimum(rising, falling).clip(min=0) * 2 / (right - left)
    return torch.from_numpy(triangles).float()


def _stft(samples: Tensor, scale: MelScale) -> Tensor:
    window = torch.hann_window(scale.window)
    return torch.stft(
        samples, scale.window, scale.hop, window=window, pad_mode="constant", return_complex=True
    )


def _istft(spectrum: Tensor, scale: MelScale, length: int) -> Tensor:
    return torch.istft(
        spectrum, scale.window, scale.hop, window=torch.hann_window(scale.window), length=length
    )


def mel_to_magnitudes(bands: Tensor, scale: MelScale, *, iterations: int = 64) -> Tensor:
    """Magnitudes (window // 2 + 1, frames), none below 0, whose mel bands (bands, frames) are nearest to these.

    By the multiplicative updates of Lee and Seung (NIPS 2000, theorem 1) for min |A x - b|^2: x <- x A'b / A'A x.
    """
    filters = _filters(scale)
    wanted, gram = filters.T @ bands, filters.T @ filters
    found = wanted.clone()
    for _ in range(iterations):
        found *= wanted / (gram @ found).clamp(min=1e-12)
    return found


def griffin_lim(
    magnitudes: Tensor, scale: MelScale, *, iterations: int = 32, momentum: float = 0.99
) -> Tensor:
    """Samples (frames * hop,) whose STFT has about these magnitudes (window // 2 + 1, frames), by alternating projections.

    Griffin and Lim (IEEE TASSP 32, 1984), with the momentum of Perraudin, Balazs and Sondergaard (WASPAA 2013). It starts from
    random phases of a fixed seed, so that equal magnitudes give equal samples.
    """
    generator = torch.Generator().manual_seed(0)
    phases = 2 * torch.pi * torch.rand(magnitudes.shape, generator=generator)
    spectrum, before = torch.polar(torch.ones_like(phases), phases), 0
    length = magnitudes.shape[1] * scale.hop
    for _ in range(iterations):
        found = _stft(
            _istft(magnitudes * spectrum, scale, length - 1), scale
        )  # the last sample would begin a frame
        spectrum = torch.sgn(found - momentum / (1 + momentum) * before)
        before = found
    return _istft(magnitudes * spectrum, scale, length)
