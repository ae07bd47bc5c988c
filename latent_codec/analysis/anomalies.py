"""Anomalies: images unlike the normal ones that a detector was fitted to.

image --codec--+--> reconstruction --> error: MSE or LPIPS ------------------------+
               +--> error and posterior --> -ELBO ---------------------------------+--> rank of each among held-out normal
               +--> features --> Mahalanobis distance to those of normal images ---+    images; combined: the mean rank
"""

import logging
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latent_codec.analysis.detectors import ERRORS, Detector, Measured, is_definite
from latent_codec.analysis.features import Features, extract_features
from latent_codec.analysis.heat_maps import NormalErrorMeter
from latent_codec.analysis.scikit import scikit
from latent_codec.codec import LatentCodec
from latent_codec.errors import SettingError
from latent_codec.evaluation.one_vector import fit_image
from latent_codec.evaluation.reconstruction import BATCH_PIXELS
from latent_codec.images.batches import batch_by_shape, iter_images
from latent_codec.images.labels import class_of
from latent_codec.images.sources import Data, ImageSource, SomeImages, open_source, spread
from latent_codec.metrics import lpips_distance
from latent_codec.torch_settings import ignoring_caller_settings

logger = logging.getLogger(__name__)

MAX_FEATURES = 4096
NUM_RESAMPLES = 1000
"""Of the bootstrap."""


@dataclass(frozen=True, kw_only=True)
class AreaUnderCurve:
    """ROC AUC: the probability that an unusual image scores above a normal one, ties counting half."""

    value: float
    low: float
    high: float
    """The 95 % interval of a bootstrap over normal and over unusual images (percentiles)."""


@dataclass(frozen=True, kw_only=True)
class Anomalies:
    """How unusual images are; of every score a larger one is more unusual."""

    codec: str
    names: list[str]
    indices: list[int]
    """Of the images in their source."""
    scores: dict[str, Tensor]
    """By name, float64 (N,): `reconstruction`, `elbo` (bits per dim) where the codec has a posterior, `features`, `combined`."""
    by: str
    """The score that decides."""
    threshold: float
    """Images above it are unusual."""
    false_alarms: float
    """The share of normal images that the threshold is to take for unusual."""
    is_normal: Tensor | None
    """bool (N,), as the labels say; None without labels."""
    auc: dict[str, AreaUnderCurve] | None
    """Of each score, where there are labels."""
    skipped: list[str]
    """One line for each image that could not be read, naming it and the reason."""

    @property
    def is_unusual(self) -> Tensor:
        """bool (N,)."""
        return self.scores[self.by] > self.threshold

    def ranked(self) -> list[int]:
        """Positions of the images, the most unusual first; equal ones, such as those of the highest rank, by their error."""
        by_error = self.scores["reconstruction"].argsort(descending=True, stable=True)
        return by_error[self.scores[self.by][by_error].argsort(descending=True, stable=True)].tolist()

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        is_unusual = self.is_unusual.tolist()
        found = {
            "codec": self.codec,
            "by": self.by,
            "threshold": self.threshold,
            "false_alarms": self.false_alarms,
            "num_images": len(self.names),
            "num_unusual": sum(is_unusual),
        }
        if self.is_normal is not None:
            found |= {
                "auc": {name: vars(auc) for name, auc in self.auc.items()},
                "measured_false_alarms": float(self.is_unusual[self.is_normal].double().mean()),
                "detected": float(self.is_unusual[~self.is_normal].double().mean()),
            }
        columns = {name: scores.tolist() for name, scores in self.scores.items()}
        images = [
            {
                "name": self.names[place],
                "index": self.indices[place],
                "is_unusual": is_unusual[place],
            }
            | {name: column[place] for name, column in columns.items()}
            for place in self.ranked()
        ]
        return found | {"images": images, "skipped": self.skipped}


def fit_detector(
    data: Data | ImageSource,
    codec: str | os.PathLike | LatentCodec = "default",
    *,
    error: str = "mse",
    pooling: str | None = None,
    layer: str | None = None,
    side: int | None = None,
    held_out: float = 0.2,
    false_alarms: float = 0.05,
    label: str | None = None,
    normal: int | None = None,
    limit: int | None = None,
    split: str = "train",
    on_progress: Callable[[int, int], None] | None = None,
) -> Detector:
    """Learn what normal images are like to a codec.

    Mean and covariance of the features are those of one share of the images; ranks and threshold are those of the others, which
    are held out. The codec should not have been trained on any of them: it errs less on images that it knows, so that new normal
    images raise more alarms than stated.

    Images that cannot be read are left out with a warning.

    Args:
        data: normal images as `open_source` takes them, or an open source.
        codec: an open one, or what `LatentCodec.from_pretrained` takes.
        error: of a reconstruction, "mse" or "lpips" (SqueezeNet).
        pooling, layer, side: of the features, as `extract_features` takes them.
        held_out: the share of the images that is held out, drawn with a fixed seed.
        false_alarms: the share of normal images that may be taken for unusual.
        label, normal: as `score_anomalies` takes them: only images with this label are taken. None: all.
        limit: at most N images, spread evenly; None means all.
        split: of data that has splits.
        on_progress: called with (images done, images in all), each image counting twice.

    Raises:
        SettingError: for another error, shares out of range, too few images for them, or a label that no image has.
        ValueError: as `extract_features`, or if scikit-learn is not installed.
    """
    if error not in ERRORS:
        raise SettingError("error", " or ".join(ERRORS), error)
    for name, share in (("held_out", held_out), ("false_alarms", false_alarms)):
        if not 0 < share < 1:
            raise SettingError(name, "a share between 0 and 1", share)
    _check_label(label, normal)
    ledoit_wolf = scikit("covariance").ledoit_wolf
    source = data if isinstance(data, ImageSource) else open_source(data, split=split)
    if label is not None:
        classes = _classes(source, list(range(len(source))), label, normal, and_others=False)
        source = SomeImages(source, [index for index, found in classes.items() if found == normal])
    path = None if isinstance(codec, LatentCodec) else os.fspath(codec)
    codec = codec if isinstance(codec, LatentCodec) else LatentCodec.from_pretrained(codec)
    progress = _Halves(on_progress)
    features = extract_features(
        source, codec, pooling=pooling, layer=layer, side=side, limit=limit, on_progress=progress.first
    )
    for reason in features.skipped:
        logger.warning("skipped: %s", reason)
    if features.vectors.shape[1] > MAX_FEATURES:
        raise SettingError(
            "pooling",
            f"one of at most {MAX_FEATURES:,} features, for their covariance",
            f"{features.pooling}, {features.vectors.shape[1]:,}",
            advice="take `pooling=mean-std`",
        )
    count = len(features.names)
    num_held_out = round(held_out * count)
    least = math.ceil(1 / false_alarms) - 1
    if num_held_out < least or count - num_held_out < 2:
        raise SettingError(
            "false_alarms",
            f"at least {least} held-out normal images for a share of {false_alarms:g}, and 2 others",
            f"{num_held_out} of {count}",
            advice="give more images, or raise `held_out` or `false_alarms`",
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    meter = NormalErrorMeter()
    measured = _measure(codec, source, features, error, progress.second, meter)
    normal, fitted = measured[order[:num_held_out]], measured[order[num_held_out:]]
    covariance, shrinkage = ledoit_wolf(fitted.features.double().numpy())
    if not covariance.any():
        raise ValueError(
            f"all normal images have the same features ({features.pooling}); give images that differ"
        )
    if not is_definite(torch.from_numpy(covariance)):
        raise ValueError(
            f"{len(fitted.error)} normal images are too few for the covariance of {features.vectors.shape[1]} features; give more"
        )
    return Detector(
        codec=codec.name,
        codec_path=path,
        fingerprint=codec.fingerprint,
        error=error,
        pooling=features.pooling,
        layer=layer,
        side=features.side,
        false_alarms=false_alarms,
        num_fitted=len(fitted.error),
        shrinkage=float(shrinkage),
        error_variance=max(float(fitted.squared_error.mean()), 1e-8),
        feature_mean=fitted.features.double().mean(0),
        feature_covariance=torch.from_numpy(covariance),
        normal_error=meter.result(),
        references={},
    ).with_references(normal)


def score_anomalies(
    detector: Detector,
    data: Data | ImageSource,
    codec: LatentCodec | None = None,
    *,
    by: str = "combined",
    label: str | None = None,
    normal: int | None = None,
    limit: int | None = None,
    split: str = "test",
    on_progress: Callable[[int, int], None] | None = None,
) -> Anomalies:
    """Say how unusual images are.

    Args:
        data: images as `open_source` takes them, or an open source.
        codec: the one that the detector was fitted to; None: opened as it was then.
        by: the score that decides, one of SCORES.
        label: "class" where a label is a number, else the name of an attribute; None: there are no labels.
        normal: the value of the label that normal images have.
        limit: at most N images, spread evenly; None means all.
        split: of data that has splits.
        on_progress: called with (images done, images in all), each image counting twice.

    Raises:
        SettingError: for a score that the detector does not have, or a label without the value of normal images.
        ValueError: for another codec, images that cannot be read, or labels that are missing, all normal or none.
    """
    threshold = detector.threshold(by)
    _check_label(label, normal)
    source = data if isinstance(data, ImageSource) else open_source(data, split=split)
    codec = open_codec(detector) if codec is None else codec
    detector.check(codec)
    classes = None
    if label is not None:
        classes = _classes(source, spread(len(source), limit), label, normal, and_others=True)
    progress = _Halves(on_progress)
    features = extract_features(
        source,
        codec,
        pooling=detector.pooling,
        layer=detector.layer,
        side=detector.side,
        limit=limit,
        on_progress=progress.first,
    )
    if features.vectors.shape[1] != len(detector.feature_mean):
        raise ValueError(
            f"the detector knows {len(detector.feature_mean)} features of an image ({detector.pooling}), and these images have "
            f"{features.vectors.shape[1]}; give images of the size that it was fitted to"
        )
    scores = detector.scores(_measure(codec, source, features, detector.error, progress.second))
    is_normal = auc = None
    if classes is not None:
        is_normal = torch.tensor([classes[index] == normal for index in features.indices])
        auc = {name: area_under_curve(each, is_normal) for name, each in scores.items()}
    return Anomalies(
        codec=codec.name,
        names=features.names,
        indices=features.indices,
        scores=scores,
        by=by,
        threshold=threshold,
        false_alarms=detector.false_alarms,
        is_normal=is_normal,
        auc=auc,
        skipped=features.skipped,
    )


def area_under_curve(scores: Tensor, is_normal: Tensor) -> AreaUnderCurve:
    """ROC AUC of scores (N,), larger for unusual images, and its bootstrap interval."""
    _, places = torch.unique(scores, return_inverse=True)
    groups = places[~is_normal].numpy(), places[is_normal].numpy()
    size, generator = int(places.max()) + 1, np.random.default_rng(0)

    def area(unusual: np.ndarray, normal: np.ndarray) -> float:
        above, below = np.bincount(unusual, minlength=size), np.bincount(normal, minlength=size)
        return float(above @ (np.cumsum(below) - below / 2)) / (len(unusual) * len(normal))

    drawn = [area(*(generator.choice(each, len(each)) for each in groups)) for _ in range(NUM_RESAMPLES)]
    low, high = np.quantile(drawn, (0.025, 0.975))
    return AreaUnderCurve(value=area(*groups), low=float(low), high=float(high))


def heat_map(detector: Detector, codec: LatentCodec, image: Tensor) -> Tensor:
    """Where an image (C, H, W) is unusual: (H, W), how many times the error of normal images at equal local gradient.

    A codec that makes one vector of an image gets it as `image_as_seen` gives it.
    """
    restored = codec.roundtrip(image, output_type="pt").cpu()
    return detector.normal_error.heat_map(image[None], restored)[0]


def image_as_seen(detector: Detector, codec: LatentCodec, source: ImageSource, index: int) -> Tensor:
    """An image as the codec is given it: (C, H, W) in [-1, 1]."""
    return fit_image(source.image(index, codec.channels), codec, detector.side)


def open_codec(detector: Detector) -> LatentCodec:
    """The codec of a detector, opened as it was when the detector was fitted.

    Raises:
        ValueError: if it is not there any more, or another is.
    """
    if detector.codec_path is None:
        raise SettingError("codec", f"{detector.codec}, which the detector was fitted to")
    codec = LatentCodec.from_pretrained(detector.codec_path)
    detector.check(codec)
    return codec


@ignoring_caller_settings()
def _measure(
    codec: LatentCodec,
    source: ImageSource,
    features: Features,
    error: str,
    on_progress: Callable[[int, int], None] | None,
    meter: NormalErrorMeter | None = None,
) -> Measured:
    """Send the images that have features through the codec."""
    codec.check_keeps_size("an error of each image")
    images = iter_images(source, channels=codec.channels, indices=features.indices, on_progress=on_progress)
    images = ((index, fit_image(image, codec, features.side)) for index, image in images)
    errors, squared, kls = [], [], []
    for _, batch in batch_by_shape(images, max_pixels=BATCH_PIXELS):
        batch = batch.to(codec.device)
        encoding = codec.encode_all(batch)
        restored = codec.decode(encoding.latents, size=tuple(batch.shape[2:]), output_type="pt")
        squared.append((batch - restored).double().square().mean((1, 2, 3)).cpu())
        errors.append(squared[-1] if error == "mse" else lpips_distance(restored, batch).double().cpu())
        if encoding.posterior is not None:
            kls.append(encoding.posterior.kl().double().cpu() / batch[0].numel())
        if meter is not None:
            meter.add(batch, restored)
    return Measured(
        error=torch.cat(errors),
        squared_error=torch.cat(squared),
        kl=torch.cat(kls) if kls else None,
        features=features.vectors,
    )


def _check_label(label: str | None, normal: int | None) -> None:
    if (label is None) != (normal is None):
        raise SettingError(
            "normal", "the value that normal images have", normal, advice="it goes with `label`"
        )


def _classes(
    source: ImageSource, indices: list[int], label: str, normal: int, *, and_others: bool
) -> dict[int, int]:
    """The class of each image; some have the normal one, and others do not where `and_others`."""
    classes = {index: class_of(source, index, label, setting="label") for index in indices}
    found = sorted(set(classes.values()))
    if normal not in found or (and_others and len(found) == 1):
        raise SettingError(
            "normal",
            f"a value of {label} that some images have" + (" and others do not" if and_others else ""),
            normal,
            advice=f"these images have {', '.join(map(str, found[:20]))}",
        )
    return classes


class _Halves:
    """Two passes over the same images, reported as one."""

    def __init__(self, report: Callable[[int, int], None] | None):
        self._report = report

    def first(self, done: int, total: int) -> None:
        if self._report:
            self._report(done, 2 * total)

    def second(self, done: int, total: int) -> None:
        if self._report:
            self._report(total + done, 2 * total)
