"""AutoencoderKLKVAE: Kandinsky's autoencoder of images."""

from latent_codec.families.family import Family


class KVAE(Family):
    """A Gaussian posterior; its tiles are diffusers' own."""

    channels_key, widths_key = "z_channels", "ch_mult"

    def tile_settings(self, tile: int, factor: int) -> dict[str, float]:
        return {
            "tile_sample_min_size": tile,
            "tile_latent_min_size": tile // factor,
            "tile_overlap_factor": 0.25,
        }
