"""A file for ComfyUI's custom_nodes/: a tiny random U-Net as MODEL, with a CONDITIONING, and what only its Python can compare."""

import numpy as np
import torch
from comfy import latent_formats, model_base, model_management, model_patcher, supported_models
from latent_preview import Latent2RGBPreviewer

from latent_codec.comfyui.previews import SamplingPreview
from latent_codec.previews import LatentPreviewer
from latent_codec.previews.preview_files import NAME, read_preview


class TinyModel:
    RETURN_TYPES = ("MODEL", "CONDITIONING")
    FUNCTION = "make"
    CATEGORY = "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}

    def make(self):
        config = supported_models.SD15(
            {
                "image_size": 32,
                "in_channels": 4,
                "out_channels": 4,
                "model_channels": 32,
                "num_res_blocks": [1, 1],
                "channel_mult": [1, 2],
                "transformer_depth": [1, 0],
                "transformer_depth_output": [1, 1, 0, 0],
                "transformer_depth_middle": 0,
                "use_spatial_transformer": True,
                "context_dim": 16,
                "adm_in_channels": None,
                "use_linear_in_transformer": False,
                "use_temporal_attention": False,
                "dtype": torch.float32,
            }
        )
        generator = torch.Generator().manual_seed(0)
        model = model_base.BaseModel(config).eval()
        for weight in model.diffusion_model.parameters():
            weight.data.copy_(0.05 * torch.randn(weight.shape, generator=generator))
        device = model_management.get_torch_device()
        patcher = model_patcher.ModelPatcher(model, load_device=device, offload_device=device)
        return patcher, [[torch.randn(1, 3, 16, generator=generator), {}]]


class LinearPreviews:
    """How much a codec's linear preview differs from ComfyUI's own with its factors, of 255."""

    RETURN_TYPES = ("INT",)
    FUNCTION = "compare"
    CATEGORY = "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"vae": ("VAE",)}}

    def compare(self, vae):
        codec = vae.codec()
        stored = read_preview(codec.folder / NAME, codec)
        weight, bias = stored.weight.tolist(), stored.bias.tolist()
        latent_format = latent_formats.LatentFormat()
        latent_format.process_out = (
            codec.latent_space.denormalize
        )  # as of a model trained on the codec's latents
        ours = SamplingPreview(LatentPreviewer.from_codec(codec, kind="linear"), codec, latent_format)
        host = Latent2RGBPreviewer([*zip(*weight)], bias)
        x_0 = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(0))
        images = (ours.image(x_0), host.decode_latent_to_preview(x_0))
        ours, host = (np.asarray(image).astype(int) for image in images)
        assert ours.shape == (32, 32, 3)
        return (int(np.abs(ours - host).max()),)


NODE_CLASS_MAPPINGS = {"TinyModel": TinyModel, "LinearPreviews": LinearPreviews}
