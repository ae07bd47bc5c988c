"""What a prior learns from: windows of images' codes, which lie on disk, or of their pixels.

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
from latent_codec.images.labels import Images
from latent_codec.images.sources import SomeImages, open_source
from latent_codec.latents.encoded_images import EncodedImages, are_latent_files, encode_source, open_encoded
from latent_codec.training.config import TrainingConfig
from latent_codec.training.data import EpochOrder, TrainingCrops
from latent_codec.training.labelled_data import ClassOf, Labels, hold_out

_WINDOW = 4  # stream of randomness beside the data's own, under the same seed
Item = tuple[list[Tensor], int]
"""Grids of the levels down to the prior's, its own last, and the class (0 without classes)."""


class GridWindows(Dataset):
    """Windows of codes: `windows[position]`, an Item; the image is `EpochOrder`'s, the place a function of the position.

    Args:
        encoded: the codes.
        numbers: of the images to take, whose grids are as large as the windows or larger.
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

    def __getitem__(self, position: int) -> Item:
        index = self._order[position]
        grids = grids_of(self.encoded, self.numbers[index], len(self.shapes))
        rng = np.random.default_rng((self.seed, _WINDOW, position))
        top_height, top_width = self.shapes[0]
        row = int(rng.integers(grids[0].shape[-2] - top_height + 1))
        column = int(rng.integers(grids[0].shape[-1] - top_width + 1))
        windows = []
        for grid, (height, width) in zip(grids, self.shapes):
            top, left = row * (height // top_height), column * (width // top_width)
            windows.append(grid[..., top : top + height, left : left + width])
        return windows, self.class_of(index)


class PixelWindows(Dataset):
    """Crops as pixels 0..255, int64 (C, h, w): `windows[position]`, an Item."""

    def __init__(self, crops: TrainingCrops):
        self.crops = crops

    def __len__(self) -> int:
        return len(self.crops)

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
        self.shapes = (
            [config.data.size] if codec is None else window_shapes(config, codec, config.prior.level + 1)
        )
        train, held_out = hold_out(source, config.data.held_out, config.run.seed)
        if codec is None:
            self.train, self.held_out = (
                self._pixels(config, source, numbers) for numbers in (train, held_out)
            )
        else:
            _check_codes(config, source, codec)
            self.train, self.held_out = (
                self._codes(config, source, numbers) for numbers in (train, held_out)
            )

    @property
    def num_classes(self) -> int | None:
        return None if self.labels is None else self.labels.num_classes

    def _pixels(self, config: TrainingConfig, source: Images, numbers: list[int]) -> PixelWindows:
        crops = TrainingCrops.configured(
            config,
            SomeImages(source, numbers),
            config.model.arguments.get("data_channels", 1),
            label_of=ClassOf(self.labels, numbers),
        )
        return PixelWindows(crops)

    def _codes(self, config: TrainingConfig, source: Images, numbers: list[int]) -> GridWindows:
        height, width = self.shapes[0]
        large = large_enough(source, numbers, self.shapes[0])
        if numbers and not large:
            first = "x".join(map(str, grids_of(source, numbers[0], 1)[0].shape[-2:]))
            raise ValueError(
                f"none of the {len(numbers)} images is as large as the window of {config.data.size[0]}x"
                f"{config.data.size[1]} pixels, {height}x{width} positions of the top grid; {source.name(numbers[0])} has "
                f"{first}. Set data.height and data.width."
            )
        return GridWindows(source, large, self.shapes, seed=config.run.seed, labels=self.labels)


def open_prior_source(
    config: TrainingConfig,
    data: Sequence[str],
    run: Path,
    codec: LatentCodec | None,
    *,
    split: str = "train",
    on_progress: Callable[[int, int], None] | None = None,
) -> Images:
    """What a prior trains on: latent files as they are; images encoded once into RUN/codes; for pixels the images.

    Raises:
        ValueError: if `data` cannot be read, or is not of the codec.
    """
    if codec is not None and are_latent_files(data):
        return open_encoded(data, codec=codec)
    images = open_source(data if len(data) > 1 else data[0], split=split)
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


def large_enough(encoded: EncodedImages, numbers: Sequence[int], shape: tuple[int, int]) -> list[int]:
    """Those of the images whose top grids hold a window of this shape."""
    found = ((number, grids_of(encoded, number, 1)[0].shape[-2:]) for number in numbers)
    return [number for number, (height, width) in found if height >= shape[0] and width >= shape[1]]


def grids_of(encoded: EncodedImages, number: int, num_levels: int) -> list[Tensor]:
    """The upper grids of indices, or the latents in a list."""
    return encoded.indices(number)[:num_levels] if encoded.is_discrete else [encoded.latents(number)]


def window_shapes(config: TrainingConfig, codec: LatentCodec, num_levels: int) -> list[tuple[int, int]]:
    """The window's height and width on so many levels from the top.

    Raises:
        ValueError: if the codec has fewer levels, or the window is no multiple of a position's side.
    """
    sides = [level.side for level in codec.levels] or [codec.latent_space.downsampling_factor]
    if num_levels > len(sides):
        raise ValueError(f"prior.level is {num_levels - 1}; {codec.name} has levels 0 to {len(sides) - 1}.")
    for name, side in zip(("height", "width"), config.data.size):
        if side % sides[0]:
            raise ValueError(
                f"data.{name} is {side}; {codec.name} needs a multiple of {sides[0]}, a position's side of its top grid."
            )
    return [(config.data.size[0] // side, config.data.size[1] // side) for side in sides[:num_levels]]


def _check_codes(config: TrainingConfig, source: Images, codec: LatentCodec) -> None:
    if (
        config.data.scale != (1.0, 1.0)
        or config.data.by_area
        or config.data.pad_small
        or config.data.binarize
    ):
        raise ValueError(
            "data.scale, by_area, pad_small and binarize are for images; codes are learnt as they were encoded: leave "
            "them out."
        )
    wants_codes = (
        config.model.class_name == "PixelSNAIL" or config.model.arguments.get("data", "codes") == "codes"
    )
    if wants_codes != source.is_discrete:
        holds, learns = ("indices", "latents") if source.is_discrete else ("latents", "codes")
        raise ValueError(
            f"the files hold {holds} of {codec.name}, and the prior learns {learns}: set model.arguments.data to "
            f'"{"codes" if source.is_discrete else "latents"}", of a PixelCNN, or encode the other kind.'
        )
