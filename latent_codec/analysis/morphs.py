"""From one image to the next through the latents between them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from latent_codec.codec import ImageLike, LatentCodec
from latent_codec.errors import SettingError
from latent_codec.evaluation.one_vector import fit_image, vector_side
from latent_codec.images.tensors import center_crop, to_image
from latent_codec.models.quantizers import nearest_codewords

Way = Literal["linear", "spherical"]
WAYS: tuple[Way, ...] = get_args(Way)


@dataclass(frozen=True)
class Morph:
    """What `morph` makes."""

    frames: Tensor
    """(num_frames, C, H, W) in [-1, 1]: `steps` from the first image to the second, both included, then on to the third."""
    steps: int
    way: Way
    note: str | None
    """What to know of the codec: that a grid of latents cross-fades."""

    @property
    def legs(self) -> list[Tensor]:
        """The frames from each image to the next, `steps` of them, both ends included."""
        starts = range(0, len(self.frames) - 1, self.steps - 1)
        return [self.frames[start : start + self.steps] for start in starts]

    def to_dict(self) -> dict:
        return {"num_frames": len(self.frames), "steps": self.steps, "way": self.way, "note": self.note}


def interpolate(start: Tensor, end: Tensor, share: float, way: Way = "linear") -> Tensor:
    """Walk a share of the way, 0 to 1, from latents to latents of one shape, (B, ...).

        linear:     (1 - t) a + t b
        spherical:  (sin((1 - t) w) a + sin(t w) b) / sin w, w the angle between a and b

    Linear points between independent draws of N(0, I) are nearer to the origin than draws are; spherical ones are as far from
    it (Shoemake, SIGGRAPH 1985; White, arXiv:1609.04468). Where a and b have one direction or opposite ones, or one of them is 0,
    spherical is linear.
    """
    linear = torch.lerp(start, end, share)
    if way == "linear":
        return linear
    a, b = start.flatten(1).double(), end.flatten(1).double()
    cosine = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))  # NaN where one is 0: linear
    angle = cosine.clamp(-1, 1).acos()
    sine = angle.sin()[:, None]
    on_arc = ((1 - share) * angle).sin()[:, None] * a + (share * angle).sin()[:, None] * b
    on_arc = (on_arc / sine.clamp(min=1e-6)).view_as(linear).to(linear.dtype)
    return torch.where((sine > 1e-6).view(-1, *[1] * (linear.ndim - 1)), on_arc, linear)


def morph(
    codec: LatentCodec,
    images: Sequence[ImageLike],
    *,
    steps: int = 9,
    way: Way = "linear",
    on_progress: Callable[[int, int], None] | None = None,
) -> Morph:
    """Walk from each image to the next through latents, and decode on the way.

    A codec with one vector per image gets their middle squares, of the side that it was trained on; for others they are
    cut to the middle that all of them share. The codewords of a discrete codec are blended before they are quantized: at each position
    the nearest codeword to the blend is decoded.

    Args:
        images: two or more, as `LatentCodec.encode` takes one.
        steps: images from one to the next, both included; at least 2.
        on_progress: called with (frames decoded, frames in all).

    Raises:
        SettingError: for fewer images or steps, or another way.
        ValueError: as `LatentCodec.encode` and `decode`.
    """
    if len(images) < 2:
        raise SettingError("images", "two images or more", len(images), advice="name another to morph into")
    if steps < 2:
        raise SettingError("steps", "at least 2, the two images themselves", steps)
    if way not in WAYS:
        raise SettingError("way", " or ".join(WAYS), way)
    keys = [fit_image(to_image(image, channels=codec.channels), codec) for image in images]
    shared = tuple(min(sides) for sides in zip(*(key.shape[1:] for key in keys)))
    keys = torch.stack([center_crop(key, shared) for key in keys])
    latents, note = _latents(codec, keys), None
    if vector_side(codec) is None:
        grid = "x".join(map(str, latents[-1].shape[1:]))
        note = (
            f"{codec.name} has a grid of {grid} latents for these images, each position of which blends with its own: "
            "they cross-fade. One vector per image morphs: the shipped codec garments, or what the preset faces-global trains"
        )
    frames = []
    places = [(leg, step) for leg in range(len(keys) - 1) for step in range(leg > 0, steps)]
    for leg, step in places:
        between = [
            interpolate(each[leg][None], each[leg + 1][None], step / (steps - 1), way) for each in latents
        ]
        frames.append(_decode(codec, between, tuple(keys.shape[-2:])).cpu())
        if on_progress:
            on_progress(len(frames), len(places))
    return Morph(torch.cat(frames), steps, way, note)


def _latents(codec: LatentCodec, images: Tensor) -> list[Tensor]:
    """What is blended: latents, or the codewords of each level, (N, D, h, w), top level first."""
    if not codec.indices_suffice:
        return [codec.encode(images)]
    return [
        level.codebook.detach()[grid].movedim(-1, 1)
        for level, grid in zip(codec.levels, codec.encode_indices(images))
    ]


def _decode(codec: LatentCodec, latents: list[Tensor], size: tuple[int, int]) -> Tensor:
    if not codec.indices_suffice:
        return codec.decode(latents[0], size=size, output_type="pt")
    indices = [
        nearest_codewords(blend.movedim(1, -1).flatten(0, 2), level.codebook).view(-1, *blend.shape[2:])
        for level, blend in zip(codec.levels, latents)
    ]
    return codec.decode_indices(indices, size=size, output_type="pt")
