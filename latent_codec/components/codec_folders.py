"""Codec folders: what a name, a path or a hub id stands for, opened strictly and saved safely."""

import json
import os
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latent_codec.components.weight_files import (
    CONFIG,
    PIPELINE_KEY,
    WEIGHTS,
    find_weights_in,
    is_weights_name,
    metadata_of,
    read_config_file,
    weight_patterns,
)
from latent_codec.families import LatentSpace, component_class
from latent_codec.families.pipeline_spaces import PIPELINES
from latent_codec.files import check_is_file, restore

if TYPE_CHECKING:
    from latent_codec.images.origins import Origin

ASSETS = Path(__file__).parent.parent / "assets"
DEFAULT = "default-f8c4"
SHIPPED = {
    "default": DEFAULT,
    "default-16": "default-f8c16",
    "default-eq": "default-f8c4-eq",
    "default-rd": "default-f8c16-rd",
    "default-vq": "default-vq-f8",
    "garments": "garments",
}
SHIPPED_PIPELINES = ("fashion-mnist",)
COMPONENTS = ("vae", "vqvae", "movq", "vqgan")
INDEXES = ("model_index.json", "modular_model_index.json")
"""Of pipelines."""
_HUB_ID = re.compile(r"(?P<id>[\w-][\w.-]*/[\w-][\w.-]*)(/(?P<subfolder>[\w-][\w.-]*(/[\w-][\w.-]*)*))?")
SIDECARS = ("preview.safetensors", "entropy.safetensors")
ORIGIN = "origin.json"
"""Of a codec of images that are no 8-bit photographs: the `Origin` of one image, so that samples can be written as such."""
_MAX_ORIGIN_BYTES = 2**16


def short_name(name_or_path: str | os.PathLike) -> str:
    """What messages call a codec: the folder that a person named, a shipped codec's name or a hub id."""
    name = str(name_or_path)
    if name in SHIPPED:
        return SHIPPED[name]
    path = Path(name)
    if not path.exists():
        return name
    path = path.resolve().parent if path.is_file() else path.resolve()
    whole = [(path.parent / name).is_file() for name in (*INDEXES, CONFIG)]
    is_a_part = path.name == "codec" or (path.name in COMPONENTS and any(whole))
    return path.parent.name if is_a_part else path.name


def find_weights(name_or_path: str | os.PathLike, subfolder: str | None = None) -> Path:
    """The weights that a codec's name, path or hub id stands for, next to its config.json: a file, or an index of shards.

    Raises:
        ValueError: if there are none.
    """
    name = str(name_or_path)
    if name in SHIPPED or name in SHIPPED.values():
        folder = ASSETS / SHIPPED.get(name, name)
        if not (folder / CONFIG).is_file():
            raise ValueError(
                f"the shipped codec {folder.name} is missing from this installation; reinstall it"
            )
        return folder / WEIGHTS
    path = Path(name)
    restore(path)
    if path.is_file():
        if is_foreign_file(path):
            raise ValueError(
                f"{path} is a file; a codec that can be changed is a folder: `latent-codec convert` makes one"
            )
        return path
    if path.is_dir():
        return find_weights_in(_find_in_folder(path, subfolder))
    if match := _HUB_ID.fullmatch(name):
        return _download(match["id"], subfolder or match["subfolder"])
    if path.exists():
        check_is_file(path)
    raise ValueError(
        f"{name} does not exist; give a codec's folder or file, an id on the hub (owner/name or owner/name/subfolder) or a shipped codec "
        f"({', '.join(SHIPPED)})"
    )


def pipeline_of(weights: Path) -> str | None:
    """The class name of the pipeline whose latents a stored codec's are; None: the usual ones of its class.

    That is the pipeline whose folder holds it, or the one that pipeline's priors learned the latents of, or else the one
    that the codec was saved with; each of them only if its latent space is known.
    """
    named: list[Any] = []
    for index in () if is_foreign_file(weights) else INDEXES:
        try:
            entries = json.loads((weights.parent.parent / index).read_bytes())
        except (OSError, ValueError, RecursionError):
            continue  # none, or one that the component does not need
        if isinstance(entries, dict):
            named = [entries.get("_class_name"), entries.get("for_pipeline")]
            break
    named.append(metadata_of(weights).get(PIPELINE_KEY))
    return next((name for name in named if isinstance(name, str) and name in PIPELINES), None)


def pipeline_of_codec(name_or_path: str | os.PathLike) -> str | None:
    """`pipeline_of` what a codec's name, path or hub id stands for.

    Raises:
        ValueError: if there is no codec.
    """
    return pipeline_of(Path(name_or_path) if is_foreign_file(name_or_path) else find_weights(name_or_path))


def in_subfolder(name_or_path: str | None, subfolder: str) -> str:
    """The name of what is in a subfolder of a folder or of a hub repository, for `find_weights`.

    Raises:
        ValueError: if the folder has no such subfolder, or `name_or_path` is neither.
    """
    path = Path(name_or_path or "")
    if name_or_path and path.is_dir():
        return str(_find_in_folder(path, subfolder))
    if name_or_path and not path.exists() and _HUB_ID.fullmatch(name_or_path):
        return f"{name_or_path}/{subfolder.strip('/')}"
    raise ValueError(
        f"expected a folder or a hub id (owner/name) to look for the subfolder {subfolder} in, got {name_or_path}"
    )


def _find_in_folder(folder: Path, subfolder: str | None, called: str | None = None) -> Path:
    called = called or str(folder)
    restore(folder / "codec")
    if subfolder is not None:
        if not (folder / subfolder / CONFIG).is_file():
            raise ValueError(f"{called} has no {subfolder}/{CONFIG}; look for the autoencoder's subfolder")
        return folder / subfolder
    if (folder / CONFIG).is_file():
        return folder
    if any((folder / index).is_file() for index in INDEXES):
        for component in COMPONENTS:
            if (folder / component / CONFIG).is_file():
                return folder / component
        raise ValueError(
            f"the pipeline {called} has no autoencoder under {', '.join(COMPONENTS)}; "
            f"{_elsewhere(folder) or 'name its subfolder'}"
        )
    if (folder / "codec" / CONFIG).is_file():
        return folder / "codec"
    raise ValueError(
        f"{called} is no codec: it has neither {CONFIG}, nor {' or '.join(INDEXES)} (a pipeline), nor codec/ (a run "
        "folder)"
    )


def _elsewhere(folder: Path) -> str | None:
    """Where a modular pipeline's index says that its autoencoder is: in a repository of its own."""
    if not (folder / INDEXES[1]).is_file():
        return None
    index = read_config_file(folder / INDEXES[1])
    for component in COMPONENTS:
        match index.get(component):
            case [_, _, {**entries}]:
                place = entries.get("pretrained_model_name_or_path") or entries.get("repo")
                if isinstance(place, str):
                    inside = entries.get("subfolder")
                    return f"its index names {'/'.join([place, inside] if isinstance(inside, str) and inside else [place])}"
    return None


def read_origin(folder: Path | None) -> "Origin | None":
    """What images of the codec in this folder stand for; None: they are of 8 bits, or nothing is known.

    Raises:
        ValueError: for a damaged origin.json, or one of an unknown kind.
    """
    path = None if folder is None else folder / ORIGIN
    if path is None or not path.is_file():
        return None
    from latent_codec.images.origins import origin_from_json  # numpy and torch, which `info` can do without

    try:
        return origin_from_json(json.loads(path.read_bytes()[:_MAX_ORIGIN_BYTES]))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from error


def _download(repository: str, subfolder: str | None) -> Path:
    """Fetch config and weights from the hub, or find them in its cache: one layout after the other, until there is one."""
    from latent_codec.components.loading import download

    folders = [f"{subfolder}/"] if subfolder else ["", *(f"{component}/" for component in COMPONENTS)]
    wanted = [
        *INDEXES,
        "README.md",
        *(f"{folder}{name}" for folder in folders for name in (CONFIG, ORIGIN, *SIDECARS)),
    ]
    for names in weight_patterns():
        wanted += [f"{folder}{name}" for folder in folders for name in names]
        path = download(repository, wanted)
        folder = _find_in_folder(path, subfolder, called=repository)
        weights = find_weights_in(folder)
        if weights.is_file():
            return weights
    return weights


def is_foreign_file(name_or_path: str | os.PathLike) -> bool:
    """Whether this is one file, and not diffusers' weights next to their config.json."""
    path = Path(name_or_path)
    return path.is_file() and not (is_weights_name(path.name) and (path.parent / CONFIG).is_file())


def load_foreign(path: str | os.PathLike, config: str | os.PathLike | None = None):
    """The autoencoder in a lone weight file or a checkpoint of another layout, in float32.

    Args:
        config: its config.json; None: the one in the file's metadata or next to it.

    Raises:
        ValueError: if the file is damaged, would run code or holds no known autoencoder, if a key has no place, or if
            nothing says what weights in diffusers' own key layout do not show.
    """
    import torch

    from latent_codec.conversion.foreign import read_foreign
    from latent_codec.conversion.settings import given_settings

    foreign = read_foreign(path, settings=None if config is None else given_settings(config))
    autoencoder = foreign.component(torch.float32)
    for prefix in foreign.averages:
        warnings.warn(
            f"{foreign.name} holds averaged weights, too, under {prefix}*; convert it with the entry "
            f"{prefix.rstrip('.')} to take those",
            stacklevel=3,
        )
    if foreign.scale is None:
        autoencoder.register_to_config(scaling_factor=1.0)
        known = foreign.format.published_scales(foreign.network.config)
        published = f" (published: {known})" if known else ""
        warnings.warn(
            f"nothing in {foreign.name} says the scale of its latents{published}, which is taken as 1 here; convert it with a "
            "scale to write a codec that says it",
            stacklevel=3,
        )
    return autoencoder


def load_autoencoder(weights: Path):
    """Build the class that config.json names and load its weights in float32: every key must fit.

    Raises:
        ValueError: as `components.load_component`, or for a class, scale or shift that cannot be used.
    """
    from latent_codec.components.loading import load_component

    autoencoder = load_component(weights, component_class)
    try:
        LatentSpace.from_config(autoencoder)
    except ValueError as error:
        raise ValueError(f"{weights.parent / CONFIG}: {error}") from error
    return autoencoder
