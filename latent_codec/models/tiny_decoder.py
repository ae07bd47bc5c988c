"""TinyDecoder: the decoder half of TAESD, for previews of any codec's latents."""

from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from latent_codec.errors import SettingError
from latent_codec.models.autoencoder_tiny_gn import decoder
from latent_codec.models.own_weights import OwnWeights
from latent_codec.models.tiny_autoencoder import Clamp


class TinyDecoder(OwnWeights, ModelMixin, ConfigMixin):
    """A small network that paints what a codec's own decoder would (TAESD, madebyollin/taesd).

        latents -- m tanh(z / m) --> conv --> [blocks --nearest x2, conv--> ... ] blocks --> conv --> RGB

    Its keys are those of diffusers' AutoencoderTiny (`decoder.layers.N`), but levels may differ in width: the finest
    ones have most of the pixels and need the fewest channels.

    Args:
        latent_channels: of the latents, scaled as a denoiser has them.
        block_out_channels: widths from the coarsest level to the finest; each level but the first doubles the sides.
        num_blocks: residual blocks of each level, in the same order.
        latent_magnitude: the clamp's limit m; three standard deviations of the latents.

    Raises:
        ValueError: for widths and blocks of different numbers of levels, or a magnitude that is not positive.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 4,
        block_out_channels: tuple[int, ...] = (64, 48, 32, 16),
        num_blocks: tuple[int, ...] = (3, 3, 3, 1),
        latent_magnitude: float = 3.0,
    ):
        super().__init__()
        if len(block_out_channels) != len(num_blocks) or not num_blocks:
            expected = f"one per level, {len(block_out_channels)}, as block_out_channels"
            raise SettingError("num_blocks", expected, num_blocks)
        if latent_magnitude <= 0:
            raise ValueError(f"latent_magnitude is {latent_magnitude}; expected a number above 0")
        self.decoder = decoder(latent_channels, block_out_channels, num_blocks, 3, use_midblock_gn=False)

    @property
    def upsampling_factor(self) -> int:
        """Pixels per side of a latent's position."""
        return 2 ** (len(self.config.block_out_channels) - 1)

    def forward(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) -> RGB (B, 3, h f, w f), in [-1, 1] but for overshoots."""
        return self.decoder(Clamp(self.config.latent_magnitude)(latents)) * 2 - 1
