"""What several nodes share about their inputs."""

from typing import Any

CATEGORY = "latent codec"
PREVIEW = "LATENT_CODEC_PREVIEW"
"""The type of a fitted preview, from node to node."""


def codec_vae(vae: Any) -> Any:
    """The VAE, if it is a codec's.

    Raises:
        ValueError: for ComfyUI's own.
    """
    from latent_codec.comfyui.network import CodecNetwork

    network = vae.first_stage_model
    if not isinstance(network, CodecNetwork):
        raise ValueError(
            f"expected a VAE from Load Latent Codec, got one of ComfyUI's own ({type(network).__name__})"
        )
    return vae


def number_or_none(value: float, default: float) -> float | None:
    """A widget's number; None where it is at `default`, which stands for nothing given."""
    return None if value == default else value
