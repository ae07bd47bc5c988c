"""AutoencoderKLHunyuanImage: HunyuanImage 2.1's, 32 times per side."""

from collections.abc import Mapping
from typing import Any

from latent_codec.families.family import Family


class HunyuanImage(Family):
    """A Gaussian posterior, and residual connections around every change of resolution."""

    @classmethod
    def latent_shape(cls, config: Mapping[str, Any]) -> tuple[int, int]:
        return config["latent_channels"], config["spatial_compression_ratio"]
