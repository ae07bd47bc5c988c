"""Classes of images, from the labels that sources and latent files give them."""

import reprlib

from latent_codec.images.sources import ImageSource
from latent_codec.latents.encoded_images import EncodedImages

Images = ImageSource | EncodedImages


def class_of(images: Images, number: int, key: str, *, setting: str = "data.label") -> int:
    """The class of an image, an integer from 0.

    Args:
        key: "class" where a label is a number, else the name of an attribute of a label that is a dict; true and
            false count as 1 and 0.
        setting: what `key` was given by, for messages.

    Raises:
        ValueError: if the image has no such label, naming it.
    """
    label = images.label(number)
    found = label.get(key) if isinstance(label, dict) else label if key == "class" else None
    if isinstance(found, (bool, int)) and found >= 0:
        return int(found)
    has = "no label" if label is None else f"the label {reprlib.repr(label)}"
    raise ValueError(
        f'{setting} is "{key}", and {images.name(number)} has {has}; "class" takes integers from 0, and any '
        "other name the attribute of that name."
    )
