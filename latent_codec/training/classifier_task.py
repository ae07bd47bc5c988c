"""Training a classifier of images, which judges what a prior draws."""

from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import functional as F

from latent_codec.components.loading import open_component
from latent_codec.images.sources import ImageSource, SomeImages
from latent_codec.models.classifier import ImageClassifier
from latent_codec.training.build import construct
from latent_codec.training.config import TrainingConfig
from latent_codec.training.data import TrainingCrops
from latent_codec.training.labelled_data import ClassOf, Labels, hold_out
from latent_codec.training.task import Task


def build_classifier(config: TrainingConfig, source: ImageSource) -> ImageClassifier:
    """A new classifier from `model.arguments`, or `model.pretrained`, in float32; classes are as many as the data's.

    Raises:
        ValueError: for an argument that it does not have or cannot use, or images without labels.
    """
    if not config.data.label:
        raise ValueError('a classifier learns classes: set data.label, "class" or the name of an attribute.')
    if config.model.pretrained:
        return open_component(config.model.pretrained, "classifier", [ImageClassifier]).train()
    arguments = dict(config.model.arguments)
    arguments.setdefault("num_classes", Labels(source, config.data.label).num_classes)
    arguments.setdefault("sample_size", config.data.size)
    return construct(ImageClassifier, arguments, config.run.seed)


def check_classifier(
    config: TrainingConfig, classifier: ImageClassifier, source: ImageSource, stream
) -> None:
    """Refuse what a classifier cannot be trained by, before anything is written."""
    if stream is not None:
        raise ValueError("a classifier trains on images at hand: leave --stream out.")
    if not config.data.label:
        raise ValueError('a classifier learns classes: set data.label, "class" or the name of an attribute.')
    num_classes = Labels(source, config.data.label).num_classes
    if num_classes > classifier.config.num_classes:
        raise ValueError(
            f"the images have classes 0 to {num_classes - 1}, and the classifier {classifier.config.num_classes}."
        )


class ClassifierTask(Task):
    """Cross-entropy on random crops.

    Args:
        config: of the run.
        classifier: what `build_classifier` gave.
        source: images with labels.
        accelerator: device, precision and processes.
    """

    def __init__(
        self,
        config: TrainingConfig,
        classifier: ImageClassifier,
        source: ImageSource,
        accelerator: Accelerator,
        *,
        stream=None,
        resumes: bool = False,
    ):
        super().__init__(config, classifier, accelerator)
        labels = Labels(source, config.data.label)
        train, held_out = hold_out(source, config.data.held_out, config.run.seed)
        self.train, self.held_out = (self._crops(source, numbers, labels) for numbers in (train, held_out))
        self.num_images = len(train)
        self.train_directly(classifier)

    @staticmethod
    def headline(terms: dict[str, float]) -> str:
        held_out = terms.get("held_out_accuracy")
        beside = "" if held_out is None else f", {held_out:.4f} held out"
        return f"loss {terms['loss']:.4f}, accuracy {terms['accuracy']:.4f}{beside}"

    @property
    def skipped(self) -> list[str]:
        return self.train.skipped

    def batches(self, start: int) -> Iterator[tuple[list[int], Any]]:
        return self.positions(start, self.train)

    def begin_step(self, step: int) -> None:
        self.seed_dropout(step)

    def terms(self, batch: tuple[list[int], Any], step: int) -> dict[str, Tensor]:
        _, (images, labels) = batch
        labels = labels.to(self.accelerator.device)
        logits = self.model(images.to(self.accelerator.device)).float()
        accuracy = (logits.argmax(1) == labels).float().mean()
        return {"loss": F.cross_entropy(logits, labels), "accuracy": accuracy}

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """`held_out_accuracy`, of all images that are held out."""
        count = len(self.held_out)
        if not count:
            return {}
        classifier = self.ema.module.eval()
        right = 0
        for positions in torch.arange(count).split(256):
            crops = [self.held_out[position] for position in positions.tolist()]
            images, labels = torch.utils.data.default_collate(crops)
            right += int((classifier(images.to(self.accelerator.device)).argmax(1).cpu() == labels).sum())
        return {"held_out_accuracy": right / count}

    def _crops(self, source: ImageSource, numbers: list[int], labels: Labels) -> TrainingCrops:
        return TrainingCrops.configured(
            self.config,
            SomeImages(source, numbers),
            self.network.config.in_channels,
            label_of=ClassOf(labels, numbers),
        )
