"""Training an autoencoder: crops, objectives, codebooks and the discriminator."""

import copy
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, broadcast_object_list, gather_object
from torch import Tensor
from torch.nn.functional import pixel_unshuffle
from torch.utils.data import DataLoader

from latent_codec.codec import LatentCodec
from latent_codec.components.loading import open_component
from latent_codec.components.weight_files import save_component
from latent_codec.errors import SettingError
from latent_codec.families import family_of
from latent_codec.files import replacing
from latent_codec.images.tensors import shrunk_by
from latent_codec.metrics import LPIPS_MIN_SIDE
from latent_codec.models.context_network import LatentContext
from latent_codec.models.discriminator import PatchDiscriminator, min_side
from latent_codec.models.initialization import initialize_codebooks, initialize_linear_code
from latent_codec.models.other_decoder_start import start_other_decoder
from latent_codec.models.quantizers import CodebookLearner
from latent_codec.training import losses, report
from latent_codec.training.build import CLASSES, Autoencoder, construct, open_pretrained
from latent_codec.training.config import TrainingConfig
from latent_codec.training.data import StreamedCrops, TrainingCrops
from latent_codec.training.entropy_task import channel_group, channel_units, coarsest_of
from latent_codec.training.finish_codec import convention_of
from latent_codec.training.objective import (
    ACTIVATION_BLOCKS,
    AutoencoderObjective,
    ObjectiveTerms,
    level_suffixes,
)
from latent_codec.training.optimization import build_optimizer
from latent_codec.training.task import Task, TaskInputs, collate

_NOISE, _TRANSFORMATION = 3, 4  # streams of randomness of their own under the run's seed (training/data.py)
logger = logging.getLogger(__name__)

_LINEAR_START_CROPS = 64
_CONTEXT_CROPS = 16
_CONTEXT_HIDDEN = 48  # as the preset latent-context has it
_DECODER_START_CROPS = 32
_LINEAR_START_VECTORS = 1024  # crops where each is one vector: some for each of its parts


class AutoencoderTask(Task):
    """Every objective is a setting of one network (training/objective.py)."""

    def __init__(
        self, config: TrainingConfig, network: Autoencoder, inputs: TaskInputs, accelerator: Accelerator
    ):
        self.family = family_of(network)
        channels = self.family.channels
        crops = TrainingCrops.configured(config, inputs.source, channels)
        self.grid = _coarsest_grid(self.family, config)
        self.latent_shape = None  # of the noise that the posterior is sampled by, (C, h, w)
        if config.objective.posterior == "sample" and self.family.has_posterior:
            space = self.family.latent_space()
            sides = (side // (space.raw_factor * self.family.upscale) for side in config.data.size)
            self.latent_shape = space.raw_channels, *sides
        self.samples = report.SampleImages(inputs.source, channels, config)
        if config.model.initialization == "linear" and not inputs.resumes:
            is_one_vector = self.latent_shape is not None and self.latent_shape[1:] == (1, 1)
            count = _LINEAR_START_VECTORS if is_one_vector else _LINEAR_START_CROPS
            if self.family.levels:
                count = config.codebook.kmeans_crops
            initialize_linear_code(
                network,
                collate(crops, range(count)),
                quantizer=network.quantizers[0] if self.family.levels else None,
                anchor=config.model.anchor,
            )
        self.teacher = None
        is_new = config.model.has_new_decoder and not inputs.resumes
        if is_new or config.objective.target == "decode":
            self.teacher = open_pretrained(config)
        if is_new:
            logger.info("fitting the new decoder to that of %s, layer by layer", self.teacher.name)
            _start_decoder(network, self.teacher, collate(crops, range(_DECODER_START_CROPS)))
        self.context = None
        if config.objective.rate_weight:
            self.context = _load_context(config, self.family) or _new_context(
                config, network, None if inputs.resumes else crops
            )
        super().__init__(config, network, crops, accelerator)
        if self.teacher is not None:
            self.teacher.to(accelerator.device)
        self.judge = None if self.discriminator is None else accelerator.prepare(self.discriminator)
        self.streamed = None
        if inputs.stream is not None:
            self.num_images = None
            self.streamed = StreamedCrops.configured(
                config,
                inputs.stream,
                channels,
                process_index=accelerator.process_index,
                num_processes=accelerator.num_processes,
            )

    @classmethod
    def check(cls, config: TrainingConfig, network: Autoencoder, inputs: TaskInputs) -> None:
        shape, family, objective = network.config, family_of(network), config.objective
        name = type(network).__name__
        if family.trainable is None and config.model.train == "all":
            expected = f'"decoder" for {name}: {", ".join(CLASSES)} are trained from end to end'
            raise config.error("model.train", expected)
        if family.untrained:
            expected = (
                f"a codec whose decoder is trained on images, and that of {name} is not: {family.untrained}"
            )
            raise config.error("model.pretrained", expected)
        codec = LatentCodec(network, pipeline=config.model.pipeline)  # refuses a pipeline of other classes
        if config.run.calibration_images:
            convention_of(config, codec)
        channels = shape.get("in_channels"), shape.get("out_channels")
        if None not in channels and family.channels == channels[0] != channels[1]:
            raise SettingError("model.arguments", "as many out_channels as in_channels", channels)
        if family.only_size not in (None, config.data.size):
            raise config.error("data.height", f"{family.only_size[0]}, the only side that {name} takes")
        for side in ("height", "width"):
            multiple = family.side_multiple * family.upscale
            if (getattr(config.data, side) or 0) % multiple:
                expected = f"a multiple of {multiple}, a latent's side in pixels"
                raise config.error(f"data.{side}", expected)
        if config.model.initialization == "linear" and not (
            family.trainable and family.trainable.linear_start
        ):
            expected = f'"random" or "even" for {name}: a linear start knows AutoencoderKL and AutoencoderVQ'
            raise config.error("model.initialization", expected)
        if objective.kl_weight and not family.has_posterior:
            raise config.error("objective.kl_weight", f"0 for {name}, which has no posterior")
        if objective.is_likelihood and not family.has_posterior:
            expected = f'"l1" or "mse" for {name}, which has no posterior'
            raise config.error("objective.reconstruction", expected)
        if family.levels and family.trainable:
            _check_codebooks(config, shape, name)
        is_known = any(isinstance(module, ACTIVATION_BLOCKS) for module in network.modules())
        if objective.activation_weight and not is_known:
            expected = f"0 for {name}, whose layers the penalty does not know"
            raise config.error("objective.activation_weight", expected)
        if objective.spectrum_weight and (
            config.model.train != "all" or min(_coarsest_grid(family, config)) < 4
        ):
            expected = "0 where latents are not trained, or a crop has fewer than 4x4 of them"
            raise config.error("objective.spectrum_weight", expected)
        if objective.rate_weight and not family.has_posterior:
            expected = f"0 for {name}, whose latents have no posterior mean to quantize"
            raise config.error("objective.rate_weight", expected)
        _load_context(config, family)
        if objective.target == "decode":
            _check_distilled(config, family.upscale)
        if objective.level_dropout and len(family.levels) < 2:
            expected = "0 but for a HierarchicalVQ of two or more levels"
            raise config.error("objective.level_dropout", expected)
        least = {}
        if objective.lpips_weight:
            least[f"LPIPS ({objective.lpips_net})"] = LPIPS_MIN_SIDE[objective.lpips_net]
        if objective.color_weight:
            least["hues"] = losses.COLOR_SIDE
        if objective.gan_weight:
            least["the discriminator"] = min_side(objective.discriminator_layers)
        for judge, pixels in least.items():
            if min(config.data.size) < pixels:
                raise SettingError("data.height", f"at least {pixels} for {judge}", min(config.data.size))
        if inputs.stream is not None and config.data.by_area:
            raise config.error("data.by_area", "false for a stream, whose images are not all at hand")

    def build_objective(self) -> AutoencoderObjective:
        """The objective, and around it the codebooks' learners, the discriminator and the terms."""
        config, network, device = self.config, self.network, self.accelerator.device
        train_encoder = config.model.train == "all"
        self.frozen = {} if train_encoder else _all_but_decoder(network)
        objective = AutoencoderObjective(
            network,
            config.objective,
            train_encoder=train_encoder,
            context=self.context,
            pipeline=config.model.pipeline,
        )
        is_learned = train_encoder and self.family.levels
        if is_learned and config.codebook.entropy_weight is not None:
            for quantizer in network.quantizers:
                quantizer.entropy_weight = config.codebook.entropy_weight
        self.learners = torch.nn.ModuleList(
            CodebookLearner(
                quantizer,
                learning=config.codebook.learning,
                decay=config.codebook.decay,
                restart_below=config.codebook.restart_below,
                seed=config.run.seed,
            )
            for quantizer in (dict.fromkeys(network.quantizers) if is_learned else [])
        )  # of each codebook, top level first; levels may share one
        if self.learners:
            self.modules["codebooks"] = self.learners.to(device)
        self.discriminator = None
        if config.objective.gan_weight:
            self.discriminator = self.modules["discriminator"] = PatchDiscriminator(
                self.family.channels,
                config.objective.discriminator_width,
                config.objective.discriminator_layers,
            ).to(device)
        self.terms_of = ObjectiveTerms(
            objective,
            codebook_weight=config.codebook.weight,
            binarized=config.data.binarize,
            reference=_load_reference(config, self.family),
            discriminator=self.discriminator,
            mean_over_processes=lambda tensor: self.accelerator.reduce(tensor, reduction="mean"),
        ).to(device)
        return objective

    def build_optimizer(self) -> torch.optim.Optimizer:
        settings = self.config.optimizer
        judging = list(self.discriminator.parameters()) if self.discriminator is not None else []
        encoder = self.family.trainable.encoder if self.family.trainable else ()
        encoding = [
            parameter
            for name, part in self.network.named_children()
            for parameter in part.parameters()
            if name in encoder and settings.encoder_factor != 1
        ]
        return build_optimizer(self.trained, judging, settings, encoder=encoding)

    @staticmethod
    def headline(terms: dict[str, float]) -> str:
        return f"loss {terms['loss']:.4f}, {terms['psnr']:.2f} dB"

    @property
    def skipped(self) -> list[str]:
        return (self.streamed or self.dataset).skipped

    def resume(self, state: dict[str, Any], out: Path) -> None:
        if self.frozen and not self.config.model.pretrained:
            # Made from data at the first start, and the checkpoint's own since.
            self.frozen = _all_but_decoder(self.network)
        if _changed(self.network, self.frozen):
            expected = f"the codec that the run in {out} was started with, whose encoder it keeps"
            raise self.config.error("model.pretrained", expected, advice="or give another `run_folder`")
        if self.streamed is not None and "streams" in state:
            self.streamed.load_state_dict(state["streams"][self.accelerator.process_index])
        if "context_scales" in state:
            self.context.scale_to(*state["context_scales"])

    def state_dict(self) -> dict[str, Any]:
        state = {} if self.streamed is None else {"streams": gather_object([self.streamed.state_dict()])}
        if self.context is not None:
            state["context_scales"] = self.context.config.units, self.context.config.coarsest
        return state

    def batches(self, start: int) -> Iterator[tuple[list[int], Tensor]]:
        """Positions, and crops (N, C, h, w)."""
        batches = super().batches(start)
        if self.streamed is not None:
            pin_memory = self.accelerator.device.type == "cuda"
            batches = DataLoader(self.streamed, self.config.optimizer.batch_size, pin_memory=pin_memory)
        return zip(self.position_sampler(start), batches)

    def begin_step(self, step: int) -> None:
        super().begin_step(step)
        if self.learners and step <= self.config.codebook.start_step:
            self._begin_codebooks(step)
        for learner in self.learners:
            if not learner.quantizer.has_distances:
                learner.quantizer.temperature = self._temperature(step)

    def loss(self, batch: tuple[list[int], Tensor], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        image, noisy, noise, kept_levels = self._inputs(*batch)
        transformation = self._transformation(batch[0][0])
        quantizes = step >= self.config.objective.rate_start
        small = shrunk_by(noisy, self.family.upscale)
        outputs = self.model(small, noise, kept_levels, transformation, quantizes=quantizes)
        if self.config.objective.target == "decode":
            with torch.no_grad():
                image = self.teacher.family.decode_raw(outputs["latents"]).float().clamp(-1, 1)
        self._judged = image, outputs["reconstruction"].detach()
        if self.learners and step >= self.config.codebook.start_step:
            learner_of = {learner.quantizer: learner for learner in self.learners}
            for quantizer, level in zip(self.network.quantizers, outputs["levels"]):
                learner_of[quantizer].observe(level)
        return self.terms_of.autoencoder_loss(image, outputs, step, transformation)

    def accumulate(self, batch: tuple[list[int], Tensor], step: int, *, last: bool) -> dict[str, Tensor]:
        """The autoencoder's gradients, and the discriminator's."""
        terms = super().accumulate(batch, step, last=last)
        if self.judge is not None and step >= self.config.objective.gan_start:
            with self.synchronizing(self.judge, last):
                judged = self.terms_of.discriminator_loss(self.judge, *self._judged)
                self.accelerator.backward(judged["discriminator"] / self.config.optimizer.accumulation)
            terms |= {name: value.detach().float() for name, value in judged.items()}
        return terms

    def end_step(self, step: int) -> dict[str, Tensor]:
        """Codebooks and moving average."""
        terms, restarted = {}, []
        if step > self.config.codebook.start_step:
            terms, restarted = self._update_codebooks(step)
        self.ema.update_parameters(self.network)
        _forget_averages(self.ema.module, self.network, restarted)
        return terms

    def write_samples(self, path: Path) -> None:
        self.samples.write(self.ema.module, path, self.accelerator)

    def write_companions(self, out: Path) -> None:
        """OUT/entropy: the context model, from which `fit-entropy` goes on to the codec's entropy model."""
        if self.context is not None:
            with replacing(out / "entropy") as folder:
                save_component(self.context, folder)

    def release(self) -> None:
        super().release()
        self.judge = None

    def check_end(self) -> None:
        assert not _changed(self.ema.module, self.frozen), "decoder-only training changed the encoder"

    def _inputs(
        self, positions: list[int], image: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Clean image, the network's corrupted input, the latents' noise and the kept levels, if any, of a micro-batch.

        Randomness belongs to an image's position, whatever process or restart it is seen in.
        """
        config = self.config
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
            noise = self.to_device(noise)
        if config.objective.level_dropout:
            num_levels = len(self.network.quantizers)
            kept_levels = losses.draw_kept_levels(num_levels, generators, config.objective.level_dropout)
            kept_levels = self.to_device(kept_levels)
        return self.to_device(image), self.to_device(noisy), noise, kept_levels

    def _transformation(self, position: int) -> losses.Transformation | None:
        """Of the latents of a micro-batch, by its first image's position; None without an equivariance term."""
        objective = self.config.objective
        if not objective.equivariance_weight:
            return None
        seed = (self.config.run.seed * 1_000_003 + position) * 8 + _TRANSFORMATION
        generator = torch.Generator().manual_seed(seed)
        return losses.draw_transformation(generator, self.grid, objective.equivariance_scale)

    def _begin_codebooks(self, step: int) -> None:
        """Let latents through unquantized before `codebook.start_step`; then start each codebook from k-means.

        All processes go on with the main one's codewords: those of another kind of GPU would differ in their last bits.
        """
        config, autoencoder, averaged = self.config, self.network, self.ema.module
        begins = step == config.codebook.start_step
        for quantizer in (*autoencoder.quantizers, *averaged.quantizers):
            quantizer.bypassed = not begins
        has_some = config.model.pretrained or config.model.initialization == "linear"
        if begins and config.codebook.kmeans_crops and not has_some:
            images = collate(self.dataset, range(config.codebook.kmeans_crops)).to(autoencoder.device)
            initialize_codebooks(autoencoder, images, seed=config.run.seed)
            for quantizer in dict.fromkeys(autoencoder.quantizers):
                for parameter in quantizer.parameters():
                    broadcast(parameter.data)
            pairs = [zip(each.quantizers, each.quantizer_inputs) for each in (autoencoder, averaged)]
            for (quantizer, layer), (averaged_quantizer, averaged_layer) in zip(*pairs):
                if quantizer.is_fixed:  # its latents were brought to it
                    broadcast(layer.weight.data)
                    broadcast(layer.bias.data)
                    averaged_layer.load_state_dict(layer.state_dict())
                    averaged_quantizer.load_state_dict(quantizer.state_dict())
            everything = [
                torch.ones_like(each.embedding.weight[:, 0], dtype=torch.bool)
                for each in dict.fromkeys(autoencoder.quantizers)
            ]
            _forget_averages(averaged, autoencoder, everything)

    def _temperature(self, step: int) -> float:
        """Of draws of codewords: from 1 to `codebook.final_temperature`, half a cosine."""
        start, last = self.config.codebook.start_step, self.config.codebook.final_temperature
        share = max(step - start, 0) / (self.config.run.steps - start)
        return last + (1 - last) * (1 + math.cos(math.pi * share)) / 2

    def _update_codebooks(self, step: int) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Let each codebook learn from its step, over all processes; return its terms and which codewords of each were restarted."""
        terms, restarted = {}, []
        for level, (suffix, learner) in enumerate(zip(level_suffixes(len(self.learners)), self.learners)):
            learned, moved = learner.update(
                step,
                sum_over_processes=lambda tensor: self.accelerator.reduce(tensor, reduction="sum"),
                gather=self.accelerator.gather,
            )
            terms |= {f"{name}{suffix}": value for name, value in learned.items()}
            restarted.append(moved)
            self.family.record_usage(level, learner.usage)
        return terms, restarted


@torch.no_grad()
def _start_decoder(network: Autoencoder, teacher: LatentCodec, images: Tensor) -> None:
    """Start the network's decoder from the teacher's, by crops; subpixels that the teacher has not are fitted to them."""
    known, upscale = teacher.autoencoder, family_of(network).upscale
    raw_latents = teacher.family.encode_raw(shrunk_by(images, upscale)).posterior.mode()
    latents = raw_latents if known.post_quant_conv is None else known.post_quant_conv(raw_latents)
    subpixels = pixel_unshuffle(images, upscale) if upscale > teacher.upscale else None
    start_other_decoder(network.decoder, known.decoder, latents, subpixels)


def _coarsest_grid(family, config: TrainingConfig) -> tuple[int, int]:
    """(h, w) of the coarsest latents of a crop."""
    side = max((level.side for level in family.levels), default=family.latent_space().raw_factor)
    return tuple(each // (side * family.upscale) for each in config.data.size)


def _load_reference(config: TrainingConfig, family) -> LatentCodec | None:
    """The codec that `objective.reference` names.

    Raises:
        SettingError: if its latent space is another one, naming both.
    """
    name = config.objective.reference
    if name is None:
        return None
    reference = LatentCodec.from_pretrained(name, pipeline=config.model.pipeline)
    spaces = family.latent_space(config.model.pipeline), reference.latent_space
    if spaces[0] != spaces[1]:
        own, other = (
            f"{space.channels} channels, factor {space.downsampling_factor}, scale {space.scaling_factor:g}"
            for space in spaces
        )
        expected = f"a codec whose latents have what those of the trained one have ({own})"
        raise config.error("objective.reference", expected, advice=f"{reference.name} has {other}")
    return reference


def _load_context(config: TrainingConfig, family) -> LatentContext | None:
    """The context model that `objective.context` names.

    Raises:
        SettingError: if it is of other latents.
    """
    name = config.objective.context
    if name is None:
        return None
    context = open_component(name, "entropy", [LatentContext]).train()
    channels = family.latent_space(config.model.pipeline).channels
    if context.num_channels != channels:
        expected = f"a context model of {channels} channels, which the codec's latents have"
        raise config.error("objective.context", expected, advice=f"{name} has {context.num_channels}")
    return context


def _new_context(config: TrainingConfig, network: Autoencoder, crops: TrainingCrops | None) -> LatentContext:
    """A new context model of the latents of `network`; without crops, its units and step sizes are yet to be set."""
    ones = [1.0] * family_of(network).latent_space(config.model.pipeline).channels
    arguments = {
        "units": ones,
        "coarsest": ones,
        "group": channel_group(len(ones)),
        "hidden": _CONTEXT_HIDDEN,
    }
    context = construct(LatentContext, arguments, config.run.seed)
    if crops is not None:
        logger.info("measuring the decoder's sensitivity to errors of each channel")
        # Of a copy: a codec lays its weights out for encoding, and sums of another order make another training.
        codec = LatentCodec(copy.deepcopy(network), pipeline=config.model.pipeline)
        latents = codec.encode(collate(crops, range(_CONTEXT_CROPS)))
        units = channel_units(latents).tolist()
        scales = [units, coarsest_of(codec, latents, units, config.run.seed)]
        context.scale_to(*broadcast_object_list(scales))
    return context


def _check_distilled(config: TrainingConfig, upscale: int) -> None:
    """Refuse what the pretrained codec's own decoder gives no target for."""
    if config.model.train != "decoder" or not config.model.pretrained:
        raise config.error("objective.target", '"image" where not only a decoder is trained')
    if upscale > 1:
        expected = f'"image" for a decoder that enlarges by {upscale}: the pretrained one does not'
        raise config.error("objective.target", expected)
    if config.objective.posterior != "mean":
        raise config.error(
            "objective.posterior", '"mean", which both decoders decode, for the target "decode"'
        )


def _check_codebooks(config: TrainingConfig, shape, name: str) -> None:
    """Refuse what a network with codewords cannot be trained by."""
    codebook, model = config.codebook, config.model
    if codebook.start_step >= config.run.steps:
        expected = f"a step before the run ends at {config.run.steps}, or a share of the run, such as 0.1"
        raise config.error("codebook.start_step", expected)
    kind = "gumbel" if shape.get("assignment") == "linear" else shape.get("quantizer", "vq")
    if model.pretrained and codebook.kind not in (None, kind):
        raise config.error("codebook.kind", f"none or {kind!r}, that of the network to start from")
    grid = kind not in ("vq", "gumbel")
    if model.initialization == "linear" and grid:
        raise config.error("model.initialization", '"random" or "even" for a codebook that is not learned')
    if codebook.entropy_weight is not None and not grid:
        raise config.error(
            "codebook.entropy_weight", "none for a learned codebook: it is of fsq, bsq and both kinds of lfq"
        )
    if model.initialization == "linear" and codebook.start_step:
        raise config.error("codebook.start_step", "0 for a linear start, which has a codebook")
    if model.initialization == "linear" and not codebook.kmeans_crops:
        raise config.error("codebook.kmeans_crops", "above 0 for a linear start, which has a codebook")


@torch.no_grad()
def _forget_averages(averaged: Autoencoder, autoencoder: Autoencoder, restarted: list[Tensor]) -> None:
    """Copy restarted codewords: the average of a codeword's old and new place is neither.

    Nor is that of unit vectors a unit vector, so that such codewords are normalized again.
    """
    for codebook, moved in enumerate(restarted):
        source, target = (list(dict.fromkeys(each.quantizers))[codebook] for each in (autoencoder, averaged))
        weight = target.embedding.weight
        weight.copy_(torch.where(moved[:, None], source.embedding.weight, weight))
        target.project_codebook()


def _all_but_decoder(autoencoder: Autoencoder) -> dict[str, Tensor]:
    """A copy of all that latents depend on."""
    keys = family_of(autoencoder).decoder_keys(autoencoder.config)
    return {
        key: tensor.clone() for key, tensor in autoencoder.state_dict().items() if not key.startswith(keys)
    }


def _changed(autoencoder: Autoencoder, frozen: dict[str, Tensor]) -> bool:
    state = autoencoder.state_dict()
    return any(not torch.equal(state[key], tensor) for key, tensor in frozen.items())
