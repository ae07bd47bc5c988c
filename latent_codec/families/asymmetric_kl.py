"""AsymmetricAutoencoderKL: Stable Diffusion's encoder with a wider decoder, for inpainting (arXiv:2306.04632)."""

from latent_codec.families.family import Family


class AsymmetricKL(Family):
    """A decoder that may also be told the image around a mask."""

    widths_key = "down_block_out_channels"
