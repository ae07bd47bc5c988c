"""Images of a prior in ComfyUI, shown as they grow."""

import math
import time

from torch import Tensor

from latent_codec.images.tensors import sample_grid

PAUSE = 0.5
"""Seconds from one preview to the next at least; previews take a fifth of the time at most."""


class Growing:
    """A pipeline's callback: shows in ComfyUI how far it is and what is drawn so far, and stops where the user has canceled."""

    def __init__(self, pipe):
        self.pipe, self.bar, self.due = pipe, None, 0.0

    def __call__(self, step: int, num_steps: int, indices: list[Tensor], done: Tensor) -> None:
        from comfy.utils import ProgressBar

        if self.bar is None:
            self.bar = ProgressBar(num_steps)
        self.bar.update_absolute(step, num_steps, self._preview(indices, done))

    def _preview(self, indices: list[Tensor], done: Tensor) -> tuple | None:
        from latent_preview import MAX_PREVIEW_RESOLUTION

        began = time.monotonic()
        if began < self.due:
            return None
        images = self.pipe.partial_images(indices, done)
        sheet = sample_grid(images, math.isqrt(len(images) - 1) + 1)
        now = time.monotonic()
        self.due = now + max(PAUSE, 4 * (now - began))
        return "PNG", sheet, MAX_PREVIEW_RESOLUTION
