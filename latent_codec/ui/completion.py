"""Completion: hide part of an image's indices, and let a prior draw it again."""

from collections.abc import Callable, Sequence

import torch
from PIL import Image
from torch import Tensor

from latent_codec.codec import LatentCodec
from latent_codec.images.tensors import enlarged_to, fit_square, to_image, to_pil
from latent_codec.pipelines import PriorPipeline

SIDE = 192
PARTS = ("nothing", "top half", "bottom half", "left half", "right half", "middle", "all")


def hidden_cells(part: str, rows: int, columns: int) -> set[tuple[int, int]]:
    """The positions (row, column) of a part of the grid, one of PARTS."""
    middle = range(rows // 4, rows - rows // 4), range(columns // 4, columns - columns // 4)
    ranges = {
        "nothing": (range(0), range(0)),
        "top half": (range(rows // 2), range(columns)),
        "bottom half": (range(rows - rows // 2, rows), range(columns)),
        "left half": (range(rows), range(columns // 2)),
        "right half": (range(rows), range(columns - columns // 2, columns)),
        "middle": middle,
        "all": (range(rows), range(columns)),
    }
    return {(row, column) for row in ranges[part][0] for column in ranges[part][1]}


class Completion:
    """An image as a grid of indices, some of them hidden.

    Args:
        pipeline: over indices of one level, with the size that its prior was trained on.
        image: (C, H, W) in [-1, 1]; its middle square is taken.
    """

    def __init__(self, pipeline: PriorPipeline, image: Tensor):
        self.pipeline = pipeline
        self.codec = LatentCodec(pipeline.vae, name="vae")
        self.rows, self.columns = pipeline.prior.config.sample_size
        self.side = self.codec.levels[0].side
        self.image = fit_square(to_image(image, channels=self.codec.channels), self.rows * self.side)
        (self.indices,) = self.codec.encode_indices(self.image)

    def shown(self, hidden: set[tuple[int, int]]) -> Image.Image:
        """What the prior is told: hidden cells in gray, their borders drawn."""
        image = self.codec.decode_indices([self.indices], output_type="pt")[0].cpu()
        for row, column in hidden:
            cell = image[
                :, row * self.side : (row + 1) * self.side, column * self.side : (column + 1) * self.side
            ]
            cell.fill_(-0.2)
            cell[:, 0], cell[:, :, 0] = 0.1, 0.1
        return enlarged_to(to_pil(image), SIDE)

    def cell_at(self, x: int, y: int) -> tuple[int, int]:
        """The (row, column) at a point of the image that `shown` gives."""
        side = self.side * (self.shown(set()).width // (self.columns * self.side))
        return min(y // side, self.rows - 1), min(x // side, self.columns - 1)

    def drawn(
        self,
        hidden: set[tuple[int, int]],
        labels: Sequence[str] | None,
        *,
        num_images: int = 4,
        seed: int = 0,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> list[Image.Image]:
        """Images whose hidden cells the prior has drawn; `labels` where it has classes."""
        known = torch.ones(self.rows, self.columns, dtype=torch.bool)
        for row, column in hidden:
            known[row, column] = False
        images = self.pipeline(
            labels,
            num_images,
            known=self.indices,
            known_mask=known,
            generator=torch.Generator().manual_seed(seed),
            callback=on_progress and (lambda step, num_steps, indices, done: on_progress(step, num_steps)),
        ).images
        return [enlarged_to(image, SIDE) for image in images]
