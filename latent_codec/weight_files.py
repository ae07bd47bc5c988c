"""Weight files that carry their config.json in the safetensors metadata, so that a copy of the file alone can be opened.

component --save_component--> folder/config.json
                              folder/diffusion_pytorch_model.safetensors, metadata {"format": "pt", "config": JSON}
weight file --read_config---> the config, or None where the file holds none
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path

WEIGHTS = "diffusion_pytorch_model.safetensors"
FORMER_WEIGHTS = ("diffusion_pytorch_model*",)
"""What `files.replacing` is not to carry over to a component's folder: shards and variants of the one before it."""
CONFIG_KEY = "config"
MAX_CONFIG_BYTES = 1 << 20


def save_component(component, folder: str | os.PathLike) -> None:
    """Write config.json and weights of a diffusers model as `save_pretrained` does, with the config in both files.

    The caller gives a folder that nobody reads yet (`files.replacing`). What diffusers adds about this machine, the
    path that the component was opened from, is left out.

    Raises:
        OSError: if it cannot be written.
    """
    from latent_codec.conversion.checkpoints import save_checkpoint
    from latent_codec.torch_settings import plain_state_dict

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_config_of(component), indent=2, sort_keys=True) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
    save_checkpoint(
        plain_state_dict(component), folder / WEIGHTS, {"format": "pt"} | config_metadata(component)
    )


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


def read_config(weights: str | os.PathLike) -> dict | None:
    """`config_in` of a safetensors file, of which only the header is read, without torch.

    Raises:
        OSError: if the file cannot be read.
        SafetensorError: if it is not a safetensors file, or damaged.
    """
    from safetensors import safe_open

    with safe_open(weights, framework="np") as stored:
        return config_in(stored.metadata())


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
