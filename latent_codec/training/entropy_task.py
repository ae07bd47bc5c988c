"""Train a context model: minimize the code length of a codec's quantized latents or indices."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from latent_codec.bitstream.sensitivity import coarsest_step_sizes, decoder_sensitivity
from latent_codec.codec import LatentCodec
from latent_codec.components.loading import open_component
from latent_codec.latents.encoded_images import EncodedImages
from latent_codec.models.context_network import (
    LIMIT,
    ONE,
    IndexContext,
    LatentContext,
    codeword_tree,
    freeze_shifts,
    is_frozen,
)
from latent_codec.training.build import construct
from latent_codec.training.config import TrainingConfig
from latent_codec.training.labelled_data import hold_out
from latent_codec.training.prior_data import GridWindows, Item, large_enough, window_shapes
from latent_codec.training.task import Task, TaskInputs, collate

ROUNDED_FROM = 0.6
"""Share of a training after which networks round to integers."""
CHANNEL_GROUPS = 4
"""Passes over a position's channels, at most, by default (model.arguments.group)."""
_COARSEST = 64
"""Largest step size, in a channel's units: an untrained decoder hardly notices some channels, which are all 0 long before it,
and 128 units are what the integers of an entropy model hold."""
_SURVEYED = 64  # windows, for the statistics of latents and indices
_DECODED = 4  # windows, for the decoder's sensitivity
_MEASURED = 64  # held-out windows, at most

Context = LatentContext | IndexContext


def context_class(codec: LatentCodec) -> type[Context]:
    """The context model of a codec's values."""
    return IndexContext if codec.indices_suffice else LatentContext


def build_context(config: TrainingConfig, source: EncodedImages, codec: LatentCodec) -> Context:
    """Build a new network from `model.arguments`, or open `model.pretrained`, in float32.

    Latents: units and coarsest step sizes follow from the data and the decoder's sensitivity, and phase 0 starts at the
    mean. Indices: the codewords initialize their features and the tree.

    Raises:
        ValueError: for an argument that does not fit, or a network for another codec.
    """
    wanted = context_class(codec).__name__
    if config.model.class_name != wanted:
        raise config.error("model.class_name", f"{wanted} for {codec.name}")
    windows = _windows(config, source, codec)[0]
    if config.model.pretrained:
        context = open_component(config.model.pretrained, "entropy", [context_class(codec)]).train()
        if source.is_discrete:
            fits = list(context.config.codebook_sizes) == list(codec.codebook_sizes)
        else:
            fits = context.num_channels == codec.latent_space.channels
        if not fits:
            raise config.error("model.pretrained", f"a context model for {codec.name}")
        return context
    arguments = dict(config.model.arguments)
    items = [windows[position][0] for position in range(min(len(windows), _SURVEYED))]
    if not source.is_discrete:
        latents = torch.stack([grids[-1] for grids in items])
        arguments.setdefault("group", channel_group(latents.shape[1]))
        arguments.setdefault("units", channel_units(latents).tolist())
        if "coarsest" not in arguments:
            arguments["coarsest"] = coarsest_of(codec, latents, arguments["units"], config.run.seed)
        context = construct(LatentContext, arguments, config.run.seed)
        means = latents.mean((0, 2, 3)) / torch.tensor(context.config.units)
        with torch.no_grad():
            context.networks[0].layers[-1].bias[: len(means)] = means
        return context
    arguments["codebook_sizes"] = list(codec.codebook_sizes)
    codebooks = [level.codebook.detach().float().cpu() for level in codec.levels]
    codewords = [(each - each.mean(0)) / each.std().clamp_min(1e-8) for each in codebooks]  # of variance 1
    arguments.setdefault("embedding", min(16, max(each.shape[1] for each in codewords)))
    arguments.setdefault("trees", [codeword_tree(vectors) for vectors in codewords])
    context = construct(IndexContext, arguments, config.run.seed)
    for level, vectors in enumerate(codewords):
        counts = sum(torch.bincount(grids[level].flatten(), minlength=len(vectors)) for grids in items)
        context.start_from(level, vectors, counts)
    return context


def channel_group(num_channels: int) -> int:
    """Channels of one pass of a LatentContext."""
    return -(-num_channels // CHANNEL_GROUPS)


def coarsest_of(codec: LatentCodec, latents: Tensor, units: list[float], seed: int = 0) -> list[float]:
    """Step sizes of quality 0 for a LatentContext of a codec, by its decoder's sensitivity; of latents (B, C, h, w) a few are
    decoded."""
    sensitivity = decoder_sensitivity(codec, latents[:_DECODED], seed)
    largest = _COARSEST * torch.tensor(units, dtype=torch.float64)
    return torch.minimum(coarsest_step_sizes(sensitivity), largest).tolist()


def channel_units(latents: Tensor) -> Tensor:
    """Units of a LatentContext for latents (B, C, h, w): (C,).

    The standard deviation; more where a channel's mean is so far from 0 that features within 3 deviations would be clipped.
    """
    channels = latents.movedim(1, 0).flatten(1)
    deviations = channels.std(1)
    return torch.maximum(deviations, (channels.mean(1).abs() + 3 * deviations) * ONE / LIMIT)


class EntropyTask(Task):
    """Bits per position of windows of latents at random step sizes, or of indices."""

    def __init__(
        self, config: TrainingConfig, network: Context, inputs: TaskInputs, accelerator: Accelerator
    ):
        self.codec = inputs.codec
        self.rounds = False
        windows, self.held_out = _windows(config, inputs.source, self.codec)
        super().__init__(config, network, windows, accelerator)

    @staticmethod
    def headline(terms: dict[str, float]) -> str:
        held_out = terms.get("held_out_bits_per_position")
        measured = "" if held_out is None else f", {held_out:.3f} held out"
        return f"{terms['bits_per_position']:.3f} bits per position{measured}"

    def resume(self, state: dict[str, Any], out: Path) -> None:
        before, now = state.get("space_fingerprint"), self.codec.space_fingerprint
        self.check_teacher(self.codec, before, now, "space fingerprint", out)

    def state_dict(self) -> dict[str, Any]:
        return {"space_fingerprint": self.codec.space_fingerprint}

    def begin_step(self, step: int) -> None:
        super().begin_step(step)  # seeds the draw of step sizes, too
        if not self.rounds and step >= int(ROUNDED_FROM * self.config.run.steps):
            self.rounds = True  # asked once: to look at the network's shifts waits for the device
            if not is_frozen(self.network):
                freeze_shifts(self.network)

    def loss(self, batch: Item, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        bits = self._bits(self.model, batch[0])
        return bits, {"bits_per_position": bits.detach()}

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """`held_out_bits_per_position`, of latents at the same step sizes each time."""
        if not len(self.held_out):
            return {}
        context, total = self.ema.module.eval(), 0.0
        count = min(len(self.held_out), _MEASURED)
        torch.manual_seed(self.config.run.seed)
        for positions in torch.arange(count).split(self.config.optimizer.batch_size):
            levels, _ = collate(self.held_out, positions.tolist())
            total += float(self._bits(context, levels)) * len(positions)
        return {"held_out_bits_per_position": total / count}

    def _bits(self, context, grids: Sequence[Tensor]) -> Tensor:
        """Code length of all levels or channels together, per position of the last level; a scalar."""
        *_, last = grids = [self.to_device(grid) for grid in grids]
        num_positions = len(last) * math.prod(last.shape[-2:])
        if isinstance(self.network, IndexContext):
            return context(grids).sum() / num_positions
        step_sizes = self.network.step_sizes()
        step_sizes = self.to_device(step_sizes[torch.randint(len(step_sizes), (len(last),))])
        quantized = torch.round(last / step_sizes[..., None, None])
        return context(quantized, step_sizes).sum() / num_positions


def _windows(
    config: TrainingConfig, source: EncodedImages, codec: LatentCodec
) -> tuple[GridWindows, GridWindows]:
    """Windows to train on, and held-out ones.

    Raises:
        ValueError: if the files are of another kind, or no image is large enough.
    """
    if source.is_discrete != codec.indices_suffice:
        raise ValueError(
            f"expected {'indices' if codec.indices_suffice else 'latents'} of {codec.name}, got files of "
            f"{'indices' if source.is_discrete else 'latents'}"
        )
    shapes = window_shapes(config, codec, len(codec.codebook_sizes) if source.is_discrete else 1)
    train, held_out = hold_out(source, config.data.held_out, config.run.seed)
    train = large_enough(config, source, train, shapes[0])
    held_out = large_enough(config, source, held_out, shapes[0], may_be_none=True)
    return tuple(GridWindows(source, numbers, shapes, seed=config.run.seed) for numbers in (train, held_out))
