"""What the latents of a codec look like, channel by channel, compared with the standard normal that a denoiser starts from."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from latent_codec.evaluation.meters import Batch
from latent_codec.images.figures import new_figure, small_axes
from latent_codec.models.likelihoods import kl_divergence

LIMIT = 8.0
"""The histograms run from -LIMIT to LIMIT; values outside count in the outermost bins."""

BINS_PER_UNIT = 50


@dataclass(frozen=True, kw_only=True)
class LatentStatistics:
    """Per channel of the latents (scaled and shifted, as a denoiser sees them); one entry per channel."""

    mean: list[float]
    std: list[float]
    distance_from_normal: list[float]
    """Kolmogorov-Smirnov: the largest gap between the channel's distribution function and that of
    N(0, 1). 0 is the same distribution, 1 shares nothing; 0.05 is hard to see in a plot."""
    kl: list[float] | None
    """KL(posterior || N(0, 1)) of the raw latents in nats per position, or None: see `kl_note`."""
    kl_note: str
    histogram: list[list[int]]
    """Counts of equal bins from -LIMIT to LIMIT, (channels, bins)."""

    def to_dict(self) -> dict:
        return {
            "mean": self.mean,
            "std": self.std,
            "distance_from_normal": self.distance_from_normal,
            "kl_nats_per_position": self.kl,
            "kl_note": self.kl_note,
        }


class LatentMeter:
    """Gathers LatentStatistics one batch at a time, in memory that does not grow with the images.

    Args:
        channels: of the latents.
        arrange: raw latents on the channels and positions of the latents (`LatentSpace.arrange`); None: they are.
    """

    def __init__(self, channels: int, arrange: Callable[[Tensor], Tensor] | None = None):
        self.arrange = arrange or (lambda raw_latents: raw_latents)
        self.positions = 0
        self.sum = torch.zeros(channels, dtype=torch.float64)
        self.sum_of_squares = torch.zeros(channels, dtype=torch.float64)
        self.histogram = torch.zeros(channels, round(2 * LIMIT * BINS_PER_UNIT), dtype=torch.int64)
        self.posterior_positions = 0
        self.kl = torch.zeros(channels, dtype=torch.float64)

    def add(self, batch: Batch) -> None:
        """Count in the latents, and the posterior where there is one."""
        values = batch.encoding.latents.movedim(1, 0).flatten(1).cpu().double()
        channels, bins = self.histogram.shape
        self.positions += values.shape[1]
        self.sum += values.sum(1)
        self.sum_of_squares += values.square().sum(1)
        index = ((values + LIMIT) * BINS_PER_UNIT).floor().clamp(0, bins - 1).long()
        index += torch.arange(channels).unsqueeze(1) * bins
        self.histogram += torch.bincount(index.flatten(), minlength=channels * bins).view(channels, bins)
        if posterior := batch.encoding.posterior:
            kl = getattr(posterior, "nats_per_value", None)  # of groups of latents
            if kl is None:
                kl = kl_divergence(posterior.mean.cpu().double(), posterior.logvar.cpu().double())
            kl = kl.cpu().double()
            self.kl += self.arrange(kl).sum(dim=(0, 2, 3))
            self.posterior_positions += values.shape[1]

    def result(self) -> LatentStatistics:
        mean = self.sum / self.positions
        variance = (self.sum_of_squares / self.positions - mean.square()).clamp(min=0)
        if not self.posterior_positions:
            kl, kl_note = None, "this kind of autoencoder has no posterior"
        elif not torch.isfinite(self.kl).all():
            kl, kl_note = None, "the posterior is not finite in this precision; use float32"
        else:
            kl = (self.kl / self.posterior_positions).tolist()
            kl_note = "nats per position, of the raw latents"
        inner_edges = torch.linspace(-LIMIT, LIMIT, self.histogram.shape[1] + 1, dtype=torch.float64)[1:-1]
        below = self.histogram.cumsum(1)[:, :-1] / self.positions
        return LatentStatistics(
            mean=mean.tolist(),
            std=variance.sqrt().tolist(),
            distance_from_normal=(below - torch.special.ndtr(inner_edges)).abs().amax(1).tolist(),
            kl=kl,
            kl_note=kl_note,
            histogram=self.histogram.tolist(),
        )


def plot_latent_histograms(statistics: LatentStatistics, path: Path, *, title: str = "") -> None:
    """Draw every channel's histogram with the standard normal's curve over it, as a PNG at `path`."""
    counts = torch.tensor(statistics.histogram, dtype=torch.float64)
    bins_per_bar = BINS_PER_UNIT // 10
    bars = counts.view(len(counts), -1, bins_per_bar).sum(2)
    density = bars / bars.sum(1, keepdim=True) * 10
    edges = torch.linspace(-LIMIT, LIMIT, bars.shape[1] + 1, dtype=torch.float64)
    centers = (edges[1:] + edges[:-1]) / 2
    normal = (-centers.square() / 2).exp() / (2 * torch.pi) ** 0.5

    columns = min(4, len(counts))
    rows = -(-len(counts) // columns)
    with new_figure(path, (3.2 * columns, 2.4 * rows + 0.4), layout=None) as figure:
        axes = small_axes(figure, rows, columns)
        for channel, (axis, heights) in enumerate(zip(axes, density)):
            axis.stairs(heights.numpy(), edges.numpy(), fill=True, color="tab:blue", label="latents")
            axis.plot(centers.numpy(), normal.numpy(), color="tab:orange", label="N(0, 1)")
            axis.set_xlim(-5, 5)
            axis.set_title(
                f"{channel}: mean {statistics.mean[channel]:.2f}, std {statistics.std[channel]:.2f}, "
                f"KS {statistics.distance_from_normal[channel]:.3f}",
                fontsize=8,
            )
            axis.tick_params(labelsize=7)
        for axis in axes[len(counts) :]:
            axis.axis("off")
        axes[0].legend(fontsize=7)
        if title:
            figure.suptitle(title, fontsize=10)
