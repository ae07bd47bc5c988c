"""Probes: how well a linear classifier tells classes from features, next to raw pixels and their principal components.

features (N, D) -------------------standardize--> logistic regression --> accuracy, confusion matrix
pixels (N, P) ---------------------standardize--> logistic regression --> accuracy
pixels --PCA--> components (N, D) --standardize--> logistic regression --> accuracy

All three learn from the same images and are tested on the same others. Everything that is fitted, means, deviations and
components included, is fitted to the images that are learned from.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from latent_codec.analysis.features import Features, extract_features, hold_out_of_each
from latent_codec.analysis.scikit import scikit
from latent_codec.codec import LatentCodec
from latent_codec.errors import SettingError
from latent_codec.images.figures import new_figure
from latent_codec.images.labels import check_labels, check_same_classes, in_words, shown_name
from latent_codec.images.sheets import sheet
from latent_codec.images.sources import ImageSource
from latent_codec.images.tensors import fit_square, shrunk

PIXEL_SIDE = 32
"""Raw pixels are those of images of at most this side, of larger ones those of their middle square, shrunk."""
MAX_ITERATIONS = 500
SHEET_ROWS, SHEET_COLUMNS = 8, 10
LARGEST = 128
"""Larger images are shown shrunk to this many pixels on their longer side."""
MOST_INCHES = 24


@dataclass(frozen=True, kw_only=True)
class Classification:
    """What a logistic regression on one kind of vectors made of the test images."""

    name: str
    num_features: int
    accuracy: float
    standard_error: float
    """Of the accuracy, as a share of independent test images: sqrt(p (1 - p) / N)."""
    has_converged: bool
    """Whether the regression's optimum was reached within MAX_ITERATIONS."""
    predicted: Tensor
    """The class of each test image, int64 (N,)."""

    def to_dict(self) -> dict:
        """Plain data for JSON, without the predictions."""
        return {key: value for key, value in vars(self).items() if key != "predicted"}


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What `probe` found."""

    label: str
    classes: list[int]
    """That images have, ascending."""
    num_train: int
    num_test: int
    largest_share: float
    """Of the most frequent class among the test images: the accuracy of one who always names it."""
    features: Classification
    pixels: Classification
    pca: Classification
    """Of as many components as there are features, or as many as there can be."""
    lead_over_pca: tuple[float, float, float]
    """Accuracy of the features minus that of PCA, and its 95 % interval, paired by image."""
    test: Features
    """Of the test images."""
    truth: Tensor
    """The class of each test image, int64 (N,)."""

    skipped: list[str]
    """One line for each image that could not be read, naming it and the reason."""

    @property
    def confusion(self) -> Tensor:
        """How many test images of each class (rows) got each class (columns) by their features, int64."""
        place = torch.zeros(max(self.classes) + 1, dtype=torch.int64)
        place[self.classes] = torch.arange(len(self.classes))
        pairs = place[self.truth] * len(self.classes) + place[self.features.predicted]
        return torch.bincount(pairs, minlength=len(self.classes) ** 2).view(len(self.classes), -1)

    def to_dict(self) -> dict:
        """Plain data for JSON."""
        return {
            "label": self.label,
            "classes": self.classes,
            "num_train": self.num_train,
            "num_test": self.num_test,
            "largest_share": self.largest_share,
            **{name: getattr(self, name).to_dict() for name in ("features", "pixels", "pca")},
            "lead_over_pca": list(self.lead_over_pca),
            "confusion": self.confusion.tolist(),
            "skipped": self.skipped,
            "of": self.test.to_dict(),
        }


def probe(
    source: ImageSource,
    codec: LatentCodec,
    *,
    test: ImageSource | None = None,
    held_out: float = 0.2,
    label: str = "class",
    pooling: str | None = None,
    layer: str | None = None,
    side: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    on_progress: Callable[[int, int, str], None] | None = None,
) -> Probe:
    """Learn classes from the features of images by logistic regression, and test on other images.

    Args:
        test: the other images; None: a share `held_out` of each class, drawn by `seed`.
        label: "class" where a label is a number, else the name of an attribute.
        pooling, layer, side: as for `extract_features`.
        limit: at most N images of `source`, and of `test`, spread evenly.
        on_progress: called with (done, in all, what is done).

    Raises:
        SettingError: for a share that is no share, or as `extract_features` raises it.
        ValueError: for images without such a label, or all of one class; if scikit-learn is not installed.
    """
    if not 0 < held_out < 1:
        raise SettingError("held_out", "a share of the images, above 0 and below 1", held_out)
    scikit("linear_model")  # better known before the work than after it
    report = on_progress or (lambda *_: None)

    if label == "class" and test is not None:
        check_same_classes(source, test)

    def features_of(images: ImageSource) -> Features:
        check_labels(images, limit, label)
        return extract_features(
            images,
            codec,
            pooling=pooling,
            layer=layer,
            side=side,
            limit=limit,
            on_progress=lambda done, total: report(done, total, "encoding"),
        )

    known = features_of(source)
    _check_classes(known.classes(label))
    if test is None:
        is_held_out = hold_out_of_each(known.classes(label), held_out, seed)
        if not is_held_out.any():
            raise SettingError(
                "held_out",
                f"a share that holds out an image of {len(is_held_out)}",
                held_out,
                advice="give more images",
            )
        skipped = known.skipped
        asked, known = known.some(is_held_out), known.some(~is_held_out)
    else:
        asked = features_of(test)
        skipped = known.skipped + asked.skipped
    truth, train_classes = asked.classes(label), known.classes(label)
    _check_classes(train_classes)
    pixel_side = min(PIXEL_SIDE, *source.image(known.indices[0], 1).shape[1:])
    pixels = []
    for images, features in ((source, known), (source if test is None else test, asked)):
        some = []
        for number, index in enumerate(features.indices):
            some.append(fit_square(images.image(index, codec.channels), pixel_side).flatten())
            report(number, len(features.indices), "reading pixels")
        pixels.append(torch.stack(some))

    size = known.vectors.shape[1]
    num_components = min(size, len(pixels[0]), pixels[0].shape[1])
    found = {}
    for number, (key, name, (train_vectors, test_vectors), components) in enumerate(
        (
            ("features", "features", (known.vectors, asked.vectors), None),
            ("pca", "principal components", pixels, num_components),
            ("pixels", f"pixels, {pixel_side}x{pixel_side}", pixels, None),
        )
    ):
        report(number, 3, "classifying")
        predicted, has_converged = _classify(train_vectors, train_classes, test_vectors, components)
        accuracy = float((predicted == truth).double().mean())
        found[key] = Classification(
            name=name,
            num_features=components or train_vectors.shape[1],
            accuracy=accuracy,
            standard_error=(accuracy * (1 - accuracy) / len(truth)) ** 0.5,
            has_converged=has_converged,
            predicted=predicted,
        )
    return Probe(
        label=label,
        classes=sorted({*train_classes.tolist(), *truth.tolist()}),
        num_train=len(train_classes),
        num_test=len(truth),
        largest_share=float(truth.bincount().max() / len(truth)),
        lead_over_pca=_lead(found["features"].predicted, found["pca"].predicted, truth),
        test=asked,
        truth=truth,
        skipped=skipped,
        **found,
    )


def plot_confusion(found: Probe, path: Path, names: Sequence[str], *, title: str = "") -> None:
    """Draw the confusion matrix as a PNG at `path`: rows are the images' classes, shades shares of a row.

    Args:
        names: of `found.classes`.
    """
    counts = found.confusion
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    names = [shown_name(each) for each in names]
    longest = max(map(len, names))
    inches = min(max(4, 0.55 * len(names) + 1.5), MOST_INCHES) + 0.06 * longest
    with new_figure(path, (inches, inches)) as figure:
        axes = figure.subplots()
        axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
        axes.set_xticks(range(len(names)), names, rotation=90 if longest > 2 else 0, parse_math=False)
        axes.set_yticks(range(len(names)), names, parse_math=False)
        axes.set_xlabel("predicted")
        axes.set_ylabel(shown_name(found.label), parse_math=False)
        if len(names) <= 30:
            for (row, column), share in zip(
                torch.cartesian_prod(*[torch.arange(len(names))] * 2), shares.flatten()
            ):
                count = int(counts[row, column])
                if count:
                    color = "white" if share > 0.5 else "black"
                    axes.text(column, row, str(count), ha="center", va="center", color=color, fontsize=8)
        figure.suptitle(title, fontsize=10, parse_math=False)


def mistakes_sheet(
    found: Probe, source: ImageSource, names: Sequence[str], *, side: int = 64
) -> Tensor | None:
    """Test images that were taken for another class, a row for each of the most frequent confusions.

    Args:
        source: of the test images.
        names: of `found.classes`.
        side: small images are enlarged to about this many pixels.

    Returns:
        uint8 (3, H, W); None if there is no mistake.
    """
    name = dict(zip(found.classes, (in_words(shown_name(each)) for each in names)))
    pairs = list(zip(found.truth.tolist(), found.features.predicted.tolist()))
    frequent = Counter(pair for pair in pairs if pair[0] != pair[1]).most_common(SHEET_ROWS)
    rows = []
    for pair, _ in frequent:
        places = [place for place, each in enumerate(pairs) if each == pair][:SHEET_COLUMNS]
        rows.append([shrunk(source.image(found.test.indices[place]), LARGEST) for place in places])
    titles = [
        f"{name[true]}\ntaken for {name[seen]}\n{count} time{'s' * (count != 1)}"
        for (true, seen), count in frequent
    ]
    return sheet(rows, row_titles=titles, side=side) if rows else None


def _check_classes(classes: Tensor) -> None:
    found = classes.unique()
    if len(found) < 2:
        some = (
            f"all {len(classes)} are of class {int(found[0])}" if len(classes) > 1 else "there is one image"
        )
        raise ValueError(f"expected images of two classes or more, but {some}; give images of others, too")


def _classify(
    train: Tensor, classes: Tensor, test: Tensor, num_components: int | None
) -> tuple[Tensor, bool]:
    """The class of each test vector, int64, and whether the regression converged."""
    standardize = scikit("preprocessing").StandardScaler()
    regression = scikit("linear_model").LogisticRegression(max_iter=MAX_ITERATIONS)
    steps = [standardize, regression]
    if num_components is not None:
        steps.insert(0, scikit("decomposition").PCA(num_components, random_state=0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", scikit("exceptions").ConvergenceWarning)
        fitted = scikit("pipeline").make_pipeline(*steps).fit(train.numpy(), classes.numpy())
    predicted = torch.from_numpy(fitted.predict(test.numpy()).astype("int64"))
    return predicted, bool((regression.n_iter_ < MAX_ITERATIONS).all())


def _lead(ours: Tensor, others: Tensor, truth: Tensor) -> tuple[float, float, float]:
    """Difference of two accuracies on the same images, and its 95 % interval, normal in the paired differences."""
    differences = (ours == truth).double() - (others == truth).double()
    mean = float(differences.mean())
    spread = 1.96 * float(differences.std(correction=0)) / len(truth) ** 0.5
    return mean, mean - spread, mean + spread
