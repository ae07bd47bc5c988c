"""The worst, the median and the best of an evaluation, for the eye."""

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from latent_codec.codec import LatentCodec
from latent_codec.evaluation.reconstruction import Evaluation, read_image, reconstruct
from latent_codec.picture_sources import PictureSource
from latent_codec.pictures import hstack_pictures

MIN_HEIGHT = 128
"""Smaller pictures are shown enlarged by a whole factor, pixel by pixel."""


def comparison_picture(codec: LatentCodec, source: PictureSource, evaluation: Evaluation) -> Image.Image:
    """Worst, median and best picture by PSNR, a row each: original | reconstruction | difference.

    In the difference mid-grey means equal. Fewer rows where there are fewer pictures.
    """
    ranked = evaluation.by_quality()
    chosen = {ranked[0].index: "worst"}
    chosen.setdefault(ranked[-1].index, "best")
    chosen.setdefault(ranked[(len(ranked) - 1) // 2].index, "median")

    rows = []
    for picture in ranked:
        if picture.index not in chosen:
            continue
        original = read_image(source, picture.index, codec.channels)
        reconstruction = reconstruct(codec, original.unsqueeze(0))[0].cpu()
        difference = (reconstruction - original).clamp(-1, 1)
        if codec.channels == 4:
            difference[3] = 1  # opaque: equal alphas would hide the colours' difference
        row = _enlarged(hstack_pictures([original, reconstruction, difference]))
        rows.append(
            _captioned(row, f"{chosen[picture.index]}: {Path(picture.name).name}, {picture.psnr:.2f} dB")
        )

    sheet = Image.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows)), "white")
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    return sheet


def _enlarged(picture: Image.Image) -> Image.Image:
    factor = -(-MIN_HEIGHT // picture.height)
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def _captioned(picture: Image.Image, caption: str) -> Image.Image:
    """`picture` under a line of text, widened where the text is longer."""
    font = ImageFont.load_default(max(12, picture.height // 24))
    right, bottom = font.getbbox(caption)[2:]
    sheet = Image.new("RGB", (max(picture.width, int(right) + 8), picture.height + int(bottom) + 8), "white")
    ImageDraw.Draw(sheet).text((4, 4), caption, fill="black", font=font)
    sheet.paste(picture, (0, sheet.height - picture.height))
    return sheet
