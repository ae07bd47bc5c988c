"""x_0 as observed in real pipelines, against denoisers that know the true x_0 from the papers' noise schedules."""

import copy
import gc
import inspect
import pickle
from functools import cache

import diffusers
import numpy as np
import pytest
import torch
from exact_denoisers import (
    ALPHAS_CUMPROD,
    ExactFluxTransformer,
    ExactSD3Transformer,
    ExactUNet,
    discrete_level,
    exact_answer,
    know,
)
from test_swap_in import WIDTH, build_codec, flux_pipeline, sd3_pipeline, sd_pipeline

from latent_codec.pipelines import LatentPreviewCallback
from latent_codec.pipelines.denoised import SchedulerObserver, is_observable, original_sample

NUM_STEPS = 7
TRUE_X_0 = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(5))


def shifted_flow_level(number, first, last, shift=3.0):
    """The same in multistep solvers, which round the timestep: s in equal steps, shifted by equation 23."""
    sigma = np.linspace(first, last, NUM_STEPS + 1)[number]
    sigma = shift * sigma / (1 + (shift - 1) * sigma)
    return 1 - sigma, sigma


def exact_edm_answer(scaled, timestep, prediction_type, sigma_data=0.5):
    """F of arXiv:2206.00364, equation 7: x_0 = c_skip x + c_out F(c_in x, c_noise), with c_noise = ln(sigma) / 4."""
    sigma = np.exp(4 * float(timestep))
    noisy = scaled.double() * np.sqrt(sigma**2 + sigma_data**2)
    c_skip = sigma_data**2 / (sigma**2 + sigma_data**2)
    c_out = sigma * sigma_data / np.sqrt(sigma**2 + sigma_data**2)
    answer = (TRUE_X_0.double() - c_skip * noisy) / c_out
    return (answer if prediction_type == "epsilon" else -answer).float()


@cache
def exact_pipeline():
    """One for all runs: none of them changes it."""
    return sd_pipeline(build_codec())


def run_exactly(scheduler, answer, kind=diffusers.StableDiffusionPipeline, **options):
    """A run of two images with exact answers -> all x_0 observed, and the images' infos."""
    exact_pipeline().scheduler = scheduler
    pipe = kind(**exact_pipeline().components, requires_safety_checker=False)
    latents, infos = [], []

    def previewer(x_0):
        latents.append(x_0)
        return x_0[:, :3].tanh()

    with LatentPreviewCallback(pipe, previewer, lambda image, step: infos.append(image.info)) as preview:
        know(pipe.unet, ExactUNet, answer=answer, wait=preview.wait)
        run(pipe, callback_on_step_end=preview, **options)
    return latents, infos


def run(pipe, **options):
    pipe.set_progress_bar_config(disable=True)
    prompt = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(2))
    settings = {
        **({} if "image" in options else {"height": 32, "width": 32}),
        "guidance_scale": 1.0,
        "output_type": "latent",
        "num_inference_steps": NUM_STEPS,
        "generator": torch.Generator().manual_seed(3),
    }
    return pipe(prompt_embeds=prompt, **settings | options).images


DISCRETE = {
    "DDIMScheduler": ["epsilon", "v_prediction", "sample"],
    "DDPMScheduler": ["epsilon", "v_prediction", "sample"],
    "LCMScheduler": ["epsilon", "v_prediction", "sample"],
    "TCDScheduler": ["epsilon", "v_prediction", "sample"],
    "PNDMScheduler": ["epsilon", "v_prediction"],
    "EulerDiscreteScheduler": ["epsilon", "v_prediction", "sample"],
    "EulerAncestralDiscreteScheduler": ["epsilon", "v_prediction"],
    "HeunDiscreteScheduler": ["epsilon", "v_prediction", "sample"],
    "KDPM2DiscreteScheduler": ["epsilon", "v_prediction"],
    "LMSDiscreteScheduler": ["epsilon", "v_prediction", "sample"],
    "DPMSolverMultistepScheduler": ["epsilon", "v_prediction", "sample"],
    "DPMSolverSinglestepScheduler": ["epsilon", "v_prediction", "sample"],
    "UniPCMultistepScheduler": ["epsilon", "v_prediction", "sample"],
    "DEISMultistepScheduler": ["epsilon", "v_prediction", "sample"],
}
"""Schedulers of timesteps 0 to 999, and the predictions they take."""


def build_scheduler(name, **config):
    wanted = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "timestep_spacing": "leading",
        "steps_offset": 1,
        "clip_sample": False,
        "skip_prk_steps": True,
        **config,
    }
    scheduler_class = getattr(diffusers, name)
    taken = inspect.signature(scheduler_class.__init__).parameters
    return scheduler_class(**{key: value for key, value in wanted.items() if key in taken})


def check_exact(latents, infos, num_steps):
    assert len(latents) == num_steps
    for x_0 in latents:
        assert x_0.dtype == torch.float32
        torch.testing.assert_close(x_0, TRUE_X_0, rtol=0, atol=1e-4)
    assert [info["step"] for info in infos] == list(range(num_steps))
    assert {info["shows"] for info in infos} == {"x_0"}


@pytest.mark.parametrize(
    ("name", "prediction_type"), [(name, kind) for name in DISCRETE for kind in DISCRETE[name]]
)
def test_x_0_of_schedulers_with_discrete_timesteps(name, prediction_type):
    scheduler = build_scheduler(name, prediction_type=prediction_type)
    observed = run_exactly(
        scheduler,
        lambda noisy, number, timestep: exact_answer(
            noisy, discrete_level(timestep), prediction_type, TRUE_X_0
        ),
    )
    check_exact(*observed, num_steps=len(scheduler.timesteps))


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}),
        ("UniPCMultistepScheduler", {"predict_x0": False, "solver_type": "bh1"}),
        ("DDIMScheduler", {"timestep_spacing": "trailing"}),
    ],
)
def test_x_0_of_schedulers_set_otherwise(name, config):
    scheduler = build_scheduler(name, **config)
    observed = run_exactly(
        scheduler,
        lambda noisy, number, timestep: exact_answer(noisy, discrete_level(timestep), "epsilon", TRUE_X_0),
    )
    check_exact(*observed, num_steps=NUM_STEPS)


@pytest.mark.parametrize("name", DISCRETE)
def test_x_0_where_a_run_starts_from_a_image(name):
    scheduler = build_scheduler(name)
    latents, infos = run_exactly(
        scheduler,
        lambda noisy, number, timestep: exact_answer(noisy, discrete_level(timestep), "epsilon", TRUE_X_0),
        kind=diffusers.StableDiffusionImg2ImgPipeline,
        image=torch.zeros(2, 3, 32, 32),
        strength=0.6,
    )
    assert len(latents) < len(scheduler.timesteps)
    check_exact(latents, infos, num_steps=len(latents))


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler", "LCMScheduler", "TCDScheduler"])
def test_x_0_where_the_last_timestep_is_noise_alone(name):
    """Rescaled as arXiv:2305.08891, algorithm 1: at the first step there is nothing of x_0 in what the denoiser sees."""
    root = ALPHAS_CUMPROD**0.5
    rescaled = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    config = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}

    def answer(noisy, number, timestep):
        alpha_cumprod = rescaled[int(timestep)]
        assert number > 0 or alpha_cumprod == 0
        level = alpha_cumprod**0.5, (1 - alpha_cumprod) ** 0.5
        return exact_answer(noisy, level, "v_prediction", TRUE_X_0)

    check_exact(
        *run_exactly(build_scheduler(name, prediction_type="v_prediction", **config), answer), NUM_STEPS
    )


def test_x_0_where_the_runge_kutta_steps_of_pndm_come_first():
    scheduler = build_scheduler("PNDMScheduler", skip_prk_steps=False)
    observed = run_exactly(
        scheduler,
        lambda noisy, number, timestep: exact_answer(noisy, discrete_level(timestep), "epsilon", TRUE_X_0),
    )
    check_exact(*observed, num_steps=len(scheduler.timesteps))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_x_0_of_edm_euler(prediction_type):
    observed = run_exactly(
        diffusers.EDMEulerScheduler(prediction_type=prediction_type),
        lambda scaled, number, timestep: exact_edm_answer(scaled, timestep, prediction_type),
    )
    check_exact(*observed, num_steps=NUM_STEPS)


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [
        ("DPMSolverMultistepScheduler", 0.999, 0),
        ("DEISMultistepScheduler", 0.999, 0),
        ("UniPCMultistepScheduler", 1, 0.001),
    ],
)
def test_x_0_of_multistep_solvers_of_flows(name, first, last):
    config = {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"}
    observed = run_exactly(
        build_scheduler(name, **config),
        lambda noisy, number, timestep: exact_answer(
            noisy, shifted_flow_level(number, first, last), "flow_prediction", TRUE_X_0
        ),
    )
    check_exact(*observed, num_steps=NUM_STEPS)


@pytest.mark.parametrize(
    "scheduler", [diffusers.FlowMatchEulerDiscreteScheduler, diffusers.FlowMatchHeunDiscreteScheduler]
)
def test_x_0_of_flow_matching(scheduler):
    pipe = sd3_pipeline(build_codec(shift_factor=0.1))
    pipe.scheduler = scheduler(shift=3.0)
    observed = []
    with LatentPreviewCallback(
        pipe, lambda x_0: observed.append(x_0) or x_0[:, :3], lambda *_: None
    ) as preview:
        know(pipe.transformer, ExactSD3Transformer, x_0=TRUE_X_0, wait=preview.wait)
        run(pipe, callback_on_step_end=preview, pooled_prompt_embeds=torch.zeros(2, WIDTH))
    assert len(observed) == len(pipe.scheduler.timesteps)
    for x_0 in observed:
        torch.testing.assert_close(x_0, TRUE_X_0, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("height", "width", "given"), [(32, 32, False), (48, 16, True), (48, 16, False), (16, 48, False)]
)
def test_packed_latents_of_flux_are_unpacked(height, width, given):
    pipe = flux_pipeline(build_codec(shift_factor=0.1))
    x_0 = torch.randn(2, 4, height // 8, width // 8, generator=torch.Generator().manual_seed(5))
    size = {"height": height, "width": width}
    observed = []
    preview = LatentPreviewCallback(
        pipe, lambda x_0: observed.append(x_0) or x_0[:, :3], lambda *_: None, **size if given else {}
    )
    with preview:
        packed = pipe._pack_latents(x_0, 2, 4, height // 8, width // 8)
        know(pipe.transformer, ExactFluxTransformer, x_0=packed, wait=preview.wait)
        run(pipe, callback_on_step_end=preview, pooled_prompt_embeds=torch.zeros(2, WIDTH), **size)
    assert len(observed) == NUM_STEPS
    for each in observed:
        torch.testing.assert_close(each, x_0, rtol=0, atol=1e-4)


def test_a_learned_variance_is_left_out():
    scheduler = build_scheduler("DDPMScheduler", variance_type="learned_range")
    scheduler.set_timesteps(NUM_STEPS)
    observer = SchedulerObserver(scheduler)
    noisy = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    timestep = scheduler.timesteps[2]
    answer = exact_answer(noisy, discrete_level(timestep), "epsilon", TRUE_X_0)
    scheduler.step(torch.cat([answer, torch.zeros_like(answer)], dim=1), timestep, noisy)
    torch.testing.assert_close(observer.take().x_0(), TRUE_X_0, rtol=0, atol=1e-4)
    assert observer.take() is None


def test_half_precision_is_computed_in_float32():
    scheduler = build_scheduler("DDIMScheduler")
    scheduler.set_timesteps(NUM_STEPS)
    observer = SchedulerObserver(scheduler)
    noisy, answer = torch.randn(2, 1, 4, 4, 4, generator=torch.Generator().manual_seed(0)).half()
    scheduler.step(answer, scheduler.timesteps[0], noisy)
    alpha, sigma = discrete_level(scheduler.timesteps[0])
    expected = ((noisy.double() - sigma * answer.double()) / alpha).float()
    torch.testing.assert_close(observer.take().x_0(), expected, rtol=1e-5, atol=1e-4)


def test_observing_leaves_no_trace_in_what_pipelines_read_of_a_scheduler():
    scheduler = build_scheduler("DDIMScheduler")
    signature = inspect.signature(scheduler.step)
    observer = SchedulerObserver(scheduler)
    assert inspect.signature(scheduler.step) == signature
    observer.close()
    assert "step" not in vars(scheduler)
    observer.close()

    observer = SchedulerObserver(scheduler)
    del observer
    gc.collect()
    assert "step" not in vars(scheduler)


def test_a_copy_of_an_observed_scheduler_steps_itself_unseen():
    scheduler = build_scheduler("EulerDiscreteScheduler")
    scheduler.set_timesteps(NUM_STEPS)
    observer = SchedulerObserver(scheduler)
    noisy = torch.randn(2, 1, 4, 4, 4)
    for other in (copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler))):
        other.step(noisy[0], other.timesteps[0], noisy[1])
        assert (other.step_index, scheduler.step_index) == (1, None)
    assert observer.take() is None


def test_two_observers_of_one_scheduler_go_in_any_order():
    for first_to_go in (0, 1):
        scheduler = build_scheduler("DDIMScheduler")
        scheduler.set_timesteps(NUM_STEPS)
        observers = [SchedulerObserver(scheduler), SchedulerObserver(scheduler)]
        noisy = torch.randn(2, 1, 4, 4, 4)
        expected = scheduler.step(noisy[0], scheduler.timesteps[0], noisy[1]).prev_sample
        assert torch.equal(*(observer.take().x_0() for observer in observers))
        observers.pop(first_to_go).close()
        again = scheduler.step(noisy[0], scheduler.timesteps[0], noisy[1]).prev_sample
        assert torch.equal(again, expected) and observers[0].take() is not None
        observers[0].close()
        assert torch.equal(scheduler.step(noisy[0], scheduler.timesteps[0], noisy[1]).prev_sample, expected)
        assert observers[0].take() is None


def test_schedulers_that_are_not_known_are_told():
    assert not is_observable(diffusers.ScoreSdeVeScheduler())
    assert not is_observable(diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True))
    assert is_observable(diffusers.FlowMatchEulerDiscreteScheduler())
    one = torch.ones(1)
    with pytest.raises(ValueError, match="prediction_type is 'score'; known are epsilon"):
        original_sample(one, one, one, one, "score")
