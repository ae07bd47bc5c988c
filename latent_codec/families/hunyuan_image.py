"""AutoencoderKLHunyuanImage: HunyuanImage 2.1's, 32 times per side."""

from latent_codec.families.family import Family


class HunyuanImage(Family):
    """A Gaussian posterior, and residual connections around every change of resolution."""

    factor_key = "spatial_compression_ratio"
    untiled = "diffusers' tiled encoder of it expects video"
