"""Autoencoders that are known by their keys and not supported, so that an error can say what a file holds.

Each is told from the supported formats, whose names some of them borrow, by keys or shapes that only it has.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

from latent_codec.conversion.renaming import Shapes


class OtherFamily(NamedTuple):
    """A family of autoencoders that is not converted."""

    title: str
    anchor: str
    """A key that every file of the family has, by which its prefix is found."""
    recognizes: Callable[[Shapes], bool] = lambda shapes: True
    """Whether keys without their prefix, `anchor` among them, are of the family."""


def _has(pattern: str) -> Callable[[Shapes], bool]:
    return lambda shapes: any(re.match(pattern, key) for key in shapes)


def _has_key(key: str) -> Callable[[Shapes], bool]:
    return lambda shapes: key in shapes


OTHER_FAMILIES = (
    OtherFamily(
        "FLUX.2's autoencoder (AutoencoderKLFlux2)", "bn.running_mean", _has_key("encoder.conv_in.weight")
    ),
    OtherFamily(
        "Wan 2.2's video autoencoder (AutoencoderKLWan)",
        "decoder.middle.0.residual.0.gamma",
        _has(r"decoder\.upsamples\.0\.upsamples\."),
    ),
    OtherFamily(
        "the video autoencoder of Wan 2.1 or Qwen-Image (AutoencoderKLWan, AutoencoderKLQwenImage)",
        "decoder.middle.0.residual.0.gamma",
    ),
    OtherFamily(
        "the video autoencoder of Wan or Qwen-Image (AutoencoderKLWan, AutoencoderKLQwenImage)",
        "decoder.mid_block.resnets.0.norm1.gamma",
    ),
    OtherFamily(
        "a deep compression autoencoder (DC-AE, AutoencoderDC)", "decoder.project_in.main.conv.weight"
    ),
    OtherFamily(
        "a deep compression autoencoder (DC-AE, AutoencoderDC)",
        "decoder.conv_in.weight",
        _has(r"decoder\.up_blocks\.\d+\.\d+\."),
    ),
    OtherFamily(
        # In latent-diffusion's code, whose names it has, the outermost level has nothing to upsample.
        "HunyuanImage 2.1's autoencoder (AutoencoderKLHunyuanImage)",
        "decoder.up.0.upsample.conv.weight",
    ),
    OtherFamily(
        "HunyuanImage 2.1's autoencoder (AutoencoderKLHunyuanImage)", "decoder.up_blocks.0.conv1.weight"
    ),
    OtherFamily(
        "a tiny video autoencoder (TAEHV)", "encoder.2.conv.weight", _has_key("decoder.7.conv.weight")
    ),
    OtherFamily(
        "a video autoencoder with causal convolutions (such as AutoencoderKLHunyuanVideo or AutoencoderKLCogVideoX)",
        "encoder.mid_block.resnets.0.conv1.conv.weight",
    ),
    OtherFamily(
        "LTX-Video's autoencoder (AutoencoderKLLTXVideo)", "encoder.mid_block.res_blocks.0.conv1.conv.weight"
    ),
    OtherFamily(
        "Stable Video Diffusion's autoencoder (AutoencoderKLTemporalDecoder)", "decoder.time_conv_out.weight"
    ),
    OtherFamily(
        "an inpainting autoencoder (AsymmetricAutoencoderKL)", "decoder.condition_encoder.layers.0.weight"
    ),
    OtherFamily(
        "an autoencoder with a consistency decoder (ConsistencyDecoderVAE)", "decoder_unet.conv_in.weight"
    ),
    OtherFamily("Würstchen's autoencoder (PaellaVQModel)", "vquantizer.codebook.weight"),
    OtherFamily("an autoencoder of audio (AutoencoderOobleck)", "encoder.conv1.weight_g"),
)
