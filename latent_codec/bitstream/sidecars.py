"""Entropy models from their files."""

import os

from safetensors import SafetensorError, safe_open

from latent_codec.bitstream.context_entropy import IndexContextEntropy, LatentContextEntropy
from latent_codec.bitstream.static_entropy import StaticEntropy
from latent_codec.bitstream.stored_entropy import FORMAT, VERSION, StoredEntropy, sidecar_path
from latent_codec.codec import LatentCodec
from latent_codec.files import check_is_file

KINDS = {each.kind: each for each in (StaticEntropy, LatentContextEntropy, IndexContextEntropy)}


def load_entropy_model(path: str | os.PathLike, *, codec: LatentCodec | None = None) -> StoredEntropy:
    """Open a sidecar, or the one in a codec's folder; with `codec`, check that it was fitted to it.

    Raises:
        ValueError: if it is none, damaged, of a newer version, or fitted to another codec.
        OSError: if it cannot be read.
    """
    path = sidecar_path(path)
    check_is_file(path)
    path.open("rb").close()  # the system's own words if it is forbidden
    try:
        with safe_open(path, framework="np") as stored:
            metadata = stored.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError("it is a safetensors file of something else")
            if metadata.get("version") != VERSION or metadata.get("kind") not in KINDS:
                raise ValueError(
                    f"it has version {metadata.get('version')} and kind {metadata.get('kind')}, which this "
                    f"latent-codec does not read. Update it."
                )
            arrays = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118  no mapping
        names = {"space_fingerprint": metadata["space_fingerprint"], "codec_name": metadata["codec"]}
        model = KINDS[metadata["kind"]].from_arrays(arrays, **names)
        if arrays:
            raise ValueError(f"it holds {min(arrays)}, which does not belong there")
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{path} is no entropy model: {error}") from error
    if codec is not None and model.space_fingerprint != codec.space_fingerprint:
        raise ValueError(
            f"{path} was fitted to {model.codec_name} (space {model.space_fingerprint}), not to {codec.name} "
            f"(space {codec.space_fingerprint}); fit one to it"
        )
    return model
