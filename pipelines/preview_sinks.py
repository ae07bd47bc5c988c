"""Where previews go: any function of a PIL image and the number of its step, and the two files here.

An image's `info` tells its `step`, its `timestep`, what it `shows`, "x_0" or "x_t", and, of a linear preview, that its
`pixels` are positions of latents. A sink may have a method `finish()`, which is called when a run has shown its last image.
Both are called on the thread that makes the previews, one after the other.
"""

import os
from pathlib import Path

from PIL.Image import Image, Resampling
from PIL.PngImagePlugin import PngInfo

from latent_codec.files import replacing
from latent_codec.images.animations import LAST_MILLISECONDS, MILLISECONDS, write_animation
from latent_codec.images.tensors import enlarged

SIDE = 256
"""Pixels that each side of a preview has at least, in files."""
_MAX_SIDE = 16383
"""Pixels that a side of a WebP has at most."""


def _to_side(image: Image, side: int) -> Image:
    """The image, an integer number of times as large so that both sides have at least `side` pixels.

    A strip of frames counts by its short side; it grows to _MAX_SIDE pixels at most.
    """
    factor = min(-(-side // min(image.size)), _MAX_SIDE // max(image.size))
    return enlarged(image, factor, Resampling.NEAREST if "pixels" in image.info else Resampling.BICUBIC)


class PngFolder:
    """Writes each preview as `step_0000.png` and so on, with what it shows in the file's text.

    Args:
        folder: made if need be; an older run's files of the same steps are overwritten.
        side: pixels that each side has at least; smaller previews are enlarged.
    """

    def __init__(self, folder: str | os.PathLike, *, side: int = SIDE):
        self.folder, self.side = Path(folder), side

    def __call__(self, image: Image, step: int) -> None:
        image = _to_side(image, self.side)
        text = PngInfo()
        for key, value in image.info.items():
            text.add_text(str(key), str(value))
        with replacing(self.folder / f"step_{step:04d}.png") as path:
            image.save(path, pnginfo=text)


class AnimatedWebP:
    """Writes all previews of a run as one animation, when the run is over.

    Args:
        path: of the file; the next run overwrites it.
        frame_milliseconds: for which each preview is shown.
        last_milliseconds: for which the last one is.
        side: as for `PngFolder`.

    Raises:
        ValueError: for a path that does not end in .webp.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        frame_milliseconds: int = MILLISECONDS,
        last_milliseconds: int = LAST_MILLISECONDS,
        side: int = SIDE,
    ):
        self.path, self.side = Path(path), side
        if self.path.suffix.lower() != ".webp":
            raise ValueError(f"path is {self.path}; an animated WebP needs a name that ends in .webp.")
        self.frame_milliseconds = frame_milliseconds
        self.last_milliseconds = last_milliseconds
        self._images: list[Image] = []

    def __call__(self, image: Image, step: int) -> None:
        image = _to_side(image, self.side)
        image.thumbnail((_MAX_SIDE, _MAX_SIDE))  # which a long strip of full frames may be beyond
        self._images.append(image)

    def finish(self) -> None:
        if not self._images:
            return
        images, self._images = self._images, []
        durations = {"milliseconds": self.frame_milliseconds, "last_milliseconds": self.last_milliseconds}
        write_animation(images, self.path, **durations)
