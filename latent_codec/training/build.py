"""Build the autoencoder that a configuration names."""

import inspect

import torch
from diffusers import AutoencoderKL

from latent_codec.codec import LatentCodec
from latent_codec.models.initialization import initialize_evenly
from latent_codec.training.config import TrainingConfig, near_match


def build_autoencoder(config: TrainingConfig) -> AutoencoderKL:
    """A new AutoencoderKL from `model.arguments`, or the one named by `model.pretrained`, in float32.

    `block_out_channels` decides the number of levels, from which the block types follow;
    `out_channels` are as many as `in_channels`. Initial weights are a function of `run.seed`.

    Raises:
        ValueError: for an argument that AutoencoderKL does not have or cannot use, or a
            pretrained codec that is no AutoencoderKL.
    """
    if config.model.pretrained:
        autoencoder = LatentCodec.from_pretrained(config.model.pretrained).autoencoder
        if not isinstance(autoencoder, AutoencoderKL):
            raise ValueError(
                f"{config.model.pretrained} is a {type(autoencoder).__name__}; this trainer takes an AutoencoderKL."
            )
        return autoencoder.train()
    arguments = dict(config.model.arguments)
    allowed = list(inspect.signature(AutoencoderKL.__init__).parameters)[1:]
    for name in arguments:
        if name not in allowed:
            raise ValueError(
                f"unknown key in [model.arguments]: {name!r}{near_match(name, allowed)}. Allowed: {', '.join(allowed)}."
            )
    widths = arguments.setdefault("block_out_channels", [64])
    if not isinstance(widths, (list, tuple)) or not widths:
        raise ValueError(f"model.arguments.block_out_channels is {widths!r}; expected a list, one per level.")
    arguments.setdefault("down_block_types", ["DownEncoderBlock2D"] * len(widths))
    arguments.setdefault("up_block_types", ["UpDecoderBlock2D"] * len(widths))
    arguments.setdefault("out_channels", arguments.get("in_channels", 3))
    arguments.setdefault("sample_size", min(config.data.size))
    arguments.setdefault("scaling_factor", 1.0)  # until it is measured
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        try:
            autoencoder = AutoencoderKL(**arguments)
        except (TypeError, RuntimeError, IndexError, ZeroDivisionError) as error:
            raise ValueError(f"model.arguments do not make an AutoencoderKL: {error}") from error
        if config.model.initialization == "even":
            initialize_evenly(autoencoder)
    return autoencoder
