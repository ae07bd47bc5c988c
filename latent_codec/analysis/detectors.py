"""Detectors: what normal images are like to a codec, in a folder of its own.

DETECTOR/detector.json          settings, and the codec by name and fingerprint
         detector.safetensors   features' mean and covariance, scores of held-out normal images, their error by gradient
"""

import json
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from latent_codec.analysis.features import POOLINGS
from latent_codec.analysis.heat_maps import NUM_BINS, NormalError
from latent_codec.codec import LatentCodec
from latent_codec.components.weight_files import read_json
from latent_codec.errors import SettingError
from latent_codec.files import named_in_utf8, read_folder, replacing

SETTINGS, TENSORS = "detector.json", "detector.safetensors"
FORMAT, VERSION = "latent-codec detector", 1
MAX_JSON = 1 << 20
ERRORS = ("mse", "lpips")
SCORES = ("combined", "reconstruction", "elbo", "features")
_REFERENCE = "reference."


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a codec made of N images."""

    error: Tensor
    """Of the reconstruction, by the detector's measure: float64 (N,)."""
    squared_error: Tensor
    """Mean over an image's values: float64 (N,)."""
    kl: Tensor | None
    """KL(q(z | x) || N(0, I)) in nats per value of the image: float64 (N,); None of codecs without a posterior."""
    features: Tensor
    """(N, D)."""

    def __getitem__(self, places: Tensor) -> "Measured":
        return Measured(**{name: None if each is None else each[places] for name, each in vars(self).items()})


@dataclass(frozen=True, kw_only=True)
class Detector:
    """What `fit_detector` learned of normal images."""

    codec: str
    """Its name."""
    codec_path: str | None
    """What to open it by; None where it was at hand."""
    fingerprint: str
    error: str
    """Of reconstructions: mse or lpips."""
    pooling: str
    layer: str | None
    side: int | None
    """Of the features, and of the images, as `Features` says."""
    false_alarms: float
    """The share of normal images that the threshold is to take for unusual."""
    num_fitted: int
    """Images that mean and covariance are those of."""
    shrinkage: float
    """Of the covariance: 0 the features' own, 1 a multiple of the identity (Ledoit and Wolf, 2004)."""
    error_variance: float
    """Mean squared error of normal images: the variance of the Gaussian likelihood that the -ELBO is taken under."""
    feature_mean: Tensor
    """float64 (D,)."""
    feature_covariance: Tensor
    """float64 (D, D)."""
    normal_error: NormalError
    references: dict[str, Tensor]
    """Of each score, those of held-out normal images, sorted: float64 (num_held_out,)."""

    @property
    def num_held_out(self) -> int:
        return len(self.references["combined"])

    def scores(self, measured: Measured) -> dict[str, Tensor]:
        """Score images, float64 (N,) for each name; larger is more unusual.

        reconstruction: the error.
        elbo: -ELBO in bits per dim under a Gaussian of `error_variance` (the optimal sigma-VAE, arXiv:2006.13202, equation 6), at
            the mean of the posterior instead of a draw; only with a posterior.
        features: Mahalanobis distance to normal images' features.
        combined: the mean of these scores' ranks among those of held-out normal images, in [0, 1].
        """
        found = {"reconstruction": measured.error}
        if measured.kl is not None:
            nats = 0.5 * math.log(2 * math.pi * self.error_variance) + math.log(255 / 2)
            nats = nats + measured.squared_error / (2 * self.error_variance) + measured.kl
            found["elbo"] = nats / math.log(2)
        centered = (measured.features.double() - self.feature_mean).T
        root = torch.linalg.cholesky(self.feature_covariance)
        found["features"] = torch.linalg.solve_triangular(root, centered, upper=False).norm(dim=0)
        if self.references:
            ranks = [_rank(self.references[name], scores) for name, scores in found.items()]
            found = {"combined": torch.stack(ranks).mean(0)} | found
        return found

    def with_references(self, normal: Measured) -> "Detector":
        """The detector with the scores of held-out normal images."""
        fitted = self
        for _ in range(2):  # combined needs the references of the others
            scores = fitted.scores(normal)
            fitted = replace(fitted, references={name: each.sort().values for name, each in scores.items()})
        return fitted

    def threshold(self, by: str = "combined") -> float:
        """The score above which an image is unusual.

        Of n held-out normal images it is the ceil((n + 1) (1 - false_alarms))-th smallest score, so that a new normal image is above it
        with probability `false_alarms` at most (split conformal prediction).

        Raises:
            SettingError: for a score that this detector does not have.
        """
        if by not in self.references:
            raise SettingError("by", f"one of {', '.join(self.references)}", by)
        scores = self.references[by]
        return float(scores[math.ceil((len(scores) + 1) * (1 - self.false_alarms)) - 1])

    def check(self, codec: LatentCodec) -> None:
        """Refuse another codec.

        Raises:
            ValueError: naming both.
        """
        if codec.fingerprint != self.fingerprint:
            raise ValueError(
                f"the detector was fitted to {self.codec} (fingerprint {self.fingerprint}), not to {codec.name} (fingerprint "
                f"{codec.fingerprint}); give that codec, or fit a detector to this one"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, without tensors."""
        return self._settings() | {
            "num_held_out": self.num_held_out,
            "num_features": len(self.feature_mean),
            "thresholds": {name: self.threshold(name) for name in self.references},
        }

    def save(self, folder: str | os.PathLike) -> None:
        """Write the detector's folder, complete or not at all; an older detector's is overwritten.

        Raises:
            ValueError: if `folder` holds something else.
            OSError: if it cannot be written.
        """
        folder = check_detector_folder(folder)
        tensors = {
            "feature_mean": self.feature_mean,
            "feature_covariance": self.feature_covariance,
            "normal_error": self.normal_error.means,
        } | {_REFERENCE + name: scores for name, scores in self.references.items()}
        with replacing(folder) as new:
            new.mkdir()
            (new / TENSORS).write_bytes(save({name: each.contiguous() for name, each in tensors.items()}))
            facts = {"format": FORMAT, "version": VERSION} | self._settings()
            (new / SETTINGS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")

    def _settings(self) -> dict[str, Any]:
        return {
            name: value
            for name, value in vars(self).items()
            if not isinstance(value, (Tensor, NormalError, dict))
        }


def load_detector(folder: str | os.PathLike) -> Detector:
    """Open what `Detector.save` wrote.

    Raises:
        ValueError: for a folder without a detector, one that is damaged, or a newer format.
    """
    folder = Path(folder)
    if not (folder / SETTINGS).is_file():
        raise ValueError(f"{folder} holds no detector ({SETTINGS}); `latent-codec anomaly fit` makes one")
    return read_folder(folder, lambda: _read(folder))


def _read(folder: Path) -> Detector:
    try:
        facts = read_json(folder / SETTINGS, MAX_JSON)
        if facts.pop("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT!r}")
        version = facts.pop("version")
        if version != VERSION:
            raise ValueError(f"expected version {VERSION} of its format, got {version}; update latent-codec")
        with named_in_utf8(folder / TENSORS) as name:
            tensors = {key: each.double() for key, each in load_file(name).items()}
        if not all(each.isfinite().all() for each in tensors.values()):
            raise ValueError(f"{TENSORS} holds NaN or infinity")
        found = Detector(
            **facts,
            feature_mean=tensors.pop("feature_mean"),
            feature_covariance=tensors.pop("feature_covariance"),
            normal_error=NormalError(tensors.pop("normal_error")),
            references={name.removeprefix(_REFERENCE): each for name, each in tensors.items()},
        )
        _check(found)
        return found
    except (AttributeError, KeyError, OSError, RuntimeError, SafetensorError, TypeError, ValueError) as error:
        raise ValueError(f"the detector {folder} cannot be read ({error}); fit it again") from error


def _check(detector: Detector) -> None:
    """Refuse what `Detector.save` does not write."""
    size, references = len(detector.feature_mean), detector.references
    means, count = detector.normal_error.means, len(references["combined"])
    for name, is_right in {
        "codec": isinstance(detector.codec, str) and isinstance(detector.fingerprint, str),
        "codec_path": isinstance(detector.codec_path, str | None),
        "error": detector.error in ERRORS,
        "pooling": detector.pooling in POOLINGS,
        "layer": isinstance(detector.layer, str | None),
        "side": detector.side is None or (type(detector.side) is int and detector.side > 0),
        "num_fitted": type(detector.num_fitted) is int,
        "false_alarms": isinstance(detector.false_alarms, float)
        and 0 < detector.false_alarms < 1
        and math.ceil((count + 1) * (1 - detector.false_alarms)) <= count,
        "error_variance": isinstance(detector.error_variance, float)
        and 0 < detector.error_variance < math.inf,
        "feature_mean": detector.feature_mean.shape == (size,),
        "feature_covariance": detector.feature_covariance.shape == (size, size)
        and is_definite(detector.feature_covariance),
        "normal_error": means.shape == (NUM_BINS,) and bool((means > 0).all()),
        "references": {"reconstruction", "features"} <= references.keys() <= set(SCORES)
        and all(each.shape == (count,) and bool((each.diff() >= 0).all()) for each in references.values()),
    }.items():
        if not is_right:
            raise ValueError(f"its {name} is damaged")


def check_detector_folder(folder: str | os.PathLike) -> Path:
    """The folder, if a detector may be saved there: it is new, empty or a detector's.

    Raises:
        ValueError: if it holds something else.
    """
    folder = Path(folder)
    if folder.is_dir() and any(folder.iterdir()) and not (folder / SETTINGS).is_file():
        raise ValueError(f"{folder} holds other files and no detector; give a new or empty folder")
    return folder


def is_definite(covariance: Tensor) -> bool:
    """Whether a covariance (D, D) has a Cholesky root, which the Mahalanobis distance needs."""
    return not torch.linalg.cholesky_ex(covariance.double()).info.item()


def _rank(reference: Tensor, scores: Tensor) -> Tensor:
    """The share of a sorted reference that is below each score, equal ones counting half."""
    below, up_to = (torch.searchsorted(reference, scores, right=right) for right in (False, True))
    return (below + up_to).double() / (2 * len(reference))
