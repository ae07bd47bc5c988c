"""LatentPreviewCallback: what a diffusers pipeline is about to draw, shown while it draws."""

import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline
from diffusers.callbacks import PipelineCallback
from PIL.Image import Image
from torch import Tensor

from latent_codec.images.tensors import image_grid
from latent_codec.pipelines.denoised import ObservedStep, SchedulerObserver, is_observable
from latent_codec.pipelines.packed_latents import PackedLatents, TokenGridObserver, space_of_pipeline
from latent_codec.pipelines.preview_worker import PreviewWorker

logger = logging.getLogger(__name__)

Previewer = Callable[[Tensor], Tensor]
Sink = Callable[[Image, int], Any]


@dataclass(frozen=True)
class Frame:
    """What is shown of one step: its x_0, or the latents themselves where the step was not observed."""

    step: int
    timestep: Tensor | float
    source: ObservedStep | Tensor
    """A copy."""
    packing: PackedLatents
    copied: torch.cuda.Event | None
    """When the copies are there, on a GPU."""

    @property
    def shows(self) -> str:
        return "x_0" if isinstance(self.source, ObservedStep) else "x_t"

    def latents(self) -> tuple[Tensor, int]:
        """(B * T, C, h, w), and the number of frames T of each of the batch."""
        return self.packing.unpack(
            self.source.x_0() if isinstance(self.source, ObservedStep) else self.source
        )


class LatentPreviewCallback(PipelineCallback):
    """Shows the predicted x_0 after every step: `pipe(..., callback_on_step_end=LatentPreviewCallback(pipe, ...))`.

        scheduler.step(model_output, t, x_t) --copies--> [thread] x_0 --previewer--> images --grid--> PIL --> sinks

    A pipeline hands its callbacks x_t, which looks like noise for most of a run, and not the denoiser's answer; so
    `pipe.scheduler` is observed (`SchedulerObserver`) for as long as this object lives, or until `close`, also while it
    serves several runs. Where x_0 cannot be had, x_t is shown and called so, once in the log and in each image's
    `info["shows"]`: of schedulers other than `denoised.OBSERVABLE`, and after the first step with a scheduler that the
    pipeline got later. What steps read is copied, so that a run's results are the same to the bit. Its own work per
    step is those copies; x_0, the previewer and the sinks have a thread of their own, on a GPU with a stream of
    its own, which drops frames rather than let the pipeline wait. If one of them fails, that is logged, once for each.

        with LatentPreviewCallback(pipe, previewer, AnimatedWebP("run.webp")) as preview:
            pipe(prompt, callback_on_step_end=preview)

    leaves the block once all is shown and written, also after an error. Without `with`, the last images come shortly
    after the pipeline returns; `wait` waits for them.

    Args:
        pipe: the pipeline whose runs are shown, any that takes `callback_on_step_end`.
        previewer: latents (B, C, h, w), scaled, as denoisers know them -> images (B, 1, 3 or 4, H, W) in [-1, 1]:
            a LatentPreviewer, or `lambda latents: codec.decode(latents, output_type="pt")`. It runs in parallel to the pipeline,
            so its modules should be its own: of a codec opened once more, not `pipe.vae`.
        sink: a function of a PIL image (of a whole batch, as a grid) and the step, from 0; or several. PngFolder
            and AnimatedWebP in `preview_sinks` write files.
        every_steps: shows each so-many-th step; the last is always shown, also that of a run that `pipe._interrupt` ends.
        every_milliseconds: at least so long from one image to the next.
        height, width: of the run's images in pixels, for pipelines that hand their denoiser tokens; None: as the
            pipeline tells the denoiser where they are, or else squares.
        frames: of video, "first" shows the first frame, "strip" all of them, side by side.

    Raises:
        ValueError: for intervals below 1 step or 0 ms, one of height and width, a pipe without scheduler, or sinks that
            cannot be called.
    """

    tensor_inputs: ClassVar = ["latents"]

    def __init__(
        self,
        pipe: DiffusionPipeline,
        previewer: Previewer,
        sink: Sink | Sequence[Sink],
        *,
        every_steps: int = 1,
        every_milliseconds: float = 0,
        height: int | None = None,
        width: int | None = None,
        frames: str = "first",
    ):
        super().__init__()
        sinks = list(sink) if isinstance(sink, Sequence) else [sink]
        if not callable(previewer) or not sinks or not all(map(callable, sinks)):
            raise ValueError(
                f"previewer is a {type(previewer).__name__} and sink {sink!r}; give functions: latents -> images, and "
                "(image, step) -> anything, or a list of those."
            )
        if every_steps < 1 or every_milliseconds < 0:
            raise ValueError(
                f"every_steps is {every_steps} and every_milliseconds {every_milliseconds}; they start at 1 and at 0."
            )
        if (height is None) != (width is None):
            raise ValueError(f"height is {height} and width {width}; give both or neither.")
        if frames not in ("first", "strip"):
            raise ValueError(f'expected "first" or "strip" as frames, got {frames!r}')
        if getattr(pipe, "scheduler", None) is None:
            raise ValueError(
                f"pipe is a {type(pipe).__name__} without a scheduler; give the pipeline that will run."
            )
        self.previewer = previewer
        self.sinks = sinks
        self.every_steps = every_steps
        self.every_milliseconds = every_milliseconds
        self.size = None if height is None else (height, width)
        self._logged: set[str] = set()
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._worker = PreviewWorker()
        self._last_step = -1  # of the run that goes on; -1: none does
        self._last_time = -math.inf
        self.frames = frames
        self._scheduler = self._observer = self._grid_observer = None
        self._observe(pipe.scheduler)
        self._observe_denoiser(getattr(pipe, "transformer", None))

    def __enter__(self) -> "LatentPreviewCallback":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def wait(self) -> None:
        """Return once all images so far are shown, and written where their run is over."""
        self._worker.wait()

    def close(self) -> None:
        """Stop observing the scheduler and the denoiser, end a run that was cut short, and wait until all is shown and written."""
        if self._observer is not None:
            self._observer.close()
        self._scheduler = self._observer = None
        self._observe_denoiser(None)
        if self._last_step >= 0:
            self._end_run()
        self.wait()

    def callback_fn(
        self,
        pipeline: DiffusionPipeline,
        step_index: int,
        timesteps: Tensor | float,
        callback_kwargs: dict[str, Any],
    ) -> dict[str, Any]:
        try:
            self._after_step(pipeline, step_index, timesteps, callback_kwargs.get("latents"))
        except Exception as error:  # whatever it is, the generation goes on
            self._log_once("Previews fail", error)
        return callback_kwargs

    def _observe(self, scheduler) -> None:
        if self._observer is not None:
            self._observer.close()
        self._scheduler = scheduler
        self._observer = SchedulerObserver(scheduler) if is_observable(scheduler) else None

    def _observe_denoiser(self, denoiser: torch.nn.Module | None) -> None:
        if self._grid_observer is not None:
            self._grid_observer.close()
        self._grid_observer = None if denoiser is None else TokenGridObserver(denoiser)

    def _after_step(self, pipe, step: int, timestep: Tensor | float, latents: Tensor | None) -> None:
        if step <= self._last_step:
            self._end_run()  # of a run that stopped before its last step
        self._last_step = step
        if pipe.scheduler is not self._scheduler:
            self._observe(pipe.scheduler)
        denoiser = getattr(pipe, "transformer", None)
        if denoiser is not None and not (self._grid_observer and self._grid_observer.observes(denoiser)):
            self._observe_denoiser(denoiser)
        seen = self._observer and self._observer.take()
        num_steps = getattr(pipe, "num_timesteps", None) or len(pipe.scheduler.timesteps)
        is_last = step >= num_steps - 1 or getattr(pipe, "interrupt", False)
        milliseconds = (time.monotonic() - self._last_time) * 1000
        if is_last or (step % self.every_steps == 0 and milliseconds >= self.every_milliseconds):
            self._last_time = time.monotonic()
            self._hand_over(pipe, step, timestep, seen, latents)
        if is_last:
            self._end_run()

    def _hand_over(
        self, pipe, step: int, timestep, seen: ObservedStep | None, latents: Tensor | None
    ) -> None:
        source = seen
        if seen is None:
            why = "x_0 is not known of it" if self._observer is None else "this step of it was not observed"
            self._log_once(f"Previews with {type(pipe.scheduler).__name__} show the noisy x_t", f"{why}.")
            if latents is None:
                raise ValueError(
                    "the pipeline gave no latents; name them in callback_on_step_end_tensor_inputs"
                )
            source = latents.detach().clone()
        device, copied = (latents if seen is None else seen.sample).device, None
        if device.type == "cuda":
            copied = torch.cuda.Event()
            copied.record(torch.cuda.current_stream(device))
        packing = PackedLatents(
            space_of_pipeline(pipe),
            self._grid_observer and self._grid_observer.take(),
            self.size,
            getattr(pipe, "vae_scale_factor", 8),
        )
        self._worker.show(partial(self._show, Frame(step, timestep, source, packing, copied)))

    def _end_run(self) -> None:
        self._last_step = -1
        self._last_time = -math.inf
        self._worker.run(self._finish)

    def _log_once(self, what: str, why: str | BaseException) -> None:
        if what not in self._logged:
            self._logged.add(what)
            logger.warning("%s: %s", what, why if isinstance(why, str) else f"{type(why).__name__}: {why}")

    # The worker's thread runs what follows, and must outlive whatever is raised there, CancelledError and SystemExit too.

    def _show(self, frame: Frame) -> None:
        try:
            image = self._image(frame)
        except BaseException as error:
            self._log_once("A preview failed", error)
            return
        for sink in self.sinks:
            try:
                sink(image.copy(), frame.step)  # which it may scale or draw on
            except BaseException as error:
                self._log_once(f"{sink!r} failed", error)

    def _finish(self) -> None:
        for sink in self.sinks:
            try:
                getattr(sink, "finish", lambda: None)()
            except BaseException as error:
                self._log_once(f"{sink!r} failed at the end", error)

    @torch.no_grad()
    def _image(self, frame: Frame) -> Image:
        with self._own_stream(frame):
            timestep = float(frame.timestep)
            latents, num_frames = frame.latents()
            if self.frames == "first":
                latents, num_frames = latents[::num_frames], 1
            space = getattr(self.previewer, "space", None)
            latents = frame.packing.for_previewer(latents, space and space.channels)
            images = list(self.previewer(latents).cpu())
        columns = num_frames if num_frames > 1 else math.ceil(len(images) ** 0.5)
        image = image_grid(images, columns=columns, gap=0)
        image.info.update(step=frame.step, timestep=timestep, shows=frame.shows)
        if getattr(self.previewer, "kind", None) == "linear":
            image.info["pixels"] = "positions of latents"
        return image

    def _own_stream(self, frame: Frame):
        """On a GPU, a stream that waits for the copies and for nothing else."""
        if frame.copied is None:
            return nullcontext()
        device = frame.copied.device
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        self._streams[device].wait_event(frame.copied)
        return torch.cuda.stream(self._streams[device])
