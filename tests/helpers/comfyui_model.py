"""A file for ComfyUI's custom_nodes/: a tiny random U-Net as MODEL, and something for it to be conditioned on."""

import torch
from comfy import model_base, model_management, model_patcher, supported_models


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


NODE_CLASS_MAPPINGS = {"TinyModel": TinyModel}
