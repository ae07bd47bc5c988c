"""AutoencoderRAE: a frozen representation encoder with a trained decoder (arXiv:2510.11690), for one square size."""

from typing import Any

from latent_codec.families.family import Config, Family
from latent_codec.families.latent_space import LatentSpace


class RAE(Family):
    """Images in [0, 1] inside, resized to its encoder's side; it scales and shifts by itself."""

    taken_as = ()
    unit_range = True
    has_posterior = False
    images_key = "num_channels"
    read_entries = ()
    untiled = "its attention sees the whole image, of one size"
    uncalibrated = "it normalizes its latents itself, by statistics in its weights"

    @classmethod
    def latent_shape(cls, config: Config) -> tuple[int, int]:
        return config["encoder_hidden_size"], config["patch_size"]

    @classmethod
    def latent_space_of(cls, config: Config, *where: Any) -> LatentSpace:
        return LatentSpace(*cls.latent_shape(config))

    @property
    def only_size(self) -> tuple[int, int]:
        config = self.autoencoder.config
        side = config.patch_size * (config.encoder_input_size // config.encoder_patch_size)
        return side, side
