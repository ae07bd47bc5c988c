"""FLUX.2's autoencoder (black-forest-labs/flux2) in three layouts: its own, ComfyUI's, and diffusers' keys in one file.

It has latent-diffusion's names, quant convs, and a batch norm without weights over the latents packed 2x2, whose
statistics stand for scaling_factor and shift_factor:

    latents = (packed - bn.running_mean) / sqrt(bn.running_var + 1e-4)

The original keeps the quant convs inside the encoder and the decoder, ComfyUI and diffusers outside. The decoder may
have widths of its own (FLUX.2-small-decoder).
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from latent_codec.conversion import encoder_decoder
from latent_codec.conversion.diffusers_files import own_layout
from latent_codec.conversion.encoder_decoder import (
    ANCHOR,
    LDM,
    NORM_GROUPS,
    Names,
    infer_levels,
    ldm_table,
    refuse_for_ldm,
)
from latent_codec.conversion.ldm_kl import infer_latents
from latent_codec.conversion.renaming import ConversionError, Format, Rename, Scale, Shapes, refuse_others

if TYPE_CHECKING:
    from torch import nn

EPS = 1e-4
"""Of the batch norm; shapes do not show it."""
_DIFFUSERS_ANCHOR = "encoder.mid_block.resnets.0.norm1.weight"
_PATCH = (2, 2)
_ORIGINAL = {"batch_norm_eps": EPS, "patch_size": _PATCH}
_OWN_QUANT_CONVS = {"encoder.quant_conv": "quant_conv", "decoder.post_quant_conv": "post_quant_conv"}
_FIXED = f"the original code, with {NORM_GROUPS} groups in its norms, silu as activation and {EPS:g} as batch_norm_eps"
_SCALE = Scale(
    1.0, None, f"the batch norm's statistics in the file normalize the packed latents, with eps {EPS:g}"
)


def _has_batch_norm(shapes: Shapes) -> bool:
    return "bn.running_mean" in shapes


def infer(shapes: Shapes, names: Names = LDM) -> dict:
    """The config of an AutoencoderKLFlux2, quant convs outside the encoder and the decoder.

    Raises:
        ConversionError: as `infer_levels`, and for statistics of another number of packed channels, or for decoder
            widths that the original code's 32 groups do not divide.
    """
    config = infer_levels(shapes, names) | infer_latents(shapes)
    levels = len(config["block_out_channels"])
    widths = [
        shapes[names.decoder_block.format(i=level if names is LDM else levels - 1 - level, j=0)][0]
        for level in range(levels)
    ]
    if names is LDM and any(width % NORM_GROUPS for width in widths):
        raise ConversionError(
            f"the decoder's levels are {widths} channels wide; expected multiples of {NORM_GROUPS}, the original code's "
            "groups"
        )
    packed = config["latent_channels"] * _PATCH[0] * _PATCH[1]
    if tuple(shapes["bn.running_mean"]) != (packed,):
        raise ConversionError(
            f"bn.running_mean has shape {tuple(shapes['bn.running_mean'])}; expected ({packed},), the latents' "
            f"{config['latent_channels']} channels packed 2x2"
        )
    same = tuple(widths) == config["block_out_channels"]
    return config | {"decoder_block_out_channels": None if same else tuple(widths)}


def _infer_original(shapes: Shapes) -> dict:
    inner = {}
    for key, shape in shapes.items():
        module, _, leaf = key.rpartition(".")
        inner[f"{_OWN_QUANT_CONVS.get(module, module)}.{leaf}"] = shape
    return infer(inner)


def _defaults(inferred: Mapping) -> dict:
    return {"norm_num_groups": NORM_GROUPS, "act_fn": "silu"} | _ORIGINAL


def _table(config: Mapping) -> list[Rename]:
    rows = [Rename(name, name) for name in ("quant_conv", "post_quant_conv", "bn")]
    return [*ldm_table(config), *rows]


def _original_table(config: Mapping) -> list[Rename]:
    outside = {ours: theirs for theirs, ours in _OWN_QUANT_CONVS.items()}
    return [row._replace(foreign=outside.get(row.foreign, row.foreign)) for row in _table(config)]


def _refuses(component: "nn.Module") -> str | None:
    return refuse_others(component.config, _ORIGINAL) or refuse_for_ldm(component)


def _refuses_convs(component: "nn.Module") -> str | None:
    if not (component.config.use_quant_conv and component.config.use_post_quant_conv):
        return "it lacks a quant conv, and the original code has both"
    return None


FORMAT = Format(
    names=("flux2",),
    title="FLUX.2 autoencoder",
    class_name="AutoencoderKLFlux2",
    anchor=ANCHOR,
    defaults=_defaults,
    fixed=_FIXED,
    recognizes=lambda shapes: (
        ANCHOR in shapes and _has_batch_norm(shapes) and "encoder.quant_conv.weight" in shapes
    ),
    infer=_infer_original,
    table=_original_table,
    refuses=lambda component: _refuses_convs(component) or _refuses(component),
    scale=_SCALE,
)
COMFY = replace(
    FORMAT,
    names=("flux2-comfy",),
    title="FLUX.2 autoencoder in ComfyUI's layout",
    recognizes=lambda shapes: ANCHOR in shapes and _has_batch_norm(shapes),
    infer=infer,
    table=_table,
    refuses=_refuses,
)
DIFFUSERS = own_layout(
    "AutoencoderKLFlux2",
    _DIFFUSERS_ANCHOR,
    defaults=_defaults,
    fixed=f"FLUX.2's published models, with {NORM_GROUPS} groups in their norms, silu and batch_norm_eps {EPS:g}",
    recognizes=lambda shapes: _DIFFUSERS_ANCHOR in shapes and _has_batch_norm(shapes),
    infer=lambda shapes: infer(shapes, encoder_decoder.DIFFUSERS),
    own_keys=r"(encoder|decoder|quant_conv|post_quant_conv|bn)\.",
    scale=_SCALE,
)
