"""The training loop: one function, phase by phase."""

import dataclasses
import logging
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from accelerate.utils import (
    DistributedDataParallelKwargs,
    ProjectConfiguration,
    broadcast_object_list,
    gather_object,
)
from torch import Tensor, distributed, nn

from latent_codec.codec import LatentCodec
from latent_codec.errors import SettingError
from latent_codec.training import checkpoints
from latent_codec.training.build import load_codec
from latent_codec.training.config import TrainingConfig
from latent_codec.training.optimization import learning_rate, set_learning_rate
from latent_codec.training.processes import is_main_process, on_cpu
from latent_codec.training.report import Journal, NonFiniteLossError
from latent_codec.training.resolution import resolve
from latent_codec.training.run_folder import open_run
from latent_codec.training.run_lock import lock_run
from latent_codec.training.stopping import StopRequest
from latent_codec.training.task import TaskInputs

__all__ = ["NonFiniteLossError", "TrainingResult", "train"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingResult:
    """How a call of `train` ended."""

    network: nn.Module
    """The moving average's weights, on the training device, in eval mode."""
    step: int
    """Steps done."""
    finished: bool
    """False if it was stopped before `run.steps`; the same call then goes on."""
    signal: int | None
    """The number of the signal that stopped it; None if none did."""
    skipped: tuple[str, ...]
    """Names of images that could not be read, by any process, since this call began."""
    is_main_process: bool
    """True in the process that writes files."""
    config: TrainingConfig
    """As it was run: precision and numbers of steps decided."""


def train(
    config: TrainingConfig,
    network: nn.Module,
    source,
    out: str | Path,
    *,
    codec: LatentCodec | None = None,
    stream=None,
    trackers: tuple[str, ...] = (),
    max_minutes: float | None = None,
    data_name: str = "unnamed data",
) -> TrainingResult:
    """Train `network` in place, resuming from the newest checkpoint in `out`.

    With each checkpoint the averaged weights go into OUT/codec, OUT/prior and so on (training/finish.py). Under several
    processes each calls this with the same arguments.

    Args:
        config: all that decides the result.
        network: new or pretrained, float32: what training/build.py makes of the configuration.
        source: what to train on: EncodedImages for kinds that learn codes, else an ImageSource. With a `stream`, its
            first images, for samples and a linear start.
        out: the run folder; made if need be.
        codec: the codec to learn from, where it is at hand; None: loaded as the configuration names it.
        stream: a `datasets.IterableDataset` to train an autoencoder on, as `open_stream` gives it.
        trackers: accelerate's names, such as "tensorboard".
        max_minutes: checkpoint and stop after this long; None: when done.
        data_name: what model cards call the data.

    Raises:
        ValueError: if `out` holds a run of another configuration or another process trains in it, or this configuration
            cannot be run here.
        OSError: if the run folder cannot be written to, as on a full disk.
        NonFiniteLossError: naming step and term; the checkpoints before it stay.
    """
    out = Path(out)
    with lock_run(out):
        notes: list[str] = []
        device = "cpu" if on_cpu() else torch.accelerator.current_accelerator().type
        resolved = resolve(config, out, device, say=notes.append) if is_main_process() else None
        config = broadcast_object_list([resolved])[0]
        _check(config, network, stream)
        inputs = TaskInputs(source=source, codec=codec or load_codec(config), stream=stream)
        config.kind.load("task").check(config, network, inputs)

        settings = config.optimizer
        accelerator = _start_accelerator(config, out, trackers)
        images_per_step = settings.batch_size * settings.accumulation * accelerator.num_processes
        is_main = accelerator.is_main_process
        with accelerator.main_process_first():
            resume_from = open_run(out, config) if is_main else checkpoints.latest_checkpoint(out)
        if trackers:
            accelerator.init_trackers("latent-codec", config=_plain_settings(config))
        torch.manual_seed(config.run.seed)

        # Data, networks, optimizer.
        inputs = dataclasses.replace(inputs, resumes=resume_from is not None)
        task = config.kind.load("task")(config, network, inputs, accelerator)
        averaged, finish = task.ema.module, config.kind.load("finish")
        modules = {"model": task.objective, "ema": task.ema, **task.modules}
        optimizers = {"optimizer": task.optimizer}
        if accelerator.scaler is not None:
            optimizers["scaler"] = accelerator.scaler

        # Resumption.
        state = (
            checkpoints.load_checkpoint(resume_from, modules, optimizers) if inputs.resumes else {"step": 0}
        )
        step = state["step"]
        facts = {"images_per_step": images_per_step, "num_images": task.num_images}
        _check_resumption(state, facts, out)
        task.resume(state, out)
        batches = task.batches(step)
        for note in notes:  # only now: an error is one line
            logger.info(note)
        journal = Journal(
            accelerator,
            out,
            config,
            start=step,
            images_per_step=images_per_step,
            headline=task.headline,
            state=state.get("journal"),
        )
        signalled = None
        with StopRequest(max_minutes) as stop, journal:
            # Asks after every step whether any process is to stop, without waiting for the device.
            asking = distributed.new_group(backend="gloo") if accelerator.num_processes > 1 else None
            while step < config.run.steps:
                # Gradients, over the micro-batches.
                task.begin_step(step)
                task.model.train()
                micro_terms = [
                    task.accumulate(next(batches), step, last=micro == settings.accumulation - 1)
                    for micro in range(settings.accumulation)
                ]
                terms = _mean_over_processes(accelerator, micro_terms)

                # Update.
                terms["gradient_norm"] = accelerator.clip_grad_norm_(
                    task.trained, settings.clip_norm or math.inf
                )
                rate = learning_rate(step, settings, config.run.steps)
                set_learning_rate(task.optimizer, rate)
                task.optimizer.step()
                task.optimizer.zero_grad()
                step += 1

                # Moving average, and what learns without gradients.
                terms |= task.end_step(step)

                # Status.
                looks = step % config.run.sample_every == 0 or step == config.run.steps
                if looks and is_main:
                    terms |= task.measure()
                journal.record(step, terms, rate)
                if looks:
                    journal.settle()
                if looks and is_main:
                    task.write_samples(out / "samples" / f"{step:08d}.png")

                # Checkpoint, stop.
                stopping, signalled = _any_process(stop, asking)
                if step % config.run.checkpoint_every == 0 or step == config.run.steps or stopping:
                    journal.settle()  # weights of a step that is not finite are not written
                    state = {**facts, "journal": journal.state_dict(), **task.state_dict()}
                    if is_main:
                        checkpoints.save_checkpoint(
                            out, step, modules, optimizers, keep=config.run.keep_checkpoints, state=state
                        )
                        finish(config, averaged, inputs.source, out, data_name=data_name, unfinished_at=step)
                        task.write_companions(out)
                    accelerator.wait_for_everyone()
                if stopping:
                    break

        task.check_end()
        skipped = gather_object(task.skipped)
        # With its wrappers alive torch 2.6 can wait for ever when the group of processes ends.
        del batches, optimizers, asking
        task.release()
        accelerator.free_memory()
        accelerator.end_training()
        return TrainingResult(
            averaged.eval(),
            step,
            step >= config.run.steps,
            signalled,
            tuple(dict.fromkeys(skipped)),
            is_main,
            config,
        )


def _check(config: TrainingConfig, network: nn.Module, stream) -> None:
    """Refuse a network or data that this kind of training does not take."""
    kind = config.kind
    is_free = kind.takes_any_class and config.model.pretrained
    if not is_free and not any(each.__name__ in kind.model_classes for each in type(network).__mro__):
        raise ValueError(
            f"model.class_name is {config.model.class_name}, which trains a {' or '.join(kind.model_classes)}; "
            f"expected one, got a {type(network).__name__}."
        )
    if stream is not None:
        check_streams(config)


def check_streams(config: TrainingConfig) -> None:
    """Refuse a stream where this kind of training takes none.

    Raises:
        SettingError: if so.
    """
    if not config.kind.streams:
        expected = f"none for {config.model.class_name}, which trains on data at hand"
        raise SettingError("stream", expected, True)


def _start_accelerator(config: TrainingConfig, out: Path, trackers: tuple[str, ...]) -> Accelerator:
    if config.run.precision == "fp16" and on_cpu():
        # Accelerate would leave it out in silence.
        raise config.error("run.precision", '"bf16" or "fp32" on a CPU')
    available = [str(tracker) for tracker in get_available_trackers()]
    for tracker in trackers:
        if tracker not in available:
            raise SettingError(
                "trackers",
                f"one that accelerate knows and that is installed ({', '.join(available) or 'none is'})",
                tracker,
                advice="tensorboard is part of latent-codec[train]",
            )
    AcceleratorState._reset_state()  # or an earlier run in this process would fix the precision for all
    # Of a video autoencoder's decoder, say, a still image does not reach all weights.
    unreached = DistributedDataParallelKwargs(find_unused_parameters=config.model.train == "decoder")
    return Accelerator(
        cpu=on_cpu(),
        kwargs_handlers=[unreached],
        mixed_precision={"fp32": "no"}.get(config.run.precision, config.run.precision),
        log_with=list(trackers) or None,
        project_config=ProjectConfiguration(project_dir=str(out), logging_dir=str(out)),
    )


def _plain_settings(config: TrainingConfig) -> dict[str, bool | int | float | str]:
    return {
        f"{section}.{key}": value if isinstance(value, (bool, int, float, str)) else str(value)
        for section, values in config.to_dict().items()
        for key, value in values.items()
    }


def _check_resumption(state: dict, facts: dict, out: Path) -> None:
    """Refuse to go on with other data or other steps than the checkpoint's."""
    for name, now in facts.items():
        if state.get(name, now) != now:
            raise SettingError(
                "run_folder",
                f"the folder of a run with {name} = {now}",
                f"{out}, which was trained with {name} = {state[name]}",
                advice="give the same `data`, number of processes and batch, or another `run_folder`",
            )


def _mean_over_processes(
    accelerator: Accelerator, micro_terms: list[dict[str, Tensor]]
) -> dict[str, Tensor | float]:
    """Each term's mean over micro-batches and processes, on the device."""
    stacked = torch.stack([torch.stack(list(terms.values())) for terms in micro_terms]).mean(0)
    return dict(zip(micro_terms[0], accelerator.reduce(stacked, reduction="mean")))


def _any_process(stop: StopRequest, group) -> tuple[bool, int | None]:
    """Whether any process of the group is to stop, and the highest number of the signals that they got."""
    mine = torch.tensor([int(stop.requested), stop.signal or 0])
    if group is not None:
        distributed.all_reduce(mine, distributed.ReduceOp.MAX, group=group)
    requested, number = mine.tolist()
    return bool(requested), number or None
