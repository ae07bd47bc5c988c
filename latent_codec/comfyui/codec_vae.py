"""A codec as a VAE object of ComfyUI, for its own nodes: VAE Encode, VAE Decode, their tiled forms, inpainting."""

import logging

import torch
from torch import Tensor

from latent_codec.codec import LatentCodec
from latent_codec.comfyui.network import CodecNetwork

try:
    from comfy.sd import VAE
except ModuleNotFoundError as error:  # outside of ComfyUI
    if error.name != "comfy":
        raise
    VAE = object

logger = logging.getLogger(__name__)

_NO_WEIGHTS = {"pixel_space_vae": torch.tensor(1.0)}
"""What ComfyUI makes its smallest VAE of, with every attribute that its version has."""


class CodecVAE(VAE):
    """ComfyUI's VAE with a codec in the place of its network.

    ComfyUI itself moves the network to the device, chooses batches by free memory, crops sides to a multiple and, when it is out of
    memory, decodes in tiles. Tiles are exact where the codec's class has exact ones, and else blended by ComfyUI.

    Args:
        codec: not used elsewhere: its weights are moved and converted.
        dtype: "auto" is what ComfyUI computes its VAEs in on its device, but float32 for codecs with a codebook, whose indices
            rounding would change.
    """

    def __init__(self, codec: LatentCodec, dtype: str = "auto"):
        from comfy import model_management
        from comfy.model_patcher import ModelPatcher
        from comfy.utils import ProgressBar

        super().__init__(sd=dict(_NO_WEIGHTS))
        space = codec.latent_space
        allowed = [torch.float32] if codec.is_discrete else [torch.bfloat16, torch.float32]
        self.vae_dtype = (
            model_management.vae_dtype(self.device, allowed) if dtype == "auto" else getattr(torch, dtype)
        )
        codec.to(dtype=self.vae_dtype)
        network = CodecNetwork(
            codec,
            on_progress=lambda begun, total: ProgressBar(total).update_absolute(begun),
            check=model_management.throw_exception_if_processing_interrupted,
        )
        self.first_stage_model = network
        self.downscale_ratio = space.downsampling_factor
        self.upscale_ratio = space.downsampling_factor * codec.upscale
        self.latent_channels, self.output_channels = space.channels, network.image_channels
        self.latent_dim = 2  # images, also of video models' codecs
        self.disable_offload = True  # only ComfyUI's own layers can be moved one by one
        self.memory_used_encode = lambda shape, dtype: (
            network.values_to_encode(*shape[-2:]) * model_management.dtype_size(dtype)
        )
        self.memory_used_decode = lambda shape, dtype: (
            network.values_to_decode(*shape[-2:]) * model_management.dtype_size(dtype)
        )
        self.patcher = ModelPatcher(
            network, load_device=self.device, offload_device=model_management.vae_offload_device()
        )

    def codec(self) -> LatentCodec:
        """The codec, on the device that ComfyUI computes VAEs on."""
        from comfy.model_management import load_models_gpu

        load_models_gpu([self.patcher], force_full_load=True)
        return self.first_stage_model.codec

    def get_sd(self) -> dict[str, Tensor]:
        """Weights by diffusers' names, which ComfyUI's Save VAE writes."""
        weights = self.first_stage_model.autoencoder.state_dict()
        return {key: weight.contiguous() for key, weight in weights.items()}

    def vae_encode_crop_pixels(self, pixels: Tensor) -> Tensor:
        """Crop images (B, H, W, C) to their middle, so that sides divide by what the codec needs."""
        codec = self.first_stage_model.codec
        multiple = codec.family.side_multiple
        for axis in (1, 2):
            length = pixels.shape[axis]
            if length < multiple:
                raise ValueError(
                    f"expected images of at least {multiple}x{multiple} pixels for {codec.name}, got "
                    f"{pixels.shape[1]}x{pixels.shape[2]}"
                )
            kept = length - length % multiple
            pixels = pixels.narrow(axis, (length - kept) // 2, kept)
        return pixels

    def encode_tiled_(
        self, pixel_samples: Tensor, tile_x: int = 512, tile_y: int = 512, **blending
    ) -> Tensor:
        if not self._has_exact_tiles():
            return super().encode_tiled_(pixel_samples, tile_x, tile_y, **blending)
        images = self.process_input(pixel_samples).to(self.device, self.vae_dtype)
        samples = self.first_stage_model.encode(images, tile=max(tile_x, tile_y))
        return samples.to(self.output_device).float()

    def decode_tiled_(self, samples: Tensor, tile_x: int = 64, tile_y: int = 64, **blending) -> Tensor:
        if not self._has_exact_tiles():
            return super().decode_tiled_(samples, tile_x, tile_y, **blending)
        tile = max(tile_x, tile_y) * self.upscale_ratio
        images = self.first_stage_model.decode(samples.to(self.device, self.vae_dtype), tile=tile)
        return self.process_output(images.to(self.output_device).float())

    def decode_tiled_3d(self, samples: Tensor, tile_x: int = 32, tile_y: int = 32, **_) -> Tensor:
        """Latents of video models' codecs, which have an axis of one frame."""
        return self.decode_tiled_(samples, tile_x, tile_y)

    def _has_exact_tiles(self) -> bool:
        """Whether tiles give what the whole image gives; else ComfyUI's are blended.

        Raises:
            ValueError: where neither is possible, with the reason.
        """
        codec = self.first_stage_model.codec
        space = codec.latent_space
        if codec.family.has_exact_tiles:
            return True
        blends = codec.family.only_size is None and not space.frame_axis and codec.channels < 4
        if not blends or codec.family.side_multiple != space.downsampling_factor:
            raise ValueError(
                f"tiles of {codec.name} are not supported ({codec.family.untiled}); use VAE Encode and VAE Decode without tiles"
            )
        logger.warning(
            "Note: tiles of %s are blended and differ a little from the whole image: %s.",
            codec.name,
            codec.family.untiled,
        )
        return False
