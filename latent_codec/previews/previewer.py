"""LatentPreviewer: latents as images, while a denoiser or a prior is still at work on them."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latent_codec.codec import LatentCodec
from latent_codec.errors import SettingError
from latent_codec.families import LatentSpace
from latent_codec.families.latent_space import unpack_positions
from latent_codec.models.memory_format import use_channels_last
from latent_codec.models.tiny_decoder import TinyDecoder
from latent_codec.previews.full import FullPreview
from latent_codec.previews.palette import Palette, checked_indices
from latent_codec.previews.preview_files import NAME, preview_path, read_preview
from latent_codec.tensors import check_floating, check_shape
from latent_codec.torch_settings import ignoring_caller_settings

KINDS = ("linear", "tiny", "full")


class LatentPreviewer:
    """Shows latents, or indices of a discrete codec, of which some may be unknown yet.

        latents --1x1 or 3x3 map--> RGB, a pixel per latent                linear
        latents --TinyDecoder--> RGB in the image's size                 tiny
        latents --reduced--> the codec's own decoder --> RGB               full
        indices --a color per codeword--> RGB, a pixel per index          linear and tiny
        indices --reduced, filled--> the codec's own decoder --> RGB       full

    Made by `from_pretrained`, `from_codec`, `linear`, `tiny` or `full`.

    Attributes:
        kind: "linear", "tiny" or "full".
        space: of the latents that it takes.
    """

    def __init__(
        self,
        kind: str,
        paint: Callable[[Tensor], Tensor],
        space: LatentSpace,
        paint_indices: Callable[[list[Tensor]], Tensor] | None,
        codebook_sizes: Sequence[int],
    ):
        self.kind, self.space = kind, space
        self._paint, self._paint_indices, self._codebook_sizes = paint, paint_indices, list(codebook_sizes)

    @classmethod
    @ignoring_caller_settings()
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike = "default",
        *,
        kind: str | None = None,
        pipeline: str | None = None,
    ) -> "LatentPreviewer":
        """The preview in a codec's folder, which `latent-codec fit-preview` puts there.

        Args:
            name_or_path: of a codec, as LatentCodec.from_pretrained takes it.
            kind: "linear", "tiny" or "full"; None: tiny if there is one, else linear.
            pipeline: the class name of the pipeline whose latents it is to show, as LatentCodec.from_pretrained takes it.

        Raises:
            ValueError: if there is no such codec or no such preview, or it was fitted to another codec or to the latents of
                another pipeline, which the message names.
        """
        _check_kind(kind)
        codec = LatentCodec.from_pretrained(name_or_path, pipeline=pipeline)
        if kind == "full":
            return cls.full(codec)
        return cls._stored(codec, preview_path(name_or_path), kind)

    @classmethod
    @ignoring_caller_settings()
    def from_codec(cls, codec: LatentCodec, *, kind: str | None = None) -> "LatentPreviewer":
        """The preview in the folder that `codec` was opened from; `kind` and errors are those of `from_pretrained`."""
        _check_kind(kind)
        if kind == "full":
            return cls.full(codec)
        return cls._stored(codec, codec.folder and codec.folder / NAME, kind)

    @classmethod
    def _stored(cls, codec: LatentCodec, path: Path | None, kind: str | None) -> "LatentPreviewer":
        """The preview in a file; None: the codec has no folder."""
        if path is None or not path.is_file():
            where = (
                "it has no folder" if path is None else f"there is no preview in the folder of {codec.name}"
            )
            expected = f'"full", its own decoder, as {where}'
            raise SettingError("kind", expected, advice="latent-codec fit-preview fits one")
        stored = read_preview(path, codec)
        if kind == "tiny" and stored.tiny is None:
            expected = f'"linear" or "full", as the preview of {codec.name} has no tiny decoder'
            raise SettingError("kind", expected, kind, advice="latent-codec fit-preview trains one on images")
        if stored.tiny is not None and kind != "linear":
            return cls.tiny(stored.tiny, space=codec.latent_space, palette=stored.palette)
        return cls.linear(stored.weight, stored.bias, space=codec.latent_space, palette=stored.palette)

    @classmethod
    def linear(
        cls, weight: Tensor, bias: Tensor, *, space: LatentSpace | None = None, palette: Palette | None = None
    ) -> "LatentPreviewer":
        """color = weight @ latent + bias at every position, or of the 3x3 latents around it.

        Args:
            weight: (3, C) or (3, C, 3, 3), for latents as a denoiser has them and colors in [-1, 1]. Of a space that packs
                2x2 positions (FLUX.2), C is that of the unpacked positions, each of which gets a pixel.
            bias: (3,).
            space: of the latents; None: C channels at a factor of 8, neither scaled nor shifted.
            palette: colors of the codewords, for `indices`.

        Raises:
            ValueError: for other shapes.
        """
        if len(weight) != 3 or weight.shape[2:] not in ((), (3, 3)) or weight.ndim < 2 or bias.shape != (3,):
            got = f"shapes {tuple(weight.shape)} and {tuple(bias.shape)}"
            raise ValueError(f"expected weight (3, C) or (3, C, 3, 3) and bias (3,), got {got}")
        space = space or LatentSpace(weight.shape[1], 8)
        if space.raw_channels != weight.shape[1]:
            raise ValueError(f"weight is for {weight.shape[1]} channels; the space has {space.raw_channels}")
        paint = _on_device_of_input(LinearPreview(weight, bias))
        return cls("linear", lambda latents: paint(unpacked(latents, space)), space, *_painter_of(palette))

    @classmethod
    def tiny(
        cls, decoder: TinyDecoder, *, space: LatentSpace | None = None, palette: Palette | None = None
    ) -> "LatentPreviewer":
        """A distilled decoder; `space` None: at the factor of `decoder`, neither scaled nor shifted."""
        channels = decoder.config.latent_channels
        space = space or LatentSpace(channels, decoder.upsampling_factor)
        if space.channels != channels:
            raise ValueError(f"the decoder is for {channels} channels; the space has {space.channels}")
        return cls("tiny", _on_device_of_input(decoder.float().eval()), space, *_painter_of(palette))

    @classmethod
    def full(cls, codec: LatentCodec, *, max_side: int | None = None) -> "LatentPreviewer":
        """The codec itself. A codec made to be small, such as TAESD or TAEF2 for the models they imitate, is a preview too.

        Args:
            codec: decodes on its own device, in its own precision.
            max_side: the longer side in pixels at most, to which latents are averaged down; None: as they are.

        Raises:
            ValueError: for a side below one latent.
        """
        preview = FullPreview(codec, max_side)
        paint_indices = preview.indices if codec.is_discrete else None
        return cls("full", preview, codec.latent_space, paint_indices, codec.codebook_sizes)

    @property
    def latent_channels(self) -> int:
        return self.space.channels

    @ignoring_caller_settings()
    def __call__(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, C, h, w), of any float dtype, on any device -> RGB.

        Returns:
            float32 (B, 3, H, W) in [-1, 1] on the CPU: linear h x w (2h x 2w where the space packs 2x2), tiny h f x w f, full likewise unless reduced.

        Raises:
            ValueError: for other shapes, or latents that are not finite.
        """
        check_floating(latents, "latents")
        check_shape(latents, "latents", ("B", self.latent_channels, "h", "w"))
        if 0 in latents.shape:
            raise ValueError(f"expected latents with no side 0, got shape {tuple(latents.shape)}")
        return _finished(self._paint(latents.detach()))

    @ignoring_caller_settings()
    def indices(
        self, indices: Tensor | Sequence[Tensor], *, known_mask: Tensor | Sequence[Tensor] | None = None
    ) -> Tensor:
        """Indices of a discrete codec -> RGB.

        Args:
            indices: int64 (B, h, w), or a list of one for each level, top first, of which the lowest may be left out; -1
                is what is not known yet.
            known_mask: bool, (B, h, w) or (h, w), or one for each level: False is what is not known yet either.

        Returns:
            float32 (B, 3, H, W) in [-1, 1] on the CPU: linear and tiny a pixel per index of the finest level, unknown
            ones in the mean color; full as `__call__`.

        Raises:
            ValueError: for a codec without a codebook, and indices that are not its own.
        """
        if self._paint_indices is None:
            raise ValueError("this previewer has no colors of codewords: it takes latents, not indices")
        return _finished(self._paint_indices(checked_indices(indices, self._codebook_sizes, known_mask)))


def _check_kind(kind: str | None) -> None:
    if kind not in (None, *KINDS):
        raise SettingError("kind", f"{', '.join(KINDS)}, or None for the best fitted one", kind)


class LinearPreview(nn.Module):
    """A 1x1 or 3x3 map with bias, which continues latents beyond their border."""

    def __init__(self, weight: Tensor, bias: Tensor):
        super().__init__()
        weight = weight[:, :, None, None] if weight.ndim == 2 else weight
        self.register_buffer("weight", weight.float().contiguous())
        self.register_buffer("bias", bias.float().contiguous())

    def forward(self, latents: Tensor) -> Tensor:
        if self.weight.shape[-1] == 3:
            latents = with_border(latents)
        return F.conv2d(latents, self.weight, self.bias)


def unpacked(latents: Tensor, space: LatentSpace) -> Tensor:
    """Latents of `space` with one position where it packs 2x2, normalized still."""
    return latents if space.raw_channels == space.channels else unpack_positions(latents, space.packed)


def with_border(latents: Tensor) -> Tensor:
    """Repeat the outermost latents once, on every side."""
    return F.pad(latents, (1, 1, 1, 1), mode="replicate")


def _on_device_of_input(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """`module` in float32, moved to wherever the latents are, its weights laid out for that device."""

    def paint(latents: Tensor) -> Tensor:
        use_channels_last(module.to(latents.device))
        return module(latents.float())

    return paint


def _painter_of(palette: Palette | None) -> tuple[Callable | None, list[int]]:
    if palette is None:
        return None, []
    return lambda indices: palette.to(indices[0].device)(indices), [len(table) for table in palette.tables]


def _finished(images: Tensor) -> Tensor:
    images = images.to("cpu", torch.float32)
    if not torch.isfinite(images).all():
        raise ValueError("the latents hold NaN or infinity, or are too large to show")
    return images.clamp(-1, 1)
