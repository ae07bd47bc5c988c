"""LatentPreviewCallback in real pipelines with tiny denoisers: what is shown, and that nothing else changes."""

import asyncio
import gc
import logging
import threading
import time

import diffusers
import numpy as np
import pytest
import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from helpers.processes import run_fresh
from PIL import Image
from test_denoised import NUM_STEPS, build_scheduler, run
from test_swap_in import build_codec, flux_pipeline, sd_pipeline

from latent_codec.pipelines import AnimatedWebP, LatentPreviewCallback, PngFolder

COLORS = torch.tensor([[0.3, -0.2, 0.1], [0.1, 0.3, -0.2], [-0.2, 0.1, 0.3], [0.2, 0.2, 0.2]])


def linear(latents):
    """Latents -> small RGB by a 1x1 map."""
    return torch.einsum("bchw,cr->brhw", latents.float(), COLORS).clamp(-1, 1)


def nowhere(image, step):
    pass


@pytest.fixture(scope="module")
def pipe():
    pipe = sd_pipeline(build_codec())
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Steps:
    """A pipeline's loop without the pipeline: so many steps of DDIM, with `latents` changed in place."""

    def __init__(self, num_steps=NUM_STEPS):
        self.scheduler = build_scheduler("DDIMScheduler")
        self.num_timesteps = num_steps

    def run(self, callback, *, stop_after=None, after_each=None):
        """The latents that went into each step, and what the denoiser answered."""
        self.scheduler.set_timesteps(self.num_timesteps)
        generator = torch.Generator().manual_seed(0)
        latents = torch.randn(3, 4, 4, 4, generator=generator)
        went_in = []
        for step, timestep in enumerate(self.scheduler.timesteps[:stop_after]):
            answer = torch.randn(latents.shape, generator=generator)
            went_in.append((latents.clone(), answer.clone(), timestep))
            latents.copy_(self.scheduler.step(answer, timestep, latents, return_dict=False)[0])
            answer.zero_()
            kwargs = {"latents": latents}
            assert callback(self, step, timestep, kwargs) is kwargs
            latents.mul_(1.01)
            if after_each:
                after_each()
        return went_in

    def x_0(self, latents, answer, timestep):
        """DDIM's own prediction, epsilon being the answer."""
        return self.scheduler.step(answer, timestep, latents).pred_original_sample


@pytest.mark.parametrize(
    ("scheduler", "options"),
    [
        ("DDIMScheduler", {"eta": 0.7}),
        ("DDPMScheduler", {}),
        ("LCMScheduler", {}),
        ("EulerAncestralDiscreteScheduler", {}),
        ("HeunDiscreteScheduler", {}),
        ("PNDMScheduler", {}),
        ("DPMSolverMultistepScheduler", {}),
        ("UniPCMultistepScheduler", {}),
    ],
)
def test_latents_are_the_same_to_the_bit_with_and_without_previews(pipe, scheduler, options):
    pipe.scheduler = build_scheduler(scheduler)
    plain = run(pipe, **options)
    torch.manual_seed(7)
    with LatentPreviewCallback(pipe, linear, nowhere) as preview:
        shown = run(pipe, callback_on_step_end=preview, **options)
    assert torch.equal(plain, shown)
    after = torch.get_rng_state()
    torch.manual_seed(7)
    assert torch.equal(after, torch.get_rng_state())
    assert torch.equal(run(pipe, **options), plain)


def test_a_pipe_that_changes_latents_in_place_gets_the_same():
    steps = Steps()
    plain = steps.run(lambda pipe, step, timestep, kwargs: kwargs)
    with LatentPreviewCallback(steps, linear, nowhere) as preview:
        shown = steps.run(preview)
    assert all(torch.equal(one[0], other[0]) for one, other in zip(plain, shown))


def test_what_is_shown_is_a_copy_taken_before_the_pipe_goes_on():
    steps, shown, may_decode = Steps(), [], threading.Event()

    def late(latents):
        may_decode.wait()
        shown.append(latents)
        return linear(latents)

    with LatentPreviewCallback(steps, late, nowhere) as preview:
        went_in = steps.run(preview)  # the last frame waits until all latents have changed
        may_decode.set()
        preview.wait()
    torch.testing.assert_close(shown[-1], steps.x_0(*went_in[-1]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(shown[0], steps.x_0(*went_in[0]), rtol=1e-5, atol=1e-5)


def test_frames_are_dropped_rather_than_waited_for_and_the_last_is_shown():
    steps, shown, may_show = Steps(12), [], threading.Event()

    def slow(image, step):
        may_show.wait()
        shown.append(step)

    with LatentPreviewCallback(steps, linear, slow) as preview:
        begun = time.monotonic()
        steps.run(preview)
        assert (
            shown == [] and time.monotonic() - begun < 60
        )  # it did not wait, for it could have waited forever
        may_show.set()
        preview.wait()
    assert shown[-1] == 11 and 1 <= len(shown) <= 3


def test_every_step_and_every_millisecond():
    def shown(**options):
        steps, seen = Steps(10), []
        with LatentPreviewCallback(
            steps, linear, lambda image, step: seen.append(step), **options
        ) as preview:
            steps.run(preview, after_each=preview.wait)
        return seen

    assert shown() == list(range(10))
    assert shown(every_steps=4) == [0, 4, 8, 9]
    assert shown(every_milliseconds=1e6) == [0, 9]
    assert shown(every_steps=3, every_milliseconds=1e-6) == [0, 3, 6, 9]

    steps, seen = Steps(3), []
    preview = LatentPreviewCallback(
        steps, linear, lambda image, step: seen.append(step), every_milliseconds=1e6
    )
    for _ in range(2):  # the interval is of one run
        steps.run(preview, after_each=preview.wait)
    assert seen == [0, 2, 0, 2]


def test_a_image_is_the_batch_as_a_grid_and_says_what_it_shows():
    steps, images = Steps(2), []
    with LatentPreviewCallback(steps, linear, lambda image, step: images.append(image)) as preview:
        went_in = steps.run(preview, after_each=preview.wait)
    first = images[0]
    assert first.size == (8, 8) and first.mode == "RGB"  # three images of 4x4 in two columns
    assert first.info == {"step": 0, "timestep": float(steps.scheduler.timesteps[0]), "shows": "x_0"}
    expected = linear(steps.x_0(*went_in[0])).add(1).mul(127.5).round()
    cell = torch.from_numpy(np.array(first)[:4, 4:])
    torch.testing.assert_close(cell.float(), expected[1].permute(1, 2, 0), rtol=0, atol=1)


def test_a_sink_may_draw_on_its_image():
    steps, images = Steps(2), []
    sinks = [
        lambda image, step: image.paste(0, (0, 0, 8, 8)),
        lambda image, step: images.append(image),
    ]
    with LatentPreviewCallback(steps, linear, sinks) as preview:
        steps.run(preview)
    assert images[-1].getbbox() is not None and images[-1].info["step"] == 1


def test_png_files_say_what_they_show(tmp_path):
    steps = Steps(3)
    with LatentPreviewCallback(steps, linear, PngFolder(tmp_path / "run")) as preview:
        steps.run(preview, after_each=preview.wait)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        f"step_000{n}.png" for n in range(3)
    ]
    image = Image.open(tmp_path / "run" / "step_0001.png")
    assert image.size == (256, 256)  # of 8x8
    assert image.text == {"step": "1", "timestep": "334.0", "shows": "x_0"}


def test_an_animation_holds_the_whole_run(tmp_path):
    steps, path = Steps(5), tmp_path / "run.webp"
    preview = LatentPreviewCallback(steps, linear, [AnimatedWebP(path, frame_milliseconds=40), nowhere])
    for num_runs in (1, 2):  # the second run's animation holds no frame of the first
        steps.run(preview, after_each=preview.wait)
        assert Image.open(path).n_frames == 5, num_runs
        path.unlink()
    animation = AnimatedWebP(path, frame_milliseconds=40, last_milliseconds=900)
    with LatentPreviewCallback(steps, linear, animation) as preview:
        steps.run(preview, after_each=preview.wait, stop_after=3)
        assert not path.exists()
    image = Image.open(path)  # what there was of a run that stopped is written when the block ends
    durations = []
    for frame in range(image.n_frames):
        image.seek(frame)
        image.load()
        durations.append(image.info["duration"])
    assert durations == [40, 40, 900]
    with pytest.raises(ValueError, match=r"path is run\.gif; .* ends in \.webp"):
        AnimatedWebP("run.gif")


@pytest.mark.parametrize("what", ["previewer", "sink", "finish"])
@pytest.mark.parametrize("error", [RuntimeError, asyncio.CancelledError, SystemExit])
def test_a_failure_is_logged_once_and_the_run_goes_on(what, error, pipe, caplog):
    shown = []

    def fail(*args):
        raise error("no such thing")

    class Sink:
        def __repr__(self):
            return "the 50% sink"

        def __call__(self, image, step):
            fail() if what == "sink" else None

        def finish(self):
            fail() if what == "finish" else None

    pipe.scheduler = build_scheduler("DDIMScheduler")
    plain = run(pipe)
    previewer = fail if what == "previewer" else linear
    with (
        caplog.at_level(logging.WARNING),
        LatentPreviewCallback(pipe, previewer, [Sink(), lambda image, step: shown.append(step)]) as preview,
    ):
        for _ in range(2):
            assert torch.equal(run(pipe, callback_on_step_end=preview), plain)
    messages = [record.message for record in caplog.records if "no such thing" in record.message]
    assert len(messages) == 1 and error.__name__ in messages[0]
    assert what == "previewer" or "the 50% sink failed" in messages[0]
    assert shown.count(NUM_STEPS - 1) == (0 if what == "previewer" else 2)


@pytest.mark.parametrize("call", ["wait", "close"])
def test_a_sink_that_waits_for_itself_is_told(call, pipe, caplog):
    pipe.scheduler = build_scheduler("DDIMScheduler")
    with caplog.at_level(logging.WARNING):
        preview = LatentPreviewCallback(pipe, linear, lambda image, step: getattr(preview, call)())
        run(pipe, callback_on_step_end=preview)
        preview.close()
    assert "waits for the thread that it runs on" in caplog.text


def test_a_wrong_size_of_packed_latents_is_logged_with_the_remedy(caplog):
    pipe = flux_pipeline(build_codec(shift_factor=0.1))
    size = {"height": 48, "width": 16}
    preview = LatentPreviewCallback(pipe, linear, nowhere, height=16, width=32)
    with caplog.at_level(logging.WARNING), preview:
        pooled = torch.zeros(2, 8)
        run(pipe, callback_on_step_end=preview, pooled_prompt_embeds=pooled, num_inference_steps=2, **size)
    (message,) = [record.message for record in caplog.records if "preview" in record.message]
    assert "expected 1 x 2 tokens, got 3; give LatentPreviewCallback the height and width" in message


class SomebodysScheduler:
    """Knows only how to step."""

    config = diffusers.configuration_utils.FrozenDict()
    timesteps = torch.arange(3.0)

    def step(self, model_output, timestep, sample):
        return sample - model_output


class Loop:
    scheduler = SomebodysScheduler()


def test_x_t_is_a_copy_too():
    seen, may_decode, latents = [], threading.Event(), torch.ones(1, 4, 4, 4)

    def late(x):
        may_decode.wait()
        seen.append(x)
        return linear(x)

    with LatentPreviewCallback(Loop(), late, nowhere) as preview:
        preview(Loop, 0, 2, {"latents": latents})
        latents.zero_()
        may_decode.set()
    assert seen[0].min() == 1


def test_x_t_is_shown_where_x_0_is_unknown_and_called_so(caplog):
    images, latents = [], torch.randn(1, 4, 4, 4)
    seen = []
    with (
        caplog.at_level(logging.WARNING),
        LatentPreviewCallback(
            Loop(), lambda x: seen.append(x) or linear(x), lambda image, step: images.append(image)
        ) as preview,
    ):
        for step in range(3):
            preview(Loop, step, 2 - step, {"latents": latents})
            preview.wait()
        preview(Loop, 0, 2, {})
    assert [image.info["shows"] for image in images] == ["x_t"] * 3
    assert all(torch.equal(each, latents) for each in seen)
    message, missing = [record.message for record in caplog.records]
    assert message == "Previews with SomebodysScheduler show the noisy x_t: x_0 is not known of it."
    assert "gave no latents; name them in callback_on_step_end_tensor_inputs" in missing


def test_a_scheduler_that_came_later_is_observed_from_its_second_step(pipe, caplog):
    pipe.scheduler = build_scheduler("DDIMScheduler")
    infos = []
    with (
        caplog.at_level(logging.WARNING),
        LatentPreviewCallback(pipe, linear, lambda image, step: infos.append(image.info)) as preview,
    ):
        pipe.scheduler = build_scheduler("EulerDiscreteScheduler")

        def waiting(*args):
            kwargs = preview(*args)
            preview.wait()
            return kwargs

        run(pipe, callback_on_step_end=waiting)
    assert [info["shows"] for info in infos] == ["x_t"] + ["x_0"] * (NUM_STEPS - 1)
    messages = [record.message for record in caplog.records if "x_t" in record.message]
    assert messages == [
        "Previews with EulerDiscreteScheduler show the noisy x_t: this step of it was not observed."
    ]
    assert "step" not in vars(pipe.scheduler)


def test_the_scheduler_is_as_before_once_a_callback_is_closed_or_gone(pipe):
    pipe.scheduler = build_scheduler("DDIMScheduler")
    run(pipe, callback_on_step_end=LatentPreviewCallback(pipe, linear, nowhere))
    gc.collect()
    assert "step" not in vars(pipe.scheduler)

    preview = LatentPreviewCallback(pipe, linear, nowhere)
    with pytest.raises(KeyboardInterrupt), preview:

        def interrupted(pipe, step, timestep, kwargs):
            if step == 2:
                raise KeyboardInterrupt
            return preview(pipe, step, timestep, kwargs)

        run(pipe, callback_on_step_end=interrupted)
    assert "step" not in vars(pipe.scheduler)


class Counting(PipelineCallback):
    tensor_inputs = ("prompt_embeds",)

    def callback_fn(self, pipeline, step_index, timesteps, callback_kwargs):
        assert {"latents", "prompt_embeds"} <= callback_kwargs.keys()
        return callback_kwargs


def test_one_callback_serves_several_runs_also_next_to_others(pipe):
    pipe.scheduler = build_scheduler("DDIMScheduler")
    infos = []
    preview = LatentPreviewCallback(pipe, linear, lambda image, step: infos.append(image.info))
    together = MultiPipelineCallbacks([Counting(), preview])
    for _ in range(2):
        infos.clear()
        run(pipe, callback_on_step_end=together)
        preview.wait()
        assert infos[0]["shows"] == "x_0" and infos[-1]["step"] == NUM_STEPS - 1
        assert {info["shows"] for info in infos} == {"x_0"}


def test_an_interrupted_run_ends_and_the_next_starts_anew():
    steps, ended, shown = Steps(6), [], []

    class Sink:
        def __call__(self, image, step):
            shown.append(step)

        def finish(self):
            ended.append(len(shown))

    with LatentPreviewCallback(steps, linear, Sink()) as preview:
        steps.run(preview, stop_after=3, after_each=preview.wait)
        assert ended == []
        steps.run(preview, after_each=preview.wait)
        preview.wait()
        assert ended == [3, 9]
    assert ended == [3, 9] and shown == [0, 1, 2, *range(6)]


def test_the_last_step_before_an_interruption_is_shown_and_ends_the_run(pipe):
    ended, shown = [], []

    class Sink:
        def __call__(self, image, step):
            shown.append(step)

        def finish(self):
            ended.append(len(shown))

    pipe.scheduler = build_scheduler("DDIMScheduler")
    preview = LatentPreviewCallback(pipe, linear, Sink(), every_steps=4)

    def stop(pipe, step, timestep, kwargs):
        pipe._interrupt = step == 2
        return preview(pipe, step, timestep, kwargs)

    run(pipe, callback_on_step_end=stop)
    preview.wait()
    assert shown[-1] == 2 and ended == [len(shown)]


PROGRAM = """
import sys, time, types
import latent_codec
from latent_codec import models
assert not {"torch", "diffusers"} & sys.modules.keys()
models.autoencoder_vq.AutoencoderVQ  # a deferred module imports its libraries
import latent_codec.cli.train
import torch, diffusers
from latent_codec.pipelines import AnimatedWebP, LatentPreviewCallback
pipe = types.SimpleNamespace(scheduler=diffusers.DDIMScheduler())
pipe.scheduler.set_timesteps(4)
latents = torch.randn(1, 3, 4, 4)
def previewer(latents):
    time.sleep(0.3)
    return latents.tanh()
preview = LatentPreviewCallback(pipe, previewer, AnimatedWebP(sys.argv[1]))
for step, timestep in enumerate(pipe.scheduler.timesteps):
    latents = pipe.scheduler.step(torch.randn(1, 3, 4, 4), timestep, latents).prev_sample
    preview(pipe, step, timestep, {"latents": latents})
"""


def test_a_program_that_ends_at_once_still_writes_what_was_shown(tmp_path):
    run_fresh(PROGRAM, tmp_path / "run.webp")
    assert Image.open(tmp_path / "run.webp").n_frames >= 2


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((None, linear, nowhere), {}, "pipe is a NoneType without a scheduler"),
        (("pipe", None, nowhere), {}, "previewer is a NoneType and sink"),
        (("pipe", linear, "run.webp"), {}, "sink 'run.webp'; give functions"),
        (("pipe", linear, []), {}, r"sink \[\]; give functions"),
        (
            ("pipe", linear, nowhere),
            {"every_steps": 0},
            "every_steps is 0 and every_milliseconds 0; they start at 1",
        ),
        (("pipe", linear, nowhere), {"every_milliseconds": -1}, "every_milliseconds -1"),
        (("pipe", linear, nowhere), {"height": 64}, "height is 64 and width None; give both or neither"),
    ],
)
def test_what_is_refused(arguments, options, message, pipe):
    arguments = [pipe if argument == "pipe" else argument for argument in arguments]
    with pytest.raises(ValueError, match=message):
        LatentPreviewCallback(*arguments, **options)
