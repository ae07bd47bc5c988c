"""What autoencoders with several levels of indices have in common, however their levels make up the latents."""

from collections.abc import Sequence
from fractions import Fraction

import torch
from diffusers.models.autoencoders.vae import AutoencoderMixin, DecoderOutput
from diffusers.models.autoencoders.vq_model import VQEncoderOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from latent_codec.models.quantizers import QuantizerOutput, VectorQuantizer
from latent_codec.tensors import check_range, check_shape


class IndexLevels(AutoencoderMixin):
    """Encoding and decoding of several levels of indices; precedes ModelMixin and ConfigMixin among the bases.

        image --encode_quantized--> codewords of each level --latents_of--> latents --image_decoder--> image

    A model of it says what is left open here: its levels, and how their codewords make up the latents.
    """

    use_slicing = False
    quantizers: list[VectorQuantizer]
    """Of each level, top first; levels may share one."""
    position_sides: list[int | Fraction]
    """Side in pixels of what one index of each level covers, top first."""
    latent_channels: int
    image_decoder: nn.Module
    """Latents -> image."""

    def encode_quantized(self, image: Tensor) -> list[QuantizerOutput]:
        """Image -> what each level's quantizer gives, top level first: the pass that training differentiates."""
        raise NotImplementedError

    def latents_of(self, quantized: list[Tensor]) -> Tensor:
        """Codewords of all levels -> the latents that `decode` takes."""
        raise NotImplementedError

    def mean_codeword(self, level: int) -> Tensor:
        """What stands for an index of a level that is not known, (embed_dim,)."""
        raise NotImplementedError

    @property
    def multiple(self) -> int:
        """Common divisor of both sides of an image: pixels per position of the top grid."""
        return self.position_sides[0]

    def grid_shapes(self, height: int, width: int) -> list[tuple[int, int]]:
        """Height and width of each level's grid, top first, for an image of `height` by `width` pixels.

        Raises:
            ValueError: if a side is not a positive multiple of `multiple`.
        """
        if min(height, width) < 1 or height % self.multiple or width % self.multiple:
            raise ValueError(
                f"expected an image whose sides are multiples of {self.multiple}, the "
                f"pixels of a position on the top grid, got {height} x {width}; pad or crop it"
            )
        return [(height // side, width // side) for side in self.position_sides]

    def decode_quantized(self, quantized: list[Tensor]) -> Tensor:
        """The inverse of `encode_quantized`: codewords of each level, top first -> image."""
        if len(quantized) != len(self.quantizers):
            got = f"{len(quantized)}; decode_indices fills in lower levels"
            raise ValueError(f"expected codewords of {len(self.quantizers)} levels, got {got}")
        return self.decode(self.latents_of(quantized)).sample

    @apply_forward_hook
    def encode(self, x: Tensor, return_dict: bool = True) -> VQEncoderOutput | tuple[Tensor]:
        """Image (B, C, H, W) in [-1, 1] -> `latents`, made of codewords, that `decode` takes."""
        latents, _ = self.encode_with_indices(x)
        return VQEncoderOutput(latents=latents) if return_dict else (latents,)

    @apply_forward_hook
    def decode(
        self, latents: Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple[Tensor]:
        """Latents (B, latent_channels, h, w) -> `sample`, (B, C, h f, w f).

        They are decoded as they are: a position's upper part comes from several codewords, so that none is nearest.

        Args:
            generator: ignored; pipelines pass it to every autoencoder.

        Raises:
            ValueError: if they have another number of channels.
        """
        check_shape(latents, "latents", ("B", self.latent_channels, "h", "w"))
        sample = torch.cat([self.image_decoder(part) for part in self._slices(latents)])
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    @apply_forward_hook
    def encode_indices(self, image: Tensor) -> list[Tensor]:
        """Image (B, C, H, W) in [-1, 1] -> indices of each level, int64 (B, h, w), top first."""
        return self.encode_with_indices(image)[1]

    @apply_forward_hook
    def encode_with_indices(self, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Image -> what `encode` and `encode_indices` give of it, in one pass."""
        outputs = [self.encode_quantized(part) for part in self._slices(image)]
        latents = torch.cat([self.latents_of([output.quantized for output in levels]) for levels in outputs])
        return latents, [torch.cat([output.indices for output in level]) for level in zip(*outputs)]

    @apply_forward_hook
    def decode_indices(self, grids: list[Tensor], known: Sequence[Tensor] | None = None) -> Tensor:
        """Indices of the levels, int64 (B, h, w), top first -> image (B, C, H, W).

        The lowest levels may be left out, to show an image level by level; `mean_codeword` replaces them, and indices
        where `known`, bool (B, h, w) for each level, is False.

        Raises:
            ValueError: for no or too many grids, shapes that do not follow from the top grid's, other dtypes than
                int64, and indices beyond the codebook.
        """
        shapes = self._check_grids(grids)
        quantized = [quantizer.lookup(grid) for quantizer, grid in zip(self.quantizers, grids)]
        for level, mask in enumerate(known or ()):
            mean = self.mean_codeword(level)[:, None, None]
            quantized[level] = quantized[level].where(mask[:, None], mean)
        for level in range(len(grids), len(self.quantizers)):
            codeword = self.mean_codeword(level)[None, :, None, None]
            quantized.append(codeword.expand(len(grids[0]), -1, *shapes[level]))
        return self.decode_quantized(quantized)

    def forward(self, sample: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Image -> its reconstruction, `sample`."""
        return self.decode(self.encode(sample).latents, return_dict=return_dict)

    def _slices(self, batch: Tensor) -> list[Tensor]:
        return list(batch.split(1)) if self.use_slicing else [batch]

    def _check_grids(self, grids: list[Tensor]) -> list[tuple[int, int]]:
        """Every level's height and width, as the top grid gives them."""
        num_levels = len(self.quantizers)
        if not isinstance(grids, (list, tuple)) or not 1 <= len(grids) <= num_levels:
            got = f"{len(grids)} index maps" if isinstance(grids, (list, tuple)) else type(grids).__name__
            raise ValueError(f"expected a list of 1 to {num_levels} index maps, top level first, got {got}")
        check_shape(grids[0], "indices of level 0", ("B", "h", "w"), dtype=torch.int64)
        batch, *top = grids[0].shape
        shapes = self.grid_shapes(*(side * self.multiple for side in top))
        for level, (grid, quantizer) in enumerate(zip(grids, self.quantizers)):
            name = f"indices of level {level}"
            check_shape(grid, name, (batch, *shapes[level]), dtype=torch.int64)
            check_range(grid, quantizer.codebook_size, name, "indices of its codebook")
        return shapes
