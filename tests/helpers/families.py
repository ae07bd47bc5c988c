"""A tiny random autoencoder of every class that the codec opens."""

import torch
from diffusers import ModelMixin

from latent_codec.components.codec_folders import component_class


def _blocks(num: int, width: int = 8, **others) -> dict:
    return {
        "block_out_channels": (width,) * num,
        "down_block_types": ("DownEncoderBlock2D",) * num,
        "up_block_types": ("UpDecoderBlock2D",) * num,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        **others,
    }


def _widths(num: int, width: int = 8, **others) -> dict:
    return {f"{part}_block_out_channels": (width,) * num for part in ("encoder", "decoder")} | others


_HUNYUAN = {"block_out_channels": (8, 16, 16, 16, 16), "layers_per_block": 1, "latent_channels": 4}
_VIDEO = {"block_out_channels": (8,) * 4, "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 4}
_CAUSAL = {"base_dim": 4, "z_dim": 16, "dim_mult": [1, 1, 2, 2], "num_res_blocks": 1}
_TINY = _widths(3, num_encoder_blocks=(1,) * 3, num_decoder_blocks=(1,) * 3)

CONFIGS = {
    "AsymmetricAutoencoderKL": {
        f"{part}_block_{key}": each
        for part, kind in (("down", "DownEncoderBlock2D"), ("up", "UpDecoderBlock2D"))
        for key, each in (("types", (kind,) * 3), ("out_channels", (8,) * 3))
    }
    | {"norm_num_groups": 4},
    "AutoencoderDC": _widths(
        3, latent_channels=4, encoder_layers_per_block=(1,) * 3, decoder_layers_per_block=(1,) * 3
    )
    | {"encoder_qkv_multiscales": ((),) * 3, "decoder_qkv_multiscales": ((),) * 3, "scaling_factor": 0.41},
    "AutoencoderKL": _blocks(3, force_upcast=False),
    "AutoencoderKLCogVideoX": _VIDEO,
    "AutoencoderKLCosmos": {
        "latent_channels": 4,
        "encoder_block_out_channels": (8,) * 4,
        "decode_block_out_channels": (8,) * 4,
        "num_layers": 1,
        "latents_mean": [0.1 * i for i in range(16)],
        "latents_std": [1 + 0.1 * i for i in range(16)],
    },
    "AutoencoderKLFlux2": _blocks(3, latent_channels=4),
    "AutoencoderKLHunyuanImage": {
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 4,
        "block_out_channels": (32,) * 3,
        "layers_per_block": 1,
        "spatial_compression_ratio": 4,
        "sample_size": 32,
        "scaling_factor": 0.75,
    },
    "AutoencoderKLHunyuanImageRefiner": _HUNYUAN,
    "AutoencoderKLHunyuanVideo": _VIDEO,
    "AutoencoderKLHunyuanVideo15": _HUNYUAN,
    "AutoencoderKLKVAE": {
        "channels": 32,
        "num_enc_blocks": 1,
        "num_dec_blocks": 1,
        "z_channels": 4,
        "ch_mult": (1,) * 3,
    },
    "AutoencoderKLKVAEVideo": {"ch": 32, "ch_mult": (1,) * 4, "num_res_blocks": 1, "z_channels": 4},
    "AutoencoderKLLTXVideo": {
        "latent_channels": 8,
        "block_out_channels": (8,) * 4,
        "decoder_block_out_channels": (8,) * 4,
        "layers_per_block": (1,) * 5,
        "decoder_layers_per_block": (1,) * 5,
    },
    "AutoencoderKLMagvit": _VIDEO
    | {
        "down_block_types": ["SpatialDownBlock3D", *["SpatialTemporalDownBlock3D"] * 3],
        "up_block_types": ["SpatialUpBlock3D", *["SpatialTemporalUpBlock3D"] * 3],
    },
    "AutoencoderKLMochi": {
        "encoder_block_out_channels": (32,) * 4,
        "decoder_block_out_channels": (32,) * 4,
        "latent_channels": 4,
        "layers_per_block": (1,) * 5,
        "latents_mean": (0.5,) * 4,
        "latents_std": (2.0,) * 4,
    },
    "AutoencoderKLQwenImage": _CAUSAL,
    "AutoencoderKLQwenImage21": _CAUSAL
    | {
        "decoder_base_dim": 8,
        "z_dim": 8,
        "dim_mult": [1, 1, 1, 2, 2],
        "latents_mean": [0.1 * i for i in range(8)],
        "latents_std": [1 + 0.1 * i for i in range(8)],
    },
    "AutoencoderKLTemporalDecoder": {
        "block_out_channels": (32, 32),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
    },
    "AutoencoderKLWan": _CAUSAL,
    "AutoencoderRAE": {
        "encoder_type": "mae",
        "encoder_hidden_size": 64,
        "encoder_patch_size": 4,
        "encoder_num_hidden_layers": 1,
        "encoder_input_size": 16,
        "patch_size": 16,
        "decoder_hidden_size": 16,
        "decoder_num_hidden_layers": 1,
        "decoder_num_attention_heads": 2,
        "decoder_intermediate_size": 16,
    },
    "AutoencoderTiny": _TINY,
    "AutoencoderTinyGN": _TINY,
    "AutoencoderTinyVideo": {
        "encoder_block_out_channels": (8,) * 4,
        "decoder_block_out_channels": (8,) * 4,
        "num_blocks": 1,
    },
    "AutoencoderVQ": _blocks(3, num_vq_embeddings=16, latent_channels=3),
    "ConsistencyDecoderVAE": {
        "encoder_block_out_channels": (8, 8),
        "encoder_down_block_types": ("DownEncoderBlock2D",) * 2,
        "encoder_layers_per_block": 1,
        "encoder_norm_num_groups": 4,
        "decoder_block_out_channels": (32, 32),
        "decoder_down_block_types": ("ResnetDownsampleBlock2D",) * 2,
        "decoder_up_block_types": ("ResnetUpsampleBlock2D",) * 2,
        "decoder_layers_per_block": 1,
        "decoder_norm_num_groups": 8,
    },
    "HierarchicalVQ": {"hidden_channels": 8, "residual_channels": 4, "embed_dim": 4, "codebook_sizes": 8},
    "PaellaVQModel": {"embed_dim": 16, "bottleneck_blocks": 1, "num_vq_embeddings": 32},
    "VQModel": _blocks(3, num_vq_embeddings=16),
}
"""A small config of each class."""


def tiny(class_name: str, **changes) -> ModelMixin:
    """A tiny random autoencoder of a class, with `changes` to its config here."""
    torch.manual_seed(0)
    autoencoder = component_class(class_name)(**CONFIGS[class_name] | changes).eval()
    if class_name == "AutoencoderKLFlux2":
        autoencoder.bn.running_mean.normal_()
        autoencoder.bn.running_var.uniform_(0.3, 1.5)
    return autoencoder


def tiny_wan22() -> ModelMixin:
    """Wan 2.2's: residual, of patches of 2x2 pixels, 16 times per side."""
    statistics = {"latents_mean": [0.1 * i for i in range(8)], "latents_std": [1 + 0.1 * i for i in range(8)]}
    patches = {"in_channels": 12, "out_channels": 12, "patch_size": 2, "scale_factor_spatial": 16}
    dims = {"decoder_base_dim": 8, "z_dim": 8, "dim_mult": [1, 2, 2, 2], "is_residual": True}
    return tiny("AutoencoderKLWan", **statistics, **patches, **dims)


VARIANTS = {
    "Qwen-Image, layered": lambda: tiny("AutoencoderKLQwenImage", input_channels=4),
    "Wan 2.2": tiny_wan22,
    "MoVQ": lambda: tiny(
        "VQModel",
        block_out_channels=(32,) * 3,
        up_block_types=("AttnUpDecoderBlock2D",) * 3,
        norm_type="spatial",
    ),
}
"""Second networks of a class."""
