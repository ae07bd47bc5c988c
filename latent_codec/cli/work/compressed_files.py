"""Describe and open compressed files, for several verbs; a file's header is described without torch."""

import argparse
from contextlib import suppress
from pathlib import Path

from latent_codec.bitstream import BitstreamError, unpack
from latent_codec.bitstream.container import Container, Header, read_file
from latent_codec.bitstream.entropy_model import EntropyModel
from latent_codec.components.codec_facts import shipped_name
from latent_codec.components.codec_folders import short_name
from latent_codec.errors import SettingError


def entropy_model_of(args: argparse.Namespace, codec) -> EntropyModel | None:
    """The entropy model that `--entropy` names, or the one in the codec's folder, if there is one."""
    from latent_codec.bitstream import load_entropy_model, sidecar

    return sidecar(codec) if args.entropy is None else load_entropy_model(args.entropy, codec=codec)


def needed_entropy_model(args: argparse.Namespace, codec) -> EntropyModel | None:
    """`entropy_model_of`, which latents need; indices do without.

    Raises:
        SettingError: if latents have none.
    """
    model = entropy_model_of(args, codec)
    if model is None and not codec.indices_suffice:
        expected = f"one for latents of {codec.name}, whose folder has no entropy.safetensors"
        advice = "make one by `latent-codec fit-entropy`"
        raise SettingError("entropy_model", expected, advice=advice)
    return model


def first_sentence(error: ValueError) -> str:
    """An error's message without the sentences after the first, which advise callers in Python."""
    return " ".join(str(error).split()).partition(". ")[0].rstrip(".")


def advice_for_damage(data: bytes) -> str:
    """The advice on a truncated or corrupt file: partial decoding helps if a tile's first section is whole."""
    with suppress(BitstreamError):
        container = unpack(data, partial=True)
        first_layer = container.sections[: container.header.num_tiles]
        is_partial = container.missing or container.trailing_bytes
        if is_partial and any(section is not None for section in first_layer):
            return "`latent-codec decompress --partial` decodes the whole sections"
    return "Get the file again: nothing of it can be decoded"


def describe_compressed_file(path: Path, args: argparse.Namespace) -> dict:
    """A compressed file's header, its sections by quality layer, and its damage, None if there is none.

    With `--verbose` its values are decoded, too, for their code length under the entropy model; that takes the codec.

    Raises:
        ValueError: if not even the header can be read, or if `--codec` or `--entropy` is not the file's.
    """
    damage = None
    try:
        data = read_file(path)
        try:
            container = unpack(data)
        except BitstreamError as error:
            container = _unpack_in_part(data, error)
            damage = f"{first_sentence(error)}. {advice_for_damage(data)}"
    except BitstreamError as error:
        raise ValueError(f"{path}: {error}") from error
    header = container.header
    facts = {
        "kind": f"compressed {'indices' if header.is_indices else 'latents'}",
        "height": header.height,
        "width": header.width,
        "bytes": len(data),
        "bits_per_pixel": round(8 * len(data) / (header.height * header.width), 6),
        "grids": [list(shape[1:]) for shape in header.shapes],
        "downsampling_factors": [level.side for level in header.levels],
    }
    if header.is_indices:
        facts["codebook_sizes"] = [level.codebook_size for level in header.levels]
    else:
        facts |= {"latent_channels": header.levels[0].channels, "quality": header.step_size_index}
    facts |= {
        "coding": "fixed length" if header.entropy_fingerprint is None else "entropy coded",
        "tiles": header.num_tiles,
        "tile_pixels": header.tile and header.tile * header.levels[0].side,
        "space_fingerprint": header.space_fingerprint,
        "entropy_fingerprint": header.entropy_fingerprint,
        "header_bytes": container.header_bytes,
        "layers": _layers(container),
        "damage": damage,
        "damaged_sections": container.missing,
    }
    if not args.verbose:
        name = shipped_name(header.space_fingerprint)
        return facts | {"codec": name and short_name(name), "bits_without_overhead": None}
    return facts | _by_codec(path, data if damage is None else None, header, args)


def _unpack_in_part(data: bytes, error: BitstreamError) -> Container:
    try:
        return unpack(data, partial=True)
    except BitstreamError:
        raise error from None


def _layers(container: Container) -> list[dict]:
    """Of each quality layer of all tiles together, as many sections as there are tiles."""
    tiles = container.header.num_tiles
    layers = []
    for layer in range(container.header.num_layers):
        sections = slice(layer * tiles, (layer + 1) * tiles)
        lost = sum(section is None for section in container.sections[sections])
        bits = 8 * sum(container.lengths[sections])
        layers.append({"layer": layer, "sections": tiles, "bits": bits, "damaged": lost})
    return layers


def _by_codec(path: Path, data: bytes | None, header: Header, args: argparse.Namespace) -> dict:
    """The codec's name, and the code length of the values in `data`; None where the codec or its model is not at hand."""
    from latent_codec import LatentCodec
    from latent_codec.bitstream import read

    facts = {"codec": None, "bits_without_overhead": None}
    name = args.codec or shipped_name(header.space_fingerprint)
    if name is None:
        if args.entropy is not None:
            raise ValueError(
                f"{path} was made by no shipped codec (space {header.space_fingerprint}): --entropy needs --codec, too"
            )
        return facts
    codec = LatentCodec.from_pretrained(name, pipeline=args.for_pipeline)
    if codec.space_fingerprint != header.space_fingerprint:
        raise ValueError(
            f"{path} was made by another codec (space {header.space_fingerprint}) than {codec.name} (space "
            f"{codec.space_fingerprint}); leave out --codec for the header only"
        )
    facts["codec"] = codec.name
    model = entropy_model_of(args, codec)
    fits = header.entropy_fingerprint in (None, model and model.fingerprint)
    if not fits and args.entropy is not None:
        raise ValueError(
            f"{path} was coded with the entropy model {header.entropy_fingerprint}, not with {args.entropy} "
            f"({model.fingerprint})"
        )
    if fits and data is not None:
        facts["bits_without_overhead"] = round(read(codec, data, entropy_model=model).code_length, 1)
    return facts
