"""Images to compressed files and back, through any codec of images.

    image --codec--> indices, or latents --quantize--> values --coding--> bytes
    image <--codec-- indices, or latents <--reconstruct-- values <--coding-- bytes

The codec's own arithmetic may differ between machines; from the values on, and up to them, nothing does.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from latent_codec.bitstream.coding import DecodedValues, Values, decode_values, values_bits
from latent_codec.bitstream.container import Container, Header, Level, Tile, unpack
from latent_codec.bitstream.entropy_model import EntropyModel, Prediction
from latent_codec.bitstream.errors import CorruptError, WrongCodecError, WrongEntropyModelError
from latent_codec.bitstream.quantization import reconstruct
from latent_codec.bitstream.sidecars import load_entropy_model
from latent_codec.bitstream.stored_entropy import FILE_NAME
from latent_codec.bitstream.targets import (
    RATE_WEIGHT,
    compress_indices,
    compress_latents,
    compress_latents_to,
)
from latent_codec.codec import ImageLike, LatentCodec, as_output
from latent_codec.images.tensors import to_image
from latent_codec.torch_settings import ignoring_caller_settings

TILE = 1024
"""Pixels; images that are larger become several tiles."""
DEFAULT_QUALITY = 50
LARGE = 2**22
MARGIN = 64
"""Pixels that a decoder sees around each tile that it decodes by itself, and of which the outer half is not used."""


class PartialWarning(UserWarning):
    """A file was decoded in part."""


@dataclass(frozen=True, kw_only=True)
class Decoded(DecodedValues):
    """What a file holds, before the codec decodes it."""

    container: Container


@ignoring_caller_settings()
def compress(
    codec: LatentCodec,
    image: ImageLike,
    *,
    entropy_model: EntropyModel | None = None,
    quality: int | None = None,
    target_bytes: int | None = None,
    rate_weight: float = RATE_WEIGHT,
    tile: int | None = TILE,
) -> bytes:
    """An image as a compressed file, which has been decoded again before it is returned.

    Indices are stored without loss, entropy coded or, where that is smaller or there is no model, of fixed length. Latents
    (the posterior mean) are quantised by the model's steps.

    Args:
        image: one, of any size; what `LatentCodec.encode` takes.
        entropy_model: fitted to this codec; None: the entropy.safetensors in the codec's folder. Latents need one.
        quality: of latents: 0 (coarsest) to the model's num_steps - 1; None: DEFAULT_QUALITY, or what `target_bytes` allow.
        target_bytes: what the file may have at most. Latents: the finest steps that fit. Indices: all levels,
            or those from the top on that fit.
        rate_weight: of latents, what a bit is worth in squared steps when levels are chosen; 0 rounds.
        tile: side in pixels of the tiles of a larger image, which decode independently: a multiple of the coarsest
            level's pixels per position. None: one tile.

    Raises:
        ValueError: for a missing model, a quality that does not fit or comes with `target_bytes`, bytes that are too few,
            a model of another codec, a tile that does not fit, and images that `LatentCodec.encode` refuses.
        TooLargeError: for images beyond the format's bounds.
    """
    prepared = prepare(codec, image, entropy_model=entropy_model, tile=tile)
    return prepared.compress(quality=quality, target_bytes=target_bytes, rate_weight=rate_weight)


@ignoring_caller_settings()
def prepare(
    codec: LatentCodec,
    image: ImageLike,
    *,
    entropy_model: EntropyModel | None = None,
    tile: int | None = TILE,
) -> "PreparedImage":
    """Encode an image once, for files of several sizes; arguments and errors are those of `compress`."""
    if entropy_model is None:
        entropy_model = sidecar(codec)
    elif entropy_model.space_fingerprint != codec.space_fingerprint:
        raise ValueError(
            f"the entropy model was fitted to another codec (space {entropy_model.space_fingerprint}) than {codec.name} "
            f"(space {codec.space_fingerprint}); fit one to it"
        )
    if entropy_model is None and not codec.indices_suffice:
        raise ValueError(
            f"latents of {codec.name} need an entropy model, and none lies beside it; `latent-codec fit-entropy` makes one"
        )
    image = to_image(image, channels=codec.channels)
    levels = _levels(codec)
    outline = Header(
        num_layers=1,
        entropy_fingerprint=entropy_model and entropy_model.fingerprint,
        height=image.shape[1],
        width=image.shape[2],
        levels=levels,
        space_fingerprint=codec.space_fingerprint,
        tile=_tile_positions(tile, image.shape[1:], levels),
    )
    if codec.indices_suffice:
        found = [grid.cpu().numpy() for grid in codec.encode_indices(image)]
    else:
        found = codec.encode(image)[0].float().cpu().numpy()
    return PreparedImage(codec=codec, entropy_model=entropy_model, outline=outline, encoded=found)


@dataclass(frozen=True, kw_only=True, eq=False)
class PreparedImage:
    """An image's latents or indices, before anything is lost; made by `prepare`."""

    codec: LatentCodec
    entropy_model: EntropyModel | None
    outline: Header
    """What the header of each file says, but for the step sizes and how it is coded."""
    encoded: np.ndarray | Values
    """Latents, float32 (C, h, w), or grids of indices."""

    @ignoring_caller_settings()
    def compress(
        self,
        *,
        quality: int | None = None,
        target_bytes: int | None = None,
        rate_weight: float = RATE_WEIGHT,
    ) -> bytes:
        """A file; arguments and errors are those of the function `compress`."""
        if quality is not None and target_bytes is not None:
            raise ValueError("quality and target_bytes came; each decides the file's size: give one of them")
        if not rate_weight >= 0:
            raise ValueError(f"rate_weight is {rate_weight}; 0 or more")
        model = self.entropy_model
        if self.outline.is_indices:
            if quality is not None:
                raise ValueError(
                    f"quality is {quality}; indices of {self.codec.name} are stored as they are: leave it out"
                )
            data, values = compress_indices(model, self.encoded, self.outline, target_bytes)
        elif target_bytes is not None:
            data, values = compress_latents_to(model, self.encoded, self.outline, target_bytes, rate_weight)
        else:
            quality = min(DEFAULT_QUALITY, model.num_steps - 1) if quality is None else quality
            if not 0 <= quality < model.num_steps:
                raise ValueError(
                    f"quality is {quality}; this entropy model has 0 (coarsest) to {model.num_steps - 1}"
                )
            data, values = compress_latents(model, self.encoded, self.outline, quality, rate_weight)
        decoded = read(self.codec, data, entropy_model=model)
        if not all(map(np.array_equal, decoded.values, values)):
            raise RuntimeError("a file that was just written decodes to something else: please report this")
        return data


@ignoring_caller_settings()
def decompress(
    codec: LatentCodec,
    data: bytes,
    *,
    entropy_model: EntropyModel | None = None,
    region: tuple[int, int, int, int] | None = None,
    latents: bool = False,
    partial: bool = False,
    output_type: str = "pil",
    tile: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Image.Image | np.ndarray | Tensor | list[Tensor]:
    """A compressed file's image; or with `latents` what a pipeline or a latent file takes, no pixel being decoded.

    Args:
        entropy_model: the one it was coded with; None: the entropy.safetensors in the codec's folder, where it is needed.
        region: (top, left, height, width) in pixels: decode the tiles that it touches alone, and cut it out. A codec that
            looks at the whole image (attention, group norm) paints a region slightly differently. Not for `latents`.
        latents: give latents (1, C, h, w) in the codec's dtype, or int64 grids of indices [(1, h, w), ...], which are
            the same on every machine.
        partial: decode what is whole of a file that is cut short or damaged, with a PartialWarning. Where
            a tile is lost the image is grey; for other lost values stands what the entropy model expects, or, on lower levels
            of indices, the mean codeword.
        output_type: as `LatentCodec.decode` has it.
        tile: side in pixels, a multiple of the coarsest level's pixels per position: of a larger image decode tiles of this
            side one by one, each with MARGIN pixels around it, and blend them. Memory is then that of a tile and of
            the image, in 8 bits for "pil"; attention and group norm look at a tile and not at all of the image. None: all at once.
        on_progress: called with the numbers of tiles done and of all of them.

    Returns:
        One image: PIL, (C, H, W) for "pt", (H, W, C) for "np".

    Raises:
        ValueError: for a region that is not in the image.
        BitstreamError: by its class (bitstream/errors.py), if it cannot be decoded, or if `partial` finds nothing.
    """
    if output_type not in ("pil", "pt", "np"):
        raise ValueError(f'expected the output_type "pil", "pt" or "np", got {output_type!r}')
    if region is not None and latents:
        raise ValueError("region cuts out of the image, and latents come whole: leave one of them out")
    if entropy_model is None:
        entropy_model = sidecar(codec)
    decoded = read(codec, data, entropy_model=entropy_model, region=region, partial=partial)
    header = decoded.container.header
    _warn_of_missing(decoded.container)
    if latents and header.is_indices:
        return [torch.from_numpy(values) for values in decoded.values]
    whole = Tile.whole(header)
    if latents:
        return _latents(codec, entropy_model, decoded, whole)
    top, left, height, width = region or (0, 0, header.height, header.width)
    top, left = top - decoded.container.top, left - decoded.container.left
    side = header.levels[0].side
    if tile is not None and (tile < side or tile % side):
        raise ValueError(f"expected a tile of a positive multiple of {side} pixels, got {tile}")
    if tile is None or max(header.height, header.width) <= tile:
        image = _decode_tile(codec, entropy_model, decoded, whole)
        return as_output([image[:, top : top + height, left : left + width]], output_type)[0]
    image = _decode_tiles(
        codec,
        entropy_model,
        decoded,
        tile // side,
        torch.uint8 if output_type == "pil" else None,
        on_progress,
    )[:, top : top + height, left : left + width]
    if output_type == "pil":
        return Image.fromarray(np.squeeze(image.permute(1, 2, 0).numpy(), 2 if len(image) == 1 else ()))
    return as_output([image], output_type)[0]


def tile_for(header: Header) -> int | None:
    """A tile for `decompress`, in pixels: None for images of up to LARGE pixels, which fit into memory as they are."""
    side = header.levels[0].side
    return None if header.height * header.width <= LARGE else max(TILE // side, 1) * side


def _decode_tiles(
    codec: LatentCodec,
    entropy_model: EntropyModel | None,
    decoded: Decoded,
    tile: int,
    dtype: torch.dtype | None,
    on_progress: Callable[[int, int], None] | None,
) -> Tensor:
    """An image (C, H, W) tile by tile: uint8, or float32 in [-1, 1].

    A tile is decoded with MARGIN pixels around it. Half of them, next to where the decoder saw less than there is, are not used;
    over the other half, on both sides of the border, one tile fades into the next.
    """
    header = decoded.container.header
    side = header.levels[0].side
    half = -(-MARGIN // (2 * side))  # of the margin, in positions
    image = torch.zeros((codec.channels, header.height, header.width), dtype=dtype or torch.float32)
    sizes = header.shapes[0][1:]
    starts = list(product(*(range(0, size, tile) for size in sizes)))
    for done, start in enumerate(starts):
        if on_progress is not None:
            on_progress(done, len(starts))
        first = [max(0, each - 2 * half) for each in start]
        last = [min(size, each + tile + 2 * half) for each, size in zip(start, sizes)]
        part = Tile(top=first[0], left=first[1], height=last[0] - first[0], width=last[1] - first[1])
        new = _decode_tile(codec, entropy_model, decoded, part).cpu()
        kept = [min(size, each + tile + half) for each, size in zip(start, sizes)]
        place = image[:, first[0] * side : kept[0] * side, first[1] * side : kept[1] * side]
        new = new[:, : place.shape[1], : place.shape[2]]
        fades = [
            _fade(length, (each - half - begin) * side, 2 * half * side if each else 0)
            for length, each, begin in zip(new.shape[1:], start, first)
        ]
        weights = fades[0][:, None] * fades[1]
        if image.dtype == torch.uint8:
            place.copy_(place.float().lerp_((new + 1) * 127.5, weights).round_())
        else:
            place.lerp_(new, weights)
    return image


def _fade(length: int, begin: int, rise: int) -> Tensor:
    """Weights of a tile along one side, against the one before it: 0 up to `begin`, then rising to 1 over `rise` pixels."""
    return ((torch.arange(length) + 0.5 - begin) / rise).clamp(0, 1) if rise else torch.ones(length)


@torch.no_grad()
def _decode_tile(
    codec: LatentCodec, entropy_model: EntropyModel | None, decoded: Decoded, tile: Tile
) -> Tensor:
    """An image (C, H, W) of a tile by itself, padding included; grey where nothing is known."""
    header = decoded.container.header
    if header.is_indices:
        places = tile.slices(header.levels)
        grids = [
            torch.from_numpy(values[place].copy())
            for values, place in zip(decoded.values, places, strict=True)
        ]
        known = [each[place] for each, place in zip(decoded.known, places, strict=True)]
        whole = all(each.all() for each in known) and len(grids) == len(codec.levels)
        masks = None if whole else [torch.from_numpy(each) for each in known]
        image = codec.decode_indices(grids, known=masks, output_type="pt")[0]
    else:
        image = codec.decode(_latents(codec, entropy_model, decoded, tile), output_type="pt")[0]
    return torch.where(_lost_pixels(decoded.container, tile).to(image.device), 0, image)


def _latents(codec: LatentCodec, entropy_model: EntropyModel, decoded: Decoded, tile: Tile) -> Tensor:
    """Latents (1, C, h, w) of a tile, on the codec's device."""
    (place,) = tile.slices(decoded.container.header.levels)
    prediction = decoded.predictions[0]
    found = reconstruct(
        entropy_model,
        decoded.values[0][place],
        Prediction(prediction.numbers[place], prediction.offsets[place]),
        decoded.container.header.steps_index,
    )
    return torch.from_numpy(found)[None].to(codec.device, codec.dtype)


@ignoring_caller_settings()
def read(
    codec: LatentCodec,
    data: bytes,
    *,
    entropy_model: EntropyModel | None = None,
    region: tuple[int, int, int, int] | None = None,
    partial: bool = False,
) -> Decoded:
    """The values in a compressed file; arguments and errors are those of `decompress`."""
    if region is None:
        container = unpack(data, partial=partial)
    else:  # what lies elsewhere may be damaged
        container = unpack(data, partial=True).around(*region)
        if container.missing and not partial:
            unpack(data)  # which says what is wrong
    header = container.header
    if entropy_model is None and header.entropy_fingerprint is not None:
        entropy_model = sidecar(codec)
    _check(codec, header, entropy_model)
    if all(section is None for section in container.sections[: header.num_tiles]):
        unpack(data)  # which says what is wrong: there is nothing to decode
    found = decode_values(entropy_model, container)
    return Decoded(found.values, found.known, found.predictions, container=container)


def sidecar(codec: LatentCodec) -> EntropyModel | None:
    """The entropy model in the codec's folder, if there is one.

    Raises:
        ValueError: if it is damaged, or of another codec.
    """
    if codec.folder is None or not (codec.folder / FILE_NAME).is_file():
        return None
    return load_entropy_model(codec.folder, codec=codec)


def ideal_bits(decoded: Decoded, entropy_model: EntropyModel | None = None) -> float:
    """What the entropy model, or the codebooks' sizes, say that a file's values cost: its sections have a little more."""
    return values_bits(entropy_model, decoded.values, decoded.container.header)


def _levels(codec: LatentCodec) -> tuple[Level, ...]:
    if not codec.indices_suffice:
        return (Level(side=codec.latent_space.downsampling_factor, channels=codec.latent_space.channels),)
    return tuple(Level(side=level.side, codebook_size=level.codebook_size) for level in codec.levels)


def _tile_positions(tile: int | None, size: Sequence[int], levels: Sequence[Level]) -> int | None:
    """A tile's side in positions; None where it holds the whole image."""
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


def _lost_pixels(container: Container, part: Tile) -> Tensor:
    """Where tiles lack even their first pass: bool, (height, width) of a part of the padded image."""
    header = container.header
    first = header.levels[0]
    lost = torch.zeros(header.shapes[0][1:], dtype=torch.bool)
    for tile, section in zip(header.tiles(), container.sections):
        if section is None:
            lost[tile.slices([first])[0][1:]] = True
    lost = lost[part.slices([first])[0][1:]]
    return lost.repeat_interleave(first.side, 0).repeat_interleave(first.side, 1)


def _warn_of_missing(container: Container) -> None:
    lost = container.missing
    if container.trailing_bytes:
        lost = [*lost, f"{container.trailing_bytes} bytes behind the last section"]
    if lost:
        shown = ", ".join(lost[:4]) + (f" and {len(lost) - 4} more" if len(lost) > 4 else "")
        warnings.warn(f"decoded in part; missing or damaged: {shown}", PartialWarning, stacklevel=3)
