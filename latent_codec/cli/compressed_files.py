"""What `compress`, `decompress` and `info` share: `--entropy`, finding compressed files, and the report on one."""

import argparse
from pathlib import Path


def add_entropy_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--entropy",
        type=Path,
        metavar="PATH",
        help="the entropy model: a file, or a folder with entropy.safetensors (default: beside the codec)",
    )


def named_files(arguments: list[str]) -> list[tuple[Path, Path]]:
    """Each compressed file with a name without suffix for what comes out of it, as `named_images` does it.

    Hidden ones in folders are left out.

    Raises:
        ValueError: if two files would get one name, or a folder holds none.
        OSError: for a path that does not exist.
    """
    from latent_codec.bitstream.container import SUFFIX

    named: dict[Path, Path] = {}
    for root in map(Path, arguments):
        root.stat()  # the system's own words if it is missing
        files = {root: Path(root.name)}
        if root.is_dir():
            inside = {path: path.relative_to(root) for path in sorted(root.rglob(f"*{SUFFIX}"))}
            files = {path: name for path, name in inside.items() if path.is_file() and not _is_hidden(name)}
        if not files:
            raise ValueError(f"no compressed files ({SUFFIX}) in {root}")
        for path, name in files.items():
            name = name.with_suffix("")
            if name in named:
                raise ValueError(
                    f"{named[name]} and {path} would both be written as {name}; name them in separate calls"
                )
            named[name] = path
    return [(path, name) for name, path in named.items()]


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def shipped_name(space_fingerprint: str) -> str | None:
    """The name to open the shipped codec with this latent space by; None if there is none."""
    from latent_codec.components.codec_facts import read_facts
    from latent_codec.components.codec_folders import SHIPPED

    for name in SHIPPED:
        if read_facts(name).space_fingerprint == space_fingerprint:
            return name
    return None


def first_sentence(error: ValueError) -> str:
    """What is wrong; the sentences behind it say what to do with a function's arguments, not on the command line."""
    return " ".join(str(error).split()).partition(". ")[0].rstrip(".")


def what_is_whole(data: bytes) -> str:
    """What to do with a truncated or corrupt file: a partial decoding helps if a tile's first layer is whole."""
    from latent_codec.bitstream import BitstreamError, unpack

    try:
        container = unpack(data, partial=True)
    except BitstreamError:
        return "Get the file again: nothing of it can be decoded"
    first_layer = container.sections[: container.header.num_tiles]
    is_partial = container.missing or container.trailing_bytes
    if is_partial and any(section is not None for section in first_layer):
        return "`latent-codec decompress --partial` decodes what is whole"
    return "Get the file again: nothing of it can be decoded"


def is_compressed_file(path: Path) -> bool:
    """Whether a file says of itself, or by its suffix, that it is a compressed one; it may be damaged or missing all the same."""
    from latent_codec.bitstream.container import MAGIC, SUFFIX

    if path.suffix.lower() == SUFFIX and not path.is_dir():
        return True
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def describe_compressed_file(
    path: Path, codec_name: str | None = None, entropy: Path | None = None, *, count_bits: bool = False
) -> dict:
    """What a compressed file says of itself: its header, its section table, and which sections are damaged.

    Args:
        codec_name: what `LatentCodec.from_pretrained` takes; None: a shipped codec, if one has the file's fingerprint.
        entropy: the entropy model's file or folder; None: next to the codec.
        count_bits: decode the values, too, for the bits that they cost by the entropy model; that takes the codec.

    Returns:
        JSON-ready facts; `damage` says what is wrong with a file whose header is whole, and is None if nothing is.

    Raises:
        ValueError: if not even the header can be read, or if `codec_name` or `entropy` name another codec or entropy model
            than the file's.
    """
    from latent_codec.bitstream.container import read_file, unpack
    from latent_codec.bitstream.errors import BitstreamError
    from latent_codec.components.codec_folders import short_name

    damage = None
    try:
        data = read_file(path)
    except BitstreamError as error:
        raise ValueError(f"{path}: {error}") from error
    try:
        container = unpack(data)
    except BitstreamError as error:
        try:
            container = unpack(data, partial=True)
        except BitstreamError:
            raise ValueError(f"{path}: {error}") from error
        damage = f"{first_sentence(error)}. {what_is_whole(data)}"
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
    if not count_bits:
        name = shipped_name(header.space_fingerprint)
        return facts | {"codec": name and short_name(name), "bits_without_overhead": None}
    return facts | _by_codec(path, data if damage is None else None, header, codec_name, entropy)


def _layers(container) -> list[dict]:
    """Of each layer of all tiles together, as many sections as there are tiles."""
    tiles = container.header.num_tiles
    layers = []
    for layer in range(container.header.num_layers):
        sections = slice(layer * tiles, (layer + 1) * tiles)
        lost = sum(section is None for section in container.sections[sections])
        bits = 8 * sum(container.lengths[sections])
        layers.append({"layer": layer, "sections": tiles, "bits": bits, "damaged": lost})
    return layers


def _by_codec(path: Path, data: bytes | None, header, codec_name: str | None, entropy: Path | None) -> dict:
    """The codec's name, and what its entropy model says of the values in `data`; None where they are not at hand."""
    from latent_codec import LatentCodec
    from latent_codec.bitstream import load_entropy_model, read
    from latent_codec.bitstream.compression import sidecar

    if codec_name is None:
        name = shipped_name(header.space_fingerprint)
        codec = None if name is None else LatentCodec.from_pretrained(name)
        if codec is None and entropy is not None:
            raise ValueError(
                f"{path} was made by no shipped codec (space {header.space_fingerprint}): --entropy needs --codec beside it"
            )
    else:
        codec = LatentCodec.from_pretrained(codec_name)
        if codec.space_fingerprint != header.space_fingerprint:
            raise ValueError(
                f"{path} was made by another codec (space {header.space_fingerprint}) than {codec.name} (space "
                f"{codec.space_fingerprint}); without --codec it says what it holds all the same"
            )
    if codec is None:
        return {"codec": None, "bits_without_overhead": None}
    facts = {"codec": codec.name, "bits_without_overhead": None}
    model = sidecar(codec) if entropy is None else load_entropy_model(entropy, codec=codec)
    fits = header.entropy_fingerprint in (None, model and model.fingerprint)
    if not fits and entropy is not None:
        raise ValueError(
            f"{path} was coded with the entropy model {header.entropy_fingerprint}, not with {entropy} "
            f"({model.fingerprint})"
        )
    if fits and data is not None:
        facts["bits_without_overhead"] = round(read(codec, data, entropy_model=model).code_length, 1)
    return facts
