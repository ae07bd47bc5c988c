"""An AutoencoderKL as a network of another config that computes the same: Stable Diffusion's, for codecs that are narrower.

Hosts build one network, whatever a file holds. Most smaller ones fit into it exactly:

    channels        placed at the head of their norm group's; zeros elsewhere stay zeros through every layer
    norm groups     as many as there are, of C / G channels; k of them for one with c / g = C / (k G) channels, repeated
                    k times, since repetition changes neither mean nor variance
    more layers     residual blocks that add zero
    attention       queries times sqrt(C / c), for the softmax divides by sqrt(C); where there is none, one that adds zero
    quant convs     identities, or multiplied into the convolution next to them
"""

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from latent_codec.conversion.renaming import ConversionError, Network

if TYPE_CHECKING:
    from diffusers import AutoencoderKL
    from torch import Tensor

SD = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "mid_block_add_attention": True,
}
"""Stable Diffusion's, SDXL's, SD3's and FLUX's network: entries of its config that a narrower one may lack."""
SD_X4 = SD | {"block_out_channels": (128, 256, 512)}
"""The x4 upscaler's."""
NETWORKS = {"sd": SD}
"""Values of `embed` in `convert`."""
QUANT_CONVS = "use_quant_conv", "use_post_quant_conv"
_QUANT_CONVS = "quant_conv", "post_quant_conv"


def misfits(config: Mapping, changes: Mapping) -> list[str]:
    """Why an AutoencoderKL is no part of the network that `changes` make of its config; empty if it is.

    Args:
        config: of the AutoencoderKL.
        changes: entries of the other network's config, of those in `SD` and `QUANT_CONVS`.
    """
    network = {**config, **changes}
    found = []
    widths, wide = tuple(config["block_out_channels"]), tuple(network["block_out_channels"])
    if {"block_out_channels", "norm_num_groups"} & changes.keys():
        if len(widths) != len(wide):
            return [f"it has {len(widths)} levels, and that network {len(wide)}"]
        found += _width_misfits(widths, config["norm_num_groups"], wide, network["norm_num_groups"])
        if config.get("act_fn", "silu") not in ("silu", "swish"):
            found.append(
                f"its act_fn is {config['act_fn']}, which may be other than 0 for the channels that are 0"
            )
        if any("Attn" in name for name in (*config["down_block_types"], *config["up_block_types"])):
            found.append("it has attention at levels, and that network only in the middle")
    if config["layers_per_block"] > network["layers_per_block"]:
        found.append(
            f"its layers_per_block is {config['layers_per_block']}, and {network['layers_per_block']} there"
        )
    if config.get("mid_block_add_attention", True) and not network.get("mid_block_add_attention", True):
        found.append("it has attention in the middle, and that network has none")
    return found


def _width_misfits(widths: tuple, groups: int, wide: tuple, wide_groups: int) -> Iterator[str]:
    per_group, wide_per_group = (
        [width / each for width in ws] for ws, each in ((widths, groups), (wide, wide_groups))
    )
    uneven = [level for level, (c, there) in enumerate(zip(per_group, wide_per_group)) if there % c]
    if groups > wide_groups or uneven:
        fitting = max(1, min(groups, wide_groups))
        example = tuple(fitting * width // wide_groups for width in wide)
        yield (
            f"its {groups} norm groups have {_listed(per_group)} channels, level by level, which has to divide "
            f"{_listed(wide_per_group)}, and be at most {wide_groups} groups: block_out_channels {example} with "
            f"norm_num_groups {fitting} would fit"
        )
        return
    merged = [
        level
        for level in range(1, len(widths))
        if wide[level - 1] == wide[level] and widths[level - 1] != widths[level]
    ]
    if merged:
        yield (
            f"its levels {merged[0] - 1} and {merged[0]} are {widths[merged[0] - 1]} and {widths[merged[0]]} channels wide, "
            f"and have to be of one width, as they are there ({wide[merged[0]]})"
        )


def _listed(values: list[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def as_network(autoencoder: "AutoencoderKL", changes: Mapping) -> "AutoencoderKL":
    """The AutoencoderKL whose config has these `changes`, and whose posteriors and images are the same.

    Args:
        autoencoder: an AutoencoderKL; is not changed, and shares the tensors that stay as they are.
        changes: entries of `SD` and `QUANT_CONVS`.

    Raises:
        ConversionError: if it is no part of that network, with the reason.
    """
    import torch

    config = autoencoder.config
    if reasons := misfits(config, changes):
        raise ConversionError(
            f"this AutoencoderKL does not fit into that network exactly: {'; '.join(reasons)}"
        )
    network = Network(type(autoencoder).__name__, {**config, **changes}).on_meta()
    levels = [
        _Places(narrow, config["norm_num_groups"], wide, network.config["norm_num_groups"])
        for narrow, wide in zip(config["block_out_channels"], network.config["block_out_channels"])
    ]
    state, old = {}, autoencoder.state_dict()
    dtype = next(iter(old.values())).dtype
    rows = {name: (source, target) for name, source, target in _layers(network.config, levels)}
    for key, empty in network.state_dict().items():
        module, _, leaf = key.rpartition(".")
        block, _, part = module.rpartition(".")
        source, target = rows[module]
        tensor = torch.zeros(empty.shape, dtype=dtype)
        if key in old:
            state[key] = _placed(old[key], tensor.to(old[key].dtype), source, target, part)
        elif part in _QUANT_CONVS and leaf == "weight":
            state[key] = torch.eye(empty.shape[0], dtype=dtype)[:, :, None, None]
        elif part == "conv_shortcut" and leaf == "weight" and f"{block}.conv1.weight" in old:
            state[key] = _placed(
                torch.eye(len(source.first), dtype=dtype)[:, :, None, None], tensor, source, target, part
            )
        else:
            state[key] = tensor
    for name, setting in zip(_QUANT_CONVS, QUANT_CONVS):
        if config[setting] and not network.config[setting]:
            _multiply_in(name, old, state)
    network.load_state_dict(state, assign=True)
    network.register_to_config(**{key: value for key, value in config.items() if key not in changes})
    return network.eval()


class _Places:
    """Channels of a level in a wider network: groups keep their numbers, and repeat their channels until they are full."""

    def __init__(self, channels: int, groups: int, wide: int, wide_groups: int):
        import torch

        size, room = channels // groups, wide // wide_groups
        own = torch.arange(channels)
        self.first = own // size * room + own % size
        """Of each channel."""
        self.filled = torch.arange(groups * room)
        self.repeated = self.filled // room * size + self.filled % room % size
        """Of each filled place, the channel in it."""
        self.query_factor = math.sqrt(wide / channels)


def _layers(config: Mapping, levels: list[_Places]) -> Iterator[tuple[str, _Places | None, _Places | None]]:
    """Each layer with weights, where its inputs are placed and its outputs; None: images, latents and moments."""
    inner, blocks = levels[-1], config["layers_per_block"]
    yield from ((name, None, None) for name in _QUANT_CONVS)
    for side, outer, last in (("encoder", "down", inner), ("decoder", "up", levels[0])):
        order = levels if side == "encoder" else levels[::-1]
        before = order[0]
        yield f"{side}.conv_in", None, before
        for number, level in enumerate(order):
            block = f"{side}.{outer}_blocks.{number}"
            for layer in range(blocks + (side == "decoder")):
                yield from _residual_block(f"{block}.resnets.{layer}", before, level)
                before = level
            yield f"{block}.{outer}samplers.0.conv", level, level
        for number in (0, 1):
            yield from _residual_block(f"{side}.mid_block.resnets.{number}", inner, inner)
        for part in ("group_norm", "to_q", "to_k", "to_v", "to_out.0"):
            yield f"{side}.mid_block.attentions.0.{part}", inner, inner
        yield f"{side}.conv_norm_out", last, last
        yield f"{side}.conv_out", last, None


def _residual_block(name: str, source: _Places, target: _Places) -> Iterator[tuple[str, _Places, _Places]]:
    yield f"{name}.norm1", source, source
    yield f"{name}.conv1", source, target
    yield f"{name}.norm2", target, target
    yield f"{name}.conv2", target, target
    yield f"{name}.conv_shortcut", source, target


def _placed(
    tensor: "Tensor", zeros: "Tensor", source: _Places | None, target: _Places | None, layer: str
) -> "Tensor":
    """A layer's weight or bias in the wider network's: outputs are repeated, inputs are read from their first place."""
    import torch

    rows = channels = torch.arange(len(tensor))
    if target is not None and layer in ("to_q", "to_k", "to_v"):
        rows = target.first
    elif target is not None:
        rows, channels = target.filled, target.repeated
    values = tensor[channels]
    if layer == "to_q":
        values = values.double() * target.query_factor
    values = values.to(zeros.dtype)
    if tensor.ndim == 1:
        zeros[rows] = values
    else:
        columns = torch.arange(tensor.shape[1]) if source is None else source.first
        zeros[rows[:, None], columns] = values
    return zeros


def _multiply_in(name: str, old: Mapping, state: dict[str, "Tensor"]) -> None:
    """Put a quant conv that the network lacks into the convolution next to it.

    Raises:
        ConversionError: for a bias before the decoder, whose first convolution pads with zeros.
    """
    import torch

    weight, bias = (old[f"{name}.{leaf}"].double() for leaf in ("weight", "bias"))
    matrix = weight[:, :, 0, 0]
    neighbor = "encoder.conv_out" if name == "quant_conv" else "decoder.conv_in"
    conv = state[f"{neighbor}.weight"]
    if name == "post_quant_conv":
        if bias.any():
            raise ConversionError(
                "this AutoencoderKL does not fit into a network without quant convs exactly: its post_quant_conv has a "
                "bias, and the decoder's first convolution pads what it adds to with zeros"
            )
        state[f"{neighbor}.weight"] = torch.einsum("oikl,iz->ozkl", conv.double(), matrix).to(conv.dtype)
        return
    state[f"{neighbor}.weight"] = torch.einsum("oi,ickl->ockl", matrix, conv.double()).to(conv.dtype)
    own = state[f"{neighbor}.bias"]
    state[f"{neighbor}.bias"] = (matrix @ own.double() + bias).to(own.dtype)
