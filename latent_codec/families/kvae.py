"""AutoencoderKLKVAE: Kandinsky's autoencoder of images."""

from collections.abc import Mapping
from typing import Any

from latent_codec.families.family import Family


class KVAE(Family):
    """A Gaussian posterior; its tiles are diffusers' own."""

    @classmethod
    def latent_shape(cls, config: Mapping[str, Any]) -> tuple[int, int]:
        return config["z_channels"], 2 ** (len(config["ch_mult"]) - 1)

    def tile_settings(self, tile: int, factor: int) -> dict[str, float] | None:
        return {
            "tile_sample_min_size": tile,
            "tile_latent_min_size": tile // factor,
            "tile_overlap_factor": 0.25,
        }
