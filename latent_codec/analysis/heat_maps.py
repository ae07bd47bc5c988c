"""Heat maps: where an image is unusual, by a codec's error relative to normal images' at equal local gradient.

    image, reconstruction --> error e, smoothed --+--> e / (m(g) + floor)     m(g): the mean error of normal images
                    image --> gradient g ---------^                           where their gradient is g

A codec loses most at edges and in texture, also of normal images, so that its plain error shows where an image is busy.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

NUM_BINS = 48
LEAST, MOST = 1e-3, 2.0
"""Gradients outside of these count as these, in units of [-1, 1] per pixel."""
ERROR_SMOOTHING, GRADIENT_SMOOTHING = 3.0, 1.0
"""Standard deviations, in pixels, of the Gaussians that error and gradient are smoothed by.

The error of a defect is along its outline; smoothed wider than the gradient it is larger inside than where the outline is steep.
"""
FLOOR = 0.3
"""Share of the mean error of normal images that is added to what is usual, or noise in the smoothest places would stand out."""
SHOWN = 8.0
"""How many times the usual error is shown at full strength."""


def local_error(images: Tensor, reconstructions: Tensor) -> Tensor:
    """The squared error around each pixel, mean over channels: (N, C, H, W) twice -> (N, H, W)."""
    return _smoothed((images - reconstructions).square().mean(1), ERROR_SMOOTHING)


def local_gradient(images: Tensor) -> Tensor:
    """The length of the gradient at each pixel, root mean square of the channels': (N, C, H, W) -> (N, H, W)."""
    padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
    across = (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]) / 2
    down = (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]) / 2
    return _smoothed((across.square() + down.square()).mean(1).sqrt(), GRADIENT_SMOOTHING)


@dataclass(frozen=True)
class NormalError:
    """The local error of normal images at each local gradient, in bins of equal ratio from LEAST to MOST."""

    means: Tensor
    """float64 (NUM_BINS,), with the floor."""

    def heat_map(self, images: Tensor, reconstructions: Tensor) -> Tensor:
        """How many times as large as usual the error is: (N, C, H, W) twice -> (N, H, W); of normal images mostly below 1."""
        usual = self.means.to(images.device)[_bins(local_gradient(images))]
        return (local_error(images, reconstructions) / usual).float()


class NormalErrorMeter:
    """Gathers the errors of normal images, batch by batch."""

    def __init__(self):
        self._sums = torch.zeros(NUM_BINS, dtype=torch.float64)
        self._counts = torch.zeros(NUM_BINS, dtype=torch.float64)

    def add(self, images: Tensor, reconstructions: Tensor) -> None:
        """Count in (N, C, H, W) twice."""
        bins = _bins(local_gradient(images)).flatten().cpu()
        errors = local_error(images, reconstructions).flatten().double().cpu()
        self._sums += torch.bincount(bins, errors, NUM_BINS)
        self._counts += torch.bincount(bins, minlength=NUM_BINS)

    def result(self) -> NormalError:
        """The means and the floor; that of a bin with fewer than 1,000 pixels is taken together with its nearest neighbors'."""
        means = torch.empty_like(self._sums)
        for number in range(NUM_BINS):
            for reach in range(NUM_BINS):
                near = slice(max(number - reach, 0), number + reach + 1)
                if self._counts[near].sum() >= min(1000, self._counts.sum()):
                    break
            means[number] = self._sums[near].sum() / self._counts[near].sum()
        return NormalError(means + max(FLOOR * float(self._sums.sum() / self._counts.sum()), 1e-8))


def blend(image: Tensor, heat_map: Tensor) -> Tensor:
    """Show a heat map (H, W) in red over a gray copy of its image (C, H, W): (3, H, W) in [-1, 1].

    Where the error is as that of normal images the image is unchanged; at SHOWN times as much it is red.
    """
    strength = (heat_map.clamp(min=1).log() / torch.tensor(SHOWN).log()).clamp(max=1) * 0.85
    gray = image[:3].mean(0, keepdim=True).expand(3, -1, -1)
    red = torch.tensor([1.0, -0.7, -0.9], device=image.device).view(3, 1, 1).expand_as(gray)
    return torch.lerp(gray, red, strength.to(gray).expand_as(gray))


def _bins(gradients: Tensor) -> Tensor:
    place = (gradients.clamp(LEAST, MOST) / LEAST).log() / torch.tensor(MOST / LEAST).log()
    return (place * NUM_BINS).long().clamp(max=NUM_BINS - 1)


def _smoothed(maps: Tensor, deviation: float) -> Tensor:
    """(N, H, W) -> (N, H, W): the mean of what is inside the image, weighted by a Gaussian."""
    reach = round(3 * deviation)
    away = torch.arange(-reach, reach + 1, device=maps.device, dtype=maps.dtype)
    kernel = (-0.5 * (away / deviation).square()).exp()

    def summed(values: Tensor) -> Tensor:
        across = F.conv2d(values[:, None], kernel.view(1, 1, 1, -1), padding=(0, reach))
        return F.conv2d(across, kernel.view(1, 1, -1, 1), padding=(reach, 0))[:, 0]

    return summed(maps) / summed(torch.ones_like(maps[:1]))
