"""What an image in [-1, 1] stands for where that is no 8-bit photograph, and the way back to it.

16-bit gray, Hounsfield units, the spectrogram of a sound: each has an `Origin`, which goes with the latents and knows the
file that a decoded image becomes. A new kind is a file and a row in `KINDS`.

An origin holds numbers of range and geometry, never a name or another entry of a file's header.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from latent_codec.errors import SettingError
from latent_codec.files import replacing
from latent_codec.images.decoding import count_of_nonfinite, finite_values, gray_depth, name_of, opened
from latent_codec.metrics import round_to_8_bits

KINDS = {
    "gray": "latent_codec.images.origins:GrayOrigin",
    "sound": "latent_codec.images.sound_origins:SoundOrigin",
    "slice": "latent_codec.images.volumes:SliceOrigin",
}
"""The class of each kind as "module:name"; a module is imported when a file names its kind."""

UNITS = ("", "HU", "Gy")
"""Hounsfield units, gray of radiation; otherwise none is known."""
LUMA = (0.299, 0.587, 0.114)


class Origin:
    """What one image stands for. A subclass is a frozen dataclass of plain values, which its `__post_init__` checks."""

    kind: ClassVar[str]
    """Its key in `KINDS`."""
    number: int
    """Of a part, its place in its whole."""

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

    @property
    def whole(self) -> str | None:
        """The name of what several images are parts of, such as a volume of slices; None: it is a file of its own."""
        return None

    @property
    def count(self) -> int:
        """Of the images that its whole has."""
        return 1

    def part(self, image: Tensor) -> np.ndarray:
        """What is kept of an image until its whole is there."""
        raise NotImplementedError

    def write_parts(self, parts: Sequence[tuple[Any, np.ndarray]], path: str | os.PathLike) -> None:
        """Write origins with their parts as one file: all of a whole, or one of them."""
        raise NotImplementedError

    def as_stored(self, image: Tensor) -> Tensor:
        """An image, (C, H, W) in [-1, 1], as it would be read again from the file that `write` makes."""
        return image.float().clamp(-1, 1)

    def without_place(self) -> "Origin":
        """What a window of the image stands for, or the image resized."""
        return self

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


def as_stored(images: Tensor, origins: Sequence[Origin | None]) -> Tensor:
    """Images (N, C, H, W) in [-1, 1] as their files would hold them: rounded to 8 bits where there is no origin."""
    if not any(origins):
        return round_to_8_bits(images)
    return torch.stack(
        [
            round_to_8_bits(image) if origin is None else origin.as_stored(image)
            for image, origin in zip(images, origins, strict=True)
        ]
    )


class Wholes:
    """Gathers parts until their wholes are there; of a part that comes again there is another whole."""

    def __init__(self) -> None:
        self._groups: dict[str, list[dict[Origin, np.ndarray]]] = {}

    def add(self, origin: Origin, part: np.ndarray) -> list[tuple[Origin, np.ndarray]] | None:
        """Take a part; gives all parts of its whole with the last of them."""
        groups = self._groups.setdefault(origin.whole or "", [])
        group = next((each for each in groups if origin not in each), None)
        if group is None:
            groups.append(group := {})
        group[origin] = part
        if len(group) < origin.count:
            return None
        groups.remove(group)
        return list(group.items())

    def rest(self) -> list[list[tuple[Origin, np.ndarray]]]:
        """The parts of each whole that is not complete."""
        return [list(group.items()) for groups in self._groups.values() for group in groups]


def check_range(low: Any, high: Any) -> tuple[float, float]:
    """Two finite numbers, the first of which is the smaller one.

    Raises:
        ValueError: for anything else.
    """
    are_numbers = all(isinstance(each, int | float) and not isinstance(each, bool) for each in (low, high))
    if not are_numbers or not (math.isfinite(high - low) and low < high):
        raise ValueError(f"expected a range of two finite numbers, the smaller one first, got {low}, {high}")
    return float(low), float(high)


ValueRange = tuple[float | Literal["min"], float | Literal["max"]]
"""The values that become -1 and 1: numbers, or "min" and "max" of each file."""


def check_value_range(value_range: Any) -> ValueRange:
    """Two ends of a range, each a number or its word.

    Raises:
        SettingError: for anything else.
    """
    expected = "two numbers, the smaller one first; min and max stand for those of each file"
    try:
        low, high = value_range
        check_range(
            *(
                number if end == word else end
                for end, word, number in zip(value_range, _WORDS, (-1e300, 1e300))
            )
        )
    except (TypeError, ValueError):
        raise SettingError("value_range", expected, value_range) from None
    return low, high


_WORDS = ("min", "max")


def is_measured(value_range: ValueRange) -> bool:
    """Whether an end of a range depends on the file."""
    return value_range[0] == "min" or value_range[1] == "max"


def with_measured(value_range: ValueRange, low: float, high: float) -> tuple[float, float]:
    """A range in which `low` and `high` stand for the words; one without an extent gets one.

    Raises:
        ValueError: if nothing is between a stated and a measured end.
    """
    first, last = (found if end in _WORDS else end for end, found in zip(value_range, (low, high)))
    if first == last and is_measured(value_range):
        first, last = (first, last + 1) if value_range[1] == "max" else (first - 1, last)
    return check_range(first, last)


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


class RangeOrigin(Origin):
    """A gray image whose values from `low` to `high`, in `unit`, are from -1 to 1; or from 1 to -1 where it is `inverted`."""

    low: float
    high: float
    dtype: str
    unit: str = ""
    inverted: bool = False
    slope: float = 1.0
    """Of values in its unit, per step of the stored ones."""

    def stored(self, image: Tensor) -> np.ndarray:
        """Values (H, W) as the file stores them."""
        return self.restore(image)

    def write_stored(self, stored: np.ndarray, path: str | os.PathLike) -> None:
        """Write values as `stored` gives them."""
        raise NotImplementedError

    def values(self, image: Tensor) -> np.ndarray:
        """(H, W) in its unit, before anything is rounded to the type of the file."""
        return to_range(-image if self.inverted else image, self.low, self.high)

    def as_stored(self, image: Tensor) -> Tensor:
        found = from_range(self.restore(image), self.low, self.high)
        return (-found if self.inverted else found).expand(image.shape).to(image.device)

    def errors(self, image: Tensor, reference: Tensor) -> tuple[float, float]:
        """Root mean square and largest absolute difference of two images as they are stored, in its unit."""
        difference = self.restore(image).astype(np.float64) - self.restore(reference).astype(np.float64)
        return float(np.sqrt(np.square(difference).mean())), float(np.abs(difference).max())

    def windowed(self, image: Tensor, window: tuple[float, float]) -> Tensor:
        """An image to be looked at, (1, H, W) in [-1, 1]: black and white are the ends of a window, in its unit."""
        found = from_range(self.values(image), *window)
        return (-found if self.inverted else found)[None]

    def describe(self) -> str:
        return f"{self.low:g} to {self.high:g}" + (f" {self.unit}" if self.unit else "")


@dataclass(frozen=True, kw_only=True)
class GrayOrigin(RangeOrigin):
    """A gray image of more than 8 bits: 16-bit PNG or TIFF, or a TIFF of 32-bit integers or floats."""

    kind: ClassVar[str] = "gray"

    dtype: str
    """Of the file's values: uint16, int32 or float32."""
    low: float
    high: float
    form: str = "tif"
    """Of the file: png or tif."""
    unit: str = ""

    def __post_init__(self):
        check_range(self.low, self.high)
        if self.unit not in UNITS:
            raise ValueError(f"expected one of the units {', '.join(UNITS)}, got {self.unit!r:.40}")
        if self.dtype not in ("uint16", "int32", "float32") or self.form not in ("png", "tif"):
            raise ValueError(f"expected a gray image of 16 or 32 bits, got {self.dtype} as {self.form}")

    @property
    def suffix(self) -> str:
        return ".png" if self.form == "png" and self.dtype == "uint16" else ".tif"

    def restore(self, image: Tensor) -> np.ndarray:
        return as_type(self.values(image), self.dtype)

    def write(self, image: Tensor, path: str | os.PathLike) -> None:
        self.write_stored(self.restore(image), path)

    def write_stored(self, stored: np.ndarray, path: str | os.PathLike) -> None:
        options = {} if self.suffix == ".png" else {"compression": "tiff_adobe_deflate"}
        with replacing(path) as partial:
            Image.fromarray(stored).save(partial, "PNG" if self.suffix == ".png" else "TIFF", **options)


def gray_origin(path: str | os.PathLike, value_range: ValueRange | None = None) -> GrayOrigin | None:
    """The origin of an image file; None for one of 8 bits, or in color. Only for "min" and "max" are the pixels read.

    Raises:
        ImageError: for what is no image file, or has no value in the range.
    """
    name = name_of(path)
    with opened(path, name) as image:
        dtype, form = gray_depth(image, name), "png" if image.format == "PNG" else "tif"
        if dtype is None or (dtype == "int32" and value_range is None):
            return None
        if value_range is None:
            low, high = 0.0, 65535.0 if dtype == "uint16" else 1.0
        elif is_measured(value_range):
            values = finite_values(image, name)
            low, high = with_measured(value_range, float(values.min()), float(values.max()))
        else:
            low, high = check_range(*value_range)
    return GrayOrigin(dtype=dtype, low=low, high=high, form=form)
