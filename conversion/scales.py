"""The scale and shift of known models' latents, by rules that the report states; files rarely hold them."""

import math
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
    ("sdxl", 4, "SDXL", ("conditioner.embedders.",)),
    ("sd3", 16, "SD3", ("model.diffusion_model.joint_blocks.",)),
    ("flux", 16, "FLUX", ("model.diffusion_model.double_blocks.",)),
    ("sd1", 4, "Stable Diffusion 1 or 2", ("cond_stage_model.transformer.", "cond_stage_model.model.")),
)
"""Of whole models: the family, channels of its latents, its title, and prefixes of keys, one of which it has."""


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
    for family, channels, title, signs in _SIGNS:
        found = next((each for each in signs if any(key.startswith(each) for key in shapes)), None)
        if found and latent_channels == channels:
            return Scale(*SCALES[family], f"{title}, since there is {found}*")
    return None
