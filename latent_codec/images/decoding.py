"""An image file's pixels, upright and in sRGB, or an ImageError that says in one line what the file is instead."""

import errno
import io
import logging
import os
import stat
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError

from latent_codec.files import special_kind

logger = logging.getLogger(__name__)

# Raster formats that Pillow may try (MPO, which phones write, opens as JPEG). Left out are
# those that start other programs (EPS, WMF), that are stubs for other programs' plugins (BUFR, GRIB, HDF5, MPEG), that
# open what they hold as any format (IPTC) or inflate without bound (FITS), and those that no photograph is kept in.
_MARKED = (
    *("JPEG", "PNG", "WEBP", "AVIF", "TIFF", "GIF", "BMP", "PPM", "JPEG2000", "ICO", "CUR", "ICNS", "PSD"),
    *("PCX", "DCX", "DDS", "QOI", "SGI", "SUN", "XBM", "XPM", "MSP", "BLP", "FTEX", "FLI", "PIXAR"),
)
# Formats without a mark at their start: many a file looks like one, so that only the suffix tells.
_UNMARKED = ("PCD", "DIB", "GBR", "TGA")
FORMATS = (*_MARKED, *_UNMARKED)
SUFFIXES = frozenset(
    suffix for suffix, form in Image.registered_extensions().items() if form in (*FORMATS, "MPO")
)

# Images that are not read, by suffix.
UNSUPPORTED_SUFFIXES = frozenset(
    {".heic", ".heif", ".hif", ".jxl"}
    | {".svg", ".svgz", ".eps", ".ps", ".ai", ".wmf", ".emf"}  # drawings
    | {".fits", ".fit", ".exr", ".hdr"}  # science's and film's floats
    | {".dng", ".nef", ".cr2", ".cr3", ".arw", ".orf", ".rw2", ".raf", ".pef", ".srw"}  # raw data of cameras
)
_UNSUPPORTED_STARTS = (b"\xff\x0a", b"\0\0\0\x0cJXL ", b"<svg", b"%!PS", b"\xc5\xd0\xd3\xc6", b"v/1\x01")

MIN_SIDE = 8

# Formats whose further frames are images of their own; those of MPO and PSD are parts of the first.
_FRAMED = ("PNG", "WEBP", "AVIF", "TIFF", "GIF", "DCX", "FLI")
_MAX_FRAMED_NAMES = 5

# What a file that is no image may start with, in lower case, and what that makes it.
_FOREIGN = {
    b"%pdf": "a PDF document",
    b"<svg": "an SVG drawing: render it to PNG first",
    b"<?xml": "XML (an SVG drawing?): render it to PNG first",
    b"<!doctype": "a web page, so probably a failed download",
    b"<html": "a web page, so probably a failed download",
    b"\x93numpy": "a NumPy array (.npy)",
    b"\x1f\x8b": "gzip data: unpack it first",
    b"version https://git-lfs": "a Git LFS pointer: run `git lfs pull`",
}
NO_FILE = "no such file"
_REASONS = {
    FileNotFoundError: NO_FILE,
    IsADirectoryError: "a folder, not an image",
    PermissionError: "permission denied",
    MemoryError: "does not fit into memory",
}
_IMAGE_STARTS = (b"\xff\xd8\xff", b"\x89PNG", b"RIFF", b"II*\0", b"MM\0*", b"GIF8", b"BM")
_HEIC_BRANDS = (b"heic", b"heix", b"hevc", b"mif1", b"msf1")

# EXIF orientation -> swap rows and columns, then flip rows, flip columns.
_ORIENTATIONS = {
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}

Source = str | os.PathLike | bytes | BinaryIO | Image.Image


class ImageError(ValueError):
    """An image that cannot be read; the message is one line and names the file."""


def decode_pixels(
    source: Source, name: str | None, value_range: tuple[float, float] | None = None
) -> np.ndarray:
    """Pixels of an image, upright and in sRGB: (H, W, 1 to 4), uint8, uint16 or float32 in [0, 1].

    The last of two or four channels is alpha.

    Args:
        value_range: what is black and what is white in gray of more than 8 bits, whose color profile is then ignored;
            None: 0 and the largest number of 16 bits, or 1 for floats.
    """
    name = name or name_of(source)
    with opened(source, name) as image:
        if min(image.size) < MIN_SIDE:
            size = f"{image.width}x{image.height} pixels (width x height)"
            raise ImageError(f"{name}: {size} are too few, an image has at least {MIN_SIDE}x{MIN_SIDE}")
        _note_frames(image, name)
        image.load()
        pixels = _pixels(image, name, value_range)
        swap, flip_rows, flip_columns = _ORIENTATIONS.get(_orientation(image), (False, False, False))
    if swap:
        pixels = pixels.swapaxes(0, 1)
    return pixels[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1]


@contextmanager
def opened(source: Source, name: str) -> Iterator[Image.Image]:
    """Open an image lazily; whatever goes wrong with it inside the block becomes an ImageError.

    Pillow's decoders raise what they trip over (OSError, SyntaxError, ValueError, struct.error, KeyError,
    zlib.error ...), so every Exception counts as a damaged image.
    """
    closing = ExitStack()
    try:
        if isinstance(source, Image.Image):
            yield source
            return
        file = _open_file(source, closing)
        start = file.tell()
        if not file.read(1):
            raise ImageError(f"{name}: the file is empty")
        file.seek(start)
        with without_warnings():
            image = Image.open(file, formats=FORMATS)
        # NewSubfileType: of reduced resolution.
        if image.format == "TIFF" and image.tag_v2.get(0x00FE, 0) & 1:
            what = "raw data of a camera, of which only a thumbnail can be read"
            raise ImageError(f"{name}: {what}: save it as 16-bit TIFF or PNG")
        # Above its limit Pillow warns, and only above twice that it raises; here the limit itself holds.
        if Image.MAX_IMAGE_PIXELS and image.width * image.height > Image.MAX_IMAGE_PIXELS:
            raise Image.DecompressionBombError
        yield image
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        file.seek(start)
        raise ImageError(f"{name}: {_what_it_is(file.read(512))}") from error
    except Exception as error:
        raise ImageError(f"{name}: {_reason(error)}") from error
    finally:
        closing.close()


_framed_names: set[str] = set()


def _note_frames(image: Image.Image, name: str) -> None:
    """Say once of an image with several frames that the first is taken; of many such images, of the first few."""
    if image.format not in _FRAMED or len(_framed_names) > _MAX_FRAMED_NAMES or name in _framed_names:
        return
    if getattr(image, "is_animated", False):
        _framed_names.add(name)
        more = "; so it is with further images" if len(_framed_names) > _MAX_FRAMED_NAMES else ""
        logger.warning("Note: %s has several frames; the first is taken%s", printable(name), more)


def is_known_by_content(file: BinaryIO) -> bool:
    """Whether a file, by its first bytes and header, is an image in one of the formats that mark their start."""
    try:
        with without_warnings(), Image.open(file, formats=_MARKED):
            return True
    except Exception:  # as in `opened`: Pillow raises what it trips over
        return False


def is_unsupported(head: bytes) -> bool:
    """Whether the first bytes of a file are those of an image in a format that is not read."""
    return head.startswith(_UNSUPPORTED_STARTS) or _is_heic(head)


def printable(name: str) -> str:
    """A name for a message: control characters, and bytes that are no UTF-8, as escapes."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in name)


_warning_filters = threading.Lock()


def _renew_lock() -> None:
    """A lock that another thread held during a fork would stay locked in the child for ever."""
    global _warning_filters
    _warning_filters = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


@contextmanager
def without_warnings() -> Iterator[None]:
    """Keep back Pillow's remarks about odd metadata, which name no file.

    Filters are global to the process, hence the lock: two threads could restore them in the wrong order.
    """
    with _warning_filters, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def name_of(source: Source) -> str:
    if isinstance(source, (str, os.PathLike)):
        return os.fspath(source)
    name = getattr(source, "filename", None) or getattr(source, "name", None)
    return str(name or f"<{type(source).__name__}>")


def _open_file(source: str | os.PathLike | bytes | BinaryIO, closing: ExitStack) -> BinaryIO:
    """A seekable binary file; if it was opened here, `closing` will close it."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        return io.BytesIO(source)
    if isinstance(source, (str, os.PathLike)):
        source = closing.enter_context(open_regular(source))
    elif not hasattr(source, "read"):
        advice = "give a path, bytes, a binary file or a PIL image"
        raise ImageError(f"a {type(source).__name__} is no image: {advice}")
    return source if source.seekable() else io.BytesIO(source.read())  # a pipe is not seekable


def open_regular(path: str | os.PathLike) -> BinaryIO:
    """Open a file to read its bytes; a named pipe, on which opening would wait for ever, or a device is refused.

    Raises:
        OSError: for what is no file, or cannot be opened.
    """
    mode = os.stat(path).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # of a folder `open` says so itself
        raise NotAFileError(errno.EINVAL, f"{special_kind(mode)}, not a file", os.fspath(path))
    return open(path, "rb")


class NotAFileError(OSError):
    """A path names a pipe, socket or device."""


def _is_heic(head: bytes) -> bool:
    return head[4:8] == b"ftyp" and head[8:12] in _HEIC_BRANDS


def _what_it_is(head: bytes) -> str:
    """What to say about a file that no decoder wants, by its first bytes."""
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for magic, what in _FOREIGN.items():
        if start.startswith(magic):
            return f"not an image but {what}"
    if head.startswith(b"PK\x03\x04"):
        return f"not an image but {_archive_kind(head)}"
    if _is_heic(head):
        return "HEIC cannot be read: save it as JPEG, PNG or AVIF"
    if head.startswith(_IMAGE_STARTS) or head[4:8] == b"ftyp":
        return "damaged or cut short: its header cannot be read"
    return f"not an image in a known format ({', '.join(FORMATS)})"


def _archive_kind(head: bytes) -> str:
    """What a ZIP archive is, by the name of its first entry."""
    first = head[30 : 30 + int.from_bytes(head[26:28], "little")]
    if first.endswith(b".npy"):
        return "a NumPy archive (.npz)"
    if first.endswith(b"/data.pkl"):
        return "a file of torch.save (.pt)"
    return "a ZIP archive: unpack it first"


def _reason(error: Exception) -> str:
    """Why an image could not be read, in one line."""
    for kind, reason in _REASONS.items():
        if isinstance(error, kind):
            return reason
    if isinstance(error, NotAFileError):
        return error.strerror
    if isinstance(error, OSError) and error.errno == errno.ELOOP:
        return "a symbolic link that leads back to itself"
    if isinstance(error, Image.DecompressionBombError):
        return (
            f"more than {Image.MAX_IMAGE_PIXELS} pixels, perhaps a decompression bomb: if you trust the file, "
            "cut it in parts, or raise PIL.Image.MAX_IMAGE_PIXELS in Python"
        )
    return f"damaged or cut short ({' '.join(str(error).split()) or type(error).__name__})"


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation tag (0x0112); 1, upright, where there is none or the EXIF block is broken."""
    try:
        with without_warnings():
            return image.getexif().get(0x0112, 1)
    except Exception:  # as in `opened`: Pillow raises what it trips over
        return 1


def gray_depth(image: Image.Image, name: str) -> str | None:
    """The type of a gray image's values, which has more than 8 bits: uint16, int32 or float32.

    None for every other image, and for one with a color profile, which is brought to sRGB in 8 bits.
    """
    if not _is_deep(image) or _srgb_conversion(image, "L", name) is not None:
        return None
    is_short = image.mode.startswith("I;16") or image.format in ("PPM", "PNG")
    return "float32" if image.mode == "F" else "uint16" if is_short else "int32"


def _is_deep(image: Image.Image) -> bool:
    return image.mode == "F" or image.mode.startswith("I")


def _pixels(image: Image.Image, name: str, value_range: tuple[float, float] | None) -> np.ndarray:
    """`decode_pixels` for a loaded image, before it is turned upright."""
    deep = _is_deep(image)
    if deep and value_range is not None:
        low, high = value_range
        values = finite_values(image, name).astype(np.float64)
        return ((values - low) / (high - low)).clip(0, 1).astype(np.float32)[:, :, None]
    gray = deep or image.mode in ("1", "L", "LA", "La")
    convert = _srgb_conversion(image, "L" if gray else "CMYK" if image.mode == "CMYK" else "RGB", name)

    if deep:
        pixels = _deep_pixels(image, name)
        if convert is None:
            return pixels[:, :, None]
        scale = 255 if pixels.dtype == np.float32 else 1 / 257
        image = Image.fromarray(np.rint(pixels * scale).astype(np.uint8))

    alpha = []
    if image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = [np.array(image)[:, :, 3:]]
    if convert is not None:
        image = convert(image)
    color = np.array(image.convert("L" if gray and convert is None else "RGB"))
    return np.concatenate([color.reshape(*color.shape[:2], -1), *alpha], axis=2)


def _deep_pixels(image: Image.Image, name: str) -> np.ndarray:
    """Gray of more than 8 bits, (H, W): uint16, or float32 in [0, 1]."""
    values = np.array(image)
    if image.mode.startswith("I;16"):
        return values.astype(np.uint16)
    if image.mode == "I" and image.format in ("PPM", "PNG"):  # which Pillow scales to 16 bits
        return values.clip(0, 65535).astype(np.uint16)
    if image.mode == "F" and values.min() >= 0 and values.max() <= 1:
        return values
    finite_values(image, name)
    raise ImageError(
        f"{name}: {'float' if image.mode == 'F' else '32-bit integer'} pixels from {values.min():.6g} to "
        f"{values.max():.6g} have no known white: save 8 or 16 bits, or floats in [0, 1], or state the value range"
    )


def finite_values(image: Image.Image, name: str) -> np.ndarray:
    """Pixels of a gray image as they are stored. Raises ImageError where they are not finite."""
    values = np.array(image)
    if not np.isfinite(values).all():
        raise ImageError(f"{name}: {count_of_nonfinite(values)}")
    return values


def count_of_nonfinite(values: np.ndarray) -> str:
    """What to say about an image with values that are not finite."""
    count = np.count_nonzero(~np.isfinite(values))
    what = f"{count:,} of {values.size:,} values are NaN or infinite"
    return f"{what}: replace them by a number first, as numpy.nan_to_num does"


def _srgb_conversion(image: Image.Image, kind: str, name: str):
    """A function that turns the image into sRGB by its ICC profile; None where nothing is to be done.

    Args:
        kind: what the pixels mean: "L", "RGB" or "CMYK". A gray image may carry an RGB profile.

    A profile that is broken or for other pixels is ignored with a warning.
    """
    profile = image.info.get("icc_profile")
    if not profile or image.mode == "LAB":  # Lab needs no profile: it is absolute
        return None
    try:
        mode, transform = _srgb_transform(profile)
        if mode != kind and (kind, mode) != ("L", "RGB"):
            raise ValueError(f"it is for {mode} pixels, these are {kind}")
    except Exception as error:  # LittleCMS's errors arrive as OSError, PyCMSError, ValueError ...
        detail = " ".join(str(error).split())
        warnings.warn(f"{name}: its color profile is ignored ({detail})", stacklevel=2)
        return None
    if transform is None:
        return None
    return lambda pixels: ImageCms.applyTransform(pixels.convert(mode), transform)


@lru_cache(maxsize=32)
def _srgb_transform(profile: bytes) -> tuple[str, ImageCms.ImageCmsTransform | None]:
    """The mode that a profile is for, and its transform to sRGB; None for sRGB itself.

    A profile that moves no color of a coarse cube by more than one level of 255 counts as sRGB, so that
    the many files that carry the standard profile keep their very pixels. The intent is the one that
    browsers use, relative colorimetric, with black point compensation.
    """
    opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    space = opened.profile.xcolor_space.strip()
    mode = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}.get(space)
    if mode is None:
        raise ValueError(f"it is for {space} pixels")
    transform = ImageCms.buildTransform(
        opened,
        ImageCms.createProfile("sRGB"),
        mode,
        "RGB",
        ImageCms.Intent.RELATIVE_COLORIMETRIC,
        ImageCms.Flags.BLACKPOINTCOMPENSATION,
    )
    if mode == "CMYK":
        return mode, transform
    levels = np.arange(0, 256, 17, dtype=np.uint8)
    cube = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(64, 64, 3)
    probe = Image.fromarray(cube if mode == "RGB" else cube[:, :, 0])
    before = np.array(probe.convert("RGB"), np.int16)
    after = np.array(ImageCms.applyTransform(probe, transform), np.int16)
    return mode, (transform if np.abs(after - before).max() > 1 else None)
