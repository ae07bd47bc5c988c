"""Pipeline folders: finding one by name or path, and opening it."""

import os
from pathlib import Path

import torch

from latent_codec.components.codec_folders import SHIPPED_PIPELINES as SHIPPED
from latent_codec.components.weight_files import read_config_file
from latent_codec.pipelines.hierarchical_prior_pipeline import HierarchicalPriorPipeline
from latent_codec.pipelines.loading import INDEX, shipped_pipeline
from latent_codec.pipelines.prior_pipeline import PriorPipeline

CLASSES = {each.__name__: each for each in (PriorPipeline, HierarchicalPriorPipeline)}
PRIORS = ("prior", "top_prior", "middle_prior", "bottom_prior")
"""Names that pipelines have for their priors, top level first."""


def find_pipeline(name_or_path: str | os.PathLike) -> Path:
    """The folder of a saved pipeline over priors: a shipped one's name, the path itself, or its subfolder pipeline/.

    Raises:
        ValueError: if there is none.
    """
    if shipped := shipped_pipeline(str(name_or_path)):
        return shipped
    given = Path(name_or_path)
    for folder in (given, given / "pipeline"):
        if not (folder / INDEX).exists():
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
    return read_config_file(folder / INDEX)["_class_name"]


def load_pipeline(
    name_or_path: str | os.PathLike, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> PriorPipeline | HierarchicalPriorPipeline:
    """The pipeline that `find_pipeline` finds.

    Raises:
        ValueError: if there is none, its parts are damaged or do not fit together.
    """
    folder = find_pipeline(name_or_path)
    return CLASSES[pipeline_class(folder)].from_pretrained(folder, torch_dtype=dtype).to(device)
