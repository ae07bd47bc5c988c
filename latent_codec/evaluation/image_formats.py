"""The image formats that a codec is measured against, each at its best setting of common use."""

import io
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec

from PIL import Image, features

FORMATS = ("jpeg", "webp", "avif", "jxl")

_OPTIONS = {
    "jpeg": {"subsampling": "4:2:0", "optimize": True, "progressive": True},
    "webp": {"method": 6},
    "avif": {"speed": 4, "subsampling": "4:2:0"},
    "jxl": {"effort": 7},
}
_QUALITIES = {
    "jpeg": range(1, 96),  # above 95 Pillow's JPEG only grows
    "jxl": range(100),  # 100 is without loss, which is another mode
}


@dataclass(frozen=True)
class ImageFormat:
    """A format of Pillow's as a compressor; `image_formats` gives those that there are.

        image --Pillow--> bytes --Pillow--> image

    JPEG has optimized Huffman tables, progressive, chroma at 4:2:0; WebP is lossy by method 6; AVIF has speed 4 and
    4:2:0; JPEG XL has effort 7.
    """

    name: str

    @property
    def suffix(self) -> str:
        return f".{self.name}"

    @property
    def qualities(self) -> range:
        """Coarsest first."""
        return _QUALITIES.get(self.name, range(101))

    def encode(self, image: Image.Image, quality: int) -> bytes:
        """A gray or RGB image as a file of this format."""
        file = io.BytesIO()
        image.save(file, self.name.upper(), quality=quality, **_OPTIONS[self.name])
        return file.getvalue()

    def decode(self, data: bytes) -> Image.Image:
        with Image.open(io.BytesIO(data), formats=[self.name.upper()]) as image:
            image.load()
            return image


def image_formats(names: Iterable[str] | None = None) -> list[ImageFormat]:
    """The formats of these names; None: all that this installation has.

    Raises:
        ValueError: for a name that is none of `FORMATS`, and one that this installation lacks.
    """
    missing = {name: reason for name in FORMATS if (reason := _why_not(name))}
    if names is None:
        names = [name for name in FORMATS if name not in missing]
    names = list(dict.fromkeys(names))
    for name in names:
        if name not in FORMATS:
            raise ValueError(
                f"there is no format {name!r} to measure against; allowed are {', '.join(FORMATS)}"
            )
        if name in missing:
            raise ValueError(f"{name} cannot be measured here: {missing[name]}, or leave {name} out")
    if "jxl" in names:
        import pillow_jxl  # noqa: F401  makes the format known to Pillow
    return [ImageFormat(name) for name in names]


def _why_not(name: str) -> str | None:
    if name == "jxl":
        is_there, what = find_spec("pillow_jxl"), "it needs `pip install pillow-jxl-plugin`"
    else:
        is_there = features.check("jpg" if name == "jpeg" else name)
        what = "this Pillow was built without it; install another"
    return None if is_there else what
