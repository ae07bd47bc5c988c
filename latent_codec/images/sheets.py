"""Sheets: rows of images with titles, for people to look at.

write_image(sheet([[original, reconstruction]], column_titles=["original", "reconstruction"]), "seen.png")
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from latent_codec.images.tensors import enlarged_to, to_pil

GAP = 4
"""Pixels between images, and around titles."""
FONT_SIZE = 13


def sheet(
    rows: Sequence[Sequence[Tensor]],
    *,
    row_titles: Sequence[str] | None = None,
    column_titles: Sequence[str] | None = None,
    side: int | None = None,
) -> Tensor:
    """Lay out rows of images on white, titles of rows at their left, titles of columns above.

    Args:
        rows: of images (1, 3 or 4 channels, H, W), uint8 or in [-1, 1]. Rows may differ in length; every cell is as
            large as the largest image, and as wide as the widest title of a column.
        row_titles, column_titles: one for each; lines are broken by "\\n".
        side: smaller images are shown enlarged by a whole factor, pixel by pixel, to about this many pixels on their
            shorter side (`enlarged_to`); None: as they are.

    Returns:
        uint8 (3, H, W), as `write_image` takes it.

    Raises:
        ValueError: without an image, or for titles of another number.
    """
    cells = [[_shown(image, side) for image in row] for row in rows]
    images = [image for row in cells for image in row]
    if not images:
        raise ValueError("a sheet needs images, got none")
    num_columns = max(map(len, cells))
    for what, titles, count in (("row", row_titles, len(cells)), ("column", column_titles, num_columns)):
        if titles is not None and len(titles) != count:
            raise ValueError(f"expected a title for each of {count} {what}s, got {len(titles)}")
    at_left, above = [_size(each) for each in row_titles or []], [_size(each) for each in column_titles or []]
    width = max([*(image.width for image in images), *(width for width, _ in above)])
    height = max([*(image.height for image in images), *(height for _, height in at_left)])
    left = max((width + 2 * GAP for width, _ in at_left), default=0)
    top = max((height + 2 * GAP for _, height in above), default=0)

    canvas = Image.new(
        "RGB",
        (left + num_columns * (width + GAP) - GAP, top + len(cells) * (height + GAP) - GAP),
        "white",
    )
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(FONT_SIZE)
    for row, images in enumerate(cells):
        down = top + row * (height + GAP)
        if row_titles:
            draw.text((GAP, down + height / 2), row_titles[row], "black", font, anchor="lm")
        for column, image in enumerate(images):
            across = left + column * (width + GAP) + (width - image.width) // 2
            mask = image.getchannel("A") if image.mode == "RGBA" else None
            canvas.paste(image.convert("RGB"), (across, down + (height - image.height) // 2), mask)
    for column, title in enumerate(column_titles or []):
        middle = left + column * (width + GAP) + width / 2
        draw.text((middle, top - GAP), title, "black", font, anchor="md", align="center")
    return torch.from_numpy(np.array(canvas)).permute(2, 0, 1).contiguous()


def _shown(image: Tensor, side: int | None) -> Image.Image:
    shown = to_pil(image)
    return shown if side is None else enlarged_to(shown, side)


def _size(title: str) -> tuple[int, int]:
    """(width, height) in pixels."""
    draw, font = ImageDraw.Draw(Image.new("RGB", (1, 1))), ImageFont.load_default(FONT_SIZE)
    # From the lowest descender up.
    _, top, right, _ = draw.multiline_textbbox((0, 0), title, font, anchor="ld")
    return math.ceil(right), math.ceil(-top)
