"""Colors of codewords: grids of indices as small images, without a decoder."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

UNKNOWN = -1
"""An index that is not known yet."""


class Palette(torch.nn.Module):
    """A color for every codeword; those of several levels add up.

        color(position) = mean + sum over levels l of table_l[indices_l(position)]

    An index that is not known yet adds nothing, so that a grid without any is of the mean color.

    Args:
        mean: RGB in [-1, 1], (3,).
        tables: of each level, top first: what its codewords add, (codebook_size, 3).
    """

    def __init__(self, mean: Tensor, tables: Sequence[Tensor]):
        super().__init__()
        self.register_buffer("mean", mean.float())
        for level, table in enumerate(tables):
            self.register_buffer(f"table_{level}", table.float())
        self.num_levels = len(tables)

    @property
    def tables(self) -> list[Tensor]:
        return [self.get_buffer(f"table_{level}") for level in range(self.num_levels)]

    def forward(self, grids: Sequence[Tensor]) -> Tensor:
        """Grids (B, h, w) of the levels from the top to any other -> RGB (B, 3, h, w), on the finest of them."""
        shape = grids[-1].shape[1:]
        colors = self.mean.view(1, 3, 1, 1).expand(len(grids[-1]), 3, *shape)
        for table, grid in zip(self.tables, grids):
            added = torch.where((grid == UNKNOWN).unsqueeze(-1), 0.0, table[grid.clamp_min(0)])
            colors = colors + F.interpolate(added.permute(0, 3, 1, 2), size=shape)
        return colors


def checked_grids(
    grids: Tensor | Sequence[Tensor],
    codebook_sizes: Sequence[int],
    known_mask: Tensor | Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """A grid, or one per level, as a list of int64 grids (B, h, w), top first, with UNKNOWN where `known_mask` is False.

    Raises:
        ValueError: for too many levels, other shapes or dtypes, or indices beyond the codebook.
    """
    grids = [grids] if isinstance(grids, Tensor) else list(grids)
    if not 1 <= len(grids) <= len(codebook_sizes):
        raise ValueError(f"expected at most {len(codebook_sizes)} grids, top level first, got {len(grids)}")
    masks = [known_mask] if isinstance(known_mask, Tensor) else list(known_mask or [None] * len(grids))
    if len(masks) != len(grids):
        raise ValueError(f"expected a mask for each of {len(grids)} grids, got {len(masks)}")
    checked = []
    for level, (grid, mask, size) in enumerate(zip(grids, masks, codebook_sizes)):
        if grid.ndim != 3 or not grid.numel() or grid.is_floating_point() or grid.dtype == torch.bool:
            raise ValueError(
                f"grid {level} is {grid.dtype} of shape {tuple(grid.shape)}; indices are int64 (B, h, w)."
            )
        if len(grid) != len(grids[0]):
            raise ValueError(f"grid {level} is of {len(grid)} images and grid 0 of {len(grids[0])}.")
        grid = grid.long()
        if mask is not None:
            if mask.dtype != torch.bool or mask.shape not in (grid.shape, grid.shape[1:]):
                raise ValueError(
                    f"known_mask of grid {level} is {mask.dtype} of shape {tuple(mask.shape)}; expected bool of "
                    f"{tuple(grid.shape)} or {tuple(grid.shape[1:])}."
                )
            grid = torch.where(mask.to(grid.device), grid, UNKNOWN)
        if not UNKNOWN <= grid.min() <= grid.max() < size:
            raise ValueError(
                f"indices of grid {level} run from {int(grid.min())} to {int(grid.max())}; allowed are 0 to {size - 1}, "
                f"and {UNKNOWN} for what is not known yet."
            )
        checked.append(grid)
    return checked
