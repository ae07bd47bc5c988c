"""Where what is fitted to a codec goes: its own folder, or that of a copy."""

import shutil
from pathlib import Path

from latent_codec import LatentCodec
from latent_codec.components.codec_folders import SIDECARS, find_weights, is_foreign_file
from latent_codec.components.loading import open_weights
from latent_codec.components.weight_files import check_folder_to_save
from latent_codec.files import replacing


def folder_for_sidecar(name_or_path: str, codec, out: Path | None) -> Path:
    """The folder of the codec that a person named, or `out` with a copy of it, sidecars included.

    Raises:
        ValueError: if the codec is nobody's folder and `out` is None, or `out` holds something else.
    """
    weights = None if is_foreign_file(name_or_path) else find_weights(name_or_path)
    if out is None:
        named = Path(name_or_path).resolve()
        if weights is None or not named.is_dir() or not weights.resolve().is_relative_to(named):
            raise ValueError(
                f"{name_or_path} is a shipped codec, one from the hub or a single file, which are never changed; "
                "give --out DIR for a copy with what is fitted to it"
            )
        return weights.parent
    folder = check_folder_to_save(out)
    if (folder / "config.json").is_file():
        other = LatentCodec.from_pretrained(folder, pipeline=codec.pipeline)
        if other.fingerprint != codec.fingerprint:
            raise ValueError(
                f"{out} holds another codec ({other.fingerprint}) than {codec.name} ({codec.fingerprint}); give a "
                "new folder"
            )
    elif weights is None:
        codec.save_pretrained(folder)
    else:
        with replacing(folder) as new:
            new.mkdir()
            others = (weights.parent / name for name in ("config.json", "README.md", *SIDECARS))
            for file in (*open_weights(weights).files, *filter(Path.is_file, others)):
                shutil.copyfile(file, new / file.name)
    return folder
