"""Pipeline folders: what a name or a path stands for, and opening it."""

import json
import os
from pathlib import Path

import torch
from diffusers.utils import logging

from latent_codec.codec import to_precision
from latent_codec.codec_folders import ASSETS
from latent_codec.pipelines.hierarchical_prior_pipeline import HierarchicalPriorPipeline
from latent_codec.pipelines.prior_pipeline import PriorPipeline

CLASSES = {each.__name__: each for each in (PriorPipeline, HierarchicalPriorPipeline)}
SHIPPED = ("fashion-mnist",)
PRIORS = ("prior", "top_prior", "middle_prior", "bottom_prior")
"""Names that pipelines have for their priors, top level first."""


def find_pipeline(name_or_path: str | os.PathLike) -> Path:
    """The folder of a saved pipeline over priors: a shipped one's name, the path itself, or what lies under its pipeline/.

    Raises:
        ValueError: if there is none.
    """
    if str(name_or_path) in SHIPPED:
        folder = ASSETS / str(name_or_path)
        if not (folder / "model_index.json").is_file():
            raise ValueError(
                f"the shipped pipeline {folder.name} is missing from this installation; reinstall it."
            )
        return folder
    given = Path(name_or_path)
    for folder in (given, given / "pipeline"):
        if not (folder / "model_index.json").is_file():
            continue
        class_name = pipeline_class(folder)
        if class_name not in CLASSES:
            raise ValueError(f"{folder} holds a {class_name}; a {' or a '.join(CLASSES)} is needed.")
        return folder
    raise ValueError(
        f"{given} is no pipeline: it has neither model_index.json nor pipeline/. `latent-codec pipeline` joins a codec and "
        "its priors to one."
        if given.exists()
        else f"{given} does not exist; give a pipeline's folder or a shipped one ({', '.join(SHIPPED)})."
    )


def pipeline_class(folder: Path) -> str:
    """The class that a pipeline's model_index.json names."""
    index = folder / "model_index.json"
    try:
        return str(json.loads(index.read_text())["_class_name"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{index} is not the index of a diffusers pipeline.") from error


def load_pipeline(
    name_or_path: str | os.PathLike, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> PriorPipeline | HierarchicalPriorPipeline:
    """The pipeline that `find_pipeline` finds.

    Raises:
        ValueError: if there is none, its parts are damaged or do not fit together.
    """
    folder = find_pipeline(name_or_path)
    shows_progress = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # of the files that are read, which takes a moment
    try:
        pipe = CLASSES[pipeline_class(folder)].from_pretrained(
            folder, use_safetensors=True, local_files_only=True
        )
    except Exception as error:  # diffusers checks little of what it reads: a wrong entry can raise anything
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(f"{folder} is damaged, or its parts do not fit: {reason}") from error
    finally:
        if shows_progress:
            logging.enable_progress_bar()
    for component in pipe.components.values():
        if dtype != torch.float32 and isinstance(component, torch.nn.Module):
            to_precision(component, dtype)
    return pipe.to(device)


def priors_of(pipe: PriorPipeline | HierarchicalPriorPipeline) -> dict:
    """A pipeline's priors by the names of its components, top level first."""
    found = {name: getattr(pipe, name, None) for name in PRIORS}
    return {name: prior for name, prior in found.items() if prior is not None}
