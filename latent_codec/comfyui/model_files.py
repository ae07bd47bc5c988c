"""The codecs and pipelines that nodes offer in their lists: shipped ones, and those in ComfyUI's model folders."""

import os
from collections.abc import Iterator
from pathlib import Path

from latent_codec.components.codec_folders import INDEXES, SHIPPED, SHIPPED_PIPELINES
from latent_codec.components.weight_files import CONFIG, is_weights_name, read_config_file
from latent_codec.conversion.checkpoints import SUFFIXES

OWN = "latent_codecs"
"""The folder in `models/` for folders of codecs and of pipelines."""
FOLDERS = (OWN, "vae", "vae_approx", "diffusers")
"""Folders of ComfyUI's `models/` that are looked through."""


def register() -> None:
    """Tell ComfyUI, if this is it, of `models/latent_codecs`; extra_model_paths.yaml may name more of such folders."""
    try:
        import folder_paths
    except ModuleNotFoundError:
        return
    folder_paths.add_model_folder_path(OWN, str(Path(folder_paths.models_dir, OWN)))


def codec_names() -> list[str]:
    """Shipped codecs, then those in the model folders, such as `latent_codecs/mine` and `vae/kl.safetensors`."""
    return [*SHIPPED, *_found_codecs()]


def pipeline_names() -> list[str]:
    """Shipped pipelines over priors, then those in `models/latent_codecs`, and in runs there."""
    folders = [name for name, path in _walked((OWN,)) if path.is_dir() and _is_of_priors(path / INDEXES[0])]
    return [*SHIPPED_PIPELINES, *(name.removesuffix("/pipeline") for name in folders)]


def find_codec(name: str) -> str:
    """What LatentCodec opens for a name of `codec_names`; a path or a hub id is given back."""
    return str(_found_codecs().get(name, name))


def find_pipeline_folder(name: str) -> str:
    """The folder of a name of `pipeline_names`; other names are given back."""
    kind, _, rest = name.partition("/")
    for root in _roots(kind) if kind == OWN else ():
        if (root / rest).is_dir():
            return str(root / rest)
    return name


def stamp(name: str) -> str:
    """A string that changes when the files of a codec or pipeline do, those of its parts' folders included."""
    if name in (*SHIPPED, *SHIPPED_PIPELINES):
        return name
    path = Path(find_codec(name))
    files = [path, *path.glob("*"), *path.glob("*/*")]
    return ";".join(sorted(f"{each} {each.stat().st_mtime_ns}" for each in files if each.is_file()))


def _found_codecs() -> dict[str, Path]:
    found = {}
    for name, path in _walked(FOLDERS):
        if path.is_dir() or path.suffix in SUFFIXES:
            found.setdefault(name, path)
    return found


def _roots(kind: str) -> list[Path]:
    """The folders of one kind of model; none outside of ComfyUI."""
    try:
        import folder_paths
    except ModuleNotFoundError:
        return []
    if kind not in folder_paths.folder_names_and_paths:
        return []
    return [Path(each) for each in folder_paths.get_folder_paths(kind)]


def _walked(kinds: tuple[str, ...]) -> Iterator[tuple[str, Path]]:
    """Names and paths of folders that are a model as a whole, and of files that are not in one."""
    for kind in kinds:
        for root in _roots(kind):
            for folder, folders, files in os.walk(root, followlinks=True):
                path = Path(folder)
                folders[:] = sorted(each for each in folders if not each.startswith("."))
                if path != root and _is_model(path):
                    yield f"{kind}/{path.relative_to(root).as_posix()}", path
                    folders.clear()
                    continue
                for file in sorted(files):
                    yield f"{kind}/{(path / file).relative_to(root).as_posix()}", path / file


def _is_model(folder: Path) -> bool:
    """Whether a folder is a pipeline, or a component with its weights."""
    names = {path.name for path in folder.iterdir()}
    return bool(names & {*INDEXES}) or (CONFIG in names and any(map(is_weights_name, names)))


def _is_of_priors(index: Path) -> bool:
    """Whether a model_index.json is that of one of this project's pipelines over priors."""
    try:
        return str(read_config_file(index)["_class_name"]).endswith("PriorPipeline")
    except (OSError, ValueError, KeyError):
        return False
