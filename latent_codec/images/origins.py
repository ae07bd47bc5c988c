"""What an image in [-1, 1] stands for where that is no 8-bit photograph, and the way back to it.

16-bit gray, Hounsfield units, the spectrogram of a sound: each has an `Origin`, which goes with the latents and knows the
file that a decoded image becomes. A new kind is a file and a row in `KINDS`.

An origin holds numbers of range and geometry, never a name or another entry of a file's header.
"""

import math
import os
from dataclasses import asdict, dataclass, fields
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from latent_codec.files import replacing
from latent_codec.images.decoding import count_of_nonfinite, gray_depth, name_of, opened

KINDS = {
    "gray": "latent_codec.images.origins:GrayOrigin",
    "sound": "latent_codec.images.sound_origins:SoundOrigin",
}
"""The class of each kind as "module:name"; a module is imported when a file names its kind."""

LUMA = (0.299, 0.587, 0.114)


class Origin:
    """What one image stands for. A subclass is a frozen dataclass of plain values, which its `__post_init__` checks."""

    kind: ClassVar[str]
    """Its key in `KINDS`."""

    @property
    def suffix(self) -> str:
        """Of the file that `write` makes: ".tif"."""
        raise NotImplementedError

    def describe(self) -> str:
        """Name the content in a short phrase: "16 bits, 0 to 65535"."""
        raise NotImplementedError

    def restore(self, image: Tensor) -> np.ndarray:
        """Turn an image, (C, H, W) in [-1, 1], into values in the file's own units and type."""
        raise NotImplementedError

    def write(self, image: Tensor, path: Path) -> None:
        """Write an image, (C, H, W) in [-1, 1], as a file of its own kind, whole or not at all."""
        raise NotImplementedError

    def for_size(self, height: int, width: int) -> "Origin | None":
        """The origin of another image of this kind and size, such as a sampled one; None where there is none."""
        return None

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind} | asdict(self)  # type: ignore[call-overload]


class UnknownOriginError(ValueError):
    """An origin of a kind that this version does not know."""


def origin_from_json(found: Any) -> Origin:
    """Make the origin that `to_json` described.

    Raises:
        UnknownOriginError: for a kind that is not in `KINDS`.
        ValueError: for anything else that is no origin.
    """
    if not isinstance(found, dict) or not isinstance(found.get("kind"), str):
        raise ValueError("an origin is no object with a kind")
    kind, values = found["kind"], {key: value for key, value in found.items() if key != "kind"}
    if kind not in KINDS:
        got = f"{kind[:40]!r}; update latent-codec"
        raise UnknownOriginError(f"expected an image of {', '.join(KINDS)}, got {got}")
    module, _, name = KINDS[kind].partition(":")
    origin = getattr(import_module(module), name)
    wanted = {field.name for field in fields(origin)}
    if wanted != set(values):
        raise ValueError(f"expected the origin of a {kind} image with {', '.join(sorted(wanted))}")
    try:
        return origin(**values)
    except (TypeError, OverflowError) as error:
        raise ValueError(f"the origin of a {kind} image has a value of another type: {error}") from None


def check_range(low: Any, high: Any) -> tuple[float, float]:
    """Two finite numbers, the first of which is the smaller one.

    Raises:
        ValueError: for anything else.
    """
    are_numbers = all(isinstance(each, int | float) and not isinstance(each, bool) for each in (low, high))
    if not are_numbers or not (math.isfinite(high - low) and low < high):
        raise ValueError(f"expected a range of two finite numbers, the smaller one first, got {low}, {high}")
    return float(low), float(high)


def from_range(values: np.ndarray, low: float, high: float) -> Tensor:
    """Map `low` to -1 and `high` to 1, float32; values beyond them are clamped.

    Raises:
        ValueError: for values that are not finite.
    """
    if not np.isfinite(values).all():
        raise ValueError(count_of_nonfinite(values))
    return torch.from_numpy(((values.astype(np.float64) - low) * (2 / (high - low)) - 1).clip(-1, 1)).float()


def to_range(image: Tensor, low: float, high: float) -> np.ndarray:
    """Map an image, (C, H, W) in [-1, 1], to gray values (H, W) from `low` to `high`, float64.

    Three channels are weighted as the luma of Rec. 601, as reading weights them.
    """
    values = image.detach().cpu().double().clamp(-1, 1)
    if len(values) >= 3:
        values = (values[:3] * values.new_tensor(LUMA).view(3, 1, 1)).sum(0, keepdim=True)
    return (values[0].numpy() + 1) * ((high - low) / 2) + low


def as_type(values: np.ndarray, dtype: str) -> np.ndarray:
    """Values as `dtype`; for integers rounded, and clamped to what it holds."""
    if np.issubdtype(dtype, np.integer):
        limits = np.iinfo(dtype)
        values = np.rint(values).clip(limits.min, limits.max)
    return values.astype(dtype)


@dataclass(frozen=True, kw_only=True)
class GrayOrigin(Origin):
    """A gray image of more than 8 bits: 16-bit PNG or TIFF, or a TIFF of 32-bit integers or floats."""

    kind: ClassVar[str] = "gray"

    dtype: str
    """Of the file's values: uint16, int32 or float32."""
    low: float
    """The value that is -1 in the image."""
    high: float
    """The value that is 1 in the image."""
    form: str = "tif"
    """Of the file: png or tif."""

    def __post_init__(self):
        check_range(self.low, self.high)
        if self.dtype not in ("uint16", "int32", "float32") or self.form not in ("png", "tif"):
            raise ValueError(f"expected a gray image of 16 or 32 bits, got {self.dtype} as {self.form}")

    @property
    def suffix(self) -> str:
        return ".png" if self.form == "png" and self.dtype == "uint16" else ".tif"

    def describe(self) -> str:
        return f"{self.dtype}, {self.low:g} to {self.high:g}"

    def restore(self, image: Tensor) -> np.ndarray:
        return as_type(to_range(image, self.low, self.high), self.dtype)

    def write(self, image: Tensor, path: str | os.PathLike) -> None:
        options = {} if self.suffix == ".png" else {"compression": "tiff_adobe_deflate"}
        with replacing(path) as partial:
            Image.fromarray(self.restore(image)).save(
                partial, "PNG" if self.suffix == ".png" else "TIFF", **options
            )


def gray_origin(path: str | os.PathLike, value_range: tuple[float, float] | None = None) -> GrayOrigin | None:
    """The origin of an image file by its header alone; None for one of 8 bits, or in color.

    Raises:
        ImageError: for what is no image file.
    """
    name = name_of(path)
    with opened(path, name) as image:
        dtype, form = gray_depth(image, name), "png" if image.format == "PNG" else "tif"
    if dtype is None or (dtype == "int32" and value_range is None):
        return None
    low, high = value_range or (0, 65535 if dtype == "uint16" else 1)
    return GrayOrigin(dtype=dtype, low=low, high=high, form=form)
