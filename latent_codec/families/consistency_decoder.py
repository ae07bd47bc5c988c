"""ConsistencyDecoderVAE: Stable Diffusion's encoder, and a decoder that samples (arXiv:2303.01469)."""

from typing import TYPE_CHECKING

from latent_codec.families.family import Config, Family, last_layer_of

if TYPE_CHECKING:
    from torch import Tensor, nn


class ConsistencyDecoder(Family):
    """Its decoder draws noise: here always the same, so that the same latents give the same image."""

    widths_key, images_key = "encoder_block_out_channels", "encoder_in_channels"
    seed = 0
    untiled = "diffusers tiles its encoder, and not its decoder"
    untrained = "its decoder is a consistency model, which learns to remove noise and not to reconstruct"

    def __init__(self, autoencoder):
        super().__init__(autoencoder)
        # Tables of the scheduler are no buffers: a network that was built without memory for its weights lacks them.
        autoencoder.decoder_scheduler = type(autoencoder.decoder_scheduler)()

    @classmethod
    def decoder_keys(cls, config: Config) -> tuple[str, ...]:
        return ("decoder_unet.",)

    @property
    def last_layer(self) -> "nn.Module":
        return last_layer_of(self.autoencoder.decoder_unet)

    def decode_raw(self, raw_latents: "Tensor", tile: int | None = None) -> "Tensor":
        import torch

        generator = torch.Generator("cpu").manual_seed(self.seed)
        with self.tiling(tile):
            return self.autoencoder.decode(raw_latents, generator=generator).sample
