"""Loading the components of a pipeline's folder, of a few classes that are known here, without diffusers' own loading.

A folder's model_index.json names modules and classes; diffusers imports what it names, and some versions also code that is in
the folder.
"""

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import nn

from latent_codec import deprecated
from latent_codec.components.codec_folders import ASSETS, SHIPPED_PIPELINES, load_autoencoder
from latent_codec.components.loading import find_weights_in, open_component, read_config_file
from latent_codec.components.prior_folders import load_prior
from latent_codec.models.classifier import ImageClassifier
from latent_codec.models.own_weights import check_finite, own_weights

INDEX = "model_index.json"


def shipped_pipeline(name: str) -> Path | None:
    """Find the folder of a shipped pipeline; None for any other name.

    Raises:
        ValueError: if this installation lacks it.
    """
    if name not in SHIPPED_PIPELINES:
        return None
    if not (ASSETS / name / INDEX).is_file():
        raise ValueError(f"the shipped pipeline {name} is missing from this installation; reinstall it")
    return ASSETS / name


def load_components(folder: Path, pipeline_class: type, given: dict[str, Any]) -> dict[str, Any]:
    """What a pipeline of `pipeline_class` is built from: the components and settings that the index in `folder` lists.

    Args:
        given: components and settings that are used in place of the folder's.

    Raises:
        ValueError: if the index names another pipeline, component or class, or a component is damaged.
        OSError: if a file cannot be read.
    """
    path = folder / INDEX
    index = read_config_file(path)
    if index["_class_name"] != pipeline_class.__name__:
        raise ValueError(f"{folder} holds a {index['_class_name']}; expected a {pipeline_class.__name__}")
    entries = {key: value for key, value in index.items() if not key.startswith("_")}
    known = inspect.signature(pipeline_class.__init__).parameters.keys() - {"self"}
    for where, names in ((path, entries), ("from_pretrained", given)):
        if unknown := sorted(names.keys() - known):
            raise ValueError(f"{where}: expected {', '.join(sorted(known))}, got {unknown[0]!r}")
    found = {}
    for name, entry in (entries | given).items():
        if name in given:
            found[name] = given[name]
        elif name == "class_names":
            found[name] = _class_names(entry, path)
        elif name == "for_pipeline":
            if not isinstance(entry, str):
                raise ValueError(f"{path}: expected for_pipeline to be a string, got {entry!r:.60}")
            found[name] = entry
        else:
            found[name] = _load_component(folder, name, entry)
    return found


def _class_names(entry: object, path: Path) -> list[str] | None:
    if entry is None or (isinstance(entry, list) and all(isinstance(each, str) for each in entry)):
        return entry
    raise ValueError(f"{path}: expected class_names to be a list of strings, got {entry!r:.60}")


def _load_component(folder: Path, name: str, entry: object) -> nn.Module | None:
    """The component called `name`, which the index has as `entry`: [library, class]."""
    match entry:
        case [None, None]:
            return None
        case ["transformers", str(class_name)] if name == "classifier":
            return _load_transformers_classifier(folder / name, class_name)
        case [str(), str(class_name)]:
            if name == "vae":
                component = load_autoencoder(find_weights_in(folder / name))
            elif name == "classifier":
                component = open_component(folder / name, name, [ImageClassifier])
            else:
                component = load_prior(folder / name)
            if type(component).__name__ != deprecated.CLASS_NAMES.get(class_name, class_name):
                raise ValueError(
                    f"{folder / INDEX} has a {class_name!r:.60} as {name}, and {folder / name} holds a "
                    f"{type(component).__name__}"
                )
            return component
    raise ValueError(f"{folder / INDEX}: expected {name} to be a library and a class, got {entry!r:.60}")


def _load_transformers_classifier(folder: Path, class_name: str) -> nn.Module:
    """An image classifier of transformers, with all its weights and no code of its own."""
    from transformers import AutoModelForImageClassification

    try:
        model, loaded = AutoModelForImageClassification.from_pretrained(
            folder,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            dtype=torch.float32,
        )
        wrong = [*loaded["missing_keys"], *loaded["unexpected_keys"], *loaded["mismatched_keys"]]
        if wrong or type(model).__name__ != class_name:
            raise ValueError(
                f"{wrong[0]} is missing or unexpected" if wrong else f"it is no {class_name!r:.60}"
            )
        own_weights(model)
        for key, tensor in model.state_dict().items():
            check_finite(tensor, key, folder)
    except Exception as error:  # transformers checks little: a wrong entry can raise anything
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(f"{folder} is damaged, or its weights do not fit its config: {reason}") from error
    return model.eval()
