"""TAEF2 (madebyollin/taesd): TAESD's two files, or one in diffusers' layout, and a group norm in the middle's blocks.

The norm's branch is `pool` in the blocks of the encoder's last level and of the decoder's first.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

from latent_codec.conversion import taesd
from latent_codec.conversion.diffusers_files import own_names
from latent_codec.conversion.renaming import ConversionError, Shapes
from latent_codec.conversion.taesd import (
    PARTS,
    has_norms,
    infer_tiny,
    is_diffusers,
    is_original,
    layer_table,
)

if TYPE_CHECKING:
    from torch import nn

NORMED_PARTS = (*PARTS, ".pool.0", ".pool.1", ".pool.3")
_HIDDEN = 4
"""Channels of the branch, in widths of the block; as many groups has its norm, which shapes do not show."""


def infer(shapes: Shapes, infix: str = "") -> dict:
    """`infer_tiny` of blocks with norms.

    Raises:
        ConversionError: as `infer_tiny`, and for a branch of another width.
    """
    for key, shape in shapes.items():
        if key.endswith(".pool.0.weight") and shape[0] != _HIDDEN * shape[1]:
            raise ConversionError(
                f"{key} widens {shape[1]} channels to {shape[0]}; TAEF2's branch has {_HIDDEN} times as many, in {_HIDDEN} "
                "groups."
            )
    return infer_tiny(shapes, infix) | {"use_midblock_gn": True}


def refuses_normless(component: "nn.Module") -> str | None:
    if not component.config.use_midblock_gn:
        return "it has no group norms, and TAEF2 has; an AutoencoderTiny of its weights can be written"
    return taesd.FORMAT.refuses(component)


FORMAT = replace(
    taesd.FORMAT,
    title="TAEF2",
    class_name="AutoencoderTinyGN",
    recognizes=lambda shapes: is_original(shapes) and has_norms(shapes),
    infer=infer,
    table=layer_table(NORMED_PARTS),
    refuses=refuses_normless,
)
DIFFUSERS = replace(
    taesd.DIFFUSERS,
    title="TAEF2 in diffusers' layout",
    class_name="AutoencoderTinyGN",
    not_shown="latent_magnitude and the scale of its latents",
    recognizes=lambda shapes: is_diffusers(shapes) and has_norms(shapes),
    infer=lambda shapes: infer(shapes, "layers."),
    table=lambda config: own_names("AutoencoderTinyGN", config),
)
