"""Build networks from a configuration, and load the codec that they learn from."""

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from diffusers import AutoencoderKL, ModelMixin

from latent_codec.codec import LatentCodec
from latent_codec.errors import SettingError
from latent_codec.images.sources import ImageSource
from latent_codec.models.autoencoder_kl_other_decoder import with_other_decoder
from latent_codec.models.autoencoder_vq import AutoencoderVQ
from latent_codec.models.grid_quantizer import values_for
from latent_codec.models.hierarchical_vq import HierarchicalVQ
from latent_codec.models.initialization import initialize_evenly
from latent_codec.models.multi_scale_vq import MultiScaleVQ
from latent_codec.training.config import TrainingConfig
from latent_codec.training.settings import check_keys

CLASSES = {each.__name__: each for each in (AutoencoderKL, AutoencoderVQ, HierarchicalVQ, MultiScaleVQ)}
_CODEBOOK_ARGUMENTS = {
    "AutoencoderVQ": ("num_vq_embeddings", "vq_embed_dim"),
    "HierarchicalVQ": ("codebook_sizes", "embed_dim"),
}
"""How a network calls the size of its codebook and the length of a codeword."""
Network = TypeVar("Network", bound=torch.nn.Module)
Autoencoder = ModelMixin
"""One of CLASSES; of any family that opens where only the decoder is trained."""


def load_codec(config: TrainingConfig) -> LatentCodec | None:
    """The codec that this training learns from, on the CPU; None where it learns from images only.

    Raises:
        SettingError: if a kind that needs one has none.
    """
    if config.kind.codec in (None, "model.pretrained"):
        return None
    name = config.codec
    is_over_pixels = config.model.arguments.get("data") == "pixels"
    if is_over_pixels and name is not None:
        raise config.error(config.kind.codec, "none for a prior over pixels")
    if is_over_pixels or (name is None and config.kind.codec_optional and config.model.pretrained):
        return None
    if name is not None:
        return LatentCodec.from_pretrained(name, pipeline=config.model.pipeline)
    raise SettingError(
        config.kind.codec,
        f"the name or folder of the codec that a {config.model.class_name} learns from",
        advice="name it as `codec`",
    )


def build_autoencoder(
    config: TrainingConfig, source: ImageSource | None = None, codec: LatentCodec | None = None
) -> Autoencoder:
    """A new autoencoder of `model.class_name` from `model.arguments`, or `model.pretrained`, in float32.

    Where `model.width` and the like ask for another decoder, the pretrained one gets a new one, with initial weights.

    For AutoencoderKL and AutoencoderVQ `block_out_channels` decides the number of resolutions, from which the block
    types follow; `out_channels` are as many as `in_channels`. Initial weights are a function of `run.seed`.

    Raises:
        ValueError: for an argument that the class does not have or cannot use.
    """
    if config.model.pretrained:
        autoencoder = open_pretrained(config).autoencoder
        if config.model.has_new_decoder:
            with seeded(config.run.seed):
                autoencoder = with_other_decoder(
                    autoencoder,
                    width=config.model.width,
                    widths=config.model.widths,
                    layers_per_block=config.model.layers_per_block,
                    upscale=config.model.upscale,
                )
        return autoencoder.train()
    autoencoder_class, arguments = CLASSES[config.model.class_name], dict(config.model.arguments)
    if config.codebook.kind is not None:
        arguments |= _quantizer_arguments(config)
    if "block_out_channels" in inspect.signature(autoencoder_class.__init__).parameters:
        widths = arguments.setdefault("block_out_channels", [64])
        if not isinstance(widths, (list, tuple)) or not widths:
            raise SettingError("model.arguments.block_out_channels", "a list, one per resolution", widths)
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


def open_pretrained(config: TrainingConfig) -> LatentCodec:
    """The codec that `model.pretrained` names."""
    return LatentCodec.from_pretrained(config.model.pretrained, pipeline=config.model.pipeline)


def _quantizer_arguments(config: TrainingConfig) -> dict[str, Any]:
    """The model's arguments that `codebook.kind` decides.

    Raises:
        SettingError: for a network without a codebook, or a grid that has none of its size.
    """
    codebook, name = config.codebook, config.model.class_name
    if name not in _CODEBOOK_ARGUMENTS:
        raise config.error(
            "codebook.kind", f"none for {name}: only {' and '.join(_CODEBOOK_ARGUMENTS)} have one"
        )
    if codebook.kind == "gumbel" and name != "AutoencoderVQ":
        raise config.error("codebook.kind", f"vq, fsq, lfq, lfq-successive or bsq for {name}")
    if codebook.kind in ("vq", "gumbel"):
        linear = {"assignment": "linear" if codebook.kind == "gumbel" else "nearest"}
        return {"quantizer": "vq"} | (linear if name == "AutoencoderVQ" else {})
    size_key, dim_key = _CODEBOOK_ARGUMENTS[name]
    values = codebook.values_per_channel
    if values is None:
        size = config.model.arguments.get(
            size_key, inspect.signature(CLASSES[name]).parameters[size_key].default
        )
        try:
            values = values_for(codebook.kind, size)
        except ValueError as error:
            raise SettingError(f"model.arguments.{size_key}", str(error), size) from error
    return {
        "quantizer": codebook.kind,
        "values_per_channel": list(values) if codebook.kind == "fsq" else None,
        size_key: math.prod(values),
        dim_key: len(values),
    }


def construct(network_class: type[Network], arguments: dict[str, Any], seed: int) -> Network:
    """A network with initial weights that are a function of `seed`.

    Raises:
        ValueError: for an argument that the class does not have, naming the near match, or cannot use.
    """
    name = network_class.__name__
    allowed = list(inspect.signature(network_class.__init__).parameters)[1:]
    check_keys(arguments, allowed, f"key in [model.arguments] of {name}:")
    with seeded(seed):
        try:
            return network_class(**arguments)
        except (TypeError, ValueError, RuntimeError, IndexError, ZeroDivisionError) as error:
            article = "an" if name[0] in "AEIOU" else "a"
            raise ValueError(f"model.arguments do not make {article} {name}: {error}") from error


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Make random numbers on the CPU a function of `seed` inside, and leave their generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
