"""Classifiers that judge images, each trained on images that nothing they judge was fitted to, or with a seed of its own."""

import torch
from torch import Tensor

from latent_codec.images.sources import ImageSource
from latent_codec.models.classifier import ImageClassifier
from latent_codec.training.classifier_task import build_classifier
from latent_codec.training.config import load_config
from latent_codec.training.loop import train

PRESET = "fashion-mnist-classifier"
CONFIDENCE = 0.9


def train_judge(source: ImageSource, out, *overrides: str) -> ImageClassifier:
    """The preset fashion-mnist-classifier with a seed of its own, for evaluation."""
    config = load_config(PRESET, ["run.seed=1234", "data.held_out=0.02", *overrides])
    return train(config, build_classifier(config, source), source, out).network.eval()


@torch.no_grad()
def probabilities(judge: ImageClassifier, images: Tensor) -> Tensor:
    """(N, num_classes)."""
    return torch.cat([judge(part).softmax(1) for part in images.split(500)])
