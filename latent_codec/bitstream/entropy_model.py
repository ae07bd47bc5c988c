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
    """Values that are coded together: the table of none of them depends on another."""

    level: int
    positions: np.ndarray
    """int64: places in the level's flattened array (channels, h, w), in the order of coding."""
    layer: int
    """A tile's passes of one layer make one section of the file; layers count up from 0 without gaps."""


@dataclass(frozen=True)
class Prediction:
    """Where the values of a pass, or of whole levels, are expected: value - offset has the chances of the numbered table."""

    numbers: np.ndarray
    """int64: of the tables."""
    offsets: np.ndarray
    """int64, same shape."""


class EntropyModel(Protocol):
    """Chances of the values of a tile, pass by pass, as numbers of integer tables.

        values of earlier passes --predict--> tables and offsets --rans--> values of the next pass --> ...

    Whatever computes `predict` must give the same integers on every machine, so that it is integer arithmetic,
    or float arithmetic that is exact. Values are levels of a ScalarQuantizer, or codebook indices.
    """

    tables: Tables
    space_fingerprint: str
    """Of the codec that it was fitted to."""

    @property
    def fingerprint(self) -> str:
        """16 hex digits over everything that decoding depends on."""

    def passes(self, shapes: Sequence[Shape]) -> list[Pass]:
        """Every value of a tile exactly once; as many layers for all shapes with as many levels, some may be empty."""

    def predict(
        self, passes: Sequence[Pass], number: int, values: Sequence[np.ndarray], steps_index: int
    ) -> Prediction:
        """Of each value of pass `number`.

        Args:
            passes: of the tile.
            values: int64 (channels, h, w) for each level, where passes before `number` stand.
            steps_index: which step sizes quantised latents have; 0 for indices.
        """


class LatentEntropyModel(EntropyModel, Protocol):
    """An entropy model of latents also says how they become levels, and levels latents."""

    steps: np.ndarray
    """float32 (num_steps, channels), falling, in the latents' unit."""
    shifts: np.ndarray
    """float32, flat like `tables.starts`: what lies between a level and the mean of its latents, in steps."""

    @property
    def num_steps(self) -> int:
        """Step sizes to choose from; higher is finer."""
