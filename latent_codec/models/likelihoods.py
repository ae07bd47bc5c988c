"""Discretized likelihoods of 8-bit values, and those that end a decoder: p(image | latents), whose code length is in bits.

features --likelihood.head--> parameters --log_prob(image)--> nats of each image
                                         --mean-------------> image in [-1, 1]
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NUM_VALUES = 256
BIN_WIDTH = 2 / (NUM_VALUES - 1)
"""Of 8-bit values in [-1, 1]."""


def scale_values(values: Tensor, num_values: int, dtype: torch.dtype) -> Tensor:
    """0..num_values - 1 to -1..1."""
    return (values.to(torch.float64) * (2 / (num_values - 1)) - 1).to(dtype)


def discretized_logistic(values: Tensor, means: Tensor, log_scales: Tensor, num_values: int) -> Tensor:
    """Log-probability of values 0..K - 1 under logistics on -1..1 (arXiv:1701.05517, equation 2).

        P(x) = F((x + 1/(K-1) - mean) / scale) - F((x - 1/(K-1) - mean) / scale),  F the sigmoid

    The first and the last value take the tails beyond them. The difference is computed as log F(a) + log F(-b) +
    log(1 - exp(b - a)), which loses nothing however far the value is from the mean.

    Args:
        values: integers.
        means, log_scales: any shapes that broadcast with `values`; the log-scale counts from -7 to 7.
    """
    x = scale_values(values, num_values, means.dtype)
    half = 1 / (num_values - 1)
    sharpness = torch.exp(-log_scales.clamp(-7, 7))
    below = F.logsigmoid((x + half - means) * sharpness).masked_fill(values == num_values - 1, 0)
    above = F.logsigmoid((means - x + half) * sharpness).masked_fill(values == 0, 0)
    inside = torch.log(-torch.expm1(-2 * half * sharpness))
    return below + above + inside.masked_fill((values == 0) | (values == num_values - 1), 0)


def discretized_gaussian(image: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Log-probability of each value of an 8-bit `image` under Gaussians, in nats.

    The mass of a value is the Gaussian's over its bin, the outermost bins reaching to
    infinity (PixelCNN++, arXiv:1701.05517, equation 2, with the normal distribution in
    place of the logistic). Where a bin holds less mass than float32 can subtract, density x width replaces it.

    Args:
        image: on the 256 values of [-1, 1].
        mean: shaped like `image`.
        log_std: log of the standard deviation in units of [-1, 1]; broadcast.
    """
    image, mean, log_std = image.float(), mean.float(), log_std.float()
    distance = image - mean
    inverse = torch.exp(-log_std)
    above = torch.where(image > 1 - BIN_WIDTH / 4, math.inf, (distance + BIN_WIDTH / 2) * inverse)
    below = torch.where(image < -1 + BIN_WIDTH / 4, -math.inf, (distance - BIN_WIDTH / 2) * inverse)
    # Both tails are measured on the side where the normal distribution's mass is small and exact.
    flip = below > 0
    low, high = torch.where(flip, -above, below), torch.where(flip, -below, above)
    mass = torch.special.ndtr(high) - torch.special.ndtr(low)
    log_density = -0.5 * (distance * inverse).square() - log_std - 0.5 * math.log(2 * math.pi)
    small = mass < 1e-6
    return torch.where(small, log_density + math.log(BIN_WIDTH), torch.log(mass.clamp_min(1e-6)))


def kl_divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(q(z|x) || N(0, I)) in nats per latent value: VAE, equation 10 (arXiv:1312.6114), unsummed."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)


class GaussianLikelihood(nn.Module):
    """Discretized Gaussians around a mean image, of one learned standard deviation (sigma-VAE, arXiv:2006.13202)."""

    def __init__(self, channels: int):
        super().__init__()
        self.num_parameters = channels
        self.log_std = nn.Parameter(torch.tensor(-1.0))

    def initial_parameters(self) -> Tensor:
        """What a network may begin with at every pixel, (num_parameters,): middle gray."""
        return torch.zeros(self.num_parameters)

    def log_prob(self, parameters: Tensor, image: Tensor) -> Tensor:
        """Nats of each image, (B,), on the 256 values of [-1, 1]."""
        return discretized_gaussian(image, parameters, self.log_std).flatten(1).sum(1)

    def mean(self, parameters: Tensor) -> Tensor:
        """The mean image; under an outermost bin, which has no end, it may be beyond [-1, 1]."""
        return parameters


class LogisticMixtureLikelihood(nn.Module):
    """Discretized mixtures of logistics (PixelCNN++, arXiv:1701.05517, sections 2.1 and 2.2).

    A mixture weight is one for all channels of a pixel, and a channel's means depend linearly on the channels before it.

    Args:
        channels: of the image.
        num_mixtures: logistics in a mixture.
    """

    def __init__(self, channels: int, num_mixtures: int):
        super().__init__()
        self.channels, self.num_mixtures = channels, num_mixtures
        self.sizes = [channels, channels, channels * (channels - 1) // 2]
        self.num_parameters = num_mixtures * (1 + sum(self.sizes))

    def initial_parameters(self) -> Tensor:
        """What a network may begin with at every pixel, (num_parameters,): means from black to white, as wide as their distance."""
        count, channels, slopes = self.num_mixtures, self.channels, self.sizes[2]
        means = torch.linspace(-1, 1, count)[:, None].expand(-1, channels)
        log_scales = torch.full((count, channels), -math.log(count))
        rest = torch.cat([means, log_scales, torch.zeros(count, slopes)], 1)
        return torch.cat([torch.zeros(count), rest.flatten()])

    def log_prob(self, parameters: Tensor, image: Tensor) -> Tensor:
        """Nats of each image, (B,), on the 256 values of [-1, 1]."""
        image = image.float()
        log_weights, means, log_scales, slopes = self._split(parameters)
        values = ((image + 1) / BIN_WIDTH).round().long()
        means = torch.stack([self._mean(means, slopes, image, c) for c in range(self.channels)], 2)
        log_probs = discretized_logistic(values[:, None], means, log_scales, NUM_VALUES).sum(2)
        return torch.logsumexp(log_weights + log_probs, 1).flatten(1).sum(1)

    def mean(self, parameters: Tensor) -> Tensor:
        """The mean image, each channel's given the mean of those before it."""
        log_weights, means, _, slopes = self._split(parameters)
        weights, image = log_weights.exp(), means.new_zeros(len(means), 0, *means.shape[3:])
        for channel in range(self.channels):
            mean = self._mean(means, slopes, image, channel).clamp(-1, 1)
            image = torch.cat([image, (weights * mean).sum(1, keepdim=True)], 1)
        return image.to(parameters.dtype)

    def _split(self, parameters: Tensor) -> tuple[Tensor, ...]:
        """Log weights (B, K, H, W); means and log scales (B, K, C, H, W); slopes (B, K, C (C - 1) / 2, H, W); in float32."""
        parameters = parameters.float()
        weights, others = parameters[:, : self.num_mixtures], parameters[:, self.num_mixtures :]
        others = others.unflatten(1, (self.num_mixtures, sum(self.sizes)))
        return weights.log_softmax(1), *others.split(self.sizes, 2)

    def _mean(self, means: Tensor, slopes: Tensor, image: Tensor, channel: int) -> Tensor:
        """A channel's means, (B, K, H, W), given the channels before it."""
        start = channel * (channel - 1) // 2
        mean = means[:, :, channel]
        for earlier in range(channel):
            mean = mean + torch.tanh(slopes[:, :, start + earlier]) * image[:, None, earlier]
        return mean
