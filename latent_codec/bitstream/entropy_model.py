"""The entropy model of a codec's values: for each symbol, pass by pass, a frequency table (CDF) and an offset.

Values are quantized latents or codebook indices. The entropy coder codes symbols: the values themselves or, where a model
says so, other integers in their place.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import numpy as np
from safetensors.numpy import save_file

from latent_codec import deprecated
from latent_codec.bitstream.checks import check, check_array
from latent_codec.bitstream.tables import Tables
from latent_codec.files import replacing

FILE_NAME = "entropy.safetensors"
FORMAT = "latent-codec-entropy"
VERSION = "1"
STORED_NAMES = {"step_sizes": "steps"}
"""Names in the file of fields that have another name here."""

Shape = tuple[int, int, int]
"""(channels, h, w) of a tile's part of a level."""


@dataclass(frozen=True)
class Pass:
    """A coding pass: symbols, or one binary digit of each, none of whose tables depends on another of them."""

    level: int
    positions: np.ndarray
    """int64: places in the level's flattened array (channels, h, w), in coding order."""
    layer: int
    """A tile's passes of one layer make one section of the file; layers count up from 0 without gaps."""
    bit: int | None = None
    """The binary digit that is coded, as a symbol 0 or 1; None: whole symbols."""


@dataclass(frozen=True)
class Prediction:
    """The frequency tables of a pass, or of whole levels: that of `cdf_index` gives the distribution of symbol - offset."""

    cdf_index: np.ndarray
    """int64: numbers of tables."""
    offsets: np.ndarray
    """int64, same shape; 0 where binary digits are coded."""


@dataclass(frozen=True)
class CodedPass:
    """The input of the entropy coder for one pass."""

    layer: int
    symbols: np.ndarray
    """int64, flat: less their offsets, or binary digits."""
    cdf_index: np.ndarray
    """int64, flat: numbers of their tables."""


class Predictor(Protocol):
    """Predicts the symbols of one tile, pass by pass.

        symbols of earlier passes --predict--> tables and offsets --rans--> symbols of the next pass --> ...

    `predict` must give the same integers on every machine: it uses integer arithmetic, or float arithmetic that is exact.
    It is called for every pass in turn.
    """

    passes: Sequence[Pass]
    """Cover every symbol once, or every binary digit, the highest first. Shapes of as many levels have as many layers,
    of which some may be empty."""

    def predict(self, number: int, symbols: Sequence[np.ndarray]) -> Prediction:
        """Predict pass `number`.

        Args:
            symbols: int64 (channels, h, w) for each level, which hold those of the passes before `number`.
        """


@dataclass(frozen=True, kw_only=True, eq=False)
class EntropyModel:
    """An entropy model in integers, as its file holds it.

    Raises:
        ValueError: for arrays that do not fit each other.
    """

    kind: ClassVar[str]
    """In the file's metadata."""
    parts: ClassVar[dict[str, Any]] = {}
    """Fields that are tuples, with the class of what they hold, which has `arrays(name)` and `from_arrays(arrays, name)`."""

    tables: Tables
    space_fingerprint: str
    """Of the codec that it was fitted to."""
    codec_name: str
    """For messages."""
    step_sizes: np.ndarray | None = None
    """float32 (num_step_sizes, channels), falling, in the latents' unit; None for indices."""
    shifts: np.ndarray | None = None
    """float32, flat like `tables.starts`: from a quantized latent to the mean of its latents, in steps; None for indices."""

    def __post_init__(self):
        are_both = (self.step_sizes is None) == (self.shifts is None)
        check(are_both, "step sizes and shifts, of latents, or neither, of indices", "one of them")
        if self.is_indices:
            return
        check_array(self.step_sizes, "step_sizes", np.float32, (None, None))
        check_array(self.shifts, "shifts", np.float32, self.tables.starts.shape)
        for array in (self.step_sizes, self.shifts):
            check(bool(np.isfinite(array).all()), "finite step sizes and shifts", "others")
        check(not (self.step_sizes <= 0).any(), "step sizes above 0", self.step_sizes.min(initial=np.inf))

    steps = deprecated.attribute("steps", "step_sizes")
    num_steps = deprecated.attribute("num_steps", "num_step_sizes")

    @property
    def is_indices(self) -> bool:
        return self.step_sizes is None

    @property
    def num_step_sizes(self) -> int:
        """Step sizes to choose from, each finer than the one before; 0 for indices."""
        return 0 if self.is_indices else len(self.step_sizes)

    def predictor(self, shapes: Sequence[Shape], step_size_index: int) -> Predictor:
        """The predictor of a tile of these shapes; `step_size_index` is 0 for indices."""
        raise NotImplementedError

    def to_symbols(self, values: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The symbols of values, int64 arrays of the same shapes: the values themselves, unless a subclass codes others."""
        return list(values)

    def from_symbols(self, symbols: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The inverse of `to_symbols`; -1 for a symbol of no value."""
        return list(symbols)

    def arrays(self) -> dict[str, np.ndarray]:
        """All that decoding depends on but the space fingerprint, by the names in the file."""
        own = {STORED_NAMES.get(name, name): getattr(self, name) for name in self._array_fields()}
        found = self.tables.arrays() | {name: array for name, array in own.items() if array is not None}
        for name in self.parts:
            for number, part in enumerate(getattr(self, name)):
                found |= part.arrays(f"{name}.{number}")
        return found

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray], **names: str) -> Self:
        """The inverse of `arrays`, which are taken out one by one; `names` are space_fingerprint and codec_name.

        Raises:
            KeyError: for a missing array.
            ValueError: for arrays that do not fit each other.
        """
        taken: dict[str, Any] = {"tables": Tables.from_arrays(arrays)}
        for name, default in cls._array_fields().items():
            stored = STORED_NAMES.get(name, name)
            taken[name] = arrays.pop(stored) if default is MISSING else arrays.pop(stored, default)
        for name, kind in cls.parts.items():
            count = len({key.split(".")[1] for key in arrays if key.startswith(f"{name}.")})
            taken[name] = tuple(kind.from_arrays(arrays, f"{name}.{number}") for number in range(count))
        return cls(**taken, **names)

    @classmethod
    def _array_fields(cls) -> dict[str, object]:
        """Names of the fields that are arrays, with their defaults."""
        kinds = (np.ndarray, np.ndarray | None)
        return {each.name: each.default for each in fields(cls) if each.type in kinds}

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits over all arrays and the codec's space: everything that decoding depends on."""
        digest = hashlib.sha256(f"{self.kind} {self.space_fingerprint}\n".encode())
        for name, array in sorted(self.arrays().items()):
            little_endian = array.astype(array.dtype.newbyteorder("<"))
            digest.update(f"{name} {array.dtype.name} {array.shape}\n".encode() + little_endian.tobytes())
        return digest.hexdigest()[:16]

    def save(self, path: str | os.PathLike) -> None:
        """Write the file, complete or not at all; of a folder its `entropy.safetensors`.

        Raises:
            OSError: if it cannot be written.
        """
        metadata = {
            "format": FORMAT,
            "version": VERSION,
            "kind": self.kind,
            "codec": self.codec_name,
            "space_fingerprint": self.space_fingerprint,
        }
        with replacing(sidecar_path(path)) as written:
            save_file(self.arrays(), written, metadata)


def sidecar_path(path: str | os.PathLike) -> Path:
    """`path`, or the entropy model in it if it is a folder."""
    path = Path(path)
    return path / FILE_NAME if path.is_dir() else path
