"""AutoencoderDC: deep compression, 32 times per side (SANA; arXiv:2410.10733)."""

from collections.abc import Mapping
from typing import Any

from latent_codec.families.family import Family


class DC(Family):
    """No posterior; its tiles are diffusers' own."""

    has_posterior = False

    @classmethod
    def latent_shape(cls, config: Mapping[str, Any]) -> tuple[int, int]:
        return config["latent_channels"], 2 ** (len(config["encoder_block_out_channels"]) - 1)

    def tile_settings(self, tile: int, factor: int) -> dict[str, float] | None:
        settings: dict[str, float] = {f"tile_sample_min_{side}": tile for side in ("height", "width")}
        settings |= {f"tile_sample_stride_{side}": tile * 3 // 4 for side in ("height", "width")}
        return settings | {f"tile_latent_min_{side}": tile // factor for side in ("height", "width")}
