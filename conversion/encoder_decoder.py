"""The encoder and decoder of latent-diffusion and taming-transformers, under their names and diffusers'.

Both have levels of residual blocks with attention after each where a level has any, one downsampling or upsampling
between levels, and residual - attention - residual in the middle. diffusers counts the decoder's levels from the latents
outwards, latent-diffusion from the image inwards.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from latent_codec.conversion.renaming import Change, ConversionError, Rename, Shapes, count_keys, modules

if TYPE_CHECKING:
    from torch import nn

NORM_GROUPS = 32
"""Of every group norm in both original codes; shapes do not show it."""
FIXED = f"the original code, with {NORM_GROUPS} groups in its norms and silu as activation"
ANCHOR = "encoder.mid.block_1.norm1.weight"

_BLOCK = {
    "norm1": "norm1",
    "conv1": "conv1",
    "norm2": "norm2",
    "conv2": "conv2",
    "nin_shortcut": "conv_shortcut",
}
_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
"""Queries, keys, values and output are 1x1 convolutions there and matrices here."""


@dataclass(frozen=True)
class Names:
    """Keys from which a layout's config is read; {i} is the level, {j} the block in it."""

    encoder_block: str
    encoder_attention: str
    decoder_block: str
    decoder_attention: str
    middle_attention: str


LDM = Names(
    "encoder.down.{i}.block.{j}.conv1.weight",
    "encoder.down.{i}.attn.{j}.norm.weight",
    "decoder.up.{i}.block.{j}.conv1.weight",
    "decoder.up.{i}.attn.{j}.norm.weight",
    "{side}.mid.attn_1.norm.weight",
)
DIFFUSERS = Names(
    "encoder.down_blocks.{i}.resnets.{j}.conv1.weight",
    "encoder.down_blocks.{i}.attentions.{j}.group_norm.weight",
    "decoder.up_blocks.{i}.resnets.{j}.conv1.weight",
    "decoder.up_blocks.{i}.attentions.{j}.group_norm.weight",
    "{side}.mid_block.attentions.0.group_norm.weight",
)


def infer_levels(shapes: Shapes, names: Names) -> dict:
    """Infer what the configs of AutoencoderKL and VQModel share: channels, levels, blocks and attention.

    Raises:
        ConversionError: for widths that an original code's 32 groups do not divide, and for levels of different depth, which diffusers'
            classes cannot hold.
    """
    for key in (f"{side}.conv_{end}.weight" for side in ("encoder", "decoder") for end in ("in", "out")):
        if key not in shapes or len(shapes[key]) != 4:
            raise ConversionError(f"{key} is missing or no convolution; is the file whole?")
    counts, widths, down, up = [], [], [], []
    levels = count_keys(shapes, names.encoder_block.format(i="*", j=0))
    if not levels:
        raise ConversionError("no level of the encoder has a residual block; is the file whole?")
    for level in range(levels):
        blocks = count_keys(shapes, names.encoder_block.format(i=level, j="*"))
        counts.append(blocks)
        widths.append(shapes[names.encoder_block.format(i=level, j=0)][0])
        outer = level if names is LDM else levels - 1 - level
        decoder_blocks = count_keys(shapes, names.decoder_block.format(i=outer, j="*"))
        if decoder_blocks != blocks + 1:
            raise ConversionError(
                f"level {level} has {blocks} residual blocks in the encoder and {decoder_blocks} in the decoder; "
                f"{blocks + 1} are expected there."
            )
        for types, pattern, at, number, kinds in (
            (down, names.encoder_attention, level, blocks, ("DownEncoderBlock2D", "AttnDownEncoderBlock2D")),
            (up, names.decoder_attention, outer, blocks + 1, ("UpDecoderBlock2D", "AttnUpDecoderBlock2D")),
        ):
            attention = count_keys(shapes, pattern.format(i=at, j="*"))
            if attention not in (0, number):
                raise ConversionError(
                    f"level {level} has {number} residual blocks and {attention} attention layers; a level has as many "
                    "or none."
                )
            types.append(kinds[attention > 0])
    if len(set(counts)) != 1:
        raise ConversionError(
            f"the levels have {counts} residual blocks; diffusers' classes have as many at each."
        )
    uneven = [width for width in widths if width % NORM_GROUPS]
    if uneven and names is LDM:
        raise ConversionError(
            f"the levels are {widths} channels wide; the original code normalizes in {NORM_GROUPS} groups, which do not "
            f"divide {uneven[0]}."
        )
    return {
        "in_channels": shapes["encoder.conv_in.weight"][1],
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "block_out_channels": tuple(widths),
        "layers_per_block": counts[0],
        "down_block_types": tuple(down),
        "up_block_types": tuple(reversed(up)),
        "mid_block_add_attention": names.middle_attention.format(side="encoder") in shapes,
    }


def ldm_table(config: Mapping) -> list[Rename]:
    """The modules of encoder and decoder in latent-diffusion's and taming's names, and in diffusers'."""
    levels, blocks = len(config["block_out_channels"]), config["layers_per_block"]
    rows = []
    for side, outer in (("encoder", "down"), ("decoder", "up")):
        rows += [Rename(f"{side}.{name}", f"{side}.{name}") for name in ("conv_in", "conv_out")]
        rows.append(Rename(f"{side}.norm_out", f"{side}.conv_norm_out"))
        for number in (0, 1):
            rows += modules(f"{side}.mid.block_{number + 1}", f"{side}.mid_block.resnets.{number}", _BLOCK)
        rows += modules(f"{side}.mid.attn_1", f"{side}.mid_block.attentions.0", _ATTENTION, Change.MATRIX)
        for level in range(levels):
            theirs = f"{side}.{outer}.{level}"
            ours = f"{side}.{outer}_blocks.{level if side == 'encoder' else levels - 1 - level}"
            for number in range(blocks + (side == "decoder")):
                rows += modules(f"{theirs}.block.{number}", f"{ours}.resnets.{number}", _BLOCK)
                attention = f"{theirs}.attn.{number}", f"{ours}.attentions.{number}"
                rows += modules(*attention, _ATTENTION, Change.MATRIX)
            rows.append(Rename(f"{theirs}.{outer}sample.conv", f"{ours}.{outer}samplers.0.conv"))
    return rows


def refuse_for_ldm(component: "nn.Module") -> str | None:
    """Reason why latent-diffusion's code cannot hold this AutoencoderKL or VQModel; None if it can."""
    config = component.config
    types = (*config.down_block_types, *config.up_block_types)
    attends = any(name.startswith("Attn") for name in types)
    if config.norm_num_groups != NORM_GROUPS:
        return (
            f"its group norms have {config.norm_num_groups} groups, and latent-diffusion's code always {NORM_GROUPS}; the "
            "weights would load there and mean something else"
        )
    if config.get("norm_type", "group") != "group":
        return f"its decoder's norm_type is {config.norm_type}; latent-diffusion's code has only group norms"
    if config.act_fn not in ("silu", "swish"):
        return f"its activation is {config.act_fn}, and latent-diffusion's is silu"
    known = {"DownEncoderBlock2D", "AttnDownEncoderBlock2D", "UpDecoderBlock2D", "AttnUpDecoderBlock2D"}
    if set(types) - known:
        return f"it has blocks of type {', '.join(sorted(set(types) - known))}, which latent-diffusion's code has not"
    down = [name.startswith("Attn") for name in config.down_block_types]
    up = [name.startswith("Attn") for name in reversed(config.up_block_types)]
    if down != up:
        return "attention is at other levels in its encoder than in its decoder; latent-diffusion's code has one list"
    if attends and not config.get("mid_block_add_attention", True):
        return (
            "it has attention at levels and none in the middle; latent-diffusion's code has both or neither"
        )
    return None
