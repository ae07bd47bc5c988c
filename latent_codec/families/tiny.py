"""AutoencoderTiny and AutoencoderTinyGN: TAESD and TAEF2, a million parameters each way, no posterior."""

from latent_codec.families.family import Family


class Tiny(Family):
    """Latents close to those of the autoencoder that it imitates."""

    widths_key = "encoder_block_out_channels"
    channels_last = True
    has_posterior = False
    untiled = "diffusers' tiles of it take 4 latent channels for granted"


class TinyGN(Tiny):
    """TAEF2's, with group norms in the middle."""

    untiled = "its norms take their statistics from the whole image"
