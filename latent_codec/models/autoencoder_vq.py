"""AutoencoderVQ: diffusers' VQModel, with a quantizer that trains and indices that come in and out."""

from inspect import signature
from typing import ClassVar, Literal

import torch
from diffusers import VQModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import AutoencoderMixin, DecoderOutput
from diffusers.models.autoencoders.vq_model import VQEncoderOutput
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401  diffusers looks for it here on reload
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from latent_codec.models.grid_quantizer import QuantizerKind, build_quantizer
from latent_codec.models.gumbel_quantizer import GumbelQuantizer
from latent_codec.models.own_weights import OwnWeights
from latent_codec.models.quantizers import QuantizerOutput, VectorQuantizer


class AutoencoderVQ(OwnWeights, VQModel, AutoencoderMixin):
    """A VQ-VAE or VQGAN (arXiv:1711.00937, arXiv:2012.09841) whose folder loads in plain diffusers.VQModel.

        image --encoder--> --quant_conv--> latents --quantize--> indices
          ^                                                         |
          +------------- decoder <--post_quant_conv-- codewords <---+

    As pipelines expect of a VQModel, `encode` gives latents that are not yet quantized and `decode` quantizes
    them. Codes are one grid of int64 indices, (B, height / f, width / f).

    Opened in half precision, encoder and codebook stay in float32 (`_keep_in_fp32_modules`), because a rounded
    encoder chooses other codewords: indices are the same whatever the precision, and only the decoder is halved.

    Args:
        in_channels, out_channels, block_out_channels, layers_per_block, act_fn, latent_channels: as in VQModel.
        sample_size, num_vq_embeddings, norm_num_groups, vq_embed_dim, scaling_factor, norm_type: as in VQModel.
        mid_block_add_attention, force_upcast: as in VQModel.
        down_block_types, up_block_types: one per level; "AttnDownEncoderBlock2D" and "AttnUpDecoderBlock2D"
            have attention.
        lookup_from_codebook: so that plain VQModel decodes indices too (`force_not_quantize=True, shape=...`).
        beta, legacy, gradient, l2_normalized: of the quantizer (models/quantizers.py).
        assignment: "nearest" chooses the codeword nearest to a latent; "linear" the one with the highest logit of a
            1x1 convolution, `quantize.proj`, as a Gumbel VQGAN or a dVAE does (models/gumbel_quantizer.py), which has
            no use for the quantizer's other settings. Plain VQModel does not know that convolution: it decodes
            indices alike, and finds other ones for latents.
        quantizer: "vq" has a learned codebook; "fsq", "lfq" and "bsq" a fixed grid, on which plain VQModel finds the
            same indices; of "lfq-successive" it decodes indices alike, and finds other ones for latents
            (models/grid_quantizer.py).
        values_per_channel: of "fsq": how many values each channel of a codeword can take.
        shift_factor: which SD3's and FLUX's pipelines subtract from latents, and VQModel's config lacks.

    Raises:
        ValueError: for settings that do not go together.
    """

    _supports_gradient_checkpointing = True
    _keep_in_fp32_modules: ClassVar = ["encoder", "quant_conv", "quantize"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",),
        up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",),
        block_out_channels: tuple[int, ...] = (64,),
        layers_per_block: int = 1,
        act_fn: str = "silu",
        latent_channels: int = 3,
        sample_size: int = 32,
        num_vq_embeddings: int = 256,
        norm_num_groups: int = 32,
        vq_embed_dim: int | None = None,
        scaling_factor: float = 1.0,
        norm_type: str = "group",
        mid_block_add_attention: bool = True,
        lookup_from_codebook: bool = True,
        force_upcast: bool = False,
        beta: float = 0.25,
        legacy: bool = False,
        gradient: Literal["straight-through", "rotation"] = "straight-through",
        l2_normalized: bool = False,
        assignment: Literal["nearest", "linear"] = "nearest",
        shift_factor: float = 0.0,
        quantizer: QuantizerKind = "vq",
        values_per_channel: tuple[int, ...] | None = None,
    ):
        if assignment not in ("nearest", "linear"):
            raise ValueError(f'assignment is {assignment!r}; expected "nearest" or "linear"')
        if assignment == "linear" and (l2_normalized or legacy or gradient != "straight-through"):
            raise ValueError(
                f'l2_normalized is {l2_normalized}, legacy {legacy} and gradient {gradient!r}; assignment "linear" has no '
                "distances that these could change: leave them at their defaults."
            )
        if assignment == "linear" and quantizer != "vq":
            raise ValueError(
                f'quantizer is {quantizer!r}; assignment "linear" chooses among learned codewords, those of "vq"'
            )
        inherited = signature(VQModel.__init__).parameters
        super().__init__(**{name: self.config[name] for name in inherited if name in self.config})
        dim = vq_embed_dim or latent_channels
        if assignment == "linear":
            self.quantize = GumbelQuantizer(num_vq_embeddings, dim)
        else:
            self.quantize = build_quantizer(
                quantizer,
                num_vq_embeddings,
                dim,
                values_per_channel,
                beta=beta,
                legacy=legacy,
                gradient=gradient,
                l2_normalized=l2_normalized,
            )
        self.use_slicing = False

    @property
    def quantizers(self) -> list[VectorQuantizer]:
        """Top level first: here there is one."""
        return [self.quantize]

    @property
    def quantizer_inputs(self) -> list[nn.Conv2d]:
        """The layer before each quantizer."""
        return [self.quant_conv]

    @apply_forward_hook
    def encode(self, x: Tensor, return_dict: bool = True) -> VQEncoderOutput | tuple[Tensor]:
        """Image (B, C, H, W) in [-1, 1] -> `latents` (B, D, H / f, W / f), unquantized."""
        latents = self._latents(x).to(self.dtype)
        return VQEncoderOutput(latents=latents) if return_dict else (latents,)

    def _latents(self, image: Tensor) -> Tensor:
        """Unquantized latents in the encoder's own precision."""
        image = image.to(self.quant_conv.weight.dtype)
        parts = image.split(1) if self.use_slicing else [image]
        return torch.cat([self.quant_conv(self.encoder(part)) for part in parts])

    @apply_forward_hook
    def decode(
        self,
        h: Tensor,
        force_not_quantize: bool = False,
        return_dict: bool = True,
        shape: tuple[int, ...] | None = None,
        generator: torch.Generator | None = None,
    ) -> DecoderOutput | tuple[Tensor, Tensor]:
        """Latents, quantized here, or indices -> `sample`, (B, C, H, W), and `commit_loss`.

        Args:
            h: (B, D, h, w) of floats; or integer indices (B, h, w), or of any shape with `shape`.
            force_not_quantize: decode latents as they are.
            shape: of the codewords, (B, h, w, D), as VQModel wants it for indices.
            generator: ignored; pipelines pass it to every autoencoder.
        """
        commit_loss = torch.zeros(len(h), device=h.device, dtype=self.dtype)
        if not h.is_floating_point():
            quantized = self.quantize.lookup(h.reshape(shape[:3]) if shape is not None else h)
        elif force_not_quantize:
            quantized = h
        else:
            output = self.quantize(h)
            quantized, commit_loss = output.quantized, self.quantize.loss(output)
        quantized = quantized.to(self.post_quant_conv.weight.dtype)
        parts = quantized.split(1) if self.use_slicing else [quantized]
        spatial = self.config.norm_type == "spatial"
        sample = torch.cat(
            [self.decoder(self.post_quant_conv(part), part if spatial else None) for part in parts]
        )
        return DecoderOutput(sample=sample, commit_loss=commit_loss) if return_dict else (sample, commit_loss)

    def quantize_latents(self, latents: Tensor) -> QuantizerOutput:
        """Latents (B, D, h, w) -> codewords, indices, loss terms and perplexity."""
        return self.quantize(latents)

    @apply_forward_hook
    def encode_indices(self, image: Tensor) -> Tensor:
        """Image (B, C, H, W) in [-1, 1] -> indices, int64 (B, H / f, W / f)."""
        return self.encode_with_indices(image)[1]

    @apply_forward_hook
    def encode_with_indices(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Image -> the latents of `encode` and the indices of `encode_indices`, in one pass."""
        latents = self._latents(image)
        return latents.to(self.dtype), self.quantize.assign(latents)

    @apply_forward_hook
    def decode_indices(self, indices: Tensor) -> Tensor:
        """Indices, int64 (B, h, w) -> image (B, C, h f, w f)."""
        return self.decode(indices).sample

    def encode_quantized(self, image: Tensor) -> list[QuantizerOutput]:
        """Image -> what each level's quantizer gives, top level first: the pass that training differentiates."""
        return [self.quantize(self._latents(image))]

    def decode_quantized(self, quantized: list[Tensor]) -> Tensor:
        """The inverse of `encode_quantized`: codewords of each level -> image."""
        (codewords,) = quantized
        return self.decode(codewords, force_not_quantize=True).sample
