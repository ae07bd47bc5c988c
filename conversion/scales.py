"""The scale and shift of known models' latents, by rules that the report states; files rarely hold them."""

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from latent_codec.conversion.renaming import ConversionError, Scale, Shapes
from latent_codec.families.pipeline_spaces import FLUX1, SD1, SD3, SDXL

if TYPE_CHECKING:
    from torch import Tensor

SCALES = {
    "sd1": (SD1[0], None),  # arXiv:2112.10752's code, and every model until SDXL
    "sdxl": (SDXL[0], None),
    "sd3": SD3,
    "flux": FLUX1,
}
"""scaling_factor and shift_factor by the name of the model family."""
_SIGNS = (
    ("sdxl", r"conditioner\.embedders\.", "SDXL, since there is conditioner.embedders.*"),
    (
        "sd3",
        r"model\.diffusion_model\.joint_blocks\.",
        "SD3, since there is model.diffusion_model.joint_blocks.*",
    ),
    (
        "flux",
        r"model\.diffusion_model\.double_blocks\.",
        "FLUX, since there is model.diffusion_model.double_blocks.*",
    ),
    (
        "sd1",
        r"cond_stage_model\.(transformer|model)\.",
        "Stable Diffusion 1 or 2, since there is cond_stage_model.*",
    ),
)
_LATENTS = {"sd1": 4, "sdxl": 4, "sd3": 16, "flux": 16}


def named_scale(name: str) -> Scale:
    return Scale(*SCALES[name], f"of {name}, as asked")


def known_scale(
    shapes: Shapes,
    tensors: "Mapping[str, Tensor]",
    metadata: Mapping[str, str],
    latent_channels: int | None,
    name: str,
) -> Scale | None:
    """The scale that a checkpoint states or gives away; None if it does neither.

    Args:
        shapes, tensors, metadata: of the whole file.
        latent_channels: of a KL autoencoder, which have to be its family's; None for other kinds.
        name: of the file.

    Raises:
        ConversionError: if the metadata have words in place of a number.
    """
    if "scaling_factor" in metadata:
        try:
            shift = metadata.get("shift_factor")
            return Scale(float(metadata["scaling_factor"]), shift and float(shift), "the file's metadata")
        except ValueError as error:
            raise ConversionError(f"{name}: the scale in its metadata is no number: {error}") from error
    if "scale_factor" in shapes and math.prod(shapes["scale_factor"]) == 1:
        return Scale(float(tensors["scale_factor"]), None, "the file's scale_factor")
    for name, sign, rule in _SIGNS:
        if latent_channels == _LATENTS[name] and any(re.match(sign, key) for key in shapes):
            return Scale(*SCALES[name], rule)
    return None
