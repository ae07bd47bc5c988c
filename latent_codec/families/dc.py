"""AutoencoderDC: deep compression, 32 times per side (SANA; arXiv:2410.10733)."""

from latent_codec.families.family import Family


class DC(Family):
    """No posterior; its tiles are diffusers' own."""

    widths_key = "encoder_block_out_channels"
    has_posterior = False

    def tile_settings(self, tile: int, factor: int) -> dict[str, float]:
        settings: dict[str, float] = {f"tile_sample_min_{side}": tile for side in ("height", "width")}
        settings |= {f"tile_sample_stride_{side}": tile * 3 // 4 for side in ("height", "width")}
        return settings | {f"tile_latent_min_{side}": tile // factor for side in ("height", "width")}
