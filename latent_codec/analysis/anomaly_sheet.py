"""What a detector knows and what it found, for the eye."""

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from latent_codec.analysis.anomalies import Anomalies, heat_map, image_as_seen
from latent_codec.analysis.detectors import Detector
from latent_codec.analysis.heat_maps import blend
from latent_codec.codec import LatentCodec
from latent_codec.images.figures import new_figure, small_axes
from latent_codec.images.sheets import sheet
from latent_codec.images.sources import ImageSource
from latent_codec.images.tensors import shrunk

LARGEST = 192
"""Larger images are shown shrunk to this many pixels on their longer side."""
SIDE = 96
"""Smaller images are shown enlarged to about this many pixels."""


def anomaly_sheet(
    detector: Detector,
    codec: LatentCodec,
    source: ImageSource,
    anomalies: Anomalies,
    *,
    columns: int = 8,
    on_progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """The most unusual images, those nearest to the threshold and the most usual, each over its heat map.

    Args:
        source: that `anomalies` was measured on.
        columns: images of each kind; fewer where there are fewer.
        on_progress: called with (images done, images in all).

    Returns:
        uint8 (3, H, W).
    """
    scores, ranked = anomalies.scores[anomalies.by], anomalies.ranked()
    nearest = (scores - anomalies.threshold).abs().argsort(stable=True)[:columns].tolist()
    chosen = {
        "most unusual": ranked[:columns],
        "borderline": sorted(nearest, key=ranked.index),
        "most usual": ranked[::-1][:columns],
    }
    rows, titles, done = [], [], 0
    for title, places in chosen.items():
        images = [image_as_seen(detector, codec, source, anomalies.indices[each]) for each in places]
        maps = []
        for image in images:
            maps.append(blend(image, heat_map(detector, codec, image)))
            done += 1
            if on_progress:
                on_progress(done, sum(map(len, chosen.values())))
        rows += [[shrunk(image, LARGEST) for image in images], [shrunk(each, LARGEST) for each in maps]]
        span = dict.fromkeys(f"{scores[place]:.4g}" for place in (places[0], places[-1]))
        titles += [title + "\n" + " to\n".join(span), "where"]
    return sheet(rows, row_titles=titles, side=SIDE)


def plot_references(detector: Detector, path: Path) -> None:
    """Draw each score of held-out normal images as a histogram, with the threshold, as a PNG at `path`."""
    with new_figure(path, (3.2 * len(detector.references), 2.6), layout=None) as figure:
        axes = small_axes(figure, 1, len(detector.references))
        for axis, (name, scores) in zip(axes, detector.references.items()):
            axis.hist(scores.numpy(), bins=40, histtype="stepfilled", color="tab:blue")
            axis.axvline(detector.threshold(name), color="tab:red")
            axis.set_title(f"{name}, threshold {detector.threshold(name):.4g}", fontsize=9)
            axis.tick_params(labelsize=7)
        figure.suptitle(
            f"{detector.num_held_out:,} held-out normal images, {detector.codec}",
            fontsize=10,
            parse_math=False,
        )
