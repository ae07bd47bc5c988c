"""What people have on their disks, and what it must become; and 34 files that are no image."""

import io
import os
import resource
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from latent_codec.images.files import find_images
from latent_codec.images.tensors import (
    ImageError,
    center_crop,
    hstack_images,
    image_grid,
    image_size,
    pad_to_multiple,
    read_image,
    read_pixels,
    to_image,
    to_pil,
    write_image,
)

HEIGHT, WIDTH = 24, 32


def photo(height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """A smooth color image without symmetry, (H, W, 3) uint8."""
    y, x = np.mgrid[:height, :width] / (height, width)[0]
    return np.stack([60 + 120 * y, 30 + 100 * x, 200 - 90 * x * y], -1).clip(0, 255).astype(np.uint8)


def encoded(image: Image.Image, form: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def signed(pixels: np.ndarray) -> torch.Tensor:
    """(H, W, C) uint8 -> image, by the definition."""
    return torch.from_numpy(pixels.astype(np.float32) / 127.5 - 1).permute(2, 0, 1)


def levels(image: torch.Tensor) -> np.ndarray:
    """Image -> (H, W, C) in levels of 255, not rounded."""
    return ((image + 1) * 127.5).permute(1, 2, 0).numpy()


# Formats


@pytest.mark.parametrize(
    "form, options, tolerance",
    [
        ("PNG", {}, 0),
        ("TIFF", {}, 0),
        ("TIFF", {"compression": "tiff_lzw"}, 0),
        ("WEBP", {"lossless": True}, 0),
        ("BMP", {}, 0),
        ("PPM", {}, 0),
        ("JPEG", {"quality": 97, "subsampling": 0}, 6),  # of 255: what the codecs lose on a smooth image
        ("AVIF", {"quality": 97, "subsampling": "4:4:4"}, 6),
        ("WEBP", {"quality": 97}, 12),
    ],
)
def test_formats_become_the_same_image(tmp_path, form, options, tolerance):
    data = encoded(Image.fromarray(photo()), form, **options)
    path = tmp_path / "image"  # the content decides, not the name
    path.write_bytes(data)

    image = read_image(path)

    assert image.shape == (3, HEIGHT, WIDTH) and image.dtype == torch.float32 and image.is_contiguous()
    assert np.abs(levels(image) - photo()).max() <= tolerance + 1e-3
    for source in (data, io.BytesIO(data), Image.open(path), str(path)):
        assert torch.equal(read_image(source), image)
    assert torch.equal(read_pixels(path), image.add(1).mul(127.5).round().to(torch.uint8))
    assert image_size(path) == (HEIGHT, WIDTH)


def test_image_spans_minus_one_to_one():
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:, 4:] = 255

    image = read_image(Image.fromarray(pixels))

    assert image[:, :, :4].eq(-1).all() and image[:, :, 4:].eq(1).all()


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "AVIF", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_once(form, orientation):
    upright = photo()
    # The EXIF standard: where row 0 and column 0 of the stored image lie in the upright one.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.swapaxes(0, 1),
        6: np.rot90(upright, 1),
        7: np.rot90(upright, 2).swapaxes(0, 1),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 97, "subsampling": 0}, "WEBP": {"lossless": True}, "AVIF": {"quality": 97}}
    data = encoded(Image.fromarray(np.ascontiguousarray(stored)), form, exif=exif, **options.get(form, {}))

    image = read_image(data)

    assert image.shape == (3, HEIGHT, WIDTH)
    assert np.abs(levels(image) - upright).max() <= 12  # lossy formats; a wrong turn differs by 100


def test_broken_exif_counts_as_upright():
    data = encoded(Image.fromarray(photo()), "PNG", exif=b"Exif\0\0MM\0*\0\0\xff\xff")

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(read_image(data), signed(photo()))


# Modes and channels


def test_gray_is_repeated_for_three_channels_and_kept_for_one():
    gray = photo()[:, :, 0]
    data = encoded(Image.fromarray(gray), "PNG")

    assert torch.equal(read_image(data, channels=1), signed(gray[:, :, None]))
    assert torch.equal(read_image(data), signed(gray[:, :, None]).expand(3, -1, -1))
    with_alpha = read_image(data, channels=4)
    assert torch.equal(with_alpha[:3], read_image(data)) and with_alpha[3].eq(1).all()


def test_one_channel_of_a_color_image_is_rec_601_luma():
    colors = np.zeros((8, 24, 3), np.uint8)
    for channel in range(3):
        colors[:, 8 * channel : 8 * channel + 8, channel] = 255

    image = read_image(encoded(Image.fromarray(colors), "PNG"), channels=1)

    luma = (image[0, 0, [0, 8, 16]] + 1) / 2
    torch.testing.assert_close(luma, torch.tensor([0.299, 0.587, 0.114]))


def test_channels_other_than_1_3_4_are_refused():
    with pytest.raises(ValueError, match=r"channels=2: images have 1 \(gray\), 3 \(RGB\) or 4"):
        read_image(Image.fromarray(photo()), channels=2)


def test_alpha_is_composited_on_the_stated_background():
    pixels = np.dstack([photo(), np.full((HEIGHT, WIDTH), 255, np.uint8)])
    pixels[:, :8, 3] = 0
    pixels[:, 8:16, 3] = 51  # a fifth
    data = encoded(Image.fromarray(pixels), "PNG")
    background = (10, 200, 30)

    composited = levels(read_image(data, background=background))

    expected = photo().astype(np.float64)
    expected[:, :8] = background
    expected[:, 8:16] = 0.2 * expected[:, 8:16] + 0.8 * np.array(background)
    np.testing.assert_allclose(composited, expected, atol=1e-3)  # float32 arithmetic
    assert (levels(read_image(data))[:, :8] == 255).all()  # white if not said
    np.testing.assert_allclose(levels(read_image(data, channels=4)), pixels, atol=1e-3)
    assert np.array_equal(read_pixels(data, channels=4).permute(1, 2, 0).numpy(), pixels)


def test_gray_with_alpha_in_one_channel():
    pixels = np.zeros((8, 8, 2), np.uint8)
    pixels[:, 4:, 1] = 255

    image = read_image(encoded(Image.fromarray(pixels), "PNG"), channels=1)

    assert image[:, :, :4].eq(1).all() and image[:, :, 4:].eq(-1).all()


@pytest.mark.parametrize("form", ["PNG", "GIF", "TIFF"])
def test_palette_becomes_its_colors(form):
    palette = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) % 4).convert("P")
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 99, 199])

    image = levels(read_image(encoded(palette, form)))

    assert image[0, :4].round(3).tolist() == [[255, 0, 0], [0, 255, 0], [0, 0, 255], [9, 99, 199]]


def test_transparent_palette_entry_shows_the_background():
    palette = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) % 2).convert("P")
    palette.putpalette([255, 0, 0, 0, 255, 0])
    data = encoded(palette, "PNG", transparency=1)

    image = levels(read_image(data, background=(1, 2, 3)))

    assert image[0, :2].round(3).tolist() == [[255, 0, 0], [1, 2, 3]]


def test_transparent_color_of_an_rgb_png_shows_the_background():
    pixels = photo()
    pixels[:, :4] = (1, 2, 3)
    data = encoded(Image.fromarray(pixels), "PNG", transparency=(1, 2, 3))

    image = levels(read_image(data))

    assert (image[:, :4] == 255).all()
    np.testing.assert_allclose(image[:, 4:], pixels[:, 4:], atol=1e-3)


def test_one_bit_is_black_and_white():
    bits = np.indices((8, 16)).sum(0) % 2 == 1
    for form in ("PNG", "TIFF"):
        image = read_image(encoded(Image.fromarray(bits), form), channels=1)
        assert torch.equal(image[0], torch.from_numpy(bits).float() * 2 - 1)


def test_16_bit_gray_is_scaled_not_clipped_and_keeps_its_precision():
    deep = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    expected = torch.from_numpy(deep / 65535 * 2 - 1).float()
    pgm = b"P5 16 16 65535\n" + deep.astype(">u2").tobytes()
    big_endian = encoded(Image.frombytes("I;16B", (16, 16), deep.astype(">u2").tobytes()), "TIFF")

    for data in (*(encoded(Image.fromarray(deep), form) for form in ("PNG", "TIFF")), big_endian, pgm):
        image = read_image(data, channels=1)
        torch.testing.assert_close(image[0], expected, atol=1e-6, rtol=0)
        assert len(image.unique()) == 256
        assert read_pixels(data)[0, -1, -1] == 255


def test_16_bit_rgb_png_keeps_its_high_bytes():
    deep = photo().astype(np.uint16) * 257
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in deep)
    data = png(
        chunk(b"IHDR", struct.pack(">2I5B", WIDTH, HEIGHT, 16, 2, 0, 0, 0)),
        chunk(b"IDAT", zlib.compress(rows)),
    )

    assert torch.equal(read_pixels(data), torch.from_numpy(photo()).permute(2, 0, 1))


def test_float_tiff_in_zero_to_one():
    values = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)

    image = read_image(encoded(Image.fromarray(values), "TIFF"), channels=1)

    torch.testing.assert_close(image[0], torch.from_numpy(values * 2 - 1))


@pytest.mark.parametrize("form", ["JPEG", "TIFF"])
def test_cmyk_without_a_profile(form):
    inks = np.zeros((16, 64, 4), np.uint8)
    inks[:, 16:32] = (255, 0, 0, 0)  # cyan
    inks[:, 32:48] = (0, 0, 0, 255)  # black
    inks[:, 48:] = (0, 255, 255, 0)  # magenta and yellow: red
    options = {"quality": 100} if form == "JPEG" else {}

    image = levels(read_image(encoded(Image.frombytes("CMYK", (64, 16), inks.tobytes()), form, **options)))

    expected = [[255, 255, 255], [0, 255, 255], [0, 0, 0], [255, 0, 0]]
    assert np.abs(image[8, [8, 24, 40, 56]] - expected).max() <= 4  # JPEG


@pytest.mark.parametrize(
    "mode, form", [("HSV", None), ("YCbCr", "JPEG"), ("LAB", "TIFF"), ("PA", None), ("RGBX", None)]
)
def test_rare_modes_become_rgb(mode, form):
    image = Image.fromarray(photo())
    image = image.convert("RGBA").convert("P").convert("PA") if mode == "PA" else to_mode(image, mode)
    source = encoded(image, form, quality=97) if form else image

    image = read_image(source)

    assert image.shape == (3, HEIGHT, WIDTH)
    assert np.abs(levels(image) - photo()).mean() < 16  # these modes, and the palette of PA, are coarse


def to_mode(image: Image.Image, mode: str) -> Image.Image:
    if mode == "LAB":
        return ImageCms.profileToProfile(
            image, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
        )
    return image.convert(mode)


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (16, 16), color) for color in ("#ff0000", "#00ff00", "#0000ff")]
    for form in ("PNG", "GIF", "WEBP", "TIFF"):
        options = {"lossless": True} if form == "WEBP" else {}
        data = encoded(frames[0], form, save_all=True, append_images=frames[1:], **options)
        assert levels(read_image(data))[0, 0].tolist() == [255, 0, 0], form


# Color profiles. `icc_profile` builds one by the ICC specification (v2, matrix and curve).


def icc_profile(space: bytes, gamma: float, primaries: list[tuple[float, float, float]] = ()) -> bytes:
    """A display profile: `space` b"RGB " with three XYZ (D50) primaries, or b"GRAY", and one gamma."""

    def s15(value: float) -> bytes:
        return struct.pack(">i", round(value * 65536))

    def xyz(values) -> bytes:
        return b"XYZ \0\0\0\0" + b"".join(map(s15, values))

    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    text = b"text\0\0\0\0none\0\0\0\0"
    description = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + b"\0" * 78 + b"\0"
    tags = {b"desc": description, b"cprt": text, b"wtpt": xyz((0.9642, 1.0, 0.8249))}
    if space == b"RGB ":
        tags |= {name: xyz(values) for name, values in zip((b"rXYZ", b"gXYZ", b"bXYZ"), primaries)}
        tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)
    else:
        tags[b"kTRC"] = curve
    table, body = struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        table += name + struct.pack(">2I", 128 + 4 + 12 * len(tags) + len(body), len(content))
        body += content + b"\0" * (-len(content) % 4)
    size = 128 + len(table) + len(body)
    header = struct.pack(">I4sI4s4s4s", size, b"none", 0x02100000, b"mntr", space, b"XYZ ") + b"\0" * 12
    header += b"acsp" + b"\0" * 28 + b"".join(map(s15, (0.9642, 1.0, 0.8249))) + b"\0" * 48
    return header + table + body


# sRGB's primaries adapted to D50 (the columns of every sRGB profile's matrix).
SRGB_PRIMARIES = [(0.4361, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141)]


def srgb_curve(linear: np.ndarray) -> np.ndarray:
    """IEC 61966-2-1: linear light in [0, 1] -> sRGB, in levels of 255."""
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "AVIF", "TIFF"])
def test_linear_light_profile_becomes_srgb(form):
    profile = icc_profile(b"RGB ", 1.0, SRGB_PRIMARIES)
    options = {
        "JPEG": {"quality": 100, "subsampling": 0},
        "WEBP": {"lossless": True},
        "AVIF": {"quality": 99},
    }
    image = Image.new("RGB", (16, 16), (64, 128, 192))

    image = levels(read_image(encoded(image, form, icc_profile=profile, **options.get(form, {}))))

    expected = srgb_curve(np.array([64, 128, 192]) / 255)
    assert np.abs(image - expected).max() <= 8  # lossy formats; an ignored profile is off by 73


def test_profile_with_swapped_primaries_swaps_the_colors():
    red, green, blue = SRGB_PRIMARIES
    swapped = icc_profile(b"RGB ", 2.2, [green, red, blue])
    image = Image.new("RGB", (8, 8), (220, 90, 140))

    image = levels(read_image(encoded(image, "PNG", icc_profile=swapped)))

    assert np.abs(image[0, 0] - (90, 220, 140)).max() <= 4  # gamma 2.2 is not quite sRGB's curve


def test_profile_keeps_alpha():
    profile = icc_profile(b"RGB ", 1.0, SRGB_PRIMARIES)
    image = Image.new("RGBA", (8, 8), (64, 128, 192, 77))

    image = levels(read_image(encoded(image, "PNG", icc_profile=profile), channels=4))

    assert np.abs(image[0, 0] - [*srgb_curve(np.array([64, 128, 192]) / 255), 77]).max() <= 1


@pytest.mark.parametrize("deep", [False, True])
def test_gray_profile(deep):
    profile = icc_profile(b"GRAY", 1.0)
    gray = Image.fromarray(np.full((8, 8), 64 * 257, np.uint16)) if deep else Image.new("L", (8, 8), 64)

    for channels in (1, 3):
        image = read_image(encoded(gray, "PNG", icc_profile=profile), channels=channels)
        assert image.shape == (channels, 8, 8)
        assert np.abs(levels(image) - srgb_curve(np.array(64 / 255))).max() <= 1


def test_gray_image_with_an_rgb_profile():
    profile = icc_profile(b"RGB ", 1.0, SRGB_PRIMARIES)

    image = read_image(encoded(Image.new("L", (8, 8), 64), "PNG", icc_profile=profile))

    assert np.abs(levels(image) - srgb_curve(np.array(64 / 255))).max() <= 1


def test_srgb_profile_leaves_every_pixel_alone():
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()

    assert torch.equal(
        read_image(encoded(Image.fromarray(photo()), "PNG", icc_profile=profile)), signed(photo())
    )


def cmyk_profile() -> bytes:
    """A CMYK profile (v2, lut8 both ways is not needed: A2B0 alone) that maps every ink to Lab by R = 255 - ink - K."""
    grid = 9
    axis = np.linspace(0, 1, grid)
    c, m, y, k = np.meshgrid(axis, axis, axis, axis, indexing="ij")
    rgb = np.stack([(1 - ink) * (1 - k) for ink in (c, m, y)], -1).reshape(-1, 3)
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    ratio = linear @ np.array(SRGB_PRIMARIES) / (0.9642, 1.0, 0.8249)
    root = np.where(ratio > 216 / 24389, np.cbrt(ratio), (24389 / 27 * ratio + 16) / 116)
    lab = np.stack(
        [116 * root[:, 1] - 16, 500 * (root[:, 0] - root[:, 1]), 200 * (root[:, 1] - root[:, 2])], -1
    )
    table = np.stack([lab[:, 0] * 255 / 100, lab[:, 1] + 128, lab[:, 2] + 128], -1)
    identity = bytes(range(256))
    matrix = b"".join(struct.pack(">i", 65536 * (place % 4 == 0)) for place in range(9))
    lut = b"mft1\0\0\0\0" + bytes((4, 3, grid, 0)) + matrix + identity * 4
    lut += table.round().clip(0, 255).astype(np.uint8).tobytes() + identity * 3
    description = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"cmyk\0" + b"\0" * 79
    white = b"XYZ \0\0\0\0" + b"".join(struct.pack(">i", round(v * 65536)) for v in (0.9642, 1.0, 0.8249))
    tags = {b"desc": description, b"cprt": b"text\0\0\0\0none\0\0\0\0", b"wtpt": white, b"A2B0": lut}
    head, body = struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        head += name + struct.pack(">2I", 128 + 4 + 12 * len(tags) + len(body), len(content))
        body += content + b"\0" * (-len(content) % 4)
    header = struct.pack(
        ">I4sI4s4s4s", 128 + len(head) + len(body), b"none", 0x02100000, b"prtr", b"CMYK", b"Lab "
    )
    header += b"\0" * 12 + b"acsp" + b"\0" * 28
    header += b"".join(struct.pack(">i", round(v * 65536)) for v in (0.9642, 1.0, 0.8249)) + b"\0" * 48
    return header + head + body


@pytest.mark.parametrize("form", ["JPEG", "TIFF"])
def test_cmyk_with_a_profile(form):
    inks = np.zeros((16, 32, 4), np.uint8)
    inks[:, 16:] = (0, 255, 255, 0)  # red ink, which this profile shows as pure red
    image = Image.frombytes("CMYK", (32, 16), inks.tobytes())
    options = {"quality": 100} if form == "JPEG" else {}

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # an ignored profile would pass for white and red
        image = levels(read_image(encoded(image, form, icc_profile=cmyk_profile(), **options)))

    assert np.abs(image[8, [8, 24]] - [[255, 255, 255], [255, 0, 0]]).max() <= 10  # 8-bit Lab tables


@pytest.mark.parametrize(
    "profile",
    [
        b"not a profile",
        icc_profile(b"RGB ", 2.2, SRGB_PRIMARIES)[:200],
        icc_profile(b"GRAY", 2.2),  # of a color image
        cmyk_profile(),  # of an RGB image
    ],
    ids=["garbage", "cut short", "gray", "cmyk"],
)
def test_profile_that_does_not_fit_is_ignored_with_a_warning(tmp_path, profile):
    path = tmp_path / "holiday.png"
    path.write_bytes(encoded(Image.fromarray(photo()), "PNG", icc_profile=profile))

    with pytest.warns(UserWarning, match=r"holiday\.png: its color profile is ignored \("):
        image = read_image(path)

    assert torch.equal(image, signed(photo()))


# Broken images: each an ImageError of one line that names the file, never another exception.


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(*chunks: bytes) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks) + chunk(b"IEND", b"")


def gray_png(width: int, height: int) -> bytes:
    """A tiny file that announces width x height pixels."""
    header = chunk(b"IHDR", struct.pack(">2I5B", width, height, 8, 0, 0, 0, 0))
    return png(header, chunk(b"IDAT", zlib.compress(b"\0" * 1000)))


def noisy(form: str, **options) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    return encoded(Image.fromarray(pixels), form, **options)


def bad_crc() -> bytes:
    data = bytearray(noisy("PNG"))
    data[29] ^= 0xFF  # in the CRC of IHDR
    return bytes(data)


def bad_zlib() -> bytes:
    data = bytearray(noisy("PNG"))
    data[100:140] = b"\xff" * 40
    return bytes(data)


def half(data: bytes) -> bytes:
    return data[: len(data) // 2]


def tiff_without_pixels() -> bytes:
    """A TIFF header whose directory of tags lies beyond the end of the file."""
    return b"II*\0" + struct.pack("<I", 4096)


BROKEN = {
    "empty.jpg": (b"", "empty"),
    "text.jpg": (b"Dear Sir or Madam,\n", "not an image in a known format"),
    "page.png": (b"<!DOCTYPE html>\n<html><body>404 Not Found</body></html>", "a web page"),
    "page2.jpg": (b"\n <html><head>", "a web page"),
    "drawing.svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG drawing"),
    "drawing.xml.png": (b"<?xml version='1.0'?><svg/>", "SVG drawing"),
    "paper.pdf": (b"%PDF-1.7\n1 0 obj", "PDF document"),
    "archive.png": (b"PK\x03\x04" + b"\0" * 40, "ZIP archive"),
    "pointer.png": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1", "git lfs pull"),
    "phone.heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC cannot be read"),
    "random.jpg": (np.random.default_rng(1).bytes(4096), "not an image in a known format"),
    "zeros.jpg": (bytes(4096), "not an image in a known format"),
    "cut.jpg": (half(noisy("JPEG")), "damaged or cut short"),
    "cut-progressive.jpg": (half(noisy("JPEG", progressive=True)), "damaged or cut short"),
    "cut.png": (half(noisy("PNG")), "damaged or cut short"),
    "cut.webp": (half(noisy("WEBP", lossless=True)), "damaged or cut short"),
    "cut.tif": (half(noisy("TIFF")), "damaged or cut short"),
    "cut-lzw.tif": (half(noisy("TIFF", compression="tiff_lzw")), "damaged or cut short"),
    "cut.avif": (half(noisy("AVIF")), "damaged or cut short"),
    "cut.gif": (half(noisy("GIF")), "damaged or cut short"),
    "start.avif": (noisy("AVIF")[:40], "damaged or cut short"),
    "start.jpg": (noisy("JPEG")[:20], "damaged or cut short"),
    "start.png": (noisy("PNG")[:12], "damaged or cut short"),
    "crc.png": (bad_crc(), "damaged or cut short"),
    "zlib.png": (bad_zlib(), "damaged or cut short"),
    "header.tif": (tiff_without_pixels(), "damaged or cut short"),
    "zero.png": (gray_png(0, 0), "too few|damaged or cut short"),
    "short.png": (gray_png(512, 512), "damaged or cut short"),
    "bomb.png": (gray_png(30_000, 30_000), "decompression bomb"),
    "just-beyond-the-limit.png": (gray_png(10_000, 9_000), "decompression bomb"),
    "tiny.png": (encoded(Image.new("RGB", (7, 100)), "PNG"), r"7x100 pixels \(width x height\) are too few"),
    "nan.tif": (
        encoded(Image.fromarray(np.full((8, 8), np.nan, np.float32)), "TIFF"),
        "are NaN or infinite: replace",
    ),
    "hdr.tif": (encoded(Image.fromarray(np.full((8, 8), 4, np.float32)), "TIFF"), "float pixels from 4 to 4"),
    "int32.tif": (
        encoded(Image.fromarray(np.full((8, 8), -3, np.int32)), "TIFF"),
        "32-bit integer pixels from -3",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_file_is_a_image_error(tmp_path, capfd, name):
    data, reason = BROKEN[name]
    path = tmp_path / name
    path.write_bytes(data)

    for read in (read_image, read_pixels, to_image):
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a warning would be a second line
            with pytest.raises(ImageError, match=reason) as caught:
                read(path)
        message = str(caught.value)
        assert message.startswith(f"{path}: ") and "\n" not in message and len(message) < 500
    with pytest.raises(ImageError, match=rf"^photo 7: .*({reason})"):
        read_image(data, name="photo 7")
    if name != "cut-lzw.tif":  # where libtiff itself prints a line
        assert capfd.readouterr().err == ""


def test_any_damage_is_a_image_error_or_still_a_image():
    exif = Image.Exif()
    exif[0x0112] = 6
    extras = {"exif": exif, "icc_profile": icc_profile(b"RGB ", 1.0, SRGB_PRIMARIES)}
    files = [noisy(form, **extras) for form in ("JPEG", "PNG", "WEBP", "AVIF", "TIFF")]
    files += [noisy(form) for form in ("GIF", "BMP", "PPM")]
    rng = np.random.default_rng(0)
    num_refused = 0
    for data in files * 12:
        damaged = bytearray(data)
        for _ in range(rng.integers(1, 9)):
            damaged[rng.integers(min(300, len(data)))] = rng.integers(256)  # headers and tags, mostly
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # damaged profiles are ignored with a warning
                image = read_image(bytes(damaged))
        except ImageError as error:
            assert "\n" not in str(error)
            num_refused += 1
        else:
            assert image.shape[0] == 3 and image.abs().max() <= 1
    assert 20 < num_refused < len(files) * 12 - 10


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(ImageError, match=r"gone\.jpg: no such file"):
        read_image(tmp_path / "gone.jpg")
    with pytest.raises(ImageError, match="a folder, not an image"):
        read_image(tmp_path)


def test_file_without_permission(tmp_path):
    path = tmp_path / "locked.png"
    path.write_bytes(encoded(Image.fromarray(photo()), "PNG"))
    read_image(path)
    path.chmod(0)
    user = os.geteuid()
    try:
        if user == 0:  # root reads everything, so be nobody for a moment
            os.seteuid(65534)
    except OSError:
        pytest.skip("root reads everything, and may not become another user here")
    try:
        with pytest.raises(ImageError, match=r"locked\.png: permission denied$"):
            read_image(path)
    finally:
        os.seteuid(user)


def test_other_things_are_no_image():
    for thing in (3, None, object()):
        with pytest.raises(ImageError, match=f"a {type(thing).__name__} is no image: give a path"):
            to_image(thing)


def test_unknown_mode_is_refused():
    unknown = Image.new("La", (8, 8))

    with pytest.raises(ImageError, match="La"):
        read_image(unknown)


def test_caller_keeps_a_file_it_opened(tmp_path):
    good, bad = io.BytesIO(encoded(Image.fromarray(photo()), "PNG")), io.BytesIO(b"nothing")

    read_image(good)
    with pytest.raises(ImageError):
        read_image(bad)

    assert not good.closed and not bad.closed


def test_pipe_is_read(tmp_path):
    data = encoded(Image.fromarray(photo(8, 8)), "PNG")
    reader, writer = os.pipe()
    os.write(writer, data)
    os.close(writer)

    with os.fdopen(reader, "rb") as pipe:
        assert read_image(pipe).shape == (3, 8, 8)


# From memory, and back


def test_arrays_and_tensors_become_the_image_of_the_file():
    image = signed(photo())

    for thing in (
        photo(),
        photo().astype(np.uint16) * 257,
        photo() / 255,
        (photo() / 255).astype(np.float32),
        image,
        image.double(),
        Image.fromarray(photo()),
    ):
        torch.testing.assert_close(to_image(thing), image, atol=1e-6, rtol=0)
    assert to_image(photo()[:, :, 0]).shape == (3, HEIGHT, WIDTH)
    assert to_image(photo()[::-1, ::-1]).shape == (3, HEIGHT, WIDTH)  # negative strides
    assert to_image(image, channels=4)[3].eq(1).all()
    half_precision = to_image(image.bfloat16())
    assert half_precision.dtype == torch.float32


def test_to_image_leaves_its_argument_alone():
    array, tensor = (photo() / 255).astype(np.float32), signed(photo())
    before = array.copy(), tensor.clone()

    to_image(array).zero_()
    to_image(array, channels=1)
    to_image(tensor, channels=1)

    assert np.array_equal(array, before[0]) and torch.equal(tensor, before[1])


@pytest.mark.parametrize(
    "thing, message",
    [
        (np.zeros((8, 8, 5), np.uint8), r"shape \(8, 8, 5\)"),
        (np.zeros((0, 8, 3), np.uint8), r"shape \(0, 8, 3\)"),
        (np.zeros((8, 8, 3), np.int64), "a int64 array is no image: give uint8, uint16 or floats"),
        (np.full((8, 8, 3), 200.0), r"must be in \[0, 1\], and this one spans 200 to 200"),
        (np.full((8, 8, 3), np.nan), r"must be in \[0, 1\]"),
        (torch.zeros(1, 3, 8, 8), r"shape \(1, 3, 8, 8\) is no image: give \(C, H, W\)"),
        (torch.zeros(8, 8, 3), r"shape \(8, 8, 3\)"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), r"give floats in \[-1, 1\], such as x / 127.5 - 1"),
        (torch.full((3, 8, 8), 255.0), r"must be in \[-1, 1\], and this one spans 255 to 255"),
        (torch.full((3, 8, 8), torch.nan), r"must be in \[-1, 1\]"),
    ],
)
def test_to_image_refuses_what_it_would_have_to_guess(thing, message):
    with pytest.raises(ValueError, match=message):
        to_image(thing)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_to_pil_and_back_is_exact(channels):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, channels), np.uint8)
    image = torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1

    pil = to_pil(image)

    assert pil.mode == {1: "L", 3: "RGB", 4: "RGBA"}[channels]
    assert np.array_equal(np.array(pil).reshape(pixels.shape), pixels)
    torch.testing.assert_close(read_image(pil, channels=channels), image, atol=1e-6, rtol=0)


def test_to_pil_clamps_and_refuses():
    assert np.array(to_pil(torch.tensor([-3.0, 3.0, 0.0]).view(3, 1, 1))).tolist() == [[[0, 255, 128]]]
    with pytest.raises(ValueError, match="NaN or infinite"):
        to_pil(torch.full((3, 8, 8), torch.nan))
    with pytest.raises(ValueError, match=r"\(2, 3, 8, 8\) is not one image"):
        to_pil(torch.zeros(2, 3, 8, 8))
    with pytest.raises(ValueError, match=r"a torch\.int64 tensor is no image"):
        to_pil(torch.zeros(3, 8, 8, dtype=torch.int64))
    assert np.array(to_pil(torch.full((1, 8, 8), 7, dtype=torch.uint8))).max() == 7


@pytest.mark.parametrize("suffix", [".png", ".webp", ".tif", ".TIFF", ".jpg", ".avif"])
def test_written_image_reads_back(tmp_path, suffix):
    path = tmp_path / f"new/image{suffix}"

    write_image(signed(photo()), path)

    lossy = suffix in (".jpg", ".avif")
    assert np.abs(levels(read_image(path)) - photo()).max() <= (8 if lossy else 1e-3)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_transparent_pixels_survive_writing(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 4), np.uint8)
    for suffix in (".png", ".webp", ".tif"):
        write_image(Image.fromarray(pixels), tmp_path / f"a{suffix}")
        assert np.array_equal(
            read_pixels(tmp_path / f"a{suffix}", channels=4).permute(1, 2, 0).numpy(), pixels
        )
    with pytest.raises(ValueError, match="JPEG holds no transparency"):
        write_image(Image.fromarray(pixels), tmp_path / "a.jpg")


def test_unknown_suffix_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"cannot write a \.xyz; use \.png, \.jpg"):
        write_image(signed(photo()), tmp_path / "a.xyz")
    with pytest.raises(ValueError, match="cannot write a file without suffix"):
        write_image(signed(photo()), tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_full_disk_leaves_the_old_image(tmp_path):
    path = tmp_path / "a.png"
    write_image(torch.zeros(3, 8, 8), path)
    before = path.read_bytes()
    noise = torch.rand(3, 256, 256) * 2 - 1
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))  # as a full disk: write() fails
        with pytest.raises(OSError):
            write_image(noise, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.png"]


# Shaping


@pytest.mark.parametrize(
    "size, padded", [((8, 8), (8, 8)), ((9, 15), (16, 16)), ((3, 1), (8, 8)), ((17, 8), (24, 8))]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_padding_repeats_the_edge_and_crops_back_exactly(size, padded, dtype):
    image = torch.rand(2, 3, *size).to(dtype)

    for form in (image, image[0]):
        result = pad_to_multiple(form, 8)
        assert result.shape[-2:] == padded
        assert torch.equal(result[..., : size[0], : size[1]], form)
        assert (result[..., size[0] :, :] == result[..., size[0] - 1 : size[0], :]).all()
        assert (result[..., :, size[1] :] == result[..., :, size[1] - 1 : size[1]]).all()


def test_center_crop():
    image = torch.arange(30.0).view(1, 5, 6)

    assert center_crop(image, (3, 2)).tolist() == [[[8, 9], [14, 15], [20, 21]]]
    assert center_crop(image.expand(2, 1, 5, 6), 5).shape == (2, 1, 5, 5)
    with pytest.raises(ValueError, match=r"cannot crop 6x6 \(height x width\) out of 5x6"):
        center_crop(image, 6)


def test_find_images_walks_sorted_and_skips_the_rest(tmp_path):
    for name in ("b/2.png", "b/1.JPG", "a.webp", "notes.txt", ".hidden.png", ".cache/x.png", "b/c/3.tif"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()

    found = [path.relative_to(tmp_path).as_posix() for path in find_images(tmp_path)]

    assert found == ["a.webp", "b/1.JPG", "b/2.png", "b/c/3.tif"]
    assert find_images([tmp_path / "notes.txt"]) == [tmp_path / "notes.txt"]  # a file is taken as given
    assert find_images([str(tmp_path / "b/c"), tmp_path / "a.webp"]) == [
        tmp_path / "b/c/3.tif",
        tmp_path / "a.webp",
    ]
    with pytest.raises(ImageError, match="gone: no such file or folder"):
        find_images([tmp_path / "gone"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ImageError, match=r"no images in .*empty"):
        find_images(tmp_path / "empty")


def test_grid_places_images_row_by_row():
    images = [torch.full((1, 4, 4), -1.0), torch.zeros(3, 2, 6), Image.new("RGBA", (4, 4), (255, 0, 0, 0))]

    grid = image_grid(images, columns=2, gap=1, background=(9, 8, 7))

    assert grid.size == (6 + 1 + 6, 4 + 1 + 4)
    assert grid.getpixel((1, 0)) == (0, 0, 0) and grid.getpixel((0, 0)) == (9, 8, 7)  # centered in its cell
    assert grid.getpixel((7, 1)) == (128, 128, 128) and grid.getpixel((7, 0)) == (9, 8, 7)
    assert grid.getpixel((1, 5)) == (9, 8, 7)  # transparent
    assert hstack_images(images[:2], gap=3).size == (6 + 3 + 6, 4)
    with pytest.raises(ValueError, match="a grid needs images"):
        image_grid([], 2)
