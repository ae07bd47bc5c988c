"""Classes of images, from the labels that sources and latent files give them."""

import reprlib
from collections.abc import Sequence

from latent_codec.images.sources import ImageSource, spread
from latent_codec.latents.encoded_images import EncodedImages

Images = ImageSource | EncodedImages

MAX_CLASS = 999_999
"""Larger integers, such as ids, are no classes: they are counted by as many numbers as the largest says."""


def class_of(images: Images, number: int, key: str, *, setting: str = "data.label") -> int:
    """`class_in` the label of an image."""
    return class_in(images.label(number), key, images.name(number), setting=setting)


def class_in(label: int | dict | None, key: str, name: str, *, setting: str = "data.label") -> int:
    """The class that a label says, an integer from 0.

    Args:
        key: "class" where a label is a number, else the name of an attribute of a label that is a dict; true and
            false count as 1 and 0.
        name: of the image, for messages.
        setting: what `key` was given by, for messages.

    Raises:
        ValueError: if there is no such label, naming the image.
    """
    found = label.get(key) if isinstance(label, dict) else label if key == "class" else None
    if isinstance(found, (bool, int)) and 0 <= found <= MAX_CLASS:
        return int(found)
    if found is not None:
        expected = f"expected an integer from 0 to {MAX_CLASS:,}, or true or false"
        raise ValueError(f'{setting} is "{key}", and {name} has {key} {reprlib.repr(found)}; {expected}')
    has = "no label" if label is None else f"the label {reprlib.repr(label)}"
    raise ValueError(
        f'{setting} is "{key}", and {name} has {has}; "class" takes integers from 0, and any '
        "other name the attribute of that name."
    )


def check_labels(images: Images, limit: int | None, key: str, *, setting: str = "label") -> None:
    """Look for the label of each image that `limit` chooses, before work that needs them all.

    Raises:
        ValueError: as `class_in`.
    """
    for number in spread(len(images), limit):
        class_of(images, number, key, setting=setting)


def check_same_classes(one: Images, other: Images) -> None:
    """Refuse two sources whose classes have other names, and so other numbers.

    Raises:
        ValueError: naming both.
    """
    names = [getattr(each, "classes", None) for each in (one, other)]
    if names[0] != names[1] and all(names):
        ours, theirs = (", ".join(each[:8]) + (", ..." if len(each) > 8 else "") for each in names)
        raise ValueError(
            f"expected images of the classes {ours}, got {theirs}; give folders of the same names"
        )


def class_names(images: Images, key: str, classes: Sequence[int]) -> list[str]:
    """What to call classes: as their source names them, "not Smiling" and "Smiling", or by their numbers."""
    names = getattr(images, "classes", None)
    if key == "class" and names:
        return [names[each] if each < len(names) else str(each) for each in classes]
    if key != "class" and set(classes) <= {0, 1}:
        return [("not " if each == 0 else "") + key for each in classes]
    return [str(each) for each in classes]


def shown_name(name: str, longest: int = 24) -> str:
    """A name for a title in an image: in one line, not too long, and with `?` for bytes that are no UTF-8."""
    name = " ".join(name.encode(errors="replace").decode().split())
    return name if len(name) <= longest else name[: longest - 3] + "..."


def in_words(name: str) -> str:
    """A class's name amid words: "cat", and "class 3" where it is a number."""
    return f"class {name}" if name.isdigit() else name
