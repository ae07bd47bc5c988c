"""Images by index: what every source of images is."""

from collections.abc import Sequence
from typing import Self

from torch import Tensor

from latent_codec.images.origins import Origin
from latent_codec.images.tensors import image_size, read_pixels

MAX_SIDECAR_BYTES = 2**20
"""Of all that goes with an image, next to its label; what is beyond it is left out."""


def as_key(name: str) -> str:
    """A path without its suffix, and without dots in its last part, where they would end the key."""
    folder, _, base = name.rpartition("/")
    stem, _, suffix = base.rpartition(".")
    base = (stem or suffix).replace(".", "_")
    return f"{folder.lstrip('/')}/{base}" if folder.lstrip("/") else base


class ImageSource:
    """Images by index. A subclass says where they are: `__len__`, `name`, `label` and `_image`."""

    def __len__(self) -> int:
        raise NotImplementedError

    def name(self, index: int) -> str:
        """What to call an image in messages; unique within the source."""
        raise NotImplementedError

    def label(self, index: int) -> int | dict | None:
        """A class index, a dict of attributes, or None where there is no label."""
        return None

    def key(self, index: int) -> str:
        """What to call an image's files in a webdataset tar; of two images it may be the same."""
        return as_key(self.name(index))

    def sidecars(self, index: int) -> dict[str, bytes]:
        """What else is known of an image, by suffix: "txt" is a caption. Its label is not among them.

        What is larger than `MAX_SIDECAR_BYTES` need not be whole.
        """
        return {}

    def origin(self, index: int) -> Origin | None:
        """What the image stands for, and how to go back to it; None: 8 bits in sRGB, written as PNG."""
        return None

    def part(self, indices: Sequence[int]) -> Self | None:
        """A source of these images alone, in this order, with the names, keys and labels that they have here.

        It is as light to send to another process as their part of the listing; None where there is no listing to cut.
        """
        return None

    def _image(self, index: int):
        """What `read_pixels` takes."""
        raise NotImplementedError

    def read(self, index: int, channels: int = 3) -> Tensor:
        """One image, uint8 (channels, H, W) in sRGB, transparency over white, decoded as `images` does.

        Raises:
            ImageError: for an image that cannot be read.
        """
        return read_pixels(self._image(index), channels=channels, name=self.name(index))

    def image(self, index: int, channels: int = 3) -> Tensor:
        """The same, float32 in [-1, 1]."""
        return self.read(index, channels).float() / 127.5 - 1

    def pixels(self, index: int, channels: int = 3) -> Tensor:
        """One image, (channels, H, W) from 0 to 255: uint8 as `read`, float32 where the image has more than 8 bits."""
        if self.origin(index) is None:
            return self.read(index, channels)
        return (self.image(index, channels) + 1) * 127.5

    @property
    def reading(self) -> str:
        """How images are read, where that is not the usual way: shards of images read in another way have other names."""
        return ""

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) as stored, before EXIF orientation, without decoding. Raises ImageError as `read`."""
        return image_size(self._image(index), name=self.name(index))
