"""Uniform scalar quantization: one step size per channel, integer symbols."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from latent_codec.tensors import check_shape


@dataclass(frozen=True, kw_only=True)
class ScalarQuantizer:
    """Latents to integer levels and back, each channel by its own step.

        level  = sign(z) floor(|z| / step + 1 - dead_zone / 2), clipped to minimum..maximum
        latent = sign(level) (|level| + (dead_zone - 1) / 2) step, and 0 for level 0

    A latent comes back as the middle of its interval, at most max(1, dead_zone) / 2 steps away unless it was
    clipped, and every level comes back as itself. With `dead_zone` 1 this is rounding, halves away from zero; 2 is
    the quantizer of JPEG 2000 (ISO/IEC 15444-1, annex E). Levels of different channels are alike in size where steps
    follow the channels' spread.

    The fields are plain numbers, so that `dataclasses.asdict` is a config or a file's header.

    Raises:
        ValueError: for steps that are not above 0 and finite, an empty range or one without 0, and dead zones
            outside 1..2.
    """

    steps: tuple[float, ...]
    """Per channel, in the latents' unit."""
    minimum: int | None = None
    """Lowest level; None is no limit."""
    maximum: int | None = None
    """Highest level; None is no limit."""
    dead_zone: float = 1.0
    """Width of the interval that becomes 0, in steps: 1 (as wide as the others) to 2."""

    def __post_init__(self):
        object.__setattr__(self, "steps", tuple(float(step) for step in self.steps))
        if not self.steps or not all(0 < step < math.inf for step in self.steps):
            raise ValueError(f"steps are {self.steps}; expected one per channel, above 0 and finite")
        if (self.minimum or 0) > 0 or (self.maximum or 0) < 0:
            raise ValueError(f"expected a range that holds 0, got {self.minimum} to {self.maximum}")
        if not 1 <= self.dead_zone <= 2:
            raise ValueError(f"dead_zone is {self.dead_zone} steps; expected 1 (none) to 2")

    @classmethod
    def from_latents(cls, latents: Tensor, *, num_levels: int = 256, coverage: float = 0.9999):
        """The finest rounding whose `num_levels` levels reach over a share `coverage` of each channel's `latents`.

        Args:
            latents: (B, C, h, w), of the kind to be quantized; a few hundred images are enough.
            num_levels: levels -(num_levels // 2) to (num_levels - 1) // 2.
            coverage: share of |z| that is not clipped.

        Raises:
            ValueError: for fewer than 3 levels, a coverage outside 0..1, or a channel that is always 0.
        """
        if num_levels < 3 or not 0 < coverage <= 1:
            raise ValueError(f"expected 3 levels or more and a share up to 1, got {num_levels}, {coverage}")
        minimum, maximum = -(num_levels // 2), (num_levels - 1) // 2
        magnitudes = latents.detach().double().abs().movedim(1, 0).flatten(1).sort(dim=1).values
        last = math.ceil(coverage * magnitudes.shape[1]) - 1
        return cls(steps=(magnitudes[:, last] / maximum).tolist(), minimum=minimum, maximum=maximum)

    @property
    def num_levels(self) -> int | None:
        """Number of symbols; None without both limits."""
        if self.minimum is None or self.maximum is None:
            return None
        return self.maximum - self.minimum + 1

    def encode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) -> levels, int64, same shape.

        Raises:
            ValueError: for another number of channels, and for values that are not finite.
        """
        latents = latents.to(torch.promote_types(latents.dtype, torch.float32))
        scaled = latents / self._steps(latents)
        if not scaled.isfinite().all():
            raise ValueError("the latents hold NaN or infinity; a level is a finite number.")
        magnitudes = (scaled.abs() + (1 - self.dead_zone / 2)).floor().clamp_min(0)
        levels = (scaled.sign() * magnitudes).to(torch.int64)
        return self._clipped(levels)

    def decode(self, levels: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Levels (B, C, h, w) -> latents in `dtype`, same shape.

        Raises:
            ValueError: for another number of channels, or levels outside the range.
        """
        if levels.is_floating_point():
            raise ValueError(f"levels are {levels.dtype}; expected integers, as encode gives them.")
        steps = self._steps(levels, torch.float64 if dtype == torch.float64 else torch.float32)
        if levels.numel() and not torch.equal(self._clipped(levels), levels):
            found = f"{int(levels.min())} to {int(levels.max())}"
            raise ValueError(f"expected levels from {self.minimum} to {self.maximum}, got {found}")
        values = levels.to(steps.dtype)
        return ((values + values.sign() * ((self.dead_zone - 1) / 2)) * steps).to(dtype)

    def _clipped(self, levels: Tensor) -> Tensor:
        if self.minimum is None and self.maximum is None:
            return levels
        return levels.clamp(self.minimum, self.maximum)

    def _steps(self, values: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        check_shape(values, "a channel for each step size,", ("B", len(self.steps), "h", "w"))
        return torch.tensor(self.steps, dtype=dtype or values.dtype, device=values.device).view(1, -1, 1, 1)
