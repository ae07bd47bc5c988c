"""HierarchicalKL: groups of Gaussian latents, each given those above it (NVAE, arXiv:2007.03898)."""

from typing import TYPE_CHECKING

from latent_codec.families.family import Config, Encoded, Family, LatentGroup

if TYPE_CHECKING:
    from torch import Generator, Tensor, nn

    from latent_codec.models.hierarchical_kl import NegativeElbo


class HierarchicalGaussian(Family):
    """Raw latents are the groups' standardized latents, next to one another on the finest grid.

    Their prior is N(0, I) by construction, so that there is no scale to measure.
    """

    taken_as = ()
    read_entries = ()
    uncalibrated = "its latents are standardized already: their prior is N(0, I) in every group"
    untiled = "squeeze-excitation sees the whole image"

    @classmethod
    def latent_shape(cls, config: Config) -> tuple[int, int]:
        counts = config["groups_per_scale"]
        finest = next(scale for scale, count in enumerate(counts) if count)
        return sum(counts) * config["latent_channels"], config["patch_size"] * 2**finest

    @classmethod
    def decoder_keys(cls, config: Config) -> tuple[str, ...]:
        # Of the top-down pass every group's posterior depends on what is above it.
        return ("image_decoder.", "image_likelihood.")

    @property
    def side_multiple(self) -> int:
        return self.autoencoder.multiple

    @property
    def groups(self) -> list[LatentGroup]:
        channels = self.autoencoder.config.latent_channels
        return [LatentGroup(channels, side) for side in self.autoencoder.group_sides]

    @property
    def last_layer(self) -> "nn.Module":
        return self.autoencoder.image_decoder[-2]

    def encode_raw(self, images: "Tensor", tile: int | None = None) -> Encoded:
        with self.tiling(tile):
            return Encoded(self.autoencoder.posterior(images), None)

    def negative_elbo(
        self, images: "Tensor", num_groups: int | None = None, generator: "Generator | None" = None
    ) -> "NegativeElbo":
        return self.autoencoder.elbo(images, num_groups=num_groups, generator=generator)
