"""Wan's and Qwen-Image's autoencoders: causal in time, used with one frame (arXiv:2503.20314, section 4.1)."""

from typing import TYPE_CHECKING, ClassVar

from latent_codec.families.family import Config, Encoded, gaussian
from latent_codec.families.video import Stills

if TYPE_CHECKING:
    from torch import Tensor


class Wan(Stills):
    """A Gaussian posterior over latents of z_dim channels, with a mean and a deviation for each channel."""

    has_exact_tiles = True
    taken_as = ("AutoencoderKLWan", "AutoencoderKLQwenImage", "AutoencoderKLQwenImage21")
    first_frame: ClassVar[dict[str, bool]] = {"first_chunk": True}
    """What its decoder is told of a video's first frame."""

    @classmethod
    def latent_shape(cls, config: Config) -> tuple[int, int]:
        return config["z_dim"], 2 ** (len(config["dim_mult"]) - 1) * (config.get("patch_size") or 1)

    @classmethod
    def image_channels(cls, config: Config) -> int:
        return config[cls.images_key] // (config.get("patch_size") or 1) ** 2

    def encode_raw(self, images: "Tensor", tile: int | None = None) -> Encoded:
        if tile is None:
            return super().encode_raw(images)
        from latent_codec.models.wan_tiling import encode_frame_tiled

        return gaussian(encode_frame_tiled(self.autoencoder, images, tile))

    def decode_raw(self, raw_latents: "Tensor", tile: int | None = None) -> "Tensor":
        from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

        from latent_codec.models.wan_tiling import decode_frame_tiled

        if tile is not None:
            return decode_frame_tiled(self.autoencoder, raw_latents, tile)
        # The class's own decode clamps images, which then give the trainer no gradient.
        autoencoder = self.autoencoder
        video = autoencoder.decoder(autoencoder.post_quant_conv(raw_latents.unsqueeze(2)), **self.first_frame)
        return unpatchify(video, autoencoder.config.get("patch_size") or 1)[:, :, 0]


class QwenImage(Wan):
    """Wan 2.1's network under a class of its own; RGBA for layered images."""

    images_key = "input_channels"
    first_frame: ClassVar[dict[str, bool]] = {}
