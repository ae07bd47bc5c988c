"""Disentanglement: whether each latent dimension follows one factor of variation, and no other.

vectors (N, D), factors of each image --binned--> mutual information --> MIG
                                      --random forests--> importances --> DCI

MIG, the mutual information gap, is equation 6 of Chen et al., "Isolating Sources of Disentanglement" (arXiv:1802.04942). DCI,
disentanglement, completeness and informativeness, is Eastwood and Williams, "A Framework for the Quantitative Evaluation of
Disentangled Representations" (ICLR 2018), sections 2 and 4.3. Vectors are binned as in Locatello et al. (arXiv:1811.12359).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from latent_codec.analysis.features import Features
from latent_codec.analysis.scikit import scikit
from latent_codec.images.figures import new_figure
from latent_codec.images.labels import MAX_CLASS, shown_name

BINS = 20
HELD_OUT = 0.25
_TREES = 60


@dataclass(frozen=True, kw_only=True)
class Disentanglement:
    """What D latent dimensions say of K factors; every share is in [0, 1], higher is better."""

    factors: list[str]
    num_images: int
    mutual_information: list[list[float]]
    """Of each factor with each dimension, as a share of the factor's entropy: (K, D)."""
    gaps: list[float]
    """Of each factor: the share of the dimension that says most of it, less that of the second."""
    importances: list[list[float]]
    """Of each dimension in the forest that predicts a factor from all of them: (K, D), each row's sum is 1."""
    accuracies: list[float]
    """Of each factor's forest on held-out images."""
    baselines: list[float]
    """Of each factor, the share of its most frequent value among the held-out images, which needs no vector."""
    disentanglement: float
    """Whether a dimension serves one factor alone."""
    completeness: float
    """Whether a factor is held by one dimension alone."""

    @property
    def mig(self) -> float:
        """The mutual information gap, the mean over factors."""
        return float(np.mean(self.gaps))

    @property
    def informativeness(self) -> float:
        """The mean accuracy."""
        return float(np.mean(self.accuracies))

    def to_dict(self) -> dict:
        """Plain data for JSON."""
        return {
            **vars(self),
            "mig": self.mig,
            "informativeness": self.informativeness,
        }


def factors_of(features: Features, names: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """Factors of variation, from the labels: of each name, int64 (N,).

    Args:
        names: attributes of the labels; None: all whose values are integers, up to MAX_CLASS, or true and false.

    Raises:
        ValueError: if labels have no such attributes, or one of them has the same value on every image.
    """
    first = features.labels[0]
    if not isinstance(first, dict):
        raise ValueError(
            f"expected labels with attributes, got {first!r} for {features.names[0]}; `shapes:` has them, and tars "
            "with a .json next to each image"
        )
    names = names or [name for name, value in first.items() if isinstance(value, int) and value <= MAX_CLASS]
    factors = {name: features.classes(name).numpy() for name in names}
    for name, values in factors.items():
        if len(np.unique(values)) == 1:
            raise ValueError(
                f"every image has {name} {values[0]}: a factor needs two values or more; leave it out, or take other images"
            )
    if not factors:
        raise ValueError(f"the labels have no attributes that are integers: {', '.join(first)}")
    return factors


def measure_disentanglement(
    vectors: Tensor, factors: dict[str, np.ndarray], *, seed: int = 0
) -> Disentanglement:
    """Measure how latent dimensions and factors of variation go together.

    Args:
        vectors: (N, D), such as the posterior means of one-vector codecs.
        factors: of each name, the integer value of each image, (N,).
        seed: of the split into training and held-out images, and of the forests.

    Raises:
        ValueError: for vectors of fewer than two dimensions, which have no gap, fewer than 100 images, or without scikit-learn.
    """
    forests, metrics = scikit("ensemble"), scikit("metrics")
    count, dims = vectors.shape
    if dims < 2 or count < 100:
        raise ValueError(
            f"expected 100 images or more with vectors of 2 numbers or more, got {count} with {dims}"
        )
    values = vectors.double().numpy()
    binned = [np.digitize(column, np.histogram_bin_edges(column, BINS)[1:-1]) for column in values.T]
    order = np.random.default_rng(seed).permutation(count)
    held_out, training = np.split(order, [round(count * HELD_OUT)])

    shares, importances, accuracies, baselines = [], [], [], []
    for factor in factors.values():
        entropy = metrics.mutual_info_score(factor, factor)
        shares.append([metrics.mutual_info_score(factor, column) / entropy for column in binned])
        forest = forests.RandomForestClassifier(
            _TREES, max_features=None, min_samples_leaf=5, random_state=seed
        )
        forest.fit(values[training], factor[training])
        importances.append(forest.feature_importances_)
        accuracies.append(float(forest.score(values[held_out], factor[held_out])))
        baselines.append(float(np.bincount(factor[held_out]).max() / len(held_out)))
    most = np.sort(shares, axis=1)
    weights = np.array(importances)  # (K, D)
    return Disentanglement(
        factors=list(factors),
        num_images=count,
        mutual_information=np.array(shares).tolist(),
        gaps=(most[:, -1] - most[:, -2]).tolist(),
        importances=weights.tolist(),
        accuracies=accuracies,
        baselines=baselines,
        disentanglement=_concentration(weights.T),
        completeness=_concentration(weights),
    )


def _concentration(weights: np.ndarray) -> float:
    """1 where each row has all of its weight in one column, 0 where it is spread evenly; rows count by their weight."""
    totals = weights.sum(1, keepdims=True)
    parts = np.divide(weights, totals, out=np.zeros_like(weights), where=totals > 0)
    logs = np.log(parts, out=np.zeros_like(parts), where=parts > 0)
    entropies = (
        -(parts * logs).sum(1) / np.log(weights.shape[1]) if weights.shape[1] > 1 else np.zeros(len(weights))
    )
    return float(((1 - entropies) * totals[:, 0]).sum() / totals.sum())


def plot_mutual_information(found: Disentanglement, path: Path, *, title: str) -> None:
    """Draw the mutual information of factors (rows) and dimensions (columns) as a heat map.

    Raises:
        OSError: if `path` cannot be written.
    """
    shares = np.array(found.mutual_information)
    rows, columns = shares.shape
    inches = min(max(5.0, 0.55 * columns + 2), 24.0), min(0.5 * rows + 1.6, 24.0)
    with new_figure(path, inches) as figure:
        axis = figure.add_subplot()
        image = axis.imshow(shares, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        axis.set_yticks(
            range(rows),
            [f"{shown_name(name)} ({gap:.2f})" for name, gap in zip(found.factors, found.gaps)],
            parse_math=False,
        )
        axis.set_xticks(range(columns), range(columns))
        axis.set_xlabel("latent dimension")
        axis.set_title(f"{title}\nMIG {found.mig:.3f}; of each factor its gap", fontsize=9, parse_math=False)
        if columns <= 20:
            for row, column in np.ndindex(rows, columns):
                share = shares[row, column]
                axis.text(
                    column,
                    row,
                    f"{share:.2f}",
                    ha="center",
                    va="center",
                    color="w" if share < 0.6 else "k",
                    fontsize=7,
                )
        figure.colorbar(image, label="share of the factor's entropy")
