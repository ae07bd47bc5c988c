"""Entropy models with context networks, in integers: see models/context_network.py for the order of passes.

quantized latents so far --multiply, shift--> 8-bit features --network--> mean and deviation --> table and offset
indices so far --embedding--> 8-bit features --network, fork--> a probability: the table
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from latent_codec.bitstream.checks import check, check_array
from latent_codec.bitstream.context_tables import DEVIATIONS_PER_OCTAVE, FRACTIONS, SMALLEST, mixture_tables
from latent_codec.bitstream.entropy_model import EntropyModel, Pass, Prediction, Shape
from latent_codec.bitstream.integer_inference import KERNELS, Arithmetic, IntegerLayer, IntegerNetwork
from latent_codec.bitstream.tables import Tables, pmf_to_quantized_cdf
from latent_codec.codec import LatentCodec
from latent_codec.models.context_network import (
    LIMIT,
    ONE,
    ContextPass,
    GridContext,
    IndexContext,
    LatentContext,
    fork_of,
    index_passes,
    latent_passes,
    with_margin,
)
from latent_codec.torch_settings import ignoring_caller_settings

LARGEST_MULTIPLIER = 1 << 28
"""Its product with a symbol, which is below 2^33, has 64 bits."""
LARGEST_LOGIT = 320
"""Of forks, times ONE: a probability of 2^-14.4."""
PRECISION = 16
"""Fractional bits of multipliers."""
LAYER_OF_PHASE = (0, 1, 1, 2, 3)
"""Of one level; of several levels each is a layer."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ContextEntropy(EntropyModel):
    """The common part of entropy models with context networks."""

    parts: ClassVar[dict[str, Any]] = {"networks": IntegerNetwork}

    networks: tuple[IntegerNetwork, ...]
    """One for each pass of `context_passes`."""
    arithmetic: Arithmetic = field(default_factory=Arithmetic)
    """Of the networks; not stored."""

    @property
    def context_passes(self) -> list[ContextPass]:
        raise NotImplementedError

    def _check_networks(self, outputs: Sequence[int], num_layers: int) -> None:
        """Raise ValueError for networks that do not fit their passes, or have other outputs or layers."""
        count = len(self.context_passes)
        check(len(self.networks) == count, f"{count} networks", len(self.networks))
        for network, each, num_outputs in zip(self.networks, self.context_passes, outputs):
            expected = each.num_inputs, num_outputs, num_layers
            got = network.inputs, network.outputs, len(network.layers)
            check(got == expected, f"a network of (inputs, outputs, layers) {expected}", got)

    def on(self, device: str = "cpu", kernel: str = "float32") -> "ContextEntropy":
        """The same model with its networks on a device, their sums in "float32" or "int32" (slow): results are the same."""
        check(kernel in KERNELS, f"a kernel of {', '.join(KERNELS)}", kernel)
        return replace(self, arithmetic=Arithmetic(device, KERNELS[kernel]))


@dataclass(frozen=True, kw_only=True, eq=False)
class LatentContextEntropy(ContextEntropy):
    """A context model of latents: a mean and a deviation for each (LatentContext)."""

    kind = "latent context"

    firsts: np.ndarray
    """int32: the first table of each deviation."""
    drops: np.ndarray
    """int32: low bits of the fraction that each deviation's tables ignore."""
    feature_multipliers: np.ndarray
    """int32 (num_step_sizes, C): features per step, times 2^16."""
    mean_multipliers: np.ndarray
    """int32 (num_step_sizes, C): sixteenths of a step per output of the networks, times 2^16."""
    deviation_offsets: np.ndarray
    """int32 (num_step_sizes, C): added to the networks' deviations in sixteenths of an octave, twice the deviation's number."""

    def __post_init__(self):
        super().__post_init__()
        check(not self.is_indices, "step sizes", "none")
        check_array(self.deviation_offsets, "deviation_offsets", np.int32, self.step_sizes.shape)
        for name in ("firsts", "drops", "feature_multipliers", "mean_multipliers"):
            array, is_multiplier = getattr(self, name), name.endswith("multipliers")
            shape = self.step_sizes.shape if is_multiplier else (len(self.firsts),)
            check_array(array, name, np.int32, shape)
            largest = LARGEST_MULTIPLIER if is_multiplier else np.iinfo(np.int32).max
            lowest, highest = array.min(initial=0), array.max(initial=0)
            check(0 <= lowest <= highest <= largest, f"{name} of 0 to {largest}", f"{lowest} to {highest}")
        last = self.firsts.astype(np.int64) + (FRACTIONS - 1 >> np.clip(self.drops, 0, 30))
        fits = len(last) > 0 and last.max() < len(self.tables)
        check(fits, f"deviations of tables below {len(self.tables)}", last.max(initial=0))
        self._check_networks([2 * each.num_channels for each in self.context_passes], num_layers=3)

    @property
    def num_channels(self) -> int:
        return self.step_sizes.shape[1]

    @cached_property
    def context_passes(self) -> list[ContextPass]:
        group = self.networks[1].outputs // 2 if len(self.networks) > 1 else 0
        fits = 0 < group <= self.num_channels
        check(fits, f"networks for groups of 1 to {self.num_channels} channels", group)
        return latent_passes(self.num_channels, group)

    def predictor(self, shapes: Sequence[Shape], step_size_index: int) -> "LatentPredictor":
        fits = len(shapes) == 1 and shapes[0][0] == self.num_channels
        check(fits, "values of the entropy model's shapes", list(shapes))
        return LatentPredictor(self, shapes[0], step_size_index)

    @classmethod
    @ignoring_caller_settings()
    def export(cls, context: LatentContext, codec: LatentCodec, rate_weight: float) -> "LatentContextEntropy":
        """Export a trained context model, for files quantized with this `rate_weight`."""
        weights = torch.softmax(context.component_weights.double(), 0).cpu().numpy()
        scales = torch.exp2(context.component_scales.double()).cpu().numpy()
        step_sizes = context.step_sizes().cpu().numpy()
        per_unit = step_sizes.astype(np.float64) / (np.array(context.config.units) / ONE)
        means = FRACTIONS / per_unit / 2**context.MEAN_EXPONENT
        per_octave = 2 * DEVIATIONS_PER_OCTAVE
        # Plus one half of a deviation's number, so that the shift rounds.
        deviations = -per_octave * (np.log2(per_unit) + SMALLEST) + 1
        return cls(
            **mixture_tables(weights, scales, rate_weight),
            space_fingerprint=codec.space_fingerprint,
            codec_name=codec.name,
            networks=tuple(map(IntegerNetwork.from_mlp, context.networks)),
            step_sizes=step_sizes,
            feature_multipliers=np.round(per_unit * 2**PRECISION).astype(np.int32),
            mean_multipliers=np.round(means * 2**PRECISION).astype(np.int32),
            deviation_offsets=np.round(deviations).astype(np.int32),
        )


class LatentPredictor:
    """Predicts one tile of quantized latents."""

    @ignoring_caller_settings()
    def __init__(self, model: LatentContextEntropy, shape: Shape, step_size_index: int):
        self._model, self._step_size_index = model, step_size_index
        self._context = GridContext(*shape[1:])
        self.passes = []
        for each in model.context_passes:
            channels = np.arange(each.channels.start, each.channels.stop)[:, None] * (shape[1] * shape[2])
            positions = (channels + self._context.positions(each).numpy()).reshape(-1)
            self.passes.append(Pass(0, positions, LAYER_OF_PHASE[each.phase]))

    @ignoring_caller_settings()
    def predict(self, number: int, symbols: Sequence[np.ndarray]) -> Prediction:
        model, index, each = self._model, self._step_size_index, self._model.context_passes[number]
        multipliers = model.feature_multipliers[index, :, None, None]
        features = _scaled(symbols[0], multipliers).clip(-LIMIT, LIMIT).astype(np.int32)
        x = self._context.inputs(each, with_margin(torch.from_numpy(features)))
        outputs = model.networks[number](x, model.arithmetic).cpu().numpy().astype(np.int64)
        means, deviations = outputs[: each.num_channels], outputs[each.num_channels :]
        means = _scaled(means, model.mean_multipliers[index, each.channels, None]) + FRACTIONS // 2
        offsets = means // FRACTIONS
        deviations = deviations + model.deviation_offsets[index, each.channels, None] >> 1
        deviations = deviations.clip(0, len(model.firsts) - 1)
        cdf_index = model.firsts[deviations] + (means - FRACTIONS * offsets >> model.drops[deviations])
        return Prediction(cdf_index.reshape(-1).astype(np.int64), offsets.reshape(-1))


@dataclass(frozen=True, kw_only=True, eq=False)
class IndexContextEntropy(ContextEntropy):
    """A context model of indices: a tree over each level's codewords (IndexContext).

    A symbol is an index's leaf. Table t is for a fork with P(right side) = sigmoid((t - LARGEST_LOGIT) / ONE).
    """

    kind = "index context"
    parts: ClassVar[dict[str, Any]] = {"networks": IntegerNetwork, "forks": IntegerLayer}

    forks: tuple[IntegerLayer, ...]
    """One for each level, a row for each fork: fork f is followed by 2 f + 1 and 2 f + 2."""
    embeddings: np.ndarray
    """int8 (codewords of all levels, E): each codeword's features."""
    leaves: np.ndarray
    """int32: the codeword of each leaf, -1 where there is none; all levels' trees, one after another."""

    def __post_init__(self):
        super().__post_init__()
        check(self.is_indices, "no step sizes for indices", "some")
        check_array(self.embeddings, "embeddings", np.int8, (None, None))
        check(not (self.embeddings < -LIMIT).any(), f"embeddings of at least {-LIMIT}", "others")
        check(len(self.forks) > 0, "forks of at least one level", "none")
        check_array(self.leaves, "leaves", np.int32, (sum(forks.outputs + 1 for forks in self.forks),))
        for tree in self.trees:
            present = np.sort(tree[tree >= 0])
            fits = not len(tree) & len(tree) - 1 and np.array_equal(present, np.arange(len(present)))
            check(fits, "trees of 2^depth leaves with each codeword once", "others")
        fits = sum(self.codebook_sizes) == len(self.embeddings)
        check(fits, f"embeddings of {self.codebook_sizes} codewords", len(self.embeddings))
        are_binary = (self.tables.sizes == 2).all() and not self.tables.minimums.any()
        check(are_binary and not self.tables.escapes.any(), "tables of the symbols 0 and 1", "others")
        check(len(self.tables) % 2 == 1, "an odd number of tables", len(self.tables))
        self._check_networks([self.forks[each.level].inputs for each in self.context_passes], num_layers=2)

    @cached_property
    def context_passes(self) -> list[ContextPass]:
        return index_passes(len(self.forks), self.embeddings.shape[1])

    @cached_property
    def trees(self) -> list[np.ndarray]:
        """Of each level: the codeword of each leaf, -1 where there is none."""
        sizes = [forks.outputs + 1 for forks in self.forks]
        return np.split(self.leaves, np.cumsum(sizes)[:-1])

    @cached_property
    def depths(self) -> list[int]:
        """Of each level's tree: binary digits of a leaf's number."""
        return [(len(tree) - 1).bit_length() for tree in self.trees]

    @cached_property
    def codebook_sizes(self) -> list[int]:
        return [int((tree >= 0).sum()) for tree in self.trees]

    @cached_property
    def _leaf_of_codeword(self) -> list[np.ndarray]:
        return [np.argsort(np.where(tree < 0, len(tree), tree), kind="stable") for tree in self.trees]

    @cached_property
    def leaf_features(self) -> list[Tensor]:
        """int32 (2^depth, E) of each level: the features of each leaf's codeword, 0 where there is none."""
        found = []
        firsts = np.cumsum([0, *self.codebook_sizes])
        for tree, first in zip(self.trees, firsts):
            rows = np.where(tree[:, None] >= 0, self.embeddings[first + np.maximum(tree, 0)], 0)
            found.append(torch.from_numpy(rows.astype(np.int32)))
        return found

    def to_symbols(self, values: Sequence[np.ndarray]) -> list[np.ndarray]:
        for level, (indices, size) in enumerate(zip(values, self.codebook_sizes)):
            if indices.size and not 0 <= indices.min() <= indices.max() < size:
                got = f"{indices.min()} to {indices.max()}"
                raise ValueError(f"expected indices of 0 to {size - 1} on level {level}, got {got}")
        return [leaves[indices] for leaves, indices in zip(self._leaf_of_codeword, values)]

    def from_symbols(self, symbols: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [tree[leaves].astype(np.int64) for tree, leaves in zip(self.trees, symbols)]

    def predictor(self, shapes: Sequence[Shape], step_size_index: int) -> "IndexPredictor":
        fits = len(shapes) <= len(self.forks) and all(shape[0] == 1 for shape in shapes)
        check(fits, "values of the entropy model's shapes", list(shapes))
        return IndexPredictor(self, shapes)

    @classmethod
    @ignoring_caller_settings()
    def export(cls, context: IndexContext, codec: LatentCodec) -> "IndexContextEntropy":
        """Export a trained context model."""
        levels = range(len(context.config.codebook_sizes))
        probabilities = 1 / (1 + np.exp(-np.arange(-LARGEST_LOGIT, LARGEST_LOGIT + 1) / ONE))
        starts = list(pmf_to_quantized_cdf(np.stack([1 - probabilities, probabilities], 1)))
        embeddings = torch.cat([context.integer_embedding(level) for level in levels])
        return cls(
            tables=Tables.concatenate(starts, [0] * len(starts), escapes=False),
            space_fingerprint=codec.space_fingerprint,
            codec_name=codec.name,
            networks=tuple(map(IntegerNetwork.from_mlp, context.networks)),
            forks=tuple(map(IntegerLayer.from_linear, context.forks)),
            embeddings=embeddings.cpu().numpy().astype(np.int8),
            leaves=torch.cat([context.tree(level) for level in levels]).numpy().astype(np.int32),
        )


class IndexPredictor:
    """Predicts one tile of indices, whose symbols are leaves of trees."""

    @ignoring_caller_settings()
    def __init__(self, model: IndexContextEntropy, shapes: Sequence[Shape]):
        self._model = model
        self._contexts = [GridContext(*shape[1:]) for shape in shapes]
        self._last, self._hidden = None, None
        self.passes, self._networks = [], []
        for number, each in enumerate(model.context_passes):
            if each.level < len(shapes):
                positions = self._contexts[each.level].positions(each).numpy()
                layer = LAYER_OF_PHASE[each.phase] if len(model.forks) == 1 else each.level
                for bit in reversed(range(model.depths[each.level])):
                    self.passes.append(Pass(each.level, positions, layer, bit))
                    self._networks.append(number)

    @ignoring_caller_settings()
    def predict(self, number: int, symbols: Sequence[np.ndarray]) -> Prediction:
        model, each = self._model, self.passes[number]
        if self._last != self._networks[number]:
            self._last = self._networks[number]
            context_pass = model.context_passes[self._last]
            upper = self._features(each.level - 1, symbols) if each.level else None
            features = with_margin(self._features(each.level, symbols), upper)
            x = self._contexts[each.level].inputs(context_pass, features)
            self._hidden = model.networks[self._last](x, model.arithmetic)
        leaves = symbols[each.level].reshape(-1)[each.positions]
        forks = fork_of(leaves, each.bit, model.depths[each.level])
        logits = model.forks[each.level].rows(forks, self._hidden, model.arithmetic)
        largest = len(model.tables) // 2
        cdf_index = logits.cpu().numpy().astype(np.int64).clip(-largest, largest) + largest
        return Prediction(cdf_index, np.zeros_like(cdf_index))

    def _features(self, level: int, symbols: Sequence[np.ndarray]) -> Tensor:
        """int32 (E, h, w)."""
        return self._model.leaf_features[level][torch.from_numpy(symbols[level][0])].movedim(-1, 0)


def _scaled(values: np.ndarray, multipliers: np.ndarray) -> np.ndarray:
    """values multipliers / 2^PRECISION, rounded to the nearest, halves up."""
    return values * multipliers.astype(np.int64) + (1 << PRECISION - 1) >> PRECISION
