"""An evaluation for the eye: the worst, the median and the best image; a codebook, and an image in its indices."""

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from latent_codec.codec import LatentCodec
from latent_codec.evaluation.codes import codebook_image, index_map, mean_colors
from latent_codec.evaluation.reconstruction import Evaluation, ImageFigures, reconstruct
from latent_codec.images.sheets import sheet
from latent_codec.images.sources import ImageSource
from latent_codec.images.tensors import image_grid, to_image, to_pil

MIN_HEIGHT = 128
"""Smaller images are shown enlarged by a whole factor, pixel by pixel, to about so many pixels."""


def comparison_image(codec: LatentCodec, source: ImageSource, evaluation: Evaluation) -> Image.Image:
    """A `sheet` of the worst, the median and the best image by PSNR, a row each; fewer rows where there are fewer images."""
    ranked = evaluation.by_quality()
    chosen = {ranked[0].index: "worst"}
    chosen.setdefault(ranked[-1].index, "best")
    chosen.setdefault(median_image(evaluation).index, "median")

    rows, titles = [], []
    for image in ranked:
        if image.index not in chosen:
            continue
        original = source.image(image.index, codec.channels)
        reconstruction = reconstruct(codec, original.unsqueeze(0), [source.origin(image.index)])[0].cpu()
        rows.append([original, reconstruction, difference_image(original, reconstruction)])
        titles.append(f"{chosen[image.index]}\n{_broken(Path(image.name).name)}\n{image.psnr:.2f} dB")
    columns = ["original", "reconstruction", "difference (gray: none)"]
    return to_pil(sheet(rows, row_titles=titles, column_titles=columns, side=MIN_HEIGHT))


def side_by_side(original: Tensor, reconstruction: Tensor, *, columns: int = 3) -> Image.Image:
    """original | reconstruction | difference, in which mid-gray means equal; both are (C, H, W) in [-1, 1]."""
    return image_grid([original, reconstruction, difference_image(original, reconstruction)], columns)


def difference_image(original: Tensor, reconstruction: Tensor, times: float = 1) -> Tensor:
    """Reconstruction minus original, `times` as large, (C, H, W) in [-1, 1]: mid-gray means equal."""
    difference = ((reconstruction - original) * times).clamp(-1, 1)
    if len(original) == 4:
        difference[3] = 1  # opaque, or an equal alpha would hide the difference of the colors
    return difference


def median_image(evaluation: Evaluation) -> ImageFigures:
    """The image of median PSNR, the lower one of two."""
    ranked = evaluation.by_quality()
    return ranked[(len(ranked) - 1) // 2]


def codebook_sheet(codec: LatentCodec, evaluation: Evaluation, tiles: list[Tensor]) -> Image.Image:
    """Every level's `codebook_image`, those codewords below that no image of the evaluation uses.

    Args:
        tiles: `codeword_tiles` of each level, top first.
    """
    rows = []
    for level, usage in enumerate(evaluation.codes.levels):
        image = codebook_image(codec, level=level, counts=usage.counts, tiles=tiles[level])
        used = (
            "all used" if not usage.dead_codes else f"{usage.used_codes} used, below {usage.dead_codes} not"
        )
        rows.append(
            captioned(image, f"{level_name(level, len(tiles))}: {usage.codebook_size} codewords, {used}")
        )
    return _stacked(rows)


def index_sheet(
    codec: LatentCodec, source: ImageSource, evaluation: Evaluation, tiles: list[Tensor]
) -> Image.Image:
    """A `sheet` of the image of median PSNR, a row per level: original | indices in their codewords' mean colors | in false ones.

    Args:
        tiles: `codeword_tiles` of each level, top first.
    """
    image = median_image(evaluation)
    original = source.image(image.index, codec.channels)
    size, rows, titles = tuple(original.shape[1:]), [], []
    for level, (indices,) in enumerate(codec.encode_indices(original)):
        side = codec.levels[level].side
        maps = [
            to_image(index_map(indices, side=side, size=size, colors=colors))
            for colors in (mean_colors(tiles[level]), None)
        ]
        rows.append([original, *maps])
        titles.append(f"{level_name(level, len(tiles))}\n{len(indices)}x{indices.shape[1]} indices")
    columns = [
        _broken(Path(image.name).name),
        "indices, in the mean colors\nof their codewords",
        "indices, in false colors",
    ]
    return to_pil(sheet(rows, row_titles=titles, column_titles=columns, side=MIN_HEIGHT))


def _broken(name: str, length: int = 24) -> str:
    """A name in lines of at most this many characters."""
    return "\n".join(name[start : start + length] for start in range(0, len(name), length))


def level_name(level: int, num_levels: int) -> str:
    """What a level is called, 0 being the top."""
    if num_levels == 1:
        return "codebook"
    return f"level {level}" + {0: " (top)", num_levels - 1: " (bottom)"}.get(level, "")


def _stacked(rows: list[Image.Image]) -> Image.Image:
    sheet = Image.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows)), "white")
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    return sheet


def captioned(image: Image.Image, caption: str, font_size: int | None = None) -> Image.Image:
    """`image` under lines of text, widened where one is longer; None: letters as large as fit the image."""
    font = ImageFont.load_default(font_size or max(12, image.height // 24))
    right = ImageDraw.Draw(image).multiline_textbbox((0, 0), caption, font=font)[2]
    height = sum(font.getmetrics()) * len(caption.splitlines()) + 8  # the same whatever the letters
    sheet = Image.new("RGB", (max(image.width, int(right) + 8), image.height + height), "white")
    ImageDraw.Draw(sheet).text((4, 4), caption, fill="black", font=font)
    sheet.paste(image, (0, sheet.height - image.height))
    return sheet
