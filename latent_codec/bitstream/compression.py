"""Compress images to files and decompress them, through any codec of images.

    image --codec--> indices, or latents --quantize--> values --coding--> bytes
    image <--codec-- indices, or latents <--reconstruct-- values <--coding-- bytes

The codec's own arithmetic may differ between machines; between values and bytes everything is exact.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise, product

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from latent_codec.bitstream.coding import DecodedValues, Values, decode_values
from latent_codec.bitstream.container import Container, Header, Level, Tile, unpack
from latent_codec.bitstream.entropy_model import EntropyModel, Prediction
from latent_codec.bitstream.errors import CorruptError, WrongCodecError, WrongEntropyModelError
from latent_codec.bitstream.quantization import reconstruct
from latent_codec.bitstream.sidecars import check_fitted_to, sidecar
from latent_codec.bitstream.targets import (
    RATE_WEIGHT,
    compress_indices,
    compress_latents,
    compress_latents_to,
)
from latent_codec.codec import ImageLike, LatentCodec, as_output
from latent_codec.errors import SettingError
from latent_codec.images.tensors import to_image
from latent_codec.torch_settings import ignoring_caller_settings

TILE = 1024
"""Pixels; larger images are coded in several tiles."""
DEFAULT_QUALITY = 50
LARGE = 2**22
MARGIN = 64
"""Pixels around each tile that is decoded by itself; the outer half is not used."""


class PartialWarning(UserWarning):
    """A file was decoded in part."""


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
    """Compress an image to a file, which is decoded again before it is returned.

    Indices are stored without loss, entropy coded or, where that is smaller or there is no model, of fixed length. Latents
    (the posterior mean) are quantized by the model's step sizes.

    Args:
        image: one, of any size; what `LatentCodec.encode` takes.
        entropy_model: fitted to this codec; None: the entropy.safetensors in the codec's folder. Latents need one.
        quality: of latents: 0 (coarsest) to the model's num_step_sizes - 1; None: DEFAULT_QUALITY, or by `target_bytes`.
        target_bytes: the largest file allowed. Latents: the finest step sizes that fit. Indices: all levels,
            or those from the top on that fit.
        rate_weight: of latents, the weight of a bit, in squared steps, in their quantization (RDOQ); 0 rounds.
        tile: side in pixels of the tiles of a larger image, which decode independently: a multiple of the coarsest
            level's pixels per position. None: one tile.

    Raises:
        SettingError: for a missing model, a quality that does not fit or comes with `target_bytes`, too few bytes,
            and a tile that does not fit.
        ValueError: for a model of another codec, and images that `LatentCodec.encode` refuses.
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
    else:
        check_fitted_to(codec, entropy_model, "the entropy model")
    if entropy_model is None and not codec.indices_suffice:
        expected = f"one for latents of {codec.name}, as there is none in its folder"
        raise SettingError("entropy_model", expected, advice="fit one to it")
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
        encoded = [indices.cpu().numpy() for indices in codec.encode_indices(image)]
    else:
        encoded = codec.encode(image)[0].float().cpu().numpy()
    return PreparedImage(codec=codec, entropy_model=entropy_model, outline=outline, encoded=encoded)


@dataclass(frozen=True, kw_only=True, eq=False)
class PreparedImage:
    """An image's latents or indices, before anything is lost; made by `prepare`."""

    codec: LatentCodec
    entropy_model: EntropyModel | None
    outline: Header
    """The header of each file, but for step sizes and coding."""
    encoded: np.ndarray | Values
    """Latents, float32 (C, h, w), or indices."""

    def compress(
        self,
        *,
        quality: int | None = None,
        target_bytes: int | None = None,
        rate_weight: float = RATE_WEIGHT,
    ) -> bytes:
        """Write a file; arguments and errors are those of the function `compress`."""
        return self.compress_and_read(quality=quality, target_bytes=target_bytes, rate_weight=rate_weight)[0]

    @ignoring_caller_settings()
    def compress_and_read(
        self,
        *,
        quality: int | None = None,
        target_bytes: int | None = None,
        rate_weight: float = RATE_WEIGHT,
    ) -> tuple[bytes, "Decoded"]:
        """Write a file as `compress` does; with the values that it was decoded to again."""
        if quality is not None and target_bytes is not None:
            raise ValueError("expected quality or target_bytes, got both: each decides the file's size")
        if not rate_weight >= 0:
            raise SettingError("rate_weight", "at least 0", rate_weight)
        model = self.entropy_model
        if self.outline.is_indices:
            if quality is not None:
                what = f"none for {self.codec.name}, whose indices are stored without loss"
                raise SettingError("quality", what, quality)
            data, values = compress_indices(model, self.encoded, self.outline, target_bytes)
        elif target_bytes is not None:
            data, values = compress_latents_to(model, self.encoded, self.outline, target_bytes, rate_weight)
        else:
            quality = min(DEFAULT_QUALITY, model.num_step_sizes - 1) if quality is None else quality
            check_quality(quality, model)
            data, values = compress_latents(model, self.encoded, self.outline, quality, rate_weight)
        decoded = read(self.codec, data, entropy_model=model)
        if not all(map(np.array_equal, decoded.values, values)):
            raise RuntimeError("a file that was just written decodes to other values: please report this")
        return data, decoded


def check_quality(quality: int, model: EntropyModel) -> None:
    """Raise SettingError for a quality that an entropy model of latents does not have."""
    if not 0 <= quality < model.num_step_sizes:
        expected = f"0 (coarsest) to {model.num_step_sizes - 1} for this entropy model"
        raise SettingError("quality", expected, quality)


@dataclass(frozen=True, kw_only=True)
class Decoded(DecodedValues):
    """The values of a file, before the codec decodes them; made by `read`."""

    codec: LatentCodec
    entropy_model: EntropyModel | None
    container: Container
    """The file, or the tiles of the region."""
    region: tuple[int, int, int, int] | None = None
    """(top, left, height, width) in pixels."""

    @ignoring_caller_settings()
    def latents(self) -> Tensor | list[Tensor]:
        """Latents (1, C, h, w) in the codec's dtype, on its device, or int64 indices [(1, h, w), ...]."""
        header = self.container.header
        if header.is_indices:
            return [torch.from_numpy(indices) for indices in self.values]
        return self._latents(Tile.whole(header))

    @ignoring_caller_settings()
    def image(
        self,
        *,
        output_type: str = "pil",
        tile: int | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> Image.Image | np.ndarray | Tensor:
        """Decode pixels; arguments and errors are those of `decompress`."""
        header = self.container.header
        top, left, height, width = self.region or (0, 0, header.height, header.width)
        top, left = top - self.container.top, left - self.container.left
        positions = _tile_positions(tile, (header.height, header.width), header.levels)
        if positions is None:
            image = self._decode_tile(Tile.whole(header))
        else:
            dtype = torch.uint8 if output_type == "pil" else torch.float32
            image = self._decode_tiles(positions, dtype, on_progress)
        image = image[:, top : top + height, left : left + width]
        if image.dtype == torch.uint8:
            return Image.fromarray(np.squeeze(image.permute(1, 2, 0).numpy(), 2 if len(image) == 1 else ()))
        return as_output([image], output_type)[0]

    def _decode_tiles(
        self, tile: int, dtype: torch.dtype, on_progress: Callable[[int, int], None] | None
    ) -> Tensor:
        """Decode an image (C, H, W) tile by tile: uint8, or float32 in [-1, 1].

        A tile is decoded with MARGIN pixels around it. Half of them, next to pixels that the decoder did not see, are not used;
        over the other half, on both sides of the border, one tile fades into the next.
        """
        header = self.container.header
        side = header.levels[0].side
        half = -(-MARGIN // (2 * side))  # of the margin, in positions
        image = torch.zeros((self.codec.channels, header.height, header.width), dtype=dtype)
        sizes = header.shapes[0][1:]
        starts = list(product(*(range(0, size, tile) for size in sizes)))
        for done, start in enumerate(starts):
            if on_progress is not None:
                on_progress(done, len(starts))
            first = [max(0, each - 2 * half) for each in start]
            last = [min(size, each + tile + 2 * half) for each, size in zip(start, sizes)]
            part = Tile(top=first[0], left=first[1], height=last[0] - first[0], width=last[1] - first[1])
            new = self._decode_tile(part).cpu()
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

    @torch.no_grad()
    def _decode_tile(self, tile: Tile) -> Tensor:
        """Decode an image (C, H, W) of a tile by itself, padding included; gray where nothing is known."""
        header = self.container.header
        if header.is_indices:
            places = tile.slices(header.levels)
            indices = [torch.from_numpy(each[place].copy()) for each, place in zip(self.values, places)]
            known = [torch.from_numpy(each[place]) for each, place in zip(self.known, places)]
            is_whole = all(each.all() for each in known) and len(indices) == len(self.codec.levels)
            image = self.codec.decode_indices(indices, known=None if is_whole else known, output_type="pt")[0]
        else:
            image = self.codec.decode(self._latents(tile), output_type="pt")[0]
        return torch.where(_lost_pixels(self.container, tile).to(image.device), 0, image)

    def _latents(self, tile: Tile) -> Tensor:
        header = self.container.header
        (place,) = tile.slices(header.levels)
        prediction = self.predictions[0]
        found = reconstruct(
            self.entropy_model,
            self.values[0][place],
            Prediction(prediction.cdf_index[place], prediction.offsets[place]),
            header.step_size_index,
        )
        return torch.from_numpy(found)[None].to(self.codec.device, self.codec.dtype)


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
    """Decode a compressed file's image; or with `latents` its latents or indices, as a pipeline or a latent file takes them.

    Args:
        entropy_model: the one it was coded with; None: the entropy.safetensors in the codec's folder, where it is needed.
        region: (top, left, height, width) in pixels: decode only the tiles that it touches, and crop it. A codec whose decoder
            sees the whole image (attention, group norm) decodes a region slightly differently. Not for `latents`.
        latents: give latents (1, C, h, w) in the codec's dtype, or int64 indices [(1, h, w), ...], without decoding pixels;
            they are the same on every machine.
        partial: decode the whole sections of a file that is cut short or damaged, with a PartialWarning. Lost tiles are
            gray; other lost values are the entropy model's most probable ones or, on lower levels of indices, the mean codeword.
        output_type: as in `LatentCodec.decode`.
        tile: side in pixels, a multiple of the coarsest level's pixels per position: of a larger image decode tiles of this
            side one by one, each with MARGIN pixels around it, and blend them. Memory is then that of a tile and of
            the image, in 8 bits for "pil"; attention and group norm see a tile and not the whole image. None: all at once.
        on_progress: called with the number of tiles done and of all.

    Returns:
        One image: PIL, (C, H, W) for "pt", (H, W, C) for "np".

    Raises:
        SettingError: for a region that is not in the image, a tile that does not fit, and another output type.
        BitstreamError: by its class (bitstream/errors.py), if it cannot be decoded, or if `partial` finds nothing.
    """
    if output_type not in ("pil", "pt", "np"):
        raise SettingError("output_type", '"pil", "pt" or "np"', output_type)
    if region is not None and latents:
        raise SettingError("region", "None where latents are asked for, of the whole image", region)
    decoded = read(codec, data, entropy_model=entropy_model, region=region, partial=partial)
    _warn_of_missing(decoded.container)
    if latents:
        return decoded.latents()
    codec.check_keeps_size("a compressed file")
    return decoded.image(output_type=output_type, tile=tile, on_progress=on_progress)


def tile_for(header: Header) -> int | None:
    """A tile for `decompress`, in pixels: None for images of up to LARGE pixels, which fit into memory as they are."""
    side = header.levels[0].side
    return None if header.height * header.width <= LARGE else max(TILE // side, 1) * side


def _fade(length: int, begin: int, rise: int) -> Tensor:
    """Weights of a tile along one side, against the one before it: 0 up to `begin`, then rising to 1 over `rise` pixels."""
    return ((torch.arange(length) + 0.5 - begin) / rise).clamp(0, 1) if rise else torch.ones(length)


@ignoring_caller_settings()
def read(
    codec: LatentCodec,
    data: bytes,
    *,
    entropy_model: EntropyModel | None = None,
    region: tuple[int, int, int, int] | None = None,
    partial: bool = False,
) -> Decoded:
    """Decode the values of a compressed file; arguments and errors are those of `decompress`."""
    if region is None:
        container = unpack(data, partial=partial)
    else:  # other tiles may be damaged
        container = unpack(data, partial=True).around(*region)
        if container.missing and not partial:
            unpack(data)  # raises the error
    header = container.header
    if entropy_model is None and header.entropy_fingerprint is not None:
        entropy_model = sidecar(codec)
    _check(codec, header, entropy_model)
    if all(section is None for section in container.sections[: header.num_tiles]):
        unpack(data)  # raises the error: there is nothing to decode
    found = decode_values(entropy_model, container)
    return Decoded(
        **vars(found), codec=codec, entropy_model=entropy_model, container=container, region=region
    )


def _levels(codec: LatentCodec) -> tuple[Level, ...]:
    if not codec.indices_suffice:
        return (Level(side=codec.latent_space.downsampling_factor, channels=codec.latent_space.channels),)
    sides = [level.side for level in codec.levels]
    if any(upper % lower for upper, lower in pairwise(sides)):
        raise ValueError(
            f"{codec.name}: expected levels whose indices cover squares that divide those above them, as .lcf files have "
            f"them, got sides of {', '.join(map(str, sides))} pixels; write latent files instead"
        )
    return tuple(Level(side=level.side, codebook_size=level.codebook_size) for level in codec.levels)


def _tile_positions(tile: int | None, size: Sequence[int], levels: Sequence[Level]) -> int | None:
    """A tile's side in positions; None where it holds the whole image."""
    side = levels[0].side
    if tile is None:
        return None
    if tile < side or tile % side:
        raise SettingError("tile", f"a positive multiple of {side} pixels, or None", tile)
    return None if max(size) <= tile else tile // side


def _check(codec: LatentCodec, header: Header, entropy_model: EntropyModel | None) -> None:
    """Raise BitstreamError unless codec and entropy model are the file's."""
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
            f"expected the entropy model {header.entropy_fingerprint}, got none; it is the entropy.safetensors that the codec's "
            "folder had"
        )
    if header.entropy_fingerprint != entropy_model.fingerprint:
        raise WrongEntropyModelError(
            f"the file was coded with the entropy model {header.entropy_fingerprint}, not with "
            f"{entropy_model.fingerprint}. Pass the one that it was coded with."
        )
    if header.step_size_index and not header.step_size_index < entropy_model.num_step_sizes:
        raise CorruptError(f"the header is damaged: there are no step sizes {header.step_size_index}")


def _lost_pixels(container: Container, part: Tile) -> Tensor:
    """The pixels of tiles without their first section: bool, (height, width) of a part of the padded image."""
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
        lost = [*lost, f"{container.trailing_bytes} bytes after the last section"]
    if lost:
        shown = ", ".join(lost[:4]) + (f" and {len(lost) - 4} more" if len(lost) > 4 else "")
        warnings.warn(f"decoded in part; missing or damaged: {shown}", PartialWarning, stacklevel=3)
