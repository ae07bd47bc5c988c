"""AutoencoderKLTemporalDecoder: Stable Video Diffusion's, which decodes each image as a video of one frame."""

from typing import TYPE_CHECKING

from latent_codec.families.family import Family

if TYPE_CHECKING:
    from torch import Tensor


class TemporalDecoder(Family):
    """Stable Diffusion's encoder; a decoder whose temporal layers see one frame."""

    def decode_raw(self, raw_latents: "Tensor", tile: int | None = None) -> "Tensor":
        with self.tiling(tile):
            return self.autoencoder.decode(raw_latents, num_frames=1).sample
