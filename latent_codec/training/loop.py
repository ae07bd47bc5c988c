"""The training loop: one function, whose phases stand in order."""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from accelerate.utils import ProjectConfiguration, broadcast_object_list, gather_object
from torch import Tensor, nn

from latent_codec.models.autoregressive import AutoregressivePrior
from latent_codec.models.classifier import ImageClassifier
from latent_codec.models.context_network import IndexContext, LatentContext
from latent_codec.models.tiny_decoder import TinyDecoder
from latent_codec.training import checkpoints, report
from latent_codec.training.autoencoder_task import AutoencoderTask, check_autoencoder
from latent_codec.training.classifier_task import ClassifierTask, check_classifier
from latent_codec.training.config import TrainingConfig
from latent_codec.training.entropy_task import EntropyTask, check_entropy_network
from latent_codec.training.finish import write_so_far
from latent_codec.training.optimization import learning_rate, set_learning_rate
from latent_codec.training.prior_task import PriorTask, check_prior
from latent_codec.training.processes import on_cpu
from latent_codec.training.resolution import resolve
from latent_codec.training.run_folder import open_run
from latent_codec.training.run_lock import lock_run
from latent_codec.training.stopping import StopRequest
from latent_codec.training.task import Task
from latent_codec.training.tiny_decoder_task import TinyDecoderTask, check_tiny_decoder


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


class NonFiniteLossError(ArithmeticError):
    """A loss term became NaN or infinite."""


def train(
    config: TrainingConfig,
    network: nn.Module,
    source,
    out: str | Path,
    *,
    stream=None,
    trackers: tuple[str, ...] = (),
    max_minutes: float | None = None,
    data_name: str = "data that nobody named",
) -> TrainingResult:
    """Train `network` in place, resuming from the newest checkpoint in `out`.

    With each checkpoint the averaged weights go into `out`/codec, `out`/prior and so on (training/finish.py). Under several processes each calls this with the same arguments.

    Args:
        config: all that decides the result.
        network: new or pretrained, float32: what training/build.py makes of the configuration.
        source: what to train on: an ImageSource for autoencoders, classifiers, previews and priors over pixels,
            EncodedImages for other priors. With a `stream`, its first images, for samples and a linear start.
        out: the run folder; made if need be.
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
    task_class, check = _task_of(network)
    with lock_run(out):
        notes: list[str] = []
        config = _resolved(config, out, notes)
        check(config, network, source, stream)
        return _train(
            config, network, source, out, task_class, stream, trackers, max_minutes, data_name, notes
        )


def _train(
    config: TrainingConfig,
    network: nn.Module,
    source,
    out: Path,
    task_class: type[Task],
    stream,
    trackers: tuple[str, ...],
    max_minutes: float | None,
    data_name: str,
    notes: list[str],
) -> TrainingResult:
    """`train`, of a configuration that is resolved and checked, in a run folder that is locked."""
    settings = config.optimizer
    accelerator = _start_accelerator(config, out, trackers)
    images_per_step = settings.batch_size * settings.accumulation * accelerator.num_processes
    resume_from = _claim_run(accelerator, out, config)
    if trackers:
        accelerator.init_trackers("latent-codec", config=_plain_settings(config))
    torch.manual_seed(config.run.seed)

    # Data, networks, optimizer.
    resumes = resume_from is not None
    task = task_class(config, network, source, accelerator, stream=stream, resumes=resumes)
    modules = {"model": task.objective, "ema": task.ema, **task.modules}
    optimizer = task.prepare()
    optimizers = {"optimizer": optimizer}
    if accelerator.scaler is not None:
        optimizers["scaler"] = accelerator.scaler

    # Resumption.
    state = checkpoints.load_checkpoint(resume_from, modules, optimizers) if resumes else {"step": 0}
    step = state["step"]
    facts = {"images_per_step": images_per_step, "num_images": task.num_images}
    _check_resumption(state, facts, out)
    task.resume(state, out)
    batches = task.batches(step)
    for note in notes:  # only now: an error is one line
        print(note, file=sys.stderr)
    journal = report.Journal(
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
        while step < config.run.steps:
            # Gradients, over the micro-batches.
            task.begin_step(step)
            task.model.train()
            micro_terms = [
                task.accumulate(next(batches), step, last=micro == settings.accumulation - 1)
                for micro in range(settings.accumulation)
            ]
            mean_terms = _mean_over_processes(accelerator, micro_terms)
            _check_finite(mean_terms, step, out)

            # Update.
            norm = float(accelerator.clip_grad_norm_(task.trained, settings.clip_norm or math.inf))
            if accelerator.scaler is None:
                _check_finite({"gradient_norm": norm}, step, out)
            if math.isfinite(norm):  # float16's scaler leaves out a step that overflowed, and scales less
                mean_terms["gradient_norm"] = norm
            rate = learning_rate(step, settings, config.run.steps)
            set_learning_rate(optimizer, rate)
            optimizer.step()
            optimizer.zero_grad()
            step += 1

            # Moving average, and what learns without gradients.
            task.end_step(step, mean_terms)

            # Status.
            looks = step % config.run.sample_every == 0 or step == config.run.steps
            if accelerator.is_main_process and looks:
                mean_terms |= task.measure()
            journal.record(step, mean_terms, rate)
            if accelerator.is_main_process and looks:
                task.write_samples(out / "samples" / f"{step:08d}.png")

            # Checkpoint, stop.
            stopping, signalled = _any_process(accelerator, stop)
            if step % config.run.checkpoint_every == 0 or step == config.run.steps or stopping:
                state = {**facts, "journal": journal.state_dict(), **task.state_dict()}
                if accelerator.is_main_process:
                    checkpoints.save_checkpoint(
                        out, step, modules, optimizers, keep=config.run.keep_checkpoints, state=state
                    )
                    write_so_far(config, task.ema.module, out, step, data_name=data_name)
                accelerator.wait_for_everyone()
            if stopping:
                break

    task.check_end()
    skipped = gather_object(task.skipped)
    is_main_process = accelerator.is_main_process
    # With its wrappers alive torch 2.6 can wait for ever when the group of processes ends.
    del batches, optimizer, optimizers
    task.release()
    accelerator.free_memory()
    accelerator.end_training()
    return TrainingResult(
        task.ema.module.eval(),
        step,
        step >= config.run.steps,
        signalled,
        tuple(dict.fromkeys(skipped)),
        is_main_process,
        config,
    )


def _task_of(network: nn.Module):
    """The task that trains such a network, and what checks its configuration."""
    if isinstance(network, AutoregressivePrior):
        return PriorTask, check_prior
    if isinstance(network, ImageClassifier):
        return ClassifierTask, check_classifier
    if isinstance(network, TinyDecoder):
        return TinyDecoderTask, check_tiny_decoder
    if isinstance(network, (LatentContext, IndexContext)):
        return EntropyTask, check_entropy_network
    return AutoencoderTask, check_autoencoder


def _resolved(config: TrainingConfig, out: Path, notes: list[str]) -> TrainingConfig:
    """`resolve`, by the main process for all; it gets the `notes`."""
    device = "cpu" if on_cpu() else torch.accelerator.current_accelerator().type
    is_main_process = PartialState(cpu=on_cpu()).is_main_process
    resolved = resolve(config, out, device, say=notes.append) if is_main_process else None
    return broadcast_object_list([resolved])[0]


def _start_accelerator(config: TrainingConfig, out: Path, trackers: tuple[str, ...]) -> Accelerator:
    if config.run.precision == "fp16" and on_cpu():
        # Accelerate would leave it out in silence.
        raise ValueError('run.precision = "fp16" needs a GPU: set "bf16" or "fp32" to train on this CPU.')
    available = [str(tracker) for tracker in get_available_trackers()]
    for tracker in trackers:
        if tracker not in available:
            raise ValueError(
                f"the tracker {tracker!r} is not installed, or unknown to accelerate. "
                f"Here are: {', '.join(available) or 'none'}; tensorboard comes with latent-codec[train]."
            )
    AcceleratorState._reset_state()  # or an earlier run in this process would fix the precision for all
    return Accelerator(
        cpu=on_cpu(),
        mixed_precision={"fp32": "no"}.get(config.run.precision, config.run.precision),
        log_with=list(trackers) or None,
        project_config=ProjectConfiguration(project_dir=str(out), logging_dir=str(out)),
    )


def _claim_run(accelerator: Accelerator, out: Path, config: TrainingConfig) -> Path | None:
    """`open_run`, by the main process first."""
    with accelerator.main_process_first():
        if accelerator.is_main_process:
            open_run(out, config)
    return checkpoints.latest_checkpoint(out)


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
            raise ValueError(
                f"{out} was trained with {name} = {state[name]}, which is {now} now: give the same --data, number of "
                "processes and batch, or another --out."
            )


def _mean_over_processes(accelerator: Accelerator, micro_terms: list[dict[str, Tensor]]) -> dict[str, float]:
    stacked = torch.stack([torch.stack(list(terms.values())) for terms in micro_terms]).mean(0)
    values = accelerator.reduce(stacked, reduction="mean").tolist()
    return dict(zip(micro_terms[0], values))


def _check_finite(terms: dict[str, float], step: int, out: Path) -> None:
    bad = [name for name, value in terms.items() if not math.isfinite(value)]
    if bad:
        last = checkpoints.latest_checkpoint(out)
        kept = f"The last good checkpoint is {last}" if last else "There is no checkpoint yet"
        raise NonFiniteLossError(
            f"step {step}: {', '.join(bad)} is not finite. {kept}. A run in another --out with a lower "
            'optimizer.learning_rate, or run.precision = "fp32", may go further.'
        )


def _any_process(accelerator: Accelerator, stop: StopRequest) -> tuple[bool, int | None]:
    """Whether any process is to stop, and the highest number of the signals that they got."""
    if accelerator.num_processes == 1:
        return stop.requested, stop.signal
    mine = torch.tensor([int(stop.requested), stop.signal or 0], device=accelerator.device)
    requested, number = accelerator.gather(mine).view(-1, 2).amax(0).tolist()
    return bool(requested), number or None
