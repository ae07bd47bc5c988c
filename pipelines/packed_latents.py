"""What a pipeline's denoiser works on -> latents (B, C, h, w), whatever it packs, and however wide its images are."""

import math
import weakref
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from latent_codec.families.latent_space import LatentSpace, unpack_positions
from latent_codec.families.pipeline_spaces import PIPELINES, PipelineSpace

_VIDEO = {
    "CogVideoX": {"channel_axis": 2},
    "ConsisID": {"channel_axis": 2},
    "Kandinsky5": {"channel_axis": 4},
    "Kandinsky6": {"channel_axis": 4},
    "LTX": {"tokens": 1},
    "StableVideoDiffusion": {"channel_axis": 2},
}
"""How pipelines of video pack, by what their names begin with; others as (B, C, T, h, w)."""
_IDS = ("img_ids", "position_ids")
_SHAPES = ("img_shapes", "shape_list")
_SIDES = ("num_frames", "height", "width")


def space_of_pipeline(pipe: Any) -> PipelineSpace:
    """The row of a pipeline, by the names of its class and of those that it derives from."""
    names = [each.__name__ for each in type(pipe).__mro__]
    for name in names:
        if name in PIPELINES:
            return PIPELINES[name]
    packing = next((_VIDEO[start] for name in names for start in _VIDEO if name.startswith(start)), {})
    # Tokens of 2x2 positions, as most have them that take tokens.
    return PipelineSpace(title="a pipeline without a row", pipelines=(), **{"tokens": 2, **packing})


class TokenGridObserver:
    """Keeps the positions that a pipeline tells its denoiser: ids of tokens, or the shapes of its images.

    A hook before the denoiser's `forward`, which is taken away by `close`, or when the observer is gone; arguments are
    kept by reference and read later.
    """

    def __init__(self, denoiser: nn.Module):
        self._denoiser = weakref.ref(denoiser)
        told: dict[str, Any] = {}

        def look(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:  # and hold no observer
            told.update({name: kwargs.get(name) for name in (*_SHAPES, *_IDS, *_SIDES)})

        self._told = told
        handle = denoiser.register_forward_pre_hook(look, with_kwargs=True)
        self._remove = weakref.finalize(self, handle.remove)
        self._remove.atexit = False

    def observes(self, denoiser: nn.Module | None) -> bool:
        return self._denoiser() is denoiser

    def take(self) -> Any:
        """Ids (N, axes), shapes of images, or None; for `token_grid`."""
        told = dict(self._told)
        self._told.clear()
        for name in (*_SHAPES, *_IDS):
            if told.get(name) is not None:
                return told[name]
        sides = tuple(told.get(name) for name in _SIDES)
        return [sides] if all(isinstance(side, int) for side in sides) else None

    def close(self) -> None:
        self._remove()
        self._told.clear()


def token_grid(num_tokens: int, told: Any, *, references_first: bool = False) -> tuple[int, int, int] | None:
    """Frames, rows and columns of an image's tokens, from what the pipeline tells its denoiser; None if that does not say.

    Next to the image that is generated, a denoiser may be told of references, whose time differs, and of text.

    Args:
        told: ids (N, axes) or (B, N, axes), time, row, column, ..., of the image's tokens first or last; or shapes of
            images, [[(frames, rows, columns), ...], ...]; several of one size are one image's layers.
        references_first: whether the shape of the generated image is the last one, and not the first.
    """
    if isinstance(told, Tensor):
        return _grid_of_ids(num_tokens, told[0] if told.ndim == 3 else told)
    while isinstance(told, list) and told and isinstance(told[0], list):
        told = told[0]
    if not isinstance(told, list) or not told:
        return None
    shapes = [tuple(map(int, shape)) for shape in (told[::-1] if references_first else told)]
    frames, rows, columns = shapes[0]
    for shape in shapes[1:]:
        if frames * rows * columns >= num_tokens or shape[1:] != (rows, columns):
            break
        frames += shape[0]
    return (frames, rows, columns) if frames * rows * columns == num_tokens else None


def _grid_of_ids(num_tokens: int, ids: Tensor) -> tuple[int, int, int] | None:
    if ids.ndim != 2 or len(ids) < num_tokens or ids.shape[1] < 3:
        return None
    found = []
    for part in (ids[:num_tokens], ids[len(ids) - num_tokens :]):
        rows, columns = (len(part[:, axis].unique()) for axis in (1, 2))
        if rows * columns != num_tokens:
            continue
        grid = part[:, 1:3].view(rows, columns, 2)
        if (grid[..., 0] == grid[:, :1, 0]).all() and (grid[..., 1] == grid[:1, :, 1]).all():
            found.append((float(part[0, 0]), rows, columns))
    if not found:
        return None
    _, rows, columns = min(found, key=lambda each: each[0])  # references are at later times
    return 1, rows, columns


@dataclass(frozen=True)
class PackedLatents:
    """How to unpack what one pipeline hands its scheduler.

    Args:
        space: the pipeline's row.
        told: of `TokenGridObserver`.
        size: height and width of the images in pixels, where they are known.
        vae_scale_factor: of the pipeline: pixels per raw latent.
    """

    space: PipelineSpace
    told: Any = None
    size: tuple[int, int] | None = None
    vae_scale_factor: int = 8

    def unpack(self, latents: Tensor) -> tuple[Tensor, int]:
        """Tokens (B, N, c), video such as (B, C, T, h, w), or latents -> all frames' latents, (B * T, C, h, w), and T.

        Raises:
            ValueError: for tokens that make no square and whose grid nothing tells.
        """
        if latents.ndim == 3:
            frames, rows, columns = self._grid(latents.shape[1])
            tokens = self.space.tokens or 2
            grid = LatentSpace(latents.shape[2] // tokens**2, 1, tokens=tokens)
            latents = latents.unflatten(1, (frames, rows * columns)).flatten(0, 1)
            return grid.unpack(latents, (rows * tokens, columns * tokens)), frames
        if latents.ndim == 6:
            latents = self._generated_image(latents)
        frames = 1
        if latents.ndim == 5:
            latents = latents.movedim(self.space.channel_axis, 1)  # (B, C, T, h, w)
            frames = latents.shape[2]
            latents = latents.transpose(1, 2).flatten(0, 1)
        if self.space.repeated:
            latents = latents[:, latents.shape[1] // 2 :]
        return latents, frames

    def for_previewer(self, latents: Tensor, channels: int | None) -> Tensor:
        """Undo the packing of 2x2 positions for a previewer of so many channels, such as TAEF2's 32 for FLUX.2's 128."""
        if self.space.packed and channels is not None and latents.shape[1] == 4 * channels:
            return unpack_positions(latents, self.space.packed)
        return latents

    def _generated_image(self, latents: Tensor) -> Tensor:
        """JoyImage-Edit's images (B, images, C, T, h, w), or patches (B, N, C, t, y, x), -> the drawn one's (B, C, T, h, w)."""
        if self.told is None:
            return latents[:, -1]
        frames, rows, columns = self.told[0][0]
        patches = latents[:, : frames * rows * columns].unflatten(1, (frames, rows, columns))
        return patches.permute(0, 4, 1, 5, 2, 6, 3, 7).flatten(6, 7).flatten(4, 5).flatten(2, 3)

    def _grid(self, num_tokens: int) -> tuple[int, int, int]:
        grid = token_grid(num_tokens, self.told, references_first=self.space.references_first)
        if self.size is not None:
            pixels = self.vae_scale_factor * (2 if self.space.packed or self.space.tokens != 1 else 1)
            rows, columns = (side // pixels for side in self.size)
            grid = grid[0] if grid else 1, rows, columns
        frames, rows, columns = grid or (1, *(math.isqrt(num_tokens),) * 2)
        if frames * rows * columns != num_tokens:
            raise ValueError(
                f"expected {rows} x {columns} tokens, got {num_tokens}; give LatentPreviewCallback the height and width "
                "of the images that the pipeline draws"
            )
        return frames, rows, columns
