"""Classifier-based rejection sampling: of many images of a label, the ones that look most like it.

VQ-VAE-2 (Razavi et al., arXiv:1906.00446, section 3.4) trades diversity for fidelity this way: a classifier ranks what
was drawn by the probability of the label it was drawn for.
"""

import math
from numbers import Integral

import torch
from torch import Tensor, nn


def num_to_keep(keep: float | int, num_images: int) -> int:
    """How many of `num_images` are kept: `keep` of them if it is an integer, else that share, rounded up.

    Raises:
        ValueError: for fewer than 1 or more than `num_images`, and for shares outside (0, 1].
    """
    if isinstance(keep, Integral) and 1 <= keep <= num_images:
        return int(keep)
    if isinstance(keep, float) and 0 < keep <= 1:
        return max(math.ceil(round(keep * num_images, 9)), 1)  # 0.07 * 100 is a little more than 7
    raise ValueError(
        f"keep is {keep!r}; give how many of the {num_images} images of a label to keep (1 to {num_images}), or a share "
        "as a float above 0, up to 1.0."
    )


def class_probabilities(classifier: nn.Module, images: Tensor, num_classes: int) -> Tensor:
    """What a classifier thinks of images (B, C, H, W) in [-1, 1]: probabilities (B, num_classes), float64.

    Float32 would call too many sure answers 1 to rank them.

    Args:
        classifier: gives logits (B, num_classes), or an output that holds them as `logits`.
        num_classes: of the prior.

    Raises:
        ValueError: for a classifier of another number of classes, or one whose logits are not finite.
    """
    weight = next(classifier.parameters())
    output = classifier(images.to(weight.device, weight.dtype))
    logits = output if isinstance(output, Tensor) else output.logits
    if logits.shape != (len(images), num_classes):
        raise ValueError(
            f"the classifier {type(classifier).__name__} gave logits of shape {tuple(logits.shape)} for {len(images)} "
            f"images; the prior has {num_classes} classes, so {(len(images), num_classes)} is needed."
        )
    if not logits.isfinite().all():
        raise ValueError(
            f"the classifier {type(classifier).__name__} gave NaN or infinity in {weight.dtype}, which ranks nothing; use "
            "float32, or look at its weights."
        )
    return logits.softmax(1, dtype=torch.float64)


def most_probable(probabilities: Tensor, num_kept: int) -> tuple[Tensor, Tensor]:
    """The `num_kept` most probable images of each label, in that order, earlier ones first where equal.

    Args:
        probabilities: (labels, images per label), of each image's own label.

    Returns:
        Places in the flattened `probabilities`, and the probabilities there: (labels * num_kept,).
    """
    ordered, places = probabilities.sort(dim=1, descending=True, stable=True)
    places = places + probabilities.shape[1] * torch.arange(len(places), device=places.device)[:, None]
    return places[:, :num_kept].flatten(), ordered[:, :num_kept].flatten()
