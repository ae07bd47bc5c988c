"""Watch: a pipeline of diffusers draws, and every step is shown as it is done."""

import queue
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from latent_codec.codec import LatentCodec
from latent_codec.errors import SettingError
from latent_codec.images.tensors import enlarged_to
from latent_codec.pipelines import LatentPreviewCallback
from latent_codec.previews import LatentPreviewer

KINDS = ("linear", "tiny", "full")
SIDE = 256
MAX_STEPS = 200


@dataclass(frozen=True, kw_only=True)
class Shown:
    image: Image.Image
    step: int
    """Done, from 1."""
    num_steps: int
    caption: str
    is_final: bool = False


@lru_cache(maxsize=1)
def _pipeline(folder: Path, device: str) -> DiffusionPipeline:
    pipe = DiffusionPipeline.from_pretrained(folder, local_files_only=True).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def watch(
    folder: Path, prompt: str, *, steps: int = 20, seed: int = 0, kind: str = "linear", device: str = "cpu"
) -> Iterator[Shown]:
    """Draw one image and give what the preview shows of each step, then the image itself.

    Closing the iterator stops the pipeline after its step.

    Args:
        folder: of a pipeline with a prompt; its vae has the preview (`latent-codec fit-preview`) of `kind` "linear" or "tiny".

    Raises:
        SettingError: for a number of steps out of range, or a preview that is not there.
    """
    if not 1 <= steps <= MAX_STEPS:
        raise SettingError("steps", f"1 to {MAX_STEPS}", steps)
    if kind == "full":  # opened once more: the pipeline needs its VAE itself
        previewer = LatentPreviewer.full(LatentCodec.from_pretrained(folder, device=device), max_side=SIDE)
    else:
        previewer = LatentPreviewer.from_pretrained(folder, kind=kind)
    pipe = _pipeline(folder, device)
    arrived: queue.Queue[Shown | Exception | None] = queue.Queue()

    def shown(image: Image.Image, step: int) -> None:
        caption = f"step {step + 1} of {steps}: {image.info['shows']} by the {kind} preview, {image.width}x{image.height} px"
        arrived.put(Shown(image=enlarged_to(image, SIDE), step=step + 1, num_steps=steps, caption=caption))

    def draw() -> None:
        try:
            with LatentPreviewCallback(pipe, previewer, shown) as preview:
                generator = torch.Generator().manual_seed(seed)
                output = pipe(
                    prompt, num_inference_steps=steps, generator=generator, callback_on_step_end=preview
                )
            image = output.images[0]
            caption = (
                f"done: the image that the pipeline's own decoder makes, {image.width}x{image.height} px"
            )
            arrived.put(
                Shown(
                    image=enlarged_to(image, SIDE),
                    step=steps,
                    num_steps=steps,
                    caption=caption,
                    is_final=True,
                )
            )
        except Exception as error:
            arrived.put(error)
        finally:
            arrived.put(None)

    thread = threading.Thread(target=draw, daemon=True)
    thread.start()
    try:
        while (found := arrived.get()) is not None:
            if isinstance(found, Exception):
                raise found
            yield found
    finally:
        with suppress(AttributeError):  # of pipelines that cannot be stopped
            pipe._interrupt = True
        thread.join()
