"""HierarchicalKL: a deep hierarchical variational autoencoder, NVAE (Vahdat and Kautz, arXiv:2007.03898).

Groups of Gaussian latents z_1 .. z_L over several scales, top first, each given the groups above it:

    prior       p(z_l | z_<l)    = N(mu_l, sigma_l^2)                                    of z_1: N(0, I)
    posterior   q(z_l | x, z_<l) = N(mu_l + delta_mu_l, (sigma_l delta_sigma_l)^2)       (equation 2)

Latents here are standardized, e_l = (z_l - mu_l) / sigma_l. So their prior is N(0, I) in every group, whatever is above it,
and the divergence of equation 2 is that of N(delta_mu_l / sigma_l, delta_sigma_l^2) from it.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import AutoencoderMixin, DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.accelerate_utils import apply_forward_hook
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn
from torch.nn import functional as F

from latent_codec.metrics import round_to_8_bits
from latent_codec.models.hierarchical_vq import CheckpointedSequential
from latent_codec.models.likelihoods import GaussianLikelihood, LogisticMixtureLikelihood, kl_divergence
from latent_codec.models.own_weights import OwnWeights
from latent_codec.tensors import check_shape

LOG_STD_LIMIT = 5.0
"""Logs of standard deviations are squashed to -5 to 5, as in the published code."""


class NegativeElbo(NamedTuple):
    """-ELBO of images, and what it is made of."""

    nll: Tensor
    """-log p(image | latents) in nats, (B,)."""
    kl: Tensor
    """KL(q(z_l | x, z_<l) || p(z_l | z_<l)) in nats, (B, groups), top first."""
    num_dims: int
    """Values of an image."""

    @property
    def bits_per_dim(self) -> Tensor:
        """-ELBO in bits per value of each image, (B,): an upper bound of its code length."""
        return (self.nll + self.kl.sum(1)) / (self.num_dims * math.log(2))


class Inference(NamedTuple):
    """What the top-down pass gives of an image; lists are of groups, top first."""

    hidden: Tensor
    """What the image is decoded from."""
    latents: list[Tensor]
    means: list[Tensor]
    """Of the standardized latents, as are log_variances: what each group was drawn from."""
    log_variances: list[Tensor]

    @property
    def divergences(self) -> list[Tensor]:
        """KL divergences from the prior in nats, shaped like the latents; float32."""
        return [kl_divergence(*map(Tensor.float, each)) for each in zip(self.means, self.log_variances)]


class HierarchicalKL(OwnWeights, AutoencoderMixin, ModelMixin, ConfigMixin):
    """NVAE at a size that trains on a CPU: groups of latents of two or more resolutions, with residual posteriors.

        image --stem--> features --encoder cells--+--downsample--> ... --> features of the top group
                                                  |                            |
                             features of a group  |                            v   learned constant
        +------------------------------------ posterior                    posterior <--+
        |                                         ^                            |        |
        v           e_l -> z_l, added             |                            v        v
        hidden <--------upsample, decoder cells---+--- ... <---------------- hidden <-- e_1
          |
          +--image_decoder--> parameters --likelihood--> image, log p(image | latents)

    The bottom-up pass gives features of every group; the top-down pass is shared by prior and posterior. There is no
    batch norm: residual branches begin at 0 instead, so that training and evaluation compute the same.

    `encode` and `decode` work on a list of groups' latents, top first, or on one tensor (`pack`): all groups next to one
    another as channels, on the finest group's grid.

    Args:
        in_channels: of the image.
        patch_size: pixels per position of the first scale, per side; a power of two.
        block_out_channels: channels of each scale, finest first; every scale has half the last one's resolution.
        groups_per_scale: groups of latents of each scale, finest first; 0 for a scale without.
        latent_channels: of each group.
        cells_per_group: residual cells before each group, in both passes, and before the image.
        expansion: width of the decoder cells' depthwise convolutions, in multiples of the scale's.
        kernel_size: of these, odd.
        likelihood: of the 8-bit values. `logistic_mixture`: a mixture for every pixel (arXiv:1701.05517); `gaussian`: a mean
            image, and one learned standard deviation.
        num_mixtures: logistics in a mixture.
        sample_size: side of the training images.

    Raises:
        ValueError: for sizes of which there is no network.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        patch_size: int = 2,
        block_out_channels: tuple[int, ...] = (32, 64),
        groups_per_scale: tuple[int, ...] = (2, 2),
        latent_channels: int = 8,
        cells_per_group: int = 1,
        expansion: int = 3,
        kernel_size: int = 5,
        likelihood: Literal["logistic_mixture", "gaussian"] = "logistic_mixture",
        num_mixtures: int = 5,
        sample_size: int = 32,
    ):
        super().__init__()
        widths, counts = list(block_out_channels), list(groups_per_scale)
        if patch_size < 1 or patch_size & (patch_size - 1):
            raise ValueError(f"expected a power of two as patch_size, got {patch_size}")
        if not widths or len(widths) != len(counts):
            raise ValueError(
                f"expected as many groups_per_scale as block_out_channels, got {counts} and {widths}"
            )
        if min(counts) < 0 or counts[-1] < 1:
            raise ValueError(
                f"expected groups_per_scale of at least 0, and 1 at the last, coarsest scale, got {counts}"
            )
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"expected an odd kernel_size, got {kernel_size}")
        finest = next(scale for scale, count in enumerate(counts) if count)

        def encoder_cells(width: int) -> CheckpointedSequential:
            return CheckpointedSequential(*(EncoderCell(width) for _ in range(cells_per_group)))

        def decoder_cells(width: int) -> CheckpointedSequential:
            return CheckpointedSequential(
                *(DecoderCell(width, expansion, kernel_size) for _ in range(cells_per_group))
            )

        # Above the finest group: what is made of the image before it, and of the hidden state after it.
        stem: list[nn.Module] = [
            nn.PixelUnshuffle(patch_size),
            nn.Conv2d(in_channels * patch_size**2, widths[0], 3, padding=1),
        ]
        image_decoder: list[nn.Module] = [decoder_cells(widths[finest])]
        for scale in range(finest):
            stem += [encoder_cells(widths[scale]), downsampling(widths[scale], widths[scale + 1])]
        for scale in reversed(range(finest)):
            image_decoder += [upsampling(widths[scale + 1], widths[scale]), decoder_cells(widths[scale])]
        self.stem = nn.Sequential(*stem)

        # Module i of one pass is at the scale of module i of the other; the bottom-up pass runs backward through its own.
        bottom_up: list[nn.Module] = []
        top_down: list[nn.Module] = []
        for scale in reversed(range(finest, len(widths))):
            width = widths[scale]
            if top_down:
                bottom_up.append(downsampling(width, widths[scale + 1]))
                top_down.append(upsampling(widths[scale + 1], width))
            for _ in range(counts[scale]):
                is_top = not top_down
                bottom_up.append(encoder_cells(width))
                cells = nn.Sequential() if is_top else decoder_cells(width)
                top_down.append(LatentGroup(width, latent_channels, cells, has_prior=not is_top))
            if not counts[scale]:
                bottom_up.append(encoder_cells(width))
                top_down.append(decoder_cells(width))
        self.top = nn.Parameter(torch.zeros(1, widths[-1], 1, 1))
        self.bottom_up, self.top_down = nn.ModuleList(bottom_up), nn.ModuleList(top_down)

        if likelihood == "gaussian":
            self.image_likelihood: GaussianLikelihood | LogisticMixtureLikelihood = GaussianLikelihood(
                in_channels
            )
        elif likelihood == "logistic_mixture":
            self.image_likelihood = LogisticMixtureLikelihood(in_channels, num_mixtures)
        else:
            raise ValueError(f"expected the likelihood logistic_mixture or gaussian, got {likelihood!r}")
        num_outputs = self.image_likelihood.num_parameters * patch_size**2
        conv_out = nn.Conv2d(widths[0], num_outputs, 3, padding=1)
        with torch.no_grad():
            start = self.image_likelihood.initial_parameters()
            conv_out.bias.copy_(start.repeat_interleave(patch_size**2))  # in the order of PixelShuffle
        image_decoder += [nn.SiLU(), conv_out]
        self.image_decoder = nn.Sequential(*image_decoder, nn.PixelShuffle(patch_size))

    @property
    def groups(self) -> "list[LatentGroup]":
        """Top first."""
        return [module for module in self.top_down if isinstance(module, LatentGroup)]

    @property
    def group_sides(self) -> list[int]:
        """Side in pixels of what one position of each group covers, top first."""
        counts = self.config.groups_per_scale
        sides = [
            self.config.patch_size * 2**scale for scale, count in enumerate(counts) for _ in range(count)
        ]
        return sides[::-1]

    @property
    def multiple(self) -> int:
        """Common divisor of both sides of an image: pixels per position of the top group."""
        return self.group_sides[0]

    def group_shapes(self, height: int, width: int) -> list[tuple[int, int, int]]:
        """(channels, h, w) of each group's latents, top first, for an image of `height` by `width` pixels.

        Raises:
            ValueError: if a side is not a positive multiple of `multiple`.
        """
        if min(height, width) < 1 or height % self.multiple or width % self.multiple:
            raise ValueError(
                f"expected an image whose sides are multiples of {self.multiple}, the pixels of a position of the top group, "
                f"got {height} x {width}; pad or crop it"
            )
        channels = self.config.latent_channels
        return [(channels, height // side, width // side) for side in self.group_sides]

    def pack(self, latents: Sequence[Tensor]) -> Tensor:
        """Latents of all groups, top first -> one tensor (B, groups x latent_channels, h, w) on the finest grid.

        A position of a coarser group becomes r x r equal ones, each 1/r of its value, so that norms stay; `unpack` sums them, so
        that N(0, I) on the finest grid is N(0, I) in every group.
        """
        sides = self.group_sides
        ratios = [side // sides[-1] for side in sides]
        spread = [
            (each / ratio).repeat_interleave(ratio, 2).repeat_interleave(ratio, 3)
            for each, ratio in zip(latents, ratios, strict=True)
        ]
        return torch.cat(spread, 1)

    def unpack(self, packed: Tensor) -> list[Tensor]:
        """The inverse of `pack`.

        Raises:
            ValueError: for another number of channels, or sides that are no multiples of the top group's.
        """
        sides = self.group_sides
        channels = self.config.latent_channels
        check_shape(packed, "latents", ("B", len(sides) * channels, "h", "w"))
        self.group_shapes(*(side * sides[-1] for side in packed.shape[2:]))
        ratios = [side // sides[-1] for side in sides]
        return [
            F.avg_pool2d(each, ratio) * ratio if ratio > 1 else each
            for each, ratio in zip(packed.split(channels, 1), ratios)
        ]

    @apply_forward_hook
    def encode(
        self, x: Tensor, *, sample: bool = False, generator: torch.Generator | None = None
    ) -> list[Tensor]:
        """Image (B, C, H, W) in [-1, 1] -> standardized latents of each group, top first.

        Args:
            sample: draw each group's from its posterior, given those drawn above it; otherwise means.

        Raises:
            ValueError: for another number of channels, or sides that do not divide.
        """
        return self._infer(self._features(x), sample=sample, generator=generator).latents

    def posterior(self, x: Tensor) -> "HierarchicalPosterior":
        """Image (B, C, H, W) in [-1, 1] -> what `pack`ed latents are drawn from."""
        return HierarchicalPosterior(self, self._features(x))

    @apply_forward_hook
    def decode(
        self,
        latents: Tensor | Sequence[Tensor],
        return_dict: bool = True,
        generator: torch.Generator | None = None,
        *,
        temperature: float = 0.0,
    ) -> DecoderOutput | tuple[Tensor]:
        """Latents of the groups, top first, or `pack`ed -> `sample`, the likelihood's mean image.

        Args:
            latents: a list may end after any group; the others come from the prior.
            temperature: of those, the prior's standard deviations are multiplied by it; 0: the prior's means.

        Raises:
            ValueError: for no or too many groups, other shapes or a temperature below 0.
        """
        groups = self.unpack(latents) if isinstance(latents, Tensor) else list(latents)
        sample = self.image_likelihood.mean(self._image_parameters(groups, temperature, generator))
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def forward(self, sample: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Image -> its reconstruction from the posterior's means, `sample`."""
        return self.decode(self.encode(sample), return_dict=return_dict)

    @torch.no_grad()
    def sample(
        self,
        num: int,
        temperature: float = 1.0,
        *,
        size: tuple[int, int] | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw latents from the prior and decode them to mean images, (num, C, H, W) in [-1, 1].

        Args:
            temperature: factor of every group's standard deviation.
            size: height and width; None: those of the training images.

        Raises:
            ValueError: for a size that does not divide, or a temperature below 0.
        """
        height, width = size or (self.config.sample_size,) * 2
        top, *_ = self.group_shapes(height, width)
        noise = randn_tensor((num, *top), generator, self.device, torch.float32).to(self.dtype)
        return self.decode([temperature * noise], generator=generator, temperature=temperature).sample.clamp(
            -1, 1
        )

    @apply_forward_hook
    def elbo(
        self, image: Tensor, *, num_groups: int | None = None, generator: torch.Generator | None = None
    ) -> NegativeElbo:
        """-ELBO of 8-bit images by one draw of their latents.

        Args:
            image: (B, C, H, W) in [-1, 1]; rounded to the 256 values whose probability counts.
            num_groups: how many groups, from the top, the posterior informs; the others are drawn from the prior, which costs
                nothing. None: all.

        Raises:
            ValueError: for another number of groups or channels, or sides that do not divide.
        """
        image = round_to_8_bits(image.float())
        features = self._features(image.to(self.dtype))
        found = self._infer(features, sample=True, generator=generator, num_groups=num_groups)
        nll = -self.image_likelihood.log_prob(self.image_decoder(found.hidden), image)
        kl = torch.stack([each.flatten(1).sum(1) for each in found.divergences], 1)
        return NegativeElbo(nll, kl, image[0].numel())

    def _features(self, image: Tensor) -> list[Tensor]:
        """The bottom-up pass: an image -> features at each module of the top-down pass."""
        check_shape(image, "an image", ("B", self.config.in_channels, "H", "W"))
        self.group_shapes(*image.shape[2:])
        features = [self.stem(image)]
        for module in reversed(self.bottom_up):
            features.append(module(features[-1]))
        return features[:0:-1]

    def _infer(
        self,
        features: list[Tensor],
        *,
        sample: bool,
        generator: torch.Generator | None = None,
        num_groups: int | None = None,
    ) -> "Inference":
        """The top-down pass given an image's features; groups beyond `num_groups` are drawn from the prior."""
        count = len(self.groups)
        num_groups = count if num_groups is None else num_groups
        if not 0 <= num_groups <= count:
            raise ValueError(f"expected num_groups from 0 to {count}, the model's, got {num_groups}")
        latents: list[Tensor] = []
        means: list[Tensor] = []
        log_variances: list[Tensor] = []

        def infer(position: int, group: LatentGroup, hidden: Tensor, log_std: Tensor) -> Tensor:
            mean = log_variance = torch.zeros_like(log_std)
            if len(latents) < num_groups:
                mean, log_variance = group.posterior(hidden, features[position], log_std)
            value = mean
            if sample:
                value = mean + torch.exp(0.5 * log_variance) * _noise_like(mean, generator)
            for values, each in zip((latents, means, log_variances), (value, mean, log_variance)):
                values.append(each)
            return value

        batch, _, *grid = features[0].shape
        hidden = self._descend(infer, batch, grid)
        return Inference(hidden, latents, means, log_variances)

    def _image_parameters(
        self, latents: list[Tensor], temperature: float, generator: torch.Generator | None
    ) -> Tensor:
        """The likelihood's parameters, given the latents of the first groups and draws from the prior of the others."""
        self._check_latents(latents)
        if not temperature >= 0:
            raise ValueError(f"expected a temperature of at least 0, got {temperature}")
        given = iter(latents)

        def take(position: int, group: LatentGroup, hidden: Tensor, log_std: Tensor) -> Tensor:
            value = next(given, None)
            if value is None:
                value = torch.zeros_like(log_std)
                if temperature:
                    value = temperature * _noise_like(log_std, generator)
            return value

        batch, _, *grid = latents[0].shape
        return self.image_decoder(self._descend(take, batch, grid))

    def _descend(
        self,
        latents_of: "Callable[[int, LatentGroup, Tensor, Tensor], Tensor]",
        batch: int,
        grid: Sequence[int],
    ) -> Tensor:
        """The top-down pass from the top group's grid; return the hidden state.

        Args:
            latents_of: called with a group's position in the pass, the group, the hidden state and the prior's log standard
                deviation; gives its standardized latents.
        """
        hidden = self.top.expand(batch, -1, *grid)
        for position, module in enumerate(self.top_down):
            if isinstance(module, LatentGroup):
                hidden = module.cells(hidden)
                mean, log_std = module.prior(hidden)
                standardized = latents_of(position, module, hidden, log_std)
                hidden = hidden + module.latents_in(mean + torch.exp(log_std) * standardized)
            else:
                hidden = module(hidden)
        return hidden

    def _check_latents(self, latents: Sequence[Tensor]) -> None:
        """Raise ValueError unless these are latents of the first groups."""
        count = len(self.groups)
        if not 1 <= len(latents) <= count:
            raise ValueError(f"expected latents of 1 to {count} groups, top first, got {len(latents)}")
        check_shape(latents[0], "latents of group 1", ("B", self.config.latent_channels, "h", "w"))
        batch, _, *grid = latents[0].shape
        shapes = self.group_shapes(*(side * self.multiple for side in grid))
        for number, (each, shape) in enumerate(zip(latents, shapes), 1):
            check_shape(each, f"latents of group {number}", (batch, *shape))


class HierarchicalPosterior(DiagonalGaussianDistribution):
    """What an image's latents, packed, are drawn from, group by group.

    Mean and variance of each group are those given the means above it, and `mode` packs these means. A `sample` is
    ancestral: every group is drawn given the draws above it.
    """

    def __init__(self, model: HierarchicalKL, features: list[Tensor]):
        self._model, self._features = model, features
        found = model._infer(features, sample=False)
        ratios = [side // model.group_sides[-1] for side in model.group_sides]
        log_variances = [
            each.repeat_interleave(ratio, 2).repeat_interleave(ratio, 3)
            for each, ratio in zip(found.log_variances, ratios)
        ]
        super().__init__(torch.cat([model.pack(found.means), *log_variances], 1))
        self.nats_per_value = model.pack([each / ratio for each, ratio in zip(found.divergences, ratios)])
        """KL(q || p) in nats, (B, c, h, w): a coarser group's is spread over its positions, so that sums are those of the groups."""

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        found = self._model._infer(self._features, sample=True, generator=generator)
        return self._model.pack(found.latents)

    def kl(self, other: DiagonalGaussianDistribution | None = None) -> Tensor:
        """Nats of each image, (B,), where the means are all that is above a group."""
        if other is not None:
            raise ValueError("expected None, as the divergence is from the prior, got another distribution")
        return self.nats_per_value.flatten(1).sum(1)


class LatentGroup(nn.Module):
    """One group of latents: its prior, its posterior, and how they enter the hidden state.

    Args:
        width: channels of the hidden state.
        latent_channels: of the group.
        cells: what the hidden state goes through before.
        has_prior: False for the top group, whose prior is N(0, I).
    """

    def __init__(self, width: int, latent_channels: int, cells: nn.Module, *, has_prior: bool):
        super().__init__()
        self.cells = cells
        self.latent_channels = latent_channels
        self.prior_out = zeroed(nn.Conv2d(width, 2 * latent_channels, 1)) if has_prior else None
        self.hidden_in = nn.Conv2d(width, width, 1)
        self.posterior_out = zeroed(nn.Conv2d(width, 2 * latent_channels, 3, padding=1))
        self.latents_in = nn.Conv2d(latent_channels, width, 1)

    def prior(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """mu and log sigma."""
        if self.prior_out is None:
            zeros = hidden.new_zeros(len(hidden), self.latent_channels, *hidden.shape[2:])
            return zeros, zeros
        mean, log_std = self.prior_out(F.silu(hidden)).chunk(2, 1)
        return mean, squashed(log_std)

    def posterior(self, hidden: Tensor, features: Tensor, log_std: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the standardized latents: delta_mu / sigma, 2 log delta_sigma.

        Args:
            log_std: the prior's log sigma.
        """
        joined = F.silu(features + self.hidden_in(hidden))
        delta_mean, log_delta = self.posterior_out(joined).chunk(2, 1)
        return delta_mean * torch.exp(-log_std), 2 * squashed(log_delta)


class EncoderCell(nn.Module):
    """Residual cell of the bottom-up pass (figure 3b): two 3x3 convolutions and squeeze-excitation."""

    def __init__(self, channels: int):
        super().__init__()
        self.branch = nn.Sequential(
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.SiLU(),
            zeroed(nn.Conv2d(channels, channels, 3, padding=1)),
            SqueezeExcitation(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class DecoderCell(nn.Module):
    """Residual cell of the top-down pass (figure 3a): depthwise-separable, in `expansion` times as many channels."""

    def __init__(self, channels: int, expansion: int, kernel_size: int):
        super().__init__()
        inner = channels * expansion
        self.branch = nn.Sequential(
            nn.Conv2d(channels, inner, 1),
            nn.SiLU(),
            nn.Conv2d(inner, inner, kernel_size, padding=kernel_size // 2, groups=inner),
            nn.SiLU(),
            zeroed(nn.Conv2d(inner, channels, 1)),
            SqueezeExcitation(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class SqueezeExcitation(nn.Module):
    """Scale channels by gates that the mean over the image decides (arXiv:1709.01507)."""

    def __init__(self, channels: int, reduction: int = 4):
        super().__init__()
        hidden = max(channels // reduction, 4)
        self.gates = nn.Sequential(
            nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gates(x.mean((2, 3)))[..., None, None]


def downsampling(narrow: int, wide: int) -> nn.Module:
    """Half the resolution."""
    return nn.Conv2d(narrow, wide, 3, stride=2, padding=1)


def upsampling(wide: int, narrow: int) -> nn.Module:
    """Twice the resolution, by repetition."""
    return nn.Sequential(nn.Conv2d(wide, narrow, 1), nn.Upsample(scale_factor=2))


def zeroed(layer: nn.Conv2d) -> nn.Conv2d:
    """The layer with zeros as weights: what it ends begins as nothing."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def squashed(log_std: Tensor) -> Tensor:
    return LOG_STD_LIMIT * torch.tanh(log_std / LOG_STD_LIMIT)


def _noise_like(tensor: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal draws, in float32 whatever the dtype, so that a generator gives the same in all."""
    return randn_tensor(tensor.shape, generator, tensor.device, torch.float32).to(tensor.dtype)
