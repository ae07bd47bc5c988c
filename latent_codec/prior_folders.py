"""Prior folders: what a path stands for, opened strictly."""

import json
import os
from pathlib import Path

from latent_codec.models.autoregressive import AutoregressivePrior
from latent_codec.models.pixelcnn import PixelCNN
from latent_codec.models.pixelsnail import PixelSNAIL

CLASSES = {each.__name__: each for each in (PixelCNN, PixelSNAIL)}


def find_prior(path: str | os.PathLike) -> Path:
    """The diffusers folder of a prior: the path itself, or what lies under prior/ of a run or a pipeline.

    Raises:
        ValueError: if there is none.
    """
    given = Path(path)
    for folder in (given, given / "prior"):
        config = folder / "config.json"
        if not config.is_file():
            continue
        try:
            class_name = json.loads(config.read_text())["_class_name"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{config} is not the config of a diffusers model.") from error
        if class_name not in CLASSES:
            raise ValueError(f"{folder} holds a {class_name}; a prior is a {' or a '.join(CLASSES)}.")
        return folder
    raise ValueError(
        f"{given} is no prior: it has neither config.json nor prior/ (as run folders and pipelines have)."
        if given.exists()
        else f"{given} does not exist; give a prior's folder, a run folder or a pipeline's."
    )


def load_prior(path: str | os.PathLike) -> AutoregressivePrior:
    """The prior that `find_prior` finds, in float32 and eval mode.

    Raises:
        ValueError: if there is none, or its weights do not fit its config.
    """
    folder = find_prior(path)
    prior_class = CLASSES[json.loads((folder / "config.json").read_text())["_class_name"]]
    try:
        prior, loaded = prior_class.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except (
        Exception
    ) as error:  # diffusers checks neither config nor weights: a wrong entry can raise anything
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(f"{folder} is damaged, or its weights do not fit its config: {reason}") from error
    wrong = [*loaded["missing_keys"], *loaded["unexpected_keys"]]
    if wrong:
        raise ValueError(
            f"the weights of {folder} do not fit its config: {wrong[0]} is missing or unexpected."
        )
    return prior.float().eval()
