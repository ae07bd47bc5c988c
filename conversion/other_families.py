"""Autoencoders that are known by their keys and not supported, so that an error can say what a file holds.

Each is told from the supported formats, whose names some of them borrow, by keys or shapes that only it has.
"""

from typing import NamedTuple


class OtherFamily(NamedTuple):
    """A family of autoencoders that is not converted."""

    title: str
    anchor: str
    """A key that every file of the family has and no other, by which its prefix is found."""


OTHER_FAMILIES = (
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
