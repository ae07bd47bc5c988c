"""HunyuanImage 2.1's autoencoder (Tencent-Hunyuan/HunyuanImage-2.1): latent-diffusion's names, and other layers.

The checkpoint is of a video autoencoder: convolutions have kernels over one frame, and keys begin with vae. ComfyUI has
neither; both are read, and each is written by a name of its own. What has
latent-diffusion's names differs from it in four ways: `decoder.up.0` is the coarsest level, resampling convolutions trade
pixels for channels, so that every residual block keeps its width, and shortcuts without weights go around them.
"""

from collections.abc import Mapping
from dataclasses import replace
from itertools import count

from latent_codec.conversion.diffusers_files import configured
from latent_codec.conversion.ldm_kl import LOSS
from latent_codec.conversion.renaming import (
    Change,
    ConversionError,
    Format,
    Rename,
    Scale,
    Shapes,
    count_keys,
    modules,
    refuse_others,
)

_ANCHOR = "decoder.up.0.upsample.conv.weight"
"""In latent-diffusion's code, the outermost level has nothing to upsample."""
_SAMPLE_SIZE = 384
"""Of the tiles that diffusers cuts, as in its published config."""
_SCALE = Scale(0.75289, None, "of HunyuanImage 2.1, whose original code fixes it")
_ORIGINAL = {"downsample_match_channel": True, "upsample_match_channel": True}
_BLOCK = {name: name for name in ("norm1", "conv1", "norm2", "conv2")}
_ATTENTION = {"norm": "norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "proj"}


def infer(shapes: Shapes) -> dict:
    """The config of an AutoencoderKLHunyuanImage.

    Raises:
        ConversionError: for levels of different depth.
    """
    levels = range(count_keys(shapes, "encoder.down.*.block.0.conv1.weight"))
    depths = [count_keys(shapes, f"encoder.down.{level}.block.*.conv1.weight") for level in levels]
    if len(set(depths)) != 1:
        raise ConversionError(f"the encoder's levels have {depths} residual blocks; expected as many at each")
    num_resamplings = sum(f"encoder.down.{level}.downsample.conv.weight" in shapes for level in levels)
    return {
        "in_channels": shapes["encoder.conv_in.weight"][1],
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "block_out_channels": tuple(
            shapes[f"encoder.down.{level}.block.0.conv1.weight"][0] for level in levels
        ),
        "layers_per_block": depths[0],
        "spatial_compression_ratio": 2**num_resamplings,
    } | _ORIGINAL


def table(config: Mapping) -> list[Rename]:
    return [row._replace(change=Change.STILL) for row in comfy_table(config)]


def comfy_table(config: Mapping) -> list[Rename]:
    levels, blocks = len(config["block_out_channels"]), config["layers_per_block"]
    rows = []
    for side, outer, depth in (("encoder", "down", blocks), ("decoder", "up", blocks + 1)):
        rows += [Rename(f"{side}.{name}", f"{side}.{name}") for name in ("conv_in", "norm_out", "conv_out")]
        for number in (0, 1):
            rows += modules(f"{side}.mid.block_{number + 1}", f"{side}.mid_block.resnets.{number}", _BLOCK)
        rows += modules(f"{side}.mid.attn_1", f"{side}.mid_block.attentions.0", _ATTENTION)
        ours = count()  # diffusers counts blocks and resamplings flat
        for level in range(levels):
            theirs = f"{side}.{outer}.{level}"
            for block in range(depth):
                rows += modules(f"{theirs}.block.{block}", f"{side}.{outer}_blocks.{next(ours)}", _BLOCK)
            rows.append(Rename(f"{theirs}.{outer}sample.conv", f"{side}.{outer}_blocks.{next(ours)}.conv"))
    return rows


FORMAT = Format(
    names=("hunyuan-image",),
    title="HunyuanImage 2.1 autoencoder",
    class_name="AutoencoderKLHunyuanImage",
    anchor=_ANCHOR,
    defaults=lambda inferred: {"sample_size": _SAMPLE_SIZE},
    fixed="the original code",
    recognizes=lambda shapes: _ANCHOR in shapes and "encoder.down.0.block.0.conv1.weight" in shapes,
    infer=infer,
    table=table,
    left_out=(LOSS,),
    refuses=lambda component: refuse_others(component.config, _ORIGINAL),
    scale=_SCALE,
    written_prefix="vae.",
)
COMFY = replace(
    FORMAT,
    names=("hunyuan-image-comfy",),
    recognizes=lambda shapes: False,  # FORMAT reads these, too
    table=comfy_table,
    written_prefix="",
)
DIFFUSERS = configured(
    "AutoencoderKLHunyuanImage",
    "decoder.up_blocks.0.conv1.weight",
    recognizes=lambda shapes: "decoder.up_blocks.0.conv1.weight" in shapes,
    scale=_SCALE,
)
