"""HierarchicalVQ and MultiScaleVQ: levels of indices, each finer than the one above it (arXiv:1906.00446, 2404.02905)."""

from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate
from operator import mul
from typing import TYPE_CHECKING

from latent_codec.families.family import Config, Encoded, Family, Level, Trainable, last_layer_of
from latent_codec.models.scale_sides import position_sides

if TYPE_CHECKING:
    from torch import Tensor, nn


class Hierarchical(Family):
    """Raw latents are the levels' codewords, brought to the bottom level's resolution and concatenated."""

    levels_condition = True
    taken_as = ()
    has_posterior = False
    untiled = "no tiles were written for it"
    trainable = Trainable(encoder=("encoders", "quantize_convs"))

    @classmethod
    def latent_shape(cls, config: Config) -> tuple[int, int]:
        return len(config["strides"]) * config["embed_dim"], config["strides"][0]

    @classmethod
    def level_shapes(cls, config: Config) -> Sequence[tuple[int, int | Fraction]]:
        strides, sizes = config["strides"], config["codebook_sizes"]
        sizes = [sizes] * len(strides) if isinstance(sizes, int) else sizes
        return list(zip(sizes, list(accumulate(strides, mul))[::-1], strict=True))

    @classmethod
    def decoder_keys(cls, config: Config) -> tuple[str, ...]:
        # The upper decoders are part of what the levels below them encode.
        return (f"decoders.{len(config['strides']) - 1}.", "usage_")

    @property
    def side_multiple(self) -> int:
        return self.autoencoder.multiple

    @property
    def levels(self) -> list[Level]:
        quantizers, shapes = self.autoencoder.quantizers, self.level_shapes(self.autoencoder.config)
        return [
            Level(quantizer.embedding.weight, side)
            for quantizer, (_, side) in zip(quantizers, shapes, strict=True)
        ]

    @property
    def last_layer(self) -> "nn.Module":
        return last_layer_of(self.autoencoder.decoders[-1])

    def encode_with_indices(self, images: "Tensor") -> "tuple[Encoded, list[Tensor]]":
        latents, indices = self.autoencoder.encode_with_indices(images.to(self.autoencoder.dtype))
        return Encoded(None, latents), indices

    def decode_indices(
        self, indices: "Sequence[Tensor]", known: "Sequence[Tensor] | None" = None
    ) -> "Tensor":
        """Lower levels may be missing: their mean codeword takes their place, as it does wherever `known` is False."""
        return self.autoencoder.decode_indices(list(indices), known)

    def latents_of_indices(self, indices: "Sequence[Tensor]") -> "Tensor":
        return self.autoencoder.upper_features(list(indices))

    def record_usage(self, level: int, counts: "Tensor") -> None:
        # Not by set_usage, whose checks wait for the device: this is called in every step of a training.
        self.autoencoder.get_buffer(f"usage_{level}").copy_(counts / counts.sum())


class MultiScale(Hierarchical):
    """MultiScaleVQ: raw latents are the sum of all scales' codewords, brought to the last scale's resolution."""

    trainable = Trainable(encoder=("encoder", "quantize_conv"))

    @classmethod
    def latent_shape(cls, config: Config) -> tuple[int, int]:
        return config["embed_dim"], config["downsampling_factor"]

    @classmethod
    def level_shapes(cls, config: Config) -> Sequence[tuple[int, int | Fraction]]:
        sides = position_sides(config["downsampling_factor"], config["sides"])
        return [(config["codebook_size"], side) for side in sides]

    @classmethod
    def codeword_dim(cls, config: Config) -> int:
        return config["embed_dim"]

    @classmethod
    def decoder_keys(cls, config: Config) -> tuple[str, ...]:
        return ("image_decoder.",)

    @property
    def last_layer(self) -> "nn.Module":
        return last_layer_of(self.autoencoder.image_decoder)

    def record_usage(self, level: int, counts: "Tensor") -> None:
        """Nothing: an index that is not known adds nothing, whatever the others are."""
