"""Where what is fitted to a codec goes: its own folder, or that of a copy."""

import shutil
from pathlib import Path

from latent_codec import LatentCodec
from latent_codec.components.codec_folders import ORIGIN, SIDECARS, find_weights, is_foreign_file
from latent_codec.components.loading import open_weights
from latent_codec.components.weight_files import check_folder_to_save
from latent_codec.files import replacing


def own_folder(name_or_path: str) -> Path:
    """The folder of a codec, if the person who named the codec named a folder of theirs.

    Raises:
        ValueError: for a shipped codec, one from the hub, or a file.
    """
    named = Path(name_or_path).resolve()
    if not is_foreign_file(named):
        folder = find_weights(name_or_path).parent
        if named.is_dir() and folder.resolve().is_relative_to(named):
            return folder
    raise ValueError(
        f"{name_or_path} is a shipped codec, one from the hub or a single file, which are never changed; "
        "give --out DIR for a copy"
    )


def folder_for_sidecar(name_or_path: str, codec, out: Path | None) -> Path:
    """The folder of the codec that a person named, or `out` with a copy of it, sidecars included.

    Raises:
        ValueError: if the codec is nobody's folder and `out` is None, or `out` holds something else.
    """
    if out is None:
        return own_folder(name_or_path)
    folder = check_folder_to_save(out)
    if (folder / "config.json").is_file():
        other = LatentCodec.from_pretrained(folder, pipeline=codec.pipeline)
        if other.fingerprint != codec.fingerprint:
            raise ValueError(
                f"{out} holds another codec ({other.fingerprint}) than {codec.name} ({codec.fingerprint}); give a "
                "new folder"
            )
    elif is_foreign_file(name_or_path):
        codec.save_pretrained(folder)
    else:
        weights = find_weights(name_or_path)
        with replacing(folder) as new:
            new.mkdir()
            others = (weights.parent / name for name in ("config.json", "README.md", ORIGIN, *SIDECARS))
            for file in (*open_weights(weights).files, *filter(Path.is_file, others)):
                shutil.copyfile(file, new / file.name)
    return folder
