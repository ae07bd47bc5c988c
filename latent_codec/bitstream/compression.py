"""Pictures to compressed files and back, through any codec of pictures.

    picture --codec--> indices, or latents --quantize--> values --coding--> bytes
    picture <--codec-- indices, or latents <--reconstruct-- values <--coding-- bytes

The codec's own arithmetic may differ between machines; from the values on, and up to them, nothing does.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from latent_codec.bitstream.coding import Values, decode_values, encode_values, values_bits
from latent_codec.bitstream.container import Container, Header, Level, unpack
from latent_codec.bitstream.entropy_model import EntropyModel
from latent_codec.bitstream.errors import CorruptError, WrongCodecError, WrongEntropyModelError
from latent_codec.codec import LatentCodec, Picture, as_output, decodes_codewords
from latent_codec.models.hierarchical_vq import HierarchicalVQ
from latent_codec.pictures import to_image

TILE = 1024
"""Pixels; pictures that are larger become several tiles."""


class PartialWarning(UserWarning):
    """A file was decoded in part."""


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """What a file holds, before the codec decodes it."""

    container: Container
    values: Values
    """int64 (channels, h, w) for each level, 0 where unknown."""
    known: list[np.ndarray]
    """bool (h, w) for each level: whether all its channels are known there."""


def compress(
    codec: LatentCodec,
    picture: Picture,
    *,
    entropy_model: EntropyModel | None = None,
    quality: int | None = None,
    tile: int | None = TILE,
) -> bytes:
    """A picture as a compressed file, which has been decoded again before it is returned.

    Indices are stored without loss, entropy coded or, where that is smaller or no model came, of fixed length. Latents
    (the posterior mean) are quantised by the model's steps.

    Args:
        picture: one, of any size; what `LatentCodec.encode` takes.
        entropy_model: fitted to this codec; latents need one.
        quality: of latents: 0 (coarsest) to the model's num_steps - 1.
        tile: side in pixels of the tiles of a larger picture, which decode independently: a multiple of the coarsest
            level's pixels per position. None: one tile.

    Raises:
        ValueError: for a missing or superfluous quality, a model of another codec, a tile that does not fit, and
            pictures that `LatentCodec.encode` refuses.
        TooLargeError: for pictures beyond the format's bounds.
    """
    if entropy_model is not None and entropy_model.space_fingerprint != codec.space_fingerprint:
        raise ValueError(
            f"the entropy model was fitted to another codec (space {entropy_model.space_fingerprint}) than {codec.name} "
            f"(space {codec.space_fingerprint}); fit one to it"
        )
    image = to_image(picture, channels=codec.channels)
    levels = _levels(codec)
    if decodes_codewords(codec):
        if quality is not None:
            raise ValueError(
                f"quality is {quality}; indices of {codec.name} are stored as they are: leave it out"
            )
        values = [grid.cpu().numpy() for grid in codec.encode_indices(image)]
        models = [None] if entropy_model is None else [entropy_model, None]
    else:
        if entropy_model is None:
            raise ValueError(f"latents of {codec.name} need an entropy model; fit one with fit_static")
        num_steps = entropy_model.num_steps
        if quality is None or not 0 <= quality < num_steps:
            raise ValueError(f"quality is {quality}; this entropy model has 0 (coarsest) to {num_steps - 1}")
        latents = codec.encode(image).float().cpu().numpy()
        values = [entropy_model.quantize(latents[0], quality)]
        models = [entropy_model]
    outline = Header(
        num_passes=1,
        entropy_fingerprint=entropy_model and entropy_model.fingerprint,
        height=image.shape[1],
        width=image.shape[2],
        levels=levels,
        space_fingerprint=codec.space_fingerprint,
        steps_index=quality or 0,
        tile=_tile_positions(tile, image.shape[1:], levels),
    )
    data = min((encode_values(model, values, outline) for model in models), key=len)
    decoded = read(codec, data, entropy_model=entropy_model)
    if not all(map(np.array_equal, decoded.values, values)):
        raise RuntimeError("a file that was just written decodes to something else: please report this")
    return data


def decompress(
    codec: LatentCodec,
    data: bytes,
    *,
    entropy_model: EntropyModel | None = None,
    latents: bool = False,
    partial: bool = False,
    output_type: str = "pil",
) -> Image.Image | np.ndarray | Tensor | list[Tensor]:
    """A compressed file's picture; or with `latents` what a pipeline or a latent file takes, no pixel being decoded.

    Args:
        entropy_model: the one it was coded with; none for indices of fixed length.
        latents: give latents (1, C, h, w) in the codec's dtype, or int64 grids of indices [(1, h, w), ...], which are
            the same on every machine.
        partial: decode what is whole of a file that is cut short or damaged, with a PartialWarning. Where
            a tile is lost the picture is grey; where only lower levels of indices are, the mean codeword stands in.
            Unknown indices are 0, unknown latents those of level 0.
        output_type: as `LatentCodec.decode` has it.

    Returns:
        One picture: PIL, (C, H, W) for "pt", (H, W, C) for "np".

    Raises:
        BitstreamError: by its class (bitstream/errors.py), if it cannot be decoded, or if `partial` finds nothing.
    """
    decoded = read(codec, data, entropy_model=entropy_model, partial=partial)
    header = decoded.container.header
    _warn_of_missing(decoded.container)
    if header.is_indices:
        grids = [torch.from_numpy(values) for values in decoded.values]
        if latents:
            return grids
        whole = all(known.all() for known in decoded.known) and len(grids) == len(codec.codebook_sizes)
        if whole or not isinstance(codec.autoencoder, HierarchicalVQ):
            image = codec.decode_indices(grids, output_type="pt")[0]
        else:
            image = _decode_some_levels(codec, grids, decoded.known)
    else:
        found = torch.from_numpy(entropy_model.reconstruct(decoded.values[0], header.steps_index))[None]
        found = found.to(codec.device, codec.dtype)
        if latents:
            return found
        image = codec.decode(found, output_type="pt")[0]
    image = torch.where(_lost_pixels(decoded.container).to(image.device), 0, image)
    image = image[:, : header.height, : header.width]
    return as_output([image], output_type)[0]


def read(
    codec: LatentCodec, data: bytes, *, entropy_model: EntropyModel | None = None, partial: bool = False
) -> Decoded:
    """The values in a compressed file; arguments and errors are those of `decompress`."""
    container = unpack(data, partial=partial)
    header = container.header
    _check(codec, header, entropy_model)
    if all(section is None for section in container.sections[: header.num_tiles]):
        unpack(data)  # which says what is wrong: there is nothing to decode
    values, known = decode_values(entropy_model, container)
    return Decoded(container=container, values=values, known=known)


def ideal_bits(decoded: Decoded, entropy_model: EntropyModel | None = None) -> float:
    """What the entropy model, or the codebooks' sizes, say that a file's values cost: its sections have a little more."""
    return values_bits(entropy_model, decoded.values, decoded.container.header)


def _levels(codec: LatentCodec) -> tuple[Level, ...]:
    if not decodes_codewords(codec):
        return (Level(side=codec.space.downsampling_factor, channels=codec.space.channels),)
    autoencoder = codec.autoencoder
    is_hierarchical = isinstance(autoencoder, HierarchicalVQ)
    sides = autoencoder.position_sides if is_hierarchical else [codec.space.downsampling_factor]
    return tuple(
        Level(side=side, codebook_size=size) for side, size in zip(sides, codec.codebook_sizes, strict=True)
    )


def _tile_positions(tile: int | None, size: Sequence[int], levels: Sequence[Level]) -> int | None:
    """A tile's side in positions; None where it holds the whole picture."""
    side = levels[0].side
    if tile is None:
        return None
    if tile < side or tile % side:
        raise ValueError(f"tile is {tile} pixels; this codec needs a positive multiple of {side}, or None")
    return None if max(size) <= tile else tile // side


def _check(codec: LatentCodec, header: Header, entropy_model: EntropyModel | None) -> None:
    """Whether codec and entropy model are the file's."""
    if header.space_fingerprint != codec.space_fingerprint:
        raise WrongCodecError(
            f"the file was made by another codec (space {header.space_fingerprint}), not by {codec.name} "
            f"(space {codec.space_fingerprint}). Open it with the codec that it was made by."
        )
    levels = _levels(codec)
    if header.levels != levels[: len(header.levels)]:
        raise CorruptError(f"the header is damaged: {codec.name} has other grids than it says")
    if header.entropy_fingerprint is None:
        return
    if entropy_model is None:
        raise WrongEntropyModelError(
            f"the file needs the entropy model {header.entropy_fingerprint}, and none came; it is the "
            "entropy.safetensors that lies beside the codec"
        )
    if header.entropy_fingerprint != entropy_model.fingerprint:
        raise WrongEntropyModelError(
            f"the file was coded with the entropy model {header.entropy_fingerprint}, not with "
            f"{entropy_model.fingerprint}. Give the one that it was coded with."
        )
    if header.steps_index and not header.steps_index < entropy_model.num_steps:
        raise CorruptError(f"the header is damaged: the entropy model has no step sizes {header.steps_index}")


def _lost_pixels(container: Container) -> Tensor:
    """Where tiles lack even their first pass: bool, (height, width) of the padded picture."""
    header = container.header
    first = header.levels[0]
    lost = torch.zeros(header.shapes[0][1:], dtype=torch.bool)
    for tile, section in zip(header.tiles(), container.sections):
        if section is None:
            lost[tile.slices([first])[0][1:]] = True
    return lost.repeat_interleave(first.side, 0).repeat_interleave(first.side, 1)


def _warn_of_missing(container: Container) -> None:
    lost = container.missing
    if container.trailing_bytes:
        lost = [*lost, f"{container.trailing_bytes} bytes behind the last section"]
    if lost:
        shown = ", ".join(lost[:4]) + (f" and {len(lost) - 4} more" if len(lost) > 4 else "")
        warnings.warn(f"decoded in part; missing or damaged: {shown}", PartialWarning, stacklevel=3)


@torch.no_grad()
def _decode_some_levels(codec: LatentCodec, grids: Sequence[Tensor], known: Sequence[np.ndarray]) -> Tensor:
    """An image (C, H, W) of a HierarchicalVQ's indices, with the mean codeword where none is known."""
    autoencoder, quantized = codec.autoencoder, []
    side = autoencoder.position_sides[0]
    shapes = autoencoder.grid_shapes(grids[0].shape[1] * side, grids[0].shape[2] * side)
    for level, shape in enumerate(shapes):
        codewords = autoencoder.mean_codeword(level).view(1, -1, 1, 1).expand(1, -1, *shape)
        if level < len(grids):
            found = autoencoder.quantizers[level].lookup(grids[level].to(codec.device))
            mask = torch.from_numpy(known[level]).to(codec.device)
            codewords = torch.where(mask, found, codewords)
        quantized.append(codewords)
    latents = codec.space.normalize(autoencoder.concatenate(quantized))
    return codec.decode(latents, output_type="pt")[0]
