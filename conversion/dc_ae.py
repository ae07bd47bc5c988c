"""The deep compression autoencoder DC-AE as mit-han-lab/efficientvit keeps it (arXiv:2410.10733): a state dict, no prefix.

Both halves count their stages from the image inwards. A stage is a list of blocks, before which the decoder upsamples and
after which the encoder downsamples. Two styles exist: convolutions with a stride and interpolation (SANA's), and pixel
unshuffling and shuffling (in, mix), in which the outermost stage may be empty. A block's queries, keys and values come
from one convolution, whose rows diffusers keeps as three matrices: plain thirds, although the original groups them by
head, which puts them together again before it computes with them.
"""

import re
from collections.abc import Mapping
from itertools import count
from typing import TYPE_CHECKING, NamedTuple

from latent_codec.conversion.diffusers_files import configured
from latent_codec.conversion.renaming import (
    THIRDS,
    Change,
    ConversionError,
    Format,
    Rename,
    Shapes,
    count_keys,
    modules,
    refuse_others,
)

if TYPE_CHECKING:
    from torch import nn

_ANCHOR = "decoder.project_in.main.conv.weight"
_HEAD_DIM = 32
_MOST_STAGES = 16
_ACTIVATIONS = {"batch_norm": "relu", "rms_norm": "silu"}
"""Of a decoder's stage, by its norm."""
_SCALES = {
    ("conv", 32, 32): "0.41407 (SANA's f32c32)",
    ("pixel_unshuffle", 32, 32): "0.3189 (f32c32-in) and 0.4552 (f32c32-mix)",
    ("pixel_unshuffle", 64, 128): "0.2889 (f64c128-in) and 0.4538 (f64c128-mix)",
    ("pixel_unshuffle", 128, 512): "0.4883 (f128c512-in) and 0.3620 (f128c512-mix)",
}
"""Published scaling factors by style, downsampling factor and latent channels."""
_BLOCKS = {
    "ResBlock": ("main.conv1.conv.weight", "main.conv2.norm"),
    "EfficientViTBlock": ("local_module.main.point_conv.conv.weight", "context_module.main.proj.norm"),
}
"""The convolution by which a kind of block is known, which has its width, and the norm."""
_RES_BLOCK = {"main.conv1.conv": "conv1", "main.conv2.conv": "conv2", "main.conv2.norm": "norm"}
_VIT_BLOCK = {
    "context_module.main.proj.norm": "attn.norm_out",
    "local_module.main.inverted_conv.conv": "conv_out.conv_inverted",
    "local_module.main.depth_conv.conv": "conv_out.conv_depth",
    "local_module.main.point_conv.conv": "conv_out.conv_point",
    "local_module.main.point_conv.norm": "conv_out.norm",
}


class _Stage(NamedTuple):
    """What the blocks of a stage are; of an empty one, what diffusers' configs say."""

    width: int
    depth: int
    block_type: str = "ResBlock"
    multiscales: tuple[int, ...] = ()
    norm_type: str = "rms_norm"


def _stage(shapes: Shapes, theirs: str, first: int) -> _Stage:
    """Read the stage `theirs`, whose blocks begin at `first`."""
    blocks = []
    for number in count(first):
        block = f"{theirs}.op_list.{number}"
        kind = next((kind for kind, (conv, _) in _BLOCKS.items() if f"{block}.{conv}" in shapes), None)
        if kind is None:
            break
        conv, norm = _BLOCKS[kind]
        scales = f"{block}.context_module.main.aggreg"
        num_scales = count_keys(shapes, f"{scales}.*.0.weight")
        kernels = tuple(shapes[f"{scales}.{scale}.0.weight"][-1] for scale in range(num_scales))
        norm_type = "batch_norm" if f"{block}.{norm}.running_mean" in shapes else "rms_norm"
        blocks.append(_Stage(shapes[f"{block}.{conv}"][0], 1, kind, kernels, norm_type))
    if len(set(blocks)) > 1:
        raise ConversionError(f"{theirs} has blocks of several kinds; expected one kind per stage")
    return blocks[0]._replace(depth=len(blocks)) if blocks else _Stage(0, 0)


def infer(shapes: Shapes) -> dict:
    """The config of an AutoencoderDC.

    Raises:
        ConversionError: for stages that have no blocks, the outermost excepted, or blocks of several kinds.
    """
    num_stages = 1 + max(int(key.split(".")[2]) for key in shapes if key.startswith("encoder.stages."))
    if num_stages > _MOST_STAGES:
        raise ConversionError(f"it has {num_stages} stages; expected at most {_MOST_STAGES}")
    encoder = [_stage(shapes, f"encoder.stages.{i}", 0) for i in range(num_stages)]
    decoder = [_stage(shapes, f"decoder.stages.{i}", int(i < num_stages - 1)) for i in range(num_stages)]
    for side, stages in (("encoder", encoder), ("decoder", decoder)):
        if num_stages < 2 or any(not stage.depth for stage in stages[1:]):
            raise ConversionError(
                f"the {side}'s stages have {[stage.depth for stage in stages]} blocks; expected some in each but the first"
            )
        if not stages[0].depth:  # it has no weights; published ones are half as wide as the next
            stages[0] = _Stage(stages[1].width // 2, 0, norm_type=stages[1].norm_type)
    project_in = "encoder.project_in.conv"
    unshuffles = any(
        f"encoder.stages.{i}.op_list.{stage.depth}.main.conv.conv.weight" in shapes
        for i, stage in enumerate(encoder)
    )
    outermost = f"{project_in}.weight" if f"{project_in}.weight" in shapes else f"{project_in}.conv.weight"
    upsampling = shapes[f"decoder.stages.{num_stages - 2}.op_list.0.main.conv.conv.weight"][0]
    return {
        "in_channels": shapes[outermost][1],
        "latent_channels": shapes[_ANCHOR][1],
        "encoder_block_types": tuple(stage.block_type for stage in encoder),
        "decoder_block_types": tuple(stage.block_type for stage in decoder),
        "encoder_block_out_channels": tuple(stage.width for stage in encoder),
        "decoder_block_out_channels": tuple(stage.width for stage in decoder),
        "encoder_layers_per_block": tuple(stage.depth for stage in encoder),
        "decoder_layers_per_block": tuple(stage.depth for stage in decoder),
        "encoder_qkv_multiscales": tuple(stage.multiscales for stage in encoder),
        "decoder_qkv_multiscales": tuple(stage.multiscales for stage in decoder),
        "downsample_block_type": "pixel_unshuffle" if unshuffles else "conv",
        "upsample_block_type": "pixel_shuffle" if upsampling == 4 * decoder[-2].width else "interpolate",
        "decoder_norm_types": tuple(stage.norm_type for stage in decoder),
    }


def _defaults(inferred: Mapping) -> dict:
    return {
        "attention_head_dim": _HEAD_DIM,
        "decoder_act_fns": tuple(_ACTIVATIONS[norm] for norm in inferred["decoder_norm_types"]),
        "encoder_out_shortcut": True,
        "decoder_in_shortcut": True,
        "decoder_conv_act_fn": "relu",
    }


def table(config: Mapping) -> list[Rename]:
    is_deep = {side: config[f"{side}_layers_per_block"][0] > 0 for side in ("encoder", "decoder")}
    inner = ".conv" if config["downsample_block_type"] == "pixel_unshuffle" else ""
    rows = [
        Rename("encoder.project_in.conv", "encoder.conv_in")
        if is_deep["encoder"]
        else Rename(f"encoder.project_in.conv{inner}", "encoder.conv_in.conv"),
        Rename("encoder.project_out.main.op_list.0.conv", "encoder.conv_out"),
        Rename("decoder.project_in.main.conv", "decoder.conv_in"),
        Rename("decoder.project_out.op_list.0", "decoder.norm_out"),
        Rename("decoder.project_out.op_list.2.conv", "decoder.conv_out")
        if is_deep["decoder"]
        else Rename("decoder.project_out.op_list.2.conv.conv", "decoder.conv_out.conv"),
    ]
    for side, outer in (("encoder", "down"), ("decoder", "up")):
        depths, multiscales = config[f"{side}_layers_per_block"], config[f"{side}_qkv_multiscales"]
        for stage, depth in enumerate(depths):
            theirs, ours = f"{side}.stages.{stage}.op_list", f"{side}.{outer}_blocks.{stage}"
            first = int(side == "decoder" and stage < len(depths) - 1)
            for block in range(first, first + depth):
                rows += _block(f"{theirs}.{block}", f"{ours}.{block}", len(multiscales[stage]))
            resampling = (
                f"{theirs}.{depth}.main.conv{inner}" if side == "encoder" else f"{theirs}.0.main.conv.conv"
            )
            rows.append(Rename(resampling, f"{ours}.{0 if side == 'decoder' else depth}.conv"))
    return rows


def _block(theirs: str, ours: str, num_scales: int) -> list[Rename]:
    rows = modules(theirs, ours, _RES_BLOCK | _VIT_BLOCK)
    attention = f"{theirs}.context_module.main"
    for name, third in zip(("to_q", "to_k", "to_v"), THIRDS):
        rows.append(Rename(f"{attention}.qkv.conv", f"{ours}.attn.{name}", third))
    rows.append(Rename(f"{attention}.proj.conv", f"{ours}.attn.to_out", Change.MATRIX))
    for scale in range(num_scales):
        for layer, name in enumerate(("proj_in", "proj_out")):
            rows.append(
                Rename(f"{attention}.aggreg.{scale}.{layer}", f"{ours}.attn.to_qkv_multiscale.{scale}.{name}")
            )
    return rows


def _refuses(component: "nn.Module") -> str | None:
    config = component.config
    stages = {key: _per_stage(config, key) for key in ("decoder_norm_types", "decoder_act_fns")}
    return refuse_others({**config, **stages}, _defaults(stages))


def _per_stage(config: Mapping, key: str) -> tuple:
    """An entry that a config may have once for all stages."""
    value = config[key]
    return (value,) * len(config["decoder_block_out_channels"]) if isinstance(value, str) else tuple(value)


def published_scales(config: Mapping) -> str:
    factor = 2 ** (len(config["encoder_block_out_channels"]) - 1)
    return _SCALES.get((config["downsample_block_type"], factor, config["latent_channels"]), "")


FORMAT = Format(
    names=("dcae",),
    title="deep compression autoencoder (DC-AE)",
    class_name="AutoencoderDC",
    anchor=_ANCHOR,
    defaults=_defaults,
    fixed="the original code, whose decoder has relu after batch norms and silu after others",
    recognizes=lambda shapes: _ANCHOR in shapes and any(key.startswith("encoder.stages.") for key in shapes),
    infer=infer,
    table=table,
    refuses=_refuses,
    published_scales=published_scales,
)
DIFFUSERS = configured(
    "AutoencoderDC",
    "decoder.conv_in.weight",
    recognizes=lambda shapes: (
        "decoder.conv_in.weight" in shapes
        and any(re.match(r"decoder\.up_blocks\.\d+\.\d+\.", key) for key in shapes)
    ),
    published_scales=published_scales,
)
