"""What a pipeline's denoiser works on -> latents (B, C, h, w), whatever it packs, and however wide its images are."""

import math
import weakref
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from latent_codec.families.latent_space import LatentSpace, unpack_positions
from latent_codec.families.pipeline_spaces import PIPELINES, PipelineSpace

_UNKNOWN = PipelineSpace(title="a pipeline that is not known", pipelines=(), tokens=2)
"""Tokens of 2x2 positions, as most have them that take tokens."""
_IDS = ("img_ids", "position_ids")
_SHAPES = "img_shapes"


def space_of_pipeline(pipe: Any) -> PipelineSpace:
    """The row of a pipeline, by the names of its class and of those that it derives from."""
    for each in type(pipe).__mro__:
        if each.__name__ in PIPELINES:
            return PIPELINES[each.__name__]
    return _UNKNOWN


class TokenGridObserver:
    """Keeps the positions that a pipeline tells its denoiser: ids of tokens, or the shapes of its images.

    A hook before the denoiser's `forward`; arguments are kept by reference and read later.
    """

    def __init__(self, denoiser: nn.Module):
        self._denoiser = weakref.ref(denoiser)
        self._told: Any = None
        self._handle = denoiser.register_forward_pre_hook(self._look, with_kwargs=True)

    def observes(self, denoiser: nn.Module | None) -> bool:
        return self._denoiser() is denoiser

    def take(self) -> Any:
        """Ids (N, axes), shapes of images, or None; for `token_grid`."""
        told, self._told = self._told, None
        return told

    def close(self) -> None:
        self._handle.remove()

    def _look(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        for name in (_SHAPES, *_IDS):
            if kwargs.get(name) is not None:
                self._told = kwargs[name]
                return


def token_grid(num_tokens: int, told: Any) -> tuple[int, int] | None:
    """Rows and columns of the tokens of an image, from what the pipeline tells its denoiser; None if that does not say.

    Args:
        told: ids (N, axes) or (B, N, axes), time, row, column, ..., of the image's tokens first or last; or shapes of images,
            [[(frames, rows, columns), ...], ...], the generated one first.
    """
    if isinstance(told, list):
        while told and isinstance(told[0], list):
            told = told[0]
        if told and math.prod(told[0]) == num_tokens:
            return told[0][-2], told[0][-1]
        return None
    if not isinstance(told, Tensor) or told.ndim not in (2, 3):
        return None
    ids = told[0] if told.ndim == 3 else told
    if len(ids) < num_tokens or ids.shape[1] < 3:
        return None
    for part in (ids[:num_tokens], ids[len(ids) - num_tokens :]):
        rows, columns = (len(part[:, axis].unique()) for axis in (1, 2))
        if rows * columns == num_tokens:
            return rows, columns
    return None


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
        """Tokens (B, N, c), video (B, C, T, h, w), or latents -> latents of all frames, (B * T, C, h, w), and T.

        Raises:
            ValueError: for tokens that make no square and whose grid nothing tells.
        """
        if latents.ndim == 3:
            rows, columns = self._grid(latents.shape[1])
            tokens = self.space.tokens or 2
            grid = LatentSpace(latents.shape[2] // tokens**2, 1, tokens=tokens)
            return grid.unpack(latents, (rows * tokens, columns * tokens)), 1
        frames = 1
        if latents.ndim == 5:
            latents = latents.movedim(4, 1) if self.space.channels_last else latents  # (B, C, T, h, w)
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

    def _grid(self, num_tokens: int) -> tuple[int, int]:
        grid = token_grid(num_tokens, self.told)
        if self.size is not None:
            pixels = self.vae_scale_factor * (2 if self.space.packed or self.space.tokens != 1 else 1)
            grid = tuple(side // pixels for side in self.size)
        rows, columns = grid or (math.isqrt(num_tokens),) * 2
        if rows * columns != num_tokens:
            raise ValueError(
                f"expected {rows} x {columns} tokens, got {num_tokens}; give LatentPreviewCallback the height and width "
                "of the images that the pipeline draws"
            )
        return rows, columns
