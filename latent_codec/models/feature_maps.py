"""Feature maps in a scratch file, read and written a tile at a time, and group norm over all of one.

    write(tile) --> file: (H, W, C), so that a tile's lines are contiguous --> read(tile)
         |                                                                        |
         +--> mean and variance of each channel --> normalization(group norm) ----+--> convolution

The operating system keeps of the files in free memory what fits there, and the disk holds the rest. They have no name, so
that nothing is left behind however the process ends, and are in the folder for temporary files (TMPDIR sets it).
"""

import os
import tempfile
import weakref
from collections.abc import Callable
from math import prod

import numpy as np
import torch
from torch import Tensor, nn

VALUES_AT_ONCE = 2**18
"""Values read, normalized or written at once: 1 MB in float32, which fits a processor's cache."""


class FeatureMap:
    """One image's features, (C, H, W), in a scratch file; statistics of what is written are kept.

    Tiles are (1, C, h, w) on `device`, channels last in memory, and chosen by slices of rows and columns.
    """

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device | str):
        self.shape, self.dtype, self.device = shape, dtype, device
        file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115  closed with the last reference to the map
        weakref.finalize(self, file.close)
        self._file = file.fileno()
        self._count = 0
        self._mean = torch.zeros(shape[0], dtype=torch.float64, device="cpu")
        self._squares = torch.zeros_like(self._mean)  # of the deviations from it, summed

    @classmethod
    def of(cls, values: Tensor) -> "FeatureMap":
        """A map that holds `values`, (1, C, H, W)."""
        new = cls(tuple(values.shape[1:]), values.dtype, values.device)
        new.write(*new.everywhere, values)
        return new

    @property
    def everywhere(self) -> tuple[slice, slice]:
        """The rows and columns of the whole map."""
        return slice(0, self.shape[1]), slice(0, self.shape[2])

    def read(self, rows: slice, columns: slice, then: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """A tile; `then` is applied to a few lines of it at a time, (n, w, C)."""
        height, width = rows.stop - rows.start, columns.stop - columns.start
        tile = torch.empty(height, width, self.shape[0], dtype=self.dtype, device=self.device)
        row = rows.start
        for part in tile.split(self._lines_at_once(width)):
            lines = torch.empty(part.shape, dtype=self.dtype, device="cpu")
            for line in _bytes(lines):
                os.preadv(self._file, [line], self._offset(row, columns))
                row += 1
            lines = lines.to(self.device)
            part.copy_(then(lines) if then else lines)
        return tile.permute(2, 0, 1)[None]

    def write(self, rows: slice, columns: slice, tile: Tensor) -> None:
        """Write a tile, each position of the map once: its statistics are of all that was written.

        Raises:
            OSError: where there is no room for it.
        """
        row = rows.start
        for part in tile[0].permute(1, 2, 0).split(self._lines_at_once(columns.stop - columns.start)):
            lines = part.to(self.dtype).contiguous()
            self._count_in(lines.flatten(0, 1))
            for line in _bytes(lines.cpu()):
                self._write_line(memoryview(line), self._offset(row, columns))
                row += 1

    def normalization(
        self, norm: nn.GroupNorm, activation: Callable[[Tensor], Tensor] | None = None
    ) -> Callable[[Tensor], Tensor]:
        """Group norm over all of this map and the activation behind it, as a function of lines (n, w, C).

        Group norm (arXiv:1803.08494, equations 1-6) is an affine function of each channel, once mean and
        variance of its group are known.
        """
        means = self._mean.view(norm.num_groups, -1)
        variance = (self._squares / self._count).view_as(means).mean(1) + means.var(1, correction=0)
        deviation, mean = (
            each[:, None].expand_as(means).flatten() for each in ((variance + norm.eps).sqrt(), means.mean(1))
        )
        scale = norm.weight.double().cpu() / deviation
        shift = norm.bias.double().cpu() - mean * scale
        scale, shift = (each.to(self.device, _precision(self.dtype)) for each in (scale, shift))

        def normalize(lines: Tensor) -> Tensor:
            lines = torch.addcmul(shift, lines.to(scale.dtype), scale).to(lines.dtype)
            return activation(lines) if activation else lines

        return normalize

    def _count_in(self, values: Tensor) -> None:
        """Merge mean and squared deviations of `values`, (n, C), into the map's: Chan, Golub and LeVeque (1979), equations 2.1."""
        values = values.to(_precision(self.dtype))
        mean = values.mean(0)
        squares = (values - mean).square_().sum(0)
        difference = mean.cpu().double() - self._mean
        before, self._count = self._count, self._count + len(values)
        self._mean += difference * (len(values) / self._count)
        self._squares += squares.cpu().double() + difference.square() * (before * len(values) / self._count)

    def _write_line(self, line: memoryview, offset: int) -> None:
        try:
            while line:
                written = os.pwrite(self._file, line, offset)
                line, offset = line[written:], offset + written
        except OSError as error:
            size = prod(self.shape) * self.dtype.itemsize / 2**30
            raise OSError(
                error.errno,
                f"{error.strerror}: {tempfile.gettempdir()} has no room for a feature map of {size:.2f} GiB; make room "
                "there, or set TMPDIR to a folder that holds three of them",
            ) from error

    def _lines_at_once(self, width: int) -> int:
        return max(1, VALUES_AT_ONCE // (width * self.shape[0]))

    def _offset(self, row: int, columns: slice) -> int:
        return (row * self.shape[2] + columns.start) * self.shape[0] * self.dtype.itemsize


def _precision(dtype: torch.dtype) -> torch.dtype:
    """Of sums: float32, or better where the network is."""
    return torch.promote_types(dtype, torch.float32)


def _bytes(lines: Tensor) -> np.ndarray:
    """The memory of `lines`, (n, w, C), a row for each."""
    return lines.flatten(1).view(torch.uint8).numpy()
