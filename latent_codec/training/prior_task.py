"""Training a prior: the likelihood of indices, pixels or quantized latents."""

import math
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from latent_codec.codec import LatentCodec
from latent_codec.components.prior_folders import CLASSES, load_prior
from latent_codec.images.labels import Images
from latent_codec.images.sheets import sheet
from latent_codec.images.tensors import write_image
from latent_codec.models.autoregressive import AutoregressivePrior
from latent_codec.models.scalar_quantizer import ScalarQuantizer
from latent_codec.training.build import construct
from latent_codec.training.config import TrainingConfig
from latent_codec.training.prior_data import Item, PriorData
from latent_codec.training.report import SAMPLE_SIDE
from latent_codec.training.task import Task, TaskInputs, collate

NUM_SAMPLES = 16
_SURVEYED = 1000  # windows that the commonest index and the latents' range are found from
_MEASURED = 1024  # held-out windows, at most


def build_prior(
    config: TrainingConfig, source: Images, codec: LatentCodec | None = None
) -> AutoregressivePrior:
    """A new prior of `model.class_name`, or `model.pretrained`, in float32, for these codes.

    What codec and data decide may be left out of `model.arguments`: codebook_size, data_channels, num_classes,
    condition_channels, and a ScalarQuantizer's latent_steps. Initial weights are a function of `run.seed`.

    Raises:
        ValueError: for an argument that the class does not have or cannot use, or that contradicts codec or data.
    """
    data = PriorData(config, source, codec)
    if config.model.pretrained:
        prior = load_prior(config.model.pretrained)
        _facts(config, dict(prior.config), f"the prior {config.model.pretrained}", codec, data)
        return prior.train()
    arguments = dict(config.model.arguments)
    arguments |= _facts(config, arguments, "model.arguments", codec, data)
    if arguments.get("data") == "latents" and "latent_steps" not in arguments:
        arguments |= _quantizer(arguments, data)
    arguments["sample_size"] = data.shapes[-1]
    arguments["space_fingerprint"] = None if codec is None else codec.space_fingerprint
    prior = construct(CLASSES[config.model.class_name], arguments, config.run.seed)
    prior.register_to_config(most_frequent=_most_frequent(prior, data))
    return prior


def _facts(
    config: TrainingConfig, arguments: dict, owner: str, codec: LatentCodec | None, data: PriorData
) -> dict[str, Any]:
    """Arguments that codec and data determine, which the `owner` of `arguments` must not contradict."""
    facts: dict[str, Any] = {}
    if data.num_classes is not None:
        facts["num_classes"] = data.num_classes
    if codec is not None and codec.codebook_sizes:
        level = config.prior.level
        facts["codebook_size"] = codec.codebook_sizes[level]
        if level and arguments.get("condition_codebook_size") is not None:
            facts["condition_codebook_size"] = codec.codebook_sizes[level - 1]
        elif level:
            facts["condition_channels"] = codec.autoencoder.condition_channels(level)
    elif codec is not None:
        facts["data_channels"] = codec.latent_space.channels
    whose = "the data" if codec is None else f"{codec.name} and the data"
    for key, value in facts.items():
        given = arguments.get(key)
        is_enough = key == "num_classes" and isinstance(given, int) and given >= value
        if given is not None and given != value and not is_enough:
            raise ValueError(
                f"{owner} has {key} = {given}, and {whose} have {value}: leave it out, or correct it."
            )
        if is_enough:
            facts[key] = given
    return facts


def _quantizer(arguments: dict, data: PriorData) -> dict[str, Any]:
    """The scalar quantizer's arguments, from the range of the latents."""
    lowest, highest = arguments.get("latent_minimum", -128), arguments.get("latent_maximum", 127)
    found = ScalarQuantizer.from_latents(_first_values(data), num_levels=highest - lowest + 1)
    return {"latent_steps": found.steps, "latent_minimum": found.minimum, "latent_maximum": found.maximum}


def _most_frequent(prior: AutoregressivePrior, data: PriorData) -> tuple[int, ...]:
    """The commonest index of each channel."""
    values = _first_values(data)
    if values.is_floating_point():
        values = prior.encode_latents(values)
    channels = values.movedim(1, 0).flatten(1) if prior.has_channels else values.flatten()[None]
    return tuple(int(torch.bincount(channel).argmax()) for channel in channels)


def _first_values(data: PriorData) -> Tensor:
    items = (data.train[position] for position in range(min(len(data.train), _SURVEYED)))
    return torch.stack([levels[-1] for levels, _ in items])


class PriorTask(Task):
    """Maximum likelihood: the mean of -log p(index | those before it, condition, class)."""

    def __init__(
        self,
        config: TrainingConfig,
        network: AutoregressivePrior,
        inputs: TaskInputs,
        accelerator: Accelerator,
    ):
        self.codec = inputs.codec
        if self.codec is not None:
            self.codec.autoencoder.to(accelerator.device)
        self.data = PriorData(config, inputs.source, self.codec)
        super().__init__(config, network, self.data.train, accelerator)

    @staticmethod
    def headline(terms: dict[str, float]) -> str:
        held_out = terms.get("held_out_bits_per_index")
        measured = "" if held_out is None else f", {held_out:.4f} held out"
        return f"{terms['bits_per_index']:.4f} bits per index{measured}"

    def loss(self, batch: Item, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        nats = -self.model(*self._arguments(self.network, *batch)).mean() / self.network.data_channels
        return nats, {"bits_per_index": nats.detach() / math.log(2)}

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """`held_out_bits_per_index`."""
        if not len(self.data.held_out):
            return {}
        prior = self.ema.module.eval()
        total, count = 0.0, min(len(self.data.held_out), _MEASURED)
        for positions in torch.arange(count).split(self.config.optimizer.batch_size):
            batch = collate(self.data.held_out, positions.tolist())
            log_prob = prior(*self._arguments(prior, *batch))
            total -= float(log_prob.double().mean((1, 2)).sum())
        return {"held_out_bits_per_index": total / count / prior.data_channels / math.log(2)}

    def write_samples(self, path: Path) -> None:
        """Samples of every class in turn, under the first images' own upper levels."""
        prior = self.ema.module.eval()
        levels, labels = collate(self.data.train, range(NUM_SAMPLES))
        if self.data.num_classes:
            labels = torch.arange(NUM_SAMPLES) % self.data.num_classes
        _, condition, labels = self._arguments(prior, levels, labels)
        channels = [prior.data_channels] if prior.has_channels else []
        shape = (NUM_SAMPLES, *channels, *self.data.shapes[-1])
        generator = torch.Generator().manual_seed(self.config.run.seed)
        drawn = prior.sample(shape, condition, labels, generator=generator)
        if self.codec is None:
            images = drawn.cpu() / 127.5 - 1
        elif self.codec.is_discrete:
            above = [level.to(drawn.device) for level in levels[:-1]]
            images = self.codec.decode_indices([*above, drawn], output_type="pt").cpu()
        else:
            images = self.codec.decode(prior.decode_latents(drawn), output_type="pt").cpu()
        numbers = torch.arange(1, NUM_SAMPLES + 1) if labels is None else labels
        what, side = "sample" if labels is None else "class", math.isqrt(NUM_SAMPLES)
        titles = [f"{what}\n{', '.join(map(str, row.tolist()))}" for row in numbers.split(side)]
        write_image(sheet(images.split(side), row_titles=titles, side=SAMPLE_SIDE), path)

    def _arguments(
        self, prior: AutoregressivePrior, levels: list[Tensor], labels: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """A batch as the prior's arguments: values, condition and class labels; checked before they go to the device."""
        *above, values = levels
        if values.is_floating_point():
            values = prior.encode_latents(values)
        labels = labels if prior.config.num_classes else None
        prior.check_ranges(values, above[-1] if above else None, labels)
        values, *above = map(self.to_device, (values, *above))
        condition = None
        if above and prior.config.condition_codebook_size is not None:
            condition = above[-1]
        elif above:
            condition = self.codec.autoencoder.upper_features(above)
        return values, condition, None if labels is None else self.to_device(labels)
