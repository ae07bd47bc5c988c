"""Figures of matplotlib as files."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from latent_codec.files import replacing

if TYPE_CHECKING:
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
