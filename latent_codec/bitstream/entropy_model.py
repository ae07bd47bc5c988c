"""What an entropy model is to a compressed file: which values make a pass, and which table each value has."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from latent_codec.bitstream.tables import Tables

Shape = tuple[int, int, int]
"""(channels, h, w) of a tile's part of a level."""


@dataclass(frozen=True)
class Pass:
    """Values, or one binary digit of each, that are coded together: the table of none of them depends on another."""

    level: int
    positions: np.ndarray
    """int64: places in the level's flattened array (channels, h, w), in the order of coding."""
    layer: int
    """A tile's passes of one layer make one section of the file; layers count up from 0 without gaps."""
    bit: int | None = None
    """Which binary digit of the values is coded, as a symbol 0 or 1; None: the values themselves."""


@dataclass(frozen=True)
class Prediction:
    """Where the values of a pass, or of whole levels, are expected: value - offset has the chances of the numbered table."""

    numbers: np.ndarray
    """int64: of the tables."""
    offsets: np.ndarray
    """int64, same shape; 0 where binary digits are coded."""


@dataclass(frozen=True)
class CodedPass:
    """What the coder gets of a pass."""

    layer: int
    values: np.ndarray
    """int64, flat: less their offsets, or binary digits."""
    numbers: np.ndarray
    """int64, flat: of the tables."""


class Predictor(Protocol):
    """Chances of the values of one tile, pass by pass, as numbers of integer tables.

        values of earlier passes --predict--> tables and offsets --rans--> values of the next pass --> ...

    Whatever computes `predict` must give the same integers on every machine, so that it is integer arithmetic,
    or float arithmetic that is exact. It is called for every pass in turn.
    """

    passes: Sequence[Pass]
    """Every value exactly once, or every binary digit, the highest first; as many layers for all shapes of as many levels,
    of which some may be empty."""

    def predict(self, number: int, values: Sequence[np.ndarray]) -> Prediction:
        """Of what pass `number` codes.

        Args:
            values: int64 (channels, h, w) for each level, where passes before `number` stand.
        """


class EntropyModel(Protocol):
    """What says how likely values are: levels of a ScalarQuantizer, or codebook indices.

    Values may be coded under other numbers, `codes`, so that binary digits mean something.
    """

    tables: Tables
    space_fingerprint: str
    """Of the codec that it was fitted to."""

    @property
    def fingerprint(self) -> str:
        """16 hex digits over everything that decoding depends on."""

    def predictor(self, shapes: Sequence[Shape], steps_index: int) -> Predictor:
        """For a tile of these shapes.

        Args:
            steps_index: which step sizes quantised latents have; 0 for indices.
        """

    def codes(self, values: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Of values, int64 arrays of the same shapes."""

    def values(self, codes: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The inverse of `codes`; -1 for a code that no value has."""


class LatentEntropyModel(EntropyModel, Protocol):
    """An entropy model of latents also says how they become levels, and levels latents; codes are the levels themselves."""

    steps: np.ndarray
    """float32 (num_steps, channels), falling, in the latents' unit."""
    shifts: np.ndarray
    """float32, flat like `tables.starts`: what lies between a level and the mean of its latents, in steps."""

    @property
    def num_steps(self) -> int:
        """Step sizes to choose from; higher is finer."""
