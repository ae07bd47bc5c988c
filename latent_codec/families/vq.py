"""VQModel, AutoencoderVQ and MoVQ: latents of one codebook (VQGAN, arXiv:2012.09841)."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from latent_codec.families.family import (
    Config,
    Encoded,
    Family,
    Level,
    Trainable,
    encoder_tail_of,
    single_level_indices,
)
from latent_codec.families.latent_space import LatentSpace

if TYPE_CHECKING:
    from torch import Tensor, nn


class VQ(Family):
    """diffusers' VQModel. Raw latents are unquantized, as latent diffusion has them; decoding quantizes."""

    channels_last = True
    taken_as = (*Family.taken_as, "VQModel")
    has_exact_tiles = True
    has_posterior = False

    @classmethod
    def of(cls, config: Config) -> type[Family]:
        return MoVQ if config.get("norm_type") == "spatial" else cls

    @classmethod
    def latent_shape(cls, config: Config) -> tuple[int, int]:
        channels = config["vq_embed_dim"] or config["latent_channels"]
        return channels, 2 ** (len(config["block_out_channels"]) - 1)

    @classmethod
    def level_shapes(cls, config: Config) -> list[tuple[int, int]]:
        return [(config["num_vq_embeddings"], cls.latent_shape(config)[1])]

    @property
    def levels(self) -> list[Level]:
        return [Level(self.autoencoder.quantize.embedding.weight, self.side_multiple)]

    @property
    def encoder_tail(self) -> "nn.Sequential":
        return encoder_tail_of(self.autoencoder)

    def reads(self, pipeline: str | None = None) -> tuple[str, ...]:
        # Latent diffusion's pipelines, which it is made for, know no shift.
        return tuple(key for key in super().reads(pipeline) if key != "shift_factor")

    def encode_raw(self, images: "Tensor", tile: int | None = None) -> Encoded:
        if tile is None or not self.has_exact_tiles:
            return super().encode_raw(images, tile)
        from latent_codec.models.tiling import encode_tiled

        autoencoder = self.autoencoder
        latents = encode_tiled(autoencoder.encoder, autoencoder.quant_conv, images, tile)
        return Encoded(None, latents.to(autoencoder.dtype))

    def decode_raw(self, raw_latents: "Tensor", tile: int | None = None) -> "Tensor":
        indices = self._assign(raw_latents)
        if tile is None:
            return self._decode(indices)
        from latent_codec.models.tiling import decode_tiled

        autoencoder, codewords = self.autoencoder, self.latents_of_indices([indices])
        return decode_tiled(autoencoder.decoder, autoencoder.post_quant_conv, codewords, tile)

    def encode_with_indices(self, images: "Tensor") -> "tuple[Encoded, list[Tensor]]":
        encoded = self.encode_raw(images.to(self.autoencoder.dtype))
        return encoded, [self._assign(encoded.raw_latents)]

    def decode_indices(
        self, indices: "Sequence[Tensor]", known: "Sequence[Tensor] | None" = None
    ) -> "Tensor":
        (level,) = self.levels
        return self._decode(single_level_indices(indices, level.codebook_size).to(level.codebook.device))

    def latents_of_indices(self, indices: "Sequence[Tensor]") -> "Tensor":
        (only,) = indices
        return self.autoencoder.quantize.embedding(only).permute(0, 3, 1, 2).contiguous()

    def _assign(self, raw_latents: "Tensor") -> "Tensor":
        """The nearest codewords' indices, in float32: bfloat16 rounding can change which codeword wins."""
        from latent_codec.models.quantizers import nearest_codewords

        vectors = raw_latents.permute(0, 2, 3, 1)
        codebook = self.autoencoder.quantize.embedding.weight
        return nearest_codewords(vectors.flatten(0, 2), codebook).view(vectors.shape[:3])

    def _decode(self, indices: "Tensor") -> "Tensor":
        """VQModel.decode in any dtype: its own search for the nearest codeword has no half-precision form on CPUs."""
        autoencoder = self.autoencoder
        if autoencoder.config.lookup_from_codebook:
            shape = (*indices.shape, self.latent_shape(autoencoder.config)[0])
            return autoencoder.decode(indices, force_not_quantize=True, shape=shape).sample
        return autoencoder.decode(self.latents_of_indices([indices]), force_not_quantize=True).sample


class OwnVQ(VQ):
    """AutoencoderVQ, whose quantizer assigns by itself and in float32."""

    trainable = Trainable(encoder=("encoder", "quant_conv"), linear_start=True)

    def encode_with_indices(self, images: "Tensor") -> "tuple[Encoded, list[Tensor]]":
        latents, indices = self.autoencoder.encode_with_indices(images)  # in float32, whatever its dtype
        return Encoded(None, latents), [indices]

    def _assign(self, raw_latents: "Tensor") -> "Tensor":
        return self.autoencoder.quantize.assign(raw_latents)


class MoVQ(VQ):
    """Kandinsky's VQModel (spatial norms), whose pipelines decode latents as they are, neither scaled nor quantized."""

    indices_suffice = False
    uncalibrated = "its raw latents are its latents"
    read_entries = ()
    channels_last = False  # not measured
    has_exact_tiles = False  # the decoder's norms read the latents too

    @classmethod
    def latent_space_of(cls, config: Config, *where: Any) -> LatentSpace:
        return super().latent_space_of({**config, "scaling_factor": None}, *where)

    def decode_raw(self, raw_latents: "Tensor", tile: int | None = None) -> "Tensor":
        with self.tiling(tile):
            return self.autoencoder.decode(raw_latents, force_not_quantize=True).sample
