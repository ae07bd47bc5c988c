"""The video autoencoders of Wan 2.1 and 2.2 (Wan-Video), as their repositories keep them; Qwen-Image's file is Wan 2.1's.

Names are numbers in nn.Sequential. Wan 2.1 counts the blocks and resamplings of the encoder, and those of the decoder,
flat; Wan 2.2 by levels. Mean and deviation of the latents are in the original code, not in the file.
"""

from collections.abc import Mapping
from dataclasses import replace
from itertools import count
from typing import TYPE_CHECKING

from latent_codec.conversion.diffusers_files import configured
from latent_codec.conversion.renaming import (
    ConversionError,
    Format,
    Rename,
    Scale,
    Shapes,
    count_keys,
    modules,
)

if TYPE_CHECKING:
    from torch import nn

_ANCHOR = "decoder.middle.0.residual.0.gamma"
_LEVELS_OF_2_2 = "decoder.upsamples.0.upsamples.0.residual.2.weight"
_BLOCK = {
    "residual.0": "norm1",
    "residual.2": "conv1",
    "residual.3": "norm2",
    "residual.6": "conv2",
    "shortcut": "conv_shortcut",
}
_RESAMPLING = {"resample.1": "resample.1", "time_conv": "time_conv"}
_SCALE = Scale(1.0, None, "latents_mean and latents_std of the config, one per channel, take its place")
_PATCH_SIZE = 2
"""Of Wan 2.2: pixels of 2x2 are packed into channels before the encoder."""

# fmt: off
_MEAN_2_1 = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508, 0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497,
    0.2503, -0.2921,
)
_STD_2_1 = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743, 3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251,
    1.9160,
)
_MEAN_2_2 = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891, 0.1570, -0.0098,
    0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502, -0.2055, -0.0322, 0.1109, 0.1567,
    -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957,
    0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)
_STD_2_2 = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454,
    0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659, 0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999,
    0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444,
    0.4089, 0.7468, 0.7744,
)
# fmt: on


def _statistics(mean: tuple[float, ...], std: tuple[float, ...], inferred: Mapping) -> dict:
    """latents_mean and latents_std, where the latents have as many channels."""
    if inferred["z_dim"] != len(mean):
        return {}
    return {"latents_mean": list(mean), "latents_std": list(std)}


def _factors(inferred: Mapping) -> dict:
    """What AutoencoderKLWan's config repeats of its levels."""
    halvings = inferred["temperal_downsample"]
    return {
        "scale_factor_temporal": 2 ** sum(halvings),
        "scale_factor_spatial": 2 ** len(halvings) * (inferred["patch_size"] or 1),
    }


def _infer(shapes: Shapes, levels: list[list[int]], halves_time: list[bool]) -> dict:
    """The config of an AutoencoderKLWan.

    Args:
        levels: widths of the encoder's residual blocks, by level.
        halves_time: whether a resampling after a level halves time too.
    """
    base_dim, decoder_dim = shapes["encoder.conv1.weight"][0], shapes["decoder.head.0.gamma"][0]
    if len({len(widths) for widths in levels}) != 1 or not levels[0] or len(levels) != len(halves_time) + 1:
        raise ConversionError(
            f"the encoder's levels have {[len(widths) for widths in levels]} residual blocks; expected as many at each"
        )
    if any(widths[0] % base_dim for widths in levels):
        raise ConversionError(
            f"the encoder's levels are {[widths[0] for widths in levels]} channels wide; expected multiples of {base_dim}"
        )
    dim_mult = [widths[0] // base_dim for widths in levels]
    decoder_dim //= dim_mult[0]
    return {
        "base_dim": base_dim,
        "decoder_base_dim": None if decoder_dim == base_dim else decoder_dim,
        "z_dim": shapes["conv2.weight"][0],
        "dim_mult": dim_mult,
        "num_res_blocks": len(levels[0]),
        "attn_scales": [],
        "temperal_downsample": halves_time,
        "in_channels": shapes["encoder.conv1.weight"][1],
        "out_channels": shapes["decoder.head.2.weight"][0],
    }


def _infer_2_1(shapes: Shapes) -> dict:
    levels: list[list[int]] = [[]]
    halves_time: list[bool] = []
    for number in count():
        layer = f"encoder.downsamples.{number}"
        if f"{layer}.residual.2.weight" in shapes:
            levels[-1].append(shapes[f"{layer}.residual.2.weight"][0])
        elif f"{layer}.resample.1.weight" in shapes:
            levels.append([])
            halves_time.append(f"{layer}.time_conv.weight" in shapes)
        else:
            break
    return _infer(shapes, levels, halves_time) | {"is_residual": False, "patch_size": None}


def _infer_2_2(shapes: Shapes) -> dict:
    levels: list[list[int]] = []
    halves_time: list[bool] = []
    for number in range(count_keys(shapes, "encoder.downsamples.*.downsamples.0.residual.2.weight")):
        level = f"encoder.downsamples.{number}.downsamples"
        blocks = count_keys(shapes, f"{level}.*.residual.2.weight")
        levels.append([shapes[f"{level}.{block}.residual.2.weight"][0] for block in range(blocks)])
        if f"{level}.{blocks}.resample.1.weight" in shapes:
            halves_time.append(f"{level}.{blocks}.time_conv.weight" in shapes)
    return _infer(shapes, levels, halves_time) | {"is_residual": True, "patch_size": _PATCH_SIZE}


def _infer_qwen_image(shapes: Shapes) -> dict:
    """The config of an AutoencoderKLQwenImage, which has one number for both halves where AutoencoderKLWan has two."""
    config = _infer_2_1(shapes)
    if config["decoder_base_dim"] is not None or config["in_channels"] != config["out_channels"]:
        raise ConversionError(
            f"encoder and decoder are {config['base_dim']} and {config['decoder_base_dim']} channels wide and have images "
            f"of {config['in_channels']} and {config['out_channels']} channels; AutoencoderKLQwenImage has one number "
            "for both"
        )
    shared = ("base_dim", "z_dim", "dim_mult", "num_res_blocks", "attn_scales", "temperal_downsample")
    return {key: config[key] for key in shared} | {"input_channels": config["in_channels"]}


def _ends(config: Mapping) -> list[Rename]:
    """The modules before, between and after the levels."""
    rows = [Rename("conv1", "quant_conv"), Rename("conv2", "post_quant_conv")]
    for side in ("encoder", "decoder"):
        rows.append(Rename(f"{side}.conv1", f"{side}.conv_in"))
        for number in (0, 1):
            rows += modules(f"{side}.middle.{2 * number}", f"{side}.mid_block.resnets.{number}", _BLOCK)
        attention = f"{side}.middle.1", f"{side}.mid_block.attentions.0"
        rows += modules(*attention, {name: name for name in ("norm", "to_qkv", "proj")})
        rows += modules(f"{side}.head", side, {"0": "norm_out", "2": "conv_out"})
    return rows


def _table_2_1(config: Mapping) -> list[Rename]:
    levels, blocks = len(config["dim_mult"]), config["num_res_blocks"]
    rows = _ends(config)
    for number in range(levels * (blocks + 1) - 1):
        names = _RESAMPLING if number % (blocks + 1) == blocks else _BLOCK
        rows += modules(f"encoder.downsamples.{number}", f"encoder.down_blocks.{number}", names)
    for level in range(levels):
        for block in range(blocks + 1):
            theirs = f"decoder.upsamples.{level * (blocks + 2) + block}"
            rows += modules(theirs, f"decoder.up_blocks.{level}.resnets.{block}", _BLOCK)
        resampling = f"decoder.upsamples.{level * (blocks + 2) + blocks + 1}"
        rows += modules(resampling, f"decoder.up_blocks.{level}.upsamplers.0", _RESAMPLING)
    return rows


def _table_2_2(config: Mapping) -> list[Rename]:
    rows = _ends(config)
    for level in range(len(config["dim_mult"])):
        for side, name, blocks in (
            ("encoder", "down", config["num_res_blocks"]),
            ("decoder", "up", config["num_res_blocks"] + 1),
        ):
            theirs, ours = f"{side}.{name}samples.{level}.{name}samples", f"{side}.{name}_blocks.{level}"
            for block in range(blocks):
                rows += modules(f"{theirs}.{block}", f"{ours}.resnets.{block}", _BLOCK)
            rows += modules(f"{theirs}.{blocks}", f"{ours}.{name}sampler", _RESAMPLING)
    return rows


def _refuses_2_1(component: "nn.Module") -> str | None:
    if component.config.get("is_residual"):
        return "it has the residual levels of Wan 2.2"
    return _refuses(component)


def _refuses_2_2(component: "nn.Module") -> str | None:
    config = component.config
    if not config.is_residual or config.patch_size != _PATCH_SIZE:
        return f"it is no Wan 2.2 autoencoder, whose levels are residual and whose patches are {_PATCH_SIZE} wide"
    return _refuses(component)


def _refuses(component: "nn.Module") -> str | None:
    if component.config.attn_scales:
        return f"it has attention at scales {component.config.attn_scales}, whose layers have no known names"
    return None


WAN_2_2 = Format(
    names=("wan",),
    title="video autoencoder of Wan 2.2",
    class_name="AutoencoderKLWan",
    anchor=_ANCHOR,
    required=("latents_mean", "latents_std"),
    not_shown="latents_mean and latents_std",
    fixed="the original code, which has latents_mean and latents_std",
    scale=_SCALE,
    recognizes=lambda shapes: _ANCHOR in shapes and _LEVELS_OF_2_2 in shapes,
    infer=_infer_2_2,
    defaults=lambda inferred: _statistics(_MEAN_2_2, _STD_2_2, inferred) | _factors(inferred),
    table=_table_2_2,
    refuses=_refuses_2_2,
)
QWEN_IMAGE = replace(
    WAN_2_2,
    title="video autoencoder of Qwen-Image",
    class_name="AutoencoderKLQwenImage",
    recognizes=lambda shapes: False,  # nothing in the file tells it from Wan 2.1's
    infer=_infer_qwen_image,
    defaults=lambda inferred: _statistics(_MEAN_2_1, _STD_2_1, inferred),
    table=_table_2_1,
    refuses=_refuses_2_1,
)
WAN_2_1 = replace(
    QWEN_IMAGE,
    title="video autoencoder of Wan 2.1 or Qwen-Image",
    class_name="AutoencoderKLWan",
    recognizes=lambda shapes: _ANCHOR in shapes and _LEVELS_OF_2_2 not in shapes,
    infer=_infer_2_1,
    defaults=lambda inferred: _statistics(_MEAN_2_1, _STD_2_1, inferred) | _factors(inferred),
    twins=(QWEN_IMAGE,),
)
_DIFFUSERS_ANCHOR = "decoder.mid_block.resnets.0.norm1.gamma"
QWEN_IMAGE_DIFFUSERS = configured(
    "AutoencoderKLQwenImage", _DIFFUSERS_ANCHOR, recognizes=lambda shapes: False, scale=_SCALE
)
DIFFUSERS = configured(
    "AutoencoderKLWan",
    _DIFFUSERS_ANCHOR,
    recognizes=lambda shapes: _DIFFUSERS_ANCHOR in shapes,
    scale=_SCALE,
    twins=(QWEN_IMAGE_DIFFUSERS,),
)
