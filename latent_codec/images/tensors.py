"""Reading, shaping and writing images.

Everywhere in this project an `image` is a float tensor, (channels, height, width)
or (batch, channels, height, width), in [-1, 1], sRGB; here is what is
between that and the files people have. Channels are 1 (gray, Rec. 601 luma),
3 (RGB) or 4 (RGB and straight alpha).
"""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from latent_codec.files import replacing
from latent_codec.images.decoding import ImageError as ImageError
from latent_codec.images.decoding import Source, decode_pixels, name_of, opened
from latent_codec.images.origins import check_range, from_range

WHITE = (255, 255, 255)

# How `write_image` saves: without loss where the format can, close to it where not.
_SAVE_OPTIONS = {
    ".png": ("PNG", {}),
    ".jpg": ("JPEG", {"quality": 95, "subsampling": "4:4:4"}),
    ".jpeg": ("JPEG", {"quality": 95, "subsampling": "4:4:4"}),
    ".webp": ("WEBP", {"lossless": True, "exact": True}),
    ".avif": ("AVIF", {"quality": 95, "subsampling": "4:4:4"}),
    ".tif": ("TIFF", {"compression": "tiff_adobe_deflate"}),
    ".tiff": ("TIFF", {"compression": "tiff_adobe_deflate"}),
}

Color = tuple[int, int, int]


def read_image(
    source: Source,
    *,
    channels: int = 3,
    background: Color = WHITE,
    name: str | None = None,
    value_range: tuple[float, float] | None = None,
) -> Tensor:
    """Read one image as image, as a color-managed viewer would show it.

    EXIF orientation is applied; an embedded ICC profile is turned into sRGB (a broken one is ignored with a
    warning); of an animation the first frame is taken; transparent pixels are composited on `background`.
    16-bit gray keeps its precision, 16-bit RGB is rounded down to 8 bits by Pillow. Float pixels (TIFF) must be
    in [0, 1]. CMYK without a profile is converted by Pillow's plain formula.

    Args:
        source: a path, the bytes of a file, a binary file, or a PIL image.
        channels: 1, 3 or 4.
        background: sRGB, 0 to 255. Unused with four channels.
        name: what errors call the image; None: its path.
        value_range: the values of gray with more than 8 bits that become -1 and 1, others being clamped; None: all of
            16 bits, or 0 and 1 for floats.

    Returns:
        float32, (channels, height, width), in [-1, 1].

    Raises:
        ImageError: for anything that is not a whole image of at least 8 x 8 pixels, saying why.
    """
    value_range = None if value_range is None else check_range(*value_range)
    return _with_channels(_to_signed(decode_pixels(source, name, value_range)), channels, background)


def read_pixels(
    source: Source, *, channels: int = 3, background: Color = WHITE, name: str | None = None
) -> Tensor:
    """`read_image` rounded to uint8, (channels, height, width), 0 to 255: what a cache holds."""
    pixels = decode_pixels(source, name)
    if pixels.dtype == np.uint8 and pixels.shape[2] == channels:
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
    return to_uint8(_with_channels(_to_signed(pixels), channels, background))


def to_uint8(images: Tensor) -> Tensor:
    """Round images in [-1, 1] to 0 to 255; values beyond the range are clamped."""
    return images.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)


def image_size(source: Source, *, name: str | None = None) -> tuple[int, int]:
    """(height, width) as stored, before EXIF orientation, from the header alone. Raises ImageError."""
    with opened(source, name or name_of(source)) as image:
        return image.height, image.width


def to_image(
    thing,
    *,
    channels: int = 3,
    background: Color = WHITE,
    value_range: tuple[float, float] | None = None,
) -> Tensor:
    """Make an image of an image file, PIL image, numpy array or tensor.

    Args:
        thing: what `read_image` takes; or a numpy array (H, W) or (H, W, C), uint8, uint16 or float in
            [0, 1]; or a float tensor (C, H, W) already in [-1, 1]. C is 1, 2 (gray and alpha), 3 or 4.
        channels: of the image returned: 1, 3 or 4.
        value_range: the values that become -1 and 1, others being clamped: of an array of any integers or floats, or of
            a file's gray with more than 8 bits. Nothing is rounded to 8 bits.

    Returns:
        float32, (channels, height, width), in [-1, 1]; a tensor stays on its device.

    Raises:
        ValueError: for another shape, dtype or range, naming what is allowed.
    """
    if isinstance(thing, np.ndarray) and value_range is not None:
        image = from_range(_checked_shape(thing).transpose(2, 0, 1), *check_range(*value_range))
    elif isinstance(thing, np.ndarray):
        image = _to_signed(_checked_array(thing))
    elif isinstance(thing, Tensor):
        image = _checked_tensor(thing).float()
    else:
        return read_image(thing, channels=channels, background=background, value_range=value_range)
    return _with_channels(image, channels, background)


def to_images(batch: np.ndarray | Tensor, *, channels: int = 3) -> list[Tensor]:
    """`to_image` of each of a batch, (N, H, W, C) or (N, C, H, W)."""
    if (
        isinstance(batch, Tensor)
        and batch.is_floating_point()
        and batch.shape[1] == channels
        and batch.numel()
    ):
        _check_range(
            batch.detach(), -1, 1, "a tensor image"
        )  # of all at once: each look at a GPU's values waits for it
        return list(batch.float())
    return [to_image(each, channels=channels) for each in batch]


def _checked_shape(array: np.ndarray) -> np.ndarray:
    """The array as (H, W, C), if it is an image."""
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] not in (1, 2, 3, 4) or not array.size:
        raise ValueError(f"an array of shape {array.shape} is no image: give (H, W) or (H, W, 1 to 4)")
    return array


def _checked_array(array: np.ndarray) -> np.ndarray:
    """The array as (H, W, C), if it is an image whose type says its range."""
    array = _checked_shape(array)
    if array.dtype not in (np.uint8, np.uint16) and array.dtype.kind != "f":
        raise ValueError(f"a {array.dtype} array is no image: give uint8, uint16 or floats in [0, 1]")
    if array.dtype.kind == "f":
        _check_range(torch.from_numpy(array.astype(np.float32)), 0, 1, "a float array")
    return array


def _checked_tensor(tensor: Tensor) -> Tensor:
    shape = tuple(tensor.shape)
    if tensor.ndim != 3 or shape[0] not in (1, 2, 3, 4) or not tensor.numel():
        raise ValueError(f"a tensor of shape {shape} is no image: give (C, H, W) with 1 to 4 channels")
    if not tensor.is_floating_point():
        advice = "give floats in [-1, 1], such as x / 127.5 - 1"
        raise ValueError(f"a {tensor.dtype} tensor is no image: {advice}")
    _check_range(tensor.detach(), -1, 1, "a tensor image")
    return tensor


def _check_range(values: Tensor, low: float, high: float, what: str) -> None:
    """Refuse values outside [low, high]; the slack of 1e-3 is for what half precision rounds."""
    smallest, largest = (value.item() for value in torch.aminmax(values))
    if not (smallest >= low - 1e-3 and largest <= high + 1e-3):  # written so that NaN is refused
        got = f"{smallest:.4g} to {largest:.4g}"
        raise ValueError(f"{what} must be in [{low}, {high}], and this one spans {got}: rescale or clamp it")


def _to_signed(pixels: np.ndarray) -> Tensor:
    """(H, W, C), uint8, uint16 or float in [0, 1] -> float32 (C, H, W) in [-1, 1]."""
    white = {"uint8": 255, "uint16": 65535}.get(pixels.dtype.name, 1)
    # A copy, so that the caller's array is never written to; always native byte order.
    signed = torch.from_numpy(np.array(pixels.transpose(2, 0, 1), dtype=np.float32, order="C"))
    return signed.div_(white / 2).sub_(1)


def _with_channels(image: Tensor, channels: int, background: Color) -> Tensor:
    """Bring an image of 1 to 4 channels, the last of 2 or 4 being alpha, to 1, 3 or 4 channels."""
    if channels not in (1, 3, 4):
        raise ValueError(f"channels={channels}: images have 1 (gray), 3 (RGB) or 4 (RGB and alpha) channels")
    color, alpha = (image[:-1], image[-1:]) if image.shape[0] in (2, 4) else (image, None)
    if alpha is not None and channels != 4:
        behind = color.new_tensor(background).view(3, 1, 1) / 127.5 - 1
        color = torch.lerp(behind, color.expand(3, -1, -1), (alpha + 1) / 2)
    if channels == 1:
        luma = color.new_tensor((0.299, 0.587, 0.114)).view(3, 1, 1)
        return (color * luma).sum(0, keepdim=True) if color.shape[0] == 3 else color
    color = color.expand(3, -1, -1)
    if channels == 4:
        return torch.cat((color, torch.ones_like(color[:1]) if alpha is None else alpha))
    return color.contiguous()


def to_pil(image: Tensor) -> Image.Image:
    """Round an image, (1, 3 or 4, H, W) in [-1, 1], to an 8-bit PIL image; values beyond the range are clamped.

    One of uint8 is taken as it is.

    Raises:
        ValueError: for another shape or dtype, or values that are not finite.
    """
    if not isinstance(image, Tensor) or not (image.is_floating_point() or image.dtype == torch.uint8):
        what = f"a {image.dtype} tensor" if isinstance(image, Tensor) else f"a {type(image).__name__}"
        raise ValueError(f"{what} is no image: give a float tensor in [-1, 1], or uint8")
    if image.ndim != 3 or image.shape[0] not in (1, 3, 4):
        raise ValueError(f"a tensor of shape {tuple(image.shape)} is not one image: give (1, 3 or 4, H, W)")
    pixels = image.detach().cpu()
    if pixels.is_floating_point():
        pixels = pixels.float()
        if not torch.isfinite(pixels).all():
            raise ValueError("the image holds NaN or infinite values, so there is no image to write")
        pixels = to_uint8(pixels)
    return Image.fromarray(pixels[0].numpy() if len(pixels) == 1 else pixels.permute(1, 2, 0).numpy().copy())


def write_image(image: Tensor | Image.Image, path: str | os.PathLike) -> None:
    """Write an image or PIL image, whole or not at all; the suffix names the format.

    PNG, WebP and TIFF are written without loss, JPEG and AVIF with quality 95.

    Raises:
        ValueError: for an unknown suffix, or transparency in a JPEG.
        OSError: where the system cannot write.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in _SAVE_OPTIONS:
        written = suffix or "file without suffix"
        raise ValueError(f"{path}: cannot write a {written}; use {', '.join(_SAVE_OPTIONS)}")
    image = image if isinstance(image, Image.Image) else to_pil(image)
    form, options = _SAVE_OPTIONS[suffix]
    if form == "JPEG" and image.has_transparency_data:
        raise ValueError(f"{path}: JPEG holds no transparency; write .png, .webp, .avif or .tif")
    with replacing(path) as partial:
        image.save(partial, format=form, **options)


def pad_to_size(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Repeat the last row and column until an image is (height, width) or larger; CHW or NCHW, of any dtype."""
    bottom, right = (max(wanted - side, 0) for side, wanted in zip(image.shape[-2:], size))
    if not (bottom or right):
        return image
    values = image if image.is_floating_point() else image.float()
    return F.pad(values, (0, right, 0, bottom), mode="replicate").to(image.dtype)


def pad_to_multiple(image: Tensor, factor: int) -> Tensor:
    """Repeat the last row and column until height and width are multiples of `factor`; CHW or NCHW."""
    height, width = image.shape[-2:]
    return pad_to_size(image, (height + -height % factor, width + -width % factor))


def center_crop(image: Tensor, size: int | tuple[int, int]) -> Tensor:
    """Cut the middle (height, width), or a square, out of (..., H, W).

    Raises:
        ValueError: if the image is smaller than that.
    """
    height, width = (size, size) if isinstance(size, int) else size
    if not (0 < height <= image.shape[-2] and 0 < width <= image.shape[-1]):
        there = f"{image.shape[-2]}x{image.shape[-1]}"
        raise ValueError(f"cannot crop {height}x{width} (height x width) out of {there}")
    top, left = (image.shape[-2] - height) // 2, (image.shape[-1] - width) // 2
    return image[..., top : top + height, left : left + width]


def fit_square(image: Tensor, side: int) -> Tensor:
    """Resize an image (C, H, W) in [-1, 1] until its shorter side is `side`, and cut out the middle square.

    By an antialiased bicubic filter, as training resizes its crops.
    """
    height, width = image.shape[-2:]
    shorter = min(height, width)
    image = center_crop(image, shorter)
    if shorter == side:
        return image
    return F.interpolate(image[None], (side, side), mode="bicubic", antialias=True)[0].clamp_(-1, 1)


def shrunk(image: Tensor, largest: int) -> Tensor:
    """An image (C, H, W) in [-1, 1] with at most `largest` pixels on its longer side; a smaller one as it is."""
    height, width = image.shape[-2:]
    scale = largest / max(height, width)
    if scale >= 1:
        return image
    size = max(round(height * scale), 1), max(round(width * scale), 1)
    return F.interpolate(image[None], size, mode="area")[0]


def shrunk_by(images: Tensor, factor: int) -> Tensor:
    """Images (N, C, H, W) in [-1, 1] at 1 / `factor` of their sides, which it divides, by an antialiased bicubic filter."""
    if factor == 1:
        return images
    size = [side // factor for side in images.shape[2:]]
    return F.interpolate(images, size, mode="bicubic", antialias=True).clamp(-1, 1)


def central_window(image: Tensor, size: tuple[int, int]) -> Tensor:
    """The middle (height, width) of (C, H, W), continued beyond its last row and column where it is smaller."""
    return center_crop(pad_to_size(image, size), size)


def enlarged(
    image: Image.Image, factor: int, resampling: Image.Resampling = Image.Resampling.NEAREST
) -> Image.Image:
    """A PIL image `factor` times as wide and high, its pixels as squares unless told otherwise; itself below 2."""
    if factor < 2:
        return image
    return image.resize((image.width * factor, image.height * factor), resampling)


def enlarged_to(image: Image.Image, side: int) -> Image.Image:
    """A small PIL image enlarged by a whole factor to about `side` pixels on its shorter side, at most twice as many on the other."""
    return enlarged(image, round(min(side / min(image.size), 2 * side / max(image.size))))


def sample_grid(images: Sequence[Image.Image], columns: int, *, min_side: int = 96) -> Image.Image:
    """PIL images as an `image_grid`, small ones enlarged by a whole factor to `min_side` pixels or more on their shorter side."""
    return image_grid([enlarged(image, -(-min_side // min(image.size))) for image in images], columns)


def hstack_images(images: Sequence[Tensor | Image.Image], *, gap: int = 4) -> Image.Image:
    """Images side by side: `image_grid` with one row."""
    return image_grid(images, len(images), gap=gap)


def image_grid(
    images: Sequence[Tensor | Image.Image], columns: int, *, gap: int = 4, background: Color = WHITE
) -> Image.Image:
    """Lay out images (as `to_pil` takes) or PIL images row by row, `gap` pixels apart, on `background`.

    Every cell is as large as the largest image; smaller ones are centerd in theirs. No more columns are
    made than there are images.
    """
    if not images or columns < 1:
        raise ValueError(f"a grid needs images and columns: got {len(images)} and {columns}")
    images = [image if isinstance(image, Image.Image) else to_pil(image) for image in images]
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    cell_width = max(image.width for image in images)
    cell_height = max(image.height for image in images)
    size = columns * (cell_width + gap) - gap, rows * (cell_height + gap) - gap
    sheet = Image.new("RGB", size, background)
    for place, image in enumerate(images):
        row, column = divmod(place, columns)
        left = column * (cell_width + gap) + (cell_width - image.width) // 2
        top = row * (cell_height + gap) + (cell_height - image.height) // 2
        mask = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
        sheet.paste(image.convert("RGB"), (left, top), mask)
    return sheet
