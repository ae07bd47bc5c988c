"""Training a LatentTranslator: a linear map in closed form, then a network for what it leaves.

crops --codec--> latents ---+--ridge regression--> linear map, and the network's last layer
      --target-> latents' --+--AdamW-------------> the whole network, and the layers that are reused
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from latent_codec.codec import LatentCodec
from latent_codec.components.loading import open_component
from latent_codec.files import plain
from latent_codec.images.sheets import sheet
from latent_codec.images.sources import ImageSource
from latent_codec.images.tensors import shrunk_by, write_image
from latent_codec.models.latent_translator import CodecIdentity, LatentTranslator
from latent_codec.previews.full import rgb
from latent_codec.regression import ridge_regression
from latent_codec.training.build import construct, load_codec
from latent_codec.training.config import TrainingConfig
from latent_codec.training.data import EpochOrder, TrainingCrops
from latent_codec.training.report import SAMPLE_SIDE
from latent_codec.training.task import Task, TaskInputs, collate

NUM_SAMPLES = 4
ROWS_PER_FEATURE = 8
"""Positions of the lessons, for each feature of a layer that is fitted to them in closed form, at least."""
Pair = tuple[Tensor, Tensor]
"""The source's latents of some images, and the target's."""
logger = logging.getLogger(__name__)


def build_translator(
    config: TrainingConfig, source: ImageSource, codec: LatentCodec | None = None
) -> LatentTranslator:
    """A new translator from `model.arguments`, or `model.pretrained`, in float32.

    Raises:
        ValueError: for an argument that it does not have or cannot use, or codecs that it cannot translate between.
    """
    codec = load_codec(config) if codec is None else codec
    target = load_target(config)
    if config.model.pretrained:
        translator = open_component(config.model.pretrained, "translator", [LatentTranslator]).train()
        translator.check_source(codec)
        translator.check_target(target)
        return translator
    ends = {"source": CodecIdentity.of(codec).to_config(), "target": CodecIdentity.of(target).to_config()}
    arguments = config.model.arguments | ends | {"upscale": config.translator.upscale}
    layers = reusable_layers(codec, target) if config.translator.reuse_layers else {}
    for part, (autoencoder, _) in layers.items():
        arguments[autoencoder] = _config_of(codec if part == "head" else target)
    translator = construct(LatentTranslator, arguments, config.run.seed)
    for part, (_, module) in layers.items():
        translator.get_submodule(part).load_state_dict(module.state_dict())
    return translator


def reusable_layers(codec: LatentCodec, target: LatentCodec) -> dict[str, tuple[str, nn.Module]]:
    """What a translator's `head` and `tail` begin as, each with the argument that says whose they are; those that there are.

    Packed latents stand for 2x2 positions, so that no layer works on their grid.
    """
    found = {
        "head": ("source_autoencoder", None if codec.latent_space.packed else codec.family.decoder_head),
        "tail": ("target_autoencoder", None if target.latent_space.packed else target.family.encoder_tail),
    }
    return {part: (name, module) for part, (name, module) in found.items() if module is not None}


def _config_of(codec: LatentCodec) -> dict[str, Any]:
    """The config of an autoencoder, without where it was read from."""
    entries = codec.autoencoder.config.items()
    kept = {key: plain(value) for key, value in entries if not key.startswith("_")}
    return kept | {"_class_name": type(codec.autoencoder).__name__}


def load_target(config: TrainingConfig) -> LatentCodec:
    """The codec whose latents are wanted, on the CPU.

    Raises:
        SettingError: if none is named.
    """
    if config.translator.target is None:
        expected = "the name or folder of the codec whose latents a LatentTranslator gives"
        raise config.error("translator.target", expected)
    return LatentCodec.from_pretrained(config.translator.target)


@dataclass(eq=False)
class NumberedCrops(Dataset):
    """Crops with their numbers: `crops[position]`, (number, crop).

    Args:
        crops: what they are cut by.
        count: how many different ones there are, each once per epoch; None: one for every position.
    """

    crops: TrainingCrops
    count: int | None = None

    def __post_init__(self):
        self._order = None if self.count is None else EpochOrder(self.count, self.crops.seed)

    def __len__(self) -> int:
        """In an epoch; positions go on beyond it."""
        return self.count or len(self.crops)

    def __getitem__(self, position: int) -> tuple[int, Tensor]:
        number = position if self._order is None else self._order[position]
        return number, self.crops[number]

    @property
    def skipped(self) -> list[str]:
        return self.crops.skipped


class TranslatorTask(Task):
    """Mean squared error of the target's latents, and with `translator.image_weight` of the image that it decodes from them.

        crop --codec--> latents --translator--> latents' --+--> mse    latents' --target--> image --+--> image_weight * image
        crop --target-------------------------> latents' --+           latents' --target--> image --+

    Where no layers are reused the linear map stays as it was fitted, so that `linear_mse` is the floor at all times.
    """

    def __init__(
        self, config: TrainingConfig, network: LatentTranslator, inputs: TaskInputs, accelerator: Accelerator
    ):
        self.codec, self.target = inputs.codec, load_target(config)
        for each in (self.codec, self.target):
            each.autoencoder.to(accelerator.device).requires_grad_(False)
        self.upscale = config.translator.upscale
        self.from_reconstructions = config.translator.lesson == "reconstruction" and self.upscale == 1
        self._encoded: dict[int, Pair] = {}
        self.has_tail = network.tail is not None
        self.has_floor = network.head is None and not self.has_tail
        crops = TrainingCrops.configured(config, inputs.source, self.codec.channels)
        self.crops = NumberedCrops(crops, config.translator.crops)
        if not (inputs.resumes or config.model.pretrained):
            numbers = range(config.translator.linear_crops)
            fit_in_closed_form(network, [self._features(each, crops[each][None]) for each in numbers])
        network.linear.requires_grad_(network.network is None or not self.has_floor)
        super().__init__(config, network, self.crops, accelerator)

    @classmethod
    def check(cls, config: TrainingConfig, network: LatentTranslator, inputs: TaskInputs) -> None:
        if config.data.binarize:
            raise config.error("data.binarize", "false for a LatentTranslator, whose codecs have gray values")
        multiple = max(
            network.source.latent_space.side_multiple * config.translator.upscale,
            network.target.latent_space.side_multiple,
        )
        for side in ("height", "width"):
            if (getattr(config.data, side) or 0) % multiple:
                raise config.error(f"data.{side}", f"a multiple of {multiple}, a latent's side in pixels")

    @staticmethod
    def headline(terms: dict[str, float]) -> str:
        of = f" of the linear map's {terms['linear_mse']:.4f}" if "linear_mse" in terms else ""
        return f"error {terms['mse']:.4f}{of}"

    def resume(self, state: dict[str, Any], out: Path) -> None:
        self.check_teacher(self.codec, state.get("codec"), self.codec.fingerprint, "fingerprint", out)
        self.check_teacher(self.target, state.get("target"), self.target.fingerprint, "fingerprint", out)

    def state_dict(self) -> dict[str, Any]:
        return {"codec": self.codec.fingerprint, "target": self.target.fingerprint}

    def loss(self, batch: tuple[Tensor, Tensor], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        numbers, images = batch
        latents, wanted = self._lesson(numbers.tolist(), images)
        translated = self.model(latents).float()
        loss = F.mse_loss(translated, wanted)
        terms = {"mse": loss}
        if self.has_floor:
            terms["linear_mse"] = F.mse_loss(self.network.linearly(latents).detach().float(), wanted)
        weight = self.config.translator.image_weight
        if weight:
            window = self._window(step, wanted)
            with torch.no_grad():
                expected = self._decode(wanted[window])
            terms["image"] = F.mse_loss(self._decode(translated[window]), expected)
            loss = loss + weight * terms["image"]
        return loss, terms

    def _decode(self, latents: Tensor) -> Tensor:
        return self.target.family.decode_raw(self.target.latent_space.denormalize(latents)).float()

    def _window(self, step: int, latents: Tensor) -> tuple[slice | EllipsisType, ...]:
        """A window of `translator.image_side` latents, by the step's number."""
        side = self.config.translator.image_side
        if side is None:
            return (...,)
        generator = torch.Generator().manual_seed(self.config.run.seed * 1_000_003 + step)
        whole = latents.shape[2:]
        starts = [int(torch.randint(max(0, each - side) + 1, (), generator=generator)) for each in whole]
        return ..., *(slice(start, start + side) for start in starts)

    @torch.no_grad()
    def write_samples(self, path: Path) -> None:
        """The target's decodes of its own latents, and of the averaged translator's with and without the network."""
        numbers, images = collate(self.dataset, range(NUM_SAMPLES))
        latents, wanted = self._lesson(numbers.tolist(), images)
        network = self.ema.module.eval()
        rows = {
            "target's own": wanted,
            "translated": network(latents),
            "without network": network.linearly(latents),
        }
        decoded = [rgb(self.target.decode(each, output_type="pt")).cpu() for each in rows.values()]
        columns = [f"crop {number}" for number in range(1, NUM_SAMPLES + 1)]
        write_image(sheet(decoded, row_titles=list(rows), column_titles=columns, side=SAMPLE_SIDE), path)

    def _lesson(self, numbers: list[int], images: Tensor) -> Pair:
        """Crops -> both codecs' latents, float32."""
        pairs = [self._encode(number, image[None]) for number, image in zip(numbers, images)]
        latents, wanted = (torch.cat(each) for each in zip(*pairs))
        return latents, wanted

    def _encode(self, number: int, image: Tensor) -> Pair:
        """One crop at a time, so that its latents are equal to the bit whatever the batch; kept where it comes again."""
        if number in self._encoded:
            return self._encoded[number]
        latents = self.codec.encode(shrunk_by(image, self.upscale)).float()
        if self.from_reconstructions:
            image = self.codec.decode(latents, size=tuple(image.shape[2:]), output_type="pt")
        pair = latents, self.target.encode(image).float()
        if self.crops.count is not None:
            self._encoded[number] = pair
        return pair

    def _features(self, number: int, image: Tensor) -> Pair:
        """`_encode`, with what the target's own tail is given in place of its latents, where the translator has one."""
        if not self.has_tail:
            return self._encode(number, image)
        found: list[Tensor] = []
        hook = self.target.family.encoder_tail[0].register_forward_pre_hook(
            lambda _, inputs: found.append(inputs[0])
        )
        try:
            latents, _ = self._encode(number, image)
        finally:
            hook.remove()
        return latents, found[-1].float()


@torch.no_grad()
def fit_in_closed_form(translator: LatentTranslator, lessons: Sequence[Pair]) -> None:
    """Fit the linear map by ridge regression, and the network's last layer, on top of its random features, to what that leaves.

    So the network begins where hundreds of steps would bring it. Its last layer stays 0 where the lessons are too few for it.

    Args:
        translator: changed in place, but for its head and tail.
        lessons: both codecs' latents of some images, (B, C, h, w) and (B, C', h', w'); of a translator with a tail, in place of the
            latter, what its tail makes them of.
    """
    linear, network = translator.linear, translator.network
    inputs = (translator.fold(latents) for latents, _ in lessons)
    wanted = [positions(F.pixel_unshuffle(each, translator.unfolded)) for _, each in lessons]
    features = (F.unfold(translator.with_border(each), linear.kernel_size) for each in inputs)
    set_layer(linear, ridge_regression((columns(each), rows) for each, rows in zip(features, wanted)))
    left = [
        rows - positions(linear(translator.with_border(translator.fold(latents))))
        for (latents, _), rows in zip(lessons, wanted)
    ]
    num_rows = sum(map(len, left))
    std = (sum(each.double().square().sum(0) for each in left) / num_rows).sqrt().float().clamp_min(1e-6)
    translator.residual_std.copy_(std.view(-1, 1, 1))
    if network is None or num_rows < ROWS_PER_FEATURE * network[-1].weight[0].numel():
        return
    hidden = (network[:-1](translator.fold(latents)) for latents, _ in lessons)
    features = (F.unfold(each, 3, padding=1) for each in hidden)
    set_layer(
        network[-1], ridge_regression((columns(each), rows / std) for each, rows in zip(features, left))
    )


def set_layer(layer: nn.Conv2d, solution: tuple[Tensor, Tensor]) -> None:
    weight, bias = solution
    layer.weight.copy_(weight.view_as(layer.weight))
    layer.bias.copy_(bias)


def positions(grid: Tensor) -> Tensor:
    """(B, C, h, w) -> (B h w, C)."""
    return grid.permute(0, 2, 3, 1).flatten(0, 2)


def columns(unfolded: Tensor) -> Tensor:
    """(B, features, h w) -> (B h w, features)."""
    return unfolded.mT.flatten(0, 1)
