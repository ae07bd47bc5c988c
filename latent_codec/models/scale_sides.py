"""What one index of each scale of a MultiScaleVQ covers; without torch, for those who only read its config."""

from collections.abc import Sequence
from fractions import Fraction


def position_sides(downsampling_factor: int, sides: Sequence[int]) -> list[int | Fraction]:
    """Side in pixels of what one index of each scale covers, the coarsest first; a fraction where it is no integer."""
    covered = (Fraction(downsampling_factor * sides[-1], side) for side in sides)
    return [int(each) if each.denominator == 1 else each for each in covered]
