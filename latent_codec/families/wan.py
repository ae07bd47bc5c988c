"""Wan's and Qwen-Image's autoencoders: causal in time, used with one frame (arXiv:2503.20314, section 4.1)."""

from collections.abc import Mapping
from typing import Any

from latent_codec.families.video import Stills


class Wan(Stills):
    """A Gaussian posterior over latents of z_dim channels, with a mean and a deviation for each channel."""

    @classmethod
    def latent_shape(cls, config: Mapping[str, Any]) -> tuple[int, int]:
        return config["z_dim"], 2 ** (len(config["dim_mult"]) - 1) * (config.get("patch_size") or 1)

    @classmethod
    def image_channels(cls, config: Mapping[str, Any]) -> int:
        return config["in_channels"] // (config.get("patch_size") or 1) ** 2


class QwenImage(Wan):
    """Wan 2.1's network under a class of its own; RGBA for layered images."""

    @classmethod
    def image_channels(cls, config: Mapping[str, Any]) -> int:
        return config["input_channels"]
