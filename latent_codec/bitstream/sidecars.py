"""Open entropy models."""

import os

from safetensors import SafetensorError, safe_open

from latent_codec.bitstream.context_entropy import IndexContextEntropy, LatentContextEntropy
from latent_codec.bitstream.entropy_model import FILE_NAME, FORMAT, VERSION, EntropyModel, sidecar_path
from latent_codec.bitstream.static_entropy import StaticEntropy
from latent_codec.codec import LatentCodec
from latent_codec.files import check_is_file

KINDS = {each.kind: each for each in (StaticEntropy, LatentContextEntropy, IndexContextEntropy)}


def load_entropy_model(path: str | os.PathLike, *, codec: LatentCodec | None = None) -> EntropyModel:
    """Open an entropy model's file, or the one in a codec's folder; with `codec`, check that it was fitted to it.

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
                raise ValueError("it is a safetensors file of another kind")
            if metadata.get("version") != VERSION or metadata.get("kind") not in KINDS:
                raise ValueError(
                    f"expected version {VERSION} and one of the kinds {', '.join(KINDS)}, got version {metadata.get('version')} and "
                    f"kind {metadata.get('kind')}; update latent-codec"
                )
            arrays = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118  no mapping
        names = {"space_fingerprint": metadata["space_fingerprint"], "codec_name": metadata["codec"]}
        model = KINDS[metadata["kind"]].from_arrays(arrays, **names)
        if arrays:
            raise ValueError(f"expected no array {min(arrays)} in the kind {model.kind}")
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{path} is no entropy model: {error}") from error
    if codec is not None:
        check_fitted_to(codec, model, str(path))
    return model


def check_fitted_to(codec: LatentCodec, model: EntropyModel, name: str) -> None:
    """Raise ValueError for an entropy model, `name` in the message, that was fitted to another codec."""
    if model.space_fingerprint != codec.space_fingerprint:
        raise ValueError(
            f"{name} was fitted to {model.codec_name} (space {model.space_fingerprint}), not to {codec.name} "
            f"(space {codec.space_fingerprint}); fit one to it"
        )


def sidecar(codec: LatentCodec) -> EntropyModel | None:
    """The entropy model in the codec's folder, if there is one.

    Raises:
        ValueError: if it is damaged, or of another codec.
    """
    if codec.folder is None or not (codec.folder / FILE_NAME).is_file():
        return None
    return load_entropy_model(codec.folder, codec=codec)
