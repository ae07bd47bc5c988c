"""What goes with the compressed file of an image in units of its own, NAME.lcr next to NAME.lcf: the units, and an error bound.

    decoded image --origin.stored--> values --+ residual * step--> values, each at most `max_error` from the original

Residuals are quantized uniformly, as near-lossless JPEG-LS (ITU-T T.87) does: integers in steps of 2 E + 1, so that no value is
off by more than E. The codec's network decodes again; where another machine rounds otherwise, a hash of its values tells.

A safetensors file: `residuals` is an LZMA stream of the steps (zigzag, a plane for each byte), the rest is metadata.
"""

import hashlib
import json
import lzma
import math
from dataclasses import dataclass

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from latent_codec.errors import SettingError
from latent_codec.images.origins import Origin, RangeOrigin, UnknownOriginError, as_type, origin_from_json

SUFFIX = ".lcr"
FORMAT = "latent-codec correction"
VERSION = "1"
_FILTERS = [{"id": lzma.FILTER_LZMA2, "dict_size": 2**22, "lc": 4, "lp": 0, "pb": 0}]


@dataclass(frozen=True)
class Correction:
    """What `read_correction` found."""

    origin: Origin
    max_error: float | None
    """In the image's unit; None: there are no residuals, as of all that is no RangeOrigin."""
    step: float
    """Of residuals, in values as they are stored."""
    compressed: str
    """SHA-256 of the compressed file."""
    decoded: str
    """Of the values that the residuals are added to."""
    residuals: bytes

    def apply(self, image: Tensor) -> tuple[np.ndarray, bool]:
        """The values of a decoded image, (C, H, W) in [-1, 1], as its file stores them, and whether the bound is certain.

        Raises:
            ValueError: for an origin that is no RangeOrigin; residuals of an image of another size, or damaged ones.
        """
        if not isinstance(self.origin, RangeOrigin):
            raise ValueError(f"expected an image of gray values, got {self.origin.describe()}")
        values = self.origin.stored(image)
        if self.max_error is None:
            return values, True
        return _added(values, _unpacked(self.residuals, values.shape), self.step), _hash(
            values
        ) == self.decoded


def make_correction(
    origin: Origin,
    compressed: bytes,
    decoded: Tensor | None = None,
    original: np.ndarray | None = None,
    max_error: float | None = None,
) -> bytes:
    """The content of a file that gives a compressed image its units, and with `max_error` bounds what it is off by.

    Args:
        compressed: the content of the compressed file.
        decoded: the image that it decodes to, (C, H, W) in [-1, 1]; for a bound.
        original: values as their file stores them, (H, W); for a bound.
        max_error: in the image's unit.

    Raises:
        SettingError: for a bound that is no number from 0, or 0 of floats.
    """
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "compressed": hashlib.sha256(compressed).hexdigest(),
        "origin": json.dumps(origin.to_json(), sort_keys=True),
    }
    residuals = b""
    if max_error is not None:
        if not 0 <= max_error < math.inf:
            raise SettingError("max_error", "a number from 0", max_error)
        if decoded is None or original is None or not isinstance(origin, RangeOrigin):
            raise ValueError("expected gray values, the decoded image and the original for a bound")
        values = origin.stored(decoded)
        step = _step(origin, max_error)
        difference = original.astype(np.float64) - values.astype(np.float64)
        steps = np.rint(difference / step).astype(np.int64)
        residuals = _packed(steps)
        found = _added(values, steps, step).astype(np.float64)
        error = np.abs(found - original).max() * abs(origin.slope)
        if error > max_error + 1e-6 * abs(origin.high - origin.low):  # of which float32 may round as much
            raise RuntimeError("a bound that was just made does not hold: please report this")
        metadata |= {"max_error": repr(float(max_error)), "step": repr(step), "decoded": _hash(values)}
    return save({"residuals": torch.from_numpy(np.frombuffer(residuals, np.uint8).copy())}, metadata)


def _step(origin: RangeOrigin, max_error: float) -> float:
    """Between residuals, in stored values."""
    stored = max_error / abs(origin.slope)
    if np.issubdtype(origin.dtype, np.integer):
        return float(2 * math.floor(stored + 1e-9) + 1)
    if not stored:
        raise SettingError("max_error", "a number above 0 for values that are floats", max_error)
    return 2 * stored


def read_correction(content: bytes) -> Correction:
    """Read what `make_correction` wrote.

    Raises:
        ValueError: for anything else, and damaged content.
    """
    try:
        end = 8 + int.from_bytes(content[:8], "little")
        metadata = json.loads(content[8:end]).get("__metadata__", {})
        if metadata.get("format") != FORMAT:
            raise ValueError("it is no correction of a compressed file")
        if metadata.get("version") != VERSION:
            raise ValueError(
                f"expected version {VERSION}, got {metadata.get('version')}; update latent-codec"
            )
        origin = origin_from_json(json.loads(metadata["origin"]))
        residuals = load(content)["residuals"].numpy().tobytes()
        bound, step = metadata.get("max_error"), float(metadata.get("step", 1))
        max_error = None if bound is None else float(bound)
        has_bound = isinstance(origin, RangeOrigin) and 0 <= (max_error or 0) < 1e30
        if not (has_bound or max_error is None) or not 0 < step < 1e30:
            raise ValueError("its origin or its step is malformed")
        return Correction(
            origin, max_error, step, metadata["compressed"], metadata.get("decoded", ""), residuals
        )
    except UnknownOriginError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError, SafetensorError) as error:
        raise ValueError(f"its correction is damaged: {error}") from None


def _hash(values: np.ndarray) -> str:
    return hashlib.sha256(values.astype(values.dtype.newbyteorder("<")).tobytes()).hexdigest()


def _added(values: np.ndarray, steps: np.ndarray, step: float) -> np.ndarray:
    return as_type(values.astype(np.float64) + steps * step, values.dtype.name)


def _packed(steps: np.ndarray) -> bytes:
    """Integers as bytes: small ones of either sign become small ones (zigzag), least significant bytes first."""
    zigzag = (steps << 1) ^ (steps >> 63)
    planes = max(-(-int(zigzag.max(initial=0)).bit_length() // 8), 1)
    content = b"".join((zigzag >> (8 * plane) & 255).astype(np.uint8).tobytes() for plane in range(planes))
    return bytes([planes]) + lzma.compress(content, lzma.FORMAT_RAW, filters=_FILTERS)


def _unpacked(packed: bytes, shape: tuple[int, ...]) -> np.ndarray:
    planes, count = (packed[0] if packed else 0), math.prod(shape)
    if not 1 <= planes <= 7:
        raise ValueError("its correction is damaged: residuals of no known size")
    wanted = planes * count
    try:
        content = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=_FILTERS).decompress(packed[1:], wanted + 1)
    except lzma.LZMAError as error:
        raise ValueError(f"its correction is damaged: {error}") from None
    if len(content) != wanted:
        raise ValueError(
            f"its correction is damaged: expected residuals of {'x'.join(map(str, shape))} pixels"
        )
    found = np.frombuffer(content, np.uint8).reshape(planes, *shape).astype(np.int64)
    zigzag = sum((found[plane] << (8 * plane) for plane in range(planes)), np.zeros(shape, np.int64))
    return (zigzag >> 1) ^ -(zigzag & 1)
