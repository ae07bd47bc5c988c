"""Autoencoders that are known by their keys and not supported, so that an error can say what a file holds.

Each is told from the supported formats, whose names some of them borrow, by keys or shapes that only it has.
"""

OTHER_FAMILIES = {
    "encoder.mid_block.resnets.0.conv1.conv.weight": (
        "a video autoencoder with causal convolutions (such as AutoencoderKLHunyuanVideo or AutoencoderKLCogVideoX)"
    ),
    "encoder.mid_block.res_blocks.0.conv1.conv.weight": "LTX-Video's autoencoder (AutoencoderKLLTXVideo)",
    "decoder.time_conv_out.weight": "Stable Video Diffusion's autoencoder (AutoencoderKLTemporalDecoder)",
    "decoder.condition_encoder.layers.0.weight": "an inpainting autoencoder (AsymmetricAutoencoderKL)",
    "decoder_unet.conv_in.weight": "an autoencoder with a consistency decoder (ConsistencyDecoderVAE)",
    "vquantizer.codebook.weight": "Würstchen's autoencoder (PaellaVQModel)",
    "encoder.conv1.weight_g": "an autoencoder of audio (AutoencoderOobleck)",
}
"""Titles by the key that every file of a family has and no other, by which its prefix is found."""
