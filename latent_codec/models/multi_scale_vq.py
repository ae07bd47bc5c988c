"""MultiScaleVQ: indices of one image at growing resolutions, each what is left of the latents by those before it.

The tokenizer of VAR (Tian et al., arXiv:2404.02905, section 3.2, algorithms 1 and 2), with the layers of HierarchicalVQ.
"""

from fractions import Fraction
from itertools import pairwise
from typing import Literal

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn import functional as F

from latent_codec.models.hierarchical_vq import ResidualBlock, decoder, encoder
from latent_codec.models.index_levels import IndexLevels
from latent_codec.models.own_weights import OwnWeights
from latent_codec.models.quantizers import QuantizerOutput, VectorQuantizer
from latent_codec.models.scale_sides import position_sides
from latent_codec.tensors import check_shape
from latent_codec.torch_settings import ignoring_caller_settings


class MultiScaleVQ(OwnWeights, IndexLevels, ModelMixin, ConfigMixin):
    """A residual quantizer over scales, with one codebook for all of them.

        image --encoder--> --quantize_conv--> features, the first residual
        for each side:   residual --area--> side x side --quantizer--> indices --codebook--> codewords
                         residual - enlarged <------- phis[scale] <--bicubic-- codewords
                                       |
        image <--image_decoder-- sum of all enlarged = latents

    A level is a scale. `sides` are grids of a square image of `downsampling_factor` times the last one; every other image
    has as many of that square as fit, so that one index of a scale covers the same part of any image, which need not be
    an integer number of pixels: with a factor of 8, one of the scale of 13 covers 8 * 16 / 13. An image's sides are
    multiples of what an index of the first scale covers.

    Gradients pass through all scales: what a scale leaves is the next one's residual. An enlarged codeword is
    (1 - phi_share) x + phi_share conv(x) of its bicubic enlargement x; without a bias, so that a scale that is left out, or an
    index that is not known, adds nothing.

    Args:
        in_channels: of the image.
        downsampling_factor: pixels per position of the latents, a power of two.
        sides: of the scales' grids, ascending; the first divides every other one.
        hidden_channels, num_residual_blocks, residual_channels: of encoder and decoder, as HierarchicalVQ's.
        embed_dim: length of the codewords, and the latents' channels.
        codebook_size: of the codebook that all scales share.
        phi_share: of the convolution in an enlarged codeword (0.5 in the paper's code).
        beta: of the commitment, the mean over the scales.
        gradient, l2_normalized: of the quantizer (models/quantizers.py).
        scaling_factor, shift_factor, latents_mean, latents_std: of the latents (latent_space.py).
        sample_size: side of the training images.

    Raises:
        ValueError: for a factor that is no power of two, or sides that do not ascend or the first does not divide.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        downsampling_factor: int = 16,
        sides: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
        hidden_channels: int = 128,
        num_residual_blocks: int = 2,
        residual_channels: int = 32,
        embed_dim: int = 32,
        codebook_size: int = 4096,
        phi_share: float = 0.5,
        beta: float = 0.25,
        gradient: Literal["straight-through", "rotation"] = "straight-through",
        l2_normalized: bool = False,
        scaling_factor: float = 1.0,
        shift_factor: float | None = None,
        latents_mean: tuple[float, ...] | None = None,
        latents_std: tuple[float, ...] | None = None,
        sample_size: int = 256,
    ):
        super().__init__()
        if downsampling_factor < 2 or downsampling_factor & (downsampling_factor - 1):
            raise ValueError(
                f"expected a downsampling_factor that is a power of two, got {downsampling_factor}"
            )
        if not sides or sides[0] < 1 or any(one >= other for one, other in pairwise(sides)):
            raise ValueError(f"expected ascending sides, got {tuple(sides)}")
        if any(side % sides[0] for side in sides):
            raise ValueError(f"expected sides that the first one divides, got {tuple(sides)}")
        num_halvings = downsampling_factor.bit_length() - 1

        def residual() -> nn.Sequential:
            blocks = [ResidualBlock(hidden_channels, residual_channels) for _ in range(num_residual_blocks)]
            return nn.Sequential(*blocks, nn.ReLU())

        self.encoder = encoder(in_channels, hidden_channels, num_halvings, residual())
        self.quantize_conv = nn.Conv2d(hidden_channels, embed_dim, 1)
        self.quantize = VectorQuantizer(
            codebook_size, embed_dim, beta=beta / len(sides), gradient=gradient, l2_normalized=l2_normalized
        )
        self.phis = nn.ModuleList(nn.Conv2d(embed_dim, embed_dim, 3, padding=1, bias=False) for _ in sides)
        self.image_decoder = decoder(embed_dim, hidden_channels, in_channels, num_halvings, residual())

    @property
    def quantizers(self) -> list[VectorQuantizer]:
        """The same one for every scale."""
        return [self.quantize] * len(self.config.sides)

    @property
    def quantizer_inputs(self) -> list[nn.Conv2d]:
        """The layer before the quantizer of all scales."""
        return [self.quantize_conv]

    @property
    def latent_channels(self) -> int:
        """Channels of the latents."""
        return self.config.embed_dim

    @property
    def downsampling_factor(self) -> int:
        """Pixels per position of the latents, which are on the last scale's grid."""
        return self.config.downsampling_factor

    @property
    def position_sides(self) -> list[int | Fraction]:
        """Side in pixels of what one index of each scale covers, the coarsest first."""
        return position_sides(self.config.downsampling_factor, self.config.sides)

    def condition_channels(self, level: int) -> int:
        """Channels of `upper_features` as the condition of a level's prior."""
        return self.config.embed_dim

    def encode_quantized(self, image: Tensor) -> list[QuantizerOutput]:
        """Image -> what the quantizer gives at each scale, the coarsest first: the pass that training differentiates.

        Raises:
            ValueError: if the image has the wrong number of channels, or sides that do not divide.
        """
        check_shape(image, "an image", ("B", self.config.in_channels, "H", "W"))
        shapes = self.grid_shapes(*image.shape[2:])
        residual = self.quantize_conv(self.encoder(image))
        outputs: list[QuantizerOutput] = []
        for level, shape in enumerate(shapes):
            outputs.append(self.quantize(F.interpolate(residual, shape, mode="area")))
            residual = residual - self._enlarged(level, outputs[-1].quantized, shapes[-1])
        return outputs

    def latents_of(self, quantized: list[Tensor]) -> Tensor:
        """Codewords of the scales, the coarsest first -> their sum on the last scale's grid; finer ones may be left out."""
        ratio = self.config.sides[-1] // self.config.sides[0]
        shape = tuple(side * ratio for side in quantized[0].shape[2:])
        return sum(self._enlarged(level, codewords, shape) for level, codewords in enumerate(quantized))

    @ignoring_caller_settings()
    def upper_features(self, grids: list[Tensor]) -> Tensor:
        """Condition of the next scale's prior on the coarser scales' indices: the sum of their codewords, on the next scale's
        grid; of all scales: the latents.

        Args:
            grids: int64 (B, h, w) of the scales from the coarsest to any other.
        """
        total, sides = self.latents_of([self.quantize.lookup(grid) for grid in grids]), self.config.sides
        if len(grids) == len(sides):
            return total
        shape = tuple(side * sides[len(grids)] // sides[0] for side in grids[0].shape[1:])
        return F.interpolate(total, shape, mode="area")

    def mean_codeword(self, level: int) -> Tensor:
        """Nothing, (embed_dim,): what is not known of a residual adds nothing to the others."""
        return torch.zeros_like(self.quantize.embedding.weight[0])

    def _enlarged(self, level: int, codewords: Tensor, shape: tuple[int, int]) -> Tensor:
        if codewords.shape[2:] != shape:
            codewords = F.interpolate(codewords, shape, mode="bicubic")
        return torch.lerp(codewords, self.phis[level](codewords), self.config.phi_share)
