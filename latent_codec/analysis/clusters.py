"""Clusters: groups of images whose features are near each other, found without labels.

features (N, D) --k-means--> a cluster for each image --> contact sheet, purity, NMI
        --t-SNE or PCA--> (N, 2) --> map of thumbnails

Distances are those of the features as they are: to standardize a VAE's latents would blow up the dimensions that it left
unused.
"""

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from latent_codec.analysis.features import Features
from latent_codec.analysis.scikit import scikit
from latent_codec.errors import SettingError
from latent_codec.images.labels import in_words, shown_name
from latent_codec.images.sheets import sheet
from latent_codec.images.sources import ImageSource, spread
from latent_codec.images.tensors import fit_square, to_uint8

USUAL_NUMBER = 10
"""Of clusters, where images have no classes."""
RESTARTS = 10
"""k-means keeps the best of so many, by the sum of squared distances."""
MAPS = ("tsne", "pca")
MAP_IMAGES = 1500
MAP_CELLS, THUMBNAIL = 32, 34
"""A map has at most so many thumbnails per side, of so many pixels each."""
PERPLEXITY = 30
"""Of t-SNE (van der Maaten and Hinton, 2008): about how many neighbors of an image stay near it."""
FRAME = 2
"""Pixels around a thumbnail in the color of its cluster."""


@dataclass(frozen=True, kw_only=True)
class Clusters:
    """What `find_clusters` found. Cluster 0 is the largest."""

    features: Features
    assignments: Tensor
    """The cluster of each image, int64 (N,)."""
    distances: Tensor
    """Of each image from the center of its cluster, float32 (N,)."""
    sizes: list[int]
    """Images of each cluster."""
    label: str | None
    """Which label says the classes; None: there are none."""
    classes: Tensor | None
    """The class of each image, int64 (N,)."""
    purity: float | None
    """Share of images that are of the most frequent class of their cluster."""
    nmi: float | None
    """Mutual information of clusters and classes over the mean of their entropies, 0 (independent) to 1 (the same)."""

    def main_classes(self) -> list[tuple[int, float]] | None:
        """The most frequent class of each cluster, and its share of the cluster."""
        if self.classes is None:
            return None
        counts = [self.classes[self.assignments == each].bincount() for each in range(len(self.sizes))]
        return [(int(each.argmax()), float(each.max() / each.sum())) for each in counts]

    def to_dict(self) -> dict:
        """Plain data for JSON."""
        main = self.main_classes() or [(None, None)] * len(self.sizes)
        return {
            "clusters": [
                {"size": size, "main_class": number, "share": share}
                for size, (number, share) in zip(self.sizes, main)
            ],
            "label": self.label,
            "purity": self.purity,
            "nmi": self.nmi,
            "of": self.features.to_dict(),
        }


def find_clusters(
    features: Features, num_clusters: int | None = None, *, label: str | None = None, seed: int = 0
) -> Clusters:
    """Group images by k-means on their features; labels are compared with the groups, and never used to find them.

    Args:
        num_clusters: None: as many as there are classes, or USUAL_NUMBER without any, and at most as many as there are
            different images.
        label: "class" where a label is a number, else the name of an attribute; None: "class", if images have it.

    Raises:
        SettingError: for more clusters than different images, or fewer than 2.
        ValueError: for images that are all the same, or without the label that was named; if scikit-learn is not installed.
    """
    classes = None
    if label is not None or all(isinstance(each, int) for each in features.labels):
        label = label or "class"
        classes = features.classes(label)
    num_different = len(features.vectors.unique(dim=0))
    if num_different < 2:
        some = "there is one image" if len(features.names) == 1 else "all images have the same features"
        raise ValueError(f"expected two different images or more, but {some}; give others, too")
    if num_clusters is None:
        num_clusters = USUAL_NUMBER if classes is None else max(len(classes.unique()), 2)
        num_clusters = min(num_clusters, num_different)
    if not 2 <= num_clusters <= num_different:
        raise SettingError(
            "num_clusters", f"2 to {num_different}, the number of different images", num_clusters
        )
    means = scikit("cluster").KMeans(num_clusters, n_init=RESTARTS, random_state=seed)
    distances = torch.from_numpy(means.fit_transform(features.vectors.numpy())).float()
    found = torch.from_numpy(means.labels_).long()
    sizes, order = found.bincount(minlength=num_clusters).sort(descending=True, stable=True)
    sizes = sizes[sizes > 0]  # k-means leaves clusters empty where images hardly differ
    purity = nmi = None
    if classes is not None:
        best = [classes[found == each].bincount().max() for each in found.unique()]
        purity = float(sum(best) / len(found))
        nmi = float(scikit("metrics").normalized_mutual_info_score(classes.numpy(), found.numpy()))
    return Clusters(
        features=features,
        assignments=order.argsort()[found],
        distances=distances.gather(1, found[:, None])[:, 0],
        sizes=sizes.tolist(),
        label=label,
        classes=classes,
        purity=purity,
        nmi=nmi,
    )


def contact_sheet(
    clusters: Clusters, source: ImageSource, *, class_names: dict[int, str] | None = None, columns: int = 12
) -> Tensor:
    """A row of images for each cluster, evenly spread from the nearest to its center to the farthest.

    Args:
        source: that the features are of.
        class_names: of the classes; None: their numbers.

    Returns:
        uint8 (3, H, W).
    """
    main, rows, titles = clusters.main_classes(), [], []
    for each, size in enumerate(clusters.sizes):
        places = (clusters.assignments == each).nonzero().flatten()
        places = places[clusters.distances[places].argsort()]
        color = _color(each)
        rows.append(
            [_thumbnail(clusters, source, int(places[place]), 64, color) for place in spread(size, columns)]
        )
        title = f"cluster {each}\n{size:,} image{'s' * (size != 1)}"
        if main is not None:
            number, share = main[each]
            title += f"\n{share:.0%} {in_words(shown_name((class_names or {}).get(number, str(number))))}"
        titles.append(title)
    width = max(map(len, rows))
    headings = ["nearest", *[""] * (width - 2), "farthest"] if width > 1 else None
    return sheet(rows, row_titles=titles, column_titles=headings)


def plane_map(
    clusters: Clusters, source: ImageSource, *, method: str = "tsne", seed: int = 0, limit: int = MAP_IMAGES
) -> Tensor:
    """Images as thumbnails in a plane, near each other where their features are; frames have the clusters' colors.

    Each thumbnail is in the cell of a square grid that its place falls into; of several in one cell the first is shown.

    Args:
        source: that the features are of.
        method: "tsne", which keeps neighbors, or "pca", the two components of greatest variance, which keeps distances.
        limit: at most N images, spread evenly.

    Returns:
        uint8 (3, H, W), on white.

    Raises:
        SettingError: for another method.
    """
    if method not in MAPS:
        raise SettingError("method", " or ".join(MAPS), method)
    places = spread(len(clusters.assignments), limit)
    points = _project(clusters.features.vectors[places], method, seed)
    low, high = points.amin(0), points.amax(0)
    cells = ((points - low) / (high - low).clamp(min=1e-12) * (MAP_CELLS - 1e-3)).long()
    full = THUMBNAIL + 2 * FRAME
    canvas = torch.full((3, MAP_CELLS * full, MAP_CELLS * full), 255, dtype=torch.uint8)
    taken: set[tuple[int, int]] = set()
    for place, cell in zip(places, map(tuple, cells.tolist())):
        if cell in taken:
            continue
        taken.add(cell)
        color = _color(int(clusters.assignments[place]))
        across, down = (each * full for each in cell)
        canvas[:, down : down + full, across : across + full] = _thumbnail(
            clusters, source, place, THUMBNAIL, color
        )
    return canvas


def _project(vectors: Tensor, method: str, seed: int) -> Tensor:
    """(N, D) -> (N, 2)."""
    pca = scikit("decomposition").PCA(min(2 if method == "pca" else 50, *vectors.shape), random_state=seed)
    points = pca.fit_transform(vectors.numpy())
    if method == "tsne" and len(points) > 3:
        perplexity = min(PERPLEXITY, (len(points) - 1) / 3)
        tsne = scikit("manifold").TSNE(
            perplexity=perplexity, init="pca" if points.shape[1] > 1 else "random", random_state=seed
        )
        points = tsne.fit_transform(points)
    found = torch.from_numpy(points).float()[:, :2]
    return F.pad(found, (0, 2 - found.shape[1]))


def _thumbnail(
    clusters: Clusters, source: ImageSource, place: int, side: int, color: Sequence[int]
) -> Tensor:
    """The middle square of an image, uint8 (3, side, side), in a frame."""
    image = fit_square(source.image(clusters.features.indices[place]), side)
    framed = torch.tensor(color, dtype=torch.uint8).view(3, 1, 1).repeat(1, *[side + 2 * FRAME] * 2)
    framed[:, FRAME:-FRAME, FRAME:-FRAME] = to_uint8(image)
    return framed


def _color(cluster: int) -> tuple[int, int, int]:
    """A hue for each cluster, neighbors' far apart."""
    hue = cluster * 0.381966 % 1  # by the golden ratio
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.9 if cluster % 2 == 0 else 0.6, 0.9 if cluster % 3 else 0.7)
    return round(red * 255), round(green * 255), round(blue * 255)
