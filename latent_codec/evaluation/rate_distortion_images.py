"""Rate and distortion for the eye: curves, and images at equal bytes."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from latent_codec.evaluation.comparison import captioned
from latent_codec.evaluation.rate_distortion import Compressor
from latent_codec.evaluation.rate_distortion_result import LESS_IS_BETTER, METRICS, RateDistortion, Trial
from latent_codec.images.decoding import printable
from latent_codec.images.figures import new_figure
from latent_codec.images.sources import ImageSource, spread
from latent_codec.images.tensors import center_crop, image_grid, to_image, to_pil

CELL = 320
"""Larger images show their middle, pixel by pixel."""


def plot_rate_distortion(result: RateDistortion, path: Path) -> None:
    """Draw a panel for each metric that has figures, bits per pixel on a logarithmic axis, as a PNG at `path`.

    The dashed line is what the codec itself loses, with no file between.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator

    curves = {name: result.curve(name) for name in result.compressors}
    panels = [metric for metric in METRICS if getattr(curves[result.codec][0], metric) is not None]
    with new_figure(path, (4.6 * len(panels), 4.2), dpi=130) as figure:
        for axis, metric in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
            for place, (name, curve) in enumerate(curves.items()):
                points = [(each.bits_per_pixel, getattr(each, metric)) for each in curve]
                is_ours = name == result.codec
                axis.plot(
                    *zip(*points),
                    color=f"C{place}",
                    marker="o" if is_ours else ".",
                    linewidth=2 if is_ours else 1,
                    zorder=3 if is_ours else 2,
                    label=name,
                )
            if result.ceiling is not None:
                axis.axhline(
                    getattr(result.ceiling, metric),
                    color="C0",
                    linestyle="--",
                    linewidth=1,
                    label=f"{result.codec}, unquantized",
                )
            axis.set_xscale("log")
            axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.xaxis.set_minor_locator(LogLocator(subs=()))
            axis.set_xlabel("bits per pixel")
            axis.set_title(
                METRICS[metric]
                + (", dB" if metric == "psnr" else " (less is better)" if metric in LESS_IS_BETTER else ""),
                fontsize=10,
            )
            axis.grid(alpha=0.3)
        figure.axes[0].legend(fontsize=8)


def equal_bytes_grid(
    result: RateDistortion,
    compressors: Sequence[Compressor],
    source: ImageSource,
    folder: Path,
    *,
    channels: int = 3,
    num_images: int = 3,
) -> Image.Image:
    """A row for each comparison and image: the original, then every compressor's, decoded from its file.

    Args:
        compressors, source, folder, channels: of `measure_rate_distortion`.
        num_images: at most N, spread evenly over those measured.
    """
    measured = sorted({trial.index for trial in result.trials})
    chosen = [measured[place] for place in spread(len(measured), num_images)]
    cells = []
    for comparison in result.comparisons:
        for index in chosen:
            original = to_pil(source.image(index, channels))
            name = printable(Path(source.name(index)).name)
            cells.append(_cell(original, name, f"original, at {comparison}"))
            for compressor in compressors:
                (trial,) = (
                    each for each in result.select(comparison, compressor.name) if each.index == index
                )
                decoded = compressor.decode((folder / trial.file).read_bytes())
                cells.append(_cell(decoded, trial.compressor, _caption(trial)))
    return image_grid(cells, len(compressors) + 1)


def _caption(trial: Trial) -> str:
    size = f"{trial.num_bytes:,} B" + ("" if trial.fits else " (too large)")
    lpips = "" if trial.lpips is None else f", LPIPS {trial.lpips:.3f}"
    return f"{size}, {trial.psnr:.2f} dB{lpips}"


def _cell(image: Image.Image, *lines: str) -> Image.Image:
    """The middle of an image under lines of text."""
    pixels = to_image(image)
    middle = center_crop(pixels, (min(CELL, pixels.shape[1]), min(CELL, pixels.shape[2])))
    return captioned(to_pil(middle), "\n".join(lines), font_size=12)
