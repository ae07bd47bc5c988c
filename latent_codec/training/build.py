"""Build the autoencoder that a configuration names."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from diffusers import AutoencoderKL

from latent_codec.codec import LatentCodec
from latent_codec.families import family_of
from latent_codec.models.autoencoder_vq import AutoencoderVQ
from latent_codec.models.hierarchical_vq import HierarchicalVQ
from latent_codec.models.initialization import initialize_evenly
from latent_codec.training.config import TrainingConfig, near_match

CLASSES = {each.__name__: each for each in (AutoencoderKL, AutoencoderVQ, HierarchicalVQ)}
Network = TypeVar("Network", bound=torch.nn.Module)
Autoencoder = AutoencoderKL | AutoencoderVQ | HierarchicalVQ


def build_autoencoder(config: TrainingConfig) -> Autoencoder:
    """A new autoencoder of `model.class_name` from `model.arguments`, or `model.pretrained`, in float32.

    For AutoencoderKL and AutoencoderVQ `block_out_channels` decides the number of levels, from which the block
    types follow; `out_channels` are as many as `in_channels`. Initial weights are a function of `run.seed`.

    Raises:
        ValueError: for an argument that the class does not have or cannot use, or a
            pretrained codec of a class that is not trained here.
    """
    if config.model.pretrained:
        autoencoder = LatentCodec.from_pretrained(config.model.pretrained).autoencoder
        if family_of(autoencoder).trainable is None:
            raise ValueError(
                f"{config.model.pretrained} is of the class {type(autoencoder).__name__}; this trainer takes "
                f"{', '.join(CLASSES)}."
            )
        return autoencoder.train()
    autoencoder_class, arguments = CLASSES[config.model.class_name], dict(config.model.arguments)
    if "block_out_channels" in inspect.signature(autoencoder_class.__init__).parameters:
        widths = arguments.setdefault("block_out_channels", [64])
        if not isinstance(widths, (list, tuple)) or not widths:
            raise ValueError(
                f"model.arguments.block_out_channels is {widths!r}; expected a list, one per level."
            )
        arguments.setdefault("down_block_types", ["DownEncoderBlock2D"] * len(widths))
        arguments.setdefault("up_block_types", ["UpDecoderBlock2D"] * len(widths))
        arguments.setdefault("out_channels", arguments.get("in_channels", 3))
    arguments.setdefault("sample_size", min(config.data.size))
    arguments.setdefault("scaling_factor", 1.0)  # until it is measured
    autoencoder = construct(autoencoder_class, arguments, config.run.seed)
    if config.model.initialization == "even":
        with seeded(config.run.seed):
            initialize_evenly(autoencoder)
    return autoencoder


def construct(network_class: type[Network], arguments: dict[str, Any], seed: int) -> Network:
    """A network with initial weights that are a function of `seed`.

    Raises:
        ValueError: for an argument that the class does not have, naming the near match, or cannot use.
    """
    name = network_class.__name__
    allowed = list(inspect.signature(network_class.__init__).parameters)[1:]
    for key in arguments:
        if key not in allowed:
            raise ValueError(
                f"unknown key in [model.arguments]: {key!r}{near_match(key, allowed)}. {name} has: {', '.join(allowed)}."
            )
    with seeded(seed):
        try:
            return network_class(**arguments)
        except (TypeError, ValueError, RuntimeError, IndexError, ZeroDivisionError) as error:
            article = "an" if name[0] in "AEIOU" else "a"
            raise ValueError(f"model.arguments do not make {article} {name}: {error}") from error


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Chance on the CPU as a function of `seed` inside, and untouched outside."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
