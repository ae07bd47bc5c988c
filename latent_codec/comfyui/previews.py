"""Live previews while ComfyUI samples: a wrapper of its sampling that looks at x_0 and changes nothing.

ComfyUI's callback(step, x_0, x_t, steps) --x_0--> model's format --> samples --latents_of--> previewer --> image --> the node
"""

import inspect
import logging
from collections.abc import Callable
from typing import Any

from PIL.Image import Image
from torch import Tensor

from latent_codec.codec import LatentCodec
from latent_codec.comfyui.network import latents_of
from latent_codec.previews import LatentPreviewer

logger = logging.getLogger(__name__)

KEY = "latent_codec_preview"
"""Under which ComfyUI keeps the wrapper; another preview of the same model takes its place."""


class SamplingPreview:
    """Shows what a model is about to draw: ComfyUI calls it around its sampling (`WrappersMP.OUTER_SAMPLE`).

    Args:
        previewer: of the codec's latents.
        codec: whose latents the model was trained on.
        latent_format: the model's, of ComfyUI: from what it samples to what nodes pass on.
        every: shows each so-many-th step, and the last.
    """

    def __init__(self, previewer: LatentPreviewer, codec: LatentCodec, latent_format, every: int = 1):
        self.previewer, self.space = previewer, codec.latent_space
        self.format, self.every = latent_format, every
        self._failed = False

    def __call__(
        self,
        sample: Callable,
        noise: Tensor,
        latent_image: Tensor,
        sampler,
        sigmas: Tensor,
        denoise_mask: Tensor | None = None,
        callback: Callable | None = None,
        *rest,
        **named,
    ) -> Tensor:
        """Run ComfyUI's `sample` with a callback that shows previews, too."""
        from comfy.utils import ProgressBar
        from latent_preview import MAX_PREVIEW_RESOLUTION

        _mute(callback)

        def after_step(step: int, x_0: Tensor, x_t: Tensor, num_steps: int) -> None:
            if callback is not None:
                callback(step, x_0, x_t, num_steps)
            if (step + 1) % self.every == 0 or step + 1 == num_steps:
                image = self._try_image(x_0)
                if image is not None:
                    preview = ("JPEG", image, MAX_PREVIEW_RESOLUTION)
                    ProgressBar(num_steps).update_absolute(step + 1, num_steps, preview)

        return sample(noise, latent_image, sampler, sigmas, denoise_mask, after_step, *rest, **named)

    def image(self, x_0: Tensor) -> Image:
        """The first image, or frame, of what the model predicts, in ComfyUI's own rounding."""
        from latent_preview import preview_to_image

        samples = self.format.process_out(x_0[:1])
        latents = latents_of(samples[:, :, :1] if samples.ndim == 5 else samples, self.space)
        return preview_to_image(self.previewer(latents)[0].movedim(0, -1))

    def _try_image(self, x_0: Tensor) -> Image | None:
        """`image`; None where that fails, whatever it is: sampling goes on, and the first reason is logged."""
        try:
            return self.image(x_0)
        except Exception as error:
            if not self._failed:
                logger.warning("Previews fail: %s: %s", type(error).__name__, error)
            self._failed = True
            return None


def with_preview(model: Any, preview: SamplingPreview, codec_patcher: Any = None) -> Any:
    """A copy of a MODEL that shows `preview` as it samples.

    Args:
        codec_patcher: of the codec, if its own decoder makes the previews: ComfyUI then keeps both on the device.
    """
    from comfy.patcher_extension import WrappersMP

    model = model.clone()
    model.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, KEY)
    model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, preview)
    model.remove_additional_models(KEY)
    if codec_patcher is not None:
        model.set_additional_models(KEY, [codec_patcher])
    return model


def _mute(callback: Callable | None) -> None:
    """Turn off the preview of ComfyUI's own callback, whose colors are those of the model that it takes the latents for."""
    own = (
        inspect.getclosurevars(callback).nonlocals.get("previewer") if inspect.isfunction(callback) else None
    )
    if own is not None:
        own.decode_latent_to_preview_image = lambda *_: None
