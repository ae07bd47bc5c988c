"""Loss terms of the autoencoder objectives, each under its equation, and the corruptions of denoising.

All terms are means over an image's dimensions (channels x height x width), so that
one weight means the same at every resolution; `nats` of a likelihood or divergence
are likewise per dimension of the image.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from latent_codec.metrics import lab
from latent_codec.models.likelihoods import discretized_gaussian
from latent_codec.models.likelihoods import kl_divergence as kl_divergence

BERNOULLI_MARGIN = 1 / 256  # nearest probability to 0 and 1 before the loss continues linearly
COLOR_SIDE = 8
"""Of the squares, in pixels, whose mean hues are compared."""


def gaussian_nll(image: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Negative log-likelihood of 8-bit `image` under a discretized Gaussian, in nats per dimension.

    A learned global standard deviation is the sigma-VAE (Rybkin et al., arXiv:2006.13202).

    Args:
        image: (N, C, H, W) on the 256 levels of [-1, 1].
        mean: shaped like `image`.
        log_std: log of the standard deviation in units of [-1, 1]; broadcast.
    """
    return -discretized_gaussian(image, mean, log_std).mean()


def bernoulli_nll(image: Tensor, mean: Tensor) -> Tensor:
    """Cross-entropy of an image whose values are probabilities of white, in nats per dimension.

    The reconstruction stays an image: its value v in [-1, 1] is the probability
    p = (v + 1) / 2. Outside of [1/256, 255/256] the loss goes on along its tangent,
    so that a decoder that overshoots to the wrong side is still pulled back; beyond the right
    side it is constant, so that the loss is bounded by 0.

    Args:
        image: (N, C, H, W), -1 or 1 (binarized data; anything between is a soft label,
            whose cross-entropy is no likelihood).
        mean: shaped like `image`.
    """
    target, probability = (image.float() + 1) / 2, (mean.float() + 1) / 2
    inside = probability.clamp(BERNOULLI_MARGIN, 1 - BERNOULLI_MARGIN)
    value = F.binary_cross_entropy(inside, target, reduction="none")
    slope = (inside - target) / (inside * (1 - inside))
    return (value + ((probability - inside) * slope.detach()).clamp_min(0)).mean()


def nats_to_bits_per_dim(nats: Tensor | float) -> Tensor | float:
    return nats / math.log(2)


def hinge_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Hinge loss of the discriminator's logits (Geometric GAN, arXiv:1705.02894)."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def adaptive_gan_weight(
    reconstruction: Tensor,
    adversarial: Tensor,
    last_weight: Tensor,
    maximum: float,
    mean_over_processes: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> Tensor:
    """|grad of the reconstruction loss| / |grad of the adversarial loss| at the last layer, capped.

    VQGAN, equation 7 (arXiv:2012.09841), whose published cap of 1e4 lets a vanishing
    adversarial gradient blow the generator up.

    Returns:
        A scalar without gradient, 0 to `maximum`.
    """
    gradients = [
        torch.autograd.grad(term, last_weight, retain_graph=True)[0] for term in (reconstruction, adversarial)
    ]
    wanted, opposed = mean_over_processes(torch.stack(gradients).float())
    return (wanted.norm() / (opposed.norm() + 1e-6)).clamp(0, maximum)


def ramp(step: int, start: int, length: int) -> float:
    """0 before `start`, then growing linearly to 1 over `length` steps."""
    return min(max((step - start + 1) / length, 0.0), 1.0)


def corrupt(
    image: Tensor, generators: list[torch.Generator], *, noise: float, dropped: float, patch: int
) -> Tensor:
    """The denoising autoencoder's input (Vincent et al., 2008): dropped patches, then Gaussian noise.

    Args:
        image: (N, C, H, W) in [-1, 1].
        generators: one per image, on the CPU.
        noise: standard deviation in units of [-1, 1].
        dropped: share of `patch` x `patch` squares set to middle gray, in all channels.

    Returns:
        Shaped like `image`; noise may leave [-1, 1].
    """
    if dropped:
        rows, columns = (math.ceil(side / patch) for side in image.shape[-2:])
        kept = torch.stack([torch.rand(1, rows, columns, generator=g) for g in generators]) >= dropped
        kept = kept.repeat_interleave(patch, 2).repeat_interleave(patch, 3)
        image = image * kept[..., : image.shape[-2], : image.shape[-1]].to(image)
    if noise:
        image = image + noise * torch.stack(
            [torch.randn(image.shape[1:], generator=g) for g in generators]
        ).to(image)
    return image


class Transformation(NamedTuple):
    """What latents and image are both put through (EQ-VAE, arXiv:2502.09509, section 3.2)."""

    turns: int
    """Quarters, counterclockwise."""
    grid: tuple[int, int]
    """(h, w) of the coarsest latents."""
    size: tuple[int, int]
    """(h, w) that they are shrunk to before they are turned."""

    def __call__(self, image: Tensor) -> Tensor:
        """Shrink, antialiased, and turn an image or latents (N, C, H, W), whose sides are multiples of the grid's."""
        if self.size != self.grid:
            sides = zip(image.shape[2:], self.grid, self.size)
            shrunk = [side // whole * part for side, whole, part in sides]
            image = F.interpolate(image, shrunk, mode="bilinear", antialias=True)
        return image.rot90(self.turns, (2, 3))


def draw_transformation(
    generator: torch.Generator, grid: tuple[int, int], least_scale: float
) -> Transformation:
    """A random turn, and a random share of the grid's sides: in three draws of five `least_scale`, otherwise any from there up. Never
    neither, and a turn where a grid is too small to be shrunk."""
    side = min(grid)
    turns = int(torch.randint(4, (), generator=generator))
    least = max(1, math.ceil(least_scale * side))
    part = int(torch.randint(least, side + 1, (), generator=generator))
    if torch.rand((), generator=generator) < 0.6:
        part = least
    if part == side and not turns:
        turns = 1
    return Transformation(turns, grid, tuple(max(1, round(each * part / side)) for each in grid))


def spectral_distance(latents: Tensor, image: Tensor) -> Tensor:
    """How far the latents' spectrum lies from the image's, both on the latents' grid: 0 where their shares of power are equal.

    Mean over radial frequencies of the squared difference of log shares. A share is of a ring of the power spectrum, mean over
    channels and images, without the constant part; high frequencies that an image lacks are what a diffusion model fits last
    (scale equivariance, arXiv:2502.14831, section 3).

    Args:
        latents: (N, C, h, w), h and w at least 4.
        image: (N, channels, H, W), shrunk here to (h, w).
    """
    small = F.interpolate(image.float(), latents.shape[2:], mode="bilinear", antialias=True)
    shares = [_ring_shares(grid) for grid in (latents.float(), small)]
    return (shares[0] - shares[1]).square().mean()


def _ring_shares(grid: Tensor) -> Tensor:
    """Logs of the shares of power of rings as wide as the lowest frequency, up to the highest of the shorter side."""
    height, width = grid.shape[2:]
    power = torch.fft.fft2(grid).abs().square().mean((0, 1))
    down, across = (
        torch.fft.fftfreq(side, device=grid.device) * min(height, width) for side in (height, width)
    )
    ring = (down[:, None].square() + across.square()).sqrt().round().long().clamp_max(min(height, width) // 2)
    sums = power.new_zeros(min(height, width) // 2 + 1).index_add(0, ring.flatten(), power.flatten())[1:]
    return (sums / sums.sum().clamp_min(1e-12)).clamp_min(1e-8).log()


def color_distance(image: Tensor, reconstruction: Tensor) -> Tensor:
    """How far hues are off: mean squared difference of a* and b* (CIE 1976), each the mean of a square of 8x8 px, in units of 100.

    A tint of skin is seen at once and hardly counts in the squared error of pixels, most of which is texture; means over squares
    hold the tint alone.

    Args:
        image: (N, 1, 3 or 4, H, W) in [-1, 1], H and W at least 8.
        reconstruction: shaped like it.
    """
    difference = (lab(reconstruction) - lab(image))[:, 1:] / 100
    return F.avg_pool2d(difference, COLOR_SIDE).square().mean()


def draw_kept_levels(num_levels: int, generators: list[torch.Generator], dropout: float) -> Tensor:
    """Draw how many levels, from the top, each image is decoded from: all, or fewer with probability `dropout`.

    Args:
        num_levels: at least 2.
        generators: one per image, on the CPU.

    Returns:
        int64 (N,), 1 to `num_levels`; every number below it has the same probability.
    """

    def draw(generator: torch.Generator) -> int:
        drops = torch.rand((), generator=generator) < dropout
        fewer = torch.randint(1, num_levels, (), generator=generator)
        return int(fewer) if drops else num_levels

    return torch.tensor([draw(generator) for generator in generators])
