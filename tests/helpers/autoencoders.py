"""A tiny random autoencoder of every class that opens."""

import diffusers
import torch
from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel

from latent_codec import (
    AutoencoderKLOtherDecoder,
    AutoencoderTinyGN,
    AutoencoderTinyVideo,
    AutoencoderVQ,
    HierarchicalKL,
    HierarchicalVQ,
    MultiScaleVQ,
)

# ruff: noqa: C408  keyword arguments of classes read best as such
_BLOCKS = dict(
    block_out_channels=(8, 8, 16),
    down_block_types=("DownEncoderBlock2D",) * 3,
    up_block_types=("UpDecoderBlock2D",) * 3,
    layers_per_block=1,
    norm_num_groups=4,
)
_TINY = dict(
    encoder_block_out_channels=(8, 8, 8),
    decoder_block_out_channels=(8, 8, 8),
    num_encoder_blocks=(1, 1, 1),
    num_decoder_blocks=(1, 1, 1),
)
_DEEP = {
    f"{part}_{name}": value
    for part in ("encoder", "decoder")
    for name, value in dict(
        block_out_channels=(8, 8, 8), layers_per_block=(1, 1, 1), qkv_multiscales=((), (), ())
    ).items()
}
_HUNYUAN = dict(block_out_channels=(8, 16, 16, 16, 16), layers_per_block=1, latent_channels=4)
_WAN_2_2 = dict(
    base_dim=4,
    decoder_base_dim=8,
    z_dim=8,
    dim_mult=[1, 2, 2, 2],
    num_res_blocks=1,
    is_residual=True,
    in_channels=12,
    out_channels=12,
    patch_size=2,
    scale_factor_spatial=16,
    latents_mean=[0.1 * i for i in range(8)],
    latents_std=[1 + 0.1 * i for i in range(8)],
)

CONFIGS: dict[str, tuple[type, dict]] = {
    "AsymmetricAutoencoderKL": (
        diffusers.AsymmetricAutoencoderKL,
        dict(
            down_block_types=["DownEncoderBlock2D"] * 3,
            down_block_out_channels=(8, 8, 8),
            up_block_types=["UpDecoderBlock2D"] * 3,
            up_block_out_channels=(8, 8, 8),
            norm_num_groups=4,
        ),
    ),
    "AutoencoderDC": (
        diffusers.AutoencoderDC,
        dict(latent_channels=4, attention_head_dim=4, scaling_factor=0.41407, **_DEEP),
    ),
    "AutoencoderKL": (diffusers.AutoencoderKL, dict(latent_channels=4, **_BLOCKS)),
    "AutoencoderKLCogVideoX": (
        diffusers.AutoencoderKLCogVideoX,
        dict(block_out_channels=(8,) * 4, layers_per_block=1, latent_channels=4, norm_num_groups=4),
    ),
    "AutoencoderKLCosmos": (
        diffusers.AutoencoderKLCosmos,
        dict(
            latent_channels=4,
            encoder_block_out_channels=(8,) * 4,
            decode_block_out_channels=(8,) * 4,
            num_layers=1,
            latents_mean=[0.1 * i for i in range(16)],
            latents_std=[1 + 0.1 * i for i in range(16)],
        ),
    ),
    "AutoencoderKLFlux2": (diffusers.AutoencoderKLFlux2, dict(latent_channels=4, **_BLOCKS)),
    "AutoencoderKLHunyuanImage": (
        diffusers.AutoencoderKLHunyuanImage,
        dict(
            in_channels=3,
            out_channels=3,
            latent_channels=4,
            block_out_channels=(32, 32, 32),
            layers_per_block=1,
            spatial_compression_ratio=4,
            sample_size=32,
            scaling_factor=0.75289,
        ),
    ),
    "AutoencoderKLHunyuanImageRefiner": (diffusers.AutoencoderKLHunyuanImageRefiner, _HUNYUAN),
    "AutoencoderKLHunyuanVideo": (
        diffusers.AutoencoderKLHunyuanVideo,
        dict(block_out_channels=(8,) * 4, layers_per_block=1, latent_channels=4, norm_num_groups=4),
    ),
    "AutoencoderKLHunyuanVideo15": (diffusers.AutoencoderKLHunyuanVideo15, _HUNYUAN),
    "AutoencoderKLKVAE": (
        diffusers.AutoencoderKLKVAE,
        dict(channels=32, num_enc_blocks=1, num_dec_blocks=1, z_channels=4, ch_mult=(1, 1, 1)),
    ),
    "AutoencoderKLKVAEVideo": (
        diffusers.AutoencoderKLKVAEVideo,
        dict(ch=32, ch_mult=(1,) * 4, num_res_blocks=1, z_channels=4),
    ),
    "AutoencoderKLLTXVideo": (
        diffusers.AutoencoderKLLTXVideo,
        dict(
            latent_channels=8,
            block_out_channels=(8,) * 4,
            decoder_block_out_channels=(8,) * 4,
            layers_per_block=(1,) * 5,
            decoder_layers_per_block=(1,) * 5,
        ),
    ),
    "AutoencoderKLMagvit": (
        diffusers.AutoencoderKLMagvit,
        dict(
            block_out_channels=(8,) * 4,
            down_block_types=["SpatialDownBlock3D", *["SpatialTemporalDownBlock3D"] * 3],
            up_block_types=["SpatialUpBlock3D", *["SpatialTemporalUpBlock3D"] * 3],
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
        ),
    ),
    "AutoencoderKLMochi": (
        diffusers.AutoencoderKLMochi,
        dict(
            encoder_block_out_channels=(32,) * 4,
            decoder_block_out_channels=(32,) * 4,
            latent_channels=4,
            layers_per_block=(1,) * 5,
            latents_mean=(0.5,) * 4,
            latents_std=(2.0,) * 4,
        ),
    ),
    "AutoencoderKLOtherDecoder": (
        AutoencoderKLOtherDecoder,
        dict(
            latent_channels=4, **_BLOCKS, decoder_block_out_channels=(4,) * len(_BLOCKS["block_out_channels"])
        ),
    ),
    "AutoencoderKLQwenImage": (
        diffusers.AutoencoderKLQwenImage,
        dict(base_dim=4, z_dim=16, dim_mult=[1, 1, 2, 2], num_res_blocks=1),
    ),
    "AutoencoderKLQwenImage, layered": (
        diffusers.AutoencoderKLQwenImage,
        dict(base_dim=4, z_dim=16, dim_mult=[1, 1, 2, 2], num_res_blocks=1, input_channels=4),
    ),
    "AutoencoderKLQwenImage21": (
        diffusers.AutoencoderKLQwenImage21,
        dict(base_dim=4, decoder_base_dim=8, z_dim=64, dim_mult=[1, 1, 1, 2, 2], num_res_blocks=1),
    ),
    "AutoencoderKLTemporalDecoder": (
        diffusers.AutoencoderKLTemporalDecoder,
        dict(block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2),
    ),
    "AutoencoderKLWan": (
        diffusers.AutoencoderKLWan,
        dict(base_dim=4, z_dim=16, dim_mult=[1, 1, 2, 2], num_res_blocks=1),
    ),
    "AutoencoderKLWan 2.2": (diffusers.AutoencoderKLWan, _WAN_2_2),
    "AutoencoderRAE": (
        diffusers.AutoencoderRAE,
        dict(
            encoder_type="mae",
            encoder_hidden_size=64,
            encoder_patch_size=4,
            encoder_num_hidden_layers=1,
            decoder_hidden_size=16,
            decoder_num_hidden_layers=1,
            decoder_num_attention_heads=2,
            decoder_intermediate_size=16,
            patch_size=8,
            encoder_input_size=16,
        ),
    ),
    "AutoencoderTiny": (diffusers.AutoencoderTiny, _TINY),
    "AutoencoderTinyGN": (AutoencoderTinyGN, dict(latent_channels=4, **_TINY)),
    "AutoencoderTinyVideo": (
        AutoencoderTinyVideo,
        dict(
            latent_channels=4,
            num_blocks=1,
            encoder_block_out_channels=(8, 8, 8),
            decoder_block_out_channels=(8, 8, 8),
            encoder_time_strides=(2, 2),
            decoder_time_strides=(2, 2),
        ),
    ),
    "AutoencoderVQ": (AutoencoderVQ, dict(num_vq_embeddings=16, **_BLOCKS)),
    "ConsistencyDecoderVAE": (
        diffusers.ConsistencyDecoderVAE,
        dict(
            encoder_block_out_channels=(8, 8),
            encoder_down_block_types=("DownEncoderBlock2D",) * 2,
            encoder_layers_per_block=1,
            encoder_norm_num_groups=4,
            decoder_block_out_channels=(32, 32),
            decoder_down_block_types=("ResnetDownsampleBlock2D",) * 2,
            decoder_up_block_types=("ResnetUpsampleBlock2D",) * 2,
            decoder_layers_per_block=1,
            decoder_norm_num_groups=8,
        ),
    ),
    "HierarchicalKL": (
        HierarchicalKL,
        dict(
            block_out_channels=(8, 8), groups_per_scale=(1, 1), latent_channels=2, expansion=1, kernel_size=3
        ),
    ),
    "HierarchicalVQ": (
        HierarchicalVQ,
        dict(hidden_channels=8, residual_channels=4, embed_dim=2, codebook_sizes=16),
    ),
    "MultiScaleVQ": (
        MultiScaleVQ,
        dict(
            downsampling_factor=4,
            sides=(1, 2, 4),
            hidden_channels=8,
            residual_channels=4,
            embed_dim=4,
            codebook_size=16,
        ),
    ),
    "PaellaVQModel": (PaellaVQModel, dict(embed_dim=16, bottleneck_blocks=1, num_vq_embeddings=32)),
    "VQModel": (diffusers.VQModel, dict(num_vq_embeddings=16, **_BLOCKS)),
    "VQModel, spatial norms": (
        diffusers.VQModel,
        dict(
            block_out_channels=(32, 32),
            down_block_types=["DownEncoderBlock2D"] * 2,
            up_block_types=["AttnUpDecoderBlock2D"] * 2,
            norm_type="spatial",
            num_vq_embeddings=16,
        ),
    ),
}
"""Class and arguments by name: of each row of `families.FAMILIES`, with a comma or a version where it has more."""


def build(name: str, **changes):
    """The autoencoder of CONFIGS, random by a fixed seed, for evaluation; FLUX.2's statistics are random, too."""
    torch.manual_seed(0)
    autoencoder_class, arguments = CONFIGS[name]
    autoencoder = autoencoder_class(**{**arguments, **changes})
    if name == "AutoencoderKLFlux2":
        autoencoder.bn.running_mean.normal_()
        autoencoder.bn.running_var.uniform_(0.3, 1.5)
    return autoencoder.eval()
