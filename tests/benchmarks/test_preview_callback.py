"""What LatentPreviewCallback costs a run, and how near its x_0 is to the true one.

pytest tests/benchmarks/test_preview_callback.py -s -o addopts=          about 1 minute of one idle core
"""

import statistics
import time
from itertools import pairwise

import diffusers
import pytest
import torch
from exact_denoisers import discrete_level, exact_answer
from tables import table
from test_denoised import (
    DISCRETE,
    NUM_STEPS,
    TRUE_X_0,
    build_scheduler,
    exact_edm_answer,
    run,
    run_exactly,
)
from test_latent_preview_callback import linear
from test_swap_in import build_codec, sd_pipeline

from latent_codec.pipelines import LatentPreviewCallback

SIZE = {"height": 256, "width": 256}
"""Latents of 32x32."""


def test_observed_x_0_against_the_true_one():
    rows = []
    for name, prediction_types in DISCRETE.items():
        cells = {}
        for kind in prediction_types:
            observed, _ = run_exactly(
                build_scheduler(name, prediction_type=kind),
                lambda noisy, number, t, kind=kind: exact_answer(noisy, discrete_level(t), kind, TRUE_X_0),
            )
            cells[kind] = f"{max(float((x_0 - TRUE_X_0).abs().max()) for x_0 in observed):.1e}"
        rows.append([name, *(cells.get(kind, "-") for kind in ("epsilon", "v_prediction", "sample"))])
    cells = []
    for kind in ("epsilon", "v_prediction"):
        observed, _ = run_exactly(
            diffusers.EDMEulerScheduler(prediction_type=kind),
            lambda scaled, number, t, kind=kind: exact_edm_answer(scaled, t, kind),
        )
        cells.append(f"{max(float((x_0 - TRUE_X_0).abs().max()) for x_0 in observed):.1e}")
    rows.append(["EDMEulerScheduler", *cells, "-"])
    table(
        f"Largest error of x_0 in {NUM_STEPS} steps (goal 1e-4; flows: tests/test_denoised.py)",
        ["scheduler", "epsilon", "v", "sample"],
        rows,
    )


@pytest.fixture
def pipe():
    pipe = sd_pipeline(build_codec())
    pipe.scheduler = build_scheduler("EulerDiscreteScheduler")
    return pipe


def test_the_callback_returns_at_once(pipe):
    plain = run(pipe, num_inference_steps=30, **SIZE)
    times, busy, steps_shown = [], [], []
    with LatentPreviewCallback(pipe, linear, lambda image, step: steps_shown.append(step)) as preview:

        def timed(*arguments):
            begun, begun_busy = time.perf_counter(), time.thread_time()
            kwargs = preview(*arguments)
            times.append(time.perf_counter() - begun)
            busy.append(time.thread_time() - begun_busy)
            return kwargs

        shown = run(pipe, num_inference_steps=30, callback_on_step_end=timed, **SIZE)
    table(
        "Linear previews every step, 30 steps of a tiny pipeline, batch 2, 32x32 latents",
        [
            "callback returns in, median (goal 0.2 ms)",
            "of which computing",
            "longest",
            "frames shown",
            "latents identical",
        ],
        [
            [
                f"{statistics.median(times) * 1000:.3f} ms",
                f"{statistics.median(busy) * 1000:.3f} ms",
                f"{max(times) * 1000:.3f} ms",
                f"{len(steps_shown)} of 30",
                str(torch.equal(plain, shown)),
            ]
        ],
    )
    assert torch.equal(plain, shown)


class SlowUNet(diffusers.UNet2DConditionModel):
    """200 ms for each answer, most of it asleep."""

    def forward(self, *args, **kwargs):
        time.sleep(0.2)
        return super().forward(*args, **kwargs)


def test_what_previews_cost_a_run_of_200_ms_steps(pipe):
    """In the same runs every other step is shown: from one callback to the next, the worker's share included."""
    pipe.unet.__class__ = SlowUNet
    seconds = {"shown": [], "not shown": []}
    latents = []
    for _ in range(3):
        ends = []
        with LatentPreviewCallback(pipe, linear, lambda *_: None) as preview:

            def every_other(pipe, step, *arguments, preview=preview, ends=ends):
                ends.append(time.perf_counter())
                return preview(pipe, step, *arguments) if step % 2 else arguments[-1]

            latents.append(run(pipe, num_inference_steps=30, callback_on_step_end=every_other))
        for step, (begun, ended) in enumerate(pairwise(ends)):
            seconds["shown" if step % 2 else "not shown"].append(ended - begun)
    shown, not_shown = (statistics.median(each) for each in seconds.values())
    table(
        "Steps of 200 ms, medians of 42 and 45",
        ["without, ms", "linear preview, ms", "slower by (goal 1 %)"],
        [[not_shown * 1000, shown * 1000, f"{(shown / not_shown - 1) * 100:.2f} %"]],
    )
    plain = run(pipe, num_inference_steps=30)
    assert all(torch.equal(each, plain) for each in latents)
