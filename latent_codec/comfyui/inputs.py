"""What several nodes share about their inputs."""

from typing import Any

CATEGORY = "latent codec"
PREVIEW = "LATENT_CODEC_PREVIEW"
"""The type of a fitted preview, from node to node."""


def node_input(kind: str | list[str], tooltip: str, **settings: Any) -> tuple[str | list[str], dict]:
    """An input as INPUT_TYPES has it: a type, or the values to choose from; `settings` are those of ComfyUI's widget."""
    return kind, settings | {"tooltip": tooltip}


def number_input(
    tooltip: str, *, default: float, between: tuple[float, float], **settings: Any
) -> tuple[str | list[str], dict]:
    """An integer where `default` is one, else a number in steps of 0.01."""
    kind, step = ("INT", {}) if isinstance(default, int) else ("FLOAT", {"step": 0.01})
    least, most = between
    return node_input(kind, tooltip, default=default, min=least, max=most, **step, **settings)


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
