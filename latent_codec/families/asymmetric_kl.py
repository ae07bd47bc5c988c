"""AsymmetricAutoencoderKL: Stable Diffusion's encoder with a wider decoder, for inpainting (arXiv:2306.04632)."""

from collections.abc import Mapping
from typing import Any

from latent_codec.families.family import Family


class AsymmetricKL(Family):
    """A decoder that may also be told the image around a mask."""

    @classmethod
    def latent_shape(cls, config: Mapping[str, Any]) -> tuple[int, int]:
        return config["latent_channels"], 2 ** (len(config["down_block_out_channels"]) - 1)
