"""PaellaVQModel: Stable Cascade's and Wuerstchen's VQGAN, 4 times per side (arXiv:2306.00637)."""

from typing import TYPE_CHECKING, Any

from latent_codec.families.family import Config, Entries, Family, last_layer_of
from latent_codec.families.latent_space import LatentSpace
from latent_codec.families.pipeline_spaces import SCALE

if TYPE_CHECKING:
    from torch import nn


class Paella(Family):
    """Images in [0, 1] inside; its pipelines decode latents as they are, not quantized, times scale_factor."""

    taken_as = ()
    unit_range = True
    has_posterior = False
    read_entries = SCALE

    @classmethod
    def latent_shape(cls, config: Config) -> tuple[int, int]:
        return config["latent_channels"], config["up_down_scale_factor"] * 2 ** (config["levels"] - 1)

    @classmethod
    def latent_space_of(cls, config: Config, *where: Any) -> LatentSpace:
        # Pipelines multiply latents by it before they decode; other classes' are divided by scaling_factor.
        return super().latent_space_of({**config, "scaling_factor": 1 / config["scale_factor"]}, *where)

    @classmethod
    def decoder_keys(cls, config: Config) -> tuple[str, ...]:
        return ("up_blocks.", "out_block.")

    def entries_of(self, space: LatentSpace, pipeline: str | None = None) -> tuple[Entries, Entries]:
        return {"scale_factor": 1 / space.scaling_factor}, {}

    @property
    def last_layer(self) -> "nn.Module":
        return last_layer_of(self.autoencoder.out_block)
