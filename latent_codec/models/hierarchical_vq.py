"""HierarchicalVQ: the autoencoder of VQ-VAE-2, with one grid of indices per level.

VQ-VAE-2 (Razavi et al., arXiv:1906.00446, section 3.1 and figure 2) has two levels, and its one-level case is
VQ-VAE (van den Oord et al., arXiv:1711.00937). The layers are those of DeepMind's Sonnet example as
rosinality/vq-vae-2-pytorch has them, so that its checkpoints fit here once renamed.
"""

from collections import OrderedDict
from itertools import accumulate, pairwise
from operator import mul
from typing import Literal

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn import functional as F

from latent_codec.models.grid_quantizer import QuantizerKind, build_quantizer
from latent_codec.models.index_levels import IndexLevels
from latent_codec.models.own_weights import OwnWeights
from latent_codec.models.quantizers import QuantizerOutput, VectorQuantizer
from latent_codec.tensors import check_shape
from latent_codec.torch_settings import ignoring_caller_settings


class HierarchicalVQ(OwnWeights, IndexLevels, ModelMixin, ConfigMixin):
    """A VQ-VAE-2 of any number of levels, each conditioned on the levels above it.

        image --encoders[1]--> features --encoders[0]--> features
                                  |                         | quantize_convs[0], quantizers[0]
                                  |                         v
                                  |<----decoders[0]---- codewords 0 (top) --> indices 0
                                  | quantize_convs[1], quantizers[1]  |
                                  v                                   | upsamplers[0]
        indices 1 <-- codewords 1 (bottom) ------ concatenate <-------+
                                                       |
        image <--------------decoders[1]----------- latents

    With more levels the step between two repeats: `decoders[l]` takes the codewords of levels 0 to l, brought to
    the grid of level l and concatenated. The last makes the image, every other one features for the next level's
    quantizer. Lists are in the order of levels, top first; only `strides` begins at the image.

    The latents that `encode` gives and `decode` takes are the last concatenation, already quantized:
    (B, levels * embed_dim, H / strides[0], W / strides[0]).

    Args:
        in_channels: of the image.
        strides: powers of two, bottom first: from the image to the finest grid, from there to the next coarser.
        hidden_channels, num_residual_blocks, residual_channels: of every encoder and decoder.
        embed_dim: length of the codewords.
        codebook_sizes: number of codewords, of all levels or of each.
        beta, legacy, gradient, l2_normalized: of the quantizers (models/quantizers.py).
        scaling_factor, shift_factor, latents_mean, latents_std: of the latents (latent_space.py).
        sample_size: side of the training images.
        quantizer: of all levels: "vq" has learned codebooks; "fsq", "lfq", "lfq-successive" and "bsq" fixed grids
            (models/grid_quantizer.py).
        values_per_channel: of "fsq": how many values each channel of a codeword can take.

    Raises:
        ValueError: if strides are not powers of two, or numbers of levels differ.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        strides: tuple[int, ...] = (4, 2),
        hidden_channels: int = 128,
        num_residual_blocks: int = 2,
        residual_channels: int = 32,
        embed_dim: int = 64,
        codebook_sizes: int | tuple[int, ...] = 512,
        beta: float = 0.25,
        legacy: bool = False,
        gradient: Literal["straight-through", "rotation"] = "straight-through",
        l2_normalized: bool = False,
        scaling_factor: float = 1.0,
        shift_factor: float | None = None,
        latents_mean: tuple[float, ...] | None = None,
        latents_std: tuple[float, ...] | None = None,
        sample_size: int = 256,
        quantizer: QuantizerKind = "vq",
        values_per_channel: tuple[int, ...] | None = None,
    ):
        super().__init__()
        if not strides or any(stride < 2 or stride & (stride - 1) for stride in strides):
            raise ValueError(f"strides are {strides}; expected one or more powers of two, 2 and above")
        if hidden_channels < 2 or hidden_channels % 2:
            raise ValueError(f"expected an even number of hidden_channels, got {hidden_channels}")
        num_levels = len(strides)
        sizes = [codebook_sizes] * num_levels if isinstance(codebook_sizes, int) else codebook_sizes
        if len(sizes) != num_levels:
            raise ValueError(f"expected {num_levels} codebook_sizes, one per stride, or one, got {sizes}")
        self.encoders = nn.ModuleList()
        self.quantize_convs = nn.ModuleList()
        self.codebooks = nn.ModuleList()
        self.decoders = nn.ModuleList()
        self.upsamplers = nn.ModuleList()

        def residual() -> nn.Sequential:
            blocks = [ResidualBlock(hidden_channels, residual_channels) for _ in range(num_residual_blocks)]
            return nn.Sequential(*blocks, nn.ReLU())

        for level, (stride, size) in enumerate(zip(reversed(strides), sizes)):
            is_top, is_bottom = level == 0, level == num_levels - 1
            num_halvings = stride.bit_length() - 1
            width = (level + 1) * embed_dim  # of the concatenation at this level
            source_channels = in_channels if is_bottom else hidden_channels
            target_channels = in_channels if is_bottom else embed_dim
            self.encoders.append(encoder(source_channels, hidden_channels, num_halvings, residual()))
            above = 0 if is_top else embed_dim
            self.quantize_convs.append(nn.Conv2d(hidden_channels + above, embed_dim, 1))
            self.codebooks.append(
                build_quantizer(
                    quantizer,
                    size,
                    embed_dim,
                    values_per_channel,
                    beta=beta,
                    legacy=legacy,
                    gradient=gradient,
                    l2_normalized=l2_normalized,
                )
            )
            self.decoders.append(decoder(width, hidden_channels, target_channels, num_halvings, residual()))
            if not is_bottom:
                self.upsamplers.append(upsampling([width] * (num_halvings + 1)))
            # Weights of the mean codeword, in any unit; all 0 counts as all alike.
            self.register_buffer(f"usage_{level}", torch.full((size,), 1 / size))

    @property
    def quantizers(self) -> list[VectorQuantizer]:
        """Top level first."""
        return list(self.codebooks)

    @property
    def quantizer_inputs(self) -> list[nn.Conv2d]:
        """The layer before each level's quantizer."""
        return list(self.quantize_convs)

    @property
    def latent_channels(self) -> int:
        """Channels of the latents."""
        return len(self.codebooks) * self.config.embed_dim

    @property
    def downsampling_factor(self) -> int:
        """Pixels per position of the latents, which are on the bottom grid."""
        return self.config.strides[0]

    @property
    def position_sides(self) -> list[int]:
        """Side in pixels of what one index of each level covers, top first."""
        return list(accumulate(self.config.strides, mul))[::-1]

    @property
    def image_decoder(self) -> nn.Module:
        return self.decoders[-1]

    def latents_of(self, quantized: list[Tensor]) -> Tensor:
        """Codewords of all levels -> the latents that `decode` takes: `concatenate`."""
        return self.concatenate(quantized)

    def condition_channels(self, level: int) -> int:
        """Channels of `upper_features` as the condition of a level's prior."""
        return level * self.config.embed_dim

    def concatenate(self, quantized: list[Tensor]) -> Tensor:
        """Codewords of the levels from the top to any level l -> (B, (l + 1) * embed_dim, h, w), on l's grid."""
        concatenation = quantized[0]
        for upsampler, codewords in zip(self.upsamplers, quantized[1:]):
            concatenation = torch.cat([upsampler(concatenation), codewords], 1)
        return concatenation

    @ignoring_caller_settings()
    def upper_features(self, grids: list[Tensor]) -> Tensor:
        """Condition of the next level's prior on the upper levels' indices: their codewords as the decoder takes them.

        Args:
            grids: int64 (B, h, w) of the levels from the top to any level l.

        Returns:
            `concatenate` of their codewords, (B, (l + 1) * embed_dim, h, w), on l's grid.
        """
        return self.concatenate([quantizer.lookup(grid) for quantizer, grid in zip(self.codebooks, grids)])

    def encode_quantized(self, image: Tensor) -> list[QuantizerOutput]:
        """Image -> what each level's quantizer gives, top level first: the pass that training differentiates.

        Raises:
            ValueError: if the image has the wrong number of channels, or sides that do not divide.
        """
        check_shape(image, "an image", ("B", self.config.in_channels, "H", "W"))
        self.grid_shapes(*image.shape[2:])
        features = [image]
        for encoder in reversed(self.encoders):
            features.append(encoder(features[-1]))
        outputs: list[QuantizerOutput] = []
        for level, quantizer in enumerate(self.codebooks):
            hidden = features.pop()
            if outputs:
                above = self.concatenate([output.quantized for output in outputs])
                hidden = torch.cat([self.decoders[level - 1](above), hidden], 1)
            outputs.append(quantizer(self.quantize_convs[level](hidden)))
        return outputs

    def mean_codeword(self, level: int) -> Tensor:
        """The mean of a level's codewords, (embed_dim,), weighted by how often each is used."""
        weight = self.codebooks[level].embedding.weight
        usage = self.get_buffer(f"usage_{level}").float().clamp_min(1e-12)
        return (usage / usage.sum() @ weight.float()).to(weight.dtype)

    @torch.no_grad()
    def set_usage(self, level: int, counts: Tensor) -> None:
        """Remember how often each codeword of a level is used, as shares.

        Args:
            level: 0 is the top.
            counts: (codebook_size,), in any unit.

        Raises:
            ValueError: for another level or length, negative or infinite counts, or none above 0.
        """
        if not 0 <= level < len(self.codebooks):
            raise ValueError(f"level is {level}; levels are 0 (top) to {len(self.codebooks) - 1}.")
        usage = self.get_buffer(f"usage_{level}")
        check_shape(counts, f"counts of level {level}", usage.shape)
        counts = counts.float()
        if not counts.isfinite().all() or (counts < 0).any() or not counts.any():
            raise ValueError(f"counts of level {level} must be finite, at least 0, and some above 0.")
        usage.copy_(counts / counts.sum())


class CheckpointedSequential(nn.Sequential):
    """Layers in sequence; with gradient checkpointing, training keeps only each layer's input and recomputes the rest."""

    gradient_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = self._gradient_checkpointing_func(layer, x)
            else:
                x = layer(x)
        return x


class ResidualBlock(nn.Module):
    """x + conv1x1(relu(conv3x3(relu(x)))), through fewer channels."""

    def __init__(self, channels: int, residual_channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, residual_channels, 3, padding=1)
        self.conv2 = nn.Conv2d(residual_channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


def encoder(
    in_channels: int, channels: int, num_halvings: int, residual: nn.Sequential
) -> CheckpointedSequential:
    """(B, in_channels, H, W) -> (B, channels, H / 2^n, W / 2^n): a strided convolution per halving."""
    widths = [in_channels, channels // 2] + [channels] * (num_halvings - 1)
    layers: list[nn.Module] = []
    for narrow, wide in pairwise(widths):
        layers += [nn.Conv2d(narrow, wide, 4, stride=2, padding=1), nn.ReLU()]
    layers.append(nn.Conv2d(widths[-1], channels, 3, padding=1))
    return CheckpointedSequential(OrderedDict(downsampling=nn.Sequential(*layers), residual=residual))


def decoder(
    in_channels: int, channels: int, out_channels: int, num_doublings: int, residual: nn.Sequential
) -> CheckpointedSequential:
    """(B, in_channels, h, w) -> (B, out_channels, 2^n h, 2^n w)."""
    widths = [channels] * num_doublings + [out_channels]
    if num_doublings > 1:
        widths[-2] = channels // 2
    return CheckpointedSequential(
        OrderedDict(
            conv_in=nn.Conv2d(in_channels, channels, 3, padding=1),
            residual=residual,
            upsampling=upsampling(widths),
        )
    )


def upsampling(widths: list[int]) -> nn.Sequential:
    """Transposed convolutions between these numbers of channels, each of which doubles both sides."""
    layers: list[nn.Module] = []
    for wide, narrow in pairwise(widths):
        layers += [nn.ConvTranspose2d(wide, narrow, 4, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
