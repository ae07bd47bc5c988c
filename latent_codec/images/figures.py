"""Figures of matplotlib as files."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from latent_codec.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@contextmanager
def new_figure(
    path: Path, inches: tuple[float, float], *, dpi: int = 120, layout: str | None = "constrained"
) -> Iterator["Figure"]:
    """A figure to draw on, which is then written as a PNG at `path`, whole or not at all."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=inches, layout=layout)
    yield figure
    with replacing(path) as written:
        figure.savefig(written, dpi=dpi, format="png")


def small_axes(figure: "Figure", rows: int, columns: int) -> list["Axes"]:
    """Add a grid of axes, 2 to 4 inches wide, with room for small labels, for their titles and for the figure's.

    Margins are in inches. A layout that measures every label takes longer than to draw them.
    """
    width, height = figure.get_size_inches()
    margins = {
        "left": 0.4 / width,
        "right": 1 - 0.15 / width,
        "bottom": 0.25 / height,
        "top": 1 - 0.6 / height,
    }
    spaces = {"wspace": 0.15, "hspace": 0.25}
    return list(figure.subplots(rows, columns, squeeze=False, gridspec_kw=margins | spaces).flatten())
