"""The codec itself as a preview, of fewer latents where asked."""

import torch
from torch import Tensor
from torch.nn import functional as F

from latent_codec.codec import LatentCodec
from latent_codec.errors import SettingError
from latent_codec.previews.palette import UNKNOWN


class FullPreview:
    """A codec's decoder on latents averaged down, or on every n-th index; made by `LatentPreviewer.full`."""

    def __init__(self, codec: LatentCodec, max_side: int | None):
        factor = codec.latent_space.downsampling_factor
        if max_side is not None and max_side < factor:
            expected = f"at least {factor}, the pixels that a latent of {codec.name} is wide, or None"
            raise SettingError("max_side", expected, max_side)
        self.codec, self.max_side = codec, max_side

    def __call__(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) -> RGB (B, 3, H, W)."""
        size = self._reduced(latents.shape[2:], self.codec.latent_space.downsampling_factor)
        if size != latents.shape[2:]:
            latents = F.interpolate(latents.float(), size=size, mode="area")
        return rgb(self.codec.decode(latents, output_type="pt"))

    def indices(self, indices: list[Tensor]) -> Tensor:
        """Indices (B, h, w) of the levels from the top to any other -> RGB; unknown ones as the middle codeword."""
        top, levels = indices[0].shape[1:], self.codec.levels
        size = self._reduced(top, levels[0].side)
        filled = []
        for each, level in zip(indices, levels):
            if size != top:
                wanted = [length * levels[0].side // level.side for length in size]
                each = F.interpolate(each[:, None].double(), size=wanted, mode="nearest-exact")[:, 0].long()
            filled.append(torch.where(each == UNKNOWN, _middle(level.codebook), each))
        return rgb(self.codec.decode_indices(filled, output_type="pt"))

    def _reduced(self, shape: torch.Size, side: int) -> tuple[int, int]:
        """Rows and columns that `max_side` allows, one at least, of `shape` with positions `side` pixels wide."""
        longest = max(shape) * side
        if self.max_side is None or longest <= self.max_side:
            return tuple(shape)
        return tuple(max(length * self.max_side // longest, 1) for length in shape)


def rgb(images: Tensor) -> Tensor:
    """Images (B, 1, 3 or 4, H, W) in [-1, 1] -> RGB (B, 3, H, W); alpha is composed over white."""
    if images.shape[1] == 4:
        alpha = (images[:, 3:] + 1) / 2
        images = images[:, :3] * alpha + 1 - alpha
    return images.expand(-1, 3, -1, -1)


def _middle(codebook: Tensor) -> int:
    """The codeword nearest to the mean of all."""
    codebook = codebook.detach().float()
    return int((codebook - codebook.mean(0)).square().sum(1).argmin())
