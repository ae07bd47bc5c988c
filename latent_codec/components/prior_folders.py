"""Prior folders: what a path stands for, opened strictly."""

import os
from pathlib import Path

from latent_codec.components.loading import find_component, open_component
from latent_codec.models.autoregressive import AutoregressivePrior
from latent_codec.models.pixelcnn import PixelCNN
from latent_codec.models.pixelsnail import PixelSNAIL

CLASSES = {each.__name__: each for each in (PixelCNN, PixelSNAIL)}


def find_prior(path: str | os.PathLike) -> Path:
    """The diffusers folder of a prior: the path itself, or prior/ of a run or a pipeline.

    Raises:
        ValueError: if there is none.
    """
    return find_component(path, "prior", CLASSES.values())


def load_prior(path: str | os.PathLike) -> AutoregressivePrior:
    """The prior that `find_prior` finds, in float32 and eval mode.

    Raises:
        ValueError: if there is none, or its weights do not fit its config.
    """
    return open_component(path, "prior", CLASSES.values())
