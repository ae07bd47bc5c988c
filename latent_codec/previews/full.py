"""The codec itself as a preview, of fewer latents where asked."""

import torch
from torch import Tensor
from torch.nn import functional as F

from latent_codec.codec import LatentCodec
from latent_codec.previews.palette import UNKNOWN


class FullPreview:
    """A codec's decoder on latents averaged down, or on every n-th index.

    Args:
        codec: not moved or changed.
        max_side: longer side of a preview in pixels, at most; None: not reduced.

    Raises:
        ValueError: for a side below one latent.
    """

    def __init__(self, codec: LatentCodec, max_side: int | None):
        factor = codec.space.downsampling_factor
        if max_side is not None and max_side < factor:
            raise ValueError(
                f"max_side is {max_side}; a latent of {codec.name} is {factor} pixels wide already"
            )
        self.codec, self.max_side = codec, max_side

    def __call__(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) -> RGB (B, 3, H, W)."""
        size = self._reduced(latents.shape[2:], self.codec.space.downsampling_factor)
        if size != latents.shape[2:]:
            latents = F.interpolate(latents.float(), size=size, mode="area")
        return rgb(self.codec.decode(latents, output_type="pt"))

    def indices(self, grids: list[Tensor]) -> Tensor:
        """Grids (B, h, w) of the levels from the top to any other -> RGB; unknown indices as the middle codeword."""
        top, sides = grids[0].shape[1:], position_sides(self.codec)
        size = self._reduced(top, sides[0])
        filled = []
        for grid, side, codebook in zip(grids, sides, codebooks(self.codec)):
            if size != top:
                wanted = [length * sides[0] // side for length in size]
                grid = F.interpolate(grid[:, None].double(), size=wanted, mode="nearest-exact")[:, 0].long()
            filled.append(torch.where(grid == UNKNOWN, _middle(codebook), grid))
        return rgb(self.codec.decode_indices(filled, output_type="pt"))

    def _reduced(self, shape: torch.Size, side: int) -> tuple[int, int]:
        """Rows and columns that `max_side` allows, one at least, of `shape` with positions `side` pixels wide."""
        longest = max(shape) * side
        if self.max_side is None or longest <= self.max_side:
            return tuple(shape)
        return tuple(max(length * self.max_side // longest, 1) for length in shape)


def codebooks(codec: LatentCodec) -> list[Tensor]:
    """Codewords of each level, float32 (codebook_size, dim), top first."""
    autoencoder = codec.autoencoder
    quantizers = getattr(autoencoder, "quantizers", None) or [autoencoder.quantize]
    return [quantizer.embedding.weight.detach().float() for quantizer in quantizers]


def position_sides(codec: LatentCodec) -> list[int]:
    """Side in pixels of what one index of each level stands for, top first."""
    return getattr(codec.autoencoder, "position_sides", [codec.space.downsampling_factor])


def rgb(images: Tensor) -> Tensor:
    """Images (B, 1, 3 or 4, H, W) in [-1, 1] -> RGB (B, 3, H, W); alpha lies on white."""
    if images.shape[1] == 4:
        alpha = (images[:, 3:] + 1) / 2
        images = images[:, :3] * alpha + 1 - alpha
    return images.expand(-1, 3, -1, -1)


def _middle(codebook: Tensor) -> int:
    """The codeword nearest to the mean of all."""
    return int((codebook - codebook.mean(0)).square().sum(1).argmin())
