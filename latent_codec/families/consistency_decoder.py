"""ConsistencyDecoderVAE: Stable Diffusion's encoder, and a decoder that samples (arXiv:2303.01469)."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from latent_codec.families.family import Family

if TYPE_CHECKING:
    from torch import Tensor


class ConsistencyDecoder(Family):
    """Its decoder draws noise: here always the same, so that the same latents give the same image."""

    seed = 0
    untrained = "its decoder is a consistency model, which learns to remove noise and not to reconstruct"

    def __init__(self, autoencoder):
        super().__init__(autoencoder)
        # Tables of the scheduler are no buffers: a network that was built without memory for its weights lacks them.
        autoencoder.decoder_scheduler = type(autoencoder.decoder_scheduler)()

    @classmethod
    def latent_shape(cls, config: Mapping[str, Any]) -> tuple[int, int]:
        return config["latent_channels"], 2 ** (len(config["encoder_block_out_channels"]) - 1)

    @classmethod
    def image_channels(cls, config: Mapping[str, Any]) -> int:
        return config["encoder_in_channels"]

    @classmethod
    def decoder_keys(cls, config: Mapping[str, Any]) -> tuple[str, ...]:
        return ("decoder_unet.",)

    def decode_raw(self, raw_latents: "Tensor", tile: int | None = None) -> "Tensor":
        import torch

        generator = torch.Generator("cpu").manual_seed(self.seed)
        with self.tiling(tile):
            return self.autoencoder.decode(raw_latents, generator=generator).sample
