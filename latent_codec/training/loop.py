"""The training loop: one function, whose phases stand in order."""

import contextlib
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from accelerate.utils import ProjectConfiguration, broadcast, gather_object
from torch import Tensor
from torch.utils.data import DataLoader

from latent_codec.latent_space import LatentSpace, side_multiple
from latent_codec.metrics import LPIPS_MIN_SIDE
from latent_codec.models.autoencoder_vq import AutoencoderVQ
from latent_codec.models.discriminator import PatchDiscriminator, min_side
from latent_codec.models.hierarchical_vq import HierarchicalVQ
from latent_codec.models.initialization import initialize_codebooks, initialize_linear_code
from latent_codec.models.quantizers import CodebookLearner
from latent_codec.picture_sources import PictureSource
from latent_codec.training import checkpoints, losses, report
from latent_codec.training.build import Autoencoder
from latent_codec.training.config import TrainingConfig
from latent_codec.training.data import PositionSampler, StreamedCrops, TrainingCrops
from latent_codec.training.objective import AutoencoderObjective, ObjectiveTerms, level_suffixes
from latent_codec.training.optimization import (
    build_optimizer,
    learning_rate,
    moving_average,
    set_learning_rate,
)
from latent_codec.training.processes import emulates_bfloat16, on_cpu
from latent_codec.training.run_folder import open_run
from latent_codec.training.stopping import StopRequest, ignore_interrupts

_NOISE = 3  # stream of randomness beside the data's own, under the same seed
_LINEAR_START_CROPS = 64


@dataclass(frozen=True)
class TrainingResult:
    """How a call of `train` ended."""

    autoencoder: Autoencoder
    """The moving average's weights, on the training device, in eval mode."""
    step: int
    """Steps done."""
    finished: bool
    """False if it was stopped before `run.steps`; the same call then goes on."""
    skipped: tuple[str, ...]
    """Names of pictures that could not be read, by any process, since this call began."""
    is_main_process: bool
    """True in the process that writes files."""


class NonFiniteLossError(ArithmeticError):
    """A loss term became NaN or infinite."""


def train(
    config: TrainingConfig,
    autoencoder: Autoencoder,
    source: PictureSource,
    out: str | Path,
    *,
    stream=None,
    trackers: tuple[str, ...] = (),
    max_minutes: float | None = None,
) -> TrainingResult:
    """Train `autoencoder` in place, resuming from the newest checkpoint in `out`.

    Under several processes each calls this with the same arguments.

    Args:
        config: all that decides the result.
        autoencoder: new or pretrained, float32.
        source: pictures to train on; with a `stream`, its first ones, for samples and a linear start.
        out: the run folder; made if need be.
        stream: a `datasets.IterableDataset` to train on, as `open_stream` gives it.
        trackers: accelerate's names, such as "tensorboard".
        max_minutes: checkpoint and stop after this long; None: when done.

    Raises:
        ValueError: if `out` holds a run of another configuration, or this one cannot be run here.
        OSError: if the run folder cannot be written to, as on a full disk.
        NonFiniteLossError: naming step and term; the checkpoints before it stay.
    """
    out = Path(out)
    settings, objective_config = config.optimizer, config.objective
    is_discrete = hasattr(autoencoder, "quantizers")
    _check_fit(config, autoencoder, stream)
    accelerator = _start_accelerator(config, out, trackers)
    if accelerator.is_main_process and config.run.precision == "bf16" and on_cpu() and emulates_bfloat16():
        print(
            "this CPU has no bfloat16 arithmetic, and emulates it at about a third of float32's speed: "
            "begin with --set run.precision=fp32",
            file=sys.stderr,
        )
    pictures_per_step = settings.batch_size * settings.accumulation * accelerator.num_processes
    resume_from = _claim_run(accelerator, out, config)
    if trackers:
        accelerator.init_trackers("latent-codec", config=_plain_settings(config))
    torch.manual_seed(config.run.seed)

    # Data.
    crops = TrainingCrops(
        source,
        size=config.data.size,
        channels=autoencoder.config.in_channels,
        seed=config.run.seed,
        flip=config.data.flip,
        scale=config.data.scale,
        pad_small=config.data.pad_small,
        by_area=config.data.by_area,
        cache_bytes=int(config.data.cache_gigabytes * 2**30),
    )
    streamed = None if stream is None else _streamed_crops(stream, crops, accelerator)

    # Networks.
    if config.model.initialization == "linear" and resume_from is None:
        images = _first_crops(crops, config.codebook.kmeans_crops if is_discrete else _LINEAR_START_CROPS)
        initialize_linear_code(autoencoder, images, anchor=config.model.anchor)
    autoencoder.to(accelerator.device).train()
    if config.run.gradient_checkpointing:
        autoencoder.enable_gradient_checkpointing()
    train_encoder = config.model.train == "all"
    frozen = {} if train_encoder else _freeze_encoder(autoencoder)
    ema = moving_average(autoencoder, settings.ema_decay)
    objective = AutoencoderObjective(autoencoder, objective_config, train_encoder=train_encoder)
    modules = {"model": objective, "ema": ema}
    learners = _codebook_learners(config, autoencoder)
    if learners:
        modules["codebooks"] = learners.to(accelerator.device)
    discriminator = None
    if objective_config.gan_weight:
        discriminator = modules["discriminator"] = PatchDiscriminator(
            autoencoder.config.in_channels,
            objective_config.discriminator_width,
            objective_config.discriminator_layers,
        ).to(accelerator.device)
    terms_of = ObjectiveTerms(
        objective,
        codebook_weight=config.codebook.weight,
        binarized=config.data.binarize,
        discriminator=discriminator,
        mean_over_processes=lambda tensor: accelerator.reduce(tensor, reduction="mean"),
    ).to(accelerator.device)

    # Optimizer.
    trained = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    judging = list(discriminator.parameters()) if discriminator is not None else []
    encoding = _encoder_parameters(autoencoder) if settings.encoder_factor != 1 else []
    model, optimizer = accelerator.prepare(
        objective, build_optimizer(trained, judging, settings, encoder=encoding)
    )
    judge = accelerator.prepare(discriminator) if discriminator is not None else None
    optimizers = {"optimizer": optimizer}
    if accelerator.scaler is not None:
        optimizers["scaler"] = accelerator.scaler

    # Resumption.
    state = checkpoints.load_checkpoint(resume_from, modules, optimizers) if resume_from else {"step": 0}
    step = state["step"]
    if frozen and not config.model.pretrained:
        frozen = _freeze_encoder(
            autoencoder
        )  # made from data at the first start, and the checkpoint's own since
    num_pictures = len(source) if stream is None else None
    facts = {"pictures_per_step": pictures_per_step, "num_pictures": num_pictures}
    _check_resumption(state, facts, autoencoder, frozen, out)
    if streamed is not None and "streams" in state:
        streamed.load_state_dict(state["streams"][accelerator.process_index])
    batches = _batches(crops, streamed, config, step, accelerator)
    latent_shape = _latent_shape(config, autoencoder)
    samples = report.SamplePictures(source, autoencoder.config.in_channels, config)
    journal = report.Journal(
        accelerator,
        out,
        config,
        start=step,
        pictures_per_step=pictures_per_step,
        state=state.get("journal"),
    )
    with StopRequest(max_minutes) as stop, journal:
        while step < config.run.steps:
            # Codebooks begin.
            if learners and step <= config.codebook.start_step:
                _begin_codebooks(config, step, autoencoder, ema.module, crops)

            # Gradients of the autoencoder, and of the discriminator, over the micro-batches.
            model.train()
            judged = judge is not None and step >= objective_config.gan_start
            micro_terms: list[dict[str, Tensor]] = []
            for micro in range(settings.accumulation):
                image, noisy, noise = _inputs(config, latent_shape, *next(batches), accelerator.device)
                last = micro == settings.accumulation - 1
                with contextlib.nullcontext() if last else accelerator.no_sync(model):
                    outputs = model(noisy, noise)
                    with accelerator.autocast():
                        terms = terms_of.autoencoder_loss(image, outputs, step)
                    accelerator.backward(terms["loss"] / settings.accumulation)
                if step >= config.codebook.start_step:
                    for learner, level in zip(learners, outputs.get("levels", [])):
                        learner.observe(level)
                if judged:
                    with contextlib.nullcontext() if last else accelerator.no_sync(judge):
                        judge_terms = terms_of.discriminator_loss(judge, image, outputs["reconstruction"])
                        accelerator.backward(judge_terms["discriminator"] / settings.accumulation)
                    terms |= judge_terms
                micro_terms.append({name: value.detach().float() for name, value in terms.items()})
            mean_terms = _mean_over_processes(accelerator, micro_terms)
            _check_finite(mean_terms, step, out)

            # Update.
            norm = float(accelerator.clip_grad_norm_(trained, settings.clip_norm or math.inf))
            if accelerator.scaler is None:
                _check_finite({"gradient_norm": norm}, step, out)
            if math.isfinite(norm):  # float16's scaler leaves out a step that overflowed, and scales less
                mean_terms["gradient_norm"] = norm
            rate = learning_rate(step, settings, config.run.steps)
            set_learning_rate(optimizer, rate)
            optimizer.step()
            optimizer.zero_grad()
            step += 1

            # Codebooks and moving average.
            restarted = []
            if step > config.codebook.start_step:
                restarted = _update_codebooks(learners, autoencoder, step, accelerator, mean_terms)
            ema.update_parameters(autoencoder)
            _forget_averages(ema.module, autoencoder, restarted)

            # Status.
            journal.record(step, mean_terms, rate)
            if accelerator.is_main_process and (
                step % config.run.sample_every == 0 or step == config.run.steps
            ):
                samples.write(ema.module, out / "samples" / f"{step:08d}.png", accelerator)

            # Checkpoint, stop.
            stopping = _any_process(accelerator, stop.requested)
            if step % config.run.checkpoint_every == 0 or step == config.run.steps or stopping:
                state = {**facts, "journal": journal.state_dict()}
                if streamed is not None:
                    state["streams"] = gather_object([streamed.state_dict()])
                if accelerator.is_main_process:
                    checkpoints.save_checkpoint(
                        out, step, modules, optimizers, keep=config.run.keep_checkpoints, state=state
                    )
                accelerator.wait_for_everyone()
            if stopping:
                break

    averaged = ema.module.eval()
    assert not _changed(averaged, frozen), "decoder-only training changed the encoder"
    skipped = gather_object(crops.skipped if streamed is None else streamed.skipped)
    is_main_process = accelerator.is_main_process
    accelerator.end_training()
    return TrainingResult(
        averaged, step, step >= config.run.steps, tuple(dict.fromkeys(skipped)), is_main_process
    )


def _check_fit(config: TrainingConfig, autoencoder: Autoencoder, stream) -> None:
    shape = autoencoder.config
    channels = shape.in_channels, shape.get("out_channels", shape.in_channels)
    if channels[0] != channels[1]:
        raise ValueError(
            f"the autoencoder takes {channels[0]} channels and gives {channels[1]}: make them equal."
        )
    factor = side_multiple(autoencoder)
    for name, side in zip(("height", "width"), config.data.size):
        if side % factor:
            raise ValueError(
                f"data.{name} is {side}; a multiple of {factor}, which is a latent's side in pixels."
            )
    if hasattr(autoencoder, "quantizers"):
        if config.objective.kl_weight or config.objective.reconstruction in ("gaussian", "bernoulli"):
            raise ValueError(
                f"{type(autoencoder).__name__} has codewords and no posterior: leave objective.kl_weight 0, and set "
                'objective.reconstruction to "l1" or "mse".'
            )
        if config.codebook.start_step >= config.run.steps:
            raise ValueError(
                f"codebook.start_step is {config.codebook.start_step}, and the run ends at {config.run.steps}: start earlier."
            )
        if config.model.train == "decoder" and not isinstance(autoencoder, AutoencoderVQ):
            raise ValueError(
                'model.train = "decoder" needs an encoder apart from the decoder: HierarchicalVQ has none.'
            )
        if config.model.initialization == "linear" and (
            config.codebook.start_step or not config.codebook.kmeans_crops
        ):
            raise ValueError(
                'model.initialization = "linear" begins with a codebook under its latents: set codebook.kmeans_crops above '
                "0 and leave codebook.start_step 0."
            )
    # Both begin late in a run, which is no time to find out.
    judges = []
    if config.objective.lpips_weight:
        judges.append((f"LPIPS ({config.objective.lpips_net})", LPIPS_MIN_SIDE[config.objective.lpips_net]))
    if config.objective.gan_weight:
        judges.append(("the discriminator", min_side(config.objective.discriminator_layers)))
    for judge, least in judges:
        if min(config.data.size) < least:
            raise ValueError(f"crops are {min(config.data.size)} px; {judge} needs at least {least}.")
    if stream is not None and config.data.by_area:
        raise ValueError("data.by_area needs all pictures at hand: set it to false to train on a stream.")


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


def _check_resumption(
    state: dict, facts: dict, autoencoder: Autoencoder, frozen: dict[str, Tensor], out: Path
) -> None:
    """Refuse to go on with other data, other steps or another encoder than the checkpoint's."""
    for name, now in facts.items():
        if state.get(name, now) != now:
            raise ValueError(
                f"{out} was trained with {name} = {state[name]}, which is {now} now: give the same --data, number of "
                "processes and batch, or another --out."
            )
    if _changed(autoencoder, frozen):
        raise ValueError(
            f"{out} keeps the encoder of another codec: give the one it was started with, or another --out."
        )


def _first_crops(crops: TrainingCrops, count: int) -> Tensor:
    return torch.stack([crops[position] for position in range(count)])


def _begin_codebooks(
    config: TrainingConfig, step: int, autoencoder: Autoencoder, averaged: Autoencoder, crops: TrainingCrops
) -> None:
    """Let latents through unquantised before `codebook.start_step`; then start each codebook from k-means.

    All processes go on with the main one's codewords: those of another kind of GPU would differ in their last bits.
    """
    begins = step == config.codebook.start_step
    for quantizer in (*autoencoder.quantizers, *averaged.quantizers):
        quantizer.bypassed = not begins
    has_some = config.model.pretrained or config.model.initialization == "linear"
    if begins and config.codebook.kmeans_crops and not has_some:
        images = _first_crops(crops, config.codebook.kmeans_crops).to(autoencoder.device)
        initialize_codebooks(autoencoder, images, seed=config.run.seed)
        for quantizer in autoencoder.quantizers:
            broadcast(quantizer.embedding.weight.data)
        everything = [torch.arange(quantizer.codebook_size) for quantizer in autoencoder.quantizers]
        _forget_averages(averaged, autoencoder, everything)


def _codebook_learners(config: TrainingConfig, autoencoder: Autoencoder) -> torch.nn.ModuleList:
    """One per codebook that is trained, top level first."""
    if config.model.train == "decoder":
        return torch.nn.ModuleList()
    settings = config.codebook
    return torch.nn.ModuleList(
        CodebookLearner(
            quantizer,
            learning=settings.learning,
            decay=settings.decay,
            restart_below=settings.restart_below,
            seed=config.run.seed,
        )
        for quantizer in getattr(autoencoder, "quantizers", [])
    )


def _update_codebooks(
    learners: torch.nn.ModuleList,
    autoencoder: Autoencoder,
    step: int,
    accelerator: Accelerator,
    terms: dict[str, float],
) -> list[Tensor]:
    """Let each codebook learn from its step, over all processes; return the restarted codewords of each."""
    restarted = []
    for level, (suffix, learner) in enumerate(zip(level_suffixes(len(learners)), learners)):
        learned, moved = learner.update(
            step,
            sum_over_processes=lambda tensor: accelerator.reduce(tensor, reduction="sum"),
            gather=accelerator.gather,
        )
        terms |= {f"{name}{suffix}": value for name, value in learned.items()}
        restarted.append(moved)
        if isinstance(autoencoder, HierarchicalVQ):
            autoencoder.set_usage(level, learner.usage)
    return restarted


@torch.no_grad()
def _forget_averages(averaged: Autoencoder, autoencoder: Autoencoder, restarted: list[Tensor]) -> None:
    """Copy restarted codewords: the average of a codeword's old and new place is no place.

    Nor is that of unit vectors a unit vector, so that such codewords are normalised again.
    """
    for level, codewords in enumerate(restarted):
        source, target = (each.quantizers[level] for each in (autoencoder, averaged))
        target.embedding.weight[codewords] = source.embedding.weight[codewords]
        target.project_codebook()


def _encoder_parameters(autoencoder: Autoencoder) -> list[torch.nn.Parameter]:
    parts = [
        getattr(autoencoder, name, None) for name in ("encoder", "encoders", "quant_conv", "quantize_convs")
    ]
    return [parameter for part in parts if part is not None for parameter in part.parameters()]


def _freeze_encoder(autoencoder: Autoencoder) -> dict[str, Tensor]:
    """Take encoder, quant_conv and codebook out of training, and return a copy of them."""
    names = ("encoder", "quant_conv", "quantize")
    for part in (getattr(autoencoder, name, None) for name in names):
        if part is not None:
            part.requires_grad_(False)
    return {
        key: tensor.clone()
        for key, tensor in autoencoder.state_dict().items()
        if key.partition(".")[0] in names
    }


def _changed(autoencoder: Autoencoder, frozen: dict[str, Tensor]) -> bool:
    state = autoencoder.state_dict()
    return any(not torch.equal(state[key], tensor) for key, tensor in frozen.items())


def _streamed_crops(stream, like: TrainingCrops, accelerator: Accelerator) -> StreamedCrops:
    return StreamedCrops(
        stream,
        size=like.size,
        channels=like.channels,
        seed=like.seed,
        flip=like.flip,
        scale=like.scale,
        pad_small=like.pad_small,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
    )


def _batches(
    crops: TrainingCrops,
    streamed: StreamedCrops | None,
    config: TrainingConfig,
    start: int,
    accelerator: Accelerator,
) -> Iterator[tuple[list[int], Tensor]]:
    """This process's micro-batches from step `start` on: positions, and crops (N, C, h, w)."""
    sampler = PositionSampler(
        start,
        batch_size=config.optimizer.batch_size,
        accumulation=config.optimizer.accumulation,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
        num_steps=config.run.steps - start,
    )
    pin_memory = accelerator.device.type == "cuda"
    if streamed is not None:
        return zip(sampler, DataLoader(streamed, config.optimizer.batch_size, pin_memory=pin_memory))
    loader = DataLoader(
        crops,
        batch_sampler=sampler,
        num_workers=config.data.num_workers,
        worker_init_fn=ignore_interrupts,
        pin_memory=pin_memory,
    )
    return zip(sampler, loader)


def _inputs(
    config: TrainingConfig,
    latent_shape: tuple[int, ...] | None,
    positions: list[int],
    image: Tensor,
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The clean image, the network's corrupted input, and the latents' noise if any, of one micro-batch.

    Randomness belongs to a picture's position, whatever process or restart it is seen in.
    """
    generators = [
        torch.Generator().manual_seed((config.run.seed * 1_000_003 + position) * 8 + _NOISE)
        for position in positions
    ]
    if config.data.binarize:
        image = torch.where(image > 0, 1.0, -1.0)
    noisy = losses.corrupt(
        image,
        generators,
        noise=config.objective.input_noise,
        dropped=config.objective.dropped_pixels,
        patch=config.objective.dropped_patch,
    )
    noise = None
    if latent_shape is not None:
        noise = torch.stack([torch.randn(latent_shape, generator=generator) for generator in generators])
        noise = noise.to(device, non_blocking=True)
    return image.to(device, non_blocking=True), noisy.to(device, non_blocking=True), noise


def _latent_shape(config: TrainingConfig, autoencoder: Autoencoder) -> tuple[int, int, int] | None:
    """Shape of the noise that the posterior is sampled by, (C, h, w); None where it is not."""
    if config.objective.posterior == "mean" or hasattr(autoencoder, "quantizers"):
        return None
    space = LatentSpace.from_config(autoencoder)
    return (space.channels, *(side // space.downsampling_factor for side in config.data.size))


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


def _any_process(accelerator: Accelerator, flag: bool) -> bool:
    if accelerator.num_processes == 1:
        return flag
    return bool(accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), reduction="sum") > 0)
