"""Attributes as directions of latents: find one, such as that of a smile, and move images along it.

direction = fit_attribute(codec, open_source("faces.tar"), "Smiling", without=["Male"])
direction.save("smiling.safetensors")
images = apply_attribute(codec, "face.jpg", direction, [-2, -1, 0, 1, 2])
"""

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from latent_codec.analysis.features import Features, check_vector_side, extract_features, hold_out_of_each
from latent_codec.analysis.scikit import scikit
from latent_codec.codec import ImageLike, LatentCodec
from latent_codec.errors import SettingError
from latent_codec.evaluation.one_vector import fit_image
from latent_codec.files import check_is_file, named_in_utf8, replacing
from latent_codec.images.labels import check_labels
from latent_codec.images.sources import ImageSource
from latent_codec.images.tensors import to_image
from latent_codec.torch_settings import ignoring_caller_settings

Method = Literal["means", "classifier"]
METHODS: tuple[Method, ...] = get_args(Method)
ENTRY = "latent_codec_attribute"
VERSION = 1


@dataclass(frozen=True, kw_only=True, eq=False)
class AttributeDirection:
    """From images without an attribute to images with it, in latents."""

    direction: Tensor
    """(C, 1, 1) float32: one amount of it is as far as the classes are apart in its direction."""
    label: str
    """Such as "Smiling", or "class=8" for one class against all others."""
    without: tuple[str, ...]
    """Other labels that were held equal."""
    method: Method
    codec: str
    """The codec's name."""
    space_fingerprint: str
    num_images: int
    """That it was fitted to."""
    num_positive: int
    """Of these, with the attribute."""
    auc: float
    """Of held-out images' projections on it: how probably one with the attribute is ahead of one without."""
    num_held_out: int

    def to_dict(self) -> dict[str, Any]:
        """Everything but the direction itself, of which its length."""
        found = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "direction"}
        return found | {"without": list(self.without), "length": float(self.direction.norm())}

    def save(self, path: str | os.PathLike) -> None:
        """Write a safetensors file, whole or not at all."""
        facts = {"version": VERSION} | self.to_dict()
        with replacing(path) as partial:
            partial.write_bytes(save({"direction": self.direction.contiguous()}, {ENTRY: json.dumps(facts)}))

    @classmethod
    def load(cls, path: str | os.PathLike, codec: LatentCodec | None = None) -> "AttributeDirection":
        """Read what `save` wrote; with `codec`, check that its latents are those that the direction was fitted to.

        Raises:
            ValueError: for another file, a damaged one, or one of another codec's latents.
            OSError: if it cannot be read.
        """
        path = Path(path)
        check_is_file(path)
        path.open("rb").close()  # the system's own words if it is forbidden
        try:
            with named_in_utf8(path) as name, safe_open(name, framework="pt") as stored:
                written = stored.metadata() or {}
                if ENTRY not in written:
                    raise ValueError("its header says nothing of one")
                facts = json.loads(written[ENTRY])
                direction = stored.get_tensor("direction")
            if (version := facts.pop("version")) != VERSION:
                raise ValueError(f"its version is {version}; update latent-codec")
            del facts["length"]
            found = cls(direction=direction.float(), **facts | {"without": tuple(facts["without"])})
            if direction.shape != (len(direction), 1, 1) or not found.direction.isfinite().all():
                raise ValueError("its direction is damaged")
            words = (found.label, found.method, found.codec, found.space_fingerprint, *found.without)
            if not all(isinstance(each, str) for each in words):
                raise ValueError("what it says of the direction is damaged")
        except (SafetensorError, AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(
                f"{path} is not the direction of an attribute, as `latent-codec attribute fit` writes one: {error}"
            ) from None
        if codec is not None:
            found.check(codec, path.name)
        return found

    def check(self, codec: LatentCodec, name: str = "the direction") -> None:
        """Refuse a codec whose latents are others than those that the direction was fitted to.

        Args:
            name: what the message calls the direction.

        Raises:
            ValueError: naming both.
        """
        if self.space_fingerprint != codec.space_fingerprint:
            raise ValueError(
                f"{name} is one in the latents of {self.codec} (space {self.space_fingerprint}), not of {codec.name} "
                f"(space {codec.space_fingerprint}). Use the codec {self.codec}, or fit the attribute to {codec.name}."
            )
        if len(self.direction) != codec.latent_space.channels:
            raise ValueError(
                f"{name} is damaged: it has {len(self.direction)} numbers, and latents of {codec.name} "
                f"{codec.latent_space.channels}; fit the attribute again"
            )

    def project(self, latents: Tensor) -> Tensor:
        """Latents (N, C, 1, 1), or vectors (N, C) -> where they are along the direction, (N,) float64, in amounts, from an arbitrary zero."""
        direction = self.direction.flatten().double()
        return latents.detach().cpu().double().flatten(1) @ direction / direction.square().sum()


@ignoring_caller_settings()
def fit_attribute(
    codec: LatentCodec,
    source: ImageSource,
    label: str,
    *,
    without: Sequence[str] = (),
    method: Method = "means",
    held_out: float = 0.2,
    limit: int | None = None,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> AttributeDirection:
    """Find the direction of an attribute in the latents of a codec with one vector per image.

    Latents are regressed on the label and on those of `without` together, z = b + y d + x B + noise, by least squares. With
    no other label d is the difference between the means of both classes; with others it is what the label says at
    equal others. A classifier's direction w is that of a logistic regression on latents from which the others' share x B is taken,
    as long as the classes are apart along it: (d . w / w . w) w.

    Args:
        label: an attribute that is true or false (1 or 0), or "NAME=VALUE" for one value against all others; "class=8" is
            class 8 of labels that are numbers.
        without: other labels, likewise, whose own direction is to stay out of it: "Male", where smiles and men are correlated.
        method: "means" or "classifier".
        held_out: share of the images of each class that the direction is measured on and not fitted to, drawn by `seed`.
        limit: at most N images, spread evenly over the source.
        on_progress: called with (images done, images in all).

    Raises:
        SettingError: for a label that an image has not, or that all images have; or too few images.
        ValueError: for a codec with a grid of latents, or without scikit-learn.
    """
    if method not in METHODS:
        raise SettingError("method", " or ".join(METHODS), method)
    if not 0 < held_out < 1:
        raise SettingError("held_out", "a share above 0 and below 1", held_out)
    check_vector_side(codec, "an attribute")
    for each in (label, *without):  # before all images are encoded
        check_labels(source, limit, each.partition("=")[0])
    features = extract_features(source, codec, limit=limit, on_progress=on_progress)
    latents = features.vectors.double()
    known = torch.stack(
        [torch.ones(len(latents)), *(_values(features, name) for name in (label, *without))], 1
    ).double()

    has_it = known[:, 1] == 1
    with_it, num_images = int(has_it.sum()), len(known)
    if not 2 <= with_it <= num_images - 2:
        raise SettingError(
            "label",
            "one that 2 or more of the images have and 2 or more lack",
            label,
            advice=f"{with_it} of {num_images} have it; give more images, or another label",
        )
    others = known[:, [0, *range(2, known.shape[1])]]
    explained = others @ torch.linalg.lstsq(others, known[:, 1], driver="gelsd").solution
    if torch.allclose(explained, known[:, 1], atol=1e-6):
        raise SettingError("without", f"labels that do not say what {label} says", ", ".join(without))
    measured = hold_out_of_each(~has_it, held_out, seed, at_least=1)
    fitted = ~measured
    direction = _direction(latents[fitted], known[fitted], method)
    projections = latents[measured] @ direction
    return AttributeDirection(
        direction=direction.float().view(-1, 1, 1),
        label=label,
        without=tuple(without),
        method=method,
        codec=codec.name,
        space_fingerprint=codec.space_fingerprint,
        num_images=int(fitted.sum()),
        num_positive=int(has_it[fitted].sum()),
        auc=float(scikit("metrics").roc_auc_score(has_it[measured].numpy(), projections.numpy())),
        num_held_out=int(measured.sum()),
    )


def _values(features: Features, label: str) -> Tensor:
    """Whether each image has an attribute, 1 or 0."""
    name, is_one_value, value = label.partition("=")
    classes = features.classes(name)
    if is_one_value:
        if not value.isdecimal():
            raise SettingError("label", "NAME or NAME=VALUE, the value an integer from 0", label)
        return (classes == int(value)).double()
    if (highest := int(classes.max())) > 1:
        raise SettingError(
            "label",
            "an attribute that is true or false",
            label,
            advice=f"it goes up to {highest}; `label={label}={highest}` is that value against all others",
        )
    return classes.double()


def _direction(latents: Tensor, known: Tensor, method: Method) -> Tensor:
    """Latents (N, D), and (N, K) with ones, the label and the other labels -> (D,), all float64."""
    effects = torch.linalg.lstsq(
        known, latents, driver="gelsd"
    ).solution  # which takes labels that say the same
    if method == "means":
        return effects[1]
    residuals = latents - known[:, 2:] @ effects[2:]
    scale = residuals.std(0).clamp(min=torch.finfo(torch.float64).tiny)
    logistic = scikit("linear_model").LogisticRegression(max_iter=1000)
    classifier = logistic.fit((residuals / scale).numpy(), known[:, 1].numpy())
    weight = torch.from_numpy(classifier.coef_[0]) / scale
    return (effects[1] @ weight) / weight.square().sum() * weight


def apply_attribute(
    codec: LatentCodec, image: ImageLike, direction: AttributeDirection, amounts: Sequence[float]
) -> Tensor:
    """Move an image along a direction: decode z + amount * direction.

    Args:
        amounts: 0 is the image's reconstruction, 1 as far as the classes are apart.

    Returns:
        (number of amounts, C, H, W) in [-1, 1], of the size that the codec was trained on.

    Raises:
        SettingError: for an amount that is not finite.
        ValueError: for a direction of another codec's latents, or an image that cannot be read.
    """
    for amount in amounts:
        if not math.isfinite(amount):
            raise SettingError("amounts", "finite numbers", amount)
    direction.check(codec)
    check_vector_side(codec, "an attribute")
    image = fit_image(to_image(image, channels=codec.channels), codec)
    latents = codec.encode(image)
    steps = torch.tensor(list(amounts), dtype=torch.float32).view(-1, 1, 1, 1)
    moved = latents.float().cpu() + steps * direction.direction
    return codec.decode(moved, size=tuple(image.shape[-2:]), output_type="pt")
