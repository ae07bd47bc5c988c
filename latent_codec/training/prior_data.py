"""What a prior learns from: windows of images' codes, which are on disk, or of their pixels.

images --codec--> latent files --windows of all levels down to the prior's--> codes, and the condition above them
images --crops--> pixels 0..255
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from latent_codec.codec import LatentCodec
from latent_codec.errors import SettingError
from latent_codec.images.labels import Images
from latent_codec.images.sources import SomeImages, open_source
from latent_codec.latents.encoded_images import EncodedImages, are_latent_files, encode_source, open_encoded
from latent_codec.training.config import TrainingConfig
from latent_codec.training.data import EpochOrder, TrainingCrops
from latent_codec.training.labelled_data import ClassOf, Labels, hold_out

_WINDOW = 4  # a stream of randomness of its own under the run's seed (training/data.py)
Item = tuple[list[Tensor], int]
"""Indices of the levels down to the prior's, its own last (or latents, or pixels), and the class (0 without classes)."""


class GridWindows(Dataset):
    """Windows of codes: `windows[position]`, an Item; the image is `EpochOrder`'s, the place a function of the position.

    Args:
        encoded: the codes.
        numbers: of the images to take, whose levels are as large as the windows or larger.
        shapes: (h, w) of the window on each level, top first; each is a multiple of the one above.
        seed: at least 0.
        labels: of the images; None: all are of class 0.
    """

    def __init__(
        self,
        encoded: EncodedImages,
        numbers: Sequence[int],
        shapes: Sequence[tuple[int, int]],
        *,
        seed: int,
        labels: Labels | None = None,
    ):
        self.encoded, self.numbers, self.shapes = encoded, list(numbers), list(shapes)
        self.seed, self.class_of = seed, ClassOf(labels, self.numbers)
        self._order = EpochOrder(len(self.numbers), seed)

    def __len__(self) -> int:
        """Images in an epoch; positions go on beyond it."""
        return len(self.numbers)

    @property
    def skipped(self) -> list[str]:
        """None: what was encoded can be read."""
        return []

    def __getitem__(self, position: int) -> Item:
        index = self._order[position]
        levels = levels_of(self.encoded, self.numbers[index], len(self.shapes))
        rng = np.random.default_rng((self.seed, _WINDOW, position))
        top_height, top_width = self.shapes[0]
        row = int(rng.integers(levels[0].shape[-2] - top_height + 1))
        column = int(rng.integers(levels[0].shape[-1] - top_width + 1))
        windows = []
        for level, (height, width) in zip(levels, self.shapes):
            top, left = row * (height // top_height), column * (width // top_width)
            windows.append(level[..., top : top + height, left : left + width])
        return windows, self.class_of(index)


class PixelWindows(Dataset):
    """Crops as pixels 0..255, int64 (C, h, w): `windows[position]`, an Item."""

    def __init__(self, crops: TrainingCrops):
        self.crops = crops

    def __len__(self) -> int:
        return len(self.crops)

    @property
    def skipped(self) -> list[str]:
        return self.crops.skipped

    def __getitem__(self, position: int) -> Item:
        crop, label = self.crops[position]
        return [((crop + 1) * 127.5).round().to(torch.int64)], label


class PriorData:
    """The windows of a run, the classes, and which images are held out.

    Args:
        config: of a prior.
        source: EncodedImages, or an ImageSource for a prior over pixels.
        codec: whose codes they are; None for pixels.

    Raises:
        ValueError: if images, codec and configuration do not fit together.
    """

    def __init__(self, config: TrainingConfig, source: Images, codec: LatentCodec | None):
        self.labels = Labels(source, config.data.label) if config.data.label else None
        if codec is None:
            self.shapes = [config.data.size]
        else:
            self.shapes = window_shapes(config, codec, config.prior.level + 1)
            _check_codes(config, source, codec)
        self.train, self.held_out = (
            self._windows(config, source, numbers, of_pixels=codec is None)
            for numbers in hold_out(source, config.data.held_out, config.run.seed)
        )

    @property
    def num_classes(self) -> int | None:
        return None if self.labels is None else self.labels.num_classes

    def _windows(
        self, config: TrainingConfig, source: Images, numbers: list[int], *, of_pixels: bool
    ) -> PixelWindows | GridWindows:
        if not of_pixels:
            large = large_enough(config, source, numbers, self.shapes[0])
            return GridWindows(source, large, self.shapes, seed=config.run.seed, labels=self.labels)
        some, channels = SomeImages(source, numbers), config.model.arguments.get("data_channels", 1)
        label_of = ClassOf(self.labels, numbers)
        return PixelWindows(TrainingCrops.configured(config, some, channels, label_of=label_of))


def open_codes(
    config: TrainingConfig,
    data: Sequence[str],
    run: Path,
    codec: LatentCodec | None,
    *,
    split: str = "train",
    on_progress: Callable[[int, int], None] | None = None,
) -> Images:
    """What a kind that learns codes trains on: latent files as they are, images encoded once into RUN/codes, or images for a prior over pixels.

    Raises:
        ValueError: if `data` cannot be read, or is not of the codec.
    """
    if codec is not None and are_latent_files(data):
        return open_encoded(data, codec=codec)
    images = open_source(data, split=split)
    if codec is None:
        return images
    files = encode_source(
        codec,
        images,
        run / "codes",
        mirrored=config.data.flip,
        labels=config.data.label is not None,
        on_progress=on_progress,
    )
    return open_encoded(files, codec=codec)


def large_enough(
    config: TrainingConfig,
    encoded: EncodedImages,
    numbers: Sequence[int],
    shape: tuple[int, int],
    *,
    may_be_none: bool = False,
) -> list[int]:
    """Those of the images whose top level holds a window of this shape.

    Raises:
        SettingError: if there are images, and none of them does, unless `may_be_none`.
    """
    shapes = {number: tuple(levels_of(encoded, number, 1)[0].shape[-2:]) for number in numbers}
    large = [number for number, each in shapes.items() if each[0] >= shape[0] and each[1] >= shape[1]]
    if numbers and not large and not may_be_none:
        first = "x".join(map(str, shapes[numbers[0]]))
        raise SettingError(
            "data.height",
            f"a window that one of the {len(numbers)} images holds",
            "x".join(map(str, config.data.size)),
            advice=f"that is {shape[0]}x{shape[1]} positions of the top level, and {encoded.name(numbers[0])} has {first}; "
            "set `data.height` and `data.width`",
        )
    return large


def levels_of(encoded: EncodedImages, number: int, num_levels: int) -> list[Tensor]:
    """Indices of the upper levels, or the latents in a list."""
    return encoded.indices(number)[:num_levels] if encoded.is_discrete else [encoded.latents(number)]


def window_shapes(config: TrainingConfig, codec: LatentCodec, num_levels: int) -> list[tuple[int, int]]:
    """The window's height and width on the first `num_levels` levels from the top.

    Raises:
        ValueError: if the codec has fewer levels, or the window is no multiple of a position's side.
    """
    for key in ("scale", "by_area", "pad_small", "binarize"):
        if key in config.data.changed():
            raise config.error(f"data.{key}", "its default: codes are learned as they were encoded")
    sides = [level.side for level in codec.levels] or [codec.latent_space.downsampling_factor]
    if num_levels > len(sides):
        raise config.error("prior.level", f"from 0 to {len(sides) - 1}, the levels of {codec.name}")
    for name, side in zip(("height", "width"), config.data.size):
        if side % sides[0]:
            expected = f"a multiple of {sides[0]}, the pixels of a position on the top level of {codec.name}"
            raise SettingError(f"data.{name}", expected, side)
    return [(config.data.size[0] // side, config.data.size[1] // side) for side in sides[:num_levels]]


def _check_codes(config: TrainingConfig, source: Images, codec: LatentCodec) -> None:
    wants_codes = (
        config.model.class_name == "PixelSNAIL" or config.model.arguments.get("data", "codes") == "codes"
    )
    if wants_codes != source.is_discrete:
        holds, learns = ("indices", "latents") if source.is_discrete else ("latents", "codes")
        raise SettingError(
            "model.arguments.data",
            f'"{"codes" if source.is_discrete else "latents"}" (of a PixelCNN) for files of {holds} of {codec.name}',
            learns,
            advice="or encode the other kind",
        )
