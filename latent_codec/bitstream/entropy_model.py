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


class EntropyModel(Protocol):
    """Chances of the values of a tile, pass by pass, as numbers of integer tables.

        values of earlier passes --table_numbers--> numbers of tables --rans--> values of the next pass --> ...

    Whatever computes `table_numbers` must give the same integers on every machine, so that it is integer arithmetic,
    or float arithmetic that is exact. Values are levels of a ScalarQuantizer, or codebook indices.
    """

    tables: Tables
    space_fingerprint: str
    """Of the codec that it was fitted to."""

    @property
    def fingerprint(self) -> str:
        """16 hex digits over everything that decoding depends on."""

    def passes(self, shapes: Sequence[Shape]) -> list[Pass]:
        """Every value of a tile exactly once; as many passes for all shapes with as many levels, some may be empty."""

    def table_numbers(
        self, passes: Sequence[Pass], number: int, values: Sequence[np.ndarray], steps_index: int
    ) -> np.ndarray:
        """The table of each value of pass `number`, int64 (n,).

        Args:
            passes: of the tile.
            values: int64 (channels, h, w) for each level, where passes before `number` stand; 0 elsewhere.
            steps_index: which step sizes quantised latents have; 0 for indices.
        """


class LatentEntropyModel(EntropyModel, Protocol):
    """An entropy model of latents also says how they become levels, and levels latents."""

    num_steps: int
    """Step sizes to choose from; higher is finer."""

    def quantize(self, latents: np.ndarray, steps_index: int) -> np.ndarray:
        """float32 (C, h, w) -> int64 levels."""

    def reconstruct(self, levels: np.ndarray, steps_index: int) -> np.ndarray:
        """int64 levels (C, h, w) -> float32, to the bit the same on every machine."""
