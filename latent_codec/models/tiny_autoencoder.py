"""TinyAutoencoder: what our tiny autoencoders share, called as diffusers' AutoencoderTiny is."""

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTinyOutput
from diffusers.models.autoencoders.vae import AutoencoderMixin, DecoderOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from latent_codec.models.own_weights import OwnWeights
from latent_codec.tensors import check_shape


class Clamp(nn.Module):
    """m tanh(x / m)."""

    def __init__(self, magnitude: float):
        super().__init__()
        self.magnitude = magnitude

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / self.magnitude) * self.magnitude


class TinyAutoencoder(OwnWeights, ModelMixin, AutoencoderMixin, ConfigMixin):
    """Images in [-1, 1] <-> latents, by networks of images in [0, 1], which a subclass has: `_encode` and `_decode`."""

    use_slicing = False

    def _encode(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) in [0, 1] -> latents (B, D, h, w)."""
        return self.encoder(images)

    def _decode(self, latents: Tensor) -> Tensor:
        """Latents (B, D, h, w) -> images (B, C, H, W) in [0, 1] but for overshoots."""
        raise NotImplementedError

    @apply_forward_hook
    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderTinyOutput | tuple[Tensor]:
        """Image (B, C, H, W) in [-1, 1] -> `latents`, (B, D, h, w).

        Raises:
            ValueError: if it has another number of channels, or dimensions.
        """
        check_shape(x, "an image", ("B", self.config.in_channels, "H", "W"))
        latents = torch.cat([self._encode((part + 1) / 2) for part in self._slices(x)])
        return AutoencoderTinyOutput(latents=latents) if return_dict else (latents,)

    @apply_forward_hook
    def decode(
        self, x: Tensor, generator: torch.Generator | None = None, return_dict: bool = True
    ) -> DecoderOutput | tuple[Tensor]:
        """Latents (B, D, h, w) -> `sample`, (B, C, h f, w f), in [-1, 1] but for overshoots.

        Args:
            generator: ignored; pipelines pass it to every autoencoder.

        Raises:
            ValueError: if they have another number of channels, or dimensions.
        """
        check_shape(x, "latents", ("B", self.config.latent_channels, "h", "w"))
        sample = torch.cat([self._decode(part) * 2 - 1 for part in self._slices(x)])
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def forward(self, sample: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Image -> its reconstruction, `sample`."""
        return self.decode(self.encode(sample).latents, return_dict=return_dict)

    def _slices(self, batch: Tensor) -> list[Tensor]:
        return list(batch.split(1)) if self.use_slicing else [batch]
