"""Weight files that carry their config.json in the safetensors metadata, so that a lone copy of the file can be opened.

component --save_component--> folder/config.json
                              folder/diffusion_pytorch_model.safetensors, metadata {"format": "pt", "config": JSON,
                              "pipeline": whose latents a codec's are, if that is not the usual one of its class}
weight file --config_in(metadata_of)--> the config, or None where the file holds none
"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latent_codec import deprecated
from latent_codec.files import named_in_utf8

CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
FORMER_WEIGHTS = ("diffusion_pytorch_model*",)
"""What `files.replacing` is not to carry over to a component's folder: shards and variants of the one before it."""
CONFIG_KEY = "config"
PIPELINE_KEY = "pipeline"
LATENTS = "latent-codec"
"""What the metadata of a latent file call its format."""
FEATURES = "latent-codec features"
"""The same of a file of features."""
MAX_CONFIG_BYTES = 1 << 20
_MAX_JSON = 2**22

BASES = ("diffusion_pytorch_model", "model")
_SUFFIXES = ("safetensors", "bin")
_WEIGHTS_NAME = re.compile(
    rf"({'|'.join(BASES)})"
    r"((\.(?P<variant>\w+))?\.(safetensors|bin)|\.(safetensors|bin)\.index(\.(?P<shards>\w+))?\.json)"
)


def weight_patterns() -> list[tuple[str, ...]]:
    """File names as `find_weights_in` looks for them, first choice first, in the language of fnmatch."""
    layouts = []
    for base in BASES:
        for suffix in _SUFFIXES:
            layouts.append((f"{base}.{suffix}",))
            layouts.append((f"{base}.{suffix}.index.json", f"{base}-*-of-*.{suffix}"))
        for suffix in _SUFFIXES:
            layouts.append((f"{base}.*.{suffix}", f"{base}.{suffix}.index.*.json"))
    return layouts


def is_weights_name(name: str) -> bool:
    """Whether diffusers gives this name to a component's weights, or to the index of their shards."""
    return _WEIGHTS_NAME.fullmatch(name) is not None


def find_weights_in(folder: Path) -> Path:
    """The weights in a component's folder: one file, or the index of several; where the file would be if there are none.

    Safetensors go before `.bin`, whole files before shards, and all of these before a variant such as fp16.

    Raises:
        ValueError: if there are several variants, and nothing else.
    """
    for patterns in weight_patterns():
        found = sorted(path for pattern in patterns for path in folder.glob(pattern) if path.is_file())
        matches = [(path, match) for path in found if (match := _WEIGHTS_NAME.fullmatch(path.name))]
        variants = sorted({match["variant"] or match["shards"] or "" for _, match in matches})
        if len(variants) > 1:
            names = " and ".join(path.name for path, _ in matches)
            raise ValueError(f"{folder} holds the variants {', '.join(variants)}: name one file, {names}")
        if matches:
            return matches[0][0]
    return folder / WEIGHTS


def read_config_file(path: Path) -> dict[str, Any]:
    """A diffusers config or index, which names its class.

    Raises:
        ValueError: if it is no file, too large or too deep, or not such a config.
    """
    try:
        config = read_json(path, _MAX_JSON)
        if not isinstance(config, dict) or not isinstance(config.get("_class_name"), str):
            raise ValueError("it names no _class_name")
    except ValueError as error:
        raise ValueError(f"{path} is not the config of a diffusers model: {error}") from error
    return deprecated.rename_class(config)


def read_json(path: Path, max_bytes: int) -> Any:
    """The value in a JSON file.

    Raises:
        ValueError: with the reason, without the file's name.
    """
    if not path.is_file():
        raise ValueError("it is a folder or a device" if path.exists() else "it does not exist")
    with path.open("rb") as file:
        text = file.read(max_bytes + 1)
    if len(text) > max_bytes:
        raise ValueError(f"expected at most {max_bytes} bytes, got {path.stat().st_size}")
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("its values are nested too deep") from error


def save_component(component, folder: str | os.PathLike, pipeline: str | None = None) -> None:
    """Write config.json and weights of a diffusers model as `save_pretrained` does, with the config in both files.

    The caller gives a folder that nobody reads yet (`files.replacing`). What diffusers adds about this machine, the
    path that the component was opened from, is left out.

    Args:
        pipeline: the class name of the pipeline whose latents a codec's are; None: the usual one of its class.

    Raises:
        OSError: if it cannot be written.
    """
    from latent_codec.conversion.checkpoints import save_checkpoint
    from latent_codec.torch_settings import plain_state_dict

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_config_of(component), indent=2, sort_keys=True) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
    metadata = {"format": "pt"} | config_metadata(component)
    if pipeline is not None:
        metadata[PIPELINE_KEY] = pipeline
    save_checkpoint(plain_state_dict(component), folder / WEIGHTS, metadata)


def config_metadata(component) -> dict[str, str]:
    """The entry for a safetensors header's metadata that holds a diffusers model's config."""
    return {CONFIG_KEY: json.dumps(_config_of(component), sort_keys=True, separators=(",", ":"))}


def _config_of(component) -> dict:
    config = json.loads(component.to_json_string())
    config.pop("_name_or_path", None)
    return config


def config_in(metadata: Mapping[str, str] | None) -> dict | None:
    """The config.json that a safetensors header's metadata hold; None where they hold none of a diffusers model.

    Other programs keep other things under the same key: only a JSON object that names its `_class_name` counts.
    """
    text = (metadata or {}).get(CONFIG_KEY, "")
    if len(text) > MAX_CONFIG_BYTES:
        return None
    try:
        config = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return config if isinstance(config, dict) and isinstance(config.get("_class_name"), str) else None


def metadata_of(path: str | os.PathLike) -> dict[str, str]:
    """The metadata in a safetensors file's header, read without torch; empty for every other file."""
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        return {}
    try:
        with named_in_utf8(Path(path)) as name, safe_open(name, framework="np") as stored:
            return stored.metadata() or {}
    except (SafetensorError, OSError):
        return {}


def check_folder_to_save(folder: str | os.PathLike) -> Path:
    """`folder`, absolute, if a codec may be saved there: it is new, empty or a codec's.

    Raises:
        ValueError: if it holds something else, or is a file.
    """
    folder = Path(folder).resolve()
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; give a folder to save the codec in")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds other files and no codec; give a new or empty folder")
    return folder
