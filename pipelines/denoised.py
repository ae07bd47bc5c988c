"""The image that a denoiser is heading for: x_0, predicted from what a scheduler's step is given.

A pipeline's callback sees latents that still hold noise, x_t, and not the denoiser's answer. `SchedulerObserver`
looks at both where they meet, in `scheduler.step`, and `ObservedStep` turns them into x_0.
"""

import functools
import logging
import types
import weakref
from dataclasses import dataclass

from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LCMScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    SchedulerMixin,
    TCDScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

logger = logging.getLogger(__name__)

# How a sample is made of image and noise, by what the scheduler keeps of it.
BY_TIMESTEP = (DDIMScheduler, DDPMScheduler, LCMScheduler, PNDMScheduler, TCDScheduler)
"""x_t = sqrt(alphas_cumprod[t]) x_0 + sqrt(1 - alphas_cumprod[t]) epsilon: DDPM, arXiv:2006.11239, equation 4."""
EXPLODING = (
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LMSDiscreteScheduler,
)
"""x = x_0 + sigma epsilon, for denoisers that know it divided by sqrt(1 + sigma^2)."""
PRESERVING = (
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    UniPCMultistepScheduler,
)
"""As BY_TIMESTEP, with sigma the ratio of noise to image; or as FLOW, where `use_flow_sigmas` says so."""
PRECONDITIONED = (EDMEulerScheduler,)
"""x_0 = c_skip x + c_out F(c_in x): EDM, arXiv:2206.00364, equation 7."""
FLOW = (FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler)
"""x = (1 - sigma) x_0 + sigma epsilon, and the denoiser answers epsilon - x_0."""

OBSERVABLE = BY_TIMESTEP + EXPLODING + PRESERVING + PRECONDITIONED + FLOW


def is_observable(scheduler: SchedulerMixin) -> bool:
    """Whether x_0 is known at every step of this scheduler."""
    # Inverted sigmas count the share of the image, for denoisers whose answers mean something else.
    is_inverted = scheduler.config.get("invert_sigmas", False)
    return isinstance(scheduler, OBSERVABLE) and hasattr(scheduler.step, "__func__") and not is_inverted


def original_sample(
    model_output: Tensor, noisy: Tensor, alpha: Tensor, sigma: Tensor, prediction_type: str
) -> Tensor:
    """x_0 of noisy = alpha x_0 + sigma epsilon, from what a denoiser predicts of it.

        epsilon       noise                        x_0 = (noisy - sigma epsilon) / alpha    arXiv:2006.11239
        v_prediction  v = alpha epsilon - sigma x_0    x_0 = alpha noisy - sigma v          arXiv:2202.00512
        flow          v = epsilon - x_0                x_0 = noisy - sigma v                arXiv:2403.03206
        sample        x_0

    Raises:
        ValueError: for another prediction type.
    """
    if prediction_type == "epsilon":
        return (noisy - sigma * model_output) / alpha
    if prediction_type == "v_prediction":
        return alpha * noisy - sigma * model_output
    if prediction_type == "flow_prediction":
        return noisy - sigma * model_output
    if prediction_type in ("sample", "original_sample"):
        return model_output
    raise ValueError(
        f"prediction_type is {prediction_type!r}; known are epsilon, v_prediction, flow_prediction and sample."
    )


@dataclass(frozen=True)
class ObservedStep:
    """What one step of an observable scheduler was given; tensors are copies, and nothing of them was read yet.

    Args:
        model_output: the denoiser's answer, shaped as `sample`, or with as many channels again for the variance.
        sample: noisy, x_t.
        timestep: of `sample`.
        sigma: its noise as the scheduler counts it; None for those that go by `timestep`.
    """

    scheduler: SchedulerMixin
    model_output: Tensor
    sample: Tensor
    timestep: Tensor | float
    sigma: Tensor | None

    def x_0(self) -> Tensor:
        """The predicted x_0, float32, shaped as `sample`, neither clipped nor thresholded."""
        scheduler, config, sigma = self.scheduler, self.scheduler.config, self.sigma
        sample = self.sample.float()
        model_output = self.model_output.float()
        if model_output.ndim == 4:
            model_output = model_output[:, : sample.shape[1]]  # more is the variance, where it is learned
        if isinstance(scheduler, PRECONDITIONED):
            return scheduler.precondition_outputs(sample, model_output, sigma)
        prediction_type = config.get("prediction_type", "flow_prediction")
        if isinstance(scheduler, BY_TIMESTEP):
            alpha_cumprod = scheduler.alphas_cumprod[self.timestep]
            alpha, sigma = alpha_cumprod**0.5, (1 - alpha_cumprod) ** 0.5
        elif isinstance(scheduler, FLOW) or config.get("use_flow_sigmas", False):
            alpha = 1 - sigma
        else:
            alpha = 1 / (1 + sigma**2) ** 0.5
            sigma = sigma * alpha
            if isinstance(scheduler, EXPLODING):
                sample = sample * alpha
        return original_sample(model_output, sample, alpha, sigma, prediction_type)


class SchedulerObserver:
    """Copies what each step of a scheduler is given, without changing what the step does.

    The scheduler gets a `step` of its own that calls the one of its class, with the same signature, by which pipelines
    find out whether it takes `eta` or a generator. It is taken away by `close`, or when the observer is gone. A copy of
    the scheduler steps itself, and is not observed.

    Args:
        scheduler: one that `is_observable`.
    """

    def __init__(self, scheduler: SchedulerMixin):
        self.last: ObservedStep | None = None
        self._remove = weakref.finalize(self, _observe(scheduler, weakref.WeakMethod(self._see)))
        self._remove.atexit = False

    def take(self) -> ObservedStep | None:
        """The last step, once; None if there was none since."""
        last, self.last = self.last, None
        return last

    def close(self) -> None:
        """Stop observing."""
        self._remove()
        self.last = None

    def _see(self, scheduler: SchedulerMixin, model_output: Tensor, timestep, sample: Tensor) -> None:
        sigma = None if isinstance(scheduler, BY_TIMESTEP) else _last_sigma(scheduler)
        copies = (each.detach().clone() for each in (model_output, sample))
        self.last = ObservedStep(scheduler, *copies, timestep, sigma)


def _last_sigma(scheduler: SchedulerMixin) -> Tensor:
    """The sigma at which the step just taken had its denoiser asked: a view, so that no device is waited for."""
    index = scheduler.step_index - 1
    if isinstance(scheduler, KDPM2DiscreteScheduler) and scheduler.state_in_first_order:
        return scheduler.sigmas_interpol[index]  # it was the second of two stages, halfway
    return scheduler.sigmas[index]


def _observe(scheduler: SchedulerMixin, see: weakref.WeakMethod):
    """Let `see` be called after every step, until the function that comes back is."""
    observed = weakref.ref(scheduler)
    had_its_own = "step" in vars(scheduler)
    inner = scheduler.step.__func__  # unbound, so that a deep copy of the scheduler calls its own

    @functools.wraps(inner)
    def step(self, model_output, timestep, sample, *args, **kwargs):
        result = inner(self, model_output, timestep, sample, *args, **kwargs)
        seen = see()
        if seen is not None and self is observed():
            try:
                seen(self, model_output, timestep, sample)
            except Exception as error:  # whatever it is, the generation goes on
                logger.warning("A step of %s could not be observed: %s", type(self).__name__, error)
        return result

    scheduler.step = types.MethodType(step, scheduler)

    def remove() -> None:
        scheduler = observed()
        # Where another observer was added later, its step goes on calling this one, which only passes on from now.
        if scheduler is not None and getattr(vars(scheduler).get("step"), "__func__", None) is step:
            if had_its_own:
                scheduler.step = types.MethodType(inner, scheduler)
            else:
                del scheduler.step

    return remove
