"""A whole training: data, network, loop and what it leaves. The verb `train` calls `train`, and so may a program."""

import logging
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from accelerate import PartialState

from latent_codec.codec import LatentCodec
from latent_codec.errors import SettingError
from latent_codec.images.decoding import printable
from latent_codec.images.sources import open_source, open_stream
from latent_codec.training import loop
from latent_codec.training.build import load_codec
from latent_codec.training.config import TrainingConfig, load_config
from latent_codec.training.data import first_images
from latent_codec.training.finish import is_finished
from latent_codec.training.prior_data import open_codes
from latent_codec.training.processes import on_cpu
from latent_codec.training.run_lock import lock_run
from latent_codec.training.stopping import check_minutes

logger = logging.getLogger(__name__)

FIRST_IMAGES = 64
"""Of a stream, at least, that stand for it in samples, calibration and a linear start."""

Showing = Callable[[str], AbstractContextManager[Callable[..., None]]]


@dataclass(frozen=True, kw_only=True)
class TrainedRun:
    """What `train` did.

    Args:
        folder: what was trained, as its class's `from_pretrained` opens it: of the averaged weights, so far after a stop.
        step: the last step that was made, of `num_steps`.
        finished: whether all steps are made.
        was_finished: whether they were before, so that nothing was done.
        signal: the signal that stopped the run; None: none did.
        is_main_process: False in the other processes of a training in several, which say nothing.
    """

    folder: Path
    step: int
    num_steps: int
    finished: bool
    was_finished: bool
    signal: int | None
    is_main_process: bool


def _in_silence(phase: str) -> AbstractContextManager[Callable[..., None]]:
    return nullcontext(lambda *done: None)


def train(
    preset: str | os.PathLike,
    data: str | os.PathLike | Sequence[str | os.PathLike],
    out: str | os.PathLike | None = None,
    *,
    settings: Sequence[str] = (),
    codec: str | None = None,
    pipeline: str | None = None,
    reference: str | None = None,
    target: str | None = None,
    split: str = "train",
    stream: bool = False,
    minutes: float | None = None,
    trackers: Sequence[str] = (),
    showing: Showing = _in_silence,
) -> TrainedRun:
    """Train what a preset describes; the same call goes on with a run that was stopped or killed.

        latent_codec.train("sd-f8c4", "photos/", "runs/mine", settings=["run.steps=5000"])

    Args:
        preset: a shipped preset's name, or a .toml file.
        data: a folder of images, tars, an IDX folder or "hf:owner/name"; several in a list.
        out: the run folder; None: runs/ and the preset's name.
        settings: overrides, such as "run.steps=500".
        codec: the codec to start from or to learn from; None: the preset's.
        reference: the codec whose latents the trained ones stay near, of an objective with a `reference_weight`.
        target: the codec whose latents a translator gives, from those of `codec`.
        pipeline: the class name of the pipeline whose latents the codec's are to be; None: the preset's, or as
            `LatentCodec.from_pretrained` takes them.
        split: of data that has splits.
        stream: read "hf:owner/name" while training, without downloading it first.
        minutes: checkpoint and stop after this many; None: at the last step.
        trackers: accelerate's names, such as "tensorboard".
        showing: makes a context of a phase's name, which yields a function of (done, total); None is shown by default.

    Raises:
        ValueError: if preset, settings, data and run folder do not fit, or the loss is not finite.
        OSError: if the run folder cannot be written, or is another process's.
    """
    config = load_config(preset, list(settings), codec, pipeline, reference, target)
    names = [os.fspath(each) for each in ([data] if isinstance(data, (str, os.PathLike)) else data)]
    if not names:
        raise SettingError("data", "a folder of images, tars, an IDX folder or hf:owner/name")
    check_minutes(minutes)
    if stream:
        loop.check_streams(config)
    if stream and len(names) > 1:
        raise SettingError("data", "one dataset, hf:owner/name, to stream", ", ".join(names))
    out = Path(out or Path("runs") / Path(preset).name.removesuffix(".toml"))
    with lock_run(out):
        with showing("preparing the training"):
            learned = load_codec(config)
            source, streamed = _open_data(config, names, out, learned, split, stream, showing)
            network = config.kind.load("build")(config, source, learned)
        data_name = ", ".join(map(_name, names))
        result = loop.train(
            config,
            network,
            source,
            out,
            codec=learned,
            stream=streamed,
            trackers=tuple(trackers),
            max_minutes=minutes,
            data_name=data_name,
        )
        config, was_finished = result.config, False
        if result.is_main_process:
            if result.skipped:
                some = ", ".join(result.skipped[:5]) + (", ..." if len(result.skipped) > 5 else "")
                logger.warning("%d image(s) could not be read: %s", len(result.skipped), some)
            was_finished = result.finished and is_finished(config, out, result.step)
            if result.finished and not was_finished:
                with showing("finishing the run") as on_progress:
                    finish = config.kind.load("finish")
                    finish(config, result.network, source, out, data_name=data_name, on_progress=on_progress)
        return TrainedRun(
            folder=out / config.kind.folder,
            step=result.step,
            num_steps=config.run.steps,
            finished=result.finished,
            was_finished=was_finished,
            signal=result.signal,
            is_main_process=result.is_main_process,
        )


def _open_data(
    config: TrainingConfig,
    data: list[str],
    out: Path,
    codec: LatentCodec | None,
    split: str,
    stream: bool,
    showing: Showing,
):
    """The images, or their codes, and the stream if there is to be one; then the images are its first."""
    if config.kind.learns_codes:  # computed by the main process where there are none yet
        with PartialState(cpu=on_cpu()).main_process_first(), showing("encoding") as on_progress:
            return open_codes(config, data, out, codec, split=split, on_progress=on_progress), None
    if not stream:
        value_range, axis = config.data.value_range, config.data.axis
        return open_source(data, split=split, value_range=value_range, axis=axis), None
    streamed = open_stream(data[0], split=split)
    count = max(config.run.calibration_images, FIRST_IMAGES)
    logger.warning(
        "samples and calibration take the first %d images of the stream, whose length is not known", count
    )
    return first_images(streamed, count, name=data[0]), streamed


def _name(data: str) -> str:
    """Data as the model card names it: without this machine's folders."""
    path = Path(data.removeprefix("hf:"))
    is_name = data.startswith(("hf:", "shapes:")) and not path.exists()
    return printable(data if is_name else path.resolve().name)
