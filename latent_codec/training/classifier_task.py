"""Training a classifier of images, which judges the samples of a prior."""

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import functional as F

from latent_codec.codec import LatentCodec
from latent_codec.components.loading import open_component
from latent_codec.images.sources import ImageSource, SomeImages
from latent_codec.models.classifier import ImageClassifier
from latent_codec.training.build import construct
from latent_codec.training.config import TrainingConfig
from latent_codec.training.data import TrainingCrops
from latent_codec.training.labelled_data import ClassOf, Labels, hold_out
from latent_codec.training.task import Task, TaskInputs, collate


def build_classifier(
    config: TrainingConfig, source: ImageSource, codec: LatentCodec | None = None
) -> ImageClassifier:
    """A new classifier from `model.arguments`, or `model.pretrained`, in float32; classes are as many as the data's.

    Raises:
        ValueError: for an argument that it does not have or cannot use, or images without labels.
    """
    _check_label(config)
    if config.model.pretrained:
        return open_component(config.model.pretrained, "classifier", [ImageClassifier]).train()
    arguments = dict(config.model.arguments)
    arguments.setdefault("num_classes", Labels(source, config.data.label).num_classes)
    arguments.setdefault("sample_size", config.data.size)
    return construct(ImageClassifier, arguments, config.run.seed)


def _check_label(config: TrainingConfig) -> None:
    if not config.data.label:
        expected = 'what a classifier learns: "class" or the name of an attribute'
        raise config.error("data.label", expected)


class ClassifierTask(Task):
    """Cross-entropy on random crops."""

    def __init__(
        self, config: TrainingConfig, network: ImageClassifier, inputs: TaskInputs, accelerator: Accelerator
    ):
        source, labels = inputs.source, Labels(inputs.source, config.data.label)
        train, self.held_out = (
            TrainingCrops.configured(
                config,
                SomeImages(source, numbers),
                network.config.in_channels,
                label_of=ClassOf(labels, numbers),
            )
            for numbers in hold_out(source, config.data.held_out, config.run.seed)
        )
        super().__init__(config, network, train, accelerator)

    @classmethod
    def check(cls, config: TrainingConfig, network: ImageClassifier, inputs: TaskInputs) -> None:
        _check_label(config)
        num_classes = Labels(inputs.source, config.data.label).num_classes
        if num_classes > network.config.num_classes:
            raise ValueError(
                f"the images have classes 0 to {num_classes - 1}, and the classifier {network.config.num_classes}."
            )

    @staticmethod
    def headline(terms: dict[str, float]) -> str:
        held_out = terms.get("held_out_accuracy")
        measured = "" if held_out is None else f", {held_out:.4f} held out"
        return f"loss {terms['loss']:.4f}, accuracy {terms['accuracy']:.4f}{measured}"

    def loss(self, batch: tuple[Tensor, Tensor], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        images, labels = map(self.to_device, batch)
        logits = self.model(images).float()
        accuracy = (logits.argmax(1) == labels).float().mean()
        return F.cross_entropy(logits, labels), {"accuracy": accuracy}

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """`held_out_accuracy`, of all images that are held out."""
        count = len(self.held_out)
        if not count:
            return {}
        classifier = self.ema.module.eval()
        right = 0
        for positions in torch.arange(count).split(256):
            images, labels = map(self.to_device, collate(self.held_out, positions.tolist()))
            right += int((classifier(images).argmax(1) == labels).sum())
        return {"held_out_accuracy": right / count}
