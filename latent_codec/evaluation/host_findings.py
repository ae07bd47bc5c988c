"""What is found of a codec in a host, and the rules that hosts share."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

from latent_codec.codec import LatentCodec

Verdict = Literal["as it is", "with limits", "no"]

RELEASED_FACTOR = 8
"""Pixels per latent position of most released denoisers."""

CHANGES_LATENTS = "it changes the latents, so before a denoiser is trained"


@dataclass(frozen=True)
class Finding:
    verdict: Verdict
    reason: str
    remedy: str | None = None


no = partial(Finding, "no")
limit = partial(Finding, "with limits")


def note(reason: str) -> Finding:
    return Finding("as it is", f"Note: {reason}")


def factor_limits(codec: LatentCodec, by_config: int, released: int = RELEASED_FACTOR) -> Iterator[Finding]:
    factor = codec.latent_space.downsampling_factor
    decoded = factor * codec.upscale
    if by_config != decoded:
        yield limit(
            f"it takes {by_config} pixels per latent position, and {decoded} come out: images have another size than "
            "was asked for",
        )
    elif factor != released:
        yield limit(
            f"a latent position is {factor}x{factor} pixels and {released}x{released} in released "
            f"denoisers: at the grid that they were trained on, images have {factor}/{released} of the side; "
            f"sides that are no multiple of {factor} shrink to one, of {2 * factor} where the denoiser takes 2x2 patches",
        )


def image_limits(codec) -> Iterator[Finding]:
    if codec.channels != 3:
        yield limit(
            f"images have {codec.channels} channels: text-to-image works, and encoding fails, because images "
            "are given to the encoder in RGB",
        )
