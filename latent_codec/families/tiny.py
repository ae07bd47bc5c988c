"""AutoencoderTiny and AutoencoderTinyGN: TAESD and TAEF2, a million parameters each way, no posterior."""

from collections.abc import Mapping
from typing import Any

from latent_codec.families.family import Family


class Tiny(Family):
    """Latents close to those of the autoencoder that it imitates."""

    channels_last = True
    has_posterior = False

    @classmethod
    def latent_shape(cls, config: Mapping[str, Any]) -> tuple[int, int]:
        return config["latent_channels"], 2 ** (len(config["encoder_block_out_channels"]) - 1)
