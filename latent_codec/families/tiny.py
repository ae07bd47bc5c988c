"""AutoencoderTiny and AutoencoderTinyGN: TAESD and TAEF2, a million parameters each way, no posterior."""

from typing import TYPE_CHECKING

from latent_codec.families.family import Family

if TYPE_CHECKING:
    from torch import nn


class Tiny(Family):
    """Latents close to those of the autoencoder that it imitates."""

    widths_key = "encoder_block_out_channels"
    channels_last = True
    has_posterior = False
    untiled = "diffusers' tiles of it take 4 latent channels for granted"

    @property
    def decoder_head(self) -> "nn.Sequential":
        from torch import nn

        from latent_codec.models.tiny_autoencoder import Clamp

        layers = self.autoencoder.decoder.layers
        first = next(
            (place for place, layer in enumerate(layers) if isinstance(layer, nn.Upsample)), len(layers)
        )
        return nn.Sequential(Clamp(self.autoencoder.config.latent_magnitude), *layers[:first])

    @property
    def encoder_tail(self) -> "nn.Sequential":
        layers = self.autoencoder.encoder.layers
        strides = [place for place, layer in enumerate(layers) if getattr(layer, "stride", None) == (2, 2)]
        return layers[strides[-1] + 1 if strides else 0 :]


class TinyGN(Tiny):
    """TAEF2's, with group norms in the middle."""

    untiled = "its norms take their statistics from the whole image"
