"""Colors of codewords: index maps as small images, without a decoder."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from latent_codec.tensors import check_shape

UNKNOWN = -1
"""An index that is not known yet."""


class Palette(torch.nn.Module):
    """A color for every codeword; those of several levels add up.

        color(position) = mean + sum over levels l of table_l[indices_l(position)]

    An index that is not known yet adds nothing, so that a map without any is of the mean color.

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

    def forward(self, indices: Sequence[Tensor]) -> Tensor:
        """Indices (B, h, w) of the levels from the top to any other -> RGB (B, 3, h, w), in the finest's resolution."""
        batch, *shape = indices[-1].shape
        colors = self.mean.view(1, 3, 1, 1).expand(batch, 3, *shape)
        for table, each in zip(self.tables, indices):
            added = torch.where((each == UNKNOWN).unsqueeze(-1), 0.0, table[each.clamp_min(0)])
            colors = colors + F.interpolate(added.permute(0, 3, 1, 2), size=shape)
        return colors


def checked_indices(
    indices: Tensor | Sequence[Tensor],
    codebook_sizes: Sequence[int],
    known_mask: Tensor | Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Indices of one level or of each as a list of int64 (B, h, w), top first, with UNKNOWN where `known_mask` is False.

    Raises:
        ValueError: for too many levels, other shapes or dtypes, or indices beyond the codebook.
    """
    maps = [indices] if isinstance(indices, Tensor) else list(indices)
    if not 1 <= len(maps) <= len(codebook_sizes):
        raise ValueError(f"expected 1 to {len(codebook_sizes)} index maps, top level first, got {len(maps)}")
    masks = [known_mask] if isinstance(known_mask, Tensor) else list(known_mask or [None] * len(maps))
    if len(masks) != len(maps):
        raise ValueError(f"expected a mask for each of {len(maps)} index maps, got {len(masks)}")
    checked = []
    for level, (found, mask, size) in enumerate(zip(maps, masks, codebook_sizes)):
        name, shape = f"indices of level {level}", found.shape
        if not found.numel() or found.is_floating_point() or found.dtype == torch.bool:
            raise ValueError(f"{name}: expected int64, no side 0, got {found.dtype} of shape {tuple(shape)}")
        check_shape(found, name, (len(maps[0]), "h", "w"))
        found = found.long()
        if mask is not None:
            check_shape(mask, f"known_mask of level {level}", shape, shape[1:], dtype=torch.bool)
            found = torch.where(mask.to(found.device), found, UNKNOWN)
        if not UNKNOWN <= found.min() <= found.max() < size:
            got = f"{int(found.min())} to {int(found.max())}"
            raise ValueError(f"{name}: expected 0 to {size - 1}, or {UNKNOWN} where not known yet, got {got}")
        checked.append(found)
    return checked
