"""Images of a prior in ComfyUI, shown as they grow."""

import math

from torch import Tensor

from latent_codec.images.tensors import sample_grid
from latent_codec.pipelines.sampling import Pace


class Growing:
    """A pipeline's callback: shows in ComfyUI how far it is and what is drawn so far, and stops where the user has canceled."""

    def __init__(self, pipe):
        self.pipe, self.bar, self.pace = pipe, None, Pace()

    def __call__(self, step: int, num_steps: int, indices: list[Tensor], done: Tensor) -> None:
        from comfy.utils import ProgressBar

        if self.bar is None:
            self.bar = ProgressBar(num_steps)
        self.bar.update_absolute(step, num_steps, self._preview(indices, done))

    def _preview(self, indices: list[Tensor], done: Tensor) -> tuple | None:
        from latent_preview import MAX_PREVIEW_RESOLUTION

        if not self.pace.is_due:
            return None
        with self.pace:
            images = self.pipe.partial_images(indices, done)
            return "PNG", sample_grid(images, math.isqrt(len(images) - 1) + 1), MAX_PREVIEW_RESOLUTION
