"""Training an autoencoder: crops, objectives, codebooks and the discriminator."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, gather_object
from torch import Tensor
from torch.utils.data import DataLoader

from latent_codec.families import family_of
from latent_codec.images.sources import ImageSource
from latent_codec.metrics import LPIPS_MIN_SIDE
from latent_codec.models.discriminator import PatchDiscriminator, min_side
from latent_codec.models.initialization import initialize_codebooks, initialize_linear_code
from latent_codec.models.quantizers import CodebookLearner
from latent_codec.training import losses, report
from latent_codec.training.build import Autoencoder
from latent_codec.training.config import TrainingConfig
from latent_codec.training.data import StreamedCrops, TrainingCrops
from latent_codec.training.objective import AutoencoderObjective, ObjectiveTerms, level_suffixes
from latent_codec.training.optimization import build_optimizer, moving_average
from latent_codec.training.task import Task

_NOISE = 3  # stream of randomness beside the data's own, under the same seed
_LINEAR_START_CROPS = 64


class AutoencoderTask(Task):
    """Every objective is a setting of one network (training/objective.py).

    Args:
        config: of the run.
        autoencoder: new or pretrained, float32.
        source: images to train on; with a `stream`, its first ones, for samples and a linear start.
        accelerator: device, precision and processes.
        stream: a `datasets.IterableDataset` to train on, or None.
        resumes: whether a checkpoint will be restored, so that nothing need be made from data.
    """

    def __init__(
        self,
        config: TrainingConfig,
        autoencoder: Autoencoder,
        source: ImageSource,
        accelerator: Accelerator,
        *,
        stream=None,
        resumes: bool = False,
    ):
        super().__init__(config, autoencoder, accelerator)
        self.family = family_of(autoencoder)
        self.is_discrete = bool(self.family.levels)
        self.crops = TrainingCrops.configured(config, source, autoencoder.config.in_channels)
        self.streamed = None if stream is None else self._streamed(stream)
        self.num_images = len(source) if stream is None else None
        self.samples = report.SampleImages(source, autoencoder.config.in_channels, config)
        self.latent_shape = _latent_shape(config, autoencoder)

        # Networks.
        if config.model.initialization == "linear" and not resumes:
            count = config.codebook.kmeans_crops if self.is_discrete else _LINEAR_START_CROPS
            initialize_linear_code(
                autoencoder,
                self._first_crops(count),
                quantizer=autoencoder.quantizers[0] if self.is_discrete else None,
                anchor=config.model.anchor,
            )
        autoencoder.to(accelerator.device).train()
        if config.run.gradient_checkpointing:
            autoencoder.enable_gradient_checkpointing()
        train_encoder = config.model.train == "all"
        self.frozen = {} if train_encoder else _freeze_encoder(autoencoder)
        self.ema = moving_average(autoencoder, config.optimizer.ema_decay)
        self.objective = AutoencoderObjective(autoencoder, config.objective, train_encoder=train_encoder)
        self.learners = _codebook_learners(config, autoencoder)
        if self.learners:
            self.modules["codebooks"] = self.learners.to(accelerator.device)
        self.discriminator = None
        if config.objective.gan_weight:
            self.discriminator = self.modules["discriminator"] = PatchDiscriminator(
                autoencoder.config.in_channels,
                config.objective.discriminator_width,
                config.objective.discriminator_layers,
            ).to(accelerator.device)
        self.terms_of = ObjectiveTerms(
            self.objective,
            codebook_weight=config.codebook.weight,
            binarized=config.data.binarize,
            discriminator=self.discriminator,
            mean_over_processes=lambda tensor: accelerator.reduce(tensor, reduction="mean"),
        ).to(accelerator.device)

    @staticmethod
    def headline(terms: dict[str, float]) -> str:
        return f"loss {terms['loss']:.4f}, {terms['psnr']:.2f} dB"

    def prepare(self) -> torch.optim.Optimizer:
        settings = self.config.optimizer
        judging = list(self.discriminator.parameters()) if self.discriminator is not None else []
        encoding = _encoder_parameters(self.network) if settings.encoder_factor != 1 else []
        self.model, optimizer = self.accelerator.prepare(
            self.objective, build_optimizer(self.trained, judging, settings, encoder=encoding)
        )
        self.judge = None
        if self.discriminator is not None:
            self.judge = self.accelerator.prepare(self.discriminator)
        return optimizer

    @property
    def skipped(self) -> list[str]:
        return self.crops.skipped if self.streamed is None else self.streamed.skipped

    def resume(self, state: dict[str, Any], out: Path) -> None:
        if self.frozen and not self.config.model.pretrained:
            # Made from data at the first start, and the checkpoint's own since.
            self.frozen = _freeze_encoder(self.network)
        if _changed(self.network, self.frozen):
            raise ValueError(
                f"{out} keeps the encoder of another codec: give the one it was started with, or another --out."
            )
        if self.streamed is not None and "streams" in state:
            self.streamed.load_state_dict(state["streams"][self.accelerator.process_index])

    def state_dict(self) -> dict[str, Any]:
        return {} if self.streamed is None else {"streams": gather_object([self.streamed.state_dict()])}

    def batches(self, start: int) -> Iterator[tuple[list[int], Tensor]]:
        """Positions, and crops (N, C, h, w)."""
        if self.streamed is None:
            return self.positions(start, self.crops)
        pin_memory = self.accelerator.device.type == "cuda"
        loader = DataLoader(self.streamed, self.config.optimizer.batch_size, pin_memory=pin_memory)
        return zip(self.position_sampler(start), loader)

    def begin_step(self, step: int) -> None:
        if self.learners and step <= self.config.codebook.start_step:
            self._begin_codebooks(step)

    def accumulate(self, batch: tuple[list[int], Tensor], step: int, *, last: bool) -> dict[str, Tensor]:
        """The autoencoder's gradients, and the discriminator's."""
        accumulation, accelerator = self.config.optimizer.accumulation, self.accelerator
        image, noisy, noise, kept_levels = self._inputs(*batch)
        with self.synchronizing(self.model, last):
            outputs = self.model(noisy, noise, kept_levels)
            with accelerator.autocast():
                terms = self.terms_of.autoencoder_loss(image, outputs, step)
            accelerator.backward(terms["loss"] / accumulation)
        if step >= self.config.codebook.start_step:
            for learner, level in zip(self.learners, outputs.get("levels", [])):
                learner.observe(level)
        if self.judge is not None and step >= self.config.objective.gan_start:
            with self.synchronizing(self.judge, last):
                judged = self.terms_of.discriminator_loss(self.judge, image, outputs["reconstruction"])
                accelerator.backward(judged["discriminator"] / accumulation)
            terms |= judged
        return {name: value.detach().float() for name, value in terms.items()}

    def end_step(self, step: int, terms: dict[str, float]) -> None:
        """Codebooks and moving average."""
        restarted = []
        if step > self.config.codebook.start_step:
            restarted = self._update_codebooks(step, terms)
        self.ema.update_parameters(self.network)
        _forget_averages(self.ema.module, self.network, restarted)

    def write_samples(self, path: Path) -> None:
        self.samples.write(self.ema.module, path, self.accelerator)

    def release(self) -> None:
        super().release()
        self.judge = None

    def check_end(self) -> None:
        assert not _changed(self.ema.module, self.frozen), "decoder-only training changed the encoder"

    def _streamed(self, stream) -> StreamedCrops:
        return StreamedCrops(
            stream,
            size=self.crops.size,
            channels=self.crops.channels,
            seed=self.crops.seed,
            flip=self.crops.flip,
            scale=self.crops.scale,
            pad_small=self.crops.pad_small,
            process_index=self.accelerator.process_index,
            num_processes=self.accelerator.num_processes,
        )

    def _first_crops(self, count: int) -> Tensor:
        return torch.stack([self.crops[position] for position in range(count)])

    def _inputs(
        self, positions: list[int], image: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Clean image, the network's corrupted input, the latents' noise and the kept levels, if any, of a micro-batch.

        Randomness belongs to an image's position, whatever process or restart it is seen in.
        """
        config, device = self.config, self.accelerator.device
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
        noise = kept_levels = None
        if self.latent_shape is not None:
            noise = torch.stack([torch.randn(self.latent_shape, generator=each) for each in generators])
            noise = noise.to(device, non_blocking=True)
        if config.objective.level_dropout:
            num_levels = len(self.network.quantizers)
            kept_levels = losses.draw_kept_levels(num_levels, generators, config.objective.level_dropout)
            kept_levels = kept_levels.to(device, non_blocking=True)
        image, noisy = (each.to(device, non_blocking=True) for each in (image, noisy))
        return image, noisy, noise, kept_levels

    def _begin_codebooks(self, step: int) -> None:
        """Let latents through unquantised before `codebook.start_step`; then start each codebook from k-means.

        All processes go on with the main one's codewords: those of another kind of GPU would differ in their last bits.
        """
        config, autoencoder, averaged = self.config, self.network, self.ema.module
        begins = step == config.codebook.start_step
        for quantizer in (*autoencoder.quantizers, *averaged.quantizers):
            quantizer.bypassed = not begins
        has_some = config.model.pretrained or config.model.initialization == "linear"
        if begins and config.codebook.kmeans_crops and not has_some:
            images = self._first_crops(config.codebook.kmeans_crops).to(autoencoder.device)
            initialize_codebooks(autoencoder, images, seed=config.run.seed)
            for quantizer in autoencoder.quantizers:
                broadcast(quantizer.embedding.weight.data)
            everything = [torch.arange(quantizer.codebook_size) for quantizer in autoencoder.quantizers]
            _forget_averages(averaged, autoencoder, everything)

    def _update_codebooks(self, step: int, terms: dict[str, float]) -> list[Tensor]:
        """Let each codebook learn from its step, over all processes; return the restarted codewords of each."""
        restarted = []
        for level, (suffix, learner) in enumerate(zip(level_suffixes(len(self.learners)), self.learners)):
            learned, moved = learner.update(
                step,
                sum_over_processes=lambda tensor: self.accelerator.reduce(tensor, reduction="sum"),
                gather=self.accelerator.gather,
            )
            terms |= {f"{name}{suffix}": value for name, value in learned.items()}
            restarted.append(moved)
            self.family.record_usage(level, learner.usage)
        return restarted


def check_autoencoder(config: TrainingConfig, autoencoder: Autoencoder, source: ImageSource, stream) -> None:
    """Refuse a configuration that this autoencoder cannot be trained by, before anything is written."""
    shape = autoencoder.config
    channels = shape.in_channels, shape.get("out_channels", shape.in_channels)
    if channels[0] != channels[1]:
        raise ValueError(
            f"the autoencoder takes {channels[0]} channels and gives {channels[1]}: make them equal."
        )
    factor = family_of(autoencoder).side_multiple
    for name, side in zip(("height", "width"), config.data.size):
        if side % factor:
            raise ValueError(
                f"data.{name} is {side}; a multiple of {factor}, which is a latent's side in pixels."
            )
    family = family_of(autoencoder)
    if config.model.initialization == "linear" and not family.trainable.linear_start:
        raise ValueError(
            f"a linear start knows AutoencoderKL and AutoencoderVQ, not {type(autoencoder).__name__}."
        )
    if family.levels:
        if config.objective.kl_weight or config.objective.reconstruction in ("gaussian", "bernoulli"):
            raise ValueError(
                f"{type(autoencoder).__name__} has codewords and no posterior: leave objective.kl_weight 0, and set "
                'objective.reconstruction to "l1" or "mse".'
            )
        if config.codebook.start_step >= config.run.steps:
            raise ValueError(
                f"codebook.start_step is {config.codebook.start_step}, and the run ends at {config.run.steps}: start earlier, "
                "or at a share of the run, such as 0.1."
            )
        if config.model.train != "decoder" and shape.get("assignment") == "linear":
            raise ValueError(
                'assignment "linear" has a temperature to lower and no commitment term, which this trainer does not know: '
                'set model.train = "decoder", or train with assignment "nearest".'
            )
        if config.model.train == "decoder" and not family.trainable.frozen:
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
    if config.objective.level_dropout and len(family.levels) < 2:
        raise ValueError(
            f"objective.level_dropout is {config.objective.level_dropout}; only a HierarchicalVQ of two or more levels "
            "has levels to leave out."
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
        raise ValueError("data.by_area needs all images at hand: set it to false to train on a stream.")


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
        for quantizer in (autoencoder.quantizers if family_of(autoencoder).levels else [])
    )


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
    parts = family_of(autoencoder).trainable.encoder
    return [
        parameter
        for name, part in autoencoder.named_children()
        if name in parts
        for parameter in part.parameters()
    ]


def _freeze_encoder(autoencoder: Autoencoder) -> dict[str, Tensor]:
    """Take encoder, quant_conv and codebook out of training, and return a copy of them."""
    names = family_of(autoencoder).trainable.frozen
    for name, part in autoencoder.named_children():
        if name in names:
            part.requires_grad_(False)
    return {
        key: tensor.clone()
        for key, tensor in autoencoder.state_dict().items()
        if key.partition(".")[0] in names
    }


def _changed(autoencoder: Autoencoder, frozen: dict[str, Tensor]) -> bool:
    state = autoencoder.state_dict()
    return any(not torch.equal(state[key], tensor) for key, tensor in frozen.items())


def _latent_shape(config: TrainingConfig, autoencoder: Autoencoder) -> tuple[int, int, int] | None:
    """Shape of the noise that the posterior is sampled by, (C, h, w); None where it is not."""
    family = family_of(autoencoder)
    if config.objective.posterior == "mean" or family.levels:
        return None
    space = family.latent_space()
    return (space.channels, *(side // space.downsampling_factor for side in config.data.size))
