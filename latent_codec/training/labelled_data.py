"""Classes of images, and the images that a training keeps out to be measured on."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from latent_codec import deprecated
from latent_codec.errors import SettingError
from latent_codec.images.labels import Images, class_of
from latent_codec.latents.samples import original_name

_HELD_OUT = 2  # a stream of randomness of its own under the run's seed (training/data.py)


class Labels:
    """The class of every image: `labels[number]`, int from 0.

    Args:
        images: whose labels they are.
        key: "class" where a label is a number, else the name of an attribute of a label that is a dict; true and
            false count as 1 and 0.

    Raises:
        ValueError: if an image has no such label, naming the first.
    """

    def __init__(self, images: Images, key: str):
        self._classes = np.array([class_of(images, number, key) for number in range(len(images))])

    def __getitem__(self, number: int) -> int:
        return int(self._classes[number])

    @property
    def num_classes(self) -> int:
        """One more than the highest class."""
        return int(self._classes.max()) + 1


@dataclass
class ClassOf:
    """The class of an image by its number among some of them; 0 for all where there are no classes."""

    labels: Labels | None
    numbers: Sequence[int]

    def __call__(self, index: int) -> int:
        return 0 if self.labels is None else self.labels[self.numbers[index]]


def hold_out(images: Images, share: float, seed: int) -> tuple[list[int], list[int]]:
    """Numbers of the images to train on, and of those held out, both in order; mirror images and other versions go with their original.

    Which are held out depends on nothing but seed and number of images.

    Raises:
        ValueError: if none would be left to train on, or none held out of a share above 0.
    """
    originals: dict[str, int] = {}
    groups = [
        originals.setdefault(original_name(images.name(number)), len(originals))
        for number in range(len(images))
    ]
    count = round(share * len(originals))
    if share and not 0 < count < len(originals):
        raise SettingError(
            "data.held_out",
            f"a share of the {len(originals)} images that leaves some on both sides",
            share,
            advice=f"it is {count} of them; `data.held_out=0` trains on all",
        )
    order = np.random.default_rng((seed, _HELD_OUT)).permutation(len(originals))
    is_held_out = np.isin(np.array(groups), order[:count])
    return np.flatnonzero(~is_held_out).tolist(), np.flatnonzero(is_held_out).tolist()


def __getattr__(name: str):
    return deprecated.find_name(__name__, name)
