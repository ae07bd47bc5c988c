"""AutoencoderTinyVideo: TAEHV, which imitates a video autoencoder's latents, at one frame."""

from collections.abc import Mapping
from typing import Any

from latent_codec.families.family import Family


class TinyVideo(Family):
    """No posterior; it takes and gives images, and makes frames of them inside."""

    taken_as = ()
    has_posterior = False

    @classmethod
    def latent_shape(cls, config: Mapping[str, Any]) -> tuple[int, int]:
        return config["latent_channels"], config["patch_size"] * 2 ** len(config["encoder_time_strides"])
