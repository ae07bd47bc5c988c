"""PaellaVQModel: Stable Cascade's and Wuerstchen's VQGAN, 4 times per side (arXiv:2306.00637)."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from latent_codec.families.family import Encoded, Family
from latent_codec.families.latent_space import LatentSpace

if TYPE_CHECKING:
    from torch import Tensor


class Paella(Family):
    """Images in [0, 1] inside; its pipelines decode latents as they are, not quantized, times scale_factor."""

    taken_as = ()

    @classmethod
    def latent_shape(cls, config: Mapping[str, Any]) -> tuple[int, int]:
        return config["latent_channels"], config["up_down_scale_factor"] * 2 ** (config["levels"] - 1)

    @classmethod
    def latent_space_of(cls, config: Mapping[str, Any], *where: Any) -> LatentSpace:
        # Pipelines multiply latents by it before they decode; other classes' are divided by scaling_factor.
        return super().latent_space_of({**config, "scaling_factor": 1 / config["scale_factor"]}, *where)

    @classmethod
    def decoder_keys(cls, config: Mapping[str, Any]) -> tuple[str, ...]:
        return ("up_blocks.", "out_block.")

    def encode_raw(self, images: "Tensor", tile: int | None = None) -> Encoded:
        return super().encode_raw((images + 1) / 2, tile)

    def decode_raw(self, raw_latents: "Tensor", tile: int | None = None) -> "Tensor":
        return super().decode_raw(raw_latents, tile) * 2 - 1
